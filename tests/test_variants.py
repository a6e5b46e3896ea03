"""The experiments around the method: variants, what is watched, random cells, costs, export."""

import collections
import csv
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import genotypes
import model
import model_search
import train_search
from architect import Architect
from fused import Gradients
from fused.nodes import Node
from harness import analysis, costs, files, loops
from helpers import copy_code, warm_python
from test_model_search import assert_equal, batch, close, gradients, twins

ROOT = Path(__file__).parents[1]
SMALL = dict(C=8, num_classes=3, layers=3)


def run(command, cwd, code=0):
    script, *flags = command.split()
    done = subprocess.run(
        [*warm_python(), ROOT / script, *flags], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


# --- which channels go through the operations ---


@pytest.mark.parametrize("k", [1, 2, 4])
def test_shift_is_the_formula_with_a_rotation(k):
    assert_equal(C=8, k=k, sampling="shift")


def test_shift_sends_other_channels_through_the_next_operations():
    cell = model_search.Network(16, 3, 3, None, sampling="shift").cells[0]
    mixed, passed = torch.zeros(1, 4, 1, 1), torch.arange(1.0, 13.0)
    node, _, _ = Node.apply(mixed, passed[None], 4, 3, 1, cell, [])
    assert node.flatten().tolist() == [*range(1, 13), 0, 0, 0, 0]


@pytest.mark.parametrize("k", [2, 4])
def test_random_channels_are_put_back_in_their_places(k):
    pair = twins(C=8, k=k, sampling="random")
    expected, actual = pair
    names = [name for name, _ in expected.named_parameters()]
    for draw in range(3):
        actual.resample()
        for one, other in zip(expected.cells, actual.cells, strict=True):
            one.channel_order.copy_(other.channel_order)
            one.channel_places.copy_(other.channel_places)
        found = []
        for network in pair:
            network.zero_grad()
            for tensor in network.arch_parameters():
                tensor.grad = None
            images, labels = batch(3, (8, 8), network.classifier.out_features, seed=draw)
            logits = network(images)
            F.cross_entropy(logits, labels).backward()
            found.append(gradients(network, names) | {"logits": logits})
        for name in found[0]:
            close(found[1][name], found[0][name], name)


def test_each_step_of_a_search_draws_other_channels():
    network, orders = model_search.Network(8, 3, 3, nn.CrossEntropyLoss(), sampling="random"), []
    cell = network.cells[0]
    cell.register_forward_pre_hook(lambda *_: orders.append(tuple(cell.channel_order.tolist())))
    images, labels = batch(2, (8, 8), 3, seed=0)
    loader = Batches([(images.float(), labels)] * 8)
    args = SimpleNamespace(
        momentum=0.9, weight_decay=0.0, arch_learning_rate=1e-3, arch_weight_decay=0.0,
        unrolled=False, grad_clip=5.0, report_freq=100,
    )  # fmt: skip
    log = SimpleNamespace(info=lambda *_: None)
    run = SimpleNamespace(log=log, unfinished=None, epoch=0, step=lambda figures: None)
    optimizer = torch.optim.SGD(network.weights(), 0.1)
    gradients = Gradients(network, nn.CrossEntropyLoss())
    architect, valid = Architect(network, args), iter(loader)
    loops.search_epoch(loader, valid, network, gradients, architect, optimizer, args, False, run)
    assert len(orders) == 16 and orders[::2] == orders[1::2]  # one draw for both halves of a step
    assert len(set(orders)) > 4


class Batches(list):
    device = torch.device("cpu")


def test_a_draw_takes_all_channels_alike():
    torch.manual_seed(0)
    network = model_search.Network(16, 3, 3, None, sampling="random")
    drawn, counts = set(), collections.Counter()
    for _ in range(200):
        network.resample()
        cell = network.cells[0]
        assert sorted(cell.channel_order.tolist()) == list(range(16))
        assert cell.channel_order[cell.channel_places].tolist() == list(range(16))
        drawn.add(tuple(cell.channel_order.tolist()))
        counts.update(cell.channel_order[:4].tolist())
    assert len(drawn) > 150 and min(counts.values()) > 25  # 50 expected of each
    again = model_search.Network(16, 3, 3, None, sampling="random")
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.cells[2].channel_order, network.cells[2].channel_order)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(network.eval()(x), again.eval()(x))


