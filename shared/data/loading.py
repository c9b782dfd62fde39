"""Batches on the device, one ahead of the step that trains on them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from shared.data.dataset import BadImages


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
        bad_images: of the data set in the same process.
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
        prepare: the detector's work on a batch on the device, normalisation for example. It takes the batch and its
            number, counted from `first_batch`, and runs in the thread that trains.
        explain: the error to raise if the device runs out of memory, given the batch on the host and its number.
        waiting: seconds spent waiting for the loader since it was last set to 0.
    """

    loader: DataLoader
    device: torch.device
    prepare: Callable[[Batch, int], Batch]
    first_batch: int = 0
    explain: Callable[[Batch, int], Exception] | None = None
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
        try:
            return self.prepare(to_device(batch, self.device), number)
        except torch.cuda.OutOfMemoryError as error:
            if self.explain is None:
                raise
            raise self.explain(batch, number) from error


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
