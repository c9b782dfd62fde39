"""The numbers of a report: hotcoco's, and the errors on each image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hotcoco
import numpy as np

from shared.data.annotations import CocoAnnotations
from shared.errors import UserError
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import (
    CocoEvaluator,
    check_detections,
    mean_of,
    precision_and_recall_of,
    summarize,
    summary_metrics,
)
from shared.evaluation.gathered import GatheredDetections
from shared.report.image_errors import Suspect, Wrong, find_errors, find_suspects

RESAMPLES = 200
# hotcoco's names of what `summarize` returns
_NAMES = {
    **{"mAP": "AP", "mAP_50": "AP50", "mAP_75": "AP75", "mAP_s": "APs", "mAP_m": "APm", "mAP_l": "APl"},
    **{"AR_1": "AR1", "AR_10": "AR10", "AR_100": "AR100", "AR_s": "ARs", "AR_m": "ARm", "AR_l": "ARl"},
    **{"AR": "AR", "AR_iou50": "AR50", "AR_iou75": "AR75"},
}


@dataclass(frozen=True)
class ThresholdCurve:
    """The F1 score of the detections of at least each score.

    Attributes:
        thresholds: (T,) float64, each score that occurs, the highest first.
        f1: (T,) float64.
        best: the position of the highest F1; None if no detection is right.
    """

    thresholds: np.ndarray
    f1: np.ndarray
    best: int | None

    @property
    def best_threshold(self) -> float:
        """nan if no detection is right."""
        return math.nan if self.best is None else float(self.thresholds[self.best])

    @property
    def best_f1(self) -> float:
        return math.nan if self.best is None else float(self.f1[self.best])


def threshold_curve(scores: np.ndarray, is_right: np.ndarray, objects: int) -> ThresholdCurve:
    """The curve of M detections that are right or wrong, with `objects` to find."""
    order = np.argsort(-scores, kind="stable")
    scores = scores[order].astype(np.float64)
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True)) if len(scores) else np.empty(0, np.int64)
    right, found = np.cumsum(is_right[order])[last], last + 1.0
    f1 = 2 * right / (found + objects)
    return ThresholdCurve(scores[last], f1, int(f1.argmax()) if f1.any() else None)


def interval_around(value: float, standard_error: float, least: float, most: float) -> tuple[float, float]:
    """The ends of the 95 % interval of a number between `least` and `most`: 1.96 standard errors to each side.

    The bootstrap's percentiles may miss the number: a resample can omit a rare category and its wrong detections.
    """
    ends = max(value - 1.96 * standard_error, least), min(value + 1.96 * standard_error, most)
    assert ends[0] <= value <= ends[1], f"the interval {ends} does not hold {value}"
    return ends


@dataclass(frozen=True)
class CategoryNumbers:
    """A row of the table of categories, by label. nan: the category has no object, or no detection is right.

    Attributes:
        objects: in the ground truth, without crowds.
        detections: those that count, at most 100 per image and category.
        ar: recall at 100 detections per image (keypoints: 20), the mean over IoUs.
        threshold, f1: at the highest F1, for an IoU of 0.5.
    """

    name: str
    objects: int
    detections: int
    ap: float
    ap50: float
    ar: float
    threshold: float
    f1: float


@dataclass(frozen=True)
class Verdicts:
    """What matched at an IoU of 0.5.

    Attributes:
        rows: (M,) of the detections that count. Those on a crowd do not.
        matched: (M,) rows of the annotations that they match; -1 for a wrong detection.
        objects: (N,) rows of the annotations that count.
    """

    rows: np.ndarray
    matched: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True)
class Analysis:
    """The numbers of one IoU type.

    Attributes:
        metrics: those of `evaluate`, without the prefix of the IoU type and without categories.
        intervals: the ends of their 95 % bootstrap intervals; {} without a bootstrap.
        curve: for all categories together, at an IoU (for keypoints, OKS) of 0.5.
        category_curves: by label.
        errors: hotcoco's `tide_errors`: "delta_ap" and "counts" by type, "ap_base"; None for keypoints.
        confusion: hotcoco's `confusion_matrix` at the best threshold; None if no detection is right.
        calibration: hotcoco's.
        evaluation: hotcoco's evaluation, see `CocoEvaluator.match`.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    categories: list[CategoryNumbers]
    curve: ThresholdCurve
    category_curves: list[ThresholdCurve]
    errors: dict[str, Any] | None
    confusion: dict[str, Any] | None
    calibration: dict[str, Any]
    evaluation: hotcoco.COCOeval = field(repr=False)
    verdicts: Verdicts = field(repr=False)


