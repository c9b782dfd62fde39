"""All numbers of a report, of one set of detections: hotcoco's, and what is wrong on each image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hotcoco
import numpy as np

from shared.data.annotations import CocoAnnotations
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator, check_detections, mean_of, summarize
from shared.evaluation.gathered import GatheredDetections
from shared.report.difference import interval_around
from shared.report.image_errors import ERROR_TYPES, ImageObjects, Wrong, errors_of
from shared.report.suspects import Suspect, find_suspects


@dataclass(frozen=True)
class ThresholdCurve:
    """Precision, recall and their harmonic mean, F1, of the detections of at least each score.

    Attributes:
        thresholds: (T,) float64, the scores that detections have, each once, from the highest on.
        precision, recall, f1: (T,) float64.
    """

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray

    @property
    def best(self) -> int | None:
        """Where F1 is greatest, the highest such score; None where nothing is right."""
        return int(self.f1.argmax()) if len(self.f1) and self.f1.max() > 0 else None

    @property
    def best_threshold(self) -> float:
        """nan where nothing is right."""
        return math.nan if self.best is None else float(self.thresholds[self.best])

    @property
    def best_f1(self) -> float:
        return math.nan if self.best is None else float(self.f1[self.best])


def threshold_curve(scores: np.ndarray, is_right: np.ndarray, objects: int) -> ThresholdCurve:
    """Of detections that are right or wrong.

    Args:
        scores: (M,).
        is_right: (M,) bool.
        objects: how many there are to find.
    """
    order = np.argsort(-scores, kind="stable")
    scores = scores[order].astype(np.float64)
    right = np.cumsum(is_right[order])
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True)) if len(scores) else np.empty(0, np.int64)
    right, found = right[last], last + 1.0
    return ThresholdCurve(
        thresholds=scores[last],
        precision=right / found,
        recall=right / objects if objects else np.zeros(len(last)),
        f1=2 * right / (found + objects),
    )


RESAMPLES = 200
SEED = 0
_OBJECTS_IN_AN_IMAGE = (
    ("1", 1, 1),
    ("2 to 4", 2, 4),
    ("5 to 9", 5, 9),
    ("10 to 19", 10, 19),
    ("20 and more", 20, None),
)
# hotcoco's names of what `summarize` gives
NAMES = {
    **{"mAP": "AP", "mAP_50": "AP50", "mAP_75": "AP75", "mAP_s": "APs", "mAP_m": "APm", "mAP_l": "APl"},
    **{"AR_1": "AR1", "AR_10": "AR10", "AR_100": "AR100", "AR_s": "ARs", "AR_m": "ARm", "AR_l": "ARl"},
    **{"AR": "AR", "AR_iou50": "AR50", "AR_iou75": "AR75"},
}


@dataclass(frozen=True)
class CategoryNumbers:
    """A row of the table of categories; nan where the category has no object, or no detection is right.

    Attributes:
        objects: in the ground truth, without crowds.
        detections: those that count, at most 100 an image and category.
        ar: recall at 100 detections an image (keypoints: 20), the mean over IoUs.
        threshold, f1: where F1 is greatest at an IoU of 0.5.
    """

    label: int
    name: str
    objects: int
    detections: int
    ap: float
    ap50: float
    ar: float
    threshold: float
    f1: float


@dataclass(frozen=True)
class Group:
    """AP of some of the images.

    Attributes:
        name: "2 to 4".
        images: how many.
    """

    name: str
    images: int
    ap: float
    ap50: float


@dataclass(frozen=True)
class Verdicts:
    """What matched at an IoU of 0.5.

    Attributes:
        rows: (M,) of the detections that count: not of those that lie on a crowd.
        is_right: (M,) bool.
        matched: (M,) rows of the annotations that they matched; -1 of a wrong one.
        objects: (N,) rows of the annotations that count.
    """

    rows: np.ndarray
    is_right: np.ndarray
    matched: np.ndarray
    objects: np.ndarray


@dataclass
class Analysis:
    """What one IoU type says of the detections.

    Attributes:
        metrics: the numbers of `evaluate`, without the IoU type and without those of categories.
        intervals: lower and upper end of their 95 % bootstrap intervals; {} without a bootstrap.
        curve: over the score, of all categories together, at an IoU of 0.5 (OKS of keypoints).
        category_curves: the same of each category that has objects, by its label.
        by_count: by the number of objects in an image.
        errors: hotcoco's `tide_errors`: "delta_ap" by type, "counts", "ap_base"; None of keypoints.
        confusion: hotcoco's `confusion_matrix` at the best threshold; None where nothing is right.
        calibration: hotcoco's.
        evaluation: hotcoco's evaluation itself, see `CocoEvaluator.match`; `verdicts` what matched in it.
    """

    iou_type: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    categories: list[CategoryNumbers]
    curve: ThresholdCurve
    category_curves: dict[int, ThresholdCurve]
    by_count: list[Group]
    errors: dict[str, Any] | None
    confusion: dict[str, Any] | None
    calibration: dict[str, Any]
    evaluation: hotcoco.COCOeval = field(repr=False)
    verdicts: Verdicts = field(repr=False)


@dataclass
class Analyses:
    """What there is to say of one set of detections.

    Attributes:
        of: by IoU type, boxes first.
        indices: (images,) where the evaluated images are in the annotations.
        detections: of these images, by that index.
        wrong: the errors of detections of at least the best threshold, and what they leave unfound, by boxes.
        found_objects: rows of the annotations that such detections match.
        suspects: the annotations that are worth a look, those likeliest to be wrong first.
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
        """The score under which detections are best left out: F1 of boxes is greatest there. nan where none is
        right."""
        return self.of["bbox"].curve.best_threshold

    def f1_of_images(self) -> np.ndarray:
        """(images,) of each of `indices`, of detections of at least the best threshold, by boxes; 1 where there is
        nothing and nothing is found."""
        columns = self.annotations.columns
        image_of = np.repeat(np.arange(len(self.annotations)), np.diff(columns["offsets"]))
        objects = np.bincount(image_of[self.of["bbox"].verdicts.objects], minlength=len(self.annotations))
        invented = np.bincount(
            [one.image for one in self.wrong if one.detection is not None], minlength=len(self.annotations)
        )
        right = np.bincount(image_of[self.found_objects], minlength=len(self.annotations))
        sums = 2 * right + invented + (objects - right)
        f1 = np.divide(2 * right, sums, out=np.ones(len(sums)), where=sums > 0)
        return f1[self.indices]


