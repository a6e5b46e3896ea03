"""What trainings do alike: what they log and record."""

import genotypes
import utils
from harness import files

# What the checkpoint of a training keeps: [top-1, epoch] of the best epoch, figures of the last.
START = {"best": [-1.0, 0], "tested": {}}


def sizes(folder):
    """{"C", "num_classes", "layers", "auxiliary"} of the network that a run trains.

    {} where the folder is no run of train.py or train_imagenet.py; UserError where its args.json is
    damaged.
    """
    about = files.read_args(folder)
    if about.get("script") not in ("train", "train_imagenet"):
        return {}
    args, classes = about["args"], about.get("classes")
    found = {"C": args.get("init_channels"), "layers": args.get("layers")}
    found["num_classes"] = args.get("classes") or (isinstance(classes, list) and len(classes))
    if not all(type(size) is int and size > 0 for size in found.values()):
        raise utils.UserError(f"{folder}/args.json is damaged, in init_channels, layers or classes")
    return found | {"auxiliary": args.get("auxiliary") is True}


def introduce(run, network, genotype, more=""):
    """The first lines of a training's log about its network."""
    run.log.info("network: %.6f M parameters%s", utils.count_parameters_in_MB(network), more)
    run.log.info("genotype = %s", genotypes.text(genotype))


def report(run, args, lr, figures, tested, images):
    """What an epoch gave, in the log and metrics.csv; images: "test" or "validation".

    Returns what the run keeps, as in START.
    """
    epoch = run.epoch + 1
    run.log.info(
        "epoch %d of %d: lr %.5f, train loss %.4f, top-1 %.2f %%, %s loss %.4f, top-1 %.2f %%, "
        "top-5 %.2f %%, %.0f images/s, %.1f s, peak memory %.0f MiB",
        epoch, args.epochs, lr, figures["loss"], figures["top1"],
        images, tested["loss"], tested["top1"], tested["top5"],
        figures["images_per_second"], figures["seconds"], figures["memory_mib"],
    )  # fmt: skip
    prefix = "test" if images == "test" else "val"
    columns = {f"{prefix}_{name}": tested[name] for name in ("loss", "top1", "top5")}
    run.record({"epoch": epoch, "learning_rate": lr, **figures, **columns})
    best = max(run.values["best"], [tested["top1"], epoch], key=lambda pair: pair[0])
    return {"best": best, "tested": columns}


def conclude(run, images, kept=""):
    """The last lines of a training's log; kept: the file with the best epoch's weights."""
    best = run.values["best"]
    last = {name.split("_")[-1]: value for name, value in run.values["tested"].items()}
    run.log.info(
        "best epoch: %d with top-1 %.2f %%%s (chosen on these images: not a result)",
        *best[::-1], kept and f": {kept}",
    )  # fmt: skip
    run.log.info(
        "%s accuracy after the last epoch: %.2f %% (error %.2f %%), top-5 %.2f %% (error %.2f %%)",
        images, last["top1"], 100 - last["top1"], last["top5"], 100 - last["top5"],
    )  # fmt: skip
