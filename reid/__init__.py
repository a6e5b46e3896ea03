"""Auto-ReID: searching a part-aware network for person re-identification (Quan et al., 2019).

Importing it adds the operation part_aware to operations.OPS.
"""

from operations import OPS

from .losses import RetrievalLoss, batch_hard_triplet
from .metrics import Retrieval, distances, evaluate, evaluate_embeddings, rank
from .part_aware import PartAware
from .rerank import rerank
from .sampler import PKBatches

OPS["part_aware"] = lambda C, stride, affine: PartAware(C, C, stride)

__all__ = [
    "PKBatches",
    "PartAware",
    "Retrieval",
    "RetrievalLoss",
    "batch_hard_triplet",
    "distances",
    "evaluate",
    "evaluate_embeddings",
    "rank",
    "rerank",
]