def analyse(
    annotations: CocoAnnotations,
    detections: Iterable[Detections],
    iou_types: Sequence[str],
    image_ids: Iterable[int] | None = None,
    keypoint_sigmas: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
) -> Analyses:
    """All that a report says of detections, but for words, figures and pictures.

    Args:
        iou_types: "bbox", and "segm" and "keypoints" where the detections have them.
        image_ids, keypoint_sigmas: as of `evaluate`.
        resamples: of images, with replacement, for the intervals; 0 for none.

    Raises:
        UserError: as of `evaluate`.
    """
    detections = list(detections)
    image_ids = None if image_ids is None else list(image_ids)
    check_detections(annotations, detections, image_ids)
    evaluator = CocoEvaluator(annotations, ("bbox", *(t for t in iou_types if t != "bbox")), image_ids, keypoint_sigmas)
    evaluator.update(detections)
    found = evaluator.share()
    index_of = {image_id: index for index, image_id in enumerate(annotations.image_ids.tolist())}
    evaluated = set(evaluator.image_ids.tolist())
    analyses = Analyses(
        annotations=annotations,
        of={t: analyse_one(evaluator, t, found, resamples) for t in evaluator.iou_types},
        indices=np.array(sorted(index_of[image_id] for image_id in evaluated), np.int64),
        detections={index_of[one.image_id]: one for one in detections if one.image_id in evaluated},
        wrong=[],
        found_objects=np.empty(0, np.int64),
        suspects=[],
    )
    _look_at_images(analyses, found)
    return analyses


