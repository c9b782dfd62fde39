"""COCO's precision and recall of boxes in NumPy: the bits of pycocotools, without a loop over images.

pycocotools matches each image, category, area range and IoU threshold by itself. Here one uint64 holds the 40
combinations of area range and threshold, one bit each. A cell is an image and a category. Cells are independent, so a
pass takes one pair of a detection and an object from every cell at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))  # all, small, medium, large: pixels²
MAX_DETECTIONS = (1, 10, 100)  # per image and category

_THRESHOLDS = len(IOU_THRESHOLDS)
_OF_AREA = [np.uint64(((1 << _THRESHOLDS) - 1) << (_THRESHOLDS * area)) for area in range(len(AREAS))]
_ALL = np.bitwise_or.reduce(_OF_AREA)
# an IoU that reaches n thresholds has these bits, in every area range
_REACHED = np.array(
    [sum(((1 << n) - 1) << (_THRESHOLDS * area) for area in range(len(AREAS))) for n in range(_THRESHOLDS + 1)],
    dtype=np.uint64,
)


@dataclass
class Boxes:
    """N boxes, sorted by cell, the best score first.

    Attributes:
        cells: (N,) int64, image * categories + label.
        corners: (4, N) float64, x1 y1 x2 y2 in pixels.
        box_areas: (N,) float64, width * height.
        outside: (N,) uint64, the bits of the area ranges that do not count the box.
    """

    cells: np.ndarray
    corners: np.ndarray
    box_areas: np.ndarray
    outside: np.ndarray


@dataclass
class Objects(Boxes):
    """The ground truth. Within a cell it keeps the order of the file.

    Attributes:
        crowd: (N,) bool.
        categories: how many there are.
    """

    crowd: np.ndarray
    categories: int

    @classmethod
    def of(cls, columns: Mapping[str, np.ndarray], images: np.ndarray, categories: int) -> Objects:
        """Of the columns of `CocoAnnotations`.

        Args:
            images: (N,) int64, the image of each annotation, from 0 on.
        """
        cells = images * categories + columns["labels"]
        order = np.argsort(cells, kind="stable")
        crowd = columns["iscrowd"][order]
        outside = np.where(crowd, _ALL, _outside(columns["areas"][order]))
        return cls(cells[order], *_corners_and_areas(columns["boxes"][order]), outside, crowd, categories)

    def only(self, images: np.ndarray) -> Objects:
        """Count the objects on these images only."""
        counted = np.isin(self.cells // self.categories, images)
        return replace(self, outside=np.where(counted, self.outside, _ALL))


def precision_and_recall(
    objects: Objects,
    images: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    boxes: np.ndarray,
    max_detections: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Match M detections, on images in ascending order, as pycocotools' `evaluate` and `accumulate` do.

    Args:
        images, labels: (M,) integers from 0 on.
        boxes: (M, 4) float64, x y width height.
        max_detections: per image and category, ascending.

    Returns:
        Precision (thresholds, recalls, categories, areas) of the last of `max_detections`, and recall (thresholds,
        categories, areas, max detections); -1 for a category without objects.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[_stable_order(labels[order])]  # by category, then score: the order of the curves
    to_cells = _stable_order(images[order])
    cells = (images[order].astype(np.int64) * objects.categories + labels[order])[to_cells]
    begins = np.flatnonzero(np.diff(cells, prepend=-1))
    places = np.arange(len(cells)) - np.repeat(begins, np.diff(begins, append=len(cells)))  # in their cells
    kept = places < max_detections[-1]
    to_cells, cells = to_cells[kept], cells[kept]
    corners, box_areas = _corners_and_areas(boxes[order[to_cells]])
    detections = Boxes(cells, corners, box_areas, _outside(box_areas))
    found, ignored = _match(detections, objects)

    back = np.argsort(to_cells)
    labels, places = cells[back] % objects.categories, places[kept][back]
    return _accumulate(objects, labels, places, found[back], ignored[back], max_detections)


def _stable_order(values: np.ndarray) -> np.ndarray:
    """The stable order of integers from 0 on. NumPy sorts those of 16 bits by radix, in a tenth of the time."""
    return np.argsort(values.astype(np.min_scalar_type(values.max(initial=0))), kind="stable")


def _corners_and_areas(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y, width, height = boxes.T
    return np.stack([x, y, x + width, y + height]), width * height


def _outside(areas: np.ndarray) -> np.ndarray:
    bits = np.zeros(len(areas), np.uint64)
    for (low, high), of_area in zip(AREAS, _OF_AREA, strict=True):
        bits[(areas < low) | (areas > high)] |= of_area
    return bits


def _match(detections: Boxes, objects: Objects) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of bits, one row per detection: where it has an object, and where the curves ignore it.

    A detection prefers objects that count to ignored ones, then the greatest IoU, then the last in the file. A crowd
    matches any number of detections, any other object matches one.
    """
    detection, target, bits = _pairs(detections, objects)
    second = np.repeat([False, True], len(detection))  # first come the objects that count
    bits = np.concatenate([bits & ~objects.outside[target], bits & objects.outside[target]])
    detection, target = np.tile(detection, 2), np.tile(target, 2)
    kept = np.flatnonzero(bits)
    kept = kept[np.argsort(detection[kept], kind="stable")]
    detection, target, bits, second = detection[kept], target[kept], bits[kept], second[kept]

    begins = np.flatnonzero(np.diff(detections.cells[detection], prepend=-1))
    lengths = np.diff(begins, append=len(detection))
    longest_first = np.argsort(-lengths)
    begins, lengths = begins[longest_first], lengths[longest_first]
    found = np.zeros(len(detections.cells), np.uint64)
    ignored = found.copy()
    taken = np.zeros(len(objects.cells), np.uint64)
    one_only = np.where(objects.crowd, np.uint64(0), _ALL)
    for step in range(lengths.max(initial=0)):
        pairs = begins[: np.searchsorted(-lengths, -step)] + step  # one per cell that has this many
        d, t = detection[pairs], target[pairs]
        matched = bits[pairs] & ~(taken[t] | found[d])
        found[d] |= matched
        taken[t] |= matched & one_only[t]
        ignored[d] |= np.where(second[pairs], matched, np.uint64(0))
    return found, ignored | (~found & detections.outside)


