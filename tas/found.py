"""What a search found, as a file, a line to paste, and a network; the weights of a teacher."""

import json
import math
import random
import shutil
from typing import NamedTuple

from harness import files
from tas import shapes
from tas.pruned import PrunedNetwork, multiply_adds
from utils import UserError, user_errors

NAME = "tas.json"
MOST_BYTES = 1_000_000
MOST_DRAWS = 20_000


class Found(NamedTuple):
    """A network of the search space; multiply-adds and target in millions, on size x size pixels.

    channels: `depth` integers, 3 first; blocks: of each stage, None for all; target: None where
    nothing was searched.
    """

    depth: int
    channels: list
    blocks: list | None
    multiply_adds: float
    target: float | None
    num_classes: int
    size: int

    def on(self, num_classes, size):
        """The same network for this number of classes and images of size x size.

        The target is then the same share of the unpruned network.
        """
        target = self.target
        if target is not None and (num_classes, size) != (self.num_classes, self.size):
            before, now = (
                load("unpruned", self.depth, *sizes).multiply_adds
                for sizes in ((self.num_classes, self.size), (num_classes, size))
            )
            target = round(target * now / before, 6)
        return describe(self.depth, self.channels, self.blocks, num_classes, size, target)

    def as_built(self):
        """Multiply-adds in millions of what `network` makes, which has the widths that stay."""
        sizes = self.num_classes, self.blocks, (self.size, self.size)
        return multiply_adds(self.depth, self.channels, *sizes, as_built=True)

    def network(self):
        """A PrunedNetwork."""
        return PrunedNetwork(self.depth, self.channels, self.num_classes, self.blocks)

    def text(self):
        """JSON in one line, which `load` takes."""
        return json.dumps(self._asdict())

    def save(self, path):
        files.write(path, (self.text() + "\n").encode())


def describe(depth, channels, blocks, num_classes, size, target=None):
    """A Found with its multiply-adds."""
    count = multiply_adds(depth, channels, num_classes, blocks, (size, size))
    return Found(depth, channels, blocks, round(count, 6), target, num_classes, size)


def uniform(depth, ratio, num_classes, size, tolerance=0.05):
    """A Found where all convolutions keep the same share of their channels, to compare with.

    Its multiply-adds are at most `ratio` of the unpruned network's and at least ratio - tolerance;
    where no one share gives that, the last convolutions have the next larger one. Raises UserError
    where the smallest network is above `ratio`.
    """
    low, high = _band(depth, ratio, num_classes, size, tolerance)
    choices = [shapes.width_choices(C) for C in shapes.full_channels(depth)[1:]]

    def network(place, wider=0):  # `wider` convolutions, the last ones, have the next share
        places = [place] * (len(choices) - wider) + [place + 1] * wider
        channels = [row[i] for row, i in zip(choices, places, strict=True)]
        return describe(depth, [3, *channels], None, num_classes, size, high)

    fits = [i for i in range(len(shapes.SHARES)) if network(i).multiply_adds <= high]
    if not fits:
        raise UserError(f"the smallest network is above {ratio} of the unpruned: give more")
    found, wider = network(fits[-1]), 0
    while found.multiply_adds < low:
        wider += 1
        found = network(fits[-1], wider)
    return found


def drawn(depth, ratio, num_classes, size, seed, tolerance=0.05):
    """A Found of random widths, to compare with: each choice alike, drawn until it fits.

    It fits if its multiply-adds are between ratio - tolerance and `ratio` of the unpruned
    network's. Raises UserError where 20,000 draws give none.
    """
    low, high = _band(depth, ratio, num_classes, size, tolerance)
    choices = [shapes.width_choices(C) for C in shapes.full_channels(depth)[1:]]
    generator = random.Random(seed)
    for _ in range(MOST_DRAWS):
        channels = [3, *(generator.choice(row) for row in choices)]
        found = describe(depth, channels, None, num_classes, size, high)
        if low <= found.multiply_adds <= high:
            return found
    raise UserError(f"{MOST_DRAWS} random networks, and none of {ratio} of the unpruned: try 0.45")


