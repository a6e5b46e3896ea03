"""Runs that are killed, told to stop, disturbed, or given numbers that go wrong."""

import contextlib
import csv
import errno
import importlib
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import genotypes
import utils
from harness import files, generators, loops, runs, script
from harness.loops import Figures
from helpers import warm_python
from test_bad_inputs import Hostile
from test_imagenet import fill

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SEARCH = "train_search.py --set digits --epochs 3 --begin 1 --batch_size 180 --init_channels 4 "
SEARCH += "--layers 3 --k 2 --steps 2 --input_size 8 --save_every 0.001 --report_freq 1"
TRAIN = "train.py --set digits --epochs 3 --batch_size 300 --init_channels 4 --layers 3 "
TRAIN += "--input_size 8 --drop_path_prob 0.3 --cutout --cutout_length 4 "
TRAIN += "--save_every 0.001 --report_freq 1"


def start(command, cwd, python=(sys.executable,), **more):
    """A script as a process of its own."""
    script, *flags = command.split()
    return subprocess.Popen(
        [*python, "-u", ROOT / script, *flags], cwd=cwd, text=True, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more,
    )  # fmt: skip


def finish(process, code=0):
    output = process.communicate()[0]
    assert process.returncode == code, output
    return output


def wait_for(process, words):
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"{words} never came")


FORKS = multiprocessing.get_context("forkserver")
# torch is imported once, not every time, and its garbage is collected once.
FORKS.set_forkserver_preload(["train", "train_search", "tests.frozen"])


