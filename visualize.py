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
    what = list(dict.fromkeys(args.what))
    are_runs = [os.path.isfile(Path(each, "args.json")) for each in what]  # a text is none
    out = None if args.out is None else files.expanded(args.out)
    if len(what) > 1 and not all(are_runs):
        other = what[are_runs.index(False)]
        raise utils.UserError(f"{other} is no run folder: several can be compared if all are")
    if not args.dot and any(are_runs):
        show_runs(args, {Path(each).resolve(): Path(each) for each in what}.values(), out)
    elif args.animate:
        hint = "leave --dot out" if args.dot else "give one"
        raise utils.UserError(f"--animate takes the folder of a search: {hint}")
    elif len(what) > 1:
        raise utils.UserError("--dot takes one cell: give one")
    else:
        show_cells(args, what[0], out or Path())


def show_cells(args, what, out):
    """The two cells, or the network of TAS, that `what` means."""
    suffix = args.format or "png"
    if tas_pictures.is_network(what) and not args.dot:
        print(drawing.save(tas_pictures.network(what), out / f"tas-network.{suffix}"))
        return
    with utils.user_errors(genotypes.GenotypeError):
        genotype = genotypes.load(what, ops=())
    if args.dot:
        print(drawing.dot(genotype))
        return
    for kind, figure in drawing.draw(genotype).items():
        print(drawing.save(figure, out / f"{name_of(what)}-{kind}.{suffix}"))


def show_runs(args, folders, out):
    """The report of a run, or the comparison of several."""
    drawing.figures()  # says at once that matplotlib is missing
    folders = list(folders)
    runs = [report.read(folder) for folder in folders]
    if args.animate:
        if len(runs) > 1:
            raise utils.UserError("--animate takes one run: give one folder")
        print(plots.animate(runs[0], (out or folders[0]) / "cells.gif"))
    if len(runs) > 1:
        print("\n\n".join(map(report.markdown, report.tables(runs))))
        print(f"\n{report.compare(runs, (out or Path()) / 'comparison.html')}")
        return
    is_tas = runs[0].about["script"].endswith("_tas")
    if args.format:
        more = tas_pictures.pictures(folders[0]) if is_tas else {}
        for title, (_, figure) in (report.pictures(runs[0]) | more).items():
            path = (out or folders[0]) / f"{report.file_name(title)}.{args.format}"
            print(drawing.save(figure, path))
    if is_tas:
        print(tas_pictures.write_report(folders[0], out and out / "report.html"))
    else:
        print(report.write(runs[0], (out or folders[0]) / "report.html"))


def plot(genotype, filename):
    """Draws a cell, a list of (op, input) edges, to `filename`.pdf, or a .png or .svg if it is one.

    The call of DARTS's scripts: plot(genotypes.DARTS.normal, "normal"). Every node is in the
    output. Returns the path; raises UserError where matplotlib is missing or it cannot be written.
    """
    path = Path(filename)
    if path.suffix.lower() not in (".pdf", ".png", ".svg"):
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
