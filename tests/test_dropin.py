"""Scripts of the DARTS family beside our modules: the calls they make, played as processes.

And what somebody who changes the mixed operation gets: what he wrote.
"""

import copy
import functools
import importlib
import io
import json
import os
import random
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fused
import genotypes
import model
import model_search
import operations
import utils
import visualize
from architect import _concat
from fused import known
from helpers import ROOT, copy_code, warm_python
from model_search import Network
from tas import found

DATA = '''
import glob, logging, os, sys
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.data
from argparse import Namespace
from PIL import Image
import genotypes
import utils
import visualize

args = Namespace(
    save="EXP", cutout=True, cutout_length=4, init_channels=8, layers=3, batch_size=8,
    learning_rate=0.1, learning_rate_min=0.001, momentum=0.9, weight_decay=3e-4, grad_clip=5,
    arch_learning_rate=6e-4, arch_weight_decay=1e-3, epochs=1, train_portion=0.5, auxiliary=True,
    auxiliary_weight=0.4, drop_path_prob=0.2, arch="PCDARTS", report_freq=1, unrolled="UNROLLED",
)
torch.manual_seed(0)
np.random.seed(0)


class Pictures(torch.utils.data.Dataset):
    """Looks like torchvision's CIFAR10."""

    def __init__(self, transform):
        self.transform = transform
        self.data = np.random.RandomState(0).randint(0, 256, (32, 32, 32, 3), np.uint8)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.data[i])), i % 10


utils.create_exp_dir(args.save, scripts_to_save=glob.glob("*.py"))
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
logging.getLogger().addHandler(logging.FileHandler(os.path.join(args.save, "log.txt")))
train_transform, valid_transform = utils._data_transforms_cifar10(args)
criterion = nn.CrossEntropyLoss()
'''
SEARCH = (
    DATA
    + """
from architect import Architect
from model_search import Network

model = Network(args.init_channels, 10, args.layers, criterion, **VARIANT)
logging.info("param size = %fMB", utils.count_parameters_in_MB(model))
optimizer = torch.optim.SGD(
    model.parameters(), args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay
)
train_data = Pictures(train_transform)
indices = list(range(len(train_data)))
split = int(np.floor(args.train_portion * len(train_data)))
halves = [
    torch.utils.data.DataLoader(
        train_data, batch_size=args.batch_size,
        sampler=torch.utils.data.sampler.SubsetRandomSampler(part), num_workers=0,
    )
    for part in (indices[:split], indices[split:])
]
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
    optimizer, float(args.epochs), eta_min=args.learning_rate_min
)
architect = Architect(model, args)
before = [tensor.clone() for tensor in model.arch_parameters()]
for epoch in range(args.epochs):
    lr = scheduler.get_last_lr()[0]
    logging.info("genotype = %s", model.genotype())
    print(F.softmax(model.alphas_normal, dim=-1), F.softmax(model.betas_normal[2:5], dim=-1))
    objs, top1 = utils.AvgrageMeter(), utils.AvgrageMeter()
    for step, (input, target) in enumerate(halves[0]):
        model.train()
        input_search, target_search = next(iter(halves[1]))
        architect.step(
            input, target, input_search, target_search, lr, optimizer, unrolled=args.unrolled
        )
        optimizer.zero_grad()
        logits = model(input)
        loss = criterion(logits, target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        prec1, prec5 = utils.accuracy(logits, target, topk=(1, 5))
        objs.update(loss.data.item(), input.size(0))
        top1.update(prec1.data.item(), input.size(0))
        logging.info("train %03d %e %f", step, objs.avg, top1.avg)
    scheduler.step()
    model.eval()
    with torch.no_grad():
        assert np.isfinite(criterion(model(input), target).item())
    utils.save(model, os.path.join(args.save, "weights.pt"))
assert all((a != b).any() for a, b in zip(before, model.arch_parameters()))
twin = model.new()
utils.load(twin, os.path.join(args.save, "weights.pt"))
model.eval(), twin.eval()
assert torch.allclose(twin(input), model(input), atol=1e-5)
print("done", model.genotype())
"""
)
TRAIN = (
    DATA
    + """
from model import NetworkCIFAR as Network

genotype = eval("genotypes.%s" % args.arch)
model = Network(args.init_channels, 10, args.layers, args.auxiliary, genotype)
optimizer = torch.optim.SGD(model.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
queue = torch.utils.data.DataLoader(Pictures(train_transform), batch_size=8, shuffle=True)
model.drop_path_prob = args.drop_path_prob * 1 / 2
objs = utils.AvgrageMeter()
for step, (input, target) in enumerate(queue):
    optimizer.zero_grad()
    logits, logits_aux = model(input)
    loss = criterion(logits, target) + args.auxiliary_weight * criterion(logits_aux, target)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    optimizer.step()
    objs.update(loss.item(), input.size(0))
utils.save(model, os.path.join(args.save, "weights.pt"))
utils.save_checkpoint({"epoch": 1, "state_dict": model.state_dict()}, True, args.save)
assert os.path.exists(os.path.join(args.save, "model_best.pth.tar"))

model = Network(args.init_channels, 10, args.layers, args.auxiliary, genotype)
utils.load(model, os.path.join(args.save, "weights.pt"))
model.drop_path_prob = args.drop_path_prob
model.eval()
test = torch.utils.data.DataLoader(Pictures(valid_transform), batch_size=8)
with torch.no_grad():
    for input, target in test:
        logits, _ = model(input)
        prec1, _ = utils.accuracy(logits, target, topk=(1, 5))
print("done %f %f" % (objs.avg, prec1.item()))
"""
)
PLOT = """
import genotypes
from visualize import plot

genotype = eval("genotypes.{}".format("DARTS"))
plot(genotype.normal, "normal")
plot(genotype.reduce, "reduction.png")
"""


