"""A number of two detectors, and how sure it is which is above; the interval around any number."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

_NORMAL = statistics.NormalDist()
_DEVIATIONS = 1.96  # of the normal distribution: 95 %


def interval_around(value: float, standard_error: float, least: float, most: float) -> tuple[float, float]:
    """Lower and upper end of the 95 % interval: 1.96 bootstrap standard errors to each side.

    The bootstrap's percentiles may not even hold the number. A category that few images have is in none of those drawn
    now and then, and its wrong detections are forgotten there.

    Args:
        least, most: what the number can be.
    """
    ends = max(value - _DEVIATIONS * standard_error, least), min(value + _DEVIATIONS * standard_error, most)
    assert ends[0] <= value <= ends[1], f"the interval {ends} does not hold {value}"
    return ends


@dataclass(frozen=True)
class Difference:
    """By how much B is above A; nan where one of them has nothing to score.

    Attributes:
        name: of the metric, or the category.
        a, b, delta: the numbers, and b - a.
        lower, upper: of the 95 % interval around delta, see `interval_around`; nan without a bootstrap.
        better: the probability that B is above A, by the normal distribution that the interval is of; nan without a
            bootstrap, and if the two are the same.
    """

    name: str
    a: float
    b: float
    delta: float
    lower: float = math.nan
    upper: float = math.nan
    better: float = math.nan

    @classmethod
    def of(cls, name: str, a: float, b: float, standard_error: float) -> Difference:
        """The difference of two shares, with its interval.

        Args:
            standard_error: of b - a, by a bootstrap over the same images for both; nan without one.
        """
        delta = b - a
        if math.isnan(delta) or math.isnan(standard_error):
            return cls(name, a, b, delta)
        better = _NORMAL.cdf(delta / standard_error) if standard_error > 0 else math.nan
        return cls(name, a, b, delta, *interval_around(delta, standard_error, -1.0, 1.0), better)

    @property
    def verdict(self) -> str:
        """ "better" or "worse" where the interval is on one side of 0, else ""."""
        return "better" if self.lower > 0 else "worse" if self.upper < 0 else ""
