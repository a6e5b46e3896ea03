"""The functions of the fast cell, with their backward passes.

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
import functools

import torch
import torch.nn.functional as F

EPS, MOMENTUM = 1e-5, 0.1  # of every batch norm: PyTorch's defaults
SLOW_BIAS = 2**22  # bytes of a map from which on a sum is faster than the gradient of a bias


def layout(x):
    """The memory format of x (N, C, H, W), which may be a slice along channels."""
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def in_layout(x, layout):
    """x (N, C, H, W) in this memory format; as it is for None, and within torch.func.vmap."""
    if layout is None or torch._C._functorch.peek_interpreter_stack() is not None:
        return x
    return x.contiguous(memory_format=layout)


def _conv_backward(which, g, x, weight, groups=1, padding=(0, 0), dilation=1):
    """The gradients of a convolution with respect to "weight" (its shape counts) and "bias"."""
    mask = [False, *(name in which for name in ("weight", "bias"))]
    geometry = [1, 1], list(padding), [dilation, dilation], False, [0, 0], groups
    gradients = torch.ops.aten.convolution_backward(g, x, weight, [len(weight)], *geometry, mask)
    return [gradient for gradient, wanted in zip(gradients, mask, strict=True) if wanted]


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


def _shape(x, *size):
    """A tensor of this size for _conv_backward, without memory of its own."""
    return x[:1, :1, :1, :1].expand(*size)


@functools.cache
def identity(n, dtype, device):
    """(n, n)."""
    with torch.inference_mode(False):
        return torch.eye(n, dtype=dtype, device=device)


@functools.cache
def _repeated_identity(S, c, R, dtype, device):
    """The kernel that sums each of R copies of c channels, in S groups: (S * c, R * c, 1, 1)."""
    return identity(c, dtype, device).repeat(S, R)[:, :, None, None]


def _blocks_per_group(G, c):
    """How many blocks make a group of a 1x1 convolution: some 16 channels, a vector register."""
    return max(n for n in range(1, max(1, 20 // c) + 1) if G % n == 0)


def _blockwise(h, A, b=None):
    """A h + b in every block: h (N, G * c, H, W), A (G, c, c), b (G, c, 1)."""
    G, c, _ = A.shape
    n = _blocks_per_group(G, c)
    if n > 1:  # n blocks of c are one of n * c with zeros off the diagonal
        A = (
            A.unflatten(0, (G // n, n)).unsqueeze(3)
            * identity(n, A.dtype, A.device)[:, None, :, None]
        )
    kernel = A.reshape(G * c, n * c, 1, 1).to(h.dtype)
    return F.conv2d(h, kernel, None if b is None else b.flatten().to(h.dtype), groups=G // n)


def _sums(g, h, c):
    """The sums over all pixels of g h^T, (G, c, c), and of g, (G, c, 1), for every block."""
    G = h.shape[1] // c
    n = _blocks_per_group(G, c)
    # They are the gradients of a 1x1 convolution's kernel and bias.
    small = ["bias"] if g.nbytes < SLOW_BIAS else []
    outer, *total = _conv_backward(
        ["weight", *small], g, h, _shape(h, G * c, n * c, 1, 1), groups=G // n
    )
    total = total[0] if total else g.sum((0, 2, 3))
    if n > 1:
        outer = outer.reshape(G // n, n, c, n, c).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return outer.reshape(G, c, c), total.view(G, c, 1)


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

    -mean and variance of P h, (G, c, 1), are added to `moments`. The last `plain` blocks, with
    identical matrices in P, are not normalized.
    """

    def __init__(self, hs, P, moments, plain=0):
        self.pixels = hs[0].numel() // hs[0].shape[1]
        normed = len(P) - plain
        self.fraction, self.total = moments.fraction, moments.total
        if self.pixels == 1 and self.total is None:  # as nn.BatchNorm2d, whose words these are
            raise ValueError("Expected more than 1 value per channel when training")
        # In float32: a variance is the small difference of two large figures.
        exact = (h.to(P.dtype) for h in hs)
        with without_tf32(P.device):
            sums = list(zip(*(_sums(h, h, P.shape[1]) for h in exact), strict=True))
        outer, self.sum = self._everywhere([_joined(parts, P) for parts in sums])
        self.P_outer = torch.baddbmm(outer, P, outer, beta=0, alpha=1 / self.pixels)
        minus_mean = torch.baddbmm(self.sum, P, self.sum, beta=0, alpha=-1 / self.pixels)
        var = _dots(minus_mean.square(), self.P_outer, P, -1)
        var.clamp_min_(0)  # by rounding it can be below
        moments.append((minus_mean[:normed], var[:normed]))
        self.inv_std = (var + EPS).rsqrt_()
        self.A, self.b = self.inv_std * P, self.inv_std * minus_mean
        if plain:
            self.A[normed:], self.b[normed:] = P[normed:], 0

    def backward(self, dA, db, dP_too):
        """dL/dP, and D and e for dL/dh = A^T g - (D h + e) / m; dA and db are 0 in plain blocks."""
        r, shift = self._terms(dA, db)
        dP = None
        if dP_too:
            dP = torch.baddbmm(dA, shift, self.sum.mT, alpha=-1 / self.pixels)
            dP = dP.addcmul_(self.P_outer, r * self.inv_std, value=-1).mul_(self.inv_std)
        if self.total is not None:  # h is in the statistics of all; dP is summed over them later
            r, shift = self._terms(*self._everywhere([dA, db]))
        return dP, torch.bmm(self.A.mT, self.A * r), torch.bmm(self.A.mT, shift)

    def _terms(self, dA, db):
        r = _dots(db * self.b, dA, self.A)
        return r, torch.addcmul(db, r, self.b)

    def _everywhere(self, sums):
        """The sums over all processes, times the fraction of the pixels that this one has."""
        return sums if self.total is None else [s * self.fraction for s in self.total(sums)]

    def add_input_gradient(self, dh, h, D, e):
        """dh - (D h + e) / m, in dh."""
        return dh.add_(_blockwise(h, D, e), alpha=-1 / self.pixels)


