"""Facts of the named cells; reading, writing and refusing genotypes."""

import ast
import contextlib
import importlib.util
import json
import random
import sys
from collections import namedtuple

import numpy as np
import pytest

import genotypes
from genotypes import Genotype, GenotypeError, check, from_json, load, parse, save, text, to_json

NAMED = (
    "NASNet AmoebaNet DARTS_V1 DARTS_V2 PC_DARTS_cifar PC_DARTS_image "
    "REID_BASELINE REID_SPACE REID_SEARCH PCDARTS DARTS"
).split()

# As the released code prints them (shared with golden/eval.npz).
PC_DARTS_CIFAR = (
    "Genotype(normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0), "
    "('dil_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 1), ('avg_pool_3x3', 0), "
    "('dil_conv_3x3', 1)], normal_concat=range(2, 6), reduce=[('sep_conv_5x5', 1), "
    "('max_pool_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_5x5', 2), ('sep_conv_3x3', 0), "
    "('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('sep_conv_3x3', 2)], reduce_concat=range(2, 6))"
)
DARTS_V2 = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), "
    "('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), "
    "('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), "
    "('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"
)
POSITIONAL = PC_DARTS_CIFAR
for field in Genotype._fields:
    POSITIONAL = POSITIONAL.replace(f"{field}=", "")
PAIR = [("sep_conv_3x3", 0), ("skip_connect", 1)]
SMALL = Genotype(PAIR, [2], PAIR, [2])  # one step


def error(function, *args):
    """The message of the GenotypeError that function(*args) raises; it has one line."""
    with pytest.raises(GenotypeError) as info:
        function(*args)
    message = str(info.value)
    assert isinstance(info.value, ValueError)
    assert message and message.isprintable() and len(message) < 1000
    return message


def test_names_stand_in_the_order_of_definition():
    assert genotypes.names() == NAMED
    assert genotypes.PCDARTS is genotypes.PC_DARTS_cifar
    assert Genotype._fields == ("normal", "normal_concat", "reduce", "reduce_concat")
    assert " ".join(genotypes.PRIMITIVES) == (
        "none max_pool_3x3 avg_pool_3x3 skip_connect "
        "sep_conv_3x3 sep_conv_5x5 dil_conv_3x3 dil_conv_5x5"
    )
    assert " ".join(genotypes.PRIMITIVES_REID) == (
        "none skip_connect max_pool_3x3 avg_pool_3x3 sep_conv_3x3 dil_conv_3x3 part_aware"
    )


def test_published_values():
    assert repr(genotypes.PC_DARTS_cifar) == text(genotypes.PC_DARTS_cifar) == PC_DARTS_CIFAR
    assert repr(genotypes.DARTS_V2) == DARTS_V2
    assert text(genotypes.DARTS_V2) == DARTS_V2.replace("[2, 3, 4, 5]", "range(2, 6)")


@pytest.mark.parametrize(
    "name, skips, concat",
    [
        ("NASNet", (2, 1), ([2, 3, 4, 5, 6], [4, 5, 6])),
        ("AmoebaNet", (2, 0), ([4, 5, 6], [3, 4, 6])),
        ("DARTS_V1", (3, 3), ([2, 3, 4, 5], [2, 3, 4, 5])),
        ("DARTS_V2", (2, 3), ([2, 3, 4, 5], [2, 3, 4, 5])),
        ("PC_DARTS_cifar", (1, 0), ([2, 3, 4, 5], [2, 3, 4, 5])),
        ("PC_DARTS_image", (2, 1), ([2, 3, 4, 5], [2, 3, 4, 5])),
    ],
)
def test_skip_connects_and_concats(name, skips, concat):
    cell = getattr(genotypes, name)
    assert genotypes.skip_connects(cell) == skips
    assert (list(cell.normal_concat), list(cell.reduce_concat)) == concat


@pytest.mark.parametrize("name", NAMED)
def test_round_trips(name, tmp_path):
    cell = load(name)
    assert cell == check(getattr(genotypes, name)) == check(cell)
    assert parse(text(cell)) == parse(repr(getattr(genotypes, name))) == cell
    assert from_json(to_json(cell)) == from_json(to_json(getattr(genotypes, name))) == cell
    save(cell, tmp_path / "genotype.json")
    (tmp_path / "log.txt").write_text(f"11/22 01:02:03 PM genotype = {cell}\n")
    sources = [tmp_path, str(tmp_path), tmp_path / "genotype.json", str(tmp_path / "log.txt")]
    assert [load(source) for source in [*sources, text(cell)]] == [cell] * 5


