"""The draw of widths and depths, and channel-wise interpolation (TAS, section 3.1)."""

import torch
from torch.nn import functional as F


def gumbel(like):
    """Gumbel(0, 1) noise of the shape of `like`."""
    draw = torch.empty_like(like).exponential_()
    return -draw.clamp_min_(torch.finfo(like.dtype).tiny).log()  # a draw may be 0


def two_widths(attentions, tau, noise=None, index=None):
    """For each convolution two different choices and their weights.

    attentions: (L, choices); noise: Gumbel noise of this shape; index: (L, 2); None draws them.
    Returns index (L, 2) and weights (L, 2), which sum to 1 and pass gradients to `attentions`.
    """
    noise = gumbel(attentions) if noise is None else noise
    logits = (F.log_softmax(attentions, dim=1) + noise) / tau
    if index is None:
        index = two_different(F.softmax(logits.detach(), dim=1) + 1e-7)
    return index, F.softmax(logits.gather(1, index), dim=1)


def two_different(probabilities):
    """multinomial(probabilities, 2) without replacement: (L, choices) -> (L, 2).

    Of exponential clocks with these rates, the two that ring first: torch.multinomial's law, but
    without its check of the values, for which a GPU would have to wait.
    """
    clocks = torch.empty_like(probabilities).exponential_()
    return (probabilities / clocks).topk(2, dim=1).indices


def depths(attentions, tau, noise=None):
    """Gumbel-softmax weights of all depths: (stages, choices) -> the same."""
    noise = gumbel(attentions) if noise is None else noise
    return F.softmax((F.log_softmax(attentions, dim=1) + noise) / tau, dim=1)


def cwi(choices):
    """Channel-wise interpolation as matrices: (choices, choices, C, C) for C = max(choices).

    [i, j] takes the first choices[i] channels to the larger of choices[i] and choices[j], each
    an average over a window of channels (adaptive average pooling); rows and columns beyond are 0.
    """
    C = max(choices)
    matrices = torch.zeros(len(choices), len(choices), C, C)
    for i, C_i in enumerate(choices):
        for j, C_j in enumerate(choices):
            wide = max(C_i, C_j)
            matrices[i, j, :wide, :C_i] = F.adaptive_avg_pool1d(torch.eye(C_i), wide).T
    return matrices
