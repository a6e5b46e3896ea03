"""Search a cell on CIFAR-size images with PC-DARTS (Xu et al., ICLR 2020, section 3).

    python train_search.py                          # CIFAR-10, the published setting, on one GPU
    python train_search.py --set digits             # needs no download
    python train_search.py --set folder --data DIR  # DIR/train/CLASS/*.png, DIR/test/CLASS/*.png

Each step (architect.search_step) updates the weights on a batch of the training half; after
--begin epochs it first updates alphas and betas on one of the validation half. Prints the
genotype, which `train.py --arch RUN` trains. What was measured with this code: docs/evidence.md.
"""

import shlex
import sys

import torch
from torch import nn

import fused
import utils
from architect import Architect
from harness import costs, data, distributed, flags, forms, loops, script, searches
from harness.runs import Run

DARTS = dict(k=1, no_edge_norm=True, batch_size=64, learning_rate=0.025, learning_rate_min=0.001)
DARTS |= dict(arch_learning_rate=3e-4, begin=0)


def flags_of(defaults):
    return " ".join(f"--{k}" + ("" if v is True else f" {v}") for k, v in defaults.items())


def get_args():
    parser = flags.Parser(__doc__)
    flags.add_common_arguments(parser, batch_size=256)
    flags.add_learning_arguments(parser, epochs=50, init_channels=16, layers=8, learning_rate=0.1)
    flags.add_search_arguments(parser, begin=15, k=4, arch_learning_rate=6e-4)
    flags.add_cutout_arguments(parser)
    parser.set_defaults(seed=2)
    add = parser.add_argument
    add("--train_portion", type=flags.fraction, default=0.5,
        help="share of the training images that train the weights; the others train alphas and "
        "betas")  # fmt: skip
    flags.add_stem_argument(parser)
    add("--darts", action="store_true", help="the defaults of DARTS: " + flags_of(DARTS))
    if "--darts" in sys.argv[1:]:
        parser.set_defaults(**DARTS)
    return flags.parse_args(parser)


def main(args):
    device = distributed.alone(args)
    utils.set_seed(args.seed, args.deterministic, args.detect_anomaly)

    dataset = data.load(args.set, args.data, args.input_size, args.mean, args.std)
    train_half, valid_half = data.halves(dataset.train, args.train_portion)
    common = dict(dataset=dataset, batch_size=args.batch_size, device=device)
    augmented = dict(augment=True, shuffle=True, cutout_length=args.cutout_length * args.cutout)
    train = data.Batches(train_half, **common, **augmented, seed=args.seed, what="training half")
    valid = data.Batches(
        valid_half, **common, **augmented, seed=args.seed + 1, what="validation half"
    )
    held_out = data.Batches(valid_half, **common, what="validation half")

    criterion = nn.CrossEntropyLoss()
    with utils.user_errors(ValueError):
        model = searches.supernet(args, len(dataset.classes), criterion, args.stem)
        fewest = min(train.smallest(), valid.smallest())
        costs.check_size(model, dataset.train.images.shape[1], fewest)
    shape = args.batch_size, dataset.train.images.shape[1]
    model, measured = forms.choose(model, args, device, shape)
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
    about = dict(classes=dataset.classes, images=data.digest(dataset), primitives=model.primitives)
    run = Run("search", args, device, parts, **about)
    if run.finished(args):
        return
    log = run.log
    log.info(
        "%s: %d classes, %d training and %d validation images of %d x %d",
        args.set, len(dataset.classes), *(len(half.labels) for half in (train_half, valid_half)),
        *train_half.images.shape[1:3],
    )  # fmt: skip
    log.info("images of a class: %d to %d in the training half", *data.counts(train_half))
    searches.introduce(log, args, model, measured)
    if not args.darts:
        flags.advise(log, args, 256, 0.1)

    batches = valid.forever()
    for epoch in range(run.epoch, args.epochs):
        frozen = epoch < args.begin
        lr = scheduler.get_last_lr()[0]
        figures = loops.search_epoch(
            train, batches, model, gradients, architect, optimizer, args, frozen, run
        )
        searches.report(run, args, lr, figures, model, held_out)
        scheduler.step()
        run.epoch_done()

    searches.finish(run, args, model, held_out, "the validation half")
    more = flags.same_data(args) + " --stem imagenet" * (args.stem == "imagenet")
    if train_half.images.shape[1] >= (224 if args.stem == "imagenet" else 32):
        more = " --auxiliary --cutout" + more  # the auxiliary head needs this size
    log.info("train it: python train.py --arch %s%s", shlex.quote(str(run.folder)), more)


if __name__ == "__main__":
    script.run(main, get_args)
