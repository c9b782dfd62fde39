"""COCO annotations: one record per image. A file is parsed once per machine, into columns that all processes map.

<file>.columns/lock         held by the process that parses
               <version>/   the columns of one version of the file, named after its size and time, or its ETag
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from shared.config.schema import StoreOptions, is_url
from shared.data import coco_file
from shared.data.cache import load_arrays, mark_as_cache, save_arrays
from shared.data.coco_file import Columns, check_categories, offsets_of
from shared.durable import once, user_cache
from shared.errors import UserError, nearest
from shared.log import redacted

logger = logging.getLogger(__name__)

T = TypeVar("T")


def rows_of(record: T, rows: np.ndarray | Sequence[int], names: Sequence[str]) -> T:
    """A dataclass whose attributes of these names, arrays and sequences or None, have some of their rows."""

    def some(values: Any) -> Any:
        return values[rows] if isinstance(values, np.ndarray) else values and [values[row] for row in rows]

    return dataclasses.replace(record, **{name: some(getattr(record, name)) for name in names})


@dataclass
class ImageRecord:
    """One image and its N annotations, in the order of the file.

    Attributes:
        image_id: COCO's image id.
        file_name: as in the file, relative to the folder of images.
        height, width: pixels, as in the file.
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels of the original image.
        labels: (N,) int64, 0 to K-1 in the order of category ids.
        areas: (N,) float32, pixels².
        iscrowd: (N,) bool.
        file_boxes: (N, 4) float64, x y width height, as in the file.
        raw_segmentations: N of JSON text, empty if an annotation has none.
        keypoints: (N, K, 3) float64, x y visibility (0 not labeled, 1 hidden, 2 visible), as in the file. Zeros if
            an annotation has none; None if no annotation of the file has any.
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
        """The record with some of its annotations, given by position or as (N,) bool."""
        names = ("boxes", "labels", "areas", "iscrowd", "file_boxes", "keypoints", "raw_segmentations")
        return rows_of(self, np.arange(len(self.boxes))[rows], names)

    @cached_property
    def segmentations(self) -> list[list | dict | None]:
        """N of COCO's polygons (list of [x1, y1, x2, y2, …]), RLE (dict) or None.

        They are decoded at the first access, as float64: float32 changes masks.

        Raises:
            UserError: a number is out of float64's range.
        """
        try:
            return [msgspec.json.decode(raw) if raw else None for raw in self.raw_segmentations]
        except (msgspec.DecodeError, RecursionError) as error:
            raise UserError(
                f"{self.file_name} (image id {self.image_id}) has a bad segmentation: {error}. Fix: correct or remove "
                "it"
            ) from error


