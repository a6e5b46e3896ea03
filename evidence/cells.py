"""What the cells of the published search are worth: against published and random cells, alike.

    python -m evidence.cells --data DIR                        # as published: weeks on one GPU
    python -m evidence.cells --init_channels 16 --layers 8 --epochs 12         # small trainings
    python -m evidence.cells --search_run search-EXP-20260101-120000   # of a search that is done

Searches --searches cells with train_search.py's defaults (the published setting), then trains each
of them and the other --cells with train.py, --seeds times. In the published size, 36 channels, 20
cells, 600 epochs, with the published recipe: batch 96, cutout, auxiliary head, drop path up to 0.3.
In any other size with cutout, without auxiliary head and drop path. Stopped, it goes on where it
was when called again with the same flags; --seeds, --searches and --cells may grow. Writes
results.md, results.csv and, where it searched, searches.csv into --root.
"""

import itertools
import re
import shlex
import statistics
from pathlib import Path

import torch

import genotypes
import utils
from harness import costs, data, files, flags, protocol, report, script
from model import build
from operations import OPS

CELLS = ("found", "PC_DARTS_cifar", "DARTS_V2", "random:0", "random:1", "random:2")
PUBLISHED = {"init_channels": 36, "layers": 20, "epochs": 600}
WATCHED = ["alpha_entropy_normal", "alpha_entropy_reduce"]  # of a search, in nats
WATCHED += ["beta_entropy_normal", "beta_entropy_reduce"]


def get_args():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--root", default="runs/cells", help="folder of all runs and of the results")
    add("--data", default="../data", help="folder of the data set")
    add("--set", default="cifar10", help="as of train.py: cifar10, cifar100, folder, digits")
    add("--every", type=flags.count, default=1, metavar="N",
        help="of --set folder: each N-th image of each class, by links in --root")  # fmt: skip
    add("--cells", default=",".join(CELLS), metavar="NAME,NAME", help="found: those searched here")
    add("--searches", type=flags.count, default=4, metavar="N", help="with seeds 0, 1, ...")
    add("--search_run", metavar="FOLDER", help="a finished search, in place of searching")
    add("--seeds", type=flags.natural, default=2, metavar="N", help="trainings of each cell")
    add("--epochs", type=flags.count, default=PUBLISHED["epochs"], help="of each training")
    add("--init_channels", type=flags.count, default=PUBLISHED["init_channels"], help="of it")
    add("--layers", type=flags.depth, default=PUBLISHED["layers"], help="cells of its network")
    text = dict(type=flags.words, default="", metavar="=TEXT")
    add("--search_flags", **text, help="further flags of train_search.py")
    add("--train_flags", **text, help="further flags of train.py")
    return parser.parse_args()


def main(args):
    root, names = files.expanded(args.root), args.cells.split(",")
    with utils.user_errors(genotypes.GenotypeError):  # now, not after days
        for name in names:
            if name != "found":
                genotypes.load(name, OPS)
    root.mkdir(parents=True, exist_ok=True)
    images, of = args.data, ""
    if args.every > 1:
        if args.set != "folder":
            raise utils.UserError(f"--every {args.every} is of --set folder: leave it out")
        images = protocol.thinned(args.data, root, args.every, args.every)
        of = f"-every{args.every}"
    common = ["--set", args.set, "--data", images]

    searches = {}
    if "found" in names and args.search_run:
        searches["found"] = finished(Path(args.search_run))
    elif "found" in names:
        for seed in range(args.searches):
            searches[f"found {seed}"] = protocol.run(
                "search", f"found-{seed}{of}", root, "train_search.py",
                *common, "--seed", seed, *args.search_flags,
            )  # fmt: skip
            write(root, names, searches, {})

    cells = searches | {name: name for name in names if name != "found"}
    trained = {name: [] for name in cells}
    for seed, name in itertools.product(range(args.seeds), cells):
        folder = protocol.run(
            "eval", f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}{of}-{seed}", root, "train.py",
            "--arch", cells[name], *common, "--seed", seed, *recipe(args),
        )  # fmt: skip
        trained[name].append(folder)
        write(root, names, searches, trained)  # what there is by now
    print(write(root, names, searches, trained))


def recipe(args):
    """The flags of every training."""
    size = {name: getattr(args, name) for name in PUBLISHED}
    words = [word for name, value in size.items() for word in (f"--{name}", value)]
    words += ["--cutout", *(["--auxiliary"] if size == PUBLISHED else ["--drop_path_prob", 0])]
    return [*words, *args.train_flags]


def finished(folder):
    """The folder of a search, where it has its cell."""
    if files.read_args(folder).get("script") != "train_search":
        raise utils.UserError(f"{folder} is no run of train_search.py: give the folder of one")
    if not (folder / "genotype.json").exists():
        hint = f"go on with python train_search.py --resume {folder}"
        raise utils.UserError(f"the search in {folder} is unfinished: {hint}")
    return folder


