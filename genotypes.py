"""Genotypes: what a cell is, the operations it may use, the named cells, reading and writing them.

To add a cell, paste what a search printed as `MyCell = Genotype(...)` anywhere below `Genotype`:
from then on `--arch MyCell` means it.
"""

import ast
import difflib
import json
import numbers
import os
import random
import reprlib
import warnings
from collections import namedtuple

# Nodes 0 and 1 of a cell are the outputs of the two cells before it. `normal` and `reduce` list
# (op, input node); entries 2i and 2i + 1 are summed to node 2 + i. The concat nodes are the output.
Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")

# fmt: off
PRIMITIVES = ["none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
              "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"]
PRIMITIVES_REID = ["none", "skip_connect", "max_pool_3x3", "avg_pool_3x3",
                   "sep_conv_3x3", "dil_conv_3x3", "part_aware"]
KNOWN_OPS = (*PRIMITIVES,
             "sep_conv_7x7", "conv_7x1_1x7",  # of NASNet and AmoebaNet
             "part_aware")  # of Auto-ReID; `import reid` makes it

NASNet = Genotype(  # Zoph et al., 2018 (NASNet-A), as the DARTS release has it
    normal=[("sep_conv_5x5", 1), ("sep_conv_3x3", 0),
            ("sep_conv_5x5", 0), ("sep_conv_3x3", 0),
            ("avg_pool_3x3", 1), ("skip_connect", 0),
            ("avg_pool_3x3", 0), ("avg_pool_3x3", 0),
            ("sep_conv_3x3", 1), ("skip_connect", 1)],
    normal_concat=[2, 3, 4, 5, 6],
    reduce=[("sep_conv_5x5", 1), ("sep_conv_7x7", 0),
            ("max_pool_3x3", 1), ("sep_conv_7x7", 0),
            ("avg_pool_3x3", 1), ("sep_conv_5x5", 0),
            ("skip_connect", 3), ("avg_pool_3x3", 2),
            ("sep_conv_3x3", 2), ("max_pool_3x3", 1)],
    reduce_concat=[4, 5, 6])

AmoebaNet = Genotype(  # Real et al., 2019 (AmoebaNet-A), as the DARTS release has it
    normal=[("avg_pool_3x3", 0), ("max_pool_3x3", 1),
            ("sep_conv_3x3", 0), ("sep_conv_5x5", 2),
            ("sep_conv_3x3", 0), ("avg_pool_3x3", 3),
            ("sep_conv_3x3", 1), ("skip_connect", 1),
            ("skip_connect", 0), ("avg_pool_3x3", 1)],
    normal_concat=[4, 5, 6],
    reduce=[("avg_pool_3x3", 0), ("sep_conv_3x3", 1),
            ("max_pool_3x3", 0), ("sep_conv_7x7", 2),
            ("sep_conv_7x7", 0), ("avg_pool_3x3", 1),
            ("max_pool_3x3", 0), ("max_pool_3x3", 1),
            ("conv_7x1_1x7", 0), ("sep_conv_3x3", 5)],
    reduce_concat=[3, 4, 6])

DARTS_V1 = Genotype(  # Liu et al., 2019 (DARTS), first order
    normal=[("sep_conv_3x3", 1), ("sep_conv_3x3", 0),
            ("skip_connect", 0), ("sep_conv_3x3", 1),
            ("skip_connect", 0), ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0), ("skip_connect", 2)],
    normal_concat=[2, 3, 4, 5],
    reduce=[("max_pool_3x3", 0), ("max_pool_3x3", 1),
            ("skip_connect", 2), ("max_pool_3x3", 0),
            ("max_pool_3x3", 0), ("skip_connect", 2),
            ("skip_connect", 2), ("avg_pool_3x3", 0)],
    reduce_concat=[2, 3, 4, 5])

