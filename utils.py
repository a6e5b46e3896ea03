"""Errors, seeds, meters; what scripts of the DARTS family import from utils."""

import contextlib
import os
import random
import shutil

import numpy as np
import torch
from torchvision import transforms
from torchvision.ops import stochastic_depth


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
    """Seeds Python, NumPy and PyTorch; sets cuDNN's benchmark mode and anomaly detection.

    deterministic: PyTorch takes only algorithms that give the same bits every time.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs this for it
        torch.use_deterministic_algorithms(True, warn_only=True)  # warns where there is none such
    torch.backends.cudnn.benchmark = not deterministic  # cuDNN tries its kernels
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


def in_functorch():
    """Whether this call is within torch.func, as its vmap or jvp."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_layout(x, layout):
    """x (N, C, H, W) in this memory format; as it is for None, and within torch.func.vmap."""
    if layout is None or in_functorch():
        return x
    return x.contiguous(memory_format=layout)


@torch.no_grad()
def copy_into(values, tensors):
    """The values, a list, into the tensors, in place."""
    for value, tensor in zip(values, tensors, strict=True):
        tensor.copy_(value)


def without_module_prefix(state_dict):
    """The state dict without the `module.` prefix that DataParallel gives every name."""
    prefix = "module."
    wrapped = all(name.startswith(prefix) for name in state_dict)
    return {name.removeprefix(prefix) if wrapped else name: state_dict[name] for name in state_dict}


def duration(seconds):
    """The time in words: 90 s, 12 min, 3.5 h."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


class Cutout:
    """Zeros a square of an image (C, H, W): its centre anywhere, clipped at the border.

    DeVries and Taylor, arXiv:1708.04552. length: side of the square in pixels; even, as it extends
    length // 2 to both sides.
    """

    def __init__(self, length):
        self.length = length

    def __call__(self, image):
        height, width = image.shape[1:]
        y, x = np.random.randint(height), np.random.randint(width)
        half = self.length // 2
        image = image.clone()
        image[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0
        return image


CIFAR_MEAN, CIFAR_STD = (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def _data_transforms(args, mean, std):
    normalized = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    augmented = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    cutout = [Cutout(args.cutout_length)] if args.cutout else []
    return (
        transforms.Compose([*augmented, *normalized, *cutout]),
        transforms.Compose(normalized),
    )


def _data_transforms_cifar10(args):
    """(for training, for validation): torchvision transforms. args: cutout, cutout_length."""
    return _data_transforms(args, CIFAR_MEAN, CIFAR_STD)


def _data_transforms_cifar100(args):
    """As _data_transforms_cifar10."""
    return _data_transforms(args, CIFAR100_MEAN, CIFAR100_STD)


def drop_path(x, drop_prob):
    """x (N, C, H, W): each image's maps are zeroed with this probability, else times 1 / keep."""
    return stochastic_depth(x, float(drop_prob), "row")


def save(model, model_path):
    """Writes the state dict of a network."""
    torch.save(model.state_dict(), model_path)


def load(model, model_path):
    """Loads a state dict of `save` into a network; the file runs no code."""
    model.load_state_dict(torch.load(model_path, map_location="cpu", weights_only=True))


def save_checkpoint(state, is_best, save):
    """Writes `state` to checkpoint.pth.tar in the folder `save`; the best to model_best.pth.tar."""
    path = os.path.join(save, "checkpoint.pth.tar")
    torch.save(state, path)
    if is_best:
        shutil.copyfile(path, os.path.join(save, "model_best.pth.tar"))


def create_exp_dir(path, scripts_to_save=None):
    """Makes the folder `path`, where it is missing, with copies of the files in its `scripts`."""
    os.makedirs(path, exist_ok=True)
    print(f"Experiment dir : {path}")
    if scripts_to_save is not None:
        os.makedirs(os.path.join(path, "scripts"), exist_ok=True)
        for script in scripts_to_save:
            shutil.copy(script, os.path.join(path, "scripts", os.path.basename(script)))
