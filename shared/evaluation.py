"""Detections in, COCO's metrics out: the numbers of pycocotools, by hotcoco."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

import hotcoco
import numpy as np
from determined.pytorch import MetricReducer

from shared.annotations import CocoAnnotations
from shared.detections import Detections

# name, recall instead of precision, IoU index (all where None), area index, index in max_dets (1, 10, 100):
# the twelve lines of pycocotools' summary
_SUMMARY = (
    ("mAP", False, None, 0, 2),
    ("mAP_50", False, 0, 0, 2),
    ("mAP_75", False, 5, 0, 2),
    ("mAP_s", False, None, 1, 2),
    ("mAP_m", False, None, 2, 2),
    ("mAP_l", False, None, 3, 2),
    ("AR_1", True, None, 0, 0),
    ("AR_10", True, None, 0, 1),
    ("AR_100", True, None, 0, 2),
    ("AR_s", True, None, 1, 2),
    ("AR_m", True, None, 2, 2),
    ("AR_l", True, None, 3, 2),
)
SUMMARY_METRICS = tuple(name for name, *_ in _SUMMARY)


def evaluate(
    annotations: CocoAnnotations | str | os.PathLike,
    detections: Iterable[Detections],
    iou_types: Sequence[str] = ("bbox",),
    image_ids: Iterable[int] | None = None,
) -> dict[str, float]:
    """COCO's twelve numbers and the AP of each category, by each of `iou_types` ("bbox", "segm").

    Args:
        image_ids: the images to evaluate on; all of the file where None.

    Returns:
        {"bbox_mAP": …, "bbox_mAP_50": …, …, "bbox_AP/<category name>": …, "segm_mAP": …}, fractions in
        [0, 1], nan where there is nothing to score. Categories without ground truth are left out.
    """
    if not isinstance(annotations, CocoAnnotations):
        annotations = CocoAnnotations.open(annotations)
    evaluator = CocoEvaluator(annotations, iou_types, image_ids)
    evaluator.update(detections)
    return evaluator.compute()


class CocoEvaluator(MetricReducer):
    """Collects `Detections`, on as many slots as there are, and computes the metrics once, on all of them.

    An image that several slots have seen counts once. Only the slot with `compute_here` computes: the
    others return {} from `cross_slot_reduce`.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        iou_types: Sequence[str] = ("bbox",),
        image_ids: Iterable[int] | None = None,
        compute_here: bool = True,
    ):
        for iou_type in iou_types:
            if iou_type not in ("bbox", "segm"):
                raise ValueError(f"iou_types: {iou_type!r} is not one of 'bbox', 'segm'")
        self.annotations = annotations
        self.iou_types = tuple(iou_types)
        self.image_ids = np.unique(annotations.image_ids if image_ids is None else list(image_ids))
        self.compute_here = compute_here
        self._truth: hotcoco.COCO | None = None
        self._detections: dict[int, Detections] = {}

    def reset(self) -> None:
        self._detections = {}

    def update(self, detections: Iterable[Detections]) -> None:
        for detection in detections:
            if "segm" in self.iou_types and detection.masks is None:
                raise ValueError(f"image {detection.image_id}: 'segm' needs the detections' masks, and there are none")
            self._detections[detection.image_id] = detection

    def compute(self) -> dict[str, float]:
        """The metrics of what this process has collected."""
        return self.cross_slot_reduce([self.per_slot_reduce()])

    def per_slot_reduce(self) -> tuple[np.ndarray, np.ndarray, list[dict] | None]:
        """What this slot has seen: (images,) ids, (M, 7) rows of COCO's array format (image id, x, y, width,
        height, score, category id) in float64, and M RLE masks where there are any."""
        image_ids = sorted(self._detections.keys() & set(self.image_ids.tolist()))
        collected = [self._detections[image_id] for image_id in image_ids]
        counts = [len(detection) for detection in collected]
        rows = np.empty((sum(counts), 7), dtype=np.float64)
        masks = None
        if collected:
            boxes = np.concatenate([detection.boxes for detection in collected]).astype(np.float64)
            rows[:, 0] = np.repeat(image_ids, counts)
            rows[:, 1:3] = boxes[:, :2]
            rows[:, 3:5] = boxes[:, 2:] - boxes[:, :2]
            rows[:, 5] = np.concatenate([detection.scores for detection in collected])
            labels = np.concatenate([detection.labels for detection in collected])
            rows[:, 6] = np.asarray(self.annotations.category_ids)[labels]
            if "segm" in self.iou_types:
                masks = [mask for detection in collected for mask in detection.masks]
        return np.array(image_ids, dtype=np.int64), rows, masks

    def cross_slot_reduce(self, per_slot_metrics: Sequence[tuple]) -> dict[str, float]:
        if not self.compute_here:
            return {}
        rows, masks = _merge(per_slot_metrics)
        metrics: dict[str, float] = {}
        for iou_type in self.iou_types:
            metrics.update(self._evaluate(iou_type, rows, masks))
        return metrics

    def _evaluate(self, iou_type: str, rows: np.ndarray, masks: list[dict] | None) -> dict[str, float]:
        truth = self.open_truth()
        found = truth.load_res(rows)
        if iou_type == "segm" and masks:
            found = truth.load_res(rows, segmentation=masks)
            # small, medium and large are the masks' areas, as MMDetection and Detectron2 have it, not the boxes'
            found.update_anns(ids=np.arange(1, len(rows) + 1), area=hotcoco.mask.area(masks))
        evaluation = hotcoco.COCOeval(truth, found, iou_type)
        params = evaluation.params
        params.img_ids = self.image_ids.tolist()
        evaluation.params = params
        evaluation.evaluate()
        evaluation.accumulate()
        precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]

        metrics = {}
        for name, is_recall, iou, area, max_dets in _SUMMARY:
            values = (recall if is_recall else precision)[..., area, max_dets]
            metrics[f"{iou_type}_{name}"] = _mean(values if iou is None else values[iou])
        for label, name in enumerate(self.annotations.category_names):
            average_precision = _mean(precision[:, :, label, 0, 2])
            if not math.isnan(average_precision):
                metrics[f"{iou_type}_AP/{name}"] = average_precision
        return metrics

    def open_truth(self) -> hotcoco.COCO:
        """The ground truth as hotcoco has it, made at the first evaluation."""
        if self._truth is None:
            self._truth = to_hotcoco(self.annotations, masks="segm" in self.iou_types)
        return self._truth


