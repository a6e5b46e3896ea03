"""benchmark.py as people run it, on networks that are small."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

import benchmark
from helpers import warm_python

ROOT = Path(__file__).parents[1]
SMALL = "--batch_size 4 --repeats 2 --init_channels 8 --layers 3 --device cpu"


def run(what, folder, *flags):
    command = [*warm_python(), ROOT / "benchmark.py", what, *SMALL.split(), *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("what", ["supernet", "search", "data", "cost"])
def test_tables(what, tmp_path):
    done = run(what, tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert results["machine"]["threads"] == torch.get_num_threads()
    rows = results[what]
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(rows)  # and the header
    for line, row in zip(table[1:], rows, strict=True):
        assert len(re.findall(r"\|", line)) == len(row) + 1
        assert row["median, s"] > 0
    if what == "supernet":
        by_side = {row["side"]: row for row in rows}
        old, new = by_side["plain, float32"], by_side["ours, float32"]
        assert old["times as fast"] == 1 and old["aten calls"] > 2 * new["aten calls"]
        assert old["MB kept per image"] > 2 * new["MB kept per image"]


def test_train_table(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "NetworkCIFAR", lambda *sizes: benchmark_network(4))
    args = benchmark.SimpleNamespace(device=torch.device("cpu"), batch_size=4, repeats=1)
    rows = benchmark.train(args)
    assert [row["side"].split(",")[0] for row in rows] == ["plain", "plain", "ours", "ours"]


def benchmark_network(C):
    import model

    return model.NetworkCIFAR(C, 10, 3, False, benchmark.genotypes.PCDARTS)


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    done = run("data", tmp_path, "--json", "/nowhere/figures.json")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "/nowhere/figures.json" in done.stderr


@pytest.mark.parametrize("flags", ["--layers 0", "--init_channels 6"])
def test_a_network_that_cannot_be_is_one_line(flags, tmp_path):
    done = run("supernet", tmp_path, *flags.split())
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_both_sides_take_the_same_step():
    """One released step, first and second order, moves alphas and weights as ours does."""
    args = benchmark.SimpleNamespace(
        device=torch.device("cpu"), batch_size=4, init_channels=8, layers=3
    )
    for unrolled in (None, False, True):
        old, new, _ = (network.double() for network in benchmark.supernets(args))
        for name in ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce"):
            setattr(old, name, getattr(new, name).detach().clone().requires_grad_())
        before = new.arch_parameters()[0].detach().clone()
        batches = [(torch.randn(4, 3, 32, 32).double(), torch.arange(4)) for _ in range(2)]
        for network, released in ((new, False), (old, True)):
            train, valid = ([each] for each in batches)
            benchmark.searching_step(network, iter(train), iter(valid), unrolled, released)()
        for a, b in zip(new.arch_parameters(), old.arch_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        assert torch.equal(new.arch_parameters()[0], before) == (unrolled is None)
        torch.testing.assert_close(new.classifier.weight, old.classifier.weight)
