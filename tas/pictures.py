"""Pictures of a search of widths and of the network that it found; report.html with them."""

import json
import math
from pathlib import Path

from harness import drawing, files, plots, report
from tas import found, shapes
from tas.pruned import kept_blocks
from utils import UserError

GREY, BLUE, ORANGE = "#bbbbbb", plots.BLUE, plots.ORANGE


def write_report(folder, path=None):
    """report.html of a run of train_search_tas.py or train_tas.py, and a PNG of each picture.

    path: of the report, None for the folder's own; the PNGs lie beside it. Returns it.
    """
    folder = files.expanded(folder)
    path = path or folder / "report.html"
    run, more = report.read(folder), pictures(folder)
    report.write(run, path, more)
    for title, (_, figure) in more.items():
        drawing.save(figure, path.with_name(report.file_name(title) + ".png"))
    return path


def is_network(what):
    """Whether it is a tas.json or its text."""
    return Path(what).name == found.NAME or (what.lstrip().startswith("{") and '"channels"' in what)


def network(what):
    """A Figure of the network in a tas.json, or its text, beside the unpruned one."""
    one = found.load(what)
    return bars(shapes.full_channels(one.depth), one.channels, one.blocks)


def pictures(folder):
    """{title: (what it shows, Figure)} of all that there is to draw of a run of TAS."""
    try:
        return _pictures(report.read(folder), folder)
    except UserError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError):
        raise UserError(f"{folder} is damaged, in args.json or metrics.csv: mend it") from None


def _pictures(run, folder):
    epochs, drawn = read_widths(folder), {}
    if epochs:
        full = shapes.full_channels(run.about["args"]["depth"])
        if any(len(row["channels"]) != len(full) for row in epochs):
            raise ValueError
        drawn["widths over the epochs"] = WIDTHS, widths(epochs, full)
        drawn["probabilities of the widths"] = PROBABILITIES, probabilities(epochs[-1])
        drawn["multiply-adds over the epochs"] = "", multiply_adds(run)
        last = epochs[-1]
        drawn["network before and after"] = BARS, bars(full, last["channels"], last["blocks"])
    elif (Path(folder) / found.NAME).exists():
        network = found.load(str(folder))
        full = shapes.full_channels(network.depth)
        drawn["network before and after"] = BARS, bars(full, network.channels, network.blocks)
    return drawn


WIDTHS = "Share of its full width that argmax gives each convolution, from the stem (top) down. "
WIDTHS += "Grey: its block is dropped."
PROBABILITIES = "softmax of the attentions after the last epoch; a ring marks the largest of a row."
BARS = (
    "Channels of each convolution: grey of the unpruned network, blue of the pruned one. No bar: "
)
BARS += "its block is dropped."


def read_widths(folder):
    """The lines of widths.jsonl as dicts, without one that is being written; [] without a file."""
    path = Path(folder) / "widths.jsonl"
    try:
        rows = [json.loads(line) for line in report.whole_lines(path)]
        for row in rows:
            shapes.check(len(row["channels"]), row["channels"], row["blocks"])
            if len(row["softmax_widths"]) != len(row["channels"]) - 1:
                raise ValueError
        return rows
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: mend it, or leave {folder} out") from None


def widths(epochs, full):
    """A heat map: convolutions by epochs, the share of the full width."""
    table = [kept_channels(row["channels"], row["blocks"]) for row in epochs]  # epochs, L
    shares = [[C / C_full or math.nan for C in row]
              for C_full, *row in zip(full[1:], *table, strict=True)]  # fmt: skip
    figure = _figure(7.2, max(2.0, 0.8 + 0.05 * len(shares)))
    axis = figure.subplots()
    axis.set_facecolor(GREY)
    drawn = axis.imshow(
        shares, aspect="auto", interpolation="nearest", vmin=0.3, vmax=1,
        extent=(0.5, len(table) + 0.5, len(shares) + 0.5, 0.5),
    )  # fmt: skip
    axis.set_xlabel("epoch")
    axis.set_ylabel("convolution")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.get_major_locator().set_params(integer=True)
    for stage in (1, 2):  # where a stage begins
        axis.axhline(1.5 + stage * (len(shares) - 1) / 3, color="white", linewidth=1)
    figure.colorbar(drawn, ax=axis, pad=0.01, label="share of the full width")
    return figure