def play(text, cwd):
    """The output of a script that stands elsewhere and imports our modules."""
    (cwd / "script.py").write_text(text)
    done = subprocess.run(
        [*warm_python(), "script.py"], cwd=cwd, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("unrolled", "variant"),
    [(False, {}), (True, {}), (True, {"k": 1, "edge_norm": False}), (False, {"fused": False})],
)
def test_a_search_script(unrolled, variant, tmp_path):
    text = SEARCH.replace('"UNROLLED"', str(unrolled)).replace("**VARIANT", f"**{variant}")
    if variant.get("edge_norm") is False:  # DARTS has no betas
        text = text.replace(", F.softmax(model.betas_normal[2:5], dim=-1)", "")
    output = play(text, tmp_path)
    assert "Experiment dir : EXP" in output and "done Genotype(normal=" in output
    assert (tmp_path / "EXP" / "scripts" / "script.py").exists()


def test_a_training_and_a_test_script(tmp_path):
    assert "done" in play(TRAIN, tmp_path)


def test_a_visualization_script(tmp_path):
    pytest.importorskip("matplotlib")
    play(PLOT, tmp_path)
    assert (tmp_path / "normal.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "reduction.png").read_bytes().startswith(b"\x89PNG")
    path = visualize.plot(genotypes.DARTS.normal, str(tmp_path / "k_0.5"))
    assert path == tmp_path / "k_0.5.pdf" and path.exists()


# --- single names ---


def test_cutout_zeros_one_square():
    np.random.seed(0)
    image, areas = torch.ones(3, 12, 10), set()
    for _ in range(100):
        cut = utils.Cutout(4)(image)
        rows, columns = (cut[0] == 0).nonzero().unbind(1)
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert area == len(rows) <= 16 and torch.equal(cut[0], cut[2])
        areas.add(int(area))
    assert image.all() and {16, 4} <= areas  # whole ones, and in a corner
    assert max((utils.Cutout(5)(image) == 0).sum() / 3 for _ in range(100)) == 16  # as released


def test_drop_path_keeps_the_mean():
    x = torch.ones(4000, 1, 2, 2)
    dropped = utils.drop_path(x, 0.25)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(dropped[:, :, 0, 0], dropped[:, :, 1, 1])  # per image
    assert torch.equal(utils.drop_path(x, 0.0), x)


def test_concat_and_channel_shuffle():
    assert _concat([torch.zeros(2, 2), torch.ones(1)]).tolist() == [0, 0, 0, 0, 1]
    x = torch.arange(8.0).view(1, 8, 1, 1)
    shuffled = model_search.channel_shuffle(x, 4).flatten().tolist()
    assert shuffled == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
def test_mixed_op_is_equation_2(stride, layout):
    torch.manual_seed(0)
    edge, x = model_search.MixedOp(16, stride), torch.randn(2, 16, 8, 8)
    weights = torch.rand(8)
    mixed = sum(w * op(x[:, :4]) for w, op in zip(weights, edge._ops, strict=True))
    rest = x[:, 4:] if stride == 1 else F.max_pool2d(x[:, 4:], 2)
    both = torch.cat([mixed, rest], 1)  # K = 4 groups of 4: channel c of group g to c * 4 + g
    expected = both.view(2, 4, 4, *both.shape[2:]).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(edge(x.contiguous(memory_format=layout), weights), expected)


def test_auxiliary_heads():
    x = torch.randn(2, 12, 8, 8)
    assert model.AuxiliaryHeadCIFAR(12, 10)(x).shape == (2, 10)
    assert model.AuxiliaryHeadImageNet(12, 1000)(x[:, :, :7, :7]).shape == (2, 1000)


def test_none_on_an_edge_is_zeros():
    """As the published code builds it: a node is what its other edge gives."""
    torch.manual_seed(0)
    with_none = [("none", 0), ("sep_conv_3x3", 1), ("none", 1), ("none", 0)]
    genotype = genotypes.Genotype(with_none, [2, 3], with_none, [2, 3])
    network = model.NetworkCIFAR(4, 3, 3, False, genotypes.parse(genotypes.text(genotype)))
    cell, x = network.cells[0], torch.randn(2, 12, 8, 8)
    out = cell(x, x, 0.0)
    states = cell.preprocess1(x)
    torch.testing.assert_close(out[:, :4], cell._ops[1](states))
    assert not out[:, 4:].any()
    logits, _ = network(torch.randn(2, 3, 16, 16))
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


# --- a mixed operation of one's own ---


def build(layers=3, **arguments):
    return model_search.Network(8, 3, layers, nn.CrossEntropyLoss(), **arguments).double()


class Sharper(model_search.MixedOp):
    """Another formula."""

    def forward(self, x, weights):
        return super().forward(x, weights.square())


class Switched(model_search.MixedOp):
    """The same, until somebody switches it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.drop = 0.0

    def forward(self, x, weights):
        return super().forward(x, weights) * (1 - self.drop)


class OfTheClass(model_search.MixedOp):
    """With a switch of the class."""

    drop = 0.0

    def forward(self, x, weights):
        return super().forward(x, weights) * (1 - self.drop)


class Scaled(model_search.MixedOp):
    """With a weight that changes nothing yet."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, weights):
        return super().forward(x, weights) * self.scale


class Failing(model_search.MixedOp):
    def forward(self, x, weights):
        if x.shape[2] < 16:
            raise ValueError("maps of 16 x 16, please")
        return super().forward(x, weights)


class Larger(model_search.MixedOp):
    """Another one on maps that no small cell has."""

    def forward(self, x, weights):
        return super().forward(x, weights) * (2 if x.shape[2] > 16 else 1)


class Initialized(model_search.MixedOp):
    """The same function, from other weights."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)


class Seldom(model_search.MixedOp):
    """Another one once in a thousand times."""

    def forward(self, x, weights):
        return super().forward(x, weights) * (random.random() > 0.001)


@pytest.mark.parametrize(
    "edited", [Sharper, Switched, OfTheClass, Scaled, Failing, Larger, Initialized, Seldom]
)
def test_an_edited_mixed_operation_is_what_runs(edited, monkeypatch, said):
    assert build().fused
    monkeypatch.setattr(model_search, "MixedOp", edited)
    network = build()
    assert not network.fused and type(network.cells[0]._ops[0]) is edited
    [record] = said.records
    assert f"{edited.__name__} has another text" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_cell_that_was_changed_says_so_once(said):
    fused.cell.warn_once.cache_clear()
    network = build()
    network.cells[1]._ops[0].register_forward_hook(lambda *_: None)
    for _ in range(2):
        network(torch.randn(2, 3, 8, 8).double())
    [record] = said.records
    words = "cells of the supernet run as model_search.py has them: hooks, or a function, of one"
    assert record.getMessage() == f"{words} MixedOp"


def test_gradients_in_batches_are_refused():
    """Of the fast form; the plain one has them."""

    def batched(network):
        loss = network(torch.randn(2, 3, 8, 8).double()).sum()
        given = torch.ones(2, dtype=torch.float64)
        return torch.autograd.grad(loss, network.alphas_normal, given, is_grads_batched=True)[0]

    assert batched(build(fused=False)).shape == (2, 14, 8)
    with pytest.raises(RuntimeError):
        batched(build())


def test_the_digests_are_printed_anew():
    command = [*warm_python(), "-m", "fused"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads("{" + done.stdout.rstrip(",\n") + "}") == known.WRITTEN_FOR
    assert not done.stderr


def test_a_class_without_a_text_is_what_runs(monkeypatch):
    """As of `python -` and exec."""
    names = {"MixedOp": model_search.MixedOp}
    text = "class Large(MixedOp):\n    def forward(self, x, weights):\n"
    text += "        return MixedOp.forward(self, x, weights) * (1 + (x.shape[2] > 16))\n"
    exec(text, names)
    monkeypatch.setattr(model_search, "MixedOp", names["Large"])
    assert build().why_plain == "Large has another text than the one it was written for"


def twice_the_gradient_of_alpha(ctx, g, backward=fused.norms.NormSum.backward):
    return tuple(2 * d if i == 6 else d for i, d in enumerate(backward(ctx, g)))


def twice_the_output(*arguments, norm_sum=fused.norms.norm_sum):
    return 2 * norm_sum(*arguments)


WRONG = {
    "the gradient of softmax(alpha) differs": (
        fused.norms.NormSum, "backward", staticmethod(twice_the_gradient_of_alpha),
    ),
    "running_mean after a step differs": (fused.plan.Plan, "follow", lambda *_: None),
    "the output in evaluation differs": (fused.cell, "norm_sum", twice_the_output),
}  # fmt: skip


@pytest.mark.parametrize("why", WRONG)
def test_a_fast_form_that_is_wrong_in_one_figure_is_not_taken(why, monkeypatch):
    monkeypatch.setattr(*WRONG[why])
    assert why in build().why_plain


def test_a_cell_that_adds_its_input_where_shapes_agree_is_what_runs(monkeypatch):
    """In the small cells they do not."""

    class Residual(model_search.Cell):
        def forward(self, s0, s1, weights, betas):
            out = super().forward(s0, s1, weights, betas)
            return out + s1 if out.shape == s1.shape else out

    monkeypatch.setattr(model_search, "Cell", Residual)
    network = build()
    assert not network.fused and network.why_plain.startswith("Residual has another text")


def test_what_is_wrapped_around_a_forward_is_seen(monkeypatch):
    """In networks that are there already, too."""
    forward = model_search.MixedOp.forward

    @functools.wraps(forward)
    def louder(self, x, weights):
        return forward(self, x, weights) * (2 if x.shape[2] > 16 else 1)

    network, plain = build(), build(fused=False)
    plain.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 32, 32).double()
    before = network(images)
    with monkeypatch.context() as patch:
        patch.setattr(model_search.MixedOp, "forward", louder)
        assert build().why_plain == "MixedOp has another text than the one it was written for"
        torch.testing.assert_close(network(images), plain(images))
        assert not torch.allclose(network(images), before)
    torch.testing.assert_close(network(images), before)
    assert network.cells[0].is_fast()


def test_what_is_wrapped_around_a_forward_of_torch_is_seen(monkeypatch):
    network, plain = build(), build(fused=False)
    plain.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 16, 16).double()
    forward = nn.Conv2d.forward
    torch.testing.assert_close(network(images), plain(images))
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "forward", lambda self, x: 2 * forward(self, x))
        torch.testing.assert_close(network(images), plain(images))
        assert not network.cells[0].is_fast()
    assert network.cells[0].is_fast()


def test_other_functions_in_the_place_of_those_that_a_cell_calls(monkeypatch, said):
    """The texts of the classes are the same; the figures are not."""
    monkeypatch.setattr(model_search, "channel_shuffle", lambda x, groups: x.flip(1))
    assert not build().fused
    assert "the output differs by" in said.records[0].getMessage()


def test_comments_and_docstrings_do_not_count(tmp_path):
    """But every word of the code does."""

    def digest(text):
        path = tmp_path / f"text_{abs(hash(text))}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return known.digest(module.A)

    text = "class A:\n    def f(self, x):\n        if x:\n            x = x + 1\n        return x\n"
    documented = text.replace("x):\n", 'x):  # why\n        """What."""\n\n')
    assert digest(text) == digest(documented)
    for old, new in (
        ("x + 1", "x + 2"),
        ("    return", "        return"),
        ("self, x", "self, x=0"),
    ):
        assert digest(text) != digest(text.replace(old, new))


def test_an_operation_with_a_hook_or_fixed_weights_runs_as_it_is(monkeypatch):
    """Where it has them in the later cells alone, too."""

    def hooked(C, stride, affine):
        op = operations.SepConv(C, C, 3, stride, 1, affine=affine)
        if C > 2:
            op.register_forward_hook(lambda module, inputs, out: 2 * out)
        return op

    def fixed(C, stride, affine):
        op = operations.DilConv(C, C, 3, stride, 2, 2, affine=affine)
        return op.requires_grad_(C <= 2)

    monkeypatch.setitem(operations.OPS, "sep_conv_3x3", hooked)
    monkeypatch.setitem(operations.OPS, "dil_conv_3x3", fixed)
    fast, paper = (build(fused=fused) for fused in (True, False))
    assert fast.fused
    paper.load_state_dict(fast.state_dict())
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(fast(images), paper(images))
    count = [sum(not p.requires_grad for p in network.parameters()) for network in (fast, paper)]
    assert count[0] == count[1] > 0


@pytest.mark.parametrize("fused", [True, False])
def test_parameters_load_by_their_names(fused):
    """As the released architect does it: named_parameters() over a state dict, into new()."""
    network = build(fused=fused)
    state = network.state_dict()
    changed = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    state.update(changed)
    other = network.new()
    other.load_state_dict(state)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, changed[name])
    state["cells.0.nobody"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="nobody"):
        other.load_state_dict(state)


def test_an_edited_operation_or_cell_is_what_runs(monkeypatch):
    class Loud(operations.SepConv):
        def forward(self, x):
            return 2 * super().forward(x)

    class Longer(model_search.Cell):
        def forward(self, s0, s1, weights, betas):
            return super().forward(s0, s1, weights, betas) + 1

    with monkeypatch.context() as patch:  # an op of a type of its own runs inside the fast cell
        patch.setitem(operations.OPS, "sep_conv_3x3", lambda C, s, a: Loud(C, C, 3, s, 1, a))
        fast, plain = build(), build(fused=False)
        plain.load_state_dict(fast.state_dict())
        x = torch.randn(2, 3, 8, 8).double()
        torch.testing.assert_close(fast(x), plain(x))
    with monkeypatch.context() as patch:
        patch.setattr(operations.SepConv, "forward", lambda self, x: 2 * self.op(x))
        torch.testing.assert_close(fast(x), plain(x))
        assert fast.cells[0]._plan().kinds.others == (4, 5)
        assert build().cells[0]._plan().kinds.others == (4, 5)
    assert fast.cells[0]._plan().kinds.others == (4,)
    with monkeypatch.context() as patch:
        patch.setattr(operations.ReLUConvBN, "forward", lambda self, x: self.op(x).relu())
        assert not build().fused
    monkeypatch.setattr(model_search, "Cell", Longer)
    assert not build().fused


def norms(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


class Doubled(operations.SepConv):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(module, inputs, out):
    return 2 * out


def modules(network, *types):
    return [module for module in network.modules() if isinstance(module, types)]


def replace_a_convolution(network):
    op = network.cells[0]._ops[3]._ops[4].op
    op[1] = nn.Conv2d(op[1].in_channels, op[1].out_channels, 3, 1, 1, bias=False).double()
    nn.init.constant_(op[1].weight, 0.3)


CHANGES = {
    "frozen norms": lambda network: [norm.eval() for norm in norms(network)],
    "one frozen norm": lambda network: network.cells[0]._ops[5]._ops[1][1].eval(),
    "momentum": lambda network: [setattr(norm, "momentum", 0.01) for norm in norms(network)],
    "eps": lambda network: [setattr(norm, "eps", 1e-3) for norm in norms(network)],
    "hooks": lambda network: [
        m.register_forward_hook(doubled) for m in modules(network, nn.Conv2d)
    ],
    "a hook of an edge": lambda network: network.cells[2]._ops[0].register_forward_hook(doubled),
    "a replaced operation": lambda network: network.cells[0]._ops[2]._ops.__setitem__(
        3, nn.AvgPool2d(3, 1, 1)
    ),
    "a replaced convolution": replace_a_convolution,
    "another type": lambda network: [
        setattr(m, "__class__", Doubled) for m in modules(network, operations.SepConv)
    ],
    "a forward of its own": lambda network: setattr(
        network.cells[0]._ops[1], "forward", lambda x, weights: x
    ),
    "pruning": lambda network: [
        prune.l1_unstructured(m, "weight", 0.5) for m in modules(network, nn.Conv2d)
    ],
    "parametrizations": lambda network: [
        parametrizations.weight_norm(m) for m in modules(network, nn.Conv2d)
    ],
    "another activation": lambda network: [
        m.op.__setitem__(0, nn.GELU()) for m in modules(network, operations.SepConv)
    ],
    "another activation of the preprocess": lambda network: [
        cell.preprocess1.op.__setitem__(0, nn.GELU()) for cell in network.cells
    ],
    "biases": lambda network: [
        setattr(m, "bias", nn.Parameter(torch.ones(m.out_channels).double()))
        for m in modules(network, nn.Conv2d)
    ],
    "scales": lambda network: [
        setattr(norm, "weight", nn.Parameter(torch.full([norm.num_features], 0.7).double()))
        for norm in norms(network)
    ],
    "group norms": lambda network: [
        m.op.__setitem__(-1, nn.GroupNorm(1, m.op[-1].num_features).double())
        for m in modules(network, operations.SepConv, operations.DilConv)
    ],
    "no norms": lambda network: [
        m.op.__setitem__(-1, nn.Identity()) for m in modules(network, operations.DilConv)
    ],
    "a module more": lambda network: [
        m.op.append(nn.Tanh()) for m in modules(network, operations.DilConv)
    ],
    "padding": lambda network: [
        (setattr(m, "padding_mode", "reflect"),
         setattr(m, "_reversed_padding_repeated_twice", [1] * 4))
        for m in modules(network, nn.Conv2d) if m.kernel_size == (3, 3) and m.dilation == (1, 1)
    ],
    "pools": lambda network: [setattr(m, "padding", 0) or setattr(m, "kernel_size", 1)
                              for m in modules(network, nn.AvgPool2d)],
    "a mask, then frozen norms": lambda network: [
        (setattr(m, "mask", torch.ones(3)), m.eval()) for m in norms(network)
    ],
    "no counts": lambda network: [
        setattr(norm, "num_batches_tracked", None) for norm in norms(network)
    ],
    "an operation that two edges share": lambda network: network.cells[0]._ops[1]._ops.__setitem__(
        4, network.cells[0]._ops[0]._ops[4]
    ),
    "rotation of the first cell": lambda network: setattr(network.cells[0], "sampling", "shift"),
    "statistics": lambda network: [
        setattr(norm, name, None)
        for norm in norms(network)
        for name in ("running_mean", "running_var")
    ],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_the_modules_of_a_network_is_what_runs(change):
    """After it was built and has run: by a loop over all modules, or to one of them."""
    torch.manual_seed(0)
    fast, plain = build(), build(fused=False)
    plain.load_state_dict(fast.state_dict())
    x, y = torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 0])
    fast.load_state_dict(plain.state_dict())
    before = [fast(x), plain(x)]
    torch.testing.assert_close(*before)
    assert all(cell.is_fast() for cell in fast.cells)
    for network in (fast, plain):
        CHANGES[change](network)
    results = []
    for network in (fast, plain):
        network._loss(x, y).backward()
        results.append([p.grad for p in (*network.parameters(), *network.arch_parameters())])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(fast.state_dict(), plain.state_dict())
    whole = ("a hook of an edge", "a forward of its own", "another activation of the preprocess")
    if change in whole:
        assert not all(cell.is_fast() for cell in fast.cells)
    elif change not in (
        "rotation of the first cell",
        "pools",
    ):  # the operations run as they are in the fast form
        plans = [cell._plan() for cell in fast.cells]
        assert any(plan.why is not None or plan.kinds.others for plan in plans)
    for network in (fast, plain):
        network.eval()
    torch.testing.assert_close(fast(x), plain(x))


def test_a_change_that_is_taken_back_makes_a_cell_fast_again():
    """As norms that are frozen in a warm-up."""
    network = build()
    x = torch.randn(2, 3, 16, 16).double()
    for frozen in (False, True, False):
        for norm in norms(network):
            norm.train(not frozen)
        network(x)
        plans = [cell._plan() for cell in network.cells]
        assert all((plan.why is not None or bool(plan.kinds.others)) == frozen for plan in plans)


def cells_of_two_forms(**arguments):
    sizes = 2, 2, 8, 8, 8, False, False
    paper, fast = model_search.Cell(*sizes).double(), model_search.FastCell(*sizes).double()
    fast.load_state_dict(paper.state_dict())
    return (
        paper,
        fast,
        torch.randn(2, 8, 8, 8).double(),
        torch.rand(5, 8).double(),
        torch.rand(5).double(),
    )


@pytest.mark.parametrize(
    "form",
    [
        lambda weights, betas: (list(weights), betas),
        lambda weights, betas: (weights, betas.tolist()),
        lambda weights, betas: (weights[..., None, None, None, None], betas),
        lambda weights, betas: (weights, betas[:, None]),
        lambda weights, betas: (weights.float(), betas.float()),
        lambda weights, betas: (torch.stack([weights] * 2, 2)[..., None, None, None], betas),
    ],
)  # fmt: skip
def test_weights_in_other_forms(form):
    """As scripts have them that weight each image by itself, or draw operations."""
    paper, fast, x, weights, betas = cells_of_two_forms()
    torch.testing.assert_close(
        fast(x, x, *form(weights, betas)), paper(x, x, *form(weights, betas))
    )


@pytest.mark.parametrize("stem", ["cifar", "imagenet", "resnet"])
def test_gradients_are_flat_views_as_the_released_architect_takes_them(stem):
    network = Network(8, 3, 4, nn.CrossEntropyLoss(), stem=stem)
    loss = network._loss(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    for gradient in torch.autograd.grad(loss, list(network.parameters())):
        gradient.view(-1)


@pytest.mark.parametrize("amp", [False, True])
def test_half_precision_does_not_overflow(amp):
    """The sums over all pixels would; norms in float32 beside the rest in bfloat16 work, too."""
    network = Network(8, 3, 3, nn.CrossEntropyLoss())
    images = torch.randn(96, 3, 32, 32)
    if amp:
        with torch.autocast("cpu", torch.float16):
            out = network(images)
    else:
        out = network.half()(images.half())
    assert out.isfinite().all()


def test_float64_stays_under_autocast():
    network, images = build(fused=True), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        features = network.double().features(images)
    torch.testing.assert_close(features, network.features(images))


def test_norms_in_float32_beside_bfloat16():
    fast, plain = build().float(), build(fused=False).float()
    plain.load_state_dict(fast.state_dict())
    images = torch.randn(4, 3, 16, 16, dtype=torch.bfloat16)
    for network in (fast, plain):
        network.bfloat16()
        for norm in norms(network):
            norm.float()
    ours, expected = fast(images).float(), plain(images).float()
    assert (ours - expected).norm() < 0.02 * expected.norm()  # bfloat16 has 8 bits
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=0.02, atol=1e-3)


def test_nothing_is_kept_from_one_call_of_a_cell_to_the_next():
    """Of tensors whose values change behind autograd's back, or that learn later."""
    paper, fast, x, weights, betas = cells_of_two_forms()
    for _ in range(2):
        torch.testing.assert_close(fast(x, x, weights, betas), paper(x, x, weights, betas))
        weights.data.mul_(0.5)
        x.numpy()[:] += 1
    betas.requires_grad_()
    for _ in range(2):
        found = [torch.autograd.grad(cell(x, x, weights, betas).square().sum(), betas)
                 for cell in (paper, fast)]  # fmt: skip
        torch.testing.assert_close(*found)
        betas.data.mul_(0.5)


def replicas(network):
    """As nn.DataParallel makes them: modules whose weights are attributes, no parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            replica._modules[name] = copies[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 2)
    return copies[network]


TRANSFORMS = {
    "checkpoint of cells": lambda network, x: checkpointed(network, x),
    "checkpoint": lambda network, x: checkpoint(network, x, use_reentrant=False),
    "compile": lambda network, x: torch.compile(network, backend="eager")(x),
    "export": lambda network, x: torch.export.export(network.eval(), (x,)).module()(x),
    "trace": lambda network, x: torch.jit.trace(network.eval(), x)(x),
    "replicas": lambda network, x: replicas(network)(x),
    "no gradients": lambda network, x: torch.no_grad()(network)(x),
    "inference": lambda network, x: torch.inference_mode()(network)(x).clone(),
    "fake tensors": lambda network, x: on_fakes(network, x),
    "torch.func": lambda network, x: torch.func.jvp(network.eval(), (x,), (x,))[1],
}


def checkpointed(network, x):
    s0 = s1 = network.stem(x)
    for cell in network.cells:
        kind = "reduce" if cell.reduction else "normal"
        arch = getattr(network, f"alphas_{kind}").softmax(-1), network.edge_weights(kind)
        s0, s1 = s1, checkpoint(cell, s0, s1, *arch, use_reentrant=False)
    return network.classifier(network.global_pooling(s1).flatten(1))


def on_fakes(network, x):
    """First on tensors without values, which must leave nothing behind."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        network(mode.from_tensor(x))
    return network(x)


SLOW = ("compile", "export", "trace")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in TRANSFORMS],
)
def test_what_torch_makes_of_a_network(name):
    torch.manual_seed(0)
    fast, plain = build(layers=4), build(layers=4, fused=False)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(2, 3, 16, 16).double()
    results = []
    for network in (fast, plain):
        out = TRANSFORMS[name](network, x)
        results.append([out.detach()])
        if out.requires_grad:
            learning = [*network.parameters(), *network.arch_parameters()]
            results[-1] += torch.autograd.grad(out.square().sum(), learning, materialize_grads=True)
    torch.testing.assert_close(*results)


