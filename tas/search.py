"""The network that is searched: widths, and on request depths, are drawn in every pass (TAS)."""

import torch
from torch import nn
from torch.nn import functional as F

from tas import draw, shapes
from tas.mix import Mix, WidthNorms, mixed, normalized
from tas.pruned import initialize


class SearchNetwork(nn.Module):
    """The CIFAR ResNet of `depth` = 6n + 2 layers with all its widths (TAS, section 3.1).

    width_attentions: (L, 8), a row for each convolution: the stem's, then conv_a's and conv_b's of
    every block (a shortcut's goes with its block's conv_b), a column for each width.
    depth_attentions: (3, D), a row for each stage, if search_depth.
    Raises ValueError for a depth that is not 6n + 2.

    static: all maps of `search` keep their full width, zeros beyond the drawn one, and nothing
    waits for the draw; None does so where the attentions are not on the CPU. On the CPU the maps
    are as wide as drawn, which saves work. The figures are the same.
    """

    def __init__(self, depth, num_classes, search_depth=False, static=None):
        super().__init__()
        n = shapes.blocks_per_stage(depth)
        self.depth, self.n, self.static = depth, n, static
        self.width_attentions = nn.Parameter(torch.empty(depth - 1, len(shapes.SHARES)))
        self.depth_choices = shapes.depth_choices(n)
        self.depth_attentions = None
        if search_depth:
            self.depth_attentions = nn.Parameter(torch.empty(3, len(self.depth_choices)))
        for attentions in self.arch_parameters():
            nn.init.normal_(attentions, 0, 0.01)

        C_in = shapes.STAGES[0]
        self.layers = nn.ModuleList([WidthConv(3, C_in, 3)])
        self.norms = nn.ModuleList()  # a stage each
        for stage, C in enumerate(shapes.STAGES):
            for block in range(n):
                self.layers.append(Block(C_in, C, 2 if stage > 0 and block == 0 else 1))
                C_in = C
            self.norms.append(WidthNorms(shapes.width_choices(C)))
        self.classifier = nn.Linear(C_in, num_classes)
        choices = [shapes.width_choices(C) for C in shapes.full_channels(depth)[1:]]
        self.register_buffer("choices", torch.tensor(choices), False)  # (L, 8)
        self.full_widths = [row[-1] for row in choices]
        self.apply(initialize)

    def arch_parameters(self):
        """[width_attentions] or [width_attentions, depth_attentions]."""
        attentions = [self.width_attentions, self.depth_attentions]
        return [tensor for tensor in attentions if tensor is not None]

    def weights(self):
        """All other parameters."""
        return [tensor for name, tensor in self.named_parameters() if "_attentions" not in name]

    def forward(self, x):
        """Logits of the unpruned network; its shortcut convolutions have no batch norm."""
        shapes.check_images(x.shape[2:])
        x = F.relu(self.layers[0](x), inplace=True)
        for block in self.layers[1:]:
            x = block(x)
        return self.classifier(x.mean((2, 3)))

    def search(self, x, tau, sample=None):
        """Logits of a drawn network (N, classes) and the expected multiply-adds in millions ().

        x: (N, 3, H, W), H and W multiples of 4; tau: temperature; sample: {"index": (L, 2),
        "gumbel": (L, 8), "gumbel_depth": (3, D)} fixes the draw, what it lacks is drawn.
        """
        shapes.check_images(x.shape[2:])
        expected = self.expected_multiply_adds(x.shape[2:])
        device = self.width_attentions.device
        fixed = {name: value.to(device) for name, value in (sample or {}).items()}
        index, weights = draw.two_widths(
            self.width_attentions, tau, fixed.get("gumbel"), fixed.get("index")
        )
        depth_weights = (None, None, None)
        if self.depth_attentions is not None:
            depth_weights = draw.depths(self.depth_attentions, tau, fixed.get("gumbel_depth"))
        widths = self._widths(index)

        x = x.contiguous(memory_format=torch.channels_last)
        for stage in range(3):
            x = self._search_stage(x, stage, index, weights, widths, depth_weights[stage])
        features = x.mean((2, 3))
        weight = self.classifier.weight[:, : features.shape[1]]
        return F.linear(features, weight, self.classifier.bias), expected

    def _widths(self, index):
        """Channels of each convolution's output in this pass, in Python: L integers."""
        static = self.static
        if static is None:
            static = index.device.type != "cpu"
        if static:
            return self.full_widths
        return self.choices.gather(1, index).amax(1).tolist()

    def _search_stage(self, x, stage, index, weights, widths, depth_weights):
        """The stem, if it is stage 0, and the blocks of a stage."""
        n, norms = self.n, self.norms[stage]
        rows = list(range(2 * n * stage + 1, 2 * n * (stage + 1) + 1))  # of the attentions
        convs = [conv for block in self._blocks(stage) for conv in (block.conv_a, block.conv_b)]
        if stage == 0:
            rows, convs = [0, *rows], [self.layers[0], *convs]
        else:
            rows, convs = [rows[1], *rows], [self._blocks(stage)[0].downsample, *convs]
        index, weights, widths = index[rows], weights[rows], [widths[row] for row in rows]
        first, *mixes = norms(convs, index, weights, widths)
        statistics = []

        if stage == 0:
            x = F.relu(self.layers[0].search(x, first, statistics), inplace=True)
        maps = []
        for number, block in enumerate(self._blocks(stage)):
            shortcut = x
            if number == 0 and stage > 0:
                shortcut = block.downsample.search(x, first, statistics)
            x = block.search(x, shortcut, *mixes[2 * number : 2 * number + 2], statistics)
            maps.append(x)
        if self.training:
            norms.track(convs, index, statistics)
        if depth_weights is None:
            return x

        # a sum of a residual is as wide as the widest map so far: so is its place among the choices
        outputs = index[0::2].amax(1).cummax(0).values[1:]  # conv_b's, after the stem's or shortcut's
        after = [count - 1 for count in self.depth_choices]
        interpolations = norms.cwi[outputs[after], outputs[-1]] * depth_weights[:, None, None]
        return sum(
            mixed(maps[block], Mix(matrix, None, maps[block].shape[1]), x.shape[1])
            for block, matrix in zip(after, interpolations, strict=True)
        )

    def _blocks(self, stage):
        return self.layers[1 + stage * self.n : 1 + (stage + 1) * self.n]

    def expected_multiply_adds(self, size=(32, 32)):
        """Expected multiply-adds in millions, (), on one image of `size` (H, W): differentiable.

        A convolution counts with the expected widths of its input and output, by softmax of the
        attentions; a block with the probability that its stage is deep enough to have it.
        """
        height, width = size
        n, stages = self.n, torch.arange(3, device=self.choices.device)
        C = (F.softmax(self.width_attentions, dim=1) * self.choices).sum(1)  # (L), E[C_out]
        pixels = height * width // 4**stages  # (3)
        convs = 9 * C[:-1] * C[1:]  # but the stem's
        blocks = convs.view(3, n, 2).sum(2)
        C_before = torch.stack([C[2 * n], C[4 * n]])  # the stage's input, the shortcut's
        C_after = torch.stack([C[2 * n + 2], C[4 * n + 2]])
        shortcuts = F.pad(C_before * C_after, (1, 0))  # none in stage 0
        blocks = blocks + F.pad(shortcuts[:, None], (0, n - 1))
        if self.depth_attentions is not None:
            blocks = blocks * self._probability_of_blocks()
        count = (blocks.sum(1) * pixels).sum() + 9 * 3 * C[0] * height * width
        return (count + C[-1] * self.classifier.out_features) / 1e6

    def _probability_of_blocks(self):
        """(3, n): that a stage has at least so many blocks; those up to a choice share one."""
        probability = F.softmax(self.depth_attentions, dim=1)
        at_least = probability.flip(1).cumsum(1).flip(1)
        counts = [0, *self.depth_choices]
        group = [
            choice
            for choice in range(len(self.depth_choices))
            for _ in range(counts[choice], counts[choice + 1])
        ]
        return at_least[:, group]

    def derive(self):
        """The network of the largest attentions: channels (`depth`, 3 first), blocks (3) or None."""
        channels = self.choices.gather(1, self.width_attentions.argmax(1, keepdim=True))
        blocks = None
        if self.depth_attentions is not None:
            blocks = [self.depth_choices[row] for row in self.depth_attentions.argmax(1).tolist()]
        return [3, *channels.flatten().tolist()], blocks


