"""The discrete networks that a genotype stands for (Xu et al., PC-DARTS, ICLR 2020, section 4).

A cell has two preprocessed inputs and nodes that each sum two operations on earlier states; the
nodes of `concat` are its output. The cells at layers // 3 and 2 * layers // 3 halve the map and
double the channels. NetworkCIFAR and NetworkImageNet differ in the stem and the auxiliary head.
The state dicts have the names and shapes of the published networks', in the same order.
"""

import copy
import functools

import torch
from torch import nn
from torchvision.ops import stochastic_depth

import genotypes
import measure
import utils
from operations import OPS, FactorizedReduce, Identity, ReLUConvBN, without_module_prefix


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
        self._inputs = [node for _, node in edges]
        self._ops = nn.ModuleList(
            OPS[name](C, 2 if reduction and node < 2 else 1, True) for name, node in edges
        )
        self.C_out = len(self._concat) * C

    def forward(self, s0, s1, drop_path_prob):
        """(N, C_out, H, W) of s0 and s1, the ReLU'd outputs of the two cells before.

        A reduction cell halves H and W. drop_path_prob: in training, of each op but an Identity.
        """
        states = [self.preprocess0.after_relu(s0), self.preprocess1.after_relu(s1)]
        for i in range(0, len(self._ops), 2):
            first = self._edge(i, states, drop_path_prob)
            second = self._edge(i + 1, states, drop_path_prob)
            states.append(first + second)
        return torch.cat([states[node] for node in self._concat], dim=1)

    def _edge(self, i, states, drop_path_prob):
        op = self._ops[i]
        out = op(states[self._inputs[i]])
        if isinstance(op, Identity):  # never dropped: a way through the cell stays
            return out
        return stochastic_depth(out, drop_path_prob, "row", self.training)


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
        return self.classifier(
            self.features(x).mean((2, 3))
        )  # README, difference 8  # 1 x 1 at the published sizes