def test_weights_are_read_anew_each_time():
    """An initialization over all modules, some weights fixed, functional calls, a copy."""
    torch.manual_seed(0)
    fast, plain = build(), build(fused=False)
    plain.load_state_dict(fast.state_dict())
    x, y = torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 0])
    fast(x), plain(x)

    def initialize(module):
        if isinstance(module, nn.Conv2d):
            generator = torch.Generator().manual_seed(module.weight.numel())
            nn.init.kaiming_normal_(module.weight, generator=generator)

    for network in (fast, plain):
        network.apply(initialize)
        for number, convolution in enumerate(modules(network, nn.Conv2d)):
            convolution.weight.requires_grad_(number % 3 > 0)
        network._loss(x, y).backward()
    found = [[p.grad for p in network.parameters()] for network in (fast, plain)]
    assert [g is None for g in found[0]] == [g is None for g in found[1]]
    torch.testing.assert_close(*([g for g in part if g is not None] for part in found))
    copied = copy.deepcopy(fast)
    assert all(cell.is_fast() for cell in (*fast.cells, *copied.cells))
    for parameter in copied.parameters():
        parameter.data.mul_(2)
    torch.testing.assert_close(fast(x), plain(x))
    values = dict(copied.named_parameters())
    torch.testing.assert_close(
        torch.func.functional_call(fast, values, (x,)), copied(x), rtol=1e-9, atol=1e-9
    )
    stored = io.BytesIO()
    torch.save(copied, stored)
    loaded = torch.load(io.BytesIO(stored.getvalue()), weights_only=False)
    torch.testing.assert_close(loaded.eval()(x), copied.eval()(x))


