"""The ImageNet scripts as processes, alone and under torchrun, killed and resumed."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import genotypes
from harness import script
from helpers import torchrun, warm_python
from test_imagenet import fill

ROOT = Path(__file__).parents[1]
SMALL = "--init_channels 8 --layers 3 --input_size 32 --workers 1 --tmp_data_dir"
SEARCH = f"{SMALL} data --batch_size 6 --epochs 2 --begin 1"
TRAIN = f"{SMALL} few --batch_size 16 --epochs 3 --drop_path_prob 0.2"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # the processes share the cores


def start(command, cwd, processes=None):
    """The process of a command, under torchrun if there are several processes."""
    script, *flags = command.split()
    python = torchrun(processes) if processes else warm_python()
    return subprocess.Popen(
        [*python, ROOT / script, *flags], cwd=cwd, text=True, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(command, cwd, processes=None):
    """The output of a command that must succeed."""
    process = start(command, cwd, processes)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def kill_after(process, words, pid=None):
    """Kills the process (or the one `pid` of it names) when it has printed a line with `words`."""
    for line in process.stdout:
        if words in line:
            os.kill(process.pid if pid is None else pid(), signal.SIGKILL)
            return process.communicate()[0]
    raise AssertionError(f"{words} never came")


def weights(folder, name="weights.pt"):
    return torch.load(folder / name, weights_only=True)


def rows(folder):
    return list(csv.DictReader((folder / "metrics.csv").open()))


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    """A folder with photos in data/imagenet, fewer in few/, and a search of data: search-one-*."""
    cwd = tmp_path_factory.mktemp("imagenet")
    fill(cwd / "data" / "imagenet" / "train", {"cat": 100, "dog": 90, "owl": 90})
    fill(cwd / "data" / "imagenet" / "val", {"cat": 3, "dog": 5, "owl": 3})
    fill(cwd / "few" / "imagenet" / "train", {"cat": 20, "dog": 19, "owl": 19})
    shutil.copytree(cwd / "data" / "imagenet" / "val", cwd / "few" / "imagenet" / "val")
    output = run(f"train_search_imagenet.py {SEARCH} --save one", cwd)
    (cwd / "search.txt").write_text(output)
    return cwd


def only(cwd, pattern):
    [folder] = cwd.glob(pattern)
    return folder


def test_a_search(cwd):
    folder, output = only(cwd, "search-one-*"), (cwd / "search.txt").read_text()
    assert {path.name for path in folder.iterdir()} == {
        "args.json", "log.txt", "metrics.csv", "genotypes.jsonl", "checkpoint.pt",
        "checkpoint.prev.pt", "scripts", "weights.pt", "genotype.json", "split_train.txt",
        "split_val.txt",
    }  # fmt: skip
    assert "28 images (9 to 10 of a class) for the weights, 6 (2 to 2) for alphas" in output
    assert [float(row["learning_rate"]) for row in rows(folder)] == pytest.approx([0.5, 0.25])
    assert [row["frozen"] for row in rows(folder)] == ["1", "0"]
    printed = [line for line in output.splitlines() if "genotype = " in line][-1]
    assert genotypes.parse(printed) == genotypes.load(str(folder))
    assert "python train_imagenet.py --arch search-one-" in output
    arch = [tensor for name, tensor in weights(folder).items() if name.startswith(("alph", "beta"))]
    assert len(arch) == 4 and all(tensor.abs().max() > 5e-3 for tensor in arch)  # one step of 6e-3


def test_a_search_on_a_given_split_is_the_same(cwd):
    one = only(cwd, "search-one-*")
    run(f"train_search_imagenet.py {SEARCH} --save split --split {one}/split_val.txt", cwd)
    again = only(cwd, "search-split-*")
    for name in ("split_train.txt", "split_val.txt"):
        assert (one / name).read_text() == (again / name).read_text()
    first, second = weights(one), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_in_one_process_and_its_resume(cwd):
    """A training that is killed and resumed ends with the same bits as one that is not."""
    arch = only(cwd, "search-one-*")
    whole = run(f"train_imagenet.py {TRAIN} --arch {arch} --save whole", cwd)
    assert "58 training and 11 validation images" in whole and "as the paper counts" in whole
    process = start(f"train_imagenet.py {TRAIN} --arch {arch} --save killed", cwd)
    kill_after(process, "train step 0 of 4: ")  # of the first epoch: no checkpoint yet
    killed = only(cwd, "eval-killed-*")
    kill_after(start(f"train_imagenet.py --resume {killed}", cwd), "epoch 2 of 3")
    output = run(f"train_imagenet.py --resume {killed} --workers 0", cwd)
    assert f"resumed {killed} after epoch 2 of 3" in output or "after epoch 1 of 3" in output
    whole_run = only(cwd, "eval-whole-*")
    for name in ("weights.pt", "model_best.pt"):
        first, second = weights(whole_run, name), weights(killed, name)
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert [row["epoch"] for row in rows(killed)] == ["1", "2", "3"]
    for one, other in zip(rows(whole_run), rows(killed), strict=True):
        assert one["loss"] == other["loss"] and one["val_top1"] == other["val_top1"]
    assert "nothing is left to do" in run(f"train_imagenet.py --resume {killed}", cwd)
    best = max(float(row["val_top1"]) for row in rows(whole_run))
    assert f"top-1 {best:.2f} %: model_best.pt" in whole
    last = rows(whole_run)[-1]
    assert f"after the last epoch: {float(last['val_top1']):.2f} %" in whole.splitlines()[-1]


@pytest.mark.slow
def test_a_search_under_torchrun_is_killed_and_goes_on_with_three(cwd):
    name = f"two-of-{os.getpid()}"  # which no other process on this machine has
    command = f"train_search_imagenet.py {SEARCH} --epochs 3 --sync_bn --save {name}"
    process = start(command, cwd, 2)

    def a_rank():  # the newest process with this command, which is none but a rank
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if f"--save\0{name}\0".encode() in path.read_bytes():
                    _, after_name = path.with_name("stat").read_text().rsplit(")", 1)
                    found.append((int(after_name.split()[19]), int(path.parent.name)))  # its start
        return max(found)[1]

    output = kill_after(process, "epoch 2 of 3", a_rank)
    assert process.returncode == 1
    assert "another process of this job ended" in output or "Signal 9" in output
    folder = only(cwd, f"search-{name}-*")
    output = run(f"train_search_imagenet.py --resume {folder}", cwd, 3)
    assert len(re.findall("epoch 3 of 3", output)) == 1  # one process speaks
    assert "3 processes" in output and "resumed" in output
    assert [row["epoch"] for row in rows(folder)] == ["1", "2", "3"]
    assert (folder / "genotype.json").exists()


def test_torchrun_told_to_end_saves_in_the_middle_of_an_epoch(cwd):
    command = f"train_imagenet.py {TRAIN} --epochs 2 --report_freq 1"
    run(f"{command} --save whole2", cwd, 2)
    process = start(f"{command} --save told", cwd, 2)
    for line in process.stdout:
        if "train step 1 of" in line:
            process.send_signal(signal.SIGTERM)
            break
    output = process.communicate()[0]
    assert process.returncode and output.count("SIGTERM: saved") == 1, output
    folder, whole = only(cwd, "eval-told-*"), only(cwd, "eval-whole2-*")
    done = weights(folder, "checkpoint.pt")
    assert done["epoch"] == 0 and done["unfinished"]["step"] >= 2
    shutil.copytree(folder, cwd / "told3")
    run(f"train_imagenet.py --resume {folder}", cwd, 2)
    resumed = weights(folder)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, resumed[name]), name
    assert [row["loss"] for row in rows(whole)] == [row["loss"] for row in rows(folder)]
    output = run("train_imagenet.py --resume told3", cwd, 3)
    assert f"after epoch 0 of 2 and {done['unfinished']['step']} steps" in output
    assert [row["images"] for row in rows(cwd / "told3")] == ["58", "58"]


def test_training_under_torchrun_counts_every_image_once(cwd):
    output = run(f"train_imagenet.py {TRAIN} --epochs 1 --save ranks", cwd, 2)
    folder = only(cwd, "eval-ranks-*")
    hits = float(rows(folder)[0]["val_top1"]) * 11 / 100
    assert hits == pytest.approx(round(hits), abs=1e-4)  # of 11 images, not of 12
    assert "58 training and 11 validation images" in output
    assert len(list(cwd.glob("eval-ranks-*"))) == 1
    state = weights(folder, "checkpoint.pt")
    assert len(state["generators"]) == 2 and state["epoch"] == 1


@pytest.fixture(scope="module")
def auxiliary(cwd):
    """A training with an auxiliary head: (folder, output)."""
    flags = f"{TRAIN} --epochs 1 --auxiliary --input_size 224 --batch_size 29 --save auxiliary"
    flags += " --lr_scheduler cosine --amp --classes 10"
    output = run(f"train_imagenet.py {flags}", cwd)
    return only(cwd, "eval-auxiliary-*"), output


def test_the_auxiliary_head_needs_224_pixels(cwd, auxiliary):
    folder, output = auxiliary
    assert weights(folder)["auxiliary_head.classifier.weight"].shape == (10, 768)
    assert "lr 0.50000" in output
    assert json.loads((folder / "args.json").read_text())["classes"] == ["cat", "dog", "owl"]
    score = run(f"test.py --model_path {folder} --workers 1", cwd)
    last = rows(folder)[-1]
    assert f"top-1 {float(last['val_top1']):.2f} %" in score and "on 11 test images" in score
    flags = f"--arch PCDARTS --set imagenet --data data --model_path {folder}/weights.pt"
    assert score.splitlines()[-1].split(": ")[1] in run(f"test.py {flags}", cwd)


def test_what_torchrun_cannot_do_is_one_line(cwd):
    process = start(f"train_imagenet.py {TRAIN} --gpu 1", cwd, 2)
    output, _ = process.communicate()
    lines = [line for line in output.splitlines() if line.startswith("train_imagenet.py: error")]
    assert process.returncode != 0 and "leave --gpu and --device out" in lines[0]


def test_bfloat16_and_synchronized_norms_go_together(cwd):
    """In both scripts; a share of one image is enough."""
    flags = "--amp --sync_bn --epochs 1 --tmp_data_dir few --save amp"
    run(f"train_imagenet.py {TRAIN} {flags} --batch_size 19", cwd, 2)
    run(f"train_search_imagenet.py {SEARCH} {flags} --begin 0 --batch_size 2", cwd, 2)
    for folder in (only(cwd, "eval-amp-*"), only(cwd, "search-amp-*")):
        assert float(rows(folder)[0]["loss"]) < 100


def test_the_layout_is_measured_before_norms_wait_for_other_processes(cwd, tmp_path):
    """As on GPUs: with the measuring forced, of one process alone."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from harness import tuning\nimport train_imagenet\n"
        "tuning.MEASURED_ON = ('cpu',)\n"
        "if __name__ == '__main__':\n    train_imagenet.main(train_imagenet.get_args())\n"
    )
    (tmp_path / "forced.py").write_text(program)
    flags = f"{TRAIN} --epochs 1 --sync_bn --save forced"
    process = start(f"{tmp_path / 'forced.py'} {flags}", cwd, 2)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and output.count("layout c") == 1, output
    [folder] = cwd.glob("eval-forced-*")
    assert set(json.loads((folder / "args.json").read_text())["layout_ms"]) == {
        "contiguous", "channels_last"
    }  # fmt: skip