@pytest.mark.parametrize("wrong, words", [
    (dict(sampling="none"), "shuffle, shift, random"),
    (dict(primitives=["sep_conv_9x9"]), "sep_conv_9x9"),
])  # fmt: skip
def test_variants_that_cannot_be(wrong, words):
    with pytest.raises(ValueError, match=words):
        model_search.Network(16, 3, 3, None, **wrong)


# --- second order and eigenvalue, against exact autograd ---


class Exact(model_search.Network):
    """A small supernet in float64 whose loss can be differentiated twice."""

    def __init__(self, **arguments):
        arguments |= dict(steps=2, multiplier=2, k=2, fused=False)
        super().__init__(4, 3, 3, nn.CrossEntropyLoss(), **arguments)


@pytest.fixture
def exact():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield Exact()
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_second_order_of_a_supernet_nears_exact_autograd(exact, momentum):
    """With momentum and its buffers, and weight decay."""
    weights, arch = list(exact.parameters()), exact.arch_parameters()
    optimizer = torch.optim.SGD(weights, 0.1, momentum, weight_decay=3e-4)
    train, valid = batch(4, (8, 8), 3, seed=1), batch(4, (8, 8), 3, seed=2)
    exact._loss(*train).backward(inputs=weights)
    optimizer.step()
    gradient = torch.autograd.grad(exact._loss(*train), weights, create_graph=True)
    ahead = []
    for weight, g in zip(weights, gradient, strict=True):
        moment = momentum * optimizer.state[weight]["momentum_buffer"] if momentum else 0
        ahead.append(weight - 0.1 * (moment + g + 3e-4 * weight))
    names = [name for name, _ in exact.named_parameters()]
    logits = torch.func.functional_call(exact, dict(zip(names, ahead, strict=True)), valid[0])
    wanted = torch.autograd.grad(F.cross_entropy(logits, valid[1]), arch)
    args = SimpleNamespace(momentum=momentum, weight_decay=3e-4, arch_learning_rate=1e-3,
                           arch_weight_decay=0.0)  # fmt: skip
    architect, errors = Architect(exact, args), []
    for step in (1e-3, 1e-4, 1e-5):  # beyond, the kinks of ReLU and max pool are what is seen
        architect.STEP = step
        architect.backward(*train, *valid, 0.1, optimizer, True)
        off = [a.grad - w for a, w in zip(arch, wanted, strict=True)]
        errors.append(
            float(sum(o.square().sum() for o in off) / sum(w.square().sum() for w in wanted)) ** 0.5
        )
    assert errors[2] < 1e-5 and errors[2] < errors[1] < errors[0]


def test_eigenvalue_is_that_of_the_exact_hessian(exact):
    exact = Exact(primitives=["none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"])
    images, labels = batch(4, (8, 8), 3, seed=1)
    alphas = exact.arch_parameters()[:2]

    def loss(normal, reduce):
        exact.alphas_normal, exact.alphas_reduce = normal, reduce
        return exact._loss(images, labels)

    blocks = torch.autograd.functional.hessian(loss, tuple(alphas))
    n = [alpha.numel() for alpha in alphas]
    hessian = torch.cat(
        [torch.cat([blocks[i][j].reshape(n[i], n[j]) for j in (0, 1)], 1) for i in (0, 1)]
    )
    values = torch.linalg.eigvalsh(hessian)
    largest = values[values.abs().argmax()]
    exact.alphas_normal, exact.alphas_reduce = alphas
    kept = [alpha.clone() for alpha in alphas]
    state = {name: value.clone() for name, value in exact.state_dict().items()}
    found = analysis.dominant_eigenvalue(exact, images, labels, iterations=200, step=1e-6)
    assert found == pytest.approx(float(largest), rel=1e-3)
    for alpha, before in zip(alphas, kept, strict=True):
        assert torch.equal(alpha, before)
    assert all(torch.equal(value, state[name]) for name, value in exact.state_dict().items())


