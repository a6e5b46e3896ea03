"""TAS: the search network against golden figures and its plain form; draws, costs, networks."""

import copy
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import recipe
import tas
import tas_plain
from tas import draw, found, loops, shapes
from utils import UserError

GOLDEN, _ = recipe.golden("tas", "tas")
CONFIG = json.loads(str(np.load(recipe.GOLDEN / "tas.npz")["tas/config"]))
CASES = {"width": False, "shape": True}  # search_depth
FORMS = {"as drawn": False, "static": True}


def figure(case, name):
    return torch.from_numpy(np.asarray(GOLDEN[f"{case}/{name}"]))


def names(case, name):
    return {key: tuple(size) for key, size in json.loads(str(GOLDEN[f"{case}/{name}"])).items()}


def shapes_of(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def golden_network(case, static=None):
    network = tas.SearchNetwork(CONFIG["depth"], CONFIG["classes"], CASES[case], static)
    return recipe.fill(network, CONFIG["seed"])


def golden_batch():
    return recipe.batch(*(CONFIG["seed"], "train0", CONFIG["n"], CONFIG["size"], CONFIG["classes"]))


def close(actual, expected, tolerance=1e-9):
    """Relative to the largest value."""
    largest = float(torch.as_tensor(expected).detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)


class Batches(list):
    device = torch.device("cpu")


def test_a_step_moves_the_weights_on_one_half_then_the_attentions_on_the_other(monkeypatch):
    network, events = tas.SearchNetwork(8, 3), []
    search = tas.SearchNetwork.search

    def seen(self, x, tau):
        events.append(float(x[0, 0, 0, 0]))
        return search(self, x, tau)

    monkeypatch.setattr(tas.SearchNetwork, "search", seen)
    optimizers = [
        torch.optim.SGD(tensors, 0.1) for tensors in (network.weights(), network.arch_parameters())
    ]
    for optimizer, name in zip(optimizers, ("weights", "attentions"), strict=True):
        optimizer.register_step_pre_hook(lambda *_, name=name: events.append(name))
    halves = [Batches([(torch.full((2, 3, 8, 8), half), torch.tensor([0, 1]))] * 2)
              for half in (1.0, 2.0)]  # fmt: skip
    args = SimpleNamespace(amp=False, grad_clip=None, flop_ratio=0.5, flop_weight=2.0,
                           tolerance=0.05, report_freq=9)  # fmt: skip
    run = SimpleNamespace(log=SimpleNamespace(info=lambda *_: None), unfinished=None, epoch=0,
                          step=lambda figures: None)  # fmt: skip
    loops.search_epoch(halves[0], iter(halves[1]), network, *optimizers, 1.0, 5.0, args, run)
    assert events == [1.0, "weights", 2.0, "attentions"] * 2


def random_sample(network, seed):
    """A draw of `network` from a seed, and attentions that are not all alike."""
    generator = torch.Generator().manual_seed(seed)

    def noise(rows, columns):
        uniform = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
        return -(-uniform.log()).log()

    sizes = [tuple(attentions.shape) for attentions in network.arch_parameters()]
    with torch.no_grad():
        for attentions in network.arch_parameters():
            attentions.copy_(torch.randn(attentions.shape, generator=generator))
    even = torch.ones(sizes[0])
    sample = {
        "index": torch.multinomial(even, 2, generator=generator),
        "gumbel": noise(*sizes[0]),
    }
    if len(sizes) == 2:
        sample["gumbel_depth"] = noise(*sizes[1])
    return sample


# --- golden figures ---


@pytest.mark.parametrize("case", CASES)
def test_state_dict_has_the_published_names_in_their_order(case):
    network = tas.SearchNetwork(CONFIG["depth"], CONFIG["classes"], CASES[case])
    assert list(shapes_of(network).items()) == list(names(case, "names").items())


@pytest.mark.parametrize("case", CASES)
def test_unpruned_logits(case):
    network = golden_network(case).eval()
    close(network(golden_batch()[0]), figure(case, "logits_full"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_search_logits_expected_loss_and_gradients(case, form):
    network = golden_network(case, FORMS[form])
    wanted = ["index", "gumbel", *(["gumbel_depth"] if CASES[case] else [])]
    sample = {name: figure(case, name) for name in wanted}
    images, labels = golden_batch()
    logits, expected = network.search(images, CONFIG["tau"], sample)
    loss = F.cross_entropy(logits, labels) + CONFIG["flop_weight"] * expected.log()
    loss.backward()
    close(logits, figure(case, "logits_search"))
    close(expected, figure(case, "expected_mmacs")[0])
    close(loss, figure(case, "loss"))
    for attentions, name in zip(network.arch_parameters(), ("width", "depth"), strict=False):
        close(attentions.grad, figure(case, f"grad_{name}_attentions"))


@pytest.mark.parametrize("case", CASES)
def test_derived_network(case):
    depth, classes = CONFIG["depth"], CONFIG["classes"]
    channels, blocks = golden_network(case).derive()
    assert channels == figure(case, "derived_channels").tolist()
    assert blocks == (figure(case, "derived_blocks").tolist() if CASES[case] else None)
    count = tas.multiply_adds(depth, channels, classes, blocks)
    assert count == pytest.approx(figure(case, "derived_mmacs").item(), abs=1e-8)
    on_device = golden_network(case).argmax_multiply_adds()
    assert on_device.item() == pytest.approx(count, rel=1e-12)

    network = tas.PrunedNetwork(depth, channels, classes, blocks)
    assert shapes_of(network) == names(case, "derived_names")
    recipe.fill(network, CONFIG["seed"]).eval()
    close(network(golden_batch()[0]), figure(case, "derived_logits"))


# --- the fast form and the plain one ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "depth, classes, search_depth, size",
    [(8, 3, False, 8), (8, 2, True, 16), (14, 100, True, 12), (26, 5, True, 8), (32, 10, False, 8)],
)
def test_search_is_the_plain_form(depth, classes, search_depth, size, form, training):
    network = tas.SearchNetwork(depth, classes, search_depth, FORMS[form])
    recipe.fill(network, depth).train(training)
    plain = copy.deepcopy(network)
    images, labels = recipe.batch(1, "tas", 3, size, classes)
    for seed, tau in enumerate((10.0, 1.0, 0.1)):
        sample = random_sample(network, seed)
        random_sample(plain, seed)
        fast, slow = (
            network.search(images, tau, sample),
            tas_plain.search(plain, images, tau, sample),
        )
        for logits, expected in (fast, slow):
            (F.cross_entropy(logits, labels) + expected.log()).backward()
        for actual, wanted in zip(fast, slow, strict=True):
            close(actual, wanted, 1e-10)
    for (name, actual), wanted in zip(network.named_parameters(), plain.parameters(), strict=True):
        grad = torch.zeros_like(wanted) if wanted.grad is None else wanted.grad
        assert torch.allclose(actual.grad, grad, rtol=1e-8, atol=1e-9), name
    wanted = plain.state_dict()
    for name, actual in network.state_dict().items():
        assert torch.allclose(actual, wanted[name], rtol=1e-12, atol=1e-13), name


def test_search_float32_is_close_to_float64():
    network = recipe.fill(tas.SearchNetwork(20, 10, True), 3)
    images, _ = recipe.batch(1, "tas", 16, 16, 10)
    sample = random_sample(network, 3)
    wanted, _ = network.search(images, 1.0, sample)
    network.float()
    sample = {name: value.float() if name != "index" else value for name, value in sample.items()}
    actual, _ = network.search(images.float(), 1.0, sample)
    close(actual.double(), wanted, 2e-4)


def test_search_in_bfloat16_keeps_its_statistics_in_float32():
    network = tas.SearchNetwork(8, 10, True)
    images = recipe.batch(1, "tas", 8, 8, 10)[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = network.search(images, 1.0)
    (logits.float().sum() + expected).backward()
    assert logits.dtype == torch.bfloat16 and expected.dtype == torch.float32
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(norm.running_mean.dtype == torch.float32 for norm in norms)
    drawn = sum(norm.num_batches_tracked.item() for norm in norms)
    assert drawn == 2 * (7 + 2)  # 7 convolutions and 2 shortcuts' with two norms each


class OneDevice(TorchDispatchMode):
    """Refuses operations that bring a tensor with values from or to another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if is_map(x)]
        assert len({tensor.device.type for tensor in tensors}) <= 1, func
        return out


def is_map(x):
    return isinstance(x, torch.Tensor) and x.dim() > 0


@pytest.mark.parametrize("search_depth", [False, True])
def test_search_off_the_cpu_reads_no_value_and_moves_none(search_depth):
    """On tensors without values `.item()`, `.tolist()` and `.cpu()` fail: so do they here."""
    network = tas.SearchNetwork(20, 10, search_depth).to("meta")
    with OneDevice():
        logits, expected = network.search(torch.empty(2, 3, 32, 32, device="meta"), 1.0)
        (logits.sum() + expected).backward()
    assert logits.shape == (2, 10) and expected.shape == ()


def test_static_maps_are_zero_beyond_the_drawn_width():
    network = recipe.fill(tas.SearchNetwork(8, 10, static=True), 1)
    seen = []
    search = network.layers[3].search
    network.layers[3].search = lambda x, *rest: seen.append(x) or search(x, *rest)
    sample = random_sample(network, 1)
    sample["index"][:] = torch.tensor([2, 1])
    network.search(recipe.batch(1, "tas", 2, 8, 10)[0], 1.0, sample)
    (x,) = seen
    assert x.shape[1] == 32 and not x[:, 16:].any() and x[:, :16].any()


# --- channel-wise interpolation ---


@pytest.mark.parametrize("C", shapes.STAGES)
def test_cwi_is_adaptive_average_pooling_over_channels(C):
    choices = shapes.width_choices(C)
    table = draw.cwi(choices).double()
    x = torch.randn(5, C, dtype=torch.float64)
    for (i, C_i), (j, C_j) in itertools.product(enumerate(choices), repeat=2):
        wide = max(C_i, C_j)
        expected = F.adaptive_avg_pool1d(x[:, None, :C_i], wide)[:, 0]
        actual = x @ table[i, j].T
        close(actual[:, :wide], expected, 1e-14)
        assert not actual[:, wide:].any()


def test_cwi_by_hand():
    """4 channels to 6: windows [0, 1), [0, 2), [1, 2), [2, 3), [2, 4), [3, 4)."""
    matrix = draw.cwi([4, 6])[0, 1, :6, :4]
    rows = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0]]
    rows += [row[::-1] for row in reversed(rows)]
    assert matrix.tolist() == rows


# --- the draw ---


def test_two_different_choices_with_the_law_of_multinomial():
    """The ordered pair (i, j) has probability p_i p_j / (1 - p_i): chi-square, 55 degrees."""
    torch.manual_seed(0)
    N = 200_000
    p = F.softmax(torch.linspace(-1, 1, 8, dtype=torch.float64), dim=0)
    first, second = draw.two_different(p.expand(N, 8)).T
    assert (first != second).all()
    counts = torch.bincount(8 * first + second, minlength=64).view(8, 8).double()
    expected = N * p[:, None] * p / (1 - p[:, None])
    off = ~torch.eye(8, dtype=torch.bool)
    chi_square = ((counts - expected) ** 2 / expected)[off].sum().item()
    assert 25 < chi_square < 93  # 0.9998 and 0.0010 of chi-square with 55 degrees


def test_gumbel_noise_has_its_mean_and_variance():
    torch.manual_seed(0)
    noise = draw.gumbel(torch.empty(400_000, dtype=torch.float64))
    assert noise.mean().item() == pytest.approx(np.euler_gamma, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_weights_of_a_draw_are_softmax_over_the_two_logits():
    torch.manual_seed(0)
    attentions = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    noise, tau = draw.gumbel(attentions.detach()), 0.7
    index, weights = draw.two_widths(attentions, tau, noise)
    score = attentions.softmax(1) * noise.exp()  # its power 1 / tau is proportional to the weight
    pair = score.gather(1, index) ** (1 / tau)
    close(weights, pair / pair.sum(1, keepdim=True), 1e-12)
    weights[:, 0].sum().backward()
    assert (attentions.grad.abs() > 1e-12).sum(1).eq(2).all()


def test_low_temperature_draws_the_largest_and_gives_it_all():
    torch.manual_seed(0)
    attentions, noise = torch.randn(50, 8), torch.zeros(50, 8)
    index, weights = draw.two_widths(attentions, 1e-3, noise)
    assert index[:, 0].equal(attentions.argmax(1)) and weights[:, 0].gt(0.99).float().mean() > 0.9


def test_the_draw_follows_the_attentions_in_a_search():
    torch.manual_seed(0)
    network = tas.SearchNetwork(8, 2)
    with torch.no_grad():
        network.width_attentions[:] = -100
        network.width_attentions[:, [2, 5]] = 0
    network.search(torch.randn(2, 3, 4, 4), 1.0)
    for module in network.modules():
        if hasattr(module, "BNs"):
            drawn = [i for i, norm in enumerate(module.BNs) if norm.num_batches_tracked]
            assert drawn == [2, 5]


# --- expected multiply-adds ---


def enumerate_expected(network, free, blocks=(None,)):
    """Sum over all networks of probability times multiply-adds; rows not in `free` are decided."""
    depth, classes = network.depth, network.classifier.out_features
    P = network.width_attentions.detach().softmax(1)
    options = [
        [i for i in range(8) if P[row, i] > 1e-12] if row in free else [int(P[row].argmax())]
        for row in range(depth - 1)
    ]
    total = weight = 0.0
    for picks in itertools.product(*options):
        channels = [3, *(int(network.choices[row, i]) for row, i in enumerate(picks))]
        p = math.prod(float(P[row, i]) for row, i in enumerate(picks))
        for counts in blocks:
            q = p
            if counts is not None:
                D = network.depth_attentions.detach().softmax(1)
                places = [network.depth_choices.index(count) for count in counts]
                q *= math.prod(float(D[stage, d]) for stage, d in enumerate(places))
            total += q * tas.multiply_adds(depth, channels, classes, counts)
            weight += q
    assert weight == pytest.approx(1)
    return total


def decide(network, rows, choice, free, options):
    """Attentions: rows take `choice`; the rows `free` spread over the choices `options`."""
    torch.manual_seed(0)
    network.double()
    with torch.no_grad():
        network.width_attentions.fill_(-1e3)
        for row in rows:
            network.width_attentions[row, choice] = 0
        for row in free:
            network.width_attentions[row, options] = torch.randn(len(options)).double()
        if network.depth_attentions is not None:
            network.depth_attentions.normal_()


def test_expected_multiply_adds_is_the_mean_over_all_networks_of_widths():
    """Depth 8: rows 0 stem, 1 a, 2 b, 3 a, 4 b, 5 a, 6 b; 4^5 networks.

    The stem and the first conv_b have one width, since the expectation has no shortcut
    convolutions but those of stride 2. Layers are drawn independently, so the mean of a product of
    two widths is the product of their means.
    """
    network = tas.SearchNetwork(8, 7)
    free = [1, 3, 4, 5, 6]
    decide(network, [0, 2], 3, free, [0, 2, 5, 7])
    expected = network.expected_multiply_adds().item()
    assert expected == pytest.approx(enumerate_expected(network, free), rel=1e-12)


@pytest.mark.parametrize("depth", [14, 20])
def test_expected_multiply_adds_is_the_mean_over_all_networks_of_depths(depth):
    """The widths of a stage's blocks agree and some conv_a are free, for the reason above."""
    network = tas.SearchNetwork(depth, 7, search_depth=True)
    n = network.n
    free = [3, 2 * n + 1, 6 * n - 1]  # conv_a of a block in each stage
    decide(network, [row for row in range(depth - 1) if row not in free], 4, free, [1, 3, 6])
    blocks = list(itertools.product(network.depth_choices, repeat=3))
    expected = network.expected_multiply_adds().item()
    assert expected == pytest.approx(enumerate_expected(network, free, blocks), rel=1e-12)


@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_multiply_adds_follow_the_image(size):
    network = tas.SearchNetwork(14, 10).double()
    with torch.no_grad():
        network.width_attentions.fill_(-1e3)
        network.width_attentions[:, -1] = 0
    images = torch.zeros(2, 3, *size, dtype=torch.float64)
    _, expected = network.search(images, 1.0)
    full = tas.multiply_adds(14, tas.full_channels(14), 10, size=size)
    assert expected.item() == pytest.approx(full, rel=1e-12)


# --- networks ---


@pytest.mark.parametrize(
    "depth, published", [(20, 40.81), (32, 69.12), (56, 125.75), (110, 253.15)]
)
def test_published_multiply_adds(depth, published):
    count = tas.multiply_adds(depth, tas.full_channels(depth), 10)
    assert round(count, 2) == published


def random_channels(depth, seed):
    generator = np.random.RandomState(seed)
    full = tas.full_channels(depth)[1:]
    return [3, *(int(generator.choice(shapes.width_choices(C))) for C in full)]


@pytest.mark.parametrize("blocks", [None, (1, 3, 2), (2, 1, 1)])
def test_multiply_adds_as_built_are_those_of_a_forward_pass(blocks):
    channels = random_channels(20, 5)
    network = tas.PrunedNetwork(20, channels, 10, blocks).eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 16, 24))
    count = tas.multiply_adds(20, channels, 10, blocks, size=(16, 24), as_built=True)
    assert counter.get_total_flops() == pytest.approx(2e6 * count, abs=0.5)


def test_multiply_adds_count_a_dropped_block_as_what_the_next_stage_reads():
    channels = random_channels(20, 5)
    blocks = (1, 3, 3)
    kept, dropped = channels[3], channels[7]  # conv_b of the first and of the third block
    C_a, C_b = channels[8:10]
    difference = (dropped - kept) * (9 * C_a + C_b) * 256 / 1e6
    counts = [tas.multiply_adds(20, channels, 10, blocks, as_built=built) for built in (0, 1)]
    assert kept != dropped and counts[0] - counts[1] == pytest.approx(difference, abs=1e-9)


@pytest.mark.parametrize("search_depth", [False, True])
def test_smallest_ratio_is_that_of_the_smallest_network(search_depth):
    ratio = tas.smallest_ratio(20, 10, search_depth)
    channels = [3, *[4] * 7, *[9] * 6, *[19] * 6]
    blocks = (1, 1, 1) if search_depth else None
    smallest = tas.multiply_adds(20, channels, 10, blocks, as_built=True)
    assert ratio == pytest.approx(smallest / 40.813184)
    counts = [
        tas.multiply_adds(20, random_channels(20, seed), 10, blocks, as_built=True)
        for seed in range(50)
    ]
    assert min(counts) > smallest


@pytest.mark.parametrize("training", [True, False])
def test_unpruned_network_is_the_search_networks_forward(training):
    search = recipe.fill(tas.SearchNetwork(14, 4), 2).train(training)
    pruned = tas.PrunedNetwork(14, tas.full_channels(14), 4).double().train(training)
    state = {
        name: value
        for name, value in search.state_dict().items()
        if "attentions" not in name and ("BNs" not in name or "BNs.7." in name)
    }
    state = {name.replace("BNs.7.", "bn."): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if "downsample.bn" not in name}
    pruned.load_state_dict(state)
    images, _ = recipe.batch(2, "tas", 3, 12, 4)
    close(search(images), pruned(images), 1e-12)


@pytest.mark.parametrize(
    "n, choices",
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (5, [1, 3, 5]),
        (6, [1, 3, 5, 6]),
        (9, [1, 3, 5, 7, 9]),
        (18, [1, 3, 5, 7, 9, 11, 13, 15, 17, 18]),
    ],
)
def test_depth_choices(n, choices):
    assert shapes.depth_choices(n) == choices