def test_a_resumed_search_reads_its_own_lists(cwd, tmp_path):
    one = only(cwd, "search-one-*")
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("split_train.txt", "split_val.txt"):
        shutil.copy(one / name, lists)
    run(f"train_search_imagenet.py {SEARCH} --epochs 1 --begin 1 --split {lists} --save own", cwd)
    shutil.rmtree(lists)
    folder = only(cwd, "search-own-*")
    output = run(f"train_search_imagenet.py --resume {folder} --tmp_data_dir data/imagenet", cwd)
    assert "nothing is left to do" in output


def _without(name):
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        *map(_without, ("epoch", "model", "optimizer", "loader", "values", "generators")),
        lambda state: state.update(epoch=99),
        lambda state: state.update(epoch=-1),
        lambda state: state.update(generators=[{}]),
        lambda state: state["model"].popitem(),
        lambda state: state.update(script="train"),
        lambda state: state.update(format=99),
    ],
)
def test_checkpoints_that_do_not_fit(cwd, auxiliary, tmp_path, monkeypatch, change):
    folder, _ = auxiliary
    shutil.copytree(folder, tmp_path / "run")
    state = weights(folder, "checkpoint.pt")
    change(state)
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    assert "checkpoint.pt" in refused(tmp_path / "run", cwd, monkeypatch)


