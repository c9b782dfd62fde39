"""A COCO annotation file as memory-mapped columns.

The JSON is parsed once, by one process, into a folder of plain NumPy arrays, the cache. Every later open, and every
loader worker and rank of the machine, maps the same pages, so a file of COCO's size costs its memory once.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shared.config.schema import StoreOptions, is_url
from shared.data.file_lock import once, user_cache
from shared.data.numbers import FARTHEST, as_ids, wrong_number_in
from shared.data.remote import read_url, version_of
from shared.errors import UserError, nearest
from shared.redaction import redacted

logger = logging.getLogger(__name__)

CACHE_VERSION = 3

_DTYPES = {
    "image_ids": "<i8",
    "heights": "<i4",
    "widths": "<i4",
    "file_names": "|u1",
    "file_name_offsets": "<i8",
    "offsets": "<i8",
    "annotation_ids": "<i8",
    "boxes": "<f8",
    "labels": "<i4",
    "areas": "<f8",
    "iscrowd": "|b1",
    "segmentations": "|u1",
    "segmentation_offsets": "<i8",
    "keypoints": "<f8",
}
_MOST_PADDING = 10  # keypoints of zeros for each that is in the file
_MOST_UNPACKED = 200  # times what is packed, beside 64 MiB: JSON takes 5 to 40, and gzip's most is 1,032


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
    segmentation: msgspec.Raw = msgspec.Raw(b"")
    keypoints: msgspec.Raw = msgspec.Raw(b"")


class _CocoFile(msgspec.Struct, gc=False):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[dict[str, Any]]


@dataclass
class ImageRecord:
    """One image and its N annotations, in the order of the file.

    Attributes:
        image_id: COCO's image id.
        file_name: as in the file, relative to the images' folder.
        height, width: pixels, as in the file.
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels of the original image.
        labels: (N,) int64, 0 to K-1 in the order of category ids.
        areas: (N,) float32, pixels².
        iscrowd: (N,) bool.
        file_boxes: (N, 4) float64, x y width height, as in the file.
        keypoints: (N, K, 3) float64, x y visibility (0 not labelled, 1 hidden, 2 visible), as in the file, zeros
            where an annotation has none; None where no annotation of the file has any.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    iscrowd: np.ndarray
    file_boxes: np.ndarray
    raw_segmentations: Sequence[bytes]
    keypoints: np.ndarray | None = None

    def only(self, rows: np.ndarray | Sequence[int]) -> ImageRecord:
        """With some of the annotations: their positions, or (N,) bool."""
        rows = np.arange(len(self.boxes))[rows]
        return dataclasses.replace(
            self,
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            areas=self.areas[rows],
            iscrowd=self.iscrowd[rows],
            file_boxes=self.file_boxes[rows],
            raw_segmentations=[self.raw_segmentations[row] for row in rows],
            keypoints=None if self.keypoints is None else self.keypoints[rows],
        )

    @cached_property
    def segmentations(self) -> list[list | dict | None]:
        """N of COCO's polygons (list of [x1, y1, x2, y2, …]) or RLE (dict), None where there is none.

        Decoded at the first access, in the file's float64: float32 changes masks.

        Raises:
            UserError: a number in one is greater than a float64 can be.
        """
        try:
            return [msgspec.json.decode(raw) if raw else None for raw in self.raw_segmentations]
        except (msgspec.DecodeError, RecursionError) as error:
            raise UserError(f"{self.file_name} (image id {self.image_id}) has a bad segmentation: {error}") from error


