"""The candidate operations of a cell (DARTS, section 3.1.1), the blocks of cells, and the stems."""

import torch
from torch import nn

# Each entry is a function (C, stride, affine) that returns a module from (N, C, H, W) to
# (N, C, H / stride, W / stride). Genotypes and --primitives may name any entry; those in
# genotypes.PRIMITIVES are searched by default.
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
    """ReLU, convolution, batch norm: a cell's preprocess of an input that has its size already."""

    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride=stride, padding=padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


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
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x):
        if x.shape[2] % 2 or x.shape[3] % 2:
            size = f"{x.shape[2]} x {x.shape[3]}"
            raise ValueError(f"a map of {size} cannot be halved: give images whose maps stay even")
        x = self.relu(x)
        # Strided before the convolutions: docs/differences.md, 9.
        halves = [self.conv_1(x[:, :, ::2, ::2]), self.conv_2(x[:, :, 1::2, 1::2])]
        return self.bn(torch.cat(halves, dim=1))


class StemConv(nn.Conv2d):
    """A convolution whose weight has a contiguous gradient, whatever the memory format of x.

    The Architect of DARTS calls .view(-1) on every gradient, which fails on a channels_last one.
    """

    def forward(self, x):
        return self._conv_forward(x, self.weight.flatten().view(self.weight.shape), self.bias)


def stem(kind, C, convolution=nn.Conv2d):
    """{name: module}: the stem, which maps images (N, 3, H, W) to C channels.

    kind: "cifar", full size; "imagenet", two modules in sequence, with outputs of a quarter and an
    eighth of the size; "resnet", a quarter. convolution: the class of its convolutions.
    """

    def conv(C_in, C_out, size=3, stride=2):
        return convolution(C_in, C_out, size, stride, size // 2, bias=False), nn.BatchNorm2d(C_out)

    if kind == "cifar":
        return {"stem": nn.Sequential(*conv(3, C, stride=1))}
    if kind == "resnet":
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        return {"stem": nn.Sequential(*conv(3, C, 7), nn.ReLU(), pool)}
    halves = *conv(3, C // 2), nn.ReLU(), *conv(C // 2, C)
    return {"stem0": nn.Sequential(*halves), "stem1": nn.Sequential(nn.ReLU(), *conv(C, C))}
