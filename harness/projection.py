"""What a search step would take on GPUs, on paper: kernels, bytes and operations, counted.

    python -m harness.projection  # the tables of docs/projection.md

Runs the default supernet on meta tensors: shapes alone, so any batch takes a second and no memory.
A kernel is a call into aten that is neither a view nor an allocation; each takes as long as its
launch, its bytes or its operations, whichever is longest. Nothing here was measured on a GPU.
"""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from fused.gradients import frozen
from harness import costs, flags, report, script
from model_search import Network

LAUNCH, IN_GRAPH = 5e-6, 1.5e-6  # seconds a kernel: from Python, in a CUDA graph (assumed)
GPUS = {  # bytes and operations a second, data sheets; convolutions in TF32 where there is TF32
    "H200": (4.8e12, 494e12), "V100": (0.9e12, 15.7e12), "RTX 4090": (1.008e12, 82.6e12),
}  # fmt: skip
FORMS = {"plain": (False, False), "fused": (True, False), "fused + graph": (True, True)}


@dataclass
class Kernel:
    """A call: its name, of a convolution with its kind; bytes read and written; operations."""

    name: str
    bytes: int
    operations: int = 0

    def seconds(self, gpu, launch):
        bandwidth, peak = GPUS[gpu]
        return max(launch, self.bytes / bandwidth, self.operations / peak)


class Count(costs.Calls):
    """The kernels that are called within it, in `kernels`."""

    def __init__(self):
        super().__init__(self._seen)
        self.kernels = []

    def _seen(self, name, args, kwargs, out):
        if "empty" in name:
            return
        size, operations = sum(map(_bytes, costs.tensors_in((args, kwargs, out)))), 0
        if name in ("convolution", "convolution_backward"):
            name, operations = _convolution(name, args, out)
        elif name in ("mm", "addmm", "bmm", "baddbmm"):
            *_, first, second = costs.tensors_in(args)
            operations = 2 * first.numel() * second.shape[-1]
        self.kernels.append(Kernel(name, size, operations))


def _bytes(tensor):
    """What is read or written of a tensor, each element once however often it is expanded."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in pairs if stride)


def _convolution(name, args, out):
    """(name with the kind, operations) of a convolution or of its backward."""
    if name == "convolution":
        x, weight, y, passes = args[0], args[1], out, 1
    else:
        y, x, weight = args[:3]
        passes = sum(args[-1][:2])  # dL/dx, dL/dweight: each as many as forward
    inner, groups = weight.shape[1:].numel(), x.shape[1] // weight.shape[1]
    kind = "1x1" if inner == weight.shape[1] else "dense"
    kind = "depthwise" if weight.shape[1] == 1 else f"{kind}, grouped" if groups > 1 else kind
    return f"{name} ({kind})", 2 * y.numel() * inner * passes


def pieces(network, images, labels):
    """{"weight step": (gradients, update), "architecture step": ...}: the Kernels of each."""
    weights, arch = network.weights(), network.arch_parameters()
    sgd = torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=3e-4, foreach=True)
    adam = torch.optim.Adam(arch, 6e-4, (0.5, 0.999), weight_decay=1e-3, foreach=True)
    steps = {}
    for name, optimizer in (("weight step", sgd), ("architecture step", adam)):
        wanted, others = (weights, arch) if optimizer is sgd else (arch, weights)
        for _ in range(2):  # the first makes the optimizer's buffers
            with Count() as gradients, frozen(others):
                loss = network._loss(images, labels)
                values = torch.autograd.grad(loss, wanted, materialize_grads=True)
            with Count() as update:
                for tensor, value in zip(wanted, values, strict=True):
                    tensor.grad = value
                if optimizer is sgd:  # clip_grad_norm_, which has no foreach form on paper
                    norm = torch.stack(torch._foreach_norm(values)).norm()
                    torch._foreach_mul_(values, (5.0 / norm).clamp(max=1.0))
                optimizer.step()
        steps[name] = gradients.kernels, update.kernels
    return steps


def seconds(gradients, update, gpu, graph):
    """Of a step, one kernel after the other; graph: its gradients in a CUDA graph."""
    launch = IN_GRAPH if graph else LAUNCH
    both = [(kernel, launch) for kernel in gradients] + [(kernel, LAUNCH) for kernel in update]
    return sum(kernel.seconds(gpu, launch) for kernel, launch in both)


def count(fused, batch_size, C=16, layers=8, size=32):
    """`pieces` of the default supernet with these sizes."""
    with torch.device("meta"):
        network = Network(C, 10, layers, nn.CrossEntropyLoss(), fused=fused)
        images, labels = torch.empty(batch_size, 3, size, size), torch.empty(batch_size).long()
        return pieces(network, images, labels)


def get_args():
    parser = flags.Parser(__doc__)
    parser.add_argument("--batch_size", type=flags.count, default=256, help="images in a step")
    return parser.parse_args()


def main(args):
    counts = {fused: count(fused, args.batch_size) for fused in (False, True)}
    rows = []
    for step, (form, (fused, graph)) in itertools.product(counts[True], FORMS.items()):
        parts = counts[fused][step]
        row = {"step": step, "form": form, **totals(itertools.chain(*parts), "kernels")}
        times = {f"{gpu}, ms": f"{1e3 * seconds(*parts, gpu, graph):.1f}" for gpu in GPUS}
        rows.append(row | times)
    print(report.markdown(rows))
    for form, (fused, _) in list(FORMS.items())[:2]:
        groups = defaultdict(list)
        for kernel in itertools.chain(*counts[fused]["weight step"]):
            groups[kernel.name].append(kernel)
        spent = {name: sum(k.seconds("H200", IN_GRAPH) for k in groups[name]) for name in groups}
        rows = []
        for name in sorted(spent, key=spent.get, reverse=True)[:14]:
            bytes_ms = 1e3 * sum(k.bytes for k in groups[name]) / GPUS["H200"][0]
            row = {"kernel": name, **totals(groups[name], "calls", 2, 1)}
            times = {"ms of bytes, H200": bytes_ms, "ms in a graph, H200": 1e3 * spent[name]}
            rows.append(row | {column: f"{ms:.2f}" for column, ms in times.items()})
        print(f"\n{form}, weight step:\n\n{report.markdown(rows)}")


def totals(kernels, what, gigabytes=1, operations=0):
    """Three columns of a table: how many, GB, 10^9 operations; the digits of the latter two."""
    kernels = list(kernels)
    return {
        what: len(kernels),
        "GB moved": f"{sum(k.bytes for k in kernels) / 1e9:.{gigabytes}f}",
        "10^9 operations": f"{sum(k.operations for k in kernels) / 1e9:.{operations}f}",
    }


if __name__ == "__main__":
    script.run(main, get_args)
