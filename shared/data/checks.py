"""Checks of a data set before training: boxes, images and segmentations."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import hotcoco
import msgspec
import numpy as np

from shared.config.schema import is_url
from shared.data.annotations import CocoAnnotations
from shared.data.cache import Look, load_arrays, look_once, save_arrays
from shared.data.convert.files import ImageFinder
from shared.data.images import darkness, value_range
from shared.data.remote import RemoteImages
from shared.data.storage import DiskImages, ImageStorage
from shared.durable import once
from shared.errors import UserError

logger = logging.getLogger(__name__)

# --- boxes ------------------------------------------------------------------------------------------

# Boxes are corners (x1 y1 x2 y2) if nearly all fit into their image as corners, and many reach far over its edge as x y
# width height. In correct files (COCO, BCCD) no box reaches over, and a tenth fits as corners. With the same boxes
# written as corners, 70 to 76 % reach over: those with their middle in the right or the lower half. Boxes annotated
# beyond the edge (amodal) also reach over, and fit if they start near the corner; in no file a quarter does so by 5 %.
_FIT_AS_CORNERS = 0.98
_REACH_OVER = 0.25
_FAR = 0.05  # of the image's side, at least one pixel
_FEWEST = 5
_AT_ONCE = 2**12  # images in memory at once


def check_box_format(annotations: CocoAnnotations, where: str) -> None:
    """Raises UserError if all boxes are shares of the image's size, or corners, instead of x y width height in
    pixels."""
    check_boxes(_boxes_in_use(annotations), f"{where}: {annotations.path}" if annotations.path else where)


def check_boxes(parts: Iterable[tuple[np.ndarray, np.ndarray]], where: str) -> None:
    """The same for boxes of any source.

    Args:
        parts: (N, 4) boxes with an area, and (N, 2) width and height of each one's image.
        where: the source, for errors.
    """
    count = largest_side = reaching_over = fitting = 0
    within_one, has_fractions = True, False
    for boxes, sizes in parts:
        count += len(boxes)
        largest_side = max(largest_side, int(sizes.max()))
        within_one &= bool(boxes.min() >= 0 and boxes.max() <= 1)
        has_fractions = has_fractions or (within_one and bool((boxes % 1 > 0).any()))
        far = np.maximum(_FAR * sizes, 1)
        reaching_over += int((boxes[:, :2] + boxes[:, 2:] > sizes + far).any(axis=1).sum())
        fit = (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= sizes + 1) & (boxes[:, :2] >= -1)
        fitting += int(fit.all(axis=1).sum())
    # an image of a few pixels may have such boxes rightly; whole numbers are boxes in an image's first pixel
    if count and within_one and largest_side > 8 and has_fractions:
        raise UserError(
            f"{where}: all {count} boxes lie between 0 and 1: they are shares of the image's size, and COCO "
            "has pixels. Fix: multiply x and width by the image's width, y and height by its height"
        )
    if count >= _FEWEST and reaching_over / count >= _REACH_OVER and fitting / count >= _FIT_AS_CORNERS:
        raise UserError(
            f"{where}: its boxes look like corners, x1 y1 x2 y2, and COCO has x y width height: "
            f"{reaching_over / count:.0%} of them reach far over the edge of their image as COCO's, and "
            f"{fitting / count:.0%} fit as corners. Fix: write [x1, y1, x2 - x1, y2 - y1]"
        )


def image_sizes(annotations: CocoAnnotations, images: slice = slice(None)) -> np.ndarray:
    """(annotations, 2) int32: the width and height of each annotation's image."""
    columns = annotations.columns
    sizes = np.stack([columns["widths"][images], columns["heights"][images]], axis=1)
    return np.repeat(sizes, np.diff(columns["offsets"])[images], axis=0)


def under_a_pixel(annotations: CocoAnnotations) -> np.ndarray:
    """(annotations,) bool: boxes that are less than a pixel wide or high, and have an area."""
    return (annotations.columns["boxes"][:, 2:] < 1).any(axis=1) & ~annotations.without_area


