"""The cell of the supernet, several times faster: by source node, not by edge.

model_search.Cell makes 14 slices, 14 x 8 operations and 14 shuffles. But all edges that leave node
i read the same slice, so here the work is done once per source node, for its T targets together;
and both input nodes go at once, as a wave of S = 2 sources. With the weights
softmax(alpha) * softmax(beta):

- ReLU, the pools and their norms do not depend on the target: once, not T times.
- The depthwise convolutions of all targets and ops are one, on more channels.
- The 1x1 convolution and the batch norm at the end of each op, and its weight in the sum, are one
  1x1 convolution, of all ops side by side: its kernel needs the mean and the covariance of what
  comes before, no more. The equations stand in fused/norms.py.
- Sum, concatenation and shuffle are linear: a node is put together once, after the sum.
- A cell's output is ReLU'd once, not by both cells that read it.

The modules are those of model_search.Cell: only the forward is another. First derivatives only:
docs/differences.md, 12.
"""

import contextlib
import functools
import logging
import threading
import weakref

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused.convolutions import (
    Depthwise,
    Halve,
    Pointwise,
    identity,
    layout,
    quarters,
    quarters_of_kernel,
)
from fused.nodes import Node, pass_by
from fused.norms import Moments, NormReLUDepthwise, NormSum, norm_relu_depthwise, norm_sum
from fused.plan import Plan, constants
from fused.pools import WidePools
from operations import ReLUConvBN
from utils import in_functorch

log = logging.getLogger("pc-darts")


class _Scope(threading.local):
    """The forward of a network that is under way in this thread."""

    name = None
    keepers = ()  # weak references to the tensors that keep something for it


_scope = _Scope()


def sharing():
    """Within it cells share what several of them need of a tensor: around those of one forward."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _sharing()


@contextlib.contextmanager
def _sharing():
    before = _scope.name, _scope.keepers
    _scope.name, _scope.keepers = object(), []
    try:
        yield
    finally:
        for keeper in _scope.keepers:
            if (tensor := keeper()) is not None:  # somebody keeps the map, and not this with it
                vars(tensor).pop("_fused", None)
        _scope.name, _scope.keepers = before


def shared(make, key, *tensors):
    """make(), kept on the first of the tensors that it is made of, for the other cells.

    On the tensor, so that it goes when the map goes. Made anew in another forward or thread, for
    another key or other partners (by identity), after an in-place change of a tensor, and in
    another grad mode. A write through `.data` is not seen.
    """
    if _scope.name is None or is_checkpointed():
        return make()
    versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    state = torch.is_grad_enabled(), versions  # compared by value, the rest by identity
    same = _scope.name, key, *tensors[1:]
    before, its, made = getattr(tensors[0], "_fused", (None, same, None))
    if state != before or any(a is not b for a, b in zip(same, its, strict=True)):
        made = make()
        tensors[0]._fused = state, same, made
        _scope.keepers.append(weakref.ref(tensors[0]))
    return made


def is_checkpointed():
    """Whether torch.utils.checkpoint is to find all that is computed here, each time it runs."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return bool(hooks) and getattr(hooks[0], "__module__", None) == checkpoint.__module__


