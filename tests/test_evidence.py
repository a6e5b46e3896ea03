"""The protocols: runs that are made once and gone on with, their tables, what is kept of them."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import genotypes
from evidence import cells, collect
from harness import files, protocol
from helpers import ROOT, warm_python
from utils import UserError

# A script that does nothing for long: it makes its folder, and ends as it is told the first time.
FAKE = """
import json, os, pathlib, signal, sys, time
words = dict(zip(sys.argv[1:], sys.argv[2:]))
if "--resume" in words:
    folder = pathlib.Path(words["--resume"])
else:
    save = pathlib.Path(words["--save"])
    folder = save.parent / f"eval-{save.name}-20260101-000000"
    folder.mkdir()
    about = {"format": 1, "script": "fake", "command": sys.argv, "args": {}}
    (folder / "args.json").write_text(json.dumps(about))
with open(folder / "calls", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
code = 0 if "--resume" in words else int(words.get("--code", 0))
if "--parent" in words:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.kill(int(words["--parent"]), signal.SIGTERM)
    time.sleep(0.5)
if code < 0:
    os.kill(os.getpid(), -code)
elif code == 0:
    (folder / "weights.pt").touch()
sys.exit(code)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """run(name, *flags) of the protocol with that script; its folders are in tmp_path."""
    for name in ("fake.py", "other.py"):
        (tmp_path / name).write_text(FAKE)
    monkeypatch.setattr(protocol, "ROOT", tmp_path)
    return lambda name, *flags, script="fake.py": protocol.run(
        "eval", name, tmp_path, script, *flags
    )


def calls(folder):
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_means_and_tables():
    assert protocol.mean([97.434]) == "97.43 (1 run)"
    assert protocol.mean([1, 2, 3]) == "2.00 ± 1.00 (3 runs)"
    assert protocol.mean([0.125, 0.125], 3) == "0.125 ± 0.000 (2 runs)"
    lines = protocol.table(["a", "b"], [[1, "x"]])
    assert lines == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_a_run_is_made_once(fake, tmp_path):
    folder = fake("a", "--seed", 1)
    assert folder == tmp_path / "eval-a-20260101-000000"
    assert fake("a", "--seed", 1) == folder
    assert calls(folder) == [["--seed", "1", "--save", str(tmp_path / "a")]]


def test_a_run_is_not_taken_for_another(fake, tmp_path):
    longer = fake("a-b")
    assert fake("a") != longer
    assert fake("[a]").name == "eval-[a]-20260101-000000"
    assert protocol.begun("eval", "[a]", tmp_path) is not None
    assert protocol.begun("eval", "b", tmp_path) is None


@pytest.mark.parametrize("code, end", [(1, 1), (130, 130), (143, 143), (-15, 143), (-9, 137)])
def test_the_exit_code_is_passed_on(fake, code, end):
    with pytest.raises(SystemExit) as left:
        fake("a", "--code", code)
    assert left.value.code == end


def test_a_signal_that_comes_too_late_for_a_script_ends_the_protocol(fake, tmp_path):
    """Its run is finished then; the next is not begun."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        fake("a", "--parent", os.getpid())
    assert left.value.code == 143 and (tmp_path / "eval-a-20260101-000000/weights.pt").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    assert fake("a", "--parent", os.getpid()).name == "eval-a-20260101-000000"


def test_what_a_user_caused_is_said_in_one_line(fake):
    with pytest.raises(UserError, match=r"fake.py of a stopped; the line above says why"):
        fake("a", "--code", 2)


def test_an_unfinished_run_goes_on_with_what_may_be_given_anew(fake, tmp_path):
    with pytest.raises(SystemExit):
        fake("a", "--code", 1, "--data", "one", "--seed", 3)
    folder = fake("a", "--code", 1, "--data", "two", "--seed", 3)
    assert calls(folder)[1] == ["--resume", str(folder), "--data", "two"]
    assert len(list(tmp_path.glob("eval-*"))) == 1


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--epochs", 4, "--amp"], "was begun with --epochs 3, now it is --epochs 4"),
        (["--epochs", 3], "was begun with --amp, now it is left out"),
        (["--epochs", 3, "--amp", "--k", 2], "was begun without --k, now it is --k 2"),
    ],
)
@pytest.mark.parametrize("done", [True, False])
def test_a_run_begun_with_other_flags_is_an_error(fake, flags, said, done):
    folder = fake("a", "--epochs", 3, "--amp")
    if not done:
        (folder / "weights.pt").unlink()
    with pytest.raises(UserError) as error:
        fake("a", *flags)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert len(calls(folder)) == 1


def test_the_same_flags_written_otherwise_are_the_same(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = fake("a", "--epochs", 3, "--arch", "b/c", "--data", "one", "--amp")
    words = ["--amp", f"--arch={tmp_path / 'b' / 'c'}", "--epochs", 9, "--epochs", 3]
    assert fake("a", *words, "--data", "two", "--device", "cpu") == folder


def test_a_run_of_another_script_is_an_error(fake):
    fake("a")
    with pytest.raises(UserError, match=r"is a run of fake.py, not other.py"):
        fake("a", script="other.py")


# evidence.cells

TOY = ["--set", "digits", "--cells", "found,random:0", "--searches", "1", "--seeds", "1"]
TOY += ["--epochs", "6", "--init_channels", "4", "--layers", "3"]
TOY += ["--train_flags", "--input_size 8 --cutout_length 4 --batch_size 300 --report_freq 1"]
TOY += ["--search_flags"]
SMALL = "--layers 3 --init_channels 4 --k 2 --steps 2 --input_size 8"
TOY += [f"--epochs 2 --begin 1 --batch_size 180 {SMALL}"]


def start(root):
    """The protocol of a toy size, as a process of its own."""
    command = [*warm_python(), "-m", "evidence.cells", "--root", root, *TOY]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def finish(process, code=0):
    output = process.communicate()[0]
    assert process.returncode == code, output
    return output


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def timeless(root):
    """The results without the hours."""
    lines = (root / "results.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| search")).split(" | ")
    assert header[3] == "hours in steps"
    lines = [
        line.split(" | ")[:3] + line.split(" | ")[4:]
        if line.startswith("| found 0 | 0 |")
        else line.split(" | ")[:-1]
        if line.startswith("|")
        else line
        for line in lines
    ]
    tables = [read_csv(root / name) for name in ("results.csv", "searches.csv")]
    return lines, [[row | {"hours": None} for row in table] for table in tables]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The root of a protocol of a toy size that nothing disturbed."""
    root = tmp_path_factory.mktemp("whole")
    output = finish(start(root))
    assert (root / "results.md").read_text() in output
    return root


def test_the_protocol_from_search_to_table(whole):
    [search], [found, drawn] = whole.glob("search-*"), sorted(whole.glob("eval-*"))
    rows = read_csv(whole / "results.csv")
    assert [row["cell"] for row in rows] == ["found 0", "random:0"]
    for row, folder in zip(rows, (found, drawn), strict=True):
        ends = read_csv(folder / "metrics.csv")
        assert len(ends) == 6
        assert float(row["test_accuracy"]) == float(ends[-1]["test_top1"])
        assert float(row["parameters_m"]) == files.read_args(folder)["parameters_m"]
        assert row["runs"] == "1" and row["test_accuracy_std"] == ""
    cell = genotypes.load(search)
    assert genotypes.load(found) == cell and genotypes.text(cell) == rows[0]["genotype"]
    assert genotypes.load(drawn) == genotypes.load("random:0")
    [of_search] = read_csv(whole / "searches.csv")
    assert of_search["genotype"] == genotypes.text(cell) and of_search["epochs"] == "2"
    text = (whole / "results.md").read_text()
    assert f"| found 0 | {float(rows[0]['test_accuracy']):.2f} (1 run) |" in text
    assert "| DARTS_V2 | not run |" in text and "| found | not run |" not in text
    assert genotypes.text(cell) in text and str(whole) not in text


@pytest.mark.slow
def test_stopped_in_its_second_run_it_ends_alike(whole, tmp_path):
    process = start(tmp_path)
    while process.poll() is None and not any(
        "train step 3" in log.read_text() for log in tmp_path.glob("eval-*/log.txt")
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    finish(process, 128 + signal.SIGTERM)
    [begun] = tmp_path.glob("eval-*")  # the second of three runs, stopped in its middle
    assert (begun / "checkpoint.pt").exists() and not (begun / "weights.pt").exists()
    assert "not run" in (tmp_path / "results.md").read_text()
    output = finish(start(tmp_path))
    assert f"--resume {begun}" in output and "train_search.py" not in output.split("# What")[0]
    assert timeless(tmp_path) == timeless(whole)


def run_of(folder, top1, seconds, **args):
    """A finished training as evidence.cells reads it, of PC_DARTS_cifar on ten classes."""
    folder.mkdir()
    args = {"init_channels": 36, "layers": 20, "stem": "cifar", "set": "cifar10"} | args
    about = {"format": 1, "script": "train", "command": ["/x/train.py", "--seed", "1", "--cutout"]}
    about |= {"device": "a device", "torch": "2", "classes": [*"0123456789"], "parameters_m": 3.63}
    (folder / "args.json").write_text(json.dumps(about | {"args": {"input_size": None} | args}))
    genotypes.save(genotypes.PC_DARTS_cifar, folder / "genotype.json")
    for each in top1:
        files.append_csv(folder / "metrics.csv", {"test_top1": each, "seconds": seconds})
    return folder


def test_the_last_epoch_counts_and_runs_have_a_deviation(tmp_path):
    runs = [run_of(tmp_path / name, [99, end], 1800) for name, end in (("a", 97), ("b", 96))]
    text = cells.write(tmp_path, ["PC_DARTS_cifar"], {}, {"PC_DARTS_cifar": runs, "one": runs[:1]})
    row = (
        "| PC_DARTS_cifar | 96.50 ± 0.71 (2 runs) | 3.50 ± 0.71 (2 runs) | 3.630 | 556.7 | 1.000 |"
    )
    assert row in text
    assert "| one | 97.00 (1 run) |" in text
    assert "PC_DARTS_cifar, one: `train.py --cutout`, a device, torch 2, commit unknown." in text
    line, _ = read_csv(tmp_path / "results.csv")
    assert line["test_accuracies"] == "97.00 96.00" and float(line["hours"]) == 1


def test_a_search_in_figures():
    row = cells.of_search("found", ROOT / "evidence" / "digits-search")
    assert (row["seed"], row["epochs"]) == (2, 50)
    assert (row["skip_connects_normal"], row["skip_connects_reduce"]) == (0, 0)
    assert f"{row['alpha_entropy_normal']:.3f} {row['alpha_entropy_reduce']:.3f}" == "2.078 2.079"
    lines = (ROOT / "evidence" / "digits-search" / "genotypes.jsonl").read_text().splitlines()
    edges = [[json.loads(line)[name] for name in ("normal", "reduce")] for line in lines]
    assert edges[row["settled"] - 2] != edges[row["settled"] - 1] == edges[-1]


def test_when_a_cell_has_settled():
    def line(epoch, op):
        edges = [[op, 0], ["none", 1]]
        return {"epoch": epoch, "normal": edges, "normal_concat": [2], "reduce": [],
                "reduce_concat": [2]}  # fmt: skip

    assert cells.settled([line(1, "a")]) == 1
    assert cells.settled([line(1, "a"), line(2, "a")]) == 1
    assert cells.settled([line(1, "a"), line(2, "b"), line(3, "b")]) == 2
    assert cells.settled([line(1, "a"), line(2, "b"), line(3, "a")]) == 3


def flags_of(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["cells.py", *words])
    return cells.get_args()


def test_the_recipe_is_whole_in_the_published_size_alone(monkeypatch):
    words = list(map(str, cells.recipe(flags_of(monkeypatch))))
    assert " ".join(words) == "--init_channels 36 --layers 20 --epochs 600 --cutout --auxiliary"
    words = list(map(str, cells.recipe(flags_of(monkeypatch, "--epochs", "12"))))
    assert " ".join(words[4:]) == "--epochs 12 --cutout --drop_path_prob 0"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    import train

    args = train.get_args()
    assert (args.batch_size, args.drop_path_prob, args.epochs) == (96, 0.3, 600)
    assert (args.init_channels, args.layers, args.learning_rate) == (36, 20, 0.025)


def test_an_unfinished_search_or_no_search_is_an_error(tmp_path, monkeypatch):
    shutil.copy(ROOT / "evidence" / "digits-search" / "args.json", tmp_path)
    args = flags_of(monkeypatch, "--search_run", str(tmp_path), "--root", str(tmp_path))
    with pytest.raises(UserError, match="is unfinished: go on with"):
        cells.main(args)
    args.search_run = str(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no run of train_search.py"):
        cells.main(args)
    args.cells = "PC_DARTS_cifr"
    with pytest.raises(UserError, match="nearest: PC_DARTS_cifar"):
        cells.main(args)


def test_each_third_image_of_each_class_to_train_on_and_each_second_to_test(tmp_path):
    for half, count in (("train", 7), ("test", 3)):
        for name in ("cat", "dog"):
            (tmp_path / "all" / half / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / "all" / half / name / f"{i}.png").write_text(f"{half} {name} {i}")
    for _ in range(2):  # the second time all links are there
        subset = protocol.thinned(tmp_path / "all", tmp_path / "root", 3, 2)
        found = sorted(path.read_text() for path in subset.glob("*/*/*"))
        names = [f"test {name} {i}" for name in ("cat", "dog") for i in (0, 2)]
        names += [f"train {name} {i}" for name in ("cat", "dog") for i in (0, 3, 6)]
        assert found == names
        places = sorted(str(path.relative_to(subset)) for path in subset.glob("*/*/*"))
        assert places == [name.replace(" ", "/") + ".png" for name in names]
    shutil.move(tmp_path / "all", tmp_path / "moved")
    subset = protocol.thinned(tmp_path / "moved", tmp_path / "root", 3, 2)
    assert len([path for path in subset.glob("*/*/*") if path.exists()]) == 10
    with pytest.raises(UserError, match="has no train folder"):
        protocol.thinned(tmp_path / "all", tmp_path / "root", 3, 2)
    for half in ("train", "test"):
        for name in ("cat/a/0.png", "cat/b/0.png", "dog/0.png"):
            path = tmp_path / "deep" / half / name
            path.parent.mkdir(parents=True)
            path.write_text(name)
    subset = protocol.thinned(tmp_path / "deep", tmp_path / "other", 1, 1)
    found = sorted(path.read_text() for path in subset.glob("train/*/*"))
    assert found == ["cat/a/0.png", "cat/b/0.png", "dog/0.png"]


def test_links_to_other_data_are_not_mixed(tmp_path):
    for name in ("one", "other"):
        for half in ("train", "val"):
            for label in ("cat", "dog"):
                path = tmp_path / name / half / label / f"{name}.png"
                path.parent.mkdir(parents=True)
                path.write_text(name)
    subset = protocol.thinned(tmp_path / "one", tmp_path / "root", 2, 2)
    assert len(list(subset.glob("val/*/*"))) == 2
    (tmp_path / "moved").mkdir()
    for half in ("train", "val"):  # links themselves, to another place
        shutil.move(tmp_path / "one" / half, tmp_path / "moved" / half)
        (tmp_path / "one" / half).symlink_to(tmp_path / "moved" / half)
    (tmp_path / "alias").symlink_to(tmp_path / "one")
    for folder in ("one", "alias", "one"):
        assert protocol.thinned(tmp_path / folder, tmp_path / "root", 2, 2) == subset
        protocol.thinned(tmp_path / folder, tmp_path / "anew", 2, 2)
    with pytest.raises(UserError, match="is of other data"):
        protocol.thinned(tmp_path / "other", tmp_path / "root", 2, 2)


def test_flags_with_a_quote_that_does_not_end(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cells.py", "--train_flags", "--note 'x"])
    with pytest.raises(SystemExit, match="2"):
        cells.get_args()
    assert "--train_flags" in (error := capsys.readouterr().err) and error.count("\n") == 1


# evidence.collect


def test_a_run_is_not_written_over(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        about = {"format": 1, "script": "train", "command": ["train.py"], "args": {"save": name}}
        (tmp_path / name / "args.json").write_text(json.dumps(about))
        (tmp_path / name / "log.txt").write_text("")
    for dest in ("one", "other"):
        with pytest.raises(UserError, match="is a run: give another folder"):
            collect.collect(tmp_path / "one", tmp_path / dest, "none")
    assert json.loads((tmp_path / "other" / "args.json").read_text())["args"]["save"] == "other"


@pytest.mark.parametrize("format", ["png", "svg", "none"])
def test_a_run_is_kept_without_weights_and_paths(tmp_path, monkeypatch, capsys, format):
    format == "none" or pytest.importorskip("matplotlib")
    kept, run, dest = ROOT / "evidence" / "digits-search", tmp_path / "run", tmp_path / "new" / "a"
    run.mkdir()
    for name in ("genotypes.jsonl", "metrics.csv"):  # its first epochs: less to draw
        lines = (kept / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[:4]))
    shutil.copy(kept / "genotype.json", run)
    about = json.loads((kept / "args.json").read_text())
    about["command"] = ["/home/me/train_search.py", "--data", "/home/me/images", "--seed", "2"]
    about["command"] += ["--save=/home/me/runs/a"]
    about["args"] |= {"data": "/home/me/images", "save": "/home/me/runs/a", "arch": "runs/b"}
    (run / "args.json").write_text(json.dumps(about))
    for name in ("weights.pt", "checkpoint.pt", "checkpoint.prev.pt", "log.txt"):
        (run / name).write_text("large")
    monkeypatch.setattr(sys, "argv", ["collect.py", str(run), str(dest), "--format", format])
    collect.main(collect.get_args())
    pictures = ["curves", "normal-cell", "reduction-cell", "what-is-watched", "alphas-normal-cell"]
    pictures += ["alphas-reduction-cell", "betas"]
    names = {"args.json", "metrics.csv", "genotypes.jsonl", "genotype.json"}
    names |= {f"{name}.{format}" for name in pictures if format != "none"}
    assert {path.name for path in dest.iterdir()} == names
    assert set(capsys.readouterr().out.split()) == {str(dest / name) for name in names}
    text = (dest / "args.json").read_text()
    assert "/home" not in text and str(tmp_path) not in text
    told = json.loads(text)
    assert told["command"] == ["train_search.py", "--data", "DIR", "--seed", "2", "--save=a"]
    assert [told["args"][name] for name in ("data", "save", "arch")] == ["DIR", "a", "b"]
    assert told["args"]["epochs"] == 50 and told["commit"] == about["commit"]
    assert (dest / "metrics.csv").read_text() == (run / "metrics.csv").read_text()


def test_only_a_run_can_be_kept(tmp_path):
    with pytest.raises(UserError, match="is no run"):
        collect.collect(tmp_path, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()
