"""How a training is run: compiled cells and the memory format, which change no figure."""

import csv
import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import genotypes
from harness import loops, tuning
from helpers import ROOT, warm_python
from model import NetworkCIFAR
from utils import UserError

CPU, LOG = torch.device("cpu"), logging.getLogger("test_tuning")
ARGS = SimpleNamespace(
    amp=False, auxiliary=True, auxiliary_weight=0.4, layout="auto", resume=None, device=None,
    gpu=None, deterministic=False,
)  # fmt: skip
SMALL = genotypes.Genotype(
    normal=[("sep_conv_3x3", 0), ("skip_connect", 1), ("dil_conv_5x5", 1), ("max_pool_3x3", 2)],
    normal_concat=[2, 3], reduce=[("skip_connect", 0), ("sep_conv_5x5", 1)], reduce_concat=[2],
)  # fmt: skip
TRAIN = "train.py --set digits --epochs 3 --batch_size 300 --init_channels 4 --layers 3 "
TRAIN += "--input_size 8 --drop_path_prob 0.3 --report_freq 1"


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile with a stand-in for the compiler, which counts: [one entry a graph]."""
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def stand_in(function, dynamic, options):
        return torch._dynamo.optimize(count, dynamic=dynamic)(function)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", stand_in)
    yield compiled
    torch._dynamo.reset()


@pytest.fixture
def timed(monkeypatch):
    """The layouts are timed on the CPU, too."""
    monkeypatch.setattr(tuning, "MEASURED_ON", ("cpu",))


def build(layers=5):
    torch.manual_seed(0)
    return NetworkCIFAR(4, 10, layers, True, SMALL).double()


def compile_cells(network, number=4, side=32, **more):
    tuning.compile_cells(network, (number, side), SimpleNamespace(**vars(ARGS) | more), CPU, LOG)


def figures(network, x, y, seed=0):
    """Everything that a training step leaves: loss, gradients, running figures."""
    torch.manual_seed(seed)
    network.zero_grad()
    loss, logits = loops.classify(network, nn.CrossEntropyLoss(), x, y, ARGS)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    return [loss.detach(), logits.detach(), *gradients, *(b.clone() for b in network.buffers())]


def batch(n=4, side=32):
    torch.manual_seed(1)
    return torch.rand(n, 3, side, side, dtype=torch.float64), torch.randint(10, (n,))


def test_each_shape_of_cell_is_compiled_once_for_all_epochs(graphs):
    network, shapes = build(layers=15), set()
    for cell in network.cells:
        cell.register_forward_pre_hook(
            lambda cell, s: shapes.add((s[0].shape, s[1].shape, str(cell)))
        )
    compile_cells(network)
    first = len(graphs)
    assert first == len(shapes) == 11  # 0, 1, 2, the reduction 5, 6, 7, 8, the reduction 10, ...
    for p in (0.0, 0.1, 0.2, 0.3):
        network.drop_path_prob = p
        figures(network.train(), *batch())
        figures(network, *batch(3))  # the last of an epoch
        with torch.no_grad():
            network.eval()(batch()[0])
    assert len(graphs) == first


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_figures_drop_path_and_state_dict_are_the_uncompiled_network_s(graphs, p):
    plain, compiled = build(), build()
    names = list(compiled.state_dict())
    compile_cells(compiled)
    assert graphs and list(compiled.state_dict()) == names
    for network in (plain, compiled):
        network.drop_path_prob = p
    for seed in range(2):
        for a, b in zip(*(figures(n, *batch(), seed) for n in (plain, compiled)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    plain.load_state_dict(compiled.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(batch()[0])[0], compiled.eval()(batch()[0])[0])


def test_trying_a_step_leaves_no_trace(graphs, timed):
    network = build().float()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random, training = torch.get_rng_state(), network.eval().training
    network.drop_path_prob = 0.5
    compile_cells(network)
    tuning.choose_layout(network, (4, 32), ARGS, CPU)
    assert torch.equal(torch.get_rng_state(), random) and network.training == training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_without_a_working_compiler_it_goes_on(monkeypatch, caplog):
    def compile(function, **_):
        def fails(*_):
            raise RuntimeError("no working compiler\nhere")

        return fails

    monkeypatch.setattr(torch, "compile", compile)
    network, plain = build(), build()
    LOG.setLevel(logging.INFO)
    with caplog.at_level(logging.INFO, LOG.name):
        compile_cells(network)
    assert caplog.messages == [
        "--compile: going on uncompiled, it failed (RuntimeError: no working compiler here)"
    ]
    pairs = zip(figures(network, *batch()), figures(plain, *batch()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def run(command, cwd, code=0, **environment):
    """Output of a script that ends with this code."""
    script, *flags = command.split()
    # A compiler's settings are read where torch is imported.
    python = [sys.executable] if "--compile" in flags else warm_python()
    done = subprocess.run(
        [*python, ROOT / script, *flags], cwd=cwd, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(cwd / "cache")}
        | environment,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_training_without_a_compiler(tmp_path):
    out = run(f"{TRAIN} --epochs 1 --compile", tmp_path, CXX=str(tmp_path / "g++"))
    lines = [line for line in out.splitlines() if "--compile" in line]
    assert len(lines) == 1 and "going on uncompiled" in lines[0] and "C++ compiler" in lines[0]
    assert "test accuracy after the last epoch" in out


def test_compile_and_synchronized_norms_are_refused(tmp_path):
    out = run("train_imagenet.py --compile --sync_bn", tmp_path, code=2)
    assert "--compile has no --sync_bn" in out and "Traceback" not in out


def test_compile_and_several_gpus_in_one_process_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="torchrun"):
        tuning.compile_cells(build(), (4, 32), ARGS, torch.device("cuda"), LOG)


def weights(folder):
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.slow
def test_a_compiled_network_gives_the_figures_of_an_uncompiled_one():
    torch._dynamo.reset()
    plain, compiled = build(4), build(4)
    compile_cells(compiled)
    assert all("forward" in vars(cell) for cell in compiled.cells)
    for p in (0.0, 0.4):
        plain.drop_path_prob = compiled.drop_path_prob = p
        for a, b in zip(*(figures(n, *batch()) for n in (plain, compiled)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_training_that_is_resumed_ends_as_one_that_was_not(tmp_path):
    out = run(f"{TRAIN} --compile --save whole", tmp_path)
    assert "compiled 3 cells" in out
    run(f"{TRAIN} --compile --save cut", tmp_path)
    [whole], [cut] = tmp_path.glob("eval-whole-*"), tmp_path.glob("eval-cut-*")
    (cut / "checkpoint.prev.pt").replace(cut / "checkpoint.pt")  # after the second epoch
    (cut / "weights.pt").unlink()
    out = run(f"train.py --resume {cut}", tmp_path)
    assert "after epoch 2 of 3" in out and "compiled 3 cells" in out
    first, second = weights(whole), weights(cut)
    assert all(torch.equal(first[name], second[name]) for name in first)
    plain = run(f"{TRAIN} --save plain", tmp_path)
    rows = [list(csv.DictReader((folder / "metrics.csv").open()))
            for folder in (whole, *tmp_path.glob("eval-plain-*"))]  # fmt: skip
    for mine, theirs in zip(*rows, strict=True):  # other rounding alone
        assert float(mine["loss"]) == pytest.approx(float(theirs["loss"]), abs=0.02)
    assert "compiled" not in plain


def test_the_faster_layout_is_taken_and_kept_by_a_resume(tmp_path, monkeypatch, timed):
    network, seen = build().float(), []

    def slow(network, *_):
        seen.append(network.layout)
        clock[0] += 3 if network.layout == torch.channels_last else 2

    clock = [0.0]
    monkeypatch.setattr(tuning, "_try_step", slow)
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: clock[0])
    kept = tuning.choose_layout(network, (4, 32), ARGS, CPU)
    assert kept == {
        "layout": "contiguous", "layout_ms": {"contiguous": 2000.0, "channels_last": 3000.0}
    }  # fmt: skip
    assert network.layout == torch.contiguous_format and len(seen) == 14
    about = {"format": 1, "script": "train", "args": {}} | kept
    (tmp_path / "args.json").write_text(json.dumps(about))
    resumed = SimpleNamespace(**vars(ARGS) | {"resume": str(tmp_path)})
    network.layout = None
    assert tuning.choose_layout(network, (4, 32), resumed, CPU) == kept
    assert network.layout == torch.contiguous_format and len(seen) == 14
    network.layout = None
    exact = SimpleNamespace(**vars(ARGS) | {"deterministic": True})
    assert tuning.choose_layout(network, (4, 32), exact, CPU) == {}  # nothing depends on a clock
    assert network.layout is None and len(seen) == 14


def test_a_resume_of_a_run_that_measured_nothing_measures_nothing(tmp_path, timed):
    (tmp_path / "args.json").write_text('{"format": 1, "script": "train", "args": {}}')
    network = build()
    resumed = SimpleNamespace(**vars(ARGS) | {"resume": str(tmp_path)})
    assert tuning.choose_layout(network, (4, 32), resumed, CPU) == {}
    assert network.layout is None


@pytest.mark.parametrize("name", tuning.LAYOUTS)
def test_layouts_give_the_same_figures_and_are_taken_as_given(name, timed):
    network, other = build(), build()
    args = SimpleNamespace(**vars(ARGS) | {"layout": name})
    assert tuning.choose_layout(network, (4, 32), args, CPU) == {}
    strides = []
    network.stem.register_forward_hook(lambda m, inputs, y: strides.append(y.stride(1)))
    pairs = zip(figures(network, *batch()), figures(other, *batch()), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert strides == [1024 if name == "contiguous" else 1]


def test_a_training_says_and_keeps_its_layout(tmp_path, monkeypatch):
    """As on a GPU: with the measuring forced."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from harness import tuning\nimport train\n"
        "tuning.MEASURED_ON = ('cpu',)\n"
        "train.main(train.get_args())\n"
    )
    (tmp_path / "forced.py").write_text(program)
    flags = f"{TRAIN} --epochs 1 --save forced".split()[1:]
    command = [*warm_python(), tmp_path / "forced.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True,
                           env=environment)  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("layout c") == 1
    [folder] = tmp_path.glob("eval-forced-*")
    about = json.loads((folder / "args.json").read_text())
    assert set(about["layout_ms"]) == set(tuning.LAYOUTS)
    assert about["layout"] == min(about["layout_ms"], key=about["layout_ms"].get)
    run(f"{TRAIN} --epochs 1 --save plain --layout {about['layout']}", tmp_path)
    [plain] = tmp_path.glob("eval-plain-*")
    first, second = weights(folder), weights(plain)
    assert all(torch.equal(first[name], second[name]) for name in first)
