"""Detections in, COCO's metrics out: the numbers of pycocotools, by hotcoco."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

import hotcoco
import numpy as np
from determined.pytorch import MetricReducer

from shared.data.annotations import CocoAnnotations
from shared.errors import UserError
from shared.evaluation.detections import Detections

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
# of keypoints the ten lines: there are no small ones, and at most 20 detections an image
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
    iou_types: Sequence[str] = ("bbox",),
    image_ids: Iterable[int] | None = None,
    keypoint_sigmas: Sequence[float] | None = None,
) -> dict[str, float]:
    """COCO's twelve numbers and the AP of each category, by each of `iou_types` ("bbox", "segm", "keypoints"); of
    keypoints COCO has ten.

    Args:
        image_ids: the images to evaluate on; all of the file where None.
        keypoint_sigmas: how far each of the K keypoints may lie off, as a share of the object's size; those of COCO's
            17 of a person where None.

    Returns:
        {"bbox_mAP": …, "bbox_mAP_50": …, …, "bbox_AP/<category name>": …, "segm_mAP": …}, fractions in
        [0, 1], nan where there is nothing to score. Categories without ground truth are left out.
    """
    if not isinstance(annotations, CocoAnnotations):
        annotations = CocoAnnotations.open(annotations)
    evaluator = CocoEvaluator(annotations, iou_types, image_ids, keypoint_sigmas=keypoint_sigmas)
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
        keypoint_sigmas: Sequence[float] | None = None,
    ):
        for iou_type in iou_types:
            if iou_type not in IOU_TYPES:
                raise ValueError(f"iou_types: {iou_type!r} is not one of {', '.join(map(repr, IOU_TYPES))}")
        if "keypoints" in iou_types:
            _check_keypoints(annotations, keypoint_sigmas)
        self.keypoint_sigmas = keypoint_sigmas
        self.annotations = annotations
        self.iou_types = tuple(iou_types)
        self.image_ids = np.unique(annotations.image_ids if image_ids is None else list(image_ids))
        self.compute_here = compute_here
        self._truth: hotcoco.COCO | None = None
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

    def compute(self) -> dict[str, float]:
        """The metrics of what this process has collected."""
        return self.cross_slot_reduce([self.per_slot_reduce()])

    def per_slot_reduce(self) -> tuple[np.ndarray, np.ndarray, list[dict] | None, np.ndarray | None, set[int]]:
        """What this slot has seen: (images,) ids, (M, 7) rows of COCO's array format (image id, x, y, width,
        height, score, category id) in float64, M RLE masks and (M, 3K) keypoints where they are evaluated, and the
        ids left out."""
        image_ids = sorted(self._detections.keys() & set(self.image_ids.tolist()))
        collected = [self._detections[image_id] for image_id in image_ids]
        counts = [len(detection) for detection in collected]
        rows = np.empty((sum(counts), 7), dtype=np.float64)
        masks, keypoints = None, None
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
            if "keypoints" in self.iou_types:
                keypoints = np.concatenate(
                    [d.keypoints.reshape(len(d), -1) for d in collected if len(d)] or [rows[:, :0]]
                )
        return np.array(image_ids, dtype=np.int64), rows, masks, keypoints, self._skipped

    def cross_slot_reduce(self, per_slot_metrics: Sequence[tuple]) -> dict[str, float]:
        if not self.compute_here:
            return {}
        rows, masks, keypoints = _merge(per_slot_metrics)
        skipped = set().union(*(slot[-1] for slot in per_slot_metrics))
        image_ids = [image_id for image_id in self.image_ids.tolist() if image_id not in skipped]
        metrics: dict[str, float] = {}
        for iou_type in self.iou_types:
            metrics.update(self._evaluate(iou_type, image_ids, rows, masks, keypoints))
        if skipped:
            metrics["skipped_images"] = len(skipped)
        return metrics

    def _evaluate(
        self,
        iou_type: str,
        image_ids: list[int],
        rows: np.ndarray,
        masks: list[dict] | None,
        keypoints: np.ndarray | None,
    ) -> dict[str, float]:
        truth = self.open_truth()
        found = truth.load_res(rows)
        if iou_type == "keypoints" and len(rows):
            found = truth.load_res(_keypoint_results(rows, keypoints))
        if iou_type == "segm" and masks:
            found = truth.load_res(rows, segmentation=masks)
            # small, medium and large are the masks' areas, as MMDetection and Detectron2 have it, not the boxes'
            found.update_anns(ids=np.arange(1, len(rows) + 1), area=hotcoco.mask.area(masks))
        evaluation = hotcoco.COCOeval(truth, found, iou_type)
        params = evaluation.params
        params.img_ids = image_ids
        if iou_type == "keypoints" and self.keypoint_sigmas:
            params.kpt_oks_sigmas = list(self.keypoint_sigmas)
        evaluation.params = params
        evaluation.evaluate()
        evaluation.accumulate()
        precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]

        metrics = {}
        for name, is_recall, iou, area, max_dets in _summary_of(iou_type):
            values = (recall if is_recall else precision)[..., area, max_dets]
            metrics[f"{iou_type}_{name}"] = _mean(values if iou is None else values[iou])
        for label, name in enumerate(self.annotations.category_names):
            average_precision = _mean(precision[:, :, label, 0, -1])
            if not math.isnan(average_precision):
                metrics[f"{iou_type}_AP/{name}"] = average_precision
        return metrics

    def open_truth(self) -> hotcoco.COCO:
        """The ground truth as hotcoco has it, made at the first evaluation."""
        if self._truth is None:
            with_keypoints = "keypoints" in self.iou_types
            self._truth = to_hotcoco(self.annotations, masks="segm" in self.iou_types, keypoints=with_keypoints)
        return self._truth


def _check_keypoints(annotations: CocoAnnotations, sigmas: Sequence[float] | None) -> None:
    if "keypoints" not in annotations.columns:
        raise UserError(f"{annotations.path} has no keypoints to evaluate on")
    count = annotations.columns["keypoints"].shape[1]
    if count != (len(sigmas) if sigmas else _COCO_KEYPOINTS):
        raise UserError(
            f"{annotations.path} has {count} keypoints an object, and there are "
            f"{len(sigmas) if sigmas else _COCO_KEYPOINTS} sigmas to evaluate them with; give one for each"
        )


def _keypoint_results(rows: np.ndarray, keypoints: np.ndarray) -> list[dict]:
    return [
        {
            "image_id": int(row[0]),
            "category_id": int(row[6]),
            "bbox": row[1:5].tolist(),
            "score": row[5],
            "keypoints": points,
        }
        for row, points in zip(rows, keypoints.astype(np.float64).tolist(), strict=True)
    ]


def to_hotcoco(annotations: CocoAnnotations, masks: bool = True, keypoints: bool = False) -> hotcoco.COCO:
    """The annotations as hotcoco's data set, in the file's own float64."""
    columns = annotations.columns
    counts = np.diff(columns["offsets"])
    segmentation = None
    if masks:
        segmentation = [piece or [] for record in annotations for piece in record.segmentations]
    images = [
        {"id": image_id, "height": height, "width": width, "file_name": ""}
        for image_id, height, width in zip(
            columns["image_ids"].tolist(), columns["heights"].tolist(), columns["widths"].tolist(), strict=True
        )
    ]
    if keypoints:  # which hotcoco takes a dict an annotation only
        return hotcoco.COCO(
            {
                "images": images,
                "categories": annotations.categories,
                "annotations": _annotation_dicts(annotations, segmentation),
            }
        )
    return hotcoco.COCO.from_arrays(
        images=images,
        categories=annotations.categories,
        image_ids=np.repeat(columns["image_ids"], counts),
        category_ids=np.asarray(annotations.category_ids)[columns["labels"]],
        boxes=columns["boxes"],
        ids=columns["annotation_ids"],
        area=columns["areas"],
        iscrowd=columns["iscrowd"],
        segmentation=segmentation,
    )


def _annotation_dicts(annotations: CocoAnnotations, segmentation: list | None) -> list[dict]:
    columns = annotations.columns
    rows = []
    for i, image_id in enumerate(np.repeat(columns["image_ids"], np.diff(columns["offsets"])).tolist()):
        points = columns["keypoints"][i]
        row = {
            "id": int(columns["annotation_ids"][i]),
            "image_id": image_id,
            "category_id": annotations.category_ids[columns["labels"][i]],
            "bbox": columns["boxes"][i].tolist(),
            "area": float(columns["areas"][i]),
            "iscrowd": int(columns["iscrowd"][i]),
            "keypoints": points.ravel().tolist(),
            "num_keypoints": int((points[:, 2] > 0).sum()),
        }
        rows.append(row if segmentation is None else {**row, "segmentation": segmentation[i]})
    return rows


def _merge(per_slot: Sequence[tuple]) -> tuple[np.ndarray, list[dict] | None, np.ndarray | None]:
    """All slots' rows, each image once and in the order of image ids: the same for any number of slots."""
    seen: set[int] = set()
    rows, masks, keypoints = [], [], []
    for image_ids, slot_rows, slot_masks, slot_keypoints, _ in per_slot:
        keep = ~np.isin(slot_rows[:, 0], list(seen & set(image_ids.tolist())))
        seen.update(image_ids.tolist())
        rows.append(slot_rows[keep])
        if slot_masks is not None:
            masks += [mask for mask, kept in zip(slot_masks, keep.tolist(), strict=True) if kept]
        if slot_keypoints is not None and keep.any():
            keypoints.append(slot_keypoints[keep])
    merged = np.concatenate(rows)
    order = np.argsort(merged[:, 0], kind="stable")
    return (
        merged[order],
        [masks[i] for i in order.tolist()] if masks else None,
        np.concatenate(keypoints)[order] if keypoints else None,
    )


def _mean(values: np.ndarray) -> float:
    # pycocotools marks what cannot be scored with -1
    values = values[values > -1]
    return float(values.mean()) if values.size else math.nan
