"""The candidate operations of a cell (DARTS, section 3.1.1) and the blocks of cells."""

import torch
import torch.nn.functional as F
from torch import nn

# Each makes a module from (N, C, H, W) to (N, C, H / stride, W / stride). An op added here is at
# once a name for genotypes; added to genotypes.PRIMITIVES too, it is searched.
OPS = {
    "none": lambda C, stride, affine: Zero(stride),
    "avg_pool_3x3": lambda C, stride, affine: nn.AvgPool2d(
        3, stride=stride, padding=1, count_include_pad=False
    ),
    "max_pool_3x3": lambda C, stride, affine: nn.MaxPool2d(3, stride=stride, padding=1),
    "skip_connect": lambda C, stride, affine: (
        Identity() if stride == 1 else FactorizedReduce(C, C, affine=affine)
    ),
    "sep_conv_3x3": lambda C, stride, affine: SepConv(C, C, 3, stride, 1, affine=affine),
    "sep_conv_5x5": lambda C, stride, affine: SepConv(C, C, 5, stride, 2, affine=affine),
    "sep_conv_7x7": lambda C, stride, affine: SepConv(C, C, 7, stride, 3, affine=affine),
    "dil_conv_3x3": lambda C, stride, affine: DilConv(C, C, 3, stride, 2, 2, affine=affine),
    "dil_conv_5x5": lambda C, stride, affine: DilConv(C, C, 5, stride, 4, 2, affine=affine),
    "conv_7x1_1x7": lambda C, stride, affine: nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(C, C, (1, 7), stride=(1, stride), padding=(0, 3), bias=False),
        nn.Conv2d(C, C, (7, 1), stride=(stride, 1), padding=(3, 0), bias=False),
        nn.BatchNorm2d(C, affine=affine),
    ),
}


class ReLUConvBN(nn.Module):
    """ReLU, convolution, batch norm: the preprocess of a cell's inputs where the sizes agree."""

    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride=stride, padding=padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.after_relu(F.relu(x))

    def after_relu(self, x):
        """The same on an input that is ReLU'd already, as a cell's is for both of its readers."""
        return self.op[2](self.op[1](x))


class DilConv(nn.Module):
    """Dilated depthwise-separable convolution: ReLU, depthwise k x k (dilated), 1x1, batch norm."""

    def __init__(self, C_in, C_out, kernel_size, stride, padding, dilation, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, dilation, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class SepConv(nn.Module):
    """Depthwise-separable convolution, applied twice; the first has the stride."""

    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_in, 1, bias=False),
            nn.BatchNorm2d(C_in, affine=affine),
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, 1, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class Identity(nn.Module):
    """skip_connect at stride 1; drop path leaves its output alone."""

    def forward(self, x):
        return x


class Zero(nn.Module):
    """none: zeros of the size that the stride gives."""

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class FactorizedReduce(nn.Module):
    """Halves height and width: two stride-2 1x1 convolutions, the second on x[:, :, 1:, 1:].

    Raises ValueError where C_out, or the height or width of an input, is odd.
    """

    def __init__(self, C_in, C_out, affine=True):
        super().__init__()
        if C_out % 2:
            raise ValueError(f"FactorizedReduce makes two halves: C_out={C_out} must be even")
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x):
        return self.after_relu(self.relu(x))

    def after_relu(self, x):
        """The same on an input that is ReLU'd already."""
        kernel = factorized_kernel(self.conv_1.weight, self.conv_2.weight)
        return self.bn(halve(x, kernel))


def factorized_kernel(first, second):
    """Both 1x1 kernels (..., C/2, C_in, 1, 1) as one (..., C, C_in, 2, 2): README, difference 9."""
    return torch.cat([F.pad(first, (0, 1, 0, 1)), F.pad(second, (1, 0, 1, 0))], dim=-4)


def halve(x, kernel):
    """x (N, C_in, H, W) through a factorized kernel (C, C_in, 2, 2): (N, C, H / 2, W / 2)."""
    if x.shape[2] % 2 or x.shape[3] % 2:
        size = f"{x.shape[2]} x {x.shape[3]}"
        raise ValueError(f"a map of {size} cannot be halved: give images whose maps stay even")
    return F.conv2d(x, kernel, stride=2)


def without_module_prefix(state_dict):
    """The state dict as a network saves it that is not wrapped in DataParallel."""
    prefix = "module."
    wrapped = all(name.startswith(prefix) for name in state_dict)
    return {name.removeprefix(prefix) if wrapped else name: state_dict[name] for name in state_dict}


# Batch norms of many edges at once, for the supernet. Norms over few channels are slow as matrices
# (N * H * W, C). In channels_last the same memory is a matrix (N * H, W * C) of long rows, on which
# sums, scales and shifts run at memory speed; figures per channel are tiled W times for it.
EPS, MOMENTUM = 1e-5, 0.1  # of every batch norm: PyTorch's defaults


