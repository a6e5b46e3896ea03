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
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import genotypes
import utils
from harness import drawing, files, flags, plots

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff }
img { max-width: 100%; height: auto; display: block }
pre { white-space: pre-wrap; background: #f4f4f4; padding: .6em }
table { border-collapse: collapse }
td, th { padding: .15em .7em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
summary { cursor: pointer }
"""


WATCHED = {"skip_connects_normal": "skip_connects (normal)", "argmax_m": "multiply-adds (M)"}


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
        """The column whose last value is the result: test accuracy, of a search that in training.

        A script may name another in args.json, whose values may be NaN where nothing was tested,
        and under "drawn" one more for the curves.
        """
        if "result" in self.about:
            return self.about["result"]
        if self.is_search:
            return "top1"
        return "val_top1" if "imagenet" in self.about["script"] else "test_top1"

    def column(self, name):
        return [row[name] for row in self.rows if name in row]

    @property
    def tested(self):
        """What the names of the tested columns begin with: "test_", "val_"; "" without such."""
        return "" if "result" in self.about else self.accuracy.removesuffix("top1")

    @property
    def measured(self):
        """[(epoch, result)] of the epochs that were measured."""
        return self.values(self.accuracy)

    def values(self, name):
        """[(epoch, value)] of a column, without NaN."""
        values = enumerate(self.column(name), 1)
        return [(epoch, value) for epoch, value in values if not math.isnan(value)]


def read(folder):
    """The Record of a run folder; UserError where it is none or cannot be read."""
    folder = files.expanded(folder)
    about = files.read_args(folder)
    if not str(about.get("script")).startswith("train"):
        raise utils.UserError(f"{folder} is no run of a search or training: give such a folder")
    try:
        table = csv.DictReader(whole_lines(folder / "metrics.csv"))
        rows = [{name: float(value) for name, value in row.items()} for row in table]
        cells = [json.loads(line) for line in whole_lines(folder / "genotypes.jsonl")]
        genotype = None
        if (folder / "genotype.json").exists():
            genotype = genotypes.load(folder, ops=())
        elif cells:
            genotype = genotypes.from_json(json.dumps(cells[-1]), ops=())
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
    drawn = pictures(run) | (more or {})
    for title, (explanation, figure) in drawn.items():
        parts.append(f"<h2>{title.capitalize()}</h2><p>{explanation}</p>{image(figure, title)}")
    names = set(map(file_name, drawn))
    for picture in sorted(run.folder.glob("*.png")):  # that the script left there
        if picture.stem in names:  # one of these, as a file of its own
            continue
        shown = embedded(picture.read_bytes(), "png", picture.stem)
        parts.append(f"<h2>{picture.stem.capitalize()}</h2>{shown}")
    if run.genotype is not None:
        parts.append(f"<pre>{html.escape(genotypes.text(run.genotype))}</pre>")
    page(path, name, parts)
    return path


def file_name(title):
    """Of a picture with this title, without a suffix."""
    return re.sub(r"\W+", "-", title)


def pictures(run):
    """{title: (what it shows, Figure)} of all that there is to draw of a run."""
    found = {}
    if run.rows:
        found["curves"] = "", plots.curves(run)
    if run.genotype is not None:
        for kind, figure in drawing.draw(run.genotype).items():
            found[f"{kind} cell"] = "", figure
    if run.is_search and run.rows and "alpha_entropy_normal" in run.rows[0]:
        found["what is watched"] = "", plots.watched(run)
    if run.cells and "softmax_alphas_normal" in run.cells[0]:
        explanation = "softmax(alpha) of every edge: a row per operation, a column per epoch."
        for kind, title in plots.KINDS.items():
            found[f"alphas, {title}"] = explanation, plots.alphas(run, kind)
        if "softmax_betas_normal" in run.cells[0]:
            explanation = "softmax(beta) of every edge, times the number of edges to its node: "
            explanation += "1 is an even share. A column per epoch."
            found["betas"] = explanation, plots.betas(run)
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
        files.write(path, text.encode(errors="backslashreplace"))


def groups(runs):
    """[[runs that differ in nothing but their seed, their time and what they are trained on]]."""
    alike = {}
    for run in runs:
        args = {name: value for name, value in run.about["args"].items() if name not in flags.FREE}
        for name in ("seed", "note", "form", "no_cuda_graph"):  # the same figures, but for speed
            args.pop(name, None)
        if any(part.startswith("search-") for part in Path(str(args.get("arch"))).parts):
            args["arch"] = "the cell of a search"
        data = [run.about.get(name) for name in ("classes", "images")]
        key = json.dumps([run.about["script"], args, *data], sort_keys=True)
        alike.setdefault(key, []).append(run)
    return list(alike.values())


def mean(values, digits=2):
    """As text: mean, and standard deviation of several; of those that are numbers."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def tables(runs):
    """A table of the searches and one of the trainings: a row, a dict, per group of runs."""
    rows = [(group[0].is_search, summary(group)) for group in groups(runs)]
    both = ([row for is_search, row in rows if is_search == kind] for kind in (True, False))
    tables = []
    for table in filter(None, both):
        columns = dict.fromkeys(name for row in table for name in row)
        tables.append([{name: row.get(name, "–") for name in columns} for row in table])
    return tables


def summary(group):
    """{column: text} of runs that differ in their seed alone."""
    first, begun = group[0], [run for run in group if run.rows]
    results = [[value for _, value in run.measured] for run in begun if run.measured]
    sizes = [run.column("parameters_m") or [run.about.get("parameters_m")] for run in group]
    seconds = [sum(run.column("seconds")) for run in begun]
    memory = [max(run.column("memory_mib"), default=0) for run in begun]
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
        for column, name in WATCHED.items():
            values = [run.column(column)[-1] for run in begun if run.column(column)]
            row |= {name: mean(values, 1)} if values else {}
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
    figure, (loss, accuracy) = plots.subplots(2, 7.2, 3)
    colours = [*drawing.COLOURS.values(), *drawing.OTHERS]
    styles = ("-", "--", ":", "-.")
    for i, group in enumerate(groups(runs)):
        for j, run in enumerate(group):
            style = {"linestyle": styles[i // len(colours) % 4], "alpha": 1 if j == 0 else 0.5}
            label = None if j else f"{run.about['args'].get('save', '')} ({len(group)})"
            color = colours[(i + 3) % len(colours)]
            plots.line(loss, run.column(run.tested + "loss"), label, color, **style)
            epochs = [epoch for epoch, _ in run.measured]
            plots.line(
                accuracy, [value for _, value in run.measured], label, color, epochs, **style
            )
    results = ", ".join(sorted({run.about.get("result", "top-1 accuracy") for run in runs}))
    for axis, title in ((loss, "loss"), (accuracy, f"{results} (%)")):
        plots.epochs_axis(axis, max(len(run.rows) for run in runs))
        axis.set_title(title)
    accuracy.legend(frameon=False, title="--save (runs)")
    parts.append(
        "<p>On the test or validation images where a run measured it there, else in training.</p>"
    )
    parts.append(image(figure, "loss and accuracy of all runs"))
    page(path, "Comparison", parts)
    return path
