"""A run off the cluster: everything it leaves lies in one folder, and it can be taken up again."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import shutil
import threading
from collections.abc import Iterator
from typing import Any

from determined.pytorch import PyTorchCallback

from shared.errors import UserError
from shared.evaluation.evaluator import CocoEvaluator, for_json
from shared.evaluation.gathered import save_detections
from shared.training.loggers import Loggers
from shared.training.run_folder import RunFolder
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)


class LocalRun(PyTorchCallback):
    """Writes the reports and keeps the last and the best checkpoint. Only the chief acts."""

    def __init__(self, trial: DetectionTrial, folder: RunFolder, loggers: Loggers):
        self.trial = trial
        self.folder = folder
        self.loggers = loggers
        self.chief = trial.rank == 0
        self.best: float | None = None
        self.best_at = -1
        self.saves_best = False
        if self.chief:
            # a run that begins anew validates before its first batch once more
            folder.forget_metrics_after(trial.first_batch or -1)

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.trial.searcher_metric.name, "best": self.best, "best_at": self.best_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        metric = self.trial.searcher_metric.name
        self.best, self.best_at = state["best"], state["best_at"]
        if state.get("metric") != metric:  # older checkpoints do not name it
            report = self.folder.validation_after(self.best_at)
            of_metric = report and report["metrics"].get(metric)
            if of_metric is not None or "metric" in state:
                self.best = of_metric
                logger.info("the best %s so far: %s", metric, "unknown" if of_metric is None else of_metric)

    def on_training_workload_end(self, avg_metrics: dict[str, Any], batch_metrics: list) -> None:
        if self.trial.report_is_whole():
            self._report("train", self.trial.training_metrics.last)

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        trial, wanted = self.trial, self.trial.searcher_metric
        value = trial.last_validation[wanted.name]
        value = wanted.worst if math.isnan(value) else value
        if wanted.is_better(value, self.best):
            self.best, self.best_at = value, trial.batches_trained
            if self.chief and isinstance(trial.evaluator, CocoEvaluator):
                names = trial.evaluator.annotations.category_names
                save_detections(self.folder.detections, trial.evaluator.found_by_id(), names)
        self._report("val", {**trial.last_validation, **trial.category_ap})
        if self.chief:
            logger.info(
                "batch %d: %s %.4f%s",
                trial.batches_trained,
                wanted.name,
                trial.last_validation[wanted.name],
                " (best so far)" if self.best_at == trial.batches_trained else "",
            )

    def on_checkpoint_save_start(self, checkpoint: dict[str, Any]) -> None:
        self.saves_best = self.best_at == self.trial.batches_trained

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        # called beside the training, which may have come further
        saved = self.folder.saved(uuid)
        if self.saves_best:
            # before `last`: killed in between, the resumed run comes by here again
            copy = self.folder.saving / "best"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(saved, copy)  # no links: damage to one must leave the other
            self.folder.replace("best", copy)
        self.folder.replace("last", saved)

    def on_trial_shutdown(self) -> None:
        # a second Ctrl-C does not wait for a checkpoint, which the thread that writes it may just be about to rename
        if self.chief and self.trial.saving.is_idle:
            shutil.rmtree(self.folder.saving, ignore_errors=True)

    def _report(self, split: str, metrics: dict[str, float]) -> None:
        if not self.chief:
            return
        plain = for_json(metrics)
        self.folder.append_report(self.trial.batches_trained, split, plain)
        self.loggers.report(self.trial.batches_trained, split, plain)


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
