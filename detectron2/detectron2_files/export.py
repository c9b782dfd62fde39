"""Detectron2's detectors from images to detections, as `export` writes them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import DeformConv, ModulatedDeformConv, ROIAlign
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, Res5ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from PIL import Image
from torch import Tensor, nn

from shared.errors import UserError
from shared.export.operations import (
    Exportable,
    as_tensor,
    best_boxes,
    best_of_classes,
    best_pairs,
    of_labels,
    pool_regions,
    resize_as_pillow,
    within,
)

_KEY = "hyperparameters.config_file"
_FIX = "Fix: use its checkpoint, or a detector that docs/export.md lists"
_MOST = 1000  # detections of an image, without TEST.DETECTIONS_PER_IMAGE


def exportable(model: nn.Module, mapper: Any) -> Exportable:
    """The detector as `export` writes it.

    Args:
        model: Detectron2's detector.
        mapper: the mapper of the data to test on.

    Raises:
        UserError: the config has what an exported file cannot do; says what.
    """
    kind = _ExportableRCNN if isinstance(model, GeneralizedRCNN) else _ExportableRetinaNet
    return kind(model, mapper)


class _ExportableDetectron2(Exportable):
    """The pixels of Detectron2's test mapper, and the boxes of `detector_postprocess`."""

    def __init__(self, model: nn.Module, mapper: Any):
        super().__init__()
        if any(isinstance(module, (DeformConv, ModulatedDeformConv)) for module in model.modules()):
            raise UserError(f"{_KEY}: it cannot be exported: an exported file has no deformable convolution. {_FIX}")
        steps = list(getattr(getattr(mapper, "augmentations", None), "augs", [None]))
        plain = all(type(step) is ResizeShortestEdge and step.interp == Image.BILINEAR for step in steps)
        if not plain or len(steps) > 1 or model.backbone.padding_constraints.get("square_size"):
            raise UserError(f"{_KEY}: an exported file cannot prepare images as this config's test does. {_FIX}")
        self.model = model
        self.in_bgr = mapper.image_format == "BGR"
        self.sizes = (steps[0].short_edge_length[0], steps[0].max_size) if steps else None

    def prepare(self, images: Tensor) -> tuple[Tensor, Tensor]:
        height, width = new_height, new_width = images.shape[-2:]
        pixels = images.float()
        if self.sizes is not None:
            new_height, new_width = within(height, width, *self.sizes)
            pixels = resize_as_pillow(images, new_height, new_width)
        pixels = pixels.flip(1) if self.in_bgr else pixels
        pixels = (pixels - self.model.pixel_mean) / self.model.pixel_std
        divisor = max(self.model.backbone.size_divisibility, 1)
        pixels = F.pad(pixels, (0, (-new_width) % divisor, 0, (-new_height) % divisor))
        return pixels, as_tensor(height, width, new_height, new_width)

    def detect(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        height, width, new_height, new_width = sizes.unbind()
        edge = torch.stack([new_width, new_height]).repeat(2)
        boxes, scores, *others = self.find(self.model.backbone(pixels), edge)
        boxes = boxes * torch.stack([width / new_width, height / new_height]).repeat(2)
        boxes = torch.minimum(boxes.clamp(min=0), torch.stack([width, height]).repeat(2))
        is_empty = (boxes[..., 2:] <= boxes[..., :2]).any(-1)
        return boxes, torch.where(is_empty, torch.zeros_like(scores), scores), *others

    @abstractmethod
    def find(self, features: Mapping[str, Tensor], edge: Tensor) -> tuple[Tensor, ...]:
        """The detections in pixels of the network's input; (4,) `edge` is its width and height twice."""


class _ExportableRetinaNet(_ExportableDetectron2):
    """The boxes of `RetinaNet.forward`."""

    def __init__(self, model: nn.Module, mapper: Any):
        if not isinstance(model, RetinaNet) or type(model).forward_inference is not RetinaNet.forward_inference:
            kind = type(model).__name__
            raise UserError(f"{_KEY}: {kind} cannot be exported: only RetinaNet and GeneralizedRCNN can. {_FIX}")
        super().__init__(model, mapper)

    def find(self, features: Mapping[str, Tensor], edge: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        features = [features[name] for name in model.head_in_features]
        logits, deltas = model._transpose_dense_predictions(model.head(features), [model.num_classes, 4])
        found = []
        for level, regressed, anchors in zip(logits, deltas, model.anchor_generator(features), strict=True):
            count = model.test_topk_candidates
            scores, places, labels = best_pairs(level.sigmoid(), count, model.test_score_thresh)
            found.append((_decoded(model, regressed, anchors.tensor, places), scores, labels))
        boxes, scores, labels = (torch.cat(each, 1) for each in zip(*found, strict=True))
        return best_boxes(boxes, scores, labels, model.test_nms_thresh, model.max_detections_per_image)[:3]


class _ExportableRCNN(_ExportableDetectron2):
    """The boxes and masks of `GeneralizedRCNN.inference`."""

    def __init__(self, model: GeneralizedRCNN, mapper: Any):
        heads = model.roi_heads
        _check(model)
        super().__init__(model, mapper)
        if heads.mask_on:
            self.outputs = (*self.outputs, "masks")

    def find(self, features: Mapping[str, Tensor], edge: Tensor) -> tuple[Tensor, ...]:
        heads = self.model.roi_heads
        boxes, found = self._proposals(features, edge)
        predictors = _as_list(heads.box_predictor)
        total = 0.0
        for number, predictor in enumerate(predictors):
            logits, deltas = predictor(self._box_features(features, boxes, number))
            total = total + (logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(-1))
            decoded = predictor.box2box_transform.apply_deltas(deltas, boxes.flatten(0, 1))
            decoded = decoded.unflatten(1, (-1, 4)).unflatten(0, boxes.shape[:2])
            decoded = torch.minimum(decoded.clamp(min=0), edge)
            boxes = decoded[:, :, 0]
        scores = (total / len(predictors))[:, :-1].unflatten(0, boxes.shape[:2])
        scores = torch.where((found > 0)[..., None], scores, torch.zeros_like(scores))
        most = scores.shape[1] * scores.shape[2]
        limit = min(predictor.test_topk_per_image if predictor.test_topk_per_image >= 0 else _MOST, most)
        nms_threshold, score_threshold = predictor.test_nms_thresh, predictor.test_score_thresh
        boxes, scores, labels = best_of_classes(decoded, scores, nms_threshold, limit, score_threshold)
        if not heads.mask_on:
            return boxes, scores, labels
        masks = heads.mask_head.layers(self._mask_features(features, boxes))
        return boxes, scores, labels, of_labels(masks, labels).sigmoid()

    def _proposals(self, features: Mapping[str, Tensor], edge: Tensor) -> tuple[Tensor, Tensor]:
        """The boxes of `find_top_rpn_proposals`, (B, N, 4), and their scores, (B, N), 0 for none."""
        rpn = self.model.proposal_generator
        features = [features[name] for name in rpn.in_features]
        logits, deltas = rpn.rpn_head(features)
        count, found = rpn.pre_nms_topk[False], []
        for level, regressed, anchors in zip(logits, deltas, rpn.anchor_generator(features), strict=True):
            # positive numbers in the same order
            scores = level.permute(0, 2, 3, 1).flatten(1).clamp(-80, 80).exp()
            scores, places, _ = best_pairs(scores[..., None], count, 0.0)
            regressed = regressed.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            boxes = torch.minimum(_decoded(rpn, regressed, anchors.tensor, places).clamp(min=0), edge)
            is_large = ((boxes[..., 2:] - boxes[..., :2]) > rpn.min_box_size).all(-1)
            found.append((boxes, torch.where(is_large, scores, torch.zeros_like(scores))))
        boxes, scores = (torch.stack(each, 2) for each in zip(*found, strict=True))
        limit = min(rpn.post_nms_topk[False], count * len(found))
        return best_of_classes(boxes, scores, rpn.nms_thresh, limit)[:2]

    def _box_features(self, features: Mapping[str, Tensor], boxes: Tensor, stage: int) -> Tensor:
        heads = self.model.roi_heads
        if isinstance(heads, Res5ROIHeads):
            return heads.res5(_pooled(heads.pooler, features, heads.in_features, boxes)).mean(dim=[2, 3])
        return _as_list(heads.box_head)[stage](_pooled(heads.box_pooler, features, heads.box_in_features, boxes))

    def _mask_features(self, features: Mapping[str, Tensor], boxes: Tensor) -> Tensor:
        heads = self.model.roi_heads
        if isinstance(heads, Res5ROIHeads):
            return heads.res5(_pooled(heads.pooler, features, heads.in_features, boxes))
        return _pooled(heads.mask_pooler, features, heads.mask_in_features, boxes)


def _as_list(modules: nn.Module | nn.ModuleList) -> list[nn.Module]:
    """The modules of each stage of a cascade, or the only one."""
    return list(modules) if isinstance(modules, nn.ModuleList) else [modules]


def _decoded(model: nn.Module, deltas: Tensor, anchors: Tensor, places: Tensor) -> Tensor:
    """(B, N, 4) boxes of (B, N) places among all anchors, whose deltas are (B, anchors, 4)."""
    chosen = deltas.gather(1, places[..., None].expand(-1, -1, 4)).flatten(0, 1)
    return model.box2box_transform.apply_deltas(chosen, anchors[places.flatten()]).unflatten(0, places.shape)


def _pooled(pooler: ROIPooler, features: Mapping[str, Tensor], names: list[str], boxes: Tensor) -> Tensor:
    levels = range(pooler.min_level + 1, pooler.max_level + 1)
    bounds = [pooler.canonical_box_size * 2.0 ** (level - pooler.canonical_level) for level in levels]
    return pool_regions([features[name] for name in names], boxes, pooler.level_poolers, bounds)


# of each kind of part, the methods that the rules above repeat
_RULES = {
    GeneralizedRCNN: ("forward", "inference"),
    RPN: ("forward", "predict_proposals"),
    CascadeROIHeads: ("forward", "_forward_box", "_run_stage", "_forward_mask"),
    StandardROIHeads: ("forward", "_forward_box", "_forward_mask"),
    Res5ROIHeads: ("forward", "_shared_roi_transform", "forward_with_given_boxes"),
    FastRCNNOutputLayers: ("forward", "inference", "predict_boxes", "predict_probs"),
    BaseMaskRCNNHead: ("forward",),
    ROIPooler: ("forward",),
}


def _check(model: GeneralizedRCNN) -> None:
    """Raises UserError if a part of the detector computes in another way than the rules above."""
    heads = model.roi_heads
    if getattr(heads, "keypoint_on", False):
        raise UserError(f"{_KEY}: it cannot be exported: an exported file has no keypoints. {_FIX}")
    parts = [model, model.proposal_generator, heads, *_as_list(getattr(heads, "box_predictor", nn.Identity()))]
    parts += [heads.mask_head] if getattr(heads, "mask_on", False) else []
    poolers = [module for module in model.modules() if isinstance(module, ROIPooler)]
    for part in [*parts, *poolers]:
        kind = next((kind for kind in _RULES if isinstance(part, kind)), None)
        if kind is None or any(getattr(type(part), name) is not getattr(kind, name) for name in _RULES[kind]):
            name = type(part).__name__
            raise UserError(f"{_KEY}: {name} cannot be exported: it finds boxes or masks by a rule of its own. {_FIX}")
    if any(not isinstance(layer, ROIAlign) for pooler in poolers for layer in pooler.level_poolers):
        raise UserError(f"{_KEY}: it cannot be exported: an exported file pools regions by ROIAlign alone. {_FIX}")
