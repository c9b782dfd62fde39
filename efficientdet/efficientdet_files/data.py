"""From image and record to effdet's inputs and targets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from effdet.anchors import AnchorLabeler, Anchors
from effdet.data import resolve_input_config
from effdet.data.loader import DetectionFastCollate
from effdet.data.transforms import Compose, ImageToNumpy, RandomFlip, RandomResizePad, ResizePad, resolve_fill_color
from PIL import Image

from efficientdet_hyperparameters import EfficientDetHyperparameters
from shared.data.annotations import ImageRecord
from shared.data.loading import Batch


def input_config(hparams: EfficientDetHyperparameters, config: Any) -> dict[str, Any]:
    """effdet's input size, interpolation, mean, std and fill colour, of the model and the hyperparameters."""
    given = {"interpolation": hparams.interpolation, "fill_color": hparams.fill_color}
    inputs = resolve_input_config(given, model_config=config)
    inputs["fill_color"] = resolve_fill_color(inputs["fill_color"], inputs["mean"])
    return inputs


class EfficientDetTransform:
    """effdet's augmentation. A sample is (image, target, image id): image (3, H, W) uint8; target as in
    effdet's data set, `bbox` (N, 4) float32 y1 x1 y2 x2 in pixels of the input, `cls` (N,) int64 from 1.

    Args:
        annotated: give the target boxes also where nothing is augmented.
    """

    def __init__(
        self, hparams: EfficientDetHyperparameters, inputs: dict[str, Any], training: bool, annotated: bool = False
    ):
        size, fill_color = inputs["input_size"][-2:], inputs["fill_color"]
        self.annotated = training or annotated
        pad = PadThin(size, hparams.scale_jitter[0] if training else 1.0, fill_color)
        if training:
            steps = [
                RandomFlip(horizontal=True, vertical=hparams.vertical_flip, prob=0.5),
                RandomResizePad(size, tuple(hparams.scale_jitter), hparams.train_interpolation, fill_color),
            ]
        else:
            steps = [ResizePad(size, inputs["interpolation"], fill_color)]
        self.transform = Compose([pad, *steps, ImageToNumpy()])

    def __call__(self, image: Image.Image, record: ImageRecord) -> tuple[np.ndarray, dict[str, Any], int]:
        target: dict[str, Any] = {"img_size": (record.width, record.height)}
        if self.annotated:
            # effdet's parser leaves out crowds and what is under a pixel wide or high
            sides = record.boxes[:, 2:] - record.boxes[:, :2]
            keep = ~record.iscrowd & (sides >= 1).all(axis=1)
            target["bbox"] = record.boxes[keep][:, [1, 0, 3, 2]]
            target["cls"] = record.labels[keep] + 1
        image, target = self.transform(image, target)
        return image, target, record.image_id


class PadThin:
    """Pads a banner, below or to the right, until no side of it becomes 0 pixels where effdet resizes it, which fails.

    Args:
        size: (height, width) that the image is fitted into.
        smallest: the least factor of the random scale.
        fill_color: of the new pixels, RGB.
    """

    def __init__(self, size: tuple[int, int], smallest: float, fill_color: tuple[int, int, int]):
        self.size, self.smallest, self.fill_color = size, smallest, fill_color

    def __call__(self, image: Image.Image, target: dict[str, Any]) -> tuple[Image.Image, dict[str, Any]]:
        scale = min(self.smallest * self.size[0] / image.height, self.smallest * self.size[1] / image.width)
        if int(min(image.size) * scale) >= 1:
            return image, target
        least = math.floor(1 / scale) + 1
        padded = Image.new("RGB", (max(image.width, least), max(image.height, least)), color=self.fill_color)
        padded.paste(image)
        return padded, target


class EfficientDetCollate:
    """effdet's collate function, which labels the anchors too where the loader is to do it."""

    def __init__(self, hparams: EfficientDetHyperparameters, config: Any, training: bool):
        labeler = None
        if training and hparams.labeler == "loader":
            labeler = AnchorLabeler(Anchors.from_config(config), config.num_classes, match_threshold=0.5)
        self.collate = DetectionFastCollate(anchor_labeler=labeler)

    def __call__(self, samples: list[tuple[np.ndarray, dict[str, Any], int]]) -> Batch:
        images, targets = self.collate([(image, target) for image, target, _ in samples])
        return Batch(images, targets, [image_id for _, _, image_id in samples])


def normalize(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 to float32; `mean` and `std` (1, 3, 1, 1) on the scale of 0 to 255."""
    return images.float().sub_(mean).div_(std)
