"""The discrete networks that a genotype stands for (Xu et al., PC-DARTS, ICLR 2020, section 4).

A cell has two preprocessed inputs and nodes that each sum two operations on earlier states; the
nodes of `concat` are its output. The cells at layers // 3 and 2 * layers // 3 halve the map and
double the channels. NetworkCIFAR and NetworkImageNet differ in the stem and the auxiliary head.
The state dicts have the names and shapes of the published networks', in the same order.
"""

import torch
from torch import nn
from torchvision.ops import stochastic_depth

import genotypes
import operations
from operations import OPS, FactorizedReduce, Identity, ReLUConvBN
from utils import in_layout, without_module_prefix


class Cell(nn.Module):
    """One cell of a genotype that `check` returned: node 2 + i sums operations 2i and 2i + 1."""

    def __init__(self, genotype, C_prev_prev, C_prev, C, reduction, reduction_prev):
        super().__init__()
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0)
        if reduction:
            edges, self._concat = genotype.reduce, genotype.reduce_concat
        else:
            edges, self._concat = genotype.normal, genotype.normal_concat
        self._indices = [node for _, node in edges]  # the input node of each op
        self._steps, self.multiplier = len(edges) // 2, len(self._concat)
        self._ops = nn.ModuleList(
            OPS[name](C, 2 if reduction and node < 2 else 1, True) for name, node in edges
        )

    def forward(self, s0, s1, drop_path_prob):
        """(N, multiplier * C, H, W) of s0 and s1, the outputs of the two cells before.

        A reduction cell halves H and W. drop_path_prob: the chance to drop an op's output, per
        image, in training.
        """
        drops = self.training and drop_path_prob > 0
        return self.compute(s0, s1, self.drop_path(s1, drop_path_prob) if drops else None)

    def compute(self, s0, s1, factors=None):
        """As forward; factors: of each op's output, as `drop_path` draws them, or None."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(0, len(self._ops), 2):
            first = self._edge(i, states, factors)
            second = self._edge(i + 1, states, factors)
            states.append(first + second)
        return torch.cat([states[node] for node in self._concat], dim=1)

    def drop_path(self, x, drop_path_prob):
        """One factor (N, 1, 1, 1) per op, in the type of x: 0, or 1 / (1 - drop_path_prob).

        None for an Identity, whose output is never dropped.
        """
        return [
            None if isinstance(op, Identity)
            else stochastic_depth(x.new_ones(len(x), 1, 1, 1), drop_path_prob, "row")
            for op in self._ops
        ]  # fmt: skip

    def leaves_out_nodes(self):
        """Whether some node or input has no path to the output."""
        read = set(self._concat)
        for i in reversed(range(len(self._indices))):
            if 2 + i // 2 in read:
                read.add(self._indices[i])
        return len(read) < 2 + self._steps

    def _edge(self, i, states, factors):
        out = self._ops[i](states[self._indices[i]])
        return out if factors is None or factors[i] is None else out * factors[i]


class AuxiliaryHead(nn.Module):
    """The second classifier, behind the second reduction; its loss is added in training.

    stride: of the pooling. norm: whether a batch norm follows the 2x2 convolution. scale: side of
    the image over side of the map, for the error message.
    """

    def __init__(self, C, num_classes, stride, norm, scale):
        super().__init__()
        self._smallest, self._scale = 5 + stride, scale  # pooled to 2 x 2, then 1 x 1
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=stride),  # unpadded
            nn.Conv2d(C, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            *([nn.BatchNorm2d(768)] if norm else []),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x):
        """Logits (N, num_classes) of a map (N, C, H, W); ValueError where it is too small."""
        if min(x.shape[2:]) < self._smallest:
            size = self._smallest * self._scale
            raise ValueError(
                f"a map of {x.shape[2]} x {x.shape[3]} is too small for the auxiliary head: "
                f"give images of {size} x {size} or more, or train without it"
            )
        return self.classifier(self.features(x).mean((2, 3)))  # docs/differences.md, 8


class AuxiliaryHeadCIFAR(AuxiliaryHead):
    """For maps of 8 x 8."""

    def __init__(self, C, num_classes):
        super().__init__(C, num_classes, stride=3, norm=True, scale=4)


class AuxiliaryHeadImageNet(AuxiliaryHead):
    """For maps of 7 x 7; one batch norm, not two, as in the published results."""

    def __init__(self, C, num_classes):
        super().__init__(C, num_classes, stride=2, norm=False, scale=32)


def stack(genotype, C, C_stem, layers, reductions, reduction_prev=False):
    """(cells one after the other, the channels of each one's output).

    C: channels of a node in the first cell; those in `reductions` double them. reduction_prev:
    whether the map before the stem's output is twice its size.
    """
    cells, channels = nn.ModuleList(), [C_stem, C_stem]
    for i in range(layers):
        reduction = i in reductions
        C *= 2 if reduction else 1
        cells.append(Cell(genotype, *channels[-2:], C, reduction, reduction_prev))
        channels.append(cells[-1].multiplier * C)
        reduction_prev = reduction
    return cells, channels[2:]


class DiscreteNetwork(nn.Module):
    """What both networks share: cells, auxiliary head, classifier.

    C: channels of a node in the first cell. layers: the number of cells. stem: what stands before
    them, a kind of operations.stem, and C_stem its channels. head: the class of the auxiliary head.
    drop_path_prob is an attribute to be set before each epoch.
    layout: the memory format of all maps; None: channels_last on a CPU, where it is 1.4 to 1.7
    times as fast, and that of the images elsewhere.
    Raises ValueError where there is no layer, GenotypeError (a ValueError) where `check` does.
    """

    layout = None

    def __init__(self, C, num_classes, layers, auxiliary, genotype, stem, C_stem, head):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers={layers}: give 1 cell or more")
        genotype = genotypes.check(genotype, OPS)
        self.drop_path_prob = 0.0
        for name, module in operations.stem(stem, C_stem).items():
            self.add_module(name, module)

        reductions = layers // 3, 2 * layers // 3
        halved = stem == "imagenet"  # stem1 halves the map of stem0, so s0 is twice s1
        self.cells, channels = stack(genotype, C, C_stem, layers, reductions, halved)
        self._layers, self._auxiliary, self.auxiliary_head = layers, auxiliary, None
        if auxiliary:
            self.auxiliary_head = head(channels[2 * layers // 3], num_classes)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)  # any size; 7 x 7 at 224
        self.classifier = nn.Linear(channels[-1], num_classes)

    def forward(self, x):
        """(logits, auxiliary logits or None), (N, num_classes) each; the second only in training.

        x: (N, 3, H, W). Raises ValueError where a map to be halved is odd, and where images are too
        small for the auxiliary head.
        """
        x = in_layout(x, self.layout_on(x.device))
        s0, s1 = self.stem_states(x)
        logits_aux = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path_prob)
            if i == 2 * self._layers // 3 and self._auxiliary and self.training:
                logits_aux = self.auxiliary_head(s1)
        return self.classifier(self.global_pooling(s1).flatten(1)), logits_aux

    def layout_on(self, device):
        """The memory format of all maps on this device; None: that of the images."""
        return self.layout or (torch.channels_last if device.type == "cpu" else None)

    def leaves_out_nodes(self):
        """Whether the output of a cell does not depend on some node or input of it.

        Weights that lead only there get no gradient; those behind a `none` get zeros.
        """
        return any(cell.leaves_out_nodes() for cell in self.cells)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As nn.Module's; accepts a `module.` prefix."""
        return super().load_state_dict(without_module_prefix(state_dict), strict, assign)


class NetworkCIFAR(DiscreteNetwork):
    """The network for CIFAR-size images: a stem of 3C channels at full size."""

    def __init__(self, C, num_classes, layers, auxiliary, genotype):
        super().__init__(
            C, num_classes, layers, auxiliary, genotype, "cifar", 3 * C, AuxiliaryHeadCIFAR
        )

    def stem_states(self, x):
        """The inputs of the first cell, one map twice: (N, 3C, H, W)."""
        s = self.stem(x)
        return s, s


class NetworkImageNet(DiscreteNetwork):
    """The network for 224 x 224 images: three stride-2 convolutions before the cells.

    Raises ValueError for an odd C too. The auxiliary head has one batch norm, not two, as in the
    published results.
    """

    def __init__(self, C, num_classes, layers, auxiliary, genotype):
        super().__init__(
            C, num_classes, layers, auxiliary, genotype, "imagenet", C, AuxiliaryHeadImageNet
        )

    def stem_states(self, x):
        """The inputs of the first cell: (N, C, H / 4, W / 4) and (N, C, H / 8, W / 8)."""
        s0 = self.stem0(x)
        return s0, self.stem1(s0)


def build(genotype, C, num_classes, layers, stem="cifar", auxiliary=False):
    """NetworkCIFAR, or NetworkImageNet where stem is "imagenet"; ValueError where they do."""
    kind = NetworkImageNet if stem == "imagenet" else NetworkCIFAR
    return kind(C, num_classes, layers, auxiliary, genotype)


if __name__ == "__main__":
    from harness import costs, script

    script.run(costs.main_discrete, costs.get_args_discrete)
