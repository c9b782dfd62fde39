"""Sides that take turns, so that noise on the machine changes all of them. And the figures of their results."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

Side = Callable[[int], float]


def in_turns(sides: dict[Any, Side], turns: int, warm_up: int = 1) -> dict[Any, list[float]]:
    """The figure of each side in each turn. Each turn begins with the next side.

    Args:
        sides: each takes the number of the turn, and returns its figure, such as seconds.
        turns: turns that count.
        warm_up: turns before them.
    """
    measured, names = {name: [] for name in sides}, list(sides)
    for turn in range(warm_up + turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            measured[name].append(sides[name](turn))
    return {name: figures[warm_up:] for name, figures in measured.items()}


def seconds_of(work: Callable, *arguments: object, clock: Callable[[], float] = time.process_time) -> float:
    """The seconds that a call takes, by default of the CPU."""
    started = clock()
    work(*arguments)
    return clock() - started


def ratio(ours: Sequence[float], others: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """The median of our figure divided by the other side's, turn by turn, and the least and the greatest."""
    pairs = [one / other for one, other in zip(ours, others, strict=True)]
    return {
        "ratio_median": round(statistics.median(pairs), digits),
        "ratio_min_max": [round(min(pairs), digits), round(max(pairs), digits)],
    }


def spread(values: Sequence[float], digits: int = 1, middle: Callable = statistics.median) -> str:
    """The median or another middle, with the least and the greatest."""
    return f"{middle(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
