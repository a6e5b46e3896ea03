"""Pictures of cells, reports of runs and comparisons: the facts they show."""

import base64
import csv
import io
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import genotypes
from genotypes import Genotype
from harness import drawing, files, plots, report
from helpers import warm_python

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"

ONE = [("sep_conv_3x3", 0), ("skip_connect", 1)]
FIVE = [(op, min(i // 2 + i % 2, i // 2 + 1)) for i, op in enumerate(["dil_conv_5x5"] * 10)]
TWICE = [("max_pool_3x3", 0), ("max_pool_3x3", 0), ("my_op", 2), ("my_op", 2)]
ODD = {
    "one step": Genotype(ONE, [2], ONE, [2]),
    "five steps": Genotype(FIVE, range(2, 7), FIVE, [6]),
    "a subset in another order": Genotype(FIVE, [5, 3], FIVE, [2]),
    "repeated inputs": Genotype(TWICE, [3], TWICE, [2, 3]),
}
NAMED = {name: genotypes.load(name) for name in genotypes.names()}
ALL = NAMED | ODD
CELLS = {f"{name} {kind}": cell for name, g in ALL.items()
         for kind, cell in (("normal", g[:2]), ("reduction", g[2:]))}  # fmt: skip


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_every_edge_and_label_is_drawn_once(cell):
    edges, concat = cell
    buffer = io.BytesIO()
    drawing.draw_cell(edges, concat).savefig(buffer, format="svg")
    root = ET.fromstring(buffer.getvalue())
    texts = sorted("".join(text.itertext()) for text in root.iter(f"{SVG}text"))
    assert texts == sorted([op for op, _ in edges] + drawing.node_names(edges))
    ids = [element.get("id") or "" for element in root.iter(f"{SVG}g")]
    drawn = sorted(name for name in ids if name.startswith(("edge-", "concat-")))
    expected = [f"edge-{e}" for e in range(len(edges))] + [
        f"concat-{i}" for i in range(len(concat))
    ]
    assert drawn == sorted(expected)


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_nothing_overlaps_or_leaves_the_picture(cell):
    edges, concat = cell
    places = drawing.layout(edges, concat)
    boxes = [(*box, drawing.NODE_HEIGHT) for box in places.nodes.values()]
    boxes += [(*box, drawing.LABEL_HEIGHT) for box in places.labels.values()]
    for x, y, width, height in boxes:
        assert x - width / 2 > 0 and x + width / 2 < places.size[0]
        assert y - height / 2 > 0 and y + height / 2 < places.size[1]
    for one, other in itertools.combinations(boxes, 2):
        apart = abs(one[0] - other[0]) >= (one[2] + other[2]) / 2
        assert apart or abs(one[1] - other[1]) >= (one[3] + other[3]) / 2, (one, other)
    # Each edge ends where it should, passes its own label, and no other label or node.
    for e, (_, source) in enumerate(edges):
        points = places.paths[e]
        assert points[0] == places.nodes[source] and points[-1] == places.nodes[2 + e // 2]
        assert places.labels[e] in points
    for points in places.paths:
        for x, y, width in points:
            for bx, by, bwidth, height in boxes:
                if (bx, by, bwidth) != (x, y, width) and abs(bx - x) < (bwidth + width) / 2:
                    assert abs(by - y) >= height / 2
    assert places.size[0] < (5.5 if len(edges) <= 8 else 7)  # inches: the width of a page


def test_no_more_crossings_than_needed(monkeypatch):
    """Against all orders of the places, for cells of which there are few."""
    original, seen = drawing.fewest_crossings, {}

    def spy(order, links):
        seen.update(order=order, links=links)
        return original(order, links)

    monkeypatch.setattr(drawing, "fewest_crossings", spy)
    for edges in (
        [("a", 0), ("b", 1), ("c", 0), ("d", 1)],
        [("a", 0), ("b", 1), ("c", 0), ("d", 2)],
        [("a", 1), ("b", 0), ("c", 2), ("d", 2)],
    ):
        found = drawing.layout(edges, [2, 3]).crossings
        best = min(
            sum(drawing._crossings(ranks, seen["links"], r) for r in range(len(ranks) - 1))
            for ranks in itertools.product(*map(itertools.permutations, seen["order"]))
        )
        assert found == best


def test_colours_are_of_the_op():
    assert len({drawing.colour(op) for op in genotypes.PRIMITIVES}) == len(genotypes.PRIMITIVES)
    assert drawing.colour("my_op") == drawing.colour("my_op")
    light = [sum(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in drawing.COLOURS.values()]
    assert max(light) < 3 * 200  # on white paper


def run(*flags, cwd):
    return subprocess.run(
        [*warm_python(), ROOT / "visualize.py", *flags], cwd=cwd, capture_output=True, text=True
    )


def test_a_genotype_as_text(tmp_path):
    text = genotypes.text(genotypes.PC_DARTS_cifar)
    assert run(text, "--dot", cwd=tmp_path).stdout == drawing.dot(genotypes.PC_DARTS_cifar) + "\n"


def test_runs_with_operations_of_somebodys_own(tmp_path):
    folder = a_search(tmp_path / "own", 4)
    genotypes.save(genotypes.PC_DARTS_cifar, folder / "genotype.json")
    for name in ("genotypes.jsonl", "genotype.json"):
        (folder / name).write_text((folder / name).read_text().replace("sep_conv_3x3", "gate"))
    done = run("own", "--animate", cwd=tmp_path)
    assert done.returncode == 0 and (folder / "cells.gif").exists(), done.stderr
    assert "gate" in run("own", "--dot", cwd=tmp_path).stdout
    report.write(report.read(folder), folder / "report.html")


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_pictures_are_written_the_same_each_time(tmp_path, kind):
    (tmp_path / "mine.json").write_text(genotypes.to_json(ODD["one step"]))
    contents = []
    for out in ("a", "b"):
        done = run("mine.json", "--format", kind, "--out", out, cwd=tmp_path)
        assert done.stdout.split() == [f"{out}/mine-normal.{kind}", f"{out}/mine-reduction.{kind}"]
        contents.append([(tmp_path / path).read_bytes() for path in done.stdout.split()])
    assert contents[0] == contents[1]
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind]
    assert all(content.startswith(start) for content in contents[0])


def test_graphviz_source():
    source = drawing.dot(ODD["repeated inputs"])
    assert source.count("->") == 8 + 1 + 2
    assert source.count('label="max_pool_3x3"') == 4 and source.count("normal2 -> normal3") == 2
    assert source.count("{") == source.count("}") + source.count("c_{k") - source.count('}"')
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg"], input=source, text=True, check=True, capture_output=True)


def a_search(folder, epochs, of=4, steps=4, edge_norm=True, **args):
    """A run folder as a search leaves it after some epochs."""
    folder.mkdir()
    ops, edges = genotypes.PRIMITIVES, steps * (steps + 3) // 2
    args = {"epochs": of, "save": "a", "seed": 0, "begin": 1} | args
    about = {"format": files.FORMAT, "script": "train_search", "args": args, "classes": ["x", "y"]}
    about |= {"command": ["train_search.py", "--note", "<b>"], "primitives": ops, "device": "CPU"}
    (folder / "args.json").write_text(json.dumps(about))
    cell = [("sep_conv_3x3", 0), ("skip_connect", 1)] * steps
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "learning_rate": 0.1, "loss": 2 / epoch, "top1": 10.0 * epoch}
        row |= {"seconds": 60, "memory_mib": 100, "frozen": int(epoch == 1), "parameters_m": 3}
        row |= {"multiply_adds_m": 500}
        fields = {"epoch": epoch, "normal": cell, "normal_concat": [2], "reduce": cell}
        fields["reduce_concat"] = [2 + steps - 1]
        for kind in ("normal", "reduce"):
            row |= {f"alpha_entropy_{kind}": 2 / epoch, f"skip_connects_{kind}": steps}
            fields[f"softmax_alphas_{kind}"] = [[1 / len(ops)] * len(ops)] * edges
            if edge_norm:
                row[f"beta_entropy_{kind}"] = 1
                fields[f"softmax_betas_{kind}"] = [0.25] * edges
        files.append_csv(folder / "metrics.csv", row)
        files.append_jsonl(folder / "genotypes.jsonl", fields)
    return folder


def a_training(folder, accuracies, of=None, **args):
    folder.mkdir()
    args = {"epochs": of or len(accuracies), "save": "t", "seed": 0, "arch": "PCDARTS"} | args
    about = {"format": files.FORMAT, "script": "train", "args": args, "device": "CPU"}
    (folder / "args.json").write_text(json.dumps(about))
    genotypes.save(genotypes.PCDARTS, folder / "genotype.json")
    for epoch, accuracy in enumerate(accuracies, 1):
        row = {"epoch": epoch, "learning_rate": 0.1, "loss": 1, "top1": 50, "seconds": 90}
        row |= {"memory_mib": 10, "test_loss": 1, "test_top1": accuracy}
        files.append_csv(folder / "metrics.csv", row)
    return folder


RUNS = {
    "search": lambda folder: a_search(folder, 4),
    "half done": lambda folder: a_search(folder, 2),
    "one epoch": lambda folder: a_search(folder, 1),
    "not one": lambda folder: a_search(folder, 0),
    "one step": lambda folder: a_search(folder, 3, steps=1),
    "five steps, no betas": lambda folder: a_search(folder, 3, steps=5, edge_norm=False),
    "training": lambda folder: a_training(folder, [50.0, 80.0, 70.0]),
    "training, one epoch": lambda folder: a_training(folder, [50.0]),
    "training, none": lambda folder: a_training(folder, [], of=3),
}


def pictures(page):
    """The SVG trees in a page; asserts that nothing comes from elsewhere."""
    sources = re.findall(r'<img [^>]*src="([^"]*)"', page)
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^">)]*)', page)
    assert all(link.startswith("data:") for link in links)
    return [ET.fromstring(base64.b64decode(source.split(",")[1])) for source in sources]


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_reports(tmp_path, make):
    folder = make(tmp_path / "run")
    path = report.write(report.read(folder), folder / "report.html")
    page = path.read_text()
    record = report.read(folder)
    assert f"{len(record.rows)} of {record.epochs} epochs" in page
    search, rows = record.is_search, bool(record.rows)
    betas = search and rows and "softmax_betas_normal" in record.cells[0]
    expected = rows + 2 * (record.genotype is not None) + 3 * (search and rows) + betas
    assert len(pictures(page)) == expected
    assert "<b>" not in page and (not search or "&lt;b&gt;" in page)


def test_a_report_of_a_row_that_is_being_written(tmp_path):
    folder = a_search(tmp_path / "run", 2)
    for name, rest in (("metrics.csv", "3,0.1,"), ("genotypes.jsonl", '{"epoch": 3, "nor')):
        with (folder / name).open("a") as file:
            file.write(rest)
    assert len(report.read(folder).rows) == len(report.read(folder).cells) == 2


def test_the_curves_mark_last_and_best(tmp_path):
    record = report.read(a_training(tmp_path / "run", [50.0, 80.0, 70.0]))
    accuracy = plots.curves(record).axes[1]
    marked = {line.get_label(): line.get_xydata().tolist() for line in accuracy.lines}
    assert marked["best: 80.00 %"] == [[2, 80]] and marked["last: 70.00 %"] == [[3, 70]]
    assert "70.00 % after the last epoch" in report.headline(record)
    frozen = plots.curves(report.read(a_search(tmp_path / "search", 3))).axes[0].patches
    assert [(patch.get_x(), patch.get_width()) for patch in frozen] == [(0.5, 1.0)]


def test_the_heat_map_shows_the_softmax(tmp_path):
    folder = a_search(tmp_path / "run", 2)
    lines = [json.loads(line) for line in (folder / "genotypes.jsonl").read_text().splitlines()]
    lines[1]["softmax_alphas_normal"][3] = [0.3, *[0.1] * 7]  # the second edge of node 1
    (folder / "genotypes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = plots.alphas(report.read(folder), "normal")
    [axis] = [axis for axis in figure.axes if axis.get_title() == "c_{k-1} to 1"]
    assert axis.images[0].get_array().tolist() == [[0.125, 0.3], *[[0.125, 0.1]] * 7]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == genotypes.PRIMITIVES


def test_comparisons(tmp_path):
    values = {"a": [60.0, 70.0], "b": [75.0, 74.0]}
    folders = [a_training(tmp_path / name, v, seed=i) for i, (name, v) in enumerate(values.items())]
    folders.append(a_training(tmp_path / "c", [90.0], of=2, save="other"))
    folders.append(a_search(tmp_path / "s", 4))
    runs = [report.read(folder) for folder in folders]
    text = "\n\n".join(map(report.markdown, report.tables(runs)))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    last, best = ([70.0, 74.0], [70.0, 75.0])
    expected = [
        "t",
        "2",
        "2",
        *(f"{statistics.mean(v):.2f} ± {statistics.stdev(v):.2f}" for v in (last, best)),
    ]
    assert [row[:5] for row in rows if row[0] == "t"] == [expected]
    [other] = [row for row in rows if row[0] == "other"]
    assert other[:5] == ["other", "1", "1 of 2", "90.00", "90.00"]
    [search] = [row for row in rows if row[0] == "a"]
    assert search[:5] == ["a", "1", "4", "40.00", "4.0"] and "4 min" in search
    page = report.compare(runs, tmp_path / "comparison.html").read_text()
    assert len(pictures(page)) == 1 and "72.00 ± 2.83" in page


def test_runs_on_other_images_are_no_row_and_one_run_is_one(tmp_path):
    folders = [a_training(tmp_path / name, [50.0], seed=i) for i, name in enumerate("ab")]
    records = [report.read(folder) for folder in folders]
    assert len(report.groups(records)) == 1
    for record, images in zip(records, ("1", "2"), strict=True):
        record.about["images"] = images
    assert len(report.groups(records)) == 2
    pytest.importorskip("matplotlib")
    done = run("a", "a/", "./a", "b", cwd=tmp_path)
    assert "| t | 2 |" in done.stdout


def test_what_is_not_damaged_is_not_called_so(tmp_path):
    for what in (["Nothing"], ["PCDARTS", "--out", "/proc/nowhere"]):
        done = run(*what, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "damaged" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.csv", "epoch,loss\n1,2\n"),
        ("genotypes.jsonl", "5\n"),
        ("genotypes.jsonl", '{"epoch": 1}\n'),
    ],
)
def test_what_was_edited_by_hand_is_one_line(tmp_path, name, text):
    pytest.importorskip("matplotlib")
    (a_search(tmp_path / "a", 2) / name).write_text(text)
    done = run("a", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "damaged" in done.stderr, done.stderr


def test_only_cells_of_searches_are_one_row(tmp_path):
    archs = "cells/a.json", "cells/b.json", "search-1", "runs/search-2/genotype.json"
    runs = [report.read(a_training(tmp_path / str(i), [60.0, 70.0], arch=arch, seed=i))
            for i, arch in enumerate(archs)]  # fmt: skip
    assert [len(alike) for alike in report.groups(runs)] == [1, 1, 2]


def test_animation(tmp_path):
    from PIL import Image

    folder = a_search(tmp_path / "run", 3)
    lines = [json.loads(line) for line in (folder / "genotypes.jsonl").read_text().splitlines()]
    for line in lines:  # a picture that is the last one over again is no frame of its own
        line["normal"][0][0] = genotypes.PRIMITIVES[line["epoch"]]
    (folder / "genotypes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("run", "--animate", cwd=tmp_path)
    assert done.stdout.split() == ["run/cells.gif", "run/report.html"], done.stderr
    assert Image.open(folder / "cells.gif").n_frames == 3


@pytest.mark.slow
def test_without_matplotlib_scripts_run_and_say_what_to_install(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    code = (
        "import sys; sys.argv = ['{0}', *'{1}'.split()]; import {0}; from harness import script; "
    )
    code += "script.run({0}.main, {0}.get_args)"

    def script(name, flags):
        return subprocess.run(
            [sys.executable, "-c", code.format(name, flags)], cwd=tmp_path, capture_output=True,
            text=True, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        )  # fmt: skip

    small = "--set digits --epochs 1 --layers 3 --init_channels 8 --batch_size 300 --input_size 8"
    for name, flags in (("visualize", "PCDARTS"), ("train", f"{small} --report"),
                        ("train_search", f"{small} --tensorboard")):  # fmt: skip
        done = script(name, flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "needs matplotlib: pip install" in done.stderr
    assert not list(tmp_path.glob("*-*"))
    assert "digraph" in script("visualize", "PCDARTS --dot").stdout
    assert script("train_search", small).returncode == 0


def test_a_search_with_report_and_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = "--set digits --epochs 3 --begin 1 --layers 3 --init_channels 8 --batch_size 300 "
    flags += "--input_size 8 --report 2 --tensorboard"
    command = [*warm_python(), ROOT / "train_search.py", *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "epochs left" not in done.stdout  # seconds are not worth a line
    [folder] = tmp_path.glob("search-*")
    page = (folder / "report.html").read_text()
    assert "3 of 3 epochs" in page and len(pictures(page)) == 7
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    for name in rows[0]:
        values = [(event.step, event.value) for event in events.Scalars(name)]
        assert values == [(int(r["epoch"]), pytest.approx(float(r[name]), 1e-5)) for r in rows]
    tags = events.Tags()
    assert sorted(tags["images"]) == ["normal cell", "reduction cell"]
    kinds = [
        f"softmax_{what}_{kind}" for what in ("alphas", "betas") for kind in ("normal", "reduce")
    ]
    assert sorted(tags["histograms"]) == kinds
    for row in map(json.loads, (folder / "genotypes.jsonl").read_text().splitlines()):
        assert all(sum(edge) == pytest.approx(1, abs=1e-5) for edge in row["softmax_alphas_normal"])
        assert sum(row["softmax_betas_reduce"]) == pytest.approx(4, abs=1e-4)  # 1 of each node


BROWSER = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_the_report_in_a_browser(tmp_path):
    folder = a_search(tmp_path / "run", 3)
    path = report.write(report.read(folder), folder / "report.html")
    script = (
        "<script>addEventListener('load', () => { document.title = 'pictures ' + "
        "[...document.images].filter(i => i.complete && i.naturalWidth > 0).length + ' of ' + "
        "document.images.length })</script></body>"
    )
    path.write_text(path.read_text().replace("</body>", script))
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    flags += f" --enable-logging=stderr --user-data-dir={tmp_path}/profile --dump-dom"
    done = subprocess.run(
        [BROWSER, *flags.split(), path.as_uri()], capture_output=True, text=True, timeout=60
    )
    assert "<title>pictures 7 of 7</title>" in done.stdout
    assert "CONSOLE" not in done.stderr  # as the browser logs errors of the page
