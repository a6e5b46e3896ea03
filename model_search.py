"""The supernet of PC-DARTS: mixed edges on 1/K of the channels, edge normalization, genotype() (Xu et al., ICLR 2020).

A cell's node j is the sum over its edges i of softmax(beta)_ij * f_ij(x_i) (eq. 2), where f_ij is

    shuffle(concat(sum_o softmax(alpha)_ij,o * o(x_i[:, :C/K]), x_i[:, C/K:]))              (eq. 1)

Written so, a cell makes 14 slices, 14 x 8 operations and 14 shuffles. But the edges that leave node i all read the same
slice, so here the work is done once per source node, for all its T target nodes together. With w = softmax(alpha) *
softmax(beta):

- ReLU, pooling and the norms of the pools do not depend on the target: once, not T times.
- A depthwise convolution and the 1x1 convolution behind it are one dense convolution with kernel pw[o, i] * dw[i].
  T of them on one input are one convolution with T * C/K outputs; where inputs differ, one with T groups.
- Every op ends in a batch norm, so w is the scale of that norm: no output is kept twice (NormSum).
- Shuffle, concatenation and the sum over edges are linear: a node is put together once, after the sum.

The figures equal those of the formula; tests/textbook.py is the formula, edge by edge.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from genotypes import PRIMITIVES, Genotype
from operations import (
    OPS,
    DilConv,
    FactorizedReduce,
    Identity,
    ReLUConvBN,
    SepConv,
    Zero,
    factorized_kernel,
    halve,
    without_module_prefix,
)

EPS, MOMENTUM = 1e-5, 0.1  # of every batch norm, PyTorch's defaults


# Norms over few channels are slow as (N * H * W, C); in channels_last the same memory is a matrix (N * H, W * C) of long
# rows, on which sums, scales and shifts run at memory speed. Per-channel figures are tiled W times for it.


def _rows(x):
    """(N, C, H, W) in channels_last as the matrix (N * H, W * C)."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n * h, w * c)


def _images(rows, like):
    """Back from rows to the shape (N, C, H, W) of `like`, in channels_last."""
    n, c, h, w = like.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def _per_channel(columns, C):
    """Sums (O, W * C) to sums (O, C)."""
    return columns.view(len(columns), -1, C).sum(1)


def _tile(figures, width):
    """Per-channel figures (O, C) as (O, 1, W * C)."""
    return figures.repeat(1, width).unsqueeze(1)


def _standardize(ys, running_mean, running_var, training):
    """Batch statistics of O tensors at once: (ys - mean as rows (O, N * H, W * C), 1 / std (O, C)).

    In training the running figures (O, C) follow, as in nn.BatchNorm2d; else they are the statistics.
    """
    n, C, h, width = ys[0].shape
    m = n * h * width
    y = torch.stack([_rows(part) for part in ys])
    if not training:
        return y.sub_(_tile(running_mean, width)), (running_var + EPS).rsqrt()
    mean = _per_channel(y.sum(1), C) / m
    y.sub_(_tile(mean, width))
    var = _per_channel((y * y).sum(1), C) / m
    running_mean.lerp_(mean, MOMENTUM)
    running_var.lerp_(var * (m / max(m - 1, 1)), MOMENTUM)
    return y, (var + EPS).rsqrt()


def _norm_backward(g, y, scale, inv_std, width, training):
    """Gradients with respect to (O, N * H, W * C) inputs of norms, and with respect to their scale.

    y is centred; output = scale * inv_std * y. With a = scale * inv_std and m values per channel:
    dy = a * (g - mean(g) - y * inv_std^2 * mean(g * y)), dscale = inv_std * sum(g * y).
    """
    C = inv_std.shape[1]
    m = y.shape[1] * width
    a = scale * inv_std
    dot = _per_channel((g * y).sum(1), C)
    if not training:
        return g * _tile(a, width), dot * inv_std
    total = _per_channel(g.sum(1), C)
    b, shift = a * inv_std.square() * dot / -m, a * total / -m
    a, b, shift = _tile(torch.cat([a, b, shift]), width).chunk(3)
    return torch.addcmul(shift, g, a).addcmul_(y, b), dot * inv_std


