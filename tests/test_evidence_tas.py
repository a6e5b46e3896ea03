"""The evidence of TAS at toy size, as a process: stopped, gone on with, and its tables."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from evidence import tas as protocol_of_tas
from helpers import ROOT
from utils import UserError

TOY = "--set digits --input_size 8 --depth 8 --seeds 1 --random 2 --batch_size 300"
TOY += " --epochs 1 --search_epochs 1"


def start(root, flags=TOY):
    return subprocess.Popen(
        [sys.executable, "-m", "evidence.tas", *flags.split(), "--root", root], cwd=ROOT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def commands(output):
    return [line for line in output.splitlines() if line.startswith(">")]


@pytest.mark.slow
def test_the_protocol_goes_on_after_a_stop_and_ends_with_its_tables(tmp_path):
    root = tmp_path / "runs"
    process = start(root)
    while not list(root.glob("search-s0-*/log.txt")) and process.poll() is None:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 143, output
    assert not (root / "results.csv").exists()

    process = start(root)
    more = process.communicate()[0]
    assert process.returncode == 0, more
    names = ["unpruned", "found, teacher", "found", "uniform", "random 1", "random 2"]
    begun = [line for line in commands(output + more) if "--resume" not in line]
    assert len(commands(output)) == 2 and len(begun) in (7, 8)  # 8: stopped before a checkpoint
    assert sum("--arch unpruned" in line for line in begun) == 1

    with open(root / "results.csv") as file:
        rows = {row["network"]: row for row in csv.DictReader(file)}
    assert list(rows) == names
    unpruned = float(rows["unpruned"]["multiply_adds_m"])
    for name, row in rows.items():
        folder = root / row["run"]
        result = json.loads((folder / "result.json").read_text())
        assert float(row["test_top1"]) == pytest.approx(result["test_top1"], abs=1e-6)
        assert (folder / "teacher").exists() == (name == "found, teacher")
        if name == "uniform" or name.startswith("random"):
            assert 0.45 <= float(row["multiply_adds_m"]) / unpruned <= 0.5
            arch = json.loads((root / f"{name.replace(' ', '')}.json").read_text())
            assert json.loads((folder / "tas.json").read_text())["channels"] == arch["channels"]
    search = json.loads(next(root.glob("search-s0-*/tas.json")).read_text())
    for name in ("found", "found, teacher"):
        student = json.loads((root / rows[name]["run"] / "tas.json").read_text())
        assert student["channels"] == search["channels"]
    text = (root / "results.md").read_text()
    assert text.strip() in more
    assert all(f"| {name} | " in text for name in [*names, "random, all", "seed 0"])

    weights = {path: path.stat().st_mtime for path in root.glob("*/weights.pt")}
    process = start(root)  # nothing is left to do
    assert commands(process.communicate()[0]) == [] and process.returncode == 0
    assert weights == {path: path.stat().st_mtime for path in root.glob("*/weights.pt")}

    process = start(root, TOY.replace(" --epochs 1 ", " --epochs 2 "))
    said = process.communicate()[0]
    assert process.returncode == 2 and "was begun with --epochs 1, now it is --epochs 2" in said, (
        said
    )
    assert "Traceback" not in said


def test_tables_have_means_of_the_runs_and_of_all_random_ones():
    def row(network, top1, ms):
        values = [0, "", top1, 1.0, 1.0, 20.0, 0.1, ms, 2.0, 10 * ms, 40.0, 5.0]
        return dict(zip(protocol_of_tas.COLUMNS, [network, *values], strict=True))

    rows = [row("unpruned", 50.0, 2.0), row("unpruned", 52.0, 2.0)]
    rows += [row("random 1", 40.0, 1.0), row("random 2", 44.0, 4.0)]
    lines = protocol_of_tas.networks_table(rows).splitlines()[2:]
    assert lines == [
        "| unpruned | 51.00 ± 1.41 (2 runs) | 20.00 | 0.100 | 2.00 | 20.0 | 1.00, 2.00 |",
        "| random 1 | 40.00 (1 run) | 20.00 | 0.100 | 1.00 | 10.0 | 2.00, 4.00 |",
        "| random 2 | 44.00 (1 run) | 20.00 | 0.100 | 4.00 | 40.0 | 0.50, 1.00 |",
        "| random, all | 42.00 ± 2.83 (2 runs) | 20.00 | 0.100 | 2.50 | 25.0 | 1.25, 2.50 |",
    ]


def test_other_images_are_other_runs(tmp_path, monkeypatch):
    """--data may be given anew to a run, so which images of it are taken is in the runs' names."""
    for half in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "all" / half / name).mkdir(parents=True)
            (tmp_path / "all" / half / name / "0.png").touch()
    names = []

    def run(kind, name, root, script, *flags):
        names.append(name)
        raise UserError("enough")

    monkeypatch.setattr(protocol_of_tas.protocol, "run", run)
    for every in ("--train_every 20", "--train_every 10", "--train_every 1 --test_every 1"):
        flags = f"--data {tmp_path}/all --root {tmp_path}/runs {every}"
        monkeypatch.setattr(sys, "argv", ["tas.py", *flags.split()])
        with pytest.raises(UserError, match="enough"):
            protocol_of_tas.main(protocol_of_tas.get_args())
    assert names == ["unpruned-every-20-5-s0", "unpruned-every-10-5-s0", "unpruned-s0"]
