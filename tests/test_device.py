"""What must hold on a GPU as on the CPU: the same tests on both; those on a GPU are marked gpu.

`make gpu` runs these. On the CPU a stand-in takes the place of a CUDA graph.
"""

import contextlib
import copy
import functools
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from inspect import signature
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten

import operations
import recipe
from architect import Architect, search_step
from fused import Gradients
from fused.nodes import pass_by
from fused.norms import Moments, _Norm
from harness import costs, distributed, flags, forms, generators
from helpers import ROOT
from model_search import SAMPLINGS, Network
from test_architect import CASES, NAMES
from test_distributed import in_processes

GPU = pytest.mark.gpu
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=GPU, id="cuda")]
ON_BOTH = pytest.mark.parametrize("device", DEVICES)
ARGS = SimpleNamespace(
    momentum=0.9, weight_decay=3e-4, arch_learning_rate=6e-3, arch_weight_decay=1e-3,
    grad_clip=5.0, unrolled=False, learning_rate=0.1, amp=False, no_cuda_graph=False,
    form="auto", plain=False, deterministic=False, resume=None, recompute=False, begin=0, epochs=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def exact():
    """One thread, and on a GPU float32 as it is, not TF32."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = cudnn


class Graph:
    """In the place of a CUDA graph: the computation itself, run again into the captured tensors."""

    def __init__(self, gradients, wanted, own, results):
        self.gradients, self.wanted, self.own, self.results = gradients, wanted, own, results
        self.replays = 0

    def replay(self):
        self.replays += 1
        loss, logits, values = self.gradients._compute(self.wanted, *self.own)
        loss_of, logits_of, values_of = self.results
        for tensor, value in zip(
            [loss_of, logits_of, *values_of], [loss, logits, *values], strict=True
        ):
            tensor.copy_(value)


class Replayed(Gradients):
    """Gradients that capture and replay; on the CPU with a stand-in, a `graph`."""

    graph = Graph
    captures = 0

    def graphed(self, input):
        return self.graphs and (input.device.type == "cpu" or super().graphed(input))

    def _aside(self, wanted, input, target, scale=1.0):
        if input.device.type == "cuda":
            return super()._aside(wanted, input, target, scale)
        return self._compute(wanted, input, target, scale)

    def _capture(self, wanted, input, target):
        self.captures += 1
        if input.device.type == "cuda":
            return super()._capture(wanted, input, target)
        own = torch.zeros_like(input), torch.zeros_like(target)
        with torch.random.fork_rng([]):
            results = self._compute(wanted, *own)
        return self.graph(self, wanted, own, results), *own, results


def near(actual, expected, tolerance, what=""):
    """The largest error, relative to the largest value; it is at most `tolerance`."""
    actual = torch.as_tensor(actual).detach().double().cpu()
    expected = torch.as_tensor(expected).detach().double().cpu()
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item() / max(expected.abs().max().item(), 1e-6)
    assert error <= tolerance, f"{what}: {error:.1e}"
    return error


def supernet(form="fused", device="cpu", **arguments):
    """A small supernet of a form, float64, the same weights each time."""
    fast, layout = flags.FORMS[form]
    arguments = dict(C=4, num_classes=3, layers=3, k=2, steps=2, multiplier=2) | arguments
    network = copy.deepcopy(made(fast, **arguments))
    network.layout = layout
    return network.to(device).train()


@functools.cache
def made(fast, **arguments):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = Network(criterion=nn.CrossEntropyLoss(), fused=fast, **arguments).double()
    assert network.fused == fast
    return network


def batch(n, device="cpu", size=8, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, size, size, generator=draw, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=draw)
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last), y.to(device)


# The published figures


TYPES = {"float64": torch.float64, "float32": torch.float32}
CASES_ON_GPU = itertools.product(CASES, flags.FORMS, (False, True), TYPES, ["cuda"])
CASES_ON_CPU = [*itertools.product(["cifar_k4"], flags.FORMS, [False], TYPES, ["cpu"])]
CASES_ON_CPU += [("cifar_k4", "fused-contiguous", True, "float64", "cpu")]
CASES_ON_CPU += [(case, "fused", False, "float32", "cpu") for case in ("imagenet_k2", "darts_k1")]


@pytest.mark.parametrize(
    ("case", "form", "captured", "dtype", "device"),
    [*CASES_ON_CPU, *(pytest.param(*values, marks=GPU) for values in CASES_ON_GPU)],
)
def test_golden_figures(case, form, captured, dtype, device, record_property):
    file, arguments = CASES[case]
    figures, config = recipe.golden(file, case)
    seed, n, size, classes = (config[key] for key in ("seed", "n", "size", "classes"))
    fast, layout = flags.FORMS[form]
    criterion = nn.CrossEntropyLoss()
    shape = config["C"], classes, config["layers"]
    network = Network(*shape, criterion, fused=fast, **({"k": 4} | arguments))
    network.layout = layout
    recipe.fill(network, seed).to(device, TYPES[dtype]).train()
    x, y = recipe.batch(seed, "valid0", n, size, classes)
    x, y = x.to(device, TYPES[dtype]), y.to(device)
    kept = copy.deepcopy(network.state_dict())
    gradients = Replayed(network, criterion, graphs=captured)
    arch = network.arch_parameters()
    for _ in range(Gradients.WARM_UP + 2 if captured else 1):
        loss, logits, values = gradients(arch, x, y)
    assert gradients.captures == captured and gradients.reason is None
    # In float32 rounding moves a ReLU or a maximum here and there, and gradients jump.
    rounding, jump = (1e-9, 1e-9) if dtype == "float64" else (1e-3, 3e-2)
    errors = [near(loss, figures["loss_train"], rounding, "loss")]
    errors.append(near(logits, figures["logits_train"], rounding, "logits"))
    for name, value in zip(NAMES, values, strict=False):
        errors.append(near(value, figures[f"grad_{name}"], jump, name))
    network.load_state_dict(kept)
    with torch.no_grad():
        logits = network.eval()(x)
    errors.append(near(logits, figures["logits_eval"], rounding, "evaluation"))
    record_property("largest relative error", f"{max(errors):.1e}")


# Gradients against the CPU, in the paper's form


@pytest.mark.parametrize(
    ("form", "sampling", "device"),
    [("fused-contiguous", sampling, "cpu") for sampling in SAMPLINGS]
    + [
        pytest.param(form, sampling, "cuda", marks=GPU)
        for form in flags.FORMS
        for sampling in SAMPLINGS
    ],
)
def test_all_gradients_are_those_of_the_plain_form_on_the_cpu(
    form, sampling, device, record_property
):
    plain = supernet("plain", sampling=sampling, layers=4)
    other = supernet(form, sampling=sampling, layers=4)
    torch.manual_seed(1)
    plain.resample()
    other.load_state_dict(plain.state_dict())
    other.to(device)
    assert next(other.parameters()).device.type == device
    errors = []
    for network, where in ((plain, "cpu"), (other, device)):
        network._loss(*batch(4, where)).backward()
        # under the names of the state dict, whatever holds them in a form
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(parameter.grad)
    mine, its = plain.state_dict(), other.state_dict()
    for name, tensor in mine.items():
        errors.append(near(its[name], tensor, 1e-9, name))
    for tensors in zip(plain.arch_parameters(), other.arch_parameters(), strict=True):
        errors.append(near(tensors[1].grad, tensors[0].grad, 1e-9, "alphas, betas"))
    record_property("largest relative error", f"{max(errors):.1e}")


@ON_BOTH
def test_the_variance_of_a_channel_that_hardly_varies(device):
    """As GPUs are used: with TF32, in which it would be lost."""
    torch.backends.cudnn.allow_tf32 = True  # the fixture puts it back
    h = 3 + 0.01 * torch.randn(8, 16, 16, 16, dtype=torch.float64)
    eye = torch.eye(4).expand(4, 4, 4).to(device)
    moments = Moments()
    maps = h.float().to(device).contiguous(memory_format=torch.channels_last)
    _Norm([maps], eye, moments)
    [(minus_mean, variance)] = moments
    expected = h.float().double().var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(variance.cpu().double().flatten(), expected, rtol=0.2, atol=0)
    torch.testing.assert_close(
        -minus_mean.cpu().double().flatten(), h.mean((0, 2, 3)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("form", flags.FORMS)
def test_a_form_keeps_its_memory_format(form):
    """Of the fast cells from end to end; the images come in channels_last."""
    network, seen = supernet(form, layers=4), set()
    for cell in network.cells:
        cell.register_forward_hook(lambda cell, args, out: seen.add(out.stride(1) == 1))
    network._loss(*batch(4)).backward()
    assert seen == {"contiguous" not in form}


# Graphs and what happens around them


class Search:
    """A search of a few steps, captured or not."""

    def __init__(self, captured, device, form="fused", amp=False, unrolled=False, **arguments):
        self.model = supernet(form, device, **arguments)
        if amp:
            self.model.float()
        self.device, self.dtype = device, torch.float32 if amp else torch.float64
        self.args = SimpleNamespace(**vars(ARGS) | {"unrolled": unrolled, "amp": amp})
        weights = self.model.weights()
        self.optimizer = torch.optim.SGD(weights, 0.1, 0.9, weight_decay=3e-4)
        self.architect = Architect(self.model, self.args)
        self.architect.gradients = Replayed(self.model, amp=amp, graphs=captured)
        self.gradients = Replayed(self.model, nn.CrossEntropyLoss(), amp, graphs=captured)
        self.figures = []
        torch.manual_seed(7)  # of `resample`

    def steps(self, *sizes):
        for n in sizes:
            self.model.resample()
            seed = 2 * len(self.figures)
            train, valid = (
                batch(n, self.device, seed=seed + i, dtype=self.dtype) for i in range(2)
            )
            loss, logits, norm = search_step(
                train, valid, self.model.weights(), self.gradients, self.architect,
                self.optimizer, self.args,
            )  # fmt: skip
            self.figures += [loss.cpu(), logits.cpu(), norm.cpu()]

    def evaluate(self):
        self.model.eval()
        with torch.no_grad():
            self.figures.append(self.model(batch(4, self.device, dtype=self.dtype)[0]).cpu())
        self.model.train()

    def state(self):
        parts = self.model, self.optimizer, self.architect.optimizer
        return copy.deepcopy([part.state_dict() for part in parts])

    def resume(self, state):
        for part, values in zip(
            (self.model, self.optimizer, self.architect.optimizer), state, strict=True
        ):
            part.load_state_dict(values)

    def end(self):
        return [*self.figures, *(tensor.cpu() for tensor in self.model.state_dict().values())]


VARIANTS = {
    "first order": {},
    "second order": dict(unrolled=True),
    "recompute": dict(recompute=True),
    "random sampling": dict(sampling="random"),
    "plain": dict(form="plain"),
    "contiguous": dict(form="fused-contiguous"),
    "second order, random, contiguous": dict(
        unrolled=True, sampling="random", form="fused-contiguous"
    ),
    "amp": dict(amp=True),
    "amp, recompute": dict(amp=True, recompute=True),
}
SOME = ("second order, random, contiguous", "amp, recompute")  # enough of a stand-in


@pytest.mark.parametrize(
    ("variant", "device"),
    [(variant, "cpu") for variant in SOME]
    + [pytest.param(variant, "cuda", marks=GPU) for variant in VARIANTS],
)
def test_a_captured_search_is_the_other(variant, device, record_property):
    """Also after batches of another size, an evaluation, and weights that were loaded."""
    ends, kept = [], None
    for captured in (False, True):
        search = Search(captured, device, **VARIANTS[variant])
        search.steps(4, 4)
        kept = search.state()
        search.steps(4, 4, 2, 4)
        search.evaluate()
        search.steps(4)
        search.resume(kept)
        search.steps(4)
        ends.append(search.end())
        for gradients in (search.gradients, search.architect.gradients):
            assert gradients.reason is None
            assert (gradients.captures > 0) == captured
    # bfloat16 rounds, and on a GPU in another order each time: steps drift apart
    tolerance = 1e-7 if not VARIANTS[variant].get("amp") else {"cpu": 1e-5, "cuda": 0.2}[device]
    errors = [near(a, b, tolerance, i) for i, (b, a) in enumerate(zip(*ends, strict=True))]
    record_property("largest relative difference after 8 steps", f"{max(errors):.1e}")


@ON_BOTH
def test_other_types_and_targets_have_their_own_graph(device):
    """A batch is never converted to that of a graph, nor its target cut."""
    network = supernet(device=device)
    gradients = Replayed(network, lambda logits, y: F.cross_entropy(logits, y))
    x, y = batch(4, device)
    soft = F.one_hot(y, 3).double()
    for target in (y, soft, soft * 0.5):
        for _ in range(Gradients.WARM_UP + 2):
            loss = gradients(network.arch_parameters(), x, target)[0]
        near(loss, F.cross_entropy(network(x), target), 1e-9)
    assert gradients.captures == 2  # the last two targets are alike


@GPU
def test_a_graph_is_on_the_device_of_its_input(record_property):
    """With --gpu N it is not the current one."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    torch.cuda.set_device(0)
    network = supernet(device=device)
    gradients = Gradients(network, nn.CrossEntropyLoss())
    for seed in range(Gradients.WARM_UP + 3):
        x, y = batch(4, device, seed=seed)
        loss = gradients(network.weights(), x, y)[0]
        near(loss, network._loss(x, y), 1e-9)
    assert gradients.reason is None and gradients.captured
    assert torch.cuda.current_device() == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    record_property("device", str(device))


@GPU
def test_a_capture_that_fails_leaves_the_stream_and_goes_on():
    """In a process of its own, which a failed capture leaves damaged in some versions of torch."""
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=a_capture_that_fails, daemon=True)
    process.start()
    process.join(300)
    assert process.exitcode == 0


