"""`data.augment` on training images: each sample is a function of (seed, epoch, image).

Flips, scales, crops and mosaics decide where the pixels go before any pixel moves. So each image is resized once.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from shared.config.augment import Augment
from shared.data import fast_images
from shared.data.annotations import ImageRecord
from shared.data.augment.placement import (
    Drawn,
    Layout,
    Picture,
    Placement,
    Size,
    as_raw,
    decoded_rle,
    filled,
    joined,
    with_boxes,
)
from shared.data.dataset import Loaded, SampleKey

Other = Callable[[int], Loaded | None]

_CACHE_BYTES = 192 * 2**20  # of decoded images, per process
_MOSAIC_CENTER = (0.3, 0.7)  # the range of the point where the four images meet, as a share of the canvas
_MOSAIC_SCALE = (0.4, 1.0)  # the range of the size of an image in a mosaic, as a share of its size alone
_CROPPED = (0.3, 1.0)  # the range of the sides of a crop, as a share of the image's


def span(
    source: tuple[int, int], length: float, room: tuple[int, int], side: float, at: float
) -> tuple[int, int, int, int]:
    """Fits a part of an image, which would have `length` pixels on the canvas, into a room of the canvas.

    Args:
        source: the first and last pixel of the part.
        room: the first and last pixel of the room.
        side: where a shorter part lies in the room, from 0 to 1.
        at: which piece of a longer part is shown, from 0 to 1.

    Returns:
        The first and last pixel of the image, and those of the canvas where they go.
    """
    space, pixels = room[1] - room[0], source[1] - source[0]
    if length <= space:
        shown = min(max(round(length), 1), space)
        first = room[0] + round(side * (space - shown))
        return (*source, first, first + shown)
    shown = min(max(round(pixels * space / length), 1), pixels)
    start = source[0] + round(at * (pixels - shown))
    return (start, start + shown, *room)


@dataclass(eq=False)
class DataAugmenter:
    """Changes images and records as `data.augment` says.

    A record on a canvas has boxes, labels, crowds and keypoints. It has masks if `masks` is set.

    Attributes:
        settings: the section.
        layout: how the detector fits images into its input.
        last_epoch: the first epoch of `off_for_last`; None for no such epoch.
        mirrored: by label, the order of the keypoints in a mirrored image.
        masks: carry the segmentations along.
    """

    settings: Augment
    layout: Layout
    last_epoch: int | None = None
    mirrored: Sequence[np.ndarray] | None = None
    masks: bool = False

    def __post_init__(self) -> None:
        self.cache: OrderedDict[int, Loaded] = OrderedDict()
        self.cached_bytes = 0
        self.named = None
        if self.settings.transforms:
            from shared.data.augment.named import NamedTransforms  # importing torchvision's transforms takes a while

            self.named = NamedTransforms(self.settings.named_transforms, self.layout)

    def __reduce__(self):
        # loader workers that are not forked begin with an empty cache
        return DataAugmenter, (self.settings, self.layout, self.last_epoch, self.mirrored, self.masks)

    def with_masks(self) -> DataAugmenter:
        """The same changes, with masks on the records."""
        return dataclasses.replace(self, masks=True)

    # --- what the data set calls ----------------------------------------------------------------------

    def decode(self, data: bytes) -> np.ndarray:
        """The pixels of an image file, at a fraction of their number if the input is much smaller."""
        return np.ascontiguousarray(fast_images.decode(data, self.layout.fit))

    def loaded(self, index: int, load: Callable[[int], Loaded]) -> tuple[Picture, ImageRecord]:
        """The decoded image and its record, which may be cached."""
        if index in self.cache:
            self.cache.move_to_end(index)
            return self.cache[index]
        pixels, record = load(index)
        found = Picture(pixels, max(record.width // pixels.shape[1], 1)), record
        if self.settings.others:
            self.cache[index] = found
            self.cached_bytes += pixels.nbytes
            while self.cached_bytes > _CACHE_BYTES and len(self.cache) > 1:
                _, (oldest, _) = self.cache.popitem(last=False)
                self.cached_bytes -= oldest.pixels.nbytes
        return found

    def __call__(
        self, image: Picture, record: ImageRecord, key: SampleKey, seed: int, other: Other, count: int
    ) -> Drawn:
        is_last = self.last_epoch is not None and key.epoch >= self.last_epoch
        settings = self.settings.at_the_end if is_last else self.settings
        rng = np.random.default_rng([seed, *key.seeds, 5])
        return _Sample(self, settings, rng, list(key.others), other, count).drawn(image, record)


@dataclass(eq=False)
class _Sample:
    """The changes of one sample.

    Attributes:
        others: the images to combine it with, in a fixed order: draws do not depend on other switches.
    """

    augmenter: DataAugmenter
    settings: Augment
    rng: np.random.Generator
    others: list[int]
    other: Other
    count: int

    def drawn(self, image: Picture, record: ImageRecord) -> Drawn:
        settings, rng = self.settings, self.rng
        chances = settings.mosaic, settings.mixup, settings.copy_paste, settings.erase
        of_mosaic, mixes, pastes, erases = rng.random(4) < chances
        self.masks = self.augmenter.masks or bool(pastes)
        canvas = self.augmenter.layout.canvas(record.width, record.height)
        compose = self._mosaic if of_mosaic else self._alone
        drawn = compose(image, record, canvas)
        if pastes and (found := self._other()) is not None:
            drawn = paste_objects(drawn, self._alone(*found, canvas), rng)
        if mixes and (found := self._other()) is not None:
            drawn = mix(drawn, self._alone(*found, canvas), rng)
        pixels, changed = drawn
        if settings.color:
            pixels = change_color(pixels, settings.color, rng)
        if settings.transforms:
            pixels, changed = self.augmenter.named(pixels, changed, int(rng.integers(2**31)))
        if erases:
            pixels = erase(pixels, rng)
        return pixels, changed

    def _other(self) -> tuple[Picture, ImageRecord] | None:
        index = self.others.pop() if self.others else int(self.rng.integers(self.count))
        return self.other(index)

    def _scale(self) -> float:
        low, high = np.log(self.settings.scale)
        return float(np.exp(self.rng.uniform(low, high)))

    def _alone(self, image: Picture, record: ImageRecord, canvas: Size) -> Drawn:
        """The image on a canvas of its own: cropped, scaled, flipped, and somewhere on it."""
        window = (0, 0, *image.size)
        if self.rng.random() < self.settings.crop:
            window = self._crop(image, record)
        scale = self._scale()
        is_plain = window == (0, 0, *image.size) and scale == 1
        side = np.zeros(2) if is_plain else self.rng.random(2)  # as the detector places an image that is not scaled
        room = (0, 0, *canvas)
        return self._composed([(image, record, self._placed(image, window, scale, room, side))], canvas)

    def _mosaic(self, image: Picture, record: ImageRecord, canvas: Size) -> Drawn:
        """The image and three others in the corners of a canvas. They meet in one point."""
        x, y = (np.array(canvas) * self.rng.uniform(*_MOSAIC_CENTER, 2)).round().astype(int).tolist()
        rooms = [(0, 0, x, y), (x, 0, canvas[0], y), (0, y, x, canvas[1]), (x, y, *canvas)]
        sides = [(1, 1), (0, 1), (1, 0), (0, 0)]
        images = [(image, record)]
        images += [found for _ in range(3) if (found := self._other()) is not None]
        parts = []
        for corner, (each, of_each) in zip(self.rng.permutation(4), images, strict=False):
            scale = self._scale() * self.rng.uniform(*_MOSAIC_SCALE)
            placed = self._placed(each, (0, 0, *each.size), scale, rooms[corner], np.array(sides[corner]))
            parts.append((each, of_each, placed))
        return self._composed(parts, canvas)

    def _placed(
        self, image: Picture, window: tuple[int, int, int, int], scale: float, room: tuple, side: np.ndarray
    ) -> Placement:
        size, at = self.augmenter.layout.fit(window[2] - window[0], window[3] - window[1]), self.rng.random(2)
        along_x, along_y = (self.rng.random(2) < (self.settings.flip, self.settings.vertical_flip)).tolist()
        (x1, x2, left, right), (y1, y2, top, bottom) = (
            span(window[axis::2], size[axis] * scale, room[axis::2], side[axis], at[axis]) for axis in (0, 1)
        )
        return Placement((x1, y1, x2, y2), (left, top, right, bottom), image.reduction, (along_x, along_y))

    def _composed(self, parts: Sequence[tuple[Picture, ImageRecord, Placement]], canvas: Size) -> Drawn:
        pixels, records = filled(canvas, self.augmenter.layout.fill), []
        for image, record, placement in parts:
            placement.draw(image, pixels)
            records.append(placement.record(record, canvas, self.masks, self.augmenter.mirrored))
        return pixels, joined(records)

    def _crop(self, image: Picture, record: ImageRecord) -> tuple[int, int, int, int]:
        """A part of the decoded image that keeps one of its objects whole."""
        whole = np.array(image.size)
        sides = (whole * self.rng.uniform(*_CROPPED, 2)).round().astype(int).clip(1)
        kept = np.flatnonzero(~record.iscrowd)
        low, high = np.zeros(2, dtype=int), whole - sides
        if len(kept):
            box = record.boxes[self.rng.choice(kept)] / image.reduction
            first, last = np.floor(box[:2]).astype(int).clip(0), np.minimum(np.ceil(box[2:]).astype(int), whole)
            first = np.minimum(first, last - 1).clip(0)
            sides = np.maximum(sides, last - first)
            low, high = (last - sides).clip(0), np.minimum(first, whole - sides)
        start = self.rng.integers(low, np.maximum(high, low) + 1)
        return (*start.tolist(), *(start + sides).tolist())


# --- the pixels of a canvas, (H, W, 3) uint8 RGB ----------------------------------------------------


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


def mix(one: Drawn, other: Drawn, rng: np.random.Generator) -> Drawn:
    """Both images blended, with the objects of both."""
    blended = Image.blend(Image.fromarray(one[0]), Image.fromarray(other[0]), rng.beta(_MIXING, _MIXING))
    return np.asarray(blended), joined([one[1], other[1]])


def paste_objects(one: Drawn, other: Drawn, rng: np.random.Generator) -> Drawn:
    """Some objects of another image, which lie over those of this one. An object without a mask is pasted as its box.

    Both records carry masks. Crowds are not pasted.
    """
    (pixels, record), (other_pixels, other_record) = one, other
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
