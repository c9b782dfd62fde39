"""The detections of an image's tiles as those of the image.

1. A tile's edge cuts objects. A detection at such an edge is dropped if another tile shows all of it.
2. The detector's own rule drops the lower-scoring of two detections of a category that overlap more than it allows.
   Here a detection that an edge may cut counts with half its score.
3. A detection that an edge may cut is dropped if most of it lies in a higher-scoring one of its category.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import hotcoco
import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import batched_nms

from shared.data.tiles import Tile, Tiling
from shared.evaluation.detections import Detections

_EDGE = 1 / 128  # of a tile: a box that ends so near to an edge may be cut
_CUT = 0.5  # of the score of a detection that an edge may cut
_COVERED = 0.5  # of a cut box
_AT_ONCE = 64  # cut boxes that are compared with all others


def merge(
    image_id: int, size: tuple[int, int], found: Sequence[tuple[Tile, Detections]], tiling: Tiling, max_iou: float
) -> Detections:
    """The detections of an image, the best first.

    Args:
        size: (width, height) of the image.
        found: detections of each tile, in the tile's pixels.
        max_iou: IoU that two detections of a category may have.
    """
    if len(found) == 1:
        return replace(found[0][1], image_id=image_id)
    part_of = np.repeat(np.arange(len(found)), [len(each) for _, each in found])
    row_of = np.concatenate([np.arange(len(each)) for _, each in found])
    boxes = np.concatenate([_boxes_in_image(tile, each, size) for tile, each in found])
    scores = np.concatenate([each.scores for _, each in found])
    labels = np.concatenate([each.labels for _, each in found])

    at_edge = np.concatenate([_at_edge(tile, each, size, tiling) for tile, each in found])
    kept = np.flatnonzero(~(at_edge & _is_whole_in_a_tile(boxes, size, tiling)))
    sureness = np.where(at_edge, _CUT * scores, scores)
    kept = kept[np.argsort(-sureness[kept], kind="stable")]
    ranks = torch.arange(len(kept), 0, -1, dtype=torch.float32)
    kept = kept[batched_nms(torch.from_numpy(boxes[kept]), ranks, torch.from_numpy(labels[kept]), max_iou).numpy()]
    cut, whole = kept[at_edge[kept]], kept[~at_edge[kept]]
    cut = cut[~_are_covered(cut, whole, boxes, labels, sureness)]
    kept = np.concatenate([whole, cut])
    kept = kept[np.argsort(-scores[kept], kind="stable")]

    masks = keypoints = None
    chosen = [(*found[part_of[row]], row_of[row]) for row in kept]
    if all(each.masks is not None for _, each in found):
        masks = [_mask_in_image(tile, each.masks[row], size) for tile, each, row in chosen]
    if all(each.keypoints is not None for _, each in found):
        points = [_points_in_image(tile, each.keypoints[row]) for tile, each, row in chosen]
        keypoints = np.stack(points) if points else found[0][1].keypoints[:0]
    return Detections(image_id, boxes[kept], scores[kept], labels[kept], masks, keypoints)


def _boxes_in_image(tile: Tile, detections: Detections, size: tuple[int, int]) -> np.ndarray:
    """(M, 4) float32."""
    boxes = detections.boxes * np.float32(tile.factor) + np.tile(np.float32(tile.box[:2]), 2)
    if tile.factor > 1:  # the last pixel of a reduced image may reach over the edge
        boxes = boxes.clip(0, np.tile(np.float32(size), 2))
    return boxes.astype(np.float32)


def _points_in_image(tile: Tile, points: np.ndarray) -> np.ndarray:
    """(K, 3): whole numbers are the centers of pixels."""
    moved = points.copy()
    moved[:, :2] = (points[:, :2] + 0.5) * tile.factor - 0.5 + tile.box[:2]
    return moved


def _at_edge(tile: Tile, detections: Detections, size: tuple[int, int], tiling: Tiling) -> np.ndarray:
    """(M,) bool: detections that touch an edge of the tile that is no edge of the image."""
    if tile.is_view:
        return np.zeros(len(detections), bool)
    (left, top, right, bottom), (width, height), margin = tile.box, size, tiling.size * _EDGE
    x1, y1, x2, y2 = detections.boxes.T
    return (
        ((left > 0) & (x1 < margin))
        | ((top > 0) & (y1 < margin))
        | ((right < width) & (x2 > right - left - margin))
        | ((bottom < height) & (y2 > bottom - top - margin))
    )


def _is_whole_in_a_tile(boxes: np.ndarray, size: tuple[int, int], tiling: Tiling) -> np.ndarray:
    """(M,) bool: boxes that a tile shows away from its edges. Tiles are a grid: each direction counts alone."""
    whole, margin = np.ones(len(boxes), bool), tiling.size * _EDGE
    for low, high, length in ((boxes[:, 0], boxes[:, 2], size[0]), (boxes[:, 1], boxes[:, 3], size[1])):
        starts = np.asarray(tiling.starts(length))
        ends = np.minimum(starts + tiling.size, length)
        after_start = (low[:, None] >= starts + margin) | (starts == 0)
        before_end = (high[:, None] <= ends - margin) | (ends == length)
        whole &= (after_start & before_end).any(axis=1)
    return whole


def _are_covered(
    rows: np.ndarray, by: np.ndarray, boxes: np.ndarray, labels: np.ndarray, sureness: np.ndarray
) -> np.ndarray:
    """(rows,) bool: boxes that lie mostly inside a surer box of their category.

    Args:
        by: the rows of the others.
    """
    covered = np.zeros(len(rows), bool)
    for label in np.unique(labels[rows]):
        others = by[labels[by] == label]
        x1, y1, x2, y2 = boxes[others].T
        own = np.flatnonzero(labels[rows] == label)
        for some in np.array_split(own, -(-len(own) // _AT_ONCE)):
            left, top, right, bottom = boxes[rows[some]].T[..., None]
            shared = np.minimum(right, x2) - np.maximum(left, x1)
            np.clip(shared, 0, None, out=shared)
            shared *= (np.minimum(bottom, y2) - np.maximum(top, y1)).clip(0)
            inside = shared > _COVERED * (right - left) * (bottom - top)
            covered[some] = (inside & (sureness[others] >= sureness[rows[some], None])).any(axis=1)
    return covered


def _mask_in_image(tile: Tile, mask: dict, size: tuple[int, int]) -> dict:
    """COCO's RLE at the image's size. Only its runs are computed: an image may have too many pixels to decode."""
    (width, height), (left, top), factor = size, tile.box[:2], tile.factor
    inside = coco_mask.decode(mask).T  # by column, as COCO counts
    steps = np.diff(inside.astype(np.int8), axis=1, prepend=0, append=0)
    (columns, starts), (_, ends) = np.nonzero(steps == 1), np.nonzero(steps == -1)
    columns = left + (columns[:, None] * factor + np.arange(factor)).ravel()
    starts = np.repeat(top + starts * factor, factor)
    ends = np.repeat(np.minimum(top + ends * factor, height), factor)
    order = np.lexsort((starts, columns))
    order = order[columns[order] < width]
    turns = (columns[order, None] * height + np.stack([starts[order], ends[order]], axis=1)).ravel()
    joined = turns[1:-1:2] == turns[2::2]  # a run that ends with its column, and one that begins with the next
    turns = np.delete(turns, np.concatenate([np.flatnonzero(joined) * 2 + 1, np.flatnonzero(joined) * 2 + 2]))
    counts = np.diff(turns, prepend=0, append=width * height)
    return hotcoco.mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