class CocoAnnotations:
    """The images of a COCO file, each with its annotations; `ann[i]` is an `ImageRecord`.

    The columns keep the file's own values: boxes as x y width height in float64. Images are in the file's
    order, the annotations of an image too.

    Attributes:
        path: the file or its URL, or None for annotations made in memory.
        categories: [{"id": 1, "name": "person", …}, …], as in the file, in the order of ids.
        columns: name to array; the annotations of image i are rows `offsets[i]` to `offsets[i + 1]`.
        cache: the folder that the columns are mapped from, None where they are in memory.
        selected_from: of `select_categories`: the annotations with all categories, and (annotations,) bool which of
            theirs these are.
    """

    selected_from: tuple[CocoAnnotations, np.ndarray] | None = None

    def __init__(
        self, columns: dict[str, np.ndarray], categories: list[dict], path: Path | str | None, cache: Path | None
    ):
        self.columns = columns
        self.categories = categories
        self.path = path
        self.cache = cache

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        cache_dir: str | os.PathLike | None = None,
        options: StoreOptions = StoreOptions(),  # noqa: B008, it is frozen
    ) -> CocoAnnotations:
        """Map the cache of `path`, made at the first open by one of the processes that ask for it: in `cache_dir`,
        else beside the file, else in the user's cache directory. Where none of them can be written, the columns stay
        in memory.

        Args:
            path: the file, or its URL.
            options: how to reach the store of a URL.

        Raises:
            UserError: the file is missing, is not JSON, not COCO, or contradicts itself.
        """
        if is_url(os.fspath(path)):
            url = os.fspath(path)
            path, signature = url, version_of(url, options)
            size = int(signature["size"]) if "size" in signature else None
            read: Callable[[], bytes | mmap.mmap] = functools.partial(read_url, url, options, size)
        else:
            path = Path(path)
            signature, read = _version_on_disk(path), functools.partial(_map_file, path)
        signature = {"version": CACHE_VERSION, **signature}

        places = _cache_places(path, cache_dir)
        version = hashlib.sha256(json.dumps(signature, sort_keys=True).encode()).hexdigest()[:12]
        caches = [place / version for place in places]

        def find() -> CocoAnnotations | None:
            opened = (cls._from_cache(cache, path, signature) for cache in caches)
            return next((annotations for annotations in opened if annotations), None)

        def make() -> CocoAnnotations:
            columns, categories = _to_columns(_decode(_as_json(read(), path), path), path)
            for cache in caches:
                if _write_cache(cache, columns, categories, signature):
                    return cls._from_cache(cache, path, signature) or cls(columns, categories, path, None)
            logger.warning(
                "%s: the annotation cache cannot be written in %s; set data.cache_dir to a folder with room. "
                "Going on with the annotations in memory.",
                path,
                " or ".join(str(place.parent) for place in places) or "a home directory, for there is none",
            )
            return cls(columns, categories, path, None)

        return once([place / "lock" for place in places], find, make)

    @classmethod
    def from_dict(cls, coco: dict) -> CocoAnnotations:
        """Annotations from COCO's JSON structure in memory.

        Raises:
            UserError: as in `open`.
        """
        columns, categories = _to_columns(_decode(json.dumps(coco).encode(), "the annotations"), "the annotations")
        return cls(columns, categories, None, None)

    @classmethod
    def _from_cache(cls, cache: Path, path: Path | str | None, signature: dict | None) -> CocoAnnotations | None:
        try:
            header = json.loads((cache / "header.json").read_bytes())
            if signature is not None and header["signature"] != signature:
                return None
            # asarray: the same mapped pages without np.memmap's slow indexing
            columns = {name: np.asarray(np.load(cache / f"{name}.npy", mmap_mode="r")) for name in header["columns"]}
            if {name: len(column) for name, column in columns.items()} != header["columns"]:
                return None
            _check_columns(columns, _checked_categories(header["categories"], cache))
            return cls(columns, header["categories"], path, cache)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None  # missing, cut off or not ours: made anew

    def __reduce__(self):
        # loader workers that are not forked map the cache again instead of receiving a copy
        if self.cache is not None:
            return CocoAnnotations._from_cache, (self.cache, self.path, None)
        return CocoAnnotations, (self.columns, self.categories, self.path, None)

    def __len__(self) -> int:
        return len(self.columns["image_ids"])

    def __getitem__(self, index: int) -> ImageRecord:
        columns = self.columns
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start, end = columns["offsets"][index], columns["offsets"][index + 1]
        boxes = columns["boxes"][start:end]
        xyxy = np.empty((end - start, 4), dtype=np.float32)
        xyxy[:, :2] = boxes[:, :2]
        xyxy[:, 2:] = boxes[:, :2] + boxes[:, 2:]
        raw, raw_offsets = columns["segmentations"], columns["segmentation_offsets"][start : end + 1].tolist()
        return ImageRecord(
            image_id=int(columns["image_ids"][index]),
            file_name=self.file_name(index),
            height=int(columns["heights"][index]),
            width=int(columns["widths"][index]),
            boxes=xyxy,
            labels=columns["labels"][start:end].astype(np.int64),
            areas=columns["areas"][start:end].astype(np.float32),
            iscrowd=columns["iscrowd"][start:end].copy(),
            file_boxes=boxes,
            raw_segmentations=_LazyBytes(raw, raw_offsets),
            keypoints=columns["keypoints"][start:end] if "keypoints" in columns else None,
        )

    def file_name(self, index: int) -> str:
        start, end = self.columns["file_name_offsets"][index], self.columns["file_name_offsets"][index + 1]
        return self.columns["file_names"][start:end].tobytes().decode()

    @property
    def file_names(self) -> np.ndarray:
        """(images,) bytes, the UTF-8 of all names."""
        lengths = np.diff(self.columns["file_name_offsets"])
        width = max(int(lengths.max()), 1)
        letters = np.zeros((len(self), width), np.uint8)
        letters[np.arange(width) < lengths[:, None]] = self.columns["file_names"]
        return letters.view(f"S{width}").ravel()

    @property
    def category_ids(self) -> list[int]:
        """The category id of each label."""
        return [category["id"] for category in self.categories]

    @property
    def category_names(self) -> list[str]:
        """The category name of each label."""
        return [category["name"] for category in self.categories]

    @property
    def image_ids(self) -> np.ndarray:
        """(images,) int64."""
        return self.columns["image_ids"]

    def select_categories(self, names: Sequence[str]) -> CocoAnnotations:
        """The same images with the annotations of these categories only; held in memory.

        Raises:
            UserError: a name is not a category's; says which, and the nearest.
        """
        for name in names:
            if name not in self.category_names:
                raise UserError(f"{name!r} is no category of {self.path}; {nearest(name, self.category_names)}")
        categories = [category for category in self.categories if category["name"] in names]
        labels = [self.category_names.index(category["name"]) for category in categories]
        columns, kept = dict(self.columns), np.isin(self.columns["labels"], labels)
        image_rows = np.repeat(np.arange(len(self)), np.diff(columns["offsets"]))[kept]
        columns["offsets"] = _offsets(np.bincount(image_rows, minlength=len(self)))
        starts, ends = columns["segmentation_offsets"][:-1][kept], columns["segmentation_offsets"][1:][kept]
        pieces = [columns["segmentations"][start:end] for start, end in zip(starts, ends, strict=True)]
        columns["segmentations"] = np.concatenate([np.empty(0, np.uint8), *pieces])
        columns["segmentation_offsets"] = _offsets(ends - starts)
        for name in ("annotation_ids", "boxes", "areas", "iscrowd", "keypoints"):
            if name in columns:
                columns[name] = columns[name][kept]
        columns["labels"] = np.searchsorted(labels, columns["labels"][kept]).astype(np.int32)
        selected = CocoAnnotations(columns, categories, self.path, None)
        selected.selected_from = self, kept
        return selected

    @property
    def without_area(self) -> np.ndarray:
        """(annotations,) bool: boxes of no width or no height, which cannot be trained on."""
        return (self.columns["boxes"][:, 2:] <= 0).any(axis=1)


