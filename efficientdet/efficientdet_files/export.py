"""EfficientDet from images to detections, as `export` writes it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from effdet.anchors import Anchors, clip_boxes_xyxy, decode_box_outputs
from torch import Tensor, nn

from efficientdet_files.data import normalize
from shared.errors import UserError
from shared.export.operations import (
    Decoding,
    ExportableRaw,
    best_boxes,
    check_filter,
    inside,
    resize_as_pillow,
    size_of,
)

_IOU_THRESHOLD = 0.5  # of effdet's NMS


class ExportableEfficientDet(ExportableRaw):
    """The pixels of effdet's `ResizePad`, the network, and effdet's `DetBenchPredict`.

    Args:
        model: the network.
        config: effdet's config of the model.
        inputs: of `input_config`.

    Raises:
        UserError: the config has what an exported file cannot do.
    """

    def __init__(self, model: nn.Module, config: Any, inputs: dict[str, Any]):
        super().__init__()
        if config.soft_nms:
            raise UserError("hyperparameters.soft_nms: an exported file has no soft NMS. Fix: set it to false")
        self.filter = inputs["interpolation"]
        check_filter(self.filter, "hyperparameters.interpolation")
        self.model, self.config = model, config
        self.input_size = tuple(inputs["input_size"][-2:])
        self.register_buffer("anchors", Anchors.from_config(config).boxes)
        for name, values in (
            ("mean", torch.tensor(inputs["mean"]) * 255),
            ("std", torch.tensor(inputs["std"]) * 255),
            ("fill_color", torch.tensor(inputs["fill_color"], dtype=torch.float32)),
        ):
            self.register_buffer(name, values.view(1, 3, 1, 1))

    def prepare(self, images: Tensor) -> tuple[Tensor, Tensor]:
        most_height, most_width = self.input_size
        height, width = inside(*images.shape[-2:], most_height, most_width)
        pixels = resize_as_pillow(images, height, width, self.filter) - self.fill_color
        pixels = F.pad(pixels, (0, most_width - width, 0, most_height - height)) + self.fill_color
        return normalize(pixels, self.mean, self.std), size_of(images)

    def detect(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, regressed = self._outputs(pixels)
        scale = (sizes / torch.tensor(self.input_size, dtype=torch.float32)).max()
        classes = self.config.num_classes
        logits, best = logits.topk(self.config.max_detection_points, dim=1)
        places = best // classes
        regressed = regressed.gather(1, places[..., None].expand(-1, -1, 4))
        boxes = decode_box_outputs(regressed.flatten(0, 1), self.anchors[places.flatten()], output_xyxy=True)
        boxes = clip_boxes_xyxy(boxes, sizes.flip(0) / scale).view_as(regressed)
        limit = self.config.max_det_per_image
        boxes, scores, labels = best_boxes(boxes, logits.sigmoid(), best % classes, _IOU_THRESHOLD, limit)
        return boxes * scale, scores, labels

    def _outputs(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Of all anchors: logits (B, N * K), and regressed boxes (B, N, 4)."""
        class_outputs, box_outputs = (
            torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in levels], 1) for levels in self.model(pixels)
        )
        return class_outputs, box_outputs.unflatten(1, (-1, 4))

    def decoding(self) -> Decoding:
        return Decoding(
            keeps_ratio=True,
            filter=self.filter,
            fill_color=tuple(self.fill_color.flatten().int().tolist()),
            one_label=False,
            candidates=self.config.max_detection_points,
            iou_threshold=_IOU_THRESHOLD,
            limit=self.config.max_det_per_image,
            clips=True,
        )

    def places(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, regressed = self._outputs(normalize(images, self.mean, self.std))
        anchors = self.anchors.expand(regressed.shape[0], -1, -1).flatten(0, 1)
        boxes = decode_box_outputs(regressed.flatten(0, 1), anchors, output_xyxy=True)
        return boxes.view_as(regressed), logits.sigmoid().unflatten(1, (-1, self.config.num_classes))
