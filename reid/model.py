"""The discrete network of Auto-ReID: a ResNet whose residual layers are cells (section 3.1)."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import genotypes
import operations
from model import stack
from operations import OPS
from utils import without_module_prefix

LAYERS = (2, 2, 2, 2)  # cells of each stage
RESNETS = ("resnet18", "resnet34", "resnet50")  # of torchvision, to compare with


def reductions(layers=LAYERS):
    """Which cells reduce: the first of every stage but the first, counted from 0."""
    if not layers or min(layers) < 1:
        raise ValueError(f"layers {tuple(layers)}: give one cell or more a stage")
    return tuple(sum(layers[:stage]) for stage in range(1, len(layers)))


class Head(nn.Module):
    """(N, C, H, W) to embeddings (N, embedding) and logits (N, num_classes).

    Global average pool, linear and norm, classifier.
    """

    def __init__(self, C, num_classes, embedding):
        super().__init__()
        self.linear = nn.Linear(C, embedding, bias=False)  # the norm has one
        self.bn = nn.BatchNorm1d(embedding)
        self.classifier = nn.Linear(embedding, num_classes)

    def forward(self, x):
        embeddings = self.bn(self.linear(x.mean((2, 3))))
        return embeddings, self.classifier(embeddings)


class ReIDNetwork(nn.Module):
    """The network of a genotype: stem, four stages of cells, global average pool, embedding.

    C: channels of a node in the first stage, which each later stage doubles, and of the stem.
    layers: cells a stage. drop_path_prob is an attribute to be set before each epoch.
    Raises ValueError where a stage is empty, GenotypeError (a ValueError) where `check` does.
    """

    def __init__(self, C, num_classes, layers, genotype, embedding=512):
        super().__init__()
        genotype = genotypes.check(genotype, OPS)
        self.drop_path_prob = 0.0
        self.stem = operations.stem("resnet", C)["stem"]
        self.cells, channels = stack(genotype, C, C, sum(layers), reductions(layers))
        self.head = Head(channels[-1], num_classes, embedding)

    def forward(self, x):
        """(embeddings (N, embedding), logits (N, num_classes)) of x (N, 3, H, W).

        In evaluation the embeddings alone. Raises ValueError where a map to be halved is odd, and
        where a map is too low for part_aware.
        """
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, self.drop_path_prob)
        embeddings, logits = self.head(s1)
        return (embeddings, logits) if self.training else embeddings

    def leaves_out_nodes(self):
        """As model.DiscreteNetwork's."""
        return any(cell.leaves_out_nodes() for cell in self.cells)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As nn.Module's; accepts a `module.` prefix."""
        return super().load_state_dict(without_module_prefix(state_dict), strict, assign)


class ResNet(nn.Module):
    """A ResNet of torchvision without pretraining, with the head of a ReIDNetwork.

    name: one of RESNETS. The last stage does not halve the map (Luo et al., CVPRW 2019, section
    3.4), which so is a 16th of the image, as of a ReIDNetwork with three stages.
    """

    def __init__(self, name, num_classes, embedding=512):
        super().__init__()
        self.drop_path_prob = 0.0  # it has no cells to drop a path of
        resnet = models.get_model(name, weights=None)
        for module in resnet.layer4.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
        self.body = nn.Sequential(*list(resnet.children())[:-2])  # without its pool and classifier
        self.head = Head(resnet.fc.in_features, num_classes, embedding)

    def forward(self, x):
        """As ReIDNetwork's."""
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        embeddings, logits = self.head(self.body(x))
        return (embeddings, logits) if self.training else embeddings


def check_size(network, layers, height, width, images):
    """Raises ValueError where a ReIDNetwork or Supernet cannot read height x width images.

    layers: cells of each stage. images: the fewest in a step.
    """
    try:
        _on_paper(network, images, height, width)
    except (ValueError, RuntimeError) as error:  # of PyTorch: maps that do not fit together
        if "more than 1 value per channel" in str(error):  # in the head
            raise ValueError(
                "a step of 1 image in a process is too small for batch norm: "
                "raise --identities or --instances"
            ) from None
        side = 2 ** (len(layers) + 1)  # a quarter behind the stem, and a half with each stage
        raise ValueError(
            f"images of {height} x {width}: {str(error).splitlines()[0]}; for {len(layers)} stages "
            f"give a height of {4 * side} or more and a width, both in steps of {side}"
        ) from None


def multiply_adds(network, height, width):
    """Those of convolutions and products of matrices for one image, in evaluation."""
    with FlopCounterMode(display=False) as counter:
        _on_paper(copy.deepcopy(network).eval(), 1, height, width)
    return counter.get_total_flops() // 2


def _on_paper(network, images, height, width):
    """A pass of shapes alone, through a copy."""
    copy.deepcopy(network).to("meta")(torch.empty(images, 3, height, width, device="meta"))