def _boxes_in_use(annotations: CocoAnnotations) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Boxes with an area, and the sizes of their images, some images at a time."""
    for first in range(0, len(annotations), _AT_ONCE):
        images = slice(first, first + _AT_ONCE)
        offsets = annotations.columns["offsets"][first : first + _AT_ONCE + 1]
        boxes = annotations.columns["boxes"][offsets[0] : offsets[-1]]
        in_use = (boxes[:, 2:] > 0).all(axis=1)
        if in_use.any():
            yield boxes[in_use], image_sizes(annotations, images)[in_use]


# --- images -----------------------------------------------------------------------------------------

_LONGEST_PATH = 4096  # bytes
_TRIED_FOR_DARKNESS = 4
_SKIP = ". Fix: add them, or give data.on_bad_image: skip to omit them"


def check_images(
    annotations: CocoAnnotations, images: DiskImages | RemoteImages, where: str, skip: bool = False
) -> None:
    """Checks that the images exist, once per version of the annotation file. A folder on disk that has changed is
    checked again; a bucket is not.

    Args:
        where: for errors.
        skip: missing images are a warning, unless all are missing.

    Raises:
        UserError: an image is missing, or the folder holds a link out of it.
    """

    def message(look: Look) -> str:
        return (
            f"{where}: {look.missing} of the {len(annotations)} images that the annotation file names are not there, "
            f"the first is {look.first_missing}"
        )

    def look_now() -> Look:
        look = images.look(annotations.file_names)
        if look.missing and (not skip or look.missing == len(annotations)):
            found = _found_instead(images.folder, look.first_missing) if isinstance(images, DiskImages) else ""
            fix = found or (". Fix: correct the folder" if look.missing == len(annotations) else _SKIP)
            raise UserError(f"{message(look)}{fix}")
        return look

    if annotations.cache is None or images.place is None:
        look = look_now()
    else:
        name = hashlib.sha256(os.fsencode(images.place)).hexdigest()[:12]
        look = look_once(annotations.cache / f"images-{name}", look_now, allow_missing=skip)
    if look.sizes is not None:
        images.take_sizes(look.sizes)
    if look.missing:
        logger.warning("%s; they are skipped", message(look))


def refuse_names_outside(annotations: CocoAnnotations, where: str) -> None:
    """Raises UserError if an image's name leads out of the folder of images, or cannot be a file's name."""
    letters, offsets = annotations.columns["file_names"], annotations.columns["file_name_offsets"]
    lengths, text = np.diff(offsets), letters.tobytes()
    first_letters = letters[offsets[:-1][lengths > 0]]
    if (
        0 < lengths.min() <= lengths.max() <= _LONGEST_PATH
        and not np.isin(first_letters, (ord("/"), ord("\\"))).any()
        and not any(part in text for part in (b"..", b":/", b"\0"))
    ):
        return  # the names need no closer look, which takes a microsecond each
    for i in range(len(annotations)):
        name = annotations.file_name(i)
        up = ".." in name.split("/")
        if not 0 < lengths[i] <= _LONGEST_PATH or up or "\0" in name or is_url(name) or name.startswith(("/", "\\")):
            raise UserError(
                f"{where}: the image file name {name[:200]!r} leads out of the images' folder, or is empty. Fix: write "
                "names relative to that folder"
            )


def first_dark_image(annotations: CocoAnnotations, images: ImageStorage) -> str:
    """The warning about the first dark image of a few, spread over the file; "" for none."""
    some = np.linspace(0, len(annotations) - 1, _TRIED_FOR_DARKNESS).astype(int)
    names = (annotations.file_name(i) for i in np.unique(some).tolist())
    return next(filter(None, (darkness(name, value_range(images, name)) for name in names)), "")


def _found_instead(folder: Path, name: str) -> str:
    """Names the file that a missing image may be, and what to do; "" without one."""
    finder = ImageFinder(folder)
    try:
        found = finder.find(name) or finder.find_stem(PurePosixPath(name.replace("\\", "/")).stem)
    except ValueError as error:  # several
        return f"; {error}"
    if found is None:
        return ""
    for place in (folder.parent, folder / found.removesuffix(name)):
        if (place / name).is_file():
            return f"; {place / name} is there. Fix: give `images: {place}`"
    return (
        f"; {found!r} is there, not {name!r}: folders, case, ending or Unicode differ. Fix: `python3 -m shared convert "
        f"coco FILE OUTPUT --images {folder}` writes a file with the names that exist"
    )


# --- segmentations ----------------------------------------------------------------------------------

# COCO's own polygons are decoded in one call each: 860,000 take two seconds, and ten in plain Python
_FARTHEST = 1e6  # pixels; pycocotools walks along each edge, and runs out of memory on longer ones
_Coordinate = Annotated[float, msgspec.Meta(ge=-_FARTHEST, le=_FARTHEST)]
_POLYGONS = msgspec.json.Decoder(
    Annotated[list[Annotated[list[_Coordinate], msgspec.Meta(min_length=6)]], msgspec.Meta(min_length=1)]
)
_EMPTY = len(b"[]")  # bytes of an empty list; an absent segmentation has none


def wrong_segmentation(segmentation: Any, height: int, width: int) -> str | None:
    """The fault of a decoded segmentation of an image of that size, as the end of a sentence. None if it is polygons or
    RLE that every detector and the evaluator accept."""
    if segmentation in ([], {}):
        return "is empty"
    if isinstance(segmentation, list):
        if not all(isinstance(polygon, list) and set(map(type, polygon)) <= {int, float} for polygon in segmentation):
            return "is not a list of polygons, each a list of numbers"
        bad = next((len(polygon) for polygon in segmentation if len(polygon) < 6 or len(polygon) % 2), None)
        if bad is not None:
            return f"has a polygon of {bad} numbers, and not x and y of three points or more"
        farthest = max(max(map(abs, polygon)) for polygon in segmentation)
        return None if farthest <= _FARTHEST else f"has a point at {farthest:g} pixels"
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        kind = {str: "a string", dict: "other keys"}.get(type(segmentation), "a number")
        return f"is neither polygons nor RLE with `size` and `counts`, but {kind}"
    if segmentation["size"] != [height, width]:
        return f"is RLE of the size {segmentation['size']}, and the image's is {[height, width]}"
    counts, pixels = segmentation["counts"], height * width
    try:
        hotcoco.mask.area(segmentation)
        if isinstance(counts, list):
            return None if sum(counts) == pixels else f"has RLE of {sum(counts)} pixels, and the image has {pixels}"
        hotcoco.mask.rle_from_string(counts, pixels, 1)  # raises if there are more pixels
    except (TypeError, ValueError, OverflowError) as error:
        return f"has RLE that cannot be read ({error})"
    try:
        hotcoco.mask.rle_from_string(counts, pixels - 1, 1)
    except ValueError:
        return None
    return f"has RLE of fewer pixels than the image, which has {pixels}"


def is_absent(annotations: CocoAnnotations) -> np.ndarray:
    """(annotations,) bool: no segmentation, or an empty list."""
    return np.diff(annotations.columns["segmentation_offsets"]) <= _EMPTY


def wrong_rows(annotations: CocoAnnotations) -> np.ndarray:
    """(N,) int64: the rows of `annotations.columns` with a wrong segmentation. They are found once, and remembered
    beside the annotation cache."""
    if annotations.selected_from is not None:
        whole, kept = annotations.selected_from
        wrong = np.zeros(len(kept), dtype=bool)
        wrong[wrong_rows(whole)] = True
        return np.flatnonzero(wrong[kept])
    if annotations.cache is None:
        return _find_wrong_rows(annotations)
    folder, count = annotations.cache / "segmentations", len(annotations.columns["annotation_ids"])

    def remembered() -> np.ndarray | None:
        loaded = load_arrays(folder)
        rows = loaded[0].get("wrong") if loaded else None
        return rows if rows is not None and (not len(rows) or 0 <= rows.min() <= rows.max() < count) else None

    def remember() -> np.ndarray:
        rows = _find_wrong_rows(annotations)
        save_arrays(folder, {"wrong": rows}, about=None)  # else the next start looks again
        return rows

    return once([folder / "lock"], remembered, remember)


def why_wrong(annotations: CocoAnnotations, row: int) -> str:
    """The fault of an annotation's segmentation; "" if it is right."""
    columns = annotations.columns
    image = int(np.searchsorted(columns["offsets"], row, side="right")) - 1
    height, width = (int(columns[name][image]) for name in ("heights", "widths"))
    start, end = columns["segmentation_offsets"][row : row + 2]
    try:
        segmentation = msgspec.json.decode(columns["segmentations"][start:end].tobytes())
        return wrong_segmentation(segmentation, height, width) or ""
    except (msgspec.DecodeError, RecursionError) as error:
        return f"cannot be read ({error})"


def _find_wrong_rows(annotations: CocoAnnotations) -> np.ndarray:
    columns = annotations.columns
    offsets, data = columns["segmentation_offsets"].tolist(), memoryview(columns["segmentations"])
    wrong = []
    for row in np.flatnonzero(~is_absent(annotations)).tolist():
        try:
            polygons = _POLYGONS.decode(data[offsets[row] : offsets[row + 1]])
            is_right = not any(len(polygon) % 2 for polygon in polygons)
        except (ValueError, RecursionError):  # mostly RLE
            is_right = False
        if not is_right and why_wrong(annotations, row):
            wrong.append(row)
    return np.array(wrong, dtype=np.int64)
