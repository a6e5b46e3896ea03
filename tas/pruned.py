"""A discrete network: the ResNet with the channels and blocks that a search chose."""

from torch import nn
from torch.nn import functional as F

from tas import shapes


class PrunedNetwork(nn.Module):
    """The CIFAR ResNet with basic blocks of these channels; (N, 3, H, W) -> logits (N, classes).

    channels: `depth` integers, 3 and then each convolution's (the stem's, conv_a's and conv_b's of
    every block); shapes.full_channels(depth) is the unpruned network. blocks: how many of each
    stage stay, from 1, None for all; dropped blocks keep their places in `channels`. H and W are
    multiples of 4. Raises ValueError for widths that are not in the search space, and for blocks
    that are not there.
    """

    def __init__(self, depth, channels, num_classes, blocks=None):
        super().__init__()
        stem, *kept = kept_blocks(depth, channels, blocks)
        self.layers = nn.ModuleList([ConvBN(*stem, 3)])
        self.layers.extend(Block(*block) for block in kept)
        self.classifier = nn.Linear(kept[-1][2], num_classes)
        self.apply(initialize)

    def forward(self, x):
        shapes.check_images(x.shape[2:])
        x = F.relu(self.layers[0](x), inplace=True)
        for block in self.layers[1:]:
            x = block(x)
        return self.classifier(x.mean((2, 3)))


class Block(nn.Module):
    """Basic block C_in -> C_a -> C_b; a shortcut convolution where shape or width change."""

    def __init__(self, C_in, C_a, C_b, stride):
        super().__init__()
        self.conv_a = ConvBN(C_in, C_a, 3, stride)
        self.conv_b = ConvBN(C_a, C_b, 3)
        self.downsample = None
        if stride == 2:
            self.downsample = ConvBN(C_in, C_b, 1, pool=True, norm=False)
        elif C_in != C_b:
            self.downsample = ConvBN(C_in, C_b, 1)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv_b(F.relu(self.conv_a(x), inplace=True))
        return F.relu(x + shortcut, inplace=True)


class ConvBN(nn.Module):
    """Convolution (after a 2 x 2 average if `pool`) and batch norm (if `norm`)."""

    def __init__(self, C_in, C_out, kernel_size, stride=1, pool=False, norm=True):
        super().__init__()
        self.pool = pool
        self.conv = nn.Conv2d(C_in, C_out, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(C_out) if norm else None

    def forward(self, x):
        x = self.conv(F.avg_pool2d(x, 2) if self.pool else x)
        return x if self.bn is None else self.bn(x)


def initialize(module):
    """He et al. (2015): normal convolutions by fan-out; norms start at 1 and 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
        nn.init.zeros_(module.bias)


def kept_blocks(depth, channels, blocks=None):
    """[(3, C of the stem), (C_in, C_a, C_b, stride) of each block that stays]."""
    shapes.check(depth, channels, blocks)
    n = shapes.blocks_per_stage(depth)
    kept = [tuple(channels[:2])]
    C_in = channels[1]
    for stage, count in enumerate(blocks or (n, n, n)):
        for block in range(count):
            first = 2 + 2 * (stage * n + block)
            C_a, C_b = channels[first : first + 2]
            kept.append((C_in, C_a, C_b, 2 if stage > 0 and block == 0 else 1))
            C_in = C_b
    return kept


def multiply_adds(depth, channels, num_classes, blocks=None, size=(32, 32), as_built=False):
    """Multiply-adds in millions of PrunedNetwork(depth, ...) on one image of `size` (H, W).

    Convolutions, those of shortcuts too, and the classifier count. What reads a stage that lost
    blocks is counted with the width of the stage's last block, though that is dropped: so the
    released code counts, and so the expected multiply-adds of a search do. as_built counts it with
    the width that it gets. Raises ValueError as PrunedNetwork does.
    """
    shapes.check_images(size)
    (C_image, C_stem), *kept = kept_blocks(depth, channels, blocks)
    n = shapes.blocks_per_stage(depth)
    stage, pixels = 0, size[0] * size[1]
    count = 9 * C_image * C_stem * pixels
    for C_in, C_a, C_b, stride in kept:
        if stride == 2:
            stage, pixels = stage + 1, pixels // 4
            C_in = C_in if as_built else channels[1 + 2 * n * stage]
        shortcut = C_in * C_b if stride == 2 or C_in != C_b else 0
        count += (9 * C_in * C_a + 9 * C_a * C_b + shortcut) * pixels
    C_last = kept[-1][2] if as_built else channels[-1]
    return (count + C_last * num_classes) / 1e6


def smallest_ratio(depth, num_classes, search_depth=False, size=(32, 32)):
    """Multiply-adds of the smallest network of the search space over those of the unpruned one.

    No search can reach a ratio below it.
    """
    full = shapes.full_channels(depth)
    narrow = [3, *(shapes.width_choices(C)[0] for C in full[1:])]
    blocks = (1, 1, 1) if search_depth else None
    smallest = multiply_adds(depth, narrow, num_classes, blocks, size)
    return smallest / multiply_adds(depth, full, num_classes, None, size)
