"""The errors on each image, by TIDE's types, and the annotations that detections contradict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import nms

from shared.data.annotations import CocoAnnotations
from shared.evaluation.gathered import GatheredDetections

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


def find_errors(
    annotations: CocoAnnotations,
    found: GatheredDetections,
    rows_of: Mapping[int, slice],
    is_wrong: np.ndarray,
    is_object: np.ndarray,
    is_missed: np.ndarray,
) -> list[Wrong]:
    """The errors on each image, told apart as TIDE does it, by the IoU of boxes.

    Args:
        rows_of: by index in the annotations, each image's rows in `found`.
        is_wrong: (M,) bool: detections that match nothing, not even a crowd.
        is_object: (annotations,) bool: those that are not crowds.
        is_missed: (annotations,) bool: objects that no detection matches.
    """
    truth_boxes, truth_labels = _corners(annotations.columns["boxes"]), annotations.columns["labels"]
    errors: list[Wrong] = []
    for image, rows in rows_of.items():
        first, last = annotations.columns["offsets"][image : image + 2].tolist()
        wrong = rows.start + np.flatnonzero(is_wrong[rows])
        objects = first + np.flatnonzero(is_object[first:last])
        explained: set[int] = set()  # objects that another error is about
        ious = box_ious(found.boxes[wrong], truth_boxes[objects])
        for row, overlaps in zip(wrong.tolist(), ious, strict=True):
            label, score = int(found.labels[row]), float(found.scores[row])
            kind, among = _kind(overlaps, truth_labels[objects] == label)
            annotation = None
            if among is not None:
                annotation = int(objects[np.argmax(np.where(among, overlaps, -1))])
                if kind in ("Loc", "Cls"):
                    explained.add(annotation)
            errors.append(Wrong(kind, image, label, score, row - rows.start, annotation))
        missed = first + np.flatnonzero(is_missed[first:last])
        for row in missed.tolist():
            if row not in explained:
                errors.append(Wrong("Miss", image, int(truth_labels[row]), 0.0, None, row))
    return errors


def _corners(boxes: np.ndarray) -> np.ndarray:
    """(N, 4) float64 x1 y1 x2 y2, of x y width height."""
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


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


def box_ious(one: np.ndarray, other: np.ndarray, of_one: bool = False) -> np.ndarray:
    """(A, B) float64 IoU of the boxes (A, 4) and (B, 4), x1 y1 x2 y2; or the share of each of A that lies in each of
    B."""
    if not len(one) or not len(other):
        return np.zeros((len(one), len(other)))
    one, other = (np.hstack([b[:, :2], b[:, 2:] - b[:, :2]]) for b in (one.astype(float), other.astype(float)))
    return coco_mask.iou(one, other, [of_one] * len(other))


def worst_images(wrong: Sequence[Wrong], count: int) -> list[tuple[int, list[Wrong]]]:
    """The images with most of the errors, weighted by their scores, each with its errors."""
    of_image: dict[int, list[Wrong]] = {}
    for one in wrong:
        of_image.setdefault(one.image, []).append(one)

    def weight(item: tuple[int, list[Wrong]]) -> tuple[float, int]:
        return -sum(one.score if one.detection is not None else 1.0 for one in item[1]), item[0]

    return sorted(of_image.items(), key=weight)[:count]


# --- suspects ---------------------------------------------------------------------------------------
#
# A detector that errs is seldom certain, see docs/evaluate.md. So the share of contradicted annotations falls as the
# certainty x, in log-odds, grows, down to the share e of annotations that are wrong:
#
#     P(contradicted | x) = q(x) + (1 - q(x)) · e,    q(x) = 1 / (1 + exp(a + b · x))
#
# Expectation maximization fits a, b and e to all detections. The chance that a contradiction is the detector's own
# mistake is then q / (q + (1 - q) · e). The model is the psychometric function with a lapse rate: Wichmann and Hill,
# "The psychometric function", Perception & Psychophysics 63, 2001.

_MOST_CHANCE_FALSE = 0.5
_APART = 0.3  # IoU: a box between two objects overlaps each of them more
_LEAST_SCORE, _MOST_SCORE = 0.02, 0.999  # lower scores carry no information
_LEAST = math.log(_LEAST_SCORE / (1 - _LEAST_SCORE))  # certainty
_BINS = 200
_ROUNDS = 500
# of a and b: normal distributions around a detector whose scores are probabilities, for data with few mistakes
_MEAN = np.array([0.0, 1.0])
_PRECISIONS = {"category": np.array([1e6, 9.0]), "missing": np.array([0.04, 1.0])}  # one of two equal scores is right


@dataclass(frozen=True)
class Suspect:
    """An annotation that may be wrong, or missing.

    Attributes:
        kind: "category" or "missing".
        image: index in the annotations.
        label, score, box: the detection's. The box is (4,) x1 y1 x2 y2 in pixels.
        annotation: row of the annotation with another category; None for a missing one.
        chance_false: probability that the detector is wrong instead of the annotation.
    """

    kind: str
    image: int
    label: int
    score: float
    box: np.ndarray
    annotation: int | None
    chance_false: float


class _Cases(NamedTuple):
    """On one image or on all, what the detections say about the annotations.

    Attributes:
        agreeing: (N,) certainty in log-odds, for each annotation that they agree with.
        contradicting: (M,) certainty, for each of the contradictions.
        evidence: (M,) certainty against the annotation, which takes the second guess into account.
        rows: (M,) of the detections.
        annotations: (M,) rows of the annotations, -1 for none.
    """

    agreeing: np.ndarray
    contradicting: np.ndarray
    evidence: np.ndarray
    rows: np.ndarray
    annotations: np.ndarray


def find_suspects(
    annotations: CocoAnnotations,
    found: GatheredDetections,
    rows_of: Mapping[int, slice],
    min_score: float,
) -> list[Suspect]:
    """The annotations that are more likely wrong than the detections that contradict them, the likeliest first.

    Args:
        rows_of: see `find_errors`.
        min_score: a detection needs it to contradict an annotation.
    """
    shares = found.scores.astype(np.float64).clip(_LEAST_SCORE, _MOST_SCORE)
    odds = np.log(shares / (1 - shares))
    categories, missing, image_of = [], [], np.empty(len(odds), np.int64)
    for image, of_image in rows_of.items():
        image_of[of_image] = image
        rows = of_image.start + np.flatnonzero(odds[of_image] > _LEAST)
        one, other = _cases_of(image, annotations, found, rows[np.argsort(-odds[rows], kind="stable")], odds)
        categories.append(one)
        missing.append(other)
    suspects = []
    for kind, per_image in (("category", categories), ("missing", missing)):
        cases = _Cases(*map(np.concatenate, zip(*per_image, strict=True)))
        chances = _chances_false(cases, kind)
        for i in np.flatnonzero((chances <= _MOST_CHANCE_FALSE) & (found.scores[cases.rows] >= min_score)).tolist():
            row, annotation = int(cases.rows[i]), int(cases.annotations[i])
            suspects.append(
                Suspect(
                    kind=kind,
                    image=int(image_of[row]),
                    label=int(found.labels[row]),
                    score=float(found.scores[row]),
                    box=found.boxes[row],
                    annotation=None if annotation < 0 else annotation,
                    chance_false=float(chances[i]),
                )
            )
    return sorted(suspects, key=lambda suspect: (suspect.chance_false, -suspect.score))


def _cases_of(
    image: int, annotations: CocoAnnotations, found: GatheredDetections, rows: np.ndarray, odds: np.ndarray
) -> tuple[_Cases, _Cases]:
    """The cases of "category" and "missing" on an image. `rows` are its detections, the most certain first."""
    columns = annotations.columns
    first, last = columns["offsets"][image : image + 2].tolist()
    truth = _corners(columns["boxes"][first:last])
    is_crowd, truth_labels = columns["iscrowd"][first:last], columns["labels"][first:last]
    boxes, labels, certainty = found.boxes[rows], found.labels[rows], odds[rows]
    ious = box_ious(boxes, truth)
    objects = np.flatnonzero(~is_crowd)

    # for each object, the certainty of the annotated category, of the best other guess, and of the next one; a
    # detection belongs to one object, to one of its own category if possible
    own, other, third = np.full((3, len(objects)), _LEAST)
    best = np.full(len(objects), -1)
    if len(objects):
        on_objects = ious[:, objects]
        matches = on_objects >= _MATCHES
        agrees = labels[:, None] == truth_labels[objects]
        owner = (on_objects + (agrees & matches)).argmax(axis=1)
        for position in np.flatnonzero(matches[np.arange(len(rows)), owner])[::-1].tolist():  # the best one last
            at = owner[position]
            if agrees[position, at]:
                own[at] = certainty[position]
            else:
                if labels[best[at]] != labels[position]:
                    third[at] = other[at]
                other[at], best[at] = certainty[position], position
    top = np.maximum(own, other)
    is_found, contradicted = top > _LEAST, other > own
    wrong_category = _Cases(
        agreeing=(own - other)[is_found & ~contradicted],
        contradicting=(other - np.maximum(own, third))[contradicted],
        evidence=(other - own)[contradicted],
        rows=rows[best[contradicted]],
        annotations=first + objects[contradicted],
    )

    in_a_crowd = (box_ious(boxes, truth[is_crowd], of_one=True) >= _MATCHES).any(axis=1)
    alone = np.flatnonzero(~(ious >= _APART).any(axis=1) & ~in_a_crowd)
    of_alone = torch.from_numpy(boxes[alone])
    alone = alone[nms(of_alone, torch.arange(len(alone), 0, -1).to(of_alone), _APART).numpy()]  # one per object
    missing = _Cases(
        agreeing=top[is_found],
        contradicting=certainty[alone],
        evidence=certainty[alone],
        rows=rows[alone],
        annotations=np.full(len(alone), -1),
    )
    return wrong_category, missing


def _chances_false(cases: _Cases, kind: str) -> np.ndarray:
    """(M,) the probability of each contradiction that it is the detector's mistake.

    Args:
        kind: "category" or "missing".
    """
    if not len(cases.contradicting):
        return np.empty(0)
    both = np.concatenate([cases.agreeing, cases.contradicting])
    edges = np.linspace(both.min(), both.max(), _BINS + 1)
    right, wrong = (np.histogram(part, edges)[0].astype(np.float64) for part in (cases.agreeing, cases.contradicting))
    centers = np.stack([np.ones(_BINS), (edges[1:] + edges[:-1]) / 2])
    parameters, precision = _MEAN.copy(), _PRECISIONS[kind]
    share = 0.5 * wrong.sum() / len(both)  # of annotations that are wrong: e
    for _ in range(_ROUNDS):
        mistaken = _mistaken(parameters, centers)
        own = wrong * mistaken / (mistaken + (1 - mistaken) * share)  # contradictions that are the detector's mistakes
        for _ in range(2):
            mistaken = _mistaken(parameters, centers)
            slope = centers @ ((right + wrong) * mistaken - own) - precision * (parameters - _MEAN)
            curvature = (centers * ((right + wrong) * mistaken * (1 - mistaken))) @ centers.T + np.diag(precision)
            parameters = parameters + np.linalg.solve(curvature, slope).clip(-1, 1)
        before, share = share, max(float((wrong - own).sum() / (right + wrong - own).sum()), 1e-9)
        if abs(share - before) < 1e-7:
            break
    mistaken = _mistaken(parameters, np.stack([np.ones(len(cases.evidence)), cases.evidence]))
    return mistaken / (mistaken + (1 - mistaken) * share)


def _mistaken(parameters: np.ndarray, certainty: np.ndarray) -> np.ndarray:
    """q: the probability that the detector is wrong."""
    return 1 / (1 + np.exp((parameters @ certainty).clip(-30, 30)))