class DiscreteNetwork(nn.Module):
    """What both networks share: cells, auxiliary head, classifier.

    C: channels of a node in the first cell. layers: the number of cells. stems: the modules before
    them by name, C_stem: the channels these give, stem_stride: side of the image over side of the
    map behind them. head: stride and norm of the AuxiliaryHead. drop_path_prob is an attribute to
    be set before each epoch.
    Raises ValueError for fewer than 3 layers, GenotypeError (a ValueError) where `check` does.
    """

    def __init__(
        self, C, num_classes, layers, auxiliary, genotype, stems, C_stem, stem_stride, head
    ):
        super().__init__()
        if layers < 3:
            raise ValueError(f"layers={layers}: two cells reduce, so it takes 3 or more")
        genotype = genotypes.check(genotype, OPS)
        self.drop_path_prob = 0.0
        for name, stem in stems.items():
            self.add_module(name, stem)

        self.cells = nn.ModuleList()
        C_prev_prev, C_prev, C_curr = C_stem, C_stem, C
        reduction_prev = stem_stride > 1  # the second stem halves the map of the first
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C_curr *= 2 if reduction else 1
            cell = Cell(genotype, C_prev_prev, C_prev, C_curr, reduction, reduction_prev)
            self.cells.append(cell)
            reduction_prev = reduction
            C_prev_prev, C_prev = C_prev, cell.C_out

        self._head_cell = 2 * layers // 3
        self.auxiliary_head = None
        if auxiliary:
            C_head, scale = self.cells[self._head_cell].C_out, 4 * stem_stride
            self.auxiliary_head = AuxiliaryHead(C_head, num_classes, scale=scale, **head)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)  # any size; 7 x 7 at 224
        self.classifier = nn.Linear(C_prev, num_classes)

    def forward(self, x):
        """Logits, and in training with an auxiliary head its logits, else None: (N, num_classes).

        x: (N, 3, H, W). Raises ValueError where a map to be halved is odd, and where images are too
        small for the auxiliary head.
        """
        if x.device.type == "cpu":  # 1.4 to 1.7 times as fast; elsewhere the caller's layout stays
            x = x.contiguous(memory_format=torch.channels_last)
        s0, s1 = self.stem_states(x)
        logits_aux = None
        for i, cell in enumerate(self.cells):
            out = cell(s0, s1, self.drop_path_prob)
            s0, s1 = s1, out.relu()  # once for both cells that read it
            if i == self._head_cell and self.training and self.auxiliary_head is not None:
                logits_aux = self.auxiliary_head(out)
        return self.classifier(self.global_pooling(out).flatten(1)), logits_aux

    def leaves_out_nodes(self):
        """Whether a cell's output lacks some of its nodes, which may then learn nothing."""
        return any(len(cell._concat) < len(cell._ops) // 2 for cell in self.cells)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As nn.Module's; accepts a `module.` prefix."""
        return super().load_state_dict(without_module_prefix(state_dict), strict, assign)


class NetworkCIFAR(DiscreteNetwork):
    """The network for CIFAR-size images: a stem of 3C channels at full size."""

    def __init__(self, C, num_classes, layers, auxiliary, genotype):
        C_stem = 3 * C
        stem = nn.Sequential(nn.Conv2d(3, C_stem, 3, padding=1, bias=False), nn.BatchNorm2d(C_stem))
        head = dict(stride=3, norm=True)
        super().__init__(
            C, num_classes, layers, auxiliary, genotype, {"stem": stem}, C_stem, 1, head
        )

    def stem_states(self, x):
        """The ReLU'd inputs of the first cell, one map twice: (N, 3C, H, W)."""
        s = self.stem(x).relu()
        return s, s


class NetworkImageNet(DiscreteNetwork):
    """The network for 224 x 224 images: three stride-2 convolutions before the cells.

    Raises ValueError for an odd C too. The auxiliary head has one batch norm, not two, as in the
    published results.
    """

    def __init__(self, C, num_classes, layers, auxiliary, genotype):
        stem0 = nn.Sequential(
            nn.Conv2d(3, C // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C // 2),
            nn.ReLU(),
            nn.Conv2d(C // 2, C, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C),
        )
        stem1 = nn.Sequential(
            nn.ReLU(), nn.Conv2d(C, C, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(C)
        )
        stems, head = {"stem0": stem0, "stem1": stem1}, dict(stride=2, norm=False)
        super().__init__(C, num_classes, layers, auxiliary, genotype, stems, C, 8, head)

    def stem_states(self, x):
        """The ReLU'd inputs of the first cell: (N, C, H / 4, W / 4) and (N, C, H / 8, W / 8)."""
        s0 = self.stem0(x).relu()
        return s0, self.stem1[1:](s0).relu()  # [0] is the ReLU


def parameters(network):
    """The number of parameters, those of an auxiliary head not counted, as papers give it."""
    return sum(p.numel() for name, p in network.named_parameters() if "auxiliary_head." not in name)


def build(genotype, C, num_classes, layers, stem="cifar", auxiliary=False):
    """NetworkCIFAR, or NetworkImageNet where stem is "imagenet"; ValueError where they do."""
    kind = NetworkImageNet if stem == "imagenet" else NetworkCIFAR
    return kind(C, num_classes, layers, auxiliary, genotype)


PUBLISHED = {  # C, classes, cells, side of the images
    "cifar": (36, 10, 20, 32), "imagenet": (48, 1000, 14, 224),
}  # fmt: skip


@functools.lru_cache
def _cost(text, stem):
    *sizes, side = PUBLISHED[stem]
    with torch.device("meta"):  # shapes alone
        network = build(genotypes.parse(text, OPS), *sizes, stem)
    return parameters(network), multiply_adds(network, side)


def derived_cost(genotype, imagenet=False):
    """(parameters, multiply-adds) of the network of this cell in the size that is published.

    36 channels, 20 cells, 32 pixels, 10 classes; on ImageNet 48, 14, 224 and 1000.
    """
    return _cost(genotypes.text(genotype), "imagenet" if imagenet else "cifar")


def multiply_adds(network, size, paper=False):
    """The multiply-adds of Conv2d and Linear layers for one 3 x size x size image, in evaluation.

    paper: as the published tables count, with each element that a batch norm reads twice, and
    those that ReLUs and pools read once. Raises ValueError where the network does.
    """
    total = 0

    def count(*layers):
        weights = sum(layer.weight.numel() for layer in layers)

        def hook(module, inputs, output):
            nonlocal total
            total += weights * output[0, 0].numel()  # each weight once per place of the map

        return hook

    def count_read(times):
        def hook(module, inputs, output):
            nonlocal total
            total += times * sum(x.numel() for x in inputs if torch.is_tensor(x))

        return hook

    network = copy.deepcopy(network).to("meta").eval()  # shapes alone
    if paper:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(count_read(2))
            # A Cell's two inputs, and what stem1 reads, are ReLU'd before they come.
            kinds = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, Cell)
            if isinstance(module, kinds):
                module.register_forward_hook(count_read(1))
        if isinstance(network, NetworkImageNet):
            network.stem1[1].register_forward_hook(count_read(1))
    for module in network.modules():
        if isinstance(module, FactorizedReduce):  # never calls its two convolutions as such
            module.bn.register_forward_hook(count(module.conv_1, module.conv_2))
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count(module))
    network(torch.empty(1, 3, size, size, dtype=network.classifier.weight.dtype, device="meta"))
    return total


def get_args():
    parser = utils.Parser("What the network of a cell costs, before it is trained.")
    add = parser.add_argument
    add("--arch", default="PCDARTS", help="as of train.py")
    add("--set", default="cifar10", choices=["cifar10", "imagenet"], help="the published sizes of")
    for name, what in (("init_channels", "channels C"), ("num_classes", "outputs"),
                       ("layers", "cells"), ("input_size", "side of the images")):  # fmt: skip
        add(f"--{name}", type=utils.count, help=f"{what}; None: as published")
    add("--auxiliary", action="store_true", help="a second classifier at two thirds of the depth")
    return parser.parse_args()


def main(args):
    stem = "imagenet" if args.set == "imagenet" else "cifar"
    given = args.init_channels, args.num_classes, args.layers, args.input_size
    *sizes, side = (g or p for g, p in zip(given, PUBLISHED[stem], strict=True))
    with utils.user_errors(ValueError):  # a GenotypeError too
        genotype = genotypes.load(args.arch, OPS)
        network = build(genotype, *sizes, stem, args.auxiliary)
        measure.check_size(network, side)
        counts = [multiply_adds(network, side, paper=paper) for paper in (False, True)]
    kept = measure.kept_per_image(network, side)
    print(
        f"{sizes[0]} channels, {sizes[2]} cells, {side} x {side} pixels, {sizes[1]} classes\n"
        f"parameters: {parameters(network) / 1e6:.2f} M (an auxiliary head not counted)\n"
        f"multiply-adds: {counts[0] / 1e6:.2f} M of convolutions and linear layers, "
        f"{counts[1] / 1e6:.2f} M as the paper counts\n"
        f"memory per image in training: {kept / 1e6:.1f} MB kept for the backward pass, float32"
    )


if __name__ == "__main__":
    utils.run(main, get_args)
