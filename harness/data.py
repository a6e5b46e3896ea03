"""CIFAR-size images: the sets, the halves of a search, and batches that are made on the device.

A set is small enough to live on the device as uint8. Crop, flip, normalization and cutout run there
on whole batches, each image with its own draw from the distribution of the torchvision transforms.
"""

import contextlib
import hashlib
import io
import math
import os
import socket
import tempfile
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, extract_archive

import utils
from harness import distributed
from harness.files import expanded
from harness.imagefiles import class_names, image_files, read, reason
from utils import UserError

SETS = ("cifar10", "cifar100", "digits", "folder")
CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
STATISTICS = {  # mean and std of the training images, as in the released code
    "cifar10": (utils.CIFAR_MEAN, utils.CIFAR_STD),
    "cifar100": (utils.CIFAR100_MEAN, utils.CIFAR100_STD),
}
TIMEOUT = 10.0  # seconds without an answer after which a download fails; torchvision sets none


class Images(NamedTuple):
    images: torch.Tensor  # (N, H, W, 3) uint8
    labels: torch.Tensor  # (N,) int64


class DataSet(NamedTuple):
    train: Images
    test: Images
    classes: list[str]
    mean: tuple[float, float, float]  # of the training images scaled to 0..1
    std: tuple[float, float, float]
    flip: bool  # whether a mirrored image is still of its class


def load(
    name: str,
    root: str | os.PathLike,
    input_size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
) -> DataSet:
    """Read the set `name`, one of SETS, from the folder `root` (digits comes with this file).

    input_size: height and width in pixels, 8 or more; None is 32, for digits 16. folder reads
    root/train/CLASS and root/test/CLASS (or root/val/CLASS); CIFAR is downloaded when missing.
    mean, std: "R,G,B" in the place of those of the training images (CIFAR: as published).
    Raises UserError where the set is unknown, missing, corrupted or incomplete.
    """
    dataset = _load(name, root, input_size)
    given = {"mean": mean, "std": std}
    given = {k: tuple(map(float, v.split(","))) for k, v in given.items() if v is not None}
    if min(given.get("std", (1,))) <= 0:
        raise UserError(f"--std {std}: give numbers above 0")
    return dataset._replace(**given)


def _load(name, root, input_size):
    if name not in SETS:
        raise UserError(f"unknown set {name!r}: use one of {', '.join(SETS)}")
    if input_size is not None and input_size < 8:
        raise UserError(f"input_size {input_size} is too small: use 8 or more")
    size = input_size or default_side(name)
    if name == "digits":
        return _digits(size)
    root = expanded(root)
    try:
        if root.exists() and not root.is_dir():
            raise UserError(f"{root} is a file: give the folder that holds the images")
        return _folder(root, size) if name == "folder" else _cifar(name, root, size)
    except OSError as error:
        raise UserError(f"{root} cannot be read ({reason(error)}): check the folder") from error


def default_side(name):
    """Height and width in pixels of the images of a set where --input_size is not given."""
    return 16 if name == "digits" else 32


def counts(images: Images) -> tuple[int, int]:
    """(fewest, most) images of a class that is there."""
    per_class = images.labels.bincount()
    return int(per_class.min()), int(per_class.max())


def digest(dataset: DataSet) -> str:
    """A hash of all pixels and labels, by which a resumed run knows its data."""
    found = hashlib.sha256()
    for part in (*dataset.train, *dataset.test):
        found.update(part.contiguous().numpy())
    return found.hexdigest()[:16]


def halves(images: Images, train_portion: float) -> tuple[Images, Images]:
    """Split into the first floor(train_portion * N) images and the rest, without a copy.

    Raises UserError where either would be empty.
    """
    total = len(images.labels)
    split = math.floor(train_portion * total) if 0 <= train_portion <= 1 else 0
    if not 0 < split < total:
        raise UserError(
            f"train_portion {train_portion} of {total} images leaves a half empty: use 0.5 or so"
        )
    return Images(*(t[:split] for t in images)), Images(*(t[split:] for t in images))