def analyse_one(evaluator: CocoEvaluator, iou_type: str, found: GatheredDetections, resamples: int = 0) -> Analysis:
    """What one IoU type says of an evaluator's detections, see `CocoEvaluator.match`."""
    annotations = evaluator.annotations
    evaluation = evaluator.match(iou_type, found)
    names = annotations.category_names
    metrics = {
        name.removeprefix(f"{iou_type}_"): value
        for name, value in summarize(evaluation, iou_type, names).items()
        if "_AP/" not in name
    }
    verdicts = _verdicts_of(evaluation)
    rows, is_right = verdicts.rows, verdicts.is_right
    counts = np.bincount(annotations.columns["labels"][verdicts.objects], minlength=len(names))
    scores, labels = found.scores[rows], found.labels[rows]
    curves = {
        label: threshold_curve(scores[labels == label], is_right[labels == label], int(counts[label]))
        for label in np.flatnonzero(counts).tolist()
    }
    curve = threshold_curve(scores, is_right, int(counts.sum()))
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    detected = np.bincount(labels, minlength=len(names))
    nothing = threshold_curve(np.empty(0), np.empty(0, bool), 0)
    return Analysis(
        iou_type=iou_type,
        metrics=metrics,
        intervals=_intervals(evaluator, evaluation, iou_type, metrics, resamples),
        categories=[
            CategoryNumbers(
                label=label,
                name=name,
                objects=int(counts[label]),
                detections=int(detected[label]),
                ap=mean_of(precision[:, :, label, 0, -1]),
                ap50=mean_of(precision[0, :, label, 0, -1]),
                ar=mean_of(recall[:, label, 0, -1]),
                threshold=curves.get(label, nothing).best_threshold,
                f1=curves.get(label, nothing).best_f1,
            )
            for label, name in enumerate(names)
        ],
        curve=curve,
        category_curves=curves,
        by_count=_by_count(evaluation, annotations, evaluator.image_ids),
        errors=None if iou_type == "keypoints" else evaluation.tide_errors(),
        confusion=None
        if iou_type == "keypoints" or curve.best is None
        else evaluation.confusion_matrix(min_score=curve.best_threshold),
        calibration=evaluation.calibration(),
        evaluation=evaluation,
        verdicts=verdicts,
    )


def best_of_boxes(evaluator: CocoEvaluator) -> ThresholdCurve:
    """Over the score, of what an evaluator's last metrics are of, by boxes where they are evaluated; on the chief."""
    iou_type = "bbox" if "bbox" in evaluator.iou_types else evaluator.iou_types[0]
    verdicts = _verdicts_of(evaluator.match(iou_type, evaluator.found))
    return threshold_curve(evaluator.found.scores[verdicts.rows], verdicts.is_right, len(verdicts.objects))


def _verdicts_of(evaluation: hotcoco.COCOeval) -> Verdicts:
    diagnostics = evaluation.image_diagnostics()
    rows = np.array(sorted(r for r, verdict in diagnostics["dt_status"].items() if verdict in ("tp", "fp")), np.int64)
    match = diagnostics["dt_match"]
    matched = np.array([match.get(row, 0) for row in rows.tolist()], np.int64) - 1
    is_right = np.array([diagnostics["dt_status"][row] == "tp" for row in rows.tolist()], bool)
    objects = sorted(r for r, verdict in diagnostics["gt_status"].items() if verdict in ("matched", "fn"))
    return Verdicts(rows - 1, is_right, np.where(is_right, matched, -1), np.array(objects, np.int64) - 1)


def _intervals(
    evaluator: CocoEvaluator, evaluation: hotcoco.COCOeval, iou_type: str, metrics: dict[str, float], resamples: int
) -> dict[str, tuple[float, float]]:
    """Around each number, see `interval_around`."""
    if resamples < 2 or len(evaluator.image_ids) < 2:
        return {}
    # hotcoco resamples differences; from nothing found, which scores 0, the difference is the number itself
    nothing = evaluator.match(iou_type, _none_found(iou_type))
    compared = hotcoco.compare(nothing, evaluation, n_bootstrap=resamples, seed=SEED)
    errors = {name: compared["ci"][NAMES[name]]["std_err"] for name in metrics if NAMES[name] in compared["ci"]}
    return {
        name: interval_around(metrics[name], error, 0.0, 1.0)
        for name, error in errors.items()
        if not math.isnan(metrics[name])
    }


