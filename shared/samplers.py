"""Which images make up which batch: a function of (seed, epoch), the same for any number of loader workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from shared.dataset import SampleKey


class TrainingBatchSampler(Sampler):
    """Batches of shuffled images without end; `len` is the batches of an epoch.

    Every image comes once an epoch; the last global batch is filled up from the epoch's beginning, so that
    all batches have the same size.

    Args:
        dataset_size: number of images.
        per_slot_batch_size: images a batch on this slot.
        rank, slots: which part of each global batch is this slot's.
        first_batch: batches already trained, to go on after.
    """

    def __init__(
        self,
        dataset_size: int,
        per_slot_batch_size: int,
        seed: int,
        rank: int = 0,
        slots: int = 1,
        first_batch: int = 0,
    ):
        self.dataset_size = dataset_size
        self.per_slot_batch_size = per_slot_batch_size
        self.seed = seed
        self.rank = rank
        self.slots = slots
        self.first_batch = first_batch

    def __len__(self) -> int:
        return -(-self.dataset_size // (self.per_slot_batch_size * self.slots))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, first = divmod(self.first_batch, len(self))
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.dataset_size)
            batches = np.resize(order, (len(self), self.slots, self.per_slot_batch_size))
            for batch in batches[first:, self.rank].tolist():
                yield [SampleKey(epoch, index) for index in batch]
            epoch, first = epoch + 1, 0


class EvaluationBatchSampler(Sampler):
    """This slot's share of `indices`, in order. A slot without a share gets the first image: the evaluator
    counts it once, and no slot stands without a batch."""

    def __init__(self, indices: Sequence[int], batch_size: int, rank: int = 0, slots: int = 1):
        own = list(indices[rank::slots]) or list(indices[:1])
        self.batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)
