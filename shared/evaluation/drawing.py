"""Draw boxes, masks and keypoints on images, as pixels or as PDF."""

from __future__ import annotations

import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin
from pycocotools import mask as coco_mask

from shared.data.annotations import ImageRecord, rows_of
from shared.evaluation.detections import Detections, as_rle
from shared.evaluation.lettering import Color, color_of, lettering, on_color, runs_of

MADE_BY = "detection-on-determined"  # PNG's "Software": `predict` skips such a file
LARGEST_SIDE = 4000  # pixels of a picture
_MASK_OPACITY = 0.45
_LEAST_KEYPOINT_SCORE = 0.05
_MARGIN = 8  # pixels between the images of a page

# --- what is drawn


@dataclass
class Objects:
    """N objects to draw on an image, in its pixels. Later ones cover earlier ones.

    Attributes:
        boxes: (N, 4) x1 y1 x2 y2. Pixel i reaches from i to i + 1.
        labels: N, for the colors.
        names, endings: N each, the two parts of the captions. A long caption loses letters of its name.
        masks: N COCO RLE dicts, or None for an object without one.
        keypoints: (N, K, 3) x, y and whether the point exists. Whole numbers are the centers of pixels.
        skeletons: by label, the pairs of keypoints that a line joins, counted from 0.
    """

    boxes: np.ndarray
    labels: Sequence[int]
    names: Sequence[str]
    endings: Sequence[str]
    masks: Sequence[dict | None] | None = None
    keypoints: np.ndarray | None = None
    skeletons: Sequence[Sequence[tuple[int, int]]] = ()

    def only(self, rows: Sequence[int] | np.ndarray) -> Objects:
        """Some of the objects, in the order of `rows`."""
        return rows_of(self, rows, ("boxes", "labels", "names", "endings", "masks", "keypoints"))

    def limbs(self, i: int) -> Iterator[np.ndarray]:
        """(2, 2) x y of the two ends of each line of the skeleton. Both ends exist."""
        points = self.keypoints[i]
        for pair in self.skeletons[self.labels[i]]:
            if max(pair) < len(points) and points[list(pair), 2].all():
                yield points[list(pair), :2] + 0.5

    def joints(self, i: int) -> np.ndarray:
        """(points, 2) x y of the keypoints that exist."""
        points = self.keypoints[i]
        return points[points[:, 2] > 0, :2] + 0.5


def objects_of_detections(detections: Detections, categories: Sequence[dict], min_score: float | np.ndarray) -> Objects:
    """The detections with a score of at least `min_score`, the best score last.

    Args:
        categories: COCO categories by label. "skeleton" holds pairs of keypoints, counted from 1.
        min_score: for all categories, or (K,) by label. No detection reaches nan.
    """
    points = detections.keypoints
    if points is not None:
        points = np.dstack([points[..., :2], points[..., 2] > _LEAST_KEYPOINT_SCORE])
    numbers = [""] * len(detections)
    if detections.track_ids is not None:
        numbers = [f" #{number}" if number >= 0 else "" for number in detections.track_ids.tolist()]
    shown = np.flatnonzero(detections.reach(min_score))
    return Objects(
        boxes=detections.boxes,
        labels=detections.labels.tolist(),
        names=[str(categories[label]["name"]) for label in detections.labels.tolist()],
        endings=[f"{a} {score:.2f}" for a, score in zip(numbers, detections.scores.tolist(), strict=True)],
        masks=detections.masks,
        keypoints=points,
        skeletons=_skeletons(categories),
    ).only(shown[np.argsort(detections.scores[shown], kind="stable")])


def objects_of_truth(
    record: ImageRecord, categories: Sequence[dict], with_masks: bool = False, with_keypoints: bool = False
) -> Objects:
    """The annotated objects. Crowds are below the others, with “(crowd)” in their captions."""
    masks = [_fillable(segmentation, record) for segmentation in record.segmentations] if with_masks else None
    return Objects(
        boxes=record.boxes,
        labels=record.labels.tolist(),
        names=[str(categories[label]["name"]) for label in record.labels.tolist()],
        endings=[" (crowd)" if crowd else "" for crowd in record.iscrowd],
        masks=masks,
        keypoints=record.keypoints if with_keypoints else None,
        skeletons=_skeletons(categories),
    ).only(np.argsort(~record.iscrowd, kind="stable"))


def _skeletons(categories: Sequence[dict]) -> list[list[tuple[int, int]]]:
    return [[(a - 1, b - 1) for a, b in category.get("skeleton") or ()] for category in categories]


