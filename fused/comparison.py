"""Whether the fast cell is the same function as the cell that it stands for."""

import inspect

import torch
from torch import nn

TOLERANCE = 1e-8  # relative, in float64; the two agree to some 1e-13
# What the fast cell knows of the modules of a cell, besides weights, statistics and submodules.
KNOWN = {"k", "stride", "sampling", "reduction", "_steps", "_multiplier"} | set(vars(nn.Module()))


def difference(paper, fast, C, edges, ops, reduction_prev):
    """None, or in a few words how fast(), a cell, differs from paper(), the one it stands for.

    C: channels of their two inputs; edges, ops: shape of the weights. Both get the same weights and
    random input; what counts is the output, all gradients, the running statistics, and the output
    in evaluation. An attribute of which the fast cell knows nothing is a difference too: whatever
    it switches, here it would not. Random numbers are afterwards as before.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
            torch.manual_seed(0)
            cells = paper().double(), fast().double()
            inputs = [torch.randn(2, C, size, size) for size in (16 if reduction_prev else 8, 8)]
            inputs += [torch.rand(edges, ops), torch.rand(edges)]
            return _difference(*cells, [x.double().requires_grad_() for x in inputs])
    except Exception as error:  # of whatever somebody has made of a cell
        reason = str(error).strip().splitlines()[:1]
        return ": ".join([type(error).__name__, *reason])[:300]


def _difference(paper, fast, inputs):
    unknown = _unknown(paper, fast)
    if unknown:
        return f"it knows nothing of {unknown}"
    state = paper.state_dict()
    if state.keys() != fast.state_dict().keys():
        name = min(state.keys() ^ fast.state_dict().keys())
        return f"{name} is in the state dict of one form alone"
    state = {name: tensor.clone() for name, tensor in state.items()}
    theirs = _figures(paper, inputs)
    for layout in (torch.channels_last, torch.contiguous_format):  # it works in either
        fast.load_state_dict(state)
        maps = [x.detach().contiguous(memory_format=layout).requires_grad_() for x in inputs[:2]]
        mine = _figures(fast.train(), [*maps, *inputs[2:]])
        for name, expected in theirs.items():
            error = (mine[name] - expected).abs().max()
            if not error <= TOLERANCE * max(1.0, float(expected.abs().max())):
                return f"{name} differs by {float(error):.1g}"
    return None


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
    """An attribute of a module of the paper's cell that the fast one does not know, or None."""
    kept = {name for name, _ in fast.named_modules() if "_ops." in name}  # run as they are
    for name, module in paper.named_modules():
        own = not type(module).__module__.startswith("torch.")
        if own and not any(f"{name}.".startswith(f"{whole}.") for whole in kept):
            for attribute in sorted(vars(module).keys() - KNOWN) + _class_attributes(module):
                return f"{type(module).__name__}.{attribute}"
    return None


def _class_attributes(module):
    """What the classes of a module hold besides functions: switches that may be set later."""
    classes = [
        c for c in type(module).__mro__ if not c.__module__.startswith(("torch.", "builtins"))
    ]
    return [
        name
        for c in classes
        for name, value in vars(c).items()
        if not name.startswith("__") and not inspect.isroutine(value)
    ]
