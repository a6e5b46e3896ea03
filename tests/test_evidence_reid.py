"""evidence/reid.py as a process, at toy size: each run once, going on where it was stopped."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import ROOT

TOY = "--set digits --seeds 1 --networks found resnet18 --init_channels 6 --embedding 8"
TOY += " --identities 4 --instances 2 --search_instances 2 --search_epochs 3 --epochs 1"


def start(root):
    command = [sys.executable, "-m", "evidence.reid", *TOY.split(), "--root", root]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.slow
def test_the_protocol_runs_and_goes_on_after_a_stop(tmp_path):
    process = start(tmp_path)
    while process.poll() is None and not [*tmp_path.glob("*/checkpoint.pt")]:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    process = start(tmp_path)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    begun = [line for line in output.splitlines() if line.startswith(">")]
    assert [line.split()[1] for line in begun] == ["train_search_reid.py"] + 2 * ["train_reid.py"]
    assert f"--resume {tmp_path}/search-found-" in begun[0]
    names = sorted(folder.name.rsplit("-", 2)[0] for folder in tmp_path.glob("*-*"))
    assert names == ["eval-found-0", "eval-resnet18-0", "search-found"]
    assert (tmp_path / "results.md").read_text() in output

    with open(tmp_path / "results.csv", newline="") as file:
        found, resnet = csv.DictReader(file)
    assert (found["network"], resnet["network"]) == ("found", "resnet18")
    assert float(found["multiply_adds_m"]) < float(resnet["multiply_adds_m"])
    [folder] = tmp_path.glob("eval-found-0-*")
    with open(folder / "metrics.csv", newline="") as file:
        last = [*csv.DictReader(file)][-1]
    assert float(found["mAP"]) == pytest.approx(float(last["mAP"]), abs=1e-3)
    assert f"| found | {float(found['mAP']):.2f} (1 run) |" in output

    output = start(tmp_path).communicate()[0]  # all is done
    assert ">" not in output and (tmp_path / "results.md").read_text() == output