def a_capture_that_fails():
    """A criterion that waits for the GPU cannot be captured."""
    network = supernet(device="cuda")
    gradients = Gradients(
        network, lambda logits, y: F.cross_entropy(logits, y) * (1 + 0 * logits.sum().item())
    )
    x, y = batch(4, "cuda")
    for _ in range(Gradients.WARM_UP + 3):
        loss = gradients(network.weights(), x, y)[0]
    near(loss, network._loss(x, y), 1e-9)
    assert gradients.reason and not gradients.graphs
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


class Cuda:
    """In the place of torch.cuda: notes what is asked of it, on the CPU."""

    def __init__(self, monkeypatch, fails=False):
        self.calls, self.now, self.fails = [], "main", fails
        for name in ("Stream", "stream", "current_stream", "set_stream", "device", "CUDAGraph",
                     "graph"):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device):
        self.calls.append(f"stream on {device}")
        return SimpleNamespace(name="side", wait_stream=lambda other: self.wait("side", other))

    def wait(self, mine, other):
        self.calls.append(f"{mine} waits for {getattr(other, 'name', other)}")

    def current_stream(self, device=None):
        return SimpleNamespace(name=self.now, wait_stream=lambda other: self.wait(self.now, other))

    def set_stream(self, stream):
        self.now = stream.name

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream.name
        yield
        self.now = before

    @contextlib.contextmanager
    def device(self, device):
        self.calls.append(f"on {device}")
        yield

    def CUDAGraph(self):
        return SimpleNamespace(pool=lambda: "pool", replay=lambda: self.calls.append("replay"))

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        signature(TORCH_GRAPH).bind(graph, pool=pool, stream=stream,
                                    capture_error_mode=capture_error_mode)  # fmt: skip
        self.calls.append(f"capture on {stream.name}, {capture_error_mode}, pool {pool}")
        self.now = stream.name
        yield
        if self.fails:  # as torch 2.14 does it: the stream stays
            raise RuntimeError("operation failed due to a previous error during capture")
        self.now = "main"


