"""Checks of a data set before training: boxes, images and segmentations."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import hotcoco
import msgspec
import numpy as np

from shared.config.schema import is_url
from shared.data.annotations import CocoAnnotations
from shared.data.file_lock import once
from shared.data.images import darkness
from shared.data.remote import Look, Sizes
from shared.data.storage import DiskImages, ImageStorage, modified
from shared.errors import UserError

# Boxes are corners, x1 y1 x2 y2, where nearly all fit into their image as such, and many reach far over its edge as x y
# width height. Of right files (COCO, BCCD) none do, and a tenth fits; of the same boxes made corners 70 to 76 % do:
# those whose middle is in the right or the lower half. Large objects that are annotated beyond the edge (amodal ones)
# reach over too, and fit where they start near the image's corner; not a quarter of a file's by a twentieth.
_FIT_AS_CORNERS = 0.98
_REACH_OVER = 0.25
_FAR = 0.05  # of the image's side, and a pixel at least
_FEWEST = 5
_AT_ONCE = 2**12  # images: what each process of a machine takes for a moment


def check_box_format(annotations: CocoAnnotations, where: str) -> None:
    """Raises UserError where all boxes are shares of the image's size, or corners, in place of pixels as x y width
    height."""
    count = largest_side = reaching_over = fitting = 0
    within_one, has_fractions = True, False
    for boxes, sizes in _boxes_in_use(annotations):
        count += len(boxes)
        largest_side = max(largest_side, int(sizes.max()))
        within_one &= bool(boxes.min() >= 0 and boxes.max() <= 1)
        has_fractions = has_fractions or (within_one and bool((boxes % 1 > 0).any()))
        far = np.maximum(_FAR * sizes, 1)
        reaching_over += int((boxes[:, :2] + boxes[:, 2:] > sizes + far).any(axis=1).sum())
        fit = (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= sizes + 1) & (boxes[:, :2] >= -1)
        fitting += int(fit.all(axis=1).sum())
    # an image of a few pixels may have such boxes rightly; whole numbers are those of an image's first pixel
    if count and within_one and largest_side > 8 and has_fractions:
        raise UserError(
            f"{where}: all {count} boxes of {annotations.path} lie between 0 and 1: they are shares of the "
            "image's size, and COCO has pixels; multiply x and width by the image's width, y and height by its height"
        )
    if count >= _FEWEST and reaching_over / count >= _REACH_OVER and fitting / count >= _FIT_AS_CORNERS:
        raise UserError(
            f"{where}: the boxes of {annotations.path} look like corners, x1 y1 x2 y2, and COCO has x y width height: "
            f"{reaching_over / count:.0%} of them reach far over the edge of their image as COCO's, and "
            f"{fitting / count:.0%} fit as corners; write [x1, y1, x2 - x1, y2 - y1]"
        )


def _boxes_in_use(annotations: CocoAnnotations) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Boxes that have an area, and the sizes of their images, some images at a time."""
    for first in range(0, len(annotations), _AT_ONCE):
        images = slice(first, first + _AT_ONCE)
        offsets = annotations.columns["offsets"][first : first + _AT_ONCE + 1]
        boxes = annotations.columns["boxes"][offsets[0] : offsets[-1]]
        in_use = (boxes[:, 2:] > 0).all(axis=1)
        if in_use.any():
            yield boxes[in_use], image_sizes(annotations, images)[in_use]


def image_sizes(annotations: CocoAnnotations, images: slice = slice(None)) -> np.ndarray:
    """(annotations, 2) int32: width and height of the image of each, of some of the images."""
    columns = annotations.columns
    sizes = np.stack([columns["widths"][images], columns["heights"][images]], axis=1)
    return np.repeat(sizes, np.diff(columns["offsets"])[images], axis=0)


def under_a_pixel(annotations: CocoAnnotations) -> np.ndarray:
    """(annotations,) bool: boxes with an area, that are less than a pixel wide or high."""
    return (annotations.columns["boxes"][:, 2:] < 1).any(axis=1) & ~annotations.without_area


