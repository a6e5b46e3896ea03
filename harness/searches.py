"""What searches do alike: their supernet, and what they log, record and save."""

import numpy as np
import torch

import genotypes
import utils
from harness import analysis, costs, distributed, files, loops
from model_search import Network


def supernet(args, classes, criterion, stem):
    """The Network of a search's flags; ValueError or UserError where there is none such."""
    names = None if args.primitives is None else args.primitives.split(",")
    if names and (len(set(names)) < len(names) or set(names) == {"none"}):
        raise utils.UserError(
            f"--primitives {args.primitives}: name each operation once, and more than none"
        )
    return Network(
        num_classes=classes, criterion=criterion, stem=stem, recompute=args.recompute,
        primitives=names, fused=not args.plain and not args.form.startswith("plain"),
        **_variant(vars(args)),
    )  # fmt: skip


def _variant(args):
    """The arguments of Network that a search's flags, a dict, name in other words."""
    return dict(
        C=args["init_channels"], layers=args["layers"], k=args["k"], steps=args["steps"],
        multiplier=args["steps"], edge_norm=not args["no_edge_norm"], sampling=args["sampling"],
    )  # fmt: skip


def of_run(folder):
    """The arguments of Network that the search in the folder gave it, but for how it runs.

    {} where it is no run of train_search.py or train_search_imagenet.py; UserError where its
    args.json is damaged.
    """
    about = files.read_args(folder)
    if about.get("script") not in ("train_search", "train_search_imagenet"):
        return {}
    try:
        stem = "imagenet" if "imagenet" in about["script"] else about["args"]["stem"]
        sizes = dict(num_classes=len(about["classes"]), primitives=about["primitives"])
        return _variant(about["args"]) | sizes | {"stem": stem}
    except (KeyError, TypeError) as error:
        raise utils.UserError(f"{folder}/args.json is damaged ({error}): mend it") from None


def introduce(log, args, model, measured=None):
    """The first lines of a search's log about its supernet. measured: what forms.choose found."""
    if measured is not None:
        log.info("%s", measured)
    form = "in their fast form"
    if not model.fused:
        why = f" ({model.why_plain})" if model.why_plain else ""  # else --form says so
        form = f"as model_search.py has them{why}"
    form += ", in NCHW" * (model.layout == torch.contiguous_format)
    log.info(
        "supernet: %.6f M weights, K = %d, cells %s",
        utils.count_parameters_in_MB(model), args.k, form,
    )  # fmt: skip
    if all(cell.reduction for cell in model.cells):
        log.info("every cell reduces: the normal cell of the genotype is that of random alphas")
    if args.begin >= args.epochs:
        log.info(
            "alphas and betas never learn: --begin %d is not below --epochs %d, so the genotype "
            "is that of random alphas", args.begin, args.epochs,
        )  # fmt: skip


def report(run, args, lr, figures, model, held_out, imagenet=False):
    """What an epoch gave, in the log and the run's files; the genotype is that after the epoch
    (docs/differences.md, 5).

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
    parameters = multiply_adds = float("nan")
    try:
        parameters, multiply_adds = costs.derived_cost(genotype, imagenet)
    except (ValueError, RuntimeError) as error:  # of an operation that does not fit the size
        run.log.info("the cell makes no network of the published size (%s)", error)
    row = {
        "epoch": epoch + 1, "learning_rate": lr, **figures, "frozen": int(epoch < args.begin),
        **analysis.entropies(model), "skip_connects_normal": skips[0],
        "skip_connects_reduce": skips[1],
        "parameters_m": parameters, "multiply_adds_m": multiply_adds,
    }  # fmt: skip
    if args.validate:
        held = loops.evaluate(held_out, model, model._criterion, args, run.log, run)
        row |= {f"valid_{name}": held[name] for name in ("loss", "top1")}
        run.log.info(
            "supernet on the validation half: top-1 %.2f %%, loss %.4f", held["top1"], held["loss"]
        )
    if args.eigenvalue:
        row["eigenvalue"] = float("nan")
        if (epoch + 1) % args.eigenvalue == 0:
            row["eigenvalue"] = analysis.dominant_eigenvalue(model, *next(iter(held_out)))
            run.log.info("largest eigenvalue of the Hessian in alpha: %.4f", row["eigenvalue"])
    run.record(row, cell_line(model, genotype, epoch + 1))


def cell_line(model, genotype, epoch):
    """The line of genotypes.jsonl after an epoch: the cell, and the softmaxes that it is of."""
    line = {"epoch": epoch} | {name: list(value) for name, value in genotype._asdict().items()}
    for name, p in analysis.softmaxes(model).items():
        line[f"softmax_{name}"] = np.round(p.double().numpy(), 6).tolist()
    return line


def finish(run, args, model, held_out, images):
    """Evaluates the supernet on `held_out`, named `images`; saves its genotype and weights."""
    figures = loops.evaluate(held_out, model, model._criterion, args, run.log, run)
    run.log.info(
        "supernet on %s: top-1 %.2f %%, loss %.4f (this is not the final accuracy of the cell: "
        "train it for that)", images, figures["top1"], figures["loss"],
    )  # fmt: skip
    save(run, model, model.genotype(args.max_skip))


def save(run, model, genotype):
    """The end of a search: genotype.json, and weights.pt, which says that it is finished."""
    if distributed.is_main():
        text = genotypes.to_json(genotype, model.primitives)
        files.write(run.folder / "genotype.json", text.encode())
        files.save(model.state_dict(), run.folder / "weights.pt")
    run.log.info("genotype = %s", genotypes.text(genotype))