def _dots(start, A, B, sign=1):
    """sign * start + the products of rows of A and B, (G, c, c), as a column (G, c, 1)."""
    rows, columns = A.reshape(-1, 1, A.shape[2]), B.reshape(-1, B.shape[2], 1)
    return torch.baddbmm(start.view(-1, 1, 1), rows, columns, beta=sign).view(start.shape)


def _joined(tensors, like):
    return (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).to(like.dtype)


def refuse_second_derivatives():
    """Under create_graph=True: what follows is no function of alphas and betas to autograd."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the supernet is once differentiable: take second derivatives by finite differences"
        )


class Depthwise(torch.autograd.Function):
    """Depthwise k x k convolutions of relu(x), R of each channel, for each of the weights.

    x (N, S * c, H, W), weights (S, R, c, k, k), k odd, with a dilation and a copy turned by 180
    degrees for each; the padding keeps the size. Returns (N, S * R * c, H, W) for each.
    """

    @staticmethod
    def forward(ctx, x, dilations, turned, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.dilations, ctx.turned = dilations, turned
        x = x.relu()
        spread = {weight.shape[1]: _spread(x, weight) for weight in weights}  # once, where R agree
        return tuple(
            _depthwise(spread[weight.shape[1]], weight, dilation)
            for weight, dilation in zip(weights, dilations, strict=True)
        )

    @staticmethod
    def backward(ctx, *gs):
        refuse_second_derivatives()
        x, *weights = ctx.saved_tensors
        dspread, dweights = {}, [None] * len(weights)
        relu = x.relu()
        for i, (g, weight, dilation) in enumerate(zip(gs, weights, ctx.dilations, strict=True)):
            S, R, c, _, _ = weight.shape
            if ctx.needs_input_grad[3 + i]:
                if dilation == 1 and c > 4:
                    dweights[i] = _depthwise_weight_gradient(g, _spread(relu, weight), weight)
                else:
                    dweights[i] = _spread_weight_gradient(g, relu, weight, dilation)
            if ctx.needs_input_grad[0]:
                part = _depthwise(g, ctx.turned[i], dilation)
                dspread[R] = dspread[R].add_(part) if R in dspread else part
        dx = None
        for R, part in dspread.items():
            part = F.conv2d(
                part, _repeated_identity(S, c, R, x.dtype, x.device), groups=S
            )  # sums over R
            dx = part if dx is None else dx.add_(part)
        if dx is not None:
            dx = torch.ops.aten.threshold_backward(dx, relu, 0)
        return dx, None, None, *dweights


def _spread(x, weight):
    """Each of S groups of c channels R times: (N, S * c, H, W) to (N, S * R * c, H, W)."""
    S, R, c, _, _ = weight.shape
    if layout(x) == torch.contiguous_format:
        return torch.cat([x.unflatten(1, (S, c))] * R, 2).flatten(1, 2)
    x = x.permute(0, 2, 3, 1).unflatten(3, (S, c))
    return torch.cat([x] * R, 4).flatten(3).permute(0, 3, 1, 2)


def _depthwise(x, weight, dilation=1):
    """x (N, C, H, W) with weight (..., k, k) of C kernels in all; also, with them turned, dL/dx.

    (oneDNN's own dL/dx is many times slower where the kernel is dilated.)
    """
    k, C = weight.shape[-1], x.shape[1]
    kernel = weight.reshape(C, 1, k, k).to(x.dtype)
    return F.conv2d(x, kernel, None, 1, dilation * (k // 2), dilation, C)


def _spread_weight_gradient(g, x, weight, dilation):
    """dL/dweight (S, R, c, k, k) of `_depthwise` of `_spread`, as the diagonal of c x c kernels."""
    S, R, c, k, _ = weight.shape
    if dilation > 1 and x.device.type == "cpu":  # oneDNN reads out of bounds there in bfloat16
        g, x = g.to(weight.dtype), x.to(weight.dtype)
        h, w = x.shape[2:]
        if dilation == 2 and w < 2 * k - 1 and h % 2 == w % 2 == 0:  # wider than x, it is slow
            g, x, dilation = _every_second(g), _every_second(x), 1
    kernel, padding = _shape(x, S * R * c, c, k, k), [dilation * (k // 2)] * 2
    (dweight,) = _conv_backward(["weight"], g, x, kernel, S, padding, dilation)
    return (
        dweight.view(S, R, c, c, k, k).diagonal(dim1=2, dim2=3).permute(0, 1, 4, 2, 3).contiguous()
    )


def _every_second(x):
    """x (N, C, H, W) as the four maps that dilation 2 keeps apart: (4 N, C, H / 2, W / 2)."""
    x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 3, 5, 2, 4, 1)
    return x.flatten(0, 2).permute(0, 3, 1, 2)


def _depthwise_weight_gradient(g, x, weight):
    """dL/dweight (..., k, k) of `_depthwise` of x, not dilated.

    oneDNN is slow at kernels wider than 3. Two pixels side by side are one with 2 C channels: for
    k = 5, its even columns are the 3 of a kernel over pairs, its odd ones the first 2 of another.
    """
    n, C, h, w = x.shape
    k = weight.shape[-1]
    if k != 5 or w % 2 or x.device.type != "cpu":
        kernel = _shape(x, C, 1, k, k)
        return _conv_backward(["weight"], g, x, kernel, C, (k // 2, k // 2))[0].view(weight.shape)

    def pairs(rows):
        return rows.reshape(n, h, -1, 2 * C).permute(0, 3, 1, 2)

    g, x = g.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
    g, even, odd = pairs(g), pairs(x), pairs(F.pad(x, (0, 0, 1, 3)))
    kernel = _shape(g, 2 * C, 1, 5, 3)
    even = _conv_backward(["weight"], g, even, kernel, 2 * C, (2, 1))
    odd = _conv_backward(["weight"], g, odd, kernel, 2 * C, (2, 0))
    columns = torch.stack(even + odd, 4).flatten(3)[..., :5]  # (2 C, 1, 5, 5)
    return (columns[:C] + columns[C:]).view(weight.shape)


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
        return _depthwise(z, weight)

    @staticmethod
    def relu(h, norm):
        return _blockwise(h, norm.A, norm.b).relu_()

    @staticmethod
    def remake(h, weight, again):
        """The output anew; for the backward pass."""
        again["z"] = NormReLUDepthwise.relu(h, again["norm"])
        return _depthwise(again["z"], weight)

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivatives()
        h, z, weight = ctx.saved_tensors
        norm, dweight = ctx.norm, None
        if z is None:
            z = ctx.again.pop("z", None)
        if z is None:
            z = NormReLUDepthwise.relu(h, norm)
        if ctx.needs_input_grad[5]:
            dweight = _depthwise_weight_gradient(g, z, weight)
        g = _depthwise(g, ctx.turned)
        g = torch.ops.aten.threshold_backward(g, z, 0)
        sums = (figures.to(norm.A.dtype) for figures in _sums(g, h, norm.A.shape[1]))
        dP, *rest = norm.backward(*sums, ctx.needs_input_grad[4])
        dh = norm.add_input_gradient(_blockwise(g, norm.A.mT), h, *rest)
        return None, None, None, dh, dP, dweight


class NormSum(torch.autograd.Function):
    """start + sum_g W[t, g] * norm(P_g h_g): (N, T * c, H, W).

    start (N, T * c, H, W) or None, W (T, G), P (G, c, c); the blocks h_1 ... h_G lie in the tensors
    hs, in this order. W_normed is W with zeros for the plain blocks. `remake` is None, or makes hs
    again from the tensors `kept`, which are kept for the backward pass in their place. moments and
    plain: see _Norm.
    """

    @staticmethod
    def forward(ctx, moments, plain, start, W_normed, remake, kept, W, P, *hs):
        norm = _Norm(hs, P, moments, plain)
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
        outer, total = [], None if g.nbytes < SLOW_BIAS else g.sum((0, 2, 3))
        for h, part in zip(hs, ctx.kernels, strict=True):
            if total is None:
                its, total = _conv_backward(["weight", "bias"], g, h, part)
            else:
                (its,) = _conv_backward(["weight"], g, h, part)
            outer.append(its)
        outer = torch.cat(outer, 1) if len(hs) > 1 else outer[0]
        total = total.view(T, c).to(W.dtype)
        # The sums of g h^T over pixels: (G, T, c * c).
        outer = outer.view(T, c, G, c).permute(2, 0, 1, 3).flatten(2).to(W.dtype)
        dA = torch.bmm(ctx.W_normed.t().unsqueeze(1), outer).view(G, c, c)
        db = (ctx.W_normed.t() @ total).unsqueeze(2)
        dP, *rest = norm.backward(dA, db, ctx.needs_input_grad[7])
        dW = None
        if ctx.needs_input_grad[6]:
            dW = torch.bmm(outer, norm.A.view(G, c * c, 1)).squeeze(2).t()
            dW = dW.addmm(total, norm.b.squeeze(2).t())
        dhs, at = [], 0
        for h, part in zip(hs, ctx.kernels, strict=True):
            blocks = slice(at, at := at + h.shape[1] // c)
            D, e = (figures[blocks] for figures in rest)
            dhs.append(norm.add_input_gradient(F.conv2d(g, part.transpose(0, 1)), h, D, e))
        start = g if ctx.started else None
        return None, None, start, None, None, None, dW, dP, *dhs


def norm_relu_depthwise(mean, var, h, P, weight):
    """What NormReLUDepthwise gives in evaluation: mean and var (G, c) are the running figures."""
    inv_std = (var + EPS).rsqrt()
    z = _blockwise(h, inv_std[:, :, None] * P, (-mean * inv_std)[:, :, None]).relu_()
    return _depthwise(z, weight)


def norm_sum(mean, var, plain, start, W, P, hs):
    """What NormSum gives in evaluation: mean and var (T, G - plain, c) are the running figures."""
    inv_std = (var + EPS).rsqrt()
    inv_std, shift = F.pad(inv_std, (0, 0, 0, plain), value=1), F.pad(-mean, (0, 0, 0, plain))
    scale = W[:, :, None] * inv_std  # (T, G, c)
    kernel = scale.transpose(1, 2)[..., None] * P.transpose(0, 1)  # (T, c, G, c)
    kernel = kernel.flatten(2).flatten(0, 1)[:, :, None, None].to(hs[0].dtype)
    bias = (scale * shift).sum(1).flatten().to(hs[0].dtype)
    for h, part in zip(hs, kernel.split([h.shape[1] for h in hs], 1), strict=True):
        out, bias = F.conv2d(h, part, bias), None
        start = out if start is None else out.add_(start)
    return start


def factorized_kernel(first, second):
    """Both 1x1 kernels (..., C/2, C_in, 1, 1) as one (..., C, C_in, 2, 2)."""
    return torch.cat([F.pad(first, (0, 1, 0, 1)), F.pad(second, (1, 0, 1, 0))], dim=-4)


def halve(x, kernel, groups=1):
    """x (N, C_in, H, W) through a factorized kernel (C, C_in, 2, 2): (N, C, H / 2, W / 2)."""
    if x.shape[2] % 2 or x.shape[3] % 2:
        size = f"{x.shape[2]} x {x.shape[3]}"
        raise ValueError(f"a map of {size} cannot be halved: give images whose maps stay even")
    return F.conv2d(x, kernel, stride=2, groups=groups)
