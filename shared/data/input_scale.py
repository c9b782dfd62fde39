"""How large objects are once a detector has resized their image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class InputScale:
    """How large objects are for the model.

    Attributes:
        smallest: pixels of the model's input, the side of what `kind` names: its smallest "anchor" or "stride".
        short, long: pixels to which an image's sides are made at most, keeping their ratio.
    """

    smallest: float
    kind: str
    short: float
    long: float

    def factor(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """(images,) pixels of the input for a pixel of the image."""
        return np.minimum(self.short / np.minimum(widths, heights), self.long / np.maximum(widths, heights))