@dataclass(frozen=True)
class Analyses:
    """The numbers of one set of detections.

    Attributes:
        of: by IoU type, boxes first.
        indices: (images,) of the evaluated images in the annotations.
        detections: by index of the image.
        wrong: by boxes, the wrong detections of at least the best threshold, and what such detections do not find.
        found_objects: rows of the annotations that such detections match.
        suspects: annotations worth a look, those likeliest to be wrong first.
    """

    annotations: CocoAnnotations
    of: dict[str, Analysis]
    indices: np.ndarray
    detections: dict[int, Detections]
    wrong: list[Wrong]
    found_objects: np.ndarray
    suspects: list[Suspect]

    @property
    def best_threshold(self) -> float:
        """The score at which F1 of boxes is highest; nan if no detection is right."""
        return self.of["bbox"].curve.best_threshold

    def named(self, index: int) -> dict[str, Any]:
        """An image's file name and id."""
        annotations = self.annotations
        return {"file_name": annotations.file_name(index), "image_id": int(annotations.image_ids[index])}


def analyse(
    annotations: CocoAnnotations,
    detections: Sequence[Detections],
    iou_types: Sequence[str],
    image_ids: Iterable[int] | None = None,
    keypoint_sigmas: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    max_detections: int | None = None,
) -> Analyses:
    """All numbers of a report.

    Args:
        iou_types: "bbox", and "segm" and "keypoints" if the detections have them.
        image_ids, keypoint_sigmas, max_detections: see `evaluate`.
        resamples: how often images are drawn again for the intervals; 0 for no intervals.

    Raises:
        UserError: see `evaluate`.
    """
    image_ids = None if image_ids is None else list(image_ids)
    check_detections(annotations, detections, image_ids)
    iou_types = ("bbox", *(t for t in iou_types if t != "bbox"))
    evaluator = CocoEvaluator(annotations, iou_types, image_ids, keypoint_sigmas, max_detections=max_detections)
    evaluator.update(detections)
    found = evaluator.share()
    if len(found.scores) and not 0 <= found.scores.min() <= found.scores.max() <= 1:
        raise UserError(
            f"the scores are {found.scores.min():g} to {found.scores.max():g}, and must be 0 to 1. Fix: divide percent "
            "by 100; apply a sigmoid or softmax to logits"
        )
    index_of = {image_id: index for index, image_id in enumerate(annotations.image_ids.tolist())}
    indices = np.flatnonzero(np.isin(annotations.image_ids, evaluator.image_ids))
    of = {iou_type: analyse_one(evaluator, iou_type, found, resamples) for iou_type in evaluator.iou_types}

    curve, verdicts = of["bbox"].curve, of["bbox"].verdicts
    counts = found.scores[verdicts.rows] >= curve.best_threshold  # none if it is nan
    found_objects = verdicts.matched[counts & (verdicts.matched >= 0)]
    is_wrong = np.zeros(len(found.scores), bool)
    is_wrong[verdicts.rows[counts & (verdicts.matched < 0)]] = True
    is_object, is_missed = np.zeros((2, len(annotations.columns["labels"])), bool)
    is_object[verdicts.objects] = is_missed[verdicts.objects] = True
    is_missed[found_objects] = False
    rows_of = dict.fromkeys(indices.tolist(), slice(0, 0))
    rows_of |= {index_of[image_id]: rows for image_id, rows in found.rows_by_image().items()}
    return Analyses(
        annotations=annotations,
        of=of,
        indices=indices,
        detections={index_of[one.image_id]: one for one in detections},
        wrong=find_errors(annotations, found, rows_of, is_wrong, is_object, is_missed),
        found_objects=found_objects,
        suspects=[] if curve.best is None else find_suspects(annotations, found, rows_of, curve.best_threshold),
    )


