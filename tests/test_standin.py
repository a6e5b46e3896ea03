"""The scripts and the tests of a GPU, on a stand-in for one (standin.py)."""

import contextlib
import csv
import os
import re
import shlex
import subprocess

import pytest
import torch
import torch.nn.functional as F

import standin
from helpers import ROOT, warm_python
from test_imagenet import fill

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
STAND_IN = ROOT / "tests" / "standin.py"
SEARCH = "train_search.py --set digits --input_size 8 --batch_size 120 --layers 3 --k 2 --steps 2"
SEARCH += " --init_channels 4 --epochs 2 --begin 1"
TRAIN = "train.py --set digits --batch_size 240 --layers 5 --init_channels 8 --epochs 2"
REID = "--set digits --layers 1,1,1 --init_channels 6 --embedding 8 --height 64 --width 32"
REID += " --identities 4 --instances 2 --workers 1 --epochs 2"
TAS = "--set digits --input_size 8 --batch_size 180 --epochs 2"
IMAGENET = "--init_channels 8 --layers 3 --input_size 32 --workers 1 --tmp_data_dir data"


def run(command, cwd, on_gpu=True, layouts=None):
    """The output of a script's command line, which must succeed."""
    name, *flags = shlex.split(command)
    before = [STAND_IN] if on_gpu else []
    done = subprocess.run(
        [*warm_python(), *before, ROOT / name, *flags], cwd=cwd, text=True, capture_output=True,
        env=ENVIRONMENT | ({"STANDIN_LAYOUTS": layouts} if layouts else {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not on_gpu or f"device cuda:0: {standin.NAME}" in done.stdout
    return done.stdout


def rows(cwd, pattern):
    [folder] = cwd.glob(pattern)
    return list(csv.DictReader((folder / "metrics.csv").open()))


def assert_near(cwd, one, other, tolerance):
    """The losses and accuracies of two runs, in every epoch."""
    first, second = rows(cwd, one), rows(cwd, other)
    names = [name for name in first[0] if re.search("loss|top1|top5|map", name) and first[0][name]]
    assert len(first) == len(second) > 1 and any("loss" in name for name in names)
    for name in names:
        for a, b in zip(first, second, strict=True):
            limit = tolerance if "loss" in name else 2.0  # of accuracies: a few images
            assert float(a[name]) == pytest.approx(float(b[name]), abs=limit), name


@contextlib.contextmanager
def modes():
    """The stand-in within this process, without a word about it in torch.cuda."""
    with standin.Operations(), standin.Functions():
        yield


def test_it_refuses_what_a_gpu_refuses():
    with modes():
        x = torch.randn(3, 4).to("cuda")
        assert x.device == torch.device("cuda:0") and x.is_cuda and x.cpu().device.type == "cpu"
        with pytest.raises(RuntimeError, match="on the CPU"):
            torch.stack([x[0, 0], torch.tensor(1.0)])
        with pytest.raises(RuntimeError, match="on the CPU"):
            torch.zeros(()).add_(x[0, 0])
        with pytest.raises(RuntimeError, match="on the CPU"):
            torch.zeros(3)[torch.tensor([1]).to("cuda")]
        with pytest.raises(RuntimeError, match="on the CPU"):
            x[torch.tensor([1]).to("cuda")] = torch.zeros(1, 4)
        with pytest.raises(RuntimeError, match="generator of the CPU"):
            torch.randn(2, device="cuda", generator=torch.Generator())
        with pytest.raises(NotImplementedError, match="shape in place"):
            x.clone().unsqueeze_(0)
        assert x.to("cuda") is x and (x + torch.tensor(1.0)).is_cuda  # a number of the CPU
        assert torch.zeros(2, device="cuda").is_cuda and not torch.zeros(2).is_cuda
        with pytest.raises(RuntimeError, match="tensors on cuda:0 and on the CPU"):
            x + torch.randn(3, 4)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        if torch.version.cuda is not None:
            with pytest.raises(NotImplementedError, match="no kernel for CUDA"):
                torch._C._nn.mkldnn_linear(x, x)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x[[0, 1]],
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.copy_(torch.ones(3, 4)),
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
        lambda x: standin.synchronize(),
        lambda x: x.flatten().unique_consecutive(),
    ],
)
def test_a_capture_may_not_wait(waits):
    with modes():
        x = torch.randn(3, 4).to("cuda")
        before = standin.WAITS.total()
        waits(x)
        assert standin.WAITS.total() > before
        refused = pytest.raises(RuntimeError, match="not permitted when stream is capturing")
        with refused, standin.capturing(standin.Graph()):
            waits(x)
        assert standin.CAPTURE.graph is None


def test_a_replay_computes_with_what_the_memory_holds_now():
    with modes():
        x, w = torch.randn(3, 4).to("cuda"), torch.randn(4, 2).to("cuda").requires_grad_()
        count, graph = torch.zeros((), device="cuda"), standin.Graph()
        number = torch.tensor(3.0)  # of the CPU: what it was in the capture
        with standin.capturing(graph):
            count.add_(1)
            out = (x @ w).relu().sum()
            [gradient] = torch.autograd.grad(out, w)
            scaled = x * number
        assert count.item() == 0 and out.isnan().item()  # nothing was computed
        x.copy_(torch.randn(3, 4))
        with torch.no_grad():
            w.mul_(-1)
        number.fill_(5.0)
        graph.replay()
        expected = (x @ w).relu().sum()
        torch.testing.assert_close(scaled.cpu(), 3 * x.cpu())
        torch.testing.assert_close(out.cpu(), expected.cpu())
        torch.testing.assert_close(gradient.cpu(), torch.autograd.grad(expected, w)[0].cpu())
        assert count.item() == 1
        del x, out, gradient, scaled, expected
        with pytest.raises(RuntimeError, match="memory that was freed"):
            graph.replay()


def test_autocast(monkeypatch):
    for name in ("is_available", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with modes(), torch.autocast("cuda", torch.bfloat16):
        x, w = (torch.randn(4, 4).to("cuda") for _ in "xw")
        assert (x @ w).dtype == F.linear(x, w).dtype == torch.bfloat16
        assert x.relu().dtype == (x @ w).softmax(1).dtype == torch.float32
        assert (x.double() @ w.double()).dtype == torch.float64
        with torch.autocast("cuda", enabled=False):
            assert (x @ w).dtype == torch.float32


def test_its_memory_is_that_of_the_tensors_on_it():
    with modes():
        standin.MEMORY.reset()
        before = standin.MEMORY.now
        x = torch.randn(100, 10).to("cuda").requires_grad_()
        y = (x.sigmoid() * 2).sum()  # keeps what sigmoid gives
        assert standin.MEMORY.now - before == 4 * (2 * 1000 + 1)
        assert standin.MEMORY.most - before == 4 * (3 * 1000 + 1)
        view = x.detach()[3:].t()
        y.backward()
        del y
        assert standin.MEMORY.now - before == 4 * 2 * 1000
        del x
        assert standin.MEMORY.now - before == 4 * 1000 and view.shape == (10, 97)
        del view
        assert standin.MEMORY.now == before


GRAPH = r"CUDA graph of {} gradients of a batch of {}, training: captured and compared"


def assert_graphs(said, batch_size):
    """Both graphs of a search were captured, are the step, and stayed."""
    for wanted in (r"\d\d\d+", r"\d"):  # weights; alphas and betas
        assert re.search(GRAPH.format(wanted, batch_size), said), said
    assert "no CUDA graph" not in said and "captured again" not in said


@pytest.mark.parametrize("layouts", [None, pytest.param("drawn", marks=pytest.mark.slow)])
def test_a_search_with_graphs_is_that_of_the_cpu(layouts, tmp_path):
    for name, on_gpu in (("cpu", False), ("gpu", True)):
        said = run(f"{SEARCH} --form fused --save {name}", tmp_path, on_gpu, layouts)
    assert_graphs(said, 120)
    assert_near(tmp_path, "search-cpu-*", "search-gpu-*", 0.002)


@pytest.mark.parametrize(
    ("command", "sizes"),
    [
        (f"{SEARCH} --epochs 1 --begin 0 --form fused --no_cuda_graph", (350, 150)),
        pytest.param(f"{SEARCH} --form fused", (100, 61), marks=pytest.mark.slow),
        pytest.param(f"{SEARCH} --unrolled --form fused", (100, 61), marks=pytest.mark.slow),
        pytest.param(f"{TRAIN} --layout contiguous --drop_path_prob 0.2", (480, 120),
                     marks=pytest.mark.slow),
        pytest.param(f"train_search_tas.py {TAS} --depth 8 --flop_ratio 0.5", (180, 100),
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_no_step_waits_for_the_gpu(command, sizes, tmp_path):
    """As many waits, whether an epoch has few steps or many."""
    script = tmp_path / "count.py"
    script.write_text(f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport standin\n"
                      "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
                      "print('waits', standin.WAITS.total())\n")  # fmt: skip
    name, *flags = command.split()
    counts = set()
    for size in sizes:
        words = [STAND_IN, script, ROOT / name, *flags, "--batch_size", str(size)]
        said = subprocess.check_output(
            [*warm_python(), *words], cwd=tmp_path, text=True, env=ENVIRONMENT
        )
        counts.add(int(said.split("waits ")[1]))
    assert len(counts) == 1, counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--form fused --recompute",
        "--form fused-contiguous --sampling random",
        "--form plain --deterministic --eigenvalue 1",
        "--form fused --amp",
    ],
)
def test_a_search(flags, tmp_path):
    assert_graphs(run(f"{SEARCH} {flags} --save one", tmp_path), 120)


@pytest.mark.slow
def test_a_search_of_second_order(tmp_path):
    said = run(f"{SEARCH} --form fused --unrolled", tmp_path)
    assert_graphs(said, 120)
    # L_train in the weights, L_val in both, L_train in alphas and betas at w +- R v
    assert len(set(re.findall(r"CUDA graph of (\d+) gradients", said))) == 3


@pytest.mark.slow
def test_the_choice_of_the_form(tmp_path):
    said = run(SEARCH, tmp_path)
    tried = re.search(r"form [\w -]+, the fastest; ms a step: (.*) \(tried in", said)[1]
    assert len(re.findall(r"(?:fused|plain)[a-z -]* [\d.]+", tried)) == 8, tried
    assert "no CUDA graph" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    ["--layout channels_last --drop_path_prob 0.2", "--layout contiguous --cutout"],
)
def test_a_training_is_that_of_the_cpu(flags, tmp_path):
    for name, on_gpu in (("cpu", False), ("gpu", True)):
        run(f"{TRAIN} {flags} --save {name}", tmp_path, on_gpu)
    assert_near(tmp_path, "eval-cpu-*", "eval-gpu-*", 0.01)
    [folder] = tmp_path.glob("eval-gpu-*")
    assert "top-1" in run(f"test.py --model_path {folder.name}", tmp_path)


@pytest.mark.slow
def test_a_search_told_to_end_goes_on(tmp_path):
    """With graphs in its second half, too."""
    words = shlex.split(f"{SEARCH} --form fused --report_freq 1 --save one")
    words = [*warm_python(), STAND_IN, ROOT / words[0], *words[1:]]
    process = subprocess.Popen(words, cwd=tmp_path, text=True, env=ENVIRONMENT,
                               stdout=subprocess.PIPE)  # fmt: skip
    for line in process.stdout:
        if "search step 4 of" in line:
            process.terminate()
            break
    process.communicate()
    assert process.returncode == 143
    [folder] = tmp_path.glob("search-one-*")
    said = run(f"train_search.py --resume {folder.name}", tmp_path)
    assert_graphs(said, 120)
    run(f"{SEARCH} --form fused --save whole", tmp_path)
    assert_near(tmp_path, "search-one-*", "search-whole-*", 1e-6)


@pytest.mark.slow
def test_the_scripts_of_auto_reid(tmp_path):
    for order in ("--first_order", ""):
        said = run(f"train_search_reid.py {REID} {order} --save one", tmp_path)
        assert_graphs(said, 8)
    said = run(f"train_reid.py {REID} --eval_freq 1 --warm_up 1", tmp_path)
    assert "retrieval: mAP" in said


@pytest.mark.slow
def test_the_scripts_of_tas(tmp_path):
    run(f"train_search_tas.py {TAS} --depth 8 --flop_ratio 0.5 --save one", tmp_path)
    [folder] = tmp_path.glob("search-one-*")
    assert "test accuracy" in run(f"train_tas.py {TAS} --arch {folder.name}", tmp_path)


@pytest.mark.slow
def test_the_scripts_of_imagenet(tmp_path):
    fill(tmp_path / "data" / "imagenet" / "train", {"cat": 100, "dog": 90, "owl": 90})
    fill(tmp_path / "data" / "imagenet" / "val", {"cat": 3, "dog": 5, "owl": 3})
    flags = f"{IMAGENET} --batch_size 6 --epochs 2 --begin 1 --form fused"
    assert_graphs(run(f"train_search_imagenet.py {flags}", tmp_path), 6)
    said = run(f"train_imagenet.py {IMAGENET} --batch_size 30 --epochs 2", tmp_path)
    assert "validation accuracy" in said


UNKNOWN = "capture_that_fails or data_parallel or nccl"  # see standin.py


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layouts", "chosen", "tests"),
    [
        ("", f"not ({UNKNOWN})", 70),
        *((name, "golden_figures or all_gradients", 60)
          for name in ("contiguous", "channels_last", "drawn")),
    ],
)  # fmt: skip
def test_the_tests_of_a_gpu(layouts, chosen, tests):
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", chosen]
    done = subprocess.run(
        [*warm_python(), STAND_IN, *words, "tests/test_device.py"], cwd=ROOT, text=True,
        capture_output=True, env=ENVIRONMENT | {"STANDIN_LAYOUTS": layouts},
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and int(passed[1]) >= tests, done.stdout[-3000:]
