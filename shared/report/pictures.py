"""The pictures of a report: the truth beside what was detected, small enough for a page."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shared.data.annotations import CocoAnnotations, ImageRecord
from shared.data.checks import refuse_names_outside
from shared.data.images import BadImageError, read_image
from shared.data.storage import DiskImages, ImageStorage
from shared.evaluation.detections import Detections
from shared.evaluation.drawing import Objects, draw, objects_of_detections, objects_of_truth
from shared.report.analysis import Analyses
from shared.report.image_errors import Wrong
from shared.report.suspects import Suspect

_PANEL = 360  # pixels, of the longer side
_GAP = 6
_QUALITY = 72
_CONTEXT = 0.6  # of a box's size, around it on each side


def open_pictures(images: ImageStorage | str | os.PathLike | None, annotations: CocoAnnotations) -> ImageStorage | None:
    """Where a page's pictures come from: a folder is checked as the data of a training is.

    Raises:
        UserError: an image's name leads out of the folder, or the folder holds a link out of it.
    """
    if images is None or not isinstance(images, (str, os.PathLike)):
        return images
    opened = DiskImages(Path(images).absolute())
    refuse_names_outside(annotations, f"--images ({images})", opened.folder)
    opened.look(annotations.file_names)
    return opened


def picture_of_errors(
    analyses: Analyses, images: ImageStorage, index: int, wrong: Sequence[Wrong], min_score: float
) -> str | None:
    """The truth beside the wrong detections; of objects that are not found, these beside all detections. None where
    the image cannot be read."""
    annotations = analyses.annotations
    record = annotations[index]
    image = _read(images, record)
    if image is None:
        return None
    found = analyses.detections.get(index) or Detections(record.image_id, [], [], [])
    with_masks, with_keypoints = found.masks is not None, found.keypoints is not None
    first = int(annotations.columns["offsets"][index])
    missed = [one.annotation - first for one in wrong if one.detection is None]
    if missed:
        truth = record.only(missed)
        right = objects_of_detections(found, annotations.categories, min_score)
    else:
        truth = record
        right = objects_of_detections(_only(found, [one.detection for one in wrong]), annotations.categories, -np.inf)
    left = objects_of_truth(truth, annotations.categories, with_masks, with_keypoints)
    scale = min(_PANEL / max(image.size), 1.0)
    return _as_data(_beside(draw(image, left, scale), draw(image, right, scale)))


def picture_of_suspect(analyses: Analyses, images: ImageStorage, suspect: Suspect) -> str | None:
    """What is annotated around the place beside what was detected there."""
    annotations = analyses.annotations
    record = annotations[suspect.image]
    image = _read(images, record)
    if image is None:
        return None
    categories = annotations.categories
    truth = objects_of_truth(record, categories)
    detected = Objects(
        boxes=suspect.box[None],
        labels=[suspect.label],
        names=[annotations.category_names[suspect.label]],
        endings=[f" {suspect.score:.2f}"],
    )
    box = suspect.box.astype(float)
    around = _CONTEXT * max(box[2] - box[0], box[3] - box[1])
    left, top = max(int(box[0] - around), 0), max(int(box[1] - around), 0)
    right, bottom = min(int(box[2] + around) + 1, image.width), min(int(box[3] + around) + 1, image.height)
    if right - left < 1 or bottom - top < 1:
        return None
    crop = image.crop((left, top, right, bottom))
    scale = _PANEL / max(crop.size) / 1.5
    crop = crop.resize([max(round(side * scale), 1) for side in crop.size])
    panels = [draw(crop, _moved(objects, left, top, scale, crop.size)) for objects in (truth, detected)]
    return _as_data(_beside(*panels))


def picture_of_difference(a: Analyses, b: Analyses, images: ImageStorage, index: int) -> str | None:
    """The truth, and what each of two detectors finds with its best threshold."""
    annotations = a.annotations
    record = annotations[index]
    image = _read(images, record)
    if image is None:
        return None
    found = [of.detections.get(index) or Detections(record.image_id, [], [], []) for of in (a, b)]
    thresholds = [np.inf if math.isnan(of.best_threshold) else of.best_threshold for of in (a, b)]
    with_masks = any(each.masks is not None for each in found)
    panels = [objects_of_truth(record, annotations.categories, with_masks)]
    panels += [
        objects_of_detections(each, annotations.categories, threshold)
        for each, threshold in zip(found, thresholds, strict=True)
    ]
    scale = min(_PANEL / max(image.size), 1.0)
    return _as_data(_beside(*(draw(image, objects, scale) for objects in panels)))


def _only(found: Detections, rows: Sequence[int]) -> Detections:
    rows = list(rows)
    return Detections(
        found.image_id,
        found.boxes[rows],
        found.scores[rows],
        found.labels[rows],
        masks=None if found.masks is None else [found.masks[row] for row in rows],
        keypoints=None if found.keypoints is None else found.keypoints[rows],
    )


def _moved(objects: Objects, left: int, top: int, scale: float, size: tuple[int, int]) -> Objects:
    """On a part of the image; boxes that do not reach into it are left out."""
    boxes = (np.asarray(objects.boxes, np.float64) - [left, top, left, top]) * scale
    inside = np.flatnonzero((boxes[:, 2:] > 0).all(axis=1) & (boxes[:, :2] < size).all(axis=1))
    return Objects(
        boxes=boxes[inside].clip(0, np.tile(size, 2)),
        labels=[objects.labels[i] for i in inside],
        names=[objects.names[i] for i in inside],
        endings=[objects.endings[i] for i in inside],
    )


def _read(images: ImageStorage, record: ImageRecord) -> Image.Image | None:
    try:
        return read_image(images, record.file_name, (record.width, record.height))
    except BadImageError:
        return None


def _beside(*panels: Image.Image) -> Image.Image:
    width = sum(panel.width for panel in panels) + _GAP * (len(panels) - 1)
    page = Image.new("RGB", (width, max(panel.height for panel in panels)), "white")
    x = 0
    for panel in panels:
        page.paste(panel, (x, 0))
        x += panel.width + _GAP
    return page


def _as_data(picture: Image.Image) -> str:
    """A URL that is the picture itself."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
