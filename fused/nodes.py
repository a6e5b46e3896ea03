"""The nodes of the fast cell: what was mixed and what passed by, put together and sampled anew."""

import math

import torch

from fused.convolutions import refuse_second_derivatives
from fused.pools import HalvedMax


def pass_by(bypass, rest, betas, stride, dim):
    """`bypass` + betas (T,) times rest (N, C - c, H, W), flat: (T, N * H * W * (C - c)).

    dim: the place of the channels in the order of memory, 3 for channels_last, 1 for contiguous.
    bypass: None at first.
    """
    if stride == 2:
        rest = HalvedMax.apply(rest)
    rest, betas = _moved(rest, dim).flatten(), betas.to(rest.dtype)
    return Outer.apply(betas, rest) if bypass is None else bypass.addr(betas, rest)


class Outer(torch.autograd.Function):
    """torch.outer(a, b), whose gradients PyTorch would take by way of two maps of its size."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.outer(a, b)

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivatives()
        a, b = ctx.saved_tensors
        da = torch.mv(g, b) if ctx.needs_input_grad[0] else None
        return da, torch.mv(g.t(), a) if ctx.needs_input_grad[1] else None


class Node(torch.autograd.Function):
    """The next node of a cell, sampled anew, and the sums so far of those after it.

    mixed (N, T * c, H, W), bypass (T, N * H * W * (C - c)): the sums of the operations and of
    `pass_by` (dim: as there) of the T nodes that are left of `steps`. gradient: a list that the
    nodes of a cell share, for dL/dbypass.
    Returns the node (N, C, H, W), mixed (N, (T - 1) * c, H, W) and bypass (T - 1, ...), or None.
    """

    @staticmethod
    def forward(ctx, mixed, bypass, c, dim, steps, cell, gradient):
        own, sampling = _moved(mixed[:, :c], dim), cell.sampling
        size = list(own.shape)
        size[dim] = (cell._ops[0].k - 1) * c  # an error where HalvedMax made other sizes
        passed = bypass[0].view(size)
        if sampling == "shuffle":
            # Channel i of group g goes to place i * K + g: channel_shuffle in one write.
            node = torch.stack([own, *passed.split(c, dim)], dim + 1).flatten(dim, dim + 1)
        elif sampling == "shift":  # the next operations take the first that passed here
            node = torch.cat([passed, own], dim)
        else:  # every channel back in its place
            node = torch.cat([own, passed], dim).index_select(dim, cell.channel_places)
        ctx.save_for_backward(cell.channel_order if sampling == "random" else None)
        ctx.c, ctx.dim, ctx.sampling, ctx.gradient = c, dim, sampling, gradient
        ctx.before = steps - len(bypass)
        node = node.permute(0, 3, 1, 2) if dim == 3 else node
        return (node, mixed[:, c:], bypass[1:]) if len(bypass) > 1 else (node, None, None)

    @staticmethod
    def backward(ctx, g, dmixed, dbypass):
        refuse_second_derivatives()
        c, dim, before, g = ctx.c, ctx.dim, ctx.before, _moved(g, ctx.dim)
        if ctx.sampling == "shuffle":
            own, *passed = g.unflatten(dim, (c, -1)).unbind(dim + 1)
        elif ctx.sampling == "shift":
            *passed, own = g.split([g.shape[dim] - c, c], dim)
        else:
            (order,) = ctx.saved_tensors
            own, *passed = g.index_select(dim, order).split([c, g.shape[dim] - c], dim)
        if dmixed is not None:
            own = torch.cat([own, _moved(dmixed, dim)], dim)
        # dL/dbypass grows by a row from node to node, backwards: each is written into its place.
        kept, size = ctx.gradient, list(g.shape)
        size[dim] -= c
        if dbypass is None or not kept or kept[0][before + 1 :].data_ptr() != dbypass.data_ptr():
            others = 0 if dbypass is None else len(dbypass)
            kept[:] = [g.new_empty(before + 1 + others, math.prod(size))]
            if others:
                kept[0][before + 1 :] = dbypass
        rows = kept[0]
        torch.cat(passed, dim, out=rows[before].view(size))
        if before == 0:
            kept.clear()
        own = own.permute(0, 3, 1, 2) if dim == 3 else own
        return own, rows[before:], None, None, None, None, None


def _moved(x, dim):
    """x (N, C, H, W) with its channels as this dimension, 1 or 3."""
    return x.permute(0, 2, 3, 1) if dim == 3 else x
