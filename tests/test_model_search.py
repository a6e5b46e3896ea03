"""The batched supernet: the published figures, equality of its two forms, state dict, cost."""

import copy
import json
import statistics
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model_search
import recipe
from architect import Architect
from fused.cell import side_by_side
from genotypes import PRIMITIVES
from harness import analysis, costs
from model_search import Network
from operations import OPS, DilConv, Identity, SepConv

ARCH = ["alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce"]
FORMS = ("plain", "fused")  # the paper's form, and the fast one
BOTH = pytest.mark.parametrize("form", FORMS)
GOLDEN = {  # case: (file, arguments)
    "cifar_k4": ("pcdarts", {}),
    "imagenet_k2": ("pcdarts", dict(k=2, stem="imagenet")),
    "darts_k1": ("darts", dict(k=1, edge_norm=False)),
}
NAMES = {  # entry of names.json: arguments
    "search cifar C=8 layers=5 classes=10 k=4": dict(C=8, num_classes=10, layers=5),
    "search imagenet C=8 layers=5 classes=20 k=2": dict(
        C=8, num_classes=20, layers=5, k=2, stem="imagenet"
    ),
}


@pytest.fixture(autouse=True)
def one_thread():
    """On tensors of a few kilobytes threads only wait for each other, long where others compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(form, C=4, num_classes=3, layers=3, k=1, **arguments):
    criterion, fused = nn.CrossEntropyLoss(), form == "fused"
    network = Network(C, num_classes, layers, criterion, k=k, fused=fused, **arguments)
    assert network.fused == fused
    return network


def arch(network):
    """{name: tensor} of alphas and betas."""
    return dict(zip(ARCH, network.arch_parameters(), strict=False))


def close(actual, expected, what="", tolerance=1e-9):
    """The largest error is at most `tolerance` times the largest value (1e-6 or more)."""
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    error, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * max(scale, 1e-6), f"{what}: {error:.1e} of {scale:.1e}"


def one_line(info, *words):
    message = str(info.value)
    assert message.isprintable() and all(word in message for word in words), message


def batch(n, size, classes, seed=0):
    """Images (n, 3, *size) in float64 and labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, *size, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, classes, (n,), generator=generator)


def twins(seed=0, **arguments):
    """A plain and a fused network, float64, with the same weights, alphas and betas."""
    torch.manual_seed(seed)
    networks = [build(form, **arguments).double() for form in FORMS]
    networks[1].load_state_dict(networks[0].state_dict())
    for tensors in zip(*(network.arch_parameters() for network in networks), strict=True):
        values = torch.randn(tensors[0].shape, dtype=torch.float64)
        for tensor in tensors:  # the same in both
            tensor.data = values.clone()
    return networks


def gradients(network, names):
    """{name in the state dict: gradient} of the weights `names`, and those of alphas and betas."""
    double = copy.deepcopy(network)
    with torch.no_grad():
        for mine, its in zip(network.parameters(), double.parameters(), strict=True):
            its.copy_(mine.grad)
    state = double.state_dict()
    found = {name: state[name] for name in names}
    return found | {name: tensor.grad for name, tensor in arch(network).items()}


def figures(network, names, n, size, classes):
    """All there is to see of two batches in training and an image in evaluation, and the state."""
    found = {}
    for step, training in enumerate([True, True, False]):
        images, labels = batch(n if training else 1, size, classes, seed=step)
        network.train(training)
        network.zero_grad()
        for tensor in network.arch_parameters():
            tensor.grad = None
        logits = network(images)
        F.cross_entropy(logits, labels).backward()
        found[f"{step} logits"] = logits
        for name, gradient in gradients(network, names).items():
            found[f"{step} gradient {name}"] = gradient.clone()
    state = network.state_dict()
    return found | {f"state {name}": state[name] for name in state if name not in ARCH}


def assert_equal(n=3, size=(8, 8), **arguments):
    """Both networks give the same figures; returns them."""
    networks = twins(**arguments)
    names = [name for name, _ in networks[0].named_parameters()]
    classes = networks[0].classifier.out_features
    expected, actual = (figures(network, names, n, size, classes) for network in networks)
    assert actual.keys() == expected.keys()
    for name in expected:
        close(actual[name], expected[name], name)
    return networks


# The published figures


def filled(form, case):
    """(the network of a golden case in float64, its batch valid0, the figures)."""
    file, arguments = GOLDEN[case]
    found, config = recipe.golden(file, case)
    seed, n, size, classes = (config[key] for key in ("seed", "n", "size", "classes"))
    network = build(form, config["C"], classes, config["layers"], **({"k": 4} | arguments))
    return recipe.fill(network, seed), recipe.batch(seed, "valid0", n, size, classes), found


