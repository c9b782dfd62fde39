"""The training loop: load the next batch, step, report, validate and save when due, decide whether to stop.

It uses Determined's public APIs, and is the same on a cluster, off it, and after any resume. What differs is the `Run`,
which takes the reports and the checkpoints. In contrast to Determined's own loop, it counts batches over all starts. It
writes checkpoints beside the training and executes nothing that a checkpoint holds. A signal or the searcher's decision
stops it after the batch. A validation that a stop cut short is repeated. A hang ends the process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import determined as det
import torch

from shared.errors import DivergedError, UserError, out_of_memory_as_error
from shared.log import without_secrets
from shared.training.checkpoints import CATEGORIES_FILE, Checkpoint, load_weights
from shared.training.hang import Phase
from shared.training.resume import BuiltOptimizer, check_categories, merged
from shared.training.run import DrawFigures, Run, TensorBoard
from shared.training.saving import Background, FiniteCheck, HostCopy, Snapshot, checkpoint_state
from shared.training.stopping import BestSoFar, Clock, End, Outcome, Stopping
from shared.training.training_metrics import Progress
from shared.training.trial import DetectionTrial
from shared.training.validation import Validation

logger = logging.getLogger(__name__)


def train(
    trial: DetectionTrial, run: Run, checkpoint: Checkpoint | None = None, draw: DrawFigures = lambda *_: {}
) -> Outcome:
    """Trains to the end, or until it is stopped.

    Args:
        checkpoint: to continue from; `check_resume` allows it.
        draw: draws the figures of each validation, for TensorBoard.

    Raises:
        DivergedError: a loss or the weights are not finite.
        UserError: the evaluation, a save or the GPU's memory failed in a way that the user can fix.
    """
    return _Training(trial, run, draw).train(checkpoint)


class _Training:
    """One start of a run, on one rank."""

    def __init__(self, trial: DetectionTrial, run: Run, draw: DrawFigures):
        self.trial, self.run, self.draw = trial, run, draw
        self.context, self.periods, self.watch = trial.context, trial.periods, trial.watch
        self.is_chief = trial.rank == 0
        self.best = BestSoFar(trial.hparams.early_stopping, trial.searcher_metric)
        self.clock = Clock(trial.hparams.max_hours, trial.hparams.checkpoint_every_minutes)
        self.stopping = Stopping(self.context.distributed, trial.aggregation_frequency, self.clock, run.signals)
        self.saving = Background("saving")
        self.host_copy = HostCopy()
        self.finite = FiniteCheck(trial.plain_model, trial.evaluation_model)
        self.validated_at = self.saved_at = trial.first_batch
        self.validation: Validation | None = None

    @property
    def batches(self) -> int:
        return self.trial.batches_trained

    @property
    def epochs(self) -> int:
        return self.batches // self.trial.batches_per_epoch

    # --- the loop -----------------------------------------------------------------------------------------

    def train(self, checkpoint: Checkpoint | None) -> Outcome:
        trial, run = self.trial, self.run
        with contextlib.ExitStack() as stack:
            if run.signals is not None:
                stack.callback(run.signals.end)
            trial.begin_training(run.folder)
            batches = iter(trial.build_training_data_loader())  # the workers start here, before threads that hold locks
            self.validation_loader = trial.build_validation_data_loader(self.stopping.cuts_validation)
            self.tensorboard = self.progress = None
            if self.is_chief:
                self.tensorboard = TensorBoard(run.begin(trial.first_batch), self.draw)
                stack.callback(self.tensorboard.close)
                self.progress = Progress(trial.first_batch, self.periods.total)
                stack.callback(self.progress.close)
            if checkpoint is not None:
                self._load(checkpoint)
                if why := self._nothing_to_do(checkpoint):
                    return Outcome(End.NOTHING_TO_DO, self.batches, self.periods.total, why)
                if not self._ask(lambda: run.holds(checkpoint.path)):
                    self.best.forget()  # this run's place has no best checkpoint yet
            with self.watch.training(self.batches):
                with self.saving, self._naming_last_checkpoint(), out_of_memory_as_error(trial.smaller_batch):
                    self._train(batches)
                    self._mark(Phase.SAVING)
                self._mark(Phase.REPORTING)
                if self.is_chief:
                    self.tensorboard.write_figures(wait=True)
                run.finish(self.tensorboard)
            outcome = self._outcome()
            if outcome.is_finished:
                trial.end_training()
        return outcome

    @contextlib.contextmanager
    def _naming_last_checkpoint(self) -> Iterator[None]:
        """An error of a run that diverged names its last checkpoint, if there is one."""
        try:
            yield
        except DivergedError as error:
            if self.saved_at <= 0:
                raise
            raise DivergedError(f"{error}. The last checkpoint is of batch {self.saved_at}") from error

    def _train(self, batches: Iterator[Any]) -> None:
        trial, periods, stopping = self.trial, self.periods, self.stopping
        if trial.schedule.initial_validation and self.batches == 0 and self._ask(self.run.last_validation) is None:
            self._validate()
        stopping.begin()
        stops = False
        if self.batches and periods.validates(self.batches) and self.validated_at != self.batches:
            self.saved_at = -1  # save again, with what the validation says
            self._validate()
            stops = self._stops()

        self._begin_window()
        while self.batches < periods.total and not stops:
            trial.train_batch(next(batches), self.epochs, self.batches)
            if self.is_chief:
                self.progress.update()
            is_stopped = stopping.after_batch(self.batches)

            validates = periods.validates(self.batches) or stopping.ended is not None
            saves = periods.saves(self.batches) or stopping.saves_after == self.batches
            reports = periods.reports(self.batches)
            if not (reports or validates or saves or is_stopped):
                continue
            self._report(is_whole=reports)
            if validates:
                self._validate()
            if saves and self.saved_at != self.batches:
                self._save()
            stops = self._stops()
            if not stops:
                self._begin_window()

        if self.saved_at != self.batches:
            self._save()

    # --- its parts ----------------------------------------------------------------------------------------

    def _begin_window(self) -> None:
        """Begins the batches until the next report, validation or save."""
        self._mark(Phase.LOADING, self.batches + 1)
        if self.is_chief:
            self.run.set_status("training")
        self.trial.model.train()
        self.context.reset_reducers()

    def _report(self, is_whole: bool) -> None:
        """Reports the losses since the last report. If a stop or a save cut that short, the next report takes them."""
        self._mark(Phase.REPORTING)
        trial, metrics = self.trial, self.trial.training_metrics
        steering = self.context.reduce_metrics(for_training=True)
        metrics.raise_if_diverged()
        if not is_whole:
            metrics.continue_with(metrics.begun(), trial.rank, trial.slots)
        elif self.is_chief:
            last = metrics.last
            self.run.report_training(self.batches, self.epochs, last, steering)
            self.tensorboard.write("train", last, self.batches)
            self.progress.describe(f"loss {last['loss']:.3f}, {last['images_per_second']:.1f} images/s")
        if self.is_chief:
            self.tensorboard.write_figures()

    @torch.no_grad()
    def _validate(self) -> None:
        """Validates, reports, and saves if `checkpoint_policy` asks for it. A signal cuts it short without a report."""
        self._mark(Phase.VALIDATING)
        trial, run = self.trial, self.run
        if self.is_chief:
            run.set_status("validating")
        self.context.reset_reducers()
        trial.model.eval()
        trial.start_validation(self.validation_loader)
        for index, batch in enumerate(self.validation_loader):
            trial.evaluate_batch(batch, index)
        self._mark(Phase.EVALUATING)
        metrics = self.context.reduce_metrics(for_training=False)
        if self.stopping.validation_was_cut(self.batches):
            return

        validation = trial.finish_validation(metrics)
        self.validated_at = self.batches
        self.validation = validation
        name = trial.searcher_metric.name
        is_best = self.best.update(validation.metrics[name], self.batches)
        self.stopping.after_validation(self.best.why_over())
        saves = False
        if self.is_chief:
            is_last = self.batches == self.periods.total or self.stopping.ended is not None
            self.tensorboard.write_validation(trial, validation, is_last)
            saves = run.report_validation(validation, self.epochs, trial.evaluator, is_best)
            best = " (best so far)" if is_best else ""
            logger.info("batch %d: %s %.4f%s", self.batches, name, validation.metrics[name], best)
        if self.context.distributed.broadcast(saves) and self.saved_at != self.batches:
            self._save()

    def _save(self) -> None:
        """Copies the state; the chief writes it beside the training."""
        self._mark(Phase.SAVING)
        self.saved_at = self.batches
        self.clock.saved()
        if self.is_chief:
            self.run.set_status("checkpointing")
            self.saving.wait()  # for the memory of the last copy
            self.saving.begin(functools.partial(self.run.store, self._snapshot()))

    def _stops(self) -> bool:
        """Whether this is the last batch, on every rank alike."""
        self.saving.raise_if_failed()
        self._mark(Phase.REPORTING)
        stopped_by = self.run.at_boundary(self.batches / self.periods.total, self.tensorboard)
        return self.stopping.at_boundary(self.batches, stopped_by)

    # --- checkpoints --------------------------------------------------------------------------------------

    def _snapshot(self) -> Snapshot:
        trial = self.trial
        training = {
            **trial.training_state(),
            "patience": self.best.state(),
            "seconds": self.clock.seconds,
            "begun_report": [] if self.periods.reports(self.batches) else trial.training_metrics.begun(),
        }
        self.finite.raise_if_undefined()
        state = self.host_copy.of(checkpoint_state(self.context, trial.plain_model, trial.scaler, training))
        return Snapshot(
            state=state,
            counts={
                "trial_id": self.run.trial_id,
                "last_ckpt": self.saved_at,
                "step_id": 0,
                "last_val": self.validated_at,
                "batches_trained": self.batches,
                "epochs_trained": self.epochs,
            },
            load_data={
                "trial_type": "PyTorchTrial",
                "experiment_config": without_secrets(self.context.get_experiment_config()),
                "hparams": without_secrets(self.context.get_hparams()),
                "trial_cls_spec": f"{type(trial).__module__}:{type(trial).__qualname__}",
                "is_trainer": True,
            },
            metadata={
                "determined_version": det.__version__,
                "steps_completed": self.batches,
                "framework": f"torch-{torch.__version__}",
                "format": "pickle",
            },
            is_best=self.best.best_at == self.batches,
            write_own=self._write_own,
        )

    def _write_own(self, folder: Path) -> None:
        (folder / CATEGORIES_FILE).write_text(json.dumps(self.trial.categories))
        self.trial.save_own_config(folder)

    def _load(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint. After one of another trial, all counts start from 0."""
        trial, training, counts = self.trial, checkpoint.training, checkpoint.counts
        load_checkpoint(trial, checkpoint)
        if not trial.first_batch:
            return
        self.clock.resume(training.get("seconds", 0.0))
        if begun := training.get("begun_report"):
            trial.training_metrics.continue_with(begun, trial.rank, trial.slots)
        if best := training["patience"]:
            value = self._ask(lambda: self.run.earlier_value(best["best_at"], self.best.metric.name))
            self.best.load(best, value)
        # a validation that was reported after the checkpoint was saved counts too
        is_reported = self._ask(self.run.last_validation) == self.batches
        self.validated_at = self.batches if is_reported else counts.get("last_val", -1)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The chief's answer, on every rank."""
        return self.context.distributed.broadcast(question() if self.is_chief else None)

    # --- the end ------------------------------------------------------------------------------------------

    def _nothing_to_do(self, checkpoint: Checkpoint) -> str | None:
        """Why there is nothing to train after the checkpoint, and what to change to continue; None if there is."""
        total, is_validated = self.periods.total, self.validated_at == self.batches
        if not self.batches:
            return None
        if self.batches > total or (self.batches == total and is_validated):
            return (
                f"{checkpoint.path} has been trained for {self.batches} batches, and searcher.max_length is {total}. "
                "Fix: give a greater one"
            )
        if why := self.best.why_over():
            return (
                f"{checkpoint.path} has ended by {why}. Fix: give a patience of more than "
                f"{self.best.without_improvement}, or omit hyperparameters.early_stopping"
            )
        if is_validated and self.clock.is_over():
            why = self.clock.why
            return f"{checkpoint.path} has ended by {why}. Fix: give more hours, or omit hyperparameters.max_hours"
        return None

    def _outcome(self) -> Outcome:
        stopping, total, number = self.stopping, self.periods.total, None
        if self.validated_at == self.batches == total:
            end, why = End.COMPLETE, ""
        elif self.validated_at == self.batches and stopping.ended is not None:
            end, why = End.ENDED, stopping.ended
        else:
            end, number = End.STOPPED, stopping.stopped_by
            why = stopping.stopped_elsewhere_by if number is None else number.name
        return Outcome(end, self.batches, total, why, number, self.validation, self.clock.seconds)

    def _mark(self, phase: Phase, batch: int | None = None) -> None:
        self.watch.mark(phase, self.batches if batch is None else batch)


