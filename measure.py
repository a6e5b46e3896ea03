"""What a network needs: a size of its images, calls into aten, bytes kept for the backward pass."""

import copy
from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def check_size(model, size, images=2):
    """Raises ValueError where `model`, in its mode, cannot read images of size x size.

    It names the next size that fits. images: the fewest in a step.
    """
    on_paper = copy.deepcopy(model).to("meta")  # shapes alone, nothing is computed

    def reason(side):
        try:
            on_paper(torch.empty(images, 3, side, side, device="meta"))
        except ValueError as error:
            return str(error)

    why = reason(size)
    if why is None:
        return
    if "more than 1 value per channel" in why:
        why = f"a step of {images} image is too small for batch norm there"
    fits = (side for side in range(size + 4 - size % 4, size + 257, 4) if reason(side) is None)
    hint = f"the next size that fits is --input_size {next(fits, size + 256)}"
    raise ValueError(f"images of {size} x {size}: {why}; {hint}")


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.is_mutable or not _memory(out) <= _memory((args, kwargs)):
            self.names[func.overloadpacket.__name__] += 1
        return out


def _memory(tree):
    """The addresses of all tensors' storages in nested lists, tuples and dicts."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def aten_calls(function):
    """A Counter {name: calls} of the aten functions that `function()` calls, views left out.

    A view writes nothing and returns only memory of its arguments. Each of the others is at least
    one kernel launch on a GPU, except for the few that only allocate.
    """
    with _Calls() as calls:
        function()
    return calls.names


def bytes_kept(function, parameters=()):
    """Bytes of all tensors kept for the backward of the loss `function()`, parameters left out.

    Those that autograd saves, and those that nodes of the graph hold by themselves. Tensors that
    share a storage count once, with the whole storage, since all of it is kept alive.
    """
    storages, known = {}, _memory(list(parameters))

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
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


class _Bytes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.is_mutable or not _memory(out) <= _memory((args, kwargs)):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if torch.is_tensor(leaf)]
            self.moved += sum(tensor.nbytes for tensor in tensors)
        return out


def bytes_moved(function):
    """Bytes of all tensors that the aten functions called by `function()` read and write."""
    with _Bytes() as count:
        function()
    return count.moved
