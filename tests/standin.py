"""A stand-in for a CUDA GPU: tensors that say they are on one, whose values lie on the CPU.

    python tests/standin.py train_search.py --set digits ...    # as python train_search.py ...
    python tests/standin.py -m pytest -m gpu                    # as python -m pytest -m gpu

What runs here is what would run on a GPU, in Python: the same branches, captures and replays. It
stops, as a GPU does, where tensors of both devices meet, where a graph's capture waits for the
GPU, where NumPy is given a tensor of the GPU, and where an operation has no kernel for CUDA (known
to a PyTorch that was built for it). A replay runs the operations of the capture again, on the
memory that they had then. With STANDIN_LAYOUTS=other, each convolution, pool and norm leaves its
maps in the memory format that the CPU would not have chosen: which one cuDNN takes is its affair.

Its memory is that of the tensors on it, as PyTorch counts it on a GPU, without what cuDNN takes
within a call. WAITS counts where the host waits for the GPU, by operation.

It is not: fast, kernels, streams, several GPUs, pinned memory, or the random numbers of a GPU. Of
autocast it has the functions that are used here. A process that is spawned has none.
"""

import contextlib
import os
import runpy
import sys
import weakref
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

NAME = "a stand-in"
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
# What such a tensor calls its device in C++: autograd has no thread for it, and no other use.
INSIDE = torch.device("lazy:0")
WAITS = Counter()

aten = torch.ops.aten
BETWEEN = {aten.copy_.default, aten._to_copy.default}  # may have tensors of both devices
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
WAITING = {  # for a size or a value
    aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select,
    aten.bincount, aten._unique2, aten.unique_dim, aten.repeat_interleave,
}  # fmt: skip
LAID_OUT = {
    aten.convolution, aten.convolution_backward, aten.native_batch_norm,
    aten.native_batch_norm_backward, aten.max_pool2d_with_indices, aten.avg_pool2d,
    aten.max_pool2d_with_indices_backward, aten.avg_pool2d_backward,
}  # fmt: skip

# What autocast computes in half precision and in float32 on CUDA, of what is used here (the lists
# stand in PyTorch's reference of automatic mixed precision).
HALF = {
    torch.conv2d, F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm,
    torch.mv, Tensor.mv, torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm, torch.addmm,
    Tensor.addmm, torch.addr, Tensor.addr,
}  # fmt: skip
FULL = {
    F.cross_entropy, F.nll_loss, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax,
    torch.log_softmax, Tensor.log_softmax, F.kl_div, F.normalize, torch.sum, Tensor.sum, torch.norm,
    Tensor.norm, Tensor.prod, Tensor.cumsum, Tensor.exp, Tensor.log, Tensor.pow, Tensor.rsqrt,
}  # fmt: skip