def test_parameters_are_attentions_or_weights():
    network = tas.SearchNetwork(20, 10, search_depth=True)
    arch, weights = network.arch_parameters(), network.weights()
    assert [tuple(tensor.shape) for tensor in arch] == [(19, 8), (3, 3)]
    every = {id(tensor) for tensor in network.parameters()}
    assert {id(tensor) for tensor in arch + weights} == every
    assert len(arch) + len(weights) == len(every)
    assert network.width_attentions.std().item() == pytest.approx(0.01, rel=0.3)
    assert len(tas.SearchNetwork(20, 10).arch_parameters()) == 1


def test_state_dict_comes_back_and_gives_the_same_search():
    torch.manual_seed(0)
    network = tas.SearchNetwork(14, 4, search_depth=True)
    images = torch.randn(4, 3, 8, 8)
    network.search(images, 1.0)
    other = tas.SearchNetwork(14, 4, search_depth=True)
    other.load_state_dict(copy.deepcopy(network.state_dict()), strict=True)
    sample = {name: value.float() for name, value in random_sample(network, 1).items()}
    sample["index"] = sample["index"].long()
    random_sample(other, 1)
    for model in (network, other):
        model.eval()
    assert network.search(images, 1.0, sample)[0].equal(other.search(images, 1.0, sample)[0])


