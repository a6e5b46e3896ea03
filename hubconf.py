"""For torch.hub: networks of this repository by name.

    torch.hub.load(REPO, "pc_darts_cifar", weights="eval-EXP-.../weights.pt")
    torch.hub.load(REPO, "pc_darts_imagenet", num_classes=1000, auxiliary=True)
    torch.hub.load(REPO, "supernet", k=4)
    torch.hub.load(REPO, "tas", arch="search-EXP-.../tas.json", weights="eval-EXP-...")

weights: a run's folder, weights.pt or checkpoint.pt, or a checkpoint of the published code.
Raises UserError, one line, where they cannot be read or are of another network.
"""

from torch import nn as _nn

import genotypes as _genotypes
import model as _model
import model_search as _model_search
from harness import files as _files
from harness import searches as _searches
from harness import trainings as _trainings
from operations import OPS as _OPS
from tas import found as _found
from utils import UserError as _UserError

dependencies = ["torch", "torchvision", "numpy"]


def pc_darts_cifar(
    num_classes=None, auxiliary=None, weights=None, C=None, layers=None, genotype=None
):
    """NetworkCIFAR; forward(x) -> (logits, logits of the auxiliary head or None).

    genotype: as --arch of train.py: a name, genotype.json, run folder or text. What is None is that
    of the run whose weights are given, else as published: PC_DARTS_cifar, 10 classes, 36 channels,
    20 layers; no auxiliary head.
    """
    given = dict(num_classes=num_classes, auxiliary=auxiliary, C=C, layers=layers)
    published = dict(num_classes=10, auxiliary=False, C=36, layers=20)
    cell = _cell(genotype, weights, "PC_DARTS_cifar")
    sizes = _sizes(given, weights, published)
    return _loaded(_model.NetworkCIFAR(genotype=cell, **sizes), weights)


def pc_darts_imagenet(
    num_classes=None, auxiliary=None, weights=None, C=None, layers=None, genotype=None
):
    """NetworkImageNet; as pc_darts_cifar.

    As published: PC_DARTS_image, 1000 classes, 48 channels, 14 layers.
    """
    given = dict(num_classes=num_classes, auxiliary=auxiliary, C=C, layers=layers)
    published = dict(num_classes=1000, auxiliary=False, C=48, layers=14)
    cell = _cell(genotype, weights, "PC_DARTS_image")
    sizes = _sizes(given, weights, published)
    return _loaded(_model.NetworkImageNet(genotype=cell, **sizes), weights)


def supernet(num_classes=None, weights=None, C=None, layers=None, **variant):
    """The search network; variant: further arguments of model_search.Network, such as k.

    What is not given is that of the search whose weights are given, else as published: 10 classes,
    16 channels, 8 layers. UserError where it is given and not the search's.
    """
    given = dict(num_classes=num_classes, C=C, layers=layers)
    given = {name: value for name, value in given.items() if value is not None} | variant
    run = {} if weights is None else _searches.of_run(_files.run_folder(weights))
    for name in given.keys() & run.keys():
        if given[name] != run[name]:
            raise _UserError(f"{weights} has {name}={run[name]}, not {given[name]}: leave it out")
    arguments = dict(num_classes=10, C=16, layers=8, criterion=_nn.CrossEntropyLoss()) | run | given
    return _loaded(_model_search.Network(**arguments), weights)


def tas(arch=None, num_classes=None, weights=None, depth=None):
    """The ResNet with the widths and depths that a search found; forward(x) -> logits.

    arch: as --arch of train_tas.py: tas.json, run folder, text, or "unpruned", which needs depth;
    None: that of the run of the weights, else "unpruned". num_classes: None: the arch's, of
    "unpruned" 10.
    """
    if arch is None:
        own = None if weights is None else _files.run_folder(weights)
        arch = own if own is not None and (own / _found.NAME).exists() else "unpruned"
    if str(arch) == "unpruned" and depth is None:
        raise _UserError("arch='unpruned' needs depth: give 20, 32, 44, 56 or 110")
    network = _found.load(str(arch), depth)
    if num_classes is not None:
        if not isinstance(num_classes, int) or num_classes < 1:
            raise _UserError(f"num_classes={num_classes!r}: give 1 or more")
        network = network._replace(num_classes=num_classes)
    return _loaded(network.network(), weights)


def _cell(genotype, weights, published):
    """The genotype: as given, or of the run of these weights, or as published.

    Another one than the run's would take the weights, too, where its convolutions are the same.
    """
    cell = None if genotype is None else _genotypes.load(genotype, _OPS)
    own = None if weights is None else _files.run_folder(weights) / "genotype.json"
    if own is None or not own.exists():
        return _genotypes.load(published, _OPS) if cell is None else cell
    its = _genotypes.load(own, _OPS)
    if cell not in (None, its):
        raise _UserError(f"{weights} has another genotype, {own}: leave the genotype out")
    return its


def _sizes(given, weights, published):
    """The arguments of a network: as given, or of the run of these weights, or as published."""
    run = {} if weights is None else _trainings.sizes(_files.run_folder(weights))
    return published | run | {name: value for name, value in given.items() if value is not None}


def _loaded(network, weights):
    if weights is not None:
        path = _files.weights_of(weights)
        _files.load_weights(network, _files.load(path), path)
    return network
