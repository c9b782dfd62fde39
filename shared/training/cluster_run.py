"""A trial of a cluster: the master gets its reports, Determined's storage its checkpoints.

The last functions correct what a Determined 0.38.1 master does not do by itself. tests/test_determined_fixes.py shows
each.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import determined as det
from determined import core, tensorboard
from determined.experimental import client
from torch.utils.tensorboard import SummaryWriter

from shared.config.schema import SearcherMetric
from shared.evaluation.gathered import ChiefReducer
from shared.training.run import Run
from shared.training.saving import Snapshot, write_manifest
from shared.training.tensorboard import TensorBoard
from shared.training.validation import Validation

logger = logging.getLogger(__name__)

SECONDS_FOR_A_REPORT = 10  # in which the master has what the trial reported
_BETWEEN_QUESTIONS = 0.05
SECONDS_BETWEEN_UPLOADS = 1.1  # Determined uploads TensorBoard's files once a second at most


class ClusterRun(Run):
    """A trial's run.

    Args:
        policy: `checkpoint_policy`: "best", "all" or "none".
    """

    def __init__(self, opened: core.Context, trial_id: int, metric: SearcherMetric, policy: str):
        self.core, self.trial_id, self.metric, self.policy = opened, trial_id, metric, policy
        self.is_chief = opened.distributed.rank == 0
        self.folder = Path.cwd()
        self.code = Path(det.constants.MANAGED_TRAINING_MODEL_COPY)
        self._validated_at = -1  # by this start

    def begin(self, first_batch: int, profiling: bool) -> None:
        if profiling:
            self.core.profiler.on()

    def open_tensorboard(self, first_batch: int) -> SummaryWriter:
        return SummaryWriter(str(self.core.train.get_tensorboard_path()))

    def set_status(self, status: str) -> None:
        self.core.train.set_status(status)

    def report_training(self, batches: int, epochs: int, metrics: dict[str, float], steering: dict[str, float]) -> None:
        self.core.train.report_training_metrics(batches, {**steering, "batches": batches, "epochs": epochs})

    def report_validation(self, validation: Validation, epochs: int, evaluator: ChiefReducer, is_best: bool) -> bool:
        metrics = validation.for_master(self.metric)
        best_before = self.core.train.get_experiment_best_validation()
        batches = self._validated_at = validation.batches
        self.core.train.report_validation_metrics(batches, {**metrics, "batches": batches, "epochs": epochs})
        value = validation.metrics[self.metric.name]
        logger.info("batch %d: %s %.4f%s", batches, self.metric.name, value, " (best so far)" if is_best else "")
        is_best_of_experiment = self.metric.is_better(metrics[self.metric.name], best_before)
        return self.policy == "all" or (self.policy == "best" and is_best_of_experiment)

    def last_validation(self) -> int | None:
        return last_validation(self.trial_id)

    def store(self, snapshot: Snapshot, write_own: Callable[[Path], None]) -> None:
        with self.core.checkpoint.store_path(snapshot.metadata) as (path, _):
            snapshot.write(path, self.code)
            write_own(path)
            write_manifest(path, snapshot.metadata["steps_completed"])

    def is_stopped_elsewhere(self) -> bool:
        return trial_is_stopping(self.trial_id, self._validated_at)

    def at_boundary(self, progress: float, tensorboard: TensorBoard | None) -> bool:
        self._upload(tensorboard)
        if self.is_chief:
            self.core.train.report_progress(progress)
        return self.core.preempt.should_preempt()

    def finish(self, tensorboard: TensorBoard | None) -> None:
        time.sleep(SECONDS_BETWEEN_UPLOADS)
        self._upload(tensorboard)

    def _upload(self, board: TensorBoard | None) -> None:
        if board is not None:
            board.flush()
        self.core.train.upload_tensorboard_files(
            (lambda _: True) if self.is_chief else (lambda path: not path.match("*tfevents*")),
            tensorboard.util.get_rank_aware_path,
        )


def trial_is_stopping(trial_id: int, validated_at: int) -> bool:
    """Whether the searcher stopped the trial.

    `adaptive_asha` marks a trial as stopping in the master, and nothing signals the trial: without this question, all
    trials of a search train to the end. Determined sends a report in a thread of its own. If the question comes before
    the report, the answer comes with the next one. If that is a validation, the master counts it as another trial's,
    and begins one more trial for it, beyond max_concurrent_trials.

    Args:
        validated_at: batches of the last validation, which the master should know; -1 before the first.
    """
    until = time.monotonic() + SECONDS_FOR_A_REPORT
    try:
        while True:
            trial = client.get_trial(trial_id)
            if trial.state is not None and trial.state.name.startswith("STOPPING"):
                return True
            if _last_validation_of(trial) >= validated_at or time.monotonic() > until:
                return False
            time.sleep(_BETWEEN_QUESTIONS)
    except Exception as error:  # whatever the network does, it must not end the training
        logger.warning("the master could not be asked whether trial %d shall stop: %s", trial_id, error)
        return False


def last_validation(trial_id: int) -> int | None:
    """The batches of the last validation that the master knows of a trial; None without one.

    `det.get_cluster_info()` has no public name for it.
    """
    try:
        batches = _last_validation_of(client.get_trial(trial_id))
    except Exception as error:  # then a validation is repeated
        logger.warning("the master could not be asked for the validations of trial %d: %s", trial_id, error)
        return None
    return int(batches) if 0 <= batches < math.inf else None


def _last_validation_of(trial: client.Trial) -> float:
    """-1 without a validation."""
    reported = (trial.summary_metrics or {}).get("validation_metrics")
    return reported.get("batches", {}).get("last", math.inf) if reported else -1
