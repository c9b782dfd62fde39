"""From Detectron2's outputs to `Detections`, and the library's own evaluators for what has one."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    RotatedCOCOEvaluator,
    SemSegEvaluator,
)
from detectron2.modeling import GeneralizedRCNN, detector_postprocess
from detectron2.structures import Instances, RotatedBoxes
from pycocotools import mask as coco_mask
from torch import nn

from shared.errors import UserError
from shared.evaluation.detections import Detections, encode, encode_masks, masks_at_once
from shared.evaluation.gathered import ChiefReducer, Gather

logger = logging.getLogger(__name__)

# --- detections -------------------------------------------------------------------------------------


def detect(model: nn.Module, inputs: list[dict[str, Any]]) -> Iterator[Detections]:
    """The detections of each image, at its own size. Masks are pasted and encoded a few at a time, so that those of a
    large image never lie in memory together."""
    if isinstance(model, GeneralizedRCNN):
        outputs = [{"unpasted": instances} for instances in model.inference(inputs, do_postprocess=False)]
    else:
        outputs = model(inputs)
    for given, output in zip(inputs, outputs, strict=True):
        height, width = given["height"], given["width"]
        if "unpasted" in output:
            yield _pasted(output["unpasted"], given["image_id"], height, width)
        elif "instances" in output:
            yield to_detections(output["instances"], given["image_id"])
        elif "sem_seg" in output:
            yield _segments(output["sem_seg"], given["image_id"])
        else:
            raise UserError(
                "this config's model only proposes regions, and detects nothing that could be drawn. Fix: use a "
                "config of a detector"
            )


def warn_of_masks(detected: Iterable[Detections]) -> bool:
    """Warns of masks that no evaluation asks for. Returns whether there are any."""
    has_masks = any(found.masks is not None for found in detected)
    if has_masks:
        logger.warning(
            "the model detects masks, and no `mask_head` of its config says so: the boxes alone are evaluated"
        )
    return has_masks


def to_detections(instances: Instances, image_id: int) -> Detections:
    """Detectron2's instances of one image, at the image's own size."""
    masks, keypoints = None, None
    fields = dict(instances.get_fields())
    if (pixels := fields.pop("pred_masks", None)) is not None:  # which stay where they are: they are large
        masks = encode(pixels.bool())
    instances = Instances(instances.image_size, **fields).to("cpu")
    if instances.has("pred_keypoints"):
        keypoints = np.array(instances.pred_keypoints)
        keypoints[..., :2] -= 0.5  # COCO's whole numbers are the pixels' centers
    boxes = instances.pred_boxes
    if isinstance(boxes, RotatedBoxes):
        corners = _corners(boxes.tensor)
        boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
        masks = [coco_mask.frPyObjects([c.ravel().tolist()], *instances.image_size)[0] for c in corners.numpy()]
    else:
        boxes = boxes.tensor
    return Detections(
        image_id=image_id,
        boxes=boxes.numpy(),
        scores=instances.scores.numpy(),
        labels=instances.pred_classes.numpy(),
        masks=masks,
        keypoints=keypoints,
    )


def _pasted(instances: Instances, image_id: int, height: int, width: int) -> Detections:
    at_once = masks_at_once(height, width) if instances.has("pred_masks") else max(len(instances), 1)
    parts = [
        to_detections(detector_postprocess(instances[start : start + at_once], height, width), image_id)
        for start in range(0, max(len(instances), 1), at_once)
    ]
    if len(parts) == 1:
        return parts[0]
    return Detections(
        image_id=image_id,
        boxes=np.concatenate([part.boxes for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        masks=[mask for part in parts for mask in part.masks],
        keypoints=None if parts[0].keypoints is None else np.concatenate([part.keypoints for part in parts]),
    )


def _segments(scores: torch.Tensor, image_id: int) -> Detections:
    """A semantic segmentation, (classes, height, width), as a mask for each class that is there."""
    classes = scores.argmax(dim=0).cpu().numpy()
    labels = np.unique(classes)
    masks = encode_masks([classes == label for label in labels])
    boxes = coco_mask.toBbox(masks).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(image_id=image_id, boxes=boxes, scores=np.ones(len(labels)), labels=labels, masks=masks)


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    """(N, 4, 2) corners of (N, 5) rotated boxes."""
    angles = torch.deg2rad(boxes[:, 4])
    along = torch.stack([angles.cos(), -angles.sin()], dim=1) * boxes[:, 2:3] / 2
    across = torch.stack([angles.sin(), angles.cos()], dim=1) * boxes[:, 3:4] / 2
    return boxes[:, None, :2] + torch.stack([-along - across, along - across, along + across, -along + across], dim=1)


# --- the library's own evaluators -------------------------------------------------------------------


@dataclass
class OwnResult:
    """What one of Detectron2's evaluators takes: a model's input, without its image, and its output."""

    given: dict[str, Any]
    output: dict[str, Any]


class OwnEvaluator(ChiefReducer):
    """One of Detectron2's evaluators, which gathers over slots by itself: every slot computes with it.

    Args:
        has_share: whether this slot's images are its own; else it was given one that another slot has too.
        gather: the way to the chief, see `ChiefReducer`.

    Raises:
        UserError: it does not work here: Cityscapes' on several machines.
    """

    def __init__(self, evaluator: DatasetEvaluator, has_share: bool, gather: Gather):
        super().__init__(gather)
        self.evaluator = evaluator
        self.has_share = has_share
        try:
            self.reset()
        except AssertionError as error:
            raise UserError(
                f"the config's data set cannot be evaluated here: {error}. Fix: give data.val, which is evaluated by "
                "COCO's rules"
            ) from error

    def reset(self) -> None:
        self.evaluator.reset()

    def update(self, results: Iterable[OwnResult]) -> None:
        if self.has_share:
            for result in results:
                self.evaluator.process([result.given], [result.output])

    def share(self) -> dict[str, float]:
        return flat_metrics(self.evaluator.evaluate() or {})

    def metrics_of(self, shares: list[dict[str, float]]) -> dict[str, float]:
        return shares[0]


def flat_metrics(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{"bbox": {"AP": 41.0, "AP-cat": 50.0}} as {"bbox_AP": 0.41, "bbox_AP/cat": 0.5}: all of Detectron2's evaluators
    give percent, and every metric here is a fraction."""
    return {
        f"{task}_{name.replace('AP-', 'AP/')}": float(value) / 100
        for task, metrics in results.items()
        for name, value in metrics.items()
    }


