"""The pictures of a report: the truth beside what was detected, small enough for a page."""

from __future__ import annotations

import base64
import dataclasses
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

_PANEL = 360  # pixels of the longer side
_GAP = 6
_CONTEXT = 0.6  # of the size of a box, around it on each side


def open_pictures(images: ImageStorage | str | os.PathLike | None, annotations: CocoAnnotations) -> ImageStorage | None:
    """The source of a page's pictures. A folder is checked as the data of a training is.

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
    analyses: Analyses, images: ImageStorage | None, index: int, wrong: Sequence[Wrong], min_score: float
) -> str | None:
    """The truth beside the wrong detections. Missed objects are beside all detections of at least `min_score`.

    This and the next two return a `data:` URL; None if there is no image that can be read.
    """
    annotations = analyses.annotations
    record = annotations[index]
    found = _found(analyses, index)
    missed = [one.annotation - int(annotations.columns["offsets"][index]) for one in wrong if one.detection is None]
    if missed:
        truth, right = record.only(missed), objects_of_detections(found, annotations.categories, min_score)
    else:
        shown = [one.detection for one in wrong]
        truth, right = record, objects_of_detections(found, annotations.categories, -np.inf, shown)
    left = objects_of_truth(truth, annotations.categories, found.masks is not None, found.keypoints is not None)
    return _panels(images, record, [left, right])


def picture_of_difference(a: Analyses, b: Analyses, images: ImageStorage | None, index: int) -> str | None:
    """The truth, and what each of two detectors finds with its best threshold."""
    annotations = a.annotations
    record = annotations[index]
    found = [_found(of, index) for of in (a, b)]
    thresholds = [np.inf if math.isnan(of.best_threshold) else of.best_threshold for of in (a, b)]
    panels = [objects_of_truth(record, annotations.categories, any(each.masks is not None for each in found))]
    for each, threshold in zip(found, thresholds, strict=True):
        panels.append(objects_of_detections(each, annotations.categories, threshold))
    return _panels(images, record, panels)


def picture_of_suspect(analyses: Analyses, images: ImageStorage | None, suspect: Suspect) -> str | None:
    """The annotations around a place, beside the detection there."""
    annotations = analyses.annotations
    record = annotations[suspect.image]
    detected = Objects(
        boxes=suspect.box[None],
        labels=[suspect.label],
        names=[annotations.category_names[suspect.label]],
        endings=[f" {suspect.score:.2f}"],
    )
    return _panels(images, record, [objects_of_truth(record, annotations.categories), detected], suspect.box)


def _found(analyses: Analyses, index: int) -> Detections:
    return analyses.detections.get(index) or Detections(int(analyses.annotations.image_ids[index]), [], [], [])


def _panels(
    images: ImageStorage | None, record: ImageRecord, panels: Sequence[Objects], around: np.ndarray | None = None
) -> str | None:
    """The image with each of the objects, side by side; only the part around a box, if one is given."""
    if images is None:
        return None
    try:
        image = read_image(images, record.file_name, (record.width, record.height))
    except BadImageError:
        return None
    scale = min(_PANEL / max(image.size), 1.0)
    if around is not None:
        x1, y1, x2, y2 = around.astype(float).tolist()
        margin = _CONTEXT * max(x2 - x1, y2 - y1)
        left, top = max(int(x1 - margin), 0), max(int(y1 - margin), 0)
        right, bottom = min(int(x2 + margin) + 1, image.width), min(int(y2 + margin) + 1, image.height)
        if right <= left or bottom <= top:
            return None
        image = image.crop((left, top, right, bottom))
        scale = _PANEL / max(image.size) / 1.5
        panels = [_on_part(objects, left, top, image.size) for objects in panels]
    drawn = [draw(image, objects, scale) for objects in panels]
    page = Image.new("RGB", (sum(d.width + _GAP for d in drawn) - _GAP, max(d.height for d in drawn)), "white")
    for position, picture in enumerate(drawn):
        page.paste(picture, (position * (picture.width + _GAP), 0))  # all have one size
    buffer = io.BytesIO()
    page.save(buffer, "JPEG", quality=72, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _on_part(objects: Objects, left: int, top: int, size: tuple[int, int]) -> Objects:
    """The objects on a part of the image. Boxes outside of it are omitted."""
    boxes = np.asarray(objects.boxes, np.float64) - [left, top, left, top]
    inside = np.flatnonzero((boxes[:, 2:] > 0).all(axis=1) & (boxes[:, :2] < size).all(axis=1))
    return dataclasses.replace(objects, boxes=boxes.clip(0, np.tile(size, 2))).only(inside)
