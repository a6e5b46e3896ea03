"""The flags of the scripts: parsers, types and the groups that several share; the device."""

import argparse
import importlib
import shlex
import sys
from pathlib import Path

import torch

from harness import files
from utils import UserError


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class Parser(argparse.ArgumentParser):
    """Argparse with defaults in the help, no abbreviated flags, and errors of one line.

    description: the docstring of the script, which --help shows as it is.
    """

    def __init__(self, description):
        name = Path(sys.argv[0]).name  # since Python 3.14 argparse says "python -m ...", too
        super().__init__(name, description=description, formatter_class=_Help, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        """As argparse; defaults, which may be of an args.json, must be among the choices, too."""
        parsed = super().parse_args(args, namespace)
        for action in self._actions:
            value = getattr(parsed, action.dest, None)
            if action.choices and isinstance(value, str) and value not in action.choices:
                among = ", ".join(action.choices)
                self.error(f"argument --{action.dest}: {value[:50]!r} is none of {among}")
        return parsed

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

FORMS = {  # of a supernet: name: (its cells in the fast form, the memory format of its maps)
    "fused": (True, torch.channels_last),
    "fused-contiguous": (True, torch.contiguous_format),
    "plain": (False, None),  # as the images come
    "plain-contiguous": (False, torch.contiguous_format),
}


def words(text):
    """An argparse type: the words of a shell's command line."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:50]!r}: {str(error).lower()}") from None


def colour(text):
    """An argparse type: three numbers from 0 to 1, the text as it is."""
    values = [fraction(value) for value in text.split(",")]
    if len(values) != 3:
        raise argparse.ArgumentTypeError(
            f"{text[:50]!r} must be three numbers, such as 0.5,0.5,0.5"
        )
    return text


def add_common_arguments(parser, batch_size, more_sets=""):
    """The flags that all scripts on CIFAR-size images share; sets are named by data.SETS."""
    add = parser.add_argument
    add("--data", default="../data", help="folder of the data set")
    sets = f"cifar10, cifar100, folder or digits (needs no files){more_sets}"
    add("--set", default="cifar10", help=sets)
    add("--input_size", type=count, help="side of the images in pixels; None: the set's own")
    add("--batch_size", type=count, default=batch_size, help="images in a step")
    add("--mean", type=colour, metavar="R,G,B",
        help="mean of each channel, pixels scaled to 0..1; None: the published one of CIFAR, else "
        "computed from the training images")  # fmt: skip
    add("--std", type=colour, metavar="R,G,B", help="standard deviation, as --mean")
    add_machine_arguments(parser)


def add_imagenet_arguments(parser, workers):
    """The flags that search and training on ImageNet share."""
    add = parser.add_argument
    add("--tmp_data_dir", default="/tmp/cache/", help="folder that holds imagenet/{train,val}")
    add("--input_size", type=count, default=224, help="side of the images in pixels")
    add("--batch_size", type=count, default=1024, help="images in a step, of all GPUs together")
    add("--sync_bn", action="store_true", help="batch statistics over all processes of torchrun")
    add("--workers", type=natural, default=workers, help="processes that read images, of each GPU")
    add("--note", default="try", help="a word for the log")
    add_machine_arguments(parser, gpu=None)


def add_machine_arguments(parser, gpu=0):
    """The flags of all that runs a network over images."""
    add = parser.add_argument
    several = "; None: all, or under torchrun one per process" if gpu is None else ""
    add("--gpu", type=natural, default=gpu, help=f"which GPU{several}")
    add("--device", help="cpu, cuda, cuda:1 or mps instead of --gpu")
    add("--report_freq", type=count, default=50, help="steps between two lines of progress")


def add_learning_arguments(parser, epochs, init_channels, layers, learning_rate):
    """The flags that searches and trainings of PC-DARTS share, on images of any size."""
    add = parser.add_argument
    add("--init_channels", type=count, default=init_channels, help="channels C of the first cell")
    add("--layers", type=depth, default=layers, help="cells")
    add("--momentum", type=fraction, default=0.9, help="of the weights' SGD")
    add_run_arguments(parser, epochs, learning_rate)


def add_search_arguments(parser, begin, k, arch_learning_rate):
    """The flags that the searches share."""
    add = parser.add_argument
    add("--begin", type=natural, default=begin, help="epochs before alphas and betas move")
    add("--k", type=count, default=k, help="1/k of the channels go through the operations")
    add_variant_arguments(parser)
    add("--learning_rate_min", type=non_negative, default=0.0, help="at the end (cosine)")
    add("--weight_decay", type=non_negative, default=3e-4, help="of the weights' SGD")
    add("--arch_learning_rate", type=positive, default=arch_learning_rate,
        help="of alphas and betas")  # fmt: skip
    add("--arch_weight_decay", type=non_negative, default=1e-3, help="of alphas and betas")
    add("--unrolled", action="store_true", help="second-order gradient of alphas and betas")
    add("--recompute", action="store_true", help="keep 40 %% less memory for the backward pass")
    add("--no_cuda_graph", action="store_true", help="launch every kernel of a step by itself")
    add("--plain", action="store_true",
        help="the cells as model_search.py has them, not their fast form: readable, changeable, "
        "slower")  # fmt: skip
    add(
        "--form",
        default="auto",
        choices=["auto", *FORMS],
        help="of the supernet; auto: on a GPU the fastest, else fused, or plain with --plain",
    )
    add("--validate", action="store_true",
        help="the supernet's loss and top-1 on the validation half after each epoch, which costs "
        "a forward pass over it")  # fmt: skip


def add_training_arguments(parser, weight_decay, drop_path_prob):
    """The flags that the trainings of a discrete network share."""
    add = parser.add_argument
    add("--arch", default="PCDARTS",
        help="name in genotypes.py, random:SEED, genotype.json, run folder or text")  # fmt: skip
    add("--weight_decay", type=non_negative, default=weight_decay, help="of SGD")
    add("--auxiliary", action="store_true", help="a second classifier at two thirds of the depth")
    add("--auxiliary_weight", type=non_negative, default=0.4, help="of its loss")
    add("--drop_path_prob", type=fraction, default=drop_path_prob,
        help="in the last epochs; grows from 0 with the epoch")  # fmt: skip
    add("--compile", action="store_true",
        help="torch.compile of the cells in training: minutes first, faster steps then, other "
        "rounding; needs a C++ compiler, on a GPU Triton")  # fmt: skip
    layouts = ["auto", "contiguous", "channels_last"]
    add("--layout", default="auto", choices=layouts,
        help="memory format of all maps; auto: channels_last on a CPU, on a GPU the faster of both "
        "in a few steps before the first")  # fmt: skip


def add_stem_argument(parser):
    """Which stem networks on CIFAR-size images have."""
    parser.add_argument(
        "--stem", default="cifar", choices=["cifar", "imagenet"],
        help="imagenet: the cells begin at an eighth of the image's side, for large images",
    )  # fmt: skip


def add_cutout_arguments(parser):
    """The flags of Cutout, on CIFAR-size images."""
    add = parser.add_argument
    add("--cutout", action="store_true", help="cut a square out of every training image")
    add("--cutout_length", type=count, default=16, help="side of that square in pixels, even")


def add_run_arguments(parser, epochs, learning_rate):
    """The flags of all that searches or trains."""
    add = parser.add_argument
    add("--seed", type=natural, default=0, help="of every random number")
    add("--epochs", type=count, default=epochs, help="passes over the training images")
    add("--learning_rate", type=positive, default=learning_rate, help="of the weights, at first")
    add("--grad_clip", type=positive, default=5.0,
        help="largest norm of the weights' gradient (and, in the searches on ImageNet and of "
        "Auto-ReID, of that of alphas and betas)")  # fmt: skip
    add("--amp", action="store_true", help="bfloat16 where autocast has it: faster, rounds more")
    add("--save", default="EXP", help="name of the run, in the name of its folder")
    add("--resume", metavar="FOLDER", help="go on with the run in this folder")
    add("--save_every", type=positive, default=10.0, help="minutes between checkpoints in an epoch")
    add("--deterministic", action="store_true",
        help="deterministic kernels on a GPU where PyTorch has them; slower there")  # fmt: skip
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
        help="which channels the operations of the next node take")  # fmt: skip
    add(
        "--primitives", metavar="OP,OP,...", help="operations to search; None: genotypes.PRIMITIVES"
    )
    add("--steps", type=number(int, 1, 100), default=4, help="nodes of a cell")
    add("--max_skip", type=natural, help="at most this many skip_connects in the normal cell "
        "(P-DARTS)")  # fmt: skip
    add("--eigenvalue", type=count, metavar="N",
        help="every N epochs the largest eigenvalue of the loss's Hessian in alpha")  # fmt: skip


# What a resumed run may be given anew: where and how it runs, not what it computes.
FREE = ("device", "gpu", "workers", "report_freq", "save_every", "detect_anomaly", "resume")
FREE += ("report", "tensorboard", "data", "tmp_data_dir")  # which may have moved

# What counts only beside another flag.
NEEDS = {"cutout_length": "cutout", "auxiliary_weight": "auxiliary"}
NEEDS |= {"temperature": "teacher", "distillation": "teacher"}


def parse_args(parser):
    """The flags; with --resume FOLDER those of the run in it, as they stand in its args.json.

    A flag that is newer than the run has its default. Raises UserError where the folder holds no
    run of this script, and where a flag differs that is not one of FREE.
    """
    args = parser.parse_args()
    if args.resume is not None:
        return _agreeing(_resumed(parser, args))
    for name, other in NEEDS.items():
        idle = hasattr(args, name) and not getattr(args, other)
        if idle and getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name} does nothing without --{other}: give both, or neither")
    return _agreeing(args)


def _resumed(parser, args):
    """The flags of the run in the folder args.resume, with those of FREE that were given."""
    unset = object()
    given = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    about, script = files.read_args(args.resume), files.script_name()
    if not about:
        raise UserError(f"--resume {args.resume}: no args.json there; give the folder of a run")
    if about.get("script") != script:
        raise UserError(f"{args.resume} is a run of {about['script']}.py: resume it with that")
    stored = {name: parser.get_default(name) for name in vars(args)} | about["args"]
    unknown = set(stored) - set(vars(args))
    if unknown:
        name = min(unknown)
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
    free["detect_anomaly"] = args.detect_anomaly  # which nobody wants for the rest of a run
    if "device" in free or "gpu" in free:  # one takes the place of the other
        free = {"device": None, "gpu": None} | free
    return argparse.Namespace(**vars(parser.parse_args([])) | free)


def _agreeing(args):
    """args, where no flag contradicts another."""
    if getattr(args, "learning_rate_min", 0) > args.learning_rate:
        low, high = args.learning_rate_min, args.learning_rate
        raise UserError(f"--learning_rate_min {low} is above --learning_rate {high}: lower it")
    form = getattr(args, "form", "auto")
    if getattr(args, "plain", False) and form.startswith("fused"):
        raise UserError(f"--plain and --form {form}: give one of them")
    plain = "--plain" if getattr(args, "plain", False) else f"--form {form}"
    if "plain" in plain and getattr(args, "recompute", False):
        raise UserError(f"--recompute is of the fast form: leave it out, or leave out {plain}")
    if getattr(args, "compile", False) and getattr(args, "sync_bn", False):
        raise UserError("--compile has no --sync_bn: leave one of them out")
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
        except ValueError as error:  # as matplotlib's, of a wrong MPLBACKEND
            raise UserError(f"{what}: {package} says {error}") from None


def advise(log, args, batch_size, learning_rate):
    """A warning where --batch_size is not the published one and --learning_rate does not follow."""
    scaled = learning_rate * args.batch_size / batch_size
    if args.batch_size != batch_size and abs(args.learning_rate / scaled - 1) > 0.01:
        log.info(
            "--batch_size %d is not the published %d: in proportion --learning_rate is %g, not %g",
            args.batch_size, batch_size, scaled, args.learning_rate,
        )  # fmt: skip


def same_data(args):
    """The flags of the command that reads the same CIFAR-size images."""
    more = "" if args.set == "cifar10" else f" --set {args.set}"
    if args.data != "../data" and args.set != "digits":
        more += f" --data {shlex.quote(args.data)}"
    given = {name: getattr(args, name) for name in ("input_size", "mean", "std")}
    return more + "".join(f" --{name} {value}" for name, value in given.items() if value)


def choose_device(args):
    """The device of --device, else GPU number --gpu, else the CPU; UserError if it is not there.

    An Apple GPU, mps, on request alone: nothing was run on one.
    """
    if args.device is not None and args.gpu:
        raise UserError(f"--device {args.device} and --gpu {args.gpu}: give one of them")
    if args.device is None and not args.gpu and not torch.cuda.is_available():
        return torch.device("cpu")
    name = f"cuda:{args.gpu or 0}" if args.device is None else args.device
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
    except RuntimeError:
        raise UserError(f"--device {name!r} is unknown: use cpu, cuda, cuda:1 or mps") from None
    gpus = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else 0
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
        hint = " (--device mps tries the Apple GPU)" * torch.backends.mps.is_available()
        return f"no GPU in use: running on the CPU, {torch.get_num_threads()} threads{hint}"
    return f"device {device}"
