"""TensorBoard's numbers and pictures."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from shared.data.images import read_image
from shared.data.open import SplitData
from shared.evaluation import drawing
from shared.evaluation.evaluator import CocoEvaluator
from shared.evaluation.gathered import GatheredDetections
from shared.training.saving import Background
from shared.training.trial import DetectionTrial
from shared.training.validation import Validation

logger = logging.getLogger(__name__)

_WIDTH = 700  # pixels, of a validation's picture
DrawFigures = Callable[[CocoEvaluator, GatheredDetections], dict[str, np.ndarray]]
"""Draws the figures of an evaluation: (height, width, 3) pictures by their tags."""


class TensorBoard:
    """TensorBoard's groups train, val, categories and report_…, and a picture of each validation; on the chief."""

    def __init__(self, writer: SummaryWriter, draw: DrawFigures):
        self._writer = writer
        self.figures = ReportFigures(writer, draw)
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
            self.figures.draw(trial.evaluator, validation.batches, is_last)

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
        self.figures.close()
        self._writer.close()


class ReportFigures:
    """Draws in a thread of its own. A validation that ends while earlier figures are being drawn gets none, unless it
    is the last one.

    The training writes what is drawn, at its next report: each upload closes the writer's file, and what another thread
    adds at that moment would be lost.
    """

    def __init__(self, writer: SummaryWriter, draw: DrawFigures):
        self._writer = writer
        self._draw = draw
        self._background = Background("figures", self._warn)
        self._drawn: deque[tuple[int, dict[str, np.ndarray]]] = deque()

    def draw(self, evaluator: CocoEvaluator, batches: int, is_last: bool) -> None:
        """Begins to draw the figures of the evaluator's last metrics."""
        self.write()
        if is_last or self._background.is_idle:
            found = evaluator.found
            self._background.begin(lambda: self._drawn.append((batches, self._draw(evaluator, found))))

    def write(self) -> None:
        """Writes what was drawn since the last call."""
        while self._drawn:
            batches, pictures = self._drawn.popleft()
            try:
                for tag, picture in pictures.items():
                    self._writer.add_image(tag, picture, batches, dataformats="HWC")
            except OSError as error:  # the training meets a full disk itself
                logger.warning("the figures of the validation at batch %d could not be written: %s", batches, error)

    def close(self) -> None:
        """Waits for what is being drawn, and writes it."""
        self._background.wait()
        self.write()

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
