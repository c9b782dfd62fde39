"""Which score to trust: F1 over the threshold under which detections are left out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ThresholdCurve:
    """Precision, recall and their harmonic mean, F1, of the detections of at least each score.

    Attributes:
        thresholds: (T,) float64, the scores that detections have, each once, from the highest on.
        precision, recall, f1: (T,) float64.
    """

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray

    @property
    def best(self) -> int | None:
        """Where F1 is greatest, the highest such score; None where nothing is right."""
        return int(self.f1.argmax()) if len(self.f1) and self.f1.max() > 0 else None

    @property
    def best_threshold(self) -> float:
        """nan where nothing is right."""
        return math.nan if self.best is None else float(self.thresholds[self.best])

    @property
    def best_f1(self) -> float:
        return math.nan if self.best is None else float(self.f1[self.best])


def threshold_curve(scores: np.ndarray, is_right: np.ndarray, objects: int) -> ThresholdCurve:
    """Of detections that are right or wrong.

    Args:
        scores: (M,).
        is_right: (M,) bool.
        objects: how many there are to find.
    """
    order = np.argsort(-scores, kind="stable")
    scores = scores[order].astype(np.float64)
    right = np.cumsum(is_right[order])
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True)) if len(scores) else np.empty(0, np.int64)
    right, found = right[last], last + 1.0
    return ThresholdCurve(
        thresholds=scores[last],
        precision=right / found,
        recall=right / objects if objects else np.zeros(len(last)),
        f1=2 * right / (found + objects),
    )
