"""Reads a COCO annotation file into columns: one NumPy array per field."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import itertools
import json
import math
import mmap
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import hotcoco
import msgspec
import numpy as np
import numpy.typing as npt

from shared.config.schema import StoreOptions
from shared.data import remote
from shared.errors import UserError, count_of

FARTHEST = 2.0**31  # pixels; images are smaller, and float32 becomes infinite only beyond 3e38
_MOST_SHOWN = 40  # digits
# Python writes the first two, and JSON does not have them; the others are out of a float64's range, for the most part
_SUSPICIOUS = re.compile(rb"(?<=[:\[,\s])(?:NaN|-?Infinity|-?\d+(?:\.\d+)?[eE]\+?\d{3,}|-?\d{309,})(?=[\s,\]}])")
_MAX_PADDING = 10  # zero keypoints per keypoint in the file
_MAX_COMPRESSION = 200  # plus 64 MiB. JSON compresses 5 to 40 times; gzip's limit is 1,032
_UTF_16 = "is in UTF-16. Fix: save it as UTF-8"
_WEB_PAGE = "is a web page, not the file itself. Fix: download it again, in a browser if it needs a login"
# how other kinds of file begin, in lower case
_OTHER_KINDS = {
    b"\xff\xfe": _UTF_16,
    b"\xfe\xff": _UTF_16,
    b"{\0": _UTF_16,
    b"\0{": _UTF_16,
    b"<!doctype html": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"<": "is XML. Fix: convert it with `python3 -m shared convert`, which reads Pascal VOC and CVAT",
    b"pk\3\4": "is a ZIP archive. Fix: unpack it, and give the JSON file in it",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself. Fix: run `git lfs pull`",
}

T = TypeVar("T")
Columns = dict[str, np.ndarray]
JSONBytes = bytes | mmap.mmap


class Parsed(NamedTuple):
    """A parsed file: its columns, its categories sorted by id, and sentences on what was changed in reading it."""

    columns: Columns
    categories: list[dict]
    notes: list[str]


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    height: int
    width: int


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool | None = 0
    ignore: int | bool | None = 0
    segmentation: msgspec.Raw = msgspec.Raw(b"")
    keypoints: msgspec.Raw = msgspec.Raw(b"")


class _CocoFile(msgspec.Struct, gc=False):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[dict[str, Any]]


def version_of(path: Path | str, options: StoreOptions) -> dict[str, Any]:
    """What changes when the file changes.

    Args:
        path: a `str` is a URL.

    Raises:
        UserError: the file does not exist or cannot be read.
    """
    if isinstance(path, str):
        with _must_exist(path):
            return remote.version_of(path, options)
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(
            f"{path} does not exist or cannot be read ({error.strerror}). Fix: correct the path or its permissions"
        ) from error
    if not path.is_file():
        raise UserError(f"{path} is not a file. Fix: give the COCO JSON file itself")
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def read(path: Path | str, version: dict[str, Any], options: StoreOptions) -> Parsed:
    """Reads and parses a file or a URL of that version."""
    if isinstance(path, str):
        size = int(version["size"]) if "size" in version else None
        with _must_exist(path):
            return parse(remote.read_url(path, options, size, options.timeout if size is None else 0), path)
    try:
        with path.open("rb") as file:
            # it is not closed here: the undecoded segmentations point into it
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Fix: correct the path or its permissions") from error
    except ValueError as error:  # there is nothing to map
        raise UserError(f"{path} is empty. Fix: copy or download it again") from error
    return parse(data, path)


@contextlib.contextmanager
def _must_exist(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise remote.StoreError(f"{url} does not exist") from error


def parse(data: JSONBytes, source: object) -> Parsed:
    """Parses the content of a file.

    Numbers may be in quotes. An `area` that is missing, or 0 for a box with an area, becomes the area of the mask or
    the box. A category without annotations is omitted if another has its name.

    Args:
        data: may be packed with gzip, or begin with a byte order mark.
        source: the file's name for errors.

    Raises:
        UserError: the content is not JSON, is not COCO, or contradicts itself.
    """
    coco = _decode(unpack(data, source), source)
    images, annotations, notes = coco.images, coco.annotations, []
    if not images:
        raise UserError(f"{source} has no images. Fix: give a file with `images`")
    image_ids = as_ids([image.id for image in images], "image id", source)
    annotation_ids = as_ids([a.id for a in annotations], "annotation id", source)
    image_of = as_ids([a.image_id for a in annotations], "image id of an annotation", source)
    category_of = as_ids([a.category_id for a in annotations], "category id of an annotation", source)
    _refuse_duplicates(image_ids, "image", source)
    _refuse_duplicates(annotation_ids, "annotation", source)
    for image in images:
        if min(image.height, image.width) <= 0 or max(image.height, image.width) >= 2**31:
            raise UserError(
                f"{source}: image {image.id} has the size {image.width}×{image.height}. Fix: give its width and height "
                "in pixels"
            )
    categories = check_categories(without_namesakes(coco.categories, category_of, notes), source)
    image_rows = _rows_of(image_of, image_ids, annotation_ids, "image", source)
    category_ids = np.array([category["id"] for category in categories], np.int64)
    labels = _rows_of(category_of, category_ids, annotation_ids, "category", source)

    boxes = np.fromiter(itertools.chain.from_iterable(a.bbox for a in annotations), np.float64, 4 * len(annotations))
    boxes = boxes.reshape(-1, 4)
    _check_reach(boxes, "bbox", annotation_ids, source)
    areas = _fill_areas(annotations, boxes, notes)
    _check_reach(areas[:, None], "area", annotation_ids, source, FARTHEST**2)

    order = np.argsort(image_rows, kind="stable")
    ordered = [annotations[i] for i in order.tolist()]
    columns = {
        "image_ids": image_ids,
        "heights": np.array([image.height for image in images], np.int32),
        "widths": np.array([image.width for image in images], np.int32),
        "offsets": offsets_of(np.bincount(image_rows, minlength=len(images))),
        "annotation_ids": annotation_ids[order],
        "boxes": boxes[order],
        "labels": labels[order].astype(np.int32),
        "areas": areas[order],
        "iscrowd": np.array([bool(a.iscrowd) for a in ordered], np.bool_),
    }
    columns["file_names"], columns["file_name_offsets"] = _joined([image.file_name.encode() for image in images])
    columns["segmentations"], columns["segmentation_offsets"] = _joined([_present(a.segmentation) for a in ordered])
    if any(a.ignore for a in annotations):
        columns["ignore"] = np.array([bool(a.ignore) for a in ordered], np.bool_)
        ignored = count_of(int(columns["ignore"].sum()), "annotation")
        notes.append(f"training omits {ignored} with `ignore: 1`; an evaluation counts them")
    if any(_present(a.keypoints) for a in annotations):
        columns["keypoints"] = _parse_keypoints(ordered, source)
    return Parsed(columns, categories, notes)


def without_namesakes(categories: list[dict], category_of: np.ndarray, notes: list[str]) -> list[dict]:
    """The categories without those that have no annotations and another's name, as Roboflow's root category."""
    ids_by_name: dict[str, list[int]] = {}
    for category in categories:
        with contextlib.suppress(KeyError, msgspec.ValidationError):  # `check_categories` reports these
            category["id"] = msgspec.convert(category["id"], int, strict=False)
            ids_by_name.setdefault(str(category["name"]), []).append(category["id"])
    omitted: set[object] = set()
    for name, ids in ids_by_name.items():
        unused = sorted(set(ids) - set(category_of.tolist())) if len(ids) > 1 else []
        for category_id in unused if len(unused) < len(ids) else unused[:-1]:
            omitted.add(category_id)
            notes.append(f"category {category_id} is omitted: it has no annotations, and another has its name {name!r}")
    return [category for category in categories if category.get("id") not in omitted]


def _fill_areas(annotations: list[_Annotation], boxes: np.ndarray, notes: list[str]) -> np.ndarray:
    """(annotations,) float64: areas, of the mask or the box if the file has none."""
    areas = np.array([math.nan if a.area is None else a.area for a in annotations], np.float64)
    is_zero = (areas <= 0) & (boxes[:, 2:] > 0).all(axis=1)
    for i in np.flatnonzero(np.isnan(areas) | is_zero).tolist():
        areas[i] = _mask_area(annotations[i].segmentation) or boxes[i, 2] * boxes[i, 3]
    if is_zero.any():
        count = count_of(int(is_zero.sum()), "box")
        notes.append(f"{count} with `area: 0`; the area of the mask or the box is used")
    return areas


def _mask_area(raw: msgspec.Raw) -> float:
    """Pixels of polygons or RLE; 0 if they are missing or wrong."""
    try:
        segmentation = msgspec.json.decode(_present(raw) or b"[]")
        if isinstance(segmentation, dict):
            return float(hotcoco.mask.area(segmentation))
        points = [np.reshape(np.array(polygon, np.float64), (-1, 2)).T for polygon in segmentation]
        area = sum(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2 for x, y in points)
        return float(area) if area < FARTHEST**2 else 0.0
    except (TypeError, ValueError, OverflowError, RecursionError):
        return 0.0


def check_categories(categories: list[dict], source: object) -> list[dict]:
    """The categories sorted by id. Raises UserError if an id or a name is missing or occurs twice."""
    if not categories:
        raise UserError(f"{source} has no categories. Fix: give a file with `categories`")
    for category in categories:
        if type(category.get("id")) is not int or not isinstance(category.get("name"), str):
            raise UserError(
                f"{source}: every category needs an integer `id` and a `name`, and one is {category}. Fix: add them"
            )
    _refuse_duplicates(as_ids([category["id"] for category in categories], "category id", source), "category", source)
    names = [category["name"] for category in categories]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{source}: two categories have the name {twice!r}. Fix: rename one")
    return sorted(categories, key=lambda category: category["id"])


def offsets_of(counts: Collection[int] | np.ndarray) -> np.ndarray:
    """(N + 1,) int64: where each of N pieces of these lengths begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def unpack(data: JSONBytes, source: object) -> JSONBytes:
    """JSON without gzip and the byte order mark that Windows programs write."""
    if data[:2] == b"\x1f\x8b":
        data = _gunzip(data, source)
    if data[:3] == codecs.BOM_UTF8:
        data = data[3:]
    head = bytes(data[:256]).lstrip().lower()
    for start, meaning in _OTHER_KINDS.items():
        if head.startswith(start):
            raise UserError(f"{source} {meaning}")
    return data