logger = logging.getLogger(__name__)

_INCOMPLETE_IS_GOOD_FOR = 3600  # seconds that a bucket without some of the images is not listed anew
_LONGEST = 4096  # bytes of a path
_TRIED_FOR_DARKNESS = 4
_MOST_SEARCHED = 200_000  # files, for what a missing one may be called


def check_images(annotations: CocoAnnotations, images: ImageStorage, where: str, skip: bool = False) -> None:
    """Looks for the images, unless that was done with this version of the annotation file. A folder on disk that has
    changed is looked at again; a bucket is not.

    Args:
        where: of the errors.
        skip: missing images are a warning, unless all are.

    Raises:
        UserError: the file of an image is missing, or the folder holds a link out of it.
    """

    def looked() -> Look:
        look = images.look(annotations.file_names)
        if look.missing and (not skip or look.missing == len(annotations)):
            found = _found_instead(images.folder, look.first_missing) if isinstance(images, DiskImages) else ""
            raise UserError(_message(look, annotations, where) + found)
        return look

    if annotations.cache is None or images.place is None:
        look = looked()
    else:
        place = annotations.cache / f"images-{hashlib.sha256(os.fsencode(images.place)).hexdigest()[:12]}"
        look = once([place / "lock"], lambda: _remembered(place, skip), lambda: _remember(looked(), place))
        if look.sizes is not None:
            images.take_sizes(look.sizes)
    if look.missing:
        logger.warning("%s; they are left out", _message(look, annotations, where))


def refuse_names_outside(annotations: CocoAnnotations, where: str, folder: Path | None = None) -> None:
    """Raises UserError where an image's name leads out of the images' folder, or can be no file's.

    Args:
        folder: the images' one, where it is on disk.
    """
    letters, offsets = annotations.columns["file_names"], annotations.columns["file_name_offsets"]
    lengths = np.diff(offsets)
    no_name = (lengths == 0) | (lengths > _LONGEST)
    suspicious = no_name.copy()
    # what each wrong name has one of: few right ones do
    first = letters[offsets[:-1][~no_name]]
    suspicious[~no_name] = (first == ord("/")) | (first == ord("\\"))
    before, here = letters[:-1], letters[1:]
    up_or_url = (here == ord(".")) & (before == ord(".")) | (here == ord("/")) & (before == ord(":"))
    for at in (np.flatnonzero(up_or_url), np.flatnonzero(letters == 0)):
        suspicious[np.searchsorted(offsets, at, side="right") - 1] = True
    for i in np.flatnonzero(suspicious).tolist():
        name = annotations.file_name(i)
        outside = "\0" in name or is_url(name) or name.startswith(("/", "\\")) or ".." in name.split("/")
        if folder is not None and name.startswith(f"{folder}/") and ".." not in name.split("/"):
            raise UserError(
                f"{where}: the image file name {name[:200]!r} is absolute, and lies in the images' folder; names are "
                f"relative to it: write {name.removeprefix(f'{folder}/')[:200]!r}"
            )
        if no_name[i] or outside:
            raise UserError(
                f"{where}: the image file name {name[:200]!r} leads out of the images' folder, or is none; names "
                "are relative to that folder"
            )


def first_dark_image(annotations: CocoAnnotations, images: ImageStorage) -> str:
    """What `darkness` says of the first of some images, spread over the file."""
    some = np.linspace(0, len(annotations) - 1, _TRIED_FOR_DARKNESS).astype(int)
    said = (darkness(images, annotations.file_name(i)) for i in np.unique(some).tolist())
    return next(filter(None, said), "")


def _message(look: Look, annotations: CocoAnnotations, where: str) -> str:
    return (
        f"{where}: {look.missing} of the {len(annotations)} images that the annotation file names are not there, the "
        f"first is {look.first_missing}"
    )


