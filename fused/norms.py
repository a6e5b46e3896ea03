"""The norms of the fast cell, with their backward passes.

A batch norm behind a 1x1 convolution is another 1x1 convolution. With y = P h at every pixel,
    mean(y) = P mean(h),  mean(y^2) = diag(P mean(h h^T) P^T),
    norm(y) = A h + b,  A = P / std(y),  b = -mean(y) / std(y),
so c + c * c figures a block are all that the norm needs of a batch: y is never made nor kept,
and a weighted sum of norms is one convolution with the weighted A side by side. Backward, with
g = dL/dnorm(y), dA = sum(g h^T) and db = sum(g) over the m pixels, r = diag(dA A^T) + db b,
    dL/dh = A^T g - (A^T diag(r) A h + A^T (db + r b)) / m,
    dL/dP = (dA - (db + r b) mean(h)^T - r A mean(h h^T)) / std(y).

Tensors (N, G * c, H, W) are G blocks of c channels; a matrix (G, c, c) acts on each block apart.
Their memory format is that of the input, channels_last or contiguous, from end to end.
"""

import contextlib

import torch
import torch.nn.functional as F

from fused.convolutions import (
    conv_backward,
    depthwise,
    depthwise_weight_gradient,
    identity,
    layout,
    of_shape,
    pointwise_weight_gradient,
    refuse_second_derivatives,
)

EPS, MOMENTUM = 1e-5, 0.1  # of every batch norm: PyTorch's defaults
SLOW_BIAS = 2**22  # bytes of a map from which on a sum is faster than the gradient of a bias


