"""Detections in, COCO's metrics out: the numbers of pycocotools. Masks and keypoints are matched by hotcoco."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import hotcoco
import numpy as np
from tabulate import tabulate

from shared.data.annotations import CocoAnnotations
from shared.data.checks import wrong_segmentation
from shared.errors import UserError
from shared.evaluation.box_matching import MAX_DETECTIONS, Objects, precision_and_recall
from shared.evaluation.detections import Detections, as_rle
from shared.evaluation.gathered import ChiefReducer, Gather, GatheredDetections, alone, merge

# the twelve lines of pycocotools' summary: name, recall instead of precision, IoU index (None: all), area index, index
# in max_dets (1, 10, 100). -1 is the largest number of detections: 100, or `max_detections`
_SUMMARY = (
    ("mAP", False, None, 0, -1),
    ("mAP_50", False, 0, 0, -1),
    ("mAP_75", False, 5, 0, -1),
    ("mAP_s", False, None, 1, -1),
    ("mAP_m", False, None, 2, -1),
    ("mAP_l", False, None, 3, -1),
    ("AR_1", True, None, 0, 0),
    ("AR_10", True, None, 0, 1),
    ("AR_100", True, None, 0, 2),
    ("AR_s", True, None, 1, -1),
    ("AR_m", True, None, 2, -1),
    ("AR_l", True, None, 3, -1),
)
# the ten lines of keypoints: no small objects, and at most 20 detections per image
_KEYPOINT_SUMMARY = (
    ("mAP", False, None, 0, 0),
    ("mAP_50", False, 0, 0, 0),
    ("mAP_75", False, 5, 0, 0),
    ("mAP_m", False, None, 1, 0),
    ("mAP_l", False, None, 2, 0),
    ("AR", True, None, 0, 0),
    ("AR_iou50", True, 0, 0, 0),
    ("AR_iou75", True, 5, 0, 0),
    ("AR_m", True, None, 1, 0),
    ("AR_l", True, None, 2, 0),
)
_COCO_KEYPOINTS = 17
IOU_TYPES = ("bbox", "segm", "keypoints")


def summary_metrics(iou_type: str) -> tuple[str, ...]:
    """The names of COCO's summary without the IoU type: "mAP", "mAP_50", …"""
    return tuple(name for name, *_ in _summary_of(iou_type))


def _summary_of(iou_type: str) -> tuple:
    return _KEYPOINT_SUMMARY if iou_type == "keypoints" else _SUMMARY


def evaluate(
    annotations: CocoAnnotations | str | os.PathLike,
    detections: Iterable[Detections],
    iou_types: Sequence[str] | str = ("bbox",),
    image_ids: Iterable[int] | None = None,
    keypoint_sigmas: Sequence[float] | None = None,
    max_detections: int | None = None,
) -> dict[str, float]:
    """COCO's summary (twelve numbers, ten for keypoints) and the AP of each category, by each of `iou_types`.

    Args:
        detections: one per image. On an image without one nothing is found.
        iou_types: of "bbox", "segm" and "keypoints".
        image_ids: the images to evaluate on; None for all images of the file.
        keypoint_sigmas: the tolerance of each of the K keypoints, as a share of the object's size; None for COCO's 17.
        max_detections: per image and category, the best scores first; None for COCO's 100, and 20 for keypoints.

    Returns:
        {"bbox_mAP": …, "bbox_mAP_50": …, …, "bbox_AP/<category name>": …, "segm_mAP": …}, fractions in
        [0, 1], nan without ground truth. Categories without ground truth are omitted.

    Raises:
        UserError: an image or a label is not in the file, an image occurs twice, or a box or a score is not finite.
    """
    if not isinstance(annotations, CocoAnnotations):
        annotations = CocoAnnotations.open(annotations)
    image_ids = None if image_ids is None else list(image_ids)
    detections = list(detections)
    check_detections(annotations, detections, image_ids)
    evaluator = CocoEvaluator(annotations, iou_types, image_ids, keypoint_sigmas, max_detections=max_detections)
    evaluator.update(detections)
    return evaluator.compute()


