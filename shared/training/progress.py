"""How far a training is: a bar on a terminal, a line now and then where there is none."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """The bar or the lines of one training, or of another work in as many steps.

    Args:
        first, total: batches trained before, and at the end.
        unit: what is counted.
    """

    def __init__(self, first: int, total: int, unit: str = "batch"):
        self.first, self.total = first, total
        self.unit = unit
        self.batches = first
        self.text = ""
        self.started = self.last_line = time.monotonic()
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            initial=first,
            total=total,
            unit=unit,
            file=sys.stderr,
            mininterval=0.5,
            dynamic_ncols=True,
            disable=not self.on_terminal,
        )

    def update(self, count: int = 1) -> None:
        """So many more batches are trained."""
        self.batches += count
        self.bar.update(count)
        now = time.monotonic()
        if not self.on_terminal and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            done = self.batches - self.first
            left = (now - self.started) / done * (self.total - self.batches)
            logger.info(
                "%s %d of %d%s, %s left",
                self.unit,
                self.batches,
                self.total,
                self.text and f", {self.text}",
                duration(left),
            )

    def describe(self, text: str) -> None:
        """What the bar or the line says beside the batches."""
        self.text = text
        self.bar.set_postfix_str(text)

    def close(self) -> None:
        self.bar.close()


def summary_of(metrics: Mapping[str, float]) -> str:
    """What a report of the training says in short."""
    return f"loss {metrics['loss']:.3f}, {metrics['images_per_second']:.1f} images/s"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