def own_evaluator(
    name: str, iou_types: tuple[str, ...], rotated: bool, max_detections: int | None = None
) -> DatasetEvaluator:
    """What Detectron2 evaluates a registered data set with, by its metadata.

    Args:
        max_detections: per image, for COCO's and LVIS' rules; the others score all.

    Raises:
        UserError: the package that it needs is missing, or it scores another number of detections.
    """
    if rotated and max_detections is not None:
        raise UserError(
            "hyperparameters.max_detections: Detectron2's evaluator of rotated boxes scores 100. Fix: omit it"
        )
    output = tempfile.mkdtemp(prefix="detectron2-")  # for data that is not a COCO file, and is made one
    of_coco = {"output_dir": output, "max_dets_per_image": max_detections}
    kind = MetadataCatalog.get(name).get("evaluator_type")
    try:
        if rotated:
            return RotatedCOCOEvaluator(name, output_dir=output)
        evaluators = {
            "cityscapes_instance": lambda: CityscapesInstanceEvaluator(name),
            "cityscapes_sem_seg": lambda: CityscapesSemSegEvaluator(name),
            "pascal_voc": lambda: PascalVOCDetectionEvaluator(name),
            "lvis": lambda: LVISEvaluator(name, distributed=True, **of_coco),
            "sem_seg": lambda: SemSegEvaluator(name, distributed=True),
            "coco_panoptic_seg": lambda: DatasetEvaluators(
                [
                    SemSegEvaluator(name, distributed=True),
                    COCOEvaluator(name, iou_types, **of_coco),
                    COCOPanopticEvaluator(name),
                ]
            ),
        }
        return evaluators.get(kind, lambda: COCOEvaluator(name, iou_types, **of_coco))()
    except ImportError as error:
        raise UserError(
            f"the data set {name} is evaluated with a package that is not installed: {error}. Fix: install the package"
        ) from error
