"""Detectron2's detectors from images to detections, as `export` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import DeformConv, ModulatedDeformConv
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, Res5ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from PIL import Image
from torch import Tensor, nn

from shared.errors import UserError
from shared.export import operations
from shared.export.operations import Exportable, as_list, best_boxes, best_of_classes, best_pairs

_KEY = "hyperparameters.config_file"
_FIX = "Fix: use its checkpoint, or a detector that docs/export.md lists"
_MOST = 1000  # detections of an image, without TEST.DETECTIONS_PER_IMAGE
# of each kind of part, the methods that are repeated below
_RULES = {
    RetinaNet: ("forward", "forward_inference", "inference_single_image"),
    GeneralizedRCNN: ("forward", "inference"),
    RPN: ("forward", "predict_proposals"),
    CascadeROIHeads: ("forward", "_forward_box", "_run_stage", "_forward_mask"),
    StandardROIHeads: ("forward", "_forward_box", "_forward_mask"),
    Res5ROIHeads: ("forward", "_shared_roi_transform", "forward_with_given_boxes"),
    FastRCNNOutputLayers: ("forward", "inference", "predict_boxes", "predict_probs"),
    BaseMaskRCNNHead: ("forward",),
    ROIPooler: ("forward",),
}


class ExportableDetectron2(Exportable):
    """The pixels of Detectron2's test mapper, the network, and the detections of RetinaNet or `GeneralizedRCNN`.

    Args:
        model: Detectron2's detector.
        mapper: the mapper of the data to test on.

    Raises:
        UserError: the config has what an exported file cannot do; says what.
    """

    def __init__(self, model: nn.Module, mapper: Any):
        super().__init__()
        _check(model)
        steps = list(getattr(getattr(mapper, "augmentations", None), "augs", [None]))
        plain = all(type(step) is ResizeShortestEdge and step.interp == Image.BILINEAR for step in steps)
        if not plain or len(steps) > 1 or model.backbone.padding_constraints.get("square_size"):
            raise UserError(f"{_KEY}: an exported file cannot prepare images as this config's test does. {_FIX}")
        self.model = model
        self.regions = getattr(model, "roi_heads", None)
        if self.regions is not None and self.regions.mask_on:
            self.outputs = (*self.outputs, "masks")
        self.in_bgr = mapper.image_format == "BGR"
        self.sizes = (steps[0].short_edge_length[0], steps[0].max_size) if steps else None

    def prepare(self, images: Tensor) -> tuple[Tensor, Tensor]:
        height, width = new_height, new_width = images.shape[-2:]
        pixels = images.float()
        if self.sizes is not None:
            new_height, new_width = operations.within(height, width, *self.sizes)
            pixels = operations.resize_as_pillow(images, new_height, new_width)
        pixels = pixels.flip(1) if self.in_bgr else pixels
        pixels = (pixels - self.model.pixel_mean) / self.model.pixel_std
        divisor = max(self.model.backbone.size_divisibility, 1)
        pixels = F.pad(pixels, (0, (-new_width) % divisor, 0, (-new_height) % divisor))
        return pixels, operations.as_tensor(height, width, new_height, new_width)

    def detect(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        height, width, new_height, new_width = sizes.unbind()
        features, edge = self.model.backbone(pixels), torch.stack([new_width, new_height]).repeat(2)
        boxes, scores, *others = self._of_places(features) if self.regions is None else self._of_regions(features, edge)
        boxes = boxes * torch.stack([width / new_width, height / new_height]).repeat(2)
        boxes = torch.minimum(boxes.clamp(min=0), torch.stack([width, height]).repeat(2))
        is_empty = (boxes[..., 2:] <= boxes[..., :2]).any(-1)
        return boxes, torch.where(is_empty, torch.zeros_like(scores), scores), *others

    def _of_places(self, features: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The detections of `RetinaNet.forward_inference`."""
        model = self.model
        features = [features[name] for name in model.head_in_features]
        logits, deltas = model._transpose_dense_predictions(model.head(features), [model.num_classes, 4])
        found = []
        for level, regressed, anchors in zip(logits, deltas, model.anchor_generator(features), strict=True):
            count = model.test_topk_candidates
            scores, places, labels = best_pairs(level.sigmoid(), count, model.test_score_thresh)
            found.append((_decoded(model, regressed, anchors.tensor, places), scores, labels))
        boxes, scores, labels = (torch.cat(each, 1) for each in zip(*found, strict=True))
        return best_boxes(boxes, scores, labels, model.test_nms_thresh, model.max_detections_per_image)

    def _of_regions(self, features: Mapping[str, Tensor], edge: Tensor) -> tuple[Tensor, ...]:
        """The detections of `GeneralizedRCNN.inference`, inside an image whose width and height is (4,) `edge`."""
        boxes, found = self._proposals(features, edge)
        predictors, total = as_list(self.regions.box_predictor), 0.0
        for stage, predictor in enumerate(predictors):
            logits, deltas = predictor(self._pooled("box", features, boxes, stage))
            total = total + (logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(-1))
            decoded = predictor.box2box_transform.apply_deltas(deltas, boxes.flatten(0, 1))
            decoded = decoded.unflatten(1, (-1, 4)).unflatten(0, boxes.shape[:2])
            decoded = torch.minimum(decoded.clamp(min=0), edge)
            boxes = decoded[:, :, 0]
        scores = (total / len(predictors))[:, :-1].unflatten(0, boxes.shape[:2]) * (found > 0)[..., None]
        limit = predictor.test_topk_per_image if predictor.test_topk_per_image >= 0 else _MOST
        thresholds = predictor.test_nms_thresh, limit, predictor.test_score_thresh
        boxes, scores, labels = best_of_classes(decoded, scores, *thresholds)
        if not self.regions.mask_on:
            return boxes, scores, labels
        masks = self.regions.mask_head.layers(self._pooled("mask", features, boxes))
        return boxes, scores, labels, operations.of_labels(masks, labels).sigmoid()

    def _proposals(self, features: Mapping[str, Tensor], edge: Tensor) -> tuple[Tensor, Tensor]:
        """The boxes of `find_top_rpn_proposals`, (B, N, 4), and their scores, (B, N), 0 for none."""
        rpn, found = self.model.proposal_generator, []
        features = [features[name] for name in rpn.in_features]
        logits, deltas = rpn.rpn_head(features)
        for level, regressed, anchors in zip(logits, deltas, rpn.anchor_generator(features), strict=True):
            # positive numbers in the same order
            scores = level.permute(0, 2, 3, 1).flatten(1).clamp(-80, 80).exp()
            scores, places, _ = best_pairs(scores[..., None], rpn.pre_nms_topk[False], 0.0)
            regressed = regressed.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            boxes = torch.minimum(_decoded(rpn, regressed, anchors.tensor, places).clamp(min=0), edge)
            is_large = ((boxes[..., 2:] - boxes[..., :2]) > rpn.min_box_size).all(-1)
            found.append((boxes, scores * is_large))
        boxes, scores = (torch.stack(each, 2) for each in zip(*found, strict=True))
        return best_of_classes(boxes, scores, rpn.nms_thresh, rpn.post_nms_topk[False])[:2]

    def _pooled(self, kind: str, features: Mapping[str, Tensor], boxes: Tensor, stage: int = 0) -> Tensor:
        """What a "box" predictor or the "mask" head takes of (B, N, 4) boxes."""
        heads = self.regions
        is_shared = isinstance(heads, Res5ROIHeads)
        pooler = heads.pooler if is_shared else getattr(heads, f"{kind}_pooler")
        names = heads.in_features if is_shared else getattr(heads, f"{kind}_in_features")
        levels = range(pooler.min_level + 1, pooler.max_level + 1)
        bounds = [pooler.canonical_box_size * 2.0 ** (level - pooler.canonical_level) for level in levels]
        pooled = operations.pool_regions([features[name] for name in names], boxes, pooler.level_poolers, bounds)
        if is_shared:
            pooled = heads.res5(pooled)
            return pooled.mean(dim=[2, 3]) if kind == "box" else pooled
        return as_list(heads.box_head)[stage](pooled) if kind == "box" else pooled