def test_eigenvalue_of_the_supernet_is_the_same(exact):
    fast = model_search.Network(4, 3, 3, nn.CrossEntropyLoss(), steps=2, multiplier=2, k=2)
    fast.load_state_dict(exact.state_dict())
    for mine, its in zip(fast.arch_parameters(), exact.arch_parameters(), strict=True):
        mine.data.copy_(its.data)
    fast.eval()
    values = [
        analysis.dominant_eigenvalue(network, *batch(4, (8, 8), 3), step=1e-6)
        for network in (exact, fast)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6) and not fast.training


# --- what is derived and watched ---


def test_at_most_so_many_skip_connects():
    """By the rule of P-DARTS: the weakest skip_connects go, one by one."""
    torch.manual_seed(3)
    network = model_search.Network(16, 3, 3, None, edge_norm=False)
    skip = genotypes.PRIMITIVES.index("skip_connect")
    network.alphas_normal.data[:, skip] += torch.linspace(
        1, 2, 14
    )  # all edges: later ones stronger
    network.alphas_reduce.data[:, skip] += 5
    whole = network.genotype()
    assert genotypes.skip_connects(whole) == (8, 8)
    previous = {edge for edge in enumerate(whole.normal) if edge[1][0] == "skip_connect"}
    for most in (7, 4, 2, 1, 0):
        gene = network.genotype(max_skip=most)
        assert genotypes.skip_connects(gene) == (most, 8)
        assert gene.reduce == whole.reduce
        genotypes.check(gene)
    assert len(previous) == 8 and network.genotype() == whole  # alphas are as they were
    # The last to stay is the strongest: of the last node its last input.
    [stays] = [i for i, (op, _) in enumerate(network.genotype(1).normal) if op == "skip_connect"]
    assert stays // 2 == 3 and network.genotype(1).normal[stays][1] == 4


def test_max_skip_where_there_is_no_other_operation():
    network = model_search.Network(16, 3, 3, None, primitives=["none", "skip_connect"])
    assert genotypes.skip_connects(network.genotype(max_skip=2)) == (8, 8)


def test_entropies():
    network = model_search.Network(16, 3, 3, None)
    for tensor in network.arch_parameters():
        tensor.data.zero_()
    found = analysis.entropies(network)
    assert found["alpha_entropy_normal"] == pytest.approx(math.log(8))
    nodes = sum(math.log(n) for n in (2, 3, 4, 5)) / 4
    assert found["beta_entropy_reduce"] == pytest.approx(nodes, rel=1e-5)
    network.alphas_reduce.data[:, 0] = 100
    assert analysis.entropies(network)["alpha_entropy_reduce"] == pytest.approx(0, abs=1e-6)
    assert len(analysis.entropies(model_search.Network(16, 3, 3, None, edge_norm=False))) == 2


# --- random cells ---


def test_random_cells_are_uniform_and_valid():
    first, pairs = collections.Counter(), collections.Counter()
    ops = [op for op in genotypes.PRIMITIVES if op != "none"]
    for seed in range(2000):
        gene = genotypes.sample(seed)
        assert genotypes.check(gene) == gene
        for i in range(0, 8, 2):
            assert gene.normal[i][1] != gene.normal[i + 1][1]
        first[gene.normal[0][0]] += 1
        pairs[tuple(edge[1] for edge in gene.reduce[6:])] += 1
    assert set(first) == set(ops) and min(first.values()) > 2000 / 7 * 0.75
    assert set(pairs) == set(itertools.combinations(range(5), 2))
    assert min(pairs.values()) > 200 * 0.7
    assert genotypes.load("random:7") == genotypes.sample(7) != genotypes.sample(8)
    five = genotypes.sample(0, steps=5, primitives=["none", "sep_conv_7x7"])
    assert len(five.normal) == 10 and {op for op, _ in five.normal} == {"sep_conv_7x7"}


@pytest.mark.parametrize("arch", ["random:", "random:-1", "random:x", "random:" + "1" * 20])
def test_random_cells_need_a_seed(arch):
    with pytest.raises(genotypes.GenotypeError, match="has no seed"):
        genotypes.load(arch)