class Script:
    """A script in a process forked from one that has imported it: many can be killed quickly."""

    def __init__(self, command, cwd):
        name, *flags = command.split()
        self.output = Path(cwd, f"output-{time.monotonic_ns()}")
        self.process = FORKS.Process(target=_script, args=(name, flags, cwd, self.output))
        self.process.start()

    def wait_for(self, words):
        """Until it has printed this, or has ended: whether it has printed it."""
        while True:
            ended = not self.process.is_alive()
            if self.output.exists() and words in self.output.read_text():
                return True
            if ended:
                return False
            time.sleep(0.005)

    def end(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        self.process.join()

    def finish(self, code=0):
        self.process.join()
        output = self.output.read_text() if self.output.exists() else ""
        assert self.process.exitcode == code, output
        return output


def _script(name, flags, cwd, output):
    os.chdir(cwd)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = [name, *flags]
    torch.set_num_threads(1)
    module = importlib.import_module(name.removesuffix(".py"))
    script.run(module.main, module.get_args)


def run(command, cwd, code=0):
    return Script(command, cwd).finish(code)


def only(cwd, pattern):
    [folder] = cwd.glob(pattern)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with an undisturbed search and training: search-whole-*, eval-whole-*."""
    cwd = tmp_path_factory.mktemp("whole")
    run(f"{SEARCH} --save whole", cwd)
    run(f"{TRAIN} --save whole", cwd)
    return cwd


def rows(folder):
    """metrics.csv without what the clock and the machine say."""
    varying = ("seconds", "images_per_second", "memory_mib")
    table = list(csv.DictReader((folder / "metrics.csv").open()))
    return [{name: row[name] for name in row if name not in varying} for row in table]


def assert_same_end(one, other):
    """The same bits in weights, alphas, betas, both optimizers, figures and genotypes."""
    for name in ("weights.pt", "checkpoint.pt"):
        first, second = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        assert_same(first, second, name)
    assert rows(one) == rows(other)
    for name in ("genotypes.jsonl", "genotype.json"):
        if (one / name).exists():
            assert (one / name).read_text() == (other / name).read_text()
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}


def assert_same(one, other, where):
    assert type(one) is type(other), where
    if torch.is_tensor(one):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            # What the clock and the machine say, and args with the name of the folder.
            if name not in ("seconds", "images_per_second", "memory_mib", "args", "records"):
                assert_same(one[name], other[name], f"{where} {name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where} {i}")
    else:
        assert one == other, where


@pytest.mark.parametrize("command, kind", [(SEARCH, "search"), (TRAIN, "eval")])
def test_a_run_killed_ten_times_ends_as_one_that_was_not(whole, tmp_path, command, kind):
    """SIGKILL at random moments, from its first breath to while it saves (it saves every step)."""
    draw, kills = random.Random(0), 0
    process = Script(f"{command} --save killed", tmp_path)
    assert process.wait_for("step 0 of")
    folder = only(tmp_path, f"{kind}-killed-*")
    while kills < 10 or draw.random() < 0.5:
        time.sleep(draw.uniform(0, 0.4 if kills % 2 else 0.1))
        process.end()
        kills += 1
        process = Script(f"{command.split()[0]} --resume {folder}", tmp_path)
        if kills % 2:  # else wherever it is
            process.wait_for(" step ")
    process.finish()
    assert_same_end(only(whole, f"{kind}-whole-*"), folder)
    assert "nothing is left to do" in run(f"{command.split()[0]} --resume {folder}", tmp_path)
    assert_same_end(only(whole, f"{kind}-whole-*"), folder)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command, kind", [(SEARCH, "search"), (TRAIN, "eval")])
def test_a_signal_saves_and_ends(whole, tmp_path, number, code, command, kind):
    process = Script(f"{command} --save told --save_every 60", tmp_path)
    process.wait_for("step 1 of")
    process.end(number)
    output = process.finish(code)
    folder = only(tmp_path, f"{kind}-told-*")
    assert f"{number.name}: saved" in output and f"--resume {folder.name}" in output
    assert "Traceback" not in output and "after 0 epochs and" in output
    run(f"{command.split()[0]} --resume {folder} --save_every 0.001", tmp_path)
    assert_same_end(only(whole, f"{kind}-whole-*"), folder)


@pytest.mark.slow
def test_a_signal_in_the_imagenet_search_with_workers(tmp_path):
    """The whole group of processes gets it, as from a terminal or a scheduler."""
    fill(tmp_path / "data" / "imagenet_search" / "train", {"cat": 14, "dog": 14})
    fill(tmp_path / "data" / "imagenet_search" / "val", {"cat": 4, "dog": 4})
    command = "train_search_imagenet.py --tmp_data_dir data --workers 2 --input_size 32"
    command += " --init_channels 4 --layers 3 --k 2 --steps 2"
    command += " --batch_size 4 --epochs 2 --begin 0 --report_freq 1"
    finish(start(f"{command} --save whole", tmp_path, warm_python()))
    process = start(f"{command} --save told", tmp_path, start_new_session=True)
    wait_for(process, "step 2 of")
    os.killpg(process.pid, signal.SIGTERM)
    assert "SIGTERM: saved" in finish(process, 143)
    folder = only(tmp_path, "search-told-*")
    command = f"train_search_imagenet.py --resume {folder} --workers 1"
    finish(start(command, tmp_path, warm_python()))
    first, second = (
        torch.load(only(tmp_path, f"search-{name}-*") / "weights.pt", weights_only=True)
        for name in ("whole", "told")
    )
    assert_same(first, second, "weights")


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(whole, tmp_path):
    for damage in ("cut", "flipped", "gone", "empty"):
        folder = tmp_path / damage
        shutil.copytree(only(whole, "eval-whole-*"), folder)
        for name in ("weights.pt", "model_best.pt"):
            (folder / name).unlink(missing_ok=True)
        path = folder / "checkpoint.pt"
        content = bytearray(path.read_bytes())
        if damage == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "flipped":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        elif damage == "empty":
            path.write_bytes(b"")
        else:
            path.unlink()
        output = run(f"train.py --resume {folder}", tmp_path)
        assert "going on from the one before" in output and "checkpoint.prev.pt" in output
        assert damage == "gone" or "cannot be used" in output
        assert_same_end(only(whole, "eval-whole-*"), folder)


def test_two_processes_cannot_resume_the_same_run(tmp_path):
    first = Script(f"{TRAIN} --save lock --epochs 1000", tmp_path)
    assert first.wait_for("step 1 of")
    folder = only(tmp_path, "eval-lock-*")
    second = run(f"train.py --resume {folder}", tmp_path, 2)
    assert "in use by another process" in second and second.count("\n") == 1
    first.end()
    third = Script(f"train.py --resume {folder}", tmp_path)  # the lock died with its holder
    assert third.wait_for(" step ")
    third.end()


def test_two_runs_of_the_same_second_have_two_folders(tmp_path):
    folders = {files.make_folder("eval", str(tmp_path / "x")) for _ in range(3)}
    assert len(folders) == 3


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    """By a limit on the size of a file, which a write meets as it meets a full disk."""
    first = Script(f"{TRAIN} --save full", tmp_path)
    assert first.wait_for("epoch 1 of")
    first.end(signal.SIGTERM)
    first.finish(143)
    folder = only(tmp_path, "eval-full-*")
    kept = (folder / "checkpoint.pt").read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    output = finish(start(f"train.py --resume {folder}", tmp_path, preexec_fn=limit), 2)
    assert "cannot write" in output and "checkpoint.pt" in output and "Traceback" not in output
    assert (folder / "checkpoint.pt").read_bytes() == kept
    assert not list(folder.glob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    output = run(f"{TRAIN} --save nan --learning_rate 1e6 --grad_clip 1e6 --epochs 9", tmp_path, 2)
    assert "NaN or infinite in epoch" in output and "--learning_rate" in output.splitlines()[-1]
    path = only(tmp_path, "eval-nan-*") / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)["model"]
        assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_the_same_signal_twice_is_one(monkeypatch):
    """torchrun passes a signal on that its processes may have got, too; so does timeout."""
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    run = types.SimpleNamespace(signal=0)
    for _ in range(2):
        runs.Run._signalled(run, signal.SIGTERM, None)
    assert run.signal == signal.SIGTERM and not ends
    run.signalled_at -= 3
    runs.Run._signalled(run, signal.SIGTERM, None)
    assert ends == [143]


def test_the_seconds_of_an_epoch_are_those_of_its_steps(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loops.time, "perf_counter", lambda: clock[0])
    log = types.SimpleNamespace(info=lambda *args: None)
    figures = Figures("train", [None], 50, log)
    figures.update(torch.tensor(1.0), torch.eye(2), torch.tensor([0, 1]), torch.tensor(1.0))
    clock[0] = 2.0
    assert figures.result(torch.device("cpu"))["seconds"] == 2
    clock[0] = 7.0  # in the evaluation that follows
    assert figures.state_dict()["seconds"] == 2


@pytest.mark.parametrize("bad", ["loss", "norm"])
def test_figures_name_the_step(bad):
    class Log:
        def info(self, *args):
            pass

    run = type("Run", (), {"unfinished": None, "epoch": 4})
    figures = Figures("train", [None] * 3, 50, Log(), run)
    y, logits = torch.tensor([0, 1]), torch.eye(2)
    values = {"loss": torch.tensor(1.0), "norm": torch.tensor(1.0)}
    figures.update(values["loss"], logits, y, values["norm"])
    values[bad] = torch.tensor(float("inf"))
    with pytest.raises(utils.UserError, match="epoch 5, step 1"):
        figures.update(values["loss"], logits, y, values["norm"])


def test_the_folder_tells_how_it_was_made(whole):
    folder = only(whole, "search-whole-*")
    about = json.loads((folder / "args.json").read_text())
    assert about["command"][0].endswith("train_search.py") and "CPU" in about["device"]
    assert about["torch"] == torch.__version__ and set(about) >= {"commit", "clean", "python"}
    copied = {str(path.relative_to(folder / "scripts")) for path in folder.rglob("scripts/**/*.py")}
    assert copied > {path.name for path in ROOT.glob("*.py")}
    assert copied > {"fused/cell.py", "fused/__init__.py", "harness/runs.py"}
    lines = (folder / "genotypes.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert genotypes.load(str(folder))


def test_a_hostile_checkpoint_runs_no_code(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(only(whole, "eval-whole-*"), folder)
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        torch.save(Hostile(tmp_path / "hacked"), folder / name)
    (folder / "weights.pt").unlink()
    output = run(f"train.py --resume {folder}", tmp_path, 2)
    assert "no checkpoint in" in output and not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("damage", ["later rows", "cut", "empty", "gone", "binary"])
def test_records_are_written_again_as_the_checkpoint_has_them(whole, tmp_path, damage):
    """Rows of epochs after the checkpoint go, rows that a kill has cut or lost come back."""
    folder = tmp_path / "run"
    shutil.copytree(only(whole, "search-whole-*"), folder)
    for name, text in (("metrics.csv", "4,0.5"), ("genotypes.jsonl", '{"epoch": 4, "nor')):
        path = folder / name
        if damage == "later rows":
            path.write_text(path.read_text() + text)
        elif damage == "cut":
            path.write_text(path.read_text()[:-30])
        elif damage == "gone":
            path.unlink()
        else:
            path.write_bytes(b"" if damage == "empty" else b"\xff\0\xfe" * 99)
    run(f"train_search.py --resume {folder}", tmp_path)
    for name in ("metrics.csv", "genotypes.jsonl"):
        assert (folder / name).read_text() == (only(whole, "search-whole-*") / name).read_text()


def test_every_byte_of_a_checkpoint_is_checked(tmp_path):
    path = tmp_path / "checkpoint.pt"
    files.save({"x": torch.arange(9.0), "epoch": 3}, path)
    assert files.is_whole(path) and files.load(path)["epoch"] == 3
    content = path.read_bytes()
    draw = random.Random(0)
    places = [*range(0, 200), *range(len(content) - 200, len(content))]
    for place in [*places, *draw.sample(range(len(content)), 100)]:
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        # But for the length of the comment, in which nothing is kept.
        assert not files.is_whole(path) or len(content) - place in (33, 34), place
    for length in (0, 1, 33, 34, 60, len(content) - 32, len(content) - 1):
        path.write_bytes(content[:length])
        assert not files.is_whole(path)
    torch.save({"x": torch.arange(9.0)}, path)  # a foreign file, by its own checksums
    assert files.is_whole(path)
    content = path.read_bytes()
    place = content.index(torch.arange(9.0).numpy().tobytes())
    path.write_bytes(content[:place] + b"\1" + content[place + 1 :])
    assert not files.is_whole(path)


def test_a_checkpoint_of_another_run_is_refused(whole, tmp_path):
    for name, seed in (("one", 5), ("two", 6)):
        run(f"{TRAIN} --save {name} --seed {seed} --epochs 1", tmp_path)
    one, two = only(tmp_path, "eval-one-*"), only(tmp_path, "eval-two-*")
    shutil.copy(two / "checkpoint.pt", one)
    output = run(f"train.py --resume {one}", tmp_path, 2)
    assert "seed 6" in output and "one with 5" in output and output.count("\n") == 1
    genotypes.save(genotypes.DARTS_V2, two / "genotype.json")
    output = run(f"train.py --resume {two}", tmp_path, 2)
    assert "genotype.json of" in output and output.count("\n") == 1


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(only(whole, "eval-whole-*"), folder)
    (folder / "weights.pt").unlink()
    (folder / "checkpoint.pt").write_bytes(b"damaged")
    before = (folder / "checkpoint.prev.pt").read_bytes()
    process = Script(f"train.py --resume {folder} --save_every 60", tmp_path)
    assert process.wait_for("going on from the one before")
    process.end(signal.SIGKILL)
    assert not (folder / "checkpoint.pt").exists() or files.is_whole(folder / "checkpoint.pt")
    assert (folder / "checkpoint.prev.pt").read_bytes() == before


def test_weights_that_are_cut_are_written_again(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(only(whole, "eval-whole-*"), folder)
    path = folder / "weights.pt"
    path.write_bytes(path.read_bytes()[:-100])
    output = run(f"train.py --resume {folder}", tmp_path)
    assert "nothing is left" not in output
    assert_same_end(only(whole, "eval-whole-*"), folder)
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (folder / name).unlink()
    assert "no checkpoint" in run(f"train.py --resume {folder}", tmp_path, 2)


def test_streams_that_are_closed(tmp_path):
    """As some schedulers start a run; a signal still saves."""
    command = f"exec {shlex.quote(sys.executable)} {shlex.quote(str(ROOT))}/{TRAIN}"
    command += " --save mute --epochs 99 >&- 2>&-"
    process = subprocess.Popen(["bash", "-c", command], cwd=tmp_path)
    for _ in range(600):
        if list(tmp_path.glob("eval-mute-*/checkpoint.pt")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert "SIGTERM: saved" in (only(tmp_path, "eval-mute-*") / "log.txt").read_text()


def test_a_reader_that_has_enough_ends_a_script_in_silence():
    """As `| head -1` does."""
    command = [sys.executable, ROOT / "model.py", "--arch", "PC_DARTS_cifar"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("kind", "script", "more"),
    [("search", "train_search.py", ""), ("search", "train_search.py", "--report_freq 1"),
     ("eval", "train.py", "")],
)  # fmt: skip
def test_a_run_of_an_earlier_version_goes_on(kind, script, more, tmp_path):
    """Begun at commit 9c32655, before the supernet had two forms; one of two epochs is done."""
    shutil.copytree(ROOT / "tests" / "golden" / "runs" / kind, tmp_path / kind)
    run(f"{script} --resume {kind} {more}", tmp_path)
    with open(tmp_path / kind / "metrics.csv") as file:
        *_, last = csv.DictReader(file)
    expected = json.loads((tmp_path / kind / "expected.json").read_text())
    names = {"search": ("loss", "alpha_entropy_normal", "beta_entropy_reduce"),
             "eval": ("loss", "test_loss")}  # fmt: skip
    for name in ("epoch", "learning_rate", *names[kind]):  # the machine may be another
        assert float(last[name]) == pytest.approx(expected[name], rel=1e-4), name
    if kind == "eval":
        assert "top-1" in run(f"test.py --model_path {kind}", tmp_path)


def test_an_earlier_search_cannot_change_its_form(tmp_path):
    shutil.copytree(ROOT / "tests" / "golden" / "runs" / "search", tmp_path / "search")
    output = run("train_search.py --resume search --plain", tmp_path, 2)
    assert "--plain True is not the run's, which is False" in output


def test_time_left_is_told_where_minutes_are_left(tmp_path, monkeypatch):
    said, clock = [], [0.0]
    monkeypatch.setattr(runs.time, "time", lambda: clock[0])
    quiet = types.SimpleNamespace(info=lambda text, *values: said.append(text % values))
    each = runs.Run.__new__(runs.Run)
    vars(each).update(epoch=0, epochs=100, values={}, log=quiet, epoch_began=0.0, signal=0,
                      time_left_said=-100.0, report_every=None, save=lambda: None)  # fmt: skip
    for seconds in (1, 3, 3, 58, 3):  # 99, 294, 291 s are left, then more
        clock[0] += seconds
        each.epoch_done()
    assert [line.split(":")[0] for line in said] == ["98 epochs left", "96 epochs left"]


def test_a_report_that_fails_does_not_end_a_run(tmp_path):
    def broken(folder):
        raise ZeroDivisionError("in matplotlib")

    said, each = [], runs.Run.__new__(runs.Run)
    log = types.SimpleNamespace(warning=lambda text, *values: said.append(text % values))
    vars(each).update(epoch=0, epochs=2, values={}, log=log, epoch_began=0.0, signal=0,
                      time_left_said=time.time(), report_every=1, save=lambda: None,
                      write_report=broken, folder=tmp_path)  # fmt: skip
    each.epoch_done()
    assert each.epoch == 1 and said == ["no report.html: in matplotlib"]


def small_args(**more):
    return types.SimpleNamespace(**dict(epochs=1, report=None, save_every=1, resume=None, save="x",
                                        seed=0, tensorboard=False) | more)  # fmt: skip


def test_the_generators_of_all_gpus_of_a_process(monkeypatch):
    """Which DataParallel draws from; under torchrun each process has its own GPU alone."""
    states, device = {0: 10, 1: 11, 2: 12}, torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda i: torch.tensor(states[i]))
    monkeypatch.setattr(torch.cuda, "set_rng_state",
                        lambda state, device: states.update({device: int(state)}))  # fmt: skip
    kept = generators.state(device)
    drawn = torch.rand(2), random.random()
    states.update({0: 0, 1: 0, 2: 0})
    generators.restore(kept, device)
    assert states == {0: 10, 1: 11, 2: 12} and int(kept["cuda"]) == 11
    assert torch.equal(drawn[0], torch.rand(2)) and drawn[1] == random.random()
    monkeypatch.setattr(generators.distributed, "world_size", lambda: 2)
    assert [name for name in generators.state(device) if "cuda" in name] == ["cuda"]


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(runs.fcntl, "lockf", no_locks)
    runs.Run("eval", small_args(), torch.device("cpu"), {}, classes=["a"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if "no lock" in line]
    assert "No locks available" in line and "start no other process in it" in line
    assert only(tmp_path, "eval-x-*").is_dir()


def test_a_resume_does_not_look_for_anomalies_unless_told(whole, tmp_path, monkeypatch):
    import train

    about = json.loads((only(whole, "eval-whole-*") / "args.json").read_text())
    about["args"]["detect_anomaly"] = True
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(about))
    for flags, wanted in (("", False), (" --detect_anomaly", True)):
        monkeypatch.setattr(sys, "argv", f"train.py --resume {folder}{flags}".split())
        assert train.get_args().detect_anomaly == wanted


def test_a_folder_is_a_run_when_all_that_it_began_with_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    cell = genotypes.PCDARTS
    args, seen = small_args(), []

    def begin(folder):
        seen.extend(path.name for path in folder.iterdir())
        raise KeyboardInterrupt  # as a kill there would end it

    with pytest.raises(KeyboardInterrupt):
        runs.Run("eval", args, torch.device("cpu"), {}, {}, cell, begin, classes=["a"])
    assert {"genotype.json", "scripts"} <= set(seen) and "args.json" not in seen
    assert files.read_args(only(tmp_path, "eval-x-*")) == {}  # which --resume refuses
    runs.Run("eval", args, torch.device("cpu"), {}, {}, cell, classes=["a"])
    assert files.read_args(sorted(tmp_path.glob("eval-x-*"))[-1])["classes"] == ["a"]
