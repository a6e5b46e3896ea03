"""Loaders: batches of P identities for the steps, and all images once for an evaluation."""

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from harness import data, distributed, imagenet
from harness.imagenet import MEAN, STD
from utils import UserError, user_errors

from . import metrics
from .data import decode
from .rerank import rerank

# Zhong et al., Random Erasing Data Augmentation, AAAI 2020; what is cut out is the mean colour.
ERASING = v2.RandomErasing(0.5, scale=(0.02, 0.4), ratio=(0.3, 3.33))
RANKS = (1, 5, 10, 20)  # at which a retrieval is told


class Samples(Dataset):
    """(image (height, width, 3) uint8, label) of an index; a UserError instead where it fails."""

    def __init__(self, images, labels, height, width):
        self.images, self.labels, self.size = images.images, labels, (height, width)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        try:
            return torch.from_numpy(decode(self.images[i], *self.size)), int(self.labels[i])
        except UserError as error:  # with a traceback in its text, if a worker raised it
            return error


def make(samples, workers, device, **how):
    """A DataLoader whose workers heed the signals of a run; none for images in memory."""
    workers = min(workers, imagenet.cores()) if isinstance(samples.images, list) else 0
    return DataLoader(
        samples,
        num_workers=workers,
        collate_fn=imagenet.collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0 and "batch_sampler" in how,
        worker_init_fn=imagenet.heed_the_parent,
        generator=torch.Generator(),  # not the global one, which a run owns
        **how,
    )


class Loader(imagenet.Loader):
    """The batches of a PKBatches as x (B, 3, height, width) float32 and labels (B,).

    Of imagenet.Loader it has the iteration and the state; order and size are those of the batches.

    An iteration is an epoch, but the first after load_state_dict goes on where the state was taken.
    flip, erase: in half of the images; drawn from seed, epoch, step and process alone, so that a
    run that was stopped goes on with the same ones.
    """

    def __init__(self, images, labels, batches, size, device, workers, flip=True, erase=False):
        self.batches, self.device, self.total = batches, device, len(labels)
        self.epoch, self.position, self.resumed = -1, 0, False  # position: batches handed out
        self.mean, self.std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD)
        )
        augment = [v2.RandomHorizontalFlip()] * flip + [ERASING] * erase
        self.augment = v2.Compose(augment) if augment else None
        samples = Samples(images, labels, *size)
        self.loader = make(samples, workers, device, batch_sampler=_Steps(self))

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for x, y in super().__iter__():
            yield self._augmented(x), y

    def smallest(self):
        """How many images a process has in a step."""
        return len(self.batches.batch(0, 0))

    def _augmented(self, x):
        if self.augment is None:
            return x
        place = self.batches.seed, self.epoch, self.position, self.batches.rank
        with torch.random.fork_rng(devices=[]):
            seed = int(np.random.SeedSequence(place).generate_state(1)[0])
            torch.default_generator.manual_seed(seed)  # not those of the GPUs
            x = torch.stack([self.augment(image) for image in x])
        return x.contiguous(memory_format=torch.channels_last)


class _Steps:
    """The batches of the epoch that a Loader is in, from where it is."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.loader.batches.set_epoch(self.loader.epoch, self.loader.position)
        yield from self.loader.batches


@torch.no_grad()
def embed(network, images, args, device, run=None):
    """Embeddings (N, D) float32 of Images, on the device; each image once, whatever the processes.

    args: height, width, identities, instances, workers. run: a runs.Run that a signal may end here.
    """
    network.eval()
    mine = range(distributed.rank(), len(images.ids), distributed.world_size())
    samples = Samples(images, images.ids, args.height, args.width)
    how = dict(batch_size=args.identities * args.instances, sampler=mine)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    found = []
    for batch in make(samples, args.workers, device, **how):
        if isinstance(batch, UserError):
            raise batch
        found.append(network(data.normalized(batch[0].to(device), mean, std)).float().cpu())
        if run is not None:
            run.evaluating()
    parts = distributed.gather(torch.cat(found) if found else None)
    whole = torch.cat([part for part in parts if part is not None])
    result = torch.empty_like(whole)
    order = [range(r, len(images.ids), len(parts)) for r in range(len(parts))]
    result[[i for part in order for i in part]] = whole
    return result.to(device)


class Found(NamedTuple):
    """What a retrieval gave."""

    embeddings: list  # of the queries (Q, D), of the gallery (G, D)
    result: metrics.Retrieval
    figures: dict  # rank1, ..., of RANKS, and mAP, in percent
    distances: object  # of a list of queries: their rows of the matrix


def retrieve(network, people, args, device, run=None):
    """The Found of the queries of `people`, a ReIDSet, in its gallery; the same in all processes.

    args and run as for `embed`.
    """

    def evaluate(query, gallery, *labels):
        result = metrics.evaluate_embeddings(query, gallery, *labels)
        return result, lambda rows: metrics.distances(query[rows], gallery)

    embeddings = [embed(network, part, args, device, run) for part in people[1:3]]
    return _found(embeddings, people, evaluate)


def reranked(found, people):
    """The Found of the same embeddings, ranked anew by k-reciprocal neighbours."""

    def evaluate(query, gallery, *labels):
        matrix = rerank(query, gallery)
        return metrics.evaluate(matrix, *labels), lambda rows: matrix[rows]

    return _found(found.embeddings, people, evaluate)


def _found(embeddings, people, evaluate):
    labels = people.query.ids, people.gallery.ids, people.query.cameras, people.gallery.cameras
    result = distances = None
    if distributed.is_main():
        with user_errors(ValueError):
            result, distances = evaluate(*embeddings, *labels)
    result = distributed.on_main(lambda: result)
    figures = {f"rank{k}": 100 * float(result.cmc[k - 1]) for k in RANKS}
    return Found(embeddings, result, figures | {"mAP": 100 * result.mAP}, distances)
