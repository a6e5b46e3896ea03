"""Auto-ReID's scripts as processes, on the digits and on a folder in Market-1501's form."""

import csv
import json
import math
import os
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import genotypes
from harness import report
from helpers import torchrun, warm_python
from reid import PKBatches, data, trained
from reid.flags import whole_numbers
from reid.loader import Loader, embed
from reid.losses import RetrievalLoss
from reid.model import ReIDNetwork
from reid.supernet import Supernet
from test_distributed import in_processes

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = "--layers 1,1,1 --init_channels 6 --embedding 8 --height 64 --width 32 --workers 1"
SMALL += " --identities 4 --instances 2 --report_freq 1 --save_every 0.00001"
DIGITS = f"{SMALL} --set digits"
SEARCH = f"train_search_reid.py {DIGITS} --epochs 2 --first_order"
TRAIN = f"train_reid.py {DIGITS} --epochs 3 --eval_freq 2 --warm_up 1 --drop_path_prob 0.3"


def start(command, cwd, processes=None):
    script, *flags = command.split()
    python = torchrun(processes) if processes else warm_python()
    return subprocess.Popen(
        [*python, ROOT / script, *flags], cwd=cwd,
        text=True, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(command, cwd, processes=None, code=0):
    process = start(command, cwd, processes)
    output = process.communicate()[0]
    assert process.returncode == code, output
    return output


def only(cwd, pattern):
    [folder] = cwd.glob(pattern)
    return folder


def rows(folder):
    varying = ("seconds", "images_per_second", "memory_mib")
    table = csv.DictReader((folder / "metrics.csv").open())
    return [{name: row[name] for name in row if name not in varying} for row in table]


def assert_same_end(one, other):
    first, second = (torch.load(folder / "weights.pt") for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rows(one) == rows(other)


def market(root, identities=6, per_camera=2, shape=(16, 8)):
    """A folder in Market-1501's form of grey bands, a shade for each identity."""
    draw = np.random.default_rng(0)
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (root / part).mkdir(parents=True)
        for i in range(1, identities + 1):
            for camera in (1, 2):
                for n in range(per_camera):
                    image = draw.integers(0, 60, (*shape, 3)) + 30 * i
                    name = f"{i:04d}_c{camera}s1_{n:06d}_00.jpg"
                    Image.fromarray(image.astype(np.uint8)).save(root / part / name)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with an undisturbed search and training: search-whole-*, eval-whole-*."""
    cwd = tmp_path_factory.mktemp("reid")
    (cwd / "search.txt").write_text(run(f"{SEARCH} --save whole", cwd))
    arch = only(cwd, "search-whole-*")
    (cwd / "train.txt").write_text(run(f"{TRAIN} --arch {arch} --save whole --rerank", cwd))
    return cwd


def test_a_search(whole):
    folder, output = only(whole, "search-whole-*"), (whole / "search.txt").read_text()
    genotype = genotypes.load(str(folder), genotypes.PRIMITIVES_REID)
    printed = [line for line in output.splitlines() if "genotype = " in line][-1]
    assert genotypes.parse(printed, genotypes.PRIMITIVES_REID) == genotype
    assert '"primitives"' in (folder / "genotype.json").read_text()
    assert "721 images for the weights, 716 for alphas" in output
    assert [float(row["learning_rate"]) for row in rows(folder)] == pytest.approx([0.1, 0.0505])
    state = torch.load(folder / "weights.pt")
    assert state["alphas_normal"].shape == (14, 7) and "betas_normal" not in state
    assert all(state[f"alphas_{kind}"].abs().max() > 0.05 for kind in ("normal", "reduce"))


def test_a_training(whole):
    folder, output = only(whole, "eval-whole-*"), (whole / "train.txt").read_text()
    names = ("rank1", "rank5", "rank10", "rank20", "mAP")
    first, *tested = ([float(row[name]) for name in names] for row in rows(folder))
    assert all(map(math.isnan, first))
    assert all(0 < row[-1] <= 100 and row[:4] == sorted(row[:4]) for row in tested)
    assert f"after the last epoch: mAP {tested[1][4]:.2f} %, rank-1 {tested[1][0]:.2f} %" in output
    assert "re-ranked: mAP" in output
    again = run(f"train_reid.py --test {folder} --rerank", whole).splitlines()
    figures = [line.split("mAP")[1] for line in output.splitlines() if "after the last" in line]
    assert [line.split("mAP")[1] for line in again if "mAP" in line] == figures
    rates = [float(row["learning_rate"]) for row in rows(folder)]
    assert rates == pytest.approx([0.001, 0.01, 0.01])


@pytest.mark.slow
def test_a_resnet_to_compare_with(whole, tmp_path):
    output = run(f"{TRAIN} --epochs 1 --arch resnet18 --save_every 10", tmp_path)
    folder = only(tmp_path, "eval-*")
    assert "resnet18 of torchvision, not pretrained: --layers, --init_channels and" in output
    assert "network: 11.180" in output and not (folder / "genotype.json").exists()
    [figures] = [line.split("mAP")[1] for line in output.splitlines() if "after the last" in line]
    assert figures in run(f"train_reid.py --test {folder}", tmp_path)
    assert "nothing is left to do" in run(f"train_reid.py --resume {folder}", tmp_path)
    cells = only(whole, "eval-whole-*")
    output = run(f"train_reid.py --test {cells} --arch resnet18", tmp_path, code=2)
    assert "Traceback" not in output and "leave --arch out" in output.splitlines()[-1]
    for path in (cells, cells / "weights.pt", only(whole, "search-whole-*")):
        output = run(f"test.py --model_path {path}", tmp_path, code=2)
        assert "is of" in output and output.count("\n") == 1, output


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cells", "resnet"])
def test_a_network_is_exported(whole, tmp_path, kind):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    folder = only(whole, "eval-whole-*")
    if kind == "resnet":
        run(f"{TRAIN} --epochs 1 --arch resnet18", tmp_path)
        folder = only(tmp_path, "eval-*")
    output = run(f"export.py {folder} --out {tmp_path / 'out'} --batch_size 3", tmp_path)
    assert "embeddings agree to 0.0001" in output
    assert output.endswith("less (0.4850, 0.4560, 0.4060), divided by (0.2290, 0.2240, 0.2250)\n")
    network, (height, width) = trained.load(folder)
    assert f"of {height} x {width} pixels" in output
    images = torch.randn(5, 3, height, width)
    given = torch.export.load(tmp_path / "out" / "network.pt2").module()(images)
    torch.testing.assert_close(given, network(images), rtol=1e-3, atol=1e-4)
    assert given.shape == (5, 8)
    damaged = copy_of(folder, tmp_path / "damaged")
    about = json.loads((damaged / "args.json").read_text())
    about["args"]["embedding"] = "32"
    (damaged / "args.json").write_text(json.dumps(about))
    assert "args.json is damaged" in run(f"export.py {damaged}", tmp_path, code=2)


def copy_of(folder, to):
    to.mkdir()
    for name in ("args.json", "weights.pt", "genotype.json"):
        if (folder / name).exists():
            (to / name).write_bytes((folder / name).read_bytes())
    return to


def test_the_plain_form_is_searched_alike(whole, tmp_path):
    run(f"{SEARCH} --plain --save plain", tmp_path)
    folders = only(tmp_path, "search-plain-*"), only(whole, "search-whole-*")
    losses = [[float(row["loss"]) for row in rows(folder)] for folder in folders]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)  # before rounding has grown
    assert losses[0][1] == pytest.approx(losses[1][1], rel=0.05)


def test_pictures_of_a_run(whole):
    pytest.importorskip("matplotlib")
    folder = only(whole, "eval-whole-*")
    # A run with weights is finished: none without its pictures.
    last = (folder / "weights.pt").stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns <= last for path in folder.glob("*.png"))
    with Image.open(folder / "retrieved.png") as picture:
        assert min(picture.size) > 300
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "normal cell" in page.lower()
    assert "Training: rank1" in page
    figure = report.pictures(report.read(folder))["curves"][1]
    labels = [[line.get_label() for line in axes.lines] for axes in figure.axes[:2]]
    assert labels[0] == ["training"] and labels[1][:3] == ["training", "rank1", "mAP"]
    assert [label.split(":")[0] for label in labels[1][3:]] == ["best", "last"]


@pytest.mark.parametrize("command", [SEARCH, TRAIN], ids=["search", "training"])
def test_a_run_told_to_end_goes_on_to_the_bit(whole, tmp_path, command):
    kind = "search" if "search" in command else "eval"
    if kind == "eval":
        command += f" --rerank --arch {only(whole, 'search-whole-*')}"
    process = start(f"{command} --save told", tmp_path)
    for line in process.stdout:
        if re.search("step 0 of ", line):  # in the middle of an epoch, behind a checkpoint
            process.send_signal(signal.SIGTERM)
            break
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    folder = only(tmp_path, f"{kind}-told-*")
    assert f"go on with --resume {folder.name}" in output
    output = run(f"{command.split()[0]} --resume {folder} --workers 0", tmp_path)
    assert re.search(r"resumed .* after epoch \d of \d and [123] steps", output), output
    assert_same_end(only(whole, f"{kind}-whole-*"), folder)


def test_a_training_told_to_end_in_its_retrieval_goes_on_to_the_bit(whole, tmp_path):
    program = (
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from harness import script\nimport train_reid\nretrieve = train_reid.retrieve\n"
        "def told(*args, **kwargs):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return retrieve(*args, **kwargs)\n"
        "train_reid.retrieve = told\n"
        "script.run(train_reid.main, train_reid.get_args)\n"
    )
    told = tmp_path / "told" / "train_reid.py"  # a run knows its script by this name
    told.parent.mkdir()
    told.write_text(program)
    command = f"{TRAIN} --rerank --arch {only(whole, 'search-whole-*')} --save in-it"
    process = start(command.replace("train_reid.py", str(told)), tmp_path)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    folder = only(tmp_path, "eval-in-it-*")
    again = start(f"{told} --resume {folder}", tmp_path)  # in the same retrieval
    output = again.communicate()[0]
    assert again.returncode == 128 + signal.SIGTERM, output
    output = run(f"train_reid.py --resume {folder}", tmp_path)
    assert re.search(r"after epoch 1 of 3 and \d+ steps", output), output
    assert_same_end(only(whole, "eval-whole-*"), folder)


def test_two_processes(whole, tmp_path):
    output = run(f"{SEARCH} --epochs 1 --save two", tmp_path, 2)
    assert "2 processes" in output and len(re.findall("epoch 1 of 1", output)) == 1
    arch = only(tmp_path, "search-two-*")
    output = run(f"{TRAIN} --epochs 1 --arch {arch} --save two", tmp_path, 2)
    folder = only(tmp_path, "eval-two-*")
    [figures] = [line.split("mAP")[1] for line in output.splitlines() if "after the last" in line]
    assert figures in run(f"train_reid.py --test {folder}", tmp_path, 2)


def embeddings():
    """Of the digits' queries, by all processes."""
    torch.manual_seed(0)
    network = ReIDNetwork(6, 3, (1, 1, 1), genotypes.REID_SEARCH, embedding=8)
    images = data.load("digits").query
    args = SimpleNamespace(height=64, width=32, identities=4, instances=5, workers=0)
    return embed(network, data.select(images, range(31)), args, torch.device("cpu"))


def test_embeddings_are_gathered_in_order_each_image_once():
    for found in in_processes(2, embeddings):
        torch.testing.assert_close(found, embeddings(), rtol=1e-4, atol=1e-5)


def test_a_folder_in_market_form(tmp_path):
    market(tmp_path / "data")
    flags = f"{SMALL} --data data --epochs 1"
    output = run(f"train_search_reid.py {flags} --init_channels 12 --k 2 --loss ce", tmp_path)
    assert "6 identities; 12 images for the weights, 12 for alphas" in output
    assert "betas_normal" in torch.load(only(tmp_path, "search-*") / "weights.pt")
    (tmp_path / "data" / "query" / "0077_c1s1_000000_00.jpg").write_bytes(
        next((tmp_path / "data" / "query").glob("0001*")).read_bytes()
    )
    output = run(f"train_reid.py {flags} --arch REID_SPACE --amp --schedule cosine", tmp_path)
    assert "queries without an image by another camera, which do not count: 1" in output


BAD = {
    "no set": ("train_reid.py --data nowhere", "nowhere is no folder"),
    "another space": ("train_reid.py --set digits --arch PC_DARTS_cifar", "sep_conv_5x5"),
    "another resnet": ("train_reid.py --set digits --arch resnet19", "resnet19"),
    "idle lambda": ("train_search_reid.py --set digits --loss ce --lambda 0.7", "--lambda does"),
    "idle margin of no triplets": (
        "train_reid.py --set digits --lambda 1 --margin 0.2",
        "--margin does nothing with --lambda",
    ),
    "idle milestones": (
        "train_reid.py --set digits --schedule cosine --milestones 5",
        "--milestones does nothing",
    ),
    "idle margin": ("train_reid.py --set digits --loss ce --margin 0.2", "--margin does nothing"),
    "too small": ("train_search_reid.py --set digits --height 32", "32 x 32"),
    "too small to train": (f"{TRAIN} --height 16 --arch REID_SEARCH", "16 x 32"),
    "odd": (f"{TRAIN} --height 72 --width 36 --arch REID_SEARCH", "72 x 36"),
    "too many identities": (f"{SEARCH} --identities 11", "11 identities is more than the 10"),
    "lambda": (f"{SEARCH} --lambda 1.5", "--lambda"),
    "layers": (f"{SEARCH} --layers 2,x", "--layers"),
    "no value": ("train_reid.py --test", "--test: expected one argument"),
    "empty stage": (f"{SEARCH} --layers 2,0", "--layers"),
    "test of nothing": ("train_reid.py --test nowhere", "no args.json"),
    "k": (f"{SEARCH} --k 5", "5"),
    "k too large": (f"{SEARCH} --init_channels 8 --k 4", "lower --k"),
    "no triplets": (f"{SEARCH} --instances 1", "--instances"),
    "no triplets in training": (f"{TRAIN} --instances 1 --arch REID_SEARCH", "--instances"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_flags_are_one_line(tmp_path, name):
    command, words = BAD[name]
    assert_one_line(run(command, tmp_path, code=2), words, tmp_path)


def assert_one_line(output, words, cwd):
    [line] = [line for line in output.splitlines() if "error" in line]
    assert words in line and "Traceback" not in output
    assert not [*cwd.glob("search-*"), *cwd.glob("eval-*")]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: [p.unlink() for p in (d / "query").iterdir()], "no query images"),
        (lambda d: os.rename(d / "query", d / "other"), "no folder query"),
        (lambda d: (d / "query" / "name.jpg").write_text(""), "not named PID_cCAMERA"),
        (lambda d: [p.unlink() for p in d.glob("*/*_c2s*")], "of camera 1"),
        (lambda d: [p.unlink() for p in sorted(d.glob("bounding_box_train/0003*"))[1:]],
         "identity 3 has one image"),
        (lambda d: [p.unlink() for p in d.glob("bounding_box_train/000[3456]*")], "than the 2"),
        (lambda d: [p.write_text("x") for p in d.glob("bounding_box_train/0002*")],
         "no intact image"),
        (lambda d: (d / "query" / "99999999999999999999_c1s1.jpg").write_text(""),
         "not named PID_cCAMERA"),
        (lambda d: os.rename(next(d.glob("query/0001*")), d / "query" / "0000_c2s1_x.jpg"),
         "a distractor"),
    ],
    ids=["empty", "missing", "name", "camera", "single", "few", "damaged", "number", "distractor"],
)  # fmt: skip
def test_wrong_data_is_one_line(tmp_path, spoil, words):
    market(tmp_path / "data")
    spoil(tmp_path / "data")
    command = f"train_reid.py {SMALL} --data data --epochs 1 --arch REID_SEARCH --save_every 10"
    assert_one_line(run(command, tmp_path, code=2), words, tmp_path)


def test_a_run_of_other_images_is_not_resumed(tmp_path):
    market(tmp_path / "data")
    command = f"train_reid.py {SMALL} --data data --arch REID_SEARCH --save_every 10 --epochs 1"
    run(command, tmp_path)
    folder = only(tmp_path, "eval-*")
    (folder / "weights.pt").unlink()
    next((tmp_path / "data" / "query").iterdir()).unlink()
    output = run(f"train_reid.py --resume {folder}", tmp_path, code=2)
    assert "is of other images: give the data of the run" in output.splitlines()[-1]


def test_loader_goes_on_where_it_was():
    people = data.load("digits")
    labels, _ = data.labels(people.train.ids)

    def make():
        batches = PKBatches(people.train.ids, 3, 2, seed=1)
        device = torch.device("cpu")
        return Loader(people.train, labels, batches, (16, 8), device, 0, flip=True, erase=True)

    one, other = make(), make()
    expected = [[x for x, _ in one] for _ in range(2)]
    assert len(expected[0]) == 4 and not torch.equal(expected[0][0], expected[1][0])
    steps = other.forever()
    for _ in range(6):
        next(steps)
    torch.rand(3)  # which moves nothing
    third = make()
    third.load_state_dict(other.state_dict())
    rest = [x for x, _ in third]
    assert len(rest) == 2 and all(map(torch.equal, rest, expected[1][2:]))


@pytest.mark.parametrize("k", [1, 2])
def test_supernet_is_the_same_in_both_forms(k):
    x, y = torch.randn(6, 3, 64, 32).double(), torch.tensor([0, 0, 1, 1, 2, 2])
    losses, state = [], None
    for fused in (False, True):
        torch.manual_seed(0)
        network = Supernet(12, 3, whole_numbers("1,2,1"), RetrievalLoss(), k, 5, fused).double()
        assert network.fused == fused
        state = network.state_dict() if state is None else state
        network.load_state_dict(state)
        embeddings, logits = network(x)
        assert embeddings.shape == (6, 5) and logits.shape == (6, 3)
        loss = network._loss(x, y)
        gradients = torch.autograd.grad(loss, network.arch_parameters())
        losses.append([loss, *gradients])
    torch.testing.assert_close(losses[1], losses[0])
    assert len(network.new().arch_parameters()) == (2 if k == 1 else 4)
