"""Train a discrete network on ImageNet (PC-DARTS, section 4.3).

    python train_imagenet.py --tmp_data_dir DIR --arch PC_DARTS_image --auxiliary
    torchrun --nproc_per_node 8 train_imagenet.py ...  # one process per GPU, on any number of nodes

DIR/imagenet/train and DIR/imagenet/val hold a folder for each class. Started plainly on several
GPUs it uses DataParallel. Published for PC_DARTS_image: 24.2 % top-1 and 7.3 % top-5 error. What
was measured with this code stands in docs/imagenet.md.
"""

import torch
from torch import nn

import utils
from harness import costs, distributed, files, flags, imagenet, loops, script, trainings, tuning
from harness.distributed import is_main
from harness.runs import Run, load_genotype
from model import NetworkImageNet


def get_args():
    parser = flags.Parser(__doc__)
    flags.add_imagenet_arguments(parser, workers=32)
    flags.add_learning_arguments(parser, epochs=250, init_channels=48, layers=14, learning_rate=0.5)
    flags.add_training_arguments(parser, weight_decay=3e-5, drop_path_prob=0.0)
    add = parser.add_argument
    add("--classes", type=flags.count, help="outputs; None: as many as there are class folders")
    add("--lr_scheduler", default="linear", choices=["linear", "cosine"], help="of learning_rate")
    add("--label_smooth", type=flags.fraction, default=0.1,
        help="share of the target that is spread evenly over all classes")  # fmt: skip
    parser.set_defaults(report_freq=100)
    return flags.parse_args(parser)


def main(args):
    genotype = load_genotype(args)
    device = distributed.start(args)
    utils.set_seed(args.seed, args.deterministic, args.detect_anomaly)
    train_images, val_images = imagenet.load(args.tmp_data_dir)
    classes = len(train_images.classes)
    if (args.classes or classes) < classes:
        raise utils.UserError(f"--classes {args.classes}: there are {classes} class folders")
    common = dict(batch_size=args.batch_size, device=device, workers=args.workers)
    train = imagenet.Loader(
        train_images.transformed(imagenet.train_transform(args.input_size, jitter=True)),
        **common, shuffle=True, seed=args.seed, what="training images",
    )  # fmt: skip
    common["batch_size"] = max(distributed.world_size(), min(args.batch_size, len(val_images)))
    val = imagenet.Loader(
        val_images.transformed(imagenet.test_transform(args.input_size)), **common
    )

    with utils.user_errors(ValueError):
        network = NetworkImageNet(
            args.init_channels, args.classes or classes, args.layers, args.auxiliary, genotype
        )
        fewest = distributed.fewest_on_one_device(train.smallest(), device, args)
        fewest = 2 if args.sync_bn else fewest
        costs.check_size(network, args.input_size, fewest)
    macs = [
        costs.multiply_adds(network, args.input_size, paper=paper) / 1e6 for paper in (False, True)
    ]
    network.to(device)
    images = distributed.on_one_device(args.batch_size, device, args), args.input_size
    # Before --sync_bn: the main process measures alone.
    layout = tuning.choose_layout(network, images, args, device)
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

    about = dict(classes=train_images.classes, images=imagenet.digest(train_images, val_images))
    about |= dict(mean=imagenet.MEAN, std=imagenet.STD)
    about |= dict(parameters_m=utils.count_parameters_in_MB(network), **layout)
    parts = {"model": network, "optimizer": optimizer, "loader": train}
    run = Run("eval", args, device, parts, trainings.START, genotype, **about)
    if run.finished(args):
        return
    log = run.log
    log.info(
        "%d classes, %d training and %d validation images; note: %s",
        classes, len(train_images), len(val_images), args.note,
    )  # fmt: skip
    more = ", %.2f M multiply-adds of convolutions and linear layers, %.2f M as the paper counts"
    more += " (with batch norms, ReLUs and pools)"
    trainings.introduce(run, network, genotype, more % tuple(macs))
    flags.advise(log, args, 1024, 0.5)
    tuning.introduce(log, layout)
    if args.compile:
        tuning.compile_cells(network, images, args, device, log)

    for epoch in range(run.epoch, args.epochs):
        network.drop_path_prob = args.drop_path_prob * epoch / args.epochs
        lr = loops.learning_rate(
            epoch, args.epochs, args.learning_rate, args.lr_scheduler, args.batch_size > 256
        )
        optimizer.param_groups[0]["lr"] = lr
        figures = loops.train_epoch(train, model, smooth, optimizer, args, run)
        distributed.broadcast(network.buffers())
        tested = loops.evaluate(val, distributed.for_evaluation(model), criterion, args, log, run)
        values = trainings.report(run, args, lr, figures, tested, "validation")
        if is_main() and values["best"][1] == epoch + 1:
            files.save(network.state_dict(), run.folder / "model_best.pt")
        run.epoch_done(**values)

    if is_main():
        files.save(network.state_dict(), run.folder / "weights.pt")
    trainings.conclude(run, "validation", "model_best.pt")


if __name__ == "__main__":
    script.run(main, get_args)