def _pairs(detections: Boxes, objects: Objects) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detections and objects of the same cell whose IoU reaches the first threshold: their rows and the bits that the
    IoU reaches. A detection's preferred object comes first."""
    first = np.searchsorted(objects.cells, detections.cells)
    counts = np.searchsorted(objects.cells, detections.cells, side="right") - first
    detection = np.repeat(np.arange(len(counts)), counts)
    target = np.arange(len(detection)) + np.repeat(first - np.cumsum(counts) + counts, counts)
    (x1, y1, x2, y2), (left, top, right, bottom) = detections.corners, objects.corners
    widths = np.minimum(x2[detection], right[target]) - np.maximum(x1[detection], left[target])
    heights = np.minimum(y2[detection], bottom[target]) - np.maximum(y1[detection], top[target])
    overlap = np.flatnonzero((widths > 0) & (heights > 0))
    detection, target, common = detection[overlap], target[overlap], widths[overlap] * heights[overlap]
    own = detections.box_areas[detection]
    iou = common / np.where(objects.crowd[target], own, own + objects.box_areas[target] - common)
    near = np.flatnonzero(iou >= IOU_THRESHOLDS[0])
    detection, target, iou = detection[near], target[near], iou[near]

    several = np.flatnonzero(np.bincount(detection, minlength=len(counts))[detection] > 1)
    preferred = several[np.lexsort((-target[several], -iou[several], detection[several]))]
    target[several], iou[several] = target[preferred], iou[preferred]
    return detection, target, _REACHED[np.searchsorted(IOU_THRESHOLDS, iou, side="right")]


def _accumulate(
    objects: Objects,
    labels: np.ndarray,
    places: np.ndarray,
    found: np.ndarray,
    ignored: np.ndarray,
    max_detections: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """The curves. Detections are sorted by category, then score."""
    categories = objects.categories
    precision = np.full((_THRESHOLDS, len(RECALLS), categories, len(AREAS)), -1.0)
    recall = np.full((_THRESHOLDS, categories, len(AREAS), len(max_detections)), -1.0)
    category_begins = np.searchsorted(labels, np.arange(categories))
    for area, of_area in enumerate(_OF_AREA):
        counted = objects.cells[(objects.outside & of_area) == 0] % categories
        positives = np.bincount(counted, minlength=categories)
        scored = np.flatnonzero(positives)
        positives = positives[scored, None]
        needed = _least_to_reach(positives)
        for threshold in range(_THRESHOLDS):
            bit = np.uint64(1 << (area * _THRESHOLDS + threshold))
            kept = np.flatnonzero((ignored & bit) == 0)
            right = np.flatnonzero(found[kept] & bit)  # rows of `kept`
            label = labels[kept[right]]
            rights = np.bincount(label, minlength=categories)
            begins = np.cumsum(rights) - rights
            nth = np.arange(1, len(right) + 1) - begins[label]
            so_far = right + 1 - np.searchsorted(kept, category_begins)[label]
            precisions = np.append(nth / (so_far + np.spacing(1)), 0)
            # the best precision between two recalls, then from each recall on
            places_of = begins[scored, None] + np.minimum(needed, rights[scored, None])
            best = np.maximum.reduceat(precisions, places_of.ravel()).reshape(places_of.shape) if len(scored) else 0.0
            best = np.where(needed < rights[scored, None], best, 0)
            precision[threshold, :, scored, area] = np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1]
            for i, most in enumerate(max_detections):
                of_most = np.bincount(label[places[kept[right]] < most], minlength=categories)
                recall[threshold, scored, area, i] = of_most[scored] / positives[:, 0]
    return precision, recall


def _least_to_reach(positives: np.ndarray) -> np.ndarray:
    """(categories, recalls) int64: how many right detections come before the one that reaches that recall."""
    needed = np.ceil(RECALLS * positives)
    needed -= (needed - 1) / positives >= RECALLS  # where the product was rounded up
    needed += needed / positives < RECALLS
    return np.maximum(needed - 1, 0).astype(np.int64)
