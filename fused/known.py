"""What the fast form stands for: modules as operations.py makes them, of classes with these texts.

Two small cells cannot show a change that matters only at other sizes or precisions, rarely, or
outside the output. So a class with another text, or a module with something changed, runs as it is.
`python -m fused` prints the digests anew, for when the fast form has followed a change.
"""

import functools
import hashlib
import inspect
import io
import tokenize

import torch
from torch import nn

from fused.snapshot import hooks
from operations import DilConv, FactorizedReduce, Identity, ReLUConvBN, SepConv, Zero

WRITTEN_FOR = {
    "MixedOp": "080d487e9af5c25e",
    "Cell": "67bda8d3eee88b9d",
    "ReLUConvBN": "44fb556d41417056",
    "FactorizedReduce": "d1992f06cb93bdca",
    "SepConv": "7bb06a18014d4725",
    "DilConv": "52bd5f49c7693298",
    "Identity": "cc8dc151709c67f0",
    "Zero": "26d92b3d9241d376",
}
FOREIGN = ("torch.", "fused.")  # modules whose classes nobody edits
TENSORS = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
SIGNS = {tokenize.NEWLINE: ";", tokenize.INDENT: "{", tokenize.DEDENT: "}"}


# Classes


def unfamiliar(kind):
    """None, or in a few words which base of a type, or itself, has another text. torch's do not."""
    for c in kind.__mro__:
        if c is not object and not c.__module__.startswith(FOREIGN):
            names = {name: v for name, v in vars(c).items() if not _of_python(name, v)}
            if names and not _is_known(c.__name__, names):
                return f"{c.__name__} has another text than the one it was written for"
    return None


def _of_python(name, value):
    return name.startswith("__") and not inspect.isroutine(value)


def _is_known(name, attributes):
    """Whether a class holds nothing but the functions with these texts."""
    functions = all(hasattr(value, "__code__") for value in attributes.values())
    return functions and _digest(_codes(attributes)) == WRITTEN_FOR.get(name, "unknown")


def digest(c):
    """Of the texts of a class's functions, as they are; comments and docstrings do not count."""
    return _digest(_codes({key: v for key, v in vars(c).items() if inspect.isroutine(v)}))


def _codes(functions):
    """((name, code, defaults), ...): functions in which these are equal have the same text."""
    return tuple(
        (name, function.__code__, repr((function.__defaults__, function.__kwdefaults__)))
        for name, function in sorted(functions.items())
    )


@functools.cache
def _digest(codes):
    """None where one has no text, as on standard input: it is no text that is known."""
    try:
        texts = [f"{name}: {_text(code)}" for name, code, _ in codes]
    except OSError:
        return None
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _text(code):
    """The text of a function without what does not change it, the same in every Python."""
    text, before = [], None
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(code)).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if before == tokenize.INDENT and token.type == tokenize.STRING:
            before = "docstring"
        elif before == "docstring":  # the end of its line
            before = None
        else:
            text.append(SIGNS.get(token.type, token.string))
            before = token.type
    return "".join(text)


def functions_of_torch():
    """Those of torch's own classes that run in a cell."""
    classes = nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Sequential, nn.MaxPool2d, nn.AvgPool2d
    names = "forward", "_conv_forward", "_call_impl", "__call__"
    return [getattr(c, name) for c in classes for name in names if hasattr(c, name)]


AT_FIRST = functions_of_torch()


# Modules


def is_untouched(module):
    """Whether it has no hooks, and no function in the place of one of its class."""
    return not any(hooks(vars(module))) and not any(map(callable, vars(module).values()))


def is_as_made(block, reference, cell):
    """Whether a block of the cell is a fresh one but for its weights and statistics.

    reference: what `signature` gives for a fresh one. Its norms must be in the mode of the cell.
    """
    parts = list(block.modules())
    tensors = [
        tensor for tensor in (*block.parameters(), *block.buffers()) if tensor.is_floating_point()
    ]
    try:
        return (
            signature(block, cell.norm) == reference
            and {tensor.dtype for tensor in tensors} <= {cell.preprocess1.op[1].weight.dtype}
            and all(map(is_untouched, parts))
            and not any(map(unfamiliar, set(map(type, parts)) - {cell.norm}))
            and all(part.training == cell.training for part in parts if type(part) is cell.norm)
        )
    except (
        AttributeError,
        RuntimeError,
        ValueError,
        TypeError,
    ):  # attributes that cannot be compared
        return False


def signature(block, norm=nn.BatchNorm2d):
    """Of each module in a block: its type, the names of its children, its settings, shapes."""
    result = []
    for part in block.modules():
        if type(part) is norm:
            kind = nn.BatchNorm2d
            names = "num_features", "eps", "momentum", "affine", "track_running_stats"
            settings = {name: getattr(part, name) for name in names}
        else:
            kind = type(part)
            settings = {
                name: value for name, value in vars(part).items()
                if name[0] != "_" and name not in ("training", *TENSORS)
            }  # fmt: skip
        tensors = [getattr(part, name, None) for name in TENSORS]
        shapes = [None if tensor is None else tensor.shape for tensor in tensors]
        result.append((kind, list(part._modules), settings, shapes))
    return result


@functools.cache
def fresh(kind, *sizes):
    """The signature of a fresh block of our own types. Random numbers stay as they are."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        if kind is SepConv:  # c, k, stride
            c, k, stride = sizes
            return signature(SepConv(c, c, k, stride, k // 2, affine=False))
        if kind is DilConv:
            c, k, stride = sizes
            return signature(DilConv(c, c, k, stride, 2 * (k // 2), 2, affine=False))
        if kind is FactorizedReduce:  # channels in and out
            return signature(FactorizedReduce(*sizes, affine=False))
        if kind is ReLUConvBN:
            return signature(ReLUConvBN(*sizes, 1, 1, 0, affine=False))
        if kind is nn.BatchNorm2d:
            return signature(nn.BatchNorm2d(*sizes, affine=False))
        return signature(Zero(*sizes) if kind is Zero else Identity())
