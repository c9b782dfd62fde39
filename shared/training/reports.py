"""Where the numbers of a training go beside the master: TensorBoard, the log, the table at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from determined.pytorch import PyTorchCallback
from PIL import Image

from shared.data.images import read_image
from shared.evaluation import visualization
from shared.evaluation.evaluator import CocoEvaluator
from shared.evaluation.table import metrics_table
from shared.experiment import SplitData
from shared.training.progress import Progress, summary_of
from shared.training.report_figures import ReportFigures

if TYPE_CHECKING:
    from shared.training.trial import DetectionTrial

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
    return visualization.side_by_side(samples, annotations.categories, width=width)


def table_of(trial: DetectionTrial) -> str:
    """The numbers of the last validation, all of them."""
    return metrics_table({**trial.last_validation, **trial.category_ap}, trial.iou_types)
