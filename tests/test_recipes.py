"""The published settings are the defaults, and what is given reaches optimizers and losses."""

import importlib
import json
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import tas.loops
from harness import loops
from helpers import ROOT
from test_imagenet import fill

COMMON = dict(report_freq=50, momentum=0.9, grad_clip=5.0)
CIFAR = COMMON | dict(data="../data", set="cifar10", gpu=0, save="EXP", weight_decay=3e-4)
CIFAR |= dict(cutout=False, cutout_length=16)
IMAGENET = COMMON | dict(tmp_data_dir="/tmp/cache/", note="try", batch_size=1024, learning_rate=0.5)
SEARCH = dict(epochs=50, init_channels=16, layers=8, seed=2, learning_rate_min=0.0, unrolled=False)
SEARCH |= dict(weight_decay=3e-4, arch_weight_decay=1e-3)
TRAINING = dict(auxiliary=False, auxiliary_weight=0.4, seed=0)
TAS = dict(batch_size=256, learning_rate=0.1, momentum=0.9, weight_decay=5e-4)
PUBLISHED = {
    "train_search": CIFAR | SEARCH
    | dict(batch_size=256, learning_rate=0.1, train_portion=0.5, arch_learning_rate=6e-4)
    | dict(begin=15, k=4, no_edge_norm=False, sampling="shuffle"),
    "train": CIFAR | TRAINING
    | dict(batch_size=96, learning_rate=0.025, epochs=600, init_channels=36, layers=20)
    | dict(drop_path_prob=0.3),
    "train_search_imagenet": IMAGENET | SEARCH
    | dict(workers=4, begin=35, k=2, arch_learning_rate=6e-3),
    "train_imagenet": IMAGENET | TRAINING
    | dict(workers=32, epochs=250, init_channels=48, layers=14, weight_decay=3e-5)
    | dict(drop_path_prob=0.0, label_smooth=0.1, lr_scheduler="linear", report_freq=100),
    "train_search_tas": TAS
    | dict(epochs=600, tau_max=10.0, tau_min=0.1, flop_weight=2.0, tolerance=0.05)
    | dict(arch_learning_rate=1e-3, arch_weight_decay=1e-3),
    "train_tas": TAS | dict(epochs=300, temperature=4.0, distillation=0.9),
    "train_search_reid": dict(
        height=384, width=128, layers="2,2,2,2", instances=4, loss="retrieval", ce_weight=0.5,
        margin=0.3, learning_rate=0.1, learning_rate_min=0.001, weight_decay=5e-5,
        arch_learning_rate=0.02, k=1, first_order=False,
    ),
    "train_reid": dict(arch="REID_SEARCH", height=384, width=128, layers="2,2,2,2", instances=4,
                       ce_weight=0.5, margin=0.3, weight_decay=5e-4, label_smooth=0.1),
}  # fmt: skip
DIGITS = "--set digits --input_size 8 --batch_size 100 --epochs 1 --init_channels 8 --layers 3"
PHOTOS = "--tmp_data_dir data --input_size 32 --batch_size 4 --epochs 1 --init_channels 8"
PHOTOS += " --layers 3 --workers 0"
OTHER = " --learning_rate 0.2 --momentum 0.8 --weight_decay 1e-2"
OTHERS = [0.2, 0.8, 1e-2]


EARLIER = {  # of each script a run that an earlier version made
    "train_search": "digits-search",
    "train": "cells/random-0-0",
    "train_search_reid": "reid/search",
    "train_search_tas": "tas/search-s0-20261125-003746",
    "train_tas": "tas/eval-found-s0-20261125-004244",
}


@pytest.mark.parametrize("name", EARLIER)
def test_the_flags_of_earlier_runs_are_still_taken(name, monkeypatch):
    folder = ROOT / "evidence" / EARLIER[name]
    stored = json.loads((folder / "args.json").read_text())["args"]
    args = vars(arguments(name, f"--resume {folder}", monkeypatch))
    assert {flag: args[flag] for flag in stored} == stored | {"resume": str(folder)}


class EnoughError(Exception):
    pass


def arguments(name, flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags.split()])
    return importlib.import_module(name).get_args()


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults(name, monkeypatch):
    args = vars(arguments(name, "", monkeypatch))
    assert {flag: args[flag] for flag in PUBLISHED[name]} == PUBLISHED[name]


