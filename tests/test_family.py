"""What other code of the DARTS family does with networks and an Architect, beside its scripts.

It overrides, replaces, freezes, saves, transforms. Each is compared with the paper's form, or with
what PyTorch does to any module.
"""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import genotypes
import model
import operations
from architect import Architect
from fused.norms import without_tf32
from model_search import Network

ARGS = SimpleNamespace(
    momentum=0.9, weight_decay=3e-4, arch_learning_rate=6e-4, arch_weight_decay=1e-3
)
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0])


def small(fused=True, **more):
    torch.manual_seed(1)
    return Network(8, 3, 3, nn.CrossEntropyLoss(), fused=fused, **more)


def gradients(network, x=X, amp=False):
    """Of all weights, alphas and betas, as one vector."""
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = F.cross_entropy(network(x).float(), Y)
    loss.backward()
    return torch.cat([t.grad.flatten() for t in [*network.arch_parameters(), *network.weights()]])


def architecture_step(architect, unrolled=False):
    optimizer = torch.optim.SGD(architect.model.weights(), 0.1, momentum=0.9)
    architect.step(X, Y, X, Y, 0.1, optimizer, unrolled=unrolled)


# --- names and hooks of the published code ---


def test_a_subclass_draws_its_own_alphas():
    class Mine(Network):
        def _initialize_alphas(self):
            self.alphas_normal, self.alphas_reduce, self.betas_normal, self.betas_reduce = (
                torch.full(size, 5.0, requires_grad=True)
                for size in ((14, 8), (14, 8), (14,), (14,))
            )
            self._arch_parameters = [self.alphas_normal, self.alphas_reduce]

    network = Mine(8, 3, 3, nn.CrossEntropyLoss())
    assert network.alphas_normal.eq(5).all() and network.fused
    assert [id(t) for t in network.arch_parameters()] == [
        id(network.alphas_normal), id(network.alphas_reduce)]  # fmt: skip
    architecture_step(Architect(network, ARGS))
    assert not network.alphas_normal.eq(5).all() and network.betas_normal.eq(5).all()
    assert "alphas_normal" in network.state_dict() and network.double()(X.double()).isfinite().all()


def test_alphas_and_betas_under_their_published_name():
    network = small()
    everything = [*network._arch_parameters]
    assert len(everything) == 4 and everything[0] is network.alphas_normal
    network._arch_parameters = everything[:2]
    assert [id(t) for t in network.arch_parameters()] == [id(t) for t in everything[:2]]
    assert copy.deepcopy(network).arch_parameters()[0] is not network.alphas_normal


def test_an_architect_with_its_own_loss():
    class Penalized(Architect):
        def _backward_step(self, input_valid, target_valid):
            loss = self.model._loss(input_valid, target_valid)
            (loss + 100 * self.model.alphas_normal.square().sum()).backward()

    network, plain = small(), small()
    architecture_step(Penalized(network, ARGS))
    architecture_step(Architect(plain, ARGS))
    difference = network.alphas_normal.grad - plain.alphas_normal.grad
    torch.testing.assert_close(difference, 200 * small().alphas_normal.detach(), atol=1e-4, rtol=0)
    assert torch.equal(network.betas_normal.grad, plain.betas_normal.grad)
    network.alphas_normal.grad.fill_(1e6)  # nothing of a step stays for the next
    architecture_step(Penalized(network, ARGS))
    assert network.alphas_normal.grad.abs().max() < 10


def test_attributes_that_published_code_reads():
    network = small()
    assert (network._C, network._num_classes, network._layers, network._steps) == (8, 3, 3, 4)
    discrete = model.NetworkCIFAR(4, 3, 3, True, genotypes.PC_DARTS_cifar)
    cell = discrete.cells[1]
    assert (discrete._layers, discrete._auxiliary, cell._steps, cell.multiplier) == (3, True, 4, 4)
    assert cell._indices == [node for _, node in genotypes.PC_DARTS_cifar.reduce]
    images = torch.randn(2, 3, 32, 32)
    assert discrete(images)[1].shape == (2, 3)
    discrete._auxiliary = False
    assert discrete(images)[1] is None
    architect = Architect(network, ARGS)
    assert (architect.network_momentum, architect.network_weight_decay) == (0.9, 3e-4)


# --- frozen, replaced, assigned ---


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("name", ["betas_normal", "alphas_reduce", "stem"])
def test_what_is_frozen_stays(name, unrolled):
    network, free = small(), small()
    getattr(network, name).requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    for each in (network, free):
        architecture_step(Architect(each, ARGS), unrolled)
    after = network.state_dict()
    kept = [n for n in after if n.startswith(name) and not n.endswith(("_mean", "_var", "tracked"))]
    assert kept and all(torch.equal(after[n], before[n]) for n in kept)
    assert all(weight.grad is None for weight in network.stem.parameters())
    others = [n for n in ("alphas_normal", "alphas_reduce", "betas_normal") if n != name]
    for other in others:  # a frozen stem is no part of the unrolled step
        mine, its = getattr(network, other).grad, getattr(free, other).grad
        assert torch.equal(mine, its) == (not (name == "stem" and unrolled))


