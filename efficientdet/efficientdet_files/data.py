"""From image and record to effdet's inputs and targets."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from effdet.anchors import AnchorLabeler, Anchors
from effdet.data import resolve_input_config
from effdet.data.loader import DetectionFastCollate
from effdet.data.transforms import Compose, RandomFlip, RandomResizePad, ResizePad, resolve_fill_color
from PIL import Image

from efficientdet_hyperparameters import EfficientDetHyperparameters
from shared.data import fast_images, images
from shared.data.annotations import ImageRecord
from shared.data.augment.placement import Layout
from shared.data.images import DECODING_ERRORS, unreadable
from shared.data.loading import Batch

Sample = tuple[np.ndarray, dict[str, Any], int]


def input_config(hparams: EfficientDetHyperparameters, config: Any) -> dict[str, Any]:
    """effdet's input size, interpolation, mean, std and fill color, of the model and the hyperparameters."""
    given = {"interpolation": hparams.interpolation, "fill_color": hparams.fill_color}
    inputs = resolve_input_config(given, model_config=config)
    inputs["fill_color"] = resolve_fill_color(inputs["fill_color"], inputs["mean"])
    return inputs


def layout(inputs: dict[str, Any]) -> Layout:
    """How effdet fits an image into the input: at the upper left, with its aspect ratio."""
    height, width = inputs["input_size"][-2:]
    return Layout(functools.partial(_fitted, width=width, height=height), (width, height), tuple(inputs["fill_color"]))


def _fitted(image_width: int, image_height: int, width: int, height: int) -> tuple[int, int]:
    scale = min(width / image_width, height / image_height)
    return max(int(image_width * scale), 1), max(int(image_height * scale), 1)