def _fillable(segmentation: list | dict | None, record: ImageRecord) -> dict | None:
    """COCO's polygons or RLE as compressed RLE; None if there is no area to fill."""
    if isinstance(segmentation, list):  # a polygon has three points or more
        segmentation = [polygon for polygon in segmentation if isinstance(polygon, list) and len(polygon) >= 6]
    try:
        return as_rle(segmentation, record.height, record.width) if segmentation else None
    except (TypeError, ValueError, KeyError):  # `check` reports what is wrong with it
        return None


# --- on pixels


def draw(image: Image.Image, objects: Objects, scale: float = 1.0) -> Image.Image:
    """A copy of the image, `scale` times as large, with the objects on it. Lines and letters fit its size."""
    picture = with_masks(image, objects, scale)
    scales = np.divide(picture.size, image.size)  # not quite `scale`: a picture has whole pixels
    boxes = np.asarray(objects.boxes, dtype=np.float64) * np.tile(scales, 2)
    colors, line = [color_of(label) for label in objects.labels], line_width(picture)
    for box, color in zip(boxes.tolist(), colors, strict=True):
        _draw_box(picture, box, color, line)
    if objects.keypoints is not None:
        for i, color in enumerate(colors):
            limbs = [ends * scales for ends in objects.limbs(i)]
            _draw_keypoints(picture, objects.joints(i) * scales, limbs, color, line)
    captions, taken = [], []
    for i in reversed(range(len(boxes))):  # the last object chooses first
        caption = _caption(objects.names[i], objects.endings[i], picture.size, colors[i])
        left, top = _place_of_caption(boxes[i].tolist(), caption.size, picture.size, line, taken)
        taken.append((left, top, left + caption.width, top + caption.height))
        captions.append((caption, (left, top)))
    for caption, place in reversed(captions):
        picture.paste(caption, place)
    return picture


def with_masks(image: Image.Image, objects: Objects, scale: float) -> Image.Image:
    """A copy of the image, `scale` times as large, with the objects' masks alone."""
    size = tuple(max(round(side * scale), 1) for side in image.size)
    picture = image.convert("RGB")
    if size != image.size:
        filter_ = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
        picture = picture.resize(size, filter_, reducing_gap=2.0)
    for mask, label in zip(objects.masks or (), objects.labels, strict=False):
        if mask is not None:
            _draw_mask(picture, mask, color_of(label), np.divide(size, image.size))
    return picture


def line_width(picture: Image.Image) -> float:
    """Pixels, for a picture of this size."""
    return max(max(picture.size) / 400, 2)


def letter_size(size: tuple[int, int]) -> int:
    """Pixels from line to line, for a picture of this size."""
    return max(round(max(size) / 62), 9)


def _draw_mask(picture: Image.Image, mask: dict, color: Color, scales: np.ndarray) -> None:
    box, inside = coco_mask.toBbox(mask), coco_mask.decode(mask)
    left, top = np.floor(box[:2] * scales).astype(int).tolist()
    right, bottom = np.ceil((box[:2] + box[2:]) * scales).astype(int).tolist()
    columns = ((np.arange(left, right) + 0.5) / scales[0]).astype(int).clip(0, inside.shape[1] - 1)
    rows = ((np.arange(top, bottom) + 0.5) / scales[1]).astype(int).clip(0, inside.shape[0] - 1)
    if len(rows) and len(columns):
        opacity = np.ascontiguousarray(inside[rows[:, None], columns]) * np.uint8(round(255 * _MASK_OPACITY))
        picture.paste(color, (left, top), Image.fromarray(opacity))


def _draw_box(picture: Image.Image, box: Sequence[float], color: Color, line: float) -> None:
    """Draw lines whose middle is on the edges of the box. A pixel gets as much color as a line covers of it."""
    (x1, y1, x2, y2), half = box, line / 2
    for edge in (x1, x2):
        _fill(picture, (edge - half, y1 - half, edge + half, y2 + half), color)
    for edge in (y1, y2):  # between the others
        _fill(picture, (x1 + half, edge - half, x2 - half, edge + half), color)


def _fill(picture: Image.Image, area: tuple[float, float, float, float], color: Color) -> None:
    x1, y1, x2, y2 = np.clip(area, 0, [*picture.size, *picture.size]).tolist()
    if x2 > x1 and y2 > y1:
        opacity = np.rint(255 * _covered(y1, y2)[:, None] * _covered(x1, x2)).astype(np.uint8)
        picture.paste(color, (int(x1), int(y1)), Image.fromarray(opacity))