DARTS_V2 = Genotype(  # Liu et al., 2019 (DARTS), second order
    normal=[("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 1), ("skip_connect", 0),
            ("skip_connect", 0), ("dil_conv_3x3", 2)],
    normal_concat=[2, 3, 4, 5],
    reduce=[("max_pool_3x3", 0), ("max_pool_3x3", 1),
            ("skip_connect", 2), ("max_pool_3x3", 1),
            ("max_pool_3x3", 0), ("skip_connect", 2),
            ("skip_connect", 2), ("max_pool_3x3", 1)],
    reduce_concat=[2, 3, 4, 5])

PC_DARTS_cifar = Genotype(  # Xu et al., 2020 (PC-DARTS), searched on CIFAR-10
    normal=[("sep_conv_3x3", 1), ("skip_connect", 0),
            ("sep_conv_3x3", 0), ("dil_conv_3x3", 1),
            ("sep_conv_5x5", 0), ("sep_conv_3x3", 1),
            ("avg_pool_3x3", 0), ("dil_conv_3x3", 1)],
    normal_concat=range(2, 6),
    reduce=[("sep_conv_5x5", 1), ("max_pool_3x3", 0),
            ("sep_conv_5x5", 1), ("sep_conv_5x5", 2),
            ("sep_conv_3x3", 0), ("sep_conv_3x3", 3),
            ("sep_conv_3x3", 1), ("sep_conv_3x3", 2)],
    reduce_concat=range(2, 6))

PC_DARTS_image = Genotype(  # Xu et al., 2020 (PC-DARTS), searched on ImageNet
    normal=[("skip_connect", 1), ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 0), ("skip_connect", 1),
            ("sep_conv_3x3", 1), ("sep_conv_3x3", 3),
            ("sep_conv_3x3", 1), ("dil_conv_5x5", 4)],
    normal_concat=range(2, 6),
    reduce=[("sep_conv_3x3", 0), ("skip_connect", 1),
            ("dil_conv_5x5", 2), ("max_pool_3x3", 1),
            ("sep_conv_3x3", 2), ("sep_conv_3x3", 1),
            ("sep_conv_5x5", 0), ("sep_conv_3x3", 3)],
    reduce_concat=range(2, 6))

REID_BASELINE = Genotype(  # Quan et al., 2019 (Auto-ReID): searched with classification alone
    normal=[("dil_conv_3x3", 1), ("dil_conv_3x3", 0),
            ("dil_conv_3x3", 1), ("sep_conv_3x3", 2),
            ("dil_conv_3x3", 2), ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 2), ("sep_conv_3x3", 3)],
    normal_concat=range(2, 6),
    reduce=[("sep_conv_3x3", 1), ("skip_connect", 0),
            ("max_pool_3x3", 2), ("dil_conv_3x3", 1),
            ("max_pool_3x3", 0), ("dil_conv_3x3", 2),
            ("skip_connect", 0), ("dil_conv_3x3", 4)],
    reduce_concat=range(2, 6))

REID_SPACE = Genotype(  # Quan et al., 2019 (Auto-ReID): the space with part_aware
    normal=[("dil_conv_3x3", 0), ("skip_connect", 1),
            ("max_pool_3x3", 2), ("sep_conv_3x3", 0),
            ("max_pool_3x3", 3), ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 2), ("dil_conv_3x3", 3)],
    normal_concat=range(2, 6),
    reduce=[("skip_connect", 1), ("part_aware", 0),
            ("avg_pool_3x3", 2), ("part_aware", 0),
            ("sep_conv_3x3", 1), ("avg_pool_3x3", 2),
            ("skip_connect", 4), ("max_pool_3x3", 3)],
    reduce_concat=range(2, 6))

REID_SEARCH = Genotype(  # Quan et al., 2019 (Auto-ReID): the space and the retrieval loss
    normal=[("sep_conv_3x3", 0), ("skip_connect", 1),
            ("dil_conv_3x3", 2), ("dil_conv_3x3", 0),
            ("dil_conv_3x3", 3), ("sep_conv_3x3", 2),
            ("dil_conv_3x3", 4), ("dil_conv_3x3", 3)],
    normal_concat=range(2, 6),
    reduce=[("max_pool_3x3", 0), ("part_aware", 1),
            ("sep_conv_3x3", 0), ("dil_conv_3x3", 2),
            ("dil_conv_3x3", 2), ("max_pool_3x3", 0),
            ("dil_conv_3x3", 4), ("dil_conv_3x3", 3)],
    reduce_concat=range(2, 6))

PCDARTS = PC_DARTS_cifar
DARTS = DARTS_V2
# fmt: on


class GenotypeError(ValueError):
    """A genotype that cannot be used: one line that says what is wrong and what to do."""


