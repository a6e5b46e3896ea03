"""Search the widths, and depths, of a CIFAR ResNet (TAS: Dong and Yang, NeurIPS 2019).

    python train_search_tas.py --depth 56 --flop_ratio 0.47 --search_depth  # as published
    python train_search_tas.py --set digits --epochs 30 --batch_size 64   # needs no download
    python train_search_tas.py --search_depth ...             # the numbers of blocks too
    torchrun --nproc_per_node 2 train_search_tas.py ...       # one process per GPU

Each step updates the weights on a batch of one half of the training images, then the attentions
on one of the other half, with a cost that drives the multiply-adds to --flop_ratio of the unpruned
network's. Prints the network as one line of JSON and leaves it in tas.json, which
`train_tas.py --arch RUN` trains. What to expect stands in docs/tas.md.
"""

import shlex

import torch

import utils
from harness import data, distributed, files, flags, script
from harness.runs import Run
from tas import SearchNetwork, found, full_channels, losses, multiply_adds, shapes, smallest_ratio
from tas import loops as tas_loops
from tas.pictures import write_report

ratio = flags.number(float, 0, 1, above=True)
temperature = flags.number(float, 1e-3, 1e3)
SCHEDULES = {"linear": losses.linear_temperature, "cosine": losses.cosine_temperature}


def get_args():
    parser = flags.Parser(__doc__)
    flags.add_common_arguments(parser, batch_size=256)
    add = parser.add_argument
    add("--depth", type=flags.depth, default=20, help="layers: 20, 32, 56, 110 or another 6n + 2")
    add("--flop_ratio", type=ratio, default=0.5, help="multiply-adds wanted, of the unpruned ones")
    add("--search_depth", action="store_true", help="search the numbers of blocks too")
    add("--tau_max", type=temperature, default=10.0, help="temperature of the draw, at first")
    add("--tau_min", type=temperature, default=0.1, help="and in the last epoch")
    add("--tau_schedule", default="linear", choices=list(SCHEDULES),
        help="between them; linear: as in the paper, cosine: as in the released code")  # fmt: skip
    add("--flop_weight", type=flags.non_negative, default=2.0, help="of the cost of multiply-adds")
    add("--tolerance", type=flags.fraction, default=0.05,
        help="multiply-adds below the target that cost nothing, of the unpruned ones")  # fmt: skip
    add("--momentum", type=flags.fraction, default=0.9, help="of the weights' SGD (Nesterov)")
    add("--weight_decay", type=flags.non_negative, default=5e-4, help="of the weights' SGD")
    add("--arch_learning_rate", type=flags.positive, default=1e-3, help="of the attentions' Adam")
    add("--arch_weight_decay", type=flags.non_negative, default=1e-3, help="of the attentions")
    add("--train_portion", type=flags.fraction, default=0.5, help="share of the weights' images")
    flags.add_run_arguments(parser, epochs=600, learning_rate=0.1)
    parser.set_defaults(grad_clip=None)
    return flags.parse_args(parser)


