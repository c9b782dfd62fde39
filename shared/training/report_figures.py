"""The report's figures of each validation, in TensorBoard, drawn while the training goes on."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from shared.evaluation.evaluator import CocoEvaluator

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from shared.evaluation.gathered import GatheredDetections

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
