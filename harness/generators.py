"""The random number generators of a process, whose states a checkpoint holds."""

import functools
import random

import numpy as np
import torch

from harness import distributed


def state(device):
    """The state of every generator of this process, in tensors and plain values."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    states = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    return states | {name: get() for name, (get, _) in on_device(device).items()}


def restore(states, device):
    """Sets the generators to what `state` gave; those of GPUs that are no longer there are not."""
    random.setstate(states["python"])
    numpy = dict(states["numpy"])
    numpy["state"] = dict(numpy["state"], key=numpy["state"]["key"].numpy().astype(np.uint32))
    np.random.set_state(numpy)
    torch.set_rng_state(states["torch"])
    for name, (_, put) in on_device(device).items():
        if name in states:
            put(states[name])


def on_device(device):
    """{name: (get, set) of its state} of the generators on the GPUs that this process uses.

    "cuda" is that of `device`; a process alone may use the others, too (DataParallel).
    """
    if device.type == "mps":
        return {"mps": (torch.mps.get_rng_state, torch.mps.set_rng_state)}
    if device.type != "cuda":
        return {}
    get, put, own = torch.cuda.get_rng_state, torch.cuda.set_rng_state, device.index or 0
    used = range(torch.cuda.device_count()) if distributed.world_size() == 1 else [own]
    return {
        "cuda" if i == own else f"cuda:{i}": (
            functools.partial(get, i), functools.partial(put, device=i)
        )
        for i in used
    }  # fmt: skip
