"""The cache of a parsed annotation file.

    <file>.columns/lock         held by the process that parses
                   <version>/   the columns of one version of the file, named after its size and time, or its ETag

A version is not removed while a process may map it: on NFS, removing a mapped file kills its reader with SIGBUS. So the
previous version stays, and older ones are removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from shared.data import array_cache
from shared.data.coco_file import Columns, Parsed, check_categories
from shared.data.file_lock import once, user_cache
from shared.redaction import redacted

logger = logging.getLogger(__name__)

FORMAT_VERSION = 5
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
    "ignore": "|b1",
    "keypoints": "<f8",
}
_OPTIONAL = {"ignore", "keypoints"}
Opened = tuple[Parsed, Path | None]  # and the folder that the columns are mapped from


def cached(
    path: Path | str,
    version: dict,
    cache_dir: str | os.PathLike | None,
    parse: Callable[[], Parsed],
) -> Opened:
    """A parsed annotation file. One process parses a new version; the others wait and map its result.

    The cache is in `cache_dir`. By default, it is beside the file, or in the user's cache directory. If no folder can
    be written, a warning is logged and the columns stay in memory.

    Args:
        version: changes when the file changes.
    """
    text = json.dumps({"version": FORMAT_VERSION, **version}, sort_keys=True)
    places = _cache_places(path, cache_dir)
    caches = [place / hashlib.sha256(text.encode()).hexdigest()[:12] for place in places]

    def find() -> Opened | None:
        return next(filter(None, map(load, caches)), None)

    def make() -> Opened:
        parsed = parse()
        for cache in caches:
            array_cache.mark_as_cache(cache.parent)
            if array_cache.save(cache, parsed.columns, {"categories": parsed.categories, "notes": parsed.notes}):
                _remove_older(cache)
                return load(cache) or (parsed, None)
        logger.warning(
            "%s: the annotation cache cannot be written in %s; set data.cache_dir to a folder with room. "
            "Going on with the annotations in memory.",
            path,
            " or ".join(str(place.parent) for place in places) or "a home directory, for there is none",
        )
        return parsed, None

    return once([place / "lock" for place in places], find, make)


def load(cache: Path) -> Opened | None:
    """Maps a cache folder. Returns None if it is missing or damaged."""
    try:
        columns, about = array_cache.load(cache)
        parsed = Parsed(columns, **about)
        return (parsed, cache) if _is_sound(columns, check_categories(parsed.categories, cache)) else None
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
    sound = columns.keys() | _OPTIONAL == _DTYPES.keys()
    sound &= all(column.dtype == _DTYPES[name] for name, column in columns.items())
    for name, (count, end) in ends.items():
        offsets = columns[name]
        sound &= offsets.shape == (count + 1,) and offsets[0] == 0 and offsets[-1] == end
        sound &= bool((offsets[1:] >= offsets[:-1]).all())
    of_annotations = ("boxes", "labels", "areas", "iscrowd", *_OPTIONAL)
    sound &= all(len(columns[name]) == images for name in ("heights", "widths"))
    sound &= all(len(columns[name]) == annotations for name in of_annotations if name in columns)
    sound &= columns["boxes"].shape[1:] == (4,)
    return sound and (not annotations or 0 <= columns["labels"].min() <= columns["labels"].max() < len(categories))


def _remove_older(cache: Path) -> None:
    """Removes all versions except this one and the previous one, and what killed processes left."""
    others = [path for path in cache.parent.iterdir() if path.is_dir() and path != cache]
    versions = [path for path in others if (path / "header.json").is_file()]
    previous = max(versions, key=lambda path: (path / "header.json").stat().st_mtime_ns, default=None)
    for path in others:
        if path != previous:
            shutil.rmtree(path, ignore_errors=True)
