"""Retrieval: distances of embeddings, CMC and mean average precision (Zheng et al., ICCV 2015).

A query looks for images of its identity by other cameras in a gallery. Of the gallery, identity -1
(junk) and the images of the query's own identity and camera are dropped; identity 0 (a distractor,
that no query of these sets has) stays. CMC at k is the share of the queries with a match among the
first k. The average precision of a query is the mean over its matches of
(matches so far) / (rank of this one). Queries without any match do not count.
"""

from typing import NamedTuple

import numpy as np
import torch

JUNK = -1
MEMORY = 2**28  # bytes that a piece of the work on all pairs may take
PAIR_BYTES = 64  # of them for a pair of query and gallery image: distance, order, counts, masks


class Retrieval(NamedTuple):
    cmc: np.ndarray  # (max_rank,) float64: at k, cmc[k - 1]
    mAP: float
    queries: int  # that have a match
    without: int  # queries that have none and do not count


def rank(distances, query_ids, gallery_ids, query_cameras, gallery_cameras, max_rank):
    """(cmc (max_rank,) float64, mAP) of distances (Q, G): the first two of `evaluate`."""
    result = evaluate(
        distances, query_ids, gallery_ids, query_cameras, gallery_cameras, max_rank
    )  # fmt: skip
    return result.cmc, result.mAP


def evaluate(distances, query_ids, gallery_ids, query_cameras, gallery_cameras, max_rank=50):
    """The Retrieval that distances (Q, G) give; ids and cameras are (Q,) and (G,) integers.

    Arrays or tensors. Of equal distances the image that comes first in the gallery is the nearer.
    Where max_rank is more than the gallery, the CMC stays at its last figure. Raises ValueError
    where the sizes disagree, a distance is not a number, or no query has a match.
    """
    distances = torch.as_tensor(distances)
    if distances.ndim != 2 or not distances.numel():
        raise ValueError(f"distances {tuple(distances.shape)}: give (queries, gallery images)")
    labels = _labels(query_ids, gallery_ids, query_cameras, gallery_cameras, distances)
    return _evaluate(lambda rows: distances[rows], *labels, max_rank, MEMORY)


def evaluate_embeddings(
    query, gallery, query_ids, gallery_ids, query_cameras, gallery_cameras, max_rank=50,
    metric="euclidean", memory=MEMORY,
):  # fmt: skip
    """The Retrieval of embeddings (Q, D) and (G, D), some queries at a time; as `evaluate`.

    metric: "euclidean" or "cosine". memory: bytes for the pairs; beside the embeddings, 0.6 GB was
    measured in all for 3,368 queries and 15,913 gallery images of 2,048 numbers, on a CPU.
    """
    query, gallery = checked(query, gallery)
    labels = _labels(query_ids, gallery_ids, query_cameras, gallery_cameras, query, gallery)

    def of(rows):
        return pairwise(query[rows], gallery, metric)

    return _evaluate(of, *labels, max_rank, memory)


def distances(query, gallery, metric="euclidean", memory=MEMORY):
    """All distances (Q, G) of embeddings (Q, D) and (G, D), made in pieces of `memory` bytes.

    metric: "euclidean" or "cosine" (1 - cosine). Raises ValueError where the sizes disagree.
    """
    query, gallery = checked(query, gallery)
    result = query.new_empty(len(query), len(gallery))
    for rows in pieces(len(query), len(gallery), memory):
        result[rows] = pairwise(query[rows], gallery, metric)
    return result


def pairwise(x, y, metric="euclidean"):
    """Distances (N, M) of embeddings x (N, D) and y (M, D), differentiable, no copy of y.

    Half precision is multiplied as it is; a Euclidean distance of zero is 1e-6 for its gradient.
    """
    if metric == "euclidean":
        squares = (x**2).sum(1, keepdim=True) + torch.linalg.vector_norm(y, dim=1) ** 2
        return torch.addmm(squares, x, y.T, alpha=-2).clamp_min(1e-12).sqrt()
    if metric == "cosine":
        norms = (torch.linalg.vector_norm(z, dim=1).clamp_min(1e-12) for z in (x, y))
        return 1 - x @ y.T / torch.outer(*norms)
    raise ValueError(f"metric {metric!r}: give euclidean or cosine")