def check_detections(
    annotations: CocoAnnotations, detections: Sequence[Detections], image_ids: Sequence[int] | None
) -> None:
    """Raises the errors of `evaluate`, except those about labels."""
    known = set(annotations.image_ids.tolist())
    named = f"{annotations.path or 'the annotations'}"
    for image_id in image_ids or ():
        if image_id not in known:
            raise UserError(f"image_ids: no image of {named} has the id {image_id!r}. Fix: give ids of its images")
    seen: set[int] = set()
    for found in detections:
        if found.image_id not in known:
            raise UserError(
                f"detections of image {found.image_id!r}: no image of {named} has this id. Fix: give detections of its "
                "images"
            )
        if found.image_id in seen:
            raise UserError(
                f"detections of image {found.image_id}: they are given twice. Fix: put them into one `Detections`"
            )
        seen.add(found.image_id)
        for name, values in (("box", found.boxes), ("score", found.scores)):
            if not np.isfinite(values).all():
                wrong = values[~np.isfinite(values).reshape(len(values), -1).all(axis=1)][0]
                where = f"detections of image {found.image_id}"
                raise UserError(f"{where}: the {name} {wrong.tolist()} is not finite. Fix: remove it")


def iou_types_of(detections: Sequence[Detections], annotations: CocoAnnotations) -> tuple[str, ...]:
    """What can be scored: "bbox"; "segm" if all detections have masks; "keypoints" if they and the data have some."""
    masks = bool(detections) and all(found.masks is not None for found in detections)
    points = bool(detections) and all(found.keypoints is not None for found in detections)
    return ("bbox",) + ("segm",) * masks + ("keypoints",) * (points and "keypoints" in annotations.columns)


