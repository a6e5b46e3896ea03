"""The discrete networks: published figures, names, counts; drop path, odd genotypes, sizes."""

import json

import pytest
import torch
from torch import nn

import genotypes
import recipe
import utils
from genotypes import Genotype
from harness import costs
from model import Cell, NetworkCIFAR, NetworkImageNet
from operations import FactorizedReduce

NETWORKS = {"cifar": NetworkCIFAR, "imagenet": NetworkImageNet}
NAMES = {  # entry of names.json: network
    "NetworkCIFAR C=8 classes=10 layers=6 auxiliary PC_DARTS_cifar": (NetworkCIFAR, 10, 6),
    "NetworkImageNet C=8 classes=20 layers=5 auxiliary PC_DARTS_cifar": (NetworkImageNet, 20, 5),
}
PARAMETERS = {  # genotype: NetworkCIFAR of 20 cells, C=36; NetworkImageNet of 14 cells, C=48
    "PC_DARTS_cifar": (3_634_678, 5_270_560),
    "PC_DARTS_image": (3_721_510, 5_342_464),
    "DARTS_V1": (3_169_414, 4_510_432),
    "DARTS_V2": (3_349_342, 4_718_752),
    "NASNet": (3_830_950, 5_564_320),
    "AmoebaNet": (3_145_078, 4_627_360),
}
SMALL = Genotype([("max_pool_3x3", 0), ("skip_connect", 1)], [2], [("skip_connect", 0)] * 2, [2])
ODD = {
    "one step": SMALL,
    "five steps": Genotype(
        [("sep_conv_3x3", 0), ("dil_conv_3x3", 1), ("skip_connect", 2), ("avg_pool_3x3", 0)]
        + [("max_pool_3x3", 3), ("conv_7x1_1x7", 2), ("skip_connect", 4), ("skip_connect", 0)]
        + [("sep_conv_7x7", 5), ("dil_conv_5x5", 1)],
        range(2, 7),
        [("sep_conv_5x5", 1), ("skip_connect", 0), ("avg_pool_3x3", 2), ("conv_7x1_1x7", 0)]
        + [("dil_conv_5x5", 1), ("skip_connect", 3), ("max_pool_3x3", 4), ("max_pool_3x3", 1)]
        + [("sep_conv_7x7", 0), ("skip_connect", 5)],
        range(2, 7),
    ),
    "concat in any order, of some nodes": Genotype(
        [("sep_conv_3x3", 0), ("skip_connect", 1)] * 3, [4, 2], SMALL.reduce * 3, [3]
    ),
    "an input twice": Genotype(
        [("sep_conv_3x3", 1), ("dil_conv_3x3", 1), ("skip_connect", 2), ("skip_connect", 2)],
        [3],
        [("max_pool_3x3", 0), ("max_pool_3x3", 0), ("sep_conv_3x3", 2), ("avg_pool_3x3", 2)],
        [2, 3],
    ),
}


