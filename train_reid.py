"""Train and evaluate a part-aware network for person re-identification (Quan et al., ICCV 2019).

    python train_reid.py --data DIR --arch REID_SEARCH       # Market-1501 and the published cell
    python train_reid.py --arch search-REID-20260101-120000  # the cell that a search found
    python train_reid.py --data DIR --arch resnet18          # to compare with; no pretraining
    python train_reid.py --set digits --arch REID_SEARCH     # needs no files; no figure of a person
    python train_reid.py --test RUN --rerank                 # evaluate a run again

What counts is the retrieval after the last epoch: CMC and mean average precision. Published, on
Market-1501: rank-1 94.5 %, mAP 85.1 %. The recipe (Adam, warm-up, steps, label smoothing, random
erasing) is after Luo et al., CVPRW 2019; what it leaves out, and what was measured: docs/reid.md.
"""

import math
import shlex

import torch

import genotypes
import utils
from harness import distributed, files, flags, loops, script
from harness.distributed import is_main
from harness.runs import Run, load_genotype
from reid import PKBatches, RetrievalLoss, data, pictures
from reid.flags import (
    DIGITS,
    add_arguments,
    check_triplets,
    cross_entropy_weight,
    milestones,
    parse_args,
    whole_numbers,
)
from reid.loader import RANKS, Loader, reranked, retrieve
from reid.model import RESNETS, multiply_adds
from reid.trained import build

ON_DIGITS = DIGITS | dict(instances=8, epochs=100, eval_freq=50, learning_rate=0.01, warm_up=5)
ON_DIGITS |= dict(milestones="60,85")
# Flags of the run that made the weights, which --test goes by.
INHERITED = ("arch", "data", "set", "height", "width", "layers", "init_channels", "embedding")
INHERITED += ("identities", "instances")  # the size of a batch: the same figures to the bit


def get_args():
    parser = flags.Parser(__doc__)
    add_arguments(parser, epochs=120, learning_rate=3.5e-4)
    add = parser.add_argument
    add("--arch", default="REID_SEARCH",
        help=f"name, genotype.json, run folder or text; or {', '.join(RESNETS)}")  # fmt: skip
    add("--test", metavar="RUN", help="evaluate the run in this folder, and do nothing else")
    add("--rerank", action="store_true", help="k-reciprocal re-ranking at the end, too")
    add("--eval_freq", type=flags.count, default=20, help="epochs between two evaluations")
    add("--schedule", default="step", choices=["step", "cosine"], help="of learning_rate")
    add("--milestones", type=milestones, default="40,70", help="epochs; each divides it by ten")
    add("--warm_up", type=flags.natural, default=10, help="epochs, from a tenth of learning_rate")
    add("--weight_decay", type=flags.non_negative, default=5e-4, help="of Adam")
    add("--label_smooth", type=flags.fraction, default=0.1,
        help="share of the target that is spread evenly over all identities")  # fmt: skip
    add("--no_erasing", action="store_true", help="cut nothing out of the images")
    add("--drop_path_prob", type=flags.fraction, default=0.0, help="at the end; grows from 0")
    return parse_args(parser, ON_DIGITS, INHERITED)


