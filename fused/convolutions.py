"""Convolutions of the fast cell: depthwise ones with their backward passes, halving ones.

Their memory format is that of the input, channels_last or contiguous, from end to end.
"""

import functools

import torch
import torch.nn.functional as F


def layout(x):
    """The memory format of x (N, C, H, W), which may be a slice along channels."""
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def refuse_second_derivatives():
    """Under create_graph=True: what follows is no function of alphas and betas to autograd."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the supernet is once differentiable: take second derivatives by finite differences"
        )


def conv_backward(which, g, x, weight, groups=1, padding=(0, 0), dilation=(1, 1)):
    """The gradients of a convolution with respect to "weight" (its shape counts) and "bias"."""
    mask = [False, *(name in which for name in ("weight", "bias"))]
    geometry = [1, 1], list(padding), list(dilation), False, [0, 0], groups
    gradients = torch.ops.aten.convolution_backward(g, x, weight, [len(weight)], *geometry, mask)
    return [gradient for gradient, wanted in zip(gradients, mask, strict=True) if wanted]


def pointwise_weight_gradient(g, x):
    """dL/dweight (C_out, C_in) of a 1x1 convolution of x: the sum over all pixels of g x^T.

    Transposed, it is the gradient of a convolution from g to x, and taken as that where x has the
    more channels: oneDNN is then up to three times as fast.
    """
    if g.shape[1] < x.shape[1]:
        return pointwise_weight_gradient(x, g).t()
    (dweight,) = conv_backward(["weight"], g, x, of_shape(x, g.shape[1], x.shape[1], 1, 1))
    return dweight.flatten(1)


def of_shape(x, *size):
    """A tensor of this size for conv_backward, without memory of its own."""
    return x.as_strided(size, [0] * len(size))


@functools.cache
def identity(n, dtype, device):
    """(n, n)."""
    with torch.inference_mode(False):
        return torch.eye(n, dtype=dtype, device=device)


@functools.cache
def _repeated_identity(S, c, R, dtype, device):
    """The kernel that sums each of R copies of c channels, in S groups: (S * c, R * c, 1, 1)."""
    return identity(c, dtype, device).repeat(S, R)[:, :, None, None]


class Pointwise(torch.autograd.Function):
    """A 1x1 convolution of x (N, C_in, H, W), weight (C_out, C_in, 1, 1): (N, C_out, H, W)."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight)

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivatives()
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = F.conv2d(g, weight.transpose(0, 1))
        if ctx.needs_input_grad[1]:
            dweight = pointwise_weight_gradient(g, x).contiguous().view(weight.shape)
        return dx, dweight


class Halve(torch.autograd.Function):
    """The 1x1 convolutions of FactorizedReduces, side by side: x (N, S * C_in, H, W) to
    (N, E * C_out, H / 2, W / 2). E of them; E / S read each of S groups of channels.

    weights: (E, C_out / 2, C_in, 1, 1) each; the first is for the pixels (2 i, 2 j) of x, the other
    for (2 i + 1, 2 j + 1).
    """

    @staticmethod
    def forward(ctx, x, S, *weights):
        if x.shape[2] % 2 or x.shape[3] % 2:
            size = f"{x.shape[2]} x {x.shape[3]}"
            raise ValueError(f"a map of {size} cannot be halved: give images whose maps stay even")
        ctx.save_for_backward(x, *weights)
        ctx.S = S
        parts = [
            F.conv2d(_every_other(x, i), weight.flatten(0, 1), groups=S)
            for i, weight in enumerate(weights)
        ]
        E, dim = len(weights[0]), 3 if layout(x) == torch.channels_last else 1
        if dim == 3:
            parts = [part.permute(0, 2, 3, 1) for part in parts]
        parts = [part.unflatten(dim, (E, -1)) for part in parts]
        halved = torch.cat(parts, dim + 1).flatten(dim, dim + 1)
        return halved.permute(0, 3, 1, 2) if dim == 3 else halved

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivatives()
        (x, *weights), S = ctx.saved_tensors, ctx.S
        dx, dweights = torch.zeros_like(x) if ctx.needs_input_grad[0] else None, [None, None]
        halves = g.unflatten(1, (len(weights[0]), 2, -1)).unbind(2)
        for i, (half, weight) in enumerate(zip(halves, weights, strict=True)):
            half = half.flatten(1, 2).contiguous(memory_format=layout(x))
            if dx is not None:
                kernel = weight.unflatten(0, (S, -1)).flatten(1, 2).transpose(1, 2).flatten(0, 1)
                dx[:, :, i::2, i::2] = F.conv2d(half, kernel, groups=S)
            if ctx.needs_input_grad[2 + i]:
                of_x = _every_other(x, i)
                if S == 1:
                    dweight = pointwise_weight_gradient(half, of_x)
                else:
                    kernel = of_shape(x, *weight.flatten(0, 1).shape)
                    (dweight,) = conv_backward(["weight"], half, of_x, kernel, groups=S)
                dweights[i] = dweight.contiguous().view(weight.shape)
        return dx, None, *dweights