TORCH_GRAPH = torch.cuda.graph


class OnCuda(Gradients):
    """The real warm-up and capture; nothing is replayed, and the comparison is left out."""

    def graphed(self, input):
        return self.graphs

    def _checked(self, wanted, input, target):
        return self._capture(wanted, input, target)


def test_what_is_asked_of_cuda(monkeypatch):
    """Warm-up and capture on one stream of the input's device, and one pool for all graphs."""
    cuda, network = Cuda(monkeypatch), supernet()
    gradients = OnCuda(network, nn.CrossEntropyLoss())
    for n in (4, 4, 4, 4, 2, 2, 2, 2):
        gradients(network.arch_parameters(), *batch(n))
    warm_up = ["side waits for main", "main waits for side"] * 3
    capture = "capture on side, thread_local, pool"
    assert cuda.calls == [
        "stream on cpu", *warm_up, "on cpu", f"{capture} None", "replay",
        *warm_up, "on cpu", f"{capture} pool", "replay",
    ]  # fmt: skip


def test_a_capture_that_fails_at_its_end_gives_the_stream_back(monkeypatch, said):
    cuda, network = Cuda(monkeypatch, fails=True), supernet()
    gradients = OnCuda(network, nn.CrossEntropyLoss())
    for _ in range(5):
        gradients(network.arch_parameters(), *batch(4))
    assert cuda.now == "main" and not gradients.graphs
    assert "no CUDA graph (operation failed due to a previous error" in said.text