class CocoEvaluator(ChiefReducer):
    """Collects `Detections`, on as many slots as there are, and computes the metrics once, on all of them.

    An image that several slots have seen counts once.

    Args:
        image_ids: see `evaluate`.
        keypoint_sigmas: see `evaluate`.
        max_detections: see `evaluate`.
        gather: the way to the chief, see `ChiefReducer`.

    Attributes:
        found: the detections behind the last metrics; on the chief only.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        iou_types: Sequence[str] | str = ("bbox",),
        image_ids: Iterable[int] | None = None,
        keypoint_sigmas: Sequence[float] | None = None,
        gather: Gather = alone,
        max_detections: int | None = None,
    ):
        super().__init__(gather)
        self.iou_types = (iou_types,) if isinstance(iou_types, str) else tuple(iou_types)
        for iou_type in self.iou_types:
            if iou_type not in IOU_TYPES:
                raise ValueError(f"iou_types: {iou_type!r} is not one of {', '.join(map(repr, IOU_TYPES))}")
        if "keypoints" in self.iou_types:
            _check_keypoints(annotations, keypoint_sigmas)
        self.keypoint_sigmas = keypoint_sigmas
        self.max_detections = max_detections
        self.annotations = annotations
        self._all_ids = np.sort(annotations.image_ids)
        wanted = self._all_ids if image_ids is None else np.array([*image_ids], dtype=np.int64)
        self.image_ids = np.intersect1d(wanted, self._all_ids)
        self._truth: hotcoco.COCO | None = None
        self._objects: Objects | None = None
        self.found: GatheredDetections | None = None
        self.reset()

    def reset(self) -> None:
        self._detections: dict[int, Detections] = {}
        self._skipped: set[int] = set()

    def skip(self, image_ids: Iterable[int]) -> None:
        """Leaves images out of the evaluation: those that cannot be read."""
        self._skipped.update(image_ids)

    def update(self, detections: Iterable[Detections]) -> None:
        for detection in detections:
            for iou_type, needed in (("segm", "masks"), ("keypoints", "keypoints")):
                if iou_type in self.iou_types and getattr(detection, needed) is None:
                    raise ValueError(
                        f"image {detection.image_id}: {iou_type!r} needs the detections' {needed}, and there are none"
                    )
            self._detections[detection.image_id] = detection

    def share(self) -> GatheredDetections:
        """This slot's detections and skipped images, of those that are evaluated."""
        evaluated = set(self.image_ids.tolist())
        image_ids = sorted(self._detections.keys() & evaluated)
        share = GatheredDetections.of(
            [self._detections[image_id] for image_id in image_ids],
            masks="segm" in self.iou_types,
            keypoints="keypoints" in self.iou_types,
            skipped=sorted(self._skipped & evaluated),
        )
        categories = len(self.annotations.categories)
        if len(wrong := np.flatnonzero((share.labels < 0) | (share.labels >= categories))):
            image_id = np.repeat(image_ids, share.counts)[wrong[0]]
            raise UserError(
                f"detections of image {image_id}: the label {share.labels[wrong[0]]} is not valid. Fix: give labels "
                f"from 0 to {categories - 1}, for the {categories} categories"
            )
        return share

    def metrics_of(self, shares: list[GatheredDetections]) -> dict[str, float]:
        self.open_truth()
        self.found = merge(shares)
        if len(self.found.skipped) and not len(self._evaluated(self.found)):
            raise UserError("data.val.images: no image can be read. Fix: look at the lines above, each names an image")
        metrics: dict[str, float] = {}
        for iou_type in self.iou_types:
            if iou_type == "bbox":
                precision, recall = self._match_boxes(self.found)
            else:
                precision, recall = precision_and_recall_of(self.match(iou_type, self.found))
            metrics.update(summarize(precision, recall, iou_type, self.annotations.category_names))
        if len(self.found.skipped):
            metrics["skipped_images"] = len(self.found.skipped)
        return metrics

    def _positions(self, image_ids: np.ndarray) -> np.ndarray:
        """Images as hotcoco has them: the position among all of the file's ids, sorted."""
        return np.searchsorted(self._all_ids, image_ids)

    def _match_boxes(self, found: GatheredDetections) -> tuple[np.ndarray, np.ndarray]:
        """Precision and recall of the boxes, see `precision_and_recall`."""
        objects, rows, scores = self._objects, found.rows(self._positions(found.images)), found.scores
        evaluated = self._evaluated(found)
        if len(evaluated) < len(self._all_ids):
            objects = objects.only(evaluated)
            kept = np.isin(rows[:, 0], evaluated)
            rows, scores = rows[kept], scores[kept]
        images, labels = rows[:, [0, 6]].astype(np.int64).T
        return precision_and_recall(objects, images, labels, scores, rows[:, 1:5], self._most_detections())

    def _most_detections(self) -> list[int]:
        """The numbers of detections that COCO's summary counts, ascending."""
        most = self.max_detections
        return [*MAX_DETECTIONS] if most is None else [*(min(each, most) for each in MAX_DETECTIONS), most]

    def _evaluated(self, found: GatheredDetections) -> np.ndarray:
        """The positions of the images that count, sorted."""
        return self._positions(np.setdiff1d(self.image_ids, found.skipped))

    def match(self, iou_type: str, found: GatheredDetections) -> hotcoco.COCOeval:
        """Evaluate and accumulate with hotcoco. The report reads errors and verdicts from the result.

        hotcoco's ids: an image's is its position among the file's sorted ids, a category's its label, a detection's its
        row + 1, an annotation's its row in `annotations.columns` + 1.
        """
        truth = self._hotcoco_truth()
        rows = found.rows(self._positions(found.images))
        masks = found.rles() if iou_type == "segm" and len(rows) else None
        results = truth.load_res(rows, segmentation=masks)
        if iou_type == "keypoints" and len(rows):
            points = found.keypoints.astype(np.float64).tolist()
            results.update_anns([{"id": i, "keypoints": row} for i, row in enumerate(points, 1)])
        elif masks is not None:
            # small, medium and large are the masks' areas, as MMDetection and Detectron2 have it, not the boxes'
            results.update_anns(ids=np.arange(1, len(rows) + 1), area=hotcoco.mask.area(masks))
        evaluation = hotcoco.COCOeval(truth, results, iou_type)
        params = evaluation.params
        params.img_ids = self._evaluated(found).tolist()
        if iou_type == "keypoints" and self.keypoint_sigmas:
            params.kpt_oks_sigmas = list(self.keypoint_sigmas)
        if self.max_detections is not None:
            params.max_dets = [self.max_detections] if iou_type == "keypoints" else self._most_detections()
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation

    def open_truth(self) -> None:
        """Prepare the ground truth of each IoU type, once. A trial calls it before the training, so that truth which
        cannot be scored stops the run there.

        Raises:
            UserError: see `to_hotcoco`.
        """
        if "bbox" in self.iou_types and self._objects is None:
            images = self._positions(self.annotations.image_ids)[self.annotations.image_rows]
            self._objects = Objects.of(self.annotations.columns, images, len(self.annotations.categories))
        if set(self.iou_types) - {"bbox"}:
            self._hotcoco_truth()

    def _hotcoco_truth(self) -> hotcoco.COCO:
        if self._truth is None:
            self._truth = to_hotcoco(self.annotations, self.iou_types)
        return self._truth


def precision_and_recall_of(evaluation: hotcoco.COCOeval) -> tuple[np.ndarray, np.ndarray]:
    """The arrays that `summarize` takes."""
    arrays = evaluation.eval
    return arrays["precision"][..., -1], arrays["recall"]


def summarize(
    precision: np.ndarray, recall: np.ndarray, iou_type: str, category_names: Sequence[str]
) -> dict[str, float]:
    """The numbers of `evaluate`, of one IoU type.

    Args:
        precision, recall: as `precision_and_recall` returns them.
    """
    metrics = {}
    for name, is_recall, iou, area, max_dets in _summary_of(iou_type):
        values = recall[..., area, max_dets] if is_recall else precision[..., area]
        metrics[f"{iou_type}_{name}"] = mean_of(values if iou is None else values[iou])
    for label, name in enumerate(category_names):
        average_precision = mean_of(precision[:, :, label, 0])
        if not math.isnan(average_precision):
            metrics[f"{iou_type}_AP/{name}"] = average_precision
    return metrics


