"""The scripts as people run them: as processes on tiny data, and with input that is wrong."""

import csv
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import genotypes
import model_search
import utils
from harness import files, flags
from helpers import copy_code, warm_python

ROOT = Path(__file__).parents[1]
TINY_SEARCH = "--set digits --epochs 2 --begin 1 --batch_size 128 --init_channels 8 --layers 3"
TINY_SEARCH += " --input_size 8"
TINY_TRAIN = "--set digits --epochs 2 --init_channels 4 --layers 3 --batch_size 256"


def run(command, cwd, code=0):
    """The finished process of a command that ends with this exit code."""
    script, *flags = command.split()
    done = subprocess.run(
        [*warm_python(), ROOT / script, *flags], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tiny search, the training of its cell, and the score of that: (folder, their outputs)."""
    cwd = tmp_path_factory.mktemp("runs")
    search = run(f"train_search.py {TINY_SEARCH} --save tiny", cwd)
    folder = next(cwd.glob("search-tiny-*"))
    train = run(f"train.py --arch {folder} {TINY_TRAIN} --save tiny", cwd)
    trained = next(cwd.glob("eval-tiny-*"))
    test = run(f"test.py --model_path {trained}", cwd)
    return folder, trained, search.stdout, train.stdout, test.stdout


def test_accuracy_is_counted_by_hand():
    """In per cent, of the target among the largest logits; the published argument order."""
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.1, 0.3], [0.2, 0.3, 0.4], [3.0, 2.0, 1.0]])
    top1, top2 = utils.accuracy(logits, torch.tensor([1, 2, 0, 2]), topk=(1, 2))
    assert (float(top1), float(top2)) == (25, 50)
    assert float(utils.accuracy(logits, torch.tensor([1, 0, 2, 0]))[0]) == 100


def test_what_set_seed_sets():
    kept = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    try:
        utils.set_seed(3)
        first = torch.rand(2), np.random.rand()
        assert torch.backends.cudnn.benchmark and not torch.is_anomaly_enabled()
        utils.set_seed(3, deterministic=True, detect_anomaly=True)
        assert torch.equal(first[0], torch.rand(2)) and first[1] == np.random.rand()
        assert torch.are_deterministic_algorithms_enabled() and torch.is_anomaly_enabled()
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(kept[0])
        torch.backends.cudnn.benchmark = kept[1]
        torch.autograd.set_detect_anomaly(False)


def test_search_writes_its_run_folder(runs):
    folder, _, _, _, _ = runs
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "args.json", "log.txt", "metrics.csv", "genotypes.jsonl", "checkpoint.pt",
        "weights.pt", "genotype.json", "checkpoint.prev.pt", "scripts",
    }  # fmt: skip
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [row["frozen"] for row in rows] == ["1", "0"]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([0.1, 0.05])
    lines = [json.loads(line) for line in (folder / "genotypes.jsonl").read_text().splitlines()]
    last = genotypes.from_json(json.dumps(lines[-1]))
    assert last == genotypes.load(str(folder))  # the genotype after the last update
    about = json.loads((folder / "args.json").read_text())
    assert about["args"]["layers"] == 3 and about["script"] == "train_search"


def test_search_says_what_a_user_wants_to_know(runs):
    folder, _, out, _, _ = runs
    epochs = [line for line in out.splitlines() if " epoch " in line]
    assert len(epochs) == 2
    for word in (
        "lr 0.1",
        "train loss",
        "top-1",
        "images/s",
        " s, ",
        "peak memory",
        "skip_connects",
    ):
        assert word in epochs[0]
    assert "frozen" in epochs[0] and "frozen" not in epochs[1]
    assert "not the final accuracy" in out
    assert "running on the CPU" in out or "device cuda" in out or "device mps" in out
    printed = [line for line in out.splitlines() if "genotype = " in line][-1]
    assert genotypes.parse(printed) == genotypes.load(str(folder))
    assert f"python train.py --arch {folder.name} --set digits --input_size 8" in out


def test_frozen_epochs_leave_alphas_and_betas_alone(tmp_path):
    run(f"train_search.py {TINY_SEARCH} --epochs 1 --begin 1", tmp_path)
    weights = next(tmp_path.glob("search-EXP-*")) / "weights.pt"
    found = torch.load(weights, weights_only=True)
    utils.set_seed(2)  # the default of --seed
    fresh = model_search.Network(8, 10, 3, None).state_dict()
    for name in ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce"):
        assert torch.equal(found[name], fresh[name])
    assert not torch.equal(found["stem.0.weight"], fresh["stem.0.weight"])


def test_learning_epochs_move_alphas_and_betas(runs):
    found = torch.load(runs[0] / "weights.pt", weights_only=True)
    utils.set_seed(2)
    fresh = model_search.Network(8, 10, 3, None).state_dict()
    for name in ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce"):
        moved = (found[name] - fresh[name]).abs()
        assert moved.min() > 0
        assert moved.max() < 2 * 6 * 6e-4  # 6 steps of Adam at 6e-4


def test_training_ends_with_the_last_epoch_s_accuracy(runs):
    _, trained, _, out, test = runs
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    last = f"{float(rows[-1]['test_top1']):.2f} %"
    assert f"test accuracy after the last epoch: {last}" in out.splitlines()[-1]
    assert "not a result" in out  # what it says of the best epoch
    assert f"top-1 {last}" in test and "top-5" in test and "loss" in test


def test_checkpoint_weights_and_foreign_wrapping_score_the_same(runs, tmp_path):
    _, trained, _, _, out = runs
    score = re.search(r"top-1 .* test images", out).group()  # of all, in the last line
    assert score in run(f"test.py --model_path {trained}/checkpoint.pt", tmp_path).stdout
    state = torch.load(trained / "weights.pt", weights_only=True)
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "w.pt")
    shutil.copy(trained / "args.json", tmp_path)
    published = run("test.py --model_path w.pt", tmp_path, 2)  # another network than this
    assert "no genotype.json lies beside w.pt: taking PCDARTS" in published.stdout
    assert published.stderr.count("\n") == 1
    flags = f"--model_path w.pt --arch {trained}"
    assert score in run(f"test.py {flags}", tmp_path).stdout
    other = run(f"test.py {flags} --mean 0.9,0.9,0.9 --std 0.1,0.1,0.1", tmp_path).stdout
    assert "top-1" in other and score not in other


def test_search_is_the_same_on_the_same_seed(runs, tmp_path):
    folder, *_ = runs
    run(f"train_search.py {TINY_SEARCH} --save again", tmp_path)
    again = next(tmp_path.glob("search-again-*"))
    first, second = (torch.load(path / "weights.pt", weights_only=True) for path in (folder, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_images_in_folders_run_and_second_order_too(tmp_path):
    rng = np.random.RandomState(0)
    for part, n in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.randint(0, 255, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    flags = "--set folder --data pets --input_size 16 --batch_size 4 --init_channels 8 --layers 3"
    flags += " --epochs 1 --begin 0 --unrolled --cutout --k 2"
    out = run(f"train_search.py {flags}", tmp_path).stdout
    assert "2 classes, 8 training and 8 validation images of 16 x 16" in out
    folder = next(tmp_path.glob("search-EXP-*"))
    assert f"--arch {folder.name} --set folder --data pets --input_size 16" in out


def test_the_training_reads_the_images_of_the_search():
    args = SimpleNamespace(set="folder", data="a b", input_size=64, mean="0.5,0.5,0.5", std=None)
    assert flags.same_data(args) == " --set folder --data 'a b' --input_size 64 --mean 0.5,0.5,0.5"
    args = SimpleNamespace(set="cifar10", data="../data", input_size=None, mean=None, std=None)
    assert flags.same_data(args) == ""


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    files.save({"epoch": 1}, tmp_path / "checkpoint.pt")
    monkeypatch.setattr(utils.os, "fsync", full)
    with pytest.raises(utils.UserError, match="No space left"):
        files.save({"epoch": 2}, tmp_path / "checkpoint.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert files.load(tmp_path / "checkpoint.pt") == {"epoch": 1}


def test_a_cell_pasted_into_genotypes_is_a_name(tmp_path):
    copy_code(tmp_path)
    with (tmp_path / "genotypes.py").open("a") as file:
        file.write(
            "\nMyCell = Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], "
            "normal_concat=[2], reduce=[('max_pool_3x3', 0), ('skip_connect', 1)], "
            "reduce_concat=[2])\n"
        )
    flags = f"--arch MyCell {TINY_TRAIN} --epochs 1".split()
    done = subprocess.run(
        [*warm_python(), "train.py", *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "normal_concat=[2]" in done.stdout


def test_bfloat16_and_recomputing_run(tmp_path):
    run(f"train_search.py {TINY_SEARCH} --amp --recompute --no_cuda_graph --save amp", tmp_path)
    run(f"train.py {TINY_TRAIN} --amp --save amp", tmp_path)
    (search,) = tmp_path.glob("search-amp-*")
    rows = list(csv.DictReader((search / "metrics.csv").open()))
    assert len(rows) == 2 and all(float(row["loss"]) < 10 for row in rows)


FAULTS = """
import resource, torch
from harness import script

def main(args):
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(8):
        torch.empty(2**24).fill_(1)  # 64 MiB, freed at once
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    print(min(after - before for before, after in zip(counts, counts[1:], strict=False)))

script.run(main, lambda: None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.parametrize("own, few", [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "65536"}, False)])
def test_scripts_keep_the_memory_of_large_tensors(own, few, tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS)
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    done = subprocess.run(
        [*warm_python(), "faults.py"], cwd=tmp_path, capture_output=True, text=True,
        env=environment | own | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A tensor is 16,384 pages; with transparent huge pages 32.
    faults = int(done.stdout)
    assert (faults < 16) == few, faults
