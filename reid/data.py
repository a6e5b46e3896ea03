"""Re-identification sets: Market-1501's form, DukeMTMC-reID, MSMT17, and digits.

A set is three lists of images with an identity and a camera each. Train and evaluation have
different people in all of them but `digits`.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from harness.files import expanded
from harness.imagefiles import open_image
from utils import UserError

SETS = ("market1501", "dukemtmc", "msmt17", "digits")
DIGITS = Path(__file__).parent.parent / "harness" / "digits.npz"
CAMERAS = 3  # made up, for digits
NAME = re.compile(r"(-1|\d{1,9})_c(\d{1,9})\D.*")  # <pid>_c<camera>..., as 0002_c1s1_000451_03.jpg


class Images(NamedTuple):
    images: list | np.ndarray  # N paths, or (N, H, W, 3) uint8
    ids: np.ndarray  # (N,) int64
    cameras: np.ndarray  # (N,) int64


class ReIDSet(NamedTuple):
    train: Images
    query: Images
    gallery: Images
    note: str  # one line for the log: what the set is


def load(name, root=None):
    """The ReIDSet `name`, one of SETS, of the folder `root`; digits need none.

    Raises UserError where it is unknown, missing or cannot be evaluated.
    """
    if name not in SETS:
        raise UserError(f"unknown set {name!r}: use one of {', '.join(SETS)}")
    if name == "digits":
        return read_digits()
    if root is None:
        raise UserError(f"{name} is read from a folder: give --data")
    root = expanded(root)
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give the one that holds the images")
    try:
        return read_msmt17(root) if name == "msmt17" else read_market(root)
    except OSError as error:
        raise UserError(f"{root} cannot be read ({error.strerror}): check the folder") from error


def read_market(root):
    """Market-1501 and DukeMTMC-reID: bounding_box_train, query, bounding_box_test.

    Names are `<pid>_c<camera>...jpg`; pid -1 is junk and 0 a distractor, and neither is trained on.
    """
    root = Path(root)
    folders = [root / name for name in ("bounding_box_train", "query", "bounding_box_test")]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{root} has no folder {folder.name}: give the root of the data set")
    train, query, gallery = (_folder(folder) for folder in folders)
    if (query.ids == 0).any():
        name = query.images[int(np.flatnonzero(query.ids == 0)[0])]
        raise UserError(f"{name} is of identity 0, a distractor, which no query is: remove it")
    train = select(train, np.flatnonzero(train.ids > 0))
    return checked(ReIDSet(train, query, gallery, f"{root}: names as of Market-1501"))


def _folder(folder):
    files = sorted(
        path for path in folder.iterdir()
        if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")
    )  # fmt: skip
    ids, cameras = [], []
    for path in files:
        match = NAME.fullmatch(path.name)
        if match is None:
            raise UserError(f"{path} is not named PID_cCAMERA...: rename or remove it")
        ids.append(int(match[1]))
        cameras.append(int(match[2]))
    return _images(list(map(str, files)), ids, cameras)


def read_msmt17(root):
    """MSMT17, of either version: list_train.txt and list_val.txt (both trained on), list_query.txt,
    list_gallery.txt, in lines of `path pid`; the camera is the third field of the file's name.

    Identities are counted from 1 here: in the lists 0 is a person, not a distractor.
    """
    root = Path(root)
    parts = []
    for names, folders in (
        (("list_train.txt", "list_val.txt"), ("train", "mask_train_v2")),
        (("list_query.txt",), ("test", "mask_test_v2")),
        (("list_gallery.txt",), ("test", "mask_test_v2")),
    ):
        there = [root / folder for folder in folders if (root / folder).is_dir()]
        if not there:
            raise UserError(f"{root} has no folder {folders[0]}: give the root of the data set")
        lines = [entry for name in names for entry in _list(root / name, there[0])]
        parts.append(_images(*(list(column) for column in zip(*lines, strict=True))))
    return checked(ReIDSet(*parts, f"{root}: lists as of MSMT17"))


def _list(file, folder):
    """(path, id, camera) of each line."""
    if not file.is_file():
        raise UserError(f"{file} is missing: give the root of the data set")
    entries = []
    try:
        lines = file.read_text().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{file} is no text: give lines of `path pid`") from None
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(\S+)\s+(\d{1,9})\s*", line)
        camera = match and re.fullmatch(r"[^_]*_[^_]*_(\d{1,9})_.*", Path(match[1]).name)
        if not camera:
            raise UserError(f"{file}, line {i}, is not `path pid` with the camera in the third "
                            "field of the name: mend it")  # fmt: skip
        if not (folder / match[1]).exists():  # now, not after the epochs before a retrieval
            raise UserError(f"{file}, line {i}: there is no {folder / match[1]}: restore it")
        entries.append((str(folder / match[1]), int(match[2]) + 1, int(camera[1])))
    if not entries:
        raise UserError(f"{file} is empty: give lines of `path pid`")
    return entries


def read_digits(file=DIGITS):
    """Handwritten digits, to try things: the classes stand for identities, cameras are made up.

    Digit d is identity d + 1; train, query and gallery have the same ten and no image in common
    (the test images are halved by query and gallery). Camera 2 is darker and of less contrast,
    camera 3 brighter and shifted by a pixel. Images (N, 16, 16, 3) uint8.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            grey, digits, test = stored["images"], stored["labels"].astype(int), stored["test"]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{file} cannot be read as digits ({type(error).__name__}): "
                        "restore it") from error  # fmt: skip
    of_class = np.empty(len(digits), int)  # the how-many-th image of its digit, in train or test
    in_test = np.isin(np.arange(len(digits)), test)
    for part in (in_test, ~in_test):
        for digit in range(10):
            own = np.flatnonzero(part & (digits == digit))
            of_class[own] = np.arange(len(own))
    cameras = of_class % CAMERAS + 1
    is_query = in_test & (of_class // CAMERAS % 2 == 0)
    everything = _images(_seen(grey, cameras), digits + 1, cameras)
    parts = [
        select(everything, np.flatnonzero(part))
        for part in (~in_test, is_query, in_test & ~is_query)
    ]
    note = "digits: classes stand for identities, cameras are made up; no figure of a person"
    return checked(ReIDSet(*parts, note))


def _seen(grey, cameras):
    """8x8 digits of 0..16 as the made-up cameras show them: (N, 16, 16, 3) uint8."""
    x = torch.from_numpy(grey)[:, None].float() / 16
    x = F.interpolate(x, (16, 16), mode="bilinear")[:, 0].numpy()  # (N, 16, 16), 0..1
    second, third = (cameras == 2)[:, None, None], (cameras == 3)[:, None, None]
    x = np.where(second, 0.1 + 0.5 * x, x)
    x = np.where(third, 0.3 + 0.7 * np.roll(x, 1, axis=2), x)
    return np.repeat((255 * x).round().astype(np.uint8)[..., None], 3, axis=3)


def checked(data):
    """`data`; UserError where it is empty, of one camera, or no query has a match."""
    for name, part in zip(data._fields, data[:3], strict=False):
        if not len(part.ids):
            raise UserError(f"there are no {name} images ({data.note}): add some")
    cameras = np.union1d(data.query.cameras, data.gallery.cameras)
    if len(cameras) < 2:
        raise UserError(f"all query and gallery images are of camera {cameras[0]}: a match is by "
                        "another camera, so it takes two")  # fmt: skip
    if not has_match(data.query, data.gallery).any():
        raise UserError("no query has an image by another camera in the gallery: check the names")
    return data


def digest(data):
    """A hash of names, identities and cameras, by which a resumed run knows its data."""
    found = hashlib.sha256()
    for part in data[:3]:
        if isinstance(part.images, list):
            found.update(b"\n".join(os.fsencode(Path(path).name) for path in part.images))
        found.update(part.ids.tobytes() + part.cameras.tobytes())
    return found.hexdigest()[:16]


def without_junk(images):
    """The Images but those of identity -1, which no ranking has."""
    return select(images, np.flatnonzero(images.ids != -1))


def has_match(query, gallery):
    """(Q,) bool: which queries have an image by another camera in the gallery; junk (-1) has none.

    query, gallery: Images.
    """
    cameras = {}  # of each identity
    for identity, camera in zip(gallery.ids.tolist(), gallery.cameras.tolist(), strict=True):
        cameras.setdefault(identity, set()).add(camera)
    pairs = zip(query.ids.tolist(), query.cameras.tolist(), strict=True)
    others = [cameras.get(identity, set()) - {camera} for identity, camera in pairs]
    return np.array([bool(its) for its in others], bool) & (query.ids != -1)


def labels(ids):
    """(labels (N,) 0 to classes - 1, identities (classes,)) of ids (N,), for the classifier."""
    identities, numbers = np.unique(ids, return_inverse=True)
    return numbers.astype(np.int64), identities


def select(images, index):
    """The Images at these indices."""
    return _images([images.images[i] for i in index] if isinstance(images.images, list)
                   else images.images[index], images.ids[index], images.cameras[index])  # fmt: skip


def halves(images, seed=0, least=2):
    """(for the weights, for alphas, identities left out): each identity's images in two halves.

    A draw from `seed` halves them; of an odd number the weights have one more. Identities with
    fewer than `least` images for a half are in neither, so that both have the same identities.
    Raises UserError where fewer than two identities are left.
    """
    draw = np.random.default_rng(seed)
    first, second, out = [], [], []
    for identity in np.unique(images.ids):
        own = draw.permutation(np.flatnonzero(images.ids == identity))
        if len(own) < 2 * least:
            out.append(int(identity))
            continue
        first.append(own[: -(-len(own) // 2)])
        second.append(own[-(-len(own) // 2) :])
    if len(first) < 2:
        raise UserError(f"a search halves the images of each identity: {len(first)} identities "
                        f"have the {2 * least} images that it takes, give two or more")  # fmt: skip
    parts = [select(images, np.sort(np.concatenate(part))) for part in (first, second)]
    return *parts, out


def decode(image, height, width):
    """An image, a path or (H, W, 3) uint8, as (height, width, 3) uint8; UserError if broken."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else open_image(image)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(image)


def _images(images, ids, cameras):
    return Images(images, np.asarray(ids, np.int64), np.asarray(cameras, np.int64))
