"""The network of a run of train_reid.py: built from its flags, with the weights it ended with."""

import re
from pathlib import Path

import genotypes
import utils
from harness import files
from operations import OPS

from .flags import whole_numbers
from .model import RESNETS, ReIDNetwork, ResNet, check_size


def build(arch, genotype, classes, args, images=2):
    """The ResNet `arch`, or the ReIDNetwork of a genotype; UserError where there is none such.

    args: init_channels, layers (2,2,2,2), embedding, height, width. images: the fewest in a step.
    """
    layers = whole_numbers(args["layers"])
    with utils.user_errors(ValueError):
        if arch in RESNETS:
            network = ResNet(arch, classes, args["embedding"])
        else:
            sizes = args["init_channels"], classes, layers
            network = ReIDNetwork(*sizes, genotype, args["embedding"])
        check_size(network, layers, args["height"], args["width"], images)
    return network


def load(folder):
    """(the network of a run in evaluation, on the CPU; (height, width) of its images).

    Raises UserError where the folder is damaged or has no weights yet.
    """
    folder = Path(folder)
    about = files.read_args(folder)
    args, classes, path = about["args"], about.get("classes"), folder / "weights.pt"
    sizes = [args.get(name) for name in ("init_channels", "embedding", "height", "width")]
    whole = all(type(size) is int and size > 0 for size in sizes) and isinstance(classes, list)
    if not whole or not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", str(args.get("layers"))):
        raise utils.UserError(f"{folder}/args.json is damaged, in the sizes of the network")
    genotype = None
    if args.get("arch") not in RESNETS:
        with utils.user_errors(genotypes.GenotypeError):
            genotype = genotypes.load(folder, OPS)
    network = build(args.get("arch"), genotype, len(classes), args)
    files.load_weights(network, files.load(path), path)
    return network.eval(), (args["height"], args["width"])
