"""Intersection over union of rotated boxes.

A rotated box is (center x, center y, width, height, angle): pixels, and degrees counter-clockwise as one sees the
image, whose y grows downwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_PAIRS = 2**22  # that are compared at once: some 16 MiB a temporary in float32
_CLOSE_PAIRS = 2**17  # of those, whose intersections are computed at once: they stay in the processor's cache
_NO_AREA = 1e-14  # in square pixels; upstream's


class _Boxes(NamedTuple):
    """Columns of N rotated boxes, each (N,)."""

    x: Tensor
    y: Tensor
    half_width: Tensor
    half_height: Tensor
    cos: Tensor
    sin: Tensor
    area: Tensor
    reach_x: Tensor  # half the sides of the upright box around it
    reach_y: Tensor


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """The IoU of each pair; `torch.ops.detectron2.box_iou_rotated` (upstream's csrc/box_iou_rotated).

    Exact up to rounding, also where upstream's is not: in float32, one of a million pairs of crowded boxes loses a
    corner there and is off by up to 0.15 (seen). Not differentiable, as upstream's.

    Args:
        boxes1: (N, 5) rotated boxes, of any floating type. Float32 is computed in float32, float64 in float64.
        boxes2: (M, 5), the same.

    Returns:
        (N, M) in [0, 1]; 0 where a box has no area. In the boxes' type, float32 at least (upstream: float32 always).
    """
    columns1, columns2 = _columns(boxes1), _columns(boxes2)
    result = columns1.x.new_zeros(len(boxes1), len(boxes2))
    step = rows_at_once(len(boxes2))
    for start in range(0, len(boxes1) if len(boxes2) else 0, step):
        _fill(result[start : start + step], _Boxes(*(column[start : start + step] for column in columns1)), columns2)
    return result


def rows_at_once(columns: int) -> int:
    """How many rows of a matrix with this number of columns are computed at once."""
    return max(_PAIRS // max(columns, 1), 1)


def _fill(result: Tensor, boxes1: _Boxes, boxes2: _Boxes) -> None:
    """Sets the (N, M) `result`, zeros before. Most pairs of a picture are far apart: the intersections are computed of
    those only whose upright boxes overlap."""
    near = (boxes1.x[:, None] - boxes2.x).abs_() < boxes1.reach_x[:, None] + boxes2.reach_x
    near &= (boxes1.y[:, None] - boxes2.y).abs_() < boxes1.reach_y[:, None] + boxes2.reach_y
    near &= (boxes1.area >= _NO_AREA)[:, None] & (boxes2.area >= _NO_AREA)
    for pairs in near.flatten().nonzero().squeeze(1).split(_CLOSE_PAIRS):
        first, second = pairs // near.shape[1], pairs % near.shape[1]
        one = _Boxes(*(column[first] for column in boxes1))
        other = _Boxes(*(column[second] for column in boxes2))
        common = _intersection(one, other)
        result.view(-1)[pairs] = common / (one.area + other.area - common)


def _intersection(one: _Boxes, other: _Boxes) -> Tensor:
    """(P,) areas that the pairs have in common.

    In the frame of `one`, which is upright there, [-w, w] × [-h, h]: the area below a polygon's upper edges less that
    below its lower ones, each cut at the sides of `one` and held between its top and bottom, is the integral
    -∮ clamp(y) dx around `other`. Each edge's share is a continuous function of the corners, so that edges which
    coincide, touch or are parallel need no case of their own.
    """
    away_x, away_y = other.x - one.x, other.y - one.y
    x = away_x * one.cos - away_y * one.sin
    y = away_x * one.sin + away_y * one.cos
    cos = one.cos * other.cos + one.sin * other.sin
    sin = other.sin * one.cos - other.cos * one.sin
    along_x, along_y = cos * other.half_width, -sin * other.half_width
    across_x, across_y = sin * other.half_height, cos * other.half_height
    ahead_x, ahead_y = along_x + across_x, along_y + across_y
    aside_x, aside_y = along_x - across_x, along_y - across_y
    xs = torch.stack([x + ahead_x, x - aside_x, x - ahead_x, x + aside_x])  # (4, P), the corners in order
    ys = torch.stack([y + ahead_y, y - aside_y, y - ahead_y, y + aside_y])
    width, height = one.half_width, one.half_height

    to_x, to_y = xs.roll(-1, 0) - xs, ys.roll(-1, 0) - ys
    cut = torch.maximum(torch.minimum(xs, width), -width)
    per_x = torch.where(to_x == 0, 1, to_x)
    start = ys + ((cut - xs) / per_x).clamp_(0, 1) * to_y
    cut_end = cut.roll(-1, 0)
    end = ys + ((cut_end - xs) / per_x).clamp_(0, 1) * to_y

    # the mean of clamp(y) along the edge: a part lies below `one`, a part above, and the rest is straight
    low, high = torch.minimum(start, end), torch.maximum(start, end)
    span = high - low
    span = torch.where(span == 0, 1, span)
    below = ((-height - low) / span).clamp_(0, 1)
    above = ((high - height) / span).clamp_(0, 1)
    inside = torch.maximum(torch.minimum(low, height), -height) + torch.maximum(torch.minimum(high, height), -height)
    mean = height * (above - below) + (1 - below - above) * inside / 2
    common = ((cut - cut_end) * mean).sum(0)
    return torch.minimum(common, torch.minimum(one.area, other.area)).clamp_(min=0)


def _columns(boxes: Tensor) -> _Boxes:
    x, y, width, height, _ = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).unbind(1)
    angle = torch.deg2rad(boxes[:, 4].double())  # upstream too: float32 is short of digits for sine and cosine
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    half_width, half_height = width.abs() / 2, height.abs() / 2
    reach_x = half_width * cos.abs() + half_height * sin.abs()
    reach_y = half_width * sin.abs() + half_height * cos.abs()
    return _Boxes(x, y, half_width, half_height, cos, sin, width * height, reach_x, reach_y)
