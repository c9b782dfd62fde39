"""From a detector's results to `Detections`, and mmdet's own `evaluate` for the data sets that have one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
from mmcv import Config
from mmdet.core import INSTANCE_OFFSET
from mmdet.core.evaluation import recall
from mmdet.datasets import CustomDataset

from shared.errors import UserError
from shared.evaluation.detections import Detections, encode_masks
from shared.evaluation.gathered import ChiefReducer, Gather


class _RaggedNumpy:
    """NumPy, with arrays of arrays of any shapes: mmdet makes one of each image's overlaps, which NumPy refuses since
    1.24."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def array(values: Any, **arguments: Any) -> np.ndarray:
        if arguments or not all(isinstance(value, np.ndarray) for value in values):
            return np.array(values, **arguments)
        array = np.empty(len(values), dtype=object)
        for i, value in enumerate(values):
            array[i] = value
        return array


recall.np = _RaggedNumpy()


def to_detections(result: Any, image_id: int) -> Detections:
    """mmdet's result of one image: an (n, 5) array of x1 y1 x2 y2 score for each class, with masks a tuple of that and
    the masks of each class. Panoptic models have both under "ins_results", or segments alone under "pan_results"; one
    that only proposes has one array."""
    if isinstance(result, np.ndarray):
        result = [result]
    if isinstance(result, dict):
        if "ins_results" not in result:
            return _of_segments(result["pan_results"], image_id)
        result = result["ins_results"]
    boxes, masks = result if isinstance(result, tuple) else (result, None)
    if isinstance(masks, tuple):  # Mask Scoring R-CNN: masks, and scores of their own
        masks = masks[0]
    rows = np.concatenate(boxes) if len(boxes) else np.zeros((0, 5), dtype=np.float32)
    return Detections(
        image_id=image_id,
        boxes=rows[:, :4],
        scores=rows[:, 4],
        labels=np.repeat(np.arange(len(boxes)), [len(of_class) for of_class in boxes]),
        masks=None if masks is None else _encoded([mask for of_class in masks for mask in of_class]),
    )


def _encoded(masks: list[Any]) -> list[dict]:
    """RLE dicts of an image's masks: arrays, or dicts already, see `mmdetection_files.masks`."""
    return masks if masks and isinstance(masks[0], dict) else encode_masks([np.asarray(mask) for mask in masks])


