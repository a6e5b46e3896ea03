"""The gradients of a step, and their CUDA graphs."""

import logging
import time
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import nn

from fused.snapshot import Snapshot
from utils import copy_into

log = logging.getLogger("pc-darts")

# How far a replayed step may be from the same step run again, at least: relative, by precision.
# Kernels that add in any order, and TF32, are within it; a graph that reads what is no longer
# there, or that has kept weights of an earlier step, is off by 0.1 and more.
ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-2}
ROUNDING_AMP, MOST = 5e-2, 0.1


class Gradients:
    """Gradients of criterion(model(input), target) for some tensors, and no others.

    On a GPU the forward and backward pass of each kind of batch is captured in a CUDA graph after
    WARM_UP calls, and replayed from then on: one launch instead of thousands. The first replay is
    compared with the step run without it; where they differ beyond rounding, or there is no graph,
    a line of the log says so, and all goes on without (`graphs` is False then, `reason` says why).
    Each size of batch has a graph of its own, also the last, short one of an epoch. A change of the
    model (an attribute, a hook, a module, a tensor in another place) is seen before a replay, and
    the step captured again; what else Python code reads, such as a global, is what it was at the
    capture. amp: bfloat16 where autocast has it. Of a model with several outputs the last are the
    logits. Without a criterion the loss is model._loss(input, target), and stands for the logits.
    """

    WARM_UP = 3
    WORTH = 20  # replays that pay for a capture

    def __init__(self, model, criterion=None, amp=False, graphs=True):
        self.model, self.criterion, self.amp, self.graphs = model, criterion, amp, graphs
        self.calls, self.captured, self.stream, self.reason = {}, {}, None, None
        self.warm_up = {}  # calls before a capture, where they are not WARM_UP

    def __call__(self, wanted, input, target, scale=1.0):
        """(loss, logits, gradients): those of scale * loss in the tensors `wanted`, a list."""
        if not self.graphed(input):
            return self._compute(wanted, input, target, scale)
        kind = [(tensor.shape, tensor.dtype, tensor.device) for tensor in (input, target)]
        # A graph reads the memory of its capture, which a tensor leaves that is moved by `to`.
        places = tuple((id(tensor), tensor.data_ptr()) for tensor in wanted)
        key = (places, *kind, self.model.training)
        self._forget_changed(key)
        calls = self.calls[key] = self.calls.get(key, 0) + 1
        if calls <= self.warm_up.get(key, self.WARM_UP):
            return self._aside(wanted, input, target, scale)
        if key not in self.captured:
            try:
                # With the tensors, so that no other one gets the id of one of them.
                self.captured[key] = SimpleNamespace(
                    entry=self._checked(wanted, input, target), wanted=wanted, replays=0,
                    snapshot=self._snapshot(),
                )  # fmt: skip
            except RuntimeError as error:  # of the capture, of memory, or of the comparison
                self.graphs, self.reason = False, str(error).strip().split("\n")[0]
                self.captured.clear()
            if not self.graphs:  # outside of the except, whose traceback holds the failed graph
                log.warning("no CUDA graph (%s): going on without", self.reason)
                return self._compute(wanted, input, target, scale)
        self.captured[key].replays += 1
        loss, logits, gradients = _replay(self.captured[key].entry, input, target)
        if isinstance(scale, torch.Tensor):
            scale = scale.to(loss.dtype)  # of another type it would be a launch for each gradient
        # The next replay overwrites them.
        return loss.clone(), logits.clone(), list(torch._foreach_mul(gradients, scale))

    def graphed(self, input):
        waits = getattr(self.model, "sync_bn", False) or torch.is_anomaly_enabled()  # in the pass
        return self.graphs and input.device.type == "cuda" and not waits

    def _snapshot(self):
        """Of the modules that a graph has taken as they were."""
        both = self.model, self.criterion
        parts = [part for m in both if isinstance(m, nn.Module) for part in m.modules()]
        return Snapshot(parts, tensors=True)

    def _forget_changed(self, key):
        """Drops the graph where the model has changed since; the next one comes after a warm-up.

        After one that is ten times as long where the graph was not WORTH it.
        """
        old = self.captured.get(key)
        if old is not None and not old.snapshot.holds():
            del self.captured[key]
            before = self.warm_up.get(key, self.WARM_UP)
            self.warm_up[key] = self.WARM_UP if old.replays >= self.WORTH else 10 * before
            self.calls[key] = 0
            log.info("the model has changed: the CUDA graph of a batch of %d is captured again "
                     "after %d steps", key[1][0][0], self.warm_up[key])  # fmt: skip

    def _compute(self, wanted, input, target, scale=1.0):
        kept = {id(tensor) for tensor in wanted}
        everything = [*self.model.parameters(), *self.model.arch_parameters()]
        with frozen([tensor for tensor in everything if id(tensor) not in kept]):
            with torch.autocast(input.device.type, torch.bfloat16, enabled=self.amp):
                if self.criterion is None:
                    loss = logits = self.model._loss(input, target)
                else:
                    logits = self.model(input)
                    loss = self.criterion(logits, target)
                    logits = logits[-1] if isinstance(logits, tuple) else logits
            gradients = torch.autograd.grad(loss * scale, wanted, materialize_grads=True)
        return loss.detach(), logits.detach(), list(gradients)

    def _aside(self, wanted, input, target, scale=1.0):
        """On a stream of its own, as a capture needs it of the calls before."""
        device = input.device  # need not be the current one: --gpu 1
        self.stream = self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            results = self._compute(wanted, input, target, scale)
        torch.cuda.current_stream(device).wait_stream(self.stream)
        return results

    def _capture(self, wanted, input, target):
        """(graph, its input, its target, its results), which mean nothing before a replay.

        On the stream of the warm-up, so on the device of the input. Only calls of this thread that
        a capture forbids end it: a loader's thread pins memory at any time. All graphs share a
        pool: what one leaves there but its results, which are kept, the next may overwrite.
        """
        own = torch.zeros_like(input), torch.zeros_like(target)
        pool = next((old.entry[0].pool() for old in self.captured.values()), None)
        with torch.cuda.device(input.device):
            outside = torch.cuda.current_stream()
            graph = torch.cuda.CUDAGraph()
            where = dict(pool=pool, stream=self.stream, capture_error_mode="thread_local")
            try:
                with torch.cuda.graph(graph, **where):
                    results = self._compute(wanted, *own)
            finally:  # a capture that fails at its end would leave its stream the current one
                torch.cuda.set_stream(outside)
        return graph, *own, results

    def _checked(self, wanted, input, target):
        """What _capture gives, once its replay is seen to be the step. Raises RuntimeError if not.

        Compared are loss, logits, gradients, and by how much the step moves the statistics and the
        weights (not at all). The weights are changed after the capture: otherwise a graph that
        still reads the old ones would pass. The results are filled with NaN before the replay:
        otherwise a graph that writes none would pass. Afterwards the model and the random numbers
        are as before.
        """
        start, model = time.perf_counter(), self.model
        arch, weights = model.arch_parameters(), list(model.parameters())
        learning = {id(tensor) for tensor in (*arch, *weights)}
        buffers = [tensor for tensor in model.buffers() if id(tensor) not in learning]
        state = [tensor.detach() for tensor in (*buffers, *arch, *weights)]
        before = [tensor.clone() for tensor in state]
        device = input.device
        devices = [device] if device.type == "cuda" else []

        def outcome(step):
            """{name: tensors} after a step from the same state."""
            copy_into(before, state)
            _disturb(arch, 0.5)
            _disturb(weights, None)
            disturbed = [tensor.clone() for tensor in state]
            with torch.random.fork_rng(devices):
                loss, logits, gradients = step()
            moved = [(b - a).double() for a, b in zip(disturbed, state, strict=True)]
            named = {"loss": [loss], "logits": [logits], "gradients": gradients}
            named |= {"statistics": moved[: len(buffers)], "weights": moved[len(buffers) :]}
            return {name: [t.double() for t in tensors] for name, tensors in named.items()}

        try:
            with torch.random.fork_rng(devices):
                entry = self._capture(wanted, input, target)
                for tensor in (*entry[3][:2], *entry[3][2]):
                    if 0 not in tensor.stride():
                        tensor.fill_(torch.nan)
            first, again = (outcome(lambda: self._compute(wanted, input, target)) for _ in range(2))
            replayed = outcome(lambda: _replay(entry, input, target))
        finally:
            copy_into(before, state)
        rounding = ROUNDING_AMP if self.amp else ROUNDING.get(input.dtype, ROUNDING_AMP)
        errors = {name: _error(replayed[name], first[name]) for name in first}
        limits = {  # where the step itself is not the same twice, ten times that
            name: min(MOST, max(rounding, 10 * _error(again[name], first[name]))) for name in first
        }
        wrong = [name for name in first if not errors[name] <= limits[name]]  # NaN is wrong
        figures = ", ".join(f"{name} {error:.1g}" for name, error in errors.items())
        seconds = time.perf_counter() - start
        if wrong:
            raise RuntimeError(
                f"its first replay is not the step: relative differences {figures}; "
                f"up to {limits[wrong[0]]:.1g} would be rounding"
            )
        log.info(
            "CUDA graph of %d gradients of a batch of %d, %s: captured and compared in %.1f s; "
            "relative differences %s", len(wanted), len(input),
            "training" if model.training else "evaluation", seconds, figures,
        )  # fmt: skip
        return entry