def main(args):
    genotype = part_aware_genotype(args)
    device = distributed.start(args)
    utils.set_seed(args.seed, args.deterministic, args.detect_anomaly)
    people = data.load(args.set, args.data)
    people = people._replace(gallery=data.without_junk(people.gallery))
    size = args.height, args.width
    if args.test is not None:
        return test(args, people, genotype, device)
    check_triplets(args)
    labels, identities = data.labels(people.train.ids)
    world = distributed.rank(), distributed.world_size()
    triplets = cross_entropy_weight(args) < 1
    batches = PKBatches(
        people.train.ids, args.identities, args.instances, args.seed, *world, triplets
    )
    augment = dict(flip=args.set != "digits", erase=not args.no_erasing)
    train = Loader(people.train, labels, batches, size, device, args.workers, **augment)

    fewest = distributed.fewest_on_one_device(train.smallest(), device, args)
    network = build(args.arch, genotype, len(identities), vars(args), fewest)
    macs = multiply_adds(network, *size) / 1e6
    network.to(device)
    model = distributed.wrap(network, device, args)
    criterion = RetrievalLoss(cross_entropy_weight(args), args.margin, args.label_smooth)
    optimizer = torch.optim.Adam(
        network.parameters(), args.learning_rate, weight_decay=args.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: factor(epoch, args))

    parts = {"model": network, "optimizer": optimizer, "scheduler": scheduler, "loader": train}
    about = dict(classes=identities.tolist(), images=data.digest(people), multiply_adds_m=macs)
    about |= dict(result="rank1", drawn=["mAP"])
    about["parameters_m"] = utils.count_parameters_in_MB(network)
    run = Run("eval", args, device, parts, genotype=genotype, **about)
    if run.finished(args):
        return
    folder, log = run.folder, run.log
    introduce(log, args, people, identities, genotype)
    log.info("network: %.6f M parameters, %.2f M multiply-adds", about["parameters_m"], macs)

    last = None  # what the last epoch's retrieval gave
    for epoch in range(run.epoch, args.epochs):
        network.drop_path_prob = args.drop_path_prob * epoch / args.epochs
        lr = scheduler.get_last_lr()[0]
        figures = loops.train_epoch(train, model, criterion, optimizer, args, run, forward)
        distributed.broadcast(network.buffers())
        tested = dict.fromkeys([*(f"rank{k}" for k in RANKS), "mAP"], math.nan)
        if (epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs:
            last = retrieve(network, people, args, device, run)
            tested = last.figures
            log.info("%s", line("retrieval", tested))
        report(run, args, lr, figures, tested)
        scheduler.step()  # after the retrieval, in which a signal may end the run
        run.epoch_done()

    found = {"": last or retrieve(network, people, args, device, run)}
    if args.rerank:
        found["re-ranked"] = reranked(found[""], people)
    if is_main():
        pictures.save(folder, people, found, log, args.report)
        files.save(network.state_dict(), folder / "weights.pt")  # the last: it says "finished"
    log.info("evaluate it again: python train_reid.py --test %s", shlex.quote(str(folder)))
    for name, result in found.items():
        log.info("%s", line(f"after the last epoch{name and f', {name}'}", result.figures))


def part_aware_genotype(args):
    """The genotype of --arch, or of the run to test, if it is of Auto-ReID's space.

    None of a ResNet.
    """
    if args.arch in RESNETS:
        return None
    with utils.user_errors(genotypes.GenotypeError):
        if args.test is not None:
            genotype = genotypes.load(args.test, genotypes.PRIMITIVES_REID)
        else:
            genotype = load_genotype(args)
        return genotypes.check(genotype, genotypes.PRIMITIVES_REID)


def factor(epoch, args):
    """What the learning rate is multiplied by in epoch 0, 1, ..."""
    if epoch < args.warm_up:
        return 0.1 + 0.9 * epoch / args.warm_up
    if args.schedule == "cosine":
        done = (epoch - args.warm_up) / max(1, args.epochs - args.warm_up)
        return (1 + math.cos(math.pi * done)) / 2
    return 0.1 ** sum(epoch >= milestone for milestone in whole_numbers(args.milestones))


def forward(model, criterion, x, y, args):
    """(loss, logits) of a batch, for loops.train_epoch."""
    outputs = model(x)
    return criterion(outputs, y), outputs[1]


def test(args, people, genotype, device):
    """--test: the figures of a run, after its last epoch or of its checkpoint."""
    log, path = files.start_log(quiet=not is_main()), files.weights_of(args.test)
    state = files.load(path)
    classes = files.read_args(args.test).get("classes")
    if not isinstance(classes, list):
        raise utils.UserError(f"{args.test}/args.json is damaged: it names no classes")
    network = build(args.arch, genotype, len(classes), vars(args))
    files.load_weights(network, state, path)
    network.to(device)
    log.info("%s", flags.describe(device))
    introduce(log, args, people, classes, genotype)
    found = retrieve(network, people, args, device)
    log.info("%s", line(path, found.figures))
    if args.rerank:
        log.info("%s", line(f"{path}, re-ranked", reranked(found, people).figures))


def introduce(log, args, people, identities, genotype):
    """The first lines of the log: the data, and the cell or ResNet."""
    log.info("%s", people.note)
    log.info(
        "%d identities and %d images to train on, %d queries, %d gallery images without junk",
        len(identities), *(len(part.ids) for part in people[:3]),
    )  # fmt: skip
    without = (~data.has_match(people.query, people.gallery)).sum()
    if without:
        log.info("queries without an image by another camera, which do not count: %d", without)
    if genotype is None:
        log.info("%s of torchvision, not pretrained: --layers, --init_channels and "
                 "--drop_path_prob do not apply", args.arch)  # fmt: skip
    else:
        log.info("genotype = %s", genotypes.text(genotype))


def line(name, tested):
    ranks = ", ".join(f"rank-{k} {tested[f'rank{k}']:.2f} %" for k in RANKS)
    return f"{name}: mAP {tested['mAP']:.2f} %, {ranks}"


def report(run, args, lr, figures, tested):
    """What an epoch gave, in the log and metrics.csv."""
    epoch = run.epoch + 1
    run.log.info(
        "epoch %d of %d: lr %.6f, train loss %.4f, identities top-1 %.2f %%, %.0f images/s, "
        "%.1f s, peak memory %.0f MiB", epoch, args.epochs, lr, figures["loss"],
        figures["top1"], figures["images_per_second"], figures["seconds"], figures["memory_mib"],
    )  # fmt: skip
    run.record({"epoch": epoch, "learning_rate": lr, **figures, **tested})


if __name__ == "__main__":
    script.run(main, get_args)
