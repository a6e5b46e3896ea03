"""The flags that the two scripts share, and what they mean."""

import argparse

from harness import distributed, flags
from harness.files import read_args
from utils import UserError

from .data import SETS

# The sizes that --set digits has where they are not given.
DIGITS = dict(height=64, width=32, layers="1,1,1", init_channels=8, embedding=32, identities=10)


def stages(text):
    """An argparse type: cells of each stage, as 2,2,2,2; the text as it is."""
    for cells in text.split(","):
        flags.depth(cells)
    return text


def whole_numbers(text):
    """(2, 2, 2, 2) of 2,2,2,2."""
    return tuple(int(number) for number in text.split(",") if number)


def milestones(text):
    """An argparse type: epochs, as 40,70, or nothing; the text as it is."""
    for epoch in text.split(",") if text else ():
        flags.count(epoch)
    return text


def add_arguments(parser, epochs, learning_rate):
    """What search and training share."""
    add = parser.add_argument
    add("--data", default="../data", help="folder of the data set")
    add("--set", default="market1501", choices=SETS, help="form of the data; digits needs no files")
    add("--height", type=flags.count, default=384, help="of the images, in pixels")
    add("--width", type=flags.count, default=128, help="of the images, in pixels")
    add("--identities", type=flags.count, default=16, help="P: identities in a step")
    add("--instances", type=flags.count, default=4, help="images of each of them in a step")
    add("--loss", default="retrieval", choices=["retrieval", "ce"], help="ce: classification alone")
    add(
        "--ce_weight", "--lambda", dest="ce_weight", type=flags.fraction, default=0.5,
        help="lambda: weight of the cross entropy; that of the triplets is 1 - lambda",
    )  # fmt: skip
    add("--margin", type=flags.non_negative, default=0.3, help="of a triplet, in distance")
    add("--init_channels", type=flags.count, default=64, help="channels C of the first stage")
    add("--layers", type=stages, default="2,2,2,2", help="cells of each stage")
    add("--embedding", type=flags.count, default=512, help="numbers of an embedding")
    add("--workers", type=flags.natural, default=4, help="processes that read images, of each GPU")
    flags.add_machine_arguments(parser)
    flags.add_run_arguments(parser, epochs, learning_rate)
    parser.set_defaults(save="REID")


def parse_args(parser, digits, inherited=()):
    """flags.parse_args, with other defaults, `digits`, where that is the set.

    With --test RUN the `inherited` flags are those of the run where they are not given.
    """
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.error = parser.error
    known.add_argument("--set")
    if inherited:
        known.add_argument("--test")
        known.add_argument("--arch")
    given = known.parse_known_args()[0]
    folder = getattr(given, "test", None)
    stored = {} if folder is None else _args_of(folder)
    if (given.set or stored.get("set")) == "digits":
        parser.set_defaults(**digits)
    # As text, so that argparse checks them as it checks a user's.
    of_run = {name: str(stored[name]) for name in inherited if stored.get(name) is not None}
    parser.set_defaults(**of_run)
    args = flags.parse_args(parser)
    arch = stored.get("arch")
    if folder is not None and given.arch not in (None, arch):
        raise UserError(f"--test evaluates the network of {folder}, {arch}: leave --arch out")
    if folder is not None and args.resume is not None:
        raise UserError("--test evaluates, --resume goes on: give one of them")
    if folder is None and args.resume is None:
        check_idle(parser, args)
    return args


def check_idle(parser, args):
    """UserError where a flag is given that does nothing beside another."""
    idle = []
    if args.loss == "ce":
        idle += [("ce_weight", "--lambda", "--loss ce"), ("margin", "--margin", "--loss ce")]
    elif args.ce_weight == 1:
        idle += [("margin", "--margin", "--lambda 1")]
    if getattr(args, "schedule", "") == "cosine":
        idle += [("milestones", "--milestones", "--schedule cosine")]
    for name, flag, beside in idle:
        if getattr(args, name) != parser.get_default(name):
            raise UserError(f"{flag} does nothing with {beside}: give one of them")


def _args_of(folder):
    about = read_args(folder)
    if not about:
        raise UserError(f"--test {folder}: no args.json there; give the folder of a training")
    if about["script"] != "train_reid":
        hint = f"train its cell, train_reid.py --arch {folder}"
        raise UserError(f"{folder} is a run of {about['script']}.py: {hint}")
    return about["args"]


def check_triplets(args):
    """UserError where a step of this process can have no triplets, and its loss is of them too."""
    world = distributed.world_size()
    if cross_entropy_weight(args) < 1 and (args.instances < 2 or args.identities // world < 2):
        has = f"{args.identities // world} identities of {args.instances} images"
        raise UserError(f"a step has {has} in each process, and a triplet needs 2 of 2: "
                        "raise --identities or --instances, or give --loss ce")  # fmt: skip


def cross_entropy_weight(args):
    """lambda; 1 where classification is all."""
    return 1.0 if args.loss == "ce" else args.ce_weight
