"""The architecture step against the golden figures and against exact autograd."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import model_search
import recipe
from architect import Architect
from fused.gradients import Gradients, frozen
from harness import costs

CASES = {
    "cifar_k4": ("pcdarts", {}),
    "imagenet_k2": ("pcdarts", {"k": 2, "stem": "imagenet"}),
    "darts_k1": ("darts", {"k": 1, "edge_norm": False}),
}
ARGS = SimpleNamespace(
    momentum=0.9, weight_decay=3e-4, arch_learning_rate=6e-4, arch_weight_decay=1e-3
)
BOTH = pytest.mark.parametrize("form", ["plain", "fused"])
NAMES = ["alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce"]


class Case:
    """A golden case: figures, batches, and a fresh network with architect and optimizer."""

    def __init__(self, name, form="fused"):
        file, arguments = CASES[name]
        self.figures, self.config = recipe.golden(file, name)
        config = self.config
        size = config["C"], config["classes"], config["layers"]
        arguments = arguments | {"fused": form == "fused"}
        self.model = model_search.Network(*size, nn.CrossEntropyLoss(), **arguments)
        assert self.model.fused == arguments["fused"]
        recipe.fill(self.model, config["seed"]).train()
        self.architect = Architect(self.model, ARGS)
        self.optimizer = torch.optim.SGD(self.model.weights(), 0.1, 0.9, weight_decay=3e-4)
        self.arch = dict(zip(NAMES, self.model.arch_parameters(), strict=False))

    def batch(self, name):
        config = self.config
        return recipe.batch(config["seed"], name, config["n"], config["size"], config["classes"])

    def weight_step(self, name):
        self.optimizer.zero_grad()
        loss = self.model._loss(*self.batch(name))
        loss.backward(inputs=self.model.weights())
        nn.utils.clip_grad_norm_(self.model.weights(), 5)
        self.optimizer.step()
        return loss.item()


def assert_close(tensor, figure, relative):
    error = np.abs(tensor.detach().numpy() - figure).max() / np.abs(figure).max()
    assert error < relative


@BOTH
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("after", [0, 1])
def test_unrolled_gradient_is_the_released_one(name, form, after):
    case = Case(name, form)
    if after:  # one SGD step: the momentum buffers count
        case.weight_step("train0")
    batches = *case.batch(f"train{after}"), *case.batch(f"valid{after}")
    weights = [weight.detach().clone() for weight in case.model.weights()]
    case.architect.backward(*batches, 0.1, case.optimizer, unrolled=True)
    for arch, tensor in case.arch.items():
        assert_close(tensor.grad, case.figures[f"unrolled{after}_{arch}"], 1e-9)
    for before, weight in zip(weights, case.model.weights(), strict=True):
        assert torch.equal(before, weight)  # restored bit for bit


@BOTH
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", ["first3", "second3"])
def test_three_search_steps_lead_where_the_released_ones_do(name, form, order):
    case = Case(name, form)
    losses = []
    for t, eta in enumerate((0.1, 0.07, 0.03)):
        case.optimizer.param_groups[0]["lr"] = eta
        batches = *case.batch(f"train{t}"), *case.batch(f"valid{t}")
        case.architect.step(*batches, eta, case.optimizer, unrolled=order == "second3")
        losses.append(case.weight_step(f"train{t}"))
    for arch, tensor in case.arch.items():
        assert_close(tensor, case.figures[f"{order}_{arch}"], 1e-9)
    assert np.abs(losses - case.figures[f"{order}_losses"]).max() < 1e-9
    images, _ = case.batch("valid0")
    assert_close(case.model(images), case.figures[f"{order}_logits_train"], 1e-9)
    if order == "first3" and name != "imagenet_k2":  # whose statistics are moved twice, see below
        assert_close(case.model.eval()(images), case.figures["first3_logits_eval"], 1e-9)


@pytest.mark.parametrize("momentum", [0.1, 0.19])
def test_the_released_imagenet_search_runs_each_edge_twice(momentum):
    """docs/differences.md, 18: its edges' statistics move twice a pass, 1 - 0.9^2 = 0.19."""
    case = Case("imagenet_k2", "plain")
    for cell in case.model.cells:
        for module in cell._ops.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
    for t, eta in enumerate((0.1, 0.07, 0.03)):
        case.optimizer.param_groups[0]["lr"] = eta
        batches = *case.batch(f"train{t}"), *case.batch(f"valid{t}")
        case.architect.step(*batches, eta, case.optimizer, unrolled=False)
        case.weight_step(f"train{t}")
    images, _ = case.batch("valid0")
    case.model(images)
    logits, figure = case.model.eval()(images), case.figures["first3_logits_eval"]
    if momentum == 0.19:
        assert_close(logits, figure, 1e-7)
    else:  # as it is here: each edge once
        assert np.abs(logits.detach().numpy() - figure).max() > 0.01


