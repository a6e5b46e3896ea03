"""Train a discrete network on CIFAR-size images and test it (PC-DARTS, section 4.2).

    python train.py --auxiliary --cutout               # PC_DARTS_cifar: the published recipe
    python train.py --arch search-EXP-20260101-120000  # the cell that a search found
    python train.py --arch "Genotype(normal=[...], ...)" --set folder --data DIR

The figure that counts is the test accuracy after the last epoch; published for PC_DARTS_cifar:
97.43 % (an error of 2.57 ± 0.07 %, table 1). What was measured with this code: docs/evidence.md.
"""

import shlex

import torch
from torch import nn

import utils
from harness import costs, data, distributed, files, flags, loops, script, trainings, tuning
from harness.runs import Run, load_genotype
from model import build


def get_args():
    parser = flags.Parser(__doc__)
    flags.add_common_arguments(parser, batch_size=96)
    flags.add_learning_arguments(
        parser, epochs=600, init_channels=36, layers=20, learning_rate=0.025
    )
    flags.add_training_arguments(parser, weight_decay=3e-4, drop_path_prob=0.3)
    flags.add_cutout_arguments(parser)
    flags.add_stem_argument(parser)
    return flags.parse_args(parser)


def main(args):
    genotype = load_genotype(args)
    device = distributed.alone(args)
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
        costs.check_size(model, size, train.smallest())
    model.to(device)
    layout = tuning.choose_layout(model, (args.batch_size, size), args, device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": train}
    about = dict(classes=dataset.classes, images=data.digest(dataset))
    about |= dict(mean=dataset.mean, std=dataset.std)
    about |= dict(parameters_m=utils.count_parameters_in_MB(model), **layout)
    run = Run("eval", args, device, parts, trainings.START, genotype, **about)
    if run.finished(args):
        return
    log = run.log
    log.info(
        "%s: %d classes, %d training and %d test images of %d x %d",
        args.set, len(dataset.classes), len(dataset.train.labels), len(dataset.test.labels),
        size, size,
    )  # fmt: skip
    trainings.introduce(run, model, genotype)
    log.info("images of a class: %d to %d in training", *data.counts(dataset.train))
    flags.advise(log, args, 96, 0.025)
    tuning.introduce(log, layout)
    if args.compile:
        tuning.compile_cells(model, (args.batch_size, size), args, device, log)

    for epoch in range(run.epoch, args.epochs):
        model.drop_path_prob = args.drop_path_prob * epoch / args.epochs
        lr = scheduler.get_last_lr()[0]
        figures = loops.train_epoch(train, model, criterion, optimizer, args, run)
        tested = loops.evaluate(test, model, criterion, args, log, run)
        values = trainings.report(run, args, lr, figures, tested, "test")
        scheduler.step()
        run.epoch_done(**values)

    files.save(model.state_dict(), run.folder / "weights.pt")
    log.info("test it again: python test.py --model_path %s", shlex.quote(str(run.folder)))
    trainings.conclude(run, "test")


if __name__ == "__main__":
    script.run(main, get_args)