# The first replay is compared


def changed(what):
    """A stand-in whose replay is the step but for one thing."""

    class Lying(Graph):
        def __init__(self, gradients, wanted, own, results):
            super().__init__(gradients, wanted, own, results)
            self.model = gradients.model
            self.weights = [w.detach().clone() for w in self.model.parameters()]
            self.arch = [w.detach().clone() for w in self.model.arch_parameters()]

        @torch.no_grad()
        def with_old(self, tensors, old):
            now = [tensor.clone() for tensor in tensors]
            for tensor, value in zip(tensors, old, strict=True):
                tensor.copy_(value)
            with torch.enable_grad():
                super().replay()
            for tensor, value in zip(tensors, now, strict=True):
                tensor.copy_(value)

        def replay(self):
            loss, logits, values = self.results
            if what == "nothing is written":
                return
            if what == "weights of the capture":
                return self.with_old(list(self.model.parameters()), self.weights)
            if what == "alphas of the capture":
                return self.with_old(self.model.arch_parameters(), self.arch)
            if what == "input of the capture":
                self.own[0].zero_()
            super().replay()
            if what == "loss":
                loss.add_(0.1)
            if what == "logits":
                logits[0].zero_()
            if what == "a gradient":
                values[len(values) // 2].mul_(1.1)
            if what == "NaN":
                values[-1].view(-1)[0] = torch.nan
            if what == "statistics moved twice":
                super().replay()
            if what == "statistics stay" or what == "a count":
                for name, buffer in self.model.named_buffers():
                    if "num_batches" in name or (what == "statistics stay" and "running" in name):
                        buffer.copy_(before[name]) if what == "statistics stay" else buffer.add_(1)
            if what == "a weight":
                with torch.no_grad():
                    next(self.model.parameters()).view(-1)[0] += 1e-3
            if what == "random numbers":
                torch.rand(1)

    before = {}

    class Remembering(Lying):
        def replay(self):
            before.update({name: b.clone() for name, b in self.model.named_buffers()})
            return super().replay()

    return Remembering


LIES = {
    "loss": "loss 0.", "logits": "logits 0.", "a gradient": "gradients 0.",
    "nothing is written": "loss nan", "weights of the capture": "gradients",
    "alphas of the capture": "gradients", "input of the capture": "gradients", "NaN": "nan",
    "statistics moved twice": "statistics", "statistics stay": "statistics 1",
    "a count": "statistics", "a weight": "weights",
}  # fmt: skip


def bits(network):
    return [tensor.clone() for tensor in (*network.state_dict().values(), *network.parameters())]


def numbers():
    """The states of the random number generators of this process."""
    state = generators.state(torch.device("cpu"))
    return [state["python"], state["numpy"]["state"]["key"].tolist(), state["torch"].tolist()]


@pytest.mark.parametrize(
    ("what", "form", "dtype"),
    [(what, "fused", torch.float32) for what in LIES]
    + [("weights of the capture", "plain", torch.float64)],
)
def test_a_graph_that_lies_is_found(what, form, dtype, said):
    network = supernet(form).to(dtype)
    gradients = Replayed(network, nn.CrossEntropyLoss())
    gradients.graph = changed(what)
    honest = copy.deepcopy(network)
    expected = Gradients(honest, nn.CrossEntropyLoss())
    for seed in range(Gradients.WARM_UP + 2):
        x, y = batch(4, seed=seed, dtype=dtype)
        torch.manual_seed(seed)
        mine = gradients(network.weights(), x, y)
        after = numbers()
        torch.manual_seed(seed)
        theirs = expected(honest.weights(), x, y)
        assert after == numbers()
        for a, b in zip([*mine[:2], *mine[2]], [*theirs[:2], *theirs[2]], strict=True):
            assert torch.equal(a, b)
        assert all(map(torch.equal, bits(network), bits(honest)))
    assert not gradients.graphs and gradients.captures == 1 and not gradients.captured
    [record] = [record for record in said.records if record.levelno == logging.WARNING]
    line = record.getMessage()
    assert "its first replay is not the step" in line and LIES[what] in line, line
    assert "going on without" in line


@pytest.mark.parametrize("form", ["fused"])
def test_an_honest_graph_is_taken_once_it_was_compared(form, said):
    network = supernet(form)
    gradients = Replayed(network, nn.CrossEntropyLoss())
    for n in (4, 4, 4, 4, 3, 4, 3, 3, 3):
        state, before = bits(network), numbers()
        calls = gradients.captures
        x, y = batch(n)
        gradients(network.weights(), x, y)
        if gradients.captures > calls:  # as if there had been but one replay
            other = supernet(form)
            other.load_state_dict(dict(zip(network.state_dict(), state, strict=False)))
            Gradients(other, nn.CrossEntropyLoss())(other.weights(), x, y)
            assert all(map(torch.equal, bits(network), bits(other)))
        assert before == numbers()
    lines = [record.getMessage() for record in said.records]
    assert len(lines) == gradients.captures == 2  # once per shape
    for line, n in zip(lines, (4, 3), strict=True):
        assert f"a batch of {n}, training" in line and " s; relative differences loss 0," in line


class Frozen(Graph):
    """As a real graph: Python's side of the capture, and the memory where tensors were then."""

    def __init__(self, gradients, wanted, own, results):
        super().__init__(gradients, wanted, own, results)
        model, criterion = gradients.model, gradients.criterion
        tensors = [*model.parameters(), *model.buffers()]
        then = {
            id(tensor): tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors
        }
        self.wanted = [then[id(tensor)] for tensor in wanted]
        self.gradients = Gradients(*copy.deepcopy((model, criterion), then))


def elsewhere(tensors):
    for tensor in tensors:
        tensor.data = tensor.data * 1.5


CHANGES = {
    "an attribute": lambda network, loss: setattr(network.stem[1], "momentum", 0.5),
    "an attribute of the loss": lambda network, loss: setattr(loss, "label_smoothing", 0.5),
    "a hook": lambda network, loss: network.stem.register_forward_hook(lambda m, x, out: out * 2),
    "a module": lambda network, loss: setattr(
        network, "global_pooling", nn.AdaptiveMaxPool2d(1)
    ),
    "a mode": lambda network, loss: network.stem[1].eval(),
    "a function": lambda network, loss: setattr(
        network, "_loss", MethodType(lambda self, x, y: self(x).square().mean(), network)
    ),
    "weights elsewhere": lambda network, loss: elsewhere(network.weights()),
    "statistics elsewhere": lambda network, loss: elsewhere(
        b for n, b in network.named_buffers() if "running" in n
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_graph_of_a_model_that_was_changed_is_not_replayed(what, said):
    network, criterion = supernet(), nn.CrossEntropyLoss()
    network._criterion = criterion
    other, its = copy.deepcopy((network, criterion))
    own = None if what == "a function" else criterion  # None: model._loss
    gradients = Replayed(network, own)
    expected = Gradients(other, None if own is None else its)
    gradients.graph, gradients.WORTH = Frozen, 2

    def steps(n):
        for seed in range(n):
            x, y = batch(4, seed=seed)
            mine = gradients(network.arch_parameters(), x, y)
            theirs = expected(other.arch_parameters(), x, y)
            for a, b in zip([*mine[:2], *mine[2]], [*theirs[:2], *theirs[2]], strict=True):
                assert torch.equal(a, b)
            assert all(map(torch.equal, bits(network), bits(other)))

    steps(Gradients.WARM_UP + 3)
    assert gradients.captures == 1 and next(iter(gradients.captured.values())).replays == 3
    for one, loss in ((network, criterion), (other, its)):
        CHANGES[what](one, loss)
    steps(Gradients.WARM_UP + 3)
    assert gradients.captures == 2 and gradients.graphs
    assert said.text.count("captured again after 3 steps") == 1


def test_a_model_that_changes_in_each_step_is_seldom_captured():
    network = supernet()
    gradients = Replayed(network, nn.CrossEntropyLoss())
    gradients.graph = Frozen
    for step in range(45):
        network.stem[1].momentum = 1 / (step + 2)
        gradients(network.arch_parameters(), *batch(4))
    assert gradients.captures == 2 and gradients.graphs


def test_an_evaluation_leaves_the_graph_of_the_training():
    network = supernet()
    gradients = Replayed(network, nn.CrossEntropyLoss())
    for _ in range(Gradients.WARM_UP + 1):
        gradients(network.weights(), *batch(4))
        network.eval()(batch(4)[0])
        network.train()
    gradients(network.weights(), *batch(4))
    assert gradients.captures == 1 and next(iter(gradients.captured.values())).replays == 2


def test_others_get_no_graph_unasked():
    """Of an Architect with the published arguments, whose model may do anything in Python."""
    published = SimpleNamespace(
        momentum=0.9, weight_decay=3e-4, arch_learning_rate=6e-4, arch_weight_decay=1e-3
    )
    assert not Architect(supernet(), published).gradients.graphs
    assert Architect(supernet(), ARGS).gradients.graphs


def test_random_numbers_are_drawn_as_if_there_had_been_one_replay():
    gradients = Replayed(supernet(), nn.CrossEntropyLoss())
    gradients.graph = changed("random numbers")
    for _ in range(Gradients.WARM_UP + 1):
        torch.manual_seed(3)
        gradients(gradients.model.weights(), *batch(4))
    assert gradients.captures == 1 and gradients.graphs
    state = torch.get_rng_state()
    torch.manual_seed(3)
    torch.rand(1)
    assert torch.equal(state, torch.get_rng_state())


def test_a_step_that_is_not_the_same_twice_is_judged_by_its_own_differences():
    """On a GPU kernels add in any order: what the step itself does is no lie of the graph."""

    class Noisy(nn.CrossEntropyLoss):
        size, draw = 0.0, torch.Generator().manual_seed(0)

        def forward(self, logits, y):
            noise = torch.randn(logits.shape, generator=self.draw, dtype=logits.dtype)
            return super().forward(logits * (1 + self.size * noise), y)

    for size, kept in ((1e-6, True), (1.0, False)):
        network, criterion = supernet(), Noisy()
        criterion.size = size
        gradients = Replayed(network, criterion)
        for _ in range(Gradients.WARM_UP + 1):
            gradients(network.weights(), *batch(4))
        assert gradients.graphs == kept


def test_no_memory_for_the_comparison_means_no_graph(said):
    class Full(Replayed):
        def _capture(self, *batch):
            entry = super()._capture(*batch)
            self._compute = self.full
            return entry

        def full(self, *batch):
            del self._compute  # once
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    network = supernet()
    gradients, state = Full(network, nn.CrossEntropyLoss()), None
    for _ in range(Gradients.WARM_UP + 2):
        state = [weight.clone() for weight in network.weights()]
        gradients(network.weights(), *batch(4))
    assert all(map(torch.equal, state, network.weights()))
    assert "no CUDA graph (CUDA out of memory. Tried to allocate): going on" in said.text


# The form of a run


DIGITS = "--set digits --epochs 1 --begin 0 --batch_size 360 --init_channels 4 --layers 3 "
DIGITS += "--input_size 8 --steps 2 --k 2"
CPU = torch.device("cpu")


def clock(monkeypatch, times, moving=True):
    """Forms are tried on the CPU, and this is what they take; an exception is what they end by."""
    tried = []

    def seconds(steps, device):
        name = next(n for n, form in flags.FORMS.items()
                    if form == (steps.model.fused, steps.model.layout))  # fmt: skip
        tried.append(name)
        if moving:
            steps()
        if isinstance(times[name], Exception):
            raise times[name]
        return times[name]

    monkeypatch.setattr(forms, "MEASURED_ON", ("cpu",))
    monkeypatch.setattr(forms, "seconds", seconds)
    return tried


TIMES = {"fused": 3.0, "fused-contiguous": 2.0, "plain": 1.0, "plain-contiguous": 4.0}


def choice(monkeypatch, times, moving=False, **more):
    args = SimpleNamespace(**vars(ARGS) | more)
    model = supernet(recompute=args.recompute)
    tried = clock(monkeypatch, TIMES | times, moving)
    model, line = forms.choose(model, args, CPU, (4, 8))
    return model, args, line, tried


@pytest.mark.parametrize("times", [{}, {"plain": 9.0}])
def test_the_fastest_form_is_taken_as_if_nothing_had_been_tried(times, monkeypatch):
    before = supernet().state_dict()
    random.seed(1), np.random.seed(1)
    state = numbers()
    model, args, line, tried = choice(monkeypatch, times, moving=True)
    fastest = min(TIMES | times, key=(TIMES | times).get)
    assert args.form == fastest and tried == list(TIMES) and not args.no_cuda_graph
    assert (model.fused, model.layout) == flags.FORMS[fastest]
    assert numbers() == state
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.training and all(weight.grad is None for weight in model.weights())
    for name, value in (TIMES | times).items():
        assert f"{name} {1e3 * value:.1f}" in line
    assert "\n" not in line and line.startswith(f"form {fastest}, the fastest")


def test_a_form_that_does_not_fit_or_run_is_left_out(monkeypatch):
    full, absent = (
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("no kernel\nhere"),
    )
    model, args, line, _ = choice(monkeypatch, {"plain": full, "fused-contiguous": absent})
    assert args.form == "fused" and model.fused
    assert "plain: out of memory" in line and "fused-contiguous: no kernel, " in line
    with pytest.raises(torch.cuda.OutOfMemoryError):
        choice(monkeypatch, dict.fromkeys(TIMES, full))


def test_what_is_not_measured(monkeypatch):
    for more in (dict(form="plain"), dict(form="fused-contiguous"), dict(plain=True),
                 dict(deterministic=True), dict(resume="folder")):  # fmt: skip
        model, args, line, tried = choice(monkeypatch, {}, **more)
        name = more.get("form", "plain" if args.plain else "fused")
        assert (args.form, line, tried) == (name, None, [])
        assert (model.fused, model.layout) == flags.FORMS[name]
    args = SimpleNamespace(**vars(ARGS))
    monkeypatch.setattr(forms, "MEASURED_ON", ("cuda",))
    assert forms.choose(supernet(), args, CPU, (4, 8))[1] is None and args.form == "fused"
    # of the fast form alone: --recompute
    assert choice(monkeypatch, {}, recompute=True)[3] == ["fused", "fused-contiguous"]


@ON_BOTH
@pytest.mark.parametrize("faster", [True, False], ids=["graphs", "none"])
def test_forms_with_graphs_and_without(faster, device, monkeypatch, said):
    """All are tried; where steps are faster without graphs, that is kept as --no_cuda_graph."""
    if device == "cpu":
        monkeypatch.setattr(forms, "GRAPHS_ON", ("cpu",))
        monkeypatch.setattr("fused.Gradients", Replayed)
        monkeypatch.setattr("architect.Gradients", Replayed)
    tried = []

    def seconds(steps, device):
        steps()
        one, other = steps.gradients, steps.architect.gradients
        assert one.graphs == other.graphs and bool(one.captured) == one.graphs
        assert not steps.learns or bool(other.captured) == other.graphs
        tried.append((steps.model.fused, steps.model.layout, one.graphs))
        return 1.0 + len(tried) if faster == one.graphs else 100.0

    monkeypatch.setattr(forms, "seconds", seconds)
    # on the CPU two forms, with alphas and betas frozen: it takes less time
    less = {"begin": 1, "recompute": True} if device == "cpu" else {}
    args, model = SimpleNamespace(**vars(ARGS) | less), supernet()
    name, without, line = forms.measure(model, args, torch.device(device), (4, 8))
    assert (name, without) == ("fused", not faster)
    names = list(flags.FORMS)[: 2 if device == "cpu" else 4]
    assert tried == [(*flags.FORMS[name], graph) for name in names for graph in (False, True)]
    assert "fused without graphs" in line and ", fused " in line
    assert not [record for record in said.records if record.levelno == logging.WARNING]


def test_a_form_whose_graphs_lie_is_tried_without(monkeypatch):
    class Lying(Replayed):
        graph = changed("loss")

    monkeypatch.setattr(forms, "GRAPHS_ON", ("cpu",))
    monkeypatch.setattr("fused.Gradients", Lying)
    monkeypatch.setattr("architect.Gradients", Replayed)
    monkeypatch.setattr(forms, "seconds", lambda steps, device: 1.0)
    args = SimpleNamespace(**vars(ARGS) | {"begin": 1, "recompute": True})
    name, without, line = forms.measure(supernet(), args, CPU, (4, 8))
    assert (name, without) == ("fused", True)
    assert ", fused: its first replay is not the step" in line


def test_recompute_of_a_supernet_that_has_no_fast_form(monkeypatch):
    monkeypatch.setattr(forms, "seconds", lambda steps, device: 1.0)
    args = SimpleNamespace(**vars(ARGS) | {"begin": 1, "recompute": True})
    assert forms.measure(supernet("plain"), args, CPU, (4, 8))[0] == "plain"
    monkeypatch.setattr(forms, "MEASURED_ON", ("cpu",))
    forms.choose(supernet("plain"), args, CPU, (4, 8))
    assert (args.form, args.recompute) == ("plain", False)  # which --resume takes


def in_two_processes():
    """The form that each process takes where each would find another the fastest."""
    with pytest.MonkeyPatch.context() as patch:
        times = {"fused": 2.0, "plain": 1.0} if distributed.rank() == 0 else {"plain": 9.0}
        model, args, _, tried = choice(patch, times)
    return args.form, args.no_cuda_graph, len(tried), model.state_dict()


def test_all_processes_take_the_form_of_the_main_one():
    first, second = in_processes(2, in_two_processes)
    assert first[:3] == ("plain", False, 4) and second[:3] == ("plain", False, 0)
    assert all(map(torch.equal, first[3].values(), second[3].values()))


def search(flags_, cwd, times=None, code=0):
    """train_search.py in this process."""
    import train_search
    from harness import script

    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        if times is not None:
            clock(patch, times)
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["train_search.py", *flags_.split()])
        if code:
            with pytest.raises(SystemExit) as info:
                script.run(train_search.main, train_search.get_args)
            assert info.value.code == code
        else:
            script.run(train_search.main, train_search.get_args)
    for number, handler in kept.items():  # which a run takes over
        signal.signal(number, handler)


def test_an_operation_that_does_not_fit_the_published_size(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(operations.OPS, "group", lambda C, stride, affine: torch.nn.Sequential(
        torch.nn.AvgPool2d(stride), torch.nn.Conv2d(C, C, 3, padding=1, groups=8)))  # fmt: skip
    search("--set digits --input_size 8 --batch_size 300 --layers 3 --epochs 1 --init_channels 16 "
           "--k 2 --primitives none,group", tmp_path)  # fmt: skip
    assert "the cell makes no network of the published size" in capsys.readouterr().out
    [metrics] = tmp_path.glob("search-*/metrics.csv")
    header, row = (line.split(",") for line in metrics.read_text().splitlines())
    assert row[header.index("parameters_m")] == "nan"


def assert_same_bits(one, other):
    """Of tensors in nested dicts and lists, and of all other values."""
    flat, shape = tree_flatten(one)
    others, its_shape = tree_flatten(other)
    assert shape == its_shape
    for a, b in zip(flat, others, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_run_keeps_its_form_and_its_bits(tmp_path, capsys):
    """A search that tried all forms ends as one with that form from the start, and is resumed."""
    times = TIMES | {"plain": torch.cuda.OutOfMemoryError("out of memory"), "fused-contiguous": 9.0}
    search(f"{DIGITS} --save tried", tmp_path, times)
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if "the fastest" in line]
    assert "plain: out of memory" in line
    search(f"{DIGITS} --save given --form fused", tmp_path)
    folders = [next(tmp_path.glob(f"search-{name}-*")) for name in ("tried", "given")]
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in folders]
    for state in states[1:]:
        for part in ("model", "optimizer", "architect", "generators", "loader", "valid_loader"):
            assert_same_bits(state[part], states[0][part])
    for folder in folders:
        assert json.loads((folder / "args.json").read_text())["args"]["form"] == "fused"
    # a resumed run keeps the form of its own, whatever is the fastest now
    (folders[0] / "weights.pt").unlink()
    search(f"--resume {folders[0]}", tmp_path, TIMES)
    assert "the fastest" not in capsys.readouterr().out
    again = torch.load(folders[0] / "checkpoint.pt", weights_only=True)
    assert again["args"]["form"] == "fused" and again["epoch"] == 1
    search(f"--resume {folders[0]} --form plain", tmp_path, code=2)
    assert "--form plain is not the run's, which is fused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [("--plain --form fused", "--plain and --form fused: give one"),
     ("--recompute --form plain-contiguous", "leave out --form plain-contiguous"),
     ("--form quick", "invalid choice: 'quick'")],
)  # fmt: skip
def test_flags_that_contradict_each_other(given, words, tmp_path, capsys):
    search(f"{DIGITS} {given}", tmp_path, code=2)
    assert words in capsys.readouterr().err


