"""What the fast form of a cell reads off the cell's modules, and whether it stands for them.

The weights and statistics stay in the modules of model_search.Cell, which numbers its edges by
target; in here they are put in the order by source node.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fused.functions import EPS, MOMENTUM
from fused.known import FOREIGN, unfamiliar
from operations import DilConv, FactorizedReduce, Identity, ReLUConvBN, SepConv, Zero

HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"


def edges_by_source(steps):
    """The edges in the order by source, as numbers by target.

    The edge from node i to target j has number 2 + 3 + ... + (j + 1) + i: 14 edges in 4 steps.
    """
    sources = range(steps + 1)
    return [j * (j + 3) // 2 + i for i in sources for j in range(max(0, i - 1), steps)]


def sources_and_targets(steps):
    """(number of sources, of targets of each) in the order in which a cell works on its nodes.

    Both input nodes have all nodes as targets, so they go together.
    """
    return [(2, steps)] + [(1, steps - j) for j in range(1, steps)]


class Wave(NamedTuple):
    """Sources that a cell works on together."""

    S: int  # sources
    T: int  # targets of each of them
    stride: int
    first: int  # how many edges come before
    edges: tuple  # numbers by target of its edges, source by source


class Kinds(NamedTuple):
    """The places in primitives of the operations that have a batched form, and of the others."""

    seps: tuple
    dils: tuple
    pools: tuple
    halves: tuple  # skip_connects of the strided edges
    skips: tuple
    others: tuple  # users' own, applied edge by edge as the modules that they are
    n: int

    def own(self, stride):
        """The lists of places whose ops have a block of their own for each edge."""
        return self.seps, self.dils, *([o] for o in (self.halves if stride == 2 else ()))

    def plain(self, wave):
        """The number of blocks without a norm, the last: the skip_connects where they are x."""
        return wave.S * len(self.skips) if wave.stride == 1 else 0


class Plan:
    """The modules of a cell in the order in which the fast form reads them, in one of its modes.

    why: None, or in a few words why the cell has to run as it is written.
    """

    def __init__(self, cell):
        self.owner = cell._modules
        order = edges_by_source(cell._steps)
        parts = [*cell.preprocess0.modules(), *cell.preprocess1.modules(), cell._ops, *cell._ops]
        types = dict.fromkeys(map(type, (cell, *parts)))
        self.why = next((why for kind in types if (why := unfamiliar(kind))), None)
        if self.why is None:
            self.waves, first = (), 0
            for w, (S, T) in enumerate(sources_and_targets(cell._steps)):
                stride = 2 if cell.reduction and w == 0 else 1
                self.waves += (Wave(S, T, stride, first, tuple(order[first : first + S * T])),)
                first += S * T
            self.ops = [cell._ops[e]._ops for e in order]
            self.kinds = _kinds(self.ops[0], self.ops[-1], cell.reduction)
            for edge in cell._ops:
                parts.append(edge._ops)
                for o, op in enumerate(edge._ops):
                    if o not in self.kinds.others:
                        parts += op.modules()
            self.why = _why(cell, self, parts)
        self._keep(cell, parts)
        if self.why is None:
            self._read()

    def __reduce__(self):
        """None takes its place in a copy, whose modules are others."""
        return type(None), ()

    def _keep(self, cell, parts):
        """What it is of the modules that must stay as it is for the plan to hold."""
        self.parts, self.types = parts, [type(part) for part in parts]
        classes = dict.fromkeys(c for kind in {type(cell), *self.types} for c in kind.__mro__)
        self.live = [vars(c) for c in classes if not c.__module__.startswith(FOREIGN)]
        self.live += _hooks(vars(torch_module), "_global")
        for part in (cell, *parts):
            self.live += [part._modules, *_hooks(vars(part))]
        # Of tensors only whether they are there: their values may change.
        attributes = (vars(part) for part in parts)
        self.live += [d for d in attributes if not any(map(torch.is_tensor, d.values()))]
        self.kept = [dict(values) for values in self.live]
        self.tensors = [d for part in parts for d in (part._parameters, part._buffers)]
        self.absent = self._absent()

    def _absent(self):
        return [value is None for values in self.tensors for value in values.values()]

    def holds(self, cell):
        """Whether the modules of the cell are those that it was made for, and as they were."""
        return (
            self.owner is cell._modules
            and self.live == self.kept
            and list(map(type, self.parts)) == self.types
            and self._absent() == self.absent
        )

    def _read(self):
        """The lists of modules by source."""
        kinds, ops = self.kinds, self.ops
        self.pool_ops = [  # which have no weights: one for all targets of a source
            [ops[wave.first][o][0] for o in kinds.pools] for wave in self.waves
        ]
        # The convolutions of the sep_convs, first all first ones; those of the dil_convs.
        self.depthwise = [
            [[edge[o].op[at] for at in places for edge in ops] for o in group]
            for group, places in ((kinds.seps, (1, 5)), (kinds.dils, (1,)))
            if group
        ]
        self.middle, self.last = [], []  # of each wave the 1x1 convolutions that a norm follows
        strided = ops[: sum(wave.S * wave.T for wave in self.waves if wave.stride == 2)]
        self.halves = [
            ([edge[o].conv_1 for edge in strided], [edge[o].conv_2 for edge in strided])
            for o in kinds.halves
        ]
        # The norms in the order in which their figures come, and the places of these: for each wave
        # those inside the sep_convs, then the last ones of sep_convs, dil_convs and halves, then
        # those of the pools, whose figures are the same for all targets of a source.
        self.norms, self.rows, self.counts = [], [], []
        for wave in self.waves:
            edges = ops[wave.first : wave.first + wave.S * wave.T]
            self.middle.append([edge[o].op[2] for edge in edges for o in kinds.seps])
            self.last.append([edge[o].op[6] for edge in edges for o in kinds.seps])
            self.last[-1] += [edge[o].op[2] for edge in edges for o in kinds.dils]
            middle = [edge[o].op[3] for edge in edges for o in kinds.seps]
            last = [edge[o].op[7] for edge in edges for o in kinds.seps]
            last += [edge[o].op[3] for edge in edges for o in kinds.dils]
            if wave.stride == 2:
                last += [edge[o].bn for o in kinds.halves for edge in edges]
            pools = [edge[o][1] for o in kinds.pools for edge in edges]
            row = self.rows[-1] + 1 if self.rows else 0
            own = len(middle) + len(last)
            self.rows += range(row, row + own)
            self.rows += [row + own + i // wave.T for i in range(len(pools))]
            self.norms += middle + last + pools
            self.counts.append((len(middle), len(last), len(pools)))


def _kinds(first, last, reduction):
    """Read off the operations of the first edge and of the last."""

    def kind(*types):
        """Places whose op is of these types on both edges, and whose norms learn nothing."""
        pairs = enumerate(zip(first, last, strict=True))
        return tuple(
            o
            for o, pair in pairs
            if tuple(map(type, pair)) in types
            and not any(getattr(part, "affine", False) for op in pair for part in op.modules())
        )

    def keeps_size(op, dilation):
        """Whether its k x k convolutions, k odd, have this dilation and keep the size."""
        convs = [m for m in op.op if isinstance(m, nn.Conv2d) and m.groups > 1]
        return all(
            conv.kernel_size == (k, k)
            and k % 2
            and conv.dilation == (dilation, dilation)
            and conv.padding == (dilation * (k // 2),) * 2
            for conv in convs
            for k in conv.kernel_size[:1]
        )

    def is_pool(op):
        return len(op) == 2 and type(op[0]) in (nn.MaxPool2d, nn.AvgPool2d)

    def is_norm(op):
        return isinstance(op[1], nn.modules.batchnorm._BatchNorm)

    seps = tuple(o for o in kind((SepConv, SepConv)) if keeps_size(last[o], 1))
    dils = tuple(o for o in kind((DilConv, DilConv)) if keeps_size(last[o], 2))
    sequences = kind((nn.Sequential, nn.Sequential))
    pools = tuple(o for o in sequences if is_pool(last[o]) and is_norm(last[o]))
    halves = kind((FactorizedReduce, Identity))
    skips = halves if reduction else kind((Identity, Identity))
    batched = seps + dils + pools + skips + kind((Zero, Zero))
    others = tuple(o for o in range(len(last)) if o not in batched)
    return Kinds(seps, dils, pools, halves, skips, others, len(last))


def _hooks(attributes, prefix=""):
    """The dicts of hooks that a call of a module runs, of one module or of all."""
    return [attributes[prefix + name] for name in HOOKS]


def _why(cell, plan, parts):
    """None, or in a few words why the fast form is not the same function as this cell."""
    for kind in dict.fromkeys(map(type, parts)):
        if unfamiliar(kind):
            return unfamiliar(kind)
    for part in parts:
        name = type(part).__name__
        if any(_hooks(vars(part))):
            return f"hooks of {name}"
        if "forward" in vars(part):
            return f"the forward of one {name}"
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            if type(part) is not cell.norm:
                return name
            if part.training != cell.training:
                return "batch norms in another mode than their cell"
            without = part.running_mean is None or part.affine
            if without or (part.momentum, part.eps) != (MOMENTUM, EPS):
                return "other momentum, eps, weights or statistics of batch norms"
    if any(_hooks(vars(torch_module), "_global")):
        return "hooks of all modules"
    for block in (cell.preprocess0, cell.preprocess1):
        if type(block) not in (ReLUConvBN, FactorizedReduce):
            return f"the preprocess {type(block).__name__}"
    k, others = cell._ops[0].k, plan.kinds.others
    built = {
        stride: [_built(op) for o, op in enumerate(ops) if o not in others]
        for stride, ops in ((1, plan.ops[-1]), (2, plan.ops[0]))
    }
    for wave in plan.waves:
        for edge in (cell._ops[e] for e in wave.edges):
            if (edge.k, edge.stride, edge.sampling) != (k, wave.stride, cell.sampling):
                return f"an edge with k={edge.k}, stride={edge.stride}, {edge.sampling}"
            ops = [_built(op) for o, op in enumerate(edge._ops) if o not in others]
            if ops != built[wave.stride]:
                return "an edge that is not built as the others"
    return None


def _built(op):
    """Everything of the modules of an operation but their tensors."""
    return [
        (type(m), list(m._modules), {k: v for k, v in vars(m).items() if k[0] != "_"},
         [p is None or p.shape for p in (*m._parameters.values(), *m._buffers.values())])
        for m in op.modules()
    ]  # fmt: skip


@functools.cache
def constants(kinds, waves, device):
    """Of cells with these kinds: the edges by source, and where W of each wave has its entries.

    W (T, blocks) is the matrix of functions.NormSum: an edge's ops go to its own target, the pools
    and the skip_connect of a source to all. The places are those in a row of all coefficients
    (E, ops) by source, behind which is a zero: -1. `skips`, the last, are not normalized.
    Returns (E,), all places in a row, and the shapes of the matrices.
    """
    edges = [e for wave in waves for e in wave.edges]
    places = torch.arange(len(edges) * kinds.n, device="cpu").view(-1, kinds.n)
    matrices = []
    for wave in waves:
        S, T = wave.S, wave.T
        part = places[wave.first : wave.first + S * T].view(S, T, -1)
        own = torch.eye(T, dtype=torch.bool, device="cpu")[:, None, :, None]
        skips = kinds.skips if wave.stride == 1 else ()
        blocks = [torch.where(own, part[:, :, list(ops)], -1).flatten(1) for ops in kinds.own(wave.stride)]
        shared = list(kinds.pools + skips)
        blocks.append(part[:, :, shared].permute(1, 2, 0).flatten(1))
        matrices.append(torch.cat(blocks, 1))
    with torch.inference_mode(False):
        order = torch.tensor(edges, device=device)
        flat = torch.cat([matrix.flatten() for matrix in matrices]).to(device)
    return order, flat, [matrix.shape for matrix in matrices]
