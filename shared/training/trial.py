"""All that the detectors' trials have in common: data, the step, validation, what a checkpoint holds."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from determined.pytorch import MetricReducer, PyTorchCallback, PyTorchTrial, PyTorchTrialContext
from torch import nn
from torch.utils.data import DataLoader, Dataset

from shared.data.dataset import BadImages
from shared.data.input_scale import InputScale
from shared.data.loading import Batch, NotingSkipped, PrefetchLoader, start_workers, to_device
from shared.data.samplers import EvaluationBatchSampler, TrainingBatchSampler
from shared.data.seeding import seed_all
from shared.errors import UserError
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator, summary_metrics
from shared.experiment import (
    DataConfig,
    Length,
    SplitData,
    open_split,
    open_train_and_val,
    parse_data,
    parse_schedule,
    parse_searcher_metric,
    parse_section,
    parse_seed,
    per_slot_batch_size,
)
from shared.training.checkpoints import CATEGORIES_FILE
from shared.training.determined_fixes import (
    FiniteSearcherMetric,
    PlainRandomState,
    SearcherStop,
    on_cluster,
    wrap_model,
)
from shared.training.stopping import StopRequest, outlive_signals
from shared.training.training_metrics import DivergedError, TrainingMetrics, diverged

logger = logging.getLogger(__name__)


class DetectionTrial(PyTorchTrial):
    """A detector's trial: subclasses say what is theirs, in the methods below that are abstract.

    Args:
        first_batch: batches already trained; Determined's count where None.
        for_training: False for an evaluation or prediction, which opens no training data.
        categories: without training, the COCO categories of the checkpoint; those of the validation data, or of the
            pretrained weights, where None.

    Attributes:
        hparams: the subclass's `hyperparameters_class`, filled from the config.
        categories: COCO categories; the position is the label.
        model: the training model, on its device, in DDP where there are several slots.
        ema: `.module` is the averaged model and `.update(model)` averages; None without.
        scaler: the GradScaler of fp16 training; None without.
        batches_per_epoch: of all slots together.
        batches_trained: so far, those before a resume too.
        local_callbacks, on_batch_end: what a run off the cluster adds, set before `fit`.
        stop_request: of a run off the cluster, by a signal; None on one.
    """

    hyperparameters_class: type
    data_class: type[DataConfig] = DataConfig
    iou_types: tuple[str, ...] = ("bbox",)
    find_unused_parameters: bool = False
    """Whether a step may leave parameters without a gradient, which DDP has to look for then."""
    path_hyperparameters: tuple[str, ...] = ()
    """Hyperparameters that may be paths, relative to where the run is started."""
    without_pretrained: ClassVar[dict[str, Any]] = {}
    """The hyperparameters of a model whose weights a checkpoint will give."""
    picture_format: str = "png"
    """What `predict` writes where nothing else is said: "png" or "pdf"."""
    pretrained_categories: ClassVar[list[dict]] = []
    """COCO categories that the pretrained weights detect, where no annotation file says more."""

    def __init__(
        self,
        context: PyTorchTrialContext,
        first_batch: int | None = None,
        for_training: bool = True,
        categories: list[dict] | None = None,
    ):
        self.context = context
        self.config = context.get_experiment_config()
        self.rank, self.slots = context.distributed.rank, context.distributed.size
        self.for_training = for_training
        self.hparams = parse_section(context.get_hparams(), self.hyperparameters_class, "hyperparameters")
        self.data = parse_data(self.config, self.data_class)
        self.read_own_config()
        self.schedule = parse_schedule(self.config, self.default_lengths())
        self.searcher_metric = parse_searcher_metric(self.config, self.reported_metrics())
        self.global_batch_size = self.hparams.global_batch_size
        self.per_slot_batch_size = per_slot_batch_size(self.global_batch_size, self.slots)
        self.seed = context.get_trial_seed() if on_cluster() else parse_seed(self.config)
        self.first_batch = context.get_initial_batch() if first_batch is None else first_batch
        self.aggregation_frequency = (self.config.get("optimizations") or {}).get("aggregation_frequency") or 1
        self.batches_trained = self.first_batch

        self.bad_images = BadImages(skip=self.data.on_bad_image == "skip")
        if self.for_training:
            self.train_data, self.val_data = self.open_train_and_val()
            self.categories = self.train_data.categories
            self.batches_per_epoch = len(self._training_batches())
            self.total_batches = self.schedule.max_length.batches(self.batches_per_epoch, self.global_batch_size)
        else:
            self.categories = categories if categories is not None else self.known_categories()

        context.experimental.disable_dataset_reproducibility_checks()  # our sampler goes on where it was
        context.experimental.disable_auto_to_device()  # PrefetchLoader copies, and does not wait for it

        seed_all(self.seed)  # the same initial weights on every slot
        self.scaler = self.build_scaler()
        self.model = wrap_model(context, self.build_model(), self.find_unused_parameters)
        self.plain_model = self.model.module if self.slots > 1 else self.model
        self.ema = self.build_ema(self.plain_model)
        self.training_metrics = context.wrap_reducer(
            TrainingMetrics(counts_skipped=self.bad_images.skip), for_validation=False
        )
        self.local_callbacks: dict[str, PyTorchCallback] = {}
        self.on_batch_end: Callable[[], None] = lambda: None
        self.stop_request: StopRequest | None = None
        self.category_ap: dict[str, float] = {}
        self.last_validation: dict[str, float] = {}
        if self.for_training:
            self.optimizer = context.wrap_optimizer(self.build_optimizer(self.plain_model))
            self.prepare_schedule()
            self.evaluator = context.wrap_reducer(self.build_evaluator(self.val_data), for_training=False)

    # --- what a detector says of itself ---------------------------------------------------------------

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The training model on the host, with its initial or pretrained weights."""

    @abstractmethod
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of `model`'s parameters."""

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

    @classmethod
    def hyperparameters_of_checkpoint(cls, checkpoint: Path) -> dict[str, Any]:
        """What takes the place of a checkpoint's hyperparameters, to detect with it."""
        return cls.without_pretrained

    @classmethod
    def input_scale(cls, config: dict[str, Any]) -> InputScale | None:
        """How large objects will be for the model of an experiment config; None where that cannot be told."""
        return None

    def read_own_config(self) -> None:
        """Reads the detector's own configuration, which `hparams` names; `data` and `config` are there too."""

    def default_lengths(self) -> dict[str, Length]:
        """What the detector's own configuration says of `searcher.max_length`, `min_validation_period` and
        `min_checkpoint_period`; the experiment config wins."""
        return {}

    def reported_metrics(self) -> list[str] | None:
        """The names that a validation reports, one of which the searcher goes by; None where they are not known."""
        return [f"{iou_type}_{name}" for iou_type in self.iou_types for name in summary_metrics(iou_type)]

    def save_own_config(self, folder: Path) -> None:
        """Writes the detector's own configuration, resolved, into the run's or a checkpoint's folder."""

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint must hold of the detector beside weights and buffers: plain values and tensors."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes back what `own_state` gave."""

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

    def after_batch(self, number: int) -> None:
        """After the optimizer's step of batch `number`."""

    def clip_gradients(self) -> Callable[[Any], None] | None:
        """Clips the gradients of the parameters it is given, in place; None to leave them."""
        return None

    def autocast(self) -> torch.autocast:
        """The precision of the forward pass."""
        return torch.autocast(self.context.device.type, enabled=False)

    # --- data ----------------------------------------------------------------------------------------

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

    @abstractmethod
    def training_dataset(self) -> Dataset:
        """The training samples, by `SampleKey`."""

    @abstractmethod
    def evaluation_dataset(self, data: SplitData) -> Dataset:
        """The samples to detect on, by index."""

    @property
    def evaluation_batch_size(self) -> int:
        """Images a batch that a slot detects on."""
        return self.per_slot_batch_size

    def build_training_data_loader(self) -> PrefetchLoader:
        loader = self._loader(self.training_dataset(), self._training_batches(), training=True)
        self.training_loader = PrefetchLoader(
            loader, self.context.device, self._prepare_training_batch, self.first_batch
        )
        return self.training_loader

    def build_validation_data_loader(self) -> DataLoader:
        self.validation_loader = self.evaluation_loader(self.val_data)
        if self.data.workers > 0:
            start_workers(self.validation_loader)
        return self.validation_loader

    def evaluation_loader(self, data: SplitData) -> DataLoader:
        """This slot's share of the images to evaluate on, as batches on the host."""
        dataset = self.evaluation_dataset(data)
        indices = self.evaluated_images(len(dataset))
        sampler = EvaluationBatchSampler(indices, self.evaluation_batch_size, self.rank, self.slots, self._stops_here)
        return self._loader(dataset, sampler, training=False)

    def _stops_here(self) -> bool:
        return self.stop_request is not None and self.stop_request.in_validation(self.batches_trained)

    def evaluated_images(self, count: int) -> range:
        """Which of the validation images count: all, where the detector says nothing else."""
        return range(count)

    def build_evaluator(self, data: SplitData) -> MetricReducer:
        """The evaluator over the images of `evaluated_images`: `update` takes what `detect` returns."""
        image_ids = data.annotations.image_ids[list(self.evaluated_images(len(data.annotations)))]
        return CocoEvaluator(data.annotations, self.iou_types, image_ids, compute_here=self.rank == 0)

    def _training_batches(self) -> TrainingBatchSampler:
        groups = self.training_groups()
        return TrainingBatchSampler(
            groups, self.per_slot_batch_size, self.seed, self.rank, self.slots, self.first_batch
        )

    def _loader(self, dataset: Dataset, batches: Any, training: bool) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.data.workers,
            persistent_workers=self.data.workers > 0,  # or each validation forks again: slow, and see start_workers
            collate_fn=NotingSkipped(self.collate(training), self.bad_images),
            pin_memory=self.context.device.type == "cuda",
            worker_init_fn=outlive_signals,
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

        try:
            with self.autocast():
                losses = self.losses(self.model, batch)
        except FloatingPointError as error:  # Detectron2 looks itself
            raise diverged(number, batch.image_ids) from error
        loss = losses["loss"]
        self.context.backward(loss if self.scaler is None else self.scaler.scale(loss))
        self.context.step_optimizer(self.optimizer, clip_grads=self._clip(), scaler=self.scaler)
        if (number + 1) % self.aggregation_frequency == 0:
            if self.scaler is not None:
                self.scaler.update()
            if self.ema is not None:
                self.ema.update(self.plain_model)
        self.training_metrics.update(losses, number, batch.image_ids, len(batch.skipped))
        self.training_metrics.waiting = self.training_loader.waiting
        self.batches_trained = number + 1
        self.after_batch(number)
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
        if batch.skipped:
            self.evaluator.skip(batch.skipped)
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
            "own": self.trial.own_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.trial.ema is not None and state["ema"] is not None:
            self.trial.ema.module.load_state_dict(state["ema"])
        self.trial.last_validation = dict(state["last_validation"])
        self.trial.load_own_state(state["own"])

    def on_training_workload_end(self, avg_metrics: dict[str, Any], batch_metrics: list) -> None:
        # every report, validation and save comes after this
        self.trial.training_metrics.raise_if_diverged()
        self.trial.training_loader.waiting = 0.0

    def on_validation_start(self) -> None:
        self.trial.synchronize_buffers()

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        # one chart a category would bury the WebUI's metrics: the master gets the summary
        trial = self.trial
        if trial.stop_request is not None:
            trial.stop_request.look()
            if trial.stop_request.after is not None:  # of some of the images only
                return
        if trial.searcher_metric.name not in metrics:
            raise UserError(
                f"searcher.metric: {trial.searcher_metric.name!r} is not among the metrics that a validation gives: "
                f"{', '.join(map(repr, sorted(metrics)))}"
            )
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
        self.trial.save_own_config(Path(checkpoint_dir))
