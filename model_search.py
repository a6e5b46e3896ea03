"""The supernet of PC-DARTS (Xu et al., ICLR 2020): MixedOp (eq. 2), Cell (eq. 3), Network.

This is the paper in code, to be read and changed. FastCell is the same cell with a forward that is
several times faster. Network takes it only if this text is unchanged and both cells give the same
figures, which it checks each time it is built (`difference_from_fast`).
"""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import channel_shuffle

import operations
from fused import FastForward, difference, sharing
from genotypes import PRIMITIVES, Genotype
from operations import OPS, FactorizedReduce, ReLUConvBN
from utils import in_layout, without_module_prefix

KINDS = ("normal", "reduce")
SAMPLINGS = ("shuffle", "shift", "random")
STEMS = ("cifar", "imagenet", "resnet")
log = logging.getLogger("pc-darts")


class MixedOp(nn.Module):
    """One edge (eq. 2): sum_o softmax(alpha)_o * o(the first C / k channels); the rest passes by.

    C: channels of a node. primitives: names of the operations; None: genotypes.PRIMITIVES.
    """

    def __init__(self, C, stride, k=4, sampling="shuffle", primitives=None):
        super().__init__()
        self.k, self.stride, self.sampling = k, stride, sampling
        self._ops = nn.ModuleList()
        for name in primitives or PRIMITIVES:
            op = OPS[name](C // k, stride, False)
            if "pool" in name:
                op = nn.Sequential(op, nn.BatchNorm2d(C // k, affine=False))
            self._ops.append(op)

    def forward(self, x, weights):
        """(N, C, H / stride, W / stride) of x (N, C, H, W); weights (ops,): softmax(alpha)."""
        selected, bypass = x.tensor_split([x.shape[1] // self.k], dim=1)  # C / k channels; the rest
        mixed = sum(w * op(selected) for w, op in zip(weights, self._ops, strict=True))
        if self.k == 1:
            return mixed
        if self.stride == 2:
            bypass = F.max_pool2d(bypass, 2, 2)
        out = torch.cat([mixed, bypass], dim=1)
        if self.sampling == "shuffle":
            return channel_shuffle(out, self.k)
        if self.sampling == "shift":
            return out.roll(-mixed.shape[1], dims=1)
        return out  # "random": the cell puts the channels back


class Cell(nn.Module):
    """One cell: `steps` nodes, each fed by all before it; the last `multiplier` are its output.

    Edges are numbered by target: 2 into the first node, 3 into the second, ...
    C_prev_prev, C_prev: channels of the outputs of the two cells before. C: channels of a node.
    """

    def __init__(
        self, steps, multiplier, C_prev_prev, C_prev, C, reduction, reduction_prev, k=4,
        sampling="shuffle", primitives=None,
    ):  # fmt: skip
        super().__init__()
        self._steps, self._multiplier = steps, multiplier
        self.reduction, self.sampling = reduction, sampling
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self._ops = nn.ModuleList(
            MixedOp(C, 2 if reduction and i < 2 else 1, k, sampling, primitives)
            for j in range(steps)
            for i in range(2 + j)  # the edge from node i to node 2 + j
        )
        if sampling == "random":  # x[:, channel_order] has the channels of the operations first
            self.register_buffer("channel_order", torch.arange(C))
            self.register_buffer("channel_places", torch.arange(C))

    def forward(self, s0, s1, weights, betas):
        """(N, multiplier * C, H, W) of s0 and s1, the outputs of the two cells before.

        weights (E, ops): softmax(alpha). betas (E,): softmax(beta) over the edges of a node.
        """
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        random = self.sampling == "random"
        edge = 0
        for _ in range(self._steps):
            node = 0
            for state in states:  # eq. 3: x_j = sum over i < j of softmax(beta)_ij * f_ij(x_i)
                x = state[:, self.channel_order] if random else state
                node = node + betas[edge] * self._ops[edge](x, weights[edge])
                edge += 1
            states.append(node[:, self.channel_places] if random else node)
        return torch.cat(states[-self._multiplier :], dim=1)


class FastCell(FastForward, Cell):
    """A Cell with the forward of fused.FastForward, or Cell's own where that does not fit."""


class Network(nn.Module):
    """The supernet: stem, `layers` cells, classifier; alphas and betas.

    C: channels of a node in the first cell; a cell that reduces doubles them. k: 1/k of the
    channels go through the operations; k=1, edge_norm=False is DARTS. stem: "cifar", "imagenet"
    (an eighth of the size) or "resnet" (a quarter). sampling: which channels the operations of the
    next node take: "shuffle" as published; "shift", a rotation by C / k; or "random", drawn by
    `resample`, the others back in their places. primitives: names of the operations; None:
    genotypes.PRIMITIVES. reductions: which cells reduce; None: layers // 3 and 2 * layers // 3.
    fused: use the fast form of the cells if it gives the same figures. recompute: the fast form
    then keeps less for the backward pass and computes it again.
    alphas and betas are buffers that require a gradient: they are in the state dict and move with
    the network, but `parameters()` are the weights alone.
    Raises ValueError where C / k is no even number, where there is no layer, and where an argument
    is unknown.
    """

    def __init__(
        self, C, num_classes, layers, criterion, steps=4, multiplier=4, stem_multiplier=3, k=4,
        edge_norm=True, stem="cifar", recompute=False, sampling="shuffle", primitives=None,
        reductions=None, fused=True,
    ):  # fmt: skip
        super().__init__()
        if reductions is None:
            reductions = (layers // 3, 2 * layers // 3)
        self.primitives = list(primitives or PRIMITIVES)
        self._arguments = dict(
            C=C, num_classes=num_classes, layers=layers, criterion=criterion, steps=steps,
            multiplier=multiplier, stem_multiplier=stem_multiplier, k=k, edge_norm=edge_norm,
            stem=stem, recompute=recompute, sampling=sampling, primitives=self.primitives,
            reductions=reductions, fused=fused,
        )  # fmt: skip
        _check(**self._arguments)
        self._C, self._num_classes, self._layers = C, num_classes, layers  # for scripts of others
        self._criterion, self._steps, self._multiplier = criterion, steps, multiplier
        self.edge_norm = edge_norm

        variant = dict(k=k, sampling=sampling, primitives=self.primitives)
        self.why_plain = None  # why the fast form was wanted and is not taken
        if fused:
            self.why_plain = difference_from_fast(C, steps, multiplier, variant)
        self.fused = fused and self.why_plain is None
        make_cell = functools.partial(FastCell if self.fused else Cell, steps, multiplier)
        self.layout = None  # memory format of the maps; None: channels_last in the fast form

        C_prev_prev = C_prev = stem_multiplier * C
        for name, module in operations.stem(stem, C_prev, operations.StemConv).items():
            self.add_module(name, module)
        C_curr, reduction_prev = C, stem == "imagenet"
        self.cells = nn.ModuleList()
        for i in range(layers):
            reduction = i in reductions
            C_curr *= 2 if reduction else 1
            cell = make_cell(C_prev_prev, C_prev, C_curr, reduction, reduction_prev, **variant)
            cell.recompute = recompute  # used by the fast form only
            self.cells.append(cell)
            reduction_prev = reduction
            C_prev_prev, C_prev = C_prev, multiplier * C_curr
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, num_classes)

        self._arch_names, self._own_arch = ["alphas_normal", "alphas_reduce"], None
        self._arch_names += ["betas_normal", "betas_reduce"] if edge_norm else []
        for name in self._arch_names:
            self.register_buffer(name, None)
        self._initialize_alphas()

    def _initialize_alphas(self):
        """Alphas (E, ops) and betas (E,): 1e-3 * N(0, 1)."""
        edges = sum(2 + j for j in range(self._steps))
        for name in self._arch_names:
            shape = (edges, len(self.primitives)) if "alphas" in name else (edges,)
            setattr(self, name, (1e-3 * torch.randn(shape)).requires_grad_())

    def forward(self, x):
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        return self.classifier(self.features(x))

    def features(self, x):
        """What the classifier reads: the mean over the last map of each channel, (N, channels)."""
        x = in_layout(x, self.layout or (torch.channels_last if self.fused else None))
        if self._arguments["stem"] == "imagenet":
            s0 = self.stem0(x)
            s1 = self.stem1(s0)
        else:
            s0 = s1 = self.stem(x)
        weights = {kind: self.op_weights(kind) for kind in KINDS}
        betas = {kind: self.edge_weights(kind) for kind in KINDS}
        with sharing():  # fast cells compute once what several of them need
            for cell in self.cells:
                kind = "reduce" if cell.reduction else "normal"
                s0, s1 = s1, cell(s0, s1, weights[kind], betas[kind])
        return self.global_pooling(s1).flatten(1)

    def op_weights(self, kind):
        """softmax(alpha) over the operations of each edge of the "normal" or "reduce" cell (eq. 2).

        (E, ops), by target.
        """
        return getattr(self, f"alphas_{kind}").softmax(-1)

    def edge_weights(self, kind):
        """softmax(beta) over the edges of each node of the "normal" or "reduce" cell (eq. 3).

        (E,), by target; ones without edge normalization.
        """
        if not self.edge_norm:
            return torch.ones_like(getattr(self, f"alphas_{kind}")[:, 0])
        sizes = [2 + j for j in range(self._steps)]
        betas = getattr(self, f"betas_{kind}").split(sizes)
        return torch.cat([part.softmax(0) for part in betas])

    def _loss(self, input, target):
        return self._criterion(self(input), target)

    def arch_parameters(self):
        """[alphas_normal, alphas_reduce, betas_normal, betas_reduce]: (E, ops) and (E,).

        No betas without edge normalization.
        """
        return self._arch_parameters

    @property
    def _arch_parameters(self):
        """The list under the name that published code reads, and sets in _initialize_alphas."""
        return self._own_arch or [getattr(self, name) for name in self._arch_names]

    @_arch_parameters.setter
    def _arch_parameters(self, tensors):
        self._own_arch = list(tensors)

    def weights(self):
        """Everything that learns, except alphas and betas."""
        arch = {id(tensor) for tensor in self.arch_parameters()}
        return [weight for weight in self.parameters() if id(weight) not in arch]

    def new(self):
        """A network like this one with the same alphas and betas and fresh weights."""
        device = self.classifier.weight.device
        network = Network(**self._arguments).to(device, self.classifier.weight.dtype)
        network.layout = self.layout
        for mine, its in zip(self.arch_parameters(), network.arch_parameters(), strict=True):
            its.data.copy_(mine.data)
        return network

    @torch.no_grad()
    def genotype(self, max_skip=None):
        """The cells: each edge takes its best op but none, each node its two best edges.

        DARTS, section 2.4. An op's score is softmax(alpha) * softmax(beta) (PC-DARTS, section 3.3);
        ties go to the lower index.
        max_skip: the most skip_connects in the normal cell; while there are more, the one with the
        smallest softmax(alpha) is removed and the cell derived again (P-DARTS, section 3.3).
        """
        cells = []
        for kind in KINDS:
            alphas = self.op_weights(kind).cpu().clone()  # (E, ops), softmax(alpha)
            betas = self.edge_weights(kind).cpu()
            gene = self._derive(alphas * betas[:, None])
            while kind == "normal" and max_skip is not None:
                skips = [edge for edge, (op, _) in gene.items() if op == "skip_connect"]
                if len(skips) <= max_skip:
                    break
                o = self.primitives.index("skip_connect")
                skips = [edge for edge in skips if alphas[edge, o] > 0]
                if not skips:  # there is no other operation to take
                    break
                alphas[min(skips, key=lambda edge: alphas[edge, o]), o] = 0
                gene = self._derive(alphas * betas[:, None])
            cells.append(list(gene.values()))
        concat = range(2 + self._steps - self._multiplier, self._steps + 2)
        return Genotype(cells[0], concat, cells[1], concat)

    def _derive(self, scores):
        """{edge: (op, input)} of the cell with these scores (E, ops), in the genotype's order."""
        ops = [o for o, name in enumerate(self.primitives) if name != "none"]
        if not ops:
            raise ValueError("a cell of none alone cannot be derived: search more operations")
        best, op = scores[:, ops].max(1)  # of each edge
        gene, start = {}, 0
        for node in best.split([2 + j for j in range(self._steps)]):
            edges = node.sort(descending=True, stable=True).indices[:2].tolist()
            gene |= {start + e: (self.primitives[ops[op[start + e]]], e) for e in edges}
            start += len(node)
        return gene

    @torch.no_grad()
    def resample(self):
        """Draws the C / k channels that each cell's operations take; to be called before each step.

        Only with sampling="random" (docs/differences.md, 17). Returns the buffers that hold the
        draw, else [].
        """
        if self._arguments["sampling"] != "random":
            return []
        for cell in self.cells:
            order = torch.randperm(len(cell.channel_order))
            chosen, others = order.tensor_split([len(order) // self._arguments["k"]])
            cell.channel_order.copy_(torch.cat([chosen.sort().values, others.sort().values]))
            cell.channel_places.copy_(cell.channel_order.argsort())
        return [
            buffer for cell in self.cells for buffer in (cell.channel_order, cell.channel_places)
        ]

    def _apply(self, fn, recurse=True):
        """As for parameters: alphas and betas stay the same leaf tensors, only their data moves."""
        arch = {name: self._buffers.pop(name) for name in self._arch_names if name in self._buffers}
        super()._apply(fn, recurse)
        for name, tensor in arch.items():
            moved, grad = fn(tensor.detach()), tensor.grad
            try:
                tensor.data = moved
            except RuntimeError:  # to or from the meta device: another kind of tensor
                tensor = moved.requires_grad_()
            tensor.grad = None if grad is None else fn(grad)
            self._buffers[name] = tensor
        return self

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As nn.Module's; accepts a `module.` prefix, and a state dict without alphas and betas."""
        return super().load_state_dict(without_module_prefix(state_dict), strict, assign)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *others):
        """As nn.Module's; missing alphas and betas keep their values; requires_grad stays."""
        learns = {name: getattr(self, name).requires_grad for name in self._arch_names}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)
        for name in self._arch_names:
            getattr(self, name).requires_grad_(learns[name])  # `assign` replaces the tensor
            if prefix + name in missing:
                missing.remove(prefix + name)


def _check(
    *, C, k, layers, steps, multiplier, stem, sampling, primitives, recompute, fused, **others
):
    """ValueError where the arguments of Network make none."""
    if k < 1 or C < 1 or C % k or (C // k) % 2:
        raise ValueError(f"C / k must be a whole, even number of channels, not {C} / {k}")
    if layers < 1:
        raise ValueError(f"layers={layers}: give 1 cell or more")
    if not 1 <= multiplier <= steps:
        raise ValueError(f"multiplier={multiplier}: a cell outputs 1 to steps={steps} nodes")
    if stem not in STEMS:
        raise ValueError(f"stem={stem!r}: give one of {', '.join(STEMS)}")
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling={sampling!r}: give one of {', '.join(SAMPLINGS)}")
    unknown = [name for name in primitives if name not in OPS]
    if unknown:
        raise ValueError(f"unknown operation {unknown[0]!r}: give some of {', '.join(OPS)}")
    if recompute and not fused:
        raise ValueError("recompute is of the fast form: give fused=True, or leave it out")


def difference_from_fast(C, steps, multiplier, variant):
    """None, or in a few words why the fast cell does not give Cell's figures; also logged.

    Compares two small cells, normal and reduction, of MixedOp, Cell and the operations as they are
    now. Two nodes are enough for every kind of edge: from an input or a node, stride 1 or 2.
    """
    steps, multiplier = min(steps, 2), min(multiplier, 2)
    edges = sum(2 + j for j in range(steps))
    for reduction in (False, True):
        arguments = steps, multiplier, C, C, C, reduction, not reduction
        paper, fast = (functools.partial(form, *arguments, **variant) for form in (Cell, FastCell))
        why = difference(paper, fast, C, edges, len(variant["primitives"]), not reduction)
        if why is not None:
            log.warning(
                "the supernet runs as model_search.py has it, not in its fast form: %s", why
            )
            return why
    return None


if __name__ == "__main__":
    from harness import costs, script

    script.run(costs.main_supernet, costs.get_args_supernet)
