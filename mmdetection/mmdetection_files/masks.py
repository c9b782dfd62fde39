"""Instance masks of MMDetection's models as COCO's run-length encoding, made on the device.

MMDetection copies the pixels of each mask to the host, and reads each label: 200 waits for a GPU and 107 MB per image
of 100 masks and 800 × 1333 pixels. The methods below return RLE dicts instead of arrays, of the same masks. `install`
puts them into MMDetection's classes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.core import InstanceData, bbox2result
from mmdet.models.dense_heads.yolact_head import YOLACTProtonet
from mmdet.models.detectors import MaskFormer
from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from torch.nn import functional as F

from shared.evaluation.detections import encode, masks_at_once


def install() -> None:
    """Replaces the methods; each keeps the library's as `__wrapped__`."""
    for owner, name, ours in (
        (FCNMaskHead, "get_seg_masks", _two_stage),
        (YOLACTProtonet, "get_seg_masks", _yolact),
        (SingleStageInstanceSegmentor, "format_results", _solo),
        (MaskFormer, "simple_test", _maskformer),
    ):
        library = getattr(owner, name)
        if not hasattr(library, "__wrapped__"):
            setattr(owner, name, functools.wraps(library)(ours))


def encode_two_stage(
    head: FCNMaskHead,
    mask_pred: torch.Tensor | Sequence,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    threshold: float,
    size: tuple[int, int],
    scale_factor: Any,
) -> list[list[dict]]:
    """Each class's RLE dicts of the masks that `head` pastes into their boxes in the image before its resize.

    Args:
        mask_pred: (N, classes or 1, h, w) scores; probabilities, not in a tensor, of augmented images.
        boxes: (N, 4) x1 y1 x2 y2 in pixels of the resized image.
        labels: (N,) int64.
        size: height and width of the image.
    """
    probabilities = mask_pred.sigmoid() if isinstance(mask_pred, torch.Tensor) else boxes.new_tensor(mask_pred)
    if not head.class_agnostic:
        probabilities = probabilities[torch.arange(len(labels), device=labels.device), labels][:, None]
    boxes = boxes / torch.as_tensor(scale_factor).to(boxes)
    at_once, encoded = masks_at_once(*size), []
    for masks, places in zip(probabilities.split(at_once), boxes.split(at_once), strict=True):
        encoded += encode(_pasted(masks, places, size) >= threshold)
    return _by_class(encoded, labels.tolist(), head.num_classes)


def _pasted(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(N, height, width) of (N, 1, h, w) in their (N, 4) boxes, as FCNMaskHead does it on a GPU."""
    height, width = size
    x1, y1, x2, y2 = boxes.split(1, dim=1)
    x, y = _places(width, x1, x2)[:, None, :], _places(height, y1, y2)[:, :, None]
    grid = torch.stack([x.expand(-1, height, width), y.expand(-1, height, width)], dim=3)
    return F.grid_sample(masks.float(), grid, align_corners=False)[:, 0]


def _places(count: int, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """(N, count) of an image's pixels along one axis, in boxes from `start` to `end`, which are -1 and 1 there."""
    pixels = torch.arange(count, device=start.device).float() + 0.5
    places = (pixels - start) / (end - start) * 2 - 1
    return torch.where(places.isinf(), 0, places)


def _by_class(masks: Sequence[dict], labels: Sequence[int], classes: int) -> list[list[dict]]:
    result: list[list[dict]] = [[] for _ in range(classes)]
    for mask, label in zip(masks, labels, strict=True):
        result[label].append(mask)
    return result


def _two_stage(
    self: FCNMaskHead,
    mask_pred: Any,
    det_bboxes: torch.Tensor,
    det_labels: torch.Tensor,
    rcnn_test_cfg: Any,
    ori_shape: Any,
    scale_factor: Any,
    rescale: bool,
) -> list[list[Any]]:
    # on a CPU the library pastes each mask into the part of the image around its box: less work
    if not det_bboxes.is_cuda or not rescale or rcnn_test_cfg.mask_thr_binary < 0:
        library = FCNMaskHead.get_seg_masks.__wrapped__
        return library(self, mask_pred, det_bboxes, det_labels, rcnn_test_cfg, ori_shape, scale_factor, rescale)
    threshold, size = rcnn_test_cfg.mask_thr_binary, tuple(ori_shape[:2])
    return encode_two_stage(self, mask_pred, det_bboxes[:, :4], det_labels, threshold, size, scale_factor)


def _yolact(
    self: YOLACTProtonet, mask_pred: torch.Tensor, label_pred: torch.Tensor, img_meta: dict, rescale: bool
) -> list[list[Any]]:
    if not rescale or not len(mask_pred):
        return YOLACTProtonet.get_seg_masks.__wrapped__(self, mask_pred, label_pred, img_meta, rescale)
    size = tuple(img_meta["ori_shape"][:2])
    masks = F.interpolate(mask_pred[None], size, mode="bilinear", align_corners=False)[0] > 0.5
    return _by_class(encode(masks), label_pred.tolist(), self.num_classes)


def _solo(self: SingleStageInstanceSegmentor, results: InstanceData) -> tuple[list, list]:
    encoded, labels = encode(results.masks.bool()), results.labels.tolist()
    results.masks = results.masks[:, :0, :0]  # the library gives boxes and scores alone their form
    boxes, _ = SingleStageInstanceSegmentor.format_results.__wrapped__(self, results)
    return boxes, _by_class(encoded, labels, self.mask_head.num_classes)


def _maskformer(self: MaskFormer, imgs: torch.Tensor, img_metas: list[dict], **arguments: Any) -> list[Any]:
    predictions = self.panoptic_head.simple_test(self.extract_feat(imgs), img_metas, **arguments)
    results = self.panoptic_fusion_head.simple_test(*predictions, img_metas, **arguments)
    classes = self.num_things_classes
    for result in results:
        if "pan_results" in result:
            result["pan_results"] = result["pan_results"].cpu().numpy()
        if "ins_results" in result:
            labels, boxes, masks = result["ins_results"]
            by_class = _by_class(encode(masks), labels.tolist(), classes)
            result["ins_results"] = bbox2result(boxes, labels, classes), by_class
    return [result["ins_results"] for result in results] if self.num_stuff_classes == 0 else results