def _gunzip(data: JSONBytes, source: object) -> bytes:
    limit = 64 + _MAX_COMPRESSION * len(data) // 2**20  # MiB
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            pieces = list(itertools.islice(iter(lambda: file.read(2**20), b""), limit + 1))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source} is packed with gzip, and cannot be unpacked: {error}. Fix: copy it again") from error
    if len(pieces) > limit:
        raise UserError(
            f"{source}: its {len(data):,} bytes unpack with gzip to more than {limit} MiB, which no annotation file "
            "does. Fix: download it again, or, if you trust it, unpack it with gunzip"
        )
    return b"".join(pieces)


def _decode(data: JSONBytes, source: object) -> _CocoFile:
    try:
        return decode_json(data, _CocoFile, source)
    except msgspec.ValidationError as error:
        number = wrong_number_in(data) if "out of range" in str(error) else ""
        found = f" ({number})" if number else ""
        raise UserError(
            f"{source} is not a COCO detection file: {_at_id(data, error)}{error}{found}. Fix: correct it"
        ) from error


def decode_json(data: JSONBytes, into: type[T], source: object) -> T:
    """The content of a file. Numbers may be in quotes, and 1.0 is a whole number.

    Raises:
        UserError: it is not JSON.
        msgspec.ValidationError: it is of another type.
    """
    try:
        return msgspec.json.decode(data, type=into, strict=False)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(_why_not_json(data, source, error)) from error
    except RecursionError as error:
        raise UserError(f"{source}: its lists are nested too deep. Fix: give a file in COCO's format") from error


