"""How long a run has been trained, and what is due then; the chief's clock decides for all processes."""

from __future__ import annotations

import math
import time


class Clock:
    """The seconds from the first batch on, with validations and checkpoints; those before a resume count too.

    Args:
        max_hours, minutes_between_saves: of the config's hyperparameters; None where it says nothing.

    Attributes:
        before: seconds of training before this start.
    """

    now = staticmethod(time.monotonic)

    def __init__(self, max_hours: float | None = None, minutes_between_saves: float | None = None):
        self.max_hours = max_hours
        self.minutes_between_saves = minutes_between_saves
        self.before = 0.0
        self._began: float | None = None
        self._saved = math.inf  # nothing to save before the first batch

    def begin(self) -> None:
        """This start trains its first batch."""
        self._began = self._saved = self.now()

    def saved(self) -> None:
        """A checkpoint has just been saved."""
        self._saved = self.now()

    @property
    def seconds(self) -> float:
        return self.before + (0.0 if self._began is None else self.now() - self._began)

    @property
    def is_asked(self) -> bool:
        """Whether the config makes anything depend on it."""
        return self.max_hours is not None or self.minutes_between_saves is not None

    def save_is_due(self) -> bool:
        """Whether the last checkpoint is long enough ago for another."""
        return self.minutes_between_saves is not None and self.now() - self._saved >= 60 * self.minutes_between_saves

    def why_over(self) -> str | None:
        """Why the run has come to its end; None where it has not."""
        if self.max_hours is None or self.seconds < 3600 * self.max_hours:
            return None
        return f"max_hours: {self.max_hours:g} h of training are over"