def test_statistics_that_differ_between_edges_are_those_of_each_edge():
    """As after a network was put together from others; behind pools they agree in training."""
    torch.manual_seed(0)
    fast, plain = build(), build(fused=False)
    for norm in norms(fast):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    plain.load_state_dict(fast.state_dict())
    x, y = torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 0])
    results = []
    for network in (fast, plain):
        network.eval()._loss(x, y).backward()
        results.append([p.grad for p in (*network.parameters(), *network.arch_parameters())])
    torch.testing.assert_close(*results)
    fast.train()(x), plain.train()(x)
    torch.testing.assert_close(fast.state_dict(), plain.state_dict())


def test_modes_of_a_whole_network_are_no_change():
    network = Network(8, 10, 3, nn.CrossEntropyLoss())
    for step in (
        network.eval,
        network.train,
        network.double,
        lambda: network.requires_grad_(False),
    ):
        step()
        network(torch.randn(2, 3, 16, 16, dtype=network.classifier.weight.dtype))
        assert all(cell.is_fast() for cell in network.cells)


def test_looking_whether_modules_have_changed_takes_a_millisecond_a_cell_at_most():
    cell = Network(16, 10, 8, nn.CrossEntropyLoss()).cells[0]
    cell.is_fast()
    times = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(20):
            cell.is_fast()
        times.append((time.process_time() - start) / 20)
    assert min(times) < 1e-3


