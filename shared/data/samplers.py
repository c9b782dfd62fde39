"""Which images make up which batch: a function of (seed, epoch), the same for any number of loader workers."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from shared.data.dataset import SampleKey

logger = logging.getLogger(__name__)


class TrainingBatchSampler(Sampler):
    """Batches of shuffled images without end; `len` is the batches of an epoch.

    Every image comes once an epoch, in a batch of images of its own group only; the last global batch of a group
    is filled up from the group's beginning, so that all batches have the same size. The global batches are the
    same for any number of slots.

    Args:
        groups: (images,) which images may be in one batch: those of one `aspect_ratio_groups`, or all alike.
        per_slot_batch_size: images a batch on this slot.
        rank, slots: which part of each global batch is this slot's.
        first_batch: batches already trained, to go on after.
    """

    def __init__(
        self,
        groups: np.ndarray,
        per_slot_batch_size: int,
        seed: int,
        rank: int = 0,
        slots: int = 1,
        first_batch: int = 0,
    ):
        self.groups = groups
        self.per_slot_batch_size = per_slot_batch_size
        self.seed = seed
        self.rank = rank
        self.slots = slots
        self.first_batch = first_batch
        if rank == 0 and per_slot_batch_size * slots > len(groups):
            _warn_of_repeats(per_slot_batch_size * slots, len(groups))
        _, sizes = np.unique(groups, return_counts=True)
        self.length = int((-(-sizes // (per_slot_batch_size * slots))).sum())

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, first = divmod(self.first_batch, len(self))
        while True:
            for batch in self._epoch(epoch)[first:, self.rank].tolist():
                yield [SampleKey(epoch, index) for index in batch]
            epoch, first = epoch + 1, 0

    def _epoch(self, epoch: int) -> np.ndarray:
        """(batches, slots, per_slot_batch_size) indices."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.groups))
        batch_size = self.slots * self.per_slot_batch_size
        batches = []
        for group in np.unique(self.groups):
            members = order[self.groups[order] == group]
            batches.append(np.resize(members, (-(-len(members) // batch_size), batch_size)))
        batches = generator.permutation(np.concatenate(batches)) if len(batches) > 1 else batches[0]
        return batches.reshape(len(self), self.slots, self.per_slot_batch_size)


@functools.cache  # a training makes several samplers
def _warn_of_repeats(global_batch_size: int, images: int) -> None:
    logger.warning(
        "hyperparameters.global_batch_size: %d is more than the %d images that are trained on; a batch has "
        "each several times",
        global_batch_size,
        images,
    )


def aspect_ratio_groups(widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """(images,) 1 for images that are wider than high, 0 for the others: a batch of one group needs little
    padding."""
    return (np.asarray(widths) > np.asarray(heights)).astype(np.uint8)


class EvaluationBatchSampler(Sampler):
    """This slot's share of `indices`, in order. A slot without a share gets the first image: the evaluator
    counts it once, and no slot stands without a batch.

    Args:
        stop: asked before each batch but the first; the rest is left out where it says so.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        rank: int = 0,
        slots: int = 1,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.stop = stop
        own = list(indices[rank::slots]) or list(indices[:1])
        self.batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches[:1]  # without which there is nothing to reduce
        yield from itertools.takewhile(lambda _: not self.stop(), self.batches[1:])