def _none_found(iou_type: str) -> GatheredDetections:
    nowhere = np.empty(0, np.int64)
    return GatheredDetections.of(nowhere, nowhere, [], masks=iou_type == "segm", keypoints=iou_type == "keypoints")


def _by_count(evaluation: hotcoco.COCOeval, annotations: CocoAnnotations, image_ids: np.ndarray) -> list[Group]:
    columns = annotations.columns
    image_of = np.repeat(np.arange(len(annotations)), np.diff(columns["offsets"]))
    per_image = np.bincount(image_of[~columns["iscrowd"]], minlength=len(annotations))
    order = np.argsort(annotations.image_ids)
    per_position = per_image[order]  # as hotcoco counts images
    evaluated = np.searchsorted(annotations.image_ids[order], image_ids)
    slices = {}
    for name, least, most in _OBJECTS_IN_AN_IMAGE:
        count = per_position[evaluated]
        chosen = evaluated[(count >= least) & (True if most is None else count <= most)]
        if len(chosen):
            slices[name] = chosen.tolist()
    if not slices:
        return []
    sliced = evaluation.slice_by(slices)
    return [
        Group(name, len(images), _number(sliced[name].get("AP")), _number(sliced[name].get("AP50")))
        for name, images in slices.items()
    ]


def _number(value: float | None) -> float:
    """COCO has -1 where nothing can be scored."""
    return math.nan if value is None or value < 0 else float(value)


def _look_at_images(analyses: Analyses, found: GatheredDetections) -> None:
    """Fills in what is wrong, image by image."""
    boxes = analyses.of["bbox"]
    threshold = math.inf if boxes.curve.best is None else boxes.curve.best_threshold
    annotations, columns = analyses.annotations, analyses.annotations.columns
    verdicts = boxes.verdicts
    is_right, is_wrong = np.zeros((2, len(found.scores)), bool)
    is_right[verdicts.rows[verdicts.is_right]], is_wrong[verdicts.rows[~verdicts.is_right]] = True, True
    is_object = np.zeros(len(columns["labels"]), bool)
    is_object[verdicts.objects] = True
    is_missed = is_object.copy()
    analyses.found_objects = verdicts.matched[verdicts.is_right & (found.scores[verdicts.rows] >= threshold)]
    is_missed[analyses.found_objects] = False
    order = np.argsort(annotations.image_ids)
    ends = np.cumsum(found.counts)
    rows_of = {
        int(order[position]): (int(end - count), int(end))
        for position, count, end in zip(found.images.tolist(), found.counts.tolist(), ends.tolist(), strict=True)
    }
    truth = columns["boxes"].astype(np.float64)
    truth[:, 2:] += truth[:, :2]
    for index in analyses.indices.tolist():
        first, last = int(columns["offsets"][index]), int(columns["offsets"][index + 1])
        start, end = rows_of.get(index, (0, 0))
        kept = np.arange(start, end)[found.scores[start:end] >= threshold]
        if not is_missed[first:last].any() and not is_wrong[kept].any():
            continue
        one = ImageObjects(
            image=index,
            first=first,
            truth_boxes=truth[first:last],
            truth_labels=columns["labels"][first:last],
            is_missed=is_missed[first:last],
            is_object=is_object[first:last],
            rows=kept - start,
            boxes=found.boxes[kept],
            labels=found.labels[kept],
            scores=found.scores[kept],
            is_right=is_right[kept],
            is_wrong=is_wrong[kept],
        )
        analyses.wrong += errors_of(one)
    if boxes.curve.best is not None:
        analyses.suspects = find_suspects(annotations, found, rows_of, analyses.indices.tolist(), threshold)


def counts_by_category(wrong: Sequence[Wrong], kind: str, names: Sequence[str]) -> list[tuple[str, int]]:
    """How many errors of a kind each category has, the most first."""
    counts = np.bincount([one.label for one in wrong if one.kind == kind], minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    return [(names[label], int(counts[label])) for label in order.tolist() if counts[label]]


def costliest(errors: dict[str, Any]) -> list[tuple[str, float]]:
    """TIDE's types and how much AP50 would rise without them, the most first."""
    return sorted(((kind, errors["delta_ap"][kind]) for kind in ERROR_TYPES), key=lambda pair: -pair[1])