@dataclass(eq=False, repr=False)
class CocoAnnotations:
    """The images of a COCO file, each with its annotations. `ann[i]` is an `ImageRecord`.

    Images keep the order of the file, and so do the annotations of an image. The columns keep the file's own values:
    boxes are x y width height in float64.

    Attributes:
        columns: array by name. The annotations of image i are rows `offsets[i]` to `offsets[i + 1]`.
        categories: [{"id": 1, "name": "person", …}, …], as in the file, sorted by id.
        notes: sentences on what was changed in reading the file.
        cache: the folder that the columns are mapped from; None if they are in memory.
        path: the file or its URL; None for annotations made in memory.
        selected_from: set by `select`: all annotations, and (annotations,) bool for the selected ones.
    """

    columns: Columns
    categories: list[dict]
    notes: Sequence[str] = ()
    cache: Path | None = None
    path: Path | str | None = None
    selected_from: tuple[CocoAnnotations, np.ndarray] | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        cache_dir: str | os.PathLike | None = None,
        options: StoreOptions = StoreOptions(),  # noqa: B008, it is frozen
    ) -> CocoAnnotations:
        """Opens a file or URL. One process of the machine parses it into a cache; the others wait and map the cache.

        If no folder can be written, a warning is logged and the columns stay in memory.

        Args:
            cache_dir: for the cache. By default, it is beside the file, or in the user's cache directory.
            options: how to reach the store of a URL.

        Raises:
            UserError: the file is missing, is not JSON, is not COCO, or contradicts itself.
        """
        path = os.fspath(path) if is_url(os.fspath(path)) else Path(path)
        version = coco_file.version_of(path, options)
        text = json.dumps({"version": FORMAT_VERSION, **version}, sort_keys=True)
        places = _cache_places(path, cache_dir)
        caches = [place / hashlib.sha256(text.encode()).hexdigest()[:12] for place in places]

        def find() -> CocoAnnotations | None:
            return next(filter(None, (_mapped(cache, path) for cache in caches)), None)

        def make() -> CocoAnnotations:
            parsed = coco_file.read(path, version, options)
            in_memory = cls(*parsed, path=path)
            for cache in caches:
                mark_as_cache(cache.parent)
                if save_arrays(cache, parsed.columns, {"categories": parsed.categories, "notes": parsed.notes}):
                    _remove_older(cache)
                    return _mapped(cache, path) or in_memory
            logger.warning(
                "%s: the annotation cache cannot be written in %s; set data.cache_dir to a folder with room. The "
                "annotations stay in memory",
                path,
                " or ".join(str(place.parent) for place in places) or "a home directory, for there is none",
            )
            return in_memory

        return once([place / "lock" for place in places], find, make)

    @classmethod
    def from_dict(cls, coco: dict) -> CocoAnnotations:
        """Annotations from COCO's JSON structure in memory.

        Raises:
            UserError: as for `open`.
        """
        return cls(*coco_file.parse(json.dumps(coco).encode(), "the annotations"))

    @classmethod
    def of_sizes(cls, sizes: Iterable[tuple[int, int]], categories: list[dict]) -> CocoAnnotations:
        """Images of these (width, height), without objects. Their positions are their ids and names."""
        rows = [
            {"id": i, "file_name": str(i), "width": width, "height": height} for i, (width, height) in enumerate(sizes)
        ]
        return cls.from_dict({"images": rows, "annotations": [], "categories": categories})

    def __reduce__(self):
        # loader workers that are not forked map the cache, instead of receiving a copy
        if self.cache is not None:
            return _mapped, (self.cache, self.path)
        return CocoAnnotations, (self.columns, self.categories, self.notes, None, self.path)

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
        """(images,) bytes: all names in UTF-8."""
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

    @property
    def without_area(self) -> np.ndarray:
        """(annotations,) bool: boxes without width or height, which cannot be trained on."""
        return (self.columns["boxes"][:, 2:] <= 0).any(axis=1)

    @property
    def image_rows(self) -> np.ndarray:
        """(annotations,) int64: the index of each annotation's image."""
        return np.repeat(np.arange(len(self)), np.diff(self.columns["offsets"]))

    def select(self, kept: np.ndarray) -> CocoAnnotations:
        """The same images with some of the annotations, given as (annotations,) bool; held in memory."""
        columns = dict(self.columns)
        columns["offsets"] = offsets_of(np.bincount(self.image_rows[kept], minlength=len(self)))
        starts, ends = columns["segmentation_offsets"][:-1][kept], columns["segmentation_offsets"][1:][kept]
        pieces = [columns["segmentations"][start:end] for start, end in zip(starts, ends, strict=True)]
        columns["segmentations"] = np.concatenate([np.empty(0, np.uint8), *pieces])
        columns["segmentation_offsets"] = offsets_of(ends - starts)
        for name in ("annotation_ids", "boxes", "labels", "areas", "iscrowd", "ignore", "keypoints"):
            if name in columns:
                columns[name] = columns[name][kept]
        return CocoAnnotations(columns, self.categories, self.notes, None, self.path, (self, kept))

    def select_categories(self, names: Sequence[str]) -> CocoAnnotations:
        """The same images with the annotations of these categories only, held in memory.

        Raises:
            UserError: a name is not the name of a category.
        """
        for name in names:
            if name not in self.category_names:
                raise UserError(f"{name!r} is not a category of {self.path}{nearest(name, self.category_names)}")
        labels = [label for label, name in enumerate(self.category_names) if name in names]
        kept = np.isin(self.columns["labels"], labels)
        columns = self.select(kept).columns
        columns["labels"] = np.searchsorted(labels, columns["labels"]).astype(np.int32)
        categories = [self.categories[label] for label in labels]
        return CocoAnnotations(columns, categories, self.notes, None, self.path, (self, kept))


