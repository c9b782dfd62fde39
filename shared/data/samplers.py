"""Which images make up which batch: a function of (seed, epoch), the same for any number of loader workers."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from shared.data.annotations import CocoAnnotations
from shared.data.dataset import SampleKey

logger = logging.getLogger(__name__)


class TrainingBatchSampler(Sampler):
    """Batches of shuffled images without end; `len` is the batches of an epoch.

    Every image comes once an epoch, in a batch of images of its own group only; the last global batch of a group
    is filled up from the group's beginning, so that all batches have the same size. The global batches are the
    same for any number of slots.

    With `repeats` an image comes so often instead; of a fraction, once more in so large a share of the epochs, drawn
    anew in each. An epoch has of each group what that comes to on average, rounded down or up, and as many batches as
    the greater of these needs: all epochs have one length.

    Args:
        groups: (images,) which images may be in one batch: those of one `aspect_ratio_groups`, or all alike.
        per_slot_batch_size: images a batch on this slot.
        rank, slots: which part of each global batch is this slot's.
        first_batch: batches already trained, to go on after.
        repeats: (images,) how often each image comes an epoch, 1 or more; None for once each.
    """

    def __init__(
        self,
        groups: np.ndarray,
        per_slot_batch_size: int,
        seed: int,
        rank: int = 0,
        slots: int = 1,
        first_batch: int = 0,
        repeats: np.ndarray | None = None,
    ):
        self.groups = groups
        self.per_slot_batch_size = per_slot_batch_size
        self.seed = seed
        self.rank = rank
        self.slots = slots
        self.first_batch = first_batch
        self.repeats = repeats
        if rank == 0 and per_slot_batch_size * slots > len(groups):
            _warn_of_repeats(per_slot_batch_size * slots, len(groups))
        self.length = sum(self._batches_of(group) for group in np.unique(groups))

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, first = divmod(self.first_batch, len(self))
        while True:
            own = self._epoch(epoch)[first:, self.rank].copy()  # the slice alone would keep all slots' parts
            for batch in own:  # in lists an epoch of numbers takes five times as much
                numbers = batch.tolist()
                yield [SampleKey(epoch, number % len(self.groups), number // len(self.groups)) for number in numbers]
            epoch, first = epoch + 1, 0

    def _batches_of(self, group: int) -> int:
        """Global batches an epoch of one group."""
        members = self.groups == group
        images = members.sum() if self.repeats is None else math.ceil(self.repeats[members].sum() - 1e-6)
        return -(-int(images) // (self.slots * self.per_slot_batch_size))

    def _epoch(self, epoch: int) -> np.ndarray:
        """(batches, slots, per_slot_batch_size) numbers: an index, and for each earlier copy of it in the epoch as many
        as there are images more."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self._drawn(generator))
        groups = self.groups[order % len(self.groups)]
        batch_size = self.slots * self.per_slot_batch_size
        batches = []
        for group in np.unique(self.groups):
            batches.append(np.resize(order[groups == group], (self._batches_of(group), batch_size)))
        batches = generator.permutation(np.concatenate(batches)) if len(batches) > 1 else batches[0]
        return batches.reshape(len(self), self.slots, self.per_slot_batch_size)

    def _drawn(self, generator: np.random.Generator) -> np.ndarray:
        """The numbers of all that an epoch has."""
        images = np.arange(len(self.groups))
        if self.repeats is None:
            return images
        counts = self.repeats.astype(np.int64)
        for group in np.unique(self.groups):
            # one point in each unit of the fractions laid end to end: each image as often as its own says
            members = generator.permutation(images[self.groups == group])
            ends = np.cumsum((self.repeats - counts)[members], dtype=np.float64) + generator.random()
            counts[members] += np.diff(np.floor(ends), prepend=0.0).astype(np.int64)
        index = np.repeat(images, counts)
        copy = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
        return index + copy * len(images)


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


def size_groups(widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """(images,) a number for each size: a batch of one group needs no padding."""
    sizes = np.asarray(heights, dtype=np.int64) << 32 | np.asarray(widths, dtype=np.int64)
    return np.unique(sizes, return_inverse=True)[1].reshape(-1)


def labels_of(annotations: CocoAnnotations, images: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What images have: (objects,) positions in `images`, and (objects,) labels.

    Args:
        images: (samples,) indices, all of the images where None.
    """
    offsets, labels = annotations.columns["offsets"], annotations.columns["labels"]
    if images is None:
        return np.repeat(np.arange(len(annotations)), np.diff(offsets)), np.asarray(labels)
    counts = np.diff(offsets)[images]
    first = np.cumsum(counts) - counts
    of_objects = np.arange(counts.sum()) + np.repeat(offsets[images] - first, counts)
    return np.repeat(np.arange(len(images)), counts), np.asarray(labels)[of_objects]


def repeat_factors(samples: np.ndarray, labels: np.ndarray, count: int, threshold: float) -> np.ndarray:
    """(count,) how often a sample comes an epoch, as LVIS has it (Gupta et al. 2019): max(1, √(threshold / f)) of its
    rarest category, f the share of samples that have it.

    Args:
        samples, labels: of objects, as `labels_of` gives them.
        count: samples, those without objects too.
    """
    # a pair of sample and label once, however many objects there are of it; as one number each, which sorts in a
    # twentieth of the time
    categories = int(labels.max(initial=0)) + 1
    pairs = samples.astype(np.int64) * categories + labels
    pairs.sort()
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]
    sample, category = np.divmod(pairs, categories)
    having = np.maximum(np.bincount(category, minlength=categories), 1)
    of_category = np.maximum(1.0, np.sqrt(threshold / (having / count)))
    factors = np.ones(count)
    np.maximum.at(factors, sample, of_category[category])
    return factors


def described(repeats: np.ndarray) -> str:
    """Repeats in words."""
    return (
        f"{int((repeats > 1).sum())} of {len(repeats)} images, up to {repeats.max():.3g} times an epoch, which has "
        f"{repeats.sum() / len(repeats):.3g} times as many"
    )


class EvaluationBatchSampler(Sampler):
    """This slot's share of `indices`, in order, or group by group. A slot without a share gets the first image: the
    evaluator counts it once, and no slot stands without a batch.

    Args:
        stop: asked before each batch but the first; the rest is left out where it says so.
        groups: (images,) which images may be in one batch, by index: those of one of `size_groups`. The slots share
            each group evenly. All alike where None.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        rank: int = 0,
        slots: int = 1,
        stop: Callable[[], bool] = lambda: False,
        groups: np.ndarray | None = None,
    ):
        self.stop = stop

        def group_of(index: int) -> int:
            return 0 if groups is None else int(groups[index])

        indices = sorted(indices, key=group_of)
        own = indices[rank::slots] or indices[:1]
        self.batches = []
        for _, of_group in itertools.groupby(own, group_of):
            images = list(of_group)
            self.batches += [images[start : start + batch_size] for start in range(0, len(images), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches[:1]  # without which there is nothing to reduce
        yield from itertools.takewhile(lambda _: not self.stop(), self.batches[1:])