class _LazyBytes:
    """The raw segmentations of one image, copied out of the mapped file only when somebody asks."""

    def __init__(self, data: np.ndarray, offsets: list[int]):
        self.data, self.offsets = data, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        if index >= len(self):
            raise IndexError(index)
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()


def check_same_categories(train: CocoAnnotations, val: CocoAnnotations) -> None:
    """Raises UserError where the two files do not have the same category ids and names."""
    train_names = {category["id"]: category["name"] for category in train.categories}
    val_names = {category["id"]: category["name"] for category in val.categories}
    for category_id in sorted(train_names.keys() | val_names.keys()):
        if train_names.get(category_id) != val_names.get(category_id):
            raise UserError(
                f"data.train ({train.path}) and data.val ({val.path}) have different categories: id {category_id} is "
                f"{_named(train_names.get(category_id))} in the first and {_named(val_names.get(category_id))} in the "
                "second; both need the same list"
            )


def _named(name: str | None) -> str:
    return "absent" if name is None else repr(name)


# --- from JSON to columns ---------------------------------------------------------------------------


def _version_on_disk(path: Path) -> dict[str, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} does not exist or cannot be read ({error.strerror})") from error
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the COCO JSON file itself")
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            # not closed here: the undecoded segmentations point into it
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # nothing to map
        raise UserError(f"{path} is empty") from error


# how files begin that are something else, as downloads and exports leave them, and what to do
_NO_JSON = {
    b"\xff\xfe": "is in UTF-16; save it in UTF-8",
    b"\xfe\xff": "is in UTF-16; save it in UTF-8",
    b"{\0": "is in UTF-16; save it in UTF-8",
    b"\0{": "is in UTF-16; save it in UTF-8",
    b"<!doctype html": "is a web page, not the file itself; download it again, a file behind a login or a form by hand",
    b"<html": "is a web page, not the file itself; download it again, a file behind a login or a form by hand",
    b"<": "is XML; `python3 -m shared convert` makes COCO's JSON of Pascal VOC and CVAT",
    b"pk\3\4": "is a ZIP archive; unpack it, and name the JSON file in it",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself; run `git lfs pull`",
}


