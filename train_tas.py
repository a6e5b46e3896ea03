"""Train a CIFAR ResNet with the widths that a search found, and test it (TAS, section 3.2).

    python train_tas.py --arch unpruned --depth 56                # the teacher
    python train_tas.py --arch search-EXP-... --teacher eval-...  # the network of a search
    torchrun --nproc_per_node 2 train_tas.py ...                  # one process per GPU

With --teacher the network learns from the teacher's logits too (Hinton et al. 2015). The figure
that counts is the test accuracy after the last epoch; beside it stand parameters, multiply-adds
and the time on this device, against the unpruned network. What to expect stands in docs/tas.md.
"""

import json
from pathlib import Path

import torch
from torch import nn

import utils
from harness import data, distributed, files, flags, loops, script, trainings
from harness.runs import Run
from tas import found, shapes
from tas import loops as tas_loops
from tas.pictures import write_report


def get_args():
    parser = flags.Parser(__doc__)
    flags.add_common_arguments(parser, batch_size=256)
    add = parser.add_argument
    add("--arch", default="unpruned", help="tas.json, folder with one, its text, or unpruned")
    add("--depth", type=flags.depth, help="layers of --arch unpruned: 20, 32, 56, 110 or so")
    add("--teacher", metavar="RUN", help="folder of a training to distil from; None: no teacher")
    add("--temperature", type=flags.positive, default=4.0, help="T of the distillation")
    add("--distillation", type=flags.fraction, default=0.9, help="its share of the loss")
    add("--momentum", type=flags.fraction, default=0.9, help="of SGD (Nesterov)")
    add("--weight_decay", type=flags.non_negative, default=5e-4, help="of SGD")
    flags.add_cutout_arguments(parser)
    flags.add_run_arguments(parser, epochs=300, learning_rate=0.1)
    parser.set_defaults(grad_clip=None)
    return flags.parse_args(parser)


def main(args):
    device = distributed.start(args)
    utils.set_seed(args.seed, args.deterministic, args.detect_anomaly)
    # On a resume the run's own, whatever --arch and --teacher have come to mean. Before the data is
    # read, so that what is wrong is said at once.
    network = found.load(own(args, found.NAME) or args.arch, args.depth)

    dataset = data.load(args.set, args.data, args.input_size, args.mean, args.std)
    size, classes = dataset.train.images.shape[1], len(dataset.classes)
    train = data.Batches(
        dataset.train, dataset, args.batch_size, device, augment=True, shuffle=True,
        cutout_length=args.cutout_length * args.cutout, seed=args.seed, what="training images",
    )  # fmt: skip
    test = data.Batches(
        dataset.test, dataset, min(args.batch_size, len(dataset.test.labels)), device
    )
    with utils.user_errors(ValueError):
        shapes.check_images((size, size))
    network = network.on(classes, size)
    teacher = None
    if args.teacher is not None:
        with torch.random.fork_rng(devices=[]):  # the student is the same without a teacher
            teacher = found.load_trained(own(args, "teacher") or args.teacher, dataset)
        teacher.to(device).eval()

    pruned = network.network().to(device)
    model, forward = distributed.wrap(pruned, device, args), tas_loops.taught_by(teacher)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(
        pruned.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay,
        nesterov=args.momentum > 0,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    parts = {"model": pruned, "optimizer": optimizer, "scheduler": scheduler, "loader": train}
    about = dict(classes=dataset.classes, images=data.digest(dataset))
    about |= dict(mean=dataset.mean, std=dataset.std)
    about |= dict(parameters_m=utils.count_parameters_in_MB(pruned))

    def begin(folder):
        network.save(folder / found.NAME)
        if teacher is not None:
            found.keep(args.teacher, folder / "teacher")

    run = Run(
        "eval", args, device, parts, trainings.START, begin=begin, write_report=write_report,
        **about,
    )  # fmt: skip
    if run.finished(args):
        return
    introduce(run.log, args, dataset, network, teacher)

    for _ in range(run.epoch, args.epochs):
        lr = scheduler.get_last_lr()[0]
        figures = loops.train_epoch(train, model, criterion, optimizer, args, run, forward)
        distributed.broadcast(pruned.buffers())
        tested = loops.evaluate(test, pruned, criterion, args, run.log, run)
        values = trainings.report(run, args, lr, figures, tested, "test")
        scheduler.step()
        run.epoch_done(**values)

    if distributed.is_main():
        compare(run, network, pruned, size, device)
        files.save(pruned.state_dict(), run.folder / "weights.pt")  # the last: it says finished
        trainings.conclude(run, "test")


def own(args, name):
    """A file of the run that is resumed, as text; None of a new run, or where it is not there."""
    path = Path(args.resume or "", name)
    return str(path) if args.resume and path.exists() else None


def introduce(log, args, dataset, network, teacher):
    """The first lines of a training's log."""
    size = network.size
    log.info(
        "%s: %d classes, %d training and %d test images of %d x %d",
        args.set, len(dataset.classes), len(dataset.train.labels), len(dataset.test.labels),
        size, size,
    )  # fmt: skip
    log.info("network = %s", network.text())
    if teacher is not None:
        how = args.teacher, args.temperature, args.distillation
        log.info("teacher: %s, temperature %g, share of the loss %g", *how)
    log.info("images of a class: %d to %d in training", *data.counts(dataset.train))
    flags.advise(log, args, 256, 0.1)


def compare(run, network, model, size, device):
    """What the network costs beside the unpruned one, in the log and in result.json."""
    log = run.log
    whole = found.load("unpruned", network.depth, network.num_classes, size)
    unpruned = whole.network().to(device)
    counts = [utils.count_parameters_in_MB(each) for each in (model, unpruned)]
    adds = network.multiply_adds, whole.multiply_adds
    log.info(
        "parameters: %.6f M of %.6f M unpruned (%.1f %%); "
        "multiply-adds: %.3f M of %.3f M (%.1f %%)",
        *counts, 100 * counts[0] / counts[1], *adds, 100 * adds[0] / adds[1],
    )  # fmt: skip
    if network.blocks is not None:
        log.info(
            "%.3f M multiply-adds as built: where blocks are dropped the published count takes the "
            "width of the stage's last block, though that is dropped", network.as_built(),
        )  # fmt: skip
    row = {"parameters_m": counts, "multiply_adds_m": adds, "latency_ms": {}}
    row |= run.values["tested"]
    for n in (1, 64):
        images = torch.zeros(n, 3, size, size, device=device)
        images = images.contiguous(memory_format=torch.channels_last)  # as the loader gives them
        (low, time, high), (whole_low, whole_time, whole_high) = tas_loops.latencies(
            [model, unpruned], images
        )
        row["latency_ms"][n] = time, whole_time
        log.info(
            "latency of %d image%s: %.2f ms (half of the passes %.2f to %.2f), unpruned %.2f ms "
            "(%.2f to %.2f), %.2f times as fast (%s)", n, "s" * (n > 1), time, low, high,
            whole_time, whole_low, whole_high, whole_time / time, flags.describe(device),
        )  # fmt: skip
    files.write(run.folder / "result.json", (json.dumps(row, indent=2) + "\n").encode())


if __name__ == "__main__":
    script.run(main, get_args)
