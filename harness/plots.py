"""The figures of a run: curves over its epochs, what a search watches, its cells in motion."""

import io
import json
import operator

import numpy as np

import genotypes
import utils
from harness import drawing

KINDS = {"normal": "normal cell", "reduce": "reduction cell"}
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"


def subplots(n, width, height):
    figure = drawing.figures().Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False)[0]


def epochs_axis(axis, epochs):
    axis.set_xlabel("epoch")
    axis.set_xlim(0.5, max(epochs, 1) + 0.5)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3, linewidth=0.4)
    axis.spines[["top", "right"]].set_visible(False)


def line(axis, values, label=None, color=None, epochs=None, **style):
    """A curve over epochs, None: 1, 2, ...; a single epoch is a point."""
    marker = "o" if len(values) == 1 else None
    epochs = range(1, len(values) + 1) if epochs is None else epochs
    axis.plot(epochs, values, label=label, color=color, linewidth=1.1,
              marker=marker, markersize=3, **style)  # fmt: skip


def shade(axis, run):
    """The epochs in which alphas and betas were frozen."""
    frozen = sum(run.column("frozen"))
    if frozen:
        axis.axvspan(0.5, frozen + 0.5, color="#000000", alpha=0.07, linewidth=0, label="frozen")


def curves(run):
    """Loss, accuracy and learning rate over the epochs."""
    figure, (loss, accuracy, rate) = subplots(3, 7.2, 2.1)
    other = run.tested  # of a search with --validate "valid_"
    other = other or ("valid_" if run.column("valid_top1") else "")
    for axis, name, title in ((loss, "loss", "loss"), (accuracy, "top1", "top-1 accuracy (%)")):
        shade(axis, run)
        line(axis, run.column(name), "training", BLUE)
        if other:
            label = "test" if other == "test_" else "validation"
            line(axis, run.column(other + name), label, ORANGE)
        axis.set_title(title)
    if "result" in run.about and run.measured:
        results = [run.accuracy, *run.about.get("drawn", [])]
        for name, color in zip(results, (ORANGE, PURPLE), strict=False):
            line(accuracy, [value for _, value in run.values(name)], name, color,
                 [epoch for epoch, _ in run.values(name)])  # fmt: skip
        accuracy.set_title("%")
    if (run.tested or "result" in run.about) and run.measured:
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
    skips.set_ylim(-0.1, 1.8 * max(1, skips.get_ylim()[1]))  # room for the legend
    line(cost, run.column("parameters_m"), "parameters (M)", GREEN)
    hundreds = [value / 100 for value in run.column("multiply_adds_m")]
    line(cost, hundreds, "multiply-adds (100 M)", RED)
    cost.set_title("derived network")
    cost.set_ylim(0, 1.6 * max(cost.get_ylim()))
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
        raise utils.UserError(
            f"{run.folder} has no genotypes.jsonl: --animate takes a search of cells"
        )
    frames, places = [], {}
    for row in run.cells:
        genotype = genotypes.from_json(json.dumps(row), ops=())
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
