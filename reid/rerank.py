"""Re-ranking with k-reciprocal neighbours (Zhong et al., CVPR 2017).

Two images that are among each other's nearest are likely the same person. Query and gallery
images together are the set; N(p, k) are the k nearest of p in it, p itself not counted, and p.

- R(p, k) = {g in N(p, k): p in N(g, k)}. R*(p) is R(p, k1), and for each q in it R(q, k1 / 2) too
  where at least two thirds of that lie in R(p, k1) (equations 2 and 3).
- V_p(g) = exp(-d(p, g)) for g in R*(p), else 0 (equation 7), d the squared Euclidean distance as a
  share of the largest from p; V_p is scaled to the sum 1. The paper leaves both scales open; these
  are those of its published results.
- Local query expansion: V_p is the mean of V_q over the k2 nearest q of p, p the first of them.
- Jaccard distance 1 - sum min(V_p, V_g) / sum max(V_p, V_g) (equation 10), and the result
  (1 - weight) * Jaccard + weight * d (equation 12).
"""

import torch

from . import metrics


def rerank(query, gallery, k1=20, k2=6, weight=0.3, memory=metrics.MEMORY):
    """Distances (Q, G) after re-ranking of embeddings (Q, D) and (G, D), for `evaluate`.

    weight: the paper's lambda, of the original distance; 1 changes nothing in the order. V is kept
    sparse: besides the result it takes some multiple of (Q + G) * k1 * k2 numbers, and `memory`
    bytes for the pairs. Raises ValueError where k1 or k2 is below 1, or the sizes disagree.
    """
    if k1 < 1 or k2 < 1:
        raise ValueError(f"k1={k1}, k2={k2}: give 1 or more")
    query, gallery = metrics.checked(query, gallery)
    x, Q = torch.cat([query, gallery]), len(query)
    nearest, largest = _nearest(x, max(k1 + 1, k2), memory)
    V = _expanded(_encoded(x, largest, _reciprocal(nearest, k1)), nearest[:, :k2])
    result = 1 - _jaccard_similarity(V, Q)
    for rows in metrics.pieces(Q, len(gallery), memory):
        d = _scaled(metrics.pairwise(query[rows], gallery), largest[rows, None])
        result[rows] = (1 - weight) * result[rows] + weight * d
    return result


def _scaled(d, largest):
    return d**2 / largest


def _nearest(x, k, memory):
    """(N, k) indices of the nearest, each image the first of its own, and (N,) largest d^2."""
    nearest, largest = [], []
    for rows in metrics.pieces(len(x), len(x), memory):
        d = metrics.pairwise(x[rows], x)
        largest.append(d.amax(1) ** 2)
        own = torch.arange(len(x), device=x.device)[rows]
        d[own - rows.start, own] = -1.0  # whatever a copy of it or rounding says
        nearest.append(d.argsort(dim=1, stable=True)[:, :k].clone())
    return torch.cat(nearest), torch.cat(largest)


def _reciprocal(nearest, k1):
    """R*(p) of every image: a list of sorted lists."""

    def mutual(k):
        sets = [set(row) for row in nearest[:, : k + 1].tolist()]
        return [{g for g in own if p in sets[g]} for p, own in enumerate(sets)]

    R, halves = mutual(k1), mutual(round(k1 / 2))
    result = []
    for own in R:
        near = [halves[q] for q in own if 3 * len(halves[q] & own) >= 2 * len(halves[q])]
        result.append(sorted(own.union(*near)))
    return result


def _encoded(x, largest, R):
    """V as a sparse (N, N) tensor."""
    lengths = torch.tensor([len(own) for own in R], device=x.device)
    p = torch.arange(len(R), device=x.device).repeat_interleave(lengths)
    g = torch.tensor([g for own in R for g in own], device=x.device)
    values = x.new_empty(len(p))
    step = max(1, 2**22 // x.shape[1])
    for start in range(0, len(p), step):
        pairs = slice(start, start + step)
        d = (x[p[pairs]] - x[g[pairs]]).square().sum(1) / largest[p[pairs]]
        values[pairs] = (-d).exp()
    values /= x.new_zeros(len(R)).index_add(0, p, values)[p]
    return _sparse(p, g, values, len(R))


def _expanded(V, nearest):
    """The mean of the rows of V over the nearest (N, k2) of each."""
    N, k2 = nearest.shape
    (rows, columns), values = V.indices(), V.values()
    counts = rows.bincount(minlength=N)
    at = _entries(counts, nearest.reshape(-1))
    owners = torch.arange(N, device=rows.device).repeat_interleave(counts[nearest].sum(1))
    return _sparse(owners, columns[at], values[at] / k2, N)


def _jaccard_similarity(V, Q):
    """(Q, N - Q): sum min / sum max. Rows of V have the sum 1, so sum max = 2 - sum min."""
    N = len(V)
    (rows, columns), values = V.indices(), V.values()
    lengths = rows.bincount(minlength=N).tolist()
    order = columns.argsort(stable=True)  # V by column: which images have a part in g
    images, parts = rows[order], values[order]
    counts = columns.bincount(minlength=N)
    result = values.new_empty(Q, N - Q)
    of_rows = zip(columns.split(lengths), values.split(lengths), strict=True)
    for i, (own_columns, own) in zip(range(Q), of_rows, strict=False):
        at = _entries(counts, own_columns)
        smaller = torch.minimum(parts[at], own.repeat_interleave(counts[own_columns]))
        overlap = own.new_zeros(N).index_add_(0, images[at], smaller)[Q:]
        result[i] = overlap / (2 - overlap)
    return result


def _sparse(rows, columns, values, N):
    index = torch.stack([rows, columns])
    return torch.sparse_coo_tensor(index, values, (N, N), check_invariants=True).coalesce()


def _entries(counts, groups):
    """Positions of the entries of these groups, one after another; counts (N,) of all groups."""
    starts, times = counts.cumsum(0) - counts, counts[groups]
    offsets = (starts[groups] - (times.cumsum(0) - times)).repeat_interleave(times)
    return torch.arange(len(offsets), device=counts.device) + offsets