def _every_other(x, i):
    """The pixels (2 j + i, 2 k + i) of x (N, C, H, W): (N, C, H / 2, W / 2)."""
    return x[:, :, i::2, i::2].contiguous(memory_format=layout(x))


class Depthwise(torch.autograd.Function):
    """Depthwise k x k convolutions of relu(x), R of each channel, for each of the weights.

    x (N, S * c, H, W), weights (S, R, c, k, k), k odd, with a dilation and a pair of copies for
    each, for `depthwise`, of which the second is turned by 180 degrees; the padding keeps the size.
    Returns (N, S * R * c, H, W) for each.
    """

    @staticmethod
    def forward(ctx, x, dilations, copies, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.dilations, ctx.turned = dilations, [turned for _, turned in copies]
        x = x.relu()
        spread = {weight.shape[1]: _spread(x, weight) for weight in weights}  # once, where R agree
        return tuple(
            depthwise(spread[weight.shape[1]], copy, dilation)
            for weight, (copy, _), dilation in zip(weights, copies, dilations, strict=True)
        )

    @staticmethod
    def backward(ctx, *gs):
        refuse_second_derivatives()
        x, *weights = ctx.saved_tensors
        dspread, dweights = {}, [None] * len(weights)
        relu = x.relu()
        for i, (g, weight, dilation) in enumerate(zip(gs, weights, ctx.dilations, strict=True)):
            S, R, c, _, _ = weight.shape
            g = g.contiguous(memory_format=layout(x))  # now, not in each of the calls that read it
            if ctx.needs_input_grad[3 + i]:
                if dilation == 1 and c > 4:
                    dweights[i] = depthwise_weight_gradient(g, _spread(relu, weight), weight)
                else:
                    dweights[i] = _spread_weight_gradient(g, relu, weight, dilation)
            if ctx.needs_input_grad[0]:
                part = depthwise(g, ctx.turned[i], dilation)
                dspread[R] = dspread[R].add_(part) if R in dspread else part
        dx = None
        for R, part in dspread.items():
            part = F.conv2d(
                part, _repeated_identity(S, c, R, x.dtype, x.device), groups=S
            )  # sums over R
            dx = part if dx is None else dx.add_(part)
        if dx is not None:
            dx = torch.ops.aten.threshold_backward.grad_input(dx, relu, 0, grad_input=dx)
        return dx, None, None, *dweights


def _spread(x, weight):
    """Each of S groups of c channels R times: (N, S * c, H, W) to (N, S * R * c, H, W)."""
    S, R, c, _, _ = weight.shape
    if layout(x) == torch.contiguous_format:
        return torch.cat([x.unflatten(1, (S, c))] * R, 2).flatten(1, 2)
    x = x.permute(0, 2, 3, 1).unflatten(3, (S, c))
    ones = units(x)
    if ones is not x:
        copies = ones.expand(-1, -1, -1, -1, R).contiguous().view(x.dtype)
    else:
        copies = torch.cat([x] * R, 4)
    return copies.flatten(3).permute(0, 3, 1, 2)


def units(x):
    """x (..., n), the n of each as one number of 16 bytes where they fill it on a CPU, or x.

    A copy in another order of memory then moves one number and not n: up to 4 times as fast.
    """
    n = 16 // x.element_size()
    aligned = all(stride % n == 0 for stride in (*x.stride()[:-1], x.storage_offset()))
    fits = x.device.type == "cpu" and x.shape[-1] == n and x.stride(-1) == 1 and aligned
    return x.view(torch.complex128) if fits else x


def depthwise(x, weight, dilation=1):
    """x (N, C, H, W) with weight (..., k, k) of C kernels in all; also, with them turned, dL/dx.

    (oneDNN's own dL/dx is many times slower where the kernel is dilated.) The weight may hold all
    twice: pixels side by side are then taken as one of 2 C channels. Between these a dilation of 2
    leaves no gap in a row, and oneDNN is up to 1.5 times as fast.
    """
    k, C = weight.shape[-1], x.shape[1]
    kernel = weight.reshape(-1, 1, k, k).to(x.dtype)
    if dilation == 2 and len(kernel) > C and _has_pairs(x):
        return _unpaired(F.conv2d(_paired(x), kernel, None, 1, (k - 1, k // 2), (2, 1), 2 * C))
    return F.conv2d(x, kernel[:C], None, 1, dilation * (k // 2), dilation, C)


def _has_pairs(x):
    """Whether `_paired` only changes the view of a dense x."""
    return layout(x) == torch.channels_last and x.shape[3] % 2 == 0


def _paired(x):
    """x (N, C, H, W) with two pixels of a row as one: (N, 2 C, H, W / 2), in channels_last."""
    n, C, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, h, w // 2, 2 * C).permute(0, 3, 1, 2)


def _unpaired(x):
    """(N, C, H, W) of what `_paired` gives."""
    n, C, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, h, 2 * w, C // 2).permute(0, 3, 1, 2)


def _spread_weight_gradient(g, x, weight, dilation):
    """dL/dweight (S, R, c, k, k) of `depthwise` of `_spread`, as the diagonal of c x c kernels."""
    S, R, c, k, _ = weight.shape
    if dilation > 1 and x.device.type == "cpu":  # oneDNN reads out of bounds there in bfloat16
        g, x = g.to(weight.dtype), x.to(weight.dtype)
        h, w = x.shape[2:]
        if dilation == 2 and w < 2 * k - 1 and h % 2 == w % 2 == 0:  # wider than x, it is slow
            g, x, dilation = _phases(g), _phases(x), 1
    times, padding, dilation = 1, [dilation * (k // 2)] * 2, [dilation] * 2
    # Pairs of pixels as in `depthwise`; of one group of channels they are no faster.
    if S > 1 and dilation[1] == 2 and x.device.type == "cpu" and _has_pairs(x):
        g, x, times, padding[1], dilation[1] = _paired(g), _paired(x), 2, k // 2, 1
    kernel = of_shape(x, times * S * R * c, c, k, k)
    (dweight,) = conv_backward(["weight"], g, x, kernel, times * S, padding, dilation)
    dweight = dweight.unflatten(0, (2, -1)).sum(0) if times == 2 else dweight
    dweight = dweight.view(S, R, c, c, k, k).diagonal(dim1=2, dim2=3)
    return dweight.permute(0, 1, 4, 2, 3).contiguous()


def _phases(x):
    """x (N, C, H, W) as the four maps that dilation 2 keeps apart: (4 N, C, H / 2, W / 2)."""
    x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 3, 5, 2, 4, 1)
    return x.flatten(0, 2).permute(0, 3, 1, 2)


def depthwise_weight_gradient(g, x, weight):
    """dL/dweight (..., k, k) of `depthwise` of x, not dilated.

    oneDNN is slow at kernels wider than 3. Two pixels side by side are one with 2 C channels: for
    k = 5, its even columns are the 3 of a kernel over pairs, its odd ones the 2 of another.
    """
    C, k = x.shape[1], weight.shape[-1]
    if k != 5 or x.shape[3] % 2 or x.device.type != "cpu":
        kernel = of_shape(x, C, 1, k, k)
        return conv_backward(["weight"], g, x, kernel, C, (k // 2, k // 2))[0].view(weight.shape)

    edge = x.new_zeros(len(x), x.shape[2], 1, C)
    shifted = torch.cat([edge, x.permute(0, 2, 3, 1), edge], 2).permute(0, 3, 1, 2)
    g, even, odd = _paired(g), _paired(x), _paired(shifted)
    (even,) = conv_backward(["weight"], g, even, of_shape(g, 2 * C, 1, 5, 3), 2 * C, (2, 1))
    (odd,) = conv_backward(["weight"], g, odd, of_shape(g, 2 * C, 1, 5, 2), 2 * C, (2, 0))
    columns = torch.stack([even, F.pad(odd, (0, 1))], 4).flatten(3)[..., :5]  # (2 C, 1, 5, 5)
    return (columns[:C] + columns[C:]).view(weight.shape)


def quarters(x):
    """The pixels (2 i + p, 2 j + q) of x (N, C, H, W), p, q = 0, 1: four of (N, C, H / 2, W / 2).

    Where a side is odd, with a zero behind it.
    """
    if x.shape[2] % 2 or x.shape[3] % 2:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    last = layout(x) == torch.channels_last
    x, dim = (x.permute(0, 2, 3, 1), 1) if last else (x, 2)
    rows = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    parts = [part for row in rows for part in row.unflatten(dim + 1, (-1, 2)).unbind(dim + 2)]
    return [part.permute(0, 3, 1, 2) for part in parts] if last else parts


def quarters_of_kernel(kernel):
    """With stride 2 a convolution is the sum of four without, of the quarters of x: their kernels.

    kernel (..., k, k), k odd. Returns four triples as Plan.kernels has them.
    """
    margin = kernel.shape[-1] // 2 % 2  # 1 where the middle is not at an even place
    kernel = F.pad(kernel, [margin, margin + 1] * 2)
    parts = [kernel[..., p::2, q::2] for p in (0, 1) for q in (0, 1)]
    return [(part, part.detach(), part.detach().flip(-2, -1)) for part in parts]