def test_nothing_to_learn_is_no_error():
    network = small()
    for tensor in network.arch_parameters():
        tensor.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    for unrolled in (False, True):
        architecture_step(Architect(network, ARGS), unrolled)
    assert all(
        torch.equal(before[n], getattr(network, n)) for n in ("alphas_normal", "betas_reduce")
    )


def test_alphas_that_are_parameters():
    network = small()
    network.alphas_normal = nn.Parameter(1e-3 * torch.randn(14, 8))
    assert network.arch_parameters()[0] is network.alphas_normal
    assert all(weight is not network.alphas_normal for weight in network.weights())
    assert network.double().alphas_normal.dtype == torch.float64
    assert gradients(network, X.double()).isfinite().all()


@pytest.mark.parametrize(
    ("place", "op"),
    [
        (4, lambda: operations.SepConv(2, 2, 5, 1, 2, affine=False)),
        (6, lambda: operations.DilConv(2, 2, 5, 1, 4, 2, affine=False)),
    ],
    ids=["sep_conv", "dil_conv"],
)
def test_one_operation_with_a_larger_kernel(place, op):
    networks = small().double(), small(fused=False).double()
    replaced = op().double()
    for network in networks:
        network.cells[0]._ops[3]._ops[place] = copy.deepcopy(replaced)
    assert networks[0].cells[0].is_fast()
    ours, plain = (gradients(network, X.double()) for network in networks)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


def test_a_cell_of_none_alone_cannot_be_derived():
    with pytest.raises(ValueError, match="none alone"):
        small(primitives=["none"]).genotype()


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel])
def test_loading_through_a_wrapper(wrap):
    network = small()
    wrapped = wrap(network)
    state = {name: value + 1 for name, value in wrapped.state_dict().items()}
    wrapped.load_state_dict(state, assign=True)
    assert all(tensor.requires_grad for tensor in network.arch_parameters())
    assert network.alphas_normal.mean() > 0.9
    own = network.alphas_normal
    state = {name: value for name, value in state.items() if "alphas" not in name}
    wrapped.load_state_dict(state)
    assert network.alphas_normal is own
    network.betas_normal.requires_grad_(False)
    network.load_state_dict(small().state_dict())
    assert not network.betas_normal.requires_grad and network.alphas_normal.requires_grad


# --- kept, transformed, in few bits ---


def test_maps_that_are_kept_can_be_saved():
    network, maps = small().eval(), []
    for cell in network.cells:
        cell.register_forward_hook(lambda cell, inputs, out: maps.append(out))
    with torch.no_grad():
        network(X)
    file = io.BytesIO()
    torch.save(maps, file)
    file.seek(0)
    loaded = torch.load(file)  # tensors alone
    assert all(torch.equal(a, b) for a, b in zip(loaded, maps, strict=True))
    assert not any(vars(tensor) for tensor in maps)


def test_layers_of_discrete_networks_are_those_of_torch():
    """Tools that count by type(module) see all of them."""
    network = model.NetworkImageNet(4, 3, 3, False, genotypes.PC_DARTS_image)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) > 20 and {type(m) for m in convolutions} == {nn.Conv2d}


def test_each_image_by_itself():
    network = small().eval()
    each = torch.func.vmap(lambda image: network(image[None])[0])(X)
    torch.testing.assert_close(each, network(X), rtol=1e-4, atol=1e-5)
    discrete = model.NetworkCIFAR(4, 3, 3, False, genotypes.PC_DARTS_cifar).eval()
    each = torch.func.vmap(lambda image: discrete(image[None])[0][0])(X)
    torch.testing.assert_close(each, discrete(X)[0], rtol=1e-4, atol=1e-5)


def test_no_images():
    for fused in (True, False):
        assert small(fused).eval()(X[:0]).shape == (0, 3)


def test_hooks_of_saved_tensors_that_are_no_functions():
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone):
        kept = gradients(small())
    assert torch.equal(kept, gradients(small()))


@pytest.mark.parametrize("seed", range(6))
def test_gradients_in_bfloat16(seed):
    """Of maps so small that a channel may hardly vary: its variance must not be lost."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(50 + seed))
    exact = gradients(small(fused=False), x)
    for fused in (True, False):
        error = (gradients(small(fused), x, amp=True) - exact).norm() / exact.norm()
        assert error < 0.15, (fused, error)  # 0.03 to 0.07
    low = small().bfloat16()
    assert low.cells[0].is_fast() and not low.cells[0]._fits(*arch_of(low))
    assert (gradients(low, x.bfloat16()).float() - exact).norm() < 0.15 * exact.norm()


def arch_of(network):
    return network.alphas_normal.softmax(-1), network.edge_weights("normal")


def test_statistics_are_not_taken_in_tf32():
    before = torch.backends.cudnn.allow_tf32
    with without_tf32(torch.device("cuda")):
        if hasattr(torch.backends.cudnn, "conv"):
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        else:  # before torch 2.9
            assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before
    with without_tf32(torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32 == before
