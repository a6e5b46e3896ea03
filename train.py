"""Train a discrete network on CIFAR-size images and test it (PC-DARTS, section 4.2).

    python train.py --auxiliary --cutout               # PC_DARTS_cifar: the published recipe
    python train.py --arch search-EXP-20260101-120000  # the cell that a search found
    python train.py --arch "Genotype(normal=[...], ...)" --set folder --data DIR

The figure that counts is the test accuracy after the last epoch; published for PC_DARTS_cifar:
97.43 % (the best run). What was measured with this code stands in the README.
"""

import shlex

import torch
from torch import nn

import genotypes
import utils
from harness import costs, data, files, flags, loops, script
from harness.runs import Run, load_genotype
from model import build


def get_args():
    parser = flags.Parser(__doc__.split("\n")[0])
    flags.add_common_arguments(parser, batch_size=96)
    add = parser.add_argument
    add("--arch", default="PCDARTS", help="name in genotypes.py, genotype.json, run folder or text")
    add("--epochs", type=flags.count, default=600, help="epochs of the training images")
    add("--init_channels", type=flags.count, default=36, help="channels C of the first cell")
    add("--layers", type=flags.depth, default=20, help="cells")
    add("--stem", default="cifar", choices=["cifar", "imagenet"], help="imagenet: an eighth")
    add("--auxiliary", action="store_true", help="a second classifier at two thirds of the depth")
    add("--auxiliary_weight", type=flags.non_negative, default=0.4, help="of its loss")
    add("--drop_path_prob", type=flags.fraction, default=0.3, help="at the end; grows from 0")
    add("--learning_rate", type=flags.positive, default=0.025, help="at first (cosine to 0)")
    add("--momentum", type=flags.fraction, default=0.9, help="of SGD")
    add("--weight_decay", type=flags.non_negative, default=3e-4, help="of SGD")
    add("--grad_clip", type=flags.positive, default=5.0, help="norm of the gradient")
    add("--cutout", action="store_true", help="cut a square out of every training image")
    add("--cutout_length", type=flags.count, default=16, help="side of that square in pixels")
    add("--amp", action="store_true", help="bfloat16 where autocast has it: faster, rounds more")
    add("--save", default="EXP", help="name of the run: its folder is eval-NAME-DATE-TIME")
    flags.add_run_arguments(parser)
    return flags.parse_args(parser)


def main(args):
    genotype = load_genotype(args)
    device = flags.choose_device(args)
    utils.set_seed(args.seed, args.deterministic, args.detect_anomaly)

    dataset = data.load(args.set, args.data, args.input_size, args.mean, args.std)
    size = dataset.train.images.shape[1]
    train = data.Batches(
        dataset.train, dataset, args.batch_size, device, augment=True, shuffle=True,
        cutout_length=args.cutout_length * args.cutout, seed=args.seed, what="training images",
    )  # fmt: skip
    test = data.Batches(
        dataset.test, dataset, min(args.batch_size, len(dataset.test.labels)), device
    )

    criterion = nn.CrossEntropyLoss()
    with utils.user_errors(ValueError):
        model = build(
            genotype, args.init_channels, len(dataset.classes), args.layers, args.stem,
            args.auxiliary,
        )  # fmt: skip
        costs.check_size(model, size)
    model.to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": train}
    about = dict(classes=dataset.classes, mean=dataset.mean, std=dataset.std)
    about["parameters_m"] = utils.count_parameters_in_MB(model)
    run = Run("eval", args, device, parts, {"best": [0.0, 0], "tested": {}}, genotype, **about)
    if run.finished(args):
        return
    folder, log = run.folder, run.log
    log.info(
        "%s: %d classes, %d training and %d test images of %d x %d",
        args.set, len(dataset.classes), len(dataset.train.labels), len(dataset.test.labels),
        size, size,
    )  # fmt: skip
    log.info("network: %.6f M parameters", utils.count_parameters_in_MB(model))
    log.info("genotype = %s", genotypes.text(genotype))
    log.info("images of a class: %d to %d in training", *data.counts(dataset.train))
    flags.advise(log, args, 96, 0.025)

    for epoch in range(run.epoch, args.epochs):
        model.drop_path_prob = args.drop_path_prob * epoch / args.epochs
        lr = scheduler.get_last_lr()[0]
        figures = loops.train_epoch(train, model, criterion, optimizer, args, run)
        tested = loops.evaluate(test, model, criterion, args, log, run)
        scheduler.step()
        best = max(run.values["best"], [tested["top1"], epoch + 1], key=lambda pair: pair[0])
        log.info(
            "epoch %d of %d: lr %.5f, train loss %.4f, top-1 %.2f %%, test loss %.4f, "
            "top-1 %.2f %%, %.0f images/s, %.1f s, peak memory %.0f MiB",
            epoch + 1, args.epochs, lr, figures["loss"], figures["top1"], tested["loss"],
            tested["top1"], figures["images_per_second"], figures["seconds"], figures["memory_mib"],
        )  # fmt: skip
        tested = {f"test_{name}": tested[name] for name in ("loss", "top1", "top5")}
        row = {"epoch": epoch + 1, "learning_rate": lr, **figures, **tested}
        run.record(row)
        run.epoch_done(best=best, tested=tested)

    best, tested = run.values["best"], run.values["tested"]
    files.save(model.state_dict(), folder / "weights.pt")
    log.info("best epoch: %d with %.2f %% (chosen on the test images: not a result)", *best[::-1])
    log.info("test it again: python test.py --model_path %s", shlex.quote(str(folder)))
    log.info(
        "test accuracy after the last epoch: %.2f %% (error %.2f %%)",
        tested["test_top1"],
        100 - tested["test_top1"],
    )


if __name__ == "__main__":
    script.run(main, get_args)
