"""A stand-in for a CUDA GPU: tensors that say they are on one, whose values lie on the CPU.

    python tests/standin.py train_search.py --set digits ...    # as python train_search.py ...
    python tests/standin.py -m pytest -m gpu                    # as python -m pytest -m gpu

What Python does on a GPU is done here: the same branches, captures and replays. It stops, as a GPU
does, where tensors of both devices meet; where NumPy is given a tensor of the GPU; where an
operation has no kernel for CUDA (known to a PyTorch that was built for CUDA); where a capture waits
for the GPU; and where a replay reads memory that was freed since. In a capture nothing is computed;
a replay runs its operations, on the memory that they had.

STANDIN_LAYOUTS=contiguous, channels_last or drawn: in this memory format convolutions, pools and
norms leave their maps, since which one cuDNN takes is its affair; drawn: in either, by chance.

WAITS counts where the host waits for the GPU, by operation; WAITING, which operations do, was
written by hand. MEMORY is of the tensors, without what a kernel takes within a call; a captured
graph keeps all of its own here, which a GPU does not.

It is not: fast, kernels and the types that they take, streams, threads of autograd, torch.compile,
several GPUs, pinned memory, or the random numbers of a GPU; where C++ asks for the device of a
tensor it is told another. Of autocast it has the functions that are used here. A process that is
spawned has no stand-in.
"""

