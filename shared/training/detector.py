"""The contract of a detector.

Its `model_def.py` subclasses `shared.training.trial.DetectionTrial`, which is a `Detector`. The
abstract methods come first, then the hooks by topic; each hook has a default.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from determined.pytorch import PyTorchTrial, PyTorchTrialContext
from torch import nn
from torch.utils.data import DataLoader, Dataset

from shared.config.experiment import Experiment, Sections
from shared.config.schema import DataConfig, Length, SearcherMetric, TrainingHyperparameters
from shared.data.annotations import CocoAnnotations
from shared.data.augment.augmenter import DataAugmenter
from shared.data.augment.placement import Layout, mirrored_keypoints
from shared.data.dataset import Transform, seed_all
from shared.data.images import InputScale
from shared.data.loading import Batch, TrainingBatchSampler, labels_of, repeat_factors
from shared.data.open import SplitData, open_split, open_train_and_val
from shared.errors import UserError
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator, summary_metrics
from shared.evaluation.gathered import ChiefReducer
from shared.training.processes import broadcast_from_chief
from shared.training.saving import python_state, restore_python_state
from shared.training.switches import AveragedWeights, Clip, autocast, class_weights, no_class_weights
from shared.training.validation import TOTAL

logger = logging.getLogger(__name__)


class Detector(PyTorchTrial):
    """The methods that a detector defines, and the attributes that it can use."""

    context: PyTorchTrialContext
    experiment: Experiment
    hparams: TrainingHyperparameters  # two of the experiment's sections
    data: DataConfig
    train_data: SplitData
    val_data: SplitData
    categories: list[dict]  # a category's position is its label
    model: nn.Module  # that trains, on its device, in DDP if there are several slots
    plain_model: nn.Module  # it without DDP
    ema: Any  # None without averaged weights
    optimizer: torch.optim.Optimizer
    evaluator: ChiefReducer
    searcher_metric: SearcherMetric  # that steers
    last_validation: dict[str, float]
    first_batch: int  # batches that were trained before this start
    batches_trained: int  # so far
    batches_per_epoch: int
    total_batches: int
    aggregation_frequency: int  # batches per optimizer step
    global_batch_size: int
    per_slot_batch_size: int
    seed: int
    rank: int
    slots: int  # how many processes there are
    for_training: bool  # False to evaluate or predict
    validates_loss: bool

    # --- what a detector declares -------------------------------------------------------------------------

    hyperparameters_class: type
    """The dataclass behind `hyperparameters`; has `global_batch_size` besides what `TrainingHyperparameters` has."""
    data_class: type[DataConfig] = DataConfig
    without_pretrained: ClassVar[dict[str, Any]] = {}
    """Hyperparameters of a model whose weights a checkpoint will give."""
    pretrained_categories: ClassVar[list[dict]] = []
    """COCO categories that the pretrained weights detect, if no annotation file names others."""
    python_attributes: ClassVar[Mapping[str, Sequence[str]]] = {}
    """By the class name of a module, what it keeps in plain attributes while it trains, see `python_state`."""
    iou_types: tuple[str, ...] = ("bbox",)
    """What COCO's evaluation compares: of "bbox", "segm" and "keypoints"."""
    find_unused_parameters: bool = False
    """Whether a step may leave parameters without a gradient, so that DDP has to look for them."""
    evaluates_coco: bool = True
    """Whether `CocoEvaluator` scores a validation; False if the detector's library does, on data of its own."""
    replaced_by_augment: Sequence[str] = ()
    """Hyperparameters that have no effect with `data.augment`."""
    weighs_categories: bool = False
    """Whether `build_model` puts `class_weights` into the model's loss."""
    batches_of_one_size: bool = False
    """Whether all images of a batch to detect on must have one size."""
    max_iou: float = 0.5
    """The IoU above which the detector drops the lower-scoring of two detections of a category."""
    fp16_key: str = "hyperparameters.amp"
    """Where fp16 is switched on; like the next two, for error messages."""
    optimizer_key: str = "hyperparameters.opt"
    weights_key: str = "hyperparameters.weights"

    # --- what every detector defines ----------------------------------------------------------------------

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The training model on the host, with its initial or pretrained weights."""

    @abstractmethod
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of `model`'s parameters."""

    @abstractmethod
    def training_dataset(self) -> Dataset:
        """The training samples, by `SampleKey`."""

    @abstractmethod
    def evaluation_dataset(self, data: SplitData) -> Dataset:
        """The samples to detect on, by index."""

    @abstractmethod
    def collate(self, training: bool) -> Callable[[list], Batch]:
        """A function from samples to a batch on the host."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Scalars on the device; "loss" is the one to minimize. `model` is in DDP if there are several slots."""

    @abstractmethod
    def detect(self, model: nn.Module, batch: Batch) -> list[Detections]:
        """The detections of each image of a prepared batch."""

    @abstractmethod
    def check_pretrained(self) -> None:
        """Raises UserError if the config's weights detect nothing and no checkpoint is given."""

    # --- hooks: the config --------------------------------------------------------------------------------

    @classmethod
    def sections(cls) -> Sections:
        """The detector's sections of the experiment config."""
        return Sections(cls.hyperparameters_class, cls.data_class)

    @classmethod
    def input_scale(cls, hparams: Any) -> InputScale | None:
        """The size of objects for the model of these hyperparameters; None if it is not known."""
        return None

    @classmethod
    def hyperparameters_of_checkpoint(cls, checkpoint: Path, own: Mapping[str, Any]) -> dict[str, Any]:
        """What replaces a checkpoint's hyperparameters to detect with it.

        Args:
            own: the hyperparameters of the user's config. Only they may name code.
        """
        return cls.without_pretrained

    def read_own_config(self) -> None:
        """Reads the detector's own configuration, which `hparams` names. `data` is there too."""

    def repeats_by_itself(self) -> str | None:
        """What of the detector's own configuration repeats training images; None without."""
        return None

    def default_lengths(self) -> dict[str, Length]:
        """The detector's own `searcher.max_length`, `min_validation_period` and `min_checkpoint_period`. The experiment
        config wins."""
        return {}

    def validation_times(self) -> tuple[Length | None, tuple[tuple[Length, Length], ...]]:
        """The first validation, and from when on the period is another. Counts if the experiment config gives no
        period."""
        return None, ()

    def reported_metrics(self) -> list[str] | None:
        """The names that a validation reports, or None if they are not known. One of them steers the searcher."""
        if not self.evaluates_coco:
            return None
        names = [f"{iou_type}_{name}" for iou_type in self.iou_types for name in summary_metrics(iou_type)]
        return [*names, *([TOTAL] if self.validates_loss else [])]

    def save_own_config(self, folder: Path) -> None:
        """Writes the detector's own configuration, resolved, into the folder of a run or a checkpoint."""

    def summary(self) -> list[tuple[str, object]]:
        """Lines about the detector, name and value, to print at the start."""
        return []

    # --- hooks: data --------------------------------------------------------------------------------------

    def open_train_and_val(self) -> tuple[SplitData, SplitData]:
        """The data to train and to validate on, checked."""
        train, val = open_train_and_val(self.data)
        if self.rank == 0 and (count := int(train.annotations.without_area.sum())):
            logger.warning("data.train: %d boxes without area are omitted from the training targets", count)
        return train, val

    def open_val(self) -> SplitData:
        """The data to validate on, checked."""
        return open_split(self.data, "val")

    def known_categories(self) -> list[dict]:
        """The categories of the validation data if its annotation file is there, else those of the weights."""
        return self.open_val().categories if self.data.has_val_annotations else self.pretrained_categories

    def training_groups(self) -> np.ndarray:
        """(samples,) the group of each training sample. A batch is of one group."""
        return np.zeros(len(self.train_data.annotations), dtype=np.uint8)

    def training_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions of training samples and the labels of their objects, see `labels_of`."""
        return labels_of(self.train_data.annotations)

    def training_batches(self, first_batch: int | None = None) -> TrainingBatchSampler:
        """This slot's batches from `first_batch` on, without end. None for the run's first batch."""
        first = self.first_batch if first_batch is None else first_batch
        of_slot = (self.per_slot_batch_size, self.seed, self.rank, self.slots)
        others = 0 if self.data.augment is None else self.data.augment.others
        return TrainingBatchSampler(self.training_groups(), *of_slot, first, self.repeats, others)

    def trained_images(self, annotations: CocoAnnotations) -> np.ndarray:
        """(images,) whether training on these annotations uses the image."""
        return np.ones(len(annotations), dtype=bool)

    def prepare(self, batch: Batch, number: int | None) -> Batch:
        """Work on a batch on the device, before `losses` and `detect`.

        Args:
            number: number of the training batch, from 0; None to detect. Random numbers for an image must follow from
                `seed_image(number, i)`, so that they are the same on any number of slots.
        """
        if self.hparams.channels_last and isinstance(batch.images, torch.Tensor) and batch.images.dim() == 4:
            return replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
        return batch

    def evaluated_images(self, count: int) -> range:
        """Which of `count` validation images count."""
        return range(count)

    @property
    def evaluation_batch_size(self) -> int:
        """Images per batch that a slot detects on."""
        return self.per_slot_batch_size

    def build_evaluator(self, data: SplitData) -> ChiefReducer:
        """The evaluator over the images of `evaluated_images`. Its `update` takes what `detect` returns."""
        return CocoEvaluator(
            data.annotations,
            self.iou_types,
            self.evaluated_ids(data),
            gather=self.context.distributed.gather,
            max_detections=self.scored_detections(self.experiment.config["hyperparameters"]),
        )

    @classmethod
    def scored_detections(cls, hyperparameters: Mapping[str, Any]) -> int | None:
        """Detections per image and category that are scored; None for COCO's number.

        Args:
            hyperparameters: the config's section, not parsed: a file of results is scored without a model.
        """
        given = hyperparameters.get("max_detections")
        return given if isinstance(given, int) else None

    def loss_transform(self, data: SplitData) -> Transform:
        """From a validation image to a training sample without augmentation, at the size of the evaluation; None for an
        image that gives none. Raises UserError if the detector's configuration does not allow that."""
        raise UserError("hyperparameters.validation_loss: this detector has none. Fix: remove the key")

    def image_losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """As `losses`, for a batch of one validation image and the model that validates."""
        return self.losses(model, batch)

    # --- hooks: model and optimizer -----------------------------------------------------------------------

    def detector(self, model: nn.Module) -> nn.Module:
        """The part of the model whose modules `freeze` names."""
        return model

    def exportable(self) -> nn.Module:
        """The evaluation model from images to detections, for `export`: a `shared.export.operations.Exportable`.

        Raises:
            UserError: no exported file can do what the config asks for.
        """
        raise UserError("export: this detector has no export. Fix: use its checkpoint")

    def save_for_transformers(self, folder: Path) -> None:
        """Writes the evaluation model as a folder that the package transformers loads.

        Raises:
            UserError: the detector is no model of that package.
        """
        raise UserError("--format transformers: only a model of `detr` has it. Fix: choose onnx, openvino or torch")

    def compiled_parts(self, model: nn.Module) -> Sequence[nn.Module]:
        """What `torch_compile` compiles: modules that take and return tensors."""
        return [model]

    def with_sync_bn(self, model: nn.Module) -> nn.Module:
        """The model with batch norm over all slots."""
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """The scaler of fp16 training."""
        return torch.amp.GradScaler("cuda")

    def build_ema(self, model: nn.Module) -> Any:
        """What averages the weights of `model`, see `AveragedWeights`; None without."""
        decay = self.hparams.model_ema_decay
        return None if decay is None else AveragedWeights(model, decay, self.first_batch // self.aggregation_frequency)

    def autocast(self) -> AbstractContextManager:
        """The precision of the forward pass."""
        return autocast(self.hparams.amp, self.context.device)

    def clip_gradients(self) -> Clip | None:
        """What clips the gradients of the parameters that it is given, in place; None to leave them."""
        limit = self.hparams.clip_grad
        return None if limit is None else lambda parameters: nn.utils.clip_grad_norm_(parameters, limit)

    def prepare_schedule(self) -> None:
        """Builds the learning rate's schedule, after the optimizer."""

    def warmup_batches(self) -> float:
        """For how many batches the schedule raises the learning rate."""
        return 0

    def own_state(self) -> dict[str, Any]:
        """Plain values and tensors that must outlive a restart, besides weights and buffers."""
        return python_state(self.plain_model, self.python_attributes)

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Continues from what `own_state` gave."""
        restore_python_state(self.plain_model, state)

    # --- hooks: moments of a run --------------------------------------------------------------------------

    def begin_training(self, folder: Path) -> None:
        """Before the first batch of this start. `folder` takes what a library writes."""

    def before_batch(self, number: int) -> None:
        """Before batch `number`, from 0. Sets its learning rate."""

    def after_batch(self, number: int) -> None:
        """After the optimizer's step of batch `number`."""

    def begin_validation(self, loader: DataLoader) -> None:
        """Before the first batch of a validation, on every slot."""

    def synchronize_buffers(self) -> None:
        """Gives every slot the chief's running statistics, which the checkpoint holds. DDP aligns them only at the next
        training step, and those of the averaged model never."""
        if self.slots > 1:
            models = dict.fromkeys((self.plain_model, self.evaluation_model))
            broadcast_from_chief(buffer for model in models for buffer in model.buffers())

    def end_validation(self) -> None:
        """After a validation that was not cut short, on every slot."""

    def end_training(self) -> None:
        """After the last batch of the whole training, once it is validated and saved."""

    # --- what a detector can use ---------------------------------------------------------------------------

    def given_batch_size(self, own: Callable[[], int]) -> int:
        """The global batch size; `own()` if the experiment config gives none. To detect, any number of slots is
        allowed, and it is rounded up to a multiple of them."""
        if self.hparams.global_batch_size is not None:
            return self.hparams.global_batch_size
        slots = 1 if self.for_training else self.slots
        return -(-own() // slots) * slots

    @cached_property
    def repeats(self) -> np.ndarray | None:
        """(samples,) how often each training sample comes per epoch; None for once each."""
        if self.data.repeat_threshold is None:
            return None
        return repeat_factors(*self.training_labels(), len(self.training_groups()), self.data.repeat_threshold)

    def augmenter(self, layout: Layout) -> DataAugmenter | None:
        """What changes the training images as `data.augment` says; None without it."""
        augment = self.data.augment
        if augment is None:
            return None
        given = [name for name in self.replaced_by_augment if name in self.experiment.config["hyperparameters"]]
        if given and self.rank == 0:
            logger.warning("data.augment replaces hyperparameters.%s, which has no effect", " and ".join(given))
        if self.only_flips_from == 0 and self.rank == 0:
            logger.warning("data.augment.off_for_last has as many epochs as the training, which only flips images")
        return DataAugmenter(augment, layout, self.only_flips_from, mirrored_keypoints(self.categories))

    @property
    def only_flips_from(self) -> int | None:
        """The first epoch of `data.augment.off_for_last`; None without it."""
        augment = self.data.augment
        if augment is None or augment.off_for_last is None:
            return None
        return max(self.total_batches // self.batches_per_epoch - augment.off_for_last.epochs, 0)

    def input_scale_of_batch(self, number: int) -> float:
        """The factor of the input's size in training batch `number`: `data.augment.multi_scale`. All slots have the
        same."""
        augment, last = self.data.augment, self.only_flips_from
        if augment is None or (last is not None and number // self.batches_per_epoch >= last):
            return 1.0
        return float(np.random.default_rng([self.seed, number, 6]).uniform(*augment.multi_scale))

    @cached_property
    def class_weights(self) -> torch.Tensor | None:
        """(K,) float32 on the device: how much the objects of each label count in the classification loss; None for
        all alike.

        Raises:
            UserError: a name is not a category, or this detector cannot weigh categories.
        """
        given = self.hparams.class_weights
        if given is None or not self.for_training:
            return None
        if not self.weighs_categories:
            raise no_class_weights("this detector")
        weights = class_weights(given, self.categories, self.training_labels()[1])
        return None if weights is None else weights.to(self.context.device)

    @property
    def batches_evaluations(self) -> bool:
        """Whether a library that evaluates one image at a time gets batches of one size, which need no padding. Only a
        GPU is faster with them."""
        return self.data.fast_images and self.context.device.type == "cuda"

    def evaluated_ids(self, data: SplitData) -> np.ndarray:
        """The ids of `evaluated_images`."""
        return data.annotations.image_ids[list(self.evaluated_images(len(data.annotations)))]

    def seed_image(self, number: int, position: int) -> None:
        """Seeds random numbers for the image at a position of this slot's part of training batch `number`."""
        seed_all(self.seed, number, self.rank * self.per_slot_batch_size + position, 2)