def test_normal_form():
    lists = Genotype((["sep_conv_3x3", 0], ["skip_connect", 1]) * 3, (2, 3, 4), PAIR * 3, [2, 4])
    tidy = check(lists)
    assert repr(tidy.normal) == repr(PAIR * 3)
    assert repr(tidy.normal_concat) == "range(2, 5)" and repr(tidy.reduce_concat) == "[2, 4]"
    assert text(lists) == repr(tidy) and from_json(to_json(lists)) == tidy
    assert repr(check(SMALL).normal_concat) == "[2]"
    backwards = SMALL._replace(normal=PAIR * 2, normal_concat=range(3, 1, -1))
    assert check(backwards).normal_concat == [3, 2]  # the order of the channels is kept
    other = namedtuple("Genotype", Genotype._fields)  # of another project's genotypes.py
    assert type(check(other(*SMALL))) is Genotype


def test_numbers_of_numpy_become_plain_ones():
    edges = [(op, np.int64(node)) for op, node in PAIR * 2]
    tidy = check(Genotype(edges, np.arange(2, 4).tolist(), edges, list(np.arange(2, 4))))
    assert repr(tidy.normal) == repr(PAIR * 2) and repr(tidy.reduce_concat) == "range(2, 4)"
    assert from_json(to_json(tidy)) == tidy


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "genotype = {}",
        "MyCell = {}\n",
        "11/22 01:02:03 PM genotype = {}",
        "genotypes.{}",
        "\n  x = {}  # best of 3 (seed 2)\n",
    ],
)
def test_parse_takes_any_prefix(form):
    assert parse(form.format(PC_DARTS_CIFAR)) == genotypes.PC_DARTS_cifar


def test_parse_takes_positions_lines_and_ranges():
    assert "=" not in POSITIONAL
    assert parse(POSITIONAL) == genotypes.PC_DARTS_cifar
    assert parse(PC_DARTS_CIFAR.replace(", ", ",\n")) == genotypes.PC_DARTS_cifar
    for concat in ("range(2, 6, 1)", "list(range(2, 6))", "(2, 3, 4, 5)", "list([2, 3, 4, 5])"):
        assert parse(PC_DARTS_CIFAR.replace("range(2, 6)", concat)) == genotypes.PC_DARTS_cifar


def cell(*edges):
    return SMALL._replace(normal=list(edges))


