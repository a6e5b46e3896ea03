"""Many processes: what `torchrun` starts, one per GPU. All of it works in a single process too."""

import math
import os
import sys
import warnings
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

import utils
from fused import FastForward
from harness import flags


def start(args):
    """Joins the processes that torchrun started, if it did; returns the device of this one.

    args: device and gpu. Raises UserError where the device is not there.
    """
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")):
        return flags.choose_device(args)
    if "MASTER_PORT" not in os.environ:
        raise utils.UserError(
            "MASTER_ADDR is set and MASTER_PORT is not: set both, as torchrun does"
        )
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or args.gpu:
        raise utils.UserError(
            "torchrun gives each process its own GPU: leave --gpu and --device out, "
            "or use --device cuda or cpu, also where a run has another one stored"
        )
    name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name
    device = flags.choose_device(SimpleNamespace(device=name, gpu=0))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except dist.DistError as error:
        why = str(error).split("\n")[0][:200]
        hint = f"the other processes cannot be reached ({why}): start them"
        if "EADDRINUSE" in why:
            hint = f"MASTER_PORT {os.environ['MASTER_PORT']} is in use: set another"
        raise utils.UserError(hint) from None
    _cpu_group.append(dist.new_group(backend="gloo"))
    return device


def alone(args):
    """The device of a script that is one process; UserError where torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" in os.environ:
        raise utils.UserError("this script is one process: start it with python, not with torchrun")
    return flags.choose_device(args)


_cpu_group = []  # of all processes, for messages that no GPU waits for; once there is one


def maximum(number):
    """The largest of the integers that the processes give, in every one of them."""
    if world_size() == 1:
        return int(number)
    largest = torch.tensor(int(number))
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_cpu_group[0] if _cpu_group else None)
    return int(largest)


def leave(code):
    """Ends this process with this exit code. Under torchrun all processes call it.

    They wait for each other once, then exit without taking the group of processes apart.
    """
    sys.stdout.flush()
    if world_size() > 1:
        dist.barrier(group=_cpu_group[0] if _cpu_group else None)  # the checkpoint is written
        os._exit(code)
    sys.exit(code)


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def part(images):
    """How many of the images of a whole step this process takes."""
    return len(range(rank(), images, world_size()))


def is_main():
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def on_main(function):
    """What `function()` returns in the main process, for all of them; called there alone."""
    result = [function() if is_main() else None]
    if world_size() > 1:
        dist.broadcast_object_list(result, 0)
    return result[0]


def gather(value):
    """[value of rank 0, value of rank 1, ...]."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def broadcast(tensors):
    """Makes the tensors equal to those of the main process: running statistics, say."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def total(values, device):
    """The sums over all processes of some numbers or 0-d tensors, as floats."""
    values = torch.stack([torch.as_tensor(value, device=device) for value in values])
    if world_size() > 1:
        dist.all_reduce(values)
    return values.tolist()


@torch.no_grad()
def summed(tensors):
    """The sum of each tensor over all processes, by one message for all."""
    if world_size() == 1:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def share(images, device):
    """images over the mean of all processes: the weight of a loss whose gradients are averaged.

    (They may differ: 10 images in 3 processes are 4, 3 and 3.)
    """
    if world_size() == 1:
        return 1.0
    everywhere = torch.full((), images, dtype=torch.float64, device=device)
    dist.all_reduce(everywhere)
    return images * world_size() / everywhere


def averaged(gradients):
    """A fused.Gradients whose gradients are those of the mean over the images of all processes."""

    def everywhere(wanted, input, target):
        weight = share(len(target), input.device) / world_size()
        loss, logits, values = gradients(wanted, input, target, weight)
        return loss, logits, summed(values)

    return gradients if world_size() == 1 else everywhere


def check_equal(tensors, what):
    """Raises UserError, in every process, where the tensors differ by a bit between two."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu().double()
    for other, theirs in enumerate(gather(flat.view(torch.int64).tolist())):
        if theirs != flat.view(torch.int64).tolist():
            pair = sorted((rank(), other))
            raise utils.UserError(
                f"{what} are not the same in processes {pair[0]} and {pair[1]}: the machines "
                "differ or one has failed; go on from the last checkpoint with --resume"
            )


def for_evaluation(model):
    """The model without DistributedDataParallel: a process may have one batch less than others."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x := x.clone())
        return x

    @staticmethod
    def backward(ctx, g):
        dist.all_reduce(g := g.clone())
        return g


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on any device; nn.SyncBatchNorm needs a GPU."""

    def forward(self, x):
        if not self.training or world_size() == 1:
            return super().forward(x)
        weight = share(len(x), x.device)  # of this process
        x, dtype = x.to(self.running_mean.dtype), x.dtype  # under autocast it is bfloat16

        def mean(x):
            return _Sum.apply(x.mean((0, 2, 3)) * (weight / world_size()))

        centre = mean(x)
        x = x - centre[:, None, None]
        var = mean(x.square())
        pixels = x.numel() / x.shape[1] * world_size() / weight
        self.num_batches_tracked += 1
        with torch.no_grad():
            self.running_mean.lerp_(centre, self.momentum)
            self.running_var.lerp_(var * (pixels / (pixels - 1)), self.momentum)
        x = x * (var + self.eps).rsqrt()[:, None, None]
        if self.affine:
            x = x * self.weight[:, None, None] + self.bias[:, None, None]
        return x.to(dtype)


def synchronized(network, device):
    """The network with the statistics of its batch norms taken over all processes."""
    network.sync_bn = True
    for module in network.modules():
        if isinstance(module, FastForward):
            module.total = summed
            module.norm = nn.SyncBatchNorm if device.type == "cuda" else SyncBatchNorm
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm  # the same tensors under the same names
    return network


def wrap(model, device, args):
    """A discrete network in DistributedDataParallel, in DataParallel, or as it is.

    DataParallel: one process on several GPUs, without --gpu and --device.
    """
    if world_size() > 1:
        broadcast([*model.parameters(), *model.buffers()])
        # Of depthwise kernels, whose one input channel has no stride that counts.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=hasattr(model, "leaves_out_nodes") and model.leaves_out_nodes(),
        )
    return nn.DataParallel(model) if replicas(device, args) > 1 else model


def replicas(device, args):
    """On how many GPUs DataParallel works for this process; 1 where it is not used."""
    chosen = args.device is not None or args.gpu is not None or world_size() > 1
    return max(1, torch.cuda.device_count()) if device.type == "cuda" and not chosen else 1


def fewest_on_one_device(images, device, args):
    """The fewest images that a device has in a step of this process with so many."""
    chunk = math.ceil(images / replicas(device, args))  # as DataParallel parts them
    return images % chunk or chunk


def on_one_device(batch_size, device, args):
    """How many images of a step one device works on."""
    return math.ceil(part(batch_size) / replicas(device, args))
