"""What is wrong on each image, by TIDE's types of error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# of Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020
ERROR_TYPES = {
    "Cls": "the wrong category",
    "Loc": "a box that is off",
    "Both": "the wrong category and a box that is off",
    "Dupe": "a second detection of an object",
    "Bkg": "a detection on background",
    "Miss": "an object that is not found",
}
_OVERLAPS, _MATCHES = 0.1, 0.5  # IoU: TIDE's own


@dataclass(frozen=True)
class Wrong:
    """A wrong detection, or an object that is not found.

    Attributes:
        kind: of `ERROR_TYPES`.
        image: index in the annotations.
        label: the detection's, of a "Miss" the object's.
        score: the detection's; of a "Miss" 0.
        detection: its place among the image's; None of a "Miss".
        annotation: its row in `CocoAnnotations.columns`, where there is one.
    """

    kind: str
    image: int
    label: int
    score: float
    detection: int | None
    annotation: int | None


@dataclass(frozen=True)
class ImageObjects:
    """Annotations and detections of one image, and what matched at an IoU of 0.5; N objects, M detections.

    Attributes:
        image: index in the annotations.
        first: the row of the first annotation in `CocoAnnotations.columns`.
        truth_boxes, truth_labels: (N, 4) x1 y1 x2 y2, (N,).
        is_missed: (N,) bool: an object that nothing matched.
        is_object: (N,) bool: no crowd.
        rows: (M,) the places of the detections among all of the image.
        boxes, labels, scores: (M, 4), (M,), (M,).
        is_right, is_wrong: (M,) bool: it matched an object; it matched nothing, no crowd either.
    """

    image: int
    first: int
    truth_boxes: np.ndarray
    truth_labels: np.ndarray
    is_missed: np.ndarray
    is_object: np.ndarray
    rows: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    is_right: np.ndarray
    is_wrong: np.ndarray


def errors_of(one: ImageObjects) -> list[Wrong]:
    """The image's errors, as TIDE tells them apart, by the IoU of boxes."""
    wrong: list[Wrong] = []
    objects = np.flatnonzero(one.is_object)
    explained: set[int] = set()  # objects that another error concerns already
    positions = np.flatnonzero(one.is_wrong)
    ious = box_ious(one.boxes[positions], one.truth_boxes[objects])
    for position, overlaps in zip(positions, ious, strict=True):
        same = one.truth_labels[objects] == one.labels[position]
        kind, among = _kind(overlaps, same)
        annotation = None
        if among is not None:
            nearest = objects[np.argmax(np.where(among, overlaps, -1))]
            annotation = one.first + int(nearest)
            if kind in ("Loc", "Cls"):
                explained.add(int(nearest))
        wrong.append(
            Wrong(
                kind=kind,
                image=one.image,
                label=int(one.labels[position]),
                score=float(one.scores[position]),
                detection=int(one.rows[position]),
                annotation=annotation,
            )
        )
    for missed in np.flatnonzero(one.is_missed & one.is_object):
        if missed not in explained:
            label = int(one.truth_labels[missed])
            wrong.append(Wrong("Miss", one.image, label, 0.0, None, one.first + int(missed)))
    return wrong


def _kind(overlaps: np.ndarray, same: np.ndarray) -> tuple[str, np.ndarray | None]:
    """The type of error, in the order in which tidecv asks, and which objects it is about."""
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
    """(A, B) float64 of boxes (A, 4) and (B, 4), x1 y1 x2 y2."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    top_left = np.maximum(one[:, None, :2], other[None, :, :2])
    bottom_right = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = (bottom_right - top_left).clip(0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def worst_images(wrong: Sequence[Wrong], kind: str, count: int) -> list[tuple[int, list[Wrong]]]:
    """The images with most errors of a kind, weighed by their scores; an image and its errors of the kind."""
    of_image: dict[int, list[Wrong]] = {}
    for one in wrong:
        if one.kind == kind:
            of_image.setdefault(one.image, []).append(one)

    def weight(item: tuple[int, list[Wrong]]) -> tuple[float, int]:
        return -sum(one.score if one.detection is not None else 1.0 for one in item[1]), item[0]

    return sorted(of_image.items(), key=weight)[:count]
