"""What a forward and a backward pass cost: calls into aten, and bytes kept between the two."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
    """Bytes of all tensors that `function()` saves for its backward, the parameters left out.

    Tensors that share a storage count once, with the whole storage, since all of it is kept alive.
    """
    storages, known = {}, _memory(list(parameters))

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()  # holds the graph, so that no storage is freed and its address used again
    del kept
    return sum(storages.values())


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