def _as_json(data: bytes | mmap.mmap, source: object) -> bytes | mmap.mmap:
    """The JSON, unpacked where it is packed with gzip, and without the mark that Windows' programs write before it."""
    if data[:2] == b"\x1f\x8b":
        data = _unpacked(data, source)
    if data[:3] == codecs.BOM_UTF8:
        data = data[3:]
    head = bytes(data[:256]).lstrip().lower()
    for start, meaning in _NO_JSON.items():
        if head.startswith(start):
            raise UserError(f"{source} {meaning}")
    return data


def _unpacked(data: bytes | mmap.mmap, source: object) -> bytes:
    limit = 2**26 + _MOST_UNPACKED * len(data)
    pieces, size = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while piece := file.read(2**20):
                pieces.append(piece)
                if (size := size + len(piece)) > limit:
                    raise UserError(
                        f"{source}: its {len(data):,} bytes unpack with gzip to more than {limit:,}, which no "
                        "annotation file does. Fix: download it again, or, if you trust it, unpack it with gunzip"
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source} is packed with gzip, and cannot be unpacked: {error}") from error
    return b"".join(pieces)


def _decode(data: bytes | mmap.mmap, source: object) -> _CocoFile:
    try:
        return msgspec.json.decode(data, type=_CocoFile)
    except msgspec.ValidationError as error:
        number = wrong_number_in(data) if "out of range" in str(error) else ""
        found = f" ({number})" if number else ""
        raise UserError(f"{source} is not a COCO detection file: {error}{found}") from error
    except msgspec.DecodeError as error:
        raise UserError(_why_not_json(data, source, error)) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not JSON: it is not in UTF-8 ({error})") from error
    except RecursionError as error:
        raise UserError(f"{source} is not a COCO detection file: lists in lists without end") from error


def _why_not_json(data: bytes | mmap.mmap, source: object, error: Exception) -> str:
    # Python writes NaN and Infinity, which JSON has not: name the annotation instead of a byte
    at = max(data.find(word) for word in (b"NaN", b"Infinity"))
    if at >= 0:
        start, end = data.rfind(b"{", 0, at), data.find(b"}", at)
        try:
            annotation = json.loads(data[start : end + 1])
            if not all(math.isfinite(number) for number in annotation["bbox"]):
                return f"{source}: annotation {annotation['id']} has a non-finite bbox {annotation['bbox']}; correct it"
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # not that: the parser's own words say where it is broken
    if number := wrong_number_in(data):
        return f"{source} has the number {number}, which JSON does not have: {error}. Fix: correct or omit it"
    return f"{source} is not JSON, or is cut off: {error}"


def _to_columns(coco: _CocoFile, source: object) -> tuple[dict[str, np.ndarray], list[dict]]:
    categories = _checked_categories(coco.categories, source)
    images, annotations = coco.images, coco.annotations
    if not images:
        raise UserError(f"{source} has no images")

    def column(values: Any, dtype: type, count: int) -> np.ndarray:
        return np.fromiter(values, dtype, count)

    image_ids = as_ids([image.id for image in images], "image id", source)
    annotation_ids = as_ids([a.id for a in annotations], "annotation id", source)
    image_of = as_ids([a.image_id for a in annotations], "image id of an annotation", source)
    category_of = as_ids([a.category_id for a in annotations], "category id of an annotation", source)
    _refuse_duplicates(image_ids, "image", source)
    _refuse_duplicates(annotation_ids, "annotation", source)
    for image in images:
        if image.height <= 0 or image.width <= 0 or max(image.height, image.width) >= 2**31:
            raise UserError(f"{source}: image {image.id} has the size {image.width}×{image.height}")

    image_rows = _rows_of(image_of, image_ids, annotation_ids, "image", source)
    category_ids = np.array([category["id"] for category in categories], np.int64)
    labels = _rows_of(category_of, category_ids, annotation_ids, "category", source)

    boxes = column(itertools.chain.from_iterable(a.bbox for a in annotations), np.float64, 4 * len(annotations))
    boxes = boxes.reshape(-1, 4)
    _refuse_out_of_reach(boxes, "bbox", annotation_ids, source)
    areas = column((math.nan if a.area is None else a.area for a in annotations), np.float64, len(annotations))
    areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
    _refuse_out_of_reach(areas[:, None], "area", annotation_ids, source, FARTHEST**2)

    order = np.argsort(image_rows, kind="stable")
    raw = [_present(annotations[i].segmentation) for i in order.tolist()]
    names = [image.file_name.encode() for image in images]
    columns = {
        "image_ids": image_ids,
        "heights": column((image.height for image in images), np.int32, len(images)),
        "widths": column((image.width for image in images), np.int32, len(images)),
        "file_names": np.frombuffer(b"".join(names), np.uint8),
        "file_name_offsets": _offsets(column(map(len, names), np.int64, len(names))),
        "offsets": _offsets(np.bincount(image_rows, minlength=len(images))),
        "annotation_ids": annotation_ids[order],
        "boxes": boxes[order],
        "labels": labels[order].astype(np.int32),
        "areas": areas[order],
        "iscrowd": column((bool(a.iscrowd) for a in annotations), np.bool_, len(annotations))[order],
        "segmentations": np.frombuffer(b"".join(raw), np.uint8),
        "segmentation_offsets": _offsets(column(map(len, raw), np.int64, len(raw))),
    }
    if any(_present(a.keypoints) for a in annotations):
        columns["keypoints"] = _keypoints([annotations[i] for i in order.tolist()], source)
    return columns, categories


