"""`data.fast_images`: torchvision decodes and PyTorch resizes, to nearly the pixels of Pillow.

PyTorch's antialiased resize of uint8 uses Pillow's filters with coarser coefficients. Few pixels differ, by 1 of 255
and seldom by 2.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import ExifTags, Image
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from shared.data.images import Box, decode_rgb, in_two_steps, needed_rows

MODES = {Image.BILINEAR: "bilinear", Image.BICUBIC: "bicubic"}  # the filters that both have
_REDUCTIONS = (8, 4, 2)  # of libjpeg
_MIN_REDUCED = 2  # times the wanted size: the difference would show below


def decode(data: bytes, wanted: tuple[int, int] | Callable[[int, int], tuple[int, int]] | None = None) -> np.ndarray:
    """The image of `plain_bytes`, (height, width, 3) uint8 RGB, rotated as its EXIF orientation says.

    Args:
        wanted: (width, height) that it will be resized to. A JPEG whose sides divide evenly is decoded at a half, a
            quarter or an eighth of its size, if that is at least twice the wanted size. Or a function from its
            (width, height) to that.

    Raises:
        OSError, SyntaxError and others: it cannot be decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            if plain and image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                wanted = wanted(*image.size) if callable(wanted) else wanted
                reduction = _reduction(image.size, wanted) if wanted else 1
                if reduction > 1:
                    image.draft(image.mode, (image.width // reduction, image.height // reduction))
                    return np.asarray(image.convert("RGB"))
                try:
                    encoded = torch.from_numpy(np.frombuffer(data, np.uint8))
                    return decode_jpeg(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()
                except (RuntimeError, AttributeError):  # torchvision has no libjpeg, or cannot read what Pillow can
                    pass
    return np.asarray(decode_rgb(data))


def _reduction(size: tuple[int, int], wanted: tuple[int, int]) -> int:
    for reduction in _REDUCTIONS:
        fits = all(side % reduction == 0 for side in size)
        if fits and all(side >= _MIN_REDUCED * reduction * to for side, to in zip(size, wanted, strict=True)):
            return reduction
    return 1


def resize(pixels: np.ndarray, size: tuple[int, int], resample: int = Image.BILINEAR) -> np.ndarray:
    """`Image.resize`: (H, W, 3) uint8 to `size`, (width, height), filtered where it shrinks."""
    return resize_visible(pixels, size, (0, 0, *size), resample)


def resize_visible(pixels: np.ndarray, size: tuple[int, int], box: Box, resample: int) -> np.ndarray:
    """The part `box` (left, top, right, bottom) of the image (H, W, 3) uint8 resized to `size`, (width, height)."""
    (width, height), (left, top, right, bottom) = size, box
    if resample not in MODES:
        return np.asarray(Image.fromarray(pixels).resize(size, resample).crop(box))
    image, mode = _tensor(pixels), MODES[resample]
    if not in_two_steps(image.shape[2], size, box):
        return _pixels(_interpolated(image, size, mode)[..., top:bottom, left:right])
    first, last = needed_rows(image.shape[2], height, (top, bottom), resample)
    wide = _interpolated(image[:, :, first:last], (width, last - first), mode)
    tall = torch.zeros((1, image.shape[2], right - left, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    tall[:, :, first:last] = wide[..., left:right]
    return _pixels(_interpolated(tall, (right - left, height), mode)[:, :, top:bottom])


def flipped(pixels: np.ndarray, transposition: int | None) -> np.ndarray:
    """(H, W, 3) after Pillow's FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM or ROTATE_180; unchanged for None."""
    axes = {None: [], Image.FLIP_LEFT_RIGHT: [3], Image.FLIP_TOP_BOTTOM: [2], Image.ROTATE_180: [2, 3]}[transposition]
    return _pixels(_tensor(pixels).flip(axes)) if axes else pixels


def _interpolated(image: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    if image.shape[2:] == size[::-1]:
        return image
    return functional.interpolate(image, size=size[::-1], mode=mode, antialias=True, align_corners=False)


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    """(1, 3, H, W) with channels last, also by its first stride, which PyTorch resizes fastest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about read-only arrays; nothing writes to them
        return torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)


def _pixels(image: torch.Tensor) -> np.ndarray:
    return image[0].permute(1, 2, 0).numpy()