def settled(cells):
    """The epoch from which on the cell stayed what it was, of the lines of genotypes.jsonl."""
    edges = [[line[name] for name in genotypes.Genotype._fields] for line in cells]
    epoch = cells[0]["epoch"]
    for line, before, now in zip(cells[1:], edges, edges[1:], strict=False):
        epoch = line["epoch"] if now != before else epoch
    return epoch


def of_search(name, folder):
    """A row of searches.csv."""
    run = report.read(folder)
    normal, reduce = genotypes.skip_connects(run.genotype)
    return {
        "search": name, "seed": run.about["args"]["seed"], "epochs": len(run.rows),
        "hours": sum(run.column("seconds")) / 3600,
        "skip_connects_normal": normal, "skip_connects_reduce": reduce,
        **{column: run.column(column)[-1] for column in WATCHED if run.column(column)},
        "settled": settled(run.cells), "genotype": genotypes.text(run.genotype),
    }  # fmt: skip


def of_cell(name, folders):
    """A row of results.csv; parameters and multiply-adds of the network that was trained."""
    about = files.read_args(folders[0])
    flags_of, genotype = about["args"], genotypes.load(folders[0], OPS)
    sizes = [flags_of["init_channels"], len(about["classes"]), flags_of["layers"]]
    with torch.device("meta"):  # shapes alone
        network = build(genotype, *sizes, flags_of["stem"])
    side = flags_of["input_size"] or data.default_side(flags_of["set"])
    ends = [float(protocol.rows(folder)[-1]["test_top1"]) for folder in folders]
    seconds = [sum(float(row["seconds"]) for row in protocol.rows(folder)) for folder in folders]
    return {
        "cell": name, "runs": len(ends), "test_accuracy": statistics.mean(ends),
        "test_accuracy_std": statistics.stdev(ends) if len(ends) > 1 else None,
        "test_accuracies": " ".join(f"{end:.2f}" for end in ends),
        "parameters_m": about["parameters_m"],
        "multiply_adds_m": costs.multiply_adds(network, side) / 1e6,
        "hours": statistics.mean(seconds) / 3600, "genotype": genotypes.text(genotype),
    }  # fmt: skip


def write(root, names, searches, trained):
    """Writes the results of what is done into the root; returns those of results.md."""
    trained = {name: folders for name, folders in trained.items() if folders}
    found = [of_search(name, folder) for name, folder in searches.items()]
    cells = [of_cell(name, folders) for name, folders in trained.items()]
    parts = ["# What a cell is worth"]
    alike = {}  # the same line once for all that were run so
    for what, folders in (("Searches", searches.values()), *trained.items()):
        for about in map(files.read_args, list(folders)[:1]):
            versions = f"torch {about['torch']}, commit {about.get('commit') or 'unknown'}"
            line = f"`{command(about)}`, {about['device']}, {versions}"
            alike.setdefault(line, []).append(what)
    parts += [f"{', '.join(names_of)}: {line}." for line, names_of in alike.items()]
    if found:
        header = ["search", "seed", "epochs", "hours in steps", "skip_connects normal, reduction"]
        header += ["entropy of alphas normal, reduction", "of betas", "the cell settled in epoch"]
        lines = []
        for row in found:
            nats = [f"{row[column]:.4f}" if column in row else "–" for column in WATCHED]
            skips = f"{row['skip_connects_normal']}, {row['skip_connects_reduce']}"
            lines.append([row["search"], row["seed"], row["epochs"], f"{row['hours']:.3f}", skips,
                          ", ".join(nats[:2]), ", ".join(nats[2:]), row["settled"]])  # fmt: skip
        parts.append(protocol.table(header, lines))
        parts += [f"{row['search']}: `{row['genotype']}`" for row in found]
    header = ["cell", "test accuracy after the last epoch (%)", "test error (%)"]
    header += ["parameters (M)", "multiply-adds (M)", "hours in steps"]
    lines = []
    for row in cells:
        ends = [float(protocol.rows(folder)[-1]["test_top1"]) for folder in trained[row["cell"]]]
        error = protocol.mean([100 - end for end in ends])
        costs_of = f"{row['parameters_m']:.3f}", f"{row['multiply_adds_m']:.1f}"
        lines.append([row["cell"], protocol.mean(ends), error, *costs_of, f"{row['hours']:.3f}"])
    for name in dict.fromkeys([*CELLS, *names]):
        if not any(done == name or done.startswith(f"{name} ") for done in trained):
            lines.append([name, "not run", *["–"] * 4])
    parts.append(protocol.table(header, lines))
    text = "\n\n".join(parts) + "\n"
    files.write(root / "results.md", text.encode())
    protocol.write_csv(root / "results.csv", cells)
    if found:
        protocol.write_csv(root / "searches.csv", found)
    return text


def command(about):
    """How the first of several runs was begun, without its folders and its seed."""
    words, left_out = [Path(about["command"][0]).name], False
    for word in about["command"][1:]:
        if word.startswith("--"):
            left_out = word in ("--data", "--save", "--arch", "--seed")
        if not left_out:
            words.append(word)
    return shlex.join(words)


if __name__ == "__main__":
    script.run(main, get_args)
