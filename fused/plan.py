"""What the fast form of a cell reads off the cell's modules, and whether it stands for them.

The weights and statistics stay in the modules of model_search.Cell, which numbers its edges by
target; in here they are put in the order by source node.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from fused.known import (
    AT_FIRST,
    fresh,
    functions_of_torch,
    is_as_made,
    is_untouched,
    signature,
    unfamiliar,
)
from fused.norms import MOMENTUM
from fused.snapshot import Snapshot, hooks
from operations import DilConv, FactorizedReduce, Identity, ReLUConvBN, SepConv, Zero


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

    def unnormed(self, wave):
        """The number of blocks without a norm, the last: the skip_connects where they are x."""
        return wave.S * len(self.skips) if wave.stride == 1 else 0


# Places in the `op` of a DilConv, and of the first half of a SepConv; in its second half + HALF.
DEPTHWISE, POINTWISE, NORM, HALF = 1, 2, 3, 4


class Plan:
    """The modules of a cell in the order in which the fast form reads them, in one of its modes.

    why: None, or in a few words why the cell has to run as it is written.

    The blocks of a wave have one order wherever they are listed, the maps h, P and W of
    norms.NormSum, norms and their figures: edge by edge the sep_convs of each; edge by edge the
    dil_convs; then for each skip_connect of strided edges all edges; for each pool all sources; for
    each other skip_connect all sources, not normalized.
    """

    def __init__(self, cell):
        edges = list(cell._ops)
        self.owner, self.settings = cell._modules, _settings(cell)
        types = dict.fromkeys(map(type, (cell, *edges)))
        self.why = next((why for kind in types if (why := unfamiliar(kind))), None)
        blocks, parts = [cell.preprocess0, cell.preprocess1], [cell._ops, *edges]
        if self.why is None:
            parts += [edge._ops for edge in edges]
            self.why = _why(cell, blocks, parts)
        if self.why is None:
            order = edges_by_source(cell._steps)
            self.waves, first = (), 0
            for w, (S, T) in enumerate(sources_and_targets(cell._steps)):
                stride = 2 if cell.reduction and w == 0 else 1
                self.waves += (Wave(S, T, stride, first, tuple(order[first : first + S * T])),)
                first += S * T
            self.ops = [cell._ops[e]._ops for e in order]
            strides = [wave.stride for wave in self.waves for _ in wave.edges]
            self.kinds = _kinds(list(zip(*self.ops, strict=True)), strides, cell)
            own = {SepConv, DilConv, FactorizedReduce, Identity, Zero, nn.Sequential}
            blocks += [op for edge in self.ops for op in edge if type(op) in own]
            used = [
                part for o in self._batched() for edge in self.ops for part in edge[o].modules()
            ]
            if len(used) > len(set(used)):
                self.why = "modules that edges share"
            self._read()
        self._keep(cell, parts + [part for block in blocks for part in block.modules()])

    def _batched(self):
        return [o for o in range(self.kinds.n) if o not in self.kinds.others]

    def __reduce__(self):
        """A copy of a cell has no plan yet: its modules are other objects."""
        return type(None), ()

    def _keep(self, cell, parts):
        """Records what must not change of the modules for the plan to hold."""
        self.snapshot = Snapshot(parts, more=[type(cell)])
        self.tensors = [d for part in parts for d in (part._parameters, part._buffers)]
        self.dtypes = self._dtypes()

    def _dtypes(self):
        """Of all parameters and buffers; None where there is none."""
        return [v if v is None else v.dtype for values in self.tensors for v in values.values()]

    def holds(self, cell):
        """Whether the modules of the cell are those that it was made for, and as they were."""
        try:
            same = self.owner is cell._modules and self.settings == _settings(cell)
        except (RuntimeError, ValueError, TypeError):  # attributes that cannot be compared
            return False
        return same and self.snapshot.holds() and self._dtypes() == self.dtypes

    def _read(self):
        """The lists of modules by source."""
        kinds, ops = self.kinds, self.ops
        self.pool_ops = [  # which have no weights: one for all targets of a source
            [ops[wave.first][o][0] for o in kinds.pools] for wave in self.waves
        ]
        # Depthwise, of each op: of sep_convs all first ones, then all second ones; of dil_convs.
        self.sep_convs = [
            [edge[o].op[at] for at in (DEPTHWISE, HALF + DEPTHWISE) for edge in ops]
            for o in kinds.seps
        ]
        self.dil_convs = [[edge[o].op[DEPTHWISE] for edge in ops] for o in kinds.dils]
        self.middle, self.final = [], []  # of each wave the 1x1 convolutions that a norm follows
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
            self.middle.append([edge[o].op[POINTWISE] for edge in edges for o in kinds.seps])
            self.final.append([edge[o].op[HALF + POINTWISE] for edge in edges for o in kinds.seps])
            self.final[-1] += [edge[o].op[POINTWISE] for edge in edges for o in kinds.dils]
            middle = [edge[o].op[NORM] for edge in edges for o in kinds.seps]
            last = [edge[o].op[HALF + NORM] for edge in edges for o in kinds.seps]
            last += [edge[o].op[NORM] for edge in edges for o in kinds.dils]
            if wave.stride == 2:
                last += [edge[o].bn for o in kinds.halves for edge in edges]
            pools = [edge[o][1] for o in kinds.pools for edge in edges]
            row = self.rows[-1] + 1 if self.rows else 0
            own = len(middle) + len(last)
            self.rows += range(row, row + own)
            self.rows += [row + own + i // wave.T for i in range(len(pools))]
            self.norms += middle + last + pools
            self.counts.append((len(middle), len(last), len(pools)))

    def by_source(self, places, weights, betas):
        """The weights of all cells of a kind: of the operations, of the bypass, and of the blocks.

        (E, ops) by source; (S, T) of each wave; (W, W_normed) of norms.NormSum, (T, blocks), of
        each wave. places: `constants` of this plan.
        """
        (order, places, shapes), waves = places, self.waves
        betas = betas[order]
        coefficients = weights[order] * betas[:, None]
        betas = betas.split([wave.S * wave.T for wave in waves])
        betas = [part.view(wave.S, wave.T) for part, wave in zip(betas, waves, strict=True)]
        row = F.pad(coefficients.flatten(), (0, 1))
        parts = row[places].split([T * blocks for T, blocks in shapes])
        Ws = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        unnormed = [self.kinds.unnormed(wave) for wave in waves]
        normed = [W.detach()[:, : W.shape[1] - n] for W, n in zip(Ws, unnormed, strict=True)]
        normed = [F.pad(W, (0, n)) if n else W for W, n in zip(normed, unnormed, strict=True)]
        return coefficients, betas, list(zip(Ws, normed, strict=True))

    def kernels(self):
        """Of each wave (kernels, a detached copy, that copy turned by 180 degrees) of depthwise
        convolutions, (edges, ops, c, k, k).

        Of the first convolutions of the sep_convs, of their second ones, and of the dil_convs; None
        where there are none. Smaller kernels are padded to the largest. On a CPU the copies of the
        dil_convs hold all twice, for the pairs of pixels of `depthwise`.
        """
        edges = [wave.S * wave.T for wave in self.waves]

        def by_wave(convs, n, twice=False):
            """Those of the waves, n times; convs: of each op a list of convolutions."""
            if not convs:
                return [None] * (n * len(edges))
            kernels = [torch.stack([conv.weight for conv in of_op]).squeeze(2) for of_op in convs]
            size = max(kernel.shape[-1] for kernel in kernels)
            margins = [(size - kernel.shape[-1]) // 2 for kernel in kernels]
            pairs = zip(kernels, margins, strict=True)
            kernels = torch.stack(
                [F.pad(kernel, [m] * 4) if m else kernel for kernel, m in pairs], 1
            )
            copies, sizes = kernels.detach(), edges * n
            if twice and copies.device.type == "cpu":
                copies = torch.cat([part for part in copies.split(sizes) for _ in range(2)])
                sizes = [2 * size for size in sizes]
            copies = copies.split(sizes), copies.flip(3, 4).split(sizes)
            return list(zip(kernels.split(edges * n), *copies, strict=True))

        seps, dils = by_wave(self.sep_convs, 2), by_wave(self.dil_convs, 1, twice=True)
        return list(zip(seps[: len(edges)], seps[len(edges) :], dils, strict=True))

    def pointwise(self, blocks, eye):
        """Of each wave the 1x1 convolutions that are followed by a norm, (G, c, c), as matrices.

        Those inside the sep_convs; and those at the end of each of its blocks (a number for each
        wave), which are `eye` where there is none.
        """
        weights, sizes = [], []
        for middle, last, n in zip(self.middle, self.final, blocks, strict=True):
            weights += [conv.weight for conv in middle + last]
            weights += [eye[:, :, None, None]] * (n - len(last))
            sizes += [len(middle), n]
        if not weights:
            return [(None, None)] * len(blocks)
        matrices = torch.stack(weights).flatten(2).split(sizes)
        return list(zip(matrices[::2], matrices[1::2], strict=True))

    def running(self, eye):
        """Of each wave the running means and variances of its norms; eye: (c, c).

        Those inside the sep_convs, (2, norms, c), and those of all blocks that have one, for each
        target: (2, T, blocks, c).
        """
        names = "running_mean", "running_var"
        figures = [getattr(norm, name) for name in names for norm in self.norms]
        figures = torch.stack(figures) if figures else eye[:0]
        figures = figures.view(2, len(self.norms), len(eye))
        waves = []
        for wave, part in zip(
            self.waves, figures.split([sum(n) for n in self.counts], 1), strict=True
        ):
            middle, own, pools = part.split(self.counts[len(waves)], 1)
            own = own.unsqueeze(1).expand(-1, wave.T, -1, -1)
            pools = pools.unflatten(1, (-1, wave.T)).transpose(1, 2)
            waves.append((middle, torch.cat([own, pools], 2)))
        return waves

    @torch.no_grad()
    def follow(self, moments, pixels):
        """The running figures follow those of all norms, over this many pixels in this process."""
        if not self.norms:
            return
        pixels = pixels / moments.fraction
        minus_means, variances = zip(*moments, strict=True)
        means, variances = torch.cat(minus_means + variances).squeeze(2).tensor_split(2)
        variances.mul_(pixels / (pixels - 1 if pixels > 1 else 1))
        means, variances = means.neg_().unbind(), variances.unbind()
        new = [means[row] for row in self.rows] + [variances[row] for row in self.rows]
        running = [n.running_mean for n in self.norms] + [n.running_var for n in self.norms]
        torch._foreach_lerp_(running, new, MOMENTUM)
        torch._foreach_add_([n.num_batches_tracked for n in self.norms], 1)


def _settings(cell):
    """The attributes of a cell that it reads."""
    return cell._steps, cell._multiplier, cell.reduction, cell.sampling, cell.norm


def _why(cell, blocks, parts):
    """None, or in a few words what of a cell, but for its operations, is not as it was made.

    blocks: its preprocess. parts: its edges, and the lists of modules.
    """
    if cell.sampling not in ("shuffle", "shift", "random"):
        return f"sampling={cell.sampling}"
    if any(hooks(vars(torch_module), "_global")):
        return "hooks of all modules"
    if functions_of_torch() != AT_FIRST:
        return "changed functions of torch.nn"
    for part in parts:
        if not is_untouched(part):
            return f"hooks, or a function, of one {type(part).__name__}"
    edges = list(cell._ops)
    if len(edges) != sum(2 + j for j in range(cell._steps)) or {len(e._ops) for e in edges} != {
        len(edges[0]._ops)
    }:
        return "edges or operations that are missing"
    strides = [
        2 if cell.reduction and i < 2 else 1 for j in range(cell._steps) for i in range(2 + j)
    ]
    for edge, stride in zip(edges, strides, strict=True):
        if (edge.k, edge.stride, edge.sampling) != (edges[0].k, stride, cell.sampling):
            return f"an edge with k={edge.k}, stride={edge.stride}, sampling={edge.sampling}"
    for block in blocks:
        if type(block) is ReLUConvBN:
            weight = getattr(block.op[1], "weight", None) if len(block.op) > 1 else None
            sizes = None if weight is None else (weight.shape[1], weight.shape[0])
        elif type(block) is FactorizedReduce:
            weight = getattr(block.conv_1, "weight", None)
            sizes = None if weight is None else (weight.shape[1], 2 * weight.shape[0])
        else:
            return f"the preprocess {type(block).__name__}"
        if sizes is None or not is_as_made(block, fresh(type(block), *sizes), cell):
            return f"a changed preprocess {type(block).__name__}"
    return None


def _kinds(candidates, strides, cell):
    """Which of the operations have a batched form: those that are on all edges as they were made.

    candidates: of each place in primitives the operations of all edges.
    """
    c = cell.preprocess1.op[1].weight.shape[0] // cell._ops[0].k
    places = {"seps": [], "dils": [], "pools": [], "skips": [], "zeros": [], "others": []}
    for o, ops in enumerate(candidates):
        firsts, kind = {}, None
        for op, stride in zip(ops, strides, strict=True):
            try:
                its = _kind(op, stride, c, cell, firsts)
            except (AttributeError, IndexError, TypeError):  # where something is not there
                its = "others"
            kind = its if kind in (None, its) else "others"
        places[kind].append(o)
    seps, dils, pools, skips, _, others = (tuple(found) for found in places.values())
    return Kinds(seps, dils, pools, skips if 2 in strides else (), skips, others, len(candidates))


def _kind(op, stride, c, cell, firsts):
    """The name in `places` of an operation; firsts: what must be as in the first at this place.

    {stride: the signature of a pool, "k": the size of a kernel}.
    """
    kind = type(op)
    if kind in (SepConv, DilConv):
        k = op.op[1].kernel_size[0]
        name, reference = "seps" if kind is SepConv else "dils", fresh(kind, c, k, stride)
        fits = k % 2 and k == firsts.setdefault("k", k) and is_as_made(op, reference, cell)
        return name if fits else "others"
    if kind is nn.Sequential and type(op[0]) in (nn.MaxPool2d, nn.AvgPool2d):
        first = firsts.setdefault(stride, signature(op[0]))
        known = is_as_made(op[0], first, cell) and len(op) == 2 and is_untouched(op)
        return "pools" if known and is_as_made(op[1], fresh(nn.BatchNorm2d, c), cell) else "others"
    if kind is (FactorizedReduce if stride == 2 else Identity):
        sizes = (c, c) if stride == 2 else ()
        return "skips" if is_as_made(op, fresh(kind, *sizes), cell) else "others"
    if kind is Zero:
        return "zeros" if is_as_made(op, fresh(kind, stride), cell) else "others"
    return "others"


@functools.cache
def constants(kinds, waves, device):
    """Of cells with these kinds: the edges by source, and where W of each wave has its entries.

    W (T, blocks) is the matrix of norms.NormSum: an edge's ops go to its own target, the pools
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
        blocks = [
            torch.where(own, part[:, :, list(ops)], -1).flatten(1) for ops in kinds.own(wave.stride)
        ]
        shared = list(kinds.pools + skips)
        blocks.append(part[:, :, shared].permute(1, 2, 0).flatten(1))
        matrices.append(torch.cat(blocks, 1))
    with torch.inference_mode(False):
        order = torch.tensor(edges, device=device)
        flat = torch.cat([matrix.flatten() for matrix in matrices]).to(device)
    return order, flat, [matrix.shape for matrix in matrices]
