"""The files of a run: written whole or not at all, read without running code."""

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import sys
import time
import warnings
import zipfile
from pathlib import Path

import torch

from harness import script
from utils import UserError

FORMAT = 1  # of checkpoints and args.json; to be increased when older code could not read them
MEND = "free some space there, make it writable, or name another folder"


def expanded(path):
    """The path with ~ and ~user as folders; UserError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such home folder; give another path") from None


def make_folder(kind, save):
    """Makes the run folder `kind`-SAVE-YYYYMMDD-HHMMSS, never one that exists; returns its path.

    save may begin with the folder to put it in. Raises UserError where it cannot be made.
    """
    path = expanded(save)
    parent, name = path.parent, path.name
    if name in ("", ".."):
        raise UserError(f"--save {save!r} names no run: give a name, such as --save EXP")
    script.made_parents += [each for each in (parent, *parent.parents) if not each.exists()]
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ["", *(f"-{i}" for i in range(2, 100))]:
        folder = parent / f"{kind}-{name}-{stamp}{suffix}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            script.unsaved_runs.append(folder)
            return folder
        except FileExistsError:
            if parent.is_dir():
                continue
            raise UserError(f"--save {save}: {parent} is a file; name another folder") from None
        except OSError as error:
            reason = f"{folder} cannot be made ({error.strerror})"
            raise UserError(f"{reason}: give another --save") from None
    raise UserError(f"{folder} exists already: give another --save")


def start_log(folder=None, quiet=False):
    """A logger that writes to the terminal and, where there is a run folder, to its log.txt.

    quiet: it writes nothing.
    """
    logging.raiseExceptions = False  # a closed terminal does not end a run
    log = logging.getLogger("pc-darts")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [logging.NullHandler() if quiet else logging.StreamHandler(sys.stdout)]
    if folder is not None and not quiet:
        how = dict(encoding="utf-8", errors="backslashreplace")
        log.handlers.append(logging.FileHandler(folder / "log.txt", **how))
    for handler in log.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%m/%d %I:%M:%S %p"))
    return log


def script_name():
    """Of the script that runs, as args.json and checkpoints name it: "train_search"."""
    return Path(sys.argv[0]).stem


def write_args(folder, args, **more):
    """args.json: arguments, command and versions behind a run, and what is in `more`."""
    about = {"format": FORMAT, "script": script_name(), "command": sys.argv, **more}
    about |= {"torch": torch.__version__, "python": sys.version.split()[0], "args": vars(args)}
    write(folder / "args.json", (json.dumps(about, indent=2) + "\n").encode())


def read_args(folder):
    """What write_args wrote, {} where there is no args.json; UserError where it cannot be read."""
    path = Path(folder) / "args.json"
    if not path.exists():
        return {}
    try:
        about = json.loads(path.read_text())
        newer = about["format"] > FORMAT
        if not isinstance(about["args"], dict) or not isinstance(about["script"], str):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged: mend it, or give another folder") from None
    if newer:
        raise UserError(f"{path} is of a newer version of this code: update it")
    return about


def append_csv(path, row):
    """Appends a dict as a row; a new file begins with the names."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def append_jsonl(path, row):
    """Appends a dict as a line of JSON."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def save(state, path, previous=None):
    """torch.save, written beside `path` and renamed over it: there is never half a file.

    previous: where the file that was there stays. Raises UserError where it cannot be written, on a
    full disk say.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    # A zip file ends with a comment and, before it, its length: none here. Ours is a checksum.
    write(path, content[:-2] + b"\x20\0" + hashlib.sha256(content).digest(), previous)


def is_whole(path):
    """Whether every byte of a file of `save` or torch.save is as it was written."""
    content = path.read_bytes()
    if content[-22:-18] == b"PK\5\6" and content[-2:] == b"\0\0":  # of torch.save: no comment
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    return hashlib.sha256(content[:-34] + b"\0\0").digest() == content[-32:]


def write(path, content, previous=None):
    """Writes bytes as `save` does."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        beside.replace(path)
        with contextlib.suppress(OSError):  # of file systems that sync no folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new names too
            finally:
                os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror}): {MEND}") from None


def load(path, device="cpu"):
    """What `save` wrote: tensors and plain values only, so a hostile file runs no code.

    Raises UserError where the file is missing, damaged or none of ours.
    """
    try:
        if zipfile.is_zipfile(path) and not is_whole(Path(path)):  # of older torches: no zip
            raise zipfile.BadZipFile
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is an error here
            return torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give another file") from None
    except Exception:  # the unpickler raises whatever a damaged file makes it meet
        raise UserError(f"{path} is no intact weights file: give one that torch saved") from None


def run_folder(path):
    """The folder of a run, given as itself or as a file in it."""
    path = Path(path)
    return path if path.is_dir() else path.parent


def weights_of(path):
    """The file with weights: path itself; in a run weights.pt, or else checkpoint.pt."""
    path = Path(path)
    if not path.is_dir():
        return path
    return path / ("weights.pt" if (path / "weights.pt").exists() else "checkpoint.pt")


def load_weights(model, state, path):
    """Loads a state dict, or a checkpoint with one under "model" or "state_dict", into `model`.

    Raises UserError that names the first mismatch.
    """
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    pairs = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(name, str) and torch.is_tensor(value) for name, value in pairs):
        raise UserError(f"{path} holds no weights: give a checkpoint or a state dict")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:  # "Error(s) in loading ...:" and one mismatch or list a line
        first = str(error).splitlines()[1:2] or [str(error)]
        reason = first[0].strip()[:200].rstrip(". ")
        raise UserError(f"{path} is of another network: {reason}; give its own flags") from None
