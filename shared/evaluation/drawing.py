"""Boxes, masks, keypoints and captions drawn on an image's pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from shared.data.annotations import ImageRecord
from shared.evaluation.colors import Color, color_of, on_color
from shared.evaluation.detections import Detections
from shared.evaluation.lettering import lettering

MASK_OPACITY = 0.45
_KEYPOINT_SCORE = 0.05
_SIDE_OF_SMOOTH_LIMBS = 1600  # pixels; in larger pictures they are smooth enough


@dataclass
class Objects:
    """What is drawn of an image: N objects, in its own pixels.

    Attributes:
        boxes: (N, 4) x1 y1 x2 y2, pixel i reaches from i to i + 1.
        labels: N, which give the colours.
        names, endings: N each, of the captions: where a caption is too long, the name is cut.
        masks: N of COCO's RLE dicts, None where there is none.
        keypoints: (N, K, 3), x y and whether it is there; whole numbers are the pixels' centres.
        skeletons: by label, pairs of keypoints that are joined, from 0 on.
    """

    boxes: np.ndarray
    labels: list[int]
    names: list[str]
    endings: list[str]
    masks: Sequence[dict | None] | None = None
    keypoints: np.ndarray | None = None
    skeletons: Sequence[Sequence[tuple[int, int]]] = ()

    def limbs(self, i: int) -> Iterator[np.ndarray]:
        """(2, 2) x y of the ends of each limb whose ends are both there."""
        points = self.keypoints[i]
        for pair in self.skeletons[self.labels[i]]:
            if max(pair) < len(points) and points[list(pair), 2].all():
                yield points[list(pair), :2] + 0.5

    def joints(self, i: int) -> np.ndarray:
        """(points, 2) x y of those that are there."""
        points = self.keypoints[i]
        return points[points[:, 2] > 0, :2] + 0.5


def objects_of_detections(detections: Detections, categories: Sequence[dict], min_score: float) -> Objects:
    """The detections of at least `min_score`, the surest last, over the others.

    Args:
        categories: COCO categories by label; "skeleton", pairs of keypoints from 1 on, says which are joined.
    """
    keep = np.flatnonzero(detections.scores >= min_score)
    keep = keep[np.argsort(detections.scores[keep], kind="stable")]
    labels = detections.labels[keep].tolist()
    points = None if detections.keypoints is None else detections.keypoints[keep].copy()
    if points is not None:
        points[..., 2] = points[..., 2] > _KEYPOINT_SCORE
    return Objects(
        boxes=detections.boxes[keep],
        labels=labels,
        names=[str(categories[label]["name"]) for label in labels],
        endings=[f" {score:.2f}" for score in detections.scores[keep].tolist()],
        masks=None if detections.masks is None else [detections.masks[i] for i in keep],
        keypoints=points,
        skeletons=_skeletons(categories),
    )


def objects_of_truth(
    record: ImageRecord, categories: Sequence[dict], with_masks: bool = False, with_keypoints: bool = False
) -> Objects:
    """The annotated objects; a crowd says so, and lies below the others."""
    order = np.argsort(~record.iscrowd, kind="stable")
    labels = record.labels[order].tolist()
    segmentations = record.segmentations if with_masks else None
    return Objects(
        boxes=record.boxes[order],
        labels=labels,
        names=[str(categories[label]["name"]) for label in labels],
        endings=[" (crowd)" if crowd else "" for crowd in record.iscrowd[order]],
        masks=None if segmentations is None else [_rle(segmentations[i], record) for i in order],
        keypoints=record.keypoints[order] if with_keypoints and record.keypoints is not None else None,
        skeletons=_skeletons(categories),
    )


def _skeletons(categories: Sequence[dict]) -> list[list[tuple[int, int]]]:
    return [[(a - 1, b - 1) for a, b in category.get("skeleton") or ()] for category in categories]


def _rle(segmentation: list | dict | None, record: ImageRecord) -> dict | None:
    """COCO's polygons or RLE as compressed RLE, None where there is nothing that can be filled."""
    if isinstance(segmentation, list):  # a polygon has three points or more
        segmentation = [polygon for polygon in segmentation if isinstance(polygon, list) and len(polygon) >= 6]
    if not segmentation:
        return None
    try:
        if isinstance(segmentation["counts"] if isinstance(segmentation, dict) else None, (str, bytes)):
            return segmentation
        rles = coco_mask.frPyObjects(segmentation, record.height, record.width)
    except (TypeError, ValueError, KeyError):  # to be drawn it need not be right: `check` says what is wrong
        return None
    return coco_mask.merge(rles) if isinstance(rles, list) else rles


