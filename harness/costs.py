"""What a network needs: a size of its images, calls into aten, bytes kept for the backward pass."""

import copy
import functools
import gc
import resource
import sys
import time
from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import genotypes
import utils
from harness import flags
from model import build
from model_search import Network
from operations import OPS


def check_size(model, size, images=2):
    """Raises ValueError where `model`, in its mode, cannot read images of size x size.

    It names the next size that fits. images: the fewest in a step.
    """
    on_paper = copy.deepcopy(model).to("meta")  # shapes alone, nothing is computed

    def reason(side):
        try:
            on_paper(torch.empty(images, 3, side, side, device="meta"))
        except (ValueError, RuntimeError) as error:  # of PyTorch: maps that do not fit together
            return str(error).splitlines()[0]

    why = reason(size)
    if why is None:
        return
    if "more than 1 value per channel" in why:  # an image whose last map is 1 x 1
        raise ValueError(
            "a step of 1 image, the last of an epoch perhaps, is too small for batch norm on maps "
            "of 1 x 1: give another --batch_size"
        )
    if "meta" in why:  # a tensor that did not move with its module
        raise ValueError(f"{why}: register the tensors of your operations as buffers")
    fits = (side for side in range(size + 4 - size % 4, size + 257, 4) if reason(side) is None)
    side = next(fits, None)
    hint = "" if side is None else f"; the next size that fits is --input_size {side}"
    raise ValueError(f"images of {size} x {size}: {why}{hint}")


class Calls(TorchDispatchMode):
    """Within it `seen(name, args, kwargs, out)` is told each aten function called but views."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.is_mutable or not _memory(out) <= _memory((args, kwargs)):
            self.seen(func.overloadpacket.__name__, args, kwargs, out)
        return out


def tensors_in(tree):
    """The tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _memory(tree):
    """The storages of all tensors in a tree, by what stays theirs on meta, too."""
    return {tensor.untyped_storage()._cdata for tensor in tensors_in(tree)}


def aten_calls(function):
    """A Counter {name: calls} of the aten functions that `function()` calls, views left out.

    A view writes nothing and returns only memory of its arguments. Each of the others is at least
    one kernel launch on a GPU, except for the few that only allocate.
    """
    names = Counter()
    with Calls(lambda name, *_: names.update([name])):
        function()
    return names


def bytes_kept(function, parameters=()):
    """Bytes of all tensors kept for the backward of the loss `function()`, parameters left out.

    Those that autograd saves, and those that nodes of the graph hold by themselves. Tensors that
    share a storage count once, with the whole storage, since all of it is kept alive.
    """
    storages, known = {}, _memory(list(parameters))

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()  # holds the graph, so that no storage is freed and its address used again
    for node in _nodes(kept.grad_fn):
        for tensor in _held(getattr(node, "__dict__", {}), set()):
            pack(tensor)
    return sum(storages.values())


def kept_per_image(network, size):
    """Bytes that a network in training keeps for its backward pass, of a 3 x size x size image.

    In float32, without what does not grow with the batch. Runs it with 2 and with 4 images.
    """
    network.train()

    def loss(images):
        out = network(torch.zeros(images, 3, size, size))
        parts = out if isinstance(out, tuple) else [out]  # the auxiliary head's may be None
        return sum(part.sum() for part in parts if part is not None)

    few, more = (bytes_kept(lambda n=n: loss(n), network.parameters()) for n in (2, 4))
    return (more - few) / 2


def _nodes(last):
    """All nodes of the graph that ends at `last`."""
    seen, ahead = {last}, [last]
    while ahead:
        node = ahead.pop()
        yield node
        new = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= new
        ahead += new