def _at_id(data: JSONBytes, error: Exception) -> str:
    """Names the image or annotation that an error is about by its id; "" if it has none."""
    found = re.search(r"\$\.(image|annotation)s\[(\d+)\]", str(error))
    try:
        rows = msgspec.json.decode(data, type=dict[str, msgspec.Raw])[f"{found[1]}s"]
        row = msgspec.json.decode(rows, type=list[msgspec.Raw])[int(found[2])]
        row_id = bytes(msgspec.json.decode(row, type=dict[str, msgspec.Raw])["id"])
        return f"{found[1]} {shown(row_id.decode())}: "
    except (TypeError, ValueError, LookupError, RecursionError):
        return ""


def _why_not_json(data: JSONBytes, source: object, error: Exception) -> str:
    if "UTF-8" in str(error) or isinstance(error, UnicodeDecodeError):  # msgspec 0.23 raises a DecodeError
        return f"{source} is not JSON: it is not in UTF-8. Fix: save it as UTF-8"
    # Python writes NaN and Infinity, which JSON does not have: name the annotation instead of a byte
    at = max(data.find(word) for word in (b"NaN", b"Infinity"))
    if at >= 0:
        start, end = data.rfind(b"{", 0, at), data.find(b"}", at)
        try:
            annotation = json.loads(data[start : end + 1])
            if not all(math.isfinite(number) for number in annotation["bbox"]):
                problem = f"annotation {annotation['id']} has a non-finite bbox {annotation['bbox']}"
                return f"{source}: {problem}. Fix: correct it"
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # the number is not in a box: the parser's message says where the file is broken
    if number := wrong_number_in(data):
        return f"{source} has the number {number}, which JSON does not have: {error}. Fix: correct or omit it"
    return f"{source} is not JSON, or is truncated: {error}. Fix: download or write it again"


