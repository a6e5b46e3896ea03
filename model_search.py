"""The supernet of PC-DARTS (Xu et al., ICLR 2020): mixed edges on 1/K of the channels, genotype().

Node j of a cell is the sum over its edges i of softmax(beta)_ij * f_ij(x_i) (eq. 3), where f_ij is

    shuffle(concat(sum_o softmax(alpha)_ij,o * o(x_i[:, :C/K]), x_i[:, C/K:]))              (eq. 2)

Written so, a cell makes 14 slices, 14 x 8 operations and 14 shuffles. But all edges that leave
node i read the same slice, so here the work is done once per source node, for its T targets
together; and both input nodes go at once, as a wave of S = 2 sources. With the weights
softmax(alpha) * softmax(beta):

- ReLU, the pools and their norms do not depend on the target: once, not T times.
- The depthwise convolutions of all targets and ops are one, on more channels.
- The 1x1 convolution and the batch norm at the end of each op, and its weight in the sum, are one
  1x1 convolution, of all ops side by side: its kernel needs the mean and the covariance of what
  comes before, no more. The equations stand in operations.py.
- Sum, concatenation and shuffle are linear: a node is put together once, after the sum.

The figures equal those of the formula; tests/textbook.py is the formula, edge by edge.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import distributed
import measure
import utils
from genotypes import PRIMITIVES, Genotype
from operations import (
    MOMENTUM,
    OPS,
    Depthwise,
    DilConv,
    FactorizedReduce,
    HalvedMax,
    Identity,
    Moments,
    NormReLUDepthwise,
    NormSum,
    ReLUConvBN,
    SepConv,
    Zero,
    factorized_kernel,
    halve,
    without_module_prefix,
)


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


def edges_by_source(steps):
    """The edges in the order by source, as numbers by target.

    The edge from node i to target j has number 2 + 3 + ... + (j + 1) + i: 14 edges in 4 steps.
    """
    sources = range(steps + 1)
    return [j * (j + 3) // 2 + i for i in sources for j in range(max(0, i - 1), steps)]


def waves(steps):
    """(number of sources, of targets of each) in the order in which a cell works on its nodes.

    Both input nodes have all nodes as targets, so they go together.
    """
    return [(2, steps)] + [(1, steps - j) for j in range(1, steps)]


class Stacked(nn.ParameterList):
    """Weights of all edges of a cell, which reads and writes them under the released names."""

    def _save_to_state_dict(self, *args):
        pass

    def _load_from_state_dict(self, *args):
        pass


def has_affine_norm(op):
    return any(getattr(module, "affine", False) for module in op.modules())


class Edge(nn.Module):
    """The operations of one edge that have no batched form (users' own), applied one by one."""

    def __init__(self):
        super().__init__()
        self._ops = nn.ModuleDict()  # keyed by the op's place in primitives


class Cell(nn.Module):
    """One cell: `steps` nodes, each fed by all before it; the last `multiplier` make the output.

    alphas, betas and state dicts number the edges by target; in here they stand by source.
    """

    def __init__(
        self,
        steps,
        multiplier,
        C_prev_prev,
        C_prev,
        C,
        reduction,
        reduction_prev,
        k,
        recompute=False,
        sampling="shuffle",
        primitives=None,
    ):
        super().__init__()
        self.reduction, self.multiplier, self.k, self.c = reduction, multiplier, k, C // k
        self.recompute, self.sampling = recompute, sampling
        self.primitives = primitives or PRIMITIVES
        if sampling == "random":  # source[:, channel_order] has the channels of the ops first
            self.register_buffer("channel_order", torch.arange(C), persistent=False)
            self.register_buffer("channel_places", torch.arange(C), persistent=False)
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self.order = edges_by_source(steps)
        self.waves = waves(steps)
        self.strided = 2 * steps if reduction else 0  # edges with stride 2: the first
        edges = [  # by target, as published, each op with its own initial weights
            [OPS[name](self.c, 2 if reduction and i < 2 else 1, False) for name in self.primitives]
            for j in range(steps)
            for i in range(2 + j)
        ]
        edges = [edges[e] for e in self.order]
        self._sort_operations(edges[0], edges[-1])
        self._stack_weights(edges)

    def _sort_operations(self, first, last):
        """The places in primitives of each kind of op, read off the first and the last edge."""

        def kind(*types):
            """Places whose op is of these types on both edges, with norms that learn nothing."""
            return [
                o
                for o, pair in enumerate(zip(first, last, strict=True))
                if tuple(map(type, pair)) in types and not any(map(has_affine_norm, pair))
            ]

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

        self.seps = [o for o in kind((SepConv, SepConv)) if keeps_size(last[o], 1)]
        self.dils = [o for o in kind((DilConv, DilConv)) if keeps_size(last[o], 2)]
        pools = kind((nn.MaxPool2d, nn.MaxPool2d), (nn.AvgPool2d, nn.AvgPool2d))
        self.pools = [o for o in pools if "pool" in self.primitives[o]]
        self.halves = kind((FactorizedReduce, Identity))
        self.skips = self.halves if self.strided else kind((Identity, Identity))
        batched = self.seps + self.dils + self.pools + self.skips + kind((Zero, Zero))
        self.others = [o for o in range(len(self.primitives)) if o not in batched]
        # Pools have no weights: one for all targets of a source.
        self.pool_ops = nn.ModuleList(
            nn.ModuleList((last if w else first)[o] for o in self.pools)
            for w in range(len(self.waves))
        )

    def _stack_weights(self, edges):
        """The parameters and the running statistics of all edges, by source."""
        c = self.c

        def stack(modules):
            return nn.Parameter(torch.stack([module.weight.detach() for module in modules]))

        # (op, place in the op) of the separable convolutions: the first ones of the sep_convs,
        # their second ones, the dil_convs.
        self.depthwise, self.pointwise = Stacked(), Stacked()
        firsts, seconds = [(o, 1) for o in self.seps], [(o, 5) for o in self.seps]
        groups = [firsts, seconds, [(o, 1) for o in self.dils]]
        self.convs = [group for group in groups if group]
        for group in self.convs:
            for o, at in group:
                self.depthwise.append(stack(edge[o].op[at] for edge in edges))  # (E, c, 1, k, k)
            parts = [torch.stack([edge[o].op[at + 1].weight for edge in edges]) for o, at in group]
            parts = torch.stack(parts, 1).detach()  # (E, ops, c, c, 1, 1)
            self.pointwise.append(nn.Parameter(parts))
        self.half_1, self.half_2 = Stacked(), Stacked()  # (strided edges, c / 2, c, 1, 1)
        for o in self.halves:
            self.half_1.append(stack(edge[o].conv_1 for edge in edges[: self.strided]))
            self.half_2.append(stack(edge[o].conv_2 for edge in edges[: self.strided]))
        # The rows of the running figures: for each wave the norms inside the sep_convs, then the
        # last ones of the sep_convs, dil_convs and halves, then those of the pools.
        self.middle_rows, self.last_rows = [], []
        row = 0
        for w, (S, T) in enumerate(self.waves):
            middle, halves = S * T * len(self.seps), len(self.halves) * (self._stride(w) == 2)
            last = S * T * (len(self.seps + self.dils) + halves) + S * len(self.pools)
            self.middle_rows.append(slice(row, row + middle))
            self.last_rows.append(slice(row + middle, row := row + middle + last))
        self.register_buffer("running", torch.stack([torch.zeros(row, c), torch.ones(row, c)]))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.register_buffer("eye", torch.eye(c))
        self.register_buffer("by_source", torch.tensor(self.order))
        places = self._mixture_places()
        self.shapes = [part.shape for part in places]
        self.register_buffer("places", torch.cat([part.flatten() for part in places]))
        self._ops = nn.ModuleList(Edge() for _ in edges if self.others)
        for e, edge in zip(self.order, edges, strict=True):
            for o in self.others:
                op = edge[o]
                if "pool" in self.primitives[o]:
                    op = nn.Sequential(op, nn.BatchNorm2d(c, affine=False))
                self._ops[e]._ops[str(o)] = op

    def _stride(self, wave):
        return 2 if self.reduction and wave == 0 else 1

    def _plain(self, wave):
        """The number of blocks without a norm, the last: the skip_connects where they are x."""
        return self.waves[wave][0] * len(self.skips) if self._stride(wave) == 1 else 0

    def _mixture_places(self):
        """Of each wave where in a row of all coefficients (E, ops) W has its entries: (T, blocks).

        W is the matrix of operations.NormSum: an edge's ops go to its own target, the pools and the
        skip_connect of a source to all. -1 stands for zero. `skips`, the last, are not normalized.
        """
        n = len(self.primitives)
        places = torch.arange(len(self.order) * n).view(-1, n)
        matrices = []
        for w, part in enumerate(places.split([S * T for S, T in self.waves])):
            S, T = self.waves[w]
            part = part.view(S, T, -1)
            halves, skips = (self.skips, []) if self._stride(w) == 2 else ([], self.skips)
            own = torch.eye(T, dtype=torch.bool)[:, None, :, None]
            blocks = []
            for ops in (self.seps, self.dils, *([o] for o in halves)):
                blocks.append(torch.where(own, part[:, :, ops], -1).flatten(1))
            blocks.append(part[:, :, self.pools + skips].permute(1, 2, 0).flatten(1))
            matrices.append(torch.cat(blocks, 1))
        return matrices

    def mixtures(self, coefficients):
        """(W, W_normed) of operations.NormSum, (T, blocks), of each wave; coefficients (E, ops)."""
        row = F.pad(coefficients.flatten(), (0, 1))
        parts = row[self.places].split([T * blocks for T, blocks in self.shapes])
        Ws = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        plain = [self._plain(w) for w in range(len(Ws))]
        normed = [W.detach()[:, : W.shape[1] - n] for W, n in zip(Ws, plain, strict=True)]
        normed = [F.pad(W, (0, n)) if n else W for W, n in zip(normed, plain, strict=True)]
        return list(zip(Ws, normed, strict=True))

    def forward(self, s0, s1, coefficients, betas, mixtures, share=None):
        """The output (N, multiplier * C, H, W), from those of the two cells before, ReLU'd.

        coefficients: softmax(alpha) * softmax(beta), (E, ops), by source. betas: softmax(beta),
        (S, T) of each wave. mixtures: as `mixtures` gives them. share: as for Moments.
        """
        if self.training:
            self.num_batches_tracked += 1
        states = [self.preprocess0.after_relu(s0), self.preprocess1.after_relu(s1)]
        weights = self._weights()
        moments = Moments(share) if self.training else None
        mixed = bypass = None  # of the targets to come: the sums over the sources so far
        start, sources = 0, states
        for w, (S, T) in enumerate(self.waves):
            edges, start = slice(start, start + S * T), start + S * T
            if self.sampling == "random":
                sources = [source.index_select(1, self.channel_order) for source in sources]
            parts = [source.split([self.c, source.shape[1] - self.c], 1) for source in sources]
            x = torch.cat([first for first, _ in parts], 1)  # (N, S * c, H, W)
            kind = "cpu" if x.is_meta else x.device.type
            with torch.autocast(kind, enabled=False):  # _mix computes in the type of x, or float32
                mixed = self._mix(mixed, x, w, weights[w], mixtures[w], moments)
            for o in self.others:
                ops = [self._ops[e]._ops[str(o)] for e in self.order[edges]]
                inputs = [part for part in x.chunk(S, 1) for _ in range(T)]
                outs = zip(coefficients[edges, o], ops, inputs, strict=True)
                outs = [weight * op(x) for weight, op, x in outs]
                outs = sum(torch.cat(outs[s * T : s * T + T], 1) for s in range(S))
                mixed = outs if mixed is None else mixed + outs
            if self.k > 1:
                for (_, rest), row in zip(parts, betas[w], strict=True):
                    bypass = self._pass_by(bypass, rest, row, self._stride(w))
            node, passed = mixed, bypass  # the first of the targets has all its edges now
            if T > 1:
                node, mixed = mixed.split([self.c, (T - 1) * self.c], 1)
                passed, bypass = bypass.split([1, T - 1]) if self.k > 1 else (None, None)
            states.append(self._node(node, passed))
            sources = states[-1:]
        if moments:
            pixels = node.numel() // self.c
            everywhere = 1 if share is None else distributed.world_size() / share
            self._follow(moments, pixels * everywhere)
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

    def _pass_by(self, bypass, rest, betas, stride):
        """`bypass` + betas (T,) times rest (N, C - c, H, W), flat: (T, N * H * W * (C - c))."""
        if stride == 2:
            rest = HalvedMax.apply(rest)
        rest, betas = rest.permute(0, 2, 3, 1).flatten(), betas.to(rest.dtype)
        return torch.outer(betas, rest) if bypass is None else bypass.addr(betas, rest)

    def _node(self, mixed, bypass):
        """A node (N, C, H, W) of mixed (N, c, H, W) and a row of `_pass_by`, sampled anew."""
        if self.k == 1:
            return mixed
        n, c, h, w = mixed.shape
        mixed, bypass = mixed.permute(0, 2, 3, 1), bypass.view(n, h, w, -1)
        if self.sampling == "shuffle":
            # Channel i of group g goes to place i * K + g: channel_shuffle in one write.
            node = torch.stack([mixed, *bypass.split(c, 3)], -1).flatten(3)
        elif self.sampling == "shift":  # the next operations take the first that passed here
            node = torch.cat([bypass, mixed], 3)
        else:  # every channel back in its place
            node = torch.cat([mixed, bypass], 3).index_select(3, self.channel_places)
        return node.permute(0, 3, 1, 2)

    def resample(self):
        """Draws the C / k channels that go through the operations."""
        order = torch.randperm(len(self.channel_order))
        parts = order.split([self.c, len(order) - self.c])
        order = torch.cat([part.sort().values for part in parts])
        self.channel_order.copy_(order)
        self.channel_places.copy_(order.argsort())

    def _released(self):
        """(name in a released state dict, tensor or view here) of all that is stored by source."""
        if self.sampling == "random":
            yield "channel_order", self.channel_order
            yield "channel_places", self.channel_places
        n, m = len(self.seps), len(self.dils)
        place = 0
        for w, (S, T) in enumerate(self.waves):
            halves = len(self.halves) if self._stride(w) == 2 else 0
            for local in range(S * T):
                e, last = self.order[place], self.last_rows[w].start
                depthwise = iter(self.depthwise)
                for group, pointwise in zip(self.convs, self.pointwise, strict=True):
                    for i, (o, at) in enumerate(group):
                        yield f"_ops.{e}._ops.{o}.op.{at}.weight", next(depthwise)[place]
                        yield f"_ops.{e}._ops.{o}.op.{at + 1}.weight", pointwise[place, i]
                norms = []  # (op, place in the op, row of the running figures)
                for i, o in enumerate(self.seps):
                    norms.append((o, "op.3", self.middle_rows[w].start + local * n + i))
                    norms.append((o, "op.7", last + local * n + i))
                last += S * T * n
                for i, o in enumerate(self.dils):
                    norms.append((o, "op.3", last + local * m + i))
                last += S * T * m
                for i, o in enumerate(self.halves if halves else []):
                    yield f"_ops.{e}._ops.{o}.conv_1.weight", self.half_1[i][place]
                    yield f"_ops.{e}._ops.{o}.conv_2.weight", self.half_2[i][place]
                    norms.append((o, "bn", last + local + i * S * T))
                last += S * T * halves
                for i, o in enumerate(self.pools):  # the same on all edges that leave a node
                    norms.append((o, "1", last + i * S + local // T))
                for o, at, row in norms:
                    name = f"_ops.{e}._ops.{o}.{at}"
                    yield f"{name}.running_mean", self.running[0, row]
                    yield f"{name}.running_var", self.running[1, row]
                    yield f"{name}.num_batches_tracked", self.num_batches_tracked
                place += 1

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, tensor in self._released():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        for name, tensor in self._released():
            value = state.pop(prefix + name, None)  # or a child would call it unexpected
            if value is None:
                if not name.startswith("channel_"):  # which no released state dict has
                    missing.append(prefix + name)
            elif value.shape != tensor.shape:
                shapes = f"{tuple(value.shape)} in the file, {tuple(tensor.shape)} in the model"
                errors.append(f"size mismatch for {prefix + name}: {shapes}")
            else:
                with torch.no_grad():
                    tensor.copy_(value)
        known = tuple(f"{prefix}{name}." for name in ("preprocess0", "preprocess1", "_ops"))
        if strict:
            own = (name for name in state if name.startswith(prefix))
            unexpected.extend(name for name in own if not name.startswith(known))


KINDS = ("normal", "reduce")
SAMPLINGS = ("shuffle", "shift", "random")


class Network(nn.Module):
    """The supernet: stem, `layers` cells of which two reduce, classifier; alphas and betas.

    k: 1/k of the channels go through the operations; k=1, edge_norm=False is DARTS. stem: "cifar",
    or "imagenet" (stride 8). recompute: keep less for the backward pass, and make it again there.
    sampling: which channels the operations of the next node take: "shuffle" as published; "shift",
    a rotation by C / k instead of the shuffle; or "random", drawn by `resample`, the others back in
    their places. primitives: the names of the operations; None: genotypes.PRIMITIVES.
    alphas and betas are buffers that require a gradient: they are in the state dict and move with
    the network, but `parameters()` are the weights alone.
    Raises ValueError where C / k is no even number, for fewer than 3 layers, and where an
    argument is unknown.
    """

    def __init__(
        self,
        C,
        num_classes,
        layers,
        criterion,
        steps=4,
        multiplier=4,
        stem_multiplier=3,
        k=4,
        edge_norm=True,
        stem="cifar",
        recompute=False,
        sampling="shuffle",
        primitives=None,
    ):
        super().__init__()
        if k < 1 or C < 1 or C % k or (C // k) % 2:
            raise ValueError(f"C / k must be a whole, even number of channels, not {C} / {k}")
        if layers < 3:
            raise ValueError(f"layers={layers}: two of them reduce, so it takes 3 or more")
        if not 1 <= multiplier <= steps:
            raise ValueError(f"multiplier={multiplier}: a cell outputs 1 to steps={steps} nodes")
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem={stem!r}: give 'cifar' or 'imagenet'")
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling={sampling!r}: give one of {', '.join(SAMPLINGS)}")
        unknown = [name for name in primitives or () if name not in OPS]
        if unknown:
            raise ValueError(f"unknown operation {unknown[0]!r}: give some of {', '.join(OPS)}")
        self.primitives = list(primitives or PRIMITIVES)
        self._arguments = dict(
            C=C, num_classes=num_classes, layers=layers, criterion=criterion,
            steps=steps, multiplier=multiplier, stem_multiplier=stem_multiplier,
            k=k, edge_norm=edge_norm, stem=stem, recompute=recompute, sampling=sampling,
            primitives=self.primitives,
        )  # fmt: skip
        self._criterion, self._steps, self._multiplier = criterion, steps, multiplier
        self.edge_norm = edge_norm
        self.sync_bn = False  # distributed.synchronized sets it

        C_stem = stem_multiplier * C
        if stem == "cifar":
            self.stem = nn.Sequential(
                nn.Conv2d(3, C_stem, 3, padding=1, bias=False), nn.BatchNorm2d(C_stem)
            )
        else:
            self.stem0 = nn.Sequential(
                nn.Conv2d(3, C_stem // 2, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(C_stem // 2),
                nn.ReLU(),
                nn.Conv2d(C_stem // 2, C_stem, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(C_stem),
            )
            self.stem1 = nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(C_stem, C_stem, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(C_stem),
            )

        self.cells = nn.ModuleList()
        C_prev_prev, C_prev, C_curr = C_stem, C_stem, C
        reduction_prev = stem == "imagenet"
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C_curr *= 2 if reduction else 1
            cell = Cell(
                steps,
                multiplier,
                C_prev_prev,
                C_prev,
                C_curr,
                reduction,
                reduction_prev,
                k,
                recompute,
                sampling,
                self.primitives,
            )
            self.cells.append(cell)
            reduction_prev = reduction
            C_prev_prev, C_prev = C_prev, multiplier * C_curr
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, num_classes)

        edges = len(self.cells[0].order)
        self._arch_names = ["alphas_normal", "alphas_reduce"]
        self._arch_names += ["betas_normal", "betas_reduce"] if edge_norm else []
        for name in self._arch_names:  # 1e-3 * N(0, 1)
            shape = (edges, len(self.primitives)) if "alphas" in name else (edges,)
            self.register_buffer(name, (1e-3 * torch.randn(shape)).requires_grad_())

    def forward(self, x):
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        x = x.contiguous(memory_format=torch.channels_last)
        if self._arguments["stem"] == "cifar":
            s0 = s1 = self.stem(x).relu()
        else:
            s0 = self.stem0(x).relu()
            s1 = self.stem1(s0).relu()
        normal, reduce = self._coefficients("normal"), self._coefficients("reduce")
        share = distributed.share(len(x), x.device) if self.sync_bn and self.training else None
        for cell in self.cells:
            out = cell(s0, s1, *(reduce if cell.reduction else normal), share)
            s0, s1 = s1, out.relu()  # once for both cells that read it
        return self.classifier(self.global_pooling(out).flatten(1))

    def edge_weights(self, kind):
        """softmax(beta) over the edges of each node of the "normal" or "reduce" cell (eq. 3).

        (E,), by target; ones without edge normalization.
        """
        if not self.edge_norm:
            return torch.ones_like(getattr(self, f"alphas_{kind}")[:, 0])
        sizes = [2 + j for j in range(self._steps)]
        betas = getattr(self, f"betas_{kind}").split(sizes)
        return torch.cat([part.softmax(0) for part in betas])

    @torch.no_grad()
    def softmaxes(self):
        """{"alphas_normal": softmax(alpha) (E, ops), ..., "betas_normal": softmax(beta) (E,), ...}.

        By target, as the alphas; on the CPU. Without edge normalization there are no betas.
        """
        alphas = {f"alphas_{k}": getattr(self, f"alphas_{k}").softmax(-1) for k in KINDS}
        betas = {f"betas_{k}": self.edge_weights(k) for k in KINDS if self.edge_norm}
        return {name: p.cpu() for name, p in (alphas | betas).items()}

    def entropies(self):
        """Of softmax(alpha), mean over edges, and of softmax(beta), mean over nodes, in nats."""
        means = {}
        for name, p in self.softmaxes().items():
            which, kind = name.split("_")
            n = len(p) if which == "alphas" else self._steps
            means[f"{which[:-1]}_entropy_{kind}"] = float(torch.special.entr(p).sum() / n)
        return means

    def _coefficients(self, kind):
        """The last arguments of Cell.forward, for the "normal" or the "reduce" cells."""
        cell = next(cell for cell in self.cells if cell.reduction == (kind == "reduce"))
        betas = self.edge_weights(kind)[cell.by_source]
        alphas = getattr(self, f"alphas_{kind}")[cell.by_source].softmax(-1)
        coefficients = alphas * betas[:, None]
        edges = [S * T for S, T in cell.waves]
        betas = [part.view(wave) for part, wave in zip(betas.split(edges), cell.waves, strict=True)]
        return coefficients, betas, cell.mixtures(coefficients)

    def _loss(self, input, target):
        return self._criterion(self(input), target)

    def arch_parameters(self):
        """[alphas_normal, alphas_reduce, betas_normal, betas_reduce]: (E, ops) and (E,).

        No betas without edge normalization.
        """
        return [getattr(self, name) for name in self._arch_names]

    def weights(self):
        """Everything that learns, except alphas and betas."""
        return list(self.parameters())

    def new(self):
        """A network like this one with the same alphas and betas and fresh weights."""
        device = self.classifier.weight.device
        network = Network(**self._arguments).to(device, self.classifier.weight.dtype)
        for mine, its in zip(self.arch_parameters(), network.arch_parameters(), strict=True):
            its.data.copy_(mine.data)
        return network

    @torch.no_grad()
    def genotype(self, max_skip=None):
        """The cells: of each node the two best edges, on each the best op other than none.

        DARTS, section 2.4. An op's score is softmax(alpha) * softmax(beta); of equals the first.
        max_skip: at most so many skip_connects in the normal cell: as long as there are more, the
        one with the smallest softmax(alpha) is taken out and the cell derived again (P-DARTS,
        section 3.3).
        """
        cells = []
        for kind in KINDS:
            alphas = getattr(self, f"alphas_{kind}").softmax(-1).cpu()  # (E, ops)
            betas = self.edge_weights(kind).cpu()
            gene = self._derive(alphas * betas[:, None])
            while kind == "normal" and max_skip is not None:
                skips = [edge for edge, (op, _) in gene.items() if op == "skip_connect"]
                if len(skips) <= max_skip:
                    break
                o = self.primitives.index("skip_connect")
                alphas[min(skips, key=lambda edge: alphas[edge, o]), o] = 0
                gene = self._derive(alphas * betas[:, None])
            cells.append(list(gene.values()))
        concat = range(2 + self._steps - self._multiplier, self._steps + 2)
        return Genotype(cells[0], concat, cells[1], concat)

    def _derive(self, scores):
        """{edge: (op, input)} of the cell with these scores (E, ops), in the genotype's order."""
        ops = [o for o, name in enumerate(self.primitives) if name != "none"]
        best, op = scores[:, ops].max(1)  # of each edge
        gene, start = {}, 0
        for node in best.split([2 + j for j in range(self._steps)]):
            edges = node.sort(descending=True, stable=True).indices[:2].tolist()
            gene |= {start + e: (self.primitives[ops[op[start + e]]], e) for e in edges}
            start += len(node)
        return gene

    def resample(self):
        """Before each step of a search: draws the channels anew where sampling is "random"."""
        if self._arguments["sampling"] == "random":
            for cell in self.cells:
                cell.resample()
                distributed.broadcast([cell.channel_order, cell.channel_places])

    def _apply(self, fn, recurse=True):
        """As for parameters: alphas and betas stay the same leaf tensors, only their data moves."""
        arch = {name: self._buffers.pop(name) for name in self._arch_names}
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
        state_dict = without_module_prefix(state_dict)
        for name in self._arch_names:
            state_dict.setdefault(name, getattr(self, name).detach())
        keys = super().load_state_dict(state_dict, strict, assign)
        for tensor in self.arch_parameters():  # which `assign` replaces by what requires none
            tensor.requires_grad_()
        return keys


def get_args():
    parser = utils.Parser("What the supernet costs, for each K, before a search.")
    add = parser.add_argument
    add("--init_channels", type=utils.count, default=16, help="channels C of the first cell")
    add("--num_classes", type=utils.count, default=10, help="outputs")
    add("--layers", type=utils.depth, default=8, help="cells")
    add("--steps", type=utils.count, default=4, help="nodes of a cell")
    add("--input_size", type=utils.count, default=32, help="side of the images in pixels")
    add("--stem", default="cifar", choices=["cifar", "imagenet"], help="imagenet: an eighth")
    add("--recompute", action="store_true", help="as of train_search.py")
    return parser.parse_args()


def main(args):
    """A table; K that do not divide C into even numbers are left out."""
    fitting = [k for k in (2, 4, 8, 16) if args.init_channels % (2 * k) == 0]
    with utils.user_errors(ValueError):
        for k in (1, *fitting):
            network = Network(
                args.init_channels, args.num_classes, args.layers, None, steps=args.steps,
                multiplier=args.steps, k=k, stem=args.stem, recompute=args.recompute,
            )  # fmt: skip
            measure.check_size(network, args.input_size)
            if k == 1:
                print("| K | weights (M) | kept for the backward pass, per image (MB) |")
                print("|---|---|---|")
            kept = measure.kept_per_image(network, args.input_size)
            weights = sum(weight.numel() for weight in network.weights())
            print(f"| {k} | {weights / 1e6:.3f} | {kept / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    utils.run(main, get_args)
