"""A run: the place for reports and checkpoints that the engine needs. One is in a folder, the other on a cluster.

The last functions correct what a Determined 0.38.1 master does not do by itself. tests/test_determined_fixes.py shows
each.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import shutil
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import determined as det
import numpy as np
from determined import core, tensorboard
from determined.experimental import client
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from shared.config.schema import SearcherMetric
from shared.data.images import read_image
from shared.data.open import SplitData
from shared.errors import UserError
from shared.evaluation import drawing
from shared.evaluation.evaluator import CocoEvaluator, for_json
from shared.evaluation.gathered import ChiefReducer, GatheredDetections, save_detections
from shared.training.loggers import Loggers
from shared.training.run_folder import RunFolder
from shared.training.run_store import RunStore
from shared.training.saving import METADATA, Background, Snapshot
from shared.training.stopping import StopSignals
from shared.training.trial import DetectionTrial
from shared.training.validation import Validation

logger = logging.getLogger(__name__)

_WIDTH = 700  # pixels, of a validation's picture
DrawFigures = Callable[[CocoEvaluator, GatheredDetections], dict[str, np.ndarray]]
"""Draws the figures of an evaluation: (height, width, 3) pictures by their tags."""


class TensorBoard:
    """TensorBoard's groups train, val, categories and report_…, and a picture of each validation; on the chief.

    A thread draws the figures of report_…. A validation that ends while earlier figures are being drawn gets none,
    unless it is the last one. The training writes what is drawn, at its next report: each upload closes the writer's
    file, and what another thread adds at that moment would be lost.
    """

    def __init__(self, writer: SummaryWriter, draw: DrawFigures):
        self._writer = writer
        self._draw = draw
        self._drawing = Background("figures", self._warn)
        self._drawn: deque[tuple[int, dict[str, np.ndarray]]] = deque()
        self._file_since = time.time()

    def write(self, group: str, metrics: dict[str, float], batches: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{group}/{name}", value, batches)

    def write_validation(self, trial: DetectionTrial, validation: Validation, is_last: bool) -> None:
        self.write("val", validation.metrics, validation.batches)
        self.write("categories", validation.category_ap, validation.batches)
        if picture := picture_of(trial, validation, _WIDTH):
            self._writer.add_image("val/detections", np.asarray(picture), validation.batches, dataformats="HWC")
        if isinstance(trial.evaluator, CocoEvaluator):
            self.draw_figures(trial.evaluator, validation.batches, is_last)

    def draw_figures(self, evaluator: CocoEvaluator, batches: int, is_last: bool) -> None:
        """Begins to draw the figures of the evaluator's last metrics."""
        self.write_figures()
        if is_last or self._drawing.is_idle:
            found = evaluator.found
            self._drawing.begin(lambda: self._drawn.append((batches, self._draw(evaluator, found))))

    def write_figures(self, wait: bool = False) -> None:
        """Writes the figures that were drawn since the last call. `wait`: also those that are being drawn."""
        if wait:
            self._drawing.wait()
        while self._drawn:
            batches, pictures = self._drawn.popleft()
            try:
                for tag, picture in pictures.items():
                    self._writer.add_image(tag, picture, batches, dataformats="HWC")
            except OSError as error:  # the training meets a full disk itself
                logger.warning("the figures of the validation at batch %d could not be written: %s", batches, error)

    def flush(self) -> None:
        """Makes all that was written ready for an upload. A new file for each upload keeps uploads small. Files have
        the second in their names, so that there is no new one before the next second."""
        now = time.time()
        if int(now) > int(self._file_since):
            self._writer.close()
            self._file_since = now
        else:
            self._writer.flush()

    def close(self) -> None:
        self.write_figures(wait=True)
        self._writer.close()

    def _warn(self, error: Exception) -> None:
        logger.error("the figures of a validation could not be drawn", exc_info=error)  # none is worth a training


def picture_of(trial: DetectionTrial, validation: Validation, width: int = 1400) -> Image.Image | None:
    """Detections on the first images of a validation beside the truth, `width` pixels wide. None without detections, or
    if the detector's library evaluates data of its own."""
    if not validation.pictured or not isinstance(trial.val_data, SplitData):
        return None
    annotations, images = trial.val_data.annotations, trial.val_data.images
    samples = []
    for found in validation.pictured:
        record = annotations[int(np.flatnonzero(annotations.image_ids == found.image_id)[0])]
        samples.append((read_image(images, record.file_name), record, found))
    return drawing.side_by_side(samples, annotations.categories, width=width)


SECONDS_FOR_A_REPORT = 10  # in which the master has what the trial reported
_BETWEEN_QUESTIONS = 0.05
SECONDS_BETWEEN_UPLOADS = 1.1  # Determined uploads TensorBoard's files once a second at most


