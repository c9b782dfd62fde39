"""How a DatasetMapper resizes and flips: the pixels that Detectron2 makes without most of the copies, or those of
`data.fast_images`."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data.transforms import AugInput, AugmentationList, ResizeTransform, Transform, TransformList
from fvcore.transforms.transform import HFlipTransform
from PIL import Image

from shared.data import fast_images
from shared.data.images import planes_of

logger = logging.getLogger(__name__)


def with_quick_resizing(mapper: Any, fast: bool) -> Any:
    """The mapper, or where it is one of Detectron2's with a list of augmentations a copy that resizes quicker.

    Args:
        fast: by `shared.data.fast_images`; else bit for bit.
    """
    augmentations = getattr(mapper, "augmentations", None)
    if not isinstance(mapper, DatasetMapper) or type(augmentations) is not AugmentationList:
        if fast:
            logger.warning(
                "data.fast_images does nothing for %s, which is not Detectron2's DatasetMapper", type(mapper).__name__
            )
        return mapper
    mapper = copy.copy(mapper)
    mapper.augmentations = QuickAugmentations(augmentations, fast)
    return mapper


class QuickAugmentations(AugmentationList):
    """The given augmentations on an input that resizes and flips by itself. What they draw, and the transforms that
    move boxes and masks, are theirs."""

    def __init__(self, augmentations: AugmentationList, fast: bool):
        super().__init__(augmentations.augs)
        self.fast = fast

    def __call__(self, aug_input: AugInput) -> TransformList:
        if type(aug_input) is not AugInput:
            return super().__call__(aug_input)
        own = _Input(aug_input, self.fast)
        transforms = super().__call__(own)
        aug_input.image, aug_input.boxes, aug_input.sem_seg = own.image, own.boxes, own.sem_seg
        return transforms


class _Input(AugInput):
    def __init__(self, given: AugInput, fast: bool):
        super().__init__(given.image, boxes=given.boxes, sem_seg=given.sem_seg)
        self.fast = fast

    def transform(self, tfm: Transform) -> None:
        image = self.image
        in_color = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        if in_color and type(tfm) is ResizeTransform:
            self.image = _resized(image, (tfm.new_w, tfm.new_h), tfm.interp, self.fast)
        elif in_color and type(tfm) is HFlipTransform:
            self.image = _flipped(image)
        else:
            super().transform(tfm)
            return
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)
        if self.sem_seg is not None:
            self.sem_seg = tfm.apply_segmentation(self.sem_seg)


def _flipped(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of any strides, left to right; NumPy would leave a view that takes long to copy."""
    planes = image.transpose(2, 0, 1)
    if planes.flags.c_contiguous:
        return torch.from_numpy(planes).flip(2).numpy().transpose(1, 2, 0)
    reverse = image.strides[2] < 0
    straight = np.ascontiguousarray(image[:, :, ::-1] if reverse else image)
    flipped = fast_images.flipped(straight, Image.FLIP_LEFT_RIGHT)
    return flipped[:, :, ::-1] if reverse else flipped


def _resized(image: np.ndarray, size: tuple[int, int], interp: int, fast: bool) -> np.ndarray:
    """(H, W, 3) uint8 of any strides to `size`, (width, height)."""
    # BGR is a view of Pillow's RGB, with which Pillow and PyTorch are quicker
    reverse = image.strides[2] < 0
    straight = image[:, :, ::-1] if reverse else image
    if fast:
        resized = fast_images.resize(np.ascontiguousarray(straight), size, interp)
        channels = [resized[:, :, channel] for channel in range(3)]
    else:
        channels = planes_of(Image.fromarray(straight).resize(size, interp))
    planes = np.empty((3, size[1], size[0]), np.uint8)  # as the mapper hands them on, which then copies nothing
    for plane, channel in zip(planes, channels[::-1] if reverse else channels, strict=True):
        plane[:] = channel
    return planes.transpose(1, 2, 0)