@BOTH
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_evaluation(case, form):
    network, (images, _), found = filled(form, case)
    close(network.eval()(images), found["logits_eval"])


@BOTH
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_training(case, form):
    network, (images, labels), found = filled(form, case)
    names = list(arch(network))
    assert sorted(f"grad_{name}" for name in names) == sorted(n for n in found if "grad_" in n)
    logits = network(images)
    loss = F.cross_entropy(logits, labels)
    close(logits, found["logits_train"])
    close(loss, found["loss_train"])
    values = torch.autograd.grad(loss, network.arch_parameters())
    for name, gradient in zip(names, values, strict=True):
        close(gradient, found[f"grad_{name}"], name)


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_genotype_of_the_case(case):
    network, _, found = filled("fused", case)
    assert str(network.genotype()) == str(found["genotype"])


# Equality of the forms, beyond the sizes of the published figures


@pytest.mark.parametrize(
    "arguments",
    [
        dict(k=1, C=4, layers=3, num_classes=3, steps=2, multiplier=1, n=3, size=(8, 12)),
        dict(k=1, C=4, layers=4, num_classes=2, edge_norm=False, n=5),
        dict(k=2, C=12, layers=5, num_classes=7, steps=3, multiplier=2, stem_multiplier=1, n=3),
        dict(k=4, C=8, layers=3, num_classes=5, steps=5, multiplier=4, n=3, size=(12, 8)),
        dict(k=8, C=16, layers=3, num_classes=4, edge_norm=False, n=3),
        dict(k=1, C=2, layers=3, stem="imagenet", edge_norm=False, n=3, size=(64, 64)),
        dict(k=2, C=8, layers=4, stem="imagenet", steps=2, multiplier=2, n=3, size=(64, 96)),
        dict(k=4, C=24, layers=3, stem="imagenet", steps=3, multiplier=3, n=3, size=(96, 64)),
        dict(k=8, C=16, layers=3, stem="imagenet", n=2, size=(64, 64)),
    ],
    ids=lambda arguments: " ".join(f"{k}={v}" for k, v in arguments.items()),
)
def test_the_forms_are_equal(arguments):
    assert_equal(**arguments)


def test_the_forms_train_alike():
    networks = twins(C=8, k=4)
    for network in networks:
        weights = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=3e-4)
        architecture = torch.optim.Adam(network.arch_parameters(), 0.1, (0.5, 0.999))
        for step in range(3):
            images, labels = batch(4, (8, 8), 3, seed=step)
            weights.zero_grad()
            architecture.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            weights.step()
            architecture.step()
    expected = networks[0].state_dict() | arch(networks[0])
    actual = networks[1].state_dict()
    assert actual.keys() == expected.keys()
    for name in expected:
        close(actual[name], expected[name], name)


def test_memory_format_and_requires_grad_of_images_change_nothing():
    network = twins(C=8, k=2)[1]
    images, _ = batch(3, (8, 8), 3)
    expected = network(images)
    close(network(images.to(memory_format=torch.channels_last)), expected)
    images.requires_grad_()
    network.eval()(images).sum().backward()
    reference = twins(C=8, k=2)[0]
    reference.load_state_dict({n: v for n, v in network.state_dict().items() if n not in ARCH})
    again = images.detach().clone().requires_grad_()
    reference.eval()(again).sum().backward()
    close(images.grad, again.grad)


def test_float32_is_near_float64():
    network = twins(C=16, k=4)[1]
    images, _ = batch(8, (16, 16), 3)
    expected = network(images)
    close(network.float()(images.float()), expected.float(), tolerance=1e-4)


@BOTH
def test_images_whose_maps_become_odd_are_refused(form):
    with pytest.raises(ValueError) as info:
        build(form)(torch.zeros(2, 3, 30, 30))
    one_line(info, "15 x 15")


# Gradients