def _decoded(model: nn.Module, deltas: Tensor, anchors: Tensor, places: Tensor) -> Tensor:
    """(B, N, 4) boxes of (B, N) places among all anchors, whose deltas are (B, anchors, 4)."""
    chosen = deltas.gather(1, places[..., None].expand(-1, -1, 4)).flatten(0, 1)
    return model.box2box_transform.apply_deltas(chosen, anchors[places.flatten()]).unflatten(0, places.shape)


def _check(model: nn.Module) -> None:
    """Raises UserError if the detections of a detector are not found by one of the rules above."""
    parts = [model]
    if isinstance(model, GeneralizedRCNN):
        heads = model.roi_heads
        parts += [model.proposal_generator, heads, *as_list(getattr(heads, "box_predictor", None))]
        parts += [heads.mask_head] if getattr(heads, "mask_on", False) else []
        parts += [module for module in heads.modules() if isinstance(module, ROIPooler)]
        if getattr(heads, "keypoint_on", False):
            raise UserError(f"{_KEY}: it cannot be exported: an exported file has no keypoints. {_FIX}")
    operations.check_rules(parts, _RULES, _KEY, _FIX)
    if any(isinstance(module, (DeformConv, ModulatedDeformConv)) for module in model.modules()):
        raise UserError(f"{_KEY}: it cannot be exported: an exported file has no deformable convolution. {_FIX}")
    layers = [layer for part in parts if isinstance(part, ROIPooler) for layer in part.level_poolers]
    if not all(hasattr(layer, "aligned") for layer in layers):
        raise UserError(f"{_KEY}: it cannot be exported: an exported file pools regions by ROIAlign alone. {_FIX}")
