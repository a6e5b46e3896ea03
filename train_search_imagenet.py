"""Search a cell on ImageNet with PC-DARTS (Xu et al., ICLR 2020, section 4.3).

    python train_search_imagenet.py --tmp_data_dir DIR
    torchrun --nproc_per_node 8 train_search_imagenet.py ...  # one process per GPU

Searches on DIR/imagenet_search/{train,val}; where that is missing, on 10 % and 2.5 % of every
class of DIR/imagenet/train, whose file names it leaves in the run folder for --split. Alphas and
betas stay frozen for --begin epochs. Prints the genotype, which `train_imagenet.py --arch RUN`
trains. What was measured with this code stands in docs/imagenet.md.
"""

import shlex
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import fused
import utils
from architect import Architect
from harness import costs, distributed, flags, forms, imagenet, loops, script, searches
from harness.runs import Run


def get_args():
    parser = flags.Parser(__doc__)
    flags.add_imagenet_arguments(parser, workers=4)
    flags.add_learning_arguments(parser, epochs=50, init_channels=16, layers=8, learning_rate=0.5)
    flags.add_search_arguments(parser, begin=35, k=2, arch_learning_rate=6e-3)
    parser.set_defaults(seed=2)
    parser.add_argument(
        "--split", metavar="FILE", help="list of files of an earlier search, or its folder"
    )
    return flags.parse_args(parser)


def main(args):
    device = distributed.start(args)
    utils.set_seed(args.seed, args.deterministic, args.detect_anomaly)
    split = args.split
    if args.resume and Path(args.resume, imagenet.SPLIT[0]).exists():
        split = args.resume  # its own lists
    halves = imagenet.load_search(args.tmp_data_dir, split, args.seed)
    crop = imagenet.train_transform(args.input_size, jitter=False)
    common = dict(batch_size=args.batch_size, device=device, workers=args.workers)
    augmented = dict(**common, shuffle=True)
    train = imagenet.Loader(
        halves[0].transformed(crop), **augmented, seed=args.seed, what="images for the weights"
    )
    valid = imagenet.Loader(
        halves[1].transformed(crop), **augmented, seed=args.seed + 1,
        what="images for alphas and betas",
    )  # fmt: skip
    held_out = imagenet.Loader(
        halves[1].transformed(imagenet.test_transform(args.input_size)), **common
    )

    criterion = nn.CrossEntropyLoss()
    with utils.user_errors(ValueError):
        model = searches.supernet(args, len(halves[0].classes), criterion, "imagenet")
        fewest = 2 if args.sync_bn else min(train.smallest(), valid.smallest())
        costs.check_size(model, args.input_size, fewest)
    shape = distributed.part(args.batch_size), args.input_size
    model, measured = forms.choose(model, args, device, shape)
    if args.sync_bn:
        model = distributed.synchronized(model, device)
    distributed.broadcast([*model.parameters(), *model.buffers()])
    optimizer = torch.optim.SGD(
        model.weights(),
        args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
    )
    architect = Architect(model, SimpleNamespace(**vars(args), arch_grad_clip=args.grad_clip))
    gradients = distributed.averaged(
        fused.Gradients(model, criterion, args.amp, not args.no_cuda_graph)
    )
    architect.gradients = distributed.averaged(architect.gradients)

    parts = {"model": model, "optimizer": optimizer, "architect": architect.optimizer}
    parts |= {"loader": train, "valid_loader": valid}
    about = dict(classes=halves[0].classes, images=imagenet.digest(*halves))
    about["primitives"] = model.primitives
    run = Run("search", args, device, parts, begin=partial(imagenet.write_split, halves), **about)
    if run.finished(args):
        return
    folder, log = run.folder, run.log
    log.info(
        "%d classes; %d images (%d to %d of a class) for the weights, %d (%d to %d) for alphas "
        "and betas; note: %s",
        len(halves[0].classes), len(halves[0]), *imagenet.counts(halves[0]),
        len(halves[1]), *imagenet.counts(halves[1]), args.note,
    )  # fmt: skip
    gpus = torch.cuda.device_count()
    if gpus > 1 and distributed.world_size() == 1:
        log.info("%d GPUs are here; torchrun --nproc_per_node %d uses all of them", gpus, gpus)
    searches.introduce(log, args, model, measured)
    flags.advise(log, args, 1024, 0.5)

    batches = valid.forever()
    for epoch in range(run.epoch, args.epochs):
        frozen = epoch < args.begin
        warm_up = args.batch_size > 256
        lr = loops.learning_rate(
            epoch, args.epochs, args.learning_rate, "cosine", warm_up, args.learning_rate_min
        )
        optimizer.param_groups[0]["lr"] = lr
        figures = loops.search_epoch(
            train, batches, model, gradients, architect, optimizer, args, frozen, run
        )
        distributed.check_equal(model.arch_parameters(), "alphas and betas")
        distributed.broadcast(model.buffers())
        searches.report(run, args, lr, figures, model, held_out, imagenet=True)
        run.epoch_done()

    searches.finish(run, args, model, held_out, "the images of alphas and betas")
    more = f" --tmp_data_dir {shlex.quote(args.tmp_data_dir)}"
    more += f" --input_size {args.input_size}" * (args.input_size != 224)
    more += " --auxiliary" * (args.input_size >= 224)
    log.info("train it: python train_imagenet.py --arch %s%s", shlex.quote(str(folder)), more)


if __name__ == "__main__":
    script.run(main, get_args)
