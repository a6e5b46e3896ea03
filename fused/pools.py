"""The pools of the fast cell, which keep the places of the maxima for their backward passes."""

import torch
import torch.nn.functional as F
from torch import nn

from fused.convolutions import layout, refuse_second_derivatives, units


class WidePools(torch.autograd.Function):
    """Max and average pools of x (N, C, H, W), one after the other: (N, n * C, h, w).

    For few channels on a CPU: PyTorch's channels_last kernels run along the channels, and take ten
    times as long with 4 as with 64. So the images lie side by side here, as the channels of one:
    (1, N * C, H, W). What is kept are the places of the maxima.
    """

    @staticmethod
    def forward(ctx, x, pools):
        n, C, H, W = x.shape
        wide = units(x.permute(0, 2, 3, 1)).permute(1, 2, 0, 3).contiguous().view(x.dtype)
        wide = wide.view(1, H, W, n * C).permute(0, 3, 1, 2)
        outs, places = [], []
        for pool in pools:
            if isinstance(pool, nn.MaxPool2d):
                out, its = F.max_pool2d(wide, *_window(pool), return_indices=True)
                places.append(its.int())
            else:
                out = pool(wide)
            out = out.permute(0, 2, 3, 1).view(*out.shape[2:], n, C)
            outs.append(units(out).permute(2, 0, 1, 3))
        ctx.save_for_backward(*places)
        ctx.size, ctx.pools = x.shape, pools
        return torch.stack(outs, 3).view(x.dtype).flatten(3).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivatives()
        (n, C, H, W), places, dx = ctx.size, iter(ctx.saved_tensors), None
        x = g.new_empty(1, H, W, n * C).permute(0, 3, 1, 2)
        gs = units(g.permute(0, 2, 3, 1).unflatten(3, (-1, C))).permute(3, 1, 2, 0, 4)
        gs = gs.contiguous().view(g.dtype).flatten(3)  # (pools, h, w, N * C)
        gs = gs.unsqueeze(1).permute(0, 1, 4, 2, 3)
        for pool, g in zip(ctx.pools, gs, strict=True):
            if isinstance(pool, nn.MaxPool2d):
                its = next(places).long()
                g = torch.ops.aten.max_pool2d_with_indices_backward(g, x, *_window(pool), its)
            else:
                more = pool.count_include_pad, pool.divisor_override
                g = torch.ops.aten.avg_pool2d_backward(g, x, *_window(pool), *more)
            dx = g if dx is None else dx.add_(g)
        dx = units(dx.permute(0, 2, 3, 1).view(H, W, n, C)).permute(2, 0, 1, 3)
        return dx.contiguous().view(g.dtype).permute(0, 3, 1, 2), None


def _window(pool):
    """Kernel, stride, padding, of max pools dilation, and ceil_mode, in the order of aten's."""
    names = ["kernel_size", "stride", "padding", "dilation"]
    sizes = [getattr(pool, name) for name in names if hasattr(pool, name)]
    return *([size, size] if isinstance(size, int) else size for size in sizes), pool.ceil_mode


class HalvedMax(torch.autograd.Function):
    """F.max_pool2d(x, 2, 2), which keeps the places of the maxima for its backward, but not x."""

    @staticmethod
    def forward(ctx, x):
        out, places = F.max_pool2d(x, 2, 2, return_indices=True)
        ctx.save_for_backward(places.int())
        ctx.size, ctx.layout = x.shape, layout(x)
        return out

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivatives()
        g = g.contiguous(memory_format=ctx.layout)
        x = torch.empty(ctx.size, dtype=g.dtype, device=g.device, memory_format=ctx.layout)
        places = ctx.saved_tensors[0].long()
        return torch.ops.aten.max_pool2d_with_indices_backward(
            g, x, [2, 2], [2, 2], [0, 0], [1, 1], False, places
        )
