"""The cell of the supernet, several times faster: by source node, not by edge.

model_search.Cell makes 14 slices, 14 x 8 operations and 14 shuffles. But all edges that leave node
i read the same slice, so here the work is done once per source node, for its T targets together;
and both input nodes go at once, as a wave of S = 2 sources. With the weights
softmax(alpha) * softmax(beta):

- ReLU, the pools and their norms do not depend on the target: once, not T times.
- The depthwise convolutions of all targets and ops are one, on more channels.
- The 1x1 convolution and the batch norm at the end of each op, and its weight in the sum, are one
  1x1 convolution, of all ops side by side: its kernel needs the mean and the covariance of what
  comes before, no more. The equations stand in fused/functions.py.
- Sum, concatenation and shuffle are linear: a node is put together once, after the sum.
- A cell's output is ReLU'd once, not by both cells that read it.

First derivatives only: docs/differences.md, 12.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused.functions import (
    EPS,
    MOMENTUM,
    Depthwise,
    HalvedMax,
    Moments,
    NormReLUDepthwise,
    NormSum,
    factorized_kernel,
    halve,
    layout,
)
from fused.storage import Stored, hooked
from operations import ReLUConvBN


def remembered(tensor, key, make):
    """make(), kept on the tensor that it is made of, for the cells that need the same again.

    Not on a leaf that learns, which outlives a graph, and not beyond a change of the tensor.
    """
    if tensor.is_inference() or (tensor.is_leaf and tensor.requires_grad):
        return make()
    key = *key, tensor._version, torch.is_grad_enabled()
    kept = getattr(tensor, "_fused", None)
    if kept is None or any(mine is not its for mine, its in zip(key, kept[0], strict=True)):
        kept = tensor._fused = key, make()
    return kept[1]


def preprocess(block, x):
    """block(x), a ReLUConvBN or FactorizedReduce, with a ReLU that is made once for all readers."""
    relu = remembered(x, (), x.relu)
    if isinstance(block, ReLUConvBN):
        return block.op[1:](relu)
    return block.bn(halve(relu, factorized_kernel(block.conv_1.weight, block.conv_2.weight)))


def side_by_side(tensors):
    """The tensors (N, ..., H, W) in as few tensors as may be, along channels, in this order.

    None of 32 MiB or more: glibc gives these back to the system at once, and a new one costs a page
    fault for every 4 KiB, more than what is computed with it.
    """
    groups, size = [], 0
    for tensor in tensors:
        size += tensor.nbytes
        if not groups or size >= 2**25:
            groups.append([])
            size = tensor.nbytes
        groups[-1].append(tensor)
    return [torch.cat(group, 1) if len(group) > 1 else group[0] for group in groups]


def changed_since(cell):
    """In a few words what has been done to the modules of a cell since it was built, or None.

    Told by its preprocess: a loop over all modules meets it, and nothing of the edges.
    """
    for module in (*cell.preprocess0.modules(), *cell.preprocess1.modules()):
        if hooked(module):
            return f"hooks of {type(module).__name__}"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training != cell.training:
                return "batch norms in another mode than their cell"
            if (module.momentum, module.eps) != (MOMENTUM, EPS) or module.running_mean is None:
                return "other momentum, eps or statistics of batch norms"
            if isinstance(module, nn.SyncBatchNorm) and cell.total is None:
                return "SyncBatchNorm"
    return None


class Cell(Stored):
    """One cell: `steps` nodes, each fed by all before it; the last `multiplier` make the output."""

    total = None  # a function, where batch statistics are those of all processes: see Moments

    def _fraction(self, x):
        """Of all images those of this process, where statistics are taken over all processes."""
        if self.total is None:
            return 1
        images = torch.full((), len(x), dtype=torch.float64, device=x.device)
        return images / self.total([images])[0]

    def _by_source(self, weights, betas):
        """The weights of all cells of a kind: of the operations, of the bypass, and `mixtures`.

        (E, ops) by source; (S, T) of each wave.
        """
        betas = betas[self.by_source]
        coefficients = weights[self.by_source] * betas[:, None]
        parts = zip(betas.split([S * T for S, T in self.waves]), self.waves, strict=True)
        return coefficients, [part.view(wave) for part, wave in parts], self.mixtures(coefficients)

    def mixtures(self, coefficients):
        """(W, W_normed) of functions.NormSum, (T, blocks), of each wave; coefficients (E, ops)."""
        row = F.pad(coefficients.flatten(), (0, 1))
        parts = row[self.places].split([T * blocks for T, blocks in self.shapes])
        Ws = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        plain = [self._plain(w) for w in range(len(Ws))]
        normed = [W.detach()[:, : W.shape[1] - n] for W, n in zip(Ws, plain, strict=True)]
        normed = [F.pad(W, (0, n)) if n else W for W, n in zip(normed, plain, strict=True)]
        return list(zip(Ws, normed, strict=True))

    def forward(self, s0, s1, weights, betas):
        """(N, multiplier * C, H, W) of s0 and s1, the outputs of the two cells before.

        weights (E, ops): softmax(alpha). betas (E,): softmax(beta) over the edges of a node.
        Raises RuntimeError where modules have been changed in a way that it does not follow.
        """
        change = changed_since(self)
        if change:
            raise RuntimeError(
                f"{change} would not reach the edges of the fast form: build with fused=False"
            )
        if self.training:
            self.num_batches_tracked += 1
        coefficients, betas, mixtures = remembered(
            weights, (self.reduction, betas), lambda: self._by_source(weights, betas)
        )
        states = [preprocess(self.preprocess0, s0), preprocess(self.preprocess1, s1)]
        kernels = self._weights()
        moments = Moments(self._fraction(s1), self.total) if self.training else None
        mixed = bypass = None  # of the targets to come: the sums over the sources so far
        start, sources = 0, states
        last = layout(s1) == torch.channels_last
        for w, (S, T) in enumerate(self.waves):
            edges, start = slice(start, start + S * T), start + S * T
            if self.sampling == "random":
                sources = [source.index_select(1, self.channel_order) for source in sources]
            parts = [source.split([self.c, source.shape[1] - self.c], 1) for source in sources]
            x = torch.cat([first for first, _ in parts], 1)  # (N, S * c, H, W)
            kind = "cpu" if x.is_meta else x.device.type
            with torch.autocast(kind, enabled=False):  # _mix computes in the type of x, or float32
                mixed = self._mix(mixed, x, w, kernels[w], mixtures[w], moments)
            for o in self.others:
                ops = [self._ops[e]._ops[str(o)] for e in self.order[edges]]
                inputs = [part for part in x.chunk(S, 1) for _ in range(T)]
                outs = zip(coefficients[edges, o], ops, inputs, strict=True)
                outs = [weight * op(x) for weight, op, x in outs]
                outs = sum(torch.cat(outs[s * T : s * T + T], 1) for s in range(S))
                mixed = outs if mixed is None else mixed + outs
            if self.k > 1:
                for (_, rest), row in zip(parts, betas[w], strict=True):
                    bypass = self._pass_by(bypass, rest, row, self._stride(w), last)
            node, passed = mixed, bypass  # the first of the targets has all its edges now
            if T > 1:
                node, mixed = mixed.split([self.c, (T - 1) * self.c], 1)
                passed, bypass = bypass.split([1, T - 1]) if self.k > 1 else (None, None)
            states.append(self._node(node, passed, last))
            sources = states[-1:]
        if moments:
            self._follow(moments, node.numel() // self.c / moments.fraction)
        return torch.cat(states[-self.multiplier :], dim=1)

    def _weights(self):
        """Of each wave: depthwise kernels and P of the first sep_convs, of the second, of the dils.

        Depthwise (edges, ops, c, k, k), smaller kernels padded to the largest; P (blocks, c, c).
        """
        edges = [S * T for S, T in self.waves]
        weights = [[] for _ in edges]
        kernels = iter(self.depthwise)
        for group, P in zip(self.convs, self.pointwise, strict=True):
            depthwise = [next(kernels).squeeze(2) for _ in group]
            size = max(kernel.shape[-1] for kernel in depthwise)
            margins = [(size - kernel.shape[-1]) // 2 for kernel in depthwise]
            pairs = zip(depthwise, margins, strict=True)
            depthwise = [F.pad(kernel, [m] * 4) if m else kernel for kernel, m in pairs]
            depthwise = torch.stack(depthwise, 1)
            turned = depthwise.detach().flip(3, 4).split(edges)
            depthwise, P = depthwise.split(edges), P.flatten(3).split(edges)
            for w in range(len(edges)):
                weights[w].append((depthwise[w], turned[w], P[w].flatten(0, 1)))
        return weights

    @torch.no_grad()
    def _follow(self, moments, pixels):
        """The running figures follow the (-mean, variance) of all norms over this many pixels."""
        minus_means, variances = zip(*moments, strict=True)
        figures = torch.cat(minus_means + variances).view(self.running.shape)
        unbiased = pixels / (pixels - 1 if pixels > 1 else 1)
        self.running[1].lerp_(figures[1].mul_(unbiased), MOMENTUM)
        self.running[0].mul_(1 - MOMENTUM).sub_(figures[0], alpha=MOMENTUM)

    def _mix(self, mixed, x, w, weights, mixture, moments):
        """`mixed` (N, T * c, H, W) + the weighted operations of a wave on x (N, S * c, H, W)."""
        W, W_normed = mixture
        if not W.shape[1]:  # a space of `none` and of operations that run one by one
            n, _, h, width = x[:, :, :: self._stride(w), :: self._stride(w)].shape
            return x.new_zeros(n, len(W) * self.c, h, width) if mixed is None else mixed
        (S, T), stride, weights = self.waves[w], self._stride(w), list(weights)
        firsts, seconds = [weights.pop(0), weights.pop(0)] if self.seps else [None, None]
        dils = weights.pop() if self.dils else None

        def running(rows):
            return *self.running[:, rows], moments

        hs = self._first_convolutions(x, S, T, stride, firsts, dils)
        Ps = []  # the 1x1 convolutions behind them
        again = {} if self.recompute else None
        if firsts:
            kernel, turned, P = seconds
            rows, first = running(self.middle_rows[w]), hs[0]
            hs[0] = NormReLUDepthwise.apply(*rows, again, turned, first, firsts[2], kernel)
            Ps.append(P)
        if dils:
            Ps.append(dils[2])
        skips = len(self.skips) if stride == 1 else 0  # which are x itself

        def pools(x):
            return [pool(x) for pool in self.pool_ops[w]]

        def remake(x, *kept):
            """What NormSum reads anew, for its backward pass."""
            kept = list(kept)
            if firsts:
                kept[0] = NormReLUDepthwise.remake(kept[0], kernel, again)
            return side_by_side([*kept, *pools(x), *[x] * skips])

        if self.recompute:
            kept = [h.detach() for h in ([x, first, *hs[1:]] if firsts else [x, *hs])]
            pooled = checkpoint(pools, x, use_reentrant=False, preserve_rng_state=False)
        else:
            kept, pooled = None, pools(x)
        without = W.shape[1] - sum(map(len, Ps))  # blocks whose norm is behind no convolution
        P = torch.cat([*Ps, self.eye.expand(without, -1, -1)])
        return NormSum.apply(
            *running(self.last_rows[w]), self._plain(w), mixed, W_normed,
            remake if self.recompute else None, kept, W, P,
            *side_by_side([*hs, *pooled, *[x] * skips]),
        )  # fmt: skip

    def _first_convolutions(self, x, S, T, stride, firsts, dils):
        """The outputs of the operations' first convolutions: sep_convs, dil_convs, halves."""

        def depthwise(x, *groups, dilations):
            kernels = [kernel.unflatten(0, (S, T)).flatten(1, 2) for kernel, _, _ in groups]
            return Depthwise.apply(x, dilations, [turned for _, turned, _ in groups], *kernels)

        if stride == 1:
            groups = [group for group in (firsts, dils) if group]
            dilations = [1 if group is firsts else 2 for group in groups]
            return [*depthwise(x, *groups, dilations=dilations)] if groups else []
        hs, relu = [], x.relu()
        if firsts:  # with kernels (edges * ops * c, c, k, k), zero between different channels
            kernel = (firsts[0].unsqueeze(3) * self.eye[:, :, None, None]).flatten(0, 2)
            hs.append(F.conv2d(relu, kernel.to(x.dtype), None, 2, kernel.shape[3] // 2, groups=S))
        if dils:  # with stride and dilation 2 it reads every other pixel alone
            hs += depthwise(x[:, :, ::2, ::2], dils, dilations=[1])
        for parts in zip(self.half_1, self.half_2, strict=True):
            kernel = factorized_kernel(*parts).flatten(0, 1).to(x.dtype)
            hs.append(halve(relu, kernel, groups=S))
        return hs

    def _pass_by(self, bypass, rest, betas, stride, last):
        """`bypass` + betas (T,) times rest (N, C - c, H, W), flat: (T, N * H * W * (C - c)).

        In the order of channels_last or of contiguous, as all of the cell.
        """
        if stride == 2:
            rest = HalvedMax.apply(rest)
        rest = rest.permute(0, 2, 3, 1) if last else rest
        rest, betas = rest.flatten(), betas.to(rest.dtype)
        return torch.outer(betas, rest) if bypass is None else bypass.addr(betas, rest)

    def _node(self, mixed, bypass, last=True):
        """A node (N, C, H, W) of mixed (N, c, H, W) and a row of `_pass_by`, sampled anew."""
        if self.k == 1:
            return mixed
        n, c, h, w = mixed.shape
        if last:
            mixed, bypass, dim = mixed.permute(0, 2, 3, 1), bypass.view(n, h, w, -1), 3
        else:
            bypass, dim = bypass.view(n, -1, h, w), 1
        if self.sampling == "shuffle":
            # Channel i of group g goes to place i * K + g: channel_shuffle in one write.
            node = torch.stack([mixed, *bypass.split(c, dim)], dim + 1).flatten(dim, dim + 1)
        elif self.sampling == "shift":  # the next operations take the first that passed here
            node = torch.cat([bypass, mixed], dim)
        else:  # every channel back in its place
            node = torch.cat([mixed, bypass], dim).index_select(dim, self.channel_places)
        return node.permute(0, 3, 1, 2) if last else node

    def apply(self, fn):
        """Refused with a RuntimeError: fn would not meet the modules of the edges."""
        raise RuntimeError("apply() does not reach the edges of the fast form: give fused=False")
