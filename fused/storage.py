"""What the fast cell holds: the weights and statistics of all edges, by source node.

It reads and writes them under the names of model_search.Cell, which numbers the edges by target.
"""

import torch
from torch import nn

from genotypes import PRIMITIVES
from operations import OPS, DilConv, FactorizedReduce, Identity, ReLUConvBN, SepConv, Zero


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


def hooked(module):
    """Whether a module has hooks of any kind."""
    return any("_hooks" in name and value for name, value in vars(module).items())


def touched(module):
    """In a few words what somebody has done to a module that a fast form would not follow."""
    if hooked(module):
        return f"the hooks of {type(module).__name__}"
    if not all(parameter.requires_grad for parameter in module.parameters()):
        return f"a parameter of {type(module).__name__} that does not learn"
    return None


def is_ordinary(op):
    """Whether its norms learn nothing, all else does, and nobody has hooked himself in."""
    return not any(getattr(part, "affine", False) or touched(part) for part in op.modules())


class Edge(nn.Module):
    """The operations of one edge that have no batched form (users' own), applied one by one."""

    def __init__(self):
        super().__init__()
        self._ops = nn.ModuleDict()  # keyed by the op's place in primitives


class Stored(nn.Module):
    """The parameters and buffers of a cell, and which rows of them are whose.

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
        k=4,
        sampling="shuffle",
        primitives=None,
        recompute=False,
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
            """Places whose op is of these types on both edges, as operations.py makes it."""
            return [
                o
                for o, pair in enumerate(zip(first, last, strict=True))
                if tuple(map(type, pair)) in types and all(map(is_ordinary, pair))
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

        W is the matrix of functions.NormSum: an edge's ops go to its own target, the pools and the
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
        # A parameter by its own name, of named_parameters() laid over a state dict, counts, too.
        for name, parameter in self.named_parameters(prefix.removesuffix(".")):
            fits = name in state and state[name].shape == parameter.shape
            if fits and not name.startswith(known):
                with torch.no_grad():
                    parameter.copy_(state.pop(name))
        if strict:
            own = (name for name in state if name.startswith(prefix))
            unexpected.extend(name for name in own if not name.startswith(known))
