"""A detector as a Determined trial: how it is built from a config, and how it trains and validates on a batch.

`shared.training.detector` says what a detector defines. `shared.training.engine` has the loop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from determined.pytorch import PyTorchTrialContext
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader, Dataset

from shared.config.experiment import Experiment, experiment_of, per_slot_batch_size
from shared.data.dataset import BadImages, CocoDetection, seed_all
from shared.data.loading import (
    Batch,
    EvaluationBatchSampler,
    NotingSkipped,
    PrefetchLoader,
    described,
    size_groups,
    start_workers,
    to_device,
)
from shared.data.open import SplitData
from shared.environment import keep_freed_memory, on_cluster
from shared.errors import UserError, count_of, out_of_memory_as_error
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator
from shared.training import switches
from shared.training.detector import Detector
from shared.training.hang import Phase, Watch
from shared.training.processes import first_on_each_machine, on_chief
from shared.training.resume import BuiltOptimizer, refused_values
from shared.training.saving import python_state
from shared.training.stopping import begin_worker, periods_of
from shared.training.training_metrics import STEPS_A_SCALE_MAY_SKIP, TrainingMetrics, diverged
from shared.training.validation import (
    Validation,
    ValidationLoss,
    check_losses,
    collate_with_loss,
    giving_losses,
    uncompiled,
    with_loss_sample,
)

logger = logging.getLogger(__name__)

_PICTURES = 4  # of a validation, to draw


class DetectionTrial(Detector):
    """A detector as a Determined trial. Our engine trains it, and so does Determined's own `pytorch.Trainer`.

    `schedule` says when it reports, validates and saves; `periods` is the same in batches.
    """

    # --- construction -------------------------------------------------------------------------------------

    def __init__(
        self,
        context: PyTorchTrialContext,
        experiment: Experiment | None = None,
        for_training: bool = True,
        categories: list[dict] | None = None,
        begin: bool = True,
        watch: Watch | None = None,
    ):
        """
        Args:
            experiment: None reads the context's, as Determined's own loop needs it.
            categories: to detect, those of the checkpoint; None for `known_categories`.
            begin: calls `open_data` and `build`. Otherwise the caller does.
            watch: over hangs, to which the trial reports how far it is.
        """
        self.context = context
        self.experiment = experiment or experiment_of(
            context.get_experiment_config(), context.get_hparams(), self.sections()
        )
        distributed = context.distributed
        self.rank, self.slots = distributed.rank, distributed.size
        self.for_training = for_training
        self.hparams = deepcopy(self.experiment.hyperparameters)  # a detector's own config completes them
        self.validates_loss = for_training and self.hparams.validation_loss
        self.data = self.experiment.data
        self.read_own_config()
        if for_training:
            self._check_own_config()
        self.schedule = self.experiment.schedule.with_defaults(self.default_lengths(), self.validation_times())
        # detection does not need it
        self.searcher_metric = self.experiment.searcher_metric(self.reported_metrics() if for_training else None)
        self.global_batch_size = self.hparams.global_batch_size
        self.per_slot_batch_size = per_slot_batch_size(self.global_batch_size, self.slots)
        self.seed = context.get_trial_seed() if on_cluster() else self.experiment.seed
        self.first_batch = self.batches_trained = context.get_initial_batch()
        self.aggregation_frequency = self.experiment.aggregation_frequency
        self.last_validation = {}
        self.bad_images = BadImages(skip=self.data.on_bad_image == "skip")
        self.watch = watch or Watch()
        self.categories = categories
        self.frozen: str | None = None
        self._pictured: list[Detections] = []
        self._chief_python_state: Mapping[str, Any] | None = None
        context.experimental.disable_dataset_reproducibility_checks()  # our sampler continues where it was
        context.experimental.disable_auto_to_device()  # PrefetchLoader copies, and does not wait for it
        if begin:
            self.open_data()
            self.build()

    def _check_own_config(self) -> None:
        if self.data.repeat_threshold is not None and (own := self.repeats_by_itself()):
            raise UserError(
                f"data.repeat_threshold: the config repeats images itself, by {own}. Fix: remove one of the two"
            )
        if self.validates_loss and not self.evaluates_coco:
            raise UserError(
                "hyperparameters.validation_loss: the detector's own library evaluates this config, on data without "
                "targets. Fix: omit validation_loss"
            )

    def open_data(self) -> None:
        """Opens and checks the data to train and validate on. To detect, looks up the categories only."""
        if self.for_training:
            self.train_data, self.val_data = first_on_each_machine(self.context.distributed, self.open_train_and_val)
            self.categories = self.train_data.categories
        elif self.categories is None:
            self.categories = self.known_categories()

    def build(self) -> None:
        """Builds the model; for training also what trains and validates it. The data is open."""
        if self.for_training:
            self._read_periods()
            self.class_weights  # noqa: B018 what it refuses, before the model is built
            if self.context.device.type == "cpu":
                keep_freed_memory()
        seed_all(self.seed)  # the same initial weights on every slot
        self.scaler = self._build_scaler()
        self.plain_model = self._switched(self.build_model())
        self.model = switches.wrap_model(self.context, self.plain_model, self.find_unused_parameters)
        self.ema = self.build_ema(self.plain_model)
        if self.for_training:
            self._build_training()

    def _read_periods(self) -> None:
        self.batches_per_epoch = len(self.training_batches())
        of_images = self.batches_per_epoch, self.global_batch_size
        self.periods = periods_of(self.schedule, *of_images, self.aggregation_frequency)
        self.total_batches = self.periods.total
        validates_before_the_end = self.periods.validation is not None or self.periods.validation_changes
        if self.hparams.early_stopping is not None and not validates_before_the_end:
            raise UserError(
                "hyperparameters.early_stopping: the only validation is at the end. Fix: give min_validation_period, "
                "or omit early_stopping"
            )

    def _build_training(self) -> None:
        context, distributed = self.context, self.context.distributed
        metrics = TrainingMetrics(counts_skipped=self.bad_images.skip)
        self.training_metrics = context.wrap_reducer(metrics, for_validation=False)
        with refused_values("optimizer or the learning rate's schedule"):
            self.optimizer = context.wrap_optimizer(switches.fuse(self.build_optimizer(self.plain_model)))
            self.built_optimizer = BuiltOptimizer.of(self.optimizer, self.plain_model)
            self.built_scaler = None if self.scaler is None else self.scaler.state_dict()
            self.prepare_schedule()
        if self.rank == 0 and (warmup := self.warmup_batches()) > self.total_batches:
            logger.warning(
                "the warm-up has %d batches and the training %d, so the learning rate never reaches the config's. Fix: "
                "train longer, or shorten the warm-up",
                *(warmup, self.total_batches),
            )
        self.evaluator = context.wrap_reducer(self.build_evaluator(self.val_data), for_training=False)
        if isinstance(self.evaluator, CocoEvaluator):
            on_chief(distributed, lambda: self.evaluator.open_truth() and None)  # refuses what it could not score
        if self.validates_loss:
            losses = ValidationLoss(self.evaluated_ids(self.val_data), distributed.gather)
            self.validation_loss = context.wrap_reducer(losses, for_training=False)
            on_chief(distributed, self._check_validation_loss)
        if self.rank == 0:
            logger.info("\n%s", tabulate(self.summary_lines(), tablefmt="plain"))

    def _build_scaler(self) -> torch.amp.GradScaler | None:
        if self.hparams.amp != "fp16" or not self.for_training:
            return None
        if self.context.device.type != "cuda":
            raise UserError(f"{self.fp16_key}: fp16 needs a GPU. Fix: remove it, or give hyperparameters.amp: bf16")
        return self.context.wrap_scaler(self.grad_scaler())

    def _switched(self, model: nn.Module) -> nn.Module:
        """The model with `amp`, `channels_last`, `sync_bn`, `freeze` and `torch_compile`."""
        hparams, device = self.hparams, self.context.device
        if hparams.channels_last:
            nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
        if hparams.amp == "bf16" and device.type == "cpu" and self.for_training:
            switches.train_depthwise_in_float32(model)
        if hparams.sync_bn and self.slots > 1:
            if device.type != "cuda":
                raise UserError("hyperparameters.sync_bn: PyTorch synchronizes batch norm on GPUs only. Fix: false")
            model = self.with_sync_bn(model)
        if hparams.freeze and self.for_training:
            self.frozen = switches.freeze(self.detector(model), hparams.freeze)
        if hparams.torch_compile and self.for_training:
            for part in self.compiled_parts(model):
                part.compile()
        return model

    # --- used by the engine and the commands --------------------------------------------------------------

    @property
    def evaluation_model(self) -> nn.Module:
        """The model that validates, is saved as the best and predicts: the averaged one if there is one."""
        return self.plain_model if self.ema is None else self.ema.module

    def evaluation_loader(
        self,
        data: SplitData,
        with_losses: bool = False,
        stop: Callable[[], bool] = lambda: False,
        all_images: bool = False,
        is_share: bool = False,
        in_process: bool = False,
    ) -> DataLoader:
        """This slot's share of the images to evaluate on, as batches on the host.

        Args:
            stop: asked before each batch but the first; True omits the rest.
            all_images: also those that `evaluated_images` omits.
            is_share: `data` has this slot's share alone.
            in_process: the same, and without loader workers.
        """
        dataset, collate = self.evaluation_dataset(data), self.collate(training=False)
        if isinstance(dataset, CocoDetection):
            dataset = replace(dataset, replaces=False)
        if with_losses:
            dataset = self._with_losses(dataset, data)
            collate = partial(collate_with_loss, collate, self.collate(training=True))
        groups = None
        if self.batches_of_one_size:
            groups = size_groups(data.annotations.columns["widths"], data.annotations.columns["heights"])
        images = range(len(dataset)) if all_images else self.evaluated_images(len(dataset))
        rank, slots = (0, 1) if is_share or in_process else (self.rank, self.slots)
        batches = EvaluationBatchSampler(images, self.evaluation_batch_size, rank, slots, stop, groups)
        return self._loader(dataset, batches, collate, 0 if in_process else self.data.workers)

    def training_batch_loader(self, first_batch: int | None = None) -> DataLoader:
        """This slot's training batches on the host, see `training_batches`."""
        return self._loader(self.training_dataset(), self.training_batches(first_batch), self.collate(training=True))

    @torch.no_grad()
    def detect_on_host_batch(self, batch: Batch) -> list[Detections]:
        """The detections of a batch of the evaluation loader. It is empty if none of its images can be read."""
        if not len(batch):
            return []
        model = self.evaluation_model.eval()
        with out_of_memory_as_error(self.smaller_batch):
            prepared = self.prepare(to_device(batch, self.context.device), None)
            with self.autocast(), uncompiled(self.hparams.torch_compile):
                return self.detect(model, prepared)

    @torch.no_grad()
    def losses_of_image(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The losses of one image, as a batch of `for_loss`: scalars on the device. They are not finite if the library
        finds that they would be."""
        with out_of_memory_as_error("omit hyperparameters.validation_loss, or give smaller images"):
            model = self.evaluation_model.eval()
            batch = self.prepare(to_device(batch, self.context.device), None)
            giving = giving_losses(model, self.python_attributes, self._chief_python_state)
            # the evaluation's precision: before the model is in training mode
            with self.autocast(), uncompiled(self.hparams.torch_compile), giving:
                seed_all(self.seed, batch.image_ids[0] % 2**63, 3)
                try:
                    return self.image_losses(model, batch)
                except FloatingPointError:  # a library looks itself
                    return {"loss": torch.tensor(math.nan, device=self.context.device)}

    def start_validation(self, loader: DataLoader) -> None:
        """Before the first batch of a validation, on every slot."""
        seed_all(self.seed, self.rank, self.batches_trained, 4)  # one that was cut short repeats the same numbers
        self._pictured = []
        self.begin_validation(loader)
        self.synchronize_buffers()
        if self.validates_loss and self.slots > 1:  # the state of the chief's modules outside of buffers
            state = python_state(self.evaluation_model, self.python_attributes)
            self._chief_python_state = self.context.distributed.broadcast(state)

    def finish_validation(self, metrics: Mapping[str, Any]) -> Validation:
        """After a validation, on every slot. `metrics` are all that the evaluator and the losses give."""
        self.end_validation()
        self.evaluator.raise_if_failed()
        if self.validates_loss:
            self.validation_loss.raise_if_failed()
        validation = Validation.of(self.batches_trained, metrics, self.searcher_metric.name, self._pictured)
        self.last_validation = dict(validation.metrics)
        return validation

    def training_state(self) -> dict[str, Any]:
        """The trial's state in a checkpoint, besides weights, buffers and the optimizer's state."""
        return {
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_steps": None if self.ema is None else self.ema.steps,
            "optimizer": dict(vars(self.built_optimizer)),
            "scaler": self.built_scaler,
            "batches_per_epoch": self.batches_per_epoch,
            "last_validation": {name: float(value) for name, value in self.last_validation.items()},
            "own": self.own_state(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continues from what `training_state` gave. The weights are loaded."""
        if self.ema is not None and state["ema"] is None:
            self.ema.begin()
        elif self.ema is not None:
            self.ema.load(state["ema"], state.get("ema_steps"))
        self.last_validation = dict(state["last_validation"])
        self.load_own_state(state["own"])

    def summary_lines(self) -> list[tuple[str, object]]:
        """The lines printed at the start, name and value."""
        resumed = f"; resumes after batch {self.first_batch}" if self.first_batch else ""
        return [
            *self.summary(),
            ("precision", self.hparams.amp or "float32"),
            *([] if self.frozen is None else [("frozen", self.frozen)]),
            ("global batch", f"{self.global_batch_size} on {count_of(self.slots, 'slot')}"),
            ("length", f"{count_of(self.total_batches, 'batch')}, {self.batches_per_epoch} per epoch{resumed}"),
            *([] if self.data.augment is None else [("augmentation", self.data.augment)]),
            *([] if self.repeats is None else [("repeated", described(self.repeats))]),
        ]

    # --- what Determined calls ----------------------------------------------------------------------------

    def build_training_data_loader(self) -> PrefetchLoader:
        batches, device = self.training_batch_loader(), self.context.device
        self.training_loader = PrefetchLoader(batches, device, self._prepare_training_batch, self.first_batch)
        return self.training_loader

    def build_validation_data_loader(self, stop: Callable[[], bool] = lambda: False) -> DataLoader:
        loader = self.evaluation_loader(self.val_data, self.validates_loss, stop)
        if self.data.workers > 0:
            start_workers(loader)
        return loader

    def train_batch(self, batch: Batch, epoch_idx: int, batch_idx: int) -> dict[str, Any]:
        self.watch.mark(Phase.FORWARD, batch_idx + 1)
        seed_all(self.seed, self.rank, batch_idx, 1)  # no two slots alike, and a resume exact
        self.before_batch(batch_idx)
        ends_step = (batch_idx + 1) % self.aggregation_frequency == 0
        try:
            with switches.accumulating(self.model, ends_step):
                with self.autocast():
                    losses = self.losses(self.model, batch)
                self.watch.mark(Phase.BACKWARD, batch_idx + 1)
                loss = losses["loss"]
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            if ends_step:
                switches.step(self.optimizer, self.aggregation_frequency, self.clip_gradients(), self.scaler)
                if self.ema is not None:
                    self.ema.update()
        except FloatingPointError as error:  # a library looks itself
            raise diverged(batch_idx, batch.image_ids) from error
        self.watch.mark(Phase.STEPPED, batch_idx + 1)
        lr = float(self.optimizer.param_groups[0]["lr"])
        may_skip = 0 if self.scaler is None else STEPS_A_SCALE_MAY_SKIP
        waited, skipped = self.training_loader.waiting, len(batch.skipped)
        self.training_metrics.update(losses, batch_idx, batch.image_ids, skipped, may_skip, lr, waited)
        self.batches_trained = batch_idx + 1
        self.after_batch(batch_idx)
        self.watch.mark(Phase.LOADING, batch_idx + 2)
        return {"lr": lr}  # of the host: for a tensor Determined waits for the device in each step

    def evaluate_batch(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        self.watch.mark(Phase.VALIDATING, self.batches_trained)
        detected = self.detect_on_host_batch(replace(batch, for_loss=[]))
        self.evaluator.update(detected)
        if batch.skipped:
            self.evaluator.skip(batch.skipped)
        found = [each for each in detected if isinstance(each, Detections)]
        self._pictured += found[: _PICTURES - len(self._pictured)]
        for image in batch.for_loss:
            self.validation_loss.update(image.image_ids[0], self.losses_of_image(image))
            self.watch.mark(Phase.VALIDATING, self.batches_trained)
        return {}

    def get_batch_length(self, batch: Batch) -> int:
        return len(batch)

    # --- details ------------------------------------------------------------------------------------------

    @property
    def smaller_batch(self) -> str:
        """What to do if a GPU's memory is not enough for a batch."""
        size = self.per_slot_batch_size
        smaller = max((count for count in range(1, size) if size % count == 0), default=None)
        if smaller is None:
            return "a slot has one image already; give smaller images, or hyperparameters.amp"
        if not self.for_training:
            return f"--set hyperparameters.global_batch_size={smaller * self.slots} detects on fewer images at a time"
        frequency = self.aggregation_frequency * (size // smaller)
        return (
            f"hyperparameters.global_batch_size: {smaller * self.slots} with optimizations.aggregation_frequency: "
            f"{frequency} has the same images in a step, and hyperparameters.amp takes less"
        )

    def _loader(
        self, dataset: Dataset, batches: Any, collate: Callable[[list], Batch], workers: int | None = None
    ) -> DataLoader:
        workers = self.data.workers if workers is None else workers
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,  # or each validation forks again: slow, and see start_workers
            collate_fn=NotingSkipped(collate, self.bad_images),
            pin_memory=self.context.device.type == "cuda",
            worker_init_fn=begin_worker,
        )

    def _prepare_training_batch(self, batch: Batch, number: int) -> Batch:
        seed_all(self.seed, self.rank, number, 0)
        return self.prepare(batch, number)

    def _with_losses(self, dataset: CocoDetection, data: SplitData) -> CocoDetection:
        """The samples to detect on, each beside the one whose losses are computed."""
        left_out = frozenset(data.annotations.image_ids[~self.trained_images(data.annotations)].tolist())
        transform = partial(with_loss_sample, dataset.transform, self.loss_transform(data), left_out)
        return replace(dataset, transform=transform)

    def _check_validation_loss(self) -> None:
        data = self.val_data
        dataset, collate = self._with_losses(self.evaluation_dataset(data), data), self.collate(training=True)
        trained = self.trained_images(data.annotations)
        samples = (dataset[i][1] for i in self.evaluated_images(len(dataset)) if trained[i])
        check_losses(samples, lambda sample: self.losses_of_image(collate([sample])))