def to_hotcoco(annotations: CocoAnnotations, masks: bool = True) -> hotcoco.COCO:
    """The annotations as hotcoco's data set, in the file's own float64."""
    columns = annotations.columns
    counts = np.diff(columns["offsets"])
    segmentation = None
    if masks:
        segmentation = [piece or [] for record in annotations for piece in record.segmentations]
    return hotcoco.COCO.from_arrays(
        images=[
            {"id": image_id, "height": height, "width": width, "file_name": ""}
            for image_id, height, width in zip(
                columns["image_ids"].tolist(), columns["heights"].tolist(), columns["widths"].tolist(), strict=True
            )
        ],
        categories=annotations.categories,
        image_ids=np.repeat(columns["image_ids"], counts),
        category_ids=np.asarray(annotations.category_ids)[columns["labels"]],
        boxes=columns["boxes"],
        ids=columns["annotation_ids"],
        area=columns["areas"],
        iscrowd=columns["iscrowd"],
        segmentation=segmentation,
    )


def _merge(per_slot: Sequence[tuple]) -> tuple[np.ndarray, list[dict] | None]:
    """All slots' rows, each image once and in the order of image ids: the same for any number of slots."""
    seen: set[int] = set()
    rows, masks = [], []
    for image_ids, slot_rows, slot_masks in per_slot:
        keep = ~np.isin(slot_rows[:, 0], list(seen & set(image_ids.tolist())))
        seen.update(image_ids.tolist())
        rows.append(slot_rows[keep])
        if slot_masks is not None:
            masks += [mask for mask, kept in zip(slot_masks, keep.tolist(), strict=True) if kept]
    merged = np.concatenate(rows)
    order = np.argsort(merged[:, 0], kind="stable")
    return merged[order], [masks[i] for i in order.tolist()] if masks else None


def _mean(values: np.ndarray) -> float:
    # pycocotools marks what cannot be scored with -1
    values = values[values > -1]
    return float(values.mean()) if values.size else math.nan
