"""ImageNet-size images: read, cropped and flipped by worker processes, normalized on the device.

Two layouts, as the published scripts have them: DIR/imagenet/{train,val}/CLASS/*, or for a search
DIR/imagenet_search/{train,val}/CLASS/*. Where only the first is there, a search draws its subset
by itself, as lists of files. What an image looks like in an epoch depends on the seed, the epoch
and its place in the data set alone, not on the number of workers or processes.
"""

import codecs
import copy
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import Counter

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from harness import data, distributed, imagefiles
from harness.files import expanded
from utils import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN_SHARE, VALID_SHARE = 0.1, 0.025  # of each class, in the published search
SPLIT = ("split_train.txt", "split_val.txt")


class Files(Dataset):
    """Image files in a folder, with labels; item (i, seed) is image i, transformed with the random
    numbers of this seed.

    paths: relative to the folder. An image that cannot be read is returned as the UserError.
    """

    def __init__(self, folder, paths, labels, classes):
        self.folder, self.classes, self.transform = str(folder), classes, None
        # One array each, not a million objects: workers share them without a copy.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels)

    def transformed(self, transform):
        """The same files with another transform, of PIL images."""
        files = copy.copy(self)
        files.transform = transform
        return files

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        i, seed = item
        try:
            image = imagefiles.open_image(os.path.join(self.folder, os.fsdecode(self.paths[i])))
        except UserError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not those of the GPUs
            image = self.transform(image)
        return torch.from_numpy(np.array(image)), int(self.labels[i])  # (H, W, 3) uint8


def train_transform(size, jitter):
    """As published: a random part of the image at size x size, mirrored or not, colours moved."""
    colours = [T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2)]
    crop = [T.RandomResizedCrop(size), T.RandomHorizontalFlip()]
    return T.Compose(crop + colours * jitter)


def test_transform(size):
    """As published: the centre of the image; 256 -> 224 pixels, and in proportion."""
    return T.Compose([T.Resize(round(size * 256 / 224)), T.CenterCrop(size)])


def load(root):
    """(training images, validation images) of root/imagenet, or of root, as Files.

    Raises UserError where they are missing or their classes differ.
    """
    folder = _full(root)
    train, val = folder / "train", folder / "val"
    if not val.is_dir():
        raise UserError(f"{folder} has no val folder: put the validation images there, by class")
    classes = imagefiles.class_names(train, val)
    return read_files(train, classes), read_files(val, classes)


def load_search(root, split=None, seed=0):
    """(images for the weights, images for alphas and betas) of a search, as Files.

    Those of root/imagenet_search; or, where it is missing, the published shares of every class of
    root/imagenet/train: of the lists `split`, or drawn by `seed`. Raises UserError.
    """
    folder = expanded(root) / "imagenet_search"
    if split is None and folder.is_dir():
        train, val = folder / "train", folder / "val"
        for part in (train, val):
            if not part.is_dir():
                raise UserError(f"{folder} has no {part.name} folder: put images there, by class")
        classes = imagefiles.class_names(train, val)
        return read_files(train, classes), read_files(val, classes)
    folder = _full(root) / "train"
    classes = imagefiles.class_names(folder)
    there = read_files(folder, classes)
    names = [os.fsdecode(path) for path in there.paths]
    if split is None:
        parts = draw_split(names, there.labels.tolist(), classes, seed)
    else:
        parts = read_split(split)
    return check_split(parts, dict(zip(names, there.labels.tolist(), strict=True)), folder, classes)


def draw_split(names, labels, classes, seed):
    """Two disjoint lists of names: 10 % and 2.5 % of each class, rounded down, but one at least.

    By the hash of seed and name, so it is the same on every machine and in any order of `names`.
    """
    by_class = [[] for _ in classes]
    for name, label in zip(names, labels, strict=True):
        if "\n" in name:
            raise UserError(f"{name!r} has a line break in its name: rename it")
        by_class[label].append(name)
    parts = [], []
    for name, members in zip(classes, by_class, strict=True):
        if len(members) < 2:
            raise UserError(f"class {name!r} has one image: a search needs two or more of each")
        members.sort(key=lambda member: (_hash(seed, member), member))
        shares = TRAIN_SHARE, VALID_SHARE
        train, valid = (max(1, int(share * len(members) + 1e-9)) for share in shares)
        parts[0].extend(members[:train])
        parts[1].extend(members[train : train + valid])
    return parts


def _hash(seed, name):
    return hashlib.sha256(os.fsencode(f"{seed}/{name.replace(os.sep, '/')}")).digest()


def check_split(parts, labels, folder, classes):
    """The two lists of names as Files of `folder`; labels: {name: label} of what is there.

    Raises UserError where a file is missing, listed twice, or a class has no image in a list.
    """
    seen = set()
    for name in (name for part in parts for name in part):
        if name not in labels:
            raise UserError(f"{folder} has no image {name}: the split is of another data set")
        if name in seen:
            raise UserError(f"{name} is listed twice in the split: the lists must be disjoint")
        seen.add(name)
    files = []
    for part, list_name in zip(parts, SPLIT, strict=True):
        counts = Counter(labels[name] for name in part)
        for label, class_name in enumerate(classes):
            if not counts[label]:
                raise UserError(f"{list_name} has no image of class {class_name!r}: add one")
        files.append(Files(folder, part, [labels[name] for name in part], classes))
    return tuple(files)