def _found_instead(folder: Path, name: str) -> str:
    """What lies in the folder, below or above it, in the place of a missing image, and what to do; "" for nothing."""
    wanted = PurePosixPath(name.replace("\\", "/"))
    above = PurePosixPath(*wanted.parts[1:])
    if len(wanted.parts) > 1 and folder.name == wanted.parts[0] and (folder / above).is_file():
        return (
            f"; {folder / above} is there: say `images: {folder.parent}`, or leave {wanted.parts[0]}/ out of the names"
        )

    def plain(path: PurePosixPath) -> str:
        return unicodedata.normalize("NFC", str(path)).casefold()

    by_stem = None
    for file in itertools.islice(_files_below(folder), _MOST_SEARCHED):
        path = PurePosixPath(file.relative_to(folder))
        told = f"; {str(path)!r} is there, and the annotation file says {name!r}: "
        if plain(path) == plain(wanted):
            if "\\" in name:
                return f"{told}write / for \\ in its names"
            if unicodedata.normalize("NFC", str(path)) == unicodedata.normalize("NFC", name):
                return f"{told}the same letters in other Unicode (NFC and NFD); rename the files or the names"
            return f"{told}upper and lower case count; rename the files or the names"
        if plain(PurePosixPath(path.name)) == plain(PurePosixPath(wanted.name)):
            deeper = path.parts[: len(path.parts) - len(wanted.parts)]
            if path.parts[len(deeper) :] == wanted.parts:
                return (
                    f"; {path} is there: say `images: {folder.joinpath(*deeper)}`, or put {'/'.join(deeper)}/ before "
                    "the names"
                )
            return f"{told}names have the folders below the one of the images"
        if by_stem is None and plain(PurePosixPath(path.stem)) == plain(PurePosixPath(wanted.stem)):
            by_stem = f"{told}correct the endings"
    return by_stem or ""


def _files_below(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(root) / file for file in files)


def _remember(look: Look, place: Path) -> Look:
    """The look as later ones find it, with mapped sizes, where it can be written."""
    if not look.whole:
        return look
    try:
        header = {"missing": look.missing, "first_missing": look.first_missing, "folders": look.folders}
        if look.sizes is not None:
            # a folder for each list: an earlier one may be mapped
            folder = Path(tempfile.mkdtemp(dir=place, prefix="sizes."))
            folder.chmod(0o755)
            look.sizes.save(folder)
            header["sizes"] = folder.name
        aside = place / "header.json.aside"
        aside.write_text(json.dumps(header))
        aside.replace(place / "header.json")
    except OSError:
        return look
    return _remembered(place, skip=True) or look