def test_two_backwards_through_one_graph_add_up():
    network = twins(k=2)[1]
    loss = network._loss(*batch(3, (8, 8), 3))
    tensors = network.arch_parameters() + network.weights()
    once = torch.autograd.grad(loss, tensors, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for tensor, gradient in zip(tensors, once, strict=True):
        close(tensor.grad, 2 * gradient)


def test_gradients_of_alphas_and_betas_alone_are_the_same():
    network = twins(k=2)[1]
    images, labels = batch(3, (8, 8), 3)
    network._loss(images, labels).backward()
    alone = torch.autograd.grad(network._loss(images, labels), network.arch_parameters())
    for (name, tensor), gradient in zip(arch(network).items(), alone, strict=True):
        close(gradient, tensor.grad, name)


def test_second_derivatives_are_right_or_refused():
    found = []
    for network in twins(k=2):
        loss = network._loss(*batch(3, (8, 8), 3))
        try:
            first = torch.autograd.grad(loss, network.arch_parameters(), create_graph=True)
            square = sum(gradient.square().sum() for gradient in first)
            found.append(torch.autograd.grad(square, network.arch_parameters()))
        except RuntimeError as error:
            assert "differentia" in str(error)
    assert found  # the plain form's, at least
    for second in found[1:]:
        for gradient, expected in zip(second, found[0], strict=True):
            close(gradient, expected)


# State dict


@pytest.mark.parametrize("case", NAMES)
@BOTH
def test_names_and_shapes_are_the_released_ones(case, form):
    expected = json.loads((recipe.GOLDEN / "names.json").read_text())[case]
    expected |= dict(zip(ARCH, [[14, 8], [14, 8], [14], [14]], strict=True))
    network = build(form, **({"k": 4} | NAMES[case]))
    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    assert shapes == expected


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("arguments", [dict(C=8, k=4), dict(edge_norm=False)], ids=str)
def test_a_released_state_dict_loads(arguments, prefix):
    released = recipe.fill(build("plain", **arguments), 5).state_dict()
    network = build("fused", **arguments).double()
    before = {name: tensor.clone() for name, tensor in arch(network).items()}
    released = {name: value for name, value in released.items() if name not in ARCH}
    result = network.load_state_dict({prefix + n: v for n, v in released.items()}, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    state = network.state_dict()
    assert state.keys() == released.keys() | before.keys()
    for name, value in (released | before).items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize(
    "name",
    [
        "stem.0.weight",
        "cells.0.preprocess1.op.1.weight",
        "cells.1._ops.2._ops.4.op.5.weight",
        "cells.1._ops.0._ops.3.conv_2.weight",
        "cells.2._ops.9._ops.1.1.running_var",
        "cells.0._ops.13._ops.6.op.3.num_batches_tracked",
        "alphas_normal",
        "betas_reduce",
    ],
)
def test_a_wrong_shape_is_named(name):
    network = build("fused")
    state = network.state_dict()
    state[name] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=rf"size mismatch for {name}\b"):
        network.load_state_dict(state)


@pytest.mark.parametrize(
    "name",
    [
        "foo",
        "foo.weight",
        "stem.0.bias",
        "cells.3.weight",
        "cells.0.foo",
        "cells.0.foo.weight",
        "cells.0.preprocess0.op.2.weight",
        "cells.0._ops.14.weight",
        "cells.0._ops.0._ops.8.0.weight",
        "cells.0._ops.0._ops.4.op.9.weight",
        "cells.0._ops.0._ops.3.conv_1.weight",
        "cells.0.depthwise.0",
        "cells.0.middle_mean",
        "cells.0.eye",
        "alphas",
    ],
)
def test_an_unexpected_key_is_named(name):
    network = build("fused")
    state = network.state_dict() | {name: torch.zeros(1)}
    with pytest.raises(RuntimeError, match=rf'Unexpected key.*"{name}"'):
        network.load_state_dict(state)
    assert network.load_state_dict(state, strict=False).unexpected_keys == [name]


@pytest.mark.parametrize(
    "name",
    [
        "stem.0.weight",
        "cells.0.preprocess1.op.1.weight",
        "cells.1._ops.2._ops.4.op.5.weight",
        "cells.1._ops.0._ops.3.conv_2.weight",
        "cells.2._ops.9._ops.1.1.running_var",
        "classifier.bias",
    ],
)
def test_a_missing_key_is_named(name):
    network = build("fused")
    state = network.state_dict()
    del state[name]
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{name}"'):
        network.load_state_dict(state)
    assert network.load_state_dict(state, strict=False).missing_keys == [name]


def test_state_through_a_file(tmp_path):
    arguments = dict(C=8, k=4)
    network = recipe.fill(build("fused", **arguments), 6)
    images, _ = batch(3, (8, 8), 3)
    network(images)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    other = build("fused", **arguments).double()
    tensors = arch(other)
    other.load_state_dict(state)
    mine, its = network.state_dict(), other.state_dict()
    assert list(mine) == list(its) and all(torch.equal(mine[name], its[name]) for name in mine)
    assert torch.equal(network.eval()(images), other.eval()(images))
    for name, tensor in tensors.items():  # loaded in place
        assert getattr(other, name) is tensor and tensor.is_leaf and tensor.requires_grad
    values = sum(value.numel() * value.element_size() for value in network.parameters())
    assert (tmp_path / "weights.pt").stat().st_size < 6 * values  # mostly names and statistics


def test_a_state_dict_kept_as_a_copy_restores_the_network():
    network = recipe.fill(build("fused", C=8, k=4), 7)
    images, labels = batch(3, (8, 8), 3)
    kept = copy.deepcopy(network.state_dict())
    expected = network(images).detach()
    optimizer = torch.optim.SGD(network.weights() + network.arch_parameters(), 0.1)
    network._loss(images, labels).backward()
    optimizer.step()
    state = network.state_dict()
    moving = [n for n in kept if n.endswith(("weight", "bias", "_mean", "_var", *ARCH))]
    assert all(not torch.equal(state[name], kept[name]) for name in moving)
    assert not torch.equal(network(images), expected)
    network.load_state_dict(kept)
    assert torch.equal(network(images), expected)


# What is in it


@BOTH
@pytest.mark.parametrize(
    "weights, arguments",
    [
        (299_578, dict(C=16, num_classes=10, layers=8, k=4)),
        (956_512, dict(C=16, num_classes=1000, layers=8, k=2, stem="imagenet")),
        (1_930_618, dict(C=16, num_classes=10, layers=8, k=1)),
    ],
    ids=str,
)
def test_sizes(weights, arguments, form):
    network = build(form, **arguments)
    assert sum(p.numel() for p in network.parameters()) == weights
    assert sum(tensor.numel() for tensor in network.arch_parameters()) == 252


def test_alphas_and_betas_are_no_weights():
    network = build("fused")
    assert [name for name in ARCH if hasattr(network, name)] == ARCH == list(arch(network))
    for name, tensor in arch(network).items():
        assert getattr(network, name) is tensor and tensor.is_leaf and tensor.requires_grad
    assert not {id(p) for p in network.parameters()} & {id(t) for t in network.arch_parameters()}
    assert [id(p) for p in network.weights()] == [id(p) for p in network.parameters()]
    plain = build("fused", edge_norm=False)
    assert list(arch(plain)) == ARCH[:2] and not set(ARCH[2:]) & plain.state_dict().keys()


def test_alphas_and_betas_start_small():
    torch.manual_seed(0)
    networks = [build("fused") for _ in range(2)]
    values = torch.cat([t.detach().flatten() for n in networks for t in n.arch_parameters()])
    assert values.numel() == 504
    assert abs(values.mean()) < 2e-4 and 0.85e-3 < values.std() < 1.15e-3
    assert values.unique().numel() > 500


def test_weights_start_as_the_operations_initialize_them():
    """Same distribution as the plain form's: uniform, bound 1 / sqrt(fan in)."""
    torch.manual_seed(0)
    states = [build(form, C=16).state_dict() for form in FORMS]
    kinds = {}
    for name in states[0]:
        if name.endswith("weight") and "_ops" in name:
            parts = name.split("._ops.")
            kinds.setdefault((parts[0], parts[2]), []).append(name)
    assert kinds
    for kind, names in kinds.items():
        one, other = (torch.cat([s[n].flatten() for n in names]) for s in states)
        bound = one[0].numel() / states[0][names[0]][0].numel() ** 0.5
        for values in (one, other):
            assert values.abs().max() <= bound, kind
            assert abs(values.square().mean() * 3 / bound**2 - 1) < 0.35, kind


def test_alphas_and_betas_stay_the_same_tensors():
    network = build("fused")
    tensors = arch(network)
    optimizer = torch.optim.Adam(network.arch_parameters(), 0.1)
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    for moved in (network.double(), network.to("cpu"), network.to(torch.float32), network.double()):
        assert moved is network
        for name, tensor in tensors.items():
            assert getattr(network, name) is tensor and tensor.is_leaf and tensor.requires_grad
            assert network.get_buffer(name) is tensor
            assert tensor.dtype == tensor.grad.dtype == network.classifier.weight.dtype
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer.step()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float64
        assert not torch.equal(network.state_dict()[name], before[name])
        assert torch.equal(network.state_dict()[name], tensor)


def test_deepcopy():
    network = twins(k=2)[1]
    other = copy.deepcopy(network)
    images, labels = batch(3, (8, 8), 3)
    assert torch.equal(network(images), other(images))
    other._loss(images, labels).backward()
    for mine, its in zip(network.arch_parameters(), other.arch_parameters(), strict=True):
        assert its.is_leaf and its.requires_grad and its.grad is not None and mine.grad is None
        assert mine.data_ptr() != its.data_ptr()
    assert list(arch(other)) == ARCH and other.alphas_normal is arch(other)["alphas_normal"]


@pytest.mark.parametrize("edge_norm", [True, False])
def test_new_has_the_same_alphas_and_betas_and_fresh_weights(edge_norm):
    arguments = dict(C=8, num_classes=5, layers=4, k=2, steps=3, multiplier=2, stem_multiplier=2)
    network = build("fused", stem="imagenet", edge_norm=edge_norm, **arguments).double()
    other = network.new()
    mine, its = network.state_dict(), other.state_dict()
    assert {n: (v.shape, v.dtype) for n, v in mine.items()} == {
        n: (v.shape, v.dtype) for n, v in its.items()
    }
    for name, tensor in arch(other).items():
        assert torch.equal(tensor, arch(network)[name]) and tensor is not arch(network)[name]
        assert tensor.data_ptr() != arch(network)[name].data_ptr()
        assert tensor.is_leaf and tensor.requires_grad
    for name in mine:
        if name.endswith("weight") and mine[name].dim() > 1:
            assert not torch.equal(mine[name], its[name]), name
    assert network.genotype() == other.genotype()
    images, labels = batch(2, (64, 64), 5)
    close(other._loss(images, labels), F.cross_entropy(other(images), labels))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(C=6, k=4), ["6 / 4"]),
        (dict(C=12, k=4), ["12 / 4"]),
        (dict(C=3), ["3 / 1"]),
        (dict(C=8, k=0), ["8 / 0"]),
        (dict(C=0), ["0 / 1"]),
        (dict(layers=0), ["layers=0"]),
        (dict(multiplier=5), ["multiplier=5", "steps=4"]),
        (dict(multiplier=0), ["multiplier=0"]),
        (dict(steps=0, multiplier=0), ["multiplier=0"]),
        (dict(stem="vit"), ["'vit'", "cifar", "imagenet"]),
    ],
    ids=str,
)
def test_arguments_that_make_no_network(arguments, words):
    with pytest.raises(ValueError) as info:
        build("fused", **arguments)
    one_line(info, *words)


