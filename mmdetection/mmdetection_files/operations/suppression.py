"""Non-maximum suppression: plain, soft (https://arxiv.org/abs/1704.04503) and matched (mmcv/ops/nms.py).

Boxes are x1 y1 x2 y2. With `offset` 1 x2 and y2 are the last pixels, and a width is x2 - x1 + 1.
"""

from __future__ import annotations

import numpy as np
import torch
import torchvision
from torch import Tensor

__all__ = ["nms", "nms_match", "softnms"]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Boxes that overlap none with a higher score by more than the threshold.

    Args:
        boxes: (N, 4) float.
        scores: (N,) float.

    Returns:
        (K,) int64, indices into the boxes, the highest score first.
    """
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    # mmcv takes the threshold for a float32: an overlap that is equal to it is kept
    return torchvision.ops.nms(boxes, scores, float(np.float32(iou_threshold)))


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Scores lowered by the overlap with boxes that have a higher one, on the CPU.

    Args:
        boxes: (N, 4) float.
        scores: (N,) float.
        dets: (N, 5), into whose first K rows the boxes and their new scores are written.
        iou_threshold: for the methods `naive` and `linear`.
        sigma: for `gaussian`.
        min_score: boxes whose score falls below are left out.
        method: 0 naive, 1 linear, 2 gaussian.

    Returns:
        (K,) int64, indices into the boxes, the highest new score first.
    """
    corners = boxes.detach().numpy().copy()
    scores_left = scores.detach().numpy().copy()
    areas = (corners[:, 2] - corners[:, 0] + offset) * (corners[:, 3] - corners[:, 1] + offset)
    indices = np.arange(len(corners))
    columns = (corners, scores_left, areas, indices)
    left = len(corners)
    done = 0
    # The same order of swaps as in mmcv decides between equal scores.
    while done < left:
        best = done + int(scores_left[done:left].argmax())
        for column in columns:
            column[[done, best]] = column[[best, done]]
        rest = slice(done + 1, left)
        overlap = _overlaps(corners[done], areas[done], corners[rest], areas[rest], offset)
        if method == 2:
            weight = np.exp(-(overlap * overlap) / overlap.dtype.type(sigma))
        else:
            weight = np.where(overlap >= overlap.dtype.type(iou_threshold), 1 - overlap if method == 1 else 0, 1)
        scores_left[rest] *= weight.astype(scores_left.dtype)
        done += 1
        for position in done + np.flatnonzero(scores_left[rest] < min_score):
            # the last one takes its place, if it is not to go itself
            while position < left and scores_left[position] < min_score:
                left -= 1
                for column in columns:
                    column[position] = column[left]
    kept = np.concatenate([corners[:left], scores_left[:left, None]], axis=1)
    dets[:left] = torch.from_numpy(kept)
    return torch.from_numpy(indices[:left].copy())


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of boxes: one that is kept, then those that it suppresses (an overlap of the threshold, or more).

    Args:
        dets: (N, 5) float on the CPU, x1 y1 x2 y2 score.

    Returns:
        The groups' indices, the highest score first.
    """
    boxes = dets[:, :4].detach().numpy()
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = dets[:, 4].sort(descending=True, stable=True)[1].numpy()
    groups = []
    while len(order):
        best, order = order[0], order[1:]
        overlap = _overlaps(boxes[best], areas[best], boxes[order], areas[order], 0)
        suppressed = overlap >= overlap.dtype.type(iou_threshold)
        groups.append([int(best), *order[suppressed].tolist()])
        order = order[~suppressed]
    return groups


def _overlaps(box: np.ndarray, area: np.ndarray, boxes: np.ndarray, areas: np.ndarray, offset: int) -> np.ndarray:
    """(N,) intersection over union of one box with each of the others; 0 for two without an area."""
    corner1, corner2 = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    sizes = np.maximum(corner2 - corner1 + boxes.dtype.type(offset), 0)
    intersection = sizes[:, 0] * sizes[:, 1]
    union = area + areas - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union != 0)
