"""TensorBoard's numbers and pictures."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from determined.pytorch import PyTorchCallback
from PIL import Image

from shared.data.images import read_image
from shared.data.open import SplitData
from shared.evaluation import drawing
from shared.evaluation.evaluator import CocoEvaluator, metrics_table
from shared.training.training_metrics import Progress, summary_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from shared.evaluation.gathered import GatheredDetections
    from shared.training.trial import DetectionTrial


logger = logging.getLogger(__name__)


class ReportFigures:
    """Draws on a thread of its own; a validation that ends while the figures of an earlier one are still being drawn
    has none, but for the last.

    What is drawn the training writes itself, at its next report: Determined closes the writer at each upload, and what
    another thread is just adding is lost.
    """

    def __init__(self, tensorboard: SummaryWriter) -> None:
        self._tensorboard = tensorboard
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="figures")
        self._drawing: list[tuple[int, Future[dict[str, np.ndarray]]]] = []

    def draw(self, evaluator: CocoEvaluator, batches: int, is_last: bool) -> None:
        """Begins to draw what the evaluator's last metrics are of."""
        self.write()
        if is_last or not self._drawing:
            self._drawing.append((batches, self._thread.submit(_draw, evaluator, evaluator.found, batches)))

    def write(self) -> None:
        """Writes what has been drawn since the last call."""
        while self._drawing and self._drawing[0][1].done():
            batches, drawn = self._drawing.pop(0)
            try:
                for tag, picture in drawn.result().items():
                    self._tensorboard.add_image(tag, picture, batches, dataformats="HWC")
            except OSError as error:  # a full disk is the training's to meet
                logger.warning("the figures of the validation at batch %d could not be written: %s", batches, error)

    def close(self) -> None:
        """Waits for what is being drawn, and writes it."""
        self._thread.shutdown()
        self.write()


def _draw(evaluator: CocoEvaluator, found: GatheredDetections, batches: int) -> dict[str, np.ndarray]:
    """(height, width, 3) pictures by their tags; none where they cannot be drawn."""
    try:
        # matplotlib takes half a second to import
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        from shared.report.analysis import analyse_one
        from shared.report.plots import figures_of

        names = evaluator.annotations.category_names
        pictures = {}
        for iou_type in evaluator.iou_types:
            for title, figure in figures_of(analyse_one(evaluator, iou_type, found), names).items():
                canvas = FigureCanvasAgg(figure)
                canvas.draw()
                pictures[f"report_{iou_type}/{title}"] = np.asarray(canvas.buffer_rgba())[..., :3]
        return pictures
    except Exception:  # no figure is worth a training
        logger.exception("the figures of the validation at batch %d could not be drawn", batches)
        return {}


_WIDTH = 700  # pixels, of the pictures in TensorBoard


class Reports(PyTorchCallback):
    """TensorBoard's groups train, val, categories and report_…, pictures of each validation; how far the training is.

    Only the chief writes. `trial.tensorboard` is its SummaryWriter.
    """

    def __init__(self, trial: DetectionTrial):
        self.trial = trial
        self.chief = trial.rank == 0
        if self.chief:
            self.figures = ReportFigures(trial.tensorboard)
            trial.finish_figures = self.figures.close
            self.progress = Progress(trial.first_batch, trial.total_batches)
            trial.on_batch_end = self.progress.update

    def on_training_workload_end(self, avg_metrics: dict[str, Any], batch_metrics: list) -> None:
        if self.chief:
            self.figures.write()
        if self.chief and self.trial.report_is_whole():
            metrics = self.trial.training_metrics.last
            self._write("train", metrics)
            self.progress.describe(summary_of(metrics))

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        if not self.chief:
            return
        self._write("val", self.trial.last_validation)
        self._write("categories", self.trial.category_ap)
        trial, batches = self.trial, self.trial.batches_trained
        if picture := picture_of_validation(trial, _WIDTH):
            trial.tensorboard.add_image("val/detections", np.asarray(picture), batches, dataformats="HWC")
        if isinstance(trial.evaluator, CocoEvaluator):
            self.figures.draw(trial.evaluator, batches, trial.is_at_its_end)

    def on_trial_shutdown(self) -> None:
        if self.chief:
            self.figures.close()
            self.progress.close()

    def _write(self, group: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.trial.tensorboard.add_scalar(f"{group}/{name}", value, self.trial.batches_trained)


def picture_of_validation(trial: DetectionTrial, width: int = 1400) -> Image.Image | None:
    """Detections of the last validation beside the truth, `width` pixels wide, on the first images of it; None where
    there are none, or where the detector's library evaluates data of its own."""
    if not trial.pictured or not isinstance(trial.val_data, SplitData):
        return None
    annotations, images = trial.val_data.annotations, trial.val_data.images
    samples = []
    for found in trial.pictured:
        record = annotations[int(np.flatnonzero(annotations.image_ids == found.image_id)[0])]
        samples.append((read_image(images, record.file_name), record, found))
    return drawing.side_by_side(samples, annotations.categories, width=width)


def table_of(trial: DetectionTrial) -> str:
    """The numbers of the last validation, all of them."""
    return metrics_table({**trial.last_validation, **trial.category_ap}, trial.iou_types)