def is_transformed(*tensors):
    """Whether something traces, compiles or transforms this call, as torch.func.vmap does."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or in_functorch()
        or torch.autograd.forward_ad._current_level >= 0
        or any(type(x) not in (torch.Tensor, nn.Parameter) for x in tensors)  # torch.fx, fakes
    )


def autocast_dtype(kind):
    """The type in which convolutions compute on such a device where autocast is on, or None."""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def preprocess(block, x):
    """block(x), a ReLUConvBN or FactorizedReduce, with a ReLU that is made once for all readers."""
    relu = shared(x.relu, None, x)
    halves = not isinstance(block, ReLUConvBN)
    convs = (block.conv_1, block.conv_2) if halves else block.op[1:2]
    weights, dtype = [conv.weight for conv in convs], autocast_dtype(relu.device.type)
    if dtype is not None and weights[0].dtype != torch.float64:  # which autocast leaves as it is
        relu, weights = relu.to(dtype), [weight.to(dtype) for weight in weights]
    if halves:
        return block.bn(Halve.apply(relu, 1, *(weight[None] for weight in weights)))
    return block.op[2](Pointwise.apply(relu, *weights))


def side_by_side(tensors):
    """The tensors (N, ..., H, W) in as few tensors as may be, along channels, in this order.

    None of 8 MiB or more: copying a large map takes longer than the calls that it saves.
    """
    groups, size = [], 0
    for tensor in tensors:
        size += tensor.nbytes
        if not groups or size >= 2**23:
            groups.append([])
            size = tensor.nbytes
        groups[-1].append(tensor)
    return [torch.cat(group, 1) if len(group) > 1 else group[0] for group in groups]


@functools.cache
def warn_once(why):
    """Logs that cells run in their plain form, once for each reason."""
    log.warning("cells of the supernet run as model_search.py has them: %s", why)


class FastForward:
    """Goes before model_search.Cell among the bases of a class, whose forward it makes fast.

    Each forward looks whether the modules of the cell are still as it knows them (hooks, modes,
    types, code: fused.plan); where they are not, the cell runs as it is written.
    """

    recompute = False  # keep less for the backward pass and compute it again
    total = None  # a function, where batch statistics are those of all processes: see Moments
    norm = nn.BatchNorm2d  # the type of the cell's norms
    _plans = None, None  # in evaluation, in training

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._plan()  # now, not in the first forward

    def is_fast(self):
        """Whether a forward now would be the fast one."""
        return self._plan().why is None

    def _plan(self):
        plan = self._plans[self.training]
        if plan is None or not plan.holds(self):
            plan, other = Plan(self), self._plans[not self.training]
            self._plans = (other, plan) if self.training else (plan, other)
        return plan

    def _fits(self, weights, betas):
        """Whether they are what the equations have: matrix and vector, in the type of the cell.

        Not in float16, in which the sums over all pixels are too large, and not with weights in
        bfloat16, in which the statistics are lost.
        """
        sizes = (len(self._ops), len(self._ops[0]._ops)), (len(self._ops),)
        dtypes = weights.dtype, betas.dtype, autocast_dtype(weights.device.type)
        if torch.float16 in dtypes or weights.dtype in (torch.float16, torch.bfloat16):
            return False
        if weights.dtype != betas.dtype:
            return False
        return (weights.shape, betas.shape) == sizes and weights.dtype == self._dtype()

    def _dtype(self):
        return self.preprocess1.op[1].weight.dtype

    def _fraction(self, x):
        """Of all images those of this process, where statistics are taken over all processes."""
        if self.total is None:
            return 1
        images = torch.full((), len(x), dtype=torch.float64, device=x.device)
        return images / self.total([images])[0]

    def forward(self, s0, s1, weights, betas):
        """(N, multiplier * C, H, W) of s0 and s1, the outputs of the two cells before.

        weights (E, ops): softmax(alpha). betas (E,): softmax(beta) over the edges of a node.
        """
        as_written = is_transformed(s0, s1, weights, betas) or not len(s1)
        plan = None if as_written else self._plan()
        if plan is not None and plan.why is not None:
            warn_once(plan.why)
        if plan is None or plan.why is not None or not self._fits(weights, betas):
            return super().forward(s0, s1, weights, betas)
        kinds, waves, k = plan.kinds, plan.waves, self._ops[0].k
        places = constants(kinds, waves, weights.device)
        coefficients, betas, mixtures = shared(
            lambda: plan.by_source(places, weights, betas), places, weights, betas
        )
        states = [preprocess(self.preprocess0, s0), preprocess(self.preprocess1, s1)]
        c = states[0].shape[1] // k
        kernels = plan.kernels()
        eye = identity(c, self._dtype(), s1.device)
        matrices = plan.pointwise([W.shape[1] for W, _ in mixtures], eye)
        if self.training:
            moments = Moments(self._fraction(s1), self.total)
            statistics = [moments] * len(waves)  # the same: each wave adds its own
        else:
            statistics = plan.running(eye)
        mixed = bypass = None  # of the targets to come: the sums over the sources so far
        sources, gradient, dim = states, [], 3 if layout(s1) == torch.channels_last else 1
        for w, (S, T, stride, first, edges) in enumerate(waves):
            if self.sampling == "random":
                sources = [source.index_select(1, self.channel_order) for source in sources]
            parts = [source.split([c, source.shape[1] - c], 1) for source in sources]
            x = torch.cat([selected for selected, _ in parts], 1)  # (N, S * c, H, W)
            kind = "cpu" if x.is_meta else x.device.type
            with torch.autocast(kind, enabled=False):  # _mix computes in the type of x, or float32
                of_wave = kernels[w], matrices[w], mixtures[w], statistics[w]
                mixed = self._mix(mixed, x, plan, w, *of_wave)
            for o in kinds.others:
                ops = [self._ops[e]._ops[o] for e in edges]
                inputs = [part for part in x.chunk(S, 1) for _ in range(T)]
                edges_of = zip(coefficients[first : first + S * T, o], ops, inputs, strict=True)
                outs = [weight * op(part) for weight, op, part in edges_of]
                total = sum(torch.cat(outs[s * T : s * T + T], 1) for s in range(S))
                mixed = total if mixed is None else mixed + total
            if k > 1:
                for (_, rest), row in zip(parts, betas[w], strict=True):
                    bypass = pass_by(bypass, rest, row, stride, dim)
                node, mixed, bypass = Node.apply(mixed, bypass, c, dim, self._steps, self, gradient)
            else:
                node, mixed = mixed.split([c, (T - 1) * c], 1) if T > 1 else (mixed, None)
            states.append(node)  # the first of the targets, which has all its edges now
            sources = states[-1:]
        if self.training:
            plan.follow(moments, node.numel() // node.shape[1])
        return torch.cat(states[-self._multiplier :], dim=1)

    def _mix(self, mixed, x, plan, w, kernels, matrices, mixture, statistics):
        """`mixed` (N, T * c, H, W) + the weighted operations of a wave on x (N, S * c, H, W).

        statistics: the Moments of the cell; in evaluation the running figures of the wave's norms.
        """
        (W, W_normed), kinds, stride = mixture, plan.kinds, plan.waves[w].stride
        if not W.shape[1]:  # a space of `none` and of operations that run one by one
            n, _, h, width = x[:, :, ::stride, ::stride].shape
            c = x.shape[1] // plan.waves[w].S
            return x.new_zeros(n, len(W) * c, h, width) if mixed is None else mixed
        firsts, seconds, dils = kernels
        hs = self._first_convolutions(x, plan, w, firsts, dils)
        Q, P = matrices
        unnormed, skips = kinds.unnormed(plan.waves[w]), [x] * len(kinds.skips) * (stride == 1)
        recompute = self.recompute and self.training
        again = {} if recompute else None
        if firsts:
            first, (kernel, _, turned) = hs[0], seconds
            if self.training:
                hs[0] = NormReLUDepthwise.apply(statistics, again, turned, first, Q, kernel)
            else:
                hs[0] = norm_relu_depthwise(*statistics[0], first, Q, kernel)

        def pools(x):
            few = x.device.type == "cpu" and x.shape[1] < 16 and layout(x) == torch.channels_last
            pools = plan.pool_ops[w]
            return [WidePools.apply(x, pools)] if few and pools else [pool(x) for pool in pools]

        def remake(x, *kept):
            """What NormSum reads anew, for its backward pass."""
            kept = list(kept)
            if firsts:
                kept[0] = NormReLUDepthwise.remake(kept[0], kernel, again)
            return side_by_side([*kept, *pools(x), *[x] * len(skips)])

        if recompute:
            kept = [h.detach() for h in ([x, first, *hs[1:]] if firsts else [x, *hs])]
            pooled = checkpoint(pools, x, use_reentrant=False, preserve_rng_state=False)
        else:
            kept, pooled = None, pools(x)
        hs = side_by_side([*hs, *pooled, *skips])
        if self.training:
            remake = remake if recompute else None
            return NormSum.apply(statistics, unnormed, mixed, W_normed, remake, kept, W, P, *hs)
        return norm_sum(*statistics[1], unnormed, mixed, W, P, hs)

    def _first_convolutions(self, x, plan, w, firsts, dils):
        """The outputs of the operations' first convolutions: sep_convs, dil_convs, halves."""
        S, T, stride, _, _ = plan.waves[w]

        def depthwise(x, *groups, dilations):
            kernels = [kernel.unflatten(0, (S, T)).flatten(1, 2) for kernel, _, _ in groups]
            return Depthwise.apply(x, dilations, [copies for _, *copies in groups], *kernels)

        if stride == 1:
            groups = [group for group in (firsts, dils) if group]
            dilations = [1 if group is firsts else 2 for group in groups]
            return [*depthwise(x, *groups, dilations=dilations)] if groups else []
        hs = []
        if firsts or dils:
            parts, kernels = quarters(x), quarters_of_kernel(firsts[0]) if firsts else []
            # With stride and dilation 2 every other pixel is read alone: the first quarter.
            groups = kernels[:1] + ([dils] if dils else [])
            hs += depthwise(parts[0], *groups, dilations=[1] * len(groups))
            for part, kernel in zip(parts[1:], kernels[1:], strict=False):
                hs[0] = hs[0] + depthwise(part, kernel, dilations=[1])[0]
        for pair in plan.halves:
            pair = [torch.stack([conv.weight for conv in convs]).to(x.dtype) for convs in pair]
            hs.append(Halve.apply(x.relu(), S, *pair))
        return hs