def _band(depth, ratio, num_classes, size, tolerance):
    """(fewest, most) multiply-adds in millions."""
    unpruned = load("unpruned", depth, num_classes, size).multiply_adds
    return (ratio - tolerance) * unpruned, round(ratio * unpruned, 6)


def load(what, depth=None, num_classes=10, size=32):
    """The Found of `what`: a tas.json, a run folder with one, its text, or "unpruned".

    depth: of "unpruned", whose num_classes and size these are; else it must be the file's, or None.
    Raises UserError.
    """
    if what == "unpruned":
        if depth is None:
            raise UserError("--arch unpruned needs --depth: give 20, 32, 44, 56 or 110")
        with user_errors(ValueError):
            return describe(depth, shapes.full_channels(depth), None, num_classes, size)
    found, name = _parse(*_text(what))
    if depth is not None and depth != found.depth:
        raise UserError(f"{name} is of depth {found.depth}, not {depth}: leave --depth out")
    return found


def _text(what):
    """(the JSON, what to call it)"""
    if what.lstrip().startswith("{"):
        return what, "--arch"
    path = files.expanded(what)
    try:
        if path.is_dir():
            path = path / NAME
            if not path.exists():
                raise UserError(f"{path.parent} has no {NAME}: is the search finished?")
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} is larger than 1 MB: give the {NAME} of a search")
        return path.read_text(), str(path)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or "it is not text"
        hint = f"give a {NAME}, the folder of a search, or unpruned"
        raise UserError(f"cannot read {what[:200]!r} ({reason}): {hint}") from None


def _parse(text, name):
    hint = f"give the {NAME} of a search"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{name} is cut or no JSON: {hint}") from None
    if not isinstance(values, dict) or set(values) != set(Found._fields):
        wanted = ", ".join(Found._fields)
        raise UserError(f"{name} does not hold just {wanted}: {hint}")
    found = Found(**values)
    for field in ("depth", "num_classes", "size"):
        if not _integers([getattr(found, field)]) or not 1 <= getattr(found, field) <= 10**6:
            raise UserError(f"{name}: {field} is no such number: {hint}")
    if not _integers(found.channels) or not (found.blocks is None or _integers(found.blocks)):
        raise UserError(f"{name}: channels and blocks are lists of integers: {hint}")
    numbers = [found.multiply_adds, 0 if found.target is None else found.target]
    if not all(type(n) in (int, float) and 0 <= n < math.inf for n in numbers):
        raise UserError(f"{name}: multiply_adds and target are numbers: {hint}")
    try:
        shapes.check(found.depth, found.channels, found.blocks)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    return found, name


def _integers(values):
    return isinstance(values, list) and all(type(value) is int for value in values)


def load_trained(folder, dataset=None):
    """The PrunedNetwork that a run of train_tas.py trained.

    dataset: a data.DataSet, whose classes and images it must have learned. Raises UserError.
    """
    folder = files.expanded(folder)
    about = files.read_args(folder)
    if about.get("script") != "train_tas":
        raise UserError(f"{folder} is no run of train_tas.py: give the folder of one")
    path = folder / "weights.pt"
    if not path.exists():
        raise UserError(f"{folder} has no weights.pt: is its training finished?")
    found = load(str(folder))
    if dataset is not None:
        _check_data(folder, about, found.size, dataset)
    network = found.network()
    files.load_weights(network, files.load(path), path)
    return network


def _check_data(folder, about, size, dataset):
    theirs, classes = about.get("classes"), dataset.classes
    side, other = dataset.train.images.shape[1], None
    if theirs != classes:
        same = isinstance(theirs, list) and len(theirs) != len(classes)
        other = f"{len(theirs)}, not {len(classes)}, classes" if same else "other classes"
    elif size != side:
        other = f"images of {size} x {size}, not {side} x {side}"
    elif [about.get("mean"), about.get("std")] != [list(dataset.mean), list(dataset.std)]:
        other = "images that were normalized with another --mean or --std"
    if other is not None:
        raise UserError(f"{folder} learned {other}: give a network trained on this data")


def keep(run, folder):
    """Copies into `folder` what load_trained reads of a run: all of it, or nothing is there."""
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    for name in ("args.json", NAME, "weights.pt"):
        shutil.copy(files.expanded(run) / name, beside)
    beside.replace(folder)
