"""All that the detectors' trials have in common: data, the step, validation, what a checkpoint holds."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from determined.pytorch import PyTorchCallback, PyTorchTrial, PyTorchTrialContext
from torch import nn
from torch.utils.data import DataLoader

from shared.checkpoints import CATEGORIES_FILE
from shared.dataset import CocoDetection, Transform
from shared.detections import Detections
from shared.determined_fixes import FiniteSearcherMetric, PlainRandomState, SearcherStop, on_cluster
from shared.evaluation import SUMMARY_METRICS, CocoEvaluator
from shared.experiment import (
    open_train_and_val,
    parse_data,
    parse_schedule,
    parse_searcher_metric,
    parse_section,
    parse_seed,
    per_slot_batch_size,
)
from shared.loading import Batch, PrefetchLoader, to_device
from shared.samplers import EvaluationBatchSampler, TrainingBatchSampler
from shared.seeding import seed_all
from shared.training_metrics import DivergedError, TrainingMetrics

logger = logging.getLogger(__name__)


class DetectionTrial(PyTorchTrial):
    """A detector's trial: subclasses say what is theirs, in the methods below that are abstract.

    Args:
        categories: COCO categories of an evaluation or prediction, which opens no training data; from the
            training data where None.
        first_batch: batches already trained; Determined's count where None.

    Attributes:
        hparams: the subclass's `hyperparameters_class`, filled from the config.
        categories: COCO categories; the position is the label.
        model: the training model, on its device, in DDP where there are several slots.
        ema: `.module` is the averaged model and `.update(model)` averages; None without.
        scaler: the GradScaler of fp16 training; None without.
        batches_per_epoch: of all slots together.
        batches_trained: so far, those before a resume too.
        local_callbacks, on_batch_end: what a run off the cluster adds, set before `fit`.
    """

    hyperparameters_class: type
    iou_types: tuple[str, ...] = ("bbox",)
    path_hyperparameters: tuple[str, ...] = ()
    """Hyperparameters that may be paths, relative to where the run is started."""
    without_pretrained: ClassVar[dict[str, Any]] = {}
    """The hyperparameters of a model whose weights a checkpoint will give."""
    pretrained_categories: ClassVar[list[dict]] = []
    """COCO categories that the pretrained weights detect, where no annotation file says more."""

    def __init__(
        self, context: PyTorchTrialContext, categories: list[dict] | None = None, first_batch: int | None = None
    ):
        self.context = context
        self.config = context.get_experiment_config()
        self.rank, self.slots = context.distributed.rank, context.distributed.size
        self.data = parse_data(self.config)
        self.schedule = parse_schedule(self.config)
        reported = [f"{iou_type}_{name}" for iou_type in self.iou_types for name in SUMMARY_METRICS]
        self.searcher_metric = parse_searcher_metric(self.config, reported)
        self.hparams = parse_section(context.get_hparams(), self.hyperparameters_class, "hyperparameters")
        self.global_batch_size = self.hparams.global_batch_size
        self.per_slot_batch_size = per_slot_batch_size(self.global_batch_size, self.slots)
        self.seed = context.get_trial_seed() if on_cluster() else parse_seed(self.config)
        self.first_batch = context.get_initial_batch() if first_batch is None else first_batch
        self.aggregation_frequency = (self.config.get("optimizations") or {}).get("aggregation_frequency") or 1
        self.batches_trained = self.first_batch
        self.for_training = categories is None

        if self.for_training:
            self.train_data, self.val_data = open_train_and_val(self.data)
            self.categories = self.train_data.annotations.categories
            self.batches_per_epoch = len(self._training_batches())
            self.total_batches = self.schedule.max_length.batches(self.batches_per_epoch, self.global_batch_size)
            if self.rank == 0 and (count := int(self.train_data.annotations.without_area.sum())):
                logger.warning("data.train: %d boxes without area are left out of the training targets", count)
        else:
            self.categories = categories

        context.experimental.disable_dataset_reproducibility_checks()  # our sampler goes on where it was
        context.experimental.disable_auto_to_device()  # PrefetchLoader copies, and does not wait for it

        seed_all(self.seed)  # the same initial weights on every slot
        self.scaler = self.build_scaler()
        self.model = context.wrap_model(self.build_model())
        self.plain_model = self.model.module if self.slots > 1 else self.model
        self.ema = self.build_ema(self.plain_model)
        self.training_metrics = context.wrap_reducer(TrainingMetrics(), for_validation=False)
        self.local_callbacks: dict[str, PyTorchCallback] = {}
        self.on_batch_end: Callable[[], None] = lambda: None
        self.category_ap: dict[str, float] = {}
        self.last_validation: dict[str, float] = {}
        if self.for_training:
            self.optimizer = context.wrap_optimizer(self.build_optimizer(self.plain_model))
            self.prepare_schedule()
            self.evaluator = context.wrap_reducer(self.build_evaluator(self.val_data.annotations), for_training=False)

    # --- what a detector says of itself ---------------------------------------------------------------

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The training model on the host, with its initial or pretrained weights."""

    @abstractmethod
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of `model`'s parameters."""

    @abstractmethod
    def train_transform(self) -> Transform:
        """From image and record to a training sample."""

    @abstractmethod
    def val_transform(self) -> Transform:
        """From image and record to a sample to detect on."""

    @abstractmethod
    def collate(self, training: bool) -> Callable[[list], Batch]:
        """From samples to a batch on the host."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Scalars on the device; "loss" is the one to minimise. `model` is the one that DDP wraps."""

    @abstractmethod
    def detect(self, model: nn.Module, batch: Batch) -> list[Detections]:
        """The detections of each image of a prepared batch."""

    @abstractmethod
    def check_pretrained(self) -> None:
        """Raises UserError where the config's weights detect nothing, and no checkpoint is given."""

    def prepare(self, batch: Batch, training: bool) -> Batch:
        """Work on a batch on the device, before `losses` and `detect`."""
        return batch

    def build_scaler(self) -> Any:
        """A GradScaler, wrapped by the context, for fp16; None without."""
        return None

    def build_ema(self, model: nn.Module) -> Any:
        """Averages the weights of `model`; None without."""
        return None

    def prepare_schedule(self) -> None:
        """Builds the learning rate's schedule, once the optimizer is there."""

    def before_batch(self, number: int) -> None:
        """Sets the learning rate of batch `number`, from 0."""

    def clip_gradients(self) -> Callable[[Any], None] | None:
        """Clips the gradients of the parameters it is given, in place; None to leave them."""
        return None

    def autocast(self) -> torch.autocast:
        """The precision of the forward pass."""
        return torch.autocast(self.context.device.type, enabled=False)

    # --- data ----------------------------------------------------------------------------------------

    def build_training_data_loader(self) -> PrefetchLoader:
        transform = self.train_transform()
        dataset = CocoDetection(self.train_data.annotations, self.train_data.images, transform, self.seed, True)
        loader = self._loader(dataset, self._training_batches(), training=True)
        self.training_loader = PrefetchLoader(
            loader, self.context.device, self._prepare_training_batch, self.first_batch
        )
        return self.training_loader

    def build_validation_data_loader(self) -> DataLoader:
        return self.evaluation_loader(self.val_data)

    def evaluation_loader(self, data: Any) -> DataLoader:
        """This slot's share of the images to evaluate on, as batches on the host."""
        dataset = CocoDetection(data.annotations, data.images, self.val_transform(), self.seed, False)
        indices = self.evaluated_images(len(dataset))
        sampler = EvaluationBatchSampler(indices, self.per_slot_batch_size, self.rank, self.slots)
        return self._loader(dataset, sampler, training=False)

    def evaluated_images(self, count: int) -> range:
        """Which of the validation images count: all, where the detector says nothing else."""
        return range(count)

    def build_evaluator(self, annotations: Any) -> CocoEvaluator:
        """The evaluator over the images of `evaluated_images`."""
        image_ids = annotations.image_ids[list(self.evaluated_images(len(annotations)))]
        return CocoEvaluator(annotations, self.iou_types, image_ids, compute_here=self.rank == 0)

    def _training_batches(self) -> TrainingBatchSampler:
        count = len(self.train_data.annotations)
        return TrainingBatchSampler(count, self.per_slot_batch_size, self.seed, self.rank, self.slots, self.first_batch)

    def _loader(self, dataset: CocoDetection, batches: Any, training: bool) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.data.workers,
            collate_fn=self.collate(training),
            pin_memory=self.context.device.type == "cuda",
        )

    def _prepare_training_batch(self, batch: Batch, number: int) -> Batch:
        seed_all(self.seed, self.rank, number, 0)
        return self.prepare(batch, training=True)

    def get_batch_length(self, batch: Batch) -> int:
        return len(batch)

    # --- the step ------------------------------------------------------------------------------------

    def train_batch(self, batch: Batch, epoch_idx: int, batch_idx: int) -> dict[str, Any]:
        # off the cluster Determined counts from 0 after a resume too
        number = self.first_batch + batch_idx - self.context.get_initial_batch()
        seed_all(self.seed, self.rank, number, 1)  # dropout and the like: no two slots alike, and a resume exact
        self.before_batch(number)

        with self.autocast():
            losses = self.losses(self.model, batch)
        loss = losses["loss"]
        self.context.backward(loss if self.scaler is None else self.scaler.scale(loss))
        self.context.step_optimizer(self.optimizer, clip_grads=self._clip(), scaler=self.scaler)
        if (number + 1) % self.aggregation_frequency == 0:
            if self.scaler is not None:
                self.scaler.update()
            if self.ema is not None:
                self.ema.update(self.plain_model)
        self.training_metrics.update(losses, number, batch.image_ids)
        self.training_metrics.waiting = self.training_loader.waiting
        self.batches_trained = number + 1
        self.on_batch_end()
        # a number of the host: of each tensor in here Determined makes a synchronisation a step
        return {"lr": self.optimizer.param_groups[0]["lr"]}

    def _clip(self) -> Callable[[Any], None] | None:
        clip = self.clip_gradients()
        if clip is None or self.scaler is None:
            return clip

        def unscale_and_clip(parameters: Any) -> None:
            self.scaler.unscale_(self.optimizer)
            clip(parameters)

        return unscale_and_clip

    # --- validation ----------------------------------------------------------------------------------

    @property
    def evaluation_model(self) -> nn.Module:
        """The model that validates, is best and predicts: the averaged one where there is one."""
        return self.plain_model if self.ema is None else self.ema.module

    def evaluate_batch(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        self.evaluator.update(self.detect_on_host_batch(batch))
        return {}

    @torch.no_grad()
    def detect_on_host_batch(self, batch: Batch) -> list[Detections]:
        """The detections of a batch as the evaluation loader yields it."""
        model = self.evaluation_model.eval()
        batch = self.prepare(to_device(batch, self.context.device), training=False)
        with self.autocast():
            return self.detect(model, batch)

    def synchronize_buffers(self) -> None:
        """Gives every slot the chief's running statistics, which the checkpoint holds: DDP aligns them only at
        the next training step, and the averaged model's never."""
        if self.slots > 1:
            for model in (self.plain_model, self.evaluation_model):
                for buffer in model.buffers():
                    torch.distributed.broadcast(buffer, src=0)

    def build_callbacks(self) -> dict[str, PyTorchCallback]:
        """The trial's own callbacks; the searcher's metric is made finite last."""
        callbacks: dict[str, PyTorchCallback] = {
            "random_state": PlainRandomState(),
            "training": _TrainingState(self),
            **self.local_callbacks,
        }
        if on_cluster():
            callbacks["searcher_stop"] = SearcherStop(self.context)
        callbacks["searcher_metric"] = FiniteSearcherMetric(self.searcher_metric)
        return callbacks


class _TrainingState(PyTorchCallback):
    """The averaged weights in the checkpoint, the check for divergence, the split of the metrics."""

    def __init__(self, trial: DetectionTrial):
        self.trial = trial

    def state_dict(self) -> dict[str, Any]:
        ema = self.trial.ema
        return {
            "ema": None if ema is None else ema.module.state_dict(),
            "last_validation": {name: float(value) for name, value in self.trial.last_validation.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.trial.ema is not None and state["ema"] is not None:
            self.trial.ema.module.load_state_dict(state["ema"])
        self.trial.last_validation = dict(state["last_validation"])

    def on_training_workload_end(self, avg_metrics: dict[str, Any], batch_metrics: list) -> None:
        # every report, validation and save comes after this
        self.trial.training_metrics.raise_if_diverged()
        self.trial.training_loader.waiting = 0.0

    def on_validation_start(self) -> None:
        self.trial.synchronize_buffers()

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        # one chart a category would bury the WebUI's metrics: the master gets the summary
        trial = self.trial
        trial.category_ap = {name: metrics.pop(name) for name in list(metrics) if "_AP/" in name}
        trial.last_validation = {name: float(value) for name, value in metrics.items()}
        if on_cluster() and trial.rank == 0:
            writer = trial.context.get_tensorboard_writer()
            for name, value in trial.category_ap.items():
                writer.add_scalar(f"Determined/{name}", float(value), trial.batches_trained)

    def on_checkpoint_save_start(self, checkpoint: dict[str, Any]) -> None:
        weights = [p for p in self.trial.plain_model.parameters() if p.is_floating_point()]
        if not torch.stack([p.detach().isfinite().all() for p in weights]).all():
            raise DivergedError("the weights are not finite, and were not saved; the last checkpoint is from before")

    def on_checkpoint_write_end(self, checkpoint_dir: str) -> None:
        (Path(checkpoint_dir) / CATEGORIES_FILE).write_text(json.dumps(self.trial.categories))
