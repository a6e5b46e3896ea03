"""Auto-ReID's pieces: figures of the published codes, and every piece against its plain formula."""

import contextlib
import json
import math
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision import models

import genotypes
import operations
import recipe
import reid
from operations import OPS
from reid import data, metrics
from reid.loader import Samples
from reid.model import LAYERS, Head, ReIDNetwork, ResNet, multiply_adds, reductions
from reid.supernet import Supernet
from utils import UserError

ROOT = Path(__file__).parent.parent
LABELS = "query_ids gallery_ids query_cameras gallery_cameras".split()


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@contextlib.contextmanager
def one_line(kind, *words):
    with pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


# part_aware


@pytest.mark.parametrize("case", ["part0", "part1", "part2"])
def test_part_aware_gives_the_golden_figures(case):
    figures, config = recipe.golden("reid", f"reid/{case}")
    module = reid.PartAware(config["C_in"], config["C_out"], config["stride"])
    shapes = {name: list(value.shape) for name, value in module.state_dict().items()}
    assert shapes == json.loads(str(figures["names"]))
    recipe.fill(module, config["seed"])
    for mode in ("eval", "train"):
        out = module.train(mode == "train")(torch.from_numpy(figures["x"]))
        torch.testing.assert_close(out, torch.from_numpy(figures[mode]), rtol=0, atol=1e-12)


