"""Where the pixels and the objects of an image go on a canvas: a flip, a crop and a scale in one step.

A placement maps whole pixels to whole pixels. So boxes, masks and keypoints follow the pixels without rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from shared.data import fast_images
from shared.data.annotations import ImageRecord

Size = tuple[int, int]  # width, height
Color = tuple[int, int, int]
Drawn = tuple[np.ndarray, ImageRecord]  # (H, W, 3) uint8 RGB, and its objects

_TRANSPOSITIONS = {
    (False, False): None,
    (True, False): Image.FLIP_LEFT_RIGHT,
    (False, True): Image.FLIP_TOP_BOTTOM,
    (True, True): Image.ROTATE_180,
}
LEAST_VISIBLE = 0.1  # the share of a box that must remain; a smaller rest says little about the object


@dataclass(frozen=True)
class Layout:
    """How a detector fits images into its input.

    Attributes:
        fit: from the (width, height) of an image to the size that it has in the input.
        size: (width, height) of the input; None if the input is what `fit` returns.
        fill: the color around images, RGB.
    """

    fit: Callable[[int, int], Size]
    size: Size | None = None
    fill: Color = (0, 0, 0)

    def canvas(self, width: int, height: int) -> Size:
        """The size of the input for an image of this size."""
        return self.size or self.fit(width, height)


@dataclass
class Picture:
    """A decoded image.

    Attributes:
        pixels: (h, w, 3) uint8, RGB.
        reduction: pixels of the file per decoded pixel, along each side.
    """

    pixels: np.ndarray
    reduction: int = 1

    @property
    def size(self) -> Size:
        """(width, height) of the decoded pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]


@dataclass(frozen=True)
class Placement:
    """The part `source` of a decoded image, flipped and resized to the part `target` of a canvas.

    Attributes:
        source: left, top, right, bottom in decoded pixels.
        target: left, top, right, bottom in pixels of the canvas.
        reduction: factor by which the decoded image is smaller.
        flips: whether it is flipped along x and y.
    """

    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]
    reduction: int = 1
    flips: tuple[bool, bool] = (False, False)

    @property
    def size(self) -> Size:
        """(width, height) of the part of the canvas."""
        left, top, right, bottom = self.target
        return right - left, bottom - top

    @functools.cached_property
    def _line(self) -> tuple[np.ndarray, np.ndarray]:
        """The factors and the offsets, along x and y, from pixels of the file to pixels of the canvas."""
        (x1, y1, x2, y2), (left, top, right, bottom) = self.source, self.target
        factor = np.array([(right - left) / (x2 - x1), (bottom - top) / (y2 - y1)])
        offset = (left, top) - factor * (x1, y1)
        offset = np.where(self.flips, np.array([left + right, top + bottom]) - offset, offset)
        return np.where(self.flips, -factor, factor) / self.reduction, offset

    def points(self, points: np.ndarray) -> np.ndarray:
        """(N, 2) x y in pixels of the file as pixels of the canvas."""
        factor, offset = self._line
        return np.asarray(points, dtype=np.float64) * factor + offset

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) x1 y1 x2 y2, as `points`."""
        corners = self.points(boxes.reshape(-1, 2)).reshape(-1, 2, 2)
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)

    def draw(self, picture: Picture, canvas: np.ndarray) -> None:
        """Draws the pixels on the canvas, (H, W, 3) uint8."""
        x1, y1, x2, y2 = self.source
        part = fast_images.resize(picture.pixels[y1:y2, x1:x2], self.size)
        left, top, right, bottom = self.target
        canvas[top:bottom, left:right] = fast_images.flipped(part, _TRANSPOSITIONS[self.flips])

    def mask(self, segmentation: list | dict, size: Size, canvas: Size) -> np.ndarray:
        """(H, W) uint8 on the canvas, of COCO's polygons or RLE on an image of `size`."""
        whole = np.zeros(canvas[::-1], dtype=np.uint8)
        left, top, right, bottom = self.target
        width, height = self.size
        if isinstance(segmentation, list):
            moved = [self.points(np.reshape(each, (-1, 2))) - (left, top) for each in segmentation if len(each) >= 6]
            if moved:
                rles = coco_mask.frPyObjects([points.ravel().tolist() for points in moved], height, width)
                whole[top:bottom, left:right] = coco_mask.decode(coco_mask.merge(rles))
            return whole
        inside = decoded_rle(segmentation)
        columns, rows = (self._sources(axis, count) for axis, count in enumerate((width, height)))
        columns, rows = columns.clip(0, size[0] - 1), rows.clip(0, size[1] - 1)
        whole[top:bottom, left:right] = inside[rows[:, None], columns]
        return whole

    def _sources(self, axis: int, count: int) -> np.ndarray:
        """(count,) the pixel of the file under the center of each pixel of the target along an axis."""
        start, end = self.source[axis], self.source[axis + 2]
        at = (np.arange(count) + 0.5) / count
        at = 1 - at if self.flips[axis] else at
        return ((start + at * (end - start)) * self.reduction).astype(int)

    def record(
        self, record: ImageRecord, canvas: Size, masks: bool, mirrored: Sequence[np.ndarray] | None = None
    ) -> ImageRecord:
        """The objects that are visible on the canvas, cut at the part's edges.

        Args:
            masks: carry the segmentations along; else the result has none.
            mirrored: by label, the order of the keypoints in a mirrored image.
        """
        whole = self.boxes(record.boxes)
        cut = whole.reshape(-1, 2, 2).clip(self.target[:2], self.target[2:]).reshape(-1, 4)
        sides, whole_sides = cut[:, 2:] - cut[:, :2], whole[:, 2:] - whole[:, :2]
        visible = sides.prod(axis=1) / whole_sides.prod(axis=1).clip(1e-9)
        kept = np.flatnonzero((visible >= LEAST_VISIBLE) & (sides.min(axis=1, initial=np.inf) >= 1))
        raw = [b""] * len(kept)
        if masks:
            size, segmentations = (record.width, record.height), record.segmentations
            raw = [b"" if segmentations[i] is None else as_raw(self.mask(segmentations[i], size, canvas)) for i in kept]
        labels, keypoints = record.labels[kept], record.keypoints
        return ImageRecord(
            image_id=record.image_id,
            file_name=record.file_name,
            height=canvas[1],
            width=canvas[0],
            boxes=cut[kept].astype(np.float32),
            labels=labels,
            areas=(record.areas[kept] * visible[kept] * np.abs(self._line[0].prod())).astype(np.float32),
            iscrowd=record.iscrowd[kept],
            file_boxes=np.concatenate([cut[kept, :2], sides[kept]], axis=1),
            raw_segmentations=raw,
            keypoints=None if keypoints is None else self._keypoints(keypoints[kept], labels, mirrored),
        )

    def _keypoints(self, points: np.ndarray, labels: np.ndarray, mirrored: Sequence[np.ndarray] | None) -> np.ndarray:
        """(N, K, 3) on the canvas; points that are not labeled or not visible are zeros."""
        if mirrored is not None and self.flips[0] != self.flips[1] and len(points):
            points = np.stack([of[mirrored[label]] for of, label in zip(points, labels, strict=True)])
        at = self.points(points[..., :2].reshape(-1, 2)).reshape(points[..., :2].shape)
        inside = ((at >= self.target[:2]) & (at <= self.target[2:])).all(axis=-1) & (points[..., 2] > 0)
        return np.where(inside[..., None], np.concatenate([at, points[..., 2:]], axis=-1), 0.0)


