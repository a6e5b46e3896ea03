"""In which form the supernet of a search runs: that of --form, or the one that is fastest here.

All forms compute the same figures, but for rounding. Which is the fastest on a GPU depends on the
GPU, cuDNN, the batch and the precision, so a search that is begun there tries them.
"""

import copy
import time
from types import SimpleNamespace

import torch

import fused
from architect import Architect, search_step
from harness import costs, distributed
from harness.flags import FORMS
from model_search import Network

MEASURED_ON = GRAPHS_ON = ("cuda",)
ROUNDS = 3  # timed, of a few steps each


def choose(model, args, device, shape):
    """(the supernet on `device`, in the form of the run; a line for the log on how it was chosen).

    model: as searches.supernet makes it, on the CPU. shape: (N, side) of the images of a step in
    this process. Where --form is "auto" it sets args.form, and where a step without graphs is the
    faster one args.no_cuda_graph: both stand in args.json then, so that a resumed run keeps them.
    The main process decides for all. Weights and random numbers stay as they are.
    Raises torch.cuda.OutOfMemoryError where no form fits in memory.
    """
    line = None
    if args.form == "auto":
        args.form = "plain" if args.plain else "fused"  # also in runs that are older than --form
        free = not (args.plain or args.deterministic or args.resume is not None)
        if free and device.type in MEASURED_ON:
            choice = distributed.on_main(lambda: measure(model, args, device, shape))
            args.form, args.no_cuda_graph, line = choice
            args.recompute &= args.form.startswith("fused")  # else --resume would refuse them
    return _in_form(model, args.form).to(device), line


def _in_form(model, name):
    """The supernet itself, or one like it, with the same weights, in the form `name`."""
    fast, layout = FORMS[name]
    if model.fused and not fast:
        with torch.random.fork_rng([]):
            arguments = model._arguments | {"fused": False, "recompute": False}
            plain = Network(**arguments)
        plain.load_state_dict(model.state_dict())
        model = plain
    if model.fused == fast:  # or it is plain for want of a fast form that is the same
        model.layout = layout
    return model


def measure(model, args, device, shape):
    """(name of the fastest form, whether without graphs, a line with all times).

    Each form makes a few search steps on random images, with its own copy of the supernet.
    """
    start = time.perf_counter()
    without = not model.fused
    names = [name for name, (fast, _) in FORMS.items() if not (fast and without)]
    if args.recompute and not without:
        names = [name for name in names if name.startswith("fused")]
    graphs = device.type in GRAPHS_ON and not args.no_cuda_graph
    waits = getattr(args, "sync_bn", False) or torch.is_anomaly_enabled()
    graphs = graphs and not waits  # see fused.Gradients
    times, failed = {}, {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for name in names:
            # After a capture that has failed PyTorch would retry no allocation in the next.
            captures = graphs and not any(graph for _, graph in failed)
            error = _time(name, model, args, device, shape, captures, times, failed)
            costs.forget(device)
            if error is not None:
                failed[name, (name, False) in times] = error
    if not times:
        raise next(iter(failed.values()))
    fastest, seconds = min(times, key=times.get), time.perf_counter() - start
    shown = [f"{_named(key, graphs)} {1e3 * value:.1f}" for key, value in times.items()]
    shown += [f"{_named(key, graphs)}: {_short(error)}" for key, error in failed.items()]
    line = (
        f"form {_named(fastest, graphs)}, the fastest; ms a step: {', '.join(shown)} "
        f"(tried in {seconds:.1f} s)"
    )
    return fastest[0], args.no_cuda_graph or (graphs and not fastest[1]), line


def _named(key, graphs):
    name, graph = key
    return name if graph or not graphs else f"{name} without graphs"


def _short(error):
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


def _time(name, model, args, device, shape, graphs, times, failed):
    """Adds the seconds of a step of a form, without graphs and with; returns what stopped it."""
    try:
        steps = Steps(_in_form(copy.deepcopy(model), name).to(device), args, device, shape)
        times[name, False] = seconds(steps, device)
        if graphs:
            steps.capture()
            if steps.reason is None:
                times[name, True] = seconds(steps, device)
            else:
                failed[name, True] = RuntimeError(steps.reason)
    except RuntimeError as error:  # out of memory, or a kernel that this GPU does not have
        return error.with_traceback(None)  # which holds the copy
    return None


class Steps:
    """Search steps of a copy of the supernet on random images, in training as the run makes them.

    Without messages to other processes, which cost the same in any form.
    """

    def __init__(self, model, args, device, shape):
        n, side = shape
        self.model, self.args = model.train(), args
        self.weights = model.weights()
        # Drawn on the CPU: a capture that has failed may have left a GPU's generator unusable.
        x = torch.randn(n, 3, side, side, dtype=model.classifier.weight.dtype).to(device)
        self.x = x.contiguous(memory_format=torch.channels_last)  # as the loaders have them
        self.y = torch.randint(model.classifier.out_features, (n,)).to(device)
        self.optimizer = torch.optim.SGD(self.weights, 0.0, 0.9, weight_decay=args.weight_decay)
        self.architect = Architect(model, SimpleNamespace(**vars(args) | {"no_cuda_graph": True}))
        self.gradients = fused.Gradients(model, model._criterion, args.amp, False)
        self.learns = args.begin < args.epochs

    def __call__(self, n=None):
        self.model.resample()
        batch = self.x[:n], self.y[:n]
        search_step(
            batch, batch if self.learns else None, self.weights, self.gradients, self.architect,
            self.optimizer, self.args,
        )  # fmt: skip

    def capture(self):
        """From here on steps are CUDA graphs; a last, short batch fits beside them."""
        self.gradients.graphs = self.architect.gradients.graphs = True
        for _ in range(fused.Gradients.WARM_UP + 1):
            self()
        if len(self.x) > 2:
            self(len(self.x) - 1)

    @property
    def reason(self):
        """Why there are no graphs, or None."""
        return self.gradients.reason or self.architect.gradients.reason


def seconds(steps, device):
    """The seconds of a step: the least of ROUNDS, each of some steps, after one step not counted.

    In a row on a GPU, as in a run: Python goes ahead there.
    """
    steps()
    n = 4 if device.type == "cuda" else 1

    def several():
        for _ in range(n):
            steps()

    return min(costs.seconds(several, device) for _ in range(ROUNDS)) / n