def test_a_fast_cell_used_by_itself_keeps_nothing_stale():
    """Twice on the same tensors: changed in place, without gradients first, backward each time."""
    torch.manual_seed(0)
    arguments = 2, 2, 8, 8, 8, False, False
    paper, fast = model_search.Cell(*arguments).double(), model_search.FastCell(*arguments).double()
    fast.load_state_dict(paper.state_dict())
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    weights, betas = torch.rand(5, 8).double(), torch.rand(5).double()
    for tensor in (x, weights, betas):
        tensor.requires_grad_()
    for leaf in (True, False):
        s = x if leaf else x * 2
        with torch.no_grad():
            torch.testing.assert_close(fast(s, s, weights, betas), paper(s, s, weights, betas))
        for _ in range(2):
            found = []
            for cell in (paper, fast):
                out = cell(s, s, weights, betas).square().sum()
                found.append(torch.autograd.grad(out, [x, weights, betas], retain_graph=True))
            torch.testing.assert_close(*found)
            with torch.no_grad():
                s.mul_(0.5)
                weights.mul_(0.5)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x, x, weights, betas), paper(x, x, weights, betas))


def test_comparing_leaves_random_numbers_alone(monkeypatch):
    drawn, seeded = [], []
    for fast in (False, True):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)  # by torch.manual_seed
        build(fused=fast)
        monkeypatch.undo()
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1] and not seeded


