"""A run off the cluster: everything it leaves lies in one folder."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from shared.config.schema import SearcherMetric
from shared.errors import UserError
from shared.evaluation.evaluator import CocoEvaluator, for_json
from shared.evaluation.gathered import ChiefReducer, save_detections
from shared.training.checkpoints import METADATA, write_manifest
from shared.training.loggers import Loggers
from shared.training.run import Run
from shared.training.run_folder import RunFolder
from shared.training.saving import Snapshot
from shared.training.validation import Validation

logger = logging.getLogger(__name__)


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
            save_detections(self.run_folder.detections, evaluator.found_by_id(), names)
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
