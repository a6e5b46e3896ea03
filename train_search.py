"""Search a cell on CIFAR-size images with PC-DARTS (Xu et al., ICLR 2020, section 3).

    python train_search.py                          # CIFAR-10, the published setting, on one GPU
    python train_search.py --set digits             # needs no download
    python train_search.py --set folder --data DIR  # DIR/train/CLASS/*.png, DIR/test/CLASS/*.png

Alphas and betas stay frozen for --begin epochs; then each step updates them on a batch of the
validation half, and the weights on one of the training half. Prints the genotype, which
`train.py --arch RUN` trains. What was measured with this code stands in the README.
"""

import shlex
import sys

import numpy as np
import torch
from torch import nn

import fused
import genotypes
import utils
from architect import Architect
from harness import analysis, costs, data, files, flags, loops, script
from harness.runs import Run
from model_search import Network

DARTS = dict(k=1, no_edge_norm=True, batch_size=64, learning_rate=0.025, arch_learning_rate=3e-4)
DARTS["begin"] = 0


def flags_of(defaults):
    return " ".join(f"--{k}" + ("" if v is True else f" {v}") for k, v in defaults.items())


def get_args():
    parser = flags.Parser(__doc__.split("\n")[0])
    flags.add_common_arguments(parser, batch_size=256)
    parser.set_defaults(seed=2)
    add = parser.add_argument
    add("--epochs", type=flags.count, default=50, help="epochs of the training half")
    add("--begin", type=flags.natural, default=15, help="epochs before alphas and betas move")
    add("--init_channels", type=flags.count, default=16, help="channels C of the first cell")
    add("--layers", type=flags.depth, default=8, help="cells")
    add("--k", type=flags.count, default=4, help="1/k of the channels go through the operations")
    flags.add_variant_arguments(parser)
    add("--learning_rate", type=flags.positive, default=0.1, help="of the weights, at first")
    add("--learning_rate_min", type=flags.non_negative, default=0.0, help="and at last (cosine)")
    add("--momentum", type=flags.fraction, default=0.9, help="of the weights' SGD")
    add("--weight_decay", type=flags.non_negative, default=3e-4, help="of the weights' SGD")
    add("--grad_clip", type=flags.positive, default=5.0, help="norm of the weights' gradient")
    add("--arch_learning_rate", type=flags.positive, default=6e-4, help="of alphas and betas")
    add("--arch_weight_decay", type=flags.non_negative, default=1e-3, help="of alphas and betas")
    add("--unrolled", action="store_true", help="second-order gradient of alphas and betas")
    add("--train_portion", type=flags.fraction, default=0.5, help="share of the weights' images")
    add("--cutout", action="store_true", help="cut a square out of every image")
    add("--cutout_length", type=flags.count, default=16, help="side of that square in pixels")
    add("--amp", action="store_true", help="bfloat16 where autocast has it: faster, rounds more")
    add("--recompute", action="store_true", help="keep 40 %% less memory for the backward pass")
    add("--no_cuda_graph", action="store_true", help="launch every kernel of a step by itself")
    add(
        "--stem", default="cifar", choices=["cifar", "imagenet"], help="imagenet: an eighth in size"
    )
    add("--darts", action="store_true", help="the defaults of DARTS: " + flags_of(DARTS))
    add("--save", default="EXP", help="name of the run: its folder is search-NAME-DATE-TIME")
    flags.add_run_arguments(parser)
    if "--darts" in sys.argv[1:]:
        parser.set_defaults(**DARTS)
    return flags.parse_args(parser)


