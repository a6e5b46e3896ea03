"""The supernet of PC-DARTS (Xu et al., ICLR 2020): mixed edges on 1/K of the channels, genotype().

Node j of a cell is the sum over its edges i of softmax(beta)_ij * f_ij(x_i) (eq. 3), where f_ij is

    shuffle(concat(sum_o softmax(alpha)_ij,o * o(x_i[:, :C/K]), x_i[:, C/K:]))              (eq. 2)

Written so, a cell makes 14 slices, 14 x 8 operations and 14 shuffles. But all edges that leave
node i read the same slice, so here the work is done once per source node, for its T targets
together. With the weights softmax(alpha) * softmax(beta):

- ReLU, the pools and their norms do not depend on the target: once, not T times.
- A depthwise convolution and the 1x1 behind it are one dense convolution with kernel
  pw[o, i] * dw[i]. T of them on one input are one with T * C/K outputs; on T inputs, T groups.
- Every op ends in a batch norm, and its weight is the scale of that norm (operations.NormSum).
- Sum, concatenation and shuffle are linear: a node is put together once, after the sum.

The figures equal those of the formula; tests/textbook.py is the formula, edge by edge.
"""

import torch
import torch.nn.functional as F
from torch import nn

from genotypes import PRIMITIVES, Genotype
from operations import (
    MOMENTUM,
    OPS,
    DilConv,
    FactorizedReduce,
    Identity,
    NormReLU,
    NormSum,
    ReLUConvBN,
    SepConv,
    Zero,
    factorized_kernel,
    halve,
    without_module_prefix,
)