class _LazyBytes:
    """The raw segmentations of one image, copied out of the mapped file only on access."""

    def __init__(self, data: np.ndarray, offsets: list[int]):
        self.data, self.offsets = data, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        if index >= len(self):
            raise IndexError(index)
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()


def check_same_categories(train: CocoAnnotations, val: CocoAnnotations) -> None:
    """Raises UserError if the two files differ in category ids or names."""
    train_names, val_names = (dict(zip(a.category_ids, a.category_names, strict=True)) for a in (train, val))
    for category_id in sorted(train_names.keys() | val_names.keys()):
        names = train_names.get(category_id), val_names.get(category_id)
        if names[0] != names[1]:
            first, second = ("absent" if name is None else repr(name) for name in names)
            raise UserError(
                f"data.train ({train.path}) and data.val ({val.path}) have different categories: id {category_id} is "
                f"{first} in the first and {second} in the second. Fix: give both files the same list"
            )


# --- the cache of a parsed file ---------------------------------------------------------------------

FORMAT_VERSION = 5


def _mapped(cache: Path, path: Path | str | None) -> CocoAnnotations | None:
    """The annotations of a file, mapped from its cache folder. None if that is missing or damaged."""
    try:
        columns, about = load_arrays(cache)
        mapped = CocoAnnotations(columns, **about, cache=cache, path=path)
        return mapped if _is_sound(columns, check_categories(mapped.categories, cache)) else None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _cache_places(path: Path | str, cache_dir: str | os.PathLike | None) -> list[Path]:
    file_name = redacted(os.path.basename(path))  # a URL may hold a signature
    absolute = path if isinstance(path, str) else path.absolute()
    name = f"{file_name}.{hashlib.sha256(os.fsencode(absolute)).hexdigest()[:12]}.columns"
    if cache_dir is not None:
        return [Path(cache_dir) / name]
    places = [] if isinstance(absolute, str) else [absolute.parent / f".{file_name}.columns"]
    if (cache := user_cache()) is not None:
        places.append(cache / "coco_annotations" / name)
    return places


def _is_sound(columns: Columns, categories: list[dict]) -> bool:
    """Whether reading the columns cannot fail or leave their bounds."""
    images, annotations = len(columns["image_ids"]), len(columns["annotation_ids"])
    ends = {
        "offsets": (images, annotations),
        "file_name_offsets": (images, len(columns["file_names"])),
        "segmentation_offsets": (annotations, len(columns["segmentations"])),
    }
    sound = True
    for name, (count, end) in ends.items():
        offsets = columns[name]
        sound &= offsets.shape == (count + 1,) and offsets[0] == 0 and offsets[-1] == end
        sound &= bool((offsets[1:] >= offsets[:-1]).all())
    of_annotations = ["boxes", "labels", "areas", "iscrowd", *(columns.keys() & {"ignore", "keypoints"})]
    sound &= all(len(columns[name]) == images for name in ("heights", "widths"))
    sound &= all(len(columns[name]) == annotations for name in of_annotations)
    sound &= columns["boxes"].shape[1:] == (4,)
    return sound and (not annotations or 0 <= columns["labels"].min() <= columns["labels"].max() < len(categories))


def _remove_older(cache: Path) -> None:
    """Removes all versions except this one and the previous one, and what killed processes left.

    A process may map the previous version: on NFS, removing a mapped file kills its reader with SIGBUS.
    """
    others = [path for path in cache.parent.iterdir() if path.is_dir() and path != cache]
    versions = [path for path in others if (path / "header.json").is_file()]
    previous = max(versions, key=lambda path: (path / "header.json").stat().st_mtime_ns, default=None)
    for path in others:
        if path != previous:
            shutil.rmtree(path, ignore_errors=True)
