"""Which annotations are worth a look: detections contradict them, more surely than the detector errs.

A detector that is wrong is seldom sure. A wrong annotation does not care how sure it is. So the share of contradicted
annotations falls as the detector gets surer, down to the share of annotations that are wrong:

    P(contradicted | x) = q(x) + (1 - q(x)) · e,    q(x) = 1 / (1 + exp(a + b · x))

x is how sure the detector is, in log-odds. a, b and e are fitted to all detections by expectation maximization. The
chance that a contradiction is the detector's own mistake is then q / (q + (1 - q) · e). The model is the psychometric
function with a lapse rate: Wichmann and Hill, "The psychometric function", Perception & Psychophysics 63, 2001.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from shared.data.annotations import CocoAnnotations
from shared.evaluation.gathered import GatheredDetections
from shared.report.image_errors import box_ious

_MOST_CHANCE_FALSE = 0.5
_MATCHES = 0.5  # IoU
_APART = 0.3  # IoU: a box between two objects overlaps each by more
_LEAST_SCORE, _MOST_SCORE = 0.02, 0.999  # what is less sure says nothing
_BINS = 200
_ROUNDS = 500
# of a and b: normal distributions around a detector whose scores are probabilities, for data with few mistakes
_MEAN = np.array([0.0, 1.0])
_PRECISIONS = {"category": np.array([1e6, 9.0]), "missing": np.array([0.04, 1.0])}  # of two equal scores, one is right


@dataclass(frozen=True)
class Suspect:
    """An annotation that may be wrong, or missing.

    Attributes:
        kind: "category" or "missing".
        image: index in the annotations.
        label, score, box: the detection's; (4,) x1 y1 x2 y2 in pixels.
        annotation: the row of the annotation with another category; None of a missing one.
        chance_false: the probability that the detector is wrong, and not the annotation.
    """

    kind: str
    image: int
    label: int
    score: float
    box: np.ndarray
    annotation: int | None
    chance_false: float


@dataclass
class _Cases:
    """How sure the detector is, one list item per image.

    Attributes:
        agreeing: of annotations that it agrees with.
        contradicting: of the others, or of objects that are not annotated.
        evidence: against each of the annotations that it contradicts: a category may be far from its second guess.
        rows: of the detections that contradict.
        annotations: rows of the annotations; -1 for none.
        images: indices in the annotations.
    """

    agreeing: list[np.ndarray] = field(default_factory=list)
    contradicting: list[np.ndarray] = field(default_factory=list)
    evidence: list[np.ndarray] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    annotations: list[np.ndarray] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)

    def add(
        self,
        image: int,
        agreeing: np.ndarray,
        contradicting: np.ndarray,
        evidence: np.ndarray,
        rows: np.ndarray,
        annotations: np.ndarray,
    ) -> None:
        self.agreeing.append(agreeing)
        self.contradicting.append(contradicting)
        self.evidence.append(evidence)
        self.rows.append(rows)
        self.annotations.append(annotations)
        self.images.append(np.full(len(rows), image))


def find_suspects(
    annotations: CocoAnnotations,
    found: GatheredDetections,
    rows_of: Mapping[int, tuple[int, int]],
    images: Iterable[int],
    min_score: float,
) -> list[Suspect]:
    """The annotations that are more likely wrong than the detections that contradict them, the likeliest first.

    Args:
        rows_of: by image, its first row in `found` and the one after its last.
        images: indices in the annotations.
        min_score: of the detections that may contradict.
    """
    odds, least = _log_odds(found.scores)
    cases = {"category": _Cases(), "missing": _Cases()}
    for image in images:
        start, end = rows_of.get(image, (0, 0))
        rows = np.arange(start, end)[odds[start:end] > least]
        _look_at(image, annotations, found, rows[np.argsort(-odds[rows], kind="stable")], odds, least, cases)
    suspects = []
    for kind, of in cases.items():
        if not of.rows:
            continue
        rows, of_annotations, of_images = map(np.concatenate, (of.rows, of.annotations, of.images))
        chances = chances_false(*map(np.concatenate, (of.agreeing, of.contradicting, of.evidence)), kind)
        for i in np.flatnonzero((chances <= _MOST_CHANCE_FALSE) & (found.scores[rows] >= min_score)).tolist():
            row = int(rows[i])
            suspects.append(
                Suspect(
                    kind=kind,
                    image=int(of_images[i]),
                    label=int(found.labels[row]),
                    score=float(found.scores[row]),
                    box=found.boxes[row],
                    annotation=None if of_annotations[i] < 0 else int(of_annotations[i]),
                    chance_false=float(chances[i]),
                )
            )
    return sorted(suspects, key=lambda suspect: (suspect.chance_false, -suspect.score))


def _log_odds(scores: np.ndarray) -> tuple[np.ndarray, float]:
    """(M,) float64, and the value under which a detection says nothing. Scores that are no probabilities are taken as
    log-odds in units of their spread."""
    scores = scores.astype(np.float64)
    if not len(scores) or (scores.min() >= 0 and scores.max() <= 1):
        shares = scores.clip(_LEAST_SCORE, _MOST_SCORE)
        return np.log(shares / (1 - shares)), float(np.log(_LEAST_SCORE / (1 - _LEAST_SCORE)))
    odds = (scores - scores.mean()) / max(float(scores.std()), 1e-9)
    return odds, float(odds.min()) - 1.0


def _look_at(
    image: int,
    annotations: CocoAnnotations,
    found: GatheredDetections,
    rows: np.ndarray,
    odds: np.ndarray,
    least: float,
    cases: Mapping[str, _Cases],
) -> None:
    """Adds the cases of an image; `rows` of its detections, the surest first."""
    columns = annotations.columns
    first, last = int(columns["offsets"][image]), int(columns["offsets"][image + 1])
    truth = columns["boxes"][first:last].astype(np.float64)
    truth[:, 2:] += truth[:, :2]
    is_crowd, truth_labels = columns["iscrowd"][first:last], columns["labels"][first:last]
    boxes, labels, sure = found.boxes[rows], found.labels[rows], odds[rows]
    ious = box_ious(boxes, truth)
    objects = np.flatnonzero(~is_crowd)

    # on each object, how sure the detector is of the annotated category, of its best other guess, and of the one after
    # that; a detection is on one object, of its own category if it can be
    own, other, third = np.full((3, len(objects)), least)
    surest = np.full(len(objects), -1)
    if len(objects):
        on_objects = ious[:, objects]
        matches = on_objects >= _MATCHES
        agrees = labels[:, None] == truth_labels[objects]
        owner = (on_objects + (agrees & matches)).argmax(axis=1)
        for position in np.flatnonzero(matches[np.arange(len(rows)), owner])[::-1].tolist():  # the surest last
            at = owner[position]
            if agrees[position, at]:
                own[at] = sure[position]
            else:
                if labels[surest[at]] != labels[position]:
                    third[at] = other[at]
                other[at], surest[at] = sure[position], position
    top = np.maximum(own, other)
    is_found, contradicted = top > least, other > own
    cases["category"].add(
        image,
        agreeing=(own - other)[is_found & ~contradicted],
        contradicting=(other - np.maximum(own, third))[contradicted],
        evidence=(other - own)[contradicted],
        rows=rows[surest[contradicted]],
        annotations=first + objects[contradicted],
    )

    is_alone = ~(ious >= _APART).any(axis=1) & ~_lie_in(boxes, truth[is_crowd])
    alone = _spread_out(boxes, np.flatnonzero(is_alone))
    cases["missing"].add(
        image,
        agreeing=top[is_found],
        contradicting=sure[alone],
        evidence=sure[alone],
        rows=rows[alone],
        annotations=np.full(len(alone), -1),
    )


def _lie_in(boxes: np.ndarray, crowds: np.ndarray) -> np.ndarray:
    """(M,) bool: at least half of the box lies in one of the crowds."""
    if not len(crowds):
        return np.zeros(len(boxes), bool)
    boxes = boxes.astype(np.float64)
    shared = np.minimum(boxes[:, None, 2:], crowds[:, 2:]) - np.maximum(boxes[:, None, :2], crowds[:, :2])
    areas = (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1)
    return (shared.clip(0).prod(axis=2) >= _MATCHES * areas[:, None]).any(axis=1)


def _spread_out(boxes: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Those of the positions whose boxes overlap no earlier one of them: one object each."""
    overlaps = box_ious(boxes[positions], boxes[positions]) >= _APART
    is_free, kept = np.ones(len(positions), bool), []
    for i in range(len(positions)):
        if is_free[i]:
            kept.append(i)
            is_free &= ~overlaps[i]
    return positions[kept]