def _covered(start: float, end: float) -> np.ndarray:
    """The share of each pixel, from `int(start)` on, that is between both."""
    pixels = np.arange(int(start), math.ceil(end))
    return (np.minimum(pixels + 1, end) - np.maximum(pixels, start)).clip(0, 1)


def _draw_keypoints(
    picture: Image.Image, joints: np.ndarray, limbs: Sequence[np.ndarray], color: Color, line: float
) -> None:
    if not len(joints):
        return
    smooth = 4 if max(picture.size) < 1600 else 1  # lines of larger pictures look smooth enough
    radius = 1.6 * line
    left, top = np.floor(joints.min(axis=0) - radius - 1).astype(int).tolist()
    right, bottom = np.ceil(joints.max(axis=0) + radius + 1).astype(int).tolist()
    size = ((right - left) * smooth, (bottom - top) * smooth)
    colored, white = Image.new("L", size), Image.new("L", size)
    for ends in limbs:
        points = [tuple(point) for point in ((ends - (left, top)) * smooth).tolist()]
        ImageDraw.Draw(colored).line(points, fill=255, width=max(round(line * smooth), 1))
    for center in (joints - (left, top)) * smooth:
        for layer, reach in ((colored, radius * smooth), (white, (radius - line / 2) * smooth)):
            ImageDraw.Draw(layer).ellipse([*(center - reach), *(center + reach)], fill=255)
    for layer, fill in ((colored, color), (white, (255, 255, 255))):
        picture.paste(fill, (left, top), layer.reduce(smooth))


def _fitting(text: Callable[[int], str], length: int, letters: int, width: int) -> Image.Image:
    """The lettering of `text(kept)`, with the most letters kept that fit the width."""
    kept, picture = length, lettering(text(length), letters)
    while picture.width > width and kept > 1:
        kept = max(min(kept - 1, int(kept * width / picture.width)), 1)
        picture = lettering(text(kept), letters)
    return picture


def _caption(name: str, ending: str, size: tuple[int, int], color: Color) -> Image.Image:
    """The text on its color, not wider than a picture of that size."""
    letters = letter_size(size)
    border = max(letters // 8, 1)

    def text(kept: int) -> str:
        return name + ending if kept == len(name) else f"{name[:kept].rstrip()}…{ending}"

    written = _fitting(text, len(name), letters, size[0] - 2 * border)
    caption = Image.new("RGB", (written.width + 2 * border, written.height), color)
    caption.paste(on_color(color), (border, 0), written)
    return caption.crop((0, 0, *np.minimum(caption.size, size).tolist()))


def _place_of_caption(
    box: Sequence[float],
    caption: tuple[int, int],
    picture: tuple[int, int],
    line: float,
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int]:
    """The place in the picture that hides the least of other captions: above the box, in it or below it."""
    (x1, y1, x2, y2), half, (width, height) = box, line / 2, caption
    above, in_top, in_bottom, below = y1 - half - height, y1 + half, y2 - half - height, y2 + half
    start, end = x1 - half, x2 + half - width
    places = []
    for x, y in ((start, above), (start, in_top), (end, above), (start, below), (start, in_bottom), (end, below)):
        left, top = round(min(max(x, 0), picture[0] - width)), round(min(max(y, 0), picture[1] - height))
        # moved into the picture, it would cover the object that it names
        hidden = round(abs(top - y)) * width if y in (above, below) else 0
        for x1, y1, x2, y2 in taken:
            hidden += max(min(left + width, x2) - max(left, x1), 0) * max(min(top + height, y2) - max(top, y1), 0)
        if hidden == 0:
            return left, top
        places.append((hidden, (left, top)))
    return min(places, key=lambda place: place[0])[1]


# --- pictures and files


def picture_of(
    image: Image.Image, detections: Detections, categories: Sequence[dict], min_score: float | np.ndarray = 0.3
) -> Image.Image:
    """The image with the detections that have a score of at least `min_score`, each with its category and score.

    An image with more than 4,000 pixels on a side is drawn smaller.

    Args:
        categories, min_score: see `objects_of_detections`.
    """
    return draw(image, objects_of_detections(detections, categories, min_score), _scale(image))


def save_picture_of(
    path: Path,
    image: Image.Image,
    detections: Detections,
    categories: Sequence[dict],
    min_score: float | np.ndarray = 0.3,
) -> None:
    """Save `picture_of` as PNG or, if the path ends so, as PDF. Lines and letters of a PDF stay sharp."""
    if path.suffix == ".pdf":
        _write_pdf(path, image, objects_of_detections(detections, categories, min_score), _scale(image))
    else:
        save(picture_of(image, detections, categories, min_score), path)


def _scale(image: Image.Image) -> float:
    return min(LARGEST_SIDE / max(image.size), 1.0)


def _write_pdf(path: Path, image: Image.Image, objects: Objects, scale: float) -> None:
    """Write a page of `scale` times the image's pixels at 72 per inch. Masks are pixels."""
    # here, because every run loads this module, and hardly any writes a PDF
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Rectangle

    pixels = with_masks(image, objects, scale)
    figure = Figure(figsize=(pixels.width / 72, pixels.height / 72), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(pixels, extent=(0, image.width, image.height, 0), aspect="auto", interpolation="none")
    axes.set(xlim=(0, image.width), ylim=(image.height, 0))
    axes.set_axis_off()
    line, letters = line_width(pixels), letter_size(pixels.size)
    for i, (x1, y1, x2, y2) in enumerate(objects.boxes.tolist()):
        rgb = color_of(objects.labels[i])
        color, contrast = ([level / 255 for level in each] for each in (rgb, on_color(rgb)))
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=line))
        if objects.keypoints is not None:
            for ends in objects.limbs(i):
                axes.plot(*ends.T, color=color, linewidth=line)
            axes.scatter(*objects.joints(i).T, s=(2 * line) ** 2, color="white", edgecolors=[color], zorder=3)
        text = objects.names[i] + objects.endings[i]
        axes.text(
            min(max(x1, 0), image.width),
            max(y1, 0),
            text.replace("$", r"\$"),
            color=contrast,
            font=FontProperties(fname=runs_of(text)[0][0], size=0.8 * letters),
            verticalalignment="bottom" if y1 * scale > 1.5 * letters else "top",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 1},
            clip_on=True,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # `runs_of` has logged it
        figure.savefig(path, format="pdf")


