"""The retrieval loss of Auto-ReID: cross entropy and batch-hard triplets (Hermans et al., 2017)."""

import torch
import torch.nn.functional as F
from torch import nn

from .metrics import pairwise


def batch_hard_triplet(embeddings, ids, margin=0.3):
    """max(0, margin + d(a, p) - d(a, n)), the mean over the anchors of a batch.

    embeddings (N, D), ids (N,). p is the farthest other image of the anchor's identity, n the
    nearest of another one, d Euclidean. Anchors without a p or an n do not count; where none is
    left the loss is 0. Computed in float32 or more.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        x = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        d = pairwise(x, x)
        same = ids[:, None] == ids
        others = same & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
        positive = d.masked_fill(~others, 0.0).amax(1)
        negative = d.masked_fill(same, torch.inf).amin(1)
        counted = others.any(1) & ~same.all(1)
        losses = (margin + positive - negative).relu().where(counted, 0.0)
        return losses.sum() / counted.sum().clamp_min(1)


class RetrievalLoss(nn.Module):
    """weight * cross entropy + (1 - weight) * batch_hard_triplet, of (embeddings, logits) and ids.

    weight: the paper's lambda, 0..1; 1 is classification alone. ids (N,): 0 to classes - 1.
    """

    def __init__(self, weight=0.5, margin=0.3, label_smoothing=0.0):
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight {weight} of the cross entropy: give 0 to 1")
        self.weight, self.margin, self.label_smoothing = weight, margin, label_smoothing

    def forward(self, outputs, ids):
        embeddings, logits = outputs
        loss = 0.0 * logits.sum()  # so that every parameter has a gradient
        if self.weight > 0:
            loss = self.weight * F.cross_entropy(logits, ids, label_smoothing=self.label_smoothing)
        if self.weight < 1:
            loss = loss + (1 - self.weight) * batch_hard_triplet(embeddings, ids, self.margin)
        return loss