def first_epoch(name, flags, monkeypatch, tmp_path):
    """The arguments with which a script calls its loop for the first time."""
    fill(tmp_path / "data" / "imagenet" / "train", {"cat": 100, "dog": 90})
    fill(tmp_path / "data" / "imagenet" / "val", {"cat": 3, "dog": 5})
    monkeypatch.chdir(tmp_path)
    seen = []

    def loop(*given):
        seen.extend(given)
        raise EnoughError

    for module in (loops, tas.loops):
        monkeypatch.setattr(module, "search_epoch", loop)
    monkeypatch.setattr(loops, "train_epoch", loop)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    args = arguments(name, flags, monkeypatch)
    try:
        with pytest.raises(EnoughError):
            sys.modules[name].main(args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return seen


def settings(optimizer, *names):
    [group] = optimizer.param_groups
    return [group[name] for name in names]


@pytest.mark.parametrize(
    ("name", "flags"),
    [("train_search", DIGITS), ("train_search_imagenet", PHOTOS)],
    ids=["cifar", "imagenet"],
)
def test_the_settings_of_a_search_reach_its_optimizers(name, flags, monkeypatch, tmp_path):
    flags += f"{OTHER} --arch_learning_rate 1e-4 --arch_weight_decay 1e-5 --begin 0"
    _, _, _, _, architect, optimizer, args, frozen, _ = first_epoch(
        name, flags, monkeypatch, tmp_path
    )
    assert settings(optimizer, "lr", "momentum", "weight_decay") == OTHERS
    expected = [1e-4, (0.5, 0.999), 1e-5]
    assert settings(architect.optimizer, "lr", "betas", "weight_decay") == expected
    assert (architect.network_momentum, architect.network_weight_decay) == (0.8, 1e-2)
    assert architect.grad_clip == (5.0 if "imagenet" in name else None)
    assert args.grad_clip == 5.0 and not frozen


@pytest.mark.parametrize(
    ("name", "flags"),
    [("train", DIGITS), ("train_imagenet", f"{PHOTOS} --label_smooth 0.3")],
    ids=["cifar", "imagenet"],
)
def test_the_settings_of_a_training_reach_its_optimizer_and_loss(
    name, flags, monkeypatch, tmp_path
):
    _, _, criterion, optimizer, *_ = first_epoch(name, flags + OTHER, monkeypatch, tmp_path)
    assert settings(optimizer, "lr", "momentum", "weight_decay") == OTHERS
    assert criterion.label_smoothing == (0.3 if "imagenet" in name else 0)


SMALL = "--set digits --input_size 8 --epochs 1 --batch_size 100 --depth 8"
RETRIEVAL = "--set digits --epochs 1 --lambda 0.7 --margin 0.4 --workers 0 --identities 4"


def test_the_settings_of_tas_reach_its_optimizers(monkeypatch, tmp_path):
    flags = f"{SMALL}{OTHER} --arch_learning_rate 1e-4 --arch_weight_decay 1e-5 --tau_max 3"
    _, _, _, optimizer, arch_optimizer, tau, _, args, _ = first_epoch(
        "train_search_tas", flags, monkeypatch, tmp_path
    )
    assert settings(optimizer, "lr", "momentum", "weight_decay", "nesterov") == OTHERS + [True]
    expected = [1e-4, (0.5, 0.999), 1e-5]
    assert settings(arch_optimizer, "lr", "betas", "weight_decay") == expected
    assert tau == 3 and args.grad_clip is None
    monkeypatch.undo()
    _, _, _, optimizer, *_ = first_epoch("train_tas", SMALL + OTHER, monkeypatch, tmp_path)
    assert settings(optimizer, "lr", "momentum", "weight_decay", "nesterov") == OTHERS + [True]


def test_the_settings_of_auto_reid_reach_its_optimizers_and_loss(monkeypatch, tmp_path):
    flags = f"{RETRIEVAL}{OTHER} --arch_learning_rate 1e-4 --arch_weight_decay 1e-5"
    _, _, model, _, architect, optimizer, args, *_ = first_epoch(
        "train_search_reid", flags, monkeypatch, tmp_path
    )
    assert settings(optimizer, "lr", "momentum", "weight_decay") == OTHERS
    expected = [1e-4, (0.5, 0.999), 1e-5]
    assert settings(architect.optimizer, "lr", "betas", "weight_decay") == expected
    assert args.unrolled and (model._criterion.weight, model._criterion.margin) == (0.7, 0.4)
    monkeypatch.undo()
    flags = f"{RETRIEVAL} --warm_up 0 --learning_rate 0.2 --weight_decay 1e-2 --label_smooth 0.3"
    _, _, loss, optimizer, *_ = first_epoch("train_reid", flags, monkeypatch, tmp_path)
    assert settings(optimizer, "lr", "weight_decay") == [0.2, 1e-2]
    assert (loss.weight, loss.margin, loss.label_smoothing) == (0.7, 0.4, 0.3)


def test_the_auxiliary_loss_has_its_weight():
    logits, auxiliary = torch.randn(2, 6, 5)
    y, args = torch.arange(6) % 5, SimpleNamespace(auxiliary=True, auxiliary_weight=0.3)
    loss, given = loops.classify(lambda x: (logits, auxiliary), F.cross_entropy, None, y, args)
    expected = F.cross_entropy(logits, y) + 0.3 * F.cross_entropy(auxiliary, y)
    assert given is logits
    torch.testing.assert_close(loss, expected)
