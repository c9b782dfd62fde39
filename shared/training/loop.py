"""Determined's training loop, with one count of batches: the same on a cluster, here, and after any resume."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import determined as det
import torch
from determined import core, pytorch
from determined.core import DistributedContext

from shared.config.schema import Length, Schedule
from shared.errors import UserError
from shared.redaction import redact_yaml_files, without_secrets
from shared.training.checkpoints import plain_values_only, read_checkpoint, write_manifest
from shared.training.hang import Phase
from shared.training.resume import check_resume
from shared.training.saving import HostCopy, Snapshot, checkpoint_state

if TYPE_CHECKING:
    from shared.training.trial import DetectionTrial


logger = logging.getLogger(__name__)

SECONDS_BETWEEN_UPLOADS = 1.1  # of TensorBoard's files: what comes within a second of the last is not sent


class RunHasEnded(UserError):
    """There is nothing to train after the checkpoint."""


@contextlib.contextmanager
def trial_context(
    config: dict[str, Any],
    distributed: DistributedContext,
    device: torch.device,
    first_batch: int = 0,
    trial_seed: int | None = None,
) -> Iterator[pytorch.PyTorchTrialContext]:
    """`pytorch.init`, with the device that torch can use, not the one that nvidia-smi names, and with batches that are
    trained already also off the cluster.

    Args:
        config: the experiment config, its hyperparameters fixed.
        first_batch: batches that are trained already.
    """
    with core.init(
        distributed=distributed,
        preempt_mode=core.PreemptMode.WorkersAskChief,
        tensorboard_mode=core.TensorboardMode.MANUAL,
    ) as core_context:
        yield pytorch.PyTorchTrialContext(
            core_context=core_context,
            trial_seed=trial_seed,
            hparams=config["hyperparameters"],
            slots_per_trial=distributed.size,
            num_gpus=distributed.local_size if device.type == "cuda" else 0,
            exp_conf=config,
            aggregation_frequency=aggregation_frequency(config),
            steps_completed=first_batch,
            managed_training=True,
            debug_enabled=False,
            enable_tensorboard_logging=False,  # shared.training.reports writes it
        )


def aggregation_frequency(config: dict[str, Any]) -> int:
    """Batches to an optimizer step."""
    return (config.get("optimizations") or {}).get("aggregation_frequency") or 1


@dataclass(frozen=True)
class Periods:
    """After which batches something is due, counted from 1 over the whole training; None where only at the end.

    Attributes:
        validation_start: the first validation, from which the others are counted; 0 for one period after the start.
        validation_changes: from which batch on `validation` is another.
    """

    total: int
    report: int
    validation: int | None
    checkpoint: int | None
    validation_start: int = 0
    validation_changes: tuple[tuple[int, int], ...] = ()

    @property
    def validates_before_the_end(self) -> bool:
        """Whether there may be a validation but the last."""
        return self.validation is not None or bool(self.validation_changes)

    def validates(self, batch: int) -> bool:
        period = self.validation
        for since, changed in self.validation_changes:
            period = changed if batch >= since else period
        after_start = batch - self.validation_start
        return batch == self.total or (period is not None and after_start >= 0 and after_start % period == 0)

    def saves(self, batch: int) -> bool:
        return batch == self.total or (self.checkpoint is not None and batch % self.checkpoint == 0)

    def reports(self, batch: int) -> bool:
        return batch % self.report == 0 or self.validates(batch) or self.saves(batch)


def periods_of(schedule: Schedule, batches_per_epoch: int, global_batch_size: int, window: int) -> Periods:
    """The schedule in batches.

    Args:
        window: batches to an optimizer step. Reports come at the next whole one.

    Raises:
        UserError: training, a validation or a checkpoint would end in the middle of an optimizer step.
    """

    def batches(length: Length | None, key: str) -> int | None:
        if length is None:
            return None
        count = length.batches(batches_per_epoch, global_batch_size)
        if count % window:
            raise UserError(
                f"{key}: {count} batches are not a multiple of optimizations.aggregation_frequency, {window}: that "
                f"is in the middle of an optimizer step; give {{batches: {-(-count // window) * window}}}"
            )
        return count

    total = batches(schedule.max_length, "searcher.max_length")
    changes = [
        (since.batches(batches_per_epoch, global_batch_size), period) for since, period in schedule.validation_changes
    ]
    return Periods(
        total=total,
        report=-(-schedule.reporting_batches // window) * window,
        validation=batches(schedule.validation_period, "min_validation_period"),
        checkpoint=batches(schedule.checkpoint_period, "min_checkpoint_period"),
        validation_start=batches(schedule.validation_start, "the first validation") or 0,
        validation_changes=tuple(
            (since, batches(period, "a later validation period")) for since, period in changes if since <= total
        ),
    )


def fit(trial: DetectionTrial, latest_checkpoint: str | None, checkpoint_policy: str) -> None:
    """Trains to the trial's length, as `pytorch.Trainer.fit`.

    Args:
        checkpoint_policy: "best" (on a cluster alone), "all" or "none".

    Raises:
        RunHasEnded: the checkpoint is of a training that has come to its end.
    """
    schedule, periods, on_cluster = trial.schedule, trial.periods, trial.on_cluster
    stopping = trial.stopping

    def at(due: Callable[[int], bool]) -> pytorch.Batch:
        return pytorch.Batch(_Batches(due))

    _Loop(
        trial_inst=trial,
        context=trial.context,
        max_length=pytorch.Batch(periods.total),
        validation_period=at(lambda batch: periods.validates(batch) or stopping.ended_after == batch),
        checkpoint_period=at(lambda batch: periods.saves(batch) or stopping.saves_after == batch),
        reporting_period=at(lambda batch: periods.reports(batch) or stopping.after == batch),
        checkpoint_policy=checkpoint_policy,
        step_zero_validation=schedule.initial_validation,
        latest_checkpoint=latest_checkpoint,
        steps_completed=trial.first_batch,
        local_training=not on_cluster,
        searcher_metric_name=trial.searcher_metric.name,
        smaller_is_better=trial.searcher_metric.smaller_is_better,
        profiling_enabled=schedule.profiling and on_cluster,
        global_batch_size=trial.global_batch_size,
        test_mode=False,
    ).run()


@dataclass(frozen=True)
class _Batches(Container):
    """The batches at which something is due, as Determined asks for them."""

    due: Callable[[int], bool]

    def __contains__(self, batch: object) -> bool:
        return self.due(batch)


class _Loop(pytorch._PyTorchTrialController):
    """What Determined's loop lacks (it has no public name, and no other place to put this):

    - it executes what a checkpoint's pickles hold;
    - off the cluster it counts from 0 after a resume: here it takes up whatever checkpoint it is given;
    - it trains on after a resume without the validation that a stop cut short;
    - it hears of the searcher's decision at a later report only, and of a signal never;
    - it uploads TensorBoard's files once a second at most, so that the last ones stay behind;
    - it tells the master of its progress at its reports only;
    - it stands still while a checkpoint is written, hashed and uploaded, with all other processes;
    - it stands for ever where a process hangs.
    """

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.callbacks = {"cut_validation": _CutValidation(self.trial), **self.callbacks}
        self.host_copy = HostCopy()

    def _load(self, load_path: Path) -> None:
        if not self.local_training:  # elsewhere `train` checks it before it writes anything
            check_resume(self.trial, read_checkpoint(Path(load_path)))
        with plain_values_only(load_path):
            super()._load(load_path)

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state({**state, "trial_id": self.trial_id} if self.local_training else state)

    def _run(self) -> None:
        with self.trial.watch.watching(self.state.batches_trained):
            with self.trial.saving:
                super()._run()
                self._mark(Phase.SAVING)
            if not self.local_training:
                self._mark(Phase.REPORTING)
                self.trial.finish_figures()
                time.sleep(SECONDS_BETWEEN_UPLOADS)
                self._upload_tb_files()

    def _train(self, length: pytorch.TrainUnit, train_boundaries: list) -> None:
        batches = self.state.batches_trained
        if batches and (why := self._why_it_has_ended()):
            if self.local_training:
                raise RunHasEnded(f"--resume: {self.latest_checkpoint} {why}")
            logger.info("the checkpoint %s", why)
            raise pytorch._ShouldExit()
        self.trial.stopping.begin()
        if batches and self.trial.periods.validates(batches) and not self._validation_is_current():
            self.state.last_ckpt = -1  # saved once more, with what the validation says
            if batches < self.trial.periods.total:
                self._validate()
                self._stop_requested()
        super()._train(length, train_boundaries)

    def _why_it_has_ended(self) -> str | None:
        """Why there is nothing to train after the checkpoint, and what to give to go on; None where there is."""
        batches, trial = self.state.batches_trained, self.trial
        total = trial.periods.total
        if batches > total or (batches == total and self._validation_is_current()):
            return (
                f"has been trained for {batches} batches, and searcher.max_length is {total}; give a greater one to "
                "go on"
            )
        if why := trial.patience.why_over():
            return (
                f"has ended by {why}; give a patience of more than {trial.patience.without_better}, or leave "
                "hyperparameters.early_stopping out, to go on"
            )
        if self._validation_is_current() and (why := trial.stopping.clock.why_over()):
            return f"has ended by {why}; give more of them, or leave hyperparameters.max_hours out, to go on"
        return None

    def _mark(self, phase: Phase) -> None:
        self.trial.watch.mark(phase, self.state.batches_trained)

    def _train_with_boundaries(self, *arguments: Any) -> tuple[list, list]:
        self.trial.watch.mark(Phase.LOADING, self.state.batches_trained + 1)
        return super()._train_with_boundaries(*arguments)

    def _aggregate_training_metrics(self, training_metrics: list) -> dict[str, Any]:
        self._mark(Phase.REPORTING)
        return super()._aggregate_training_metrics(training_metrics)

    def _validate(self) -> dict[str, Any]:
        self._mark(Phase.VALIDATING)
        return super()._validate()

    def _checkpoint(self, already_exiting: bool) -> None:
        self._mark(Phase.SAVING)
        self.state.last_ckpt = self.state.batches_trained
        self.trial.stopping.clock.saved()
        if self.is_chief:
            self.core_context.train.set_status("checkpointing")
            self.trial.saving.wait()  # for the memory of the last one's copy
            self.trial.saving.begin(functools.partial(self._store, self._snapshot()))

    def _snapshot(self) -> Snapshot:
        state = self.host_copy.of(checkpoint_state(self.context, self.callbacks))
        trial_class = type(self.trial)
        load_data = {
            "trial_type": "PyTorchTrial",
            "experiment_config": without_secrets(self.context.get_experiment_config()),
            "hparams": without_secrets(self.context.get_hparams()),
            "trial_cls_spec": f"{trial_class.__module__}:{trial_class.__qualname__}",
            "is_trainer": True,
        }
        return Snapshot(state, dict(vars(self.state)), load_data)

    def _store(self, snapshot: Snapshot) -> None:
        """Writes a checkpoint, has Determined upload and report it, and tells the callbacks; beside the training."""
        metadata = {
            "determined_version": det.__version__,
            "steps_completed": snapshot.counts["batches_trained"],
            "framework": f"torch-{torch.__version__}",
            "format": "pickle",
        }
        with self.core_context.checkpoint.store_path(metadata) as (path, storage_id):
            snapshot.write(path, on_cluster=not self.local_training)
            if not self.local_training:  # here, a run's folder has a redacted copy of the code
                redact_yaml_files(path / "code")
            for callback in self.callbacks.values():
                callback.on_checkpoint_write_end(str(path))
            write_manifest(path, metadata["steps_completed"])
        for callback in self.callbacks.values():
            callback.on_checkpoint_upload_end(uuid=storage_id)

    def _stop_requested(self) -> None:
        self.trial.saving.raise_if_failed()
        self._mark(Phase.REPORTING)
        # called after each report, validation and checkpoint
        if not self.local_training:
            self._upload_tb_files()
            if self.is_chief:
                self._report_training_progress()
        if self.trial.stopping.at_boundary(self.state.batches_trained):
            raise pytorch._ShouldExit()
        super()._stop_requested()


class _CutValidation(pytorch.PyTorchCallback):
    """A validation that a signal cut short is not reported; the run ends with a checkpoint that lacks it."""

    def __init__(self, trial: DetectionTrial):
        self.trial = trial

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        if self.trial.stopping.validation_was_cut(self.trial.batches_trained):
            raise pytorch._ShouldExit()
