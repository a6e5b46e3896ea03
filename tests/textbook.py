"""The supernet edge by edge, as the formulas stand: oracle and yardstick of the batched one.

Fourteen MixedOps a cell, each with its own slice, operations, concatenation and shuffle. The
parameters carry the names of the published networks; alphas and betas are plain leaf tensors.
"""

import torch
import torch.nn.functional as F
from torch import nn

from genotypes import PRIMITIVES
from operations import OPS, FactorizedReduce, ReLUConvBN


class MixedOp(nn.Module):
    """One edge: softmax(alpha)-weighted ops on C/K channels, the others pass by (eq. 2)."""

    def __init__(self, C, stride, k, sampling="shuffle"):
        super().__init__()
        self.k, self.stride, self.sampling = k, stride, sampling
        self.drawn = torch.arange(C // k)  # the channels of the operations, where they are random
        self._ops = nn.ModuleList()
        for name in PRIMITIVES:
            op = OPS[name](C // k, stride, False)
            if "pool" in name:
                op = nn.Sequential(op, nn.BatchNorm2d(C // k, affine=False))
            self._ops.append(op)

    def forward(self, x, weights):
        c = x.shape[1] // self.k
        if self.sampling == "random":
            out = x.clone() if self.stride == 1 else F.max_pool2d(x, 2, 2)
            x = x[:, self.drawn]
            out[:, self.drawn] = sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))
            return out
        mixed = sum(w * op(x[:, :c]) for w, op in zip(weights, self._ops, strict=True))
        if self.k == 1:
            return mixed
        bypass = x[:, c:] if self.stride == 1 else F.max_pool2d(x[:, c:], 2, 2)
        out = torch.cat([mixed, bypass], dim=1)
        return out.roll(-c, 1) if self.sampling == "shift" else F.channel_shuffle(out, self.k)


class Cell(nn.Module):
    """Each node is the softmax(beta)-weighted sum of the edges from all before it (eq. 3)."""

    def __init__(
        self, steps, multiplier, C_prev_prev, C_prev, C, reduction, reduction_prev, k, sampling
    ):
        super().__init__()
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self.steps, self.multiplier = steps, multiplier
        self._ops = nn.ModuleList(
            MixedOp(C, 2 if reduction and j < 2 else 1, k, sampling)
            for i in range(steps)
            for j in range(2 + i)
        )

    def forward(self, s0, s1, alphas, betas):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        edge = 0
        for _ in range(self.steps):
            n = len(states)
            node = sum(
                betas[edge + j] * self._ops[edge + j](h, alphas[edge + j])
                for j, h in enumerate(states)
            )
            edge += n
            states.append(node)
        return torch.cat(states[-self.multiplier :], dim=1)


def stem_cifar(C):
    return nn.Sequential(nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))


def half(C_in, C_out):
    return [nn.Conv2d(C_in, C_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(C_out)]


class Network(nn.Module):
    def __init__(
        self, C, num_classes, layers, criterion, steps=4, multiplier=4, stem_multiplier=3,
        k=4, edge_norm=True, stem="cifar", sampling="shuffle",
    ):  # fmt: skip
        super().__init__()
        self.criterion, self.edge_norm, self.steps = criterion, edge_norm, steps
        C_curr = stem_multiplier * C
        if stem == "cifar":
            self.stem = stem_cifar(C_curr)
        else:
            self.stem0 = nn.Sequential(*half(3, C_curr // 2), nn.ReLU(), *half(C_curr // 2, C_curr))
            self.stem1 = nn.Sequential(nn.ReLU(), *half(C_curr, C_curr))
        C_prev_prev, C_prev, C_curr = C_curr, C_curr, C
        reduction_prev = stem == "imagenet"
        self.cells = nn.ModuleList()
        self.reductions = [i in (layers // 3, 2 * layers // 3) for i in range(layers)]
        for reduction in self.reductions:
            C_curr *= 2 if reduction else 1
            self.cells.append(
                Cell(
                    steps, multiplier, C_prev_prev, C_prev, C_curr, reduction, reduction_prev, k,
                    sampling,
                )
            )  # fmt: skip
            reduction_prev = reduction
            C_prev_prev, C_prev = C_prev, multiplier * C_curr
        self.classifier = nn.Linear(C_prev, num_classes)
        edges = sum(2 + i for i in range(steps))
        self.alphas_normal = (1e-3 * torch.randn(edges, len(PRIMITIVES))).requires_grad_()
        self.alphas_reduce = (1e-3 * torch.randn(edges, len(PRIMITIVES))).requires_grad_()
        self.betas_normal = (1e-3 * torch.randn(edges)).requires_grad_()
        self.betas_reduce = (1e-3 * torch.randn(edges)).requires_grad_()

    def arch_parameters(self):
        alphas = [self.alphas_normal, self.alphas_reduce]
        return alphas + ([self.betas_normal, self.betas_reduce] if self.edge_norm else [])

    def edge_weights(self, betas):
        """softmax over the edges of each node, (14,); ones where edge normalization is off."""
        if not self.edge_norm:
            return torch.ones_like(betas)
        return torch.cat(
            [part.softmax(0) for part in betas.split([2 + i for i in range(self.steps)])]
        )

    def forward(self, x):
        if hasattr(self, "stem"):
            s0 = s1 = self.stem(x)
        else:
            s0 = self.stem0(x)
            s1 = self.stem1(s0)
        for cell, reduction in zip(self.cells, self.reductions, strict=True):
            alphas = self.alphas_reduce if reduction else self.alphas_normal
            betas = self.betas_reduce if reduction else self.betas_normal
            s0, s1 = s1, cell(s0, s1, alphas.softmax(-1), self.edge_weights(betas))
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1))

    def _loss(self, x, target):
        return self.criterion(self(x), target)


class DiscreteNetwork(nn.Module):
    """NetworkCIFAR without the auxiliary head and drop path, each operation with its own ReLU."""

    def __init__(self, C, num_classes, layers, genotype):
        super().__init__()
        self.stem = stem_cifar(3 * C)
        self.cells = nn.ModuleList()
        self.plans = []  # of each cell: the inputs of its operations, the nodes of its output
        C_prev_prev, C_prev, reduction_prev = 3 * C, 3 * C, False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C *= 2 if reduction else 1
            edges = genotype.reduce if reduction else genotype.normal
            concat = list(genotype.reduce_concat if reduction else genotype.normal_concat)
            cell = nn.Module()
            if reduction_prev:
                cell.preprocess0 = FactorizedReduce(C_prev_prev, C)
            else:
                cell.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0)
            cell.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0)
            cell._ops = nn.ModuleList(
                OPS[name](C, 2 if reduction and node < 2 else 1, True) for name, node in edges
            )
            self.cells.append(cell)
            self.plans.append(([node for _, node in edges], concat))
            C_prev_prev, C_prev, reduction_prev = C_prev, len(concat) * C, reduction
        self.classifier = nn.Linear(C_prev, num_classes)

    def forward(self, x):
        s0 = s1 = self.stem(x)
        for cell, (inputs, concat) in zip(self.cells, self.plans, strict=True):
            states = [cell.preprocess0(s0), cell.preprocess1(s1)]
            for i in range(0, len(inputs), 2):
                first, second = (cell._ops[j](states[inputs[j]]) for j in (i, i + 1))
                states.append(first + second)
            s0, s1 = s1, torch.cat([states[node] for node in concat], 1)
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1))