def main(args):
    device = distributed.start(args)
    utils.set_seed(args.seed, args.deterministic, args.detect_anomaly)
    with utils.user_errors(ValueError):
        shapes.blocks_per_stage(args.depth)
    if args.tau_min > args.tau_max:
        above = f"--tau_min {args.tau_min} is above --tau_max {args.tau_max}"
        raise utils.UserError(f"{above}: lower it")

    dataset = data.load(args.set, args.data, args.input_size, args.mean, args.std)
    size, classes = dataset.train.images.shape[1], len(dataset.classes)
    weight_half, arch_half = data.halves(dataset.train, args.train_portion)
    common = dict(dataset=dataset, batch_size=args.batch_size, device=device)
    common |= dict(augment=True, shuffle=True)
    train = data.Batches(weight_half, **common, seed=args.seed, what="weights' half")
    valid = data.Batches(arch_half, **common, seed=args.seed + 1, what="attentions' half")

    with utils.user_errors(ValueError):
        shapes.check_images((size, size))
        least = smallest_ratio(args.depth, classes, args.search_depth, (size, size))
        unpruned = multiply_adds(args.depth, full_channels(args.depth), classes, None, (size, size))
    if args.flop_ratio < least:
        hint = "" if args.search_depth else "; --search_depth reaches less"
        raise utils.UserError(
            f"--flop_ratio {args.flop_ratio} is below the smallest network of the search space: "
            f"give {least + 5e-5:.4f} or more{hint}"
        )
    model = SearchNetwork(args.depth, classes, args.search_depth).to(device)
    distributed.broadcast([*model.parameters(), *model.buffers()])
    optimizer = torch.optim.SGD(
        model.weights(), args.learning_rate, args.momentum, weight_decay=args.weight_decay,
        nesterov=args.momentum > 0,
    )  # fmt: skip
    arch_optimizer = torch.optim.Adam(
        model.arch_parameters(), args.arch_learning_rate, (0.5, 0.999),
        weight_decay=args.arch_weight_decay,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    parts = {"model": model, "optimizer": optimizer, "arch_optimizer": arch_optimizer}
    parts |= {"scheduler": scheduler, "loader": train, "valid_loader": valid}
    about = dict(classes=dataset.classes, images=data.digest(dataset))
    about |= dict(full_channels=full_channels(args.depth))
    run = Run("search", args, device, parts, write_report=write_report, **about)
    if run.finished(args):
        return
    tas_loops.same_draws(device)
    run.log.info(
        "%s: %d classes, %d and %d training images of %d x %d; depth %d: %.2f M multiply-adds "
        "unpruned, target %.2f M",
        args.set, classes, len(weight_half.labels), len(arch_half.labels), size, size, args.depth,
        unpruned, args.flop_ratio * unpruned,
    )  # fmt: skip
    flags.advise(run.log, args, 256, 0.1)

    batches = valid.forever()
    for epoch in range(run.epoch, args.epochs):
        tau = SCHEDULES[args.tau_schedule](epoch, args.epochs, args.tau_max, args.tau_min)
        lr = scheduler.get_last_lr()[0]
        figures = tas_loops.search_epoch(
            train, batches, model, optimizer, arch_optimizer, tau, unpruned, args, run
        )
        scheduler.step()
        tas_loops.check_same(model, device)
        distributed.broadcast(model.buffers())
        report(run, args, lr, tau, figures, model, unpruned, size)
        run.epoch_done()

    network = found.describe(
        args.depth, *model.derive(), classes, size, round(args.flop_ratio * unpruned, 6)
    )
    if distributed.is_main():
        network.save(run.folder / found.NAME)
        files.save(model.state_dict(), run.folder / "weights.pt")
    run.log.info("network = %s", network.text())
    run.log.info(
        "train it: python train_tas.py --arch %s%s --batch_size %d",
        shlex.quote(str(run.folder)), flags.same_data(args), args.batch_size,
    )  # fmt: skip


@torch.no_grad()
def report(run, args, lr, tau, figures, model, unpruned, size):
    """What an epoch gave, in the log and the run's files; the widths are those after it."""
    channels, blocks = model.derive()
    expected = model.expected_multiply_adds((size, size)).item()
    actual = multiply_adds(
        args.depth, channels, model.classifier.out_features, blocks, (size, size)
    )
    target = args.flop_ratio * unpruned
    softmaxes = [attentions.softmax(1).cpu() for attentions in model.arch_parameters()]
    largest = torch.cat([p.amax(1) for p in softmaxes])
    entropy = torch.cat([torch.special.entr(p).sum(1) for p in softmaxes]).mean().item()
    run.log.info(
        "epoch %d of %d: lr %.5f, tau %.3f, train loss %.4f, top-1 %.2f %%, multiply-adds %.3f M "
        "expected, %.3f M by argmax, target %.3f M, largest probabilities %.3f to %.3f, entropy "
        "%.3f, %.0f images/s, %.1f s, peak memory %.0f MiB",
        run.epoch + 1, args.epochs, lr, tau, figures["loss"], figures["top1"], expected,
        actual, target, largest.min(), largest.max(), entropy, figures["images_per_second"],
        figures["seconds"], figures["memory_mib"],
    )  # fmt: skip
    depths = "" if blocks is None else f", blocks {blocks}"
    run.log.info("widths by argmax: %s%s", " ".join(map(str, channels)), depths)
    run.log.info("largest probabilities: %s", " ".join(f"{p:.3f}" for p in largest.tolist()))
    row = {"epoch": run.epoch + 1, "learning_rate": lr, "tau": tau, **figures}
    row |= {"expected_m": expected, "argmax_m": actual, "target_m": target, "entropy": entropy}
    row |= {"probability_min": largest.min().item(), "probability_mean": largest.mean().item()}
    widths = {"epoch": run.epoch + 1, "channels": channels, "blocks": blocks}
    names = ("softmax_widths", "softmax_depths")
    rounded = [(p.double() * 1e6).round().div(1e6).tolist() for p in softmaxes]
    run.record(row, widths=widths | dict(zip(names, rounded, strict=False)))


if __name__ == "__main__":
    script.run(main, get_args)