class OnGpu(Tensor):
    """A tensor on the stand-in; `values`: what it holds, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        made = Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype,
            device=INSIDE,
        )  # fmt: skip
        made.values = values
        MEMORY.hold(values.untyped_storage())
        return made

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})

    def __reduce_ex__(self, protocol):  # in a file it is a tensor as any
        return self.values.detach().clone().__reduce_ex__(protocol)


class Memory:
    """Bytes of the tensors on the stand-in: now, and at most."""

    def __init__(self):
        self.now = self.most = 0
        self.held = set()  # storages, by their places

    def hold(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.held:
            self.held.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.free, key, size).atexit = False

    def free(self, key, size):
        self.held.remove(key)
        self.now -= size

    def reset(self, device=None):
        self.most = self.now


MEMORY = Memory()


@cache
def has_kernel(name):
    """Whether CUDA runs this operation; True where this PyTorch cannot know."""
    known = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    return torch.version.cuda is None or name.startswith("prim") or known(name, "CUDA")


def run(op, args, kwargs):
    """What an operation gives, on the device on which it would give it."""
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, OnGpu)]
    where, kind = kwargs.get("device"), op.overloadpacket
    on_gpu = bool(there) if where is None else torch.device(where).type == INSIDE.type
    elsewhere = [x for x in tensors if not isinstance(x, OnGpu)]
    if there and kind in INDEXED and elsewhere:
        waits(f"{op} with an index of the CPU")
    elif there and op not in BETWEEN and any(x.dim() for x in elsewhere):
        shapes = ", ".join(str(tuple(x.shape)) for x in elsewhere)
        raise RuntimeError(f"{op}: tensors on cuda:0 and on the CPU, of {shapes}")
    if on_gpu and kind in INDEXED and any(x.dtype is torch.bool for x in tensors[1:]):
        waits(f"{op} with a mask")
    if there and kind in WAITING:
        waits(op)
    pinned = kwargs.get("non_blocking") and hasattr(tensors[0], "pinned")
    if op is aten._to_copy.default and on_gpu != bool(there) and not pinned:
        waits(f"{op} {'to' if on_gpu else 'from'} the GPU, of {tuple(tensors[0].shape)}")
    if op is aten.copy_.default and len(there) == 1:
        waits(f"{op} between GPU and CPU, of {tuple(tensors[0].shape)}")
    if on_gpu and not has_kernel(op.name()):
        raise NotImplementedError(f"{op} has no kernel for CUDA")

    args, kwargs = tree_map(values, (args, kwargs))
    out = op(*args, **kwargs)
    if on_gpu and kind in LAID_OUT and os.environ.get("STANDIN_LAYOUTS") == "other":
        out = tree_map(in_other_layout, out)
    if not on_gpu:
        return out
    if capture is not None:
        capture.append((op, args, kwargs, out))
    known = {id(x.values): x for x in there}  # an operation in place gives back what it was given
    return tree_map(lambda x: known[id(x)] if id(x) in known else wrapped(x), out)


def values(x):
    if isinstance(x, torch.device) and x.type == INSIDE.type:
        return CPU
    return x.values if isinstance(x, OnGpu) else x


def wrapped(x):
    return OnGpu(x) if isinstance(x, Tensor) else x


def in_other_layout(x):
    if not isinstance(x, Tensor) or x.dim() != 4:
        return x
    last = x.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)


def waits(what):
    """The host waits for the GPU, which it may not in a capture."""
    if capture is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
    WAITS[str(what)] += 1


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What Python asks of a tensor before any operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        x = args[0] if args else None
        if isinstance(x, OnGpu) and function in ANSWERS:
            return ANSWERS[function](x)
        if (function in HALF or function in FULL) and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda") if function in HALF else torch.float32
            args, kwargs = tree_map(lambda x: autocast(x, dtype), (args, kwargs))
        if function == Tensor.pin_memory:
            x = x.clone()
            x.pinned = True
            return x
        if function == Tensor.cuda:
            function, args = Tensor.to, (x, GPU)
        if function == Tensor.__getitem__ and isinstance(x, OnGpu) and isinstance(args[1], list):
            args = x, torch.tensor(args[1])
        if function == Tensor.data.__set__ and isinstance(x, OnGpu):
            function(*args)
            x.values = args[1].values.detach()
            return None
        if function == Tensor.to:
            args = list(args)
            if len(args) > 1 and isinstance(args[1], Tensor):
                args[1:2] = [args[1].device, args[1].dtype]
            if "device" in kwargs:
                args.insert(1, kwargs.pop("device"))
            if len(args) > 1 and is_gpu(args[1]):
                if not isinstance(x, OnGpu):
                    args[1] = INSIDE
                else:  # it is there
                    del args[1]
                    kwargs.pop("non_blocking", None)
                    if len(args) == 1 and not kwargs:
                        return x
                    if len(args) == 1:
                        args.append(kwargs.pop("dtype", x.dtype))
        elif is_gpu(kwargs.get("device")):
            kwargs["device"] = INSIDE
            if function in (torch.tensor, torch.as_tensor):  # C++ makes it in its own way
                made = function(*args, **kwargs | {"device": CPU})
                waits(f"{function.__name__} of Python values")
                return OnGpu(made)
        return function(*args, **kwargs)


def autocast(x, dtype):
    if isinstance(x, OnGpu) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(dtype)
    return x


def is_gpu(x):
    return isinstance(x, torch.device | str) and torch.device(x).type == "cuda"


def no_numpy(x):
    raise TypeError("can't convert cuda:0 device type tensor to numpy")


def as_list(x):
    waits("tolist")
    return x.values.tolist()


ANSWERS = {
    Tensor.device.__get__: lambda x: GPU,
    Tensor.is_cuda.__get__: lambda x: True,
    Tensor.is_cpu.__get__: lambda x: False,
    Tensor.data_ptr: lambda x: x.values.data_ptr(),
    Tensor.untyped_storage: lambda x: x.values.untyped_storage(),
    Tensor.numpy: no_numpy,
    Tensor.__array__: no_numpy,
    Tensor.tolist: as_list,
}


# What torch.cuda has

capture = None  # the operations of the graph that is being captured


class Graph:
    def __init__(self):
        self.operations = []

    def pool(self):
        return 0, 1

    def replay(self):
        with torch.no_grad():
            for op, args, kwargs, out in self.operations:
                for old, new in zip(tree_iter(out), tree_iter(op(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def capturing(graph, pool=None, stream=None, capture_error_mode="global"):
    global capture
    synchronize()
    capture = graph.operations
    try:
        yield
    finally:
        capture = None


def synchronize(device=None):
    waits("synchronize")


def stream():
    return SimpleNamespace(wait_stream=lambda other: None, synchronize=synchronize)


def install():
    """From here on this process has the stand-in as its only GPU."""
    generator, current = torch.Generator(), stream()
    about = SimpleNamespace(name=NAME, total_memory=2**34, major=9, minor=0)
    there = dict(
        is_available=lambda: True, device_count=lambda: 1, is_initialized=lambda: True,
        _lazy_init=lambda: None, _is_in_bad_fork=lambda: False,
        current_device=lambda: 0, set_device=lambda device: None, synchronize=synchronize,
        get_device_name=lambda device=None: NAME, get_device_properties=lambda device=None: about,
        get_device_capability=lambda device=None: (about.major, about.minor),
        empty_cache=lambda: None, reset_peak_memory_stats=MEMORY.reset,
        max_memory_allocated=lambda device=None: MEMORY.most,
        memory_allocated=lambda device=None: MEMORY.now,
        get_rng_state=lambda device=None: generator.get_state(),
        set_rng_state=lambda state, device=None: generator.set_state(state),
        manual_seed=generator.manual_seed, manual_seed_all=generator.manual_seed,
        Stream=lambda device=None: stream(), set_stream=lambda stream: None,
        current_stream=lambda device=None: current, default_stream=lambda device=None: current,
        stream=contextlib.nullcontext, device=contextlib.nullcontext,
        CUDAGraph=Graph, graph=capturing,
    )  # fmt: skip
    for name, value in there.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.is_available = lambda: False  # nothing is pinned
    # Module.to keeps its parameters the same objects, as it does where the devices are real.
    torch.__future__.set_swap_module_params_on_conversion(True)
    _foreach_utils._foreach_supported_types.append(OnGpu)
    group = torch._C._group_tensors_by_device_and_dtype

    def grouped(*args, **kwargs):
        named = {INSIDE: GPU}
        return {(named.get(d, d), t): v for (d, t), v in group(*args, **kwargs).items()}

    torch._C._group_tensors_by_device_and_dtype = grouped
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        setattr(torch.optim.Optimizer, name, lambda self: None)
    sys.path.append(str(Path(__file__).parents[1]))
    from fused import cell

    transformed = cell.is_transformed  # which takes tensors of a type unknown to it for traced ones
    cell.is_transformed = lambda *tensors: transformed(*map(values, tensors))
    Operations().__enter__()
    Functions().__enter__()


if __name__ == "__main__":
    import standin  # not as __main__, so that there is one of it

    standin.install()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
