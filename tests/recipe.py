"""Weights and batches of the golden figures, from NumPy's frozen generator, seeded by name."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
NODE_STARTS = (0, 2, 5, 9)  # first edge of each node


def generator(*key):
    return np.random.RandomState(zlib.crc32(":".join(map(str, key)).encode()))


def stream(name):
    """Name that seeds entry `name`: pool norms of edges that leave one node share statistics."""
    match = re.fullmatch(r"(cells\.\d+)\._ops\.(\d+)\._ops\.([12])\.1\.(running_\w+)", name)
    if match is None:
        return name
    cell, edge, op, statistic = match.groups()
    source = int(edge) - max(start for start in NODE_STARTS if start <= int(edge))
    return f"{cell}.source.{source}.{op}.{statistic}"


def entry(seed, name, shape):
    """State dict entry `name` (buffers, weights, alphas, betas) as a float64 or int64 array."""
    draw = generator(seed, stream(name))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var"):
        return 1.0 + 0.2 * draw.rand(*shape)
    if name.endswith(("running_mean", "bias")):
        return 0.1 * draw.standard_normal(shape)
    if name.startswith(("alphas_", "betas_")):
        return draw.standard_normal(shape)
    if len(shape) == 1:
        return 1.0 + 0.2 * draw.standard_normal(shape)
    return draw.standard_normal(shape) / np.sqrt(np.prod(shape[1:], dtype=int))


def fill(model, seed):
    """Loads the recipe's weights into `model`, alphas and betas too, and makes it float64."""
    model.double()
    state = {
        name: torch.from_numpy(np.asarray(entry(seed, name, tuple(value.shape))))
        for name, value in model.state_dict().items()
    }
    missing = model.load_state_dict(state, strict=True)
    assert not missing.missing_keys
    with torch.no_grad():  # where alphas and betas are no part of the state dict
        for name in ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce"):
            tensor = getattr(model, name, None)
            if tensor is not None:
                tensor.data = torch.from_numpy(entry(seed, name, tuple(tensor.shape)))
    return model


def batch(seed, name, n, size, classes):
    """Images (n, 3, size, size) float64 and labels (n,) of the batch `name`."""
    draw = generator(seed, "batch", name)
    images = draw.standard_normal((n, 3, size, size))
    return torch.from_numpy(images), torch.from_numpy(draw.randint(0, classes, size=n))


def golden(file, case):
    """({name: array}, config) of one case of a golden file."""
    with np.load(GOLDEN / f"{file}.npz") as stored:
        figures = {
            key[len(case) + 1 :]: stored[key] for key in stored.files if key.startswith(case + "/")
        }
    return figures, json.loads(str(figures.pop("config", "{}")))
