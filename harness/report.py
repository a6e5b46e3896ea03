"""The report of a run and the comparison of several, as one HTML file each, from their folders.

Read are args.json, metrics.csv, genotypes.jsonl and genotype.json alone: a run that is half done,
or was copied without its weights, has a report too.
"""

import base64
import csv
import html
import io
import json
import math
import operator
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

import genotypes
import utils
from harness import drawing, files, flags

KINDS = {"normal": "normal cell", "reduce": "reduction cell"}
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff }
img { max-width: 100%; height: auto; display: block }
pre { white-space: pre-wrap; background: #f4f4f4; padding: .6em }
table { border-collapse: collapse }
td, th { padding: .15em .7em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
summary { cursor: pointer }
"""


class Record(NamedTuple):
    """What a run folder tells."""

    folder: Path
    about: dict  # args.json
    rows: list[dict]  # of metrics.csv, as numbers
    cells: list[dict]  # of genotypes.jsonl
    genotype: object  # the run's, or that after its last epoch; None before

    @property
    def is_search(self):
        return self.about["script"].startswith("train_search")

    @property
    def epochs(self):
        return self.about["args"].get("epochs", 0)

    @property
    def accuracy(self):
        """The column whose last value is the result: on the test images, of a search training.

        A script may name another in args.json, whose values may be NaN where nothing was tested.
        """
        if "result" in self.about:
            return self.about["result"]
        if self.is_search:
            return "top1"
        return "val_top1" if "imagenet" in self.about["script"] else "test_top1"

    def column(self, name):
        return [row[name] for row in self.rows if name in row]

    @property
    def measured(self):
        """[(epoch, result)] of the epochs that were measured."""
        values = enumerate(self.column(self.accuracy), 1)
        return [(epoch, value) for epoch, value in values if not math.isnan(value)]


def read(folder):
    """The Record of a run folder; UserError where it is none or cannot be read."""
    folder = Path(folder).expanduser()
    about = files.read_args(folder)
    if not str(about.get("script")).startswith("train"):
        raise utils.UserError(f"{folder} is no run of a search or training: give such a folder")
    try:
        table = csv.DictReader(whole_lines(folder / "metrics.csv"))
        rows = [{name: float(value) for name, value in row.items()} for row in table]
        cells = [json.loads(line) for line in whole_lines(folder / "genotypes.jsonl")]
        genotype = None
        if (folder / "genotype.json").exists():
            genotype = genotypes.load(folder)
        elif cells:
            genotype = genotypes.from_json(json.dumps(cells[-1]))
    except (OSError, ValueError, TypeError) as error:
        raise utils.UserError(f"{folder} is damaged ({error}): mend or leave it out") from None
    return Record(folder, about, rows, cells, genotype)


def whole_lines(path):
    """The lines of a file, but for one that is being written; none without the file."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def write(run, path, more=None):
    """Writes report.html; returns its path. more: further pictures, as those of `pictures`."""
    name = run.folder.resolve().name
    parts = [f"<h1>{html.escape(name)}</h1><p>{headline(run)}</p>"]
    command = " ".join(map(str, run.about.get("command", [])))
    parts.append(f"<pre>{html.escape(command)}</pre>")
    clean = {True: "", False: " with changes", None: ""}[run.about.get("clean")]
    facts = {
        "machine": run.about.get("device"),
        "torch, Python": f"{run.about.get('torch')}, {run.about.get('python')}",
        "commit": f"{run.about.get('commit') or 'unknown'}{clean}",
        "done": f"{len(run.rows)} of {run.epochs} epochs",
    }
    if run.rows:
        facts["time"] = f"{utils.duration(sum(run.column('seconds')))} in training steps"
        facts["peak memory"] = f"{max(run.column('memory_mib')):.0f} MiB"
    parts.append(html_table(facts.items()))
    arguments = html_table(run.about["args"].items())
    parts.append(f"<details><summary>all arguments</summary>{arguments}</details>")
    if not run.rows:
        parts.append("<p>No epoch is done yet.</p>")
    for title, (explanation, figure) in (pictures(run) | (more or {})).items():
        parts.append(f"<h2>{title.capitalize()}</h2><p>{explanation}</p>{image(figure, title)}")
    for picture in sorted(run.folder.glob("*.png")):  # that the script left there
        shown = embedded(picture.read_bytes(), "png", picture.stem)
        parts.append(f"<h2>{picture.stem.capitalize()}</h2>{shown}")
    if run.genotype is not None:
        parts.append(f"<pre>{html.escape(genotypes.text(run.genotype))}</pre>")
    page(path, name, parts)
    return path


def pictures(run):
    """{title: (what it shows, Figure)} of all that there is to draw of a run."""
    found = {}
    if run.rows:
        found["curves"] = "", curves(run)
    if run.genotype is not None:
        for kind, figure in drawing.draw(run.genotype).items():
            found[f"{kind} cell"] = "", figure
    if run.is_search and run.rows and "alpha_entropy_normal" in run.rows[0]:
        found["what is watched"] = "", watched(run)
    if run.cells and "softmax_alphas_normal" in run.cells[0]:
        explanation = "softmax(alpha) of every edge: a row per operation, a column per epoch."
        for kind, title in KINDS.items():
            found[f"alphas, {title}"] = explanation, alphas(run, kind)
        if "softmax_betas_normal" in run.cells[0]:
            explanation = "softmax(beta) of every edge, times the number of edges to its node: "
            found["betas"] = explanation + "1 is an even share. A column per epoch.", betas(run)
    return found


def headline(run):
    """The result in a sentence."""
    if not run.measured:
        return "Nothing is measured yet."
    last, value = run.measured[-1]
    if run.is_search:
        skips = ""
        if run.genotype is not None:
            skips = ", {} and {} skip_connects".format(*genotypes.skip_connects(run.genotype))
        return f"Search: training accuracy {value:.2f} % after epoch {last}{skips}."
    best, highest = max(run.measured, key=operator.itemgetter(1))
    when = "the last epoch" if last == len(run.column(run.accuracy)) else "epoch"
    name = f"{run.about['result']} " if "result" in run.about else ""
    return (
        f"Training: {name}{value:.2f} % after {when}, {last}; best epoch {best} "
        f"with {highest:.2f} % (chosen on these images: not a result)."
    )


def html_table(rows):
    """rows: of cells, the first of each its name."""
    lines = []
    for name, *cells in rows:
        cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
        lines.append(f"<tr><th>{html.escape(str(name))}</th>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def image(figure, alt):
    """The figure inside the page."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path"}):  # looks the same in any browser
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    width = round(figure.get_figwidth() * 120)
    return embedded(buffer.getvalue(), "svg+xml", alt, f' width="{width}"')


def embedded(content, kind, alt, style=""):
    """The bytes of a picture inside the page."""
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return f'<img{style} alt="{alt}" src="{source}">'


def page(path, title, parts):
    body = "\n".join(parts)
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<title>{html.escape(title)}</title><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )
    with drawing.writing(path):
        files.write(path, text.encode())


def subplots(n, width, height):
    figure = drawing.figures().Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False)[0]


def epochs_axis(axis, epochs):
    axis.set_xlabel("epoch")
    axis.set_xlim(0.5, max(epochs, 1) + 0.5)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3, linewidth=0.4)
    axis.spines[["top", "right"]].set_visible(False)


def line(axis, values, label=None, color=None, **style):
    """A curve over epochs 1, 2, ...; a single epoch is a point."""
    marker = "o" if len(values) == 1 else None
    axis.plot(range(1, len(values) + 1), values, label=label, color=color, linewidth=1.1,
              marker=marker, markersize=3, **style)  # fmt: skip


def shade(axis, run):
    """The epochs in which alphas and betas were frozen."""
    frozen = sum(run.column("frozen"))
    if frozen:
        axis.axvspan(0.5, frozen + 0.5, color="#000000", alpha=0.07, linewidth=0, label="frozen")


def curves(run):
    """Loss, accuracy and learning rate over the epochs."""
    figure, (loss, accuracy, rate) = subplots(3, 7.2, 2.1)
    tested = run.accuracy.removesuffix("top1")  # "", "test_" or "val_"
    other = tested or ("valid_" if run.column("valid_top1") else "")  # of a search with --validate
    for axis, name, title in ((loss, "loss", "loss"), (accuracy, "top1", "top-1 accuracy (%)")):
        shade(axis, run)
        line(axis, run.column(name), "training", BLUE)
        if other:
            label = "test" if other == "test_" else "validation"
            line(axis, run.column(other + name), label, ORANGE)
        axis.set_title(title)
    if "result" in run.about and run.measured:
        epochs, values = zip(*run.measured, strict=True)
        accuracy.plot(epochs, values, color=ORANGE, linewidth=1.1, label=run.accuracy)
        accuracy.set_title("%")
    if tested and run.measured:
        best, last = max(run.measured, key=operator.itemgetter(1)), run.measured[-1]
        for name, (epoch, value), marker, color in (
            ("best", best, "^", RED), ("last", last, "s", GREEN),
        ):  # fmt: skip
            label = f"{name}: {value:.2f} %"
            accuracy.plot(epoch, value, marker, color=color, markersize=4, label=label)
    shade(rate, run)
    line(rate, run.column("learning_rate"), None, BLUE)
    rate.set_title("learning rate")
    for axis in (loss, accuracy, rate):
        epochs_axis(axis, len(run.rows))
    for axis in (loss, accuracy):
        axis.legend(frameon=False)
    return figure


def watched(run):
    """Entropies of alphas and betas, skip_connects, and cost of the derived network."""
    figure, (alpha, beta, skips, cost) = subplots(4, 7.2, 1.9)
    for (kind, title), color in zip(KINDS.items(), (BLUE, ORANGE), strict=True):
        line(alpha, run.column(f"alpha_entropy_{kind}"), title, color)
        line(beta, run.column(f"beta_entropy_{kind}"), title, color)
        line(skips, run.column(f"skip_connects_{kind}"), title, color, drawstyle="steps-mid")
    alpha.set_title("entropy of softmax(alpha)")
    beta.set_title("entropy of softmax(beta)")
    skips.set_title("skip_connects")
    skips.yaxis.get_major_locator().set_params(integer=True)
    line(cost, run.column("parameters_m"), "parameters (M)", GREEN)
    hundreds = [value / 100 for value in run.column("multiply_adds_m")]
    line(cost, hundreds, "multiply-adds (100 M)", RED)
    cost.set_title("derived network")
    cost.set_ylim(0, 1.6 * max(cost.get_ylim()))  # room for the legend
    for axis in (alpha, beta):
        axis.ticklabel_format(axis="y", useOffset=False)
    for axis in (alpha, beta, skips, cost):
        shade(axis, run)
        epochs_axis(axis, len(run.rows))
    for axis in (alpha, skips, cost):
        axis.legend(frameon=False)
    return figure


def alphas(run, kind):
    """Heat maps of softmax(alpha): a row of them per node, one per edge; ops by epochs."""
    table = np.array([row[f"softmax_alphas_{kind}"] for row in run.cells])  # epochs, edges, ops
    ops = run.about.get("primitives") or list(range(table.shape[2]))
    edges = edges_of(table.shape[1])
    steps = edges[-1][1] + 1
    height = 0.35 + steps * (0.11 * len(ops) + 0.22)
    figure = drawing.figures().Figure(figsize=(7.2, height), layout="constrained")
    grid = figure.subplots(steps, steps + 1, squeeze=False, sharex=True)
    for axis in grid.flat:
        axis.set_visible(False)
    for edge, (source, node, name) in enumerate(edges):
        axis = grid[node][source]
        axis.set_visible(True)
        drawn = heat_map(axis, table[:, edge].T, vmin=table.min(), vmax=table.max())
        axis.set_title(name, pad=2)
        axis.set_yticks(range(len(ops)), ops if source == 0 else [])
        axis.tick_params(length=1.5, labelbottom=node == steps - 1 or source == 0)
        axis.xaxis.get_major_locator().set_params(nbins=4)
    for axis in grid[-1]:
        axis.set_xlabel("epoch")
    figure.colorbar(drawn, ax=grid, shrink=0.5, pad=0.01)
    return figure


def betas(run):
    """Heat maps of softmax(beta), one per cell kind: edges, parted by node, by epochs."""
    figure, axes = subplots(2, 7.2, 2.4)
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
        table = np.array([row[f"softmax_betas_{kind}"] for row in run.cells])  # epochs, edges
        edges = edges_of(table.shape[1])
        among = np.array([node + 2 for _, node, _ in edges])  # edges to its node
        drawn = heat_map(axis, (table * among).T)
        axis.set_yticks(range(len(edges)), [name for *_, name in edges], fontsize=5)
        for edge, (source, _, _) in enumerate(edges):
            if source == 0 and edge:
                axis.axhline(edge - 0.5, color="white", linewidth=1.5)
        axis.set_title(title)
        axis.set_xlabel("epoch")
        figure.colorbar(drawn, ax=axis, pad=0.01)
    return figure


def heat_map(axis, values, **limits):
    """values: (rows, epochs)."""
    rows, epochs = values.shape
    axis.xaxis.get_major_locator().set_params(integer=True)
    extent = 0.5, epochs + 0.5, rows - 0.5, -0.5
    return axis.imshow(values, aspect="auto", interpolation="nearest", extent=extent, **limits)


def edges_of(n):
    """[(source, node, name)] of a cell's n edges, as alphas have them: 2 to node 0, 3 to node 1."""
    pairs = [(source, node) for node in range(n) for source in range(node + 2)][:n]
    names = drawing.node_names([None] * 2 * n)
    return [(source, node, f"{names[source]} to {node}") for source, node in pairs]


def animate(run, path):
    """cells.gif: both cells after each epoch of a search; returns its path."""
    from PIL import Image

    if not run.cells:
        raise utils.UserError(f"{run.folder} has no genotypes.jsonl: --animate takes a search")
    frames, places = [], {}
    for row in run.cells:
        genotype = genotypes.from_json(json.dumps(row))
        text = genotypes.text(genotype)
        if text not in places:
            places[text] = [drawing.layout(*cell) for cell in drawing.cells(genotype).values()]
        frames.append((row["epoch"], genotype, places[text]))
    width = max(cell.size[0] for _, _, both in frames for cell in both)
    heights = [max(both[i].size[1] for _, _, both in frames) for i in (0, 1)]
    images = []
    for epoch, genotype, (normal, reduction) in frames:
        size = width, sum(heights) + 0.5
        figure = drawing.figures().Figure(figsize=size)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, size[0]), ylim=(0, size[1]))
        for cell, places_of, low, name in (
            (genotype.reduce, reduction, 0.05, "reduction"),
            (genotype.normal, normal, heights[1] + 0.25, "normal"),
        ):
            drawing.draw_into(axes, cell, places_of, (width - places_of.size[0]) / 2, low)
            top = low + heights[name == "reduction"]
            axes.text(0.08, top, f"{name} cell, epoch {epoch}", va="bottom", fontsize=drawing.FONT)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=160)
        images.append(Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE))
    times = [500] * (len(images) - 1) + [3000]
    with drawing.writing(path):
        images[0].save(path, save_all=True, append_images=images[1:], duration=times, loop=0)
    return path


