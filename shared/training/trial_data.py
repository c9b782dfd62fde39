"""The part of a trial that opens data and makes batches of it."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from determined.pytorch import PyTorchTrialContext
from torch.utils.data import DataLoader, Dataset

from shared.config.schema import DataConfig, TrainingHyperparameters
from shared.data.annotations import CocoAnnotations
from shared.data.dataset import BadImages, CocoDetection, Transform, seed_all
from shared.data.loading import Batch, NotingSkipped, PrefetchLoader, start_workers
from shared.data.open import SplitData, open_split, open_train_and_val
from shared.data.samplers import EvaluationBatchSampler, TrainingBatchSampler, labels_of, repeat_factors, size_groups
from shared.errors import UserError
from shared.evaluation.evaluator import CocoEvaluator
from shared.evaluation.gathered import ChiefReducer
from shared.training.hang import show_stacks_when_asked
from shared.training.stopping import Stopping, outlive_signals
from shared.training.validation_loss import CollateWithLoss, WithLossSample

logger = logging.getLogger(__name__)


class TrialData:
    """What a detector says of its data, and the loaders that come of it.

    Attributes:
        data: the `data` section of the config.
        train_data, val_data: what it opens to; of a training only.
        bad_images: what becomes of images that cannot be read.
        training_loader: yields batches on the device; `.waiting` is the seconds spent waiting for data.
    """

    data_class: type[DataConfig] = DataConfig
    pretrained_categories: ClassVar[list[dict]] = []
    """COCO categories that the pretrained weights detect, where no annotation file says more."""

    context: PyTorchTrialContext
    data: DataConfig
    hparams: TrainingHyperparameters
    bad_images: BadImages
    stopping: Stopping
    iou_types: tuple[str, ...]
    rank: int
    slots: int
    seed: int
    first_batch: int
    per_slot_batch_size: int
    validates_loss: bool

    # --- what a detector says of itself ---------------------------------------------------------------

    @abstractmethod
    def training_dataset(self) -> Dataset:
        """The training samples, by `SampleKey`."""

    @abstractmethod
    def evaluation_dataset(self, data: SplitData) -> Dataset:
        """The samples to detect on, by index."""

    def loss_transform(self, data: SplitData) -> Transform:
        """From a validation image to a training sample without augmentation, at the size that the evaluation has; None
        for an image that cannot be made one.

        Raises:
            UserError: the detector's configuration cannot be brought to that.
        """
        raise UserError("hyperparameters.validation_loss: this detector has none")

    def trained_images(self, annotations: CocoAnnotations) -> np.ndarray:
        """(images,) whether a training on these annotations has the image."""
        return np.ones(len(annotations), dtype=bool)

    @abstractmethod
    def collate(self, training: bool) -> Callable[[list], Batch]:
        """From samples to a batch on the host."""

    def prepare(self, batch: Batch, number: int | None) -> Batch:
        """Work on a batch on the device, before `losses` and `detect`.

        Args:
            number: of the training batch, from 0; None to detect. What is drawn at random for an image follows from
                `seed_image(number, i)`, so that it is the same on any number of slots.
        """
        if self.hparams.channels_last and isinstance(batch.images, torch.Tensor) and batch.images.dim() == 4:
            return replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
        return batch

    def open_train_and_val(self) -> tuple[SplitData, SplitData]:
        """The data to train and to validate on, checked."""
        train, val = open_train_and_val(self.data)
        if self.rank == 0 and (count := int(train.annotations.without_area.sum())):
            logger.warning("data.train: %d boxes without area are left out of the training targets", count)
        return train, val

    def open_val(self) -> SplitData:
        """The data to validate on, checked."""
        return open_split(self.data, "val")

    def known_categories(self) -> list[dict]:
        """The data set's categories where its annotation file is there, else those that the weights know."""
        if self.data.has_val_annotations:
            return self.open_val().categories
        return self.pretrained_categories

    def training_groups(self) -> np.ndarray:
        """(samples,) the group of each training sample: a batch is of one group."""
        return np.zeros(len(self.train_data.annotations), dtype=np.uint8)

    def training_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions of training samples and the labels of their objects, see `labels_of`."""
        return labels_of(self.train_data.annotations)

    @property
    def evaluation_batch_size(self) -> int:
        """Images a batch that a slot detects on."""
        return self.per_slot_batch_size

    @property
    def batches_evaluations(self) -> bool:
        """Whether a library that evaluates an image at a time, since padding for its neighbours would change it, is
        given batches of one size. They pad nothing, but round otherwise; and only a GPU is quicker by them: a CPU took
        1.13 times as long for 4 images of 800 pixels by a ResNet-50."""
        return self.data.fast_images and self.context.device.type == "cuda"

    @property
    def batches_of_one_size(self) -> bool:
        """Whether a batch to detect on must be of images of one size; the detector says so."""
        return False

    def evaluation_groups(self, data: SplitData) -> np.ndarray | None:
        """(images,) the group of each image: a batch to detect on is of one group. None where any may be in one."""
        if not self.batches_of_one_size:
            return None
        return size_groups(data.annotations.columns["widths"], data.annotations.columns["heights"])

    def evaluated_images(self, count: int) -> range:
        """Which of the validation images count: all, where the detector says nothing else."""
        return range(count)

    def build_evaluator(self, data: SplitData) -> ChiefReducer:
        """The evaluator over the images of `evaluated_images`: `update` takes what `detect` returns."""
        image_ids = self.evaluated_ids(data)
        return CocoEvaluator(data.annotations, self.iou_types, image_ids, gather=self.context.distributed.gather)

    def evaluated_ids(self, data: SplitData) -> np.ndarray:
        """The ids of `evaluated_images`."""
        return data.annotations.image_ids[list(self.evaluated_images(len(data.annotations)))]

    # --- loaders --------------------------------------------------------------------------------------

    def build_training_data_loader(self) -> PrefetchLoader:
        loader = self._loader(self.training_dataset(), self.training_batches(), training=True)
        self.training_loader = PrefetchLoader(
            loader, self.context.device, self._prepare_training_batch, self.first_batch, self._prefetch_out_of_memory
        )
        return self.training_loader

    def build_validation_data_loader(self) -> DataLoader:
        self.validation_loader = self.evaluation_loader(self.val_data, self.validates_loss)
        if self.data.workers > 0:
            start_workers(self.validation_loader)
        return self.validation_loader

    def evaluation_loader(self, data: SplitData, with_losses: bool = False) -> DataLoader:
        """This slot's share of the images to evaluate on, as batches on the host."""
        dataset = self.dataset_with_losses(data) if with_losses else self.evaluation_dataset(data)
        indices = self.evaluated_images(len(dataset))
        stop = self.stopping.cuts_validation
        groups = self.evaluation_groups(data)
        sampler = EvaluationBatchSampler(indices, self.evaluation_batch_size, self.rank, self.slots, stop, groups)
        return self._loader(dataset, sampler, training=False, with_losses=with_losses)

    def dataset_with_losses(self, data: SplitData) -> CocoDetection:
        """The samples to detect on, each with the one whose losses are computed beside it, see `WithLossSample`."""
        dataset = self.evaluation_dataset(data)
        left_out = frozenset(data.annotations.image_ids[~self.trained_images(data.annotations)].tolist())
        dataset.transform = WithLossSample(dataset.transform, self.loss_transform(data), left_out)
        return dataset

    def training_batches(self, first_batch: int | None = None) -> TrainingBatchSampler:
        """This slot's batches, from `first_batch` on (the run's where None), without end."""
        return TrainingBatchSampler(
            self.training_groups(),
            self.per_slot_batch_size,
            self.seed,
            self.rank,
            self.slots,
            self.first_batch if first_batch is None else first_batch,
            self.repeats,
        )

    @cached_property
    def repeats(self) -> np.ndarray | None:
        """(samples,) how often each training sample comes an epoch; None for once each."""
        if self.data.repeat_threshold is None:
            return None
        return repeat_factors(*self.training_labels(), len(self.training_groups()), self.data.repeat_threshold)

    def _loader(self, dataset: Dataset, batches: Any, training: bool, with_losses: bool = False) -> DataLoader:
        collate = self.collate(training)
        if with_losses:
            collate = CollateWithLoss(collate, self.collate(True))
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.data.workers,
            persistent_workers=self.data.workers > 0,  # or each validation forks again: slow, and see start_workers
            collate_fn=NotingSkipped(collate, self.bad_images),
            pin_memory=self.context.device.type == "cuda",
            worker_init_fn=_begin_worker,
        )

    def _prepare_training_batch(self, batch: Batch, number: int) -> Batch:
        seed_all(self.seed, self.rank, number, 0)
        return self.prepare(batch, number)

    def _prefetch_out_of_memory(self, batch: Batch, number: int) -> UserError:
        return self.out_of_memory(f"the copy of batch {number + 1} to the GPU", batch, self.smaller_batch())

    def seed_image(self, number: int, position: int) -> None:
        """Seeds what is drawn for the image at a position of this slot's part of training batch `number`."""
        seed_all(self.seed, number, self.rank * self.per_slot_batch_size + position, 2)

    def get_batch_length(self, batch: Batch) -> int:
        return len(batch)


def _begin_worker(worker_id: int) -> None:
    outlive_signals(worker_id)
    show_stacks_when_asked()
