"""Draw cells, the report of a run, and the comparison of several runs.

    python visualize.py PC_DARTS_cifar --format svg    # a name, genotype.json, tas.json or the text
    python visualize.py search-EXP-...                 # a run: report.html in its folder
    python visualize.py eval-A-... eval-B-...          # several: a table, and comparison.html

Needs matplotlib: pip install -r requirements-viz.txt. --dot needs nothing.
"""

import os
import re
from pathlib import Path

import genotypes
import utils
from harness import drawing, files, flags, plots, report, script
from tas import pictures as tas_pictures


def get_args():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("what", nargs="+", help="name in genotypes.py, genotype.json, tas.json, text, run folders")
    kinds = ["png", "svg", "pdf"]
    add("--format", choices=kinds, help="of pictures (None: png); of a run each is a file too then")
    add("--out", help="folder for what is written; None: the run's own, for cells this one")
    add("--dot", action="store_true", help="print the cells as Graphviz source instead")
    add("--animate", action="store_true", help="of a search: cells.gif, the cells over the epochs")
    return parser.parse_args()


def main(args):
    try:
        show(args)
    except utils.UserError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # edited by hand
        what = f"{type(error).__name__}: {error}"
        raise utils.UserError(f"{' '.join(args.what)} is damaged ({what}): mend it") from None


def show(args):
    args.what = list(dict.fromkeys(args.what))
    folders = [Path(what) for what in args.what]
    are_runs = [os.path.isfile(folder / "args.json") for folder in folders]  # a text is none
    out = None if args.out is None else files.expanded(args.out)
    if len(folders) > 1 and not all(are_runs):
        what = folders[are_runs.index(False)]
        raise utils.UserError(f"{what} is no run folder: several can be compared if all are")
    if args.dot or not any(are_runs):
        if args.animate:
            hint = "leave --dot out" if args.dot else "give one"
            raise utils.UserError(f"--animate takes the folder of a search: {hint}")
        if len(folders) > 1:
            raise utils.UserError("--dot takes one cell: give one")
        if tas_pictures.is_network(args.what[0]) and not args.dot:
            figure = tas_pictures.network(args.what[0])
            print(drawing.save(figure, (out or Path()) / f"tas-network.{args.format or 'png'}"))
            return
        with utils.user_errors(genotypes.GenotypeError):
            genotype = genotypes.load(args.what[0], ops=())
        if args.dot:
            print(drawing.dot(genotype))
            return
        stem = name_of(args.what[0])
        for kind, figure in drawing.draw(genotype).items():
            print(drawing.save(figure, (out or Path()) / f"{stem}-{kind}.{args.format or 'png'}"))
        return
    drawing.figures()

    folders = list({folder.resolve(): folder for folder in folders}.values())
    runs = [report.read(folder) for folder in folders]
    is_tas = len(runs) == 1 and runs[0].about["script"].endswith("_tas")
    if args.animate:
        if len(runs) > 1:
            raise utils.UserError("--animate takes one run: give one folder")
        print(plots.animate(runs[0], (out or folders[0]) / "cells.gif"))
    if args.format and len(runs) == 1:
        more = tas_pictures.pictures(folders[0]) if is_tas else {}
        for title, (_, figure) in (report.pictures(runs[0]) | more).items():
            path = (out or folders[0]) / f"{report.file_name(title)}.{args.format}"
            print(drawing.save(figure, path))
    if is_tas:
        print(tas_pictures.write_report(folders[0], out and out / "report.html"))
    elif len(runs) == 1:
        print(report.write(runs[0], (out or folders[0]) / "report.html"))
    else:
        print("\n\n".join(map(report.markdown, report.tables(runs))))
        print(f"\n{report.compare(runs, (out or Path()) / 'comparison.html')}")


def plot(genotype, filename):
    """Draws a cell, a list of (op, input) edges, to `filename`.pdf, or as its suffix says.

    The call of DARTS's scripts: plot(genotypes.DARTS.normal, "normal"). Every node is in the
    output. Returns the path; raises UserError where matplotlib is missing or it cannot be written.
    """
    path = Path(filename)
    if path.suffix not in (".pdf", ".png", ".svg"):
        path = path.with_name(path.name + ".pdf")
    nodes = range(2, 2 + len(genotype) // 2)
    return drawing.save(drawing.draw_cell(list(genotype), nodes), path)


def name_of(what):
    """A file name for the genotype that `what` means."""
    path = Path(what)
    if "Genotype(" in what:
        return "genotype"
    name = (
        path.parent.name or path.resolve().parent.name
        if path.name == "genotype.json"
        else path.stem
    )
    return re.sub(r"[^\w.-]+", "_", name) or "genotype"


if __name__ == "__main__":
    script.run(main, get_args)
