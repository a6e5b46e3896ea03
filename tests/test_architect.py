"""The architecture step against the golden figures and against exact autograd."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import model_search
import recipe
from architect import Architect

CASES = {
    "cifar_k4": ("pcdarts", {}),
    "imagenet_k2": ("pcdarts", {"k": 2, "stem": "imagenet"}),
    "darts_k1": ("darts", {"k": 1, "edge_norm": False}),
}
ARGS = SimpleNamespace(
    momentum=0.9, weight_decay=3e-4, arch_learning_rate=6e-4, arch_weight_decay=1e-3
)
NAMES = ["alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce"]


class Case:
    """A golden case: figures, batches, and a fresh network with architect and optimizer."""

    def __init__(self, name):
        file, arguments = CASES[name]
        self.figures, self.config = recipe.golden(file, name)
        config = self.config
        size = config["C"], config["classes"], config["layers"]
        self.model = model_search.Network(*size, nn.CrossEntropyLoss(), **arguments)
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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("after", [0, 1])
def test_unrolled_gradient_is_the_released_one(name, after):
    case = Case(name)
    if after:  # one SGD step: the momentum buffers count
        case.weight_step("train0")
    batches = *case.batch(f"train{after}"), *case.batch(f"valid{after}")
    weights = [weight.detach().clone() for weight in case.model.weights()]
    case.architect.backward(*batches, 0.1, case.optimizer, unrolled=True)
    for arch, tensor in case.arch.items():
        assert_close(tensor.grad, case.figures[f"unrolled{after}_{arch}"], 1e-9)
    for before, weight in zip(weights, case.model.weights(), strict=True):
        assert torch.equal(before, weight)  # restored bit for bit


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", ["first3", "second3"])
def test_three_search_steps_lead_where_the_released_ones_do(name, order):
    case = Case(name)
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


@pytest.mark.parametrize("name", ["cifar_k4", "darts_k1"])
def test_running_statistics_after_three_steps_are_the_released_ones(name):
    case = Case(name)
    for t, eta in enumerate((0.1, 0.07, 0.03)):
        case.optimizer.param_groups[0]["lr"] = eta
        batches = *case.batch(f"train{t}"), *case.batch(f"valid{t}")
        case.architect.step(*batches, eta, case.optimizer, unrolled=False)
        case.weight_step(f"train{t}")
    images, _ = case.batch("valid0")
    case.model(images)
    logits = case.model.eval()(images)
    assert_close(logits, case.figures["first3_logits_eval"], 1e-9)


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


def test_backward_computes_no_weight_gradients():
    case = Case("cifar_k4")
    batches = *case.batch("train0"), *case.batch("valid0")
    case.architect.backward(*batches, 0.1, case.optimizer, unrolled=False)
    assert all(weight.grad is None for weight in case.model.weights())
    assert all(tensor.grad is not None for tensor in case.arch.values())
