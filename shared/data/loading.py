"""Which images are in a batch, and batches on the device, one ahead of the step that trains on them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from shared.data.annotations import CocoAnnotations
from shared.data.dataset import BadImages, SampleKey

logger = logging.getLogger(__name__)

# Samples are combined with neighbors in the batches 0, 4 and 8 before. One, two or four workers have decoded them.
_NEIGHBORS = 4
_BATCHES_BACK = 3
_STEP_BACK = 4


@dataclass
class Batch:
    """The input that a detector trains and detects on.

    Attributes:
        images: the detector's images, usually (B, 3, H, W).
        targets: the detector's targets.
        image_ids: B of COCO's image ids, kept on the host.
        skipped: ids of images that cannot be read. A training replaces them, and a detection omits them.
        for_loss: in a validation with losses, the images whose losses are computed, in a batch of one each.
    """

    images: Any
    targets: Any
    image_ids: list[int]
    skipped: list[int] = field(default_factory=list)
    for_loss: list[Batch] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.image_ids)

    def pin_memory(self) -> Batch:
        """DataLoader calls this name."""
        return map_tensors(self, lambda tensor: tensor.pin_memory())


@dataclass
class NotingSkipped:
    """A collate function that notes in the batch which images were skipped for it. It omits None.

    Attributes:
        collate: the detector's.
        bad_images: the collection of the data set in the same process.
    """

    collate: Callable[[list], Batch]
    bad_images: BadImages

    def __call__(self, samples: list) -> Batch:
        samples = [sample for sample in samples if sample is not None]
        batch = self.collate(samples) if samples else Batch(None, None, [])
        batch.skipped = self.bad_images.take()
        return batch


def start_workers(loader: DataLoader) -> None:
    """Starts the workers of a loader with `persistent_workers` before the training. They wait for their first batch.

    A worker that is forked later can hang: Gloo's thread takes Python's lock for the first time when it releases a
    tensor after `torch.distributed.broadcast`. A worker forked at that moment waits in CPython's
    PyOS_AfterFork_Child for a lock that no thread holds any more.

    Args:
        loader: its `batch_sampler` is an `EvaluationBatchSampler`.
    """
    with loader.batch_sampler.empty():  # so that the workers read nothing ahead
        iter(loader)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`. The copy from pinned memory is asynchronous."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(eq=False)
class PrefetchLoader:
    """Copies each batch to the device, and prepares it there, while the device still trains on the previous one.

    On a GPU, the copy and preparation of batch N + 1 are enqueued on a side stream before batch N is yielded. So a step
    that makes the host wait for the device does not delay them. The results are bit for bit the same as without
    prefetching, if `prepare` draws its random numbers from the batch's number. An error in batch N + 1 is raised after
    batch N has been trained on.

    Attributes:
        loader: yields `Batch` on the host. Copies are asynchronous only from pinned memory.
        prepare: the detector's work on a batch on the device, normalization for example. It takes the batch and its
            number, counted from `first_batch`, and runs in the thread that trains.
        waiting: seconds spent waiting for the loader since it was last set to 0.
    """

    loader: DataLoader
    device: torch.device
    prepare: Callable[[Batch, int], Batch]
    first_batch: int = 0
    waiting: float = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = enumerate(self.loader, start=self.first_batch)  # the workers start here
        return self._ahead(batches) if self.device.type == "cuda" else iter(lambda: self._next(batches), None)

    def _ahead(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[Batch]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))  # which made what `prepare` uses

        def enqueue_next() -> Batch | Exception | None:
            try:
                with torch.cuda.stream(stream):
                    return self._next(batches)
            except Exception as error:  # of the batch after the one that is trained on next
                return error

        following = enqueue_next()
        while following is not None:
            if isinstance(following, Exception):
                raise following
            batch, following = following, None
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)  # for this batch alone: the next one is not enqueued yet
            # the memory belongs to the side stream, which must not reuse it before the step has finished
            map_tensors(batch, lambda tensor, stream=current: tensor.record_stream(stream) or tensor)
            following = enqueue_next()
            yield batch

    def _next(self, batches: Iterator[tuple[int, Batch]]) -> Batch | None:
        started = time.perf_counter()
        fetched = next(batches, None)
        self.waiting += time.perf_counter() - started
        if fetched is None:
            return None
        number, batch = fetched
        return self.prepare(to_device(batch, self.device), number)


@functools.singledispatch
def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure (dicts, lists, tuples, dataclasses) with `function` of each tensor. A detector registers the
    structures of its library."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, function) for item in value)
    if is_dataclass(value):
        return type(value)(**{f.name: map_tensors(getattr(value, f.name), function) for f in fields(value)})
    return value


# --- which images are in a batch: a function of (seed, epoch), the same for any number of loader workers


@dataclass(eq=False)
class TrainingBatchSampler(Sampler):
    """Endless batches of shuffled images. `len` is the number of batches in an epoch.

    Each epoch has every image once. A batch has images of one group. The last global batch of a group is filled up
    from the group's beginning, so all batches have the same size. Global batches are the same for any number of slots.

    With `repeats`, an epoch has an image that often. A fraction is drawn anew in each epoch: 2.3 is twice an epoch,
    and three times in three of ten. Each group's total per epoch is constant, so all epochs have the same length.

    Attributes:
        groups: (images,) which images may be in one batch: see `aspect_ratio_groups`.
        per_slot_batch_size: images per batch on this slot.
        rank, slots: which part of each global batch is for this slot.
        first_batch: batches already trained, to continue after.
        repeats: (images,) how often an epoch has each image, 1 or more; None for once.
        others: how many other images a sample is combined with: see `_others`.
    """

    groups: np.ndarray
    per_slot_batch_size: int
    seed: int
    rank: int = 0
    slots: int = 1
    first_batch: int = 0
    repeats: np.ndarray | None = None
    others: int = 0

    def __post_init__(self) -> None:
        if self.rank == 0 and self.per_slot_batch_size * self.slots > len(self.groups):
            _warn_of_small_data(self.per_slot_batch_size * self.slots, len(self.groups))
        self.length = sum(self._batches_of(group) for group in np.unique(self.groups))

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, first = divmod(self.first_batch, len(self))
        while True:
            whole = self._epoch(epoch)
            # views would keep the parts of all slots
            others = self._others(whole, epoch)[first:, self.rank].copy()
            own = whole[first:, self.rank].copy()
            del whole
            for batch, of_batch in zip(own, others, strict=True):  # a whole epoch's lists take five times the memory
                yield [
                    SampleKey(epoch, number % len(self.groups), number // len(self.groups), tuple(of_sample))
                    for number, of_sample in zip(batch.tolist(), of_batch.tolist(), strict=True)
                ]
            epoch, first = epoch + 1, 0

    def _batches_of(self, group: int) -> int:
        """Global batches of one group per epoch."""
        members = self.groups == group
        images = members.sum() if self.repeats is None else math.ceil(self.repeats[members].sum() - 1e-6)
        return -(-int(images) // (self.slots * self.per_slot_batch_size))

    def _epoch(self, epoch: int) -> np.ndarray:
        """(batches, slots, per_slot_batch_size) numbers: see `_drawn`."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self._drawn(generator))
        groups = self.groups[order % len(self.groups)]
        batch_size = self.slots * self.per_slot_batch_size
        batches = [
            np.resize(order[groups == group], (self._batches_of(group), batch_size)) for group in np.unique(self.groups)
        ]
        batches = generator.permutation(np.concatenate(batches)) if len(batches) > 1 else batches[0]
        return batches.reshape(len(self), self.slots, self.per_slot_batch_size)

    def _others(self, whole: np.ndarray, epoch: int) -> np.ndarray:
        """(batches, slots, per_slot_batch_size, others) the images that each sample is combined with, such as in a
        mosaic.

        They are samples of the same part of earlier batches, which a loader worker has decoded shortly before. In a
        short epoch they are any samples of it.
        """
        generator = np.random.default_rng([self.seed, epoch, 1])
        numbers = whole.reshape(len(whole), -1)
        count, size = numbers.shape
        shape = (count, size, self.others)
        if count < _BATCHES_BACK * _STEP_BACK:
            found = numbers.ravel()[generator.integers(0, numbers.size, shape)]
        else:
            back = generator.integers(0, _BATCHES_BACK, shape) * _STEP_BACK
            beside = np.arange(size)[:, None] // _NEIGHBORS * _NEIGHBORS + generator.integers(0, _NEIGHBORS, shape)
            found = numbers[np.arange(count)[:, None, None] - back, beside % size]
        return (found % len(self.groups)).reshape(*whole.shape, self.others)

    def _drawn(self, generator: np.random.Generator) -> np.ndarray:
        """One number for each sample of an epoch: index + copy * images."""
        images = np.arange(len(self.groups))
        if self.repeats is None:
            return images
        counts = self.repeats.astype(np.int64)
        for group in np.unique(self.groups):
            # the fractions are laid end to end, and one point is drawn in each unit of their length
            members = generator.permutation(images[self.groups == group])
            ends = np.cumsum((self.repeats - counts)[members], dtype=np.float64) + generator.random()
            counts[members] += np.diff(np.floor(ends), prepend=0.0).astype(np.int64)
        index = np.repeat(images, counts)
        copy = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
        return index + copy * len(images)