WRONG = {
    "op": (
        cell(("sep_conv_3x4", 0), PAIR[1]),
        "normal[0]: unknown op 'sep_conv_3x4'; nearest: sep_",
    ),
    "case": (
        cell(("Skip_Connect", 0), PAIR[1]),
        "unknown op 'Skip_Connect'; nearest: skip_connect",
    ),
    "later input": (cell(*PAIR, ("skip_connect", 3), PAIR[0]), "normal[2]: input 3 does not exist"),
    "own input": (
        cell(("skip_connect", 2), PAIR[0]),
        "input 2 does not exist; node 2 reads nodes of",
    ),
    "negative": (cell(("skip_connect", -1), PAIR[0]), "normal[0]: input -1 does not"),
    "bool": (cell(PAIR[0], ("skip_connect", True)), "normal[1]: input True does not"),
    "numpy": (
        cell(PAIR[0], ("skip_connect", np.int64(2))),
        "normal[1]: input np.int64(2) does not",
    ),
    "float": (cell(PAIR[0], ("skip_connect", 1.0)), "normal[1]: input 1.0 does not"),
    "string": (cell(PAIR[0], ("skip_connect", "1")), "normal[1]: input '1' does not"),
    "huge": (cell(PAIR[0], ("skip_connect", 1 << 99999)), "normal[1]: input a huge number"),
    "odd": (cell(*PAIR, PAIR[0]), "normal has 3 edges; give two per node"),
    "no edges": (cell(), "normal is []; give a list"),
    "edges type": (SMALL._replace(reduce="sep_conv_3x3"), "reduce is 'sep_conv_3x3'; give a list"),
    "edges None": (SMALL._replace(reduce=None), "reduce is None; give a list"),
    "edges dict": (SMALL._replace(reduce={1: 2, 3: 4}), "reduce is {1: 2, 3: 4}; give a list"),
    "short edge": (cell(PAIR[0], ("skip_connect",)), "normal[1] is ('skip_connect',); give"),
    "long edge": (
        cell(PAIR[0], ("skip_connect", 0, 1)),
        "normal[1] is ('skip_connect', 0, 1); give",
    ),
    "string edge": (cell(PAIR[0], "ab"), "normal[1] is 'ab'; give"),
    "op type": (cell(PAIR[0], (["skip_connect"], 0)), "normal[1] is (['skip_connect'], 0); give"),
    "empty concat": (SMALL._replace(normal_concat=[]), "normal_concat is []; give a list of nodes"),
    "empty range": (
        SMALL._replace(normal_concat=range(2, 2)),
        "normal_concat is range(2, 2); give",
    ),
    "concat type": (SMALL._replace(reduce_concat=2), "reduce_concat is 2; give a list of nodes"),
    "concat string": (SMALL._replace(reduce_concat="2"), "reduce_concat is '2'; give a list"),
    "concat late": (SMALL._replace(reduce_concat=[2, 3]), "reduce_concat: node 3 does not exist"),
    "concat input": (SMALL._replace(reduce_concat=[1, 2]), "reduce_concat: node 1 does not exist"),
    "concat twice": (
        SMALL._replace(reduce_concat=[2, 2]),
        "node 2 does not exist or is listed twice",
    ),
    "concat text": (SMALL._replace(reduce_concat=["2"]), "reduce_concat: node '2' does not"),
    "concat float": (SMALL._replace(reduce_concat=[2.0]), "reduce_concat: node 2.0 does not"),
    "endless": (SMALL._replace(reduce_concat=range(2, 10**18)), "reduce_concat: node 3 does not"),
    "long": (cell((["x" * 9999] * 9999, 0), PAIR[0]), "normal[0] is (['xxx"),
    "tuple": (tuple(SMALL), "is no Genotype; give one with all four fields"),
    "no genotype": (PAIR, "is no Genotype; give one with all four fields"),
    "lines": (cell(("a\nb", 0), PAIR[0]), r"unknown op 'a\nb' (known: none, max_pool_3x3, "),
}


@pytest.mark.parametrize("wrong, message", WRONG.values(), ids=WRONG)
def test_check_names_what_is_wrong(wrong, message):
    assert message in error(check, wrong)


def test_check_takes_the_operations_that_exist():
    mine = cell(("my_conv", 0), PAIR[1])
    ops = {"none": 0, "my_conv": 1, "skip_connect": 2, "sep_conv_3x3": 3}
    assert check(mine, ops) == parse(text(mine), ops) == from_json(to_json(mine), ops) == mine
    assert load(text(mine), ops) == mine
    assert "(known: none, my_conv, skip_connect, sep_conv_3x3)" in error(load, "NASNet", ops)
    assert "unknown op 'my_conv'" in error(check, mine)


def test_concats_may_differ_in_length():
    uneven = Genotype(PAIR * 2, [2, 3], PAIR * 3, [4])
    assert check(uneven) == Genotype(PAIR * 2, range(2, 4), PAIR * 3, [4])