# --- through the scripts ---

TINY = "--set digits --epochs 1 --layers 3 --batch_size 300 --input_size 8 --init_channels"


def flags_of(*given):
    return vars(parsed(*given))


def parsed(*given):
    argv, sys.argv = sys.argv, ["train_search.py", *given]
    try:
        return train_search.get_args()
    finally:
        sys.argv = argv


def test_darts_sets_exactly_these():
    plain, darts = flags_of(), flags_of("--darts")
    changed = {name: value for name, value in darts.items() if value != plain[name]}
    assert changed == {
        "darts": True, "k": 1, "no_edge_norm": True, "batch_size": 64, "learning_rate": 0.025,
        "learning_rate_min": 0.001, "arch_learning_rate": 3e-4, "begin": 0,
    }  # fmt: skip
    assert flags_of("--darts", "--batch_size", "32")["batch_size"] == 32


def test_a_space_of_ones_own_goes_through_search_and_training(tmp_path):
    space = "none,skip_connect,sep_conv_7x7"
    flags = f"8 --begin 0 --primitives {space} --steps 2 --sampling random --eigenvalue 2"
    flags += " --max_skip 1 --stem imagenet --input_size 32 --unrolled --epochs 2 --validate"
    out = run(f"train_search.py {TINY} {flags}", tmp_path)
    assert "largest eigenvalue" in out and "in proportion --learning_rate is" in out
    assert "images of a class: " in out
    [folder] = tmp_path.glob("search-*")
    found = json.loads((folder / "genotype.json").read_text())
    assert found["primitives"] == space.split(",") and len(found["normal"]) == 4
    assert {op for op, _ in found["normal"]} <= {"skip_connect", "sep_conv_7x7"}
    first, second = csv.DictReader((folder / "metrics.csv").open())
    assert not math.isfinite(float(first["eigenvalue"])) and float(second["eigenvalue"]) != 0
    assert 0 <= float(first["valid_top1"]) <= 100 and float(second["valid_loss"]) > 0
    out = run(f"train.py --arch {folder} {TINY} 4 --mean 0.5,0.5,0.5 --std 0.2,0.2,0.2", tmp_path)
    [trained] = tmp_path.glob("eval-*")
    about = json.loads((trained / "args.json").read_text())
    assert about["mean"] == [0.5] * 3 and about["std"] == [0.2] * 3
    assert "in proportion --learning_rate is 0.078" in out
    last = next(line for line in out.splitlines() if "test accuracy" in line).split(": ")[1][:5]
    assert f"top-1 {last}" in run(f"test.py --model_path {trained}", tmp_path)


def test_a_random_cell_and_the_other_stem_are_trained_and_tested(tmp_path):
    run(f"train.py --arch random:3 {TINY} 4 --stem imagenet --input_size 64", tmp_path)
    [trained] = tmp_path.glob("eval-*")
    assert genotypes.load(trained) == genotypes.sample(3)
    assert "top-1" in run(f"test.py --model_path {trained}", tmp_path)


OWN = """
class Gate(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1)

    def forward(self, x):
        return x * self.conv(x).sigmoid()


OPS["gate"] = lambda C, stride, affine: nn.Sequential(nn.AvgPool2d(stride), Gate(C))
"""


