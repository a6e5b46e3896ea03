"""Cells as pictures: where their nodes lie, and how they are drawn."""

import contextlib
import itertools
import random
import zlib
from typing import NamedTuple

from harness.files import MEND
from harness.flags import need
from utils import UserError

# Okabe and Ito's colours, told apart by the colour-blind; then Tol's, for operations of your own.
COLOURS = {
    "none": "#999999", "max_pool_3x3": "#cc79a7", "avg_pool_3x3": "#e69f00",
    "skip_connect": "#000000", "sep_conv_3x3": "#0072b2", "sep_conv_5x5": "#56b4e9",
    "dil_conv_3x3": "#009e73", "dil_conv_5x5": "#d55e00",
}  # fmt: skip
OTHERS = ("#332288", "#882255", "#117733", "#999933", "#aa4499", "#44aa99")
FONT, NODE_HEIGHT, LABEL_HEIGHT, GAP = 6, 0.18, 0.15, 0.07  # points; inches
SPACE = 0.18  # between ranks


def figures():
    """matplotlib.figure, which is imported when a picture is asked for; UserError without it."""
    need("a picture", ["matplotlib"])
    import matplotlib
    from matplotlib import figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "", "pdf.fonttype": 42, "font.size": FONT}
    matplotlib.rcParams.update(settings | {"font.family": "DejaVu Sans"})
    return figure


def save(figure, path):
    """Writes a picture, the same bytes each time; returns its path. UserError where it cannot."""
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(path.suffix[1:])
    with writing(path):
        figure.savefig(path, dpi=300, metadata=metadata)
    return path