def draw(image: Image.Image, objects: Objects, scale: float = 1.0) -> Image.Image:
    """The image, `scale` times as large, with the objects on it; lines and letters are as large as fits the picture."""
    picture = with_masks(image, objects, scale)
    scales = _scales(picture, image)
    boxes = np.asarray(objects.boxes, dtype=np.float64) * np.tile(scales, 2)
    colors = [color_of(label) for label in objects.labels]
    line = line_width(picture.size)
    for box, color in zip(boxes.tolist(), colors, strict=True):
        _draw_box(picture, box, color, line)
    if objects.keypoints is not None:
        for i, color in enumerate(colors):
            _draw_keypoints(picture, objects, i, color, scales, line)
    captions, taken = [], []
    for i in reversed(range(len(boxes))):  # the surest has the best place
        caption = _caption(objects.names[i], objects.endings[i], picture.size, colors[i])
        left, top = _place_of_caption(boxes[i].tolist(), caption.size, picture.size, line, taken)
        taken.append((left, top, left + caption.width, top + caption.height))
        captions.append(caption)
    for caption, (left, top, *_) in reversed([*zip(captions, taken, strict=True)]):  # and lies over the others
        picture.paste(caption, (left, top))
    return picture


def with_masks(image: Image.Image, objects: Objects, scale: float) -> Image.Image:
    """A new image, `scale` times as large, with the objects' masks alone."""
    size = tuple(max(round(side * scale), 1) for side in image.size)
    if size == image.size:
        picture = image.convert("RGB")
        picture = picture.copy() if picture is image else picture
    else:
        how = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
        picture = image.convert("RGB").resize(size, how, reducing_gap=2.0)
    scales = _scales(picture, image)
    for mask, label in zip(objects.masks or (), objects.labels, strict=False):
        if mask is not None:
            _draw_mask(picture, mask, color_of(label), scales)
    return picture


def _scales(picture: Image.Image, image: Image.Image) -> np.ndarray:
    """x and y: a picture has whole pixels."""
    return np.array([picture.width / image.width, picture.height / image.height])


def line_width(size: tuple[int, int]) -> float:
    """Pixels, in a picture of this size."""
    return max(max(size) / 400, 2)


def letter_size(size: tuple[int, int]) -> int:
    """Pixels from line to line, nearly, in a picture of this size."""
    return max(round(max(size) / 62), 9)


def _draw_mask(picture: Image.Image, mask: dict, color: Color, scales: np.ndarray) -> None:
    x, y, width, height = coco_mask.toBbox(mask).tolist()
    inside = coco_mask.decode(mask)
    left, top = (int(v) for v in np.array([x, y]) * scales)
    right, bottom = (math.ceil(v) for v in np.array([x + width, y + height]) * scales)
    columns = ((np.arange(left, right) + 0.5) / scales[0]).astype(int).clip(0, inside.shape[1] - 1)
    rows = ((np.arange(top, bottom) + 0.5) / scales[1]).astype(int).clip(0, inside.shape[0] - 1)
    if len(rows) and len(columns):
        opacity = np.ascontiguousarray(inside[rows[:, None], columns]) * np.uint8(round(255 * MASK_OPACITY))
        picture.paste(color, (left, top), Image.fromarray(opacity))


def _draw_box(picture: Image.Image, box: Sequence[float], color: Color, line: float) -> None:
    """Lines with their middle on the box's edges, a pixel as much as they cover of it."""
    (x1, y1, x2, y2), half = box, line / 2
    for edge in (x1, x2):
        _fill(picture, (edge - half, y1 - half, edge + half, y2 + half), color)
    for edge in (y1, y2):  # between the others
        _fill(picture, (x1 + half, edge - half, x2 - half, edge + half), color)