def _present(raw: msgspec.Raw) -> bytes:
    return b"" if (piece := bytes(raw)) == b"null" else piece


def _keypoints(annotations: list[_Annotation], source: object) -> np.ndarray:
    """(annotations, K, 3) float64, K of the category that has the most."""
    rows = []
    for annotation in annotations:
        raw = _present(annotation.keypoints)
        try:
            row = np.array(msgspec.json.decode(raw, type=list[float]) if raw else [])
        except msgspec.ValidationError as error:
            raise UserError(
                f"{source}: annotation {annotation.id} has keypoints that are no numbers: {error}"
            ) from error
        if len(row) % 3:
            raise UserError(
                f"{source}: annotation {annotation.id} has {len(row)} numbers in `keypoints`; COCO has x, y and "
                "visibility of each point"
            )
        rows.append(row)
    longest = max(rows, key=len)
    if len(longest) * len(rows) > _MOST_PADDING * (sum(map(len, rows)) + 2**20):
        at = next(i for i, row in enumerate(rows) if row is longest)
        raise UserError(
            f"{source}: annotation {annotations[at].id} has {len(longest) // 3} keypoints, and others far fewer; all "
            "of a category have the same number"
        )
    keypoints = np.zeros((len(rows), len(longest)))
    for at, row in enumerate(rows):
        keypoints[at, : len(row)] = row
    _refuse_out_of_reach(keypoints, "keypoints", [annotation.id for annotation in annotations], source)
    return keypoints.reshape(len(rows), -1, 3)


def _refuse_out_of_reach(
    values: np.ndarray, key: str, annotation_ids: Sequence[int], source: object, limit: float = FARTHEST
) -> None:
    """Raises UserError if one of (annotations, N) numbers cannot be of an image."""
    wrong = ~(np.abs(values) < limit)
    if wrong.any():
        at, place = np.argwhere(wrong)[0].tolist()
        raise UserError(
            f"{source}: annotation {annotation_ids[at]}: `{key}` has {values[at, place]:g}, which no image is large "
            "enough for. Fix: correct it, in pixels"
        )


def _checked_categories(categories: list[dict], source: object) -> list[dict]:
    if not categories:
        raise UserError(f"{source} has no categories")
    for category in categories:
        if type(category.get("id")) is not int or not isinstance(category.get("name"), str):
            raise UserError(f"{source}: every category needs an integer `id` and a `name`, and one is {category}")
    _refuse_duplicates(as_ids([category["id"] for category in categories], "category id", source), "category", source)
    names = [category["name"] for category in categories]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{source}: two categories have the name {twice!r}; rename one")
    return sorted(categories, key=lambda category: category["id"])


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _refuse_duplicates(ids: np.ndarray, what: str, source: object) -> None:
    ordered = np.sort(ids)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise UserError(f"{source}: {len(twice)} {what} ids occur more than once, the first is {ordered[twice[0]]}")


