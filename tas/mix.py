"""The batch norms of the drawn widths and their interpolation, as one matrix for each convolution.

A convolution's output y goes through BN_i and BN_j, which read its first C_i and C_j channels; both
results are interpolated to the wider of the two (CWI) and added with the weights of the draw. The
statistics of a batch belong to a channel, whichever norm reads it, so with z = (y - mean) / std

    w_i CWI_ij(gamma_i z + beta_i) + w_j CWI_ji(gamma_j z + beta_j) = M z + b,
    M = w_i CWI_ij diag(gamma_i) + w_j CWI_ji diag(gamma_j),
    b = w_i CWI_ij beta_i + w_j CWI_ji beta_j.

M is C x C and b has C entries: one batch norm without weights gives z, one product the rest. Maps lie
in memory with their channels last, so that this product, as one row a pixel, needs no copy.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from tas import draw


class Mix(NamedTuple):
    """What follows one convolution: M (C, C), b (C), and how many channels are not 0."""

    matrix: torch.Tensor
    bias: torch.Tensor
    width: int


def mixed(y, mix, width=None):
    """M y + b: (N, mix.width, H, W) -> (N, width or mix.width, H, W), zeros beyond mix.width."""
    width = mix.width if width is None else width
    M = mix.matrix[:width, : mix.width]
    b = None if mix.bias is None else mix.bias[:width]
    return F.linear(y.permute(0, 2, 3, 1), M, b).permute(0, 3, 1, 2)


def normalized(y, eps):
    """z = (y - mean) / std over the batch; and the mean and the unbiased variance (C)."""
    mean, var = torch.zeros_like(y[0, :, 0, 0]), torch.ones_like(y[0, :, 0, 0])
    z = F.batch_norm(y, mean, var, training=True, momentum=1.0, eps=eps)
    return z, (mean, var)


class WidthNorms(nn.Module):
    """The norms of all convolutions of C channels, mixed at once. No weights of its own.

    `convs` have `BNs`, a norm for each of the widths `choices`; K is their number.
    """

    def __init__(self, choices):
        super().__init__()
        self.choices = choices
        C, total = max(choices), sum(choices)
        starts = torch.tensor([0, *choices[:-1]]).cumsum(0)
        # entry c of norm i in the row of all norms; what lies beyond C_i meets a 0 of cwi
        entry = (starts[:, None] + torch.arange(C)).clamp(max=total - 1)
        self.register_buffer("cwi", draw.cwi(choices), False)  # (8, 8, C, C)
        self.register_buffer("entry", entry, False)  # (8, C)
        self.register_buffer("channel", torch.cat([torch.arange(C_i) for C_i in choices]), False)
        choice = torch.arange(len(choices)).repeat_interleave(torch.tensor(choices))
        self.register_buffer("choice", choice, False)  # (total), as channel

    def forward(self, convs, index, weights, widths):
        """[Mix] of `convs` for choices (K, 2) with weights (K, 2); widths: of their outputs.

        In training mode M and b of the equation above, else those that take y itself, with the
        running statistics, which belong to the norm.
        """
        gamma = self._drawn(convs, "weight", index)  # (K, 2, C)
        beta = self._drawn(convs, "bias", index)
        if not self.training:
            eps = convs[0].BNs[0].eps
            gamma = gamma * (self._drawn(convs, "running_var", index) + eps).rsqrt()
            beta = beta - gamma * self._drawn(convs, "running_mean", index)
        cwi = self.cwi[index, index.flip(1)] * weights[..., None, None]  # (K, 2, C, C)
        matrix = (cwi * gamma[:, :, None]).sum(1)
        bias = (cwi @ beta[..., None]).sum((1, 3))
        return list(map(Mix, matrix, bias, widths))

    def _all(self, convs, name):
        return torch.cat([getattr(bn, name) for conv in convs for bn in conv.BNs])

    def _drawn(self, convs, name, index):
        rows = self._all(convs, name).view(len(convs), -1)
        return rows.gather(1, self.entry[index].flatten(1)).view(len(convs), 2, -1)

    @torch.no_grad()
    def track(self, convs, index, statistics):
        """Moves the running statistics of the drawn norms to the batch's (mean, variance)."""
        norms = [bn for conv in convs for bn in conv.BNs]
        drawn = F.one_hot(index, len(self.choices)).sum(1)  # (K, 8) of 0 and 1
        rate = norms[0].momentum * drawn[:, self.choice].to(norms[0].running_mean.dtype)
        C = max(self.choices)
        for name, values in zip(("running_mean", "running_var"), zip(*statistics, strict=True)):
            batch = torch.stack([F.pad(value, (0, C - len(value))) for value in values])
            rows = self._all(convs, name).view(len(convs), -1)
            rows = rows.lerp(batch[:, self.channel], rate)
            parts = rows.flatten().split([bn.num_features for bn in norms])
            torch._foreach_copy_([getattr(bn, name) for bn in norms], parts)
        torch._foreach_add_([bn.num_batches_tracked for bn in norms], drawn.flatten().unbind())