import contextlib
import os
import random
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
BETWEEN = {aten.copy_, aten._to_copy}  # may have tensors of both devices
STRICT = {aten.cat, aten.stack}  # take not even a number of the CPU
READ_AT = {aten.index, aten._unsafe_index}
WRITTEN_AT = {aten.index_put, aten.index_put_, aten._index_put_impl_}
WAITING = {  # for a size or a value
    aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select,
    aten.bincount, aten.histc, aten.multinomial, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.repeat_interleave,
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
    where = kwargs.get("device")
    on_gpu = bool(there) if where is None else torch.device(where).type == INSIDE.type
    if there or on_gpu:
        check_devices(op, args, kwargs, tensors, on_gpu)
        look_for_waits(op, args, kwargs, tensors, on_gpu)
    if on_gpu and CAPTURE.graph is not None:
        args, kwargs = tree_map(CAPTURE.graph.with_numbers, (args, kwargs))
        out = CAPTURE.graph.record(op, *tree_map(values, (args, kwargs)))
    else:
        args, kwargs = tree_map(values, (args, kwargs))
        out = compute(op, args, kwargs, on_gpu)
    if not on_gpu:
        return out
    known = {id(x.values): x for x in there}  # an operation in place gives back what it was given
    return tree_map(lambda x: the_same(known[id(x)]) if id(x) in known else wrapped(x), out)


def check_devices(op, args, kwargs, tensors, on_gpu):
    """RuntimeError where CUDA has no such operation, or not on these tensors."""
    if on_gpu and not has_kernel(op.name()):
        raise NotImplementedError(f"{op} has no kernel for CUDA")
    if on_gpu and kwargs.get("generator") is not None:
        raise RuntimeError(f"{op}: a generator of the CPU for numbers on cuda:0")
    kind, there = op.overloadpacket, any(isinstance(x, OnGpu) for x in tensors)
    if not there or kind in BETWEEN:
        return
    if kind in READ_AT | WRITTEN_AT and isinstance(args[0], OnGpu):  # indices may be on the CPU
        tensors = list(args[2:3])
    elsewhere = [x for x in tensors if not isinstance(x, OnGpu)]
    written = op._schema.is_mutable and any(x is args[0] for x in elsewhere)
    if written or any(x.dim() or kind in STRICT | READ_AT for x in elsewhere):
        shapes = ", ".join(str(tuple(x.shape)) for x in elsewhere)
        raise RuntimeError(f"{op}: tensors on cuda:0 and on the CPU, of {shapes}")


def look_for_waits(op, args, kwargs, tensors, on_gpu):
    kind, there = op.overloadpacket, [x for x in tensors if isinstance(x, OnGpu)]
    if kind in READ_AT | WRITTEN_AT:
        indices = [x for x in args[1] if x is not None]
        masked = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
        number = kind in WRITTEN_AT and len(indices) == 1 and args[2].numel() == 1
        if masked and not number:  # which would be masked_fill
            waits(f"{op} with a mask")
        if not all(isinstance(x, OnGpu) for x in indices):
            waits(f"{op} with an index of the CPU")
    if there and kind in WAITING:
        waits(op)
    pinned = kwargs.get("non_blocking") and hasattr(tensors[0], "pinned")
    if kind is aten._to_copy and on_gpu != bool(there) and not pinned:
        waits(f"{op} {'to' if on_gpu else 'from'} the GPU, of {tuple(tensors[0].shape)}")
    if kind is aten.copy_ and len(there) == 1:
        waits(f"{op} between GPU and CPU, of {tuple(tensors[0].shape)}")


def compute(op, args, kwargs, on_gpu=True):
    out = op(*args, **kwargs)
    layouts = os.environ.get("STANDIN_LAYOUTS")
    if on_gpu and layouts and op.overloadpacket in LAID_OUT:
        return tree_map(lambda x: in_layout(x, layouts), out)
    return out


def in_layout(x, name):
    if not isinstance(x, Tensor) or x.dim() != 4:
        return x
    name = DRAW.choice(["contiguous", "channels_last"]) if name == "drawn" else name
    formats = dict(contiguous=torch.contiguous_format, channels_last=torch.channels_last)
    return x.contiguous(memory_format=formats[name])


def values(x):
    if isinstance(x, torch.device) and x.type == INSIDE.type:
        return CPU
    return x.values if isinstance(x, OnGpu) else x


def wrapped(x):
    return OnGpu(x) if isinstance(x, Tensor) else x


def the_same(x):
    strides = zip(x.shape, x.stride(), x.values.stride(), strict=False)
    if x.shape != x.values.shape or any(a != b for size, a, b in strides if size > 1):
        raise NotImplementedError("the stand-in has no changes of shape in place")
    return x


def waits(what):
    """The host waits for the GPU, which it may not in a capture."""
    not_in_a_capture(what)
    WAITS[str(what)] += 1


def not_in_a_capture(what):
    if CAPTURE.graph is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


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
        if function == Tensor.__getitem__ and isinstance(x, OnGpu):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = x, tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
        if function == Tensor.data.__set__ and isinstance(args[1], OnGpu):
            if isinstance(x, OnGpu):
                function(*args)
                x.values = args[1].values.detach()
            else:  # x stays the same object
                torch.utils.swap_tensors(x, args[1].detach().requires_grad_(x.requires_grad))
            return None
        if function == Tensor.to:
            args = arguments_of_to(args, kwargs)
            if args is None:
                return x
        elif is_gpu(kwargs.get("device")):
            kwargs["device"] = INSIDE
            if function in (torch.tensor, torch.as_tensor):  # C++ makes it in its own way
                learns = kwargs.pop("requires_grad", False)
                waits(f"{function.__name__} of Python values")
                made = OnGpu(function(*args, **kwargs | {"device": CPU}))
                return made.requires_grad_(learns)
        return function(*args, **kwargs)


def arguments_of_to(args, kwargs):
    """Those that C++ understands, of x.to(...); None where x is what is asked for."""
    x, *args = args
    if args and isinstance(args[0], Tensor):
        args[:1] = [args[0].device, args[0].dtype]
    if "device" in kwargs:
        args.insert(0, kwargs.pop("device"))
    if args and is_gpu(args[0]):
        if not isinstance(x, OnGpu):
            return [x, INSIDE, *args[1:]]
        kwargs.pop("non_blocking", None)  # it is there: of x.to(GPU, ...) the rest
        args = args[1:] or [kwargs.pop("dtype", None)]
        if args == [None]:
            if not kwargs:
                return None
            args = [x.dtype]
    return [x, *args]


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

CAPTURE = SimpleNamespace(graph=None)
DRAW = random.Random(0)


class Graph:
    """The operations of a capture, which a replay runs again."""

    def __init__(self):
        self.operations = []
        self.made, self.before = set(), {}  # storages of the capture; what it changed outside

    def pool(self):
        return 0, 1

    def with_numbers(self, x):
        """A number of the CPU is an argument of the kernel, which stays as it was."""
        if isinstance(x, Tensor) and not isinstance(x, OnGpu):
            x = x.clone()
            self.made.add(place(x))
        return x

    def record(self, op, args, kwargs):
        written = [x for x in tree_iter(written_by(op, args, kwargs)) if isinstance(x, Tensor)]
        for x in written:
            if place(x) not in self.made and place(x) not in self.before:
                whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
                self.before[place(x)] = whole, whole.clone()
        inputs = tree_map(self.kept, (args, kwargs))
        known = {place(x) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        out = compute(op, args, kwargs)
        tensors = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        self.made |= {place(x) for x in tensors} - known
        self.operations.append((op, inputs, tree_map(self.kept, out)))
        return out

    def kept(self, x):
        """How a replay finds a tensor: as it is if the graph made it, otherwise while it lives."""
        if not isinstance(x, Tensor) or place(x) in self.made:
            return x
        return Outside(x) if x.numel() else x

    def end(self):
        """Nothing was computed: what was changed is as before, what was made is without meaning."""
        for whole, before in self.before.values():
            whole.copy_(before)
        self.before.clear()
        for *_, out in self.operations:
            for x in tree_iter(out):
                if isinstance(x, Tensor) and x.is_floating_point() and 0 not in x.stride():
                    x.fill_(torch.nan)

    def replay(self):
        with torch.no_grad():
            for op, inputs, out in self.operations:
                args, kwargs = tree_map(found, inputs)
                new = compute(op, args, kwargs)
                for old, value in zip(tree_iter(out), tree_iter(new), strict=True):
                    old = found(old)
                    if isinstance(old, Tensor) and old.data_ptr() != value.data_ptr():
                        old.copy_(value)


class Outside:
    """A tensor that a graph uses and does not own."""

    def __init__(self, x):
        self.storage = weakref.ref(x.untyped_storage())
        self.about = x.storage_offset(), x.shape, x.stride()
        self.dtype = x.dtype

    def now(self):
        storage = self.storage()
        if storage is None:
            raise RuntimeError("a replay reads memory that was freed since the capture")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.about)


def found(x):
    return x.now() if isinstance(x, Outside) else x


def place(x):
    return x.untyped_storage()._cdata


def written_by(op, args, kwargs):
    """The arguments that an operation changes."""
    if op.overloadpacket is aten.native_batch_norm:  # of which its schema does not tell
        return args[3:5]
    pairs = zip(op._schema.arguments, args, strict=False)
    named = [(a, kwargs[a.name]) for a in op._schema.arguments if a.name in kwargs]
    return [x for a, x in [*pairs, *named] if a.alias_info is not None and a.alias_info.is_write]


@contextlib.contextmanager
def capturing(graph, pool=None, stream=None, capture_error_mode="global"):
    synchronize()
    CAPTURE.graph = graph
    try:
        yield
    finally:
        CAPTURE.graph = None
        with torch.no_grad():
            graph.end()


def synchronize(device=None):
    waits("synchronize")


def healthy(optimizer):
    if not all(group.get("capturable") for group in optimizer.param_groups):
        not_in_a_capture("a step of an optimizer that is not capturable")


class Numbers:
    """The generator of a GPU, of which nothing here draws."""

    def __init__(self):
        self.generator = torch.Generator()

    def get(self, device=None):
        not_in_a_capture("the state of the generator")
        return self.generator.get_state()

    def set(self, state, device=None):
        not_in_a_capture("the state of the generator")
        self.generator.set_state(state)

    def seed(self, seed):
        not_in_a_capture("the state of the generator")
        self.generator.manual_seed(seed)


def stream():
    return SimpleNamespace(wait_stream=lambda other: None, synchronize=synchronize)


def install():
    """From here on this process has the stand-in as its only GPU."""
    numbers, current = Numbers(), stream()
    about = SimpleNamespace(name=NAME, total_memory=2**34, major=9, minor=0)
    there = dict(
        is_available=lambda: True, device_count=lambda: 1, is_initialized=lambda: True,
        _lazy_init=lambda: None, _is_in_bad_fork=lambda: False,
        current_device=lambda: 0, set_device=lambda device: None, synchronize=synchronize,
        get_device_name=lambda device=None: NAME, get_device_properties=lambda device=None: about,
        get_device_capability=lambda device=None: (about.major, about.minor),
        empty_cache=lambda: not_in_a_capture("empty_cache"),
        is_current_stream_capturing=lambda: CAPTURE.graph is not None,
        reset_peak_memory_stats=MEMORY.reset,
        max_memory_allocated=lambda device=None: MEMORY.most,
        memory_allocated=lambda device=None: MEMORY.now,
        get_rng_state=numbers.get, set_rng_state=numbers.set, manual_seed=numbers.seed,
        manual_seed_all=numbers.seed,
        Stream=lambda device=None: stream(), set_stream=lambda stream: None,
        current_stream=lambda device=None: current, default_stream=lambda device=None: current,
        stream=contextlib.nullcontext, device=contextlib.nullcontext,
        CUDAGraph=Graph, graph=capturing,
    )  # fmt: skip
    for name, value in there.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.is_available = lambda: False  # or a DataLoader would pin, on a real GPU
    # Module.to keeps its parameters the same objects, as it does where the devices are real.
    torch.__future__.set_swap_module_params_on_conversion(True)
    # Optimizers and clip_grad_norm_ take the functions of many tensors that they take on a GPU.
    _foreach_utils._foreach_supported_types.append(OnGpu)
    group = torch._C._group_tensors_by_device_and_dtype

    def grouped(*args, **kwargs):
        groups = group(*args, **kwargs).items()
        return {(GPU if device == INSIDE else device, dtype): v for (device, dtype), v in groups}

    torch._C._group_tensors_by_device_and_dtype = grouped
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        setattr(torch.optim.Optimizer, name, healthy)  # which would ask a real GPU
    sys.path.append(str(Path(__file__).parents[1]))
    from fused import cell

    transformed = cell.is_transformed  # which takes tensors of a type unknown to it for traced ones
    cell.is_transformed = lambda *tensors: transformed(*map(values, tensors))
    Operations().__enter__()
    Functions().__enter__()


if __name__ == "__main__":
    import standin  # not as __main__, so that there is one of it
    import warm

    if len(sys.argv) == 1:
        sys.exit("usage: python tests/standin.py SCRIPT ..., or -m MODULE ...")
    standin.install()
    del sys.argv[0]
    warm.run()
