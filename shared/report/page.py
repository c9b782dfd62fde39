"""A page: one HTML file from a template, which needs no other file, its pictures, and its numbers as JSON beside it."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import functools
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from shared.data.annotations import CocoAnnotations, ImageRecord
from shared.data.checks import refuse_names_outside
from shared.data.images import BadImageError, read_image
from shared.data.storage import DiskImages, ImageStorage
from shared.durable import write_file
from shared.errors import UserError, check_outputs, unwritable_as_error
from shared.evaluation.detections import Detections
from shared.evaluation.drawing import Objects, draw, objects_of_detections, objects_of_truth
from shared.evaluation.evaluator import for_json
from shared.report.analysis import RESAMPLES, Analyses
from shared.report.image_errors import Suspect, Wrong
from shared.report.plots import DARK, LIGHT, style_sheet

TITLES = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}
_PANEL = 360  # pixels of the longer side of a picture
_GAP = 6
_CONTEXT = 0.6  # of the size of a box, around it on each side


def write_page(template: str, path: Path, numbers: Any = None, **content: Any) -> None:
    """Fill a template of `templates/`. All text but `Markup` is escaped.

    Args:
        numbers: for the JSON file beside the page, with nan and infinity as null; None for no file.

    Raises:
        UserError: a file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": functools.partial(number, sign="+")}
    text = environment.get_template(template).render(
        light=style_sheet(LIGHT), dark=style_sheet(DARK), titles=TITLES, **content
    )
    with unwritable_as_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text.encode(errors="replace"))  # a name may hold half of a surrogate pair
        if numbers is not None:
            write_file(path.with_suffix(".json"), json.dumps(for_json(numbers), indent=1).encode())


def check_page(page: Path, inputs: Iterable[str | os.PathLike | None]) -> None:
    """Raise UserError if the page, or the JSON file beside it, would replace one of the inputs or each other."""
    if page.suffix == ".json":
        raise UserError(f"--output: {page} is the name of the page's numbers. Fix: give it the ending .html")
    check_outputs("--output", (page, page.with_suffix(".json")), inputs)


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A cell's text; a dash if there is nothing to score."""
    return "–" if value is None or math.isnan(value) else f"{value:{sign}.{digits}f}"


def parse_page_options(parser: argparse.ArgumentParser, output: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Read a command line, with the options that all pages have besides the parser's own.

    Raises:
        UserError: the images' folder is not there; a number of resamples that gives no interval.
    """
    parser.add_argument("--images", type=Path, metavar="DIR", help="the images, for pictures")
    parser.add_argument("--output", type=Path, default=Path(output), metavar="FILE", help=f"default {output}")
    resamples_help = f"of the images, for the intervals; 0 for none; default {RESAMPLES}"
    parser.add_argument("--resamples", type=int, default=RESAMPLES, metavar="N", help=resamples_help)
    parser.add_argument(
        "--max-detections",
        type=int,
        metavar="N",
        help="detections of a category that are scored per image; default: the runs' number, else COCO's 100",
    )
    given = parser.parse_args(arguments)
    if given.max_detections is not None and given.max_detections < 1:
        raise UserError(f"--max-detections: {given.max_detections} scores nothing. Fix: give 1 or more")
    if given.images is not None and not given.images.is_dir():
        raise UserError(f"--images: {given.images} is not a folder. Fix: give the folder that holds the images")
    if given.resamples < 0 or given.resamples == 1:
        raise UserError(f"--resamples: {given.resamples} gives no interval. Fix: 0 for none, or 2 and more")
    return given


# --- pictures ---------------------------------------------------------------------------------------


def open_page(
    annotations: CocoAnnotations | str | os.PathLike,
    page: str | os.PathLike,
    images: ImageStorage | str | os.PathLike | None,
) -> tuple[CocoAnnotations, Path, ImageStorage | None]:
    """The annotations, the page's file, and the source of its pictures. A folder is checked as training data is.

    Raises:
        UserError: the page would replace the annotations; an image's name leads out of the folder, or the folder holds
            a link out of it.
    """
    if not isinstance(annotations, CocoAnnotations):
        annotations = CocoAnnotations.open(annotations)
    check_page(Path(page), [annotations.path])
    if isinstance(images, (str, os.PathLike)):
        refuse_names_outside(annotations, f"--images ({images})")
        images = DiskImages(Path(images).absolute())
        images.look(annotations.file_names)
    return annotations, Path(page), images


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
        truth, shown = record.only(missed), found
    else:
        truth, shown, min_score = record, found.only([one.detection for one in wrong]), 0
    left = objects_of_truth(truth, annotations.categories, found.masks is not None, found.keypoints is not None)
    return _panels(images, record, [left, objects_of_detections(shown, annotations.categories, min_score)])


def picture_of_difference(a: Analyses, b: Analyses, images: ImageStorage | None, index: int) -> str | None:
    """The truth, and what each of two detectors finds with its best threshold."""
    record, categories = a.annotations[index], a.annotations.categories
    found = [_found(of, index) for of in (a, b)]
    panels = [objects_of_truth(record, categories, any(each.masks is not None for each in found))]
    for of, each in zip((a, b), found, strict=True):
        panels.append(objects_of_detections(each, categories, of.best_threshold))
    return _panels(images, record, panels)


def picture_of_suspect(analyses: Analyses, images: ImageStorage | None, suspect: Suspect) -> str | None:
    """The annotations around a place, beside the detection there."""
    record, categories = analyses.annotations[suspect.image], analyses.annotations.categories
    detected = Objects(
        boxes=suspect.box[None],
        labels=[suspect.label],
        names=[categories[suspect.label]["name"]],
        endings=[f" {suspect.score:.2f}"],
    )
    return _panels(images, record, [objects_of_truth(record, categories), detected], suspect.box)


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
