"""What a search and a training minimise besides the cross-entropy."""

import math

import torch
from torch.nn import functional as F


def cost(expected, actual, target, unpruned, tolerance=0.05):
    """The term that drives the multiply-adds to `target` (TAS, section 3.1).

    expected: tensor, E, the expected multiply-adds; actual: F, those of the network that argmax
    gives now; target: R; unpruned: those of the whole network; all in millions.
    -log E where F < R - tolerance * unpruned, log E where F > R, else 0: as the released code has
    it. In the paper it is 0 up to (1 + tolerance) * R, too.
    """
    direction = (actual > target) * 1 - (actual < target - tolerance * unpruned) * 1
    return direction * expected.log()


def distillation(logits, teacher_logits, target, temperature=4.0, share=0.9):
    """Knowledge distillation (Hinton et al. 2015; TAS, section 3.2).

    (1 - share) * cross-entropy + share * T^2 * KL(softmax(teacher / T) || softmax(logits / T));
    logits (N, classes), target (N,); the mean over the batch. In float32 at least.
    """
    student, teacher = (  # on a CPU autocast leaves log_softmax in bfloat16
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits, teacher_logits)
    )
    soft = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    hard = F.cross_entropy(student, target)
    return (1 - share) * hard + share * temperature**2 * soft


def linear_temperature(epoch, epochs, start=10.0, end=0.1):
    """tau of an epoch (from 0), falling in a line from `start` to `end` in the last (the paper)."""
    return start + (end - start) * epoch / max(epochs - 1, 1)


def cosine_temperature(epoch, epochs, start=10.0, end=0.1):
    """tau of an epoch (from 0), falling along half a cosine (the released code)."""
    return end + (start - end) * (1 + math.cos(math.pi * epoch / max(epochs - 1, 1))) / 2
