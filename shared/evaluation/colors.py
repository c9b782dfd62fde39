"""A colour for each label: as far apart for the eye as 80 classes allow."""

from __future__ import annotations

import functools

import numpy as np

Color = tuple[int, int, int]

_COUNT = 256  # then they begin again
_FIRST = (31, 119, 180)
# Oklab, in which a distance is about what the eye makes of it: https://bottosson.github.io/posts/oklab
_TO_CONES = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
_TO_OKLAB = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])


def color_of(label: int) -> Color:
    """The same in every picture and every run."""
    return _palette()[label % _COUNT]


def on_color(color: Color) -> Color:
    """Black or white: what can be read on the colour."""
    red, green, blue = color
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


@functools.cache
def _palette() -> list[Color]:
    """Each is, of the colours that stand out on a photograph, the one farthest from all before it."""
    levels = np.linspace(0, 255, 16).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    lab = _oklab(candidates)
    stands_out = (np.hypot(lab[:, 1], lab[:, 2]) > 0.09) & (lab[:, 0] > 0.4) & (lab[:, 0] < 0.9)
    candidates, lab = candidates[stands_out], lab[stands_out]
    chosen, distance = [_FIRST], np.full(len(lab), np.inf)
    for _ in range(_COUNT - 1):
        to_last = np.linalg.norm((lab - _oklab(np.array(chosen[-1]))) * (0.6, 1, 1), axis=1)
        distance = np.minimum(distance, to_last)
        chosen.append(tuple(int(level) for level in candidates[distance.argmax()]))
    return chosen


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """(…, 3) lightness and two axes of colour, of sRGB from 0 to 255."""
    rgb = rgb / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    return np.cbrt(linear @ _TO_CONES.T) @ _TO_OKLAB.T
