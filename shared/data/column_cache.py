"""The cache of a parsed annotation file: memory-mapped columns that all processes of a machine share.

    <file>.columns/lock         held by the process that parses
                   <version>/   one per version of the file, named after its size and time, or its ETag in a store

A version never changes. It is not removed while a process may map it: on NFS, removing a mapped file kills its reader
with SIGBUS. The previous version stays, and older ones are removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shared.data.coco_file import Columns, check_categories
from shared.data.file_lock import once, user_cache
from shared.redaction import redacted

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
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
Parsed = tuple[Columns, list[dict], Path | None]  # columns, categories, and the cache folder that they are mapped from


def cached(
    path: Path | str,
    version: dict,
    cache_dir: str | os.PathLike | None,
    parse: Callable[[], tuple[Columns, list[dict]]],
) -> Parsed:
    """Maps the columns of an annotation file. One process parses a new file; the others wait and map its result.

    The cache is in `cache_dir`. By default, it is beside the file, or in the user's cache directory. If no folder can
    be written, a warning is logged and the columns stay in memory.

    Args:
        version: changes when the file changes.
        parse: gives columns and categories.
    """
    version = {"version": FORMAT_VERSION, **version}
    name = hashlib.sha256(json.dumps(version, sort_keys=True).encode()).hexdigest()[:12]
    places = _cache_places(path, cache_dir)
    caches = [place / name for place in places]

    def find() -> Parsed | None:
        return next(filter(None, (load(cache, version) for cache in caches)), None)

    def make() -> Parsed:
        columns, categories = parse()
        for cache in caches:
            if _write(cache, columns, categories, version):
                return load(cache, version) or (columns, categories, None)
        logger.warning(
            "%s: the annotation cache cannot be written in %s; set data.cache_dir to a folder with room. "
            "Going on with the annotations in memory.",
            path,
            " or ".join(str(place.parent) for place in places) or "a home directory, for there is none",
        )
        return columns, categories, None

    return once([place / "lock" for place in places], find, make)


def load(cache: Path, version: dict | None = None) -> Parsed | None:
    """Maps a cache folder. Returns None if it is missing, cut off or damaged, or holds another version."""
    try:
        header = json.loads((cache / "header.json").read_bytes())
        if version is not None and header["signature"] != version:
            return None
        # asarray keeps the mapped pages, and drops the slow indexing of np.memmap
        columns = {name: np.asarray(np.load(cache / f"{name}.npy", mmap_mode="r")) for name in header["columns"]}
        if {name: len(column) for name, column in columns.items()} != header["columns"]:
            return None
        _check(columns, check_categories(header["categories"], cache))
        return columns, header["categories"], cache
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
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


def _check(columns: Columns, categories: list[dict]) -> None:
    """Raises ValueError if reading the columns could fail or leave their bounds."""
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
    of_annotations = ("boxes", "labels", "areas", "iscrowd", "keypoints")
    sound &= all(len(columns[name]) == images for name in ("heights", "widths"))
    sound &= all(len(columns[name]) == annotations for name in of_annotations if name in columns)
    sound &= columns["boxes"].shape[1:] == (4,)
    sound &= not annotations or 0 <= columns["labels"].min() <= columns["labels"].max() < len(categories)
    if not sound:
        raise ValueError("not an annotation cache")


def _write(cache: Path, columns: Columns, categories: list[dict], version: dict) -> bool:
    """Whether the cache exists now. It is written under another name and renamed, so that no process maps a part."""
    new = None
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=cache.parent, prefix="."))
        new.chmod(0o755)
        for name, column in columns.items():
            np.save(new / f"{name}.npy", column)
        lengths = {name: len(column) for name, column in columns.items()}
        header = {"signature": version, "columns": lengths, "categories": categories}
        (new / "header.json").write_text(json.dumps(header))
        if cache.exists() and load(cache, version) is None:  # damaged
            cache.rename(tempfile.mkdtemp(dir=cache.parent, prefix="damaged."))
        try:
            new.rename(cache)
        except OSError:  # a process of another machine was faster
            return load(cache, version) is not None
        _remove_older(cache)
        return True
    except OSError:
        return False
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def _remove_older(cache: Path) -> None:
    """Removes all versions except this one and the previous one, and what killed processes left."""
    others = [path for path in cache.parent.iterdir() if path.is_dir() and path != cache]
    versions = [path for path in others if (path / "header.json").is_file()]
    previous = max(versions, key=lambda path: (path / "header.json").stat().st_mtime_ns, default=None)
    for path in others:
        if path != previous:
            shutil.rmtree(path, ignore_errors=True)