# Memory


def peak(device, step):
    """Bytes that a step needs: at its peak on a GPU, else those kept for the backward pass."""
    if device == "cpu":
        return costs.bytes_kept(step)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step().backward()
    return torch.cuda.max_memory_allocated() - before


@ON_BOTH
def test_memory_of_a_step(device, record_property):
    n, size, C = (256, 32, 16) if device == "cuda" else (4, 16, 8)
    taken = {}
    for name, form, more in (("plain", "plain", {}), ("fused", "fused", {}),
                             ("fused-contiguous", "fused-contiguous", {}),
                             ("recompute", "fused", dict(recompute=True))):  # fmt: skip
        network = supernet(form, device, C=C, k=4, steps=4, multiplier=4, layers=8 if n > 4 else 3,
                           **more).float()  # fmt: skip
        x, y = batch(n, device, size, dtype=torch.float32)
        if device == "cuda":
            network._loss(x, y).backward()  # gradients and what cuDNN needs are there
        taken[name] = peak(device, lambda network=network, x=x, y=y: network._loss(x, y))
        record_property(f"MiB, {name}", f"{taken[name] / 2**20:.1f}")
    assert taken["fused"] < 0.6 * taken["plain"]
    assert taken["fused-contiguous"] < 0.7 * taken["plain"]
    assert taken["recompute"] < 0.8 * taken["fused"]


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outer_products_as_long_as_they_come(dtype):
    """Of what passes by: T targets, and N * H * W * (C - c) numbers, 3 million at batch 256."""
    T, M = 3, 2**24 + 8
    rest = torch.arange(M, device="cuda").remainder(7).to(dtype).requires_grad_()
    betas = torch.arange(1.0, 1 + T, device="cuda", dtype=dtype).requires_grad_()
    first = pass_by(None, rest.view(1, 8, 1, -1), betas, 1, 1)
    both = pass_by(first, rest.view(1, 8, 1, -1), betas, 1, 1)
    near(both[:, -9:], 2 * betas[:, None] * rest[-9:], 1e-2)
    of_betas, of_rest = torch.autograd.grad(both[:, : M // 2].sum(), [betas, rest])
    near(of_rest[-1], 0, 0)
    near(of_rest[:9], 2 * betas.sum().expand(9), 1e-2)
    near(of_betas, (2 * rest[: M // 2].float().sum()).expand(T), 1e-2)


# Several GPUs


def needs_two():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")


@GPU
def test_data_parallel_gives_the_gradients_of_one_gpu():
    from genotypes import PCDARTS
    from model import NetworkCIFAR

    needs_two()
    torch.manual_seed(0)
    network = NetworkCIFAR(4, 3, 3, False, PCDARTS).double().cuda().eval()  # no batch counts
    x, y = batch(6, "cuda", 32)
    both = distributed.wrap(network, x.device, SimpleNamespace(device=None, gpu=None))
    assert isinstance(both, nn.DataParallel)
    found = []
    for form in (network, both):
        network.zero_grad()
        F.cross_entropy(form(x)[0], y).backward()
        found.append([parameter.grad.clone() for parameter in network.parameters()])
    for one, other in zip(*found, strict=True):
        near(other, one, 1e-9)


@GPU
@pytest.mark.parametrize("unrolled", ["", "--unrolled"])
def test_two_processes_search_over_nccl(unrolled, tmp_path):
    """torchrun with one GPU each; the run itself checks that alphas and betas stay the same."""
    from PIL import Image

    needs_two()
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in "ab":
            folder = tmp_path / "imagenet_search" / part / name
            folder.mkdir(parents=True)
            for i in range(16):
                pixels = draw.integers(0, 256, (80, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "train_search_imagenet.py", "--tmp_data_dir", tmp_path, "--epochs", "6",
               "--begin", "1", "--batch_size", "16", "--init_channels", "4", "--layers", "3",
               "--input_size", "64", "--workers", "1", *unrolled.split()]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "genotype = " in done.stdout and "no CUDA graph" not in done.stdout


# The report of `make gpu`


def report(tmp_path, commands, monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "commands", lambda folder: commands(folder))
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda: {"GPU": "a GPU", "torch": "2"})
    before = signal.getsignal(signal.SIGTERM)
    code = gpu.main([str(tmp_path / "gpu-report.md")])
    signal.signal(signal.SIGTERM, before)
    return code, (tmp_path / "gpu-report.md").read_text()


def test_without_a_gpu_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "gpu.py"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "no CUDA GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_report_has_figures_and_failures(tmp_path, monkeypatch):
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\n"
        "def test_good(record_property):\n    record_property('MiB', '12.5')\n"
        "def test_bad():\n    assert 1 == 2, 'one | two'\n"
        "def test_left_out():\n    pytest.skip('there is one GPU')\n"
    )

    def commands(folder):
        results = folder / "tests.xml"
        python = [sys.executable]
        pytest_ = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
        return {
            "tests": [*pytest_, f"--junitxml={results}", str(tests)],
            "benchmark": [*python, "-c", "print('## supernet\\n\\n| a |\\n|---|\\n| 1.5 |')"],
            "search": [*python, "-c", "print('no'); raise SystemExit(3)"],
        }

    code, text = report(tmp_path, commands, monkeypatch)
    assert code == 1
    for words in ("a GPU", "1 passed, 1 failed, 1 not run", "MiB 12.5", "there is one GPU",
                  "one \\| two", "| 1.5 |", "search: exit code 3"):  # fmt: skip
        assert words in text, words

    def good(folder):
        return {"search": [sys.executable, "-c", "print('epoch 2 of 2')"]}

    code, text = report(tmp_path, good, monkeypatch)
    assert code == 0 and "epoch 2 of 2" in text and "Nothing failed" in text


TOLD = """
import os, signal, time
print('epoch 2 of 2', flush=True)
os.kill(os.getppid(), signal.SIGTERM)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print('epoch 3 of 2, interrupted')
"""


def test_a_report_that_is_told_to_end_has_what_there_is(tmp_path, monkeypatch):
    parts = {"one": "print('epoch 1')", "search": TOLD, "benchmark": "print(2)"}
    command = {name: [sys.executable, "-c", text] for name, text in parts.items()}
    code, text = report(tmp_path, lambda folder: command, monkeypatch)
    assert code == 130
    for words in ("## One", "epoch 2 of 2", "epoch 3 of 2, interrupted", "- search: told to end",
                  "- benchmark: not run"):  # fmt: skip
        assert words in text, words
    assert "one: not run" not in text and "## Benchmark" not in text


def test_a_part_that_waits_for_ever_is_ended_with_its_processes(tmp_path, monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(gpu, "HOURS", 1 / 3600)
    start, waits = time.monotonic(), "sleep 50 & wait"
    done = gpu._run(["bash", "-c", waits], tmp_path, tmp_path / "log")
    assert done.returncode == -signal.SIGKILL and "killed" in done.stdout
    assert time.monotonic() - start < 40


def test_what_make_gpu_runs(tmp_path):
    import gpu

    parts = {name: [*map(str, command)] for name, command in gpu.commands(tmp_path).items()}
    assert list(parts) == ["tests", "search", "benchmark"]
    assert {"-m", "gpu"} <= set(parts["tests"])
    assert "benchmark.py" in " ".join(parts["benchmark"])
    words = " ".join(parts["search"])
    assert "train_search.py" in words and "--epochs 2" in words
    assert "gpu:" in (ROOT / "Makefile").read_text()