def test_second_derivatives_of_the_plain_form():
    network = build(fused=False)
    x, y = torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 0])
    alphas = network.arch_parameters()
    first = torch.autograd.grad(network._loss(x, y), alphas, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), alphas)
    assert all(g.abs().max() > 0 for g in second)


def test_a_file_edited_by_hand(tmp_path):
    """A temperature in MixedOp, as somebody writes it into model_search.py."""
    copy_code(tmp_path)
    path = tmp_path / "model_search.py"
    text = path.read_text()
    old = "mixed = sum(w * op(selected) for w, op in zip(weights, self._ops, strict=True))"
    assert old in text
    path.write_text(text.replace(old, old.replace("w * op", "w.sqrt() * op")))
    flags = "--set digits --input_size 8 --layers 3 --init_channels 8 --batch_size 300"
    command = [*warm_python(), "train_search.py", *flags.split(), "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("not in its fast form") == 1
    assert "cells as model_search.py has them" in done.stdout


# --- torch.hub ---


def test_hub(tmp_path):
    genotype, args = genotypes.DARTS_V1, SimpleNamespace(C=4, layers=3)
    network = model.NetworkCIFAR(args.C, 7, args.layers, True, genotype)
    weights = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "released.pth.tar")
    hub = torch.hub.load
    common = dict(source="local", C=4, layers=3)
    loaded = hub(str(ROOT), "pc_darts_cifar", num_classes=7, auxiliary=True, genotype="DARTS_V1",
                 weights=tmp_path / "released.pth.tar", **common)  # fmt: skip
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, network.state_dict()[name])
    imagenet = hub(str(ROOT), "pc_darts_imagenet", **common)
    assert imagenet(torch.zeros(2, 3, 64, 64))[0].shape == (2, 1000)
    assert hub(str(ROOT), "supernet", source="local", C=8, layers=3, num_classes=5, k=2).fused
    with pytest.raises(utils.UserError, match="another network"):
        hub(str(ROOT), "pc_darts_cifar", weights=tmp_path / "released.pth.tar", **common)
    import hubconf

    names = {n for n, value in vars(hubconf).items() if callable(value) and n[0] != "_"}
    assert names == {"pc_darts_cifar", "pc_darts_imagenet", "supernet", "tas"}