def test_an_operation_of_ones_own(tmp_path):
    """As docs/experiments.md tells it."""
    assert OWN.strip() in "\n".join(
        line.removeprefix("    ")
        for line in (ROOT / "docs" / "experiments.md").read_text().splitlines()
    )
    copy_code(tmp_path)
    with (tmp_path / "operations.py").open("a") as file:
        file.write(OWN)
    flags = f"{TINY} 8 --begin 0 --primitives none,gate,sep_conv_7x7".split()
    for script in ("train_search.py", "train.py"):
        done = subprocess.run(
            [*warm_python(), script, *flags], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        [folder] = tmp_path.glob("search-*")
        flags = f"{TINY} 4 --arch {folder}".split()
    assert {op for op, _ in genotypes.load(folder, [*model.OPS, "gate"]).normal} <= {
        "gate",
        "sep_conv_7x7",
    }


OWN_MIXED = """
class Dropped(MixedOp):
    def forward(self, x, weights):
        return super().forward(x, F.dropout(weights, 0.1, self.training))


MixedOp = Dropped
"""


def test_a_mixed_operation_of_ones_own(tmp_path):
    """As docs/experiments.md tells it."""
    assert OWN_MIXED.strip() in "\n".join(
        line.removeprefix("    ")
        for line in (ROOT / "docs" / "experiments.md").read_text().splitlines()
    )
    copy_code(tmp_path)
    path, last = tmp_path / "model_search.py", "\nif __name__"
    path.write_text(path.read_text().replace(last, f"{OWN_MIXED}\n{last}"))
    done = subprocess.run(
        [*warm_python(), "train_search.py", *f"{TINY} 8 --begin 0".split()], cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [line] = done.stderr.splitlines()
    assert "as model_search.py has it, not in its fast form: " in line


def test_odd_images_in_a_folder(tmp_path):
    """Greyscale, RGBA, palettes and sizes of all kinds; classes of different size."""
    for part in ("train", "test"):
        for kind, n in (("a", 6), ("b", 3)):
            (tmp_path / "data" / part / kind).mkdir(parents=True)
            for i in range(n):
                mode = ("L", "RGBA", "P", "RGB", "1", "CMYK")[i]
                pixels = np.random.default_rng(i).integers(0, 255, (9 + i, 20 - i, 3), np.uint8)
                suffix = "jpg" if mode == "CMYK" else "png"
                Image.fromarray(pixels).convert(mode).save(
                    tmp_path / f"data/{part}/{kind}/{i}.{suffix}"
                )
    flags = f"{TINY} 8".replace("--set digits", "--set folder --data data").replace("300", "4")
    out = run(f"train_search.py {flags}", tmp_path)
    assert "images of a class: " in out and "2 classes" in out


# --- costs and export ---


def test_what_is_kept_is_that_of_an_image():
    """The image for the weight gradient of the convolution, its output for that of the ReLU."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU())
    assert costs.kept_per_image(network, 8) == 4 * (3 + 4) * 8 * 8


def test_costs_before_a_run():
    out = run("model.py --arch PC_DARTS_image --set imagenet", ROOT)
    assert "581.63 M" in out and "597.21 M" in out and "parameters: 5.34 M" in out
    small = run("model.py --init_channels 4 --layers 3 --input_size 8", ROOT)
    assert "4 channels, 3 cells, 8 x 8 pixels" in small and "kept for the backward pass" in small
    table = run("model_search.py --init_channels 8 --layers 3 --input_size 8", ROOT)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    kept = [float(row[2]) for row in rows]
    assert kept == sorted(kept, reverse=True)


def test_export(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    run(f"train.py {TINY} 4 --input_size 32 --auxiliary --drop_path_prob 0.3", tmp_path)
    [folder] = tmp_path.glob("eval-*")
    out = run(f"export.py {folder} --batch_size 3", tmp_path)
    for name in ("PyTorch eager", "torch.export", "ONNX"):
        assert f"{name}: " in out
    assert "network.onnx" in out and "MiB" in out
    graph = onnx.load(folder / "network.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert not kinds & {"Dropout", "Bernoulli", "RandomUniform", "RandomUniformLike"}
    assert len(graph.output) == 1
    program = torch.export.load(folder / "network.pt2")
    assert not any("auxiliary" in name for name in program.state_dict)
    images = torch.randn(5, 3, 32, 32)  # another number than it was written with
    session = runtime.InferenceSession(folder / "network.onnx")
    [logits] = session.run(None, {"images": images.numpy()})
    network = model.NetworkCIFAR(4, 10, 3, True, genotypes.load(folder))
    network.load_state_dict(files.load(folder / "weights.pt"))
    wanted = network.eval()(images)[0]
    assert (torch.from_numpy(logits) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (program.module()(images) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert "no run of train.py" in run("export.py nowhere", tmp_path, code=2)
