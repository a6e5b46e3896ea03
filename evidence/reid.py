"""A search with Auto-ReID, and its cell beside the published ones and a ResNet-18.

    python -m evidence.reid --data DIR --root runs/reid    # DIR: a folder in Market-1501's form

One search; then the cell found, the three published ones and the ResNet-18 are trained alike with
each of the seeds. Call it again to go on where it was stopped. Prints the table, and leaves it in
ROOT/results.md, and every run's figures in ROOT/results.csv. What came out stands in docs/reid.md.
"""

from harness import files, flags, protocol, script
from reid.data import SETS
from reid.flags import stages
from reid.loader import RANKS

NETWORKS = ("found", "REID_BASELINE", "REID_SPACE", "REID_SEARCH", "resnet18")
FIGURES = ("mAP", *(f"rank{k}" for k in RANKS))


def get_args():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--root", default="runs/reid", help="folder of the runs, a new one for other flags")
    add("--data", default="../data", help="folder of the data set")
    add("--set", default="market1501", choices=SETS, help="form of the data; digits needs no files")
    add("--seeds", type=flags.count, default=3, help="trainings of each network: seeds 0, 1, ...")
    add("--networks", nargs="+", default=NETWORKS, choices=NETWORKS, help="what is trained")
    add("--height", type=flags.count, default=64, help="of the images, in pixels")
    add("--width", type=flags.count, default=32, help="of the images, in pixels")
    add("--layers", type=stages, default="1,1,1", help="cells of each stage")
    add("--init_channels", type=flags.count, default=16, help="channels C of the first stage")
    add("--embedding", type=flags.count, default=64, help="numbers of an embedding")
    add("--identities", type=flags.count, default=15, help="P: identities in a step")
    add("--search_instances", type=flags.count, default=3, help="images of each, in the search")
    add("--instances", type=flags.count, default=4, help="images of each, in a training")
    add("--search_epochs", type=flags.count, default=15, help="of the search, of first order")
    add("--epochs", type=flags.count, default=20, help="of each training")
    add("--learning_rate", type=flags.positive, default=3e-3, help="of each training (cosine)")
    add("--warm_up", type=flags.natural, default=3, help="epochs of each training")
    return parser.parse_args()


def main(args):
    root = files.expanded(args.root)
    shared = f"--set {args.set} --height {args.height} --width {args.width} --layers {args.layers} "
    shared += f"--init_channels {args.init_channels} --embedding {args.embedding} "
    shared += f"--identities {args.identities} --workers 0"
    shared = [*shared.split(), "--data", args.data]
    search = f"--first_order --instances {args.search_instances} --epochs {args.search_epochs}"
    train = f"--instances {args.instances} --epochs {args.epochs} --eval_freq {args.epochs} "
    train += f"--learning_rate {args.learning_rate} --schedule cosine --warm_up {args.warm_up}"

    found = None
    if "found" in args.networks:
        found = protocol.run(
            "search", "found", root, "train_search_reid.py", *shared, *search.split()
        )
    runs = {network: [] for network in args.networks}
    for seed in range(args.seeds):  # a seed of all of them before the next seed
        for network, results in runs.items():
            arch = found if network == "found" else network
            folder = protocol.run(
                "eval", f"{network}-{seed}", root, "train_reid.py", *shared, *train.split(),
                "--arch", arch, "--seed", seed,
            )  # fmt: skip
            results.append(result(folder, network, seed))
    lines = [line for results in runs.values() for line in results]
    protocol.write_csv(root / "results.csv", lines)
    text = table(runs)
    files.write(root / "results.md", f"{text}\n".encode())
    print(text)


def result(folder, network, seed):
    """A row of results.csv: what a training ended with."""
    rows, about = protocol.rows(folder), files.read_args(folder)
    row = {"network": network, "seed": seed}
    row |= {name: round(float(rows[-1][name]), 4) for name in FIGURES}
    row |= {name: round(about[name], 6) for name in ("parameters_m", "multiply_adds_m")}
    row["loss"] = round(float(rows[-1]["loss"]), 4)
    return row | {"seconds": round(sum(float(row["seconds"]) for row in rows), 1)}


def table(runs):
    """Markdown: a line for each network, {network: its rows of results.csv}."""
    header = ["network", "mAP (%)", "rank-1 (%)", "parameters (M)", "multiply-adds (M)",
              "seconds in steps"]  # fmt: skip
    lines = []
    for network, results in runs.items():
        figures = {name: [row[name] for row in results] for name in results[0]}
        line = [network, *(protocol.mean(figures[name]) for name in ("mAP", "rank1"))]
        line += [f"{figures['parameters_m'][0]:.3f}", f"{figures['multiply_adds_m'][0]:.2f}"]
        lines.append([*line, protocol.mean(figures["seconds"], 0)])
    return protocol.table(header, lines)


if __name__ == "__main__":
    script.run(main, get_args)
