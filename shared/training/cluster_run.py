"""A trial of a cluster: the master gets its reports, Determined's storage its checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import determined as det
from determined import core, tensorboard
from torch.utils.tensorboard import SummaryWriter

from shared.config.schema import SearcherMetric
from shared.evaluation.gathered import ChiefReducer
from shared.training.checkpoints import write_manifest
from shared.training.determined_fixes import last_validation, trial_is_stopping
from shared.training.run import Run
from shared.training.saving import Snapshot
from shared.training.tensorboard import TensorBoard
from shared.training.validation import Validation

logger = logging.getLogger(__name__)

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