def mean_of(values: np.ndarray) -> float:
    """The mean of precisions or recalls; nan where nothing can be scored, which pycocotools marks with -1."""
    values = values[values > -1]
    return float(values.mean()) if values.size else math.nan


def _check_keypoints(annotations: CocoAnnotations, sigmas: Sequence[float] | None) -> None:
    if "keypoints" not in annotations.columns:
        raise UserError(f"{annotations.path} has no keypoints to evaluate on. Fix: give annotations with keypoints")
    count, given = annotations.columns["keypoints"].shape[1], len(sigmas) if sigmas else _COCO_KEYPOINTS
    if count != given:
        raise UserError(
            f"{annotations.path} has {count} keypoints per object, but {given} sigmas are given. Fix: give one sigma "
            "per keypoint"
        )


def to_hotcoco(annotations: CocoAnnotations, iou_types: Sequence[str]) -> hotcoco.COCO:
    """The annotations as hotcoco's data set, in the file's own float64, with the masks and keypoints that are scored.

    Its ids are those of `CocoEvaluator.match`, because a file's ids may be negative or too great for the float64 of
    hotcoco's results.

    Raises:
        UserError: a segmentation that is no polygon or RLE, an RLE of another size than its image.
    """
    columns = annotations.columns
    positions = np.searchsorted(np.sort(annotations.image_ids), annotations.image_ids)
    segmentation = _segmentations(annotations) if "segm" in iou_types else None
    sizes = zip(positions.tolist(), columns["heights"].tolist(), columns["widths"].tolist(), strict=True)
    images = [{"id": position, "height": height, "width": width, "file_name": ""} for position, height, width in sizes]
    categories = [{**category, "id": label} for label, category in enumerate(annotations.categories)]
    try:
        truth = hotcoco.COCO.from_arrays(
            images=images,
            categories=categories,
            image_ids=positions[annotations.image_rows],
            category_ids=columns["labels"],
            boxes=columns["boxes"],
            area=columns["areas"],
            iscrowd=columns["iscrowd"],
            segmentation=segmentation,
        )
        if "keypoints" in iou_types:
            points = columns["keypoints"]
            counts = (points[..., 2] > 0).sum(axis=1).tolist()
            rows = zip(points.reshape(len(points), -1).tolist(), counts, strict=True)
            truth.update_anns([{"id": i, "keypoints": p, "num_keypoints": n} for i, (p, n) in enumerate(rows, 1)])
        return truth
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{annotations.path or 'the annotations'} cannot be evaluated on: {error}. Fix: correct the file"
        ) from error


def _segmentations(annotations: CocoAnnotations) -> list[list | dict]:
    """The mask of each annotation as compressed RLE, [] without one. hotcoco would rasterize polygons at each
    evaluation again. Polygons of less than three points enclose nothing and are omitted."""
    segmentations = []
    for record in annotations:
        for piece in record.segmentations:
            if isinstance(piece, list):
                piece = [polygon for polygon in piece if not (isinstance(polygon, list) and len(polygon) < 6)]
            if wrong := wrong_segmentation(piece, record.height, record.width) if piece else None:
                annotation_id = annotations.columns["annotation_ids"][len(segmentations)]
                raise UserError(
                    f"{annotations.path or 'the annotations'}: the segmentation of annotation {annotation_id}, on "
                    f"image {record.image_id}, {wrong}. Fix: correct or remove it"
                )
            segmentations.append(as_rle(piece, record.height, record.width) if piece else [])
    return segmentations


def metrics_table(metrics: dict[str, float], iou_types: tuple[str, ...]) -> str:
    """COCO's numbers, and the AP of each category, as text; other metrics a line each."""
    if not all(f"{iou_types[0]}_{name}" in metrics for name in summary_metrics(iou_types[0])):
        return tabulate(list(metrics.items()), floatfmt=".4f")
    names = list(dict.fromkeys(name for iou_type in iou_types for name in summary_metrics(iou_type)))
    names += [name.removeprefix(f"{iou_types[0]}_") for name in metrics if name.startswith(f"{iou_types[0]}_AP/")]
    rows = [[name, *(metrics.get(f"{iou_type}_{name}") for iou_type in iou_types)] for name in names]
    return tabulate(rows, headers=["", *iou_types], floatfmt=".4f", missingval="-")


def for_json(value: Any) -> Any:
    """Dicts and lists with None instead of nan and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {name: for_json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
