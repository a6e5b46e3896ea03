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
    waits for the draw; else they are as wide as drawn, which saves work but needs the draw in
    Python. None: as wide as drawn on the CPU, static elsewhere. The figures are the same.
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
        self.register_buffer("after", torch.tensor(self.depth_choices) - 1, False)  # these blocks
        self.full_widths = [row[-1] for row in choices]
        strided = [[stage > 0 and block == 0 for block in range(n)] for stage in range(3)]
        self.register_buffer("_strided", torch.tensor(strided), False)  # (3, n)
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
        """Channels of each convolution's output in this pass: L integers."""
        static = self.static
        if static is None:
            static = index.device.type != "cpu"
        if static:
            return self.full_widths
        return self.choices.gather(1, index).amax(1).tolist()

    def _search_stage(self, x, stage, index, weights, widths, depth_weights):
        """One stage's blocks, after the stem if it is the first, and the choice of its depth."""
        blocks, norms = self.blocks_of(stage), self.norms[stage]
        start, end = 1 + 2 * self.n * stage, 1 + 2 * self.n * (stage + 1)  # of the attentions' rows
        # before the blocks' convolutions comes the stem or, as wide as conv_b, the first shortcut's
        before = 0 if stage == 0 else start + 1
        convs = [self.layers[0] if stage == 0 else blocks[0].downsample]
        convs += [conv for block in blocks for conv in (block.conv_a, block.conv_b)]
        index = torch.cat([index[before : before + 1], index[start:end]])  # (K, 2)
        weights = torch.cat([weights[before : before + 1], weights[start:end]])
        widths = [widths[before], *widths[start:end]]
        first, *mixes = norms(convs, index, weights, widths)

        maps, statistics = [], []
        shortcut = convs[0].search(x, first, statistics, relu=stage == 0)
        x = shortcut if stage == 0 else x
        for block, mix_a, mix_b in zip(blocks, mixes[0::2], mixes[1::2], strict=True):
            x = shortcut = block.search(x, shortcut, mix_a, mix_b, statistics)
            maps.append(x)
        if self.training:
            norms.track(convs, index, statistics)
        if depth_weights is None:
            return x
        # the sum of a residual is as wide as the widest before: its place among the choices
        outputs = index[0::2].amax(1).cummax(0).values[1:]
        return self._weighted_depths(maps, outputs, norms.cwi, depth_weights)

    def _weighted_depths(self, maps, outputs, cwi, depth_weights):
        """Sum of the maps after each choice of blocks, interpolated to the widest, the last.

        outputs: (n), the place of each map's width among the choices of widths.
        """
        total, no_bias = None, cwi.new_zeros(cwi.shape[-1])
        matrices = depth_weights[:, None, None] * cwi[outputs[self.after], outputs[-1:]]
        for count, matrix in reversed(list(zip(self.depth_choices, matrices, strict=True))):
            x = maps[count - 1]
            total = mixed(x, Mix(matrix, no_bias, x.shape[1]), total)
        return total

    def blocks_of(self, stage):
        """The blocks of a stage (0, 1 or 2)."""
        return self.layers[1 + stage * self.n : 1 + (stage + 1) * self.n]

    def expected_multiply_adds(self, size=(32, 32)):
        """Expected multiply-adds in millions, (), on one image of `size` (H, W): differentiable.

        A convolution counts with the expected widths of its input and output, by softmax of the
        attentions; a block with the probability that its stage is deep enough to have it.
        """
        C = (F.softmax(self.width_attentions, dim=1) * self.choices).sum(1)  # (L), E[C_out]
        searched = self.depth_attentions is not None
        return self._count(C, self._strided, self._probability_of_blocks() if searched else 1, size)

    @torch.no_grad()
    def argmax_multiply_adds(self, size=(32, 32)):
        """In millions, (): of the network that the largest attentions give now (`derive`).

        On the device, so that no step of a search waits for it.
        """
        C = self.choices.gather(1, self.width_attentions.argmax(1, keepdim=True))[:, 0]
        kept = 1
        if self.depth_attentions is not None:
            last = self.after[self.depth_attentions.argmax(1, keepdim=True)]  # (3, 1)
            kept = torch.arange(self.n, device=C.device) <= last
        ends = C[:-1].view(3, -1, 2)[:, :, 0], C[1:].view(3, -1, 2)[:, :, 1]
        return self._count(C.to(self.width_attentions), self._strided | ends[0].ne(ends[1]), kept,
                           size)  # fmt: skip

    def _count(self, C, shortcuts, kept, size):
        """In millions: of widths C (L), of (3, n) blocks with shortcuts (0 or 1), kept a share."""
        C_in, C_out = C[:-1].view(3, -1, 2), C[1:].view(3, -1, 2)  # of conv_a and conv_b
        blocks = (9 * C_in * C_out).sum(2) + shortcuts * C_in[:, :, 0] * C_out[:, :, 1]  # a pixel
        blocks, pixels = (blocks * kept).sum(1), size[0] * size[1]
        count = 9 * 3 * C[0] * pixels
        for stage in range(3):
            count = count + blocks[stage] * (pixels // 4**stage)
        return (count + C[-1] * self.classifier.out_features) / 1e6

    def _probability_of_blocks(self):
        """(3, n): that a stage is so deep; the blocks between two choices share the deeper's."""
        at_least = F.softmax(self.depth_attentions, dim=1).flip(1).cumsum(1).flip(1)
        counts = zip([0, *self.depth_choices], self.depth_choices, strict=False)
        parts = [
            at_least[:, choice : choice + 1].expand(3, count - previous)
            for choice, (previous, count) in enumerate(counts)
        ]
        return torch.cat(parts, dim=1)

    def derive(self):
        """Network of the largest attentions: channels (depth), 3 first, and blocks (3) or None."""
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
        """The block with what `mix_a` and `mix_b` make of its convolutions."""
        x = self.conv_a.search(x, mix_a, statistics, relu=True)
        return self.conv_b.search(x, mix_b, statistics, shortcut, relu=True)


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

    def search(self, x, mix, statistics, shortcut=None, relu=False):
        """(N, up to C_in, H, W) -> (N, mix.width or shortcut's, ...), see `mixed`.

        Missing input channels are zeros: their part of the convolution's weight is left out. In
        training mode the batch's (mean, variance) is appended to `statistics`.
        """
        x = F.avg_pool2d(x, 2) if self.pool else x
        weight = self.conv.weight[: mix.width, : x.shape[1]]
        y = F.conv2d(x, weight, None, self.conv.stride, self.conv.padding)
        if self.training:
            y, of_batch = normalized(y, self.BNs[0])
            statistics.append(of_batch)
        return mixed(y, mix, shortcut, relu)
