"""What can be chosen: the widths and depths of the CIFAR ResNet."""

import itertools

STAGES = (16, 32, 64)  # channels of the three stages (He et al. 2016, section 4.2)
SHARES = tuple(tenths / 10 for tenths in range(3, 11))  # of a convolution's channels


def blocks_per_stage(depth):
    """n, the blocks of each stage of the ResNet of 6n + 2 layers; ValueError for other depths."""
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise ValueError(f"depth {depth} is not 6n + 2: give 20, 32, 44, 56 or 110")
    return n


def width_choices(C):
    """The 8 numbers of channels that a convolution of C channels may get, the last being C."""
    return [int(C * share) for share in SHARES]


def depth_choices(n):
    """The numbers of blocks that a stage of n blocks may get, the last being n."""
    if n <= 3:
        return list(range(1, n + 1))
    return [*range(1, n, 2), n]


def full_channels(depth):
    """Channels of the unpruned network: the image's 3, then each convolution's, `depth` in all."""
    n = blocks_per_stage(depth)
    return [3, STAGES[0], *itertools.chain(*([C] * 2 * n for C in STAGES))]


def check_images(size):
    """ValueError unless both strided stages halve images of `size` (height, width)."""
    if any(side % 4 or side < 4 for side in size):
        height, width = size
        fits = " x ".join(str(max(4, side + -side % 4)) for side in size)
        reason = "height and width must be multiples of 4"
        raise ValueError(f"images of {height} x {width}: {reason}; the next that fit are {fits}")


def check(depth, channels, blocks=None):
    """ValueError unless `channels` and `blocks` describe a network of the search space."""
    full = full_channels(depth)
    if len(channels) != depth:
        raise ValueError(f"{len(channels)} channels, but depth {depth} takes {depth}, 3 first")
    if channels[0] != 3:
        raise ValueError(f"channels begin with {channels[0]}, not with the image's 3")
    for position, (C, C_full) in enumerate(zip(channels[1:], full[1:], strict=True), start=1):
        if C not in width_choices(C_full):
            choices = ", ".join(map(str, width_choices(C_full)))
            raise ValueError(f"channels[{position}] is {C}, not one of {choices}")
    n = blocks_per_stage(depth)
    if blocks is not None:
        if len(blocks) != 3:
            raise ValueError(f"{len(blocks)} numbers of blocks, not one for each of 3 stages")
        for stage, count in enumerate(blocks):
            if count not in range(1, n + 1):
                raise ValueError(f"blocks[{stage}] is {count}, not in 1 to {n}")
