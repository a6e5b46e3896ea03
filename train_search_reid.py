"""Search a cell for person re-identification with Auto-ReID (Quan et al., ICCV 2019).

    python train_search_reid.py --data DIR             # Market-1501, on one GPU
    python train_search_reid.py --data DIR --set msmt17
    python train_search_reid.py --set digits           # needs no files; no figure of a person
    torchrun --nproc_per_node 4 train_search_reid.py ...  # one process per GPU

The images of each identity are halved. Each step updates alphas on P identities of one half, and
the weights on P of the other, by cross entropy and batch-hard triplets. Prints the genotype, which
`train_reid.py --arch RUN` trains. What was measured with this code stands in docs/reid.md.
"""

import shlex
from types import SimpleNamespace

import numpy as np
import torch

import fused
import genotypes
import utils
from architect import Architect
from harness import analysis, distributed, flags, loops, script, searches
from harness.runs import Run
from reid import PKBatches, RetrievalLoss, data
from reid.flags import (
    DIGITS,
    add_arguments,
    check_triplets,
    cross_entropy_weight,
    parse_args,
    whole_numbers,
)
from reid.loader import Loader
from reid.model import ReIDNetwork, check_size
from reid.supernet import Supernet

ON_DIGITS = DIGITS | dict(instances=4, epochs=20)


def get_args():
    parser = flags.Parser(__doc__)
    add_arguments(parser, epochs=200, learning_rate=0.1)
    add = parser.add_argument
    add("--k", type=flags.count, default=1, help="1/k of the channels go through the operations")
    add("--learning_rate_min", type=flags.non_negative, default=0.001, help="at the end (cosine)")
    add("--momentum", type=flags.fraction, default=0.9, help="of the weights' SGD")
    add("--weight_decay", type=flags.non_negative, default=5e-5, help="of the weights' SGD")
    add("--arch_learning_rate", type=flags.positive, default=0.02, help="of alphas")
    add("--arch_weight_decay", type=flags.non_negative, default=1e-3, help="of alphas")
    add("--first_order", action="store_true", help="leave the second-order term out")
    add("--plain", action="store_true", help="the cell as model_search.py has it: slower")
    add("--no_cuda_graph", action="store_true", help="launch every kernel of a step by itself")
    return parse_args(parser, ON_DIGITS)


def main(args):
    device = distributed.start(args)
    utils.set_seed(args.seed, args.deterministic, args.detect_anomaly)
    check_triplets(args)
    people = data.load(args.set, args.data)
    least = 2 if cross_entropy_weight(args) < 1 else 1  # images of an identity in a half
    halves = data.halves(people.train, args.seed, least)
    identities = data.labels(halves[0].ids)[1]
    layers, size = whole_numbers(args.layers), (args.height, args.width)
    train, valid = (
        Loader(half, data.labels(half.ids)[0], batches(half.ids, args, args.seed + i), size, device,
               args.workers, flip=args.set != "digits")
        for i, half in enumerate(halves[:2])
    )  # fmt: skip

    criterion = RetrievalLoss(cross_entropy_weight(args), args.margin)
    with utils.user_errors(ValueError):
        model = Supernet(
            args.init_channels, len(identities), layers, criterion, args.k, args.embedding,
            fused=not args.plain,
        )  # fmt: skip
        check_size(model, layers, *size, train.smallest())
    model.to(device)
    distributed.broadcast([*model.parameters(), *model.buffers()])
    optimizer = torch.optim.SGD(
        model.weights(), args.learning_rate, args.momentum, weight_decay=args.weight_decay
    )
    search_args = SimpleNamespace(
        **vars(args), unrolled=not args.first_order, arch_grad_clip=args.grad_clip
    )
    architect = Architect(model, search_args)
    gradients = fused.Gradients(model, criterion, args.amp, not args.no_cuda_graph)
    gradients = distributed.averaged(gradients)
    architect.gradients = distributed.averaged(architect.gradients)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, args.epochs, args.learning_rate_min
    )

    parts = {"model": model, "optimizer": optimizer, "architect": architect.optimizer}
    parts |= {"scheduler": scheduler, "loader": train, "valid_loader": valid}
    about = dict(classes=identities.tolist(), images=data.digest(people))
    about["primitives"] = model.primitives
    run = Run("search", args, device, parts, **about)
    if run.finished(args):
        return
    folder, log = run.folder, run.log
    introduce(log, args, people, halves, model, least)

    forever = valid.forever()
    for _ in range(run.epoch, args.epochs):
        lr = scheduler.get_last_lr()[0]
        figures = loops.search_epoch(
            train, forever, model, gradients, architect, optimizer, search_args, False, run
        )
        scheduler.step()
        distributed.check_equal(model.arch_parameters(), "alphas")
        distributed.broadcast(model.buffers())
        report(run, args, lr, figures, model, len(identities))
        run.epoch_done()

    searches.save(run, model, model.genotype())
    where = f"--set {args.set} --height {args.height} --width {args.width} --layers {args.layers}"
    where += "" if args.set == "digits" else f" --data {shlex.quote(args.data)}"
    log.info("train it: python train_reid.py --arch %s %s", shlex.quote(str(folder)), where)


def batches(ids, args, seed):
    """This process's batches of P identities."""
    world = distributed.rank(), distributed.world_size()
    triplets = cross_entropy_weight(args) < 1
    return PKBatches(ids, args.identities, args.instances, seed, *world, triplets)


def introduce(log, args, people, halves, model, least):
    """The first lines of the log: the data and the supernet."""
    log.info("%s", people.note)
    identities = len(np.unique(halves[0].ids))
    log.info(
        "%d identities; %d images for the weights, %d for alphas; a step has %d identities of %d "
        "images", identities, *(len(half.ids) for half in halves[:2]), args.identities,
        args.instances,
    )  # fmt: skip
    if halves[2]:
        few = len(halves[2]), 2 * least
        log.info("%d identities have fewer than %d images and are left out", *few)
    log.info("supernet: %.6f M weights, K = %d", utils.count_parameters_in_MB(model), args.k)


def report(run, args, lr, figures, model, identities):
    """What an epoch gave, in the log and the run's files; the genotype is that after the epoch."""
    genotype, epoch = model.genotype(), run.epoch + 1
    skips = genotypes.skip_connects(genotype)
    run.log.info(
        "epoch %d of %d: lr %.5f, train loss %.4f, identities top-1 %.2f %%, %.0f images/s, "
        "%.1f s, peak memory %.0f MiB, skip_connects %d normal %d reduce",
        epoch, args.epochs, lr, figures["loss"], figures["top1"], figures["images_per_second"],
        figures["seconds"], figures["memory_mib"], *skips,
    )  # fmt: skip
    run.log.info("genotype = %s", genotypes.text(genotype))
    with torch.device("meta"):  # shapes alone
        layers = whole_numbers(args.layers)
        derived = ReIDNetwork(args.init_channels, identities, layers, genotype, args.embedding)
    row = {
        "epoch": epoch, "learning_rate": lr, **figures, "frozen": 0, **analysis.entropies(model),
        "skip_connects_normal": skips[0], "skip_connects_reduce": skips[1],
        "parameters_m": utils.count_parameters_in_MB(derived),
    }  # fmt: skip
    run.record(row, searches.cell_line(model, genotype, epoch))


if __name__ == "__main__":
    script.run(main, get_args)
