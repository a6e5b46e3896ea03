"""The candidate operations and their blocks, against the formulas written out."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused.convolutions import (
    Depthwise,
    Halve,
    depthwise_weight_gradient,
    quarters,
    quarters_of_kernel,
    units,
)
from fused.nodes import Node, pass_by
from fused.norms import Moments, NormReLUDepthwise, NormSum, norm_relu_depthwise, norm_sum
from fused.pools import HalvedMax, WidePools
from operations import OPS, DilConv, FactorizedReduce, Identity, ReLUConvBN, SepConv
from utils import without_module_prefix

NAMES = (
    "none avg_pool_3x3 max_pool_3x3 skip_connect sep_conv_3x3 sep_conv_5x5 sep_conv_7x7 "
    "dil_conv_3x3 dil_conv_5x5 conv_7x1_1x7"
).split()
CONVS = {f"sep_conv_{size}x{size}": (SepConv, size) for size in (3, 5, 7)}
CONVS |= {f"dil_conv_{size}x{size}": (DilConv, size) for size in (3, 5)}


LAYOUTS = pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, 6, generator=generator, dtype=torch.float64)


def norm(y):
    """Batch norm in training mode, no affine part."""
    mean = y.mean((0, 2, 3), keepdim=True)
    variance = ((y - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (y - mean) / (variance + 1e-5).sqrt()


def separable(y, depthwise, pointwise, stride, padding, dilation):
    """A depthwise convolution channel by channel, then a 1x1 convolution as a matrix product."""
    channels = [
        F.conv2d(y[:, c : c + 1], depthwise.weight[c : c + 1], None, stride, padding, dilation)
        for c in range(y.shape[1])
    ]
    return torch.einsum("oi,nihw->nohw", pointwise.weight[:, :, 0, 0], torch.cat(channels, 1))


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_names():
    assert set(OPS) - {"part_aware"} == set(NAMES)  # which reid/ adds when it is imported


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name, stride, x):
    op = OPS[name](4, stride, False).double()
    assert op(x).shape == (3, 4, 8 // stride, 6 // stride)
    if name != "skip_connect":  # it needs even maps
        odd = OPS[name](4, stride, False).double()(x[:, :, :7, :5])
        assert odd.shape == (3, 4, -(-7 // stride), -(-5 // stride))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_affine_concerns_batch_norm_alone_and_no_convolution_has_a_bias(name, stride):
    plain, affine = OPS[name](4, stride, False), OPS[name](4, stride, True)
    norms = [m for m in affine.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(p.dim() == 4 for p in plain.parameters())
    assert sum(p.dim() == 1 for p in affine.parameters()) == 2 * len(norms)
    expected = {"sep": 2, "dil": 1, "conv": 1, "skip": stride - 1}.get(name.split("_")[0], 0)
    assert len(norms) == expected


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", CONVS)
def test_separable_convolutions(name, stride, x):
    kind, size = CONVS[name]
    op = OPS[name](4, stride, False).double()
    assert type(op) is kind
    dilation = 2 if kind is DilConv else 1
    padding = dilation * (size - 1) // 2
    y = norm(separable(x.relu(), op.op[1], op.op[2], stride, padding, dilation))
    assert op.op[1].weight.shape == (4, 1, size, size)
    if kind is SepConv:
        y = norm(separable(y.relu(), op.op[5], op.op[6], 1, padding, 1))
    same(op(x), y)


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_7x1_1x7(stride, x):
    op = OPS["conv_7x1_1x7"](4, stride, False).double()
    wide, high = op[1].weight, op[2].weight
    assert wide.shape == (4, 4, 1, 7) and high.shape == (4, 4, 7, 1)
    y = F.conv2d(x.relu(), torch.einsum("omy,mix->oiyx", high[..., 0], wide[:, :, 0]), padding=3)
    same(op(x), norm(y[:, :, ::stride, ::stride]))


@pytest.mark.parametrize("stride", [1, 2])
def test_pools_take_the_maximum_and_the_mean_of_what_lies_in_the_image(stride, x):
    highest, mean = (
        OPS["max_pool_3x3"](4, stride, False)(x),
        OPS["avg_pool_3x3"](4, stride, False)(x),
    )
    for i, top in enumerate(range(0, 8, stride)):
        for j, left in enumerate(range(0, 6, stride)):
            window = x[:, :, max(0, top - 1) : top + 2, max(0, left - 1) : left + 2]
            same(highest[:, :, i, j], window.amax((2, 3)))
            same(mean[:, :, i, j], window.mean((2, 3)))


@pytest.mark.parametrize("stride", [1, 2])
def test_none_is_zeros(stride, x):
    x.requires_grad_()
    y = OPS["none"](4, stride, False)(x)
    y.sum().backward()
    assert y.shape == (3, 4, 8 // stride, 6 // stride) and not y.any() and not x.grad.any()


def test_skip_connect(x):
    kept, halved = OPS["skip_connect"](4, 1, False), OPS["skip_connect"](4, 2, False)
    assert type(kept) is Identity and kept(x) is x
    assert type(halved) is FactorizedReduce


def test_factorized_reduce_is_two_convolutions_one_shifted_by_a_pixel(x):
    op = FactorizedReduce(4, 6, affine=False).double()
    first, second = op.conv_1.weight, op.conv_2.weight
    assert first.shape == second.shape == (3, 4, 1, 1)
    at = x.relu()
    halves = [F.conv2d(at, first, stride=2), F.conv2d(at[:, :, 1:, 1:], second, stride=2)]
    same(op(x), norm(torch.cat(halves, 1)))
    same(Halve.apply(at, 1, first[None], second[None]), torch.cat(halves, 1))


@LAYOUTS
@pytest.mark.parametrize("S, E", [(1, 1), (1, 3), (2, 4)])
def test_halves_side_by_side_are_factorized_reduces_one_by_one(S, E, layout, x):
    x, C = x.contiguous(memory_format=layout).requires_grad_(), 4 // S
    ops = [FactorizedReduce(C, 4, affine=False).double() for _ in range(E)]
    weights = [[getattr(op, name).weight for op in ops] for name in ("conv_1", "conv_2")]
    mine = Halve.apply(x, S, *map(torch.stack, weights))
    assert mine.is_contiguous(memory_format=layout)
    of_edges = [x[:, e * S // E * C :][:, :C] for e in range(E)]
    each = []
    for op, part in zip(ops, of_edges, strict=True):
        each += [op.conv_1(part[:, :, ::2, ::2]), op.conv_2(part[:, :, 1::2, 1::2])]
    same_gradients(mine, torch.cat(each, 1), [x, *weights[0], *weights[1]])


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_halves_where_one_input_does_not_learn(frozen, x):
    inputs = [x, *(torch.randn(1, 3, 4, 1, 1).double() for _ in range(2))]
    learning = [value.requires_grad_() for i, value in enumerate(inputs) if i != frozen]
    pair = [F.conv2d(x[:, :, i::2, i::2], inputs[1 + i][0]) for i in (0, 1)]
    same_gradients(Halve.apply(x, 1, *inputs[1:]), torch.cat(pair, 1), learning)


@LAYOUTS
@pytest.mark.parametrize("k", [3, 5])
def test_kernels_in_bfloat16_have_the_gradients_of_what_they_were_given(k, layout):
    """Within the rounding of its 8 bits: --amp on a CPU."""
    x, g = (torch.randn(8, 4, 16, 16).bfloat16().contiguous(memory_format=layout) for _ in "xg")
    weight = torch.randn(4, k, k).bfloat16()
    exact = weight.double().requires_grad_()
    F.conv2d(x.double(), exact[:, None], padding=k // 2, groups=4).backward(g.double())
    found = depthwise_weight_gradient(g, x, weight)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact.grad).norm() < 2**-7 * exact.grad.norm()


@LAYOUTS
@pytest.mark.parametrize("k", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("size", [(8, 6), (7, 6), (5, 9)])
def test_a_strided_convolution_is_the_sum_of_four_of_quarters(size, k, layout):
    x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout)
    kernel = torch.randn(3, k, k, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    parts = quarters(x)
    assert all((part.stride(1) == 1) == (layout == torch.channels_last) for part in parts)
    total = 0
    for part, (weight, copy, turned) in zip(parts, quarters_of_kernel(kernel), strict=True):
        assert torch.equal(weight, copy) and torch.equal(weight.flip(1, 2), turned)
        margin = weight.shape[-1] // 2
        total = total + F.conv2d(part, weight[:, None], padding=margin, groups=3)
    expected = F.conv2d(x, kernel[:, None], stride=2, padding=k // 2, groups=3)
    same_gradients(total, expected, [x, kernel])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_of_16_bytes_are_copied_as_those_that_fill_them(dtype):
    n = 16 // torch.empty((), dtype=dtype).element_size()
    x = torch.randn(3, 5, 4 * n).to(dtype)
    x[0, 0, 0], x[0, 0, 1] = torch.nan, -0.0
    for slice_ in (x.unflatten(2, (4, n)), x[1:, ::2, n : 3 * n].unflatten(2, (2, n))):
        ones = units(slice_)
        assert ones.dtype == torch.complex128 and ones.shape == (*slice_.shape[:-1], 1)
        copied = ones.permute(1, 2, 0, 3).contiguous().view(dtype)
        kept = copied.view(torch.uint8), slice_.permute(1, 2, 0, 3).contiguous().view(torch.uint8)
        assert torch.equal(*kept)
    for other in (
        x[..., 1 : 1 + n],
        x[..., ::2][..., :n],
        x[:, :, : n // 2],
        x.expand(3, 5, 4 * n),
    ):
        assert units(other) is other


@LAYOUTS
# twice what passed by: its gradient is then another tensor
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("sampling", ["shuffle", "shift", "random"])
def test_nodes_are_the_sums_sampled_anew_and_have_their_gradients(sampling, twice, layout):
    K, c, steps, dim = 3, 2, 3, 3 if layout == torch.channels_last else 1
    order = torch.randperm(K * c)
    cell = SimpleNamespace(
        sampling=sampling,
        channel_order=order,
        channel_places=order.argsort(),
        _ops=[SimpleNamespace(k=K)],
    )
    mixed = torch.randn(2, steps * c, 4, 5, dtype=torch.float64).contiguous(memory_format=layout)
    rests = [torch.randn(2, (K - 1) * c, 4, 5, dtype=torch.float64) for _ in range(steps)]
    rests = [rest.contiguous(memory_format=layout).requires_grad_() for rest in rests]
    betas = [torch.rand(steps - w, dtype=torch.float64, requires_grad=True) for w in range(steps)]
    inputs = [mixed.requires_grad_(), *rests, *betas]

    def by_hand():
        nodes, sums = [], [0] * steps
        for w in range(steps):
            for t in range(w, steps):
                sums[t] = sums[t] + betas[w][t - w] * rests[w]
            node = [mixed[:, w * c : w * c + c], sums[w]]
            node = torch.cat(node[::-1] if sampling == "shift" else node, 1)
            if sampling == "shuffle":
                node = F.channel_shuffle(node, K)
            nodes.append(node[:, cell.channel_places] if sampling == "random" else node)
            sums = [total * 2 for total in sums] if twice else sums
        return nodes

    def ours():
        nodes, left, bypass, gradient = [], mixed, None, []
        for rest, row in zip(rests, betas, strict=True):
            bypass = pass_by(bypass, rest, row, 1, dim)
            node, left, bypass = Node.apply(left, bypass, c, dim, steps, cell, gradient)
            nodes.append(node)
            bypass = bypass * 2 if twice and bypass is not None else bypass
        assert left is None and bypass is None
        return nodes

    mine, expected = ours(), by_hand()
    for some in (slice(None), slice(1), slice(1, None)):  # also where not all nodes are in a loss
        total = torch.stack(mine[some]), torch.stack(expected[some])
        for _ in range(2):  # and where a graph is used again
            same_gradients(*total, inputs, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("size", [(7, 8), (8, 7)])
def test_factorized_reduce_refuses_odd_maps(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}") as info:
        FactorizedReduce(4, 4)(torch.zeros(2, 4, *size))
    assert str(info.value).isprintable()


def test_factorized_reduce_refuses_odd_channels():
    with pytest.raises(ValueError, match="C_out=5") as info:
        FactorizedReduce(4, 5)
    assert str(info.value).isprintable()


def test_relu_conv_bn(x):
    op = ReLUConvBN(4, 5, 1, 1, 0, affine=False).double()
    y = norm(torch.einsum("oi,nihw->nohw", op.op[1].weight[:, :, 0, 0], x.relu()))
    same(op(x), y)
    assert ReLUConvBN(4, 5, 1, 1, 0).op[2].affine


def test_without_module_prefix():
    state = {"module.a": 1, "module.module.b": 2}
    assert without_module_prefix(state) == {"a": 1, "module.b": 2}
    assert without_module_prefix({"a": 1, "module.b": 2}) == {"a": 1, "module.b": 2}
    assert without_module_prefix({}) == {}
    assert len(state) == 2


def random(*shape):
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def turned(weight):
    return weight.detach().flip(-2, -1)


def same_gradients(actual, expected, inputs, **options):
    """Outputs and gradients with respect to `inputs` of two ways to compute the same."""
    same(actual, expected)
    g = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, inputs, g, **options) for out in (actual, expected)]
    for mine, formula in zip(*gradients, strict=True):
        same(mine, formula)


def blocks(h, P):
    """P h in every block of channels, as a grouped 1x1 convolution."""
    return F.conv2d(h, P.flatten(0, 1)[:, :, None, None], groups=len(P))


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 1)])
@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize("c", [2, 8])  # the gradient of the kernels is taken in two ways
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_depthwise_of_each_channel_several_times(k, c, size, layout):
    S, kernels = 2, ((3, k, 1), (3, 3, 2), (1, 5, 1))  # (R, k, dilation)
    x = random(4, S * c, *size).detach().to(memory_format=layout).requires_grad_()
    weights = [random(S, R, c, k, k) for R, k, _ in kernels]
    dilations = [dilation for *_, dilation in kernels]
    copies = [[weight.detach(), turned(weight)] for weight in weights]
    copies[1] = [torch.cat([kernel, kernel]) for kernel in copies[1]]  # for pairs of pixels
    outs = Depthwise.apply(x, dilations, copies, *weights)
    formula = []
    for weight, (R, k, dilation) in zip(weights, kernels, strict=True):
        spread = x.relu().unflatten(1, (S, 1, c)).expand(-1, S, R, c, *size).flatten(1, 3)
        kernel, padding = weight.reshape(-1, 1, k, k), dilation * (k // 2)
        formula.append(F.conv2d(spread, kernel, None, 1, padding, dilation, len(kernel)))
    same_gradients(torch.cat(outs, 1), torch.cat(formula, 1), [x, *weights])


@pytest.mark.parametrize("again", [None, {}])
@pytest.mark.parametrize("c", [2, 16])  # blocks go together in a group, or each alone
def test_norm_relu_depthwise(c, again):
    G = 6
    h, P, weight = random(3, G * c, 6, 8), random(G, c, c), random(G, c, 5, 5)
    moments = Moments()
    out = NormReLUDepthwise.apply(moments, again, turned(weight), h, P, weight)
    kernel = weight.reshape(-1, 1, 5, 5)
    formula = F.conv2d(norm(blocks(h, P)).relu(), kernel, None, 1, 2, 1, G * c)
    same_gradients(out, formula, [h, P, weight])
    minus_mean, var = (figures.flatten() for figures in moments[0])
    y = blocks(h, P)
    same(-minus_mean, y.mean((0, 2, 3)))
    same(var, y.var((0, 2, 3), correction=0))


@pytest.mark.parametrize("plain", [0, 2])
@pytest.mark.parametrize("started", [False, True])
def test_norm_sum(plain, started):
    T, G, c = 3, 5, 4
    hs, P = [random(3, 3 * c, 6, 8), random(3, (2 + plain) * c, 6, 8)], random(G, c, c)
    eye = torch.eye(c, dtype=torch.float64).expand(plain, c, c)
    W, start = random(T, G + plain), random(3, T * c, 6, 8) if started else None
    W_normed = W.detach().clone()
    W_normed[:, G:] = 0
    matrices = torch.cat([P, eye])
    out = NormSum.apply(Moments(), plain, start, W_normed, None, None, W, matrices, *hs)
    h = torch.cat(hs, 1)
    y = torch.cat([norm(blocks(h[:, : G * c], P)), h[:, G * c :]], 1).unflatten(1, (-1, c))
    formula = torch.einsum("tg,ngchw->ntchw", W, y).flatten(1, 2)
    formula = formula + start if started else formula
    same_gradients(out, formula, [*hs, P, W] + ([start] if started else []))


@pytest.mark.parametrize("plain", [0, 1])
@pytest.mark.parametrize("started", [False, True])
def test_norms_of_an_evaluation_use_the_running_figures(plain, started):
    """In the sum they may be others for each target, as they are behind pools."""
    T, G, c = 3, 2, 4
    h, P, W = random(2, (G + plain) * c, 4, 4), random(G, c, c), random(T, G + plain)
    start = random(2, T * c, 4, 4) if started else None
    mean, var = torch.randn(T, G, c).double(), torch.rand(T, G, c).double() + 0.5
    matrices = torch.cat([P, torch.eye(c, dtype=torch.float64).expand(plain, c, c)])
    halves = h.split([c, (G + plain - 1) * c], 1)
    out = norm_sum(mean, var, plain, start, W, matrices, halves)
    formula = []
    y, rest = blocks(h[:, : G * c], P), h[:, G * c :].unflatten(1, (plain, c)).unbind(1)
    for t in range(T):
        normed = F.batch_norm(y, mean[t].flatten(), var[t].flatten()).unflatten(1, (G, c))
        terms = zip(W[t], [*normed.unbind(1), *rest], strict=True)
        formula.append(sum(w * term for w, term in terms))
    formula = torch.stack(formula, 1).flatten(1, 2)
    formula = formula + start if started else formula
    inputs = [h, P, W] + ([start] if started else [])
    same_gradients(out, formula, inputs)


def test_norm_relu_depthwise_of_an_evaluation():
    G, c = 6, 2
    h, P, weight = random(3, G * c, 6, 8), random(G, c, c), random(G, c, 5, 5)
    mean, var = torch.randn(G, c).double(), torch.rand(G, c).double() + 0.5
    y = F.batch_norm(blocks(h, P), mean.flatten(), var.flatten()).relu()
    formula = F.conv2d(y, weight.reshape(-1, 1, 5, 5), None, 1, 2, 1, G * c)
    same_gradients(norm_relu_depthwise(mean, var, h, P, weight), formula, [h, P, weight])


def test_halved_max():
    x = random(2, 3, 6, 8)
    same_gradients(HalvedMax.apply(x), F.max_pool2d(x, 2, 2), [x])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("C", [2, 4])  # 2 are 16 bytes, which are copied as one
def test_wide_pools_are_pytorch_s(C, stride):
    torch.manual_seed(0)
    x = torch.randn(3, C, 8, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    pools = [nn.MaxPool2d(3, stride, 1), nn.AvgPool2d(3, stride, 1, count_include_pad=False)]
    pools.append(nn.AvgPool2d((5, 3), stride, (2, 1), ceil_mode=stride == 1))
    mine, expected = WidePools.apply(x, pools), torch.cat([pool(x) for pool in pools], 1)
    torch.testing.assert_close(mine, expected)
    same_gradients(mine, expected, [x])