def norm(y, bn):
    """Batch norm in evaluation, of (channels,)."""
    return (y - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias


def part_aware_by_loops(module, x, stride):
    H, W = x.shape[2:]
    images = []
    for image in x:
        P = []
        for i, (_, conv, bn) in enumerate(module.local_conv_list):
            total, rows = 0.0, range(math.floor(i * H / 4), math.floor((i + 1) * H / 4))
            for row in rows:
                for column in range(W):
                    total = total + image[:, row, column]
            mean = (total / (len(rows) * W)).relu()
            P.append(norm(conv.weight[:, :, 0, 0] @ mean + conv.bias, bn))
        P = torch.stack(P)
        K = P @ module.W_K.weight.T + module.W_K.bias
        Q = P @ module.W_Q.weight.T + module.W_Q.bias
        P = torch.softmax(K @ Q.T, dim=-1) @ P
        pixels = {}
        for row in range(H):
            [part] = (i for i in range(4) if i * H // 4 <= row < (i + 1) * H // 4)
            for column in range(W):
                pixels[row, column] = torch.cat([image[:, row, column], P[part]])
        zero = torch.zeros(x.shape[1] + P.shape[1], dtype=x.dtype)
        out = []
        for row in range(0, H, stride):
            for column in range(0, W, stride):
                if stride == 1:
                    y = module.last.conv.weight[:, :, 0, 0] @ pixels[row, column]
                else:
                    here, beyond = pixels[row, column], pixels.get((row + 1, column + 1), zero)
                    halves = zip(module.last.convs, (here, beyond), strict=True)
                    y = torch.cat([conv.weight[:, :, 0, 0] @ p.relu() for conv, p in halves])
                out.append(norm(y, module.last.bn))
        images.append(torch.stack(out, dim=1))
    size = -(-H // stride), -(-W // stride)
    return torch.stack(images).unflatten(2, size)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("H", "W"), [(4, 1), (5, 3), (6, 4), (7, 2), (11, 5), (12, 4)])
def test_part_aware_is_the_formula_pixel_by_pixel(stride, H, W):
    module = recipe.fill(reid.PartAware(7, 4, stride), seed=3).eval()
    x = random(2, 7, H, W)
    torch.testing.assert_close(
        module(x), part_aware_by_loops(module, x, stride), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_part_aware_gradients(stride, training):
    module = recipe.fill(reid.PartAware(4, 2, stride), seed=4).train(training)
    for bn in module.modules():
        if isinstance(bn, torch.nn.modules.batchnorm._BatchNorm):
            bn.momentum = 0.0  # the same function at every call
    x = random(2, 4, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))


def test_part_aware_depends_on_all_its_weights():
    module = recipe.fill(reid.PartAware(6, 6, 1), seed=5)
    module(random(3, 6, 8, 4)).square().sum().backward()
    assert all(
        p.grad.abs().max() > 0 for name, p in module.named_parameters() if "1.bias" not in name
    )


def test_part_aware_errors():
    with one_line(ValueError, "3 rows"):
        reid.PartAware(6, 6, 1)(random(2, 6, 3, 8).float())
    with one_line(ValueError, "C_in=2"):
        reid.PartAware(2, 6, 1)
    with one_line(ValueError, "C_out=5"):
        reid.PartAware(6, 5, 2)
    with one_line(ValueError, "stride 1 or 2, not 3"):
        reid.PartAware(6, 6, 3)


def test_part_aware_is_an_operation_once_reid_is_imported():
    op = OPS["part_aware"](6, 2, False)
    assert isinstance(op, reid.PartAware) and op.last.bn.affine
    assert op(random(2, 6, 8, 4).float()).shape == (2, 6, 4, 2)
    alone = "import operations; print('part_aware' in operations.OPS); import reid"
    alone += "; print('part_aware' in operations.OPS)"
    run = subprocess.run([sys.executable, "-c", alone], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == ["False", "True"]


# CMC and mAP


@pytest.mark.parametrize("case", ["rank0", "rank1", "rank2"])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_rank_gives_the_golden_figures(case, kind):
    figures, _ = recipe.golden("reid", f"reid/{case}")
    arrays = [kind(figures[name]) for name in ("distances", *LABELS)]
    cmc, mAP = reid.rank(*arrays, len(figures["cmc"]))
    np.testing.assert_allclose(cmc, figures["cmc"], rtol=0, atol=5e-8)  # float32 there
    assert abs(mAP - figures["mAP"]) < 1e-12


@pytest.mark.parametrize(
    ("hits", "precision"), [([1, 3], (1 / 1 + 2 / 3) / 2), ([2], 0.5), ([1, 2, 3], 1.0)]
)
def test_average_precision(hits, precision):
    ids = [7 if i in hits else 8 for i in range(1, 6)]
    cmc, mAP = reid.rank(np.arange(5.0)[None], [7], ids, [1], [2] * 5, 4)
    assert mAP == pytest.approx(precision, abs=1e-12)
    assert cmc.tolist() == [float(k >= hits[0]) for k in range(1, 5)]


def rank_by_loops(distances, query_ids, gallery_ids, query_cameras, gallery_cameras, max_rank):
    cmc, precisions = np.zeros(max_rank), []
    for i in range(len(query_ids)):
        order = sorted(range(len(gallery_ids)), key=lambda j: (distances[i][j], j))
        place, right, shares, first = 0, 0, [], None
        for j in order:
            mine = gallery_ids[j] == query_ids[i]
            if gallery_ids[j] == -1 or (mine and gallery_cameras[j] == query_cameras[i]):
                continue
            place += 1
            if mine:
                right += 1
                shares.append(right / place)
                first = first or place
        if shares:
            precisions.append(sum(shares) / len(shares))
            cmc += [first <= k for k in range(1, max_rank + 1)]
    return cmc / len(precisions), np.mean(precisions), len(precisions)


def retrieval_set(seed, Q, G, people, ties=False):
    draw = np.random.RandomState(seed)
    distances = draw.randint(0, 4, (Q, G)) if ties else draw.rand(Q, G)
    ids = draw.randint(1, people, Q), draw.randint(-1, people, G)
    return (distances.astype(float), *ids, draw.randint(0, 3, Q), draw.randint(0, 3, G))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_rank_is_the_loop_over_queries(seed, ties):
    """With junk, distractors, queries without a match, and galleries shorter than max_rank."""
    Q, G, people = [(20, 50, 9), (9, 6, 4), (30, 200, 40)][seed % 3]
    arrays = retrieval_set(seed, Q, G, people, ties)
    result = reid.evaluate(*arrays, max_rank=10)
    cmc, mAP, counted = rank_by_loops(*arrays, 10)
    np.testing.assert_allclose(result.cmc, cmc, rtol=0, atol=1e-12)
    assert result.mAP == pytest.approx(mAP, abs=1e-12)
    assert (result.queries, result.without) == (counted, Q - counted)


def test_the_random_sets_have_what_the_comparison_is_for():
    sets = [retrieval_set(seed, 9, 6, 4) for seed in (1, 4)]
    assert any(rank_by_loops(*arrays, 10)[2] < 9 for arrays in sets)
    gallery = retrieval_set(0, 20, 50, 9)[2]
    assert (gallery == -1).any() and (gallery == 0).any()


def test_rank_errors():
    good = retrieval_set(0, 4, 9, 3)
    with one_line(ValueError, "query_ids", "(4,)"):
        reid.rank(good[0], good[1][:2], *good[2:], 5)
    with one_line(ValueError, "gallery_cameras", "(9,)"):
        reid.rank(*good[:4], good[4][:, None], 5)
    with one_line(ValueError, "distances"):
        reid.rank(good[0][0], *good[1:], 5)
    with one_line(ValueError, "no query has a match"):
        reid.rank(good[0], good[1], good[2] + 100, *good[3:], 5)
    with one_line(ValueError, "no query has a match"):
        reid.rank(np.ones((1, 2)), [-1], [-1, -1], [1], [2, 2], 5)
    with one_line(ValueError, "max_rank 0"):
        reid.rank(*good, 0)
    broken = good[0].copy()
    broken[3, 3] = np.nan
    with one_line(ValueError, "not a number"):
        reid.rank(broken, *good[1:], 5)


def all_distances(x, y, metric):
    if metric == "euclidean":
        return (x[:, None] - y).square().sum(2).sqrt()
    return 1 - torch.nn.functional.cosine_similarity(x[:, None], y, dim=2)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("memory", [1, 64 * 30 * 4, 2**28])
def test_distances_in_pieces(metric, memory):
    x, y = random(11, 5), random(30, 5, seed=1)
    d = reid.distances(x, y, metric, memory)
    torch.testing.assert_close(d, all_distances(x, y, metric), rtol=0, atol=1e-12)
    labels = retrieval_set(3, 11, 30, 6)[1:]
    embedded = reid.evaluate_embeddings(x, y, *labels, 7, metric, memory)
    whole = reid.evaluate(d, *labels, 7)
    assert embedded.mAP == pytest.approx(whole.mAP, abs=1e-12)
    assert embedded.cmc.tolist() == whole.cmc.tolist() and embedded[2:] == whole[2:]


def test_distance_errors():
    x = random(3, 4)
    with one_line(ValueError, "(3, 4) and (3, 5)"):
        reid.distances(x, random(3, 5))
    with one_line(ValueError, "manhattan"):
        reid.distances(x, x, "manhattan")
    with one_line(ValueError, "no queries"):
        reid.distances(x[:0], x)


class Live(TorchDispatchMode):
    """The most bytes that the tensors made under it held at once."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.holders = 0, 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in args if torch.is_tensor(x)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if not torch.is_tensor(x):
                continue
            storage = x.untyped_storage()
            key = storage.data_ptr(), storage.nbytes()
            if key[0] in given and not self.holders[key]:
                continue  # a view of what was there before
            if not self.holders[key]:
                self.now += key[1]
            self.holders[key] += 1
            self.peak = max(self.peak, self.now)
            weakref.finalize(x, self.gone, key)
        return out

    def gone(self, key):
        self.holders[key] -= 1
        if not self.holders[key]:
            self.now -= key[1]


@pytest.mark.parametrize("queries", [64, 256])
def test_memory_of_an_evaluation_does_not_grow_with_the_queries(queries):
    G, memory = 2000, 2**22
    x, y = torch.randn(queries, 32), torch.randn(G, 32)
    labels = map(torch.from_numpy, retrieval_set(0, queries, G, 40)[1:])
    with Live() as live:
        reid.evaluate_embeddings(x, y, *labels, max_rank=10, memory=memory)
    pairs = memory // metrics.PAIR_BYTES
    assert 8 * pairs < live.peak < 1.25 * memory < 64 * queries * G  # the matrix never is there


def test_market_1501_is_cut_into_pieces_of_less_than_half_a_gigabyte():
    rows = [r.stop - r.start for r in metrics.pieces(3368, 15913)]
    assert sum(rows) == 3368 and min(rows) > 0
    assert 1.25 * max(rows) * 15913 * metrics.PAIR_BYTES < 2**29


# re-ranking


def rerank_by_sets(query, gallery, k1, k2, weight):
    x, Q = torch.cat([query, gallery]), len(query)
    N = len(x)
    d = (x[:, None] - x).square().sum(2)
    d = (d / d.max(1, keepdim=True).values).tolist()

    def near(p, k):  # p and its k nearest
        return sorted(range(N), key=lambda g: (g != p, d[p][g], g))[: k + 1]

    def mutual(p, k):
        return {g for g in near(p, k) if p in near(g, k)}

    V = np.zeros((N, N))
    for p in range(N):
        own = mutual(p, k1)
        more = set(own)
        for q in own:
            theirs = mutual(q, round(k1 / 2))
            if len(own & theirs) >= 2 / 3 * len(theirs) - 1e-9:
                more |= theirs
        for g in more:
            V[p, g] = math.exp(-d[p][g])
        V[p] /= V[p].sum()
    V = np.stack([np.mean([V[q] for q in near(p, k2 - 1)], axis=0) for p in range(N)])
    result = np.zeros((Q, N - Q))
    for p in range(Q):
        for g in range(Q, N):
            jaccard = 1 - np.minimum(V[p], V[g]).sum() / np.maximum(V[p], V[g]).sum()
            result[p, g - Q] = (1 - weight) * jaccard + weight * d[p][g]
    return result


def people(seed, people, spread=0.6):
    """Embeddings (4 people, 6) of some query and gallery images of each person."""
    centres = random(people, 1, 6, seed=seed)
    x = centres + spread * random(people, 4, 6, seed=seed + 100)
    return x[:, 0], x[:, 1:].reshape(-1, 6)


@pytest.mark.parametrize("memory", [2**12, 2**28])
@pytest.mark.parametrize(
    ("k1", "k2", "weight"), [(6, 3, 0.3), (5, 1, 0.0), (20, 6, 0.3), (3, 8, 0.9)]
)
def test_rerank_is_the_formula_with_sets(k1, k2, weight, memory):
    query, gallery = people(k1, 12)
    got = reid.rerank(query, gallery, k1, k2, weight, memory)
    want = rerank_by_sets(query, gallery, k1, k2, weight)
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-10)


def test_rerank_of_more_copies_of_an_image_than_neighbours():
    query, gallery = people(2, 8)
    query, gallery = torch.cat([query, query[:3]]), torch.cat([query[2:3].repeat(9, 1), gallery])
    got = reid.rerank(query, gallery, 4, 2)
    want = rerank_by_sets(query, gallery, 4, 2, 0.3)
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-10)


def test_rerank_helps_and_its_limits():
    query, gallery = people(0, 30, spread=0.9)
    ids = torch.arange(30)
    labels = ids, ids.repeat_interleave(3), torch.zeros(30), torch.ones(90)
    _, before = reid.rank(reid.distances(query, gallery), *labels, 1)
    _, after = reid.rank(reid.rerank(query, gallery, 4, 2), *labels, 1)
    assert after > before
    same = reid.rerank(query, gallery, 4, 2, weight=1.0).argsort(1)
    assert same.equal(reid.distances(query, gallery).argsort(1))
    few = reid.rerank(query[:2], gallery[:3])  # fewer images than k1
    assert few.shape == (2, 3) and few.isfinite().all()
    with one_line(ValueError, "k1=0"):
        reid.rerank(query, gallery, k1=0)


# losses


def triplet_by_enumeration(x, ids, margin):
    losses = []
    for a in range(len(ids)):
        all_of_anchor = [
            max(0.0, margin + float((x[a] - x[p]).norm() - (x[a] - x[n]).norm()))
            for p in range(len(ids))
            for n in range(len(ids))
            if p != a and ids[p] == ids[a] and ids[n] != ids[a]
        ]
        if all_of_anchor:
            losses.append(max(all_of_anchor))  # the hardest p and n make the largest
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize(
    "ids", [[0, 0, 1, 1], [4, 2, 4, 2, 2, 9, 9, 4], [0, 0, 1], [0, 1, 2], [5, 5]]
)
@pytest.mark.parametrize("margin", [0.0, 0.3, 2.0])
def test_batch_hard_triplet_is_the_hardest_of_all_triplets(ids, margin):
    x = random(len(ids), 3, seed=len(ids))
    loss = reid.batch_hard_triplet(x, torch.tensor(ids), margin)
    assert float(loss) == pytest.approx(triplet_by_enumeration(x, ids, margin), abs=1e-12)


def test_batch_hard_triplet_gradients():
    x = random(8, 3).requires_grad_()
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4])
    assert torch.autograd.gradcheck(lambda x: reid.batch_hard_triplet(x, ids, 1.0), (x,))
    same = torch.ones(4, 3, requires_grad=True)  # all distances 0
    loss = reid.batch_hard_triplet(same, torch.tensor([0, 0, 1, 1]), 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(0.3) and same.grad.isfinite().all()


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.8, 1.0])
def test_retrieval_loss_weighs_both(weight):
    x, logits, ids = random(4, 3), random(4, 2, seed=1), torch.tensor([0, 1, 1, 0])
    loss = reid.RetrievalLoss(weight, margin=1.0)((x, logits), ids)
    entropy = -logits.log_softmax(1)[range(4), ids].mean()
    triplet = triplet_by_enumeration(x, ids.tolist(), 1.0)
    assert float(loss) == pytest.approx(float(weight * entropy + (1 - weight) * triplet), abs=1e-12)
    with one_line(ValueError, "1.5"):
        reid.RetrievalLoss(1.5)


# batches


IDS = np.repeat([3, 5, 8, 11, 12, 20, 31], [2, 9, 4, 3, 6, 4, 5])


def epoch_of(batches, epoch):
    return np.stack([batches.batch(epoch, step) for step in range(len(batches))])


def test_batches_have_each_identity_once_an_epoch():
    batches = reid.PKBatches(IDS, identities=3, instances=4, seed=1)
    assert len(batches) == 3
    made = epoch_of(batches, 0)
    assert made.shape == (3, 12)
    rows = IDS[made].reshape(3, 3, 4)
    assert (rows == rows[:, :, :1]).all()
    assert all(len(set(row)) == 3 for row in rows[:, :, 0])
    order = rows[:, :, 0].reshape(-1)
    assert sorted(order[:7]) == sorted(set(IDS)) and order[7:].tolist() == order[:2].tolist()
    for own in made.reshape(-1, 4):
        there = np.flatnonzero(IDS[own[0]] == IDS)
        assert len(set(own)) == min(4, len(there))


def test_batches_are_a_function_of_seed_and_epoch():
    one, other = (reid.PKBatches(IDS, 3, 4, seed=1) for _ in range(2))
    other.batch(5, 0)
    assert (epoch_of(one, 2) == epoch_of(other, 2)).all()
    assert (epoch_of(one, 2) != epoch_of(one, 3)).any()
    assert (epoch_of(one, 2) != epoch_of(reid.PKBatches(IDS, 3, 4, seed=2), 2)).any()
    together = {frozenset(IDS[one.batch(epoch, 0)]) for epoch in range(10)}
    assert len(together) > 5  # other identities meet in every epoch
    seen = {index for epoch in range(40) for index in epoch_of(one, epoch).flat}
    assert seen == set(range(len(IDS)))


def test_batches_go_on_in_the_middle_of_an_epoch():
    batches = reid.PKBatches(IDS, 2, 2, seed=0)
    batches.set_epoch(3)
    whole = list(batches)
    later = reid.PKBatches(IDS, 2, 2, seed=0)
    later.set_epoch(3, step=2)
    assert list(later) == whole[2:] and list(later) == whole


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batches(world_size):
    whole = epoch_of(reid.PKBatches(IDS, 4, 3, seed=6), 1).reshape(2, 4, 3)
    shares = [
        epoch_of(reid.PKBatches(IDS, 4, 3, 6, rank, world_size), 1).reshape(2, -1, 3)
        for rank in range(world_size)
    ]
    assert all(share.shape[1] == 4 // world_size for share in shares)
    for step in range(2):
        got = sorted(tuple(own) for share in shares for own in share[step])
        assert got == sorted(map(tuple, whole[step]))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_under_any_number_of_workers(workers):
    batches = reid.PKBatches(IDS, 3, 2, seed=9)
    batches.set_epoch(4, step=1)
    images = data.Images(np.zeros((len(IDS), 8, 4, 3), np.uint8), IDS, np.arange(len(IDS)))
    loader = DataLoader(
        Samples(images, np.arange(len(IDS)), 8, 4), batch_sampler=batches, num_workers=workers
    )
    got = [places.tolist() for _, places in loader]
    assert got == [batches.batch(4, step).tolist() for step in (1, 2)]


def test_batch_errors():
    with one_line(UserError, "8 identities", "7"):
        reid.PKBatches(IDS, 8)
    with one_line(UserError, "identity 40 has one image"):
        reid.PKBatches([*IDS, 40], 2)
    alone = reid.PKBatches([*IDS, 40], 2, triplets=False)  # classification takes one image
    assert len(IDS) in epoch_of(alone, 0)
    with one_line(UserError, "3 identities", "2 processes"):
        reid.PKBatches(IDS, 3, world_size=2)
    with one_line(UserError, "1 identities"):
        reid.PKBatches(IDS, 1)
    reid.PKBatches([*IDS, 40], 2, instances=1)


# sets


def picture(path, shade=100, size=(4, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)


@pytest.fixture
def market(tmp_path):
    for pid in (2, 7):
        for camera in (1, 2):
            picture(tmp_path / "bounding_box_train" / f"{pid:04}_c{camera}s1_000451_03.jpg")
    picture(tmp_path / "bounding_box_train" / "-1_c1s1_000451_03.jpg")
    picture(tmp_path / "query" / "0003_c1s1_000001_00.jpg", 10)
    for name in ("-1_c2s1_000001_00", "0000_c4s1_000001_00", "0003_c2s1_000002_00"):
        picture(tmp_path / "bounding_box_test" / f"{name}.jpg", 200)
    picture(tmp_path / "bounding_box_test" / "0003_c12_f0046985.jpg")  # as DukeMTMC-reID has it
    (tmp_path / "bounding_box_test" / "Thumbs.db").write_text("no image")
    return tmp_path


@pytest.mark.parametrize("name", ["market1501", "dukemtmc"])
def test_market_folders(market, name):
    train, query, gallery, _ = data.load(name, market)
    assert train.ids.tolist() == [2, 2, 7, 7] and train.cameras.tolist() == [1, 2, 1, 2]
    assert query.ids.tolist() == [3] and query.cameras.tolist() == [1]
    assert sorted(zip(gallery.ids.tolist(), gallery.cameras.tolist(), strict=True)) == [
        (-1, 2), (0, 4), (3, 2), (3, 12)]  # fmt: skip
    assert [Path(path).name[:4] for path in train.images] == ["0002", "0002", "0007", "0007"]
    pixels = data.decode(query.images[0], 16, 8)
    assert pixels.shape == (16, 8, 3) and abs(int(pixels.mean()) - 10) <= 2
    x, label = Samples(gallery, gallery.ids, 12, 6)[3]
    assert x.shape == (12, 6, 3) and x.dtype == torch.uint8 and label == gallery.ids[3]


def test_market_errors(market):
    train = market / "bounding_box_train"
    train.rename(market / "away")
    with one_line(UserError, "bounding_box_train"):
        data.load("market1501", market)
    (market / "away").rename(train)
    picture(train / "person_c1.jpg")
    with one_line(UserError, "person_c1.jpg"):
        data.load("market1501", market)
    (train / "person_c1.jpg").unlink()
    [path] = (market / "query").iterdir()
    path.write_bytes(path.read_bytes()[:200])
    with one_line(UserError, "0003_c1s1_000001_00.jpg"):
        data.decode(data.load("market1501", market).query.images[0], 8, 4)
    path.rename(path.with_name("0004_c1s1_000001_00.jpg"))
    with one_line(UserError, "no query"):
        data.load("market1501", market)
    for path in (market / "query").iterdir():
        path.rename(path.with_name("0003_c2s1_000001_00.jpg"))
    (market / "bounding_box_test" / "0003_c12_f0046985.jpg").unlink()
    with one_line(UserError, "no query has an image by another camera"):
        data.load("market1501", market)
    for path in (market / "query").iterdir():
        path.unlink()
    with one_line(UserError, "no query images"):
        data.load("market1501", market)
    with one_line(UserError, "unknown set"):
        data.load("market", market)
    with one_line(UserError, "is no folder"):
        data.load("market1501", market / "elsewhere")
    with one_line(UserError, "--data"):
        data.load("market1501")


def test_one_camera(tmp_path):
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        picture(tmp_path / folder / "0001_c3s1_1.jpg")
    with one_line(UserError, "camera 3"):
        data.load("market1501", tmp_path)


def msmt(root, train="train", test="test"):
    lists = {
        "list_train.txt": ["0000/0000_000_01_0303morning_0008_0.jpg 0", "0001/0001_000_02_x.jpg 1"],
        "list_val.txt": ["0000/0000_001_03_x.jpg 0"],
        "list_query.txt": ["0000/0000_000_05_x.jpg 0"],
        "list_gallery.txt": ["0000/0000_001_15_x.jpg 0", "0001/0001_000_05_x.jpg 1", ""],
    }
    for name, lines in lists.items():
        (root / name).write_text("\n".join(lines))
        for line in filter(None, lines):
            folder = train if name in ("list_train.txt", "list_val.txt") else test
            picture(root / folder / line.split()[0])
    return root


@pytest.mark.parametrize("folders", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_msmt17_lists(tmp_path, folders):
    found = data.load("msmt17", msmt(tmp_path, *folders))
    assert found.train.ids.tolist() == [1, 2, 1] and found.train.cameras.tolist() == [1, 2, 3]
    assert found.query.ids.tolist() == [1] and found.query.cameras.tolist() == [5]
    assert found.gallery.ids.tolist() == [1, 2] and found.gallery.cameras.tolist() == [15, 5]
    for part in found[:3]:
        assert all(data.decode(image, 8, 4).shape == (8, 4, 3) for image in part.images)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("list_query.txt", None, ["list_query.txt is missing"]),
        ("list_val.txt", "", ["list_val.txt is empty"]),
        ("list_gallery.txt", "0000/0000_001_15_x.jpg\n", ["list_gallery.txt, line 1"]),
        ("list_train.txt", "0001/0001_000_02_x.jpg 1\n0000/some.jpg 0\n", ["line 2, is not"]),
        ("list_train.txt", "0000/0000_000_01_x.jpg 0\n", ["line 1: there is no", "01_x.jpg"]),
    ],
)
def test_msmt17_errors(tmp_path, file, text, words):
    msmt(tmp_path)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with one_line(UserError, *words):
        data.load("msmt17", tmp_path)


def test_digits_stand_for_identities():
    found = data.load("digits")
    parts = found[:3]
    assert [len(part.ids) for part in parts] == [1437, 182, 178]
    assert "made up" in found.note
    for part in parts:
        assert set(part.ids) == set(range(1, 11)) and set(part.cameras) == {1, 2, 3}
        assert part.images.shape == (len(part.ids), 16, 16, 3) and part.images.dtype == np.uint8
    means = [found.train.images[found.train.cameras == c].mean() for c in (1, 2, 3)]
    assert means[2] > means[0] + 30  # the cameras differ
    ranges = [np.ptp(found.train.images[found.train.cameras == c]) for c in (1, 2, 3)]
    assert ranges[1] < 0.7 * ranges[0]
    again = data.load("digits")
    assert all((a.images == b.images).all() for a, b in zip(parts, again[:3], strict=True))


def test_digits_share_no_image(monkeypatch):
    monkeypatch.setattr(data, "_seen", lambda grey, cameras: np.arange(len(grey)))
    parts = [part.images for part in data.load("digits")[:3]]
    assert sorted(np.concatenate(parts)) == list(range(1797))
    with np.load(data.DIGITS) as stored:
        assert set(np.concatenate(parts[1:])) == set(stored["test"])


def test_digits_errors(tmp_path):
    (tmp_path / "digits.npz").write_text("none")
    for name in ("digits.npz", "missing.npz"):
        with one_line(UserError, name):
            data.read_digits(tmp_path / name)


def test_labels_of_identities():
    numbers, identities = data.labels(np.array([12, 5, 5, 700]))
    assert numbers.tolist() == [1, 0, 0, 2] and identities.tolist() == [5, 12, 700]


def test_halves_have_the_same_identities():
    paths = [f"{i}.jpg" for i in range(len(IDS))]
    images = data.Images(paths, IDS, np.arange(len(IDS)))
    weights, alphas, left_out = data.halves(images, seed=4)
    assert left_out == [3, 11]  # with two and three images
    assert set(weights.ids) == set(alphas.ids) == {5, 8, 12, 20, 31}
    count = Counter(IDS.tolist())
    for identity in set(weights.ids):
        sizes = [int((half.ids == identity).sum()) for half in (weights, alphas)]
        assert sizes == [-(-count[identity] // 2), count[identity] // 2]
    used = weights.images + alphas.images
    assert len(set(used)) == len(used) == sum(count.values()) - 5
    for half in (weights, alphas):
        assert [f"{i}.jpg" for i in half.cameras] == half.images  # rows stay together
        assert (IDS[half.cameras] == half.ids).all()
    assert data.halves(images, seed=4)[0].images == weights.images
    assert data.halves(images, seed=5)[0].images != weights.images
    few = data.Images(paths[:12], np.repeat([1, 2], [10, 2]), np.zeros(12, int))
    with one_line(UserError, "1 identities", "10 images"):
        data.halves(few, least=5)


# the network


REID_CELLS = ["REID_BASELINE", "REID_SPACE", "REID_SEARCH"]


def test_the_reid_cells_are_written_as_published():
    short = {"dil": "dil_conv_3x3", "sep": "sep_conv_3x3", "skip": "skip_connect",
             "max": "max_pool_3x3", "avg": "avg_pool_3x3", "part": "part_aware"}  # fmt: skip
    published = {
        "REID_BASELINE": ("dil1 dil0 dil1 sep2 dil2 sep1 sep2 sep3",
                          "sep1 skip0 max2 dil1 max0 dil2 skip0 dil4"),
        "REID_SPACE": ("dil0 skip1 max2 sep0 max3 sep1 sep2 dil3",
                       "skip1 part0 avg2 part0 sep1 avg2 skip4 max3"),
        "REID_SEARCH": ("sep0 skip1 dil2 dil0 dil3 sep2 dil4 dil3",
                        "max0 part1 sep0 dil2 dil2 max0 dil4 dil3"),
    }  # fmt: skip
    for name, cells in published.items():
        genotype = genotypes.load(name)
        for cell, text in zip((genotype.normal, genotype.reduce), cells, strict=True):
            assert cell == [(short[word[:-1]], int(word[-1])) for word in text.split()]
        assert genotype.normal_concat == genotype.reduce_concat == range(2, 6)
        assert {op for op, _ in genotype.normal + genotype.reduce} <= {*genotypes.PRIMITIVES_REID}
    assert set(genotypes.PRIMITIVES_REID) <= set(OPS)


def test_reductions_begin_the_later_stages():
    assert reductions() == (2, 4, 6)
    assert reductions((1, 3, 2)) == (1, 4)
    with one_line(ValueError, "(2, 0)"):
        reductions((2, 0))


@pytest.mark.parametrize("name", REID_CELLS)
def test_network(name):
    torch.manual_seed(0)
    network = ReIDNetwork(4, 5, LAYERS, getattr(genotypes, name), embedding=6)
    sizes = []
    for cell in network.cells:
        cell.register_forward_hook(lambda module, inputs, out: sizes.append(tuple(out.shape[1:])))
    x = torch.randn(2, 3, 128, 64)
    embeddings, logits = network(x)
    assert embeddings.shape == (2, 6) and logits.shape == (2, 5)
    assert sizes == [(16, 32, 16)] * 2 + [(32, 16, 8)] * 2 + [(64, 8, 4)] * 2 + [(128, 4, 2)] * 2
    (logits.square().sum() + embeddings.sum()).backward()
    # The linear layer sees a norm behind it: of two images its gradient is next to nothing.
    assert all(p.grad is not None for p in network.parameters())
    out = network.eval()(x)
    assert torch.is_tensor(out) and out.shape == (2, 6)
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    other = ReIDNetwork(4, 5, LAYERS, getattr(genotypes, name), embedding=6).eval()
    other.load_state_dict(state)
    assert other(x).equal(out)
    with one_line(ValueError, "cannot be halved"):
        network(x[:, :, :112])


def test_a_supernet_of_two_stages():
    network = Supernet(8, 3, (1, 1), None, embedding=6)
    assert [cell.reduction for cell in network.cells] == [False, True]


def test_a_cell_that_never_reads_an_input_is_said_to_distributed_data_parallel():
    whole = ReIDNetwork(4, 5, (1, 1), genotypes.REID_SEARCH, embedding=6)
    assert not whole.leaves_out_nodes()
    cell = [("sep_conv_3x3", 1), ("sep_conv_3x3", 1)] * 4
    blind = genotypes.REID_SEARCH._replace(normal=cell, reduce=cell)
    assert ReIDNetwork(4, 5, (1, 1), blind, embedding=6).leaves_out_nodes()


def test_network_is_stem_cells_and_head_in_this_order():
    torch.manual_seed(0)
    network = ReIDNetwork(4, 5, (1, 1), genotypes.REID_SEARCH, embedding=6).eval()
    x = torch.randn(2, 3, 32, 16)
    s = network.stem(x)
    assert s.shape == (2, 4, 8, 4) and s.min() >= 0
    first = network.cells[0](s, s, 0.0)
    second = network.cells[1](s.relu(), first.relu(), 0.0)
    mean = second.flatten(2).mean(2)
    want = network.head.bn(mean @ network.head.linear.weight.T)
    torch.testing.assert_close(network(x), want)
    with one_line(genotypes.GenotypeError, "five"):
        ReIDNetwork(4, 5, (1, 1), genotypes.REID_SEARCH._replace(normal=[("five", 0)] * 8))


def test_stem_and_head():
    assert operations.stem("resnet", 6)["stem"](torch.zeros(2, 3, 48, 24)).shape == (2, 6, 12, 6)
    embeddings, logits = Head(8, 3, 5)(torch.randn(4, 8, 3, 2))
    assert embeddings.shape == (4, 5) and logits.shape == (4, 3)
    torch.testing.assert_close(embeddings.mean(0), torch.zeros(5), rtol=0, atol=1e-6)  # normed


def test_resnet_is_torchvisions_with_our_head():
    network = ResNet("resnet18", 5, embedding=6)
    body = models.resnet18().state_dict()
    shapes = [value.shape for name, value in body.items() if not name.startswith("fc.")]
    assert [value.shape for value in network.body.state_dict().values()] == shapes
    own = sum(p.numel() for p in network.parameters())
    assert own == 11_176_512 + 512 * 6 + 2 * 6 + 6 * 5 + 5  # torchvision's without its classifier
    last = 7 * 7 * 512 * 9 * (256 + 3 * 512) + 7 * 7 * 512 * 256  # of its last stage, which halves
    macs = 1_814_073_344 - 512 * 1000 + 3 * last + 512 * 6 + 6 * 5
    assert multiply_adds(network, 224, 224) == macs
    x = torch.randn(2, 3, 64, 32)
    assert network.body(x).shape == (2, 512, 4, 2)
    embeddings, logits = network(x)
    assert embeddings.shape == (2, 6) and logits.shape == (2, 5)
    out = network.eval()(x)
    assert out.shape == (2, 6)
    want = network.head.bn(network.body(x).flatten(2).mean(2) @ network.head.linear.weight.T)
    torch.testing.assert_close(out, want)


# pictures


def test_pictures_of_a_retrieval():
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgba

    from reid import pictures

    gallery = data.Images(np.stack([np.full((8, 4, 3), 20 * i, np.uint8) for i in range(6)]),
                          np.array([1, -1, 2, 1, 1, 0]), np.array([1, 2, 2, 2, 3, 2]))  # fmt: skip
    query = data.Images(np.full((1, 8, 4, 3), 255, np.uint8), np.array([1]), np.array([1]))
    figure = pictures.retrieved(query, gallery, np.array([[0.0, 1.0, 2.0, 5.0, 4.0, 3.0]]), count=4)
    shown = [ax for ax in figure.axes if ax.images]
    values = [int(ax.images[0].get_array()[0, 0, 0]) for ax in shown]
    assert values == [255, 40, 100, 80, 60]  # query; 0 is its own, 1 is junk
    colours = [ax.spines["left"].get_edgecolor() for ax in shown[1:]]
    wanted = [pictures.WRONG, pictures.WRONG, pictures.RIGHT, pictures.RIGHT]
    assert colours == [to_rgba(colour) for colour in wanted]


def test_picture_of_cmc_curves():
    pytest.importorskip("matplotlib")
    from reid import pictures

    result = metrics.Retrieval(np.array([0.5, 0.75]), 0.625, 8, 0)
    [ax] = pictures.cmc_curves({"some": result, "same": result}).axes
    assert [line.get_label() for line in ax.lines] == ["some (mAP 62.5 %)", "same (mAP 62.5 %)"]
    assert ax.lines[0].get_ydata().tolist() == [50.0, 75.0]
