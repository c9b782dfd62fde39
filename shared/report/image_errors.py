"""The errors on each image, by TIDE's types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.evaluation.detections import Detections

# Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020
ERROR_TYPES = {
    "Cls": "the wrong category",
    "Loc": "an inexact box",
    "Both": "the wrong category and an inexact box",
    "Dupe": "a second detection of an object",
    "Bkg": "a detection on background",
    "Miss": "an object that is not found",
}
_OVERLAPS, _MATCHES = 0.1, 0.5  # IoU: TIDE's own


@dataclass(frozen=True)
class Wrong:
    """A wrong detection, or an object that is not found ("Miss").

    Attributes:
        kind: a key of `ERROR_TYPES`.
        image: index in the annotations.
        label, score: the detection's. A "Miss" has the object's label and the score 0.
        detection: position in the image's `Detections`; None for a "Miss".
        annotation: row in `CocoAnnotations.columns` of the object that it is about; None for "Bkg".
    """

    kind: str
    image: int
    label: int
    score: float
    detection: int | None
    annotation: int | None


def errors_of(
    image: int,
    found: Detections,
    wrong: np.ndarray,
    truth_boxes: np.ndarray,
    truth_labels: np.ndarray,
    objects: np.ndarray,
    missed: np.ndarray,
) -> list[Wrong]:
    """The errors on one image, told apart as TIDE does it, by the IoU of boxes.

    Args:
        image: index in the annotations.
        wrong: positions in `found` of what matches nothing, not even a crowd.
        truth_boxes, truth_labels: (N, 4) x1 y1 x2 y2 and (N,) of all annotations.
        objects: rows of the image's annotations that are not crowds.
        missed: those of them that no detection matches.
    """
    errors: list[Wrong] = []
    explained: set[int] = set()  # objects that another error is about
    ious = box_ious(found.boxes[wrong], truth_boxes[objects])
    for position, overlaps in zip(wrong.tolist(), ious, strict=True):
        label, score = int(found.labels[position]), float(found.scores[position])
        kind, among = _kind(overlaps, truth_labels[objects] == label)
        annotation = None
        if among is not None:
            annotation = int(objects[np.argmax(np.where(among, overlaps, -1))])
            if kind in ("Loc", "Cls"):
                explained.add(annotation)
        errors.append(Wrong(kind, image, label, score, position, annotation))
    for row in missed.tolist():
        if row not in explained:
            errors.append(Wrong("Miss", image, int(truth_labels[row]), 0.0, None, row))
    return errors


def _kind(overlaps: np.ndarray, same: np.ndarray) -> tuple[str, np.ndarray | None]:
    """The error type, asked for in tidecv's order, and a mask of the objects that it is about."""
    best_same = overlaps[same].max(initial=0)
    best_other = overlaps[~same].max(initial=0)
    if _OVERLAPS <= best_same < _MATCHES:
        return "Loc", same
    if best_other >= _MATCHES:
        return "Cls", ~same
    if best_same >= _MATCHES:
        return "Dupe", same
    if max(best_same, best_other) < _OVERLAPS:
        return "Bkg", None
    return "Both", ~same


def box_ious(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(A, B) float64 IoU of the boxes (A, 4) and (B, 4), x1 y1 x2 y2."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    top_left = np.maximum(one[:, None, :2], other[None, :, :2])
    bottom_right = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = (bottom_right - top_left).clip(0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def worst_images(wrong: Sequence[Wrong], kind: str, count: int) -> list[tuple[int, list[Wrong]]]:
    """The images with most errors of a kind, weighted by their scores, each with these errors."""
    of_image: dict[int, list[Wrong]] = {}
    for one in wrong:
        if one.kind == kind:
            of_image.setdefault(one.image, []).append(one)

    def weight(item: tuple[int, list[Wrong]]) -> tuple[float, int]:
        return -sum(one.score if one.detection is not None else 1.0 for one in item[1]), item[0]

    return sorted(of_image.items(), key=weight)[:count]
