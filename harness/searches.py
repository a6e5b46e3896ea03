"""What the searches share: the supernet that the flags ask for, what an epoch gave, the end."""

import numpy as np
from torch import nn

import genotypes
import utils
from harness import analysis, costs, distributed, files, loops
from model_search import Network


def supernet(args, classes, stem):
    """The supernet of these flags; UserError where there is none."""
    names = args.primitives and args.primitives.split(",")
    if names and (len(set(names)) < len(names) or set(names) == {"none"}):
        raise utils.UserError(f"--primitives {args.primitives}: give each once, and more than none")
    if args.plain and args.recompute:
        raise utils.UserError("--recompute is of the fast form: leave it or --plain out")
    with utils.user_errors(ValueError):
        return Network(
            args.init_channels, classes, args.layers, nn.CrossEntropyLoss(), k=args.k,
            edge_norm=not args.no_edge_norm, steps=args.steps, multiplier=args.steps, stem=stem,
            sampling=args.sampling, primitives=names, recompute=args.recompute,
            fused=not args.plain,
        )  # fmt: skip


def introduce(log, args, model):
    """The first lines of a search's log about its supernet."""
    form = "the fast form of its cells" if model.fused else "its cells as in model_search.py"
    weights = utils.count_parameters_in_MB(model)
    log.info("supernet: %.6f M weights, K = %d, %s", weights, args.k, form)
    if args.begin >= args.epochs:
        log.info(
            "alphas and betas never learn: --begin %d is not below --epochs %d, so the genotype "
            "is that of random alphas", args.begin, args.epochs,
        )  # fmt: skip


def report(run, args, lr, figures, model, held_out, imagenet=False):
    """What an epoch gave, in the log and the run's files; the genotype is that after the epoch.

    held_out: a loader of validation images, for --validate and --eigenvalue.
    """
    genotype, epoch = model.genotype(args.max_skip), run.epoch
    skips = genotypes.skip_connects(genotype)
    state = f"frozen for the first {args.begin} epochs" if epoch < args.begin else "learning"
    run.log.info(
        "epoch %d of %d: lr %.5f, train loss %.4f, top-1 %.2f %%, %.0f images/s, %.1f s, "
        "peak memory %.0f MiB, alphas and betas %s, skip_connects %d normal %d reduce",
        epoch + 1, args.epochs, lr, figures["loss"], figures["top1"],
        figures["images_per_second"], figures["seconds"], figures["memory_mib"], state, *skips,
    )  # fmt: skip
    run.log.info("genotype = %s", genotypes.text(genotype))
    parameters, multiply_adds = costs.derived_cost(genotype, imagenet)
    row = {
        "epoch": epoch + 1, "learning_rate": lr, **figures, "frozen": int(epoch < args.begin),
        **analysis.entropies(model), "skip_connects_normal": skips[0],
        "skip_connects_reduce": skips[1],
        "parameters_m": parameters / 1e6, "multiply_adds_m": multiply_adds / 1e6,
    }  # fmt: skip
    cell = {name: list(value) for name, value in genotype._asdict().items()}
    if args.validate:
        valid = loops.evaluate(held_out, model, model._criterion, args, run.log, run)
        row |= {"valid_loss": valid["loss"], "valid_top1": valid["top1"]}
        run.log.info("validation loss %.4f, top-1 %.2f %%", valid["loss"], valid["top1"])
    if args.eigenvalue:
        row["eigenvalue"] = float("nan")
        if (epoch + 1) % args.eigenvalue == 0:
            row["eigenvalue"] = analysis.dominant_eigenvalue(model, *next(iter(held_out)))
            run.log.info("largest eigenvalue of the Hessian in alpha: %.4f", row["eigenvalue"])
    softmaxes = {
        f"softmax_{name}": np.round(p.double().numpy(), 6).tolist()
        for name, p in analysis.softmaxes(model).items()
    }
    run.record(row, {"epoch": epoch + 1, **cell, **softmaxes})


def finish(run, args, model, held_out, images):
    """The end of a search: the supernet's figures, genotype.json, weights.pt; the genotype's line.

    images: what the validation images are called.
    """
    figures = loops.evaluate(held_out, model, model._criterion, args, run.log, run)
    run.log.info(
        "supernet on the %s: top-1 %.2f %%, loss %.4f "
        "(this is not the final accuracy of the cell: train it for that)",
        images, figures["top1"], figures["loss"],
    )  # fmt: skip
    genotype = model.genotype(args.max_skip)
    if distributed.is_main():
        genotypes.save(genotype, run.folder / "genotype.json", model.primitives)
        files.save(model.state_dict(), run.folder / "weights.pt")
    run.log.info("genotype = %s", genotypes.text(genotype))
