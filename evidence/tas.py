"""The evidence of TAS: what a search finds beside uniform and random networks, trained alike.

    python -m evidence.tas --data DIR --amp  # images as DIR/train/CLASS and DIR/test/CLASS
    python -m evidence.tas --set digits --root runs/tas-digits   # needs no files

With every seed: the unpruned network, a search, the network found trained with and without the
unpruned one as its teacher, one whose convolutions are all narrowed alike, and random ones of about
the same multiply-adds. Every run once: stopped, the same command goes on. Ends with tables, in
results.md and results.csv under --root. What came out stands in docs/tas.md.
"""

import json
import statistics

from harness import files, flags, protocol, script
from tas import found
from train_search_tas import ratio

COLUMNS = (
    "network", "seed", "run", "test_top1", "test_loss", "train_loss", "multiply_adds_m",
    "parameters_m", "ms_1", "unpruned_ms_1", "ms_64", "unpruned_ms_64", "seconds",
)  # fmt: skip


def get_args():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--root", default="runs/tas", help="folder of the runs and of the results")
    add("--set", default="folder", help="as of the scripts: folder, cifar10, cifar100, digits")
    add("--data", default="../data", help="folder of the data set")
    add("--train_every", type=flags.count, default=20, help="of a folder: each n-th training image")
    add("--test_every", type=flags.count, default=5, help="of a folder: each n-th test image")
    add("--input_size", type=flags.count, default=16, help="side of the images in pixels")
    add("--seeds", type=flags.count, default=3, help="runs of each network: seeds 0, 1, ...")
    add("--random", type=flags.natural, default=3, help="random networks")
    add("--depth", type=flags.depth, default=20, help="layers")
    add("--flop_ratio", type=ratio, default=0.5, help="multiply-adds wanted, of the unpruned ones")
    add("--search_epochs", type=flags.count, default=12, help="epochs of a search")
    add("--epochs", type=flags.count, default=6, help="epochs of a training")
    add("--batch_size", type=flags.count, default=64, help="images in a step")
    add("--learning_rate", type=flags.positive, default=0.05, help="of the weights")
    add("--arch_learning_rate", type=flags.positive, default=0.02, help="of the attentions")
    add("--amp", action="store_true", help="bfloat16 in searches and trainings")
    return parser.parse_args()


def main(args):
    root = files.expanded(args.root)
    root.mkdir(parents=True, exist_ok=True)
    data, of = args.data, ""
    if args.set == "folder" and max(args.train_every, args.test_every) > 1:
        data = protocol.thinned(data, root, args.train_every, args.test_every)
        of = f"-every-{args.train_every}-{args.test_every}"
    common = ["--set", args.set, "--data", data, "--input_size", args.input_size]
    common += ["--batch_size", args.batch_size]
    common += ["--learning_rate", args.learning_rate, *["--amp"] * args.amp]

    runs, searches = {}, []  # {network: [its folder of each seed]}
    for seed in range(args.seeds):
        alike = [*common, "--seed", seed, "--epochs", args.epochs]

        def train(network, *flags, seed=seed, alike=alike):
            name = f"{network}{of}-s{seed}".replace(", ", "-").replace(" ", "")
            folder = protocol.run("eval", name, root, "train_tas.py", *flags, *alike)
            runs.setdefault(network, []).append(folder)
            return folder

        teacher = train("unpruned", "--arch", "unpruned", "--depth", args.depth)
        searches.append(
            protocol.run(
                "search", f"s{seed}{of}", root, "train_search_tas.py", *common, "--seed", seed,
                "--epochs", args.search_epochs, "--depth", args.depth, "--flop_ratio",
                args.flop_ratio, "--arch_learning_rate", args.arch_learning_rate,
            )
        )  # fmt: skip
        train("found, teacher", "--arch", searches[-1], "--teacher", teacher)
        train("found", "--arch", searches[-1])
        for network, arch in others(root, teacher, args).items():
            train(network, "--arch", arch)

    results = [figures(name, folder) for name, each in runs.items() for folder in each]
    protocol.write_csv(root / "results.csv", results)
    tables = f"{networks_table(results)}\n\n{searches_table(searches)}\n"
    files.write(root / "results.md", tables.encode())
    print(tables)


def others(root, teacher, args):
    """{network: its tas.json}: the uniform and the random ones, the same of every seed."""
    whole = found.load(str(teacher))
    what = args.depth, args.flop_ratio, whole.num_classes, whole.size
    networks = {"uniform": found.uniform(*what)}
    networks |= {f"random {i}": found.drawn(*what, seed=i) for i in range(1, args.random + 1)}
    paths = {name: root / f"{name.replace(' ', '')}.json" for name in networks}
    for name, network in networks.items():
        network.save(paths[name])
    return paths


def figures(network, folder):
    """A row of results.csv."""
    result, rows = json.loads((folder / "result.json").read_text()), protocol.rows(folder)
    times = result["latency_ms"]
    seed = files.read_args(folder)["args"]["seed"]
    values = [result["test_top1"], result["test_loss"], float(rows[-1]["loss"])]
    values += [result["multiply_adds_m"][0], result["parameters_m"][0], *times["1"], *times["64"]]
    values = [round(value, 6) for value in values]
    seconds = round(sum(float(row["seconds"]) for row in rows), 1)
    return dict(zip(COLUMNS, [network, seed, folder.name, *values, seconds], strict=True))


def networks_table(results):
    """The networks, each with the means of its runs; last all random ones together."""
    groups = {}
    for row in results:
        groups.setdefault(row["network"], []).append(row)
    random = [row for row in results if row["network"].startswith("random")]
    groups |= {"random, all": random} if random else {}
    header = ["network", "test accuracy, %", "multiply-adds, M", "parameters, M"]
    header += ["1 image, ms", "64 images, ms", "times as fast as unpruned: 1, 64"]
    lines = []
    for name, rows in groups.items():
        line = [name, protocol.mean([row["test_top1"] for row in rows])]
        for column, digits in (("multiply_adds_m", 2), ("parameters_m", 3)):
            line.append(f"{statistics.mean(row[column] for row in rows):.{digits}f}")
        for n, digits in ((1, 2), (64, 1)):
            line.append(f"{statistics.median(row[f'ms_{n}'] for row in rows):.{digits}f}")
        ratios = [[row[f"unpruned_ms_{n}"] / row[f"ms_{n}"] for row in rows] for n in (1, 64)]
        line.append(", ".join(f"{statistics.median(each):.2f}" for each in ratios))
        lines.append(line)
    return protocol.table(header, lines)


def searches_table(searches):
    """What each search found, and how sure its attentions were."""
    header = ["search", "multiply-adds found (target), M", "expected, M", "mean entropy"]
    header += ["largest probability, least and mean", "widths found"]
    lines = []
    for folder in searches:
        network, last = found.load(str(folder)), protocol.rows(folder)[-1]
        line = [f"seed {files.read_args(folder)['args']['seed']}"]
        line.append(f"{network.multiply_adds:.2f} ({network.target:.2f})")
        line += [f"{float(last['expected_m']):.2f}", f"{float(last['entropy']):.2f}"]
        line.append(", ".join(f"{float(last[f'probability_{k}']):.2f}" for k in ("min", "mean")))
        lines.append([*line, " ".join(map(str, network.channels[1:]))])
    return protocol.table(header, lines)


if __name__ == "__main__":
    script.run(main, get_args)