def _remembered(place: Path, skip: bool) -> Look | None:
    """The look that still holds, if there was one."""
    try:
        header_file = place / "header.json"
        header = json.loads(header_file.read_bytes())
        if header["missing"]:
            age = time.time() - header_file.stat().st_mtime
            if not skip or ("sizes" in header and age > _INCOMPLETE_IS_GOOD_FOR):
                return None
        if any(modified(Path(folder)) != time_then for folder, time_then in header["folders"].items()):
            return None
        sizes = Sizes.load(place / header["sizes"]) if "sizes" in header else None
        return Look(header["missing"], header["first_missing"], folders=header["folders"], sizes=sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # none yet, cut off or not ours


# COCO's own polygons in one call each: 860,000 of them are two seconds so, and ten in plain Python
_FARTHEST = 1e6  # pixels; pycocotools walks along each edge, and dies of memory on those without end
_Coordinate = Annotated[float, msgspec.Meta(ge=-_FARTHEST, le=_FARTHEST)]
_POLYGONS = msgspec.json.Decoder(
    Annotated[list[Annotated[list[_Coordinate], msgspec.Meta(min_length=6)]], msgspec.Meta(min_length=1)]
)
_NOTHING = len(b"[]")  # no segmentation is no bytes, or an empty list


def wrong_segmentation(segmentation: Any, height: int, width: int) -> str | None:
    """What is wrong with a decoded segmentation of an image of that size, as the end of a sentence; None where it is
    polygons or RLE that every detector and the evaluator take."""
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
    try:
        hotcoco.mask.area(segmentation)
        counts = segmentation["counts"]
        total = sum(counts) if isinstance(counts, list) else _total(counts)
    except (TypeError, ValueError, OverflowError) as error:
        return f"has RLE that cannot be read ({error})"
    return None if total == height * width else f"has RLE of {total} pixels, and the image has {height * width}"


def _total(counts: str) -> int:
    """The pixels that compressed counts are of: five bits a letter, the lowest first, 32 where more follow; from the
    fourth on each number is the difference to the one before the last."""
    total, before, last, number, shift = 0, 0, 0, 0, 0
    position = 0
    for letter in counts.encode():
        bits = letter - 48
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        number += before if position > 2 else 0
        before, last = last, number
        total, number, shift, position = total + number, 0, 0, position + 1
    return total


def is_absent(annotations: CocoAnnotations) -> np.ndarray:
    """(annotations,) bool: no segmentation, or an empty list."""
    return np.diff(annotations.columns["segmentation_offsets"]) <= _NOTHING


def wrong_rows(annotations: CocoAnnotations) -> np.ndarray:
    """(N,) int64: the rows of `annotations.columns` whose segmentation is there and wrong, looked for once and
    remembered beside the annotation cache."""
    if annotations.selected_from is not None:
        whole, kept = annotations.selected_from
        wrong = np.zeros(len(kept), dtype=bool)
        wrong[wrong_rows(whole)] = True
        return np.flatnonzero(wrong[kept])
    if annotations.cache is None:
        return _look(annotations)
    file, count = annotations.cache / "segmentations" / "wrong.npy", len(annotations.columns["annotation_ids"])
    return once(
        [file.parent / "lock"], lambda: _remembered_rows(file, count), lambda: _remember_rows(_look(annotations), file)
    )


def why_wrong(annotations: CocoAnnotations, row: int) -> str:
    """What is wrong with the segmentation of an annotation, "" where nothing is."""
    image = int(np.searchsorted(annotations.columns["offsets"], row, side="right")) - 1
    height, width = (int(annotations.columns[name][image]) for name in ("heights", "widths"))
    try:
        return wrong_segmentation(msgspec.json.decode(_raw(annotations, row)), height, width) or ""
    except (msgspec.DecodeError, RecursionError) as error:
        return f"cannot be read ({error})"


def _look(annotations: CocoAnnotations) -> np.ndarray:
    columns = annotations.columns
    offsets, data = columns["segmentation_offsets"].tolist(), memoryview(columns["segmentations"])
    present = np.flatnonzero(~is_absent(annotations)).tolist()
    wrong = []
    for row in present:
        try:
            for polygon in _POLYGONS.decode(data[offsets[row] : offsets[row + 1]]):
                if len(polygon) % 2:
                    raise ValueError
        except (ValueError, RecursionError):  # no good polygons, which is RLE for the most part
            if why_wrong(annotations, row):
                wrong.append(row)
    return np.array(wrong, dtype=np.int64)


def _raw(annotations: CocoAnnotations, row: int) -> bytes:
    start, end = annotations.columns["segmentation_offsets"][row : row + 2]
    return annotations.columns["segmentations"][start:end].tobytes()


def _remember_rows(rows: np.ndarray, file: Path) -> np.ndarray:
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as aside:
            np.save(aside, rows)
        os.chmod(aside.name, 0o644)
        os.replace(aside.name, file)
    except OSError:  # looked for again at the next start
        pass
    return rows


def _remembered_rows(file: Path, count: int) -> np.ndarray | None:
    try:
        rows = np.load(file)
    except (OSError, ValueError, EOFError):
        return None  # none yet, cut off or not ours
    sound = rows.dtype == np.int64 and rows.ndim == 1 and (not len(rows) or 0 <= rows.min() <= rows.max() < count)
    return rows if sound else None