@contextlib.contextmanager
def without_tf32(device):
    """Within it the convolutions of a GPU do not round float32 to the 10 bits of TF32."""
    if device.type != "cuda":
        yield
        return
    owner, name, value = getattr(torch.backends.cudnn, "conv", None), "fp32_precision", "ieee"
    if owner is None:  # torch 2.8
        owner, name, value = torch.backends.cudnn, "allow_tf32", False
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _blocks_per_group(G, c, most):
    """How many blocks make a group of a 1x1 convolution of `most` channels, or of one block.

    As few as fill vector registers of 16, or else as many as may be.
    """
    fit = [n for n in range(1, max(1, most // c) + 1) if G % n == 0]
    return next((n for n in fit if n * c % 16 == 0), fit[-1])


def _blockwise(h, A, b=None):
    """A h + b in every block: h (N, G * c, H, W), A (G, c, c), b (G, c, 1)."""
    G, c, _ = A.shape
    n = _blocks_per_group(G, c, 64)
    if n > 1:  # n blocks of c are one of n * c with zeros off the diagonal
        A = (
            A.unflatten(0, (G // n, n)).unsqueeze(3)
            * identity(n, A.dtype, A.device)[:, None, :, None]
        )
    kernel = A.reshape(G * c, n * c, 1, 1).to(h.dtype)
    return F.conv2d(h, kernel, None if b is None else b.flatten().to(h.dtype), groups=G // n)


def _sums(g, h, c):
    """The sums over all pixels of g h^T and of g, side by side, for every block: (G, c, c + 1)."""
    G = h.shape[1] // c
    n = _blocks_per_group(G, c, 20)  # the products outside of the blocks are for nothing
    # They are the gradients of a 1x1 convolution's kernel and bias.
    small = ["bias"] if g.nbytes < SLOW_BIAS else []
    outer, *total = conv_backward(
        ["weight", *small], g, h, of_shape(h, G * c, n * c, 1, 1), groups=G // n
    )
    total = total[0] if total else g.sum((0, 2, 3))
    outer = outer.view(G // n, n, c, n, c).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return torch.cat([outer, total.view(G // n, n, c, 1)], 3).flatten(0, 1)


class Moments(list):
    """(-mean, variance) of the norms of a cell, in their order.

    total: None; or where the statistics are to be those of all processes, a function that gives the
    sums of tensors over them, and fraction: the share of this process in all images.
    """

    def __init__(self, fraction=1, total=None):
        super().__init__()
        self.fraction, self.total = fraction, total


class _Norm:
    """norm(P h) = A h + b, of blocks that lie in the tensors hs in this order, and its backward.

    -mean and variance of P h, (G, c, 1), are added to `moments`. The last `unnormed` blocks, with
    the identity in P, are not normalized. Sums over pixels come as [sum(g h^T), sum(g)], and A and
    b as [A b], (G, c, c + 1): half the calls.
    """

    def __init__(self, hs, P, moments, unnormed=0):
        self.pixels = hs[0].numel() // hs[0].shape[1]
        normed = len(P) - unnormed
        self.fraction, self.total = moments.fraction, moments.total
        if self.pixels == 1 and self.total is None:  # as nn.BatchNorm2d, whose words these are
            raise ValueError("Expected more than 1 value per channel when training")
        # In float32: a variance is the small difference of two large figures.
        exact = (h.to(P.dtype) for h in hs)
        with without_tf32(P.device):
            sums = [_sums(h, h, P.shape[1]) for h in exact]
        sums = torch.cat(sums) if len(sums) > 1 else sums[0]
        self.sums = self._everywhere(sums.to(P.dtype))
        # -P mean(h h^T), and -mean(y)
        minus = torch.baddbmm(self.sums, P, self.sums, beta=0, alpha=-1 / self.pixels)
        minus_mean = minus[:, :, -1:]
        self.Ab = torch.cat([P, minus_mean], 2)  # [A b] times std(y), (G, c, c + 1)
        var = _dots(minus, self.Ab, -1)  # diag(P mean(h h^T) P^T) - mean(y)^2
        var.clamp_min_(0)  # by rounding it can be below
        moments.append((minus_mean[:normed], var[:normed]))
        self.inv_std = (var + EPS).rsqrt_()
        self.Ab[:normed].mul_(self.inv_std[:normed])
        if unnormed:
            self.Ab[normed:, :, -1] = 0
        self.A, self.b = _parts(self.Ab)

    def backward(self, dAb, dP_too):
        """dL/dP, and [D e] for dL/dh = A^T g - (D h + e) / m; dAb: 0 in unnormed blocks."""
        shifted = self._shifted(dAb)
        dP = None
        if dP_too:
            # dA - (db + r b) mean(h)^T - r A mean(h h^T), the last two as one product
            dA, _ = _parts(dAb)
            dP = torch.baddbmm(dA, shifted, self.sums.mT, alpha=-1 / self.pixels)
            dP = dP.mul_(self.inv_std)
        if self.total is not None:  # h is in the statistics of all; dP is summed over them later
            shifted = self._shifted(self._everywhere(dAb))
        return dP, torch.bmm(self.A.mT, shifted)

    def _shifted(self, dAb):
        """[diag(r) A, db + r b], (G, c, c + 1)."""
        shifted = self.Ab * _dots(dAb, self.Ab)
        shifted[:, :, -1].add_(dAb[:, :, -1])
        return shifted

    def _everywhere(self, sums):
        """The sums over all processes, times the fraction of the pixels that this one has."""
        return sums if self.total is None else self.total([sums])[0] * self.fraction

    def add_input_gradient(self, dh, h, De):
        """dh - (D h + e) / m, in dh."""
        return dh.add_(_blockwise(h, *_parts(De)), alpha=-1 / self.pixels)


def _parts(Ab):
    """A (G, c, c) and b (G, c, 1) of [A b]."""
    return Ab[:, :, :-1], Ab[:, :, -1:]


def _dots(A, B, sign=1):
    """sign * the products of rows of A and B (G, c, n): (G, c, 1)."""
    rows, columns = A.view(-1, 1, A.shape[2]), B.view(-1, B.shape[2], 1)
    dots = torch.baddbmm(rows[:, :, :1], rows, columns, beta=0, alpha=sign)
    return dots.view(*A.shape[:2], 1)


class NormReLUDepthwise(torch.autograd.Function):
    """The middle of the sep_convs: depthwise k x k convolutions of relu(norm(P h)).

    h (N, G * c, H, W), P (G, c, c), weight of G * c kernels (..., k, k), and turned by 180 degrees.
    moments: see _Norm. With a dict `again`, z = relu(norm(P h)) is not kept
    for the backward pass: it is made again, unless `remake` did so and left it in again["z"].
    """

    @staticmethod
    def forward(ctx, moments, again, turned, h, P, weight):
        ctx.norm = _Norm([h], P, moments)
        ctx.again, ctx.turned = again, turned
        z = NormReLUDepthwise.relu(h, ctx.norm)
        if again is not None:
            again["norm"] = ctx.norm
        ctx.save_for_backward(h, z if again is None else None, weight)
        return depthwise(z, weight)

    @staticmethod
    def relu(h, norm):
        return _blockwise(h, norm.A, norm.b).relu_()

    @staticmethod
    def remake(h, weight, again):
        """The output anew; for the backward pass."""
        again["z"] = NormReLUDepthwise.relu(h, again["norm"])
        return depthwise(again["z"], weight)

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivatives()
        h, z, weight = ctx.saved_tensors
        norm, dweight = ctx.norm, None
        if z is None:
            z = ctx.again.pop("z", None)
        if z is None:
            z = NormReLUDepthwise.relu(h, norm)
        g = g.contiguous(memory_format=layout(h))
        if ctx.needs_input_grad[5]:
            dweight = depthwise_weight_gradient(g, z, weight)
        g = depthwise(g, ctx.turned)
        g = torch.ops.aten.threshold_backward.grad_input(g, z, 0, grad_input=g)
        dAb = _sums(g, h, norm.A.shape[1]).to(norm.A.dtype)
        dP, De = norm.backward(dAb, ctx.needs_input_grad[4])
        dh = norm.add_input_gradient(_blockwise(g, norm.A.mT), h, De)
        return None, None, None, dh, dP, dweight


class NormSum(torch.autograd.Function):
    """start + sum_g W[t, g] * norm(P_g h_g): (N, T * c, H, W).

    start (N, T * c, H, W) or None, W (T, G), P (G, c, c); the blocks h_1 ... h_G lie in the tensors
    hs, in this order. W_normed is W with zeros for the unnormed blocks. `remake` is None, or makes
    hs again from the tensors `kept`, which are kept for the backward pass in their place. moments
    and unnormed: see _Norm.
    """

    @staticmethod
    def forward(ctx, moments, unnormed, start, W_normed, remake, kept, W, P, *hs):
        norm = _Norm(hs, P, moments, unnormed)
        T, G, c = *W.shape, P.shape[1]
        kernel = W[:, None, :, None] * norm.A.transpose(0, 1)  # (T, c, G, c)
        kernel = kernel.reshape(T * c, G * c, 1, 1).to(hs[0].dtype)
        bias = (W @ norm.b.squeeze(2)).flatten().to(hs[0].dtype)
        ctx.kernels = kernel.split([h.shape[1] for h in hs], 1)
        ctx.norm, ctx.started, ctx.W_normed = norm, start is not None, W_normed
        ctx.remake = remake
        ctx.save_for_backward(W, *(kept if remake else hs))
        for h, part in zip(hs, ctx.kernels, strict=True):
            part, bias = F.conv2d(h, part, bias), None
            start = part if start is None else part.add_(start)
        return start

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivatives()
        W, *hs = ctx.saved_tensors
        hs = ctx.remake(*hs) if ctx.remake else hs
        g = g.contiguous(memory_format=layout(hs[0]))
        norm, (T, G) = ctx.norm, W.shape
        c = norm.A.shape[1]
        outer = [pointwise_weight_gradient(g, h) for h in hs]
        outer = torch.cat(outer, 1) if len(hs) > 1 else outer[0]
        outer = outer.view(T, c, G, c).permute(2, 0, 1, 3)
        total = g.sum((0, 2, 3)).view(1, T, c, 1).expand(G, -1, -1, -1)
        # The sums over all pixels of g h^T and of g, side by side: (G, T, c * (c + 1)).
        sums = torch.cat([outer, total], 3).flatten(2).to(W.dtype)
        dAb = torch.bmm(ctx.W_normed.t().unsqueeze(1), sums).view(G, c, c + 1)
        dP, De = norm.backward(dAb, ctx.needs_input_grad[7])
        dW = None
        if ctx.needs_input_grad[6]:
            dW = torch.bmm(sums, norm.Ab.view(G, -1, 1)).squeeze(2).t()
        dhs, at = [], 0
        for h, part in zip(hs, ctx.kernels, strict=True):
            blocks = slice(at, at := at + h.shape[1] // c)
            dh = F.conv2d(g, part.transpose(0, 1))
            dhs.append(norm.add_input_gradient(dh, h, De[blocks]))
        start = g if ctx.started else None
        return None, None, start, None, None, None, dW, dP, *dhs


def norm_relu_depthwise(mean, var, h, P, weight):
    """What NormReLUDepthwise gives in evaluation: mean and var (G, c) are the running figures."""
    inv_std = (var + EPS).rsqrt()
    z = _blockwise(h, inv_std[:, :, None] * P, (-mean * inv_std)[:, :, None]).relu_()
    return depthwise(z, weight)


def norm_sum(mean, var, unnormed, start, W, P, hs):
    """What NormSum gives in evaluation; mean, var: the running figures (T, G - unnormed, c)."""
    inv_std = (var + EPS).rsqrt()
    inv_std, shift = F.pad(inv_std, (0, 0, 0, unnormed), value=1), F.pad(-mean, (0, 0, 0, unnormed))
    scale = W[:, :, None] * inv_std  # (T, G, c)
    kernel = scale.transpose(1, 2)[..., None] * P.transpose(0, 1)  # (T, c, G, c)
    kernel = kernel.flatten(2).flatten(0, 1)[:, :, None, None].to(hs[0].dtype)
    bias = (scale * shift).sum(1).flatten().to(hs[0].dtype)
    for h, part in zip(hs, kernel.split([h.shape[1] for h in hs], 1), strict=True):
        out, bias = F.conv2d(h, part, bias), None
        start = out if start is None else out.add_(start)
    return start