def _rows_of(wanted: np.ndarray, ids: np.ndarray, annotation_ids: np.ndarray, what: str, source: object) -> np.ndarray:
    """The row in `ids` of each of `wanted`."""
    by_id = np.argsort(ids)
    position = np.minimum(np.searchsorted(ids, wanted, sorter=by_id), len(ids) - 1)
    rows = by_id[position]
    unknown = ids[rows] != wanted
    if unknown.any():
        at = int(np.argmax(unknown))
        raise UserError(
            f"{source}: annotation {annotation_ids[at]} points to {what} {wanted[at]}, which is not in the file "
            f"({int(unknown.sum())} annotations do)"
        )
    return rows


# --- the cache --------------------------------------------------------------------------------------
#
# <file>.columns/lock             held by the process that parses
#                <version>/       one for each version of the file that was opened: its name follows from the file's
#                                 size and time (a store's ETag …), so that no pointer can be behind
#
# A version is never changed, and not removed while it may be mapped: on NFS a mapped file that another machine removes
# ends its reader in SIGBUS. Of the versions that a new one replaces, the latest stays, and the older ones go.


def _cache_places(path: Path | str, cache_dir: str | os.PathLike | None) -> list[Path]:
    absolute = path if isinstance(path, str) else path.absolute()
    file_name = redacted(os.path.basename(path))  # of a URL, it may have a signature
    name = f"{file_name}.{hashlib.sha256(os.fsencode(absolute)).hexdigest()[:12]}.columns"
    if cache_dir is not None:
        return [Path(cache_dir) / name]
    cache = user_cache()
    beside = [] if isinstance(absolute, str) else [absolute.parent / f".{file_name}.columns"]
    return [*beside, *([] if cache is None else [cache / "coco_annotations" / name])]


def _check_columns(columns: dict[str, np.ndarray], categories: list[dict]) -> None:
    """Raises ValueError where the columns are not what `_to_columns` makes: reading them would fail later, or leave
    their bounds."""
    images, annotations = len(columns["image_ids"]), len(columns["annotation_ids"])
    ends = {
        "offsets": (images, annotations),
        "file_name_offsets": (images, len(columns["file_names"])),
        "segmentation_offsets": (annotations, len(columns["segmentations"])),
    }
    sound = columns.keys() | {"keypoints"} == _DTYPES.keys()
    sound &= all(column.dtype == _DTYPES[name] for name, column in columns.items())
    for name, (count, end) in ends.items():
        offsets = columns[name]
        sound &= offsets.shape == (count + 1,) and offsets[0] == 0 and offsets[-1] == end
        sound &= bool((offsets[1:] >= offsets[:-1]).all())
    of_images, of_annotations = ("heights", "widths"), ("boxes", "labels", "areas", "iscrowd", "keypoints")
    sound &= all(len(columns[name]) == images for name in of_images)
    sound &= all(len(columns[name]) == annotations for name in of_annotations if name in columns)
    sound &= columns["boxes"].shape[1:] == (4,)
    sound &= not annotations or 0 <= columns["labels"].min() <= columns["labels"].max() < len(categories)
    if not sound:
        raise ValueError("not an annotation cache")


def _write_cache(cache: Path, columns: dict[str, np.ndarray], categories: list[dict], signature: dict) -> bool:
    """Whether the cache is in place. Written aside and renamed, so that nobody maps half of one."""
    aside = None
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=cache.parent, prefix="."))
        aside.chmod(0o755)
        for name, column in columns.items():
            np.save(aside / f"{name}.npy", column)
        lengths = {name: len(column) for name, column in columns.items()}
        header = {"signature": signature, "columns": lengths, "categories": categories}
        (aside / "header.json").write_text(json.dumps(header))
        if cache.exists() and CocoAnnotations._from_cache(cache, None, signature) is None:  # cut off, or not ours
            cache.rename(tempfile.mkdtemp(dir=cache.parent, prefix="damaged."))
        try:
            aside.rename(cache)
        except OSError:
            # a process of another machine was faster: its cache is as good
            return CocoAnnotations._from_cache(cache, None, signature) is not None
        _remove_older(cache)
        return True
    except OSError:
        return False
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _remove_older(cache: Path) -> None:
    """Removes all beside this version but the one before it."""
    others = [path for path in cache.parent.iterdir() if path.is_dir() and path != cache]
    versions = [path for path in others if (path / "header.json").is_file()]  # else one that was killed was writing it
    before = max(versions, key=lambda path: (path / "header.json").stat().st_mtime_ns, default=None)
    for path in others:
        if path != before:
            shutil.rmtree(path, ignore_errors=True)
