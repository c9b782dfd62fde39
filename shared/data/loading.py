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
    """What a detector trains and detects on.

    Attributes:
        images: the detector's images, (B, 3, H, W) for most.
        targets: the detector's targets.
        image_ids: B of COCO's image ids, kept on the host.
        skipped: the ids of images that others stand in for, because they cannot be read.
        for_loss: of a validation with losses: in a batch of one each, the images whose losses are computed.
    """

    images: Any
    targets: Any
    image_ids: list[int]
    skipped: list[int] = field(default_factory=list)
    for_loss: list[Batch] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.image_ids)

    def pin_memory(self) -> Batch:  # DataLoader asks for this name
        return map_tensors(self, lambda tensor: tensor.pin_memory())


class NotingSkipped:
    """A collate function that notes in the batch which images were left out for it.

    Args:
        collate: the detector's.
        bad_images: what the data set left out, in the same process.
    """

    def __init__(self, collate: Callable[[list], Batch], bad_images: BadImages):
        self.collate, self.bad_images = collate, bad_images

    def __call__(self, samples: list) -> Batch:
        batch = self.collate(samples)
        batch.skipped = self.bad_images.take()
        return batch


def start_workers(loader: DataLoader) -> None:
    """Starts the workers of a loader with `persistent_workers`, which wait for their first batch.

    A worker is forked. Where another thread of the process is just then taking Python's lock for the first time, as
    Gloo's does to let go of a tensor after each `torch.distributed.broadcast`, the worker can hang (it waits in
    CPython's PyOS_AfterFork_Child for a lock that nobody holds any more). So the workers start before the training.

    Args:
        loader: its `batch_sampler` is an `EvaluationBatchSampler`.
    """
    sampler = loader.batch_sampler
    sampler.batches, batches = [], sampler.batches  # nothing is read ahead, which would be thrown away
    iter(loader)
    sampler.batches = batches


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; from pinned memory without waiting for the copy."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


class PrefetchLoader:
    """Copies each batch to the device, and prepares it there, while the device still trains on the last one.

    On a GPU batch N + 1 is taken from the loader, and its copy and preparation are enqueued on a stream of their own,
    before batch N is yielded: a step that makes the host wait for the device, as a library's may, comes too late to
    hold them up. The loader's workers keep more batches than that one ready, so that taking it seldom waits; where it
    does, the training would have waited a step later. The results are the bits of a run without: what `prepare` draws
    must follow from the batch's number. An error of batch N + 1 is raised once batch N has been trained.

    Args:
        loader: yields `Batch` on the host; in pinned memory, or the copies wait.
        prepare: the detector's work on a batch that is on the device (normalisation, say), given the
            batch and its number, counted from `first_batch`. Called by the thread that trains.
        explain: the error to raise if the device's memory is not enough for a batch on the host with that number.

    Attributes:
        waiting: seconds spent waiting for the loader, since it was last set to 0.
    """

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        prepare: Callable[[Batch, int], Batch],
        first_batch: int = 0,
        explain: Callable[[Batch, int], Exception] | None = None,
    ):
        self.loader = loader
        self.device = device
        self.prepare = prepare
        self.first_batch = first_batch
        self.explain = explain
        self.waiting = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = enumerate(self.loader, start=self.first_batch)  # the workers start here
        return self._ahead(batches) if self.device.type == "cuda" else self._in_turn(batches)

    def _in_turn(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[Batch]:
        while (batch := self._next(batches)) is not None:
            yield batch

    def _ahead(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[Batch]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))  # what `prepare` uses was made there

        def enqueue_next() -> Batch | Exception | None:
            try:
                with torch.cuda.stream(stream):
                    return self._next(batches)
            except Exception as error:  # of the batch after the one that is trained next
                return error

        following = enqueue_next()
        while following is not None:
            if isinstance(following, Exception):
                raise following
            batch, following = following, None
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)  # for this batch alone: the next one is not enqueued yet
            # its memory belongs to the side stream: not to be used again before the step is done with it
            _record_stream(batch, current)
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


def _record_stream(batch: Batch, stream: torch.cuda.Stream) -> None:
    def record(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(stream)
        return tensor

    map_tensors(batch, record)


@functools.singledispatch
def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure (dicts, lists, tuples, dataclasses) with `function` of each tensor; a detector registers the
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
