"""Image files: which there are, by class, and their pixels as RGB."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import center_crop, resize

from utils import UserError


def class_names(*folders: Path) -> list[str]:
    """The names of the class folders, the same in all `folders`; UserError where they differ."""
    names = [
        sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        for folder in folders
    ]
    if len(names[0]) < 2:
        raise UserError(f"{folders[0]} has {len(names[0])} class folders: put two or more there")
    for folder, others in zip(folders, names, strict=True):
        if others != names[0]:
            name = min(set(names[0]) ^ set(others))
            has, lacks = (folders[0], folder) if name in names[0] else (folder, folders[0])
            raise UserError(f"{has} has a class {name!r} that {lacks} has not: make them the same")
    return names[0]


def image_files(folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    """Paths and labels of the images, found as ImageFolder does, but for hidden files.

    Raises UserError where a class has none.
    """
    start = len(str(folder))

    def wanted(path):
        return path.lower().endswith((*IMG_EXTENSIONS, ".gif")) and f"{os.sep}." not in path[start:]

    samples = [
        (path, label) for label, name in enumerate(classes)
        for path in _files_below(os.path.join(folder, name)) if wanted(path)
    ]  # fmt: skip
    empty = set(range(len(classes))) - {label for _, label in samples}
    if empty:
        raise UserError(f"{folder / classes[min(empty)]} has no images, *.png or so: add some")
    return samples


def _files_below(folder: str) -> Iterator[str]:
    """All files in the folder and its subfolders, links followed, in the order of ImageFolder."""
    found, above = [], {folder: [os.path.realpath(folder)]}  # of each the folders that it lies in
    for path, folders, names in os.walk(folder, followlinks=True):
        found.append((path, names))
        for name in folders:
            inner = os.path.join(path, name)
            target = os.path.realpath(inner)
            leads_up = f"{above[path][-1]}{os.sep}".startswith(f"{target}{os.sep}")
            if leads_up or target in above[path]:
                raise UserError(f"{inner} is a link to a folder that it lies in: remove it")
            above[inner] = [*above[path], target]
    return (os.path.join(path, name) for path, names in sorted(found) for name in sorted(names))


def read(sources, size: int) -> np.ndarray:
    """Bring `sources` (paths or (H, W, 3) arrays) to (N, size, size, 3) uint8."""
    images = np.empty((len(sources), size, size, 3), np.uint8)

    def place(start):
        for i in range(start, min(start + 100, len(sources))):
            array = isinstance(sources[i], np.ndarray)
            image = Image.fromarray(sources[i]) if array else open_image(sources[i])
            if image.size != (size, size):
                image = center_crop(resize(image, size), size)  # bilinear, antialiased by PIL
            images[i] = image

    with ThreadPoolExecutor() as pool:  # PIL decodes and resizes outside the interpreter lock
        for _ in pool.map(place, range(0, len(sources), 100)):
            pass  # raises what a thread raised
    return images


def open_image(path: str) -> Image.Image:
    """Decode an image file to RGB, its transparency dropped as ImageFolder does.

    Raises UserError that names a file which is broken.
    """
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise OSError("no file")
        with Image.open(path) as image:
            if image.mode == "F" or (image.mode, image.format) == ("I", "TIFF"):
                raise OSError("of floating point or 32-bit numbers, whose range is unknown")
            if image.mode.startswith("I"):  # 16-bit grey, 0..65535, which convert() would clip
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            image.info.pop("transparency", None)  # of a palette: convert() would warn
            return image.convert("RGB")
    except Exception as error:  # the decoders raise OSError, SyntaxError, struct.error and others
        raise UserError(
            f"{path} is no intact image ({reason(error)}): mend or remove it"
        ) from error


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