# --- the state of a checkpoint ----------------------------------------------------------------------


def check_resume(trial: DetectionTrial, checkpoint: Checkpoint) -> None:
    """Checks that a run can continue from a checkpoint, before anything of either is changed. Raises UserError if the
    checkpoint has other categories, another model or another optimizer."""
    check_categories(trial.categories, checkpoint, trial.weights_key)
    load_weights(trial.plain_model, checkpoint.training_weights, checkpoint.path)
    _resumed_optimizer(trial, checkpoint)
    before, now = checkpoint.training.get("batches_per_epoch"), trial.batches_per_epoch
    if trial.rank == 0 and trial.first_batch and before not in (None, now):
        logger.warning(
            "an epoch now has %d batches instead of %d: the training images or hyperparameters.global_batch_size "
            "changed. The %d batches so far count as %.1f epochs, not %.1f",
            *(now, before, trial.first_batch, trial.first_batch / now, trial.first_batch / before),
        )


def load_checkpoint(trial: DetectionTrial, checkpoint: Checkpoint) -> None:
    """Continues from a checkpoint that `check_resume` allows: weights, optimizer and the trial's own state. This
    run's config wins over what the checkpoint's config said. Empties `checkpoint.optimizer`, whose memory a training
    needs."""
    training = checkpoint.training
    trial.plain_model.load_state_dict(checkpoint.training_weights)
    trial.optimizer.load_state_dict(_resumed_optimizer(trial, checkpoint))
    if trial.scaler is not None and checkpoint.scaler is not None:
        began = training.get("scaler") or trial.built_scaler
        trial.scaler.load_state_dict(merged(trial.built_scaler, began, checkpoint.scaler))
    trial.load_training_state({**training, "ema": checkpoint.averaged_weights})
    checkpoint.optimizer.clear()


def _resumed_optimizer(trial: DetectionTrial, checkpoint: Checkpoint) -> dict[str, Any]:
    """The optimizer state to load, see `BuiltOptimizer.resumed`."""
    built = checkpoint.training.get("optimizer")
    try:
        return trial.built_optimizer.resumed(checkpoint.optimizer, built and BuiltOptimizer(**built))
    except ValueError as problem:
        raise UserError(
            f"{trial.optimizer_key}: {problem}. Fix: keep the checkpoint's value, or start a new run with "
            f"{trial.weights_key}: <the checkpoint's path>"
        ) from problem
