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
import statistics
from pathlib import Path
from typing import NamedTuple

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


def read(folder):
    """The Record of a run folder; UserError where it is none or cannot be read."""
    folder = Path(folder).expanduser()
    about = files.read_args(folder)
    if not str(about.get("script")).startswith("train"):
        raise utils.UserError(f"{folder} is no run of a search or training: give such a folder")
    rows, cells = [], []
    try:
        if (folder / "metrics.csv").exists():
            with open(folder / "metrics.csv", newline="") as file:
                for row in csv.DictReader(file):
                    if None not in row and None not in row.values():  # a line that is being written
                        rows.append({name: float(value) for name, value in row.items()})
        if (folder / "genotypes.jsonl").exists():
            for line in (folder / "genotypes.jsonl").read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    cells.append(json.loads(line))
        genotype = None
        if (folder / "genotype.json").exists():
            genotype = genotypes.load(folder)
        elif cells:
            genotype = genotypes.from_json(json.dumps(cells[-1]))
    except (OSError, ValueError) as error:
        raise utils.UserError(f"{folder} is damaged ({error}): mend or leave it out") from None
    return Record(folder, about, rows, cells, genotype)


def write(run, path, more=None):
    """Writes report.html; returns its path. more: further pictures, as those of `pictures`."""
    args, name = run.about["args"], run.folder.resolve().name
    done = f"{len(run.rows)} of {run.epochs} epochs"
    parts = [f"<h1>{html.escape(name)}</h1><p>{headline(run)}</p>"]
    command = " ".join(map(str, run.about.get("command", [])))
    parts.append(f"<pre>{html.escape(command)}</pre>")
    clean = {True: "", False: " with changes", None: ""}[run.about.get("clean")]
    facts = {
        "machine": run.about.get("device"),
        "torch, Python": f"{run.about.get('torch')}, {run.about.get('python')}",
        "commit": f"{run.about.get('commit') or 'unknown'}{clean}",
        "done": done,
    }
    if run.rows:
        facts["time"] = f"{utils.duration(sum(run.column('seconds')))} in training steps"
        facts["peak memory"] = f"{max(run.column('memory_mib')):.0f} MiB"
    parts.append(rows_of(facts))
    parts.append(f"<details><summary>all arguments</summary>{rows_of(args)}</details>")
    if not run.rows:
        parts.append("<p>No epoch is done yet.</p>")
    for title, (explanation, figure) in (pictures(run) | (more or {})).items():
        parts.append(f"<h2>{title.capitalize()}</h2><p>{explanation}</p>{image(figure, title)}")
    for picture in sorted(run.folder.glob("*.png")):  # that the script left there
        content = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<h2>{picture.stem.capitalize()}</h2><img alt="{picture.stem}" '
                     f'src="data:image/png;base64,{content}">')  # fmt: skip
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
    values = run.column(run.accuracy)
    tested = [i for i, value in enumerate(values) if not math.isnan(value)]
    if not tested:
        return "Nothing is measured yet."
    if run.is_search:
        skips = ""
        if run.genotype is not None:
            skips = ", {} and {} skip_connects".format(*genotypes.skip_connects(run.genotype))
        return f"Search: training accuracy {values[-1]:.2f} % after epoch {len(values)}{skips}."
    best, last = max(tested, key=values.__getitem__), tested[-1]
    when = "the last epoch" if last + 1 == len(values) else "epoch"
    name = f"{run.about['result']} " if "result" in run.about else ""
    return (
        f"Training: {name}{values[last]:.2f} % after {when}, {last + 1}; best epoch {best + 1} "
        f"with {values[best]:.2f} % (chosen on these images: not a result)."
    )