class Smooth(nn.Module):
    """A mixed operation without kinks, which a central difference could step over."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.alphas = torch.randn(3, dtype=torch.float64).requires_grad_()

    def arch_parameters(self):
        return [self.alphas]

    def forward(self, x):
        x = self.first(x)
        ops = (x.tanh(), x.sigmoid(), x.sin())
        return self.last(sum(w * op for w, op in zip(self.alphas.softmax(0), ops, strict=True)))

    def _loss(self, x, target):
        return nn.functional.cross_entropy(self(x), target)


def test_second_order_where_the_validation_loss_has_no_gradient():
    """As a triplet loss has none whose triplets all keep their margin."""
    torch.manual_seed(0)
    model = Smooth()
    model._loss = lambda x, target: 0 * Smooth._loss(model, x, target)
    args = SimpleNamespace(
        momentum=0.9, weight_decay=0.0, arch_learning_rate=0.1, arch_weight_decay=0.0
    )
    before = [weight.clone() for weight in model.parameters()]
    model.double()
    batch = torch.randn(4, 6).double(), torch.randint(3, (4,))
    optimizer = torch.optim.SGD(model.parameters(), 0.5, 0.9)
    Architect(model, args).backward(*batch, *batch, 0.5, optimizer, unrolled=True)
    assert torch.equal(model.alphas.grad, torch.zeros(3, dtype=torch.float64))
    assert all(torch.equal(w.float(), b) for w, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("momentum", [False, True])
def test_unrolled_gradient_is_that_of_exact_autograd(momentum):
    """d L_val(w'(alpha), alpha) / d alpha by autograd through the SGD step."""
    torch.manual_seed(0)
    model, eta = Smooth().double(), 0.5
    optimizer = torch.optim.SGD(model.parameters(), eta, 0.9, weight_decay=3e-4)
    train, valid = (
        (torch.randn(16, 6).double(), torch.randint(3, (16,))) for _ in ("train", "valid")
    )
    if momentum:
        model._loss(*train).backward()
        optimizer.step()
    names, weights = zip(*model.named_parameters(), strict=True)
    gradient = torch.autograd.grad(model._loss(*train), weights, create_graph=True)
    ahead = {}
    for name, w, g in zip(names, weights, gradient, strict=True):
        moment = 0.9 * optimizer.state[w]["momentum_buffer"] if momentum else 0
        ahead[name] = w.detach() - eta * (moment + g + 3e-4 * w.detach())
    logits = torch.func.functional_call(model, ahead, valid[0])
    [exact] = torch.autograd.grad(nn.functional.cross_entropy(logits, valid[1]), [model.alphas])
    [first] = torch.autograd.grad(model._loss(*valid), [model.alphas])

    Architect(model, ARGS).backward(*train, *valid, eta, optimizer, unrolled=True)
    assert (model.alphas.grad - exact).norm() < 1e-5 * exact.norm()
    assert (first - exact).norm() > 0.05 * exact.norm()  # the second term counts


def test_unrolled_passes_leave_running_statistics_as_the_released_ones_do():
    """Three passes on the training batch update them, that through the unrolled weights not."""
    case, other = Case("cifar_k4"), Case("cifar_k4")
    batches = *case.batch("train0"), *case.batch("valid0")
    case.architect.backward(*batches, 0.0, case.optimizer, unrolled=True)
    for _ in range(3):
        other.model(other.batch("train0")[0])
    stem = case.model.stem[1], other.model.stem[1]
    assert torch.allclose(stem[0].running_mean, stem[1].running_mean, rtol=1e-2)
    assert stem[0].num_batches_tracked == stem[1].num_batches_tracked


@pytest.mark.parametrize("unrolled", [False, True])
def test_bfloat16_is_of_first_order_steps(unrolled):
    """The two sides of the central difference are nearer to each other than its steps."""
    args = SimpleNamespace(**vars(ARGS) | {"amp": True, "unrolled": unrolled})
    assert Architect(Case("cifar_k4").model, args).gradients.amp is not unrolled


def test_the_gradient_of_alphas_and_betas_is_clipped_on_request():
    case = Case("cifar_k4")
    batches = *case.batch("train0"), *case.batch("valid0")
    case.architect.backward(*batches, 0.1, None, unrolled=False)
    plain = torch.cat([tensor.grad.flatten() for tensor in case.arch.values()])
    case.architect.step(*batches, 0.1, None, unrolled=False)
    assert torch.equal(torch.cat([t.grad.flatten() for t in case.arch.values()]), plain)
    clip = plain.norm().item() / 10
    architect = Architect(case.model, SimpleNamespace(**vars(ARGS), arch_grad_clip=clip))
    architect.step(*batches, 0.1, None, unrolled=False)
    clipped = torch.cat([tensor.grad.flatten() for tensor in case.arch.values()])
    assert clipped.norm().item() == pytest.approx(clip, rel=1e-4)


def test_backward_computes_no_weight_gradients():
    case = Case("cifar_k4")
    batches = *case.batch("train0"), *case.batch("valid0")
    case.architect.backward(*batches, 0.1, case.optimizer, unrolled=False)
    assert all(weight.grad is None for weight in case.model.weights())
    assert all(tensor.grad is not None for tensor in case.arch.values())


class Replayed(Gradients):
    """Gradients whose graph is the computation itself, run again into the captured tensors."""

    captures = replays = asides = 0

    def graphed(self, input):
        return self.graphs

    def _aside(self, *batch):
        self.asides += 1
        return self._compute(*batch)

    def _capture(self, wanted, input, target):
        self.captures += 1
        own = torch.zeros_like(input), torch.zeros_like(target)
        results = self._compute(wanted, *own)  # as in a capture: of no use before a replay

        def replay():
            self.replays += 1
            loss, logits, gradients = self._compute(wanted, *own)
            for tensor, value in zip(
                [*results[:2], *results[2]], [loss, logits, *gradients], strict=True
            ):
                tensor.copy_(value)

        return SimpleNamespace(replay=replay), *own, results


def test_captured_gradients_are_those_of_each_batch():
    """Warm-up, capture, replay, and a last short batch; the capture itself is a stand-in."""
    torch.manual_seed(0)
    network = model_search.Network(8, 3, 3, nn.CrossEntropyLoss()).double()
    network.train()

    plain, replayed = (kind(network, nn.CrossEntropyLoss()) for kind in (Gradients, Replayed))
    for wanted in (network.weights(), network.arch_parameters()):
        before = kept = None
        for n in (4, 4, 4, 4, 4, 2, 4):
            x, y = torch.randn(n, 3, 16, 16).double(), torch.arange(n) % 3
            mine, its = replayed(wanted, x, y), plain(wanted, x, y)
            for a, b in zip([*mine[:2], *mine[2]], [*its[:2], *its[2]], strict=True):
                torch.testing.assert_close(a, b)
            assert before is None or before[0] is not mine[0]
            if before is not None:  # no replay has written over an earlier result
                torch.testing.assert_close(before[0], kept)
            before, kept = mine, mine[0].clone()
    # each first replay is made once more, to be compared
    assert (replayed.captures, replayed.replays, replayed.asides) == (2, 2 + 6, 8)


def test_a_failed_capture_warns_once_and_goes_on(said):
    network = model_search.Network(8, 3, 3, nn.CrossEntropyLoss())

    class Failing(Replayed):
        def _capture(self, *batch):
            raise RuntimeError("operation not permitted")

    gradients = Failing(network)
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4) % 3
    for _ in range(6):
        gradients(network.arch_parameters(), x, y)
    [record] = said.records
    assert "no CUDA graph (operation not permitted)" in record.getMessage()


def test_frozen_tensors_learn_again_afterwards():
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(1)
    with pytest.raises(KeyError), frozen([a, b]):
        assert not a.requires_grad
        raise KeyError
    assert a.requires_grad and not b.requires_grad


def test_no_weight_gradient_is_computed_in_an_architecture_step():
    case = Case("cifar_k4")
    calls = costs.aten_calls(
        lambda: case.architect.backward(
            *case.batch("train0"), *case.batch("valid0"), 0.1, None, False
        )
    )
    both = costs.aten_calls(lambda: case.model._loss(*case.batch("train0")).backward())
    assert calls["convolution_backward"] < 0.8 * both["convolution_backward"]