def test_hub_builds_the_cell_of_the_run_whose_weights_it_gives(tmp_path):
    own = genotypes.PC_DARTS_cifar._replace(
        normal=[("avg_pool_3x3" if op == "skip_connect" else op, i)
                for op, i in genotypes.PC_DARTS_cifar.normal]
    )  # fmt: skip
    network = model.NetworkCIFAR(4, 10, 3, False, own)
    genotypes.save(own, tmp_path / "genotype.json")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    how = dict(source="local", C=4, layers=3, weights=tmp_path)
    loaded = torch.hub.load(str(ROOT), "pc_darts_cifar", **how)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(x)[0], network.eval()(x)[0])
    with pytest.raises(utils.UserError, match="leave the genotype out"):
        torch.hub.load(str(ROOT), "pc_darts_cifar", genotype="PC_DARTS_cifar", **how)


def test_hub_takes_the_sizes_of_a_run(tmp_path):
    network = model.NetworkCIFAR(6, 7, 4, True, genotypes.DARTS_V2)
    genotypes.save(genotypes.DARTS_V2, tmp_path / "genotype.json")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    args = {"init_channels": 6, "layers": 4, "auxiliary": True}
    about = {"format": 1, "script": "train", "args": args, "classes": list("abcdefg")}
    (tmp_path / "args.json").write_text(json.dumps(about))
    how = dict(source="local", weights=tmp_path)
    loaded = torch.hub.load(str(ROOT), "pc_darts_cifar", **how)
    assert loaded.state_dict().keys() == network.state_dict().keys()
    with pytest.raises(utils.UserError, match="another network"):
        torch.hub.load(str(ROOT), "pc_darts_cifar", layers=5, **how)
    (tmp_path / "args.json").write_text(json.dumps(about | {"args": args | {"layers": "4"}}))
    with pytest.raises(utils.UserError, match=r"args.json is damaged"):
        torch.hub.load(str(ROOT), "pc_darts_cifar", **how)