class EfficientDetTransform:
    """effdet's augmentation. A sample is (image, target, image id): image (3, H, W) uint8; target as in
    effdet's data set, `bbox` (N, 4) float32 y1 x1 y2 x2 in pixels of the input, `cls` (N,) int64 from 1.

    effdet's own steps draw what is random and move the boxes; the pixels are made once it is known which of them stay.

    Args:
        annotated: give the target boxes also where nothing is augmented.
        fast: take an encoded image, and make its pixels with `shared.data.fast_images`; else a PIL image, with
        effdet's pixels bit for bit.
    """

    def __init__(
        self,
        hparams: EfficientDetHyperparameters,
        inputs: dict[str, Any],
        training: bool,
        annotated: bool = False,
        fast: bool = False,
    ):
        self.size, self.fill_color = inputs["input_size"][-2:], inputs["fill_color"]
        self.training, self.annotated, self.fast = training, training or annotated, fast
        self.pad = PadThin(self.size, hparams.scale_jitter[0] if training else 1.0, self.fill_color)
        if training:
            steps = [
                RandomFlip(horizontal=True, vertical=hparams.vertical_flip, prob=0.5),
                RandomResizePad(self.size, tuple(hparams.scale_jitter), hparams.train_interpolation, self.fill_color),
            ]
        else:
            steps = [ResizePad(self.size, inputs["interpolation"], self.fill_color)]
        self.transform = Compose(steps)

    def __call__(self, image: Image.Image | bytes, record: ImageRecord) -> Sample:
        target: dict[str, Any] = {"img_size": (record.width, record.height)}
        if self.annotated:
            target |= objects_of(record)
        size = self.pad.padded(record.width, record.height)
        plan = Plan(size, self.training)
        _, target = self.transform(plan, target)
        if self.fast:
            pixels = self._fast_pixels(image, record, size, plan)
        else:
            image = self.pad(image)
            image = image if plan.flip is None else image.transpose(plan.flip)
            visible = images.resize_visible(image, plan.scaled, plan.box, plan.resample)
            pixels = images.planes_of(visible)
        return self._filled(pixels), target, record.image_id

    def _fast_pixels(self, data: bytes, record: ImageRecord, size: tuple[int, int], plan: Plan) -> np.ndarray:
        thin = size != (record.width, record.height)
        try:
            pixels = fast_images.decode(data, None if thin else plan.scaled)
        except DECODING_ERRORS as error:
            raise unreadable(record.file_name, f"image id {record.image_id}", error) from error
        if thin:
            pixels = np.asarray(self.pad(Image.fromarray(pixels)))
        pixels = fast_images.flipped(pixels, plan.flip)
        return fast_images.resize_visible(pixels, plan.scaled, plan.box, plan.resample).transpose(2, 0, 1)

    def _filled(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """An input with the three (h, w) planes at its upper left, and the rest in the fill color."""
        height, width = pixels[0].shape
        filled = np.empty((3, *self.size), dtype=np.uint8)
        for plane, of_image, color in zip(filled, pixels, self.fill_color, strict=True):
            plane[:height, :width] = of_image
            plane[height:] = color
            plane[:height, width:] = color
        return filled


def sample_of(pixels: np.ndarray, record: ImageRecord) -> Sample:
    """The sample of a whole input, (H, W, 3) uint8, as `data.augment` makes it."""
    target = {"img_size": (record.width, record.height), "img_scale": 1.0, **objects_of(record)}
    return pixels.transpose(2, 0, 1), target, record.image_id


def objects_of(record: ImageRecord) -> dict[str, np.ndarray]:
    """`bbox` and `cls` of a target. effdet's parser omits crowds and what is under a pixel wide or high."""
    sides = record.boxes[:, 2:] - record.boxes[:, :2]
    keep = ~record.iscrowd & (sides >= 1).all(axis=1)
    return {"bbox": record.boxes[keep][:, [1, 0, 3, 2]], "cls": record.labels[keep] + 1}


class Plan:
    """Stands for an image in effdet's transforms, and keeps what they do to it.

    Args:
        size: (width, height).
        crops: whether they crop what they have resized.

    Attributes:
        flip: Pillow's name of how it is flipped first; None where it is not.
        scaled: (width, height) that it is then resized to, with `resample`.
        box: the part that is kept: left, top, right, bottom in pixels of the resized image.
    """

    def __init__(self, size: tuple[int, int], crops: bool):
        self.size, self.crops = size, crops
        self.flip: int | None = None

    def transpose(self, flip: int) -> Plan:
        self.flip = flip
        return self

    def resize(self, size: tuple[int, int], resample: int) -> Plan | Image.Image:
        self.scaled, self.resample, self.box = size, resample, (0, 0, *size)
        return self if self.crops else _A_PIXEL

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        self.box = box
        return _A_PIXEL


_A_PIXEL = Image.new("RGB", (1, 1))  # for effdet to paste


class PadThin:
    """Pads a banner, below or to the right, until no side of it becomes 0 pixels where effdet resizes it, which fails.

    Args:
        size: (height, width) that the image is fitted into.
        smallest: the least factor of the random scale.
        fill_color: RGB color of the new pixels.
    """

    def __init__(self, size: tuple[int, int], smallest: float, fill_color: tuple[int, int, int]):
        self.size, self.smallest, self.fill_color = size, smallest, fill_color

    def padded(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) that an image of that size has afterwards."""
        scale = min(self.smallest * self.size[0] / height, self.smallest * self.size[1] / width)
        if int(min(width, height) * scale) >= 1:
            return width, height
        least = math.floor(1 / scale) + 1
        return max(width, least), max(height, least)

    def __call__(self, image: Image.Image) -> Image.Image:
        size = self.padded(*image.size)
        if size == image.size:
            return image
        padded = Image.new("RGB", size, color=self.fill_color)
        padded.paste(image)
        return padded


class EfficientDetCollate:
    """effdet's collate function, which labels the anchors too where the loader is to do it."""

    def __init__(self, hparams: EfficientDetHyperparameters, config: Any, training: bool):
        labeler = None
        if training and hparams.labeler == "loader":
            labeler = AnchorLabeler(Anchors.from_config(config), config.num_classes, match_threshold=0.5)
        self.collate = DetectionFastCollate(anchor_labeler=labeler)

    def __call__(self, samples: list[Sample]) -> Batch:
        # effdet's adds each image to zeros; without `out`, the layout of the images would become the batch's
        images = np.empty((len(samples), *samples[0][0].shape), dtype=np.uint8)
        np.stack([image for image, _, _ in samples], out=images)
        _, targets = self.collate([(_NO_PIXELS, target) for _, target, _ in samples])
        return Batch(torch.from_numpy(images), targets, [image_id for _, _, image_id in samples])


_NO_PIXELS = np.zeros(0, dtype=np.uint8)


def normalize(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 to float32; `mean` and `std` (1, 3, 1, 1) on the scale of 0 to 255."""
    return images.float().sub_(mean).div_(std)