def _of_segments(segments: np.ndarray, image_id: int) -> Detections:
    """The things of a panoptic segmentation, (height, width) ids; it says no scores, so each has 1."""
    ids = [segment for segment in np.unique(segments) if segment >= INSTANCE_OFFSET]  # stuff is not counted
    masks = [segments == segment for segment in ids]
    boxes = np.zeros((len(ids), 4), dtype=np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return Detections(
        image_id=image_id,
        boxes=boxes,
        scores=np.ones(len(ids), dtype=np.float32),
        labels=np.asarray(ids, dtype=np.int64) % INSTANCE_OFFSET,
        masks=encode_masks(masks),
    )


@dataclass
class OwnResult:
    """What mmdet's own data set evaluates: the detector's result for the image at a position in it."""

    index: int
    result: Any


def to_own_result(result: Any, index: int) -> OwnResult:
    """The result with its masks encoded, as mmdet's test loop hands it to `evaluate`."""
    if isinstance(result, tuple):
        boxes, masks = result
        result = boxes, _encoded_by_class(masks)
    elif isinstance(result, dict) and "ins_results" in result:
        boxes, masks = result["ins_results"]
        result = {**result, "ins_results": (boxes, _encoded_by_class(masks))}
    return OwnResult(index, result)


def _encoded_by_class(masks: Any) -> Any:
    if isinstance(masks, tuple):  # Mask Scoring R-CNN: masks, and scores of their own
        return _encoded_by_class(masks[0]), masks[1]
    return [_encoded(of_class) for of_class in masks]


# EvalHook's own arguments, which tools/test.py takes out too; the rest is `evaluate`'s
_OF_THE_HOOK = (
    "interval",
    "by_epoch",
    "start",
    "save_best",
    "rule",
    "tmpdir",
    "gpu_collect",
    "dynamic_intervals",
    "broadcast_bn_buffer",
)


def own_arguments(config: Config) -> dict[str, Any]:
    """The arguments that the config's `evaluation` section gives to `evaluate`."""
    return {key: value for key, value in (config.get("evaluation") or {}).items() if key not in _OF_THE_HOOK}


def scored_detections(config: Config) -> int | None:
    """The detections per image and category that `evaluation.proposal_nums` scores; None if it is not given.

    Raises:
        UserError: it is no number and no list of them.
    """
    numbers = (config.get("evaluation") or {}).get("proposal_nums")
    if numbers is None:
        return None
    numbers = [numbers] if isinstance(numbers, int) else numbers
    if not numbers or not all(isinstance(number, int) and number > 0 for number in numbers):
        raise UserError(f"evaluation.proposal_nums: {numbers!r} are not numbers. Fix: give [100, 300, 1000]")
    return numbers[-1]


def check_evaluation(config: Config) -> None:
    """Raises UserError if the config's `evaluation` asks for what the shared evaluator does not do."""
    evaluation = config.get("evaluation") or {}
    if evaluation.get("iou_thrs") is not None:
        raise UserError(
            "evaluation.iou_thrs: COCO's ten thresholds are scored, and no others. Fix: omit it; bbox_mAP_50 and "
            "bbox_mAP_75 have one threshold each"
        )
    if (best := evaluation.get("save_best")) not in (None, "auto"):
        raise UserError(
            f"evaluation.save_best: searcher.metric chooses the best checkpoint. Fix: omit save_best, and "
            f"give searcher.metric: {best}"
        )


def keep_detections(config: Config, count: int) -> None:
    """Sets the number of detections per image that the model's head keeps.

    Raises:
        UserError: its test_cfg has no such number.
    """
    test = config.model.get("test_cfg") or config.get("test_cfg") or {}
    sections = [section for section in (test, test.get("rcnn") or {}) if "max_per_img" in section]
    if not sections:
        raise UserError(
            "hyperparameters.max_detections: test_cfg of the MMDetection config has no max_per_img. Fix: omit it, and "
            "give the model's own number by config_overrides"
        )
    for section in sections:
        section["max_per_img"] = count


def max_iou(config: Config) -> float:
    """The IoU above which the config's non-maximum suppression drops a detection; 0.5 if it has none."""
    test = config.model.get("test_cfg") or config.get("test_cfg") or {}
    suppression = (test.get("rcnn") or test).get("nms") or {}
    return suppression.get("iou_threshold", suppression.get("iou_thr", 0.5))


class OwnEvaluator(ChiefReducer):
    """Collects the results of all slots for `evaluate` of one of mmdet's data sets, each image once.

    Args:
        arguments: of `evaluate`, from the config's `evaluation` section.
        gather: the way to the chief, see `ChiefReducer`.
    """

    def __init__(self, dataset: CustomDataset, arguments: dict[str, Any], gather: Gather):
        super().__init__(gather)
        self.dataset = dataset
        self.arguments = arguments
        self._results: dict[int, Any] = {}

    def reset(self) -> None:
        self._results = {}

    def update(self, results: Iterable[OwnResult]) -> None:
        self._results.update({result.index: result.result for result in results})

    def share(self) -> dict[int, Any]:
        return self._results

    def metrics_of(self, shares: list[dict[int, Any]]) -> dict[str, float]:
        merged = {index: result for share in shares for index, result in share.items()}
        metrics = self.dataset.evaluate([merged[index] for index in range(len(self.dataset))], **self.arguments)
        return {name: float(value) for name, value in metrics.items() if isinstance(value, Number)}
