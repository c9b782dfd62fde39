"""A number of two detectors, and how sure it is which is above."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """By how much B is above A; nan where one of them has nothing to score.

    Attributes:
        name: of the metric, or the category.
        a, b, delta: the numbers, and b - a.
        lower, upper: of the 95 % bootstrap interval of delta; nan without a bootstrap.
        better: in which share of the resamples B is above A; nan without a bootstrap.
    """

    name: str
    a: float
    b: float
    delta: float
    lower: float = math.nan
    upper: float = math.nan
    better: float = math.nan

    @property
    def verdict(self) -> str:
        """ "better" or "worse" where the interval is on one side of 0, else ""."""
        return "better" if self.lower > 0 else "worse" if self.upper < 0 else ""