def probabilities(last):
    """Heat maps: convolutions by widths and, if searched, stages by numbers of blocks."""
    tables = {"widths": last["softmax_widths"]}
    if last.get("softmax_depths"):
        tables["depths"] = last["softmax_depths"]
    figure = _figure(7.2, max(2.0, 0.8 + 0.05 * len(tables["widths"])))
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    high = max(max(map(max, table)) for table in tables.values())
    for axis, (what, table) in zip(axes, tables.items(), strict=True):
        drawn = axis.imshow(
            table, aspect="auto", interpolation="nearest", vmin=0, vmax=high,
            extent=(-0.5, len(table[0]) - 0.5, len(table) + 0.5, 0.5),
        )  # fmt: skip
        best = [max(range(len(row)), key=row.__getitem__) for row in table]
        axis.plot(best, range(1, len(best) + 1), "o", color="white", markersize=2, fillstyle="none",
                  markeredgewidth=0.5)  # fmt: skip
        labels = [f"{share:.1f}" for share in shapes.SHARES]
        if what == "depths":
            n = shapes.blocks_per_stage(len(last["channels"]))
            labels = [str(count) for count in shapes.depth_choices(n)]
            axis.set_yticks((1, 2, 3), ["stage 1", "stage 2", "stage 3"])
        else:
            axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlabel("share of the full width" if what == "widths" else "blocks")
        axis.set_ylabel("convolution" if what == "widths" else "")
    figure.colorbar(drawn, ax=axes, pad=0.01, label="probability")
    return figure


def multiply_adds(run):
    """Expected and argmax multiply-adds over the epochs, the target and what costs nothing."""
    figure, [axis] = plots.subplots(1, 7.2, 2.4)
    args, target = run.about["args"], run.column("target_m")
    unpruned = target[0] / args["flop_ratio"]
    axis.axhspan(target[0] - args["tolerance"] * unpruned, target[0], color="#000000", alpha=0.08,
                 linewidth=0, label="costs nothing")  # fmt: skip
    plots.line(axis, target, "target", plots.RED, linestyle="--")
    plots.line(axis, run.column("expected_m"), "expected", BLUE)
    plots.line(axis, run.column("argmax_m"), "by argmax", ORANGE)
    plots.epochs_axis(axis, len(run.rows))
    axis.set_ylabel("multiply-adds (M)")
    axis.legend(frameon=False)
    return figure


def kept_channels(channels, blocks=None):
    """Of each convolution, without the image's 3; 0 where its block is dropped."""
    kept_blocks(len(channels), channels, blocks)  # which checks them
    n = shapes.blocks_per_stage(len(channels))
    counts = blocks or (n, n, n)
    kept = [True] + [block < count for count in counts for block in range(n) for _ in range(2)]
    return [C if keep else 0 for C, keep in zip(channels[1:], kept, strict=True)]


def bars(full, channels, blocks=None):
    """Two rows of bars, one a convolution: the unpruned network's channels and the pruned one's.

    A bar is missing where its block was dropped.
    """
    depth = len(full)
    figure = _figure(7.2, 2.6)
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    rows = (("before", full[1:], GREY), ("after", kept_channels(channels, blocks), BLUE))
    for axis, (name, values, colour) in zip(axes, rows, strict=True):
        axis.bar(range(1, depth), values, color=colour)
        axis.set_ylabel(f"channels {name}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xlabel("convolution")
    axes[1].set_xlim(0.3, depth - 0.3)
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def _figure(width, height):
    return drawing.figures().Figure(figsize=(width, height), layout="constrained")
