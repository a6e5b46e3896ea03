"""Batches of P identities with as many images each, as batch-hard triplets need them."""

import numpy as np

from utils import UserError


class PKBatches:
    """Batches of `identities` different identities with `instances` images each.

    An epoch has every identity once; its last batch is filled up with the identities that it began
    with. An identity with fewer images than `instances` repeats some, else they differ. A batch is
    a function of seed, epoch and step alone. Of `world_size` processes each takes its share of the
    identities of every batch: together they see what one process would.

    A batch_sampler of a DataLoader: an iteration is the epoch of set_epoch, from its step on.
    ids: (N,) of the images. triplets: of each identity two different images are needed. Raises
    UserError where the numbers do not fit the ids.
    """

    def __init__(
        self, ids, identities, instances=4, seed=0, rank=0, world_size=1, triplets=True
    ):  # fmt: skip
        ids = np.asarray(ids)
        order = np.argsort(ids, kind="stable")
        values, starts = np.unique(ids[order], return_index=True)
        self.images = np.split(order, starts[1:])  # of each identity
        few = [value for value, own in zip(values, self.images, strict=True) if len(own) < 2]
        if identities < 2 or instances < 1:
            raise UserError(f"{identities} identities of {instances} images make no batch: "
                            "use 2 or more of 1 or more")  # fmt: skip
        if len(values) < identities:
            raise UserError(f"a batch of {identities} identities is more than the {len(values)} "
                            f"that there are: use {len(values)} or fewer")  # fmt: skip
        if triplets and instances > 1 and few:
            raise UserError(f"identity {few[0]} has one image, and a triplet needs two of it "
                            f"({len(few)} like it): add images, or give --loss ce")  # fmt: skip
        if identities % world_size:
            raise UserError(f"{identities} identities cannot be shared by {world_size} processes: "
                            f"use a multiple of {world_size}")  # fmt: skip
        self.identities, self.instances, self.seed = identities, instances, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = 0, 0
        self._made = None  # (epoch, its batches)

    def __len__(self):
        """Steps of an epoch."""
        return -(-len(self.images) // self.identities)

    def set_epoch(self, epoch, step=0):
        """What the next iteration is; the one after it is the same epoch from its first step."""
        self.epoch, self.start = epoch, step

    def __iter__(self):
        start, self.start = self.start, 0
        for step in range(start, len(self)):
            yield self.batch(self.epoch, step).tolist()

    def batch(self, epoch, step):
        """Indices (identities / world_size * instances,) of this process's images of a step."""
        if self._made is None or self._made[0] != epoch:
            self._made = epoch, self._epoch(epoch)
        return self._made[1][step, self.rank :: self.world_size].reshape(-1)

    def _epoch(self, epoch):
        """Indices (steps, identities, instances), the same in every process."""
        draw = np.random.default_rng([self.seed, epoch])
        order = draw.permutation(len(self.images))
        order = np.resize(order, len(self) * self.identities)  # repeats from its start
        images = [np.resize(draw.permutation(self.images[i]), self.instances) for i in order]
        return np.stack(images).reshape(len(self), self.identities, self.instances)