def with_boxes(record: ImageRecord, boxes: np.ndarray, canvas: Size) -> ImageRecord:
    """The record with other boxes (N, 4) x1 y1 x2 y2, on an image of another size."""
    file_boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    return dataclasses.replace(
        record, width=canvas[0], height=canvas[1], boxes=boxes.astype(np.float32), file_boxes=file_boxes
    )


def joined(records: Sequence[ImageRecord]) -> ImageRecord:
    """The first record with the objects of all of them, which are on one canvas."""
    arrays = {
        name: np.concatenate([getattr(record, name) for record in records])
        for name in ("boxes", "labels", "areas", "iscrowd", "file_boxes")
    }
    if all(record.keypoints is not None for record in records):
        arrays["keypoints"] = np.concatenate([record.keypoints for record in records])
    raw = [segmentation for record in records for segmentation in record.raw_segmentations]
    return dataclasses.replace(records[0], raw_segmentations=raw, **arrays)


def decoded_rle(rle: dict) -> np.ndarray:
    """(h, w) uint8 of COCO's RLE, compressed or not."""
    if isinstance(rle["counts"], list):
        rle = coco_mask.frPyObjects(rle, *rle["size"])
    return coco_mask.decode(rle)


def as_raw(mask: np.ndarray) -> bytes:
    """The JSON text of a mask, (H, W) uint8, as COCO's compressed RLE. It is empty for an empty mask."""
    if not mask.any():
        return b""
    rle = coco_mask.encode(np.asfortranarray(mask))
    return json.dumps({"size": rle["size"], "counts": rle["counts"].decode()}).encode()


def mirrored_keypoints(categories: Sequence[dict]) -> list[np.ndarray]:
    """By label, the order of keypoints in a mirrored image: `left_eye` and `right_eye` change places."""
    orders = []
    for category in categories:
        names = list(category.get("keypoints") or ())
        others = [_other_side(name) for name in names]
        found = [names.index(other) if other in names else i for i, other in enumerate(others)]
        orders.append(np.array(found, dtype=np.int64))
    return orders


def _other_side(name: str) -> str:
    for side, other in (("left", "right"), ("right", "left"), ("Left", "Right"), ("Right", "Left")):
        if side in name:
            return name.replace(side, other)
    return name


def filled(canvas: Size, color: Color) -> np.ndarray:
    """(H, W, 3) uint8 of one color."""
    pixels = np.empty((canvas[1], canvas[0], 3), dtype=np.uint8)
    pixels[0] = color
    pixels[1:] = pixels[0]  # 30 times as fast as all pixels at once
    return pixels