@contextlib.contextmanager
def writing(path):
    """Makes the folder of what is written within; UserError where it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): {MEND}") from None


def colour(op):
    """Of an operation: always the same."""
    return COLOURS.get(op) or OTHERS[zlib.crc32(op.encode()) % len(OTHERS)]


def cells(genotype):
    """{kind: (edges, concatenated nodes)}."""
    return {"normal": genotype[:2], "reduction": genotype[2:]}


def draw(genotype):
    """{"normal": matplotlib Figure, "reduction": Figure}."""
    return {kind: draw_cell(*cell) for kind, cell in cells(genotype).items()}


def dot(genotype):
    """Graphviz source of both cells, for `dot -Tpdf`."""
    lines = ["digraph {", "  rankdir=LR; node [shape=box, style=rounded];"]
    for kind, (edges, concat) in cells(genotype).items():
        lines.append(f'  subgraph cluster_{kind} {{\n    label="{kind}";')
        names = node_names(edges)
        lines += [f'    {kind}{i} [label="{name}"];' for i, name in enumerate(names)]
        for e, (op, source) in enumerate(edges):
            style = f'label="{op}", color="{colour(op)}"'
            lines.append(f"    {kind}{source} -> {kind}{2 + e // 2} [{style}];")
        lines += [f"    {kind}{node} -> {kind}{len(names) - 1};" for node in concat]
        lines.append("  }")
    return "\n".join([*lines, "}"])


def node_names(edges):
    """Of a cell's two inputs, its nodes, and its output."""
    return ["c_{k-2}", "c_{k-1}", *map(str, range(len(edges) // 2)), "c_{k}"]


class Layout(NamedTuple):
    """Where a cell's parts go, in inches from the lower left corner."""

    nodes: dict  # node: (x, y, width)
    labels: dict  # edge: (x, y, width)
    paths: list  # per edge, then per concatenated node: the points it goes through
    size: tuple  # width, height
    crossings: int


def layout(edges, concat):
    """Layers from left to right (Sugiyama): nodes in even ranks, the labels of edges in odd ones.

    An edge that spans several ranks holds a place in each, so that no line runs through a label.
    """
    n = len(edges) // 2
    layer = [0, 0]
    for v in range(n):
        layer.append(1 + max(layer[source] for _, source in edges[2 * v : 2 * v + 2]))
    rank = {("node", v): 2 * layer[v] for v in range(n + 2)}
    rank["node", n + 2] = 2 * max(layer) + 1  # the output: its edges have no labels
    labels = [0] * (2 * max(layer) + 2)  # in each rank
    chains = []  # of every edge: the places it goes through
    for e, (_, source) in enumerate(edges):
        first, last = rank["node", source], rank["node", 2 + e // 2]
        at = min(range(first + 1, last, 2), key=lambda r: (labels[r], -r))
        labels[at] += 1
        between = [("label", e) if r == at else ("bend", e, r) for r in range(first + 1, last)]
        chains.append([("node", source), *between, ("node", 2 + e // 2)])
    for v in concat:
        between = [("bend", f"{v}", r) for r in range(rank["node", v] + 1, rank["node", n + 2])]
        chains.append([("node", v), *between, ("node", n + 2)])
    for chain in chains:
        rank.update({place: rank[chain[0]] + i for i, place in enumerate(chain)})
    order = [[place for place in rank if rank[place] == r] for r in range(len(labels))]
    links = [[] for _ in order]  # from each rank to the next
    for chain in chains:
        for one, other in itertools.pairwise(chain):
            links[rank[one]].append((one, other))
    order, crossings = fewest_crossings(order, links)

    names = node_names(edges)
    texts = {("node", v): names[v] for v in range(n + 3)}
    texts |= {("label", e): op for e, (op, _) in enumerate(edges)}
    widths = {place: text_width(text) + 0.08 for place, text in texts.items()}
    ys = heights(order, links)
    x, xs = 0.05, []
    for places in order:
        width = max(widths.get(place, 0) for place in places)
        widths |= {place: width for place in places if place[0] == "bend"}  # level past the labels
        xs.append(x + width / 2)
        x += width + SPACE
    low = min(ys[place] for place in ys) - NODE_HEIGHT / 2 - 0.05
    high = max(ys.values()) + NODE_HEIGHT / 2 + 0.05
    at = {place: (xs[rank[place]], ys[place] - low, widths[place]) for place in rank}
    return Layout(
        {place[1]: at[place] for place in at if place[0] == "node"},
        {place[1]: at[place] for place in at if place[0] == "label"},
        [[at[place] for place in chain] for chain in chains],
        (x - SPACE + 0.05, high - low),
        crossings,
    )


def fewest_crossings(order, links, tries=20):
    """(ranks in the best order found, its crossings): sweeps by barycentre."""
    draw = random.Random(0)
    best = None
    for attempt in range(tries):
        ranks = [list(places) for places in order]
        if attempt:
            for places in ranks:
                draw.shuffle(places)
        for sweep in range(8):
            forth = sweep % 2 == 0
            for r in range(1, len(ranks)) if forth else range(len(ranks) - 2, -1, -1):
                near = ranks[r - 1] if forth else ranks[r + 1]
                pairs = [(b, a) for a, b in links[r - 1]] if forth else links[r]
                _sort(ranks[r], near, pairs)
        crossings = sum(_crossings(ranks, links, r) for r in range(len(ranks) - 1))
        inputs = ranks[0].index(("node", 0)), ranks[0].index(("node", 1))
        length = sum(
            abs(ranks[r].index(a) / len(ranks[r]) - ranks[r + 1].index(b) / len(ranks[r + 1]))
            for r in range(len(ranks) - 1)
            for a, b in links[r]
        )
        if best is None or (crossings, inputs, length) < best[0]:
            best = (crossings, inputs, length), ranks
    return best[1], best[0][0]


def _sort(places, near, pairs):
    where = {place: i for i, place in enumerate(near)}
    mean = {}
    for i, place in enumerate(places):
        ends = [where[end] for start, end in pairs if start == place]
        mean[place] = sum(ends) / len(ends) if ends else i
    places.sort(key=mean.get)


def _crossings(ranks, links, r):
    left, right = ({place: i for i, place in enumerate(ranks[q])} for q in (r, r + 1))
    ends = [(left[a], right[b]) for a, b in links[r]]
    return sum(
        (a - c) * (b - d) < 0 for (a, b), (c, d) in itertools.combinations(ends, 2)
    )  # links that share an end do not cross


def heights(order, links):
    """{place: y}: near its neighbours' mean, in order, and not on top of one another."""
    tall = {"node": NODE_HEIGHT, "label": LABEL_HEIGHT, "bend": 0.02}
    near = {place: [] for places in order for place in places}
    for a, b in itertools.chain(*links):
        near[a].append(b)
        near[b].append(a)
    ys = {}
    for places in order:
        offsets = _offsets(places, tall)
        ys |= {place: offsets[-1] / 2 - y for place, y in zip(places, offsets, strict=True)}
    for sweep in range(30):
        for places in order if sweep % 2 == 0 else order[::-1]:
            offsets = _offsets(places, tall)
            wish = [
                sum(ys[q] for q in near[p]) / len(near[p]) if near[p] else ys[p] for p in places
            ]
            # Descending with distances: increasing once turned and shifted, so isotonic regression.
            level = _isotonic([-w - o for w, o in zip(wish, offsets, strict=True)])
            ys |= {p: -lv - o for p, lv, o in zip(places, level, offsets, strict=True)}
    return ys


def _offsets(places, tall):
    """The least distances of the places from the first."""
    offsets = [0.0]
    for one, other in itertools.pairwise(places):
        offsets.append(offsets[-1] + (tall[one[0]] + tall[other[0]]) / 2 + GAP)
    return offsets


def _isotonic(values):
    """The nearest increasing sequence, by least squares (pool adjacent violators)."""
    blocks = []
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    return [mean for mean, n in blocks for _ in range(n)]


def text_width(text):
    """In inches."""
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=FONT).get_extents().width / 72


def draw_cell(edges, concat):
    """A matplotlib Figure of one cell, in the size that suits a column of a paper."""
    figure = figures().Figure  # says what to install, before anything else
    places = layout(edges, concat)
    figure = figure(figsize=places.size)
    axes = figure.add_axes((0, 0, 1, 1))
    draw_into(axes, edges, places)
    return figure


def draw_into(axes, edges, places, x=0.0, y=0.0):
    """Draws a cell whose lower left corner is at (x, y); the axes are in inches."""
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Curve

    if not (x or y):
        axes.set(xlim=(0, places.size[0]), ylim=(0, places.size[1]))
    axes.set_axis_off()
    for e, points in enumerate(places.paths):
        op = edges[e][0] if e < len(edges) else None
        style = dict(color=colour(op) if op else "#777777", linewidth=1.1 if op else 0.7)
        points = [(px + x, py + y, width) for px, py, width in points]
        corners, codes = [(points[0][0] + points[0][2] / 2, points[0][1])], [Curve.MOVETO]
        for (x1, y1, w1), (x2, y2, w2) in itertools.pairwise(points):
            start, end = x1 + w1 / 2, x2 - w2 / 2
            middle = (start + end) / 2
            corners += [(start, y1), (middle, y1), (middle, y2), (end, y2)]
            codes += [Curve.LINETO] + [Curve.CURVE4] * 3
        arrow = FancyArrowPatch(
            path=Curve(corners, codes), arrowstyle="-|>", mutation_scale=6, shrinkA=0, shrinkB=0,
            fill=False, **style,
        )  # fmt: skip
        arrow.set_gid(f"edge-{e}" if op else f"concat-{e - len(edges)}")
        axes.add_patch(arrow)
    names = node_names(edges)
    boxes = [(*places.nodes[v], names[v], NODE_HEIGHT, "#444444", "#eeeeee") for v in places.nodes]
    for e, place in places.labels.items():
        boxes.append((*place, edges[e][0], LABEL_HEIGHT, colour(edges[e][0]), "white"))
    for bx, by, width, text, height, edge, face in boxes:
        corner = bx + x - width / 2, by + y - height / 2
        box = FancyBboxPatch(
            corner, width, height, boxstyle="round,pad=0,rounding_size=0.05", linewidth=0.8,
            edgecolor=edge, facecolor=face, zorder=3,
        )  # fmt: skip
        axes.add_patch(box)
        axes.text(bx + x, by + y, text, ha="center", va="center_baseline", fontsize=FONT, zorder=4)
