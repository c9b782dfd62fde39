"""The lowest scores that are drawn: a number, or the best thresholds in the report of the checkpoint's run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import UserError
from shared.evaluation.detections import Detections

BEST, PER_CATEGORY = "best", "best-per-category"


@dataclass(frozen=True)
class ScoreLimits:
    """The lowest score of each category.

    Attributes:
        scores: (K,) float64 by label.
        text: which detections have at least these, in words.
    """

    scores: np.ndarray
    text: str

    def allow(self, detections: Detections) -> np.ndarray:
        """(M,) bool: which detections have the lowest score or more."""
        return detections.scores >= self.scores.astype(detections.scores.dtype)[detections.labels]


def score_limits(given: float | str, checkpoint: Path | None, categories: Sequence[dict]) -> ScoreLimits:
    """The limits of `--min-score`.

    Args:
        checkpoint: its folder; None for pretrained weights.
        given: a number; "best", the threshold with the greatest F1; or "best-per-category", that of each category. A
            category without a correct detection has the threshold over all categories.

    Raises:
        UserError: the checkpoint is of no run with a report, or no detection in the report is correct.
    """
    if isinstance(given, str):
        report, source = _report_of(given, checkpoint)
        if (best := report["best_threshold"]) is None:
            raise UserError(f"--min-score {given}: no detection is correct in {source}. Fix: give a number")
        if given == PER_CATEGORY:
            known = {row["name"]: row["threshold"] for row in report["bbox"]["categories"]}
            own = [known.get(category["name"]) for category in categories]
            scores = np.array([best if score is None else score for score in own], np.float64)
            return ScoreLimits(scores, "of at least their category's best score")
        given = best
    return ScoreLimits(np.full(len(categories), given, np.float64), f"of at least {given:g}")


def _report_of(given: str, checkpoint: Path | None) -> tuple[dict[str, Any], str]:
    path = checkpoint and checkpoint.parent.parent / "report.json"
    if path is None or not path.is_file():
        raise UserError(
            f"--min-score {given}: {checkpoint or 'the pretrained weight file'} is of no run with "
            "a report. Fix: give a number; `evaluate` prints the best one"
        )
    return json.loads(path.read_text()), str(path)