def rows_of(facts):
    cells = (
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table>{''.join(cells)}</table>"


def image(figure, alt):
    """The figure inside the page."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path"}):  # looks the same in any browser
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    content = base64.b64encode(buffer.getvalue()).decode()
    width = round(figure.get_figwidth() * 120)
    return f'<img width="{width}" alt="{alt}" src="data:image/svg+xml;base64,{content}">'


def page(path, title, parts):
    body = "\n".join(parts)
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<title>{html.escape(title)}</title><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise utils.UserError(
            f"cannot make {path.parent} ({error.strerror}): give another --out"
        ) from None
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
    values = run.column(run.accuracy)
    measured = [i for i, value in enumerate(values) if not math.isnan(value)]
    if "result" in run.about:
        accuracy.plot([i + 1 for i in measured], [values[i] for i in measured], color=ORANGE,
                      linewidth=1.1, label=run.accuracy)  # fmt: skip
        accuracy.set_title("%")
    if tested and measured:
        best = max(measured, key=values.__getitem__)
        accuracy.plot(best + 1, values[best], "^", color=RED, markersize=4,
                      label=f"best: {values[best]:.2f} %")  # fmt: skip
        last = measured[-1]
        accuracy.plot(last + 1, values[last], "s", color=GREEN, markersize=4,
                      label=f"last: {values[last]:.2f} %")  # fmt: skip
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
    for axis, name in ((alpha, "alpha_entropy"), (beta, "beta_entropy")):
        for kind, color in (("normal", BLUE), ("reduce", ORANGE)):
            line(axis, run.column(f"{name}_{kind}"), KINDS[kind], color)
    alpha.set_title("entropy of softmax(alpha)")
    beta.set_title("entropy of softmax(beta)")
    for kind, color in (("normal", BLUE), ("reduce", ORANGE)):
        line(skips, run.column(f"skip_connects_{kind}"), KINDS[kind], color, drawstyle="steps-mid")
    skips.set_title("skip_connects")
    skips.yaxis.get_major_locator().set_params(integer=True)
    line(cost, run.column("parameters_m"), "parameters (M)", GREEN)
    line(
        cost, [value / 100 for value in run.column("multiply_adds_m")], "multiply-adds (100 M)", RED
    )
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
    table = [row[f"softmax_alphas_{kind}"] for row in run.cells]  # epochs, edges, ops
    ops = run.about.get("primitives") or [str(o) for o in range(len(table[0][0]))]
    steps = steps_of(len(table[0]))
    values = [value for epoch in table for edge in epoch for value in edge]
    low, high = min(values), max(values)
    height = 0.35 + steps * (0.11 * len(ops) + 0.22)
    figure = drawing.figures().Figure(figsize=(7.2, height), layout="constrained")
    grid = figure.subplots(steps, steps + 1, squeeze=False, sharex=True)
    drawn, start = None, 0
    for node in range(steps):
        for source in range(steps + 1):
            axis = grid[node][source]
            if source > node + 1:
                axis.set_visible(False)
                continue
            values = [
                list(ops_of) for ops_of in zip(*(epoch[start] for epoch in table), strict=True)
            ]
            drawn = axis.imshow(
                values, aspect="auto", interpolation="nearest", vmin=low, vmax=high,
                extent=(0.5, len(table) + 0.5, len(ops) - 0.5, -0.5),
            )  # fmt: skip
            name = drawing.node_names([None] * 2 * steps)[source]
            axis.set_title(f"{name} to {node}", pad=2)
            axis.set_yticks(range(len(ops)), ops if source == 0 else [])
            axis.tick_params(length=1.5)
            axis.xaxis.get_major_locator().set_params(integer=True, nbins=4)
            start += 1
        grid[node][0].tick_params(labelbottom=True)
    for axis in grid[-1]:
        axis.set_xlabel("epoch")
    figure.colorbar(drawn, ax=grid, shrink=0.5, pad=0.01)
    return figure


def betas(run):
    """Heat maps of softmax(beta), one per cell kind: edges, parted by node, by epochs."""
    figure, axes = subplots(2, 7.2, 2.4)
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
        table = [row[f"softmax_betas_{kind}"] for row in run.cells]
        steps = steps_of(len(table[0]))
        names = drawing.node_names([None] * 2 * steps)
        labels = [f"{names[s]} to {node}" for node in range(steps) for s in range(node + 2)]
        among = [node + 2 for node in range(steps) for _ in range(node + 2)]  # edges to its node
        drawn = axis.imshow(
            [[n * p for p in epochs] for n, *epochs in zip(among, *table, strict=True)],
            extent=(0.5, len(table) + 0.5, len(labels) - 0.5, -0.5), aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        axis.set_yticks(range(len(labels)), labels, fontsize=5)
        for node in range(1, steps):
            axis.axhline(sum(n + 2 for n in range(node)) - 0.5, color="white", linewidth=1.5)
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(drawn, ax=axis, pad=0.01)
    return figure


def steps_of(edges):
    """Nodes of a cell with so many edges: 2 + 3 + ... of them."""
    steps = 1
    while steps * (steps + 3) // 2 < edges:
        steps += 1
    return steps


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
            both = (
                (genotype.normal, genotype.normal_concat),
                (genotype.reduce, genotype.reduce_concat),
            )
            places[text] = [drawing.layout(*cell) for cell in both]
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        images[0].save(path, save_all=True, append_images=images[1:], duration=times, loop=0)
    except OSError as error:
        raise utils.UserError(
            f"cannot write {path} ({error.strerror}): give another --out"
        ) from None
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


def table(runs):
    """Markdown: a row per group of runs, the searches apart from the trainings."""
    lines = []
    for is_search in (True, False):
        some = [group for group in groups(runs) if group[0].is_search == is_search]
        if not some:
            continue
        last = "supernet, training, last epoch" if is_search else "last epoch"
        head = ["run", "runs", "epochs", f"{last} (%)"]
        head += ["skip_connects (normal)"] if is_search else ["best epoch (%)"]
        head += ["parameters (M)", "time", "peak memory (MiB)", "device"]
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for group in some:
            values = [run.column(group[0].accuracy) for run in group]
            done = sorted({f"{len(run.rows)} of {run.epochs}" for run in group})
            whole = all(len(run.rows) == run.epochs for run in group)
            cells = [group[0].about["args"].get("save", ""), len(group)]
            cells += [group[0].epochs if whole else ", ".join(done)]
            cells += [mean([value[-1] for value in values if value])]
            if is_search:
                cells.append(
                    mean([run.column("skip_connects_normal")[-1] for run in group if run.rows], 1)
                )
            else:
                cells.append(mean([max(value) for value in values if value]))
            sizes = [run.column("parameters_m") or [run.about.get("parameters_m")] for run in group]
            cells.append(mean([size[-1] for size in sizes if size[-1] is not None]))
            seconds = [sum(run.column("seconds")) for run in group if run.rows]
            cells.append(utils.duration(statistics.mean(seconds)) if seconds else "–")
            memory = [max(run.column("memory_mib")) for run in group if run.rows]
            cells.append(f"{max(memory):.0f}" if memory else "–")
            cells.append(", ".join(sorted({str(run.about.get("device")) for run in group})))
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines).strip()


def compare(runs, path):
    """Writes comparison.html, the table and all curves on one axis; returns its path."""
    parts = ["<h1>Comparison</h1>"]
    for part in table(runs).split("\n\n"):
        rows = [row.strip("| ").split(" | ") for row in part.splitlines() if "|---" not in row]
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        parts.append(f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>")
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
