"""TensorBoard's numbers and pictures."""

from __future__ import annotations

import logging
import time
from collections import deque

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from shared.data.images import read_image
from shared.data.open import SplitData
from shared.evaluation import drawing
from shared.evaluation.evaluator import CocoEvaluator
from shared.evaluation.gathered import GatheredDetections
from shared.training.background import Background
from shared.training.trial import DetectionTrial
from shared.training.validation import Validation

logger = logging.getLogger(__name__)

_WIDTH = 700  # pixels, of a validation's picture


class TensorBoard:
    """TensorBoard's groups train, val, categories and report_…, and a picture of each validation; on the chief."""

    def __init__(self, writer: SummaryWriter):
        self._writer = writer
        self._figures = ReportFigures(writer)
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
            self._figures.draw(trial.evaluator, validation.batches, is_last)

    def write_figures(self) -> None:
        """Writes the figures that were drawn since the last call."""
        self._figures.write()

    def flush(self) -> None:
        """Makes all that was written ready for an upload. A new file for each upload keeps uploads small. Files have the
        second in their names, so that there is no new one before the next second."""
        now = time.time()
        if int(now) > int(self._file_since):
            self._writer.close()
            self._file_since = now
        else:
            self._writer.flush()

    def close_figures(self) -> None:
        """Waits for the figures that are being drawn, and writes them."""
        self._figures.close()

    def close(self) -> None:
        self._figures.close()
        self._writer.close()


class ReportFigures:
    """Draws in a thread of its own. A validation that ends while earlier figures are being drawn gets none, unless it is
    the last one.

    The training writes what is drawn, at its next report: each upload closes the writer's file, and what another thread
    adds at that moment would be lost.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer
        self._background = Background("figures")
        self._drawn: deque[tuple[int, dict[str, np.ndarray]]] = deque()

    def draw(self, evaluator: CocoEvaluator, batches: int, is_last: bool) -> None:
        """Begins to draw the figures of the evaluator's last metrics."""
        self.write()
        if is_last or self._background.is_idle:
            found = evaluator.found
            self._background.begin(lambda: self._drawn.append((batches, _draw(evaluator, found, batches))))

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


def picture_of(trial: DetectionTrial, validation: Validation, width: int = 1400) -> Image.Image | None:
    """Detections on the first images of a validation beside the truth, `width` pixels wide. None if there are none, or
    the detector's library evaluates data of its own."""
    if not validation.pictured or not isinstance(trial.val_data, SplitData):
        return None
    annotations, images = trial.val_data.annotations, trial.val_data.images
    samples = []
    for found in validation.pictured:
        record = annotations[int(np.flatnonzero(annotations.image_ids == found.image_id)[0])]
        samples.append((read_image(images, record.file_name), record, found))
    return drawing.side_by_side(samples, annotations.categories, width=width)
