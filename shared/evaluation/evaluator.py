"""Detections in, COCO's metrics out: the numbers of pycocotools, by hotcoco."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import hotcoco
import numpy as np

from shared.data.annotations import CocoAnnotations
from shared.data.segmentations import wrong_segmentation
from shared.errors import UserError
from shared.evaluation.detections import Detections
from shared.evaluation.reducer import ChiefReducer, Gather, alone

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
    iou_types: Sequence[str] | str = ("bbox",),
    image_ids: Iterable[int] | None = None,
    keypoint_sigmas: Sequence[float] | None = None,
) -> dict[str, float]:
    """COCO's twelve numbers and the AP of each category, by each of `iou_types` ("bbox", "segm", "keypoints"); of
    keypoints COCO has ten.

    Args:
        detections: one for each image; an image without any counts as one on which nothing is found.
        image_ids: the images to evaluate on; all of the file where None.
        keypoint_sigmas: how far each of the K keypoints may lie off, as a share of the object's size; those of COCO's
            17 of a person where None.

    Returns:
        {"bbox_mAP": …, "bbox_mAP_50": …, …, "bbox_AP/<category name>": …, "segm_mAP": …}, fractions in
        [0, 1], nan where there is nothing to score. Categories without ground truth are left out.

    Raises:
        UserError: detections of an image that the file has not, or that come twice, of a label that it has not, or
            whose boxes or scores are not finite; `image_ids` that it has not.
    """
    if not isinstance(annotations, CocoAnnotations):
        annotations = CocoAnnotations.open(annotations)
    image_ids = None if image_ids is None else list(image_ids)
    detections = list(detections)
    known = set(annotations.image_ids.tolist())
    named = f"{annotations.path or 'the annotations'}"
    for image_id in image_ids or ():
        if image_id not in known:
            raise UserError(f"image_ids: no image of {named} has the id {image_id!r}")
    seen: set[int] = set()
    for found in detections:
        if found.image_id not in known:
            raise UserError(f"detections of image {found.image_id!r}: no image of {named} has this id")
        if found.image_id in seen:
            raise UserError(f"detections of image {found.image_id}: they come twice; put them into one `Detections`")
        seen.add(found.image_id)
        for name, values in (("box", found.boxes), ("score", found.scores)):
            if not np.isfinite(values).all():
                wrong = values[~np.isfinite(values).reshape(len(values), -1).all(axis=1)][0]
                raise UserError(f"detections of image {found.image_id}: the {name} {wrong.tolist()} is not finite")
    evaluator = CocoEvaluator(annotations, iou_types, image_ids, keypoint_sigmas=keypoint_sigmas)
    evaluator.update(detections)
    return evaluator.compute()


def iou_types_of(detections: Sequence[Detections], annotations: CocoAnnotations) -> tuple[str, ...]:
    """What can be scored: "bbox", "segm" where all detections have masks, "keypoints" where they and the data have
    some."""
    masks = bool(detections) and all(found.masks is not None for found in detections)
    points = bool(detections) and all(found.keypoints is not None for found in detections)
    return ("bbox",) + ("segm",) * masks + ("keypoints",) * (points and "keypoints" in annotations.columns)


class CocoEvaluator(ChiefReducer):
    """Collects `Detections`, on as many slots as there are, and computes the metrics once, on all of them.

    An image that several slots have seen counts once.

    Args:
        image_ids, keypoint_sigmas: as of `evaluate`.
        gather: the way to the chief, see `ChiefReducer`.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        iou_types: Sequence[str] | str = ("bbox",),
        image_ids: Iterable[int] | None = None,
        keypoint_sigmas: Sequence[float] | None = None,
        gather: Gather = alone,
    ):
        super().__init__(gather)
        iou_types = (iou_types,) if isinstance(iou_types, str) else iou_types
        for iou_type in iou_types:
            if iou_type not in IOU_TYPES:
                raise ValueError(f"iou_types: {iou_type!r} is not one of {', '.join(map(repr, IOU_TYPES))}")
        if "keypoints" in iou_types:
            _check_keypoints(annotations, keypoint_sigmas)
        self.keypoint_sigmas = keypoint_sigmas
        self.annotations = annotations
        self.iou_types = tuple(iou_types)
        self._all_ids = np.sort(annotations.image_ids)
        wanted = self._all_ids if image_ids is None else np.array([*image_ids], dtype=np.int64)
        self.image_ids = np.intersect1d(wanted, self._all_ids)
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

    def share(self) -> _Share:
        """This slot's detections and skipped images, of those that are evaluated."""
        evaluated = set(self.image_ids.tolist())
        image_ids = sorted(self._detections.keys() & evaluated)
        share = _Share.of(
            self._positions(image_ids),
            self._positions(sorted(self._skipped & evaluated)),
            [self._detections[image_id] for image_id in image_ids],
            masks="segm" in self.iou_types,
            keypoints="keypoints" in self.iou_types,
        )
        categories = len(self.annotations.categories)
        if len(wrong := np.flatnonzero((share.labels < 0) | (share.labels >= categories))):
            image_id = np.repeat(image_ids, share.counts)[wrong[0]]
            raise UserError(
                f"detections of image {image_id}: the label {share.labels[wrong[0]]}, and the data has {categories} "
                f"categories, 0 to {categories - 1}"
            )
        return share

    def metrics_of(self, shares: list[_Share]) -> dict[str, float]:
        found = _merge(shares)
        images = np.setdiff1d(self._positions(self.image_ids), found.skipped).tolist()
        metrics: dict[str, float] = {}
        for iou_type in self.iou_types:
            metrics.update(self._evaluate(iou_type, images, found))
        if len(found.skipped):
            metrics["skipped_images"] = len(found.skipped)
        return metrics

    def _positions(self, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Images as hotcoco has them: the position among all of the file's ids, sorted. An id itself may be greater
        than hotcoco's float64 rows can hold."""
        return np.searchsorted(self._all_ids, np.asarray(image_ids, dtype=np.int64))

    def _evaluate(self, iou_type: str, images: list[int], found: _Share) -> dict[str, float]:
        truth = self.open_truth()
        rows = found.rows()
        if iou_type == "keypoints" and len(rows):
            results = truth.load_res(_keypoint_results(rows, found.keypoints))
        elif iou_type == "segm" and len(rows):
            masks = found.masks()
            results = truth.load_res(rows, segmentation=masks)
            # small, medium and large are the masks' areas, as MMDetection and Detectron2 have it, not the boxes'
            results.update_anns(ids=np.arange(1, len(rows) + 1), area=hotcoco.mask.area(masks))
        else:
            results = truth.load_res(rows)
        evaluation = hotcoco.COCOeval(truth, results, iou_type)
        params = evaluation.params
        params.img_ids = images
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
        """The ground truth as `to_hotcoco` gives it, made at the first call. Called before a training, it refuses
        there what the first validation could not score.

        Raises:
            UserError: see `to_hotcoco`.
        """
        if self._truth is None:
            with_keypoints = "keypoints" in self.iou_types
            self._truth = to_hotcoco(self.annotations, masks="segm" in self.iou_types, keypoints=with_keypoints)
        return self._truth


@dataclass
class _Share:
    """The detections of some images, in arrays: M of them, in the order of images.

    Attributes:
        images: (images,) int64 positions, see `CocoEvaluator`.
        counts: (images,) int64, each image's detections.
        skipped: (skipped,) int64 positions of images that cannot be read.
        boxes: (M, 4) float32, x1 y1 x2 y2.
        scores: (M,) float32.
        labels: (M,) int32.
        keypoints: (M, 3K) float32 where they are evaluated.
        mask_sizes: (M, 2) int32, height and width; this and the next two where masks are evaluated.
        mask_bytes: (bytes,) uint8, the masks' compressed RLE, one after the other.
        mask_lengths: (M,) int32, bytes of each.
    """

    images: np.ndarray
    counts: np.ndarray
    skipped: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    keypoints: np.ndarray | None = None
    mask_sizes: np.ndarray | None = None
    mask_bytes: np.ndarray | None = None
    mask_lengths: np.ndarray | None = None

    @classmethod
    def of(
        cls, images: np.ndarray, skipped: np.ndarray, detections: list[Detections], masks: bool, keypoints: bool
    ) -> _Share:
        """Of detections in the order of `images`."""
        share = cls(
            images=images,
            counts=np.array([len(detection) for detection in detections], dtype=np.int64),
            skipped=skipped,
            boxes=np.concatenate([np.empty((0, 4), np.float32), *(d.boxes for d in detections)]),
            scores=np.concatenate([np.empty(0, np.float32), *(d.scores for d in detections)]),
            labels=np.concatenate([np.empty(0, np.int64), *(d.labels for d in detections)]).astype(np.int32),
        )
        if keypoints:
            share.keypoints = np.concatenate(
                [d.keypoints.reshape(len(d), -1) for d in detections if len(d)] or [np.empty((0, 0), np.float32)]
            )
        if masks:
            rles = [mask for detection in detections for mask in detection.masks]
            pieces = [c.encode() if isinstance(c := rle["counts"], str) else c for rle in rles]
            share.mask_sizes = np.array([rle["size"] for rle in rles], dtype=np.int32).reshape(-1, 2)
            share.mask_bytes = np.frombuffer(b"".join(pieces), np.uint8)
            share.mask_lengths = np.array([len(piece) for piece in pieces], dtype=np.int32)
        return share

    def rows(self) -> np.ndarray:
        """(M, 7) float64 of COCO's array format: image, x, y, width, height, score, category."""
        rows = np.empty((len(self.boxes), 7), dtype=np.float64)
        rows[:, 0] = np.repeat(self.images, self.counts)
        rows[:, 1:5] = self.boxes
        rows[:, 3:5] -= rows[:, 1:3]
        rows[:, 5] = self.scores
        rows[:, 6] = self.labels
        return rows

    def masks(self) -> list[dict]:
        """M of COCO's RLE dicts."""
        data, offsets = self.mask_bytes.tobytes(), _offsets(self.mask_lengths).tolist()
        sizes, size_of = np.unique(self.mask_sizes, axis=0, return_inverse=True)
        sizes = sizes.tolist()  # a few, that all masks share
        return [
            {"size": sizes[size], "counts": data[start:end]}
            for size, start, end in zip(size_of.ravel().tolist(), offsets[:-1], offsets[1:], strict=True)
        ]


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
    """The annotations as hotcoco's data set, in the file's own float64.

    Its images have the positions of their ids among all of the file's, sorted, its categories the labels, and its
    annotations their rows in `annotations.columns` from 1 on: ids of a file may be negative, or greater than the
    float64 of hotcoco's results can hold.

    Raises:
        UserError: a segmentation that is no polygon or RLE, an RLE of another size than its image.
    """
    columns = annotations.columns
    positions = np.empty(len(annotations), dtype=np.int64)
    positions[np.argsort(annotations.image_ids)] = np.arange(len(annotations))
    segmentation = _segmentations(annotations) if masks else None
    images = [
        {"id": position, "height": height, "width": width, "file_name": ""}
        for position, height, width in zip(
            positions.tolist(), columns["heights"].tolist(), columns["widths"].tolist(), strict=True
        )
    ]
    categories = [{**category, "id": label} for label, category in enumerate(annotations.categories)]
    image_of = np.repeat(positions, np.diff(columns["offsets"]))
    try:
        if keypoints:  # which hotcoco takes a dict an annotation only
            rows = _annotation_dicts(columns, image_of, segmentation)
            return hotcoco.COCO({"images": images, "categories": categories, "annotations": rows})
        return hotcoco.COCO.from_arrays(
            images=images,
            categories=categories,
            image_ids=image_of,
            category_ids=columns["labels"],
            boxes=columns["boxes"],
            area=columns["areas"],
            iscrowd=columns["iscrowd"],
            segmentation=segmentation,
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{annotations.path or 'the annotations'} cannot be evaluated on: {error}") from error


def _segmentations(annotations: CocoAnnotations) -> list[list | dict]:
    """The segmentation of each annotation, [] where there is none, each one that hotcoco can score: polygons of less
    than three points, which enclose nothing, are left out."""
    segmentations = []
    for record in annotations:
        for piece in record.segmentations:
            if isinstance(piece, list):
                piece = [polygon for polygon in piece if not (isinstance(polygon, list) and len(polygon) < 6)]
            if wrong := wrong_segmentation(piece, record.height, record.width) if piece else None:
                annotation_id = annotations.columns["annotation_ids"][len(segmentations)]
                raise UserError(
                    f"{annotations.path or 'the annotations'}: the segmentation of annotation {annotation_id}, on "
                    f"image {record.image_id}, {wrong}; correct it, or leave it out"
                )
            segmentations.append(piece or [])
    return segmentations


def _annotation_dicts(columns: dict[str, np.ndarray], image_of: np.ndarray, segmentation: list | None) -> list[dict]:
    rows = []
    for i, image in enumerate(image_of.tolist()):
        points = columns["keypoints"][i]
        row = {
            "id": i + 1,
            "image_id": image,
            "category_id": int(columns["labels"][i]),
            "bbox": columns["boxes"][i].tolist(),
            "area": float(columns["areas"][i]),
            "iscrowd": int(columns["iscrowd"][i]),
            "keypoints": points.ravel().tolist(),
            "num_keypoints": int((points[:, 2] > 0).sum()),
        }
        rows.append(row if segmentation is None else {**row, "segmentation": segmentation[i]})
    return rows


def _merge(shares: list[_Share]) -> _Share:
    """All slots' detections, each image once and in the order of positions: the same for any number of slots."""
    images = np.concatenate([share.images for share in shares])
    counts = np.concatenate([share.counts for share in shares])
    kept_images, kept = np.unique(images, return_index=True)  # the first slot's, where several have an image
    kept_counts, starts = counts[kept], _offsets(counts)[kept]
    rows = np.repeat(starts - _offsets(kept_counts)[:-1], kept_counts) + np.arange(kept_counts.sum())

    def rows_of(name: str) -> np.ndarray | None:
        # those without detections do not know how many keypoints there are
        parts = [part for share in shares if (part := getattr(share, name)) is not None and len(part)]
        return np.concatenate(parts)[rows] if parts else getattr(shares[0], name)

    merged = _Share(
        images=kept_images,
        counts=kept_counts,
        skipped=np.unique(np.concatenate([share.skipped for share in shares])),
        boxes=rows_of("boxes"),
        scores=rows_of("scores"),
        labels=rows_of("labels"),
        keypoints=rows_of("keypoints"),
        mask_sizes=rows_of("mask_sizes"),
        mask_lengths=rows_of("mask_lengths"),
    )
    if merged.mask_sizes is not None:
        ends = _offsets(np.concatenate([share.mask_lengths for share in shares]))
        data = np.concatenate([share.mask_bytes for share in shares])
        pieces = zip(ends[starts].tolist(), ends[starts + kept_counts].tolist(), strict=True)
        merged.mask_bytes = np.concatenate([data[:0], *(data[start:end] for start, end in pieces)])
    return merged


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _mean(values: np.ndarray) -> float:
    # pycocotools marks what cannot be scored with -1
    values = values[values > -1]
    return float(values.mean()) if values.size else math.nan