def _rows(x):
    """(N, C, H, W) in channels_last as the matrix (N * H, W * C)."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n * h, w * c)


def _images(rows, like):
    """Back from rows to the shape (N, C, H, W) of `like`, in channels_last."""
    n, c, h, w = like.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def _per_channel(columns, C):
    """Sums (O, W * C) to sums (O, C)."""
    return columns.view(len(columns), -1, C).sum(1)


def _tile(figures, width):
    """Per-channel figures (O, C) as (O, 1, W * C)."""
    return figures.repeat(1, width).unsqueeze(1)


def _standardize(ys, running_mean, running_var, training):
    """O tensors (N, C, H, W) less their mean, as rows (O, N * H, W * C), and 1 / std (O, C).

    Of the batch in training, and the running figures (O, C) follow as in nn.BatchNorm2d; else of
    those.
    """
    n, C, h, width = ys[0].shape
    m = n * h * width
    y = torch.stack([_rows(part) for part in ys])
    if not training:
        return y.sub_(_tile(running_mean, width)), (running_var + EPS).rsqrt()
    mean = _per_channel(y.sum(1), C) / m
    y.sub_(_tile(mean, width))
    var = _per_channel((y * y).sum(1), C) / m
    running_mean.lerp_(mean, MOMENTUM)
    running_var.lerp_(var * (m / max(m - 1, 1)), MOMENTUM)
    return y, (var + EPS).rsqrt()


def _norm_backward(g, y, scale, inv_std, width, training):
    """Gradients with respect to (O, N * H, W * C) inputs of norms, and with respect to their scale.

    y is centred; output = scale * inv_std * y. With a = scale * inv_std and m values per channel:
    dy = a * (g - mean(g) - y * inv_std^2 * mean(g * y)), dscale = inv_std * sum(g * y).
    """
    C = inv_std.shape[1]
    m = y.shape[1] * width
    a = scale * inv_std
    dot = _per_channel((g * y).sum(1), C)
    if not training:
        return g * _tile(a, width), dot * inv_std
    total = _per_channel(g.sum(1), C)
    b, shift = a * inv_std.square() * dot / -m, a * total / -m
    a, b, shift = _tile(torch.cat([a, b, shift]), width).chunk(3)
    return torch.addcmul(shift, g, a).addcmul_(y, b), dot * inv_std


def _refuse_second_derivatives():
    """Under create_graph=True: what follows is no function of alphas and betas to autograd."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the supernet is once differentiable: take second derivatives by finite differences"
        )


class NormReLU(torch.autograd.Function):
    """relu(batch_norm(y)) of O tensors (N, C, H, W) at once: the middle of the sep_convs."""

    @staticmethod
    def forward(ctx, running_mean, running_var, training, *ys):
        y, inv_std = _standardize(ys, running_mean, running_var, training)
        z = (y * _tile(inv_std, ys[0].shape[3])).relu_()
        ctx.save_for_backward(y, z, inv_std)
        ctx.training = training
        return tuple(_images(part, ys[0]) for part in z)

    @staticmethod
    def backward(ctx, *gs):
        _refuse_second_derivatives()
        y, z, inv_std = ctx.saved_tensors
        g = torch.stack([_rows(part) for part in gs])
        g = torch.ops.aten.threshold_backward(g, z, 0)
        dy, _ = _norm_backward(g, y, 1, inv_std, gs[0].shape[3], ctx.training)
        return None, None, None, *(_images(part, gs[0]) for part in dy)


class NormSum(torch.autograd.Function):
    """start + sum_o scale_o * batch_norm(y_o), with scale (O, C); start and y_o are (N, C, H, W).

    The weight of an op in the mixture is the scale of its last norm, so no output is kept twice.
    """

    @staticmethod
    def forward(ctx, running_mean, running_var, training, start, scale, *ys):
        y, inv_std = _standardize(ys, running_mean, running_var, training)
        a = _tile(scale * inv_std, ys[0].shape[3])
        out = y[0] * a[0] if start is None else torch.addcmul(_rows(start), y[0], a[0])
        for part, a_o in zip(y[1:], a[1:], strict=True):
            out.addcmul_(part, a_o)
        ctx.save_for_backward(y, inv_std, scale)
        ctx.training, ctx.started = training, start is not None
        return _images(out, ys[0])

    @staticmethod
    def backward(ctx, g):
        _refuse_second_derivatives()
        y, inv_std, scale = ctx.saved_tensors
        rows = _rows(g)
        dy, dscale = _norm_backward(rows[None], y, scale, inv_std, g.shape[3], ctx.training)
        dstart = _images(rows, g) if ctx.started else None
        return None, None, None, dstart, dscale, *(_images(part, g) for part in dy)
