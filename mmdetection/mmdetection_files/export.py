"""MMDetection's one-stage detectors from images to detections, as `export` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from mmdet.models.dense_heads import GFLHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector
from torch import Tensor, nn

from mmdetection_files import data as data_sets
from shared.errors import UserError
from shared.export.operations import Exportable, as_tensor, best_boxes, best_pairs, resize_as_opencv, within

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
        self.model, self.head = model, model.bbox_head
        self.config = model.test_cfg
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
            new_height, new_width = within(height, width, min(self.scale), max(self.scale))
        else:
            new_height, new_width = self.input_size
        pixels = resize_as_opencv(images, new_height, new_width)
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
        return pixels, as_tensor(height, width, new_height, new_width)

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

    def detect(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = self.head(self.model.extract_feat(pixels))
        height, width, new_height, new_width = sizes.unbind()
        if isinstance(self.head, YOLOXHead):
            found = self._of_yolox(*outputs)
        else:
            found = self._of_levels(outputs, new_height, new_width)
        boxes, scores, labels = found
        scale = torch.stack([new_width / width, new_height / height]).repeat(2)
        boxes, limit = boxes / scale, self.config.get("max_per_img")
        if limit is None:  # MMDetection keeps all, and COCO counts 100 of each class
            limit = torch.sym_min(boxes.shape[1], _MOST)
        return best_boxes(boxes, scores, labels, self.config.nms["iou_threshold"], limit)[:3]

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
        scores, places, labels = best_pairs(scores, count, self.config.score_thr)
        chosen = regressed.gather(1, places[..., None].expand(-1, -1, 4))
        decoded = head.bbox_coder.decode(priors[places.flatten()], chosen.flatten(0, 1)).view(batch, count, 4)
        if factor is not None:
            factor = factor.permute(0, 2, 3, 1).reshape(batch, -1).sigmoid()
            scores = scores * factor.gather(1, places)
        return decoded, scores, labels

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


def _check(model: nn.Module) -> None:
    """Raises UserError if the boxes of a detector are not found by one of the rules above."""
    head = getattr(model, "bbox_head", None)
    kind = type(model).__name__
    if not isinstance(model, SingleStageDetector) or getattr(model, "mask_head", None) is not None:
        raise UserError(f"{_KEY}: {kind} cannot be exported: it is not a one-stage detector of boxes. {_FIX}")
    kind = type(head).__name__
    own = isinstance(head, (GFLHead, YOLOXHead))
    plain = all(
        getattr(type(head), name, None) is getattr(BaseDenseHead, name) for name in ("get_bboxes", "_get_bboxes_single")
    )
    if not own and not plain:
        raise UserError(f"{_KEY}: {kind} cannot be exported: it finds boxes by a rule of its own. {_FIX}")
    if any(isinstance(module, (DeformConv2d, ModulatedDeformConv2d)) for module in model.modules()):
        raise UserError(
            f"{_KEY}: {type(model).__name__} cannot be exported: an exported file has no deformable convolution. {_FIX}"
        )
    nms = model.test_cfg.get("nms", {})
    if nms.get("type") != "nms" or nms.get("class_agnostic") or nms.get("max_num"):
        raise UserError(
            f"{_KEY}: test_cfg.nms {dict(nms)} cannot be exported. Fix: use {{type: nms, iou_threshold: …}}"
        )


_FIX = "Fix: use its checkpoint, or a detector that docs/export.md lists"


def _test_steps(pipeline: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, int], bool, list[Mapping[str, Any]]]:
    """The size that a test pipeline resizes to, whether it keeps the ratio, and its Normalize and Pad, in order."""
    multi = next((step for step in pipeline if step["type"] == "MultiScaleFlipAug"), None)
    if multi is None or data_sets.augments(pipeline) or multi.get("img_scale") is None:
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