def _fill(picture: Image.Image, area: tuple[float, float, float, float], color: Color) -> None:
    x1, y1, x2, y2 = (max(value, 0) for value in area)
    x2, y2 = min(x2, picture.width), min(y2, picture.height)
    if x2 <= x1 or y2 <= y1:
        return
    left, top = int(x1), int(y1)
    across, down = _covered(x1, x2), _covered(y1, y2)
    opacity = np.rint(255 * down[:, None] * across).astype(np.uint8)
    picture.paste(color, (left, top), Image.fromarray(opacity))


def _covered(start: float, end: float) -> np.ndarray:
    """How much of each pixel from `int(start)` on lies between both."""
    pixels = np.arange(int(start), math.ceil(end))
    return (np.minimum(pixels + 1, end) - np.maximum(pixels, start)).clip(0, 1)


def _draw_keypoints(
    picture: Image.Image, objects: Objects, i: int, color: Color, scales: np.ndarray, line: float
) -> None:
    joints = objects.joints(i) * scales
    if not len(joints):
        return
    smooth = 4 if max(picture.size) < _SIDE_OF_SMOOTH_LIMBS else 1
    radius = 1.6 * line
    left, top = (int(v) for v in np.floor(joints.min(axis=0) - radius - 1))
    right, bottom = (int(v) for v in np.ceil(joints.max(axis=0) + radius + 1))

    def fill(fill_color: Color, paint: Callable[[ImageDraw.ImageDraw], None]) -> None:
        layer = Image.new("L", ((right - left) * smooth, (bottom - top) * smooth))
        paint(ImageDraw.Draw(layer))
        picture.paste(fill_color, (left, top), layer.reduce(smooth) if smooth > 1 else layer)

    def at(points: np.ndarray) -> list[tuple[float, float]]:
        return [tuple(point) for point in ((points - (left, top)) * smooth).tolist()]

    def dots(drawn: ImageDraw.ImageDraw, size: float) -> None:
        for x, y in at(joints):
            drawn.ellipse((x - size * smooth, y - size * smooth, x + size * smooth, y + size * smooth), fill=255)

    def lines_and_rims(drawn: ImageDraw.ImageDraw) -> None:
        for ends in objects.limbs(i):
            drawn.line(at(ends * scales), fill=255, width=max(round(line * smooth), 1))
        dots(drawn, radius)

    fill(color, lines_and_rims)
    fill((255, 255, 255), lambda drawn: dots(drawn, radius - line / 2))


def _caption(name: str, ending: str, size: tuple[int, int], color: Color) -> Image.Image:
    """The text on its colour, no wider than the picture."""
    letters = letter_size(size)
    border = max(letters // 8, 1)
    text = lettering(name + ending, letters)
    kept = len(name)
    while text.width + 2 * border > size[0] and kept > 1:
        kept = max(min(kept - 1, int(kept * size[0] / text.width)), 1)
        text = lettering(f"{name[:kept].rstrip()}…{ending}", letters)
    caption = Image.new("RGB", (text.width + 2 * border, text.height), color)
    caption.paste(on_color(color), (border, 0), text)
    return caption.crop((0, 0, *(min(a, b) for a, b in zip(caption.size, size, strict=True))))


def _place_of_caption(
    box: Sequence[float],
    caption: tuple[int, int],
    picture: tuple[int, int],
    line: float,
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int]:
    """Above the box, or else in it or below it, where no other caption is; in the picture in any case."""
    (x1, y1, x2, y2), half = box, line / 2
    width, height = caption
    above, in_top, in_bottom, below = y1 - half - height, y1 + half, y2 - half - height, y2 + half
    starts, ends = x1 - half, x2 + half - width
    best: tuple[int, tuple[int, int]] | None = None
    for x, y in ((starts, above), (starts, in_top), (ends, above), (starts, below), (starts, in_bottom), (ends, below)):
        left = round(min(max(x, 0), picture[0] - width))
        top = round(min(max(y, 0), picture[1] - height))
        moved = round(abs(top - y)) * width if y in (above, below) else 0  # it would cover what it names
        hidden = moved + sum(
            max(min(left + width, right) - max(left, other_left), 0)
            * max(min(top + height, bottom) - max(top, other_top), 0)
            for other_left, other_top, right, bottom in taken
        )
        if best is None or hidden < best[0]:
            best = (hidden, (left, top))
        if hidden == 0:
            break
    return best[1]
