"""What scripts need besides the network: errors, flags, device, meters, files."""

import argparse
import contextlib
import csv
import hashlib
import importlib
import io
import json
import logging
import os
import random
import re
import resource
import shutil
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

FORMAT = 1  # of checkpoints and args.json; raised when an older reader could not use them


class UserError(ValueError):
    """An error that the user can cause and mend: its one line says what is wrong and what to do."""


@contextlib.contextmanager
def user_errors(*kinds):
    """Turns errors of these kinds, whose text is one line for the user, into UserError."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


def run(main, get_args):
    """main(get_args()) as a script: a UserError is one line and exit code 2, an interrupt 130."""
    args = None
    for name in ("stdout", "stderr"):  # closed by who started this
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))  # noqa: SIM115
    try:
        args = get_args()
        main(args)
    except UserError as error:
        sys.exit(_fail(error, 2))
    except OSError as error:  # a full disk, a folder that is read-only
        sys.exit(_fail(f"{error}: make it writable or free some space", 2))
    except (torch.cuda.OutOfMemoryError, MemoryError):
        sys.exit(_fail(_out_of_memory(args), 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            sys.exit(_fail(_out_of_memory(args), 2))
        if "returned nan values" in str(error):  # of --detect_anomaly, which warned where
            sys.exit(_fail(f"{error} The forward call is shown above: mend it there", 2))
        if not dist.is_initialized() or not re.search("gloo|NCCL|[Cc]onnection", str(error)):
            raise
        hint = "see what it says, then go on with --resume FOLDER"
        sys.exit(_fail(f"another process of this job ended or cannot be reached; {hint}", 1))
    if dist.is_initialized():
        dist.destroy_process_group()


def _out_of_memory(args):
    used = {name: getattr(args, name, None) for name in ("batch_size", "k")}
    used = ", ".join(f"{name} {value}" for name, value in used.items() if value is not None)
    hints = {"recompute": "give --recompute", "amp": "give --amp", "k": "raise --k"}
    hints = [text for name, text in hints.items() if hasattr(args, name)]
    hints = ", or ".join(["lower --batch_size, --init_channels or --input_size", *hints])
    return f"out of memory with {used}: {hints}"


unsaved_runs = []  # folders of this process that hold no checkpoint yet


def _fail(message, code):
    """Prints the line; a run folder that holds nothing to go on from is taken away."""
    for folder in unsaved_runs if code == 2 else ():
        shutil.rmtree(folder, ignore_errors=True)
    message = " ".join(str(message).split())
    who = f" (process {dist.get_rank()})" if dist.is_initialized() else ""
    if dist.is_initialized() and dist.get_rank() > 0:
        time.sleep(3)  # where process 0 says the same, this one is ended before it does
    print(f"{Path(sys.argv[0]).name}: error{who}: {message}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(code)  # at once: the other processes may never answer again
    return code


class Parser(argparse.ArgumentParser):
    """Argparse with defaults in the help, no abbreviated flags, and errors of one line."""

    def __init__(self, description):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message):
        message = " ".join(message.split())
        message = message if len(message) < 500 else message[:500] + "..."
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def number(kind, low, high, above=False):
    """An argparse type: a `kind` (int or float) from low (not low itself if `above`) to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            bound = f"more than {low}" if above else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text[:50]!r} must be {bound} and at most {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


count = number(int, 1, 10**6)
natural = number(int, 0, 2**31 - 1)
positive = number(float, 0, 1e6, above=True)
non_negative = number(float, 0, 1e6)
fraction = number(float, 0, 1)
depth = number(int, 1, 1000)


def colour(text):
    """An argparse type: three numbers from 0 to 1, the text as it is."""
    values = [fraction(value) for value in text.split(",")]
    if len(values) != 3:
        raise argparse.ArgumentTypeError(
            f"{text[:50]!r} must be three numbers, such as 0.5,0.5,0.5"
        )
    return text


def add_common_arguments(parser, batch_size):
    """The flags that all scripts on CIFAR-size images share; sets are named by data.SETS."""
    add = parser.add_argument
    add("--data", default="../data", help="folder of the data set")
    add("--set", default="cifar10", help="cifar10, cifar100, folder or digits (needs no files)")
    add("--input_size", type=count, help="side of the images in pixels; None: the set's own")
    add("--batch_size", type=count, default=batch_size, help="images in a step")
    add("--mean", type=colour, metavar="R,G,B", help="of all pixels, 0..1; None: CIFAR's, computed")
    add("--std", type=colour, metavar="R,G,B", help="as --mean")
    add("--gpu", type=natural, default=0, help="which GPU, where there is one")
    add("--device", help="cpu, cuda, cuda:1 or mps instead of --gpu")
    add("--report_freq", type=count, default=50, help="steps between two lines of progress")
    add("--seed", type=natural, help="of every random number", default=0)


def add_imagenet_arguments(parser, init_channels, layers, epochs):
    """The flags that search and training on ImageNet share."""
    add = parser.add_argument
    add("--tmp_data_dir", default="/tmp/cache/", help="folder that holds imagenet/{train,val}")
    add("--input_size", type=count, default=224, help="side of the images in pixels")
    add("--batch_size", type=count, default=1024, help="images in a step, of all GPUs together")
    add("--epochs", type=count, default=epochs, help="epochs of the training images")
    add("--init_channels", type=count, default=init_channels, help="channels C of the first cell")
    add("--layers", type=depth, default=layers, help="cells")
    add("--learning_rate", type=positive, default=0.5, help="of the weights, at first")
    add("--momentum", type=fraction, default=0.9, help="of the weights' SGD")
    add("--grad_clip", type=positive, default=5.0, help="norm of the gradient")
    add("--sync_bn", action="store_true", help="batch statistics over all processes of torchrun")
    add("--amp", action="store_true", help="bfloat16 where autocast has it: faster, rounds more")
    add("--gpu", type=natural, help="one GPU; None: all of them, with torchrun one per process")
    add("--device", help="cpu, cuda, cuda:1 or mps instead of --gpu")
    add("--report_freq", type=count, default=100, help="steps between two lines of progress")
    add("--save", default="EXP", help="name of the run, in the name of its folder")
    add("--note", default="try", help="a word for the log")
    add_run_arguments(parser)


def add_run_arguments(parser):
    """The flags of all that searches or trains."""
    add = parser.add_argument
    add("--resume", metavar="FOLDER", help="go on with the run in this folder")
    add("--save_every", type=positive, default=10.0, help="minutes between checkpoints in an epoch")
    add("--deterministic", action="store_true", help="the same bits on a GPU too; slower there")
    add("--detect_anomaly", action="store_true", help="find where NaN comes from; much slower")
    add("--report", type=count, nargs="?", const=5, metavar="N", help="report.html each N epochs")
    add(
        "--tensorboard", action="store_true", help="curves, alphas, betas and cells for TensorBoard"
    )


def add_variant_arguments(parser):
    """The flags of the searches' variants."""
    add = parser.add_argument
    add("--no_edge_norm", action="store_true", help="no betas (DARTS)")
    add("--sampling", default="shuffle", choices=["shuffle", "shift", "random"],
        help="of the channels that the operations of the next node take")  # fmt: skip
    add(
        "--primitives", metavar="OP,OP,...", help="operations to search; None: genotypes.PRIMITIVES"
    )
    add("--steps", type=number(int, 1, 100), default=4, help="nodes of a cell")
    add("--max_skip", type=natural, help="skip_connects of the normal cell at most (P-DARTS)")
    add("--eigenvalue", type=count, metavar="N",
        help="each N epochs the largest of the loss's Hessian in alpha")  # fmt: skip


# What a resumed run may be given anew: where and how it runs, not what it computes.
FREE = ("device", "gpu", "workers", "report_freq", "save_every", "detect_anomaly", "resume")
FREE += ("report", "tensorboard", "data", "tmp_data_dir")  # which may have moved


def parse_args(parser):
    """The flags; with --resume FOLDER those of the run in it, as they stand in its args.json.

    Raises UserError where the folder holds no run of this script, and where a flag differs that
    is not one of FREE.
    """
    args = parser.parse_args()
    if args.resume is None:
        return _agreeing(args)
    unset = object()
    given = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    about, script = read_args(args.resume), Path(sys.argv[0]).stem
    if not about:
        raise UserError(f"--resume {args.resume}: no args.json there; give the folder of a run")
    if about.get("script") != script:
        raise UserError(f"{args.resume} is a run of {about['script']}.py: resume it with that")
    stored = about["args"]
    if set(stored) != set(vars(args)):
        name = min(set(stored) ^ set(vars(args)))
        raise UserError(f"{args.resume} is of another version of this code, by its flag --{name}")
    for name, value in vars(given).items():
        if value is not unset and name not in FREE and value != stored[name]:
            raise UserError(
                f"--{name} {value} is not the run's, which is {stored[name]}: "
                "leave it out to resume, or begin a new run"
            )
    for name, value in stored.items():  # as text, so that argparse checks them as a user's
        flag = isinstance(getattr(args, name), bool)
        empty = value is None and parser.get_default(name) is not None
        if flag != isinstance(value, bool) or (empty and name not in FREE):
            raise UserError(f"{args.resume}/args.json is damaged: {name} is {str(value)[:50]!r}")
        parser.set_defaults(**{name: value if flag or value is None else str(value)})
    free = {name: vars(given)[name] for name in FREE if name in stored}
    free = {name: value for name, value in free.items() if value is not unset}
    if "device" in free or "gpu" in free:  # one takes the place of the other
        free = {"device": None, "gpu": None} | free
    return _agreeing(argparse.Namespace(**vars(parser.parse_args([])) | free))


def _agreeing(args):
    """args, where no flag contradicts another."""
    if getattr(args, "learning_rate_min", 0) > args.learning_rate:
        low, high = args.learning_rate_min, args.learning_rate
        raise UserError(f"--learning_rate_min {low} is above --learning_rate {high}: lower it")
    if args.report or args.tensorboard:
        need("--report" if args.report else "--tensorboard", ["matplotlib"])
    if args.tensorboard:
        need("--tensorboard", ["torch.utils.tensorboard"])
    return args


def need(what, packages, listed="requirements-viz.txt"):
    """Raises UserError where one of the optional packages, that `what` needs, is missing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            name = package.split(".")[-1]
            hint = f"pip install {name}, or all of {listed}"
            raise UserError(f"{what} needs {name}: {hint}") from None


def advise(log, args, batch_size, learning_rate):
    """A warning where --batch_size is not the published one and --learning_rate does not follow."""
    scaled = learning_rate * args.batch_size / batch_size
    if args.batch_size != batch_size and abs(args.learning_rate / scaled - 1) > 0.01:
        log.info(
            "--batch_size %d is not the published %d: in proportion --learning_rate is %g, not %g",
            args.batch_size, batch_size, scaled, args.learning_rate,
        )  # fmt: skip


def choose_device(args):
    """The device of --device, else GPU number --gpu, else the CPU; UserError if it is not there."""
    if args.device is not None and args.gpu:
        raise UserError(f"--device {args.device} and --gpu {args.gpu}: give one of them")
    if args.device is None and not args.gpu and not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    name = f"cuda:{args.gpu or 0}" if args.device is None else args.device
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
    except RuntimeError:
        raise UserError(f"--device {name!r} is unknown: use cpu, cuda, cuda:1 or mps") from None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type != "cuda" and device.index:
        raise UserError(f"there is no {name}: use --device {device.type}")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"there is no {name}, only {gpus} CUDA GPUs: use another, or --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("there is no mps device here: use --device cpu")
    return device


def describe(device):
    """One line that names the device."""
    if device.type == "cuda":
        return f"device {device}: {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"no GPU in use: running on the CPU, {torch.get_num_threads()} threads"
    return f"device {device}"


def set_seed(seed, deterministic=False, detect_anomaly=False):
    """Seeds Python, NumPy and PyTorch.

    deterministic: PyTorch takes only algorithms that give the same bits every time.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs for it
        torch.use_deterministic_algorithms(True, warn_only=True)  # where there is no other way
        torch.backends.cudnn.benchmark = False
    torch.autograd.set_detect_anomaly(detect_anomaly)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def duration(seconds):
    """As people say it."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def peak_memory(device):
    """Peak memory in MiB: of the tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class AverageMeter:
    """A running mean that stays on the device until it is read: no step waits for the GPU."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.sum, self.cnt = 0.0, 0

    def update(self, value, n=1):
        """Adds the mean `value` (number or 0-d tensor) of n items."""
        self.sum = self.sum + (value.detach() if torch.is_tensor(value) else value) * n
        self.cnt += n

    @property
    def avg(self):
        return float(self.sum) / max(self.cnt, 1)


AvgrageMeter = AverageMeter  # as DARTS spells it


def accuracy(output, target, topk=(1,)):
    """Percentages of targets (N,) among the k best logits (N, classes): a 0-d tensor per k."""
    best = output.topk(min(max(topk), output.shape[1]), dim=1).indices  # (N, k)
    hits = best == target[:, None]
    return [100.0 * hits[:, :k].any(1).float().mean() for k in topk]


def count_parameters_in_MB(model):
    """Millions of parameters (the name is DARTS's), those of an auxiliary head not counted."""
    return sum(p.numel() for n, p in model.named_parameters() if "auxiliary" not in n) / 1e6


def create_exp_dir(kind, save):
    """Makes the run folder `kind`-SAVE-YYYYMMDD-HHMMSS, never one that exists; returns its path.

    save may begin with the folder to put it in. Raises UserError where it cannot be made.
    """
    try:
        path = Path(save).expanduser()
    except RuntimeError:  # of a user who does not exist
        raise UserError(f"--save {save}: there is no such home folder; name another") from None
    parent, name = path.parent, path.name
    if name in ("", ".."):
        raise UserError(f"--save {save!r} names no run: give a name, such as --save EXP")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ["", *(f"-{i}" for i in range(2, 100))]:
        folder = parent / f"{kind}-{name}-{stamp}{suffix}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            unsaved_runs.append(folder)
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
        log.handlers.append(logging.FileHandler(folder / "log.txt"))
    for handler in log.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%m/%d %I:%M:%S %p"))
    return log


def write_args(folder, args, **more):
    """args.json: arguments, command and versions behind a run, and what is in `more`."""
    about = {"format": FORMAT, "script": Path(sys.argv[0]).stem, "command": sys.argv, **more}
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
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new names too
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        hint = "free some space or give another --save"
        raise UserError(f"cannot write {path} ({error.strerror}): {hint}") from None


def load(path, device="cpu"):
    """What `save` wrote: tensors and plain values only, so a hostile file runs no code.

    Raises UserError where the file is missing or is none of ours.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is an error here
            return torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give another file") from None
    except Exception:  # the unpickler raises whatever a damaged file makes it meet
        raise UserError(f"{path} is no intact weights file: give one that torch saved") from None


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