def main(args):
    device = flags.choose_device(args)
    utils.set_seed(args.seed, args.deterministic, args.detect_anomaly)

    dataset = data.load(args.set, args.data, args.input_size, args.mean, args.std)
    train_half, valid_half = data.halves(dataset.train, args.train_portion)
    common = dict(dataset=dataset, batch_size=args.batch_size, device=device)
    search = dict(augment=True, shuffle=True, cutout_length=args.cutout_length * args.cutout)
    train = data.Batches(train_half, **common, **search, seed=args.seed, what="training half")
    valid = data.Batches(valid_half, **common, **search, seed=args.seed + 1, what="validation half")
    held_out = data.Batches(valid_half, **common, what="validation half")

    criterion = nn.CrossEntropyLoss()
    with utils.user_errors(ValueError):
        model = Network(
            args.init_channels, len(dataset.classes), args.layers, criterion, **variant(args),
            stem=args.stem,
        ).to(device)  # fmt: skip
        costs.check_size(model, dataset.train.images.shape[1])
    optimizer = torch.optim.SGD(
        model.weights(),
        args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
    )
    architect = Architect(model, args)
    gradients = fused.Gradients(model, criterion, args.amp, not args.no_cuda_graph)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, args.epochs, args.learning_rate_min
    )

    parts = {"model": model, "optimizer": optimizer, "architect": architect.optimizer}
    parts |= {"scheduler": scheduler, "loader": train, "valid_loader": valid}
    about = dict(classes=dataset.classes, primitives=model.primitives)
    run = Run("search", args, device, parts, **about)
    if run.finished(args):
        return
    folder, log = run.folder, run.log
    log.info(
        "%s: %d classes, %d training and %d validation images of %d x %d",
        args.set, len(dataset.classes), *(len(half.labels) for half in (train_half, valid_half)),
        *train_half.images.shape[1:3],
    )  # fmt: skip
    log.info("images of a class: %d to %d in the training half", *data.counts(train_half))
    introduce(log, args, model)
    if not args.darts:
        flags.advise(log, args, 256, 0.1)

    batches = valid.forever()
    for epoch in range(run.epoch, args.epochs):
        frozen = epoch < args.begin
        lr = scheduler.get_last_lr()[0]
        figures = loops.search_epoch(
            train, batches, model, gradients, architect, optimizer, args, frozen, run
        )
        scheduler.step()
        report(run, args, lr, figures, model, held_out)
        run.epoch_done()

    figures = loops.evaluate(held_out, model, criterion, args, log, run)
    log.info(
        "supernet on the validation half: top-1 %.2f %%, loss %.4f "
        "(this is not the final accuracy of the cell: train it for that)",
        figures["top1"],
        figures["loss"],
    )
    genotype = model.genotype(args.max_skip)
    genotypes.save(genotype, folder / "genotype.json", model.primitives)
    files.save(model.state_dict(), folder / "weights.pt")
    log.info("genotype = %s", genotypes.text(genotype))
    more = recipe(args, train_half)
    log.info("train it: python train.py --arch %s%s", shlex.quote(str(folder)), more)


def variant(args):
    """The arguments of the supernet that its variants differ in."""
    names = args.primitives and args.primitives.split(",")
    if names and (len(set(names)) < len(names) or set(names) == {"none"}):
        raise utils.UserError(f"--primitives {args.primitives}: give each once, and more than none")
    return dict(
        k=args.k, edge_norm=not args.no_edge_norm, steps=args.steps, multiplier=args.steps,
        sampling=args.sampling, primitives=names,
        recompute=args.recompute,
    )  # fmt: skip


def recipe(args, images):
    """The further flags of the command that trains the cell on the same data."""
    more = " --auxiliary --cutout" if images.images.shape[1] >= 32 else ""  # too small for a head
    more += "" if args.set == "cifar10" else f" --set {args.set}"
    more += (
        ""
        if args.data == "../data" or args.set == "digits"
        else f" --data {shlex.quote(args.data)}"
    )
    return more + (f" --input_size {args.input_size}" if args.input_size else "")


def introduce(log, args, model):
    """The first lines of a search's log about its supernet."""
    log.info("supernet: %.6f M weights, K = %d", utils.count_parameters_in_MB(model), args.k)
    if args.begin >= args.epochs:
        log.info(
            "alphas and betas never learn: --begin %d is not below --epochs %d, so the genotype "
            "is that of random alphas", args.begin, args.epochs,
        )  # fmt: skip


def report(run, args, lr, figures, model, held_out, imagenet=False):
    """What an epoch gave, in the log and the run's files; the genotype is that after the epoch.

    held_out: a loader of validation images, for --eigenvalue.
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


if __name__ == "__main__":
    script.run(main, get_args)
