"""How a discrete network is run, not what it computes: its memory format, and compiled cells."""

import contextlib
import functools
import time

import torch

from harness import costs, distributed
from harness.files import read_args
from model import Cell
from utils import UserError

MEASURED_ON = ("cuda",)  # devices on which the layouts are timed
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def choose_layout(network, images, args, device):
    """Sets network.layout as --layout says; returns what args.json keeps of it.

    auto: the network's own, or on a GPU the faster of both, except with --deterministic, where
    nothing depends on a clock; a resumed run has what it began with. images: (number, side).
    """
    if args.layout != "auto":
        network.layout = LAYOUTS[args.layout]
        return {}
    if args.resume is not None:
        about = read_args(args.resume)
        kept = {name: about[name] for name in ("layout", "layout_ms") if name in about}
    elif device.type in MEASURED_ON and not args.deterministic:
        seconds = distributed.on_main(lambda: layout_seconds(network, images, args, device))
        if min(seconds.values()) == float("inf"):  # the training will say what to do
            return {}
        kept = {"layout": min(seconds, key=seconds.get)}
        kept["layout_ms"] = {name: 1e3 * value for name, value in seconds.items()}
    else:
        return {}
    if kept:
        network.layout = LAYOUTS[kept["layout"]]
    return kept


def introduce(log, layout):
    """A line about what choose_layout measured, if it did."""
    if layout:
        times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in layout["layout_ms"].items())
        log.info("layout %s (forward + backward at the start: %s)", layout["layout"], times)


def layout_seconds(network, images, args, device):
    """{layout: seconds} of forward + backward, the fastest of five, two before not counted.

    Infinite where the memory of a GPU does not suffice.
    """
    before, seconds = network.layout, dict.fromkeys(LAYOUTS, float("inf"))
    step = functools.partial(_try_step, network, images, args, device)
    for turn in range(7):
        for name, layout in LAYOUTS.items():
            network.layout = layout
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                taken = costs.seconds(step, device)
                if turn >= 2:
                    seconds[name] = min(seconds[name], taken)
    network.layout = before
    costs.forget(device)
    return seconds


def _try_step(network, images, args, device):
    """Forward and backward of a random batch; all is afterwards as if it had not been."""
    buffers, training = [buffer.clone() for buffer in network.buffers()], network.training
    number, side = images
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            dtype = next(network.parameters()).dtype
            x = torch.rand(number, 3, side, side, device=device, dtype=dtype)
            network.train()
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                logits = [part for part in network(x) if part is not None]
                loss = sum(part.float().square().mean() for part in logits)
            torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    finally:
        network.train(training)
        with torch.no_grad():
            for buffer, value in zip(network.buffers(), buffers, strict=True):
                buffer.copy_(value)


class CompiledCell:
    """The forward of a model.Cell, compiled for training on `number` images.

    Evaluation and the short last batch of an epoch run as they would without: neither is worth a
    compilation. So does what drop path draws: its chance changes every epoch, and its random
    numbers are those of an uncompiled run.
    """

    def __init__(self, cell, compute, number):
        self.cell, self.compute, self.number = cell, compute, number

    def __call__(self, s0, s1, drop_path_prob):
        if not self.cell.training or len(s1) != self.number:
            return type(self.cell).forward(self.cell, s0, s1, drop_path_prob)
        # Factors of 1 at a chance of 0: with None it would be compiled twice.
        return self.compute(self.cell, s0, s1, self.cell.drop_path(s1, drop_path_prob))


def compile_cells(network, images, args, device, log):
    """Compiles the cells of a discrete network for --compile, each shape of cell once.

    A first step is tried at once. Where it fails, for want of a compiler say, one line tells, and
    the network is as before. images: (number in a step, their side), of this process. Raises
    UserError where the network is for several GPUs in one process.
    """
    if distributed.replicas(device, args) > 1:
        raise UserError("--compile has no DataParallel: use torchrun, or one GPU with --gpu 0")
    start = time.perf_counter()
    try:
        torch._dynamo.config.cache_size_limit = 64  # shapes of cells
        torch._dynamo.config.optimize_ddp = False  # it would split what is one cell
        layout = network.layout_on(device)
        # PyTorch 2.14 forgets the layout of depthwise convolutions in the backward pass.
        options = {"force_layout_optimization": layout == torch.channels_last}
        compute = torch.compile(Cell.compute, dynamic=False, options=options)
        for cell in network.cells:
            cell.forward = CompiledCell(cell, compute, images[0])
        _try_step(network, images, args, device)
    except Exception as error:  # whatever a compiler that is missing or fails makes of it
        for cell in network.cells:
            with contextlib.suppress(AttributeError):
                del cell.forward
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        log.info("--compile: going on uncompiled, it failed (%s)", reason)
        return
    log.info("compiled %d cells in %.0f s", len(network.cells), time.perf_counter() - start)
