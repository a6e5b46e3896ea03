"""The scripts of TAS as people run them: alone, told to end, resumed, in two processes, misused."""

import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tas
from harness import data, distributed, report, script
from helpers import torchrun, warm_python
from tas import found, loops, pictures
from test_distributed import in_processes
from utils import UserError

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
DIGITS = "--set digits --input_size 8"
TINY = f"{DIGITS} --batch_size 180 --epochs 2"  # 4 steps an epoch of a search, 8 of a training
SEARCH = f"train_search_tas.py {TINY} --depth 8 --flop_ratio 0.5"
TRAIN = f"train_tas.py {TINY}"


def start(command, cwd, processes=None):
    """The process of a command, under torchrun if there are several processes."""
    name, *flags = command.split()
    python = torchrun(processes) if processes else [*warm_python(), "-u"]
    return subprocess.Popen(
        [*python, ROOT / name, *flags], cwd=cwd, text=True, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(command, cwd, processes=None, code=0):
    """(the output of a command, the folder that it made)"""
    before = set(cwd.iterdir())
    process = start(command, cwd, processes)
    output = process.communicate()[0]
    assert process.returncode == code, output
    return output, next(iter(set(cwd.iterdir()) - before), None)


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def weights(folder):
    return torch.load(folder / "weights.pt", weights_only=True)


def assert_same(one, other):
    """The same weights and figures to the bit, time and memory apart."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    timed = {"seconds", "images_per_second", "memory_mib"}
    for a, b in zip(rows(one), rows(other), strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {
            k: v for k, v in b.items() if k not in timed
        }
    for name in ("widths.jsonl", "tas.json"):
        assert (one / name).exists() == (other / name).exists()
        if (one / name).exists():
            assert (one / name).read_text() == (other / name).read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A search with depth, its teacher and its student: folders and outputs by name."""
    cwd = tmp_path_factory.mktemp("tas")
    made = {"cwd": cwd}
    outputs = {}
    outputs["search"], made["search"] = run(f"{SEARCH} --report 1", cwd)
    outputs["teacher"], made["teacher"] = run(f"{TRAIN} --arch unpruned --depth 8", cwd)
    flags = f"--arch {made['search']} --teacher {made['teacher']} --report 2"
    outputs["student"], made["student"] = run(f"{TRAIN} {flags}", cwd)
    return made | {"outputs": outputs}


def test_a_search_leaves_what_it_found(made):
    folder, output = made["search"], made["outputs"]["search"]
    network = found.load(str(folder))
    line = next(line for line in output.splitlines() if "network = " in line)
    assert found.load(line.split("network = ")[1]) == network
    size = (8, 8)
    wanted = tas.multiply_adds(8, network.channels, 10, None, size)
    assert network.multiply_adds == pytest.approx(wanted, abs=1e-6)
    unpruned = tas.multiply_adds(8, tas.full_channels(8), 10, None, size)
    assert network.target == pytest.approx(0.5 * unpruned, abs=1e-6)
    model = tas.SearchNetwork(8, 10)
    model.load_state_dict(weights(folder))
    assert model.derive() == (network.channels, network.blocks)
    assert f"python train_tas.py --arch {folder.name} --set digits --input_size 8" in output


def test_a_search_records_every_epoch(made):
    folder, output = made["search"], made["outputs"]["search"]
    first, second = rows(folder)
    assert [float(row["tau"]) for row in (first, second)] == pytest.approx([10, 0.1])
    assert [float(row["learning_rate"]) for row in (first, second)] == pytest.approx([0.1, 0.05])
    model = tas.SearchNetwork(8, 10)
    model.load_state_dict(weights(folder))
    expected = model.expected_multiply_adds((8, 8)).item()
    assert float(second["expected_m"]) == pytest.approx(expected, rel=1e-6)
    p = model.width_attentions.detach().softmax(1)
    assert float(second["probability_min"]) == pytest.approx(p.amax(1).min().item())
    assert float(second["entropy"]) == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-5)
    assert float(second["argmax_m"]) == pytest.approx(found.load(str(folder)).multiply_adds)
    lines = [json.loads(line) for line in (folder / "widths.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["channels"] == found.load(str(folder)).channels
    assert torch.tensor(lines[-1]["softmax_widths"]).allclose(p, atol=1e-6)
    for words in ("epoch 2 of 2", "expected", "by argmax", "target", "widths by argmax: 3 "):
        assert words in output


def test_a_search_moves_weights_and_attentions(made):
    torch.manual_seed(0)  # the default of --seed
    fresh = tas.SearchNetwork(8, 10)
    moved = weights(made["search"])["width_attentions"] - fresh.width_attentions.detach()
    assert moved.abs().max() > 1e-4 and moved.abs().max() < 2 * 8 * 1e-3  # 8 steps of Adam
    after = weights(made["search"])["classifier.weight"]
    assert not torch.equal(after, fresh.classifier.weight)


def test_a_student_learns_and_is_measured_beside_the_unpruned_network(made):
    folder, output = made["student"], made["outputs"]["student"]
    last = float(rows(folder)[-1]["test_top1"])
    assert f"test accuracy after the last epoch: {last:.2f} %" in output.splitlines()[-1]
    result = json.loads((folder / "result.json").read_text())
    network = found.load(str(folder))
    assert network[:4] == found.load(str(made["search"]))[:4]
    counts = [
        sum(p.numel() for p in each.network().parameters()) / 1e6
        for each in (network, found.load("unpruned", 8))
    ]
    assert result["parameters_m"] == pytest.approx(counts)
    unpruned = tas.multiply_adds(8, tas.full_channels(8), 10, None, (8, 8))
    assert result["multiply_adds_m"] == pytest.approx([network.multiply_adds, unpruned])
    assert all(time > 0 for n in ("1", "64") for time in result["latency_ms"][n])
    assert "best epoch" in output and "not a result" in output
    written = [(folder / name).stat().st_mtime_ns for name in ("result.json", "weights.pt")]
    assert written == sorted(written)  # weights.pt says that the run is finished
    losses = [float(rows(made[name])[-1]["loss"]) for name in ("teacher", "student")]
    assert losses[0] != losses[1]


def test_pictures_of_both(made):
    for name, titles in (
        ("search", {"widths over the epochs", "probabilities of the widths",
                    "multiply-adds over the epochs", "network before and after"}),
        ("student", {"network before and after"}),
    ):  # fmt: skip
        folder = made[name]
        assert set(pictures.pictures(folder)) == titles
        page = (folder / "report.html").read_text()
        for title in titles | {"curves"}:
            assert f"<h2>{title.capitalize()}</h2>" in page
        assert page.count("<img") == len(titles) + 1  # each once, though the PNGs lie beside it
        images = {title.replace(" ", "-") + ".png" for title in titles}
        assert images == {path.name for path in folder.glob("*.png")}


def test_what_the_pictures_show(made):
    last = pictures.read_widths(made["search"])[-1]
    full = tas.full_channels(8)
    [image] = pictures.widths(pictures.read_widths(made["search"]), full).axes[0].images
    share = [C / C_full for C, C_full in zip(last["channels"][1:], full[1:], strict=True)]
    assert image.get_array()[:, -1].tolist() == pytest.approx(share)
    [image] = pictures.probabilities(last).axes[0].images
    assert image.get_array().tolist() == last["softmax_widths"]
    curves = pictures.multiply_adds(report.read(made["search"])).axes[0].lines
    actual = next(line for line in curves if line.get_label() == "by argmax")
    wanted = [float(row["argmax_m"]) for row in rows(made["search"])]
    assert list(actual.get_ydata()) == pytest.approx(wanted)
    channels = tas.full_channels(14)
    before, after = pictures.bars(channels, channels, [2, 1, 2]).axes
    heights = [bar.get_height() for bar in after.patches]
    assert [bar.get_height() for bar in before.patches] == channels[1:]
    assert heights == [16] * 5 + [32, 32, 0, 0] + [64] * 4  # a block of stage 2 is dropped


def told_to_end(command, words, cwd):
    """The folder of a run that got SIGTERM after it printed `words`."""
    before = set(cwd.iterdir())
    process = start(command, cwd)
    assert any(words in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "go on with --resume" in output
    [folder] = set(cwd.iterdir()) - before
    return folder


def test_a_search_goes_on_to_the_bit(made):
    command = f"{SEARCH} --report_freq 1"
    folder = told_to_end(command, "search step 1 of", made["cwd"])
    assert not (folder / "weights.pt").exists()
    output, _ = run(f"train_search_tas.py --resume {folder}", made["cwd"])
    assert "resumed" in output and "steps" in output
    assert_same(folder, made["search"])


def test_a_training_goes_on_to_the_bit_without_its_teacher_s_folder(made):
    cwd = made["cwd"]
    teacher = cwd / "moved"
    shutil.copytree(made["teacher"], teacher)
    command = f"{TRAIN} --arch {made['search']} --teacher {teacher} --report_freq 1"
    folder = told_to_end(command, "train step 3 of", cwd)
    shutil.rmtree(teacher)
    run(f"train_tas.py --resume {folder}", cwd)
    assert_same(folder, made["student"])


def test_two_processes_search_and_train(made):
    cwd = made["cwd"]
    output, folder = run(f"{SEARCH} --device cpu --save two", cwd, 2)
    assert "2 processes" in output and output.count("epoch 2 of 2") == 1
    assert [row["images"] for row in rows(folder)] == ["718", "718"]  # every image once
    output, _ = run(f"train_tas.py {TINY} --arch {folder} --device cpu --save two", cwd, 2)
    assert output.count("test accuracy after the last epoch") == 1


def shared_batches():
    dataset = data.load("digits", ".", 8)
    loader = data.Batches(
        dataset.train, dataset, 100, "cpu", augment=True, shuffle=True, cutout_length=2
    )
    return list(loader)


def test_processes_share_the_batches_of_one():
    whole, parts = shared_batches(), in_processes(2, shared_batches)
    assert len(whole) == 15 and len(whole[-1][1]) == 37
    for batch, *shares in zip(whole, *parts, strict=True):
        for rank, share in enumerate(shares):
            for tensor, mine in zip(batch, share, strict=True):
                assert torch.equal(tensor[rank::2], mine)


def a_step():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    mine = slice(distributed.rank(), None, distributed.world_size())
    loss = (layer(x[mine]) - y[mine]).square().mean()
    norm = loops.step(optimizer, loss, len(y[mine]))
    return norm, *(parameter.detach() for parameter in layer.parameters())


def test_a_step_of_two_processes_is_that_of_one():
    one = a_step()
    for two in in_processes(2, a_step):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def draws(alike):
    model = tas.SearchNetwork(8, 10)
    distributed.broadcast(list(model.parameters()))
    torch.manual_seed(distributed.rank())
    if alike:
        loops.same_draws(torch.device("cpu"))
    torch.rand(3)
    try:
        loops.check_same(model, torch.device("cpu"))
    except UserError as error:
        return str(error)
    return torch.rand(2)


def test_all_processes_draw_the_same_and_it_is_checked():
    one, other = in_processes(2, draws, True)
    assert torch.equal(one, other)
    assert all("the random numbers are not the same" in text for text in in_processes(2, draws, 0))


def test_half_precision_and_searched_depths(made):
    output, folder = run(f"{SEARCH.replace('depth 8', 'depth 14')} --search_depth --amp "
                         "--tau_schedule cosine --epochs 1 --grad_clip 5", made["cwd"])  # fmt: skip
    assert len(found.load(str(folder)).blocks) == 3
    assert "blocks [" in output
    flags = f"--arch {folder} --epochs 1 --amp --cutout --cutout_length 4"
    output, _ = run(f"{TRAIN} {flags}", made["cwd"])
    assert "test accuracy after the last epoch" in output


def test_latencies_are_of_each_network():
    slow, fast = nn.Conv2d(3, 256, 7), nn.Conv2d(3, 1, 1)
    times = loops.latencies([slow, fast], torch.zeros(8, 3, 32, 32), seconds=0)
    (low, middle, high), (_, fastest, _) = times
    assert low <= middle <= high and middle > 2 * fastest > 0
    assert slow.training and fast.training


# --- wrong input ---


@pytest.fixture(scope="module")
def place(made):
    """Files of tas.json that are broken, and runs that do not fit, beside those of `made`."""
    place = made["cwd"]
    good = json.loads((made["search"] / "tas.json").read_text())

    def write(name, **changes):
        (place / f"{name}.json").write_text(json.dumps(good | changes))

    write("width", channels=[3, 5, *good["channels"][2:]])
    write("few", channels=good["channels"][:-1])
    write("grey", channels=[1, *good["channels"][1:]])
    write("words", channels=["many"])
    write("flags", channels=[True] * 8)
    write("deep", depth=9)
    write("deep_text", depth="8")
    write("no_depth", depth=None)
    write("blocks", blocks=[1, 1, 2])
    write("two_blocks", blocks=[1, 1])
    write("a_count", multiply_adds="some")
    write("more", more=1)
    write("fine")
    (place / "cut.json").write_text(json.dumps(good)[:40])
    (place / "nested.json").write_text("[" * 100_000)
    (place / "list.json").write_text("[1]")
    (place / "huge.json").write_text(" " * 1_000_001)
    (place / "binary.json").write_bytes(b"\xff\xfe\x00")
    (place / "empty").mkdir()
    for name in ("search", "teacher"):
        shutil.copytree(made[name], place / name)
    write("endless", target=float("nan"))
    write("below", multiply_adds=-1.0)
    broken = "unfinished cut_weights foreign_weights flipped other_classes one_class_less"
    for name in broken.split():
        shutil.copytree(made["teacher"], place / name)
    flipped = bytearray((place / "flipped" / "weights.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (place / "flipped" / "weights.pt").write_bytes(flipped)
    (place / "unfinished" / "weights.pt").unlink()
    (place / "cut_weights" / "weights.pt").write_bytes(b"PK")
    torch.save({"x": torch.zeros(1)}, place / "foreign_weights" / "weights.pt")
    for name, classes in (("other_classes", list("abcdefghij")), ("one_class_less", ["a"] * 9)):
        path = place / name / "args.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": classes}))
    return place


S, T = "train_search_tas.py", "train_tas.py"
ON_DIGITS = f"{DIGITS} --epochs 1"
WRONG = [
    (f"{S} {ON_DIGITS} --depth 21", "depth 21", "6n + 2"),
    (f"{S} {ON_DIGITS} --depth 2", "depth 2", "6n + 2"),
    (f"{S} {ON_DIGITS} --depth 0", "--depth"),
    (f"{S} {ON_DIGITS} --flop_ratio 0", "--flop_ratio", "more than 0"),
    (f"{S} {ON_DIGITS} --flop_ratio 1.1", "--flop_ratio", "at most 1"),
    (f"{S} {ON_DIGITS} --flop_ratio nan", "--flop_ratio"),
    (f"{S} {ON_DIGITS} --flop_ratio 0.01", "0.01", "give 0.0", "--search_depth"),
    (f"{S} {ON_DIGITS} --flop_ratio 0.01 --search_depth", "0.01", "give 0.0"),
    (f"{S} --set digits --input_size 18", "18 x 18", "multiples of 4", "20 x 20"),
    (f"{S} {ON_DIGITS} --tau_min 11", "--tau_min 11", "--tau_max 10"),
    (f"{S} {ON_DIGITS} --tau_min 0", "--tau_min"),
    (f"{S} {ON_DIGITS} --tau_schedule step", "step", "cosine"),
    (f"{S} {ON_DIGITS} --flop_weight -1", "--flop_weight"),
    (f"{S} {ON_DIGITS} --tolerance 2", "--tolerance"),
    (f"{S} {ON_DIGITS} --batch_size 1000", "1000", "718"),
    (f"{S} {ON_DIGITS} --train_portion 0", "train_portion"),
    (f"{S} --set imagenet", "imagenet", "digits"),
    (f"{S} --resume empty", "args.json"),
    (f"{S} --resume teacher", "train_tas.py"),
    (f"{S} --resume search --flop_ratio 0.6", "--flop_ratio 0.6", "0.5"),
    (f"{T} {ON_DIGITS}", "--depth"),
    (f"{T} {ON_DIGITS} --depth 10", "depth 10", "6n + 2"),
    (f"{T} --set digits --input_size 10 --depth 8", "10 x 10", "12 x 12"),
    (f"{T} {ON_DIGITS} --arch nowhere", "nowhere", "No such file"),
    (f"{T} {ON_DIGITS} --arch empty", "no tas.json", "finished"),
    (f"{T} {ON_DIGITS} --arch cut.json", "cut.json", "cut"),
    (f"{T} {ON_DIGITS} --arch nested.json", "nested.json"),
    (f"{T} {ON_DIGITS} --arch list.json", "list.json", "depth, channels"),
    (f"{T} {ON_DIGITS} --arch more.json", "more.json", "depth, channels"),
    (f"{T} {ON_DIGITS} --arch huge.json", "1 MB"),
    (f"{T} {ON_DIGITS} --arch binary.json", "not text"),
    (f"{T} {ON_DIGITS} --arch search/metrics.csv", "metrics.csv", "JSON"),
    (f"{T} {ON_DIGITS} --arch width.json", "channels[1] is 5", "4, 6, 8"),
    (f"{T} {ON_DIGITS} --arch few.json", "7 channels", "depth 8"),
    (f"{T} {ON_DIGITS} --arch grey.json", "begin with 1"),
    (f"{T} {ON_DIGITS} --arch words.json", "lists of integers"),
    (f"{T} {ON_DIGITS} --arch flags.json", "lists of integers"),
    (f"{T} {ON_DIGITS} --arch deep.json", "depth 9"),
    (f"{T} {ON_DIGITS} --arch deep_text.json", "depth is no such number"),
    (f"{T} {ON_DIGITS} --arch no_depth.json", "depth is no such number"),
    (f"{T} {ON_DIGITS} --arch blocks.json", "blocks[2] is 2"),
    (f"{T} {ON_DIGITS} --arch two_blocks.json", "2 numbers of blocks"),
    (f"{T} {ON_DIGITS} --arch a_count.json", "are numbers"),
    (f"{T} {ON_DIGITS} --arch endless.json", "are numbers"),
    (f"{T} {ON_DIGITS} --arch below.json", "are numbers"),
    (f"{T} {ON_DIGITS} --arch ~nobody-of-this-name/x", "home folder"),
    (f"{T} --set folder --data ~nobody-of-this-name/x --depth 8", "home folder"),
    (f"{T} {ON_DIGITS} --depth 8 --teacher ~nobody-of-this-name/x", "home folder"),
    (f"{T} {ON_DIGITS} --depth 8 --teacher=", "no run of train_tas.py"),
    (f"{T} {ON_DIGITS} --depth 8 --teacher flipped", "weights.pt", "no intact"),
    (f"{T} {ON_DIGITS} --depth 8 --teacher teacher --mean .5,.5,.5", "normalized"),
    (f"{T} --set digits --depth 8 --teacher teacher", "8 x 8, not 16 x 16"),
    (f"{S} {ON_DIGITS} --tau_max 1e-40 --tau_min 1e-42", "--tau_max"),
    (f"{T} {ON_DIGITS} --arch fine.json --depth 20", "depth 8, not 20"),
    (f"{T} {ON_DIGITS} --arch {{}}", "--arch", "depth, channels"),
    (f"{T} {ON_DIGITS} --depth 8 --teacher nowhere", "nowhere", "no run of train_tas.py"),
    (f"{T} {ON_DIGITS} --depth 8 --teacher search", "search", "no run of train_tas.py"),
    (f"{T} {ON_DIGITS} --depth 8 --teacher unfinished", "weights.pt", "finished"),
    (f"{T} {ON_DIGITS} --depth 8 --teacher cut_weights", "weights.pt"),
    (f"{T} {ON_DIGITS} --depth 8 --teacher foreign_weights", "another network"),
    (f"{T} {ON_DIGITS} --depth 8 --teacher other_classes", "other classes"),
    (f"{T} {ON_DIGITS} --depth 8 --teacher one_class_less", "9, not 10, classes"),
    (f"{T} {ON_DIGITS} --depth 8 --temperature 0", "--temperature"),
    (f"{T} {ON_DIGITS} --depth 8 --distillation 1.5", "--distillation"),
    (f"{T} {ON_DIGITS} --depth 8 --batch_size 5000", "5000", "1437"),
]  # fmt: skip


@pytest.mark.parametrize("command, words", [(command, words) for command, *words in WRONG])
def test_wrong_input_is_one_line(command, words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    name, *flags = command.split()
    monkeypatch.setattr(sys, "argv", [name, *flags])
    before = set(place.rglob("*"))
    module = importlib.import_module(name.removesuffix(".py"))
    with pytest.raises(SystemExit) as exit:
        script.run(module.main, module.get_args)
    err = capsys.readouterr().err
    assert exit.value.code == 2
    assert err.count("\n") == 1 and err.startswith(f"{name}: error: ")
    for word in words:
        assert word in err
    assert set(place.rglob("*")) == before


def test_the_smallest_ratio_that_is_named_can_be_searched(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    module = importlib.import_module("train_search_tas")
    monkeypatch.setattr(sys, "argv", f"{S} {ON_DIGITS} --depth 8 --flop_ratio 0.05".split())
    with pytest.raises(SystemExit):
        script.run(module.main, module.get_args)
    named = float(capsys.readouterr().err.split("give ")[1].split()[0])
    least = tas.smallest_ratio(8, 10, size=(8, 8))
    assert least <= named < least + 2e-4


def test_visualize_writes_the_pictures_of_a_run(made):
    output, out = run(f"visualize.py {made['search']} --out {made['cwd']}/drawn", made["cwd"])
    assert str(out / "report.html") in output
    assert "Widths over the epochs" in (out / "report.html").read_text()
    assert (out / "widths-over-the-epochs.png").exists()


def test_a_trained_network_can_be_exported(made):
    pytest.importorskip("onnxruntime")
    output, out = run(f"export.py {made['student']} --out {made['cwd']}/exported", made["cwd"])
    assert "logits agree" in output
    network = torch.export.load(out / "network.pt2").module()
    trained = found.load_trained(made["student"]).eval()
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(network(x), trained(x), rtol=1e-4, atol=1e-4)


def test_a_trained_network_can_be_tested_again(made):
    output, _ = run(f"test.py --model_path {made['student']} --set digits", made["cwd"])
    assert f"top-1 {float(rows(made['student'])[-1]['test_top1']):.2f} %" in output.splitlines()[-1]
    output, _ = run(f"test.py --model_path {made['search']}", made["cwd"], code=2)
    assert "python train_tas.py --arch" in output and output.count("\n") == 1


def test_runs_are_compared(made, tmp_path):
    runs = [report.read(made[name]) for name in ("search", "search", "teacher", "student")]
    searches, trainings = report.tables(runs)
    assert (
        searches[0]["multiply-adds (M)"]
        == f"{float(rows(made['search'])[-1]['argmax_m']):.1f} ± 0.0"
    )
    assert all("±" not in row["parameters (M)"] != "–" for row in trainings)
    assert report.compare(runs, tmp_path / "comparison.html").exists()


def test_every_picture_has_the_wanted_format(made, tmp_path):
    run(f"visualize.py {made['search']} --format svg --out {tmp_path}", made["cwd"])
    assert (tmp_path / "widths-over-the-epochs.svg").exists()
    run(f"visualize.py {made['search']}/tas.json --format pdf --out {tmp_path}", made["cwd"])
    assert (tmp_path / "tas-network.pdf").exists()


@pytest.mark.parametrize(
    "changes",
    [{"depth": 21}, {"depth": "x"}, {"depth": 20}, {"flop_ratio": 0}, {"tolerance": None}],
)
def test_damaged_arguments_are_one_line(changes, made, tmp_path):
    folder = shutil.copytree(made["search"], tmp_path / "damaged")
    about = json.loads((folder / "args.json").read_text())
    about["args"] |= changes
    (folder / "args.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="is damaged"):
        pictures.pictures(folder)


def test_dropped_blocks_are_grey():
    channels = tas.full_channels(14)
    epochs = [{"channels": channels, "blocks": [2, 1, 2]}]
    [image] = pictures.widths(epochs, channels).axes[0].images
    dropped = [row for row, share in enumerate(image.get_array()[:, 0]) if share is np.ma.masked]
    assert dropped == [7, 8]  # of the stem and 4 in each stage the last two of the second


@pytest.mark.parametrize("text", ['{"channels": 1}\n', "[]\n", "{\n"])
def test_damaged_records_are_one_line(text, made, tmp_path):
    folder = shutil.copytree(made["search"], tmp_path / "damaged")
    (folder / "widths.jsonl").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        pictures.pictures(folder)
