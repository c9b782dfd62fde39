"""The report's figures of each validation, in TensorBoard, drawn while the training goes on."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from shared.evaluation.evaluator import CocoEvaluator

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from shared.evaluation.gathered import GatheredDetections

logger = logging.getLogger(__name__)


class ReportFigures:
    """Draws on a thread of its own; a validation that ends while the figures of an earlier one are still being drawn
    has none, but for the last."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="figures")
        self._drawing: Future | None = None

    def draw(self, evaluator: CocoEvaluator, tensorboard: SummaryWriter, batches: int, is_last: bool) -> None:
        """Begins to draw what the evaluator's last metrics are of."""
        if is_last or self._drawing is None or self._drawing.done():
            self._drawing = self._thread.submit(_draw, evaluator, evaluator.found, tensorboard, batches)

    def close(self) -> None:
        """Waits for what is being drawn."""
        self._thread.shutdown()


def _draw(evaluator: CocoEvaluator, found: GatheredDetections, tensorboard: SummaryWriter, batches: int) -> None:
    try:
        # matplotlib takes half a second to import
        from shared.report.analysis import analyse_one
        from shared.report.plots import figures_of

        names = evaluator.annotations.category_names
        for iou_type in evaluator.iou_types:
            for title, figure in figures_of(analyse_one(evaluator, iou_type, found), names).items():
                tensorboard.add_figure(f"report_{iou_type}/{title}", figure, batches)
    except OSError as error:  # a full disk is the training's to meet
        logger.warning("the figures of the validation at batch %d could not be written: %s", batches, error)
    except Exception:  # no figure is worth a training
        logger.exception("the figures of the validation at batch %d could not be drawn", batches)
