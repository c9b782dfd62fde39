"""Detections and ground truth drawn on images: a picture each, side by side, a page of them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, PngImagePlugin

from shared.data.annotations import ImageRecord
from shared.evaluation.detections import Detections
from shared.evaluation.drawing import Objects, draw, letter_size, objects_of_detections, objects_of_truth
from shared.evaluation.lettering import lettering

MADE_BY = "detection-on-determined"  # PNG's "Software": such a picture is no image to detect on
_MOST_PIXELS = 4000  # on a side of a picture; larger images are drawn smaller
_MARGIN = 8


def picture_of(
    image: Image.Image, detections: Detections, categories: Sequence[dict], min_score: float = 0.3
) -> Image.Image:
    """The image with the boxes (masks, keypoints) of at least `min_score`, each labelled with category and score; one
    of more than 4,000 pixels a side is made smaller.

    Args:
        categories: COCO categories by label; "skeleton", pairs of keypoints from 1 on, says which are joined.
    """
    return draw(image, objects_of_detections(detections, categories, min_score), _scale(image))


def save_picture_of(
    path: Path, image: Image.Image, detections: Detections, categories: Sequence[dict], min_score: float = 0.3
) -> None:
    """`picture_of` as a file, PNG or PDF by the path's ending; in a PDF lines and letters stay sharp."""
    if path.suffix == ".pdf":
        from shared.evaluation.vector_drawing import write_pdf  # matplotlib's figures take half a second to import

        write_pdf(path, image, objects_of_detections(detections, categories, min_score), _scale(image))
    else:
        save(picture_of(image, detections, categories, min_score), path)


def side_by_side(
    samples: Sequence[tuple[Image.Image, ImageRecord, Detections]],
    categories: Sequence[dict],
    min_score: float = 0.3,
    width: int = 1400,
) -> Image.Image:
    """A row a sample, `width` pixels wide: the ground truth on the left, the detections on the right."""
    cells = []
    for image, record, found in samples:
        truth = objects_of_truth(record, categories, found.masks is not None, found.keypoints is not None)
        detected = objects_of_detections(found, categories, min_score)
        cells.append((image, truth, f"ground truth, {_named(record)}"))
        cells.append((image, detected, f"detections of score ≥ {min_score:g}, {_named(record)}"))
    return _grid(cells, 2, width)


def page_of_truth(
    samples: Sequence[tuple[Image.Image, ImageRecord]], categories: Sequence[dict], width: int = 1800
) -> Image.Image:
    """Images with their annotated boxes, masks and keypoints, three a row."""
    return _grid(
        [
            (image, objects_of_truth(record, categories, with_masks=True, with_keypoints=True), _named(record))
            for image, record in samples
        ],
        3,
        width,
    )


def save(picture: Image.Image, path: str | os.PathLike) -> None:
    """As a file of the kind that the path's ending says; a PNG is marked as drawn, see `is_drawn`."""
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", MADE_BY)
    # of photographs higher levels save some hundredths and take five times as long; runs alone save a fifth and time
    fast = {"compress_level": 1, "compress_type": zlib.Z_RLE, "pnginfo": about}
    picture.save(path, **(fast if Path(path).suffix == ".png" else {}))


def is_drawn(image: Image.Image) -> bool:
    """Whether an opened file is a picture that `save` has written."""
    return image.info.get("Software") == MADE_BY


def _scale(image: Image.Image) -> float:
    return min(_MOST_PIXELS / max(image.size), 1.0)


def _named(record: ImageRecord) -> str:
    return f"{record.file_name}, id {record.image_id}"


def _grid(cells: Sequence[tuple[Image.Image, Objects, str]], columns: int, width: int) -> Image.Image:
    """Cells of equal width, each an image with its title above; a row is as high as its highest image."""
    room = (width - _MARGIN) // columns - _MARGIN  # for an image
    letters = letter_size((room, room))
    pictures = []
    for image, objects, title in cells:
        # an image that is high is made as small as one that is square
        pictures.append((draw(image, objects, room / max(image.size)), _title(title, letters, room)))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(title.height + picture.height for picture, title in row) + _MARGIN for row in rows]
    page = Image.new("RGB", (width, sum(heights) + _MARGIN), "white")
    y = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, (picture, title) in enumerate(row):
            x = _MARGIN + column * (room + _MARGIN)
            page.paste((0, 0, 0), (x, y), title)
            page.paste(picture, (x + (room - picture.width) // 2, y + title.height))
        y += height
    return page


def _title(text: str, letters: int, room: int) -> Image.Image:
    """The text, its beginning left out where it is too long: a path's end says more."""
    title, kept = lettering(text, letters), len(text)
    while title.width > room and kept > 1:
        kept = min(kept - 1, int(kept * room / title.width))
        title = lettering("…" + text[-kept:], letters)
    return title
