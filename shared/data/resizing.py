"""Resizing with Pillow where a crop follows: the same bits, without most of the pixels that the crop throws away."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the resized image

_SUPPORT = {Image.BILINEAR: 1, Image.HAMMING: 1, Image.BICUBIC: 2, Image.LANCZOS: 3}
_MOST = 0.75  # of the resized image: less is not worth two steps


def resize_visible(image: Image.Image, size: tuple[int, int], box: Box, resample: int) -> Image.Image:
    """`image.resize(size, resample).crop(box)`, bit for bit; `size` is (width, height).

    Where an image becomes higher, every Pillow resizes each row, rounds to 8 bits, then resizes each column: the rows
    are independent of each other, and so are the columns.
    """
    (width, height), (left, top, right, bottom) = size, box
    if not in_two_steps(image.height, size, box):
        resized = image.resize(size, resample)
        return resized if box == (0, 0, *size) else resized.crop(box)
    first, last = needed_rows(image.height, height, (top, bottom), resample)
    wide = image.crop((0, first, image.width, last)).resize((width, last - first), resample)
    tall = Image.new(image.mode, (right - left, image.height))
    tall.paste(wide.crop((left, 0, right, last - first)), (0, first))
    return tall.resize((right - left, height), resample).crop((0, top, right - left, bottom))


def in_two_steps(height: int, size: tuple[int, int], box: Box) -> bool:
    """Whether an image of that height becomes higher, and much of it is thrown away."""
    left, top, right, bottom = box
    return height < size[1] and (right - left) * (bottom - top) < _MOST * size[0] * size[1]


def needed_rows(height: int, to: int, rows: tuple[int, int], resample: int) -> tuple[int, int]:
    """From which row and up to which one of an image of that height the rows of the one that is resized to the height
    `to` are made."""
    scale = height / to
    reach = _SUPPORT[resample] * max(scale, 1) + 2
    first, last = math.floor((rows[0] + 0.5) * scale - reach), math.ceil((rows[1] - 0.5) * scale + reach)
    return max(first, 0), min(last, height)


def planes_of(image: Image.Image) -> list[np.ndarray]:
    """The red, green and blue of an RGB image, (height, width) uint8 each, not to be written to."""
    shape = image.height, image.width
    return [np.frombuffer(image.tobytes("raw", channel), np.uint8).reshape(shape) for channel in "RGB"]