def read_split(path):
    """The two lists of an earlier search: of its folder, or beside `path`, one of the lists."""
    path = expanded(path)
    if not path.is_dir() and path.name not in SPLIT:
        raise UserError(f"--split {path}: give {SPLIT[0]} of an earlier search, or its folder")
    parts = []
    for name in SPLIT:
        file = (path if path.is_dir() else path.parent) / name
        try:
            lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
        except OSError as error:
            raise UserError(f"--split: cannot read {file} ({error}): give another") from None
        lines = [os.fsdecode(line.removesuffix(b"\r")) for line in lines]
        parts.append([line.replace("/", os.sep) for line in lines if line])
    return parts


def write_split(files, folder):
    """The names of the two Files as two lists in `folder`, one name a line, relative, with /.

    None are written where they lie in two folders, as published.
    """
    if files[0].folder != files[1].folder:
        return
    for part, name in zip(files, SPLIT, strict=True):
        lines = (os.fsdecode(path).replace(os.sep, "/") + "\n" for path in part.paths)
        (folder / name).write_bytes(b"".join(map(os.fsencode, lines)))


def digest(*parts):
    """A hash of the names of all images of some Files, by which a resumed run knows its data."""
    found = hashlib.sha256()
    for files in parts:
        found.update(b"\n".join(files.paths.tolist()) + b"\0" + files.labels.tobytes())
    return found.hexdigest()[:16]


def counts(files):
    """(fewest, most) images of a class."""
    per_class = np.bincount(files.labels, minlength=len(files.classes))
    return int(per_class.min()), int(per_class.max())


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _full(root):
    root = expanded(root)
    for folder in (root / "imagenet", root):
        if (folder / "train").is_dir():
            return folder
    hint = "give another --tmp_data_dir (test.py: --data)"
    raise UserError(f"{root} has no imagenet/train folder: {hint}")


def read_files(folder, classes):
    """All images of these class folders as Files; UserError where a class has none."""
    samples = imagefiles.image_files(folder, classes)
    paths = [os.path.relpath(path, folder) for path, _ in samples]
    return Files(folder, paths, [label for _, label in samples], classes)


class Loader:
    """Batches of Files through worker processes; what data.Batches is for small images.

    batch_size is that of all processes together: each takes its share of every batch, and the last
    one of a shuffled epoch is left out where it has fewer images than there are processes.
    An iteration is a new epoch, but the first after load_state_dict goes on where the state was
    taken. `what` names the images in messages. Raises UserError where batch_size does not fit.
    """

    def __init__(self, files, batch_size, device, workers, shuffle=False, seed=0, what="images"):
        total, processes = len(files), distributed.world_size()
        if batch_size > total:
            raise UserError(
                f"batch_size {batch_size} is larger than the number of {what}, {total}: "
                f"use --batch_size {total} or less"
            )
        if batch_size < processes:
            raise UserError(f"batch_size {batch_size} is less than the {processes} processes; "
                            f"use --batch_size {processes} or more")  # fmt: skip
        self.device, self.total, self.batch_size = torch.device(device), total, batch_size
        self.shuffle, self.seed = shuffle, seed
        self.epoch, self.position = -1, 0  # batches handed out in it
        self.resumed = False
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in (MEAN, STD)
        )
        workers = min(workers, cores())
        self.loader = DataLoader(
            files,
            batch_sampler=_Shares(self),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=heed_the_parent,
            generator=torch.Generator(),  # not the global one, which a run owns
        )

    def __len__(self):
        whole, rest = divmod(self.total, self.batch_size)
        too_few = distributed.world_size() if self.shuffle else 1
        return whole + (rest >= too_few)

    def __iter__(self):
        """One epoch of x (B, 3, H, W) float32, channels_last, and y (B,), of this process."""
        if not self.resumed:
            self.epoch, self.position = self.epoch + 1, 0
        self.resumed = False
        for batch in self.loader:
            if isinstance(batch, UserError):
                raise batch
            self.position += 1
            x, y = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            yield data.normalized(x, self.mean, self.std), y

    forever = data.Batches.forever

    def smallest(self):
        """The fewest images that a process has in a step."""
        processes, rest = distributed.world_size(), self.total % self.batch_size
        return min(self.batch_size, rest if rest >= processes else self.batch_size) // processes

    def state_dict(self):
        """What load_state_dict needs to go on after the last batch handed out."""
        return {"epoch": self.epoch, "position": self.position, "images": self.total}

    def load_state_dict(self, state):
        """Go on from `state` at the next iteration; UserError if its number of images differs."""
        data.check_images(state, self.total)
        self.epoch, self.position = state["epoch"], state["position"]
        self.resumed = 0 < self.position < len(self)


class _Shares:
    """The items of each batch of a Loader that this process takes."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        loader = self.loader
        generator = torch.Generator().manual_seed((loader.seed << 20) + loader.epoch)
        order = torch.arange(loader.total)
        if loader.shuffle:
            order = torch.randperm(loader.total, generator=generator)
        seeds = torch.randint(2**62, (loader.total,), generator=generator)  # of each image
        for start in range(loader.position, len(loader)):
            batch = order[start * loader.batch_size : (start + 1) * loader.batch_size]
            mine = batch[distributed.rank() :: distributed.world_size()]
            if len(mine):
                yield list(zip(mine.tolist(), seeds[mine].tolist(), strict=True))


def heed_the_parent(worker):
    """Signals that end a run may reach all its processes; a worker ends when its parent says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(
            target=_wait_for_the_parent, args=(multiprocessing.parent_process().pid,), daemon=True
        ).start()


def _wait_for_the_parent(parent):
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def collate(samples):
    """A batch of samples, or the first UserError among them."""
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    if errors:
        return errors[0]
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)