DEEP = 10_000
MALICIOUS = {
    "import": "__import__('os').system('touch {hit}')",
    "hidden prefix": "__import__('os').system('touch {hit}') or Genotype(",
    "call in a field": "Genotype(normal=__import__('os').system('touch {hit}'))",
    "method": "Genotype([], [], [], list('x'.join(open('{hit}', 'w'))))",
    "class": "Genotype(normal=().__class__.__bases__[0].__subclasses__())",
    "lambda": "Genotype(*(lambda: [])())",
    "attribute": PC_DARTS_CIFAR + ".__class__",
    "two": f"{PC_DARTS_CIFAR}\n{PC_DARTS_CIFAR}",
    "five": POSITIONAL[:-1] + ", range(2, 6))",
    "call of a call": PC_DARTS_CIFAR + PC_DARTS_CIFAR[8:],
    "unknown field": PC_DARTS_CIFAR[:-1] + ", ops=[])",
    "stars": "Genotype(**{})",
    "starred": "Genotype(*[1, 2, 3, 4])",
    "positional after": PC_DARTS_CIFAR[:-1] + ", range(2, 6))",
    "repeated field": PC_DARTS_CIFAR[:-1] + ", reduce_concat=range(2, 6))",
    "both ways": POSITIONAL[:-1] + ", reduce_concat=range(2, 6))",
    "cut off": PC_DARTS_CIFAR[:-30],
    "brackets": "Genotype(" + "[" * DEEP,
    "closed brackets": "Genotype(" + "[" * DEEP + "]" * DEEP + ")",
    "parentheses": "Genotype(" * DEEP,
    "minus": "Genotype(" + "-" * 90_000 + "1)",
    "sum": "Genotype(" + "1+" * 40_000 + "1)",
    "dots": "Genotype(a" + ".b" * 40_000 + ")",
    "calls": "Genotype(f" + "()" * 40_000 + ")",
    "null": "Genotype(\0)",
    "surrogate": "Genotype('\ud800')",
    "escape": r"Genotype('\d' 1or 2)",
    "decimal": "Genotype(" + "9" * 5000 + ", [], [], [])",
    "hexadecimal": "Genotype(0x" + "f" * 90_000 + ", [], [], [])",
    "float": "Genotype(1e999, [], [], [])",
    "set": "Genotype({[]: 1}, [], [], [])",
    "long": PC_DARTS_CIFAR + " " * 100_000,
    "range": PC_DARTS_CIFAR.replace("range(2, 6)", "range(10**12)"),
    "endless range": PC_DARTS_CIFAR.replace("range(2, 6)", "range(2, 1000000000000)"),
    "endless list": PC_DARTS_CIFAR.replace("range(2, 6)", "list(range(2, 1000000000000))"),
    "range of nothing": PC_DARTS_CIFAR.replace("range(2, 6)", "range()"),
    "range of text": PC_DARTS_CIFAR.replace("range(2, 6)", "range('2', '6')"),
    "range with keyword": PC_DARTS_CIFAR.replace("range(2, 6)", "range(2, 6, step=1)"),
    "step 0": PC_DARTS_CIFAR.replace("range(2, 6)", "range(2, 6, 0)"),
    "empty": "",
}


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("bad", MALICIOUS.values(), ids=MALICIOUS)
def test_malicious_text_is_refused_and_does_nothing(bad, tmp_path, recwarn):
    bad = bad.replace("{hit}", str(tmp_path / "hit"))
    assert error(parse, bad)
    if "\0" not in bad:
        assert error(load, bad)
    assert error(from_json, bad)
    assert not (tmp_path / "hit").exists()
    assert not recwarn.list


def test_parse_says_what_to_do():
    assert "shows no genotype; give Genotype(" in error(parse, "PCDARTS")
    assert "shows no genotype; give Genotype(" in error(parse, None)
    assert "longer than 100,000 characters" in error(parse, MALICIOUS["long"])
    assert "give one whole Genotype(" in error(parse, MALICIOUS["cut off"])
    short = "Genotype(normal=[('skip_connect', 0), ('skip_connect', 1)], normal_concat=[2])"
    assert "has no reduce, reduce_concat; give all four" in error(parse, short)
    for endless in ("endless range", "endless list"):
        assert "normal_concat: node 6 does not exist" in error(parse, MALICIOUS[endless])
    assert "normal[1]: input -7 does not" in error(parse, text(cell(PAIR[0], ("skip_connect", -7))))


@pytest.mark.parametrize(
    "bad",
    ["", "NaN", "null", "1", '"x"', "[]", "{", "\0", "\ud800", "9" * 5000, b"\xff", None, 3]
    + ["[" * 100_000, '{"a":' * 100_000],
    ids=lambda bad: repr(bad)[:12],
)
def test_bad_json_is_refused(bad):
    assert "no JSON object; give what to_json wrote" in error(from_json, bad)


def test_json_fields():
    fields = json.loads(to_json(SMALL))
    assert from_json(json.dumps({**fields, "primitives": ["none"], "loss": float("nan")})) == SMALL
    del fields["reduce_concat"]
    assert "has no reduce_concat; give all four" in error(from_json, json.dumps(fields))
    nan = to_json(SMALL).replace('["skip_connect", 1]', '["skip_connect", NaN]')
    assert "normal[1]: input nan does not exist" in error(from_json, nan)
    assert to_json(SMALL).splitlines()[2] == '  "normal_concat": [2],'


