"""Operations on the pixels of a canvas, (H, W, 3) uint8 RGB: color, mixup, copy-paste and erase."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from PIL import Image

from shared.data.annotations import ImageRecord
from shared.data.augment.placement import as_raw, decoded_rle, joined, with_boxes

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.4, 0.4, 0.7, 0.1  # at strength 1; hue in turns
_COLORED = 1 / 5  # the probability that saturation and hue change
_MIDDLE = 128
_BITS = 7
_ONE = 2**_BITS
# luma and two color differences, and back
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_TO_RGB = np.linalg.inv(_TO_YIQ)
_MIXING = 8.0  # of the beta distribution: shares near one half
_PASTED = 0.5  # the probability that an object is pasted
_MOST_HIDDEN = 0.7  # the share of an object's box; an object that is hidden more is omitted
_ERASED = (0.02, 0.15)  # the range of the erased share of an image
_MOST_ERASED = 3  # rectangles


def change_color(pixels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Brightness and contrast change in each image, saturation and hue in a fifth of them.

    Args:
        strength: from 0 to 1.
    """
    most = strength * np.array([_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE])
    change = rng.uniform(-most, most)
    (brightness, contrast, saturation), turn = 1 + change[:3], change[3]
    factor, added = contrast * brightness, _MIDDLE * (1 - contrast) * brightness
    if rng.random() > _COLORED:  # 16-bit fixed-point numbers around the middle take a quarter of the time of a table
        values = torch.from_numpy(pixels).to(torch.int16).sub_(_MIDDLE).mul_(round(factor * _ONE)).add_(_ONE // 2)
        values = values.bitwise_right_shift_(_BITS).add_(round(_MIDDLE * brightness))
        return values.clamp_(0, 255).to(torch.uint8).numpy()
    cos, sin = saturation * np.cos(2 * np.pi * turn), saturation * np.sin(2 * np.pi * turn)
    matrix = factor * _TO_RGB @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _TO_YIQ
    rows = np.concatenate([matrix, np.full((3, 1), added)], axis=1)
    return np.asarray(Image.fromarray(pixels).convert("RGB", tuple(rows.ravel().tolist())))


def mix(
    pixels: np.ndarray,
    record: ImageRecord,
    other_pixels: np.ndarray,
    other_record: ImageRecord,
    rng: np.random.Generator,
) -> tuple[np.ndarray, ImageRecord]:
    """Both images blended, with the objects of both."""
    share = rng.beta(_MIXING, _MIXING)
    blended = Image.blend(Image.fromarray(pixels), Image.fromarray(other_pixels), share)
    return np.asarray(blended), joined([record, other_record])


def paste_objects(
    pixels: np.ndarray,
    record: ImageRecord,
    other_pixels: np.ndarray,
    other_record: ImageRecord,
    rng: np.random.Generator,
) -> tuple[np.ndarray, ImageRecord]:
    """Some objects of another image, which lie over those of this one. An object without a mask is pasted as its box.

    Both records carry masks. Crowds are not pasted.
    """
    chosen = np.flatnonzero(~other_record.iscrowd & (rng.random(len(other_record.boxes)) < _PASTED))
    if not len(chosen):
        return pixels, record
    pasted = other_record.only(chosen)
    over = np.zeros(pixels.shape[:2], dtype=bool)
    for i in range(len(chosen)):
        over |= mask_or_box(pasted, i) > 0
    mixed = np.where(over[..., None], other_pixels, pixels)
    return mixed, joined([without_hidden(record, over), pasted])


def mask_or_box(record: ImageRecord, i: int) -> np.ndarray:
    """(H, W) uint8 of an object; its box if it has no mask."""
    segmentation = record.segmentations[i]
    if segmentation is not None:
        return decoded_rle(segmentation)
    mask = np.zeros((record.height, record.width), dtype=np.uint8)
    left, top, right, bottom = record.boxes[i].round().astype(int).tolist()
    mask[top:bottom, left:right] = 1
    return mask


def without_hidden(record: ImageRecord, over: np.ndarray) -> ImageRecord:
    """The record without what lies under `over`, (H, W) bool. Masks and their boxes become what remains."""
    boxes, raw, kept = record.boxes.copy(), list(record.raw_segmentations), []
    for i, segmentation in enumerate(record.segmentations):
        mask = mask_or_box(record, i)
        hidden = np.logical_and(mask, over).sum()
        if hidden > _MOST_HIDDEN * mask.sum() or hidden == mask.sum():
            continue
        kept.append(i)
        if segmentation is not None and hidden:
            rest = np.where(over, 0, mask).astype(np.uint8)
            rows, columns = np.flatnonzero(rest.any(axis=1)), np.flatnonzero(rest.any(axis=0))
            inside = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)
            boxes[i] = np.concatenate([np.maximum(boxes[i, :2], inside[:2]), np.minimum(boxes[i, 2:], inside[2:])])
            raw[i] = as_raw(rest)
    seen = dataclasses.replace(record, raw_segmentations=raw)
    return with_boxes(seen, boxes, (record.width, record.height)).only(kept)


def erase(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One to three rectangles of random pixels. The objects under them stay."""
    pixels = pixels.copy()
    height, width = pixels.shape[:2]
    for _ in range(rng.integers(1, _MOST_ERASED + 1)):
        area, aspect = rng.uniform(*_ERASED) * width * height, np.exp(rng.uniform(-1, 1))
        erased_width = min(max(round(np.sqrt(area * aspect)), 1), width)
        erased_height = min(max(round(np.sqrt(area / aspect)), 1), height)
        left = rng.integers(0, width - erased_width + 1)
        top = rng.integers(0, height - erased_height + 1)
        noise = rng.integers(0, 256, (erased_height, erased_width, 3), dtype=np.uint8)
        pixels[top : top + erased_height, left : left + erased_width] = noise
    return pixels