def analyse_one(evaluator: CocoEvaluator, iou_type: str, found: GatheredDetections, resamples: int = 0) -> Analysis:
    """The numbers of one IoU type, see `CocoEvaluator.match`."""
    annotations = evaluator.annotations
    evaluation = evaluator.match(iou_type, found)
    names = annotations.category_names
    precision, recall = precision_and_recall_of(evaluation)
    summary = summarize(precision, recall, iou_type, names)
    metrics = {name: summary[f"{iou_type}_{name}"] for name in summary_metrics(iou_type)}
    verdicts = _verdicts_of(evaluation)
    rows, is_right = verdicts.rows, verdicts.matched >= 0
    counts = np.bincount(annotations.columns["labels"][verdicts.objects], minlength=len(names))
    scores, labels = found.scores[rows], found.labels[rows]
    curves = [
        threshold_curve(scores[labels == label], is_right[labels == label], count)
        for label, count in enumerate(counts.tolist())
    ]
    curve = threshold_curve(scores, is_right, int(counts.sum()))
    detected = np.bincount(labels, minlength=len(names))
    return Analysis(
        metrics=metrics,
        intervals=_intervals(evaluator, evaluation, metrics, resamples) if resamples else {},
        categories=[
            CategoryNumbers(
                name=name,
                objects=int(counts[label]),
                detections=int(detected[label]),
                ap=mean_of(precision[:, :, label, 0]),
                ap50=mean_of(precision[0, :, label, 0]),
                ar=mean_of(recall[:, label, 0, -1]),
                threshold=curves[label].best_threshold,
                f1=curves[label].best_f1,
            )
            for label, name in enumerate(names)
        ],
        curve=curve,
        category_curves=curves,
        errors=None if iou_type == "keypoints" else evaluation.tide_errors(),
        confusion=None
        if iou_type == "keypoints" or curve.best is None
        else evaluation.confusion_matrix(min_score=curve.best_threshold),
        calibration=evaluation.calibration(),
        evaluation=evaluation,
        verdicts=verdicts,
    )


def best_of_boxes(evaluator: CocoEvaluator) -> ThresholdCurve:
    """The curve of an evaluator's last metrics, by boxes if it evaluates them. On the chief only."""
    iou_type = "bbox" if "bbox" in evaluator.iou_types else evaluator.iou_types[0]
    verdicts = _verdicts_of(evaluator.match(iou_type, evaluator.found))
    return threshold_curve(evaluator.found.scores[verdicts.rows], verdicts.matched >= 0, len(verdicts.objects))


def _verdicts_of(evaluation: hotcoco.COCOeval) -> Verdicts:
    diagnostics = evaluation.image_diagnostics()
    status, match = diagnostics["dt_status"], diagnostics["dt_match"]
    counted = sorted(row for row, verdict in status.items() if verdict in ("tp", "fp"))
    matched = [match[row] if status[row] == "tp" else 0 for row in counted]
    objects = sorted(row for row, verdict in diagnostics["gt_status"].items() if verdict in ("matched", "fn"))
    return Verdicts(*(np.array(rows, np.int64) - 1 for rows in (counted, matched, objects)))  # hotcoco's are from 1 on


def _intervals(
    evaluator: CocoEvaluator, evaluation: hotcoco.COCOeval, metrics: dict[str, float], resamples: int
) -> dict[str, tuple[float, float]]:
    # no detection at all scores 0, so that the difference is the number itself
    nothing = evaluator.match(evaluation.params.iou_type, GatheredDetections.of([], masks=False, keypoints=False))
    errors = standard_errors(nothing, evaluation, resamples)
    return {
        name: interval_around(value, errors[name], 0.0, 1.0)
        for name, value in metrics.items()
        if name in errors and not math.isnan(value)
    }


def standard_errors(one: hotcoco.COCOeval, other: hotcoco.COCOeval, resamples: int) -> dict[str, float]:
    """The standard error of the difference in each metric, from a bootstrap over images; {} without one."""
    if resamples < 2 or len(one.params.img_ids) < 2:
        return {}
    found = hotcoco.compare(one, other, n_bootstrap=resamples, seed=0)["ci"]
    return {name: found[theirs]["std_err"] for name, theirs in _NAMES.items() if theirs in found}