def test_unknown_architecture():
    assert error(load, "pcdarts").startswith("unknown architecture 'pcdarts'; nearest: PCDARTS,")
    assert f"(names: {', '.join(NAMED)};" in error(load, "darts_v3")
    assert "'AMOEBANET'; nearest: AmoebaNet (" in error(load, "AMOEBANET")
    assert "nearest" not in error(load, "?")
    assert "unknown architecture 'names'" in error(load, "names")  # an attribute, but no genotype
    assert "unknown architecture 'no/genotype.json'" in error(load, "no/genotype.json")
    for odd in ("", "a\0b", "x" * 10_000, "a\nb"):
        assert error(load, odd).startswith("unknown architecture")
    for odd in (None, 3, b"PCDARTS", ["PCDARTS"]):
        assert "is no architecture; give a name" in error(load, odd)


def test_a_name_goes_before_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(SMALL, "PCDARTS")
    assert load("PCDARTS") == genotypes.PCDARTS


def test_load_of_bad_files(tmp_path):
    assert f"{str(tmp_path)!r} has no genotype.json; is the search finished?" in error(
        load, tmp_path
    )
    path = tmp_path / "genotype.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert f"cannot read {str(path)!r} (it is not text)" in error(load, tmp_path)
    path.write_text(to_json(SMALL) + " " * 1_000_000)
    assert f"{str(path)!r}: the file is larger than 1 MB" in error(load, path)
    path.write_text(to_json(SMALL._replace(normal_concat=[3])))
    assert f"{str(path)!r}: normal_concat: node 3 does not exist" in error(load, path)
    path.write_text("\ufeff" + to_json(SMALL), encoding="utf-8")  # as some editors begin a file
    assert load(path) == SMALL
    path.write_text("secret")
    assert "secret" not in error(load, path)
    path.unlink()
    path.mkdir()
    assert f"cannot read {str(path)!r} (Is a directory)" in error(load, tmp_path)


def test_load_says_which_name_is_wrong(monkeypatch):
    monkeypatch.setattr(genotypes, "MyCell", cell(*PAIR, PAIR[0]), raising=False)
    assert error(load, "MyCell") == "'MyCell': normal has 3 edges; give two per node"


@pytest.mark.parametrize("place", ["# fmt: off\n", "# fmt: on\n", "def names():", None])
def test_a_pasted_genotype_is_a_name(place, tmp_path):
    with open(genotypes.__file__, encoding="utf-8") as file:
        source = file.read()
    pasted = f"MyCell = {text(SMALL)}\n\n"
    assert place is None or place in source
    source = source.replace(place, pasted + place) if place else source + pasted
    path = tmp_path / "pasted.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("pasted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert sorted(module.names()) == sorted([*NAMED, "MyCell"])
    assert module.load("MyCell") == SMALL
    with pytest.raises(module.GenotypeError, match="nearest: MyCell"):
        module.load("mycel")


def test_import_needs_the_standard_library_only():
    with open(genotypes.__file__, encoding="utf-8") as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    imported = {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {"ast", "collections"} <= imported <= sys.stdlib_module_names


def mutants(source, pieces, count):
    """`source` with one to four random pieces cut out, doubled, swapped in or turned around."""
    rng = random.Random(0)
    for _ in range(count):
        mutant = source
        for _ in range(rng.randint(1, 4)):
            a, b = sorted(rng.choices(range(len(mutant) + 1), k=2))
            b = min(b, a + rng.choice([0, 1, 2, 20, 400]))
            piece = rng.choice(["", mutant[a:b] * 2, mutant[a:b][::-1], *pieces])
            mutant = mutant[:a] + piece + mutant[b:]
        yield mutant


PIECES = [*"()[]{},'\"=-:0123456789.*\\\n#\0 é", "range", "None", "True", "NaN", "1e9", "9" * 99]


@pytest.mark.parametrize("read, write", [(parse, text), (from_json, to_json)], ids=["text", "json"])
def test_mutants_give_a_genotype_or_a_genotype_error(read, write):
    good = bad = 0
    for name in NAMED[:5]:
        for mutant in mutants(write(getattr(genotypes, name)), PIECES, 800):
            try:
                found = read(mutant)
            except GenotypeError as wrong:
                assert str(wrong).isprintable()
                bad += 1
            else:
                assert found == check(found) == read(write(found))
                good += 1
    assert good > 20 and bad > 2000


def test_fuzz():
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings
    from hypothesis import strategies as st

    @settings(max_examples=200, deadline=None, database=None)
    @given(st.text(), st.booleans())
    def anything(words, inside):
        words = f"Genotype({words})" if inside else words
        for read in (parse, from_json):
            with contextlib.suppress(GenotypeError):
                assert isinstance(read(words), Genotype)

    anything()