def chances_false(agreeing: np.ndarray, contradicting: np.ndarray, evidence: np.ndarray, kind: str) -> np.ndarray:
    """The probability of each contradiction that it is the detector's mistake.

    Args:
        agreeing, contradicting: (N,), (M,) how sure the detector is, in log-odds.
        evidence: (M,) how sure it is that the annotation is wrong.
        kind: "category" or "missing".
    """
    if not len(contradicting):
        return np.empty(0)
    both = np.concatenate([agreeing, contradicting])
    edges = np.linspace(both.min(), both.max(), _BINS + 1)
    right, wrong = (np.histogram(part, edges)[0].astype(np.float64) for part in (agreeing, contradicting))
    centers = np.stack([np.ones(_BINS), (edges[1:] + edges[:-1]) / 2])
    parameters, precision = _MEAN.copy(), _PRECISIONS[kind]
    share = 0.5 * wrong.sum() / len(both)  # of annotations that are wrong: e
    for _ in range(_ROUNDS):
        mistaken = _mistaken(parameters, centers)
        own = wrong * mistaken / (mistaken + (1 - mistaken) * share)  # of the contradictions, the detector's mistakes
        for _ in range(2):
            mistaken = _mistaken(parameters, centers)
            slope = centers @ ((right + wrong) * mistaken - own) - precision * (parameters - _MEAN)
            curvature = (centers * ((right + wrong) * mistaken * (1 - mistaken))) @ centers.T + np.diag(precision)
            parameters = parameters + np.linalg.solve(curvature, slope).clip(-1, 1)
        before, share = share, max(float((wrong - own).sum() / (right + wrong - own).sum()), 1e-9)
        if abs(share - before) < 1e-7:
            break
    mistaken = _mistaken(parameters, np.stack([np.ones(len(evidence)), evidence]))
    return mistaken / (mistaken + (1 - mistaken) * share)


def _mistaken(parameters: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """q: the probability that the detector is wrong."""
    return 1 / (1 + np.exp((parameters @ sure).clip(-30, 30)))
