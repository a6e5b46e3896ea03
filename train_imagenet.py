"""Train a discrete network on ImageNet (PC-DARTS, section 4.3).

    python train_imagenet.py --tmp_data_dir DIR --arch PC_DARTS_image --auxiliary
    torchrun --nproc_per_node 8 train_imagenet.py ...  # one process per GPU, on any number of nodes

DIR/imagenet/train and DIR/imagenet/val hold a folder for each class. Started plainly on several
GPUs it uses DataParallel. Published for PC_DARTS_image: 24.2 % top-1 and 7.3 % top-5 error. What
was measured with this code stands in the README.
"""

import torch
from torch import nn

import genotypes
import utils
from harness import costs, distributed, files, flags, imagenet, loops, script
from harness.distributed import is_main
from harness.runs import Run, load_genotype
from model import NetworkImageNet


def get_args():
    parser = flags.Parser(__doc__.split("\n")[0])
    flags.add_imagenet_arguments(parser, init_channels=48, layers=14, epochs=250)
    add = parser.add_argument
    add("--arch", default="PCDARTS", help="name in genotypes.py, genotype.json, run folder or text")
    add("--classes", type=flags.count, help="outputs; None: as many as there are class folders")
    add("--lr_scheduler", default="linear", choices=["linear", "cosine"], help="of learning_rate")
    add("--weight_decay", type=flags.non_negative, default=3e-5, help="of SGD")
    add("--label_smooth", type=flags.fraction, default=0.1, help="share of the other classes")
    add("--auxiliary", action="store_true", help="a second classifier at two thirds of the depth")
    add("--auxiliary_weight", type=flags.non_negative, default=0.4, help="of its loss")
    add("--drop_path_prob", type=flags.fraction, default=0.0, help="at the end; grows from 0")
    add(
        "--workers",
        type=flags.natural,
        default=32,
        help="processes that read images, of each GPU",
    )
    add("--seed", type=flags.natural, default=0, help="of every random number")
    return flags.parse_args(parser)


def main(args):
    genotype = load_genotype(args)
    device = distributed.start(args)
    utils.set_seed(args.seed, args.deterministic, args.detect_anomaly)
    train_images, val_images = imagenet.load(args.tmp_data_dir)
    classes = len(train_images.classes)
    if (args.classes or classes) < classes:
        raise utils.UserError(f"--classes {args.classes}: there are {classes} class folders")
    loader = dict(batch_size=args.batch_size, device=device, workers=args.workers)
    train = imagenet.Loader(
        train_images.transformed(imagenet.train_transform(args.input_size, jitter=True)),
        **loader, shuffle=True, seed=args.seed, what="training images",
    )  # fmt: skip
    loader["batch_size"] = max(distributed.world_size(), min(args.batch_size, len(val_images)))
    val = imagenet.Loader(
        val_images.transformed(imagenet.test_transform(args.input_size)), **loader
    )

    with utils.user_errors(ValueError):
        network = NetworkImageNet(
            args.init_channels, args.classes or classes, args.layers, args.auxiliary, genotype
        )
        fewest = 2 if args.sync_bn else train.smallest()
        costs.check_size(network, args.input_size, fewest)
    macs = [
        costs.multiply_adds(network, args.input_size, paper=paper) / 1e6 for paper in (False, True)
    ]
    network.to(device)
    if args.sync_bn:
        network = distributed.synchronized(network, device)
    model = distributed.wrap(network, device, args)
    criterion = nn.CrossEntropyLoss()
    smooth = nn.CrossEntropyLoss(label_smoothing=args.label_smooth)
    optimizer = torch.optim.SGD(
        network.parameters(),
        args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
    )

    about = dict(classes=train_images.classes, mean=imagenet.MEAN, std=imagenet.STD)
    about["parameters_m"] = utils.count_parameters_in_MB(network)
    parts = {"model": network, "optimizer": optimizer, "loader": train}
    run = Run("eval", args, device, parts, {"best": [0.0, 0], "tested": {}}, genotype, **about)
    if run.finished(args):
        return
    folder, log = run.folder, run.log
    log.info(
        "%d classes, %d training and %d validation images; note: %s",
        classes, len(train_images), len(val_images), args.note,
    )  # fmt: skip
    log.info(
        "network: %.6f M parameters, %.2f M multiply-adds of convolutions and linear layers, "
        "%.2f M as the paper counts (with batch norms, ReLUs and pools)",
        utils.count_parameters_in_MB(network), *macs,
    )  # fmt: skip
    log.info("genotype = %s", genotypes.text(genotype))
    flags.advise(log, args, 1024, 0.5)

    for epoch in range(run.epoch, args.epochs):
        network.drop_path_prob = args.drop_path_prob * epoch / args.epochs
        lr = loops.learning_rate(
            epoch, args.epochs, args.learning_rate, args.lr_scheduler, args.batch_size > 256
        )
        optimizer.param_groups[0]["lr"] = lr
        figures = loops.train_epoch(train, model, smooth, optimizer, args, run)
        distributed.broadcast(network.buffers())
        tested = loops.evaluate(val, distributed.for_evaluation(model), criterion, args, log, run)
        best = max(run.values["best"], [tested["top1"], epoch + 1], key=lambda pair: pair[0])
        if is_main():
            report(run, args, lr, figures, tested)
            if best[1] == epoch + 1:
                files.save(network.state_dict(), folder / "model_best.pt")
        tested = {name: tested[name] for name in ("loss", "top1", "top5")}
        run.epoch_done(best=best, tested=tested)

    if is_main():
        files.save(network.state_dict(), folder / "weights.pt")
    best, last = run.values["best"], run.values["tested"]
    log.info(
        "best epoch: %d with top-1 %.2f %%: model_best.pt (chosen on these images: not a result)",
        *best[::-1],
    )  # fmt: skip
    log.info(
        "after the last epoch: top-1 %.2f %%, top-5 %.2f %% (errors %.2f %%, %.2f %%)",
        last["top1"], last["top5"], 100 - last["top1"], 100 - last["top5"],
    )  # fmt: skip


def report(run, args, lr, figures, tested):
    """What an epoch gave, in the log and metrics.csv."""
    epoch = run.epoch
    run.log.info(
        "epoch %d of %d: lr %.5f, train loss %.4f, top-1 %.2f %%, validation loss %.4f, top-1 "
        "%.2f %%, top-5 %.2f %%, %.0f images/s, %.1f s, peak memory %.0f MiB",
        epoch + 1, args.epochs, lr, figures["loss"], figures["top1"], tested["loss"],
        tested["top1"], tested["top5"],
        figures["images_per_second"], figures["seconds"], figures["memory_mib"],
    )  # fmt: skip
    tested = {f"val_{name}": tested[name] for name in ("loss", "top1", "top5")}
    row = {"epoch": epoch + 1, "learning_rate": lr, **figures, **tested}
    run.record(row)


if __name__ == "__main__":
    script.run(main, get_args)
