"""MMDetection's detectors from images to detections, as `export` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.ops import CARAFEPack, DeformConv2d, ModulatedDeformConv2d, SAConv2d
from mmdet.models.dense_heads import GFLHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.rpn_head import RPNHead
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor, nn

from mmdetection_files.pipelines import augments
from shared.errors import UserError
from shared.export import operations
from shared.export.operations import Exportable, as_list, best_boxes, best_of_classes, best_pairs, of_labels

_MOST = 1000  # detections of an image, without max_per_img
_KEY = "hyperparameters.config_file"


class ExportableMMDetection(Exportable):
    """The pixels of a test pipeline, the network, and the boxes of `simple_test`.

    Args:
        model: MMDetection's detector.
        pipeline: prepares the images to test on.

    Raises:
        UserError: the config has what an exported file cannot do; says what.
    """

    def __init__(self, model: nn.Module, pipeline: Sequence[Mapping[str, Any]]):
        super().__init__()
        _check(model)
        self.model = model
        self.regions = model.roi_head if isinstance(model, TwoStageDetector) else None
        self.head = model.bbox_head if self.regions is None else model.rpn_head
        self.config = model.test_cfg if self.regions is None else model.test_cfg.rpn
        if self.regions is not None and self.regions.with_mask:
            self.outputs = (*self.outputs, "masks")
        self.scale, self.keeps_ratio, self.steps = _test_steps(pipeline)
        if not self.keeps_ratio:
            self.input_size = (self.scale[1], self.scale[0])
        elif (size := _padded_size(self.steps, self.scale)) is not None:
            self.input_size = size
        for name in ("mean", "std"):
            norm = next((step for step in self.steps if step["type"] == "Normalize"), {})
            values = norm.get(name, [0.0] * 3 if name == "mean" else [1.0] * 3)
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1))

    def prepare(self, images: Tensor) -> tuple[Tensor, Tensor]:
        height, width = images.shape[-2:]
        if self.keeps_ratio:
            new_height, new_width = operations.within(height, width, min(self.scale), max(self.scale))
        else:
            new_height, new_width = self.input_size
        pixels = operations.resize_as_opencv(images, new_height, new_width)
        in_rgb = False
        for step in self.steps:
            if step["type"] == "Normalize":
                in_rgb = step.get("to_rgb", True)
                pixels = pixels if in_rgb else pixels.flip(1)
                pixels = (pixels - self.mean) / self.std
            else:
                pixels = self._padded(pixels, step)
        if not any(step["type"] == "Normalize" for step in self.steps):
            pixels = pixels.flip(1)  # OpenCV's order
        return pixels, operations.as_tensor(height, width, new_height, new_width)

    def _padded(self, pixels: Tensor, step: Mapping[str, Any]) -> Tensor:
        value = step.get("pad_val", 0)
        value = value.get("img", 0) if isinstance(value, Mapping) else value
        value = float(value[0] if isinstance(value, (list, tuple)) else value)
        height, width = pixels.shape[-2:]
        if self.input_size is not None:
            down, right = self.input_size[0] - height, self.input_size[1] - width
        else:
            divisor = step["size_divisor"]
            down, right = (-height) % divisor, (-width) % divisor
        return F.pad(pixels, (0, right, 0, down), value=value)

    def detect(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        features = self.model.extract_feat(pixels)
        outputs = self.head(features)
        height, width, new_height, new_width = sizes.unbind()
        if self.regions is not None:
            return self._of_regions(features, *self._of_levels(outputs, new_height, new_width), sizes)
        if isinstance(self.head, YOLOXHead):
            found = self._of_yolox(*outputs)
        else:
            found = self._of_levels(outputs, new_height, new_width)
        boxes, scores, labels = found
        scale = torch.stack([new_width / width, new_height / height]).repeat(2)
        boxes, limit = boxes / scale, self.config.get("max_per_img")
        if limit is None:  # MMDetection keeps all, and COCO counts 100 of each class
            limit = torch.sym_min(boxes.shape[1], _MOST)
        return best_boxes(boxes, scores, labels, self.config.nms["iou_threshold"], limit)

    def _of_levels(self, outputs: Sequence[Any], height: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates of `BaseDenseHead.get_bboxes`: the best pairs of a place and a class, by level."""
        class_levels, box_levels = outputs[:2]
        factor_levels = outputs[2] if len(outputs) > 2 else [None] * len(class_levels)
        shapes = [level.shape[-2:] for level in class_levels]
        priors = self.head.prior_generator.grid_priors(shapes, dtype=torch.float32, device=class_levels[0].device)
        found = [
            self._of_level(*level)
            for level in zip(class_levels, box_levels, factor_levels, priors, range(len(shapes)), strict=True)
        ]
        boxes, scores, labels = (torch.cat(each, 1) for each in zip(*found, strict=True))
        if getattr(self.head.bbox_coder, "clip_border", False):
            boxes = torch.minimum(boxes.clamp(min=0), torch.stack([width, height]).repeat(2))
        return boxes, scores, labels

    def _of_level(
        self, classes: Tensor, boxes: Tensor, factor: Tensor | None, priors: Tensor, level: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        head, count = self.head, self.config.get("nms_pre", 1000)
        batch = classes.shape[0]
        logits = classes.permute(0, 2, 3, 1).reshape(batch, -1, head.cls_out_channels)
        scores = logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(-1)[..., :-1]
        regressed = boxes.permute(0, 2, 3, 1)
        if isinstance(head, GFLHead):
            regressed = head.integral(regressed) * head.prior_generator.strides[level][0]
            priors = head.anchor_center(priors)
        regressed = regressed.reshape(batch, -1, 4)
        scores, places, labels = best_pairs(scores, count, self.config.get("score_thr", 0.0))
        chosen = regressed.gather(1, places[..., None].expand(-1, -1, 4))
        decoded = head.bbox_coder.decode(priors[places.flatten()], chosen.flatten(0, 1)).view(batch, count, 4)
        if factor is not None:
            factor = factor.permute(0, 2, 3, 1).reshape(batch, -1).sigmoid()
            scores = scores * factor.gather(1, places)
        return decoded, scores, labels

    def _of_regions(
        self, features: Sequence[Tensor], boxes: Tensor, scores: Tensor, levels: Tensor, sizes: Tensor
    ) -> tuple[Tensor, ...]:
        """The boxes and masks of `roi_head.simple_test`, of the RPN's candidates."""
        proposals, config = self.config, self.regions.test_cfg
        scores = scores * ((boxes[..., 2:] - boxes[..., :2]) > proposals.min_bbox_size).all(-1)
        boxes, scores = (each.unflatten(1, (-1, proposals.nms_pre)).transpose(1, 2) for each in (boxes, scores))
        boxes, found, _ = best_of_classes(boxes, scores, proposals.nms["iou_threshold"], proposals.max_per_img)
        height, width, new_height, new_width = sizes.unbind()
        scale, edge = torch.stack([new_width / width, new_height / height]).repeat(2), (new_width, new_height)
        heads, logits = as_list(self.regions.bbox_head), []
        for extractor, head in zip(as_list(self.regions.bbox_roi_extractor), heads, strict=True):
            classes, deltas = head(self._pooled(extractor, features, boxes))
            logits.append(classes)
            if head is not heads[-1]:
                deltas = deltas.unflatten(1, (-1, 4))
                if not head.reg_class_agnostic:
                    best = classes[:, :-1].argmax(1)[:, None, None].expand(-1, -1, 4)
                    deltas = deltas.gather(1, best)
                boxes = _decoded(head, boxes, deltas.flatten(1), edge)[:, :, 0]
        boxes = _decoded(heads[-1], boxes, deltas, edge) / scale
        scores = (sum(logits) / len(logits)).softmax(-1)[:, :-1].unflatten(0, boxes.shape[:2]) * (found > 0)[..., None]
        limit = config.max_per_img if config.max_per_img > 0 else _MOST
        boxes, scores, labels = best_of_classes(boxes, scores, config.nms["iou_threshold"], limit, config.score_thr)
        if not self.regions.with_mask:
            return boxes, scores, labels
        extractors, heads = as_list(self.regions.mask_roi_extractor), as_list(self.regions.mask_head)
        masks = [
            of_labels(head(self._pooled(extractor, features, boxes * scale)), labels).sigmoid()
            for extractor, head in zip(extractors, heads, strict=True)
        ]
        return boxes, scores, labels, sum(masks) / len(masks)

    def _pooled(self, extractor: SingleRoIExtractor, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        bounds = [(2**level - 1e-6) * extractor.finest_scale for level in range(1, extractor.num_inputs)]
        pooled = operations.pool_regions(features[: extractor.num_inputs], boxes, extractor.roi_layers, bounds)
        return self.regions.shared_head(pooled) if self.regions.with_shared_head else pooled

    def _of_yolox(
        self, class_levels: list[Tensor], box_levels: list[Tensor], object_levels: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates of `YOLOXHead.get_bboxes`: the best class of each place."""
        shapes = [level.shape[-2:] for level in class_levels]
        device = class_levels[0].device
        priors = self.head.prior_generator.grid_priors(shapes, torch.float32, device, with_stride=True)
        classes, boxes, objects = (
            torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in levels], 1)
            for levels in (class_levels, box_levels, object_levels)
        )
        best, labels = classes.sigmoid().max(-1)
        scores = best * objects[..., 0].sigmoid()
        priors = torch.cat(priors)
        middles, sizes = boxes[..., :2] * priors[:, 2:] + priors[:, :2], boxes[..., 2:].exp() * priors[:, 2:]
        boxes = torch.cat([middles - sizes / 2, middles + sizes / 2], -1)
        return boxes, torch.where(scores >= self.config.score_thr, scores, torch.zeros_like(scores)), labels


def _decoded(head: BBoxHead, boxes: Tensor, deltas: Tensor, edge: tuple[Tensor, Tensor]) -> Tensor:
    """(B, N, K, 4) boxes, decoded from (B, N, 4) boxes and (B * N, K * 4) deltas. `edge` is the image's lower right."""
    decoded = head.bbox_coder.decode(boxes.flatten(0, 1), deltas)
    decoded = decoded.unflatten(1, (-1, 4)).unflatten(0, boxes.shape[:2])
    return torch.minimum(decoded.clamp(min=0), torch.stack(edge).repeat(2)) if head.bbox_coder.clip_border else decoded


# of each kind of part, the methods that a rule above repeats
_RULES = {
    SingleStageDetector: ("simple_test",),
    TwoStageDetector: ("simple_test",),
    RPNHead: ("get_bboxes", "_get_bboxes_single", "_bbox_post_process"),
    StandardRoIHead: ("simple_test", "simple_test_bboxes", "simple_test_mask", "_bbox_forward", "_mask_forward"),
    CascadeRoIHead: ("simple_test", "_bbox_forward", "_mask_forward"),
    SingleRoIExtractor: ("forward", "map_roi_levels"),
    BBoxHead: ("get_bboxes", "regress_by_class"),
    FCNMaskHead: ("get_seg_masks",),
    GFLHead: ("get_bboxes", "_get_bboxes_single"),
    YOLOXHead: ("get_bboxes",),
    BaseDenseHead: ("get_bboxes", "_get_bboxes_single"),
}

_MISSING = {
    DeformConv2d: "deformable convolution",
    ModulatedDeformConv2d: "deformable convolution",
    SAConv2d: "switchable atrous convolution",
    CARAFEPack: "CARAFE",
}


def _check(model: nn.Module) -> None:
    """Raises UserError if the detections of a detector are not found by one of the rules above."""
    is_two_stage = isinstance(model, TwoStageDetector)
    parts, configs = [model], [model.test_cfg]
    if is_two_stage and model.roi_head is not None and model.with_rpn:
        regions = model.roi_head
        parts += [model.rpn_head, regions, *as_list(regions.bbox_roi_extractor), *as_list(regions.bbox_head)]
        if regions.with_mask:
            parts += [*as_list(regions.mask_roi_extractor), *as_list(regions.mask_head)]
        configs = [model.test_cfg.rpn, model.test_cfg.rcnn]
    else:
        parts.append(model.rpn_head if is_two_stage else getattr(model, "bbox_head", None))
    operations.check_rules(parts, _RULES, _KEY, _FIX)
    heads = as_list(model.roi_head.bbox_head) if len(configs) > 1 else []
    if any(head.custom_activation or not head.with_reg for head in heads):
        raise UserError(f"{_KEY}: an exported file has no such loss_cls or with_reg as its bbox_head. {_FIX}")
    missing = next(
        (name for kind, name in _MISSING.items() for part in model.modules() if isinstance(part, kind)), None
    )
    if missing is not None:
        raise UserError(f"{_KEY}: {type(model).__name__} cannot be exported: an exported file has no {missing}. {_FIX}")
    for config in configs:
        nms = config.get("nms", {})
        if nms.get("type") != "nms" or nms.get("class_agnostic") or nms.get("max_num"):
            raise UserError(
                f"{_KEY}: test_cfg.nms {dict(nms)} cannot be exported. Fix: use {{type: nms, iou_threshold: …}}"
            )
    if is_two_stage and (model.test_cfg.rpn.nms_pre <= 0 or model.test_cfg.rcnn.get("mask_thr_binary", 0.5) != 0.5):
        raise UserError(f"{_KEY}: test_cfg cannot be exported. Fix: give rpn.nms_pre, and rcnn.mask_thr_binary: 0.5")


_FIX = "Fix: use its checkpoint, or a detector that docs/export.md lists"


def _test_steps(pipeline: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, int], bool, list[Mapping[str, Any]]]:
    """The size that a test pipeline resizes to, whether it keeps the ratio, and its Normalize and Pad, in order."""
    multi = next((step for step in pipeline if step["type"] == "MultiScaleFlipAug"), None)
    if multi is None or augments(pipeline) or multi.get("img_scale") is None:
        raise UserError(f"{_KEY}: the test pipeline of the config augments, or gives no img_scale. {_FIX}")
    scale = multi["img_scale"]
    scale = tuple(scale[0]) if isinstance(scale, list) and isinstance(scale[0], (list, tuple)) else tuple(scale)
    keeps_ratio, steps = True, []
    for step in multi["transforms"]:
        kind = step["type"]
        if kind == "Resize":
            keeps_ratio = step.get("keep_ratio", True)
            if step.get("interpolation", "bilinear") != "bilinear":
                raise UserError(f"{_KEY}: an exported file cannot resize by {step['interpolation']}. {_FIX}")
        elif kind in ("Normalize", "Pad"):
            steps.append(step)
        elif kind not in ("RandomFlip", "ImageToTensor", "DefaultFormatBundle", "Collect"):
            raise UserError(f"{_KEY}: the test pipeline's step {kind} cannot be exported. {_FIX}")
    return scale, keeps_ratio, steps


def _padded_size(steps: Sequence[Mapping[str, Any]], scale: tuple[int, int]) -> tuple[int, int] | None:
    """The (height, width) of all images after the padding; None if it depends on the image."""
    pad = next((step for step in steps if step["type"] == "Pad"), {})
    if pad.get("size") is not None:
        return tuple(pad["size"])
    if pad.get("pad_to_square") and scale[0] == scale[1]:
        return scale
    if pad.get("pad_to_square"):
        raise UserError(f"{_KEY}: the test pipeline's pad_to_square needs a square img_scale to be exported. {_FIX}")
    return None