def pieces(rows, columns, memory=MEMORY):
    """Slices of `rows` rows such that the pairs of a slice with all columns fit into `memory`."""
    step = max(1, memory // (PAIR_BYTES * max(1, columns)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def ranked(distances, query_ids, gallery_ids, query_cameras, gallery_cameras):
    """(order, kept, right), each (Q, G): a row's gallery images, the nearest first.

    order: their indices. kept: which are not dropped. right: which are matches. All are tensors.
    """
    order = distances.argsort(dim=1, stable=True)
    ids, cameras = gallery_ids[order], gallery_cameras[order]
    same = ids == query_ids[:, None]
    kept = ~(same & (cameras == query_cameras[:, None])) & (ids != JUNK)
    return order, kept, same & kept


def _evaluate(distances_of, query_ids, gallery_ids, query_cameras, gallery_cameras, max_rank,
              memory):  # fmt: skip
    """distances_of(slice): the rows of the matrix for these queries."""
    if max_rank < 1:
        raise ValueError(f"max_rank {max_rank}: give 1 or more")
    first, precision = [], []  # of each query that counts: rank of its first match; AP
    for rows in pieces(len(query_ids), len(gallery_ids), memory):
        matrix = distances_of(rows)
        if matrix.isnan().any():
            raise ValueError("a distance is not a number: look at the embeddings")
        _, kept, right = ranked(
            matrix, query_ids[rows], gallery_ids, query_cameras[rows], gallery_cameras
        )
        counted = right.any(1)
        kept, right = kept[counted].cpu(), right[counted].cpu()  # MPS has no float64
        ranks = kept.cumsum(1)  # from 1, of the kept ones
        first.append(ranks.gather(1, right.int().argmax(1, keepdim=True)).squeeze(1))
        share = right.cumsum(1).double().div_(ranks).masked_fill_(~right, 0.0)
        precision.append(share.sum(1) / right.sum(1))
    first, precision = torch.cat(first), torch.cat(precision)
    if not len(first):
        raise ValueError("no query has a match by another camera in the gallery: check the ids")
    hits = first[:, None] <= torch.arange(1, max_rank + 1)  # (Q, max_rank)
    cmc = hits.double().mean(0).numpy()
    return Retrieval(cmc, float(precision.mean()), len(first), len(query_ids) - len(first))


def _labels(query_ids, gallery_ids, query_cameras, gallery_cameras, query, gallery=None):
    """The four as tensors on the device of `query`; ValueError where one has another length."""
    given = {"query_ids": query_ids, "gallery_ids": gallery_ids,
             "query_cameras": query_cameras, "gallery_cameras": gallery_cameras}  # fmt: skip
    sizes = len(query), query.shape[1] if gallery is None else len(gallery)
    for name, values in given.items():
        values = torch.as_tensor(values, device=query.device)
        size = sizes[name.startswith("gallery")]
        if values.shape != (size,):
            raise ValueError(f"{name} {tuple(values.shape)}: give ({size},) as of the distances")
        given[name] = values
    return given.values()


def checked(*both):
    """Both embeddings as tensors; ValueError where they do not fit each other."""
    both = [torch.as_tensor(x) for x in both]
    if any(x.ndim != 2 for x in both) or both[0].shape[1] != both[1].shape[1]:
        shapes = " and ".join(str(tuple(x.shape)) for x in both)
        raise ValueError(f"embeddings {shapes}: give (queries, D) and (gallery images, D)")
    if not len(both[0]) or not len(both[1]):
        raise ValueError("there are no queries, or no gallery images")
    return both