class Block(nn.Module):
    """Basic block: two 3 x 3 convolutions and, where the stride is 2, a shortcut convolution."""

    def __init__(self, C_in, C, stride):
        super().__init__()
        self.conv_a = WidthConv(C_in, C, 3, stride)
        self.conv_b = WidthConv(C, C, 3)
        self.downsample = WidthConv(C_in, C, 1, pool=True) if stride == 2 else None

    def forward(self, x):
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x, norm=False)
        x = self.conv_b(F.relu(self.conv_a(x), inplace=True))
        return F.relu(x + shortcut, inplace=True)

    def search(self, x, shortcut, mix_a, mix_b, statistics):
        """As WidthConv.search, plus `shortcut`; the narrower is added to the wider's first."""
        x = F.relu(self.conv_a.search(x, mix_a, statistics), inplace=True)
        C = shortcut.shape[1]
        x = self.conv_b.search(x, mix_b, statistics, max(mix_b.width, C))
        x[:, :C] += shortcut
        return F.relu(x, inplace=True)


class WidthConv(nn.Module):
    """Convolution (after a 2 x 2 average if `pool`) with a batch norm for each of its widths."""

    def __init__(self, C_in, C, kernel_size, stride=1, pool=False):
        super().__init__()
        self.pool = pool
        self.conv = nn.Conv2d(C_in, C, kernel_size, stride, kernel_size // 2, bias=False)
        self.BNs = nn.ModuleList(nn.BatchNorm2d(C_i) for C_i in shapes.width_choices(C))

    def forward(self, x, norm=True):
        """At full width: the last norm, or none."""
        x = self.conv(F.avg_pool2d(x, 2) if self.pool else x)
        return self.BNs[-1](x) if norm else x

    def search(self, x, mix, statistics, width=None):
        """(N, up to C_in, H, W) -> (N, width or mix.width, ...); the batch's go to `statistics`.

        Missing input channels are zeros: their part of the convolution's weight is left out.
        """
        x = F.avg_pool2d(x, 2) if self.pool else x
        weight = self.conv.weight[: mix.width, : x.shape[1]]
        y = F.conv2d(x, weight, None, self.conv.stride, self.conv.padding)
        if self.training:
            y, of_batch = normalized(y, self.BNs[0].eps)
            statistics.append(of_batch)
        return mixed(y, mix, width)