class Run:
    """Takes a run's reports and checkpoints. Only the chief calls a method, unless it says "on every rank"."""

    trial_id: int = 0  # of the cluster's trial. A checkpoint of another trial starts a new count of batches
    signals: StopSignals | None = None  # those that stop the training after a batch
    folder: Path  # for what a detector's library writes
    code: Path  # the folder of the code that a checkpoint holds

    @abstractmethod
    def begin(self, first_batch: int) -> SummaryWriter:
        """Before the first batch, once the loader's workers are there. Returns the writer of TensorBoard's files."""

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
    def store(self, snapshot: Snapshot) -> None:
        """Writes a checkpoint; called in a thread."""

    def at_boundary(self, progress: float, tensorboard: TensorBoard | None) -> str | None:
        """After reports and checkpoints, on every rank. Returns what stops the trial on a cluster, as far as this rank
        knows."""

    def finish(self, tensorboard: TensorBoard | None) -> None:
        """After the last checkpoint of this start, on every rank."""


class LocalRun(Run):
    """A folder's run. It keeps the last checkpoint and the best one.

    Args:
        policy: `checkpoint_policy`. "best" saves after each validation too: the last one is kept as well.
        run_store: for a copy of the folder; None without, and on other ranks than the chief.
    """

    def __init__(
        self,
        folder: RunFolder,
        loggers: Loggers,
        policy: str,
        signals: StopSignals | None = None,
        run_store: RunStore | None = None,
    ):
        self.run_folder, self.loggers, self.policy = folder, loggers, policy
        self.signals, self.run_store = signals, run_store
        self.folder, self.code = folder.path, folder.code

    def begin(self, first_batch: int) -> SummaryWriter:
        # a run that starts again from batch 0 repeats the validation before its first batch
        self.run_folder.forget_metrics_after(first_batch or -1)
        return SummaryWriter(str(self.run_folder.tensorboard), purge_step=first_batch + 1 if first_batch else 0)

    def report_training(self, batches: int, epochs: int, metrics: dict[str, float], steering: dict[str, float]) -> None:
        self._report(batches, "train", metrics)

    def report_validation(self, validation: Validation, epochs: int, evaluator: ChiefReducer, is_best: bool) -> bool:
        if is_best and isinstance(evaluator, CocoEvaluator):
            names = evaluator.annotations.category_names
            save_detections(self.run_folder.detections, evaluator.found, names, evaluator.max_detections)
        self._report(validation.batches, "val", {**validation.metrics, **validation.category_ap})
        if self.run_store is not None:
            self.run_store.send()
        return self.policy != "none"

    def earlier_value(self, batches: int, metric: str) -> float | None:
        report = self.run_folder.validation_after(batches)
        return report and report["metrics"].get(metric)

    def holds(self, checkpoint: Path) -> bool:
        return checkpoint.parent == self.run_folder.checkpoints

    def store(self, snapshot: Snapshot) -> None:
        new = self.run_folder.saving / "last"
        try:
            snapshot.write(new, self.code)
            (new / METADATA).write_text(json.dumps(snapshot.metadata))
            self.run_folder.keep(new, is_best=snapshot.is_best)
        finally:
            shutil.rmtree(self.run_folder.saving, ignore_errors=True)
        if self.run_store is not None:
            self.run_store.add_checkpoint(snapshot.is_best)

    def at_boundary(self, progress: float, tensorboard: TensorBoard | None) -> None:
        if self.run_store is not None:
            self.run_store.raise_if_failed()

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
        if not folder.path.exists():  # of a rank on another machine, which writes none of the run's files
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


# --- on a cluster ------------------------------------------------------------------------------------


class ClusterRun(Run):
    """A trial's run. `policy` is `checkpoint_policy`: "best", "all" or "none"."""

    def __init__(self, opened: core.Context, trial_id: int, metric: SearcherMetric, policy: str):
        self.core, self.trial_id, self.metric, self.policy = opened, trial_id, metric, policy
        self.is_chief = opened.distributed.rank == 0
        self.folder = Path.cwd()
        self.code = Path(det.constants.MANAGED_TRAINING_MODEL_COPY)
        self._validated_at = -1  # by this start

    def begin(self, first_batch: int) -> SummaryWriter:
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
        is_best_of_experiment = self.metric.is_better(metrics[self.metric.name], best_before)
        return self.policy == "all" or (self.policy == "best" and is_best_of_experiment)

    def last_validation(self) -> int | None:
        # `det.get_cluster_info()` has no public name for it
        try:
            batches = _last_validation_of(client.get_trial(self.trial_id))
        except Exception as error:  # then a validation is repeated
            logger.warning("cannot ask the master for the validations of trial %d: %s", self.trial_id, error)
            return None
        return int(batches) if 0 <= batches < math.inf else None

    def store(self, snapshot: Snapshot) -> None:
        with self.core.checkpoint.store_path(snapshot.metadata) as (path, _):
            snapshot.write(path, self.code)

    def at_boundary(self, progress: float, tensorboard: TensorBoard | None) -> str | None:
        self._upload(tensorboard)
        if self.is_chief:
            self.core.train.report_progress(progress)
        if self.core.preempt.should_preempt():
            return "a pause"
        is_stopping = self.is_chief and trial_is_stopping(self.trial_id, self._validated_at)
        return "the searcher" if is_stopping else None

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
        logger.warning("cannot ask the master whether trial %d should stop: %s", trial_id, error)
        return False


def _last_validation_of(trial: client.Trial) -> float:
    """-1 without a validation."""
    reported = (trial.summary_metrics or {}).get("validation_metrics")
    return reported.get("batches", {}).get("last", math.inf) if reported else -1
