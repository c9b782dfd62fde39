"""Loaders of batches: their workers, and the samples of a validation that gives losses too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, Dataset

from shared.data.annotations import ImageRecord
from shared.data.dataset import BadImages, Transform
from shared.data.loading import Batch, NotingSkipped
from shared.training.hang import show_stacks_when_asked
from shared.training.stopping import outlive_signals


def make_loader(
    dataset: Dataset,
    batches: Iterable[list],
    collate: Callable[[list], Batch],
    bad_images: BadImages,
    workers: int,
    pin_memory: bool,
) -> DataLoader:
    """Yields `Batch` on the host.

    Args:
        batches: the keys of each batch's samples.
        bad_images: what `dataset` leaves out, noted in the batch.
        pin_memory: for copies to a GPU.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,  # or each validation forks again: slow, and see start_workers
        collate_fn=NotingSkipped(collate, bad_images),
        pin_memory=pin_memory,
        worker_init_fn=_begin_worker,
    )


def _begin_worker(worker_id: int) -> None:
    outlive_signals(worker_id)
    show_stacks_when_asked()


class WithLossSample:
    """A transform that gives an image's evaluation sample, and beside it the sample whose losses are computed; None for
    an image that the training would leave out.

    Args:
        evaluation: the transform to detect on.
        loss: the same without augmentation, with the training's targets. It may give None.
        left_out: ids of the images that the training would leave out.
    """

    def __init__(self, evaluation: Transform, loss: Transform, left_out: frozenset[int]):
        self.evaluation, self.loss, self.left_out = evaluation, loss, left_out

    def __call__(self, image: Any, record: ImageRecord) -> tuple[Any, Any]:
        for_loss = None if record.image_id in self.left_out else self.loss(image, record)
        return self.evaluation(image, record), for_loss


class CollateWithLoss:
    """A collate function for `WithLossSample`: the evaluation's batch. Its `for_loss` has a batch of one for each image
    whose losses are computed."""

    def __init__(self, evaluation: Callable[[list], Batch], training: Callable[[list], Batch]):
        self.evaluation, self.training = evaluation, training

    def __call__(self, samples: list[tuple[Any, Any]]) -> Batch:
        batch = self.evaluation([sample for sample, _ in samples])
        return replace(batch, for_loss=[self.training([sample]) for _, sample in samples if sample is not None])
