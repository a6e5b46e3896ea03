"""Whether the fast cell is the same function as the cell that it stands for."""

import contextlib
import hashlib
import inspect
import io
import random
import tokenize

import numpy as np
import torch
from torch import nn

from fused.storage import touched

TOLERANCE = 1e-8  # relative, in float64; the two agree to some 1e-13
# What the fast cell knows of the modules of a cell, besides weights, statistics and submodules.
KNOWN = {"k", "stride", "sampling", "reduction", "_steps", "_multiplier"} | set(vars(nn.Module()))
# The texts of the classes that the fast cell stands for (`digest`): figures of two small cells do
# not show what a change does at other sizes, widths or precisions, seldom, or beside the output.
# `python -m fused.comparison` prints them anew, for when the fast cell has followed a change.
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
SIGNS = {tokenize.NEWLINE: ";", tokenize.INDENT: "{", tokenize.DEDENT: "}"}


def difference(paper, fast, C, edges, ops, reduction_prev):
    """None, or in a few words how fast(), a cell, differs from paper(), the one it stands for.

    C: channels of their two inputs; edges, ops: shape of the weights. Both get the same weights and
    random input; what counts is the output, all gradients, the running statistics, and the output
    in evaluation. An attribute of which the fast cell knows nothing is a difference too: whatever
    it switches, here it would not. So is a class of another text than the fast cell was written
    for. Random numbers are afterwards as before.
    """
    python, numpy = random.getstate(), np.random.get_state()  # torch's: fork_rng
    try:
        elsewhere = torch.get_default_device().type != "cpu"  # this mode costs a third of the time
        here = torch.device("cpu") if elsewhere else contextlib.nullcontext()
        with torch.random.fork_rng(devices=[]), here, torch.enable_grad():
            torch.manual_seed(0)
            cells = paper().double(), fast().double()
            inputs = [torch.randn(2, C, size, size) for size in (16 if reduction_prev else 8, 8)]
            inputs += [torch.rand(edges, ops), torch.rand(edges)]
            return _difference(*cells, [x.double().requires_grad_() for x in inputs])
    except Exception as error:  # of whatever somebody has made of a cell
        reason = str(error).strip().splitlines()[:1]
        return ": ".join([type(error).__name__, *reason])[:300]
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _difference(paper, fast, inputs):
    unknown = _unknown(paper, fast)
    if unknown:
        return f"it knows nothing of {unknown}"
    state = paper.state_dict()
    if state.keys() != fast.state_dict().keys():
        name = min(state.keys() ^ fast.state_dict().keys())
        return f"{name} is in the state dict of one form alone"
    fast.load_state_dict(state)
    maps = [x.detach().contiguous(memory_format=torch.channels_last) for x in inputs[:2]]
    mine = _figures(fast, [*(x.requires_grad_() for x in maps), *inputs[2:]])
    for name, expected in _figures(paper, inputs).items():
        error = (mine[name] - expected).abs().max()
        if not error <= TOLERANCE * max(1.0, float(expected.abs().max())):
            return f"{name} differs by {float(error):.1g}"
    return _rewritten(paper, fast)


def _figures(cell, inputs):
    """{name: tensor} of everything that two cells with the same weights must have in common."""
    out = cell(*inputs)
    if not out.requires_grad:  # of a space of "none"
        out = out + sum(x.sum() for x in inputs) * 0
    g = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).sin()
    parameters = list(cell.parameters())
    gradients = torch.autograd.grad(out, [*inputs, *parameters], g, materialize_grads=True)
    figures = {"the output": out.detach()}
    names = ("s0", "s1", "softmax(alpha)", "softmax(beta)")
    figures |= {f"the gradient of {n}": t for n, t in zip(names, gradients, strict=False)}
    figures |= {f"{name} after a step": t.clone() for name, t in cell.state_dict().items()}
    cell.eval()
    figures["the output in evaluation"] = cell(*inputs).detach()
    for parameter, gradient in zip(parameters, gradients[len(inputs) :], strict=True):
        parameter.data = gradient  # under the names of the state dict then
    figures |= {f"the gradient of {name}": t for name, t in cell.state_dict().items()}
    return figures


def _unknown(paper, fast):
    """What a module of the paper's cell has that the fast one does not know, or None."""
    for module in _stood_for(paper, fast):
        name = type(module).__name__
        for attribute in sorted(vars(module).keys() - KNOWN) + _class_attributes(module):
            return f"{name}.{attribute}"
        if touched(module):
            return touched(module)
    return None


def _stood_for(paper, fast):
    """The modules of our own classes in the paper's cell that the fast one does not run itself."""
    kept = {name for name, _ in fast.named_modules() if "_ops." in name}  # run as they are
    for name, module in paper.named_modules():
        own = not type(module).__module__.startswith("torch.")
        if own and not any(f"{name}.".startswith(f"{whole}.") for whole in kept):
            yield module


def _classes(module):
    """The classes of a module, without torch's and Python's own."""
    foreign = ("torch.", "builtins")
    return [c for c in type(module).__mro__ if not c.__module__.startswith(foreign)]


def _class_attributes(module):
    """What the classes of a module hold besides functions: switches that may be set later."""
    return [
        name
        for c in _classes(module)
        for name, value in vars(c).items()
        if not name.startswith("__") and not inspect.isroutine(value)
    ]


def _rewritten(paper, fast):
    """The class that has another text than the fast cell was written for, or None."""
    classes = dict.fromkeys(c for module in _stood_for(paper, fast) for c in _classes(module))
    for c in classes:
        functions = any(map(inspect.isroutine, vars(c).values()))
        if functions and digest(c) != WRITTEN_FOR.get(c.__name__):
            return f"{c.__name__} has another text than the one it was written for"
    return None


def digest(c):
    """Of the text of a class's functions, as they are now; comments and docstrings do not count."""
    functions = {name: value for name, value in vars(c).items() if inspect.isroutine(value)}
    texts = [f"{name}: {_text(value.__code__)}" for name, value in sorted(functions.items())]
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


if __name__ == "__main__":
    import model_search
    import operations

    names = "ReLUConvBN FactorizedReduce SepConv DilConv Identity Zero".split()
    for c in (model_search.MixedOp, model_search.Cell, *(getattr(operations, n) for n in names)):
        print(f'    "{c.__name__}": "{digest(c)}",')