def _present(raw: msgspec.Raw) -> bytes:
    return b"" if (piece := bytes(raw)) == b"null" else piece


def _joined(pieces: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """All bytes as uint8, and the offsets of the pieces."""
    return np.frombuffer(b"".join(pieces), np.uint8), offsets_of(np.fromiter(map(len, pieces), np.int64, len(pieces)))


def _parse_keypoints(annotations: list[_Annotation], source: object) -> np.ndarray:
    """(annotations, K, 3) float64. K is the largest number of keypoints; other rows are filled up with zeros."""
    rows = []
    for annotation in annotations:
        raw, where = _present(annotation.keypoints), f"{source}: annotation {annotation.id}"
        try:
            rows.append(np.array(msgspec.json.decode(raw, type=list[float], strict=False) if raw else []))
        except msgspec.ValidationError as error:
            raise UserError(f"{where} has keypoints that are not numbers: {error}. Fix: correct them") from error
        if len(rows[-1]) % 3:
            raise UserError(
                f"{where} has {len(rows[-1])} numbers in `keypoints`. Fix: give x, y and visibility of each point"
            )
    longest = max(map(len, rows))
    if longest * len(rows) > _MAX_PADDING * (sum(map(len, rows)) + 2**20):
        at = next(i for i, row in enumerate(rows) if len(row) == longest)
        raise UserError(
            f"{source}: annotation {annotations[at].id} has {longest // 3} keypoints, and others far fewer. Fix: give "
            "all annotations of a category the same number"
        )
    keypoints = np.zeros((len(rows), longest))
    for at, row in enumerate(rows):
        keypoints[at, : len(row)] = row
    _check_reach(keypoints, "keypoints", [annotation.id for annotation in annotations], source)
    return keypoints.reshape(len(rows), -1, 3)


def _check_reach(
    values: np.ndarray, key: str, annotation_ids: Sequence[int], source: object, limit: float = FARTHEST
) -> None:
    """Raises UserError if one of (annotations, N) numbers is too large for any image."""
    wrong = ~(np.abs(values) < limit)
    if wrong.any():
        at, place = np.argwhere(wrong)[0].tolist()
        raise UserError(
            f"{source}: annotation {annotation_ids[at]}: `{key}` has {values[at, place]:g}, which no image is large "
            "enough for. Fix: correct it, in pixels"
        )


def _refuse_duplicates(ids: np.ndarray, what: str, source: object) -> None:
    ordered = np.sort(ids)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        more = f", and so do {len(twice) - 1} more" if len(twice) > 1 else ""
        raise UserError(f"{source}: the {what} id {ordered[twice[0]]} occurs more than once{more}. Fix: renumber them")


def _rows_of(wanted: np.ndarray, ids: np.ndarray, annotation_ids: np.ndarray, what: str, source: object) -> np.ndarray:
    """The row in `ids` of each id in `wanted`, one per annotation."""
    by_id = np.argsort(ids)
    rows = by_id[np.minimum(np.searchsorted(ids, wanted, sorter=by_id), len(ids) - 1)]
    unknown = ids[rows] != wanted
    if unknown.any():
        at = int(np.argmax(unknown))
        raise UserError(
            f"{source}: annotation {annotation_ids[at]} points to {what} {wanted[at]}, which is not in the file "
            f"({int(unknown.sum())} such annotations). Fix: add it, or remove the annotations"
        )
    return rows


def as_ids(ids: Collection[int], what: str, source: object) -> np.ndarray:
    """(N,) int64.

    Args:
        what: the error's name for one, "category id".

    Raises:
        UserError: an id does not fit in 64 bits.
    """
    try:
        return np.fromiter(ids, np.int64, len(ids))
    except OverflowError as error:
        wrong = next(one for one in ids if not -(2**63) <= one < 2**63)
        raise UserError(f"{source}: the {what} {shown(wrong)} does not fit in 64 bits. Fix: give it another") from error


def is_in_reach(numbers: npt.ArrayLike) -> np.ndarray:
    """Bool of the same shape: a coordinate or a size in pixels that an image can have; not NaN, not infinite."""
    return np.abs(numbers) < FARTHEST


def wrong_number_in(data: bytes | mmap.mmap) -> str:
    """The first number in JSON that is not finite as a float64; "" without one."""
    found = (match[0].decode() for match in _SUSPICIOUS.finditer(data))
    return next((shown(number) for number in found if not np.isfinite(float(number))), "")


def shown(value: object) -> str:
    """The value for an error message, shortened."""
    text = str(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
