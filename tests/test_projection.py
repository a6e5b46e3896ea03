"""The counting behind docs/projection.md, on layers whose counts can be told by hand."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness import projection
from harness.projection import Count, Kernel


@pytest.mark.parametrize(
    "groups, k, kind", [(1, 3, "dense"), (8, 3, "depthwise"), (2, 1, "1x1, grouped")]
)
def test_a_convolution_is_counted_as_by_hand(groups, k, kind):
    with torch.device("meta"):
        conv = nn.Conv2d(8, 8, k, padding=k // 2, groups=groups, bias=False)
        x = torch.empty(4, 8, 6, 6, requires_grad=True)
    with Count() as count:
        y = conv(x)
        y.backward(torch.empty_like(y))
    forward, backward = [kernel for kernel in count.kernels if "conv" in kernel.name]
    maps, weights = 4 * 4 * 8 * 36, 4 * 8 * 8 // groups * k * k  # bytes
    operations = 2 * (4 * 8 * 36) * (8 // groups) * k * k
    assert forward == Kernel(f"convolution ({kind})", 2 * maps + weights, operations)
    assert backward.name == f"convolution_backward ({kind})"
    assert backward.bytes == 3 * maps + 2 * weights  # of y, x, dL/dx; of weight and its gradient
    assert backward.operations == 2 * operations


def test_operations_are_those_of_pytorch_s_counter():
    """On layers without groups, where it can be relied on."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 5))
        x = torch.empty(2, 3, 6, 6)
    with FlopCounterMode(display=False) as theirs, Count() as mine:
        net(x).sum().backward()
    assert sum(kernel.operations for kernel in mine.kernels) == theirs.get_total_flops()


def test_views_and_allocations_are_no_kernels():
    x = torch.ones(4, 4)
    with Count() as count:
        torch.empty(3)
        y = x.t()[1:].unsqueeze(2).expand(-1, -1, 5)
        y.clone()
        x.add_(1)
    assert count.kernels == [Kernel("clone", 4 * (12 + 60)), Kernel("add_", 4 * 32)]


def test_a_kernel_takes_its_launch_its_bytes_or_its_operations():
    bandwidth, peak = projection.GPUS["V100"]
    assert Kernel("", 8, 8).seconds("V100", 5e-6) == 5e-6
    assert Kernel("", int(bandwidth), 8).seconds("V100", 5e-6) == pytest.approx(1)
    assert Kernel("", 8, int(2 * peak)).seconds("V100", 5e-6) == pytest.approx(2)
    parts = [Kernel("", 8)] * 10, [Kernel("", 8)] * 2
    assert projection.seconds(*parts, "V100", graph=False) == pytest.approx(12 * 5e-6)
    assert projection.seconds(*parts, "V100", graph=True) == pytest.approx(10 * 1.5e-6 + 10e-6)


@pytest.mark.slow
def test_the_supernet_is_counted_on_paper():
    fused, plain = (projection.count(form, 8, C=8, layers=3, size=8) for form in (True, False))
    for step in ("weight step", "architecture step"):
        kernels, bytes_moved = (
            [sum(value(k) for k in form[step][0]) for form in (fused, plain)]
            for value in (lambda k: 1, lambda k: k.bytes)
        )
        assert kernels[0] < kernels[1] / 2 and bytes_moved[0] < bytes_moved[1]
    # Half the work: no gradients of weights.
    [weight, arch] = (len(fused[step][0]) for step in ("weight step", "architecture step"))
    assert arch < weight