@pytest.fixture(autouse=True)
def seeded():
    """One thread, as on tensors of a few kilobytes threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def build(kind, arch="PC_DARTS_cifar", C=4, classes=3, layers=3, auxiliary=False):
    genotype = genotypes.load(arch) if isinstance(arch, str) else arch
    return NETWORKS[kind](C, classes, layers, auxiliary, genotype)


def close(actual, expected, tolerance=1e-9):
    """Asserts that the largest error is at most `tolerance` times the largest value."""
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * scale, f"{error:.1e} of {scale:.1e}"


# The published networks


@pytest.mark.parametrize("arch", ["PC_DARTS_cifar", "DARTS_V2"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_logits_are_the_published_ones(kind, arch):
    figures, _ = recipe.golden("eval", f"{kind}/{arch}")
    _, config = recipe.golden("eval", "eval")
    seed, config = config["seed"], config[kind]
    network = build(
        kind, arch, config["C"], config["classes"], config["layers"], config["auxiliary"]
    )
    recipe.fill(network, seed)
    x, _ = recipe.batch(seed, "train0", config["n"], config["size"], config["classes"])
    with torch.no_grad():
        logits, logits_aux = network.eval()(x)
        assert logits_aux is None
        close(logits, figures["logits_eval"])
        logits, logits_aux = network.train()(x)
        close(logits, figures["logits_train"])
        close(logits_aux, figures["logits_aux"])


@pytest.mark.parametrize("entry", NAMES)
def test_names_shapes_and_order_are_the_published_ones(entry):
    expected = json.loads((recipe.GOLDEN / "names.json").read_text())[entry]
    cls, classes, layers = NAMES[entry]
    network = cls(8, classes, layers, True, genotypes.PC_DARTS_cifar)
    actual = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert list(actual.items()) == list(expected.items())
    without = cls(8, classes, layers, False, genotypes.PC_DARTS_cifar)
    assert list(without.state_dict()) == [name for name in expected if "auxiliary" not in name]


@pytest.mark.parametrize("kind", NETWORKS)
def test_weights_are_drawn_in_the_order_of_their_names(kind):
    network = build(kind, auxiliary=True)
    drawn = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, drawn[name]), name


@pytest.mark.parametrize("layers", [3, 4, 5, 8, 20])
@pytest.mark.parametrize("kind", NETWORKS)
def test_two_cells_reduce(kind, layers):
    network = build(kind, layers=layers, auxiliary=True)
    reductions = layers // 3, 2 * layers // 3
    for i, cell in enumerate(network.cells):
        C = 4 * 2 ** sum(i >= r for r in reductions)
        assert cell.multiplier == 4 and cell.preprocess1.op[1].out_channels == C
        factorized = i - 1 in reductions or (i == 0 and kind == "imagenet")
        assert isinstance(cell.preprocess0, FactorizedReduce) == factorized
        first = cell._ops[0].op[1]  # 5 x 5 in the reduction cell, 3 x 3 in the other
        reduces = i in reductions
        assert (first.stride, first.kernel_size) == (
            ((2, 2), (5, 5)) if reduces else ((1, 1), (3, 3))
        )
    assert network.auxiliary_head.features[2].in_channels == 4 * 4 * 4
    maps = []
    network.auxiliary_head.register_forward_hook(lambda m, inputs, y: maps.append(inputs[0]))
    network.cells[reductions[1]].register_forward_hook(lambda m, inputs, y: maps.append(y))
    network(torch.randn(2, 3, *([32] * 2 if kind == "cifar" else [224] * 2)))
    assert len(maps) == 2 and torch.equal(maps[0].relu(), maps[1].relu())


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("arch", PARAMETERS)
def test_parameters(arch, auxiliary):
    with torch.device("meta"):
        cifar = build("cifar", arch, 36, 10, 20, auxiliary)
        imagenet = build("imagenet", arch, 48, 1000, 14, auxiliary)
    networks = cifar, imagenet, nn.DataParallel(cifar)
    millions = tuple(utils.count_parameters_in_MB(network) for network in networks)
    assert millions == tuple(n / 1e6 for n in (*PARAMETERS[arch], PARAMETERS[arch][0]))


@pytest.mark.parametrize(
    ("kind", "arch", "size", "expected"),
    [
        ("cifar", "PC_DARTS_cifar", 32, 556_670_592),
        ("imagenet", "PC_DARTS_cifar", 224, 571_137_408),
        ("imagenet", "PC_DARTS_image", 224, 581_627_328),
    ],
)
def test_multiply_adds(kind, arch, size, expected):
    C, classes, layers = (36, 10, 20) if kind == "cifar" else (48, 1000, 14)
    with torch.device("meta"):
        network = build(kind, arch, C, classes, layers, auxiliary=True)
    assert costs.multiply_adds(network, size) == expected


def test_counting_leaves_the_network_as_it_is():
    network = build("cifar").double().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert costs.multiply_adds(network, 32) == costs.multiply_adds(network, 32) > 0
    assert all(module.training and not module._forward_hooks for module in network.modules())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# State dicts


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_state_dict_of_a_wrapped_network_loads(kind):
    source, network = build(kind, auxiliary=True), build(kind, auxiliary=True)
    state = nn.DataParallel(source).state_dict()
    assert all(name.startswith("module.") for name in state)
    network.load_state_dict(state, strict=True)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_a_state_dict_loads_strictly():
    state = build("cifar", auxiliary=True).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected.*auxiliary_head\.classifier\.bias"):
        build("cifar").load_state_dict(state)
    build("cifar").load_state_dict(state, strict=False)
    del state["classifier.bias"]
    with pytest.raises(RuntimeError, match=r"Missing.*classifier\.bias"):
        build("cifar", auxiliary=True).load_state_dict(state)


# Drop path


def dropped_cell(reduction, p, training=True):
    """A cell's node, its two ops' outputs without drop path, and which images keep them.

    SMALL's cells: max_pool_3x3 + skip_connect, or two skip_connects of stride 2.
    """
    cell = Cell(SMALL, 2, 2, 2, reduction, False).double().train(training)
    s = torch.randn(4000, 2, 4, 4, dtype=torch.float64).relu()
    states = cell.preprocess0(s), cell.preprocess1(s)
    first, second = (op(states[i]) for op, i in zip(cell._ops, cell._indices, strict=True))
    return cell(s, s, p), first, second


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_drop_path_is_per_image_scaled_and_spares_an_identity(p):
    node, pooled, identity = dropped_cell(False, p)
    kept = (node - identity) * (1 - p) / pooled  # 0 or 1, the same all over an image
    assert torch.allclose(kept, kept.round(), atol=1e-6)
    assert torch.equal(kept.round().amin((1, 2, 3)), kept.round().amax((1, 2, 3)))
    share = kept.round()[:, 0, 0, 0]
    assert share.unique().tolist() == [0, 1]
    assert share.mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / 4000) ** 0.5)


def test_drop_path_takes_edges_independently_and_strided_skip_connects_too():
    p = 0.3
    node, first, second = dropped_cell(True, p)
    shares = []
    for a in (0, 1):
        for b in (0, 1):
            match = torch.isclose(node, (a * first + b * second) / (1 - p)).flatten(1).all(1)
            shares.append(match.double().mean().item())
    assert sum(shares) == 1  # every image is one of the four
    assert shares == pytest.approx([p * p, p * (1 - p), (1 - p) * p, (1 - p) ** 2], abs=0.04)


@pytest.mark.parametrize("reduction", [False, True])
def test_drop_path_is_off_outside_training_and_at_0(reduction):
    for p, training in ((0.9, False), (0.0, True)):
        node, first, second = dropped_cell(reduction, p, training)
        assert torch.equal(node, first + second)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_drops_paths_in_all_cells_when_told(kind):
    network = build(kind, "PC_DARTS_cifar", layers=5)
    assert network.drop_path_prob == 0.0
    x = torch.randn(2, 3, 32, 32) if kind == "cifar" else torch.randn(2, 3, 64, 64)
    outputs = []
    for cell in network.cells:
        cell.register_forward_hook(lambda cell, inputs, y: outputs.append(y))
    network(x)
    network.drop_path_prob = 1.0
    network(x)
    before, after = outputs[:5], outputs[5:]
    for i, (cell, full, dropped) in enumerate(zip(network.cells, before, after, strict=True)):
        # Of PC_DARTS_cifar's eight edges one is an identity, in the first node of a normal cell.
        C = cell._ops[0].op[-1].num_features
        assert full[:, C:].abs().amax() > 0 and dropped[:, C:].abs().amax() == 0
        assert (dropped[:, :C].abs().amax() > 0) == (i not in (1, 3))
    logits = network.eval()(x)[0]
    network.drop_path_prob = 0.0
    assert torch.equal(logits, network(x)[0])


# Any genotype, any size


def plain(network, genotype, x):
    """(logits, auxiliary logits) as the formulas stand, with every ReLU where it belongs."""
    s0 = s1 = network.stem(x)
    for i, cell in enumerate(network.cells):
        reduces = i in (len(network.cells) // 3, 2 * len(network.cells) // 3)
        edges, concat = genotype[2:] if reduces else genotype[:2]
        states = [cell.preprocess0(s0), cell.preprocess1(s1)]
        for j in range(len(edges) // 2):
            a, b = 2 * j, 2 * j + 1
            states.append(cell._ops[a](states[edges[a][1]]) + cell._ops[b](states[edges[b][1]]))
        s0, s1 = s1, torch.cat([states[node] for node in concat], dim=1)
        if i == 2 * len(network.cells) // 3:
            head = network.auxiliary_head
            logits_aux = head.classifier(head.features(s1).flatten(1))
    return network.classifier(s1.mean((2, 3))), logits_aux


@pytest.mark.parametrize("name", ODD)
def test_odd_genotypes_are_computed_as_they_stand(name):
    network = build("cifar", ODD[name], layers=4, auxiliary=True).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    weights = list(network.parameters())
    found, expected = network(x), plain(network, ODD[name], x)
    gradients = []
    for outputs in (found, expected):
        loss = sum(logits.square().sum() for logits in outputs)
        gradients.append(torch.autograd.grad(loss, weights, allow_unused=True))
    for logits, true in zip(found, expected, strict=True):
        close(logits, true)
    scale = max(gradient.abs().max() for gradient in gradients[1] if gradient is not None)
    for actual, true in zip(*gradients, strict=True):
        assert (actual is None) == (true is None)  # as of a node that nobody reads
        assert actual is None or (actual - true).abs().max() <= 1e-9 * scale


@pytest.mark.parametrize("name", ODD)
def test_odd_genotypes_train_on_imagenet_sizes(name):
    network = build("imagenet", ODD[name], layers=3, auxiliary=True)
    logits, logits_aux = network(torch.randn(2, 3, 224, 224))
    (logits.square().sum() + logits_aux.square().sum()).backward()
    assert logits.shape == logits_aux.shape == (2, 3)
    assert network.stem0[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind, size", [("cifar", 64), ("imagenet", 256), ("imagenet", 320)])
def test_larger_images_train(kind, size):
    network = build(kind, SMALL, auxiliary=True)
    x = torch.randn(2, 3, size, size)
    assert [y.shape for y in network(x)] == [(2, 3)] * 2
    outputs = []
    network.cells[-1].register_forward_hook(lambda cell, inputs, y: outputs.append(y))
    logits = network.eval()(x)[0]
    close(logits, network.classifier(outputs[0].mean((2, 3))), 1e-5)


@pytest.mark.parametrize("kind, small, smallest", [("cifar", 28, 32), ("imagenet", 192, 224)])
def test_images_too_small_for_the_auxiliary_head(kind, small, smallest):
    network = build(kind, SMALL, auxiliary=True)
    x = torch.randn(2, 3, small, small)
    with pytest.raises(ValueError, match=f"auxiliary head: give images of {smallest} x {smallest}"):
        network(x)
    with pytest.raises(ValueError, match="auxiliary head"):
        network(torch.randn(2, 3, small, 2 * smallest))
    assert network.eval()(x)[0].shape == (2, 3)  # no head outside training
    assert network.train()(torch.randn(2, 3, smallest, smallest))[1].shape == (2, 3)


@pytest.mark.parametrize("kind", NETWORKS)
def test_without_auxiliary_head_there_are_no_auxiliary_logits(kind):
    network = build(kind, SMALL)
    assert network.training and network(torch.randn(2, 3, 64, 64))[1] is None


@pytest.mark.parametrize("layers", [1, 2])
def test_one_or_two_cells_which_all_reduce(layers):
    network = build("cifar", SMALL, layers=layers)
    assert network.classifier.in_features == 4 * 2**layers  # each doubles its channels
    assert network(torch.randn(2, 3, 16, 16))[0].shape == (2, 3)


def test_what_cannot_be_built_or_run_is_said_in_one_line():
    with pytest.raises(ValueError, match=r"^layers=0: give 1 cell or more$"):
        build("cifar", layers=0)
    with pytest.raises(ValueError, match="C_out=7 must be even"):
        build("imagenet", C=7)
    with pytest.raises(genotypes.GenotypeError, match=r"normal\[0\]: unknown op 'conv'"):
        build("cifar", SMALL._replace(normal=[("conv", 0), ("skip_connect", 1)]))
    with pytest.raises(ValueError, match="a map of 15 x 15 cannot be halved"):
        build("cifar", layers=5)(torch.randn(2, 3, 30, 30))


@pytest.mark.parametrize("kind", NETWORKS)
def test_maps_are_channels_last_on_a_cpu(kind):
    network = build(kind)
    layouts = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda m, inputs, y: layouts.append(inputs[0].stride(1) == 1)
            )
    network(torch.randn(2, 3, 64, 64))
    assert layouts and all(layouts)
