"""A detector's trial: what all detectors have in common, put together from its parts.

    trial_data        opens data, makes batches of it
    trial_step        model, optimizer, the step
    trial_validation  detections, and what becomes of a validation's numbers
    trial_checkpoint  what a checkpoint holds beside weights and optimizer

A detector's `model_def.py` fills in the methods of these that say what a detector says of itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from determined.pytorch import PyTorchCallback, PyTorchTrial, PyTorchTrialContext
from tabulate import tabulate

from shared.config.experiment import parse_data, parse_schedule, parse_searcher_metric, parse_seed, per_slot_batch_size
from shared.config.schema import Length, parse_section
from shared.data.dataset import BadImages, seed_all
from shared.data.images import InputScale
from shared.data.samplers import described
from shared.environment import on_cluster
from shared.errors import UserError, count_of
from shared.evaluation.evaluator import CocoEvaluator
from shared.training.determined_fixes import (
    FiniteSearcherMetric,
    PlainRandomState,
    trial_is_stopping,
    wrap_model,
)
from shared.training.hang import Watch
from shared.training.loop import aggregation_frequency, periods_of
from shared.training.memory import keep_freed_memory
from shared.training.processes import first_on_each_machine, on_chief
from shared.training.resume import BuiltOptimizer
from shared.training.saving import Background
from shared.training.stopping import Clock, Ending, Patience, Stopping
from shared.training.switches import fuse
from shared.training.tensorboard import Reports
from shared.training.training_metrics import TrainingMetrics
from shared.training.trial_checkpoint import CheckpointedState, TrialCheckpoint
from shared.training.trial_data import TrialData
from shared.training.trial_step import TrialStep
from shared.training.trial_validation import TrialValidation, ValidationResult
from shared.training.validation_loss import ValidationLoss

logger = logging.getLogger(__name__)


class DetectionTrial(TrialData, TrialStep, TrialValidation, TrialCheckpoint, PyTorchTrial):
    """A detector's trial; subclasses say what is theirs.

    Args:
        for_training: False for an evaluation or prediction, which opens no training data.
        categories: without training, the COCO categories of the checkpoint; those of the validation data, or of the
            pretrained weights, where None.

    Attributes:
        hparams: the subclass's `hyperparameters_class`, filled from the config; each has `global_batch_size` beside
            what every detector has.
        categories: COCO categories; the position is the label.
        first_batch: batches that were trained before this start; `total_batches` at the end, of all slots together.
        stopping: when the training ends early.
        saving: writes checkpoints beside the training.
        watch: finds out when it hangs.
        patience: counts validations without a better searcher metric.
        finish_figures: waits for those of the last validation.
        local_callbacks: what a run off the cluster adds, set before `fit`.
    """

    hyperparameters_class: type

    def __init__(
        self,
        context: PyTorchTrialContext,
        experiment: Any = None,
        for_training: bool = True,
        categories: list[dict] | None = None,
        begin: bool = True,
    ):
        """
        Args:
            experiment: the experiment config, read; the context's where None, as Determined's own loop and loader of
                checkpoints make a trial.
            begin: open the data and build the model too. Who does not calls `open_data` and then `build`.
        """
        self.context = context
        self.config = context.get_experiment_config()
        distributed = context.distributed
        self.rank, self.slots = distributed.rank, distributed.size
        self.on_cluster = on_cluster()
        self.for_training = for_training
        self.hparams = parse_section(context.get_hparams(), self.hyperparameters_class, "hyperparameters")
        self.validates_loss = for_training and self.hparams.validation_loss
        self.data = parse_data(self.config, self.data_class)
        self.read_own_config()
        self.schedule = parse_schedule(self.config, self.default_lengths(), self.validation_times())
        # to detect, nobody asks for it
        self.searcher_metric = parse_searcher_metric(self.config, self.reported_metrics() if for_training else None)
        self.global_batch_size = self.hparams.global_batch_size
        self.per_slot_batch_size = per_slot_batch_size(self.global_batch_size, self.slots)
        self.seed = context.get_trial_seed() if self.on_cluster else parse_seed(self.config)
        self.first_batch = self.batches_trained = context.get_initial_batch()
        self.aggregation_frequency = aggregation_frequency(self.config)
        self.bad_images = BadImages(skip=self.data.on_bad_image == "skip")
        self.categories = categories
        if begin:
            self.open_data()
            self.build()

    def open_data(self) -> None:
        """Opens and checks the data to train and validate on; to detect, takes the categories of the validation data
        where nobody has given any.

        Raises:
            UserError: the data cannot be trained or validated on.
        """
        if self.for_training:
            self.train_data, self.val_data = first_on_each_machine(self.context.distributed, self.open_train_and_val)
            self.categories = self.train_data.categories
        elif self.categories is None:
            self.categories = self.known_categories()

    def build(self) -> None:
        """Builds model, optimizer, evaluator and what else trains, once the data is open.

        Raises:
            UserError: the config's values do not go with the model, the data or the device.
        """
        context, distributed, for_training = self.context, self.context.distributed, self.for_training
        if for_training:
            self.batches_per_epoch = len(self.training_batches())
            self.periods = periods_of(
                self.schedule, self.batches_per_epoch, self.global_batch_size, self.aggregation_frequency
            )
            self.total_batches = self.periods.total
            self.patience = Patience(self.hparams.early_stopping, self.searcher_metric)
            if self.hparams.early_stopping is not None and not self.periods.validates_before_the_end:
                raise UserError(
                    "hyperparameters.early_stopping: the only validation is at the end; give min_validation_period, or "
                    "leave it out"
                )

        self.saving = Background()
        self.watch = Watch(distributed, self.hparams.hang_minutes)
        self.stopping = Stopping(
            distributed,
            self.aggregation_frequency,
            self._searcher_has_stopped_it,
            Clock(self.hparams.max_hours, self.hparams.checkpoint_every_minutes),
            self.total_batches if for_training else None,
        )

        context.experimental.disable_dataset_reproducibility_checks()  # our sampler goes on where it was
        context.experimental.disable_auto_to_device()  # PrefetchLoader copies, and does not wait for it

        if for_training and context.device.type == "cpu":
            keep_freed_memory()
        seed_all(self.seed)  # the same initial weights on every slot
        self.scaler = self.build_scaler()
        self.model = wrap_model(context, self.switched(self.build_model()), self.find_unused_parameters)
        self.plain_model = self.model.module if self.slots > 1 else self.model
        self.ema = self.build_ema(self.plain_model)
        self.training_metrics = context.wrap_reducer(
            TrainingMetrics(counts_skipped=self.bad_images.skip), for_validation=False
        )
        self.local_callbacks: dict[str, PyTorchCallback] = {}
        self.on_batch_end = lambda: None
        self.finish_figures = lambda: None
        self.category_ap: dict[str, float] = {}
        self.last_validation: dict[str, float] = {}
        self.pictured: list = []
        self.validated_at = -1
        if for_training:
            with _values_refused("optimizer or the learning rate's schedule"):
                self.optimizer = context.wrap_optimizer(fuse(self.build_optimizer(self.plain_model)))
                self.built_optimizer = BuiltOptimizer.of(self.optimizer, self.plain_model)
                self.prepare_schedule()
            self._warn_of_warmup()
            self.evaluator = context.wrap_reducer(self.build_evaluator(self.val_data), for_training=False)
            on_chief(distributed, self._open_truth)
            if self.validates_loss:
                losses = ValidationLoss(self.evaluated_ids(self.val_data), distributed.gather)
                self.validation_loss = context.wrap_reducer(losses, for_training=False)
                on_chief(distributed, self.check_validation_loss)
            if self.rank == 0:
                logger.info("\n%s", tabulate(self.summary_lines(), tablefmt="plain"))

    # --- what a detector says of itself, beside what its parts ask -------------------------------------

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

    def validation_times(self) -> tuple[Length | None, tuple[tuple[Length, Length], ...]]:
        """The first validation, and from when on their period is another, where the experiment config leaves the
        period to the detector's own configuration."""
        return None, ()

    def summary(self) -> list[tuple[str, object]]:
        """The lines about the detector, name and value, of what is printed at the start."""
        return []

    # --- put together ---------------------------------------------------------------------------------

    def build_callbacks(self) -> dict[str, PyTorchCallback]:
        """The trial's own callbacks; the searcher's metric is made finite last."""
        return {
            "random_state": PlainRandomState(),
            "diverged": _Divergence(self),
            "training": CheckpointedState(self),
            "validation": ValidationResult(self),
            "ending": Ending(self),
            "reports": Reports(self),
            **self.local_callbacks,
            "searcher_metric": FiniteSearcherMetric(self.searcher_metric),
        }

    def report_is_whole(self) -> bool:
        """Whether a report is due after the last batch; else a stop or a checkpoint has cut it short."""
        return self.periods.reports(self.batches_trained)

    @property
    def is_at_its_end(self) -> bool:
        """Whether nothing is to be trained any more: it has its length, or the config ends it here."""
        return self.batches_trained == self.total_batches or self.stopping.ended is not None

    @property
    def is_finished(self) -> bool:
        """Whether it has come to its end and was validated there, not stopped before."""
        return self.is_at_its_end and self.validated_at == self.batches_trained

    def summary_lines(self) -> list[tuple[str, object]]:
        """What is printed at the start, name and value."""
        goes_on = f"; goes on after batch {self.first_batch}" if self.first_batch else ""
        return [
            *self.summary(),
            ("precision", self.hparams.amp or "float32"),
            *([] if self.frozen is None else [("frozen", self.frozen)]),
            ("global batch", f"{self.global_batch_size} on {count_of(self.slots, 'slot')}"),
            ("length", f"{self.total_batches} batches, {self.batches_per_epoch} an epoch{goes_on}"),
            *([] if self.repeats is None else [("repeated", described(self.repeats))]),
        ]

    def _warn_of_warmup(self) -> None:
        if self.rank == 0 and self.warmup_batches() > self.total_batches:
            logger.warning(
                "the warm-up has %d batches and the training %d: the learning rate never becomes what the config says; "
                "train longer, or warm up for less",
                self.warmup_batches(),
                self.total_batches,
            )

    def _open_truth(self) -> None:
        """What a validation could not score is refused before the training."""
        if isinstance(self.evaluator, CocoEvaluator):
            self.evaluator.open_truth()

    def _searcher_has_stopped_it(self) -> bool:
        return self.on_cluster and trial_is_stopping(self.context.get_trial_id(), self.validated_at)


@contextlib.contextmanager
def _values_refused(what: str) -> Iterator[None]:
    """Raises UserError where a library refuses the values of the config."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AssertionError, ZeroDivisionError) as error:
        raise UserError(
            f"hyperparameters: the {what} cannot be made of these values ({type(error).__name__}: {error})"
        ) from error


class _Divergence(PyTorchCallback):
    """Ends the training where a loss was not finite: before anything is validated, reported here or saved. What a
    checkpoint cuts short is taken into the next report."""

    def __init__(self, trial: DetectionTrial):
        self.trial = trial

    def on_training_workload_end(self, avg_metrics: dict[str, Any], batch_metrics: list) -> None:
        metrics = self.trial.training_metrics
        metrics.raise_if_diverged()
        if not self.trial.report_is_whole():
            metrics.go_on_with(metrics.begun(), self.trial.rank, self.trial.slots)
        self.trial.training_loader.waiting = 0.0