@functools.cache  # a training makes several samplers
def _warn_of_small_data(global_batch_size: int, images: int) -> None:
    logger.warning(
        "hyperparameters.global_batch_size: %d is more than the %d training images; each batch has images several "
        "times",
        global_batch_size,
        images,
    )


def aspect_ratio_groups(widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """(images,) 1 for images that are wider than high, else 0. Batches of one group need little padding."""
    return (np.asarray(widths) > np.asarray(heights)).astype(np.uint8)


def size_groups(widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """(images,) one number per size. Batches of one group need no padding."""
    sizes = np.asarray(heights, dtype=np.int64) << 32 | np.asarray(widths, dtype=np.int64)
    return np.unique(sizes, return_inverse=True)[1].reshape(-1)


def labels_of(annotations: CocoAnnotations, images: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The objects of images: (objects,) positions in `images`, and (objects,) labels.

    Args:
        images: (samples,) indices; None for all images.
    """
    offsets, labels = annotations.columns["offsets"], np.asarray(annotations.columns["labels"])
    counts = np.diff(offsets)
    if images is None:
        return annotations.image_rows, labels
    counts = counts[images]
    first = np.cumsum(counts) - counts
    of_objects = np.arange(counts.sum()) + np.repeat(offsets[images] - first, counts)
    return np.repeat(np.arange(len(images)), counts), labels[of_objects]


def repeat_factors(samples: np.ndarray, labels: np.ndarray, count: int, threshold: float) -> np.ndarray:
    """(count,) how often an epoch has each sample, as in LVIS (Gupta et al. 2019): max(1, √(threshold / f)) of the
    sample's rarest category, where f is the share of samples that have the category.

    Args:
        samples, labels: of objects, see `labels_of`.
        count: samples, including those without objects.
    """
    # each pair of sample and label once, as one number, which sorts 20 times faster than pairs
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
    """This slot's share of `indices`, in order, or group by group. A slot without a share gets the first image, so that
    no slot is without a batch; the evaluator counts an image once.

    Args:
        stop: called before each batch except the first; the remaining batches are skipped if it returns True.
        groups: (images,) which images may be in one batch, by index: see `size_groups`. None for all.
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
        yield from self.batches[:1]  # without one there is nothing to reduce
        yield from itertools.takewhile(lambda _: not self.stop(), self.batches[1:])

    @contextlib.contextmanager
    def empty(self) -> Iterator[None]:
        """The sampler has no batches inside."""
        self.batches, batches = [], self.batches
        yield
        self.batches = batches
