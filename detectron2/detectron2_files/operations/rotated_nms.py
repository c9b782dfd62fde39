"""Non-maximum suppression of rotated boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from detectron2_files.operations.rotated_iou import box_iou_rotated, rows_at_once

_ROWS = 512  # at once: fewer copies to the host for more pairs that are compared in vain


def nms_rotated(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """What greedy suppression keeps; `torch.ops.detectron2.nms_rotated` (upstream's csrc/nms_rotated).

    Args:
        boxes: (N, 5) rotated boxes, as for `box_iou_rotated`.
        scores: (N,); of equal ones the first comes first.
        iou_threshold: a box goes whose IoU with one that is kept reaches this on the CPU, or exceeds it on a GPU:
            upstream's two kernels differ.

    Returns:
        (K,) int64 indices by descending score.
    """
    rest = scores.argsort(descending=True, stable=True)
    kept = [rest[:0]]
    while len(rest):
        # the best ones against all that is left
        rows = min(_ROWS, rows_at_once(len(rest)), len(rest))
        ious = box_iou_rotated(boxes[rest[:rows]], boxes[rest])
        overlaps = ious > iou_threshold if ious.is_cuda else ious >= iou_threshold
        stays = _greedy(overlaps[:, :rows].cpu()).to(rest.device)
        kept.append(rest[:rows][stays])
        suppressed = overlaps[:, rows:][stays].any(0)
        rest = rest[rows:][~suppressed]
    return torch.cat(kept)


def _greedy(overlaps: Tensor) -> Tensor:
    """(N,) bool, which of N boxes in order of their scores stay, from the (N, N) pairs that overlap too much."""
    matrix = overlaps.numpy()
    stays = torch.ones(len(matrix), dtype=torch.bool)
    array = stays.numpy()
    for i in range(len(matrix)):
        if array[i]:
            array[i + 1 :] &= ~matrix[i, i + 1 :]
    return stays
