"""Errors, seeds, meters: what scripts of the DARTS family import from utils."""

import contextlib
import os
import random

import numpy as np
import torch


class UserError(ValueError):
    """An error that the user can cause and mend: its one line says what is wrong and what to do."""


@contextlib.contextmanager
def user_errors(*kinds):
    """Turns errors of these kinds, whose text is one line for the user, into UserError."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


def set_seed(seed, deterministic=False, detect_anomaly=False):
    """Seeds Python, NumPy and PyTorch.

    deterministic: PyTorch takes only algorithms that give the same bits every time.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs for it
        torch.use_deterministic_algorithms(True, warn_only=True)  # where there is no other way
        torch.backends.cudnn.benchmark = False
    torch.autograd.set_detect_anomaly(detect_anomaly)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class AverageMeter:
    """A running mean that stays on the device until it is read: no step waits for the GPU."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.sum, self.cnt = 0.0, 0

    def update(self, value, n=1):
        """Adds the mean `value` (number or 0-d tensor) of n items."""
        self.sum = self.sum + (value.detach() if torch.is_tensor(value) else value) * n
        self.cnt += n

    @property
    def avg(self):
        return float(self.sum) / max(self.cnt, 1)


AvgrageMeter = AverageMeter  # as DARTS spells it


def accuracy(output, target, topk=(1,)):
    """Percentages of targets (N,) among the k best logits (N, classes): a 0-d tensor per k."""
    best = output.topk(min(max(topk), output.shape[1]), dim=1).indices  # (N, k)
    hits = best == target[:, None]
    return [100.0 * hits[:, :k].any(1).float().mean() for k in topk]


def count_parameters_in_MB(model):
    """Millions of parameters (the name is DARTS's), those of an auxiliary head not counted."""
    return sum(p.numel() for n, p in model.named_parameters() if "auxiliary" not in n) / 1e6


def without_module_prefix(state_dict):
    """The state dict as a network saves it that is not wrapped in DataParallel."""
    prefix = "module."
    wrapped = all(name.startswith(prefix) for name in state_dict)
    return {name.removeprefix(prefix) if wrapped else name: state_dict[name] for name in state_dict}


def duration(seconds):
    """As people say it."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