def _replay(entry, input, target):
    graph, own_input, own_target, results = entry
    own_input.copy_(input)
    own_target.copy_(target)
    graph.replay()
    return results


@torch.no_grad()
def _disturb(tensors, size):
    """Adds to each tensor up to size, or where None up to half of what each of its values is."""
    for tensor in tensors:
        wave = torch.arange(1, tensor.numel() + 1, device=tensor.device).sin().view(tensor.shape)
        wave = wave.to(tensor.dtype)
        tensor.add_(wave * (tensor / 2 if size is None else size))


def _error(tensors, expected):
    """The largest norm of a difference, relative to that of the tensor.

    Or to a thousandth of the largest norm, where that is more: of a tensor that is zero but for
    rounding. NaN where a value is not finite.
    """
    if not tensors:
        return 0.0
    differences = [(a - b).norm() for a, b in zip(tensors, expected, strict=True)]
    norms = torch.stack([b.norm() for b in expected])
    floor = max(1e-3 * norms.max(), torch.finfo(torch.float32).tiny)
    return (torch.stack(differences) / norms.clamp_min(floor)).max().item()


@contextmanager
def frozen(tensors):
    """Within it these leaf tensors require no gradient, so that none is computed for them."""
    learning = [tensor for tensor in tensors if tensor.requires_grad]
    try:
        for tensor in learning:
            tensor.requires_grad_(False)
        yield
    finally:
        for tensor in learning:
            tensor.requires_grad_()