def _cifar(name: str, root: Path, size: int) -> DataSet:
    kind = CIFAR[name]
    try:
        try:
            parts = [kind(root, train=train) for train in (True, False)]
        except RuntimeError:  # missing or corrupted: torchvision compares the md5 of every file
            _fetch(kind, root)
            parts = [kind(root, train=train) for train in (True, False)]
    except (OSError, RuntimeError, HTTPException) as error:
        raise UserError(
            f"{root} holds no intact {name} and it could not be downloaded ({reason(error)}): put "
            f"{kind.filename} there, or use --set digits (needs no network) or --set folder"
        ) from error
    arrays = [part.data if size == 32 else read(part.data, size) for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    train, test = (Images(torch.from_numpy(arrays[i]), labels[i]) for i in range(2))
    return DataSet(train, test, list(parts[0].classes), *STATISTICS[name], flip=True)


def _fetch(kind: type[CIFAR10], root: Path) -> None:
    """Unpack the archive that lies in `root`, or download it; what fails leaves nothing behind."""
    root = root.absolute()
    archive, folder = root / kind.filename, root / kind.base_folder
    there = next(path for path in (root, *root.parents) if path.exists())
    scratch = tempfile.TemporaryDirectory(prefix=".download-", dir=there)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with scratch as unpacked, contextlib.redirect_stdout(io.StringIO()):
            if check_integrity(archive, kind.tgz_md5):
                extract_archive(archive, unpacked)
            else:
                kind(unpacked, download=True)
            folder.mkdir(parents=True, exist_ok=True)
            for file in Path(unpacked, kind.base_folder).iterdir():
                file.replace(folder / file.name)  # on the same file system: all of it or nothing
    finally:
        socket.setdefaulttimeout(timeout)


def _digits(size: int) -> DataSet:
    """8x8 digits with values 0..16, enlarged; digits.npz tells their source and licence."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        images, labels, test = (torch.from_numpy(file[k]) for k in ("images", "labels", "test"))
    images = F.interpolate(images[:, None].float(), (size, size), mode="bilinear")  # (N, 1, H, W)
    images = (images * 255 / 16).round().byte().permute(0, 2, 3, 1).repeat(1, 1, 1, 3)
    labels, test = labels.long(), test.long()
    is_train = torch.ones(len(labels), dtype=torch.bool).index_fill(0, test, False)
    train = is_train.nonzero()[:, 0]
    train = train[_fixed_order(len(train))]
    train, test = (Images(images[index], labels[index]) for index in (train, test))
    return DataSet(train, test, list("0123456789"), *_statistics(train.images), flip=False)


def _folder(root: Path, size: int) -> DataSet:
    if not root.exists():
        raise UserError(f"{root} does not exist: give the folder that holds train and test")
    train, test = root / "train", root / "test"
    if not test.is_dir():
        test = root / "val"
    for folder, what in ((train, "train"), (test, "test or val")):
        if not folder.is_dir():
            raise UserError(
                f"{root} has no {what} folder: put images there as train/CLASS and test/CLASS"
            )
    classes = class_names(train, test)
    samples, tests = image_files(train, classes), image_files(test, classes)
    samples = [samples[i] for i in _fixed_order(len(samples)).tolist()]
    parts = []
    for paths, labels in (zip(*part, strict=True) for part in (samples, tests)):
        parts.append(Images(torch.from_numpy(read(paths, size)), torch.tensor(labels)))
    return DataSet(*parts, classes, *_statistics(parts[0].images), flip=True)


def _fixed_order(total: int) -> torch.Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))


def _statistics(images: torch.Tensor) -> tuple[tuple, tuple]:
    """Mean and std per channel of (N, H, W, 3) uint8 scaled to 0..1, from float64 histograms."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(-1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        means.append((share @ values).item())
        stds.append((share @ (values - means[-1]) ** 2).sqrt().item())
    return tuple(means), tuple(max(std, 1 / 255) for std in stds)  # a constant channel has std 0


def check_images(state: dict, total: int) -> None:
    """Raises UserError where the state of a loader is of another number of images."""
    if state["images"] != total:
        raise UserError(
            f"the checkpoint is of {state['images']} images, not {total}: "
            "resume with the data of the run"
        )


def normalized(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 as ToTensor and Normalize do; channels_last."""
    x = x.permute(0, 3, 1, 2).float()  # without a copy of the bytes
    return x.div_(255).sub_(mean).div_(std)


class Batches:
    """A loader that lives on the device: shuffles, crops, flips, normalizes and cuts out there.

    An iteration is a new epoch, but the first after load_state_dict goes on where the state was
    taken. All random numbers come from `generator`, on the CPU: the same on every device. Among
    several processes each takes its share of every batch.
    `what` names the images in messages. Raises UserError where batch_size does not fit.
    """

    def __init__(
        self,
        images: Images,
        dataset: DataSet,
        batch_size: int,
        device: torch.device | str,
        augment: bool = False,
        shuffle: bool = False,
        cutout_length: int = 0,
        seed: int = 0,
        what: str = "data set",
    ):
        total = len(images.labels)
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is too small: use --batch_size 1 or more")
        if batch_size > total:
            raise UserError(
                f"batch_size {batch_size} is larger than the {total} images of the {what}; "
                f"use --batch_size {total} or less"
            )
        side = min(images.images.shape[1:3])
        if cutout_length == 1 or cutout_length // 2 >= side:
            does = "cuts nothing out of" if cutout_length == 1 else "blanks the whole of"
            raise UserError(f"--cutout_length {cutout_length} {does} an image of {side} pixels: "
                            f"give 2 to {2 * side - 1}, half the side perhaps")  # fmt: skip
        self.device = torch.device(device)
        self.images, self.labels = (t.to(self.device) for t in images)
        self.mean = torch.tensor(dataset.mean, device=self.device).view(3, 1, 1)
        self.std = torch.tensor(dataset.std, device=self.device).view(3, 1, 1)
        self.flip, self.batch_size, self.augment = dataset.flip, batch_size, augment
        self.shuffle, self.cutout_length = shuffle, cutout_length
        self.generator = torch.Generator().manual_seed(seed)
        self.order = None  # (N,) the permutation of the epoch; None between epochs
        self.position = 0  # how many of it were handed out
        self.resumed = False

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        """One epoch of x (B, 3, H, W) float32, channels_last, and y (B,); the last may be short."""
        if self.order is None or not self.resumed:
            self.order, self.position = torch.arange(len(self.labels)), 0
            if self.shuffle:
                self.order = torch.randperm(len(self.labels), generator=self.generator)
        self.resumed = False
        while self.order is not None:
            index = self.order[self.position : self.position + self.batch_size]
            self.position += len(index)
            if self.position >= len(self.order):
                self.order = None  # before the last batch leaves: the next one is of a new epoch
            yield self._batch(index)

    def smallest(self):
        """The fewest images that a process has in a step of a training."""
        fewest = len(self.labels) % self.batch_size or self.batch_size
        return max(1, fewest // distributed.world_size())

    def forever(self):
        """Batches without end, epoch after epoch."""
        while True:
            yield from self

    def state_dict(self) -> dict:
        """What load_state_dict needs to go on after the last batch handed out."""
        state = {"generator": self.generator.get_state(), "images": len(self.labels)}
        return state | {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state` at the next iteration; UserError if its number of images differs."""
        check_images(state, len(self.labels))
        self.generator.set_state(state["generator"].cpu())
        self.order = state["order"] if state["order"] is None else state["order"].cpu()
        self.position, self.resumed = state["position"], True

    def _batch(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size, (height, width) = len(index), self.images.shape[1:3]
        pad = height // 8  # 4 at 32 pixels
        draws = [index]
        if self.augment:  # always all five, so that no option moves the numbers of another
            for high in (2 * pad + 1, 2 * pad + 1, 2, height, width):
                draws.append(torch.randint(high, (size,), generator=self.generator))
        draws = torch.stack(draws)
        if size >= distributed.world_size() or not self.shuffle:
            draws = draws[:, distributed.rank() :: distributed.world_size()]
            size = draws.shape[1]  # may be 0 in evaluation
        if self.device.type == "cuda":
            draws = draws.pin_memory()  # one copy that the host does not wait for
        index, *draws = draws.to(self.device, non_blocking=True).unbind()
        x = self.images[index]  # (B, H, W, 3) uint8
        if self.augment:
            dy, dx, mirrored, *centre = (draw[:, None] for draw in draws)  # (B, 1) each
            pixels = [torch.arange(n, device=self.device) for n in (height, width)]
            rows, columns = pixels[0] + dy, pixels[1] + dx  # (B, H), (B, W)
            if self.flip:
                columns = torch.where(mirrored.bool(), columns.flip(1), columns)
            batch = torch.arange(size, device=self.device)[:, None, None]
            x = F.pad(x, (0, 0, pad, pad, pad, pad))[batch, rows[:, :, None], columns[:, None, :]]
        x = normalized(x, self.mean, self.std)
        if self.augment and self.cutout_length > 0:  # DeVries and Taylor, arXiv:1708.04552
            half = self.cutout_length // 2
            rows, columns = (  # (B, H), (B, W): which the square covers; the border clips it
                (p >= c - half) & (p < c + half) for p, c in zip(pixels, centre, strict=True)
            )
            x.masked_fill_(rows[:, None, :, None] & columns[:, None, None, :], 0.0)
        return x, self.labels[index]