def test_a_resume_with_other_data_or_arguments(cwd, auxiliary, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(auxiliary[0], folder)
    about = json.loads((folder / "args.json").read_text())
    for change, word in (
        ({"classes": ["ant", "bee", "owl"]}, "other classes"),
        ({"args": about["args"] | {"init_channels": 16}}, "init_channels 8"),
        ({"args": about["args"] | {"epochs": 0}}, "--epochs"),
        ({"args": about["args"] | {"auxiliary": "yes"}}, "damaged"),
        ({"args": about["args"] | {"new_flag": 1}}, "new_flag"),
        ({"script": 3}, "damaged"),
        ({"script": "train_search_imagenet"}, "train_search_imagenet.py"),
    ):
        (folder / "args.json").write_text(json.dumps(about | change))
        assert word in refused(folder, cwd, monkeypatch)
    (folder / "args.json").write_text("{")
    assert "damaged" in refused(folder, cwd, monkeypatch)
    (folder / "args.json").write_text(json.dumps(about))
    line = refused(folder, cwd, monkeypatch, "--epochs", "7")
    assert "--epochs 7" in line and "which is 1" in line
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    assert "no checkpoint in" in refused(folder, cwd, monkeypatch)


def refused(folder, cwd, monkeypatch, *flags):
    """The one line with which train_imagenet.py refuses to resume, in this process."""
    import train_imagenet

    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", "--resume", str(folder), *flags])
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as exit:
        script.run(train_imagenet.main, train_imagenet.get_args)
    assert exit.value.code == 2
    assert err.getvalue().count("\n") == 1, err.getvalue()
    return err.getvalue()
