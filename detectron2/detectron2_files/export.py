"""Detectron2's RetinaNet from images to detections, as `export` writes it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import DeformConv, ModulatedDeformConv
from detectron2.modeling import RetinaNet
from PIL import Image
from torch import Tensor, nn

from shared.errors import UserError
from shared.export.operations import Exportable, as_tensor, best_boxes, best_pairs, resize_as_pillow, within

_KEY = "hyperparameters.config_file"
_FIX = "Fix: use its checkpoint, or a detector that docs/export.md lists"


class ExportableRetinaNet(Exportable):
    """The pixels of Detectron2's test mapper, the network, and the boxes of `RetinaNet.forward`.

    Args:
        model: Detectron2's detector.
        mapper: the mapper of the data to test on.

    Raises:
        UserError: the config has what an exported file cannot do; says what.
    """

    def __init__(self, model: nn.Module, mapper: Any):
        super().__init__()
        if type(model) is not RetinaNet:
            raise UserError(f"{_KEY}: {type(model).__name__} cannot be exported: only RetinaNet can. {_FIX}")
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

    def detect(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        features = model.backbone(pixels)
        features = [features[name] for name in model.head_in_features]
        logits, deltas = model._transpose_dense_predictions(model.head(features), [model.num_classes, 4])
        found = []
        for level, regressed, anchors in zip(logits, deltas, model.anchor_generator(features), strict=True):
            count = model.test_topk_candidates
            scores, places, labels = best_pairs(level.sigmoid(), count, model.test_score_thresh)
            regressed = regressed.gather(1, places[..., None].expand(-1, -1, 4)).flatten(0, 1)
            boxes = model.box2box_transform.apply_deltas(regressed, anchors.tensor[places.flatten()])
            found.append((boxes.unflatten(0, (-1, count)), scores, labels))
        boxes, scores, labels = (torch.cat(each, 1) for each in zip(*found, strict=True))
        limit = model.max_detections_per_image
        boxes, scores, labels, _ = best_boxes(boxes, scores, labels, model.test_nms_thresh, limit)
        height, width, new_height, new_width = sizes.unbind()
        boxes = boxes * torch.stack([width / new_width, height / new_height]).repeat(2)
        boxes = torch.minimum(boxes.clamp(min=0), torch.stack([width, height]).repeat(2))
        is_empty = (boxes[..., 2:] <= boxes[..., :2]).any(-1)
        return boxes, torch.where(is_empty, torch.zeros_like(scores), scores), labels