# --- losses and schedules ---


@pytest.mark.parametrize(
    "actual, sign", [(15.0, 1), (12.1, 1), (12.0, 0), (10.0, 0), (9.9, -1), (1.0, -1)]
)
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_cost_drives_the_multiply_adds_into_the_band(actual, sign, kind):
    """Target 12, unpruned 40, tolerance 0.05: nothing to pay between 10 and 12."""
    expected = torch.tensor(13.0, requires_grad=True)
    value = tas.cost(expected, kind(actual), 12.0, 40.0)
    value.backward()
    assert value.item() == pytest.approx(sign * math.log(13))
    assert expected.grad.item() == pytest.approx(sign / 13)


def test_distillation_is_its_formula():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    KL = (p * (p / q).log()).sum(1).mean()
    expected = 0.1 * F.cross_entropy(student, target) + 0.9 * 16 * KL
    close(tas.distillation(student, teacher, target), expected, 1e-12)


def test_distillation_within_autocast_is_in_float32():
    """On a CPU log_softmax would stay in bfloat16, which rounds 2.3 to steps of 0.016."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5).bfloat16()
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    expected = tas.distillation(student.double(), teacher.double(), target)
    with torch.autocast("cpu", torch.bfloat16):
        found = tas.distillation(student, teacher, target)
    assert found.dtype == torch.float32
    close(found.double(), expected, 1e-5)


def test_a_draw_of_zero_makes_no_infinite_noise(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x: x.fill_(0))
    index = torch.tensor([[0, 1], [0, 1]])
    _, weights = draw.two_widths(torch.zeros(2, 4), 0.1, index=index)
    assert torch.isfinite(weights).all() and torch.isfinite(draw.gumbel(torch.zeros(3))).all()


def test_limits_of_distillation():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    alone = tas.distillation(student, teacher, target, share=0.0)
    close(alone, F.cross_entropy(student, target), 1e-12)
    same = tas.distillation(teacher, teacher, target, share=1.0)
    close(same, torch.zeros((), dtype=torch.float64), 1e-12)
    # T to infinity: half the mean square of the difference of the centred logits
    difference = (student - student.mean(1, True)) - (teacher - teacher.mean(1, True))
    limit = difference.square().mean(1).mean() / 2
    close(tas.distillation(student, teacher, target, 1e4, share=1.0), limit, 1e-3)


def test_temperatures_fall_from_start_to_end():
    linear = [tas.linear_temperature(epoch, 5) for epoch in range(5)]
    assert linear == pytest.approx([10, 7.525, 5.05, 2.575, 0.1])
    cosine = [tas.cosine_temperature(epoch, 5) for epoch in range(5)]
    half = 9.9 / 2 / math.sqrt(2)
    assert cosine == pytest.approx([10, 5.05 + half, 5.05, 5.05 - half, 0.1])
    assert tas.linear_temperature(0, 1) == tas.cosine_temperature(0, 1) == 10


# --- bad input ---

FULL = tas.full_channels(20)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: tas.SearchNetwork(18, 10), "depth 18 is not 6n + 2"),
        (lambda: tas.SearchNetwork(2, 10), "depth 2 is not 6n + 2"),
        (lambda: tas.smallest_ratio(21, 10), "depth 21 is not 6n + 2"),
        (lambda: tas.PrunedNetwork(20, FULL[:-1], 10), "19 channels, but depth 20 takes 20"),
        (lambda: tas.multiply_adds(20, [1, *FULL[1:]], 10), "begin with 1, not with the image's 3"),
        (lambda: tas.PrunedNetwork(20, [3, 5, *FULL[2:]], 10), "channels[1] is 5, not one of 4, 6"),
        (lambda: tas.PrunedNetwork(20, [*FULL[:-1], 65], 10), "channels[19] is 65, not one of 19,"),
        (lambda: tas.PrunedNetwork(20, FULL, 10, [3, 3]), "2 numbers of blocks, not one for each"),
        (lambda: tas.PrunedNetwork(20, FULL, 10, [3, 4, 3]), "blocks[1] is 4, not in 1 to 3"),
        (lambda: tas.multiply_adds(20, FULL, 10, [0, 1, 1]), "blocks[0] is 0, not in 1 to 3"),
        (lambda: tas.multiply_adds(20, FULL, 10, size=(32, 30)), "images of 32 x 30: height and"),
        (lambda: tas.SearchNetwork(8, 10)(torch.zeros(1, 3, 30, 32)), "images of 30 x 32: height"),
        (lambda: tas.SearchNetwork(8, 10).search(torch.zeros(1, 3, 4, 7), 1.0), "images of 4 x 7"),
        (
            lambda: tas.PrunedNetwork(20, FULL, 10)(torch.zeros(1, 3, 2, 8)),
            "images of 2 x 8: height and width must be multiples of 4",
        ),
    ],
)
def test_bad_input_is_one_line(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value) and "\n" not in str(error.value)


# --- networks to compare with, and the measurement ---


@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.55, 0.93, 1.0])
def test_uniform_network_keeps_one_share_or_two_and_fits(ratio):
    network = found.uniform(20, ratio, 10, 32)
    whole = tas.full_channels(20)
    kept = [round(C / full, 2) for C, full in zip(network.channels, whole, strict=True)][1:]
    shares = [min(shapes.SHARES, key=lambda share: abs(share - k - 0.02)) for k in kept]
    assert ratio - 0.05 <= network.multiply_adds / 40.813184 <= ratio
    assert shares == sorted(shares) and max(shares) - min(shares) < 0.11
    assert network.multiply_adds == pytest.approx(tas.multiply_adds(20, network.channels, 10))
    if ratio == 0.5:  # 0.7 of all
        assert network.channels == [3, *[11] * 7, *[22] * 6, *[44] * 6]
    if ratio == 1.0:
        assert network.channels == whole


def test_random_networks_fit_and_are_those_of_their_seed():
    networks = [found.drawn(20, 0.5, 10, 32, seed) for seed in range(20)]
    for network in networks:
        assert 0.45 <= network.multiply_adds / 40.813184 <= 0.5
        assert network.target == pytest.approx(20.406592)
    assert found.drawn(20, 0.5, 10, 32, 3) == networks[3]
    columns = list(zip(*(network.channels for network in networks), strict=True))
    assert all(len(set(column)) > 3 for column in columns[1:])


@pytest.mark.parametrize("make, text", [
    (lambda: found.uniform(20, 0.05, 10, 32), "the smallest network is above 0.05"),
    (lambda: found.drawn(8, 1.0, 10, 32, 0, tolerance=1e-4), "and none of 1.0 of the unpruned"),
])  # fmt: skip
def test_a_ratio_that_no_network_has_is_one_line(make, text):
    with pytest.raises(UserError) as error:
        make()
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("choice", [0, 4, 7])
def test_the_convolutions_that_are_measured_alone_are_all_of_a_draw(choice):
    network = tas.SearchNetwork(14, 10)
    index = torch.full((13, 2), choice)
    index[:, 0] = 0  # the narrower of the two does not count
    channels = [3, *network.choices[:, choice].tolist()]
    with FlopCounterMode(display=False) as counter:
        tas_plain.convolutions(network, torch.zeros(1, 3, 16, 16), index)
    count = tas.multiply_adds(14, channels, 10, size=(16, 16)) - 10 * channels[-1] / 1e6
    assert counter.get_total_flops() == pytest.approx(2e6 * count, abs=0.5)


@pytest.mark.parametrize("depth, searched", [(8, False), (20, True), (56, True), (32, False)])
def test_argmax_multiply_adds_are_those_of_the_derived_network(depth, searched):
    network = tas.SearchNetwork(depth, 7, searched).double()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for attentions in network.arch_parameters():
                attentions.copy_(torch.randn(attentions.shape, generator=generator))
        channels, blocks = network.derive()
        count = tas.multiply_adds(depth, channels, 7, blocks, (16, 8))
        assert network.argmax_multiply_adds((16, 8)).item() == pytest.approx(count, rel=1e-12)


def test_a_network_for_other_images_has_the_target_in_proportion():
    network = found.uniform(20, 0.5, 10, 16)
    larger = network.on(10, 32)
    whole = found.load("unpruned", 20, 10, 32).multiply_adds
    assert larger.target == pytest.approx(0.5 * whole, abs=1e-4)
    assert larger.on(10, 16).target == pytest.approx(network.target, abs=1e-4)
    assert network.on(10, 16) == network