def check(genotype, ops=None):
    """The genotype in its normal form; raises GenotypeError where no network can be built from it.

    ops: the names of the operations that exist, such as operations.OPS; None means KNOWN_OPS, and
    () accepts any name, which is enough for drawing.
    Normal form: edges a list of tuples, concat a range where it counts upwards by one, else a list.
    """
    if getattr(genotype, "_fields", None) != Genotype._fields:
        raise GenotypeError(f"{_short(genotype)} is no Genotype; give one with all four fields")
    ops = KNOWN_OPS if ops is None else ops
    _check_cell("normal", genotype.normal, genotype.normal_concat, ops)
    _check_cell("reduce", genotype.reduce, genotype.reduce_concat, ops)
    return _tidy(genotype)


def parse(text, ops=None):
    """The genotype that a print or a log line shows: Genotype(...) behind any prefix.

    Evaluates nothing. Raises GenotypeError only: on any other text and where `check` does.
    """
    if not isinstance(text, str) or "Genotype(" not in text:
        raise GenotypeError("the text shows no genotype; give Genotype(normal=[...], ...)")
    if len(text) > 100_000:
        raise GenotypeError("the text is longer than 100,000 characters; give Genotype(...) alone")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the parser warns of is wrong here anyway
            call = ast.parse(text[text.index("Genotype(") :], mode="eval").body
        fields = dict(zip(Genotype._fields, map(_literal, call.args), strict=False))
        fields.update((keyword.arg, _literal(keyword.value)) for keyword in call.keywords)
        repeated = len(fields) < len(call.args) + len(call.keywords)
        if call.func.id != "Genotype" or repeated or set(fields) - set(Genotype._fields):
            raise ValueError
    except (AttributeError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        form = "Genotype(normal=[('op', input), ...], normal_concat=..., ...)"
        raise GenotypeError(f"cannot read the text; give one whole {form}, nothing after") from None
    return _from_fields(fields, ops)


def text(genotype):
    """The printed form, `Genotype(normal=[...], normal_concat=range(2, 6), ...)`, to be pasted."""
    return repr(_tidy(genotype))


def from_json(text, ops=None):
    """The genotype in the text of a genotype.json; keys that are no field of it are ignored.

    Raises GenotypeError only: on any other text and where `check` does.
    """
    try:
        fields = dict(json.loads(text).items())
    except (AttributeError, RecursionError, TypeError, ValueError):
        raise GenotypeError("the text is no JSON object; give what to_json wrote") from None
    return _from_fields(fields, ops)


def to_json(genotype, primitives=None):
    """The genotype as a JSON object, a line per field; with the space that was searched, if given."""
    fields = _tidy(genotype)._asdict() | ({"primitives": primitives} if primitives else {})
    lines = (f'  "{k}": {json.dumps(list(v))}' for k, v in fields.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def save(genotype, path, primitives=None):
    """Write to_json(genotype, primitives) to the file `path`; raises OSError."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(to_json(genotype, primitives))


def sample(seed, steps=4, primitives=None):
    """A random cell pair: of each node two different inputs and their ops, all equally likely.

    The baseline of a search. primitives: the ops, without none; None: PRIMITIVES.
    """
    draw = random.Random(seed)
    ops = [op for op in primitives or PRIMITIVES if op != "none"]
    cells = []
    for _ in ("normal", "reduce"):
        inputs = (sorted(draw.sample(range(2 + node), 2)) for node in range(steps))
        cells.append([(draw.choice(ops), i) for pair in inputs for i in pair])
    concat = range(2, 2 + steps)
    return Genotype(cells[0], concat, cells[1], concat)


def load(arch, ops=None):
    """The genotype of `--arch`: a name in this file, Genotype(...), a file, folder, or random:SEED.

    A folder stands for its genotype.json; a file not named .json is read by `parse`. Raises
    GenotypeError where there is none of these, the file cannot be read, or `check` does.
    """
    if not isinstance(arch, (str, os.PathLike)):
        raise GenotypeError(f"{_short(arch)} is no architecture; give a name, a path or a text")
    arch = os.fspath(arch)
    if arch.startswith("random:"):
        if not arch[7:].isdecimal() or len(arch) > 20:
            raise GenotypeError(f"{_short(arch)} has no seed; give random:0, random:1, ...")
        return check(sample(int(arch[7:])), ops)
    if arch not in names() and "Genotype(" in arch:
        return parse(arch, ops)
    path = os.path.join(arch, "genotype.json") if os.path.isdir(arch) else arch
    try:
        if arch in names():
            return check(globals()[arch], ops)
        if os.path.exists(path):
            with open(path, "rb") as file:
                data = file.read(1_000_001)
            if len(data) > 1_000_000:
                raise GenotypeError("the file is larger than 1 MB; give a genotype.json")
            read = from_json if path.endswith(".json") else parse
            return read(data.decode("utf-8-sig"), ops)
    except GenotypeError as error:
        raise GenotypeError(f"{_short(path)}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "it is not text")
        raise GenotypeError(f"cannot read {_short(path)} ({reason}); give another file") from None
    if path != arch:
        raise GenotypeError(f"{_short(arch)} has no genotype.json; is the search finished?")
    hint = f"(names: {', '.join(names())}; or give a genotype.json, a run folder or Genotype(...))"
    raise GenotypeError(f"unknown architecture {_short(arch)}{_nearest(arch, names())} {hint}")


def names():
    """The names of all genotypes in this file, in the order of their definition."""
    return [name for name, value in globals().items() if isinstance(value, Genotype)]


def skip_connects(genotype):
    """The number of skip_connects in the (normal, reduce) cell; many mean a collapsed search."""
    return tuple([op for op, _ in cell].count("skip_connect") for cell in genotype[::2])


def _check_cell(cell, edges, concat, ops):
    if not isinstance(edges, (list, tuple)) or not edges:
        raise GenotypeError(f"{cell} is {_short(edges)}; give a list with two (op, input) per node")
    if len(edges) % 2:
        raise GenotypeError(f"{cell} has {len(edges)} edges; give two per node")
    for i, edge in enumerate(edges):
        where, newest = f"{cell}[{i}]", 1 + i // 2  # newest: the last node before this edge's own
        if not isinstance(edge, (list, tuple)) or len(edge) != 2 or not isinstance(edge[0], str):
            raise GenotypeError(f"{where} is {_short(edge)}; give ('op', input)")
        op, node = edge
        if ops and op not in ops:
            hint = f"{_nearest(op, ops)} (known: {', '.join(ops)})"
            raise GenotypeError(f"{where}: unknown op {_short(op)}{hint}")
        if not _is_whole(node) or not 0 <= node <= newest:
            hint = f"node {newest + 1} reads nodes of 0..{newest}"
            raise GenotypeError(f"{where}: input {_short(node)} does not exist; {hint}")
    nodes = f"nodes of 2..{newest + 1}, each once"
    if not isinstance(concat, (list, tuple, range)) or not concat:
        raise GenotypeError(f"{cell}_concat is {_short(concat)}; give a list of {nodes}")
    for i, node in enumerate(concat):  # ends at the first wrong node, however long a range is
        if not _is_whole(node) or not 2 <= node <= newest + 1 or node in concat[:i]:
            hint = f"does not exist or is listed twice; give {nodes}"
            raise GenotypeError(f"{cell}_concat: node {_short(node)} {hint}")


def _is_whole(node):
    """Whether it is a whole number, of Python or of NumPy."""
    return isinstance(node, numbers.Integral) and not isinstance(node, bool)


def _from_fields(fields, ops):
    missing = [name for name in Genotype._fields if name not in fields]
    if missing:
        raise GenotypeError(f"the genotype has no {', '.join(missing)}; give all four fields")
    return check(Genotype(*(fields[name] for name in Genotype._fields)), ops)


def _literal(node):
    """The value of a syntax tree; list() and range() are the only calls."""
    if isinstance(node, ast.Call) and node.func.id in ("list", "range") and not node.keywords:
        if node.func.id == "range":
            return range(*map(_literal, node.args))
        [inner] = node.args
        return _literal(inner)  # not yet a list: a range of any length costs nothing
    return ast.literal_eval(node)


def _tidy(genotype):
    """The genotype in the normal form that `check` describes."""
    fields = []
    for edges, concat in (genotype[:2], genotype[2:]):
        nodes = [int(node) for node in concat]
        run = range(nodes[0], nodes[0] + len(nodes))
        fields += [
            [(op, int(node)) for op, node in edges],
            run if nodes == [*run] and run[1:] else nodes,
        ]
    return Genotype(*fields)


def _nearest(word, known):
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word[:100].lower(), names)
    return f"; nearest: {', '.join(names[name] for name in near)}" if near else ""


def _short(value):
    """repr(value) in one line, cut where it is long."""
    try:
        value = repr(value[:200]) if isinstance(value, str) else reprlib.repr(value)
        return " ".join(value.split())
    except ValueError:  # an int of more than 4,300 digits
        return "a huge number"