@BOTH
@pytest.mark.parametrize("layers", [1, 2])
def test_one_or_two_cells_which_all_reduce(form, layers):
    network, (x, y) = build(form, layers=layers), (torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    assert [cell.reduction for cell in network.cells] == [True] * layers
    network._loss(x, y).backward()
    normal, reduce = network.alphas_normal.grad, network.alphas_reduce.grad
    assert normal is None or not normal.any()
    assert reduce.abs().max() > 0


def test_there_is_one_softmax_of_alphas_and_one_of_betas():
    """Who changes it in a subclass trains, derives and records the same."""

    class Sigmoid(Network):
        def op_weights(self, kind):
            return getattr(self, f"alphas_{kind}").sigmoid()

        def edge_weights(self, kind):
            return getattr(self, f"betas_{kind}").sigmoid()

    torch.manual_seed(0)
    network = Sigmoid(4, 3, 3, nn.CrossEntropyLoss(), k=1).double()
    x = torch.randn(2, 3, 8, 8).double()
    for tensor in network.arch_parameters():
        tensor.data.normal_()
    records = analysis.softmaxes(network)
    for name, tensor in arch(network).items():
        torch.testing.assert_close(records[name], tensor.detach().sigmoid())
    before, genotype = network(x), network.genotype()
    other = Network(4, 3, 3, nn.CrossEntropyLoss(), k=1).double()
    other.load_state_dict(network.state_dict())
    other.op_weights = lambda kind: records[f"alphas_{kind}"]
    other.edge_weights = lambda kind: records[f"betas_{kind}"]
    torch.testing.assert_close(other(x), before)
    assert other.genotype() == genotype


# What it costs, on the default search of CIFAR-10 (float32)


@pytest.fixture(scope="module")
def default():
    """{module name: its default network}."""
    torch.manual_seed(0)
    arguments = dict(C=16, num_classes=10, layers=8, k=4)
    return {form: build(form, **arguments) for form in FORMS}


def images_and_labels(n):
    images, labels = batch(n, (32, 32), 10)
    return images.float(), labels


def kept(network):
    """Megabytes kept for backward, per image, of a batch of 64."""
    images, labels = images_and_labels(64)
    kept = costs.bytes_kept(lambda: network._loss(images, labels), network.parameters())
    return kept / 1e6 / len(images)


def test_bytes_kept_for_backward(default):
    assert kept(default["plain"]) == pytest.approx(39.9, abs=0.2)
    assert kept(default["fused"]) <= 14
    again = build("fused", C=16, num_classes=10, layers=8, k=4, recompute=True)
    assert kept(again) <= 9


SPACES = {
    "published": PRIMITIVES,
    "without sep_conv": [name for name in PRIMITIVES if "sep" not in name],
    "without dil_conv": [name for name in PRIMITIVES if "dil" not in name],
    "without skip_connect": [name for name in PRIMITIVES if "skip" not in name],
}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("k", [1, 2])
def test_recomputing_changes_no_bit(space, k, monkeypatch):
    monkeypatch.setattr(model_search, "PRIMITIVES", SPACES[space])
    images, labels = batch(3, (16, 16), 3)
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        network = build("fused", C=4, k=k, recompute=again).double()
        learning = [*network.weights(), *network.arch_parameters()]
        gradients.append(torch.autograd.grad(network._loss(images, labels), learning))
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_large_tensors_are_not_put_side_by_side():
    small, large = torch.zeros(1, 2, 1, 2**18), torch.zeros(1, 1, 1, 2**21)
    together = side_by_side([small, large, small, small, large])
    assert [tensor.shape[1] for tensor in together] == [2, 1, 4, 1]


def test_float32_rounds_little():
    """Logits in training against those of float64; E[y^2] - E[y]^2 rounds more than edge by edge.

    (Gradients of alphas jump where rounding moves a ReLU or a maximum, in the plain form too.)
    """
    torch.manual_seed(0)
    network = build("fused", C=16, layers=8, k=4)
    images, _ = batch(16, (16, 16), 3)
    with torch.no_grad():
        single = network(images.float() + 3)
        close(single.double(), network.double()(images + 3), tolerance=2e-5)


def test_channels_without_variance_give_no_nan():
    network = build("fused", C=8, k=2)
    loss = network._loss(torch.full((4, 3, 16, 16), 50.0), torch.tensor([0, 1, 2, 0]))
    learning = [*network.weights(), *network.arch_parameters()]
    gradients = torch.autograd.grad(loss, learning)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.slow
def test_bfloat16_leads_to_the_alphas_of_float32():
    """softmax(alpha) and softmax(beta) after 20 steps of a search within 2 %."""
    results = []
    for amp in (False, True):
        torch.manual_seed(0)
        network = build("fused", C=8, layers=4, k=4)
        args = SimpleNamespace(
            momentum=0.9,
            weight_decay=3e-4,
            arch_learning_rate=6e-4,
            arch_weight_decay=1e-3,
            amp=amp,
        )
        architect = Architect(network, args)
        optimizer = torch.optim.SGD(network.weights(), 0.1, 0.9, weight_decay=3e-4)
        for step in range(20):
            torch.manual_seed(step)
            labels = torch.arange(32) % 3
            images = torch.randn(32, 3, 16, 16) + labels[:, None, None, None]
            architect.step(images, labels, images.flip(3), labels, 0.1, optimizer, False)
            for weight, value in zip(
                network.weights(),
                architect.gradients(network.weights(), images, labels)[2],
                strict=True,
            ):
                weight.grad = value
            optimizer.step()
        results.append([tensor.detach().softmax(-1) for tensor in network.arch_parameters()])
    for exact, rounded in zip(*results, strict=True):
        assert ((rounded - exact).abs() / exact).max() < 0.02
        assert not torch.equal(rounded, exact)


def test_aten_calls(default):
    images, labels = images_and_labels(2)
    calls = costs.aten_calls(lambda: default["fused"]._loss(images, labels).backward())
    assert 1_000 < calls.total() <= 4_500, calls
    plain_calls = costs.aten_calls(lambda: default["plain"]._loss(images, labels).backward())
    assert plain_calls.total() > 2 * calls.total()


def test_forward_and_backward_take_half_the_time(default):
    """Medians of three rounds, on one thread, by the time of this process on the CPU."""
    images, labels = images_and_labels(32)
    seconds = {name: [] for name in default}
    for network in default.values():  # warms up
        network._loss(images[:2], labels[:2]).backward()
    for _ in range(3):
        for name, network in default.items():
            start = time.process_time()
            network._loss(images, labels).backward()
            seconds[name].append(time.process_time() - start)
    old, new = (statistics.median(times) for times in seconds.values())
    assert 2 * new <= old, f"{new:.2f} s against {old:.2f} s"


def test_measure_counts_what_is_computed_and_kept():
    x = torch.randn(4, 6)
    calls = costs.aten_calls(lambda: x.t()[1:].reshape(-1).sin().view(4, 5).unsqueeze(0).sum())
    assert calls == {"clone": 1, "sin": 1, "sum": 1}
    assert costs.aten_calls(lambda: torch.zeros(3).add_(1)) == {"zeros": 1, "add_": 1}
    w = torch.randn(100, requires_grad=True)
    both = costs.bytes_kept(lambda: (w.exp() * w).sum(), [w])  # exp's output, for two ops
    assert both == 400 and costs.bytes_kept(lambda: (w.exp() * w).sum()) == 800

    class Holds(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.inside = {"list": [x * 2, x * 3]}
            ctx.closure = lambda: ctx.inside
            return x * 4

    assert costs.bytes_kept(lambda: Holds.apply(w).sum()) == 800  # which no hook sees


# The list of operations is the user's


class Gate(nn.Module):
    """A user's operation: weights, statistics, and a stride."""

    def __init__(self, C, stride):
        super().__init__()
        self.conv = nn.Conv2d(C, 2 * C, 3, stride, 1)
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x):
        value, gate = self.conv(x).chunk(2, 1)
        return self.norm(value * gate.sigmoid())


USERS = {
    "gate": lambda C, stride, affine: Gate(C, stride),
    "lp_pool_3x3": lambda C, stride, affine: nn.Sequential(
        nn.ZeroPad2d(1), nn.LPPool2d(2, 3, stride)
    ),
    "max_pool_5x5": lambda C, stride, affine: nn.MaxPool2d(5, stride, 2),
    "blur_3x3": lambda C, stride, affine: nn.AvgPool2d(3, stride, 1),
    "dil_conv_3x3_4": lambda C, stride, affine: DilConv(C, C, 3, stride, 4, 4, affine=affine),
    "sep_conv_1x1": lambda C, stride, affine: SepConv(C, C, 1, stride, 0, affine=affine),
    "sep_conv_affine": lambda C, stride, affine: SepConv(C, C, 3, stride, 1),
    "halve": lambda C, stride, affine: Identity() if stride == 1 else nn.AvgPool2d(2),
}


class Noisy(nn.Module):
    """A user's operation with dropout."""

    def __init__(self, stride):
        super().__init__()
        self.pool, self.dropout = nn.AvgPool2d(3, stride, 1), nn.Dropout(0.3)

    def forward(self, x):
        return self.dropout(self.pool(x))


class Unregistered(nn.Module):
    """A user's operation with a tensor that does not move with it."""

    def __init__(self, stride):
        super().__init__()
        self.pool, self.scale = nn.AvgPool2d(3, stride, 1), torch.ones(1, 1, 1, 1)

    def forward(self, x):
        return self.pool(x) * self.scale


USERS["unregistered"] = lambda C, stride, affine: Unregistered(stride)
USERS["noisy"] = lambda C, stride, affine: Noisy(stride)


@pytest.fixture
def primitives(monkeypatch):
    """A function that makes its arguments the operations that are searched."""
    for name, op in USERS.items():
        monkeypatch.setitem(OPS, name, op)
    before = list(PRIMITIVES)

    def replace(*names):
        PRIMITIVES[:] = names

    yield replace
    PRIMITIVES[:] = before


def test_an_operation_that_draws_random_numbers_leaves_the_others_fast(primitives):
    primitives(*PRIMITIVES, "noisy")
    network = Network(8, 3, 3, nn.CrossEntropyLoss())
    assert network.fused and all(cell.is_fast() for cell in network.cells), network.why_plain


def test_an_operation_whose_tensor_is_no_buffer_is_told_to_register_it(primitives):
    primitives(*PRIMITIVES, "unregistered")
    network = Network(8, 3, 3, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="register the tensors of your operations as buffers"):
        costs.check_size(network, 32)


@pytest.mark.parametrize(
    "names",
    [
        "sep_conv_7x7",
        "gate",
        "lp_pool_3x3",
        "max_pool_5x5",
        "blur_3x3",
        "conv_7x1_1x7",
        "sep_conv_affine",
        "halve",
        "dil_conv_3x3_4 sep_conv_1x1 gate lp_pool_3x3",
    ],
)
def test_an_added_operation_is_searched(names, primitives):
    primitives(*PRIMITIVES, *names.split())
    network = assert_equal(C=8, k=2, steps=3, multiplier=3)[1]
    for o, name in list(enumerate(PRIMITIVES))[8:]:
        for alphas in network.arch_parameters()[:2]:
            alphas.data.zero_()
            alphas.data[:, o] = 1
        gene = network.genotype()
        assert {op for op, _ in gene.normal + gene.reduce} == {name}


@pytest.mark.parametrize(
    "names",
    [
        "none skip_connect sep_conv_3x3",
        "max_pool_3x3 skip_connect dil_conv_3x3",
        "none max_pool_3x3 avg_pool_3x3 skip_connect",
        "none avg_pool_3x3 sep_conv_3x3 sep_conv_5x5 dil_conv_5x5",
        "none dil_conv_3x3 dil_conv_5x5",
        "none skip_connect",
        "skip_connect",
        "max_pool_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "none gate",
        "none conv_7x1_1x7",
        "gate lp_pool_3x3 blur_3x3",
        "blur_3x3 skip_connect",
        "dil_conv_5x5 skip_connect sep_conv_3x3 avg_pool_3x3 none sep_conv_5x5 max_pool_3x3",
        "skip_connect sep_conv_3x3 none skip_connect sep_conv_3x3 max_pool_3x3 max_pool_3x3",
    ],
)
def test_other_lists_of_operations(names, primitives):
    primitives(*names.split())
    for k in (1, 2) if len(PRIMITIVES) < 3 else (2,):
        network = assert_equal(C=4 * k, k=k, steps=3, multiplier=2)[1]
    gene = network.genotype()
    assert {op for op, _ in gene.normal + gene.reduce} <= set(names.split()) - {"none"}


# genotype()


@pytest.mark.parametrize("i", range(20))
def test_golden_genotypes(i):
    found, config = recipe.golden("genotype", "genotype")
    network = build("fused").double()
    for name, tensor in arch(network).items():
        values = recipe.entry(f"{config['seed']}/{i}", name, tuple(tensor.shape))
        tensor.data.copy_(torch.from_numpy((3.0, 1.0, 1e-3)[i % 3] * values))
    assert str(network.genotype()) == str(found["strings"][i])


def flat(**arguments):
    """A network with all alphas and betas zero."""
    network = build("fused", **arguments)
    for tensor in network.arch_parameters():
        tensor.data.zero_()
    return network


def test_of_equal_operations_and_equal_edges_the_first_is_taken():
    gene = flat(edge_norm=False).genotype()
    assert gene.normal == gene.reduce == 4 * [("max_pool_3x3", 0), ("max_pool_3x3", 1)]
    network = flat()
    network.alphas_normal.data[:, [4, 6]] = 2
    network.alphas_normal.data[13, 1] = network.alphas_normal.data[11, 4] = 3
    network.betas_reduce.data[[5, 7, 8]] = 1  # node 4 has the edges 5 to 8
    gene = network.genotype()
    assert gene.normal[:6] == 3 * [("sep_conv_3x3", 0), ("sep_conv_3x3", 1)]
    assert gene.normal[6:] == [("sep_conv_3x3", 2), ("max_pool_3x3", 4)]
    assert gene.reduce[4:6] == [("max_pool_3x3", 0), ("max_pool_3x3", 2)]


def test_the_better_edge_stands_first_and_none_only_weighs_in():
    network = flat()
    network.alphas_normal.data[:, 0] = 9
    network.alphas_normal.data[3, 5] = 2
    network.alphas_normal.data[4, 7] = 1
    network.alphas_normal.data[9, 3] = 8
    network.alphas_normal.data[10, 3] = 7
    network.alphas_normal.data[10, 0] = 0  # a lower alpha, but none takes nothing from it
    assert network.genotype().normal == [
        ("max_pool_3x3", 0), ("max_pool_3x3", 1), ("sep_conv_5x5", 1), ("dil_conv_5x5", 2),
        ("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 1), ("skip_connect", 0),
    ]  # fmt: skip


def test_betas_weigh_the_edges_of_a_node():
    network = flat()
    network.alphas_reduce.data[2, 4] = 2
    network.betas_reduce.data[4] = 3
    network.betas_reduce.data[12] = -1  # softmax is over the edges of one node
    assert network.genotype().reduce == [
        ("max_pool_3x3", 0), ("max_pool_3x3", 1), ("max_pool_3x3", 2), ("sep_conv_3x3", 0),
        ("max_pool_3x3", 0), ("max_pool_3x3", 1), ("max_pool_3x3", 0), ("max_pool_3x3", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("steps, multiplier", [(4, 4), (2, 1), (5, 3)])
def test_concat_is_the_last_nodes(steps, multiplier):
    gene = flat(steps=steps, multiplier=multiplier).genotype()
    assert gene.normal_concat == gene.reduce_concat == range(2 + steps - multiplier, 2 + steps)
    assert len(gene.normal) == len(gene.reduce) == 2 * steps


def test_genotype_leaves_the_network_alone():
    network = twins()[1]
    before = copy.deepcopy(network.state_dict())
    network.genotype()
    assert all(torch.equal(before[n], v) for n, v in network.state_dict().items())
    assert all(t.grad is None and t.requires_grad for t in network.arch_parameters())


def test_alphas_still_learn_after_an_assigned_state_dict():
    first, second = build("fused"), build("fused")
    second.load_state_dict(first.state_dict(), assign=True)
    images, labels = images_and_labels(2)
    second._loss(images, labels % 3).backward()
    assert all(tensor.grad is not None for tensor in second.arch_parameters())


@pytest.mark.parametrize("k", [1, 2])
def test_a_space_of_none_gives_logits(k, monkeypatch):
    monkeypatch.setattr(model_search, "PRIMITIVES", ["none"])
    images, _ = images_and_labels(2)
    assert build("fused", k=k)(images).shape == (2, 3)