def groups(runs):
    """[[runs that differ in nothing but their seed, their time and what they are trained on]]."""
    alike = {}
    for run in runs:
        args = {name: value for name, value in run.about["args"].items() if name not in flags.FREE}
        for name in ("seed", "note", "form", "no_cuda_graph"):  # the same figures, but for speed
            args.pop(name, None)
        if "/" in str(args.get("arch")) or str(args.get("arch")).startswith("search-"):
            args["arch"] = "the cell of a search"
        key = json.dumps([run.about["script"], args, run.about.get("classes")], sort_keys=True)
        alike.setdefault(key, []).append(run)
    return list(alike.values())


def mean(values, digits=2):
    """As text: mean, and standard deviation of several."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def tables(runs):
    """A table of the searches and one of the trainings: a row, a dict, per group of runs."""
    rows = [(group[0].is_search, summary(group)) for group in groups(runs)]
    both = ([row for is_search, row in rows if is_search == kind] for kind in (True, False))
    return [table for table in both if table]


def summary(group):
    """{column: text} of runs that differ in their seed alone."""
    first, begun = group[0], [run for run in group if run.rows]
    results = [run.column(first.accuracy) for run in begun if run.column(first.accuracy)]
    sizes = [run.column("parameters_m") or [run.about.get("parameters_m")] for run in group]
    seconds = [sum(run.column("seconds")) for run in begun]
    memory = [max(run.column("memory_mib")) for run in begun]
    done = sorted({f"{len(run.rows)} of {run.epochs}" for run in group})
    whole = all(len(run.rows) == run.epochs for run in group)
    row = {
        "run": first.about["args"].get("save", ""),
        "runs": len(group),
        "epochs": first.epochs if whole else ", ".join(done),
    }
    last = mean([values[-1] for values in results])
    if first.is_search:
        row["supernet, training, last epoch (%)"] = last
        skips = [run.column("skip_connects_normal")[-1] for run in begun]
        row["skip_connects (normal)"] = mean(skips, 1)
    else:
        row["last epoch (%)"] = last
        row["best epoch (%)"] = mean([max(values) for values in results])
    return row | {
        "parameters (M)": mean([size[-1] for size in sizes if size[-1] is not None]),
        "time": utils.duration(statistics.mean(seconds)) if seconds else "–",
        "peak memory (MiB)": f"{max(memory):.0f}" if memory else "–",
        "device": ", ".join(sorted({str(run.about.get("device")) for run in group})),
    }


def markdown(rows):
    """A table of rows, dicts of the same columns."""
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else value for value in row.values()]
        lines.append(f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |")
    return "\n".join(lines)


def compare(runs, path):
    """Writes comparison.html, the table and all curves on one axis; returns its path."""
    parts = ["<h1>Comparison</h1>"]
    parts += [html_table([rows[0], *map(dict.values, rows)]) for rows in tables(runs)]
    figure, (loss, accuracy) = subplots(2, 7.2, 3)
    colours = [*drawing.COLOURS.values(), *drawing.OTHERS]
    styles = ("-", "--", ":", "-.")
    for i, group in enumerate(groups(runs)):
        for j, run in enumerate(group):
            style = {"linestyle": styles[i // len(colours) % 4], "alpha": 1 if j == 0 else 0.5}
            label = None if j else f"{run.about['args'].get('save', '')} ({len(group)})"
            prefix = run.accuracy.removesuffix("top1")
            color = colours[(i + 3) % len(colours)]
            line(loss, run.column(prefix + "loss"), label, color, **style)
            line(accuracy, run.column(prefix + "top1"), label, color, **style)
    for axis, title in ((loss, "loss"), (accuracy, "top-1 accuracy (%)")):
        epochs_axis(axis, max(len(run.rows) for run in runs))
        axis.set_title(title)
    accuracy.legend(frameon=False, title="--save (runs)")
    parts.append(
        "<p>Of trainings on the test or validation images, of searches on the training half.</p>"
    )
    parts.append(image(figure, "loss and accuracy of all runs"))
    page(path, "Comparison", parts)
    return path