class NormReLU(torch.autograd.Function):
    """relu(batch_norm(y)) for O tensors (N, C, H, W) at once: what stands between the halves of a sep_conv."""

    @staticmethod
    def forward(ctx, running_mean, running_var, training, *ys):
        y, inv_std = _standardize(ys, running_mean, running_var, training)
        z = (y * _tile(inv_std, ys[0].shape[3])).relu_()
        ctx.save_for_backward(y, z, inv_std)
        ctx.training = training
        return tuple(_images(part, ys[0]) for part in z)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gs):
        y, z, inv_std = ctx.saved_tensors
        g = torch.stack([_rows(part) for part in gs])
        g = torch.ops.aten.threshold_backward(g, z, 0)
        dy, _ = _norm_backward(g, y, 1, inv_std, gs[0].shape[3], ctx.training)
        return None, None, None, *(_images(part, gs[0]) for part in dy)


class NormSum(torch.autograd.Function):
    """start + sum_o scale_o * batch_norm(y_o): scale (O, C); start and the O tensors y_o (N, C, H, W)."""

    @staticmethod
    def forward(ctx, running_mean, running_var, training, start, scale, *ys):
        y, inv_std = _standardize(ys, running_mean, running_var, training)
        a = _tile(scale * inv_std, ys[0].shape[3])
        out = y[0] * a[0] if start is None else torch.addcmul(_rows(start), y[0], a[0])
        for part, a_o in zip(y[1:], a[1:], strict=True):
            out.addcmul_(part, a_o)
        ctx.save_for_backward(y, inv_std, scale)
        ctx.training, ctx.started = training, start is not None
        return _images(out, ys[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, inv_std, scale = ctx.saved_tensors
        rows = _rows(g)
        dy, dscale = _norm_backward(rows[None], y, scale, inv_std, g.shape[3], ctx.training)
        dstart = _images(rows, g) if ctx.started else None
        return None, None, None, dstart, dscale, *(_images(part, g) for part in dy)


def edges_by_source(steps):
    """(number of targets of each source node, the edges' numbers by target in the order by source).

    The edge from node i to the j-th target has number 2 + 3 + ... + (j + 1) + i: 14 in 4 steps.
    """
    sources = range(steps + 1)
    targets = [steps - max(0, i - 1) for i in sources]
    order = [j * (j + 3) // 2 + i for i in sources for j in range(max(0, i - 1), steps)]
    return targets, order


class Stacked(nn.ParameterList):
    """Weights of all edges of a cell; the cell itself reads and writes them under the released names."""

    def _save_to_state_dict(self, *args):
        pass

    def _load_from_state_dict(self, *args):
        pass


class Edge(nn.Module):
    """The operations of one edge that have no batched form (users' own), applied one by one."""

    def __init__(self):
        super().__init__()
        self._ops = nn.ModuleDict()  # keyed by the op's place in PRIMITIVES


class Cell(nn.Module):
    """One cell: `steps` nodes, each fed by all before it; the last `multiplier` of them are its output.

    alphas, betas and state dicts number the edges by target; in here they stand by source (`order`).
    """

    def __init__(self, steps, multiplier, C_prev_prev, C_prev, C, reduction, reduction_prev, k):
        super().__init__()
        self.reduction, self.multiplier, self.k, self.c = reduction, multiplier, k, C // k
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self.targets, self.order = edges_by_source(steps)
        self.strided = sum(self.targets[:2]) if reduction else 0  # edges of stride 2, the first ones
        edges = [  # built in the order by target; each op initializes its own weights
            [OPS[name](self.c, 2 if reduction and i < 2 else 1, False) for name in PRIMITIVES]
            for j in range(steps)
            for i in range(2 + j)
        ]
        edges = [edges[e] for e in self.order]
        self._sort_operations(edges[0], edges[-1])
        self._stack_weights(edges)

    def _sort_operations(self, first, last):
        """The places in PRIMITIVES of each kind of op, read off the first and the last edge."""
        places, pools = range(len(PRIMITIVES)), (nn.MaxPool2d, nn.AvgPool2d)
        self.seps = [o for o in places if type(last[o]) is SepConv]
        self.dils = [o for o in places if type(last[o]) is DilConv]
        self.pools = [o for o in places if type(last[o]) in pools and "pool" in PRIMITIVES[o]]
        self.skips = [o for o in places if type(last[o]) is Identity]
        self.halves = [o for o in self.skips if type(first[o]) is FactorizedReduce]
        if self.strided and self.halves != self.skips:
            raise ValueError("an op that is Identity at stride 1 must be FactorizedReduce at 2")
        batched = self.seps + self.dils + self.pools + self.skips
        self.others = [o for o in places if o not in batched and type(last[o]) is not Zero]
        # Separable convolutions: (place of the op, place of the depthwise one in it, its geometry).
        convs = [(o, 1) for o in self.seps + self.dils] + [(o, 5) for o in self.seps]
        self.convs = [(o, at, last[o].op[at].padding, last[o].op[at].dilation) for o, at in convs]
        # Without weights, a pool serves all targets of a source: one per source.
        self.pool_ops = nn.ModuleList(
            nn.ModuleList((first if i < 2 else last)[o] for o in self.pools)
            for i in range(len(self.targets))
        )

    def _stack_weights(self, edges):
        """Parameters and running statistics of all edges, by source."""
        c, E = self.c, len(edges)

        def stack(select, edges=edges):
            return nn.Parameter(torch.stack([select(edge).weight.detach() for edge in edges]))

        # The kernel of a separable convolution is pointwise (E, c, c, 1, 1) * depthwise (E, 1, c, k, k).
        self.depthwise, self.pointwise = Stacked(), Stacked()
        for o, at, *_ in self.convs:
            depthwise = stack(lambda edge, o=o, at=at: edge[o].op[at])  # (E, c, 1, k, k)
            self.depthwise.append(nn.Parameter(depthwise.detach().transpose(1, 2).contiguous()))
            self.pointwise.append(stack(lambda edge, o=o, at=at: edge[o].op[at + 1]))
        # The stride-2 skips: two of (strided edges, c / 2, c, 1, 1).
        self.half_1, self.half_2 = Stacked(), Stacked()
        for o in self.halves:
            strided = edges[: self.strided]
            self.half_1.append(stack(lambda edge, o=o: edge[o].conv_1, strided))
            self.half_2.append(stack(lambda edge, o=o: edge[o].conv_2, strided))
        for name, shape in {
            "middle": (len(self.seps), E * c),  # norms inside the sep_convs
            "last": (len(self.seps + self.dils + self.halves), E * c),
            "pool": (len(self.targets), len(self.pools) * c),
        }.items():
            self.register_buffer(f"{name}_mean", torch.zeros(shape))
            self.register_buffer(f"{name}_var", torch.ones(shape))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.register_buffer("eye", torch.eye(c))
        self._ops = nn.ModuleList(Edge() for _ in edges if self.others)
        for e, edge in zip(self.order, edges, strict=True):
            for o in self.others:
                norm = [nn.BatchNorm2d(c, affine=False)] if "pool" in PRIMITIVES[o] else []
                self._ops[e]._ops[str(o)] = nn.Sequential(edge[o], *norm) if norm else edge[o]

    def forward(self, s0, s1, coefficients, betas):
        """The output (N, multiplier * C, H, W), from the outputs of the two cells before, ReLU'd.

        coefficients: softmax(alpha) * softmax(beta), (E, ops) by source; betas: softmax(beta), (E,).
        """
        if self.training:
            self.num_batches_tracked += 1
        states = [self.preprocess0.after_relu(s0), self.preprocess1.after_relu(s1)]
        kernels, scales, linears = self._weights(coefficients)
        mixed = bypass = None  # sums over the sources so far, for the targets still to come
        at = 0
        for i, T in enumerate(self.targets):
            if i >= 2:  # node i has all its edges
                node, mixed = mixed.split([self.c, T * self.c], 1)
                passed, bypass = bypass.split([1, T]) if self.k > 1 else (None, None)
                states.append(self._node(node, passed))
            x, edges = states[i], slice(at, at + T)
            if self.k > 1:
                x, rest = x.split([self.c, x.shape[1] - self.c], 1)
                x = x.contiguous(memory_format=torch.channels_last)
                if at < self.strided:
                    rest = F.max_pool2d(rest, 2, 2)
                rest = rest.permute(0, 2, 3, 1).flatten()
                weights = betas[edges]
                bypass = torch.outer(weights, rest) if i == 0 else bypass.addr(weights, rest)
            kernels_i = [kernel[i] for kernel in kernels]
            mixed = self._mix(mixed, x, i, edges, kernels_i, scales[i], linears[i])
            for o in self.others:
                ops = [self._ops[e]._ops[str(o)] for e in self.order[edges]]
                ys = [w * op(x) for w, op in zip(coefficients[edges, o], ops, strict=True)]
                mixed = mixed + torch.cat(ys, 1)
            at += T
        states.append(self._node(mixed, bypass))
        return torch.cat(states[-self.multiplier :], dim=1)

    def _weights(self, coefficients):
        """Of each source: convolution kernels, scales of the last norms, and pools and skip as a 1x1 kernel."""
        c, channels = self.c, [T * self.c for T in self.targets]
        pairs = zip(self.pointwise, self.depthwise, strict=True)
        kernels = [(pw * dw).flatten(0, 1).split(channels) for pw, dw in pairs]  # (T * c, c, k, k)
        pairs = zip(self.half_1, self.half_2, strict=True)
        for pair in pairs:  # of the first two sources only
            kernel = factorized_kernel(*pair).flatten(0, 1).split(channels[:2])
            kernels.append(kernel + (None,) * (len(channels) - 2))
        scales = coefficients[:, self.seps + self.dils + self.skips].t()  # (ops, E)
        scales = scales.repeat_interleave(c, 1).split(channels, 1)  # (ops, T * c)
        linears = coefficients[:, None, self.pools + self.skips, None] * self.eye[:, None]
        linears = linears.flatten(2).flatten(0, 1)[:, :, None, None]  # (E * c, ops * c, 1, 1)
        return kernels, scales, linears.split(channels)

    def _mix(self, mixed, x, i, edges, kernels, scale, linear):
        """mixed (N, T * c, H, W) + the weighted operations of source i on x (N, c, H, W)."""
        stride = 2 if edges.start < self.strided else 1
        n, part = len(self.seps), slice(edges.start * self.c, edges.stop * self.c)
        relu, ys = x.relu(), []
        for kernel, (_, at, padding, dilation) in zip(kernels, self.convs, strict=False):
            if at == 1:
                ys.append(F.conv2d(relu, kernel, None, stride, padding, dilation))
        if n:
            running = self.middle_mean[:, part], self.middle_var[:, part]
            zs = NormReLU.apply(*running, self.training, *ys[:n])
            seconds = zip(zs, kernels[len(ys) :], self.convs[len(ys) :], strict=False)
            groups = edges.stop - edges.start
            ys[:n] = [F.conv2d(z, k, None, 1, padding, 1, groups) for z, k, (*_, padding, _) in seconds]
        plain = []
        if self.pools:
            pooled = torch.cat([pool(x) for pool in self.pool_ops[i]], 1)
            running = self.pool_mean[i], self.pool_var[i]
            plain.append(F.batch_norm(pooled, *running, training=self.training, momentum=MOMENTUM))
        if stride == 1 and self.skips:
            plain += [x] * len(self.skips)
        if stride == 2:
            ys += [halve(relu, kernel) for kernel in kernels[len(self.convs) :]]
        if plain:
            plain = torch.cat(plain, 1)
            start = F.conv2d(plain, linear[:, : plain.shape[1]])
            mixed = start if mixed is None else start + mixed
        if not ys:
            return mixed
        running = self.last_mean[: len(ys), part], self.last_var[: len(ys), part]
        return NormSum.apply(*running, self.training, mixed, scale[: len(ys)], *ys)

    def _node(self, mixed, bypass):
        """The shuffled node (N, C, H, W) of mixed (N, c, H, W) and bypass (1, N * H * W * (C - c))."""
        if self.k == 1:
            return mixed
        n, c, h, w = mixed.shape
        parts = bypass.view(n, h, w, -1).split(c, 3)
        # Channel i of group g goes to place i * K + g: channel_shuffle in one write.
        return torch.stack([mixed.permute(0, 2, 3, 1), *parts], -1).flatten(3).permute(0, 3, 1, 2)

    def _released(self):
        """(name in a released state dict, view of the tensor here) of all that is stored by source."""
        c = self.c
        for place, e in enumerate(self.order):
            part, strided = slice(place * c, (place + 1) * c), place < self.strided
            norms = [("middle", n, part, o, "op.3") for n, o in enumerate(self.seps)]
            norms += [("last", n, part, o, "op.7") for n, o in enumerate(self.seps)]
            norms += [("last", len(self.seps) + n, part, o, "op.3") for n, o in enumerate(self.dils)]
            source = next(i for i in range(len(self.targets)) if place < sum(self.targets[: i + 1]))
            for n, o in enumerate(self.pools):  # the same on all edges of a source
                norms.append(("pool", source, slice(n * c, (n + 1) * c), o, "1"))
            for n, o in enumerate(self.halves if strided else []):
                norms.append(("last", len(self.seps + self.dils) + n, part, o, "bn"))
                yield f"_ops.{e}._ops.{o}.conv_1.weight", self.half_1[n][place]
                yield f"_ops.{e}._ops.{o}.conv_2.weight", self.half_2[n][place]
            for (o, at, *_), dw, pw in zip(self.convs, self.depthwise, self.pointwise, strict=True):
                yield f"_ops.{e}._ops.{o}.op.{at}.weight", dw[place].transpose(0, 1)
                yield f"_ops.{e}._ops.{o}.op.{at + 1}.weight", pw[place]
            for buffer, row, columns, o, at in norms:
                name = f"_ops.{e}._ops.{o}.{at}."
                yield name + "running_mean", getattr(self, f"{buffer}_mean")[row, columns]
                yield name + "running_var", getattr(self, f"{buffer}_var")[row, columns]
                yield name + "num_batches_tracked", self.num_batches_tracked

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, tensor in self._released():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        for name, tensor in self._released():
            value = state_dict.pop(prefix + name, None)  # so that no child calls it unexpected
            if value is None:
                missing.append(prefix + name)
            elif value.shape != tensor.shape:
                errors.append(
                    f"size mismatch for {prefix + name}: {tuple(value.shape)} in the file, "
                    f"{tuple(tensor.shape)} in the model"
                )
            else:
                with torch.no_grad():
                    tensor.copy_(value)


class Network(nn.Module):
    """The supernet: stem, `layers` cells of which two reduce, classifier; alphas and betas.

    k: 1/k of the channels go through the operations; k=1, edge_norm=False is DARTS. stem: "cifar", or
    "imagenet" (stride 8). alphas and betas are buffers that require a gradient: they are in the state
    dict and move with the network, but `parameters()` are the weights alone.
    Raises ValueError for fewer than 3 layers, and for C where C / k is no even number.
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
    ):
        super().__init__()
        if k < 1 or C % k or (C // k) % 2:
            raise ValueError(f"C / k must be a whole, even number of channels, not {C} / {k}")
        if layers < 3:
            raise ValueError(f"layers={layers}: two of them reduce, so it takes 3 or more")
        if not 1 <= multiplier <= steps:
            raise ValueError(f"multiplier={multiplier}: a cell concatenates 1 to steps={steps} nodes")
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem={stem!r}: give 'cifar' or 'imagenet'")
        self._arguments = dict(
            C=C, num_classes=num_classes, layers=layers, criterion=criterion, steps=steps,
            multiplier=multiplier, stem_multiplier=stem_multiplier, k=k, edge_norm=edge_norm, stem=stem,
        )  # fmt: skip
        self._criterion, self._steps, self._multiplier = criterion, steps, multiplier
        self.edge_norm = edge_norm

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
                steps, multiplier, C_prev_prev, C_prev, C_curr, reduction, reduction_prev, k
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
            shape = (edges, len(PRIMITIVES)) if "alphas" in name else (edges,)
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
        for cell in self.cells:
            out = cell(s0, s1, *(reduce if cell.reduction else normal))
            s0, s1 = s1, out.relu()  # once for both cells that read it
        return self.classifier(self.global_pooling(out).flatten(1))

    def edge_weights(self, kind):
        """softmax(beta) over the edges of each node of the "normal" or "reduce" cell, (E,) by target (eq. 2).

        Ones without edge normalization.
        """
        if not self.edge_norm:
            return torch.ones_like(getattr(self, f"alphas_{kind}")[:, 0])
        sizes = [2 + j for j in range(self._steps)]
        betas = getattr(self, f"betas_{kind}").split(sizes)
        return torch.cat([part.softmax(0) for part in betas])

    def _coefficients(self, kind):
        """(softmax(alpha) * softmax(beta) (E, ops), softmax(beta) (E,)), by source."""
        order = self.cells[0].order
        betas = self.edge_weights(kind)[order]
        alphas = getattr(self, f"alphas_{kind}")[order].softmax(-1)
        return alphas * betas[:, None], betas

    def _loss(self, input, target):
        return self._criterion(self(input), target)

    def arch_parameters(self):
        """alphas_normal, alphas_reduce (E, ops) and, with edge normalization, betas_normal, betas_reduce (E,)."""
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

    def genotype(self):
        """The discrete architecture: per node the two best edges, on each the best op other than none (section 3.4)."""
        cells = []
        ops = [o for o, name in enumerate(PRIMITIVES) if name != "none"]
        for kind in ("normal", "reduce"):
            with torch.no_grad():
                alphas = getattr(self, f"alphas_{kind}").softmax(-1)
                scores = (alphas * self.edge_weights(kind)[:, None])[:, ops].cpu()
            best, op = scores.max(1)  # of each edge; of equal ops the first
            gene, start = [], 0
            for node in best.split([2 + j for j in range(self._steps)]):
                edges = node.sort(descending=True, stable=True).indices[:2]  # of equal edges the first
                gene += [(PRIMITIVES[ops[op[start + e]]], e) for e in edges.tolist()]
                start += len(node)
            cells.append(gene)
        concat = range(2 + self._steps - self._multiplier, self._steps + 2)
        return Genotype(normal=cells[0], normal_concat=concat, reduce=cells[1], reduce_concat=concat)

    def _apply(self, fn, recurse=True):
        """As for parameters: alphas and betas stay the same leaf tensors, and only their data moves."""
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
        """As nn.Module's; accepts a `module.` prefix, and released ones, without alphas and betas."""
        arch = {name: tensor.detach() for name, tensor in zip(self._arch_names, self.arch_parameters(), strict=True)}
        return super().load_state_dict(arch | without_module_prefix(state_dict), strict, assign)
