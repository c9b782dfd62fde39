"""A run: the place for reports and checkpoints that the engine needs; and one off the cluster, in a folder."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from shared.config.schema import SearcherMetric
from shared.errors import UserError
from shared.evaluation.evaluator import CocoEvaluator, for_json
from shared.evaluation.gathered import ChiefReducer, save_detections
from shared.training.loggers import Loggers
from shared.training.run_folder import RunFolder
from shared.training.saving import METADATA, Snapshot, write_manifest
from shared.training.tensorboard import TensorBoard
from shared.training.validation import Validation

logger = logging.getLogger(__name__)


class Run:
    """Takes a training's reports and checkpoints. Only the chief calls a method, unless it says "on every rank".

    Attributes:
        trial_id: of the cluster's trial, 0 off a cluster. A checkpoint of another trial starts a new count of batches.
        handles_signals: whether SIGTERM and Ctrl-C stop the training after a batch.
        folder: for what a detector's library writes.
        code: the folder of the code that a checkpoint holds.
    """

    trial_id: int = 0
    handles_signals: bool = False
    folder: Path
    code: Path

    def begin(self, first_batch: int, profiling: bool) -> None:
        """Before the first batch, on every rank."""

    @abstractmethod
    def open_tensorboard(self, first_batch: int) -> SummaryWriter:
        """The writer of TensorBoard's files."""

    def set_status(self, status: str) -> None:
        """The current activity of the training, in a word."""

    @abstractmethod
    def report_training(self, batches: int, epochs: int, metrics: dict[str, float], steering: dict[str, float]) -> None:
        """The numbers since the last report. `steering` are the losses and the learning rate."""

    @abstractmethod
    def report_validation(self, validation: Validation, epochs: int, evaluator: ChiefReducer, is_best: bool) -> bool:
        """The numbers of a validation. Returns whether `checkpoint_policy` asks for a checkpoint of it."""

    def last_validation(self) -> int | None:
        """The batches of the last validation that an earlier start reported; None if unknown."""
        return None

    def earlier_value(self, batches: int, metric: str) -> float | None:
        """The value of a metric in the validation after `batches`; None if unknown."""
        return None

    def holds(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is this run's own."""
        return True

    @abstractmethod
    def store(self, snapshot: Snapshot, write_own: Callable[[Path], None]) -> None:
        """Writes a checkpoint; called in a thread. `write_own` adds the detector's own files to a folder."""

    def is_stopped_elsewhere(self) -> bool:
        """Whether the searcher stopped the trial."""
        return False

    def at_boundary(self, progress: float, tensorboard: TensorBoard | None) -> bool:
        """After reports and checkpoints, on every rank. Returns whether the cluster pauses the trial."""
        return False

    def finish(self, tensorboard: TensorBoard | None) -> None:
        """After the last checkpoint of this start, on every rank."""

    def close(self, is_saved: bool) -> None:
        """At the end, also of an error. `is_saved`: no checkpoint is being written."""


class LocalRun(Run):
    """A folder's run. It keeps the last checkpoint and the best one.

    Args:
        policy: `checkpoint_policy`. "best" saves after each validation too: the last one is kept as well.
    """

    handles_signals = True

    def __init__(self, folder: RunFolder, loggers: Loggers, metric: SearcherMetric, policy: str, is_chief: bool):
        self.run_folder, self.loggers, self.metric, self.policy = folder, loggers, metric, policy
        self.is_chief = is_chief
        self.folder, self.code = folder.path, folder.code

    def begin(self, first_batch: int, profiling: bool) -> None:
        if self.is_chief:
            # a run that starts again from batch 0 repeats the validation before its first batch
            self.run_folder.forget_metrics_after(first_batch or -1)

    def open_tensorboard(self, first_batch: int) -> SummaryWriter:
        return SummaryWriter(str(self.run_folder.tensorboard), purge_step=first_batch + 1 if first_batch else 0)

    def report_training(self, batches: int, epochs: int, metrics: dict[str, float], steering: dict[str, float]) -> None:
        self._report(batches, "train", metrics)

    def report_validation(self, validation: Validation, epochs: int, evaluator: ChiefReducer, is_best: bool) -> bool:
        if is_best and isinstance(evaluator, CocoEvaluator):
            names = evaluator.annotations.category_names
            save_detections(self.run_folder.detections, evaluator.found_by_id(), names, evaluator.max_detections)
        self._report(validation.batches, "val", {**validation.metrics, **validation.category_ap})
        value, best = validation.metrics[self.metric.name], " (best so far)" if is_best else ""
        logger.info("batch %d: %s %.4f%s", validation.batches, self.metric.name, value, best)
        return self.policy != "none"

    def earlier_value(self, batches: int, metric: str) -> float | None:
        report = self.run_folder.validation_after(batches)
        return report and report["metrics"].get(metric)

    def holds(self, checkpoint: Path) -> bool:
        return checkpoint.parent == self.run_folder.checkpoints

    def store(self, snapshot: Snapshot, write_own: Callable[[Path], None]) -> None:
        new, metadata = self.run_folder.saving / "last", snapshot.metadata
        shutil.rmtree(new, ignore_errors=True)
        snapshot.write(new, self.code)
        write_own(new)
        (new / METADATA).write_text(json.dumps(metadata))
        write_manifest(new, metadata["steps_completed"])
        self.run_folder.keep(new, is_best=snapshot.is_best)

    def close(self, is_saved: bool) -> None:
        # a second Ctrl-C does not wait for a checkpoint, and its thread may be about to rename the folder
        if is_saved:
            shutil.rmtree(self.run_folder.saving, ignore_errors=True)

    def _report(self, batches: int, split: str, metrics: dict[str, float]) -> None:
        plain = for_json(metrics)
        self.run_folder.append_report(batches, split, plain)
        self.loggers.report(batches, split, plain)


@contextlib.contextmanager
def full_disk_as_error(folder: RunFolder) -> Iterator[None]:
    """Raises UserError if a checkpoint, a report or another file of the run cannot be written."""
    print_of_thread = threading.excepthook
    # TensorBoard's thread: what it raises there is raised here too, at the next report
    threading.excepthook = lambda ended: None if _is_of_disk(ended.exc_value) else print_of_thread(ended)
    try:
        yield
    except (OSError, RuntimeError) as error:
        of_disk = _is_of_disk(error)
        # shutil.copytree gathers what went wrong as text; torch.save says where in its own code
        of_copy = isinstance(error, shutil.Error) and "[Errno" in str(error)
        of_torch = "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
        if not (of_disk or of_copy or of_torch):
            raise
        free = shutil.disk_usage(folder.path).free / 2**20
        reason = error.strerror if of_disk else "a checkpoint was not written to its end"
        raise UserError(
            f"--output-dir: {folder.path} cannot be written ({reason}; {free:,.0f} MiB are free there). Its "
            "checkpoints are complete. Fix: make room, and run the same command with --resume auto"
        ) from error
    finally:
        threading.excepthook = print_of_thread


def _is_of_disk(error: BaseException | None) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