def test_hub_takes_the_space_of_a_search(tmp_path):
    space = dict(k=2, steps=3, edge_norm=False, sampling="shift",
                 primitives=["none", "skip_connect", "sep_conv_3x3"])  # fmt: skip
    network = Network(8, 5, 4, None, multiplier=3, **space)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    args = dict(init_channels=8, layers=4, k=2, steps=3, no_edge_norm=True, sampling="shift",
                stem="cifar")  # fmt: skip
    about = {"format": 1, "script": "train_search", "args": args, "classes": list("abcde")}
    (tmp_path / "args.json").write_text(json.dumps(about | {"primitives": space["primitives"]}))
    how = dict(source="local", weights=tmp_path)
    loaded = torch.hub.load(str(ROOT), "supernet", **how)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded.eval()(x), network.eval()(x))
    assert loaded.genotype() == network.genotype()
    for given in (dict(edge_norm=True), dict(sampling="shuffle"), dict(k=4)):
        with pytest.raises(utils.UserError, match="leave it out"):
            torch.hub.load(str(ROOT), "supernet", **how, **given)
    (tmp_path / "args.json").write_text(json.dumps(about))
    with pytest.raises(utils.UserError, match=r"args.json is damaged \('primitives'\)"):
        torch.hub.load(str(ROOT), "supernet", **how)


def test_hub_gives_a_network_that_a_search_found(tmp_path):
    network = found.uniform(8, 0.5, 7, 16)
    run = tmp_path / "eval-x"
    run.mkdir()
    network.save(run / "tas.json")
    torch.save(network.network().state_dict(), run / "weights.pt")
    wanted = torch.load(run / "weights.pt")

    def load(**arguments):
        return torch.hub.load(str(ROOT), "tas", source="local", **arguments)

    for arch in (str(run), str(run / "tas.json"), network.text()):
        loaded = load(arch=arch, weights=run)
        state = loaded.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
        assert loaded(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    assert load(arch=network.text(), num_classes=3)(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    of_run = load(weights=run)  # the network is that of the weights
    assert all(torch.equal(value, wanted[n]) for n, value in of_run.state_dict().items())
    whole = load(depth=8)
    assert whole.layers[-1].conv_b.conv.weight.shape == (64, 64, 3, 3)
    assert whole.classifier.out_features == 10
    with pytest.raises(utils.UserError, match="another network"):
        load(arch="unpruned", depth=8, weights=run / "weights.pt")
    with pytest.raises(utils.UserError, match="needs depth"):
        load()
    with pytest.raises(utils.UserError, match="cannot read 'nothing'"):
        load(arch="nothing")
    for classes in (0, -3):
        with pytest.raises(utils.UserError, match="give 1 or more"):
            load(arch=run / "tas.json", num_classes=classes)