def edges_by_source(steps):
    """(targets of each source node, the edges in the order by source, as numbers by target).

    The edge from node i to target j has number 2 + 3 + ... + (j + 1) + i: 14 edges in 4 steps.
    """
    sources = range(steps + 1)
    targets = [steps - max(0, i - 1) for i in sources]
    order = [j * (j + 3) // 2 + i for i in sources for j in range(max(0, i - 1), steps)]
    return targets, order


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
        self._ops = nn.ModuleDict()  # keyed by the op's place in PRIMITIVES


class Cell(nn.Module):
    """One cell: `steps` nodes, each fed by all before it; the last `multiplier` make the output.

    alphas, betas and state dicts number the edges by target; in here they stand by source.
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
        self.strided = sum(self.targets[:2]) if reduction else 0  # edges with stride 2: the first
        edges = [  # by target, as published, each op with its own initial weights
            [OPS[name](self.c, 2 if reduction and i < 2 else 1, False) for name in PRIMITIVES]
            for j in range(steps)
            for i in range(2 + j)
        ]
        edges = [edges[e] for e in self.order]
        self._sort_operations(edges[0], edges[-1])
        self._stack_weights(edges)

    def _sort_operations(self, first, last):
        """The places in PRIMITIVES of each kind of op, read off the first and the last edge."""

        def kind(*types):
            """Places whose op is of these types on both edges, with norms that learn nothing."""
            return [
                o
                for o, pair in enumerate(zip(first, last, strict=True))
                if tuple(map(type, pair)) in types and not any(map(has_affine_norm, pair))
            ]

        self.seps, self.dils = kind((SepConv, SepConv)), kind((DilConv, DilConv))
        pools = kind((nn.MaxPool2d, nn.MaxPool2d), (nn.AvgPool2d, nn.AvgPool2d))
        self.pools = [o for o in pools if "pool" in PRIMITIVES[o]]
        self.halves = kind((FactorizedReduce, Identity))
        self.skips = self.halves if self.strided else kind((Identity, Identity))
        batched = self.seps + self.dils + self.pools + self.skips + kind((Zero, Zero))
        self.others = [o for o in range(len(PRIMITIVES)) if o not in batched]
        # The separable convolutions: (place of the op, place in the op, padding, dilation).
        # The first of each op reads x; the second ones, of the sep_convs, stand last.
        convs = [(o, 1) for o in self.seps + self.dils] + [(o, 5) for o in self.seps]
        self.convs = [(o, at, last[o].op[at].padding, last[o].op[at].dilation) for o, at in convs]
        # Pools have no weights: one for all targets of a source.
        self.pool_ops = nn.ModuleList(
            nn.ModuleList((first if i < 2 else last)[o] for o in self.pools)
            for i in range(len(self.targets))
        )

    def _stack_weights(self, edges):
        """The parameters and the running statistics of all edges, by source."""
        c, E = self.c, len(edges)

        def stack(modules):
            return nn.Parameter(torch.stack([module.weight.detach() for module in modules]))

        # Pointwise (E, c, c, 1, 1) * depthwise (E, 1, c, k, k) is the kernel (E, c, c, k, k).
        self.depthwise, self.pointwise = Stacked(), Stacked()
        for o, at, *_ in self.convs:
            depthwise = stack(edge[o].op[at] for edge in edges)  # (E, c, 1, k, k)
            self.depthwise.append(nn.Parameter(depthwise.detach().transpose(1, 2).contiguous()))
            self.pointwise.append(stack(edge[o].op[at + 1] for edge in edges))
        self.half_1, self.half_2 = Stacked(), Stacked()  # (strided edges, c / 2, c, 1, 1)
        for o in self.halves:
            self.half_1.append(stack(edge[o].conv_1 for edge in edges[: self.strided]))
            self.half_2.append(stack(edge[o].conv_2 for edge in edges[: self.strided]))
        for name, shape in {
            "middle": (len(self.seps), E * c),  # the norms inside the sep_convs
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
                op = edge[o]
                if "pool" in PRIMITIVES[o]:
                    op = nn.Sequential(op, nn.BatchNorm2d(c, affine=False))
                self._ops[e]._ops[str(o)] = op

    def forward(self, s0, s1, coefficients, betas):
        """The output (N, multiplier * C, H, W), from those of the two cells before, ReLU'd.

        coefficients: softmax(alpha) * softmax(beta), (E, ops); betas: softmax(beta), (E,); both by
        source.
        """
        if self.training:
            self.num_batches_tracked += 1
        states = [self.preprocess0.after_relu(s0), self.preprocess1.after_relu(s1)]
        kernels, scales, linears = self._weights(coefficients)
        mixed = bypass = None  # of the targets to come: the sums over the sources so far
        start = 0
        for i, T in enumerate(self.targets):
            edges, start = slice(start, start + T), start + T
            if i >= 2:  # node i has all its edges
                node, mixed = mixed.split([self.c, T * self.c], 1)
                passed, bypass = bypass.split([1, T]) if self.k > 1 else (None, None)
                states.append(self._node(node, passed))
            x = states[i]
            if self.k > 1:
                x, rest = x.split([self.c, x.shape[1] - self.c], 1)
                x = x.contiguous(memory_format=torch.channels_last)
                bypass = self._pass_by(bypass, rest, betas[edges], edges.start < self.strided)
            kernel = [kernel[i] for kernel in kernels]
            mixed = self._mix(mixed, x, i, edges, kernel, scales[i], linears[i])
            for o in self.others:
                ops = [self._ops[e]._ops[str(o)] for e in self.order[edges]]
                outs = [w * op(x) for w, op in zip(coefficients[edges, o], ops, strict=True)]
                outs = torch.cat(outs, 1)
                mixed = outs if mixed is None else mixed + outs
        states.append(self._node(mixed, bypass))
        return torch.cat(states[-self.multiplier :], dim=1)

    def _weights(self, coefficients):
        """Lists by source: of each convolution its kernels, scales of the norms, pools and skip.

        Kernels are (T * c, c, k, k), scales (ops, T * c); pools and skip together are one 1x1
        kernel, (T * c, ops * c, 1, 1).
        """
        c, channels = self.c, [T * self.c for T in self.targets]
        kernels = []
        for pointwise, depthwise in zip(self.pointwise, self.depthwise, strict=True):
            kernels.append((pointwise * depthwise).flatten(0, 1).split(channels))
        for half_1, half_2 in zip(self.half_1, self.half_2, strict=True):  # of two sources only
            kernel = factorized_kernel(half_1, half_2).flatten(0, 1).split(channels[:2])
            kernels.append(kernel + (None,) * (len(channels) - 2))
        scales = coefficients[:, self.seps + self.dils + self.skips].t()  # (ops, E)
        scales = scales.repeat_interleave(c, 1).split(channels, 1)
        linears = coefficients[:, None, self.pools + self.skips, None] * self.eye[:, None]
        linears = linears.flatten(2).flatten(0, 1)[:, :, None, None]  # (E * c, ops * c, 1, 1)
        return kernels, scales, linears.split(channels)

    def _mix(self, mixed, x, i, edges, kernels, scale, linear):
        """`mixed` (N, T * c, H, W) + source i's weighted operations on x (N, c, H, W)."""
        stride = 2 if edges.start < self.strided else 1
        columns = slice(edges.start * self.c, edges.stop * self.c)
        n, readers = len(self.seps), len(self.seps + self.dils)
        relu, ys = x.relu(), []
        for kernel, (_, _, padding, dilation) in zip(
            kernels[:readers], self.convs[:readers], strict=True
        ):
            ys.append(F.conv2d(relu, kernel, None, stride, padding, dilation))
        if n:
            running = self.middle_mean[:, columns], self.middle_var[:, columns]
            zs = NormReLU.apply(*running, self.training, *ys[:n])
            T = edges.stop - edges.start
            for s, z in enumerate(zs):
                padding = self.convs[readers + s][2]
                ys[s] = F.conv2d(z, kernels[readers + s], None, 1, padding, groups=T)
        if stride == 2:
            ys += [halve(relu, kernel) for kernel in kernels[len(self.convs) :]]
        plain = [x] * len(self.skips) if stride == 1 else []
        if self.pools:
            pooled = torch.cat([pool(x) for pool in self.pool_ops[i]], 1)
            running = self.pool_mean[i], self.pool_var[i]
            pooled = F.batch_norm(pooled, *running, training=self.training, momentum=MOMENTUM)
            plain.insert(0, pooled)
        if plain:
            plain = torch.cat(plain, 1)
            plain = F.conv2d(plain, linear[:, : plain.shape[1]])
            mixed = plain if mixed is None else plain + mixed
        if not ys:
            return mixed
        running = self.last_mean[: len(ys), columns], self.last_var[: len(ys), columns]
        return NormSum.apply(*running, self.training, mixed, scale[: len(ys)], *ys)

    def _pass_by(self, bypass, rest, betas, strided):
        """`bypass` + betas (T,) times rest (N, C - c, H, W), flat: (T, N * H * W * (C - c))."""
        if strided:
            rest = F.max_pool2d(rest, 2, 2)
        rest = rest.permute(0, 2, 3, 1).flatten()
        return torch.outer(betas, rest) if bypass is None else bypass.addr(betas, rest)

    def _node(self, mixed, bypass):
        """A node (N, C, H, W), shuffled, of mixed (N, c, H, W) and a row of `_pass_by`."""
        if self.k == 1:
            return mixed
        n, c, h, w = mixed.shape
        parts = [mixed.permute(0, 2, 3, 1), *bypass.view(n, h, w, -1).split(c, 3)]
        # Channel i of group g goes to place i * K + g: channel_shuffle in one write.
        return torch.stack(parts, -1).flatten(3).permute(0, 3, 1, 2)

    def _released(self):
        """(name in a released state dict, tensor or view here) of all that is stored by source."""
        c, sources = self.c, [i for i, T in enumerate(self.targets) for _ in range(T)]
        for place, e in enumerate(self.order):
            own, strided = slice(place * c, (place + 1) * c), place < self.strided
            for (o, at, *_), dw, pw in zip(self.convs, self.depthwise, self.pointwise, strict=True):
                yield f"_ops.{e}._ops.{o}.op.{at}.weight", dw[place].transpose(0, 1)
                yield f"_ops.{e}._ops.{o}.op.{at + 1}.weight", pw[place]
            norms = [("middle", n, own, o, "op.3") for n, o in enumerate(self.seps)]
            last = [(o, "op.7") for o in self.seps] + [(o, "op.3") for o in self.dils]
            for n, o in enumerate(self.halves if strided else []):
                yield f"_ops.{e}._ops.{o}.conv_1.weight", self.half_1[n][place]
                yield f"_ops.{e}._ops.{o}.conv_2.weight", self.half_2[n][place]
                last.append((o, "bn"))
            norms += [("last", n, own, o, at) for n, (o, at) in enumerate(last)]
            for n, o in enumerate(self.pools):  # the same on all edges that leave a node
                norms.append(("pool", sources[place], slice(n * c, (n + 1) * c), o, "1"))
            for buffer, row, columns, o, at in norms:
                name = f"_ops.{e}._ops.{o}.{at}"
                yield f"{name}.running_mean", getattr(self, f"{buffer}_mean")[row, columns]
                yield f"{name}.running_var", getattr(self, f"{buffer}_var")[row, columns]
                yield f"{name}.num_batches_tracked", self.num_batches_tracked

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, tensor in self._released():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        for name, tensor in self._released():
            value = state.pop(prefix + name, None)  # or a child would call it unexpected
            if value is None:
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


class Network(nn.Module):
    """The supernet: stem, `layers` cells of which two reduce, classifier; alphas and betas.

    k: 1/k of the channels go through the operations; k=1, edge_norm=False is DARTS. stem: "cifar",
    or "imagenet" (stride 8). alphas and betas are buffers that require a gradient: they are in the
    state dict and move with the network, but `parameters()` are the weights alone.
    Raises ValueError where C / k is no even number, and for fewer than 3 layers.
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
        if k < 1 or C < 1 or C % k or (C // k) % 2:
            raise ValueError(f"C / k must be a whole, even number of channels, not {C} / {k}")
        if layers < 3:
            raise ValueError(f"layers={layers}: two of them reduce, so it takes 3 or more")
        if not 1 <= multiplier <= steps:
            raise ValueError(f"multiplier={multiplier}: a cell outputs 1 to steps={steps} nodes")
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem={stem!r}: give 'cifar' or 'imagenet'")
        self._arguments = dict(
            C=C, num_classes=num_classes, layers=layers, criterion=criterion,
            steps=steps, multiplier=multiplier, stem_multiplier=stem_multiplier,
            k=k, edge_norm=edge_norm, stem=stem,
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
        """softmax(beta) over the edges of each node of the "normal" or "reduce" cell (eq. 3).

        (E,), by target; ones without edge normalization.
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

    def genotype(self):
        """The cells: of each node the two best edges, on each the best op other than none.

        DARTS, section 2.4. An op's score is softmax(alpha) * softmax(beta); of equals the first.
        """
        cells = []
        ops = [o for o, name in enumerate(PRIMITIVES) if name != "none"]
        for kind in ("normal", "reduce"):
            with torch.no_grad():
                alphas = getattr(self, f"alphas_{kind}").softmax(-1)
                scores = (alphas * self.edge_weights(kind)[:, None])[:, ops].cpu()
            best, op = scores.max(1)  # of each edge
            gene, start = [], 0
            for node in best.split([2 + j for j in range(self._steps)]):
                edges = node.sort(descending=True, stable=True).indices[:2].tolist()
                gene += [(PRIMITIVES[ops[op[start + e]]], e) for e in edges]
                start += len(node)
            cells.append(gene)
        concat = range(2 + self._steps - self._multiplier, self._steps + 2)
        return Genotype(cells[0], concat, cells[1], concat)

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
        return super().load_state_dict(state_dict, strict, assign)
