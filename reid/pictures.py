"""Pictures of a retrieval: what the gallery gave for some queries, and CMC curves."""

import numpy as np
import torch

from harness import drawing, report
from utils import UserError

from . import metrics
from .data import decode, has_match, select

RIGHT, WRONG = "tab:green", "tab:red"


def retrieved(query, gallery, distances, count=10, height=128, width=64):
    """A figure: a row for each query, the query left, then the first `count` of its gallery.

    query, gallery: data.Images; distances (Q, G). Dropped images are left out, as where CMC and
    mAP are computed; right ones have a green frame, wrong ones a red one.
    """
    from matplotlib.figure import Figure

    labels = (query.ids, gallery.ids, query.cameras, gallery.cameras)
    order, kept, right = metrics.ranked(torch.as_tensor(distances), *map(torch.as_tensor, labels))
    Q = len(query.ids)
    figure = Figure((0.8 * (count + 1), 0.8 * Q * height / width + 0.3), layout="constrained")
    axes = figure.subplots(Q, count + 1, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.axis("off")
    for i in range(Q):
        _show(axes[i, 0], decode(query.images[i], height, width), "black")
        axes[i, 0].set_title(f"query {query.ids[i]}", fontsize=7)
        for ax, place in zip(axes[i, 1:], kept[i].nonzero().flatten(), strict=False):
            image = gallery.images[order[i, place]]
            _show(ax, decode(image, height, width), RIGHT if right[i, place] else WRONG)
    return figure


def _show(ax, image, colour):
    ax.axis("on")
    ax.imshow(image)
    for side in ax.spines.values():
        side.set(color=colour, linewidth=3)


def cmc_curves(results):
    """A figure of CMC curves; results: {name: Retrieval}, with the mAP in the legend."""
    from matplotlib.figure import Figure

    figure = Figure((5, 3.5), layout="constrained")
    ax = figure.subplots()
    for name, result in results.items():
        ranks = range(1, len(result.cmc) + 1)
        ax.plot(ranks, 100 * result.cmc, label=f"{name} (mAP {100 * result.mAP:.1f} %)")
    ax.set(xlabel="rank", ylabel="queries with a match so far (%)", ylim=(None, 100.5))
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def save(folder, people, found, log, wanted=None, queries=8):
    """retrieved.png, cmc.png and report.html in the folder of a run that has ended.

    people: data.ReIDSet; found: {name: loader.Found}, the first of which is shown. Some `queries`
    with a match are drawn, evenly spread. Without matplotlib, and where the pictures are not
    `wanted` by a flag, a line in the log is all.
    """
    try:
        drawing.figures()
    except UserError as error:
        if wanted:
            raise
        log.info("no pictures: %s", error)
        return
    query, gallery = people.query, people.gallery
    first = next(iter(found.values()))
    there = np.flatnonzero(has_match(query, gallery))
    rows = np.linspace(0, len(there) - 1, min(queries, len(there))).astype(int)
    rows = there[rows].tolist()
    figure = retrieved(select(query, rows), gallery, first.distances(rows).cpu())
    drawing.save(figure, folder / "retrieved.png")
    curves = {name or "embeddings": one.result for name, one in found.items()}
    drawing.save(cmc_curves(curves), folder / "cmc.png")
    report.write(report.read(folder), folder / "report.html")
