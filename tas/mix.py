"""The batch norms of the drawn widths and their interpolation, as one matrix for each convolution.

A convolution's output y goes through BN_i and BN_j, which read its first C_i and C_j channels; both
results are interpolated to the wider of the two (CWI) and added with the weights of the draw. The
statistics of a batch belong to a channel, whichever norm reads it, so with z = (y - mean) / std

    w_i CWI_ij(gamma_i z + beta_i) + w_j CWI_ji(gamma_j z + beta_j) = M z + b,
    M = w_i CWI_ij diag(gamma_i) + w_j CWI_ji diag(gamma_j),
    b = w_i CWI_ij beta_i + w_j CWI_ji beta_j.

M is C x C and b has C entries: one batch norm without weights gives z, one product the rest. Maps
lie in memory with their channels last, so that this product, a row a pixel, needs no copy.
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


def mixed(y, mix, shortcut=None, relu=False):
    """M y + b, plus `shortcut`, then ReLU: (N, mix.width, H, W) -> (N, the wider's, H, W).

    The narrower is added to the first channels of the wider.
    """
    N, _, H, W = y.shape
    width = mix.width if shortcut is None else max(mix.width, shortcut.shape[1])
    out = torch.addmm(mix.bias[:width], rows(y), mix.matrix[:width, : mix.width].T)  # (NHW, width)
    # in place before it is seen as a map: autograd copies a tensor that is changed through a view
    if shortcut is not None:
        C = shortcut.shape[1]
        out += rows(shortcut) if width == C else F.pad(rows(shortcut), (0, width - C))
    if relu:
        out = F.relu(out, inplace=True)
    return out.view(N, H, W, width).permute(0, 3, 1, 2)


def rows(x):
    """(N, C, H, W) -> (N H W, C), without a copy where the channels lie last in memory."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def normalized(y, norm):
    """z = (y - mean) / std over the batch with the eps of `norm`; (mean, unbiased variance) (C)."""
    C = y.shape[1]
    mean, var = norm.running_mean.new_zeros(C), norm.running_var.new_zeros(C)
    z = F.batch_norm(y, mean, var, training=True, momentum=1.0, eps=norm.eps)
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
        """(K, sum of the choices): a row holds all norms of a convolution."""
        values = torch.cat([getattr(bn, name) for conv in convs for bn in conv.BNs])
        return values.view(len(convs), -1)

    def _drawn(self, convs, name, index):
        """(K, 2, C): of the two drawn norms of each convolution."""
        entries = self.entry[index].flatten(1)
        return self._all(convs, name).gather(1, entries).view(len(convs), 2, -1)

    @torch.no_grad()
    def track(self, convs, index, statistics):
        """Moves the running statistics of the drawn norms to the batch's (mean, variance)."""
        norms = [bn for conv in convs for bn in conv.BNs]
        drawn = index.new_zeros(len(index), len(self.choices)).scatter_(1, index, 1)  # (K, 8)
        rate = norms[0].momentum * drawn[:, self.choice].to(norms[0].running_mean.dtype)
        C = max(self.choices)
        for which, name in enumerate(("running_mean", "running_var")):
            batch = [F.pad(pair[which], (0, C - len(pair[which]))) for pair in statistics]
            batch = torch.stack(batch)[:, self.channel]  # (K, all norms' channels)
            moved = self._all(convs, name).lerp(batch, rate)
            parts = moved.flatten().split([bn.num_features for bn in norms])
            torch._foreach_copy_([getattr(bn, name) for bn in norms], parts)
        torch._foreach_add_([bn.num_batches_tracked for bn in norms], drawn.flatten().unbind())
