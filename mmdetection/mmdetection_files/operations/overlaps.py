"""Overlaps of boxes (mmcv/ops/bbox.py)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bbox_overlaps"]


def bbox_overlaps(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Writes the boxes' overlaps into `ious`.

    Args:
        boxes1: (N, 4), x1 y1 x2 y2.
        boxes2: (M, 4); N = M where `aligned`.
        ious: (N, M), or (N,) where `aligned`.
        mode: 0 for the intersection over the union, 1 for it over the first box's area.
        offset: added to x2 - x1 for a width: 1 if x2 is the last pixel.
    """
    if not aligned:
        boxes1 = boxes1[:, None]
    sizes = (torch.min(boxes1[..., 2:], boxes2[..., 2:]) - torch.max(boxes1[..., :2], boxes2[..., :2]) + offset).clamp(
        0
    )
    intersection = sizes.prod(-1)
    base = (boxes1[..., 2:] - boxes1[..., :2] + offset).prod(-1)
    if mode == 0:
        base = base + (boxes2[..., 2:] - boxes2[..., :2] + offset).prod(-1) - intersection
    ious.copy_(intersection / base)
