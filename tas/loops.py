"""An epoch of the search, the loss of a training, networks side by side in time."""

import math
import statistics
import time
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from harness import costs, distributed, generators
from harness.loops import Figures
from tas import losses


def search_epoch(loader, arch_batches, model, optimizer, arch_optimizer, tau, unpruned, args, run):
    """One epoch of a search: in each step the weights, then the attentions on the other half.

    loader: of the weights' half; arch_batches: endless, of the attentions'. unpruned: multiply-adds
    in millions. args: amp, grad_clip, flop_ratio, flop_weight, tolerance, report_freq. run: a
    runs.Run. Returns the training figures as a dict.
    """
    model.train()
    figures = Figures("search", loader, args.report_freq, run.log, run)
    autocast = torch.autocast(loader.device.type, torch.bfloat16, enabled=args.amp)
    for x, y in figures.steps():
        with autocast:
            logits, _ = model.search(x, tau)
            loss = F.cross_entropy(logits, y)
        norm = step(optimizer, loss, len(y), args.grad_clip)

        x_arch, y_arch = next(arch_batches)
        with autocast:
            arch_logits, expected = model.search(x_arch, tau)
            cost = losses.cost(
                expected, model.argmax_multiply_adds(x_arch.shape[2:]),
                args.flop_ratio * unpruned, unpruned, args.tolerance,
            )  # fmt: skip
            arch_loss = F.cross_entropy(arch_logits, y_arch) + args.flop_weight * cost
        arch_norm = step(arch_optimizer, arch_loss, len(y_arch))

        figures.update(loss, logits, y, norm + arch_norm)  # not finite if either is not
        run.step(figures)
    return figures.result(loader.device)


def taught_by(teacher):
    """The `forward` of harness.loops.train_epoch: with distillation, or without, teacher None.

    args: temperature and distillation, the teacher's share of the loss.
    """

    def forward(model, criterion, x, y, args):
        logits = model(x)
        if teacher is None:
            return criterion(logits, y), logits
        with torch.no_grad():
            taught = teacher(x)
        return losses.distillation(logits, taught, y, args.temperature, args.distillation), logits

    return forward


def step(optimizer, loss, images, grad_clip=None):
    """A step on the mean loss over the images of all processes; returns the gradient's norm."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    weight = distributed.share(images, loss.device) / distributed.world_size()
    torch.autograd.backward(loss * weight, inputs=parameters)
    summed = distributed.summed([parameter.grad for parameter in parameters])
    for parameter, gradient in zip(parameters, summed, strict=True):
        parameter.grad = gradient
    norm = nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    optimizer.step()
    return norm


def same_draws(device):
    """All processes go on with the random numbers of the main one."""
    for get, put in _generators(device):
        put(distributed.on_main(get))


def check_same(model, device):
    """UserError where two processes have other attentions or would draw other numbers."""
    states = [get() for get, _ in _generators(device)]
    distributed.check_equal(model.arch_parameters(), "the attentions")
    distributed.check_equal(states, "the random numbers")


def _generators(device):
    """[(get, set)] of the states of the generators that a search on `device` draws from."""
    return [(torch.get_rng_state, torch.set_rng_state), *generators.on_device(device).values()]


@torch.no_grad()
def latencies(networks, images, seconds=2.0):
    """(lower quartile, median, upper) in ms of each network's evaluation of `images` (N, 3, H, W).

    They take turns for so many seconds, ten rounds at least, so that a busy machine slows all of
    them; the first round is not counted.
    """
    times = [[] for _ in networks]
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    start = time.perf_counter()
    while len(times[-1]) < 11 or time.perf_counter() - start < seconds:
        for network, mine in zip(networks, times, strict=True):
            mine.append(1e3 * costs.seconds(partial(network, images), images.device))
    for network, mode in zip(networks, modes, strict=True):
        network.train(mode)
    return [statistics.quantiles(mine[1:], n=4) for mine in times]
