"""From image and record to what the models of transformers take."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from detr_files.masks import masks_of
from shared.data import fast_images
from shared.data.annotations import ImageRecord
from shared.data.augment.placement import Layout
from shared.data.images import DECODING_ERRORS, unreadable
from shared.data.loading import Batch

Sample = tuple[torch.Tensor, dict[str, torch.Tensor], int, tuple[int, int]]


@dataclass(frozen=True)
class DetrTransform:
    """The image processor, and a random flip. A sample is (pixels, labels, image id, size).

    pixels are (3, h, w) float32. labels have `class_labels` (N,) int64 and `boxes` (N, 4) float32: x and y of the
    center, width and height, from 0 to 1 of the image without padding. With masks, they also have `masks` (N, h, w)
    bool. size is the image's own (height, width).

    Attributes:
        processor: an image processor of transformers.
        flip: the probability of a horizontal flip.
        fast: take an encoded image, and decode it with `shared.data.fast_images`; else a PIL image, or (H, W, 3) uint8.
        masks: give the objects' masks. Objects without one are omitted.
    """

    processor: Any
    flip: float = 0.0
    fast: bool = False
    masks: bool = False

    def __call__(self, image: Image.Image | bytes | np.ndarray, record: ImageRecord) -> Sample:
        if self.fast:
            try:
                image = fast_images.decode(image, None)
            except DECODING_ERRORS as error:
                raise unreadable(record.file_name, f"image id {record.image_id}", error) from error
        # padding depends on the other images of the batch
        pixels = self.processor(images=image, do_pad=False, return_tensors="pt")["pixel_values"][0]
        rows = trained_objects(record, self.masks)
        boxes = relative_boxes(record, rows)
        labels = {"class_labels": torch.from_numpy(record.labels[rows]), "boxes": boxes}
        if self.masks:
            labels["masks"] = masks_of(record, rows, tuple(pixels.shape[1:]), self.processor)
        if self.flip and torch.rand(()) < self.flip:
            pixels = pixels.flip(-1)
            boxes[:, 0] = 1 - boxes[:, 0]
            if self.masks:
                labels["masks"] = labels["masks"].flip(-1)
        return pixels, labels, record.image_id, (record.height, record.width)


def layout(processor: Any) -> Layout:
    """How an image processor fits an image into the input."""
    size = (processor.size["width"], processor.size["height"]) if makes_one_size(processor) else None
    return Layout(functools.partial(_resized_size, size=dict(processor.size), resizes=processor.do_resize), size)


def _resized_size(width: int, height: int, size: dict[str, int], resizes: bool) -> tuple[int, int]:
    if not resizes:
        return width, height
    if size.get("height") and size.get("width"):
        return size["width"], size["height"]
    if size.get("max_height"):
        scale = min(size["max_height"] / height, size["max_width"] / width)
    else:
        scale = size["shortest_edge"] / min(width, height)
        if size.get("longest_edge"):
            scale = min(scale, size["longest_edge"] / max(width, height))
    return max(round(width * scale), 1), max(round(height * scale), 1)


def resized(batch: Batch, scale: float, step: int) -> Batch:
    """A batch whose images are `scale` times as large, to a multiple of `step` pixels. Boxes are relative, and stay."""
    size = [max(round(side * scale / step), 1) * step for side in batch.images.shape[2:]]
    images = functional.interpolate(batch.images, size, mode="bilinear", antialias=True)
    mask = batch.targets["mask"]
    if mask is not None:
        mask = functional.interpolate(mask[:, None].float(), size).squeeze(1).to(mask.dtype)
    return replace(batch, images=images, targets={**batch.targets, "mask": mask})


def makes_one_size(processor: Any) -> bool:
    """Whether an image processor resizes all images to one height and width."""
    return processor.do_resize and bool(processor.size.get("height") and processor.size.get("width"))


def trained_objects(record: ImageRecord, masks: bool) -> np.ndarray:
    """Positions of the objects that transformers' image processors keep: no crowds, and some area inside of the image.

    Args:
        masks: omit objects without a mask too.
    """
    boxes = _inside(record)
    keep = ~record.iscrowd & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    if masks:
        keep &= np.array([segmentation is not None for segmentation in record.segmentations], dtype=bool)
    return np.flatnonzero(keep)


def relative_boxes(record: ImageRecord, rows: np.ndarray) -> torch.Tensor:
    """The boxes (N, 4) float32 of some objects, relative to the image, as transformers' image processors compute them:
    cut at the image's border."""
    boxes = _inside(record)[rows]
    low, high = boxes[:, :2], boxes[:, 2:]
    return torch.from_numpy(np.concatenate([(low + high) / 2, high - low], axis=1) / _size(record))


def _inside(record: ImageRecord) -> np.ndarray:
    return np.clip(record.boxes, 0, _size(record))


def _size(record: ImageRecord) -> np.ndarray:
    return np.array([record.width, record.height] * 2, dtype=np.float32)


@dataclass(frozen=True)
class DetrCollate:
    """A batch of samples, padded below and to the right.

    Attributes:
        pad_size: (height, width) to which all images are padded; None for the largest of the batch.
    """

    pad_size: tuple[int, int] | None = None

    @classmethod
    def of(cls, processor: Any) -> DetrCollate:
        """The collate function that pads as an image processor does."""
        size = processor.pad_size if processor.do_pad else None
        return cls(None if size is None else (size["height"], size["width"]))

    def __call__(self, samples: list[Sample]) -> Batch:
        pixels, labels, image_ids, sizes = zip(*samples, strict=True)
        heights, widths = [each.shape[1] for each in pixels], [each.shape[2] for each in pixels]
        height, width = self.pad_size or (max(heights), max(widths))
        mask = None
        if min(heights) < height or min(widths) < width:
            images = torch.zeros(len(pixels), 3, height, width)
            mask = torch.zeros(len(pixels), height, width, dtype=torch.int64)
            for i, each in enumerate(pixels):
                images[i, :, : each.shape[1], : each.shape[2]] = each
                mask[i, : each.shape[1], : each.shape[2]] = 1
            labels = [_padded(of_image, height, width) for of_image in labels]
        else:
            images = torch.stack(pixels)
        targets = {"labels": list(labels), "mask": mask, "sizes": torch.tensor(sizes)}
        return Batch(images, targets, list(image_ids))


def _padded(labels: dict[str, torch.Tensor], height: int, width: int) -> dict[str, torch.Tensor]:
    if "masks" not in labels:
        return labels
    masks = labels["masks"]
    return {**labels, "masks": functional.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1]))}
