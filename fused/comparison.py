"""Whether the fast form of a cell is the same function as the cell."""

import contextlib
import random

import numpy as np
import torch

from fused.known import unfamiliar
from fused.plan import Plan

TOLERANCE = 1e-8  # relative, in float64; the two agree to some 1e-13


def difference(paper, fast, C, edges, ops, reduction_prev):
    """None, or in a few words how fast(), a cell, differs from paper(), the one it stands for.

    C: channels of their two inputs; edges, ops: shape of the weights. Both get the same weights and
    random input; what counts is the output, all gradients, the running statistics, and the output
    in evaluation. A class of another text than the fast form was written for is a difference, too.
    Random numbers are afterwards as before.
    """
    python, numpy = random.getstate(), np.random.get_state()  # torch's: fork_rng
    try:
        elsewhere = torch.get_default_device().type != "cpu"  # this mode costs a third of the time
        here = torch.device("cpu") if elsewhere else contextlib.nullcontext()
        with torch.random.fork_rng(devices=[]), here, torch.enable_grad():
            torch.default_generator.manual_seed(0)  # torch.manual_seed is of the GPUs, too
            cells = paper().double(), fast().double()
            plan = Plan(cells[1])
            why = unfamiliar(type(cells[0])) or plan.why
            if why is not None:
                return why
            for edge in [*cells[0]._ops, *cells[1]._ops]:
                for o in plan.kinds.others:  # which run as they are, perhaps with random numbers
                    edge._ops[o].eval()
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
    fast.load_state_dict(paper.state_dict())
    maps = [x.detach().contiguous(memory_format=torch.channels_last) for x in inputs[:2]]
    mine = _figures(fast, [*(x.requires_grad_() for x in maps), *inputs[2:]])
    for name, expected in _figures(paper, inputs).items():
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
    names, parameters = zip(*cell.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, [*inputs, *parameters], g, materialize_grads=True)
    figures = {"the output": out.detach()}
    names = ("s0", "s1", "softmax(alpha)", "softmax(beta)", *names)
    figures |= {f"the gradient of {n}": t for n, t in zip(names, gradients, strict=True)}
    figures |= {f"{name} after a step": t.clone() for name, t in cell.state_dict().items()}
    cell.eval()
    figures["the output in evaluation"] = cell(*inputs).detach()
    return figures