def side_by_side(
    samples: Sequence[tuple[Image.Image, ImageRecord, Detections]],
    categories: Sequence[dict],
    min_score: float = 0.3,
    width: int = 1400,
) -> Image.Image:
    """A page, `width` pixels wide, with a row per sample: the ground truth on the left, the detections on the right."""
    cells = []
    for image, record, found in samples:
        truth = objects_of_truth(record, categories, found.masks is not None, found.keypoints is not None)
        cells.append((image, truth, f"ground truth, {_title(record)}"))
        detected = objects_of_detections(found, categories, min_score)
        cells.append((image, detected, f"detections of score ≥ {min_score:g}, {_title(record)}"))
    return _page(cells, 2, width)


def page_of_truth(
    samples: Sequence[tuple[Image.Image, ImageRecord]], categories: Sequence[dict], width: int = 1800
) -> Image.Image:
    """A page of images with their annotated boxes, masks and keypoints, three per row."""
    cells = [(image, objects_of_truth(record, categories, True, True), _title(record)) for image, record in samples]
    return _page(cells, 3, width)


def _title(record: ImageRecord) -> str:
    return f"{record.file_name}, id {record.image_id}"


def _page(cells: Sequence[tuple[Image.Image, Objects, str]], columns: int, width: int) -> Image.Image:
    """Cells of equal width: an image, and its title above. The highest image of a row sets the row's height."""
    room = (width - _MARGIN) // columns - _MARGIN  # for an image
    letters = letter_size((room, room))
    rows, y = [], _MARGIN
    for start in range(0, len(cells), columns):
        row = []
        for image, objects, title in cells[start : start + columns]:
            # a long title loses its beginning: the end of a path tells more
            text = lambda kept, title=title: title if kept == len(title) else f"…{title[-kept:]}"  # noqa: E731
            row.append((_fitting(text, len(title), letters, room), draw(image, objects, room / max(image.size))))
        rows.append((y, row))
        y += max(title.height + picture.height for title, picture in row) + _MARGIN
    page = Image.new("RGB", (width, y), "white")
    for y, row in rows:
        for column, (title, picture) in enumerate(row):
            x = _MARGIN + column * (room + _MARGIN)
            page.paste((0, 0, 0), (x, y), title)
            page.paste(picture, (x + (room - picture.width) // 2, y + title.height))
    return page


def save(picture: Image.Image, path: str | os.PathLike) -> None:
    """Save a picture in the format of the path's ending. A PNG is marked for `is_drawn`."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MADE_BY)
    # for photographs a higher level saves a few percent and takes five times as long
    fast = {"compress_level": 1, "compress_type": zlib.Z_RLE, "pnginfo": mark}
    picture.save(path, **(fast if Path(path).suffix == ".png" else {}))


def is_drawn(image: Image.Image) -> bool:
    """Whether an opened file is a picture that `save` wrote."""
    return image.info.get("Software") == MADE_BY