def _held(thing, seen):
    """The tensors in what a node holds: containers, plain objects and closures."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    inside = []
    if torch.is_tensor(thing):
        yield thing
    elif isinstance(thing, dict):
        inside = thing.values()
    elif isinstance(thing, list | tuple):
        inside = thing
    elif getattr(thing, "__closure__", None):
        inside = [cell.cell_contents for cell in thing.__closure__]
    elif not isinstance(thing, type | nn.Module):
        inside = getattr(thing, "__dict__", {}).values()
    for each in inside:
        yield from _held(each, seen)


def wait(device):
    """Until the device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds(function, device):
    """How long `function()` takes, with what it gives the device to do."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def forget(device):
    """Gives back the memory of a trial, so that the run's peak memory is not the trial's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """Peak memory in MiB: of the tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


PUBLISHED = {  # C, classes, cells, side of the images
    "cifar": (36, 10, 20, 32), "imagenet": (48, 1000, 14, 224),
}  # fmt: skip
READ_ONCE = nn.ReLU | nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d


@functools.lru_cache
def _cost(text, stem):
    *sizes, side = PUBLISHED[stem]
    with torch.device("meta"):  # shapes alone
        network = build(genotypes.parse(text, OPS), *sizes, stem)
    return utils.count_parameters_in_MB(network), multiply_adds(network, side) / 1e6


def derived_cost(genotype, imagenet=False):
    """Millions of (parameters, multiply-adds) of this cell's network in the published size.

    36 channels, 20 cells, 32 pixels, 10 classes; on ImageNet 48, 14, 224 and 1000.
    """
    return _cost(genotypes.text(genotype), "imagenet" if imagenet else "cifar")


def multiply_adds(network, size, paper=False):
    """The multiply-adds of Conv2d and Linear layers for one 3 x size x size image, in evaluation.

    paper: as the published tables count, with each element that a batch norm reads twice, and
    those that ReLUs and pools read once. Raises ValueError where the network does.
    """
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Conv2d | nn.Linear):
            total += module.weight.numel() * output[0, 0].numel()  # each once per place of the map
        elif paper and isinstance(module, nn.BatchNorm2d):
            total += 2 * inputs[0].numel()
        elif paper and isinstance(module, READ_ONCE):
            total += inputs[0].numel()

    network = copy.deepcopy(network).to("meta").eval()  # shapes alone
    for module in network.modules():
        module.register_forward_hook(count)
    network(torch.empty(1, 3, size, size, dtype=network.classifier.weight.dtype, device="meta"))
    return total


def get_args_discrete():
    parser = flags.Parser("What the network of a cell costs, before it is trained.")
    add = parser.add_argument
    add("--arch", default="PCDARTS", help="as of train.py")
    add("--set", default="cifar10", choices=["cifar10", "imagenet"], help="the published sizes of")
    for name, what in (("init_channels", "channels C"), ("num_classes", "outputs"),
                       ("layers", "cells"), ("input_size", "side of the images")):  # fmt: skip
        add(f"--{name}", type=flags.count, help=f"{what}; None: as published")
    add("--auxiliary", action="store_true", help="a second classifier at two thirds of the depth")
    return parser.parse_args()


def main_discrete(args):
    stem = "imagenet" if args.set == "imagenet" else "cifar"
    given = args.init_channels, args.num_classes, args.layers, args.input_size
    *sizes, side = (g or p for g, p in zip(given, PUBLISHED[stem], strict=True))
    with utils.user_errors(ValueError):  # a GenotypeError too
        genotype = genotypes.load(args.arch, OPS)
        network = build(genotype, *sizes, stem, args.auxiliary)
        check_size(network, side)
        counts = [multiply_adds(network, side, paper=paper) for paper in (False, True)]
    kept, parameters = kept_per_image(network, side), utils.count_parameters_in_MB(network)
    print(
        f"{sizes[0]} channels, {sizes[2]} cells, {side} x {side} pixels, {sizes[1]} classes\n"
        f"parameters: {parameters:.2f} M (an auxiliary head not counted)\n"
        f"multiply-adds: {counts[0] / 1e6:.2f} M of convolutions and linear layers, "
        f"{counts[1] / 1e6:.2f} M as the paper counts\n"
        f"memory per image in training: {kept / 1e6:.1f} MB kept for the backward pass, float32"
    )


def get_args_supernet():
    parser = flags.Parser("What the supernet costs, for each K, before a search.")
    add = parser.add_argument
    add("--init_channels", type=flags.count, default=16, help="channels C of the first cell")
    add("--num_classes", type=flags.count, default=10, help="outputs")
    add("--layers", type=flags.depth, default=8, help="cells")
    add("--steps", type=flags.count, default=4, help="nodes of a cell")
    add("--input_size", type=flags.count, default=32, help="side of the images in pixels")
    flags.add_stem_argument(parser)
    add("--recompute", action="store_true", help="as of train_search.py")
    return parser.parse_args()


def main_supernet(args):
    """A table; K that do not divide C into even numbers are left out."""
    fitting = [k for k in (2, 4, 8, 16) if args.init_channels % (2 * k) == 0]
    with utils.user_errors(ValueError):
        for k in (1, *fitting):
            network = Network(
                args.init_channels, args.num_classes, args.layers, None, steps=args.steps,
                multiplier=args.steps, k=k, stem=args.stem, recompute=args.recompute,
            )  # fmt: skip
            check_size(network, args.input_size)
            if k == 1:
                print("| K | weights (M) | kept for the backward pass, per image (MB) |")
                print("|---|---|---|")
            kept = kept_per_image(network, args.input_size)
            weights = sum(weight.numel() for weight in network.weights())
            print(f"| {k} | {weights / 1e6:.3f} | {kept / 1e6:.1f} |", flush=True)
