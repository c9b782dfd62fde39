"""Numbers and shapes of annotation programs as COCO's `bbox`, `area` and `segmentation`; all in pixels of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from shared.data.coco_file import is_in_reach, shown

_CORNERS_OF_ELLIPSE = 64  # a multiple of 4: the polygon reaches the ellipse's own left, top, right and bottom
_DECIMALS = 6  # sines and cosines leave noise below


def box(x: float, y: float, width: float, height: float) -> dict[str, Any]:
    return {"bbox": [x, y, width, height], "area": width * height}


def box_of_corners(x1: float, y1: float, x2: float, y2: float) -> dict[str, Any]:
    return box(x1, y1, x2 - x1, y2 - y1)


def polygons(pieces: Sequence[np.ndarray]) -> dict[str, Any]:
    """
    Args:
        pieces: each (N, 2) x y, of one object.

    Raises:
        ValueError: a piece has fewer than three points, or a coordinate that no image has.
    """
    for points in pieces:
        if len(points) < 3:
            raise ValueError(f"a polygon has {len(points)} points, and needs 3")
        if not is_in_reach(points).all():
            wrong = points[~is_in_reach(points)][0]
            raise ValueError(f"a coordinate is {shown(f'{wrong:g}')}, which no image is large enough for")
    together = np.concatenate(list(pieces))
    (x1, y1), (x2, y2) = together.min(axis=0).tolist(), together.max(axis=0).tolist()
    columns = (points.T for points in pieces)
    area = sum(abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2 for x, y in columns)
    return {**box_of_corners(x1, y1, x2, y2), "area": area, "segmentation": [p.ravel().tolist() for p in pieces]}


def rotated_box(middle: tuple[float, float], size: tuple[float, float], degrees: float) -> dict[str, Any]:
    """The enclosing box of a box that is rotated clockwise around its middle, and its four corners as a polygon."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (np.array(size) / 2)
    return polygons([_rotated(corners, degrees) + middle])


def ellipse(middle: tuple[float, float], radii: tuple[float, float], degrees: float = 0.0) -> dict[str, Any]:
    """The enclosing box of an ellipse that is rotated clockwise, its area, and a polygon in its place."""
    angles = np.arange(_CORNERS_OF_ELLIPSE) * (2 * math.pi / _CORNERS_OF_ELLIPSE)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii
    shape = polygons([np.round(_rotated(points, degrees) + middle, _DECIMALS)])
    (rx, ry), (sin, cos) = radii, (math.sin(math.radians(degrees)), math.cos(math.radians(degrees)))
    half = [math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)]
    bbox = [round(number, _DECIMALS) for number in (middle[0] - half[0], middle[1] - half[1], 2 * half[0], 2 * half[1])]
    return {**shape, "bbox": bbox, "area": math.pi * rx * ry}


def mask(window: np.ndarray, left: int, top: int, size: tuple[int, int]) -> dict[str, Any]:
    """RLE of a mask, with the smallest box around it; the box has no area if the mask is empty.

    Args:
        window: (height, width) bool, a part of the image.
        left, top: its position in the image.
        size: (width, height) of the image; what lies outside is cut off.
    """
    width, height = size
    inside = np.zeros((height, width), np.uint8, order="F")
    part = window[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    inside[max(top, 0) :, max(left, 0) :][: part.shape[0], : part.shape[1]] = part
    rle = coco_mask.encode(inside)
    segmentation = {"counts": rle["counts"].decode(), "size": [height, width]}
    return {"bbox": coco_mask.toBbox(rle).tolist(), "area": int(coco_mask.area(rle)), "segmentation": segmentation}


def _rotated(points: np.ndarray, degrees: float) -> np.ndarray:
    """Clockwise, as y goes down."""
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return np.round(points @ turn, _DECIMALS)


def parse_number(text: str | None, what: str, limit: float = math.inf) -> float:
    """A finite number.

    Args:
        what: the error's name for it, "xmin".
        limit: the number and its negative are below.

    Raises:
        ValueError: the text is missing, or no such number.
    """
    if text is None:
        raise ValueError(f"{what} is missing")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} is {shown(text.strip())!r}, which is not a finite number")
    if not abs(number) < limit:
        raise ValueError(f"{what} is {shown(text.strip())!r}, which no image is large enough for")
    return number


def is_number(text: str) -> bool:
    """Whether `parse_number` reads the text."""
    try:
        parse_number(text, "")
    except ValueError:
        return False
    return True


def parse_whole_number(text: str | None, what: str) -> int:
    """A whole number, also if it is written as 1.0.

    Raises:
        ValueError: as `parse_number`, or the number has a fraction.
    """
    number = parse_number(text, what)
    if number != int(number):
        raise ValueError(f"{what} is {shown(text.strip())!r}, which is not a whole number")
    return int(number)
