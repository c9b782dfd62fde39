"""Hugging Face: an `imagefolder` with metadata, or Parquet and Arrow files, which `datasets` reads."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from shared.data.coco_file import FARTHEST
from shared.data.convert import shapes
from shared.data.convert.contents import Contents, Options, Split, errors_in
from shared.data.convert.files import SPLITS, ImageFinder, files_below, image_size, read_text, split_of
from shared.data.convert.shapes import box_order, parse_number
from shared.errors import UserError

ABOUT = "an imagefolder with metadata.jsonl or metadata.csv, Parquet files, or a folder of save_to_disk"

_METADATA = ("metadata.jsonl", "metadata.csv")
_OBJECTS = ("objects", "annotations", "object", "annotation")
_BOXES = ("bbox", "bboxes", "boxes", "box")
_CATEGORIES = (
    "category",
    "categories",
    "label",
    "labels",
    "category_id",
    "class",
    "classes",
    "class_id",
    "name",
    "names",
)
_SAVED = "state.json"  # `save_to_disk` writes it into the folder of each split


def recognise(source: Path) -> str:
    if files := _metadata(source):
        return f"{', '.join(str(file) for file in files.values())} beside images"
    if files := _tables(source):
        count = sum(map(len, files.values()))
        return f"{count} files with the ending {next(iter(files.values()))[0].suffix}"
    return ""


def read(source: Path, options: Options) -> Contents:
    splits, names = {}, []
    for split, file in _metadata(source).items():
        rows = _lines(file) if file.suffix == ".jsonl" else _cells(file)
        splits[split] = _split(rows, file, options, names, file.parent, split)
    if splits:
        return Contents(splits)
    for split, files in _tables(source).items():
        rows = _open(files, source)
        names = _class_names(rows.features)
        splits[split] = _split(rows, files[0], options, names, source, split)
    if not splits:
        raise UserError(f"{source}: has no metadata.jsonl and no Parquet files. Fix: give the data set's folder")
    return Contents(splits, [{"name": name} for name in names])


# --- the rows ---------------------------------------------------------------------------------------


def _metadata(source: Path) -> dict[str, Path]:
    files = files_below(source, (".jsonl", ".csv")) if source.is_dir() else [source]
    return _by_split([file for file in files if file.name in _METADATA], source)


def _tables(source: Path) -> dict[str, list[Path]]:
    files = files_below(source, (".parquet", ".arrow")) if source.is_dir() else [source]
    parts: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix == ".parquet" or (file.suffix == ".arrow" and (file.parent / _SAVED).is_file()):
            parts.setdefault(_split_name(file, source), []).append(file)
    return {split: parts[split] for split in ("", *SPLITS) if split in parts}


def _by_split(files: Iterable[Path], source: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in files:
        split = _split_name(file, source)
        if split in found:
            raise UserError(f"{source}: both {found[split]} and {file} may be its metadata. Fix: name one")
        found[split] = file
    return {split: found[split] for split in ("", *SPLITS) if split in found}


def _split_name(file: Path, source: Path) -> str:
    """ "train" of train/metadata.jsonl and of data/train-00000-of-00001.parquet."""
    folders = file.relative_to(source).parts[:-1] if source.is_dir() else ()
    return next(filter(None, map(split_of, (*folders, *file.stem.split("-")))), "")


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if line.strip():
            with errors_in(f"{file}: line {number}", "correct the line, or delete it"):
                yield msgspec.json.decode(line, type=dict)


def _cells(file: Path) -> Iterator[dict[str, Any]]:
    """Rows whose cells are text, or JSON."""
    with errors_in(file):
        rows = list(csv.DictReader(read_text(file).splitlines()))
    for number, row in enumerate(rows, 1):
        with errors_in(f"{file}: row {number}", "correct the row, or delete it"):
            yield {k: json.loads(v) if v and v[0] in "[{" else v for k, v in row.items()}


def _open(files: list[Path], source: Path) -> Any:
    """An iterable of rows, with `features`, that keeps images undecoded."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{source}: `datasets` reads Parquet and Arrow files, and is not installed. Fix: pip install datasets"
        ) from error
    with errors_in(files[0]):
        kind = files[0].suffix.removeprefix(".")
        paths = [str(file) for file in files]
        rows = datasets.load_dataset(kind, data_files=paths, split="train", streaming=True)
        for name, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        return rows


def _class_names(features: Any) -> list[str]:
    """The names of the classes of the first ClassLabel in the features; [] without one."""
    if names := getattr(features, "names", None):
        return list(names)
    inner = features.values() if isinstance(features, dict) else [getattr(features, "feature", None)]
    return next(filter(None, (_class_names(feature) for feature in inner if feature is not None)), [])


# --- from rows to annotations -----------------------------------------------------------------------


def _split(
    rows: Iterable[dict[str, Any]], source: Path, options: Options, names: list[str], folder: Path, split: str
) -> Split:
    root = options.images or folder
    images, part = None, Split(folder=root)
    objects: list[list[tuple[str, list[float], dict[str, Any]]]] = []  # of each image: category, four numbers, more
    sizes: list[tuple[int, int]] = []
    files: list[str] = []
    for number, row in enumerate(rows):
        with errors_in(f"{source}: row {number + 1}", "correct the row, or delete it"):
            if "file_name" in row:
                images = images or ImageFinder(root)
                name = images.find(str(row["file_name"]))
                if name is None:
                    part.counts["rows left out (their image is not there)"] += 1
                    continue
                sizes.append(images.size(name))
            else:
                part.folder = _extracted(options, source, split)
                name = _extract(row, number, part.folder, folder)
                sizes.append(image_size(part.folder / name))
            files.append(name)
            objects.append(list(_objects(row, names)))
    if not files:
        raise UserError(f"{source}: none of its images is in {root}. Fix: pass --images FOLDER")
    every = np.array([box for of_image in objects for _, box, _ in of_image], dtype=np.float64).reshape(-1, 4)
    of_each = np.array([size for size, of_image in zip(sizes, objects, strict=True) for _ in of_image]).reshape(-1, 2)
    make = shapes.box if box_order(every, of_each, options.boxes, source) == "xywh" else shapes.box_of_corners
    shares = len(every) > 0 and bool(every.max() <= 1 and (every % 1 > 0).any())
    for name, size, of_image in zip(files, sizes, objects, strict=True):
        scale = [*size, *size] if shares else [1, 1, 1, 1]
        scaled = [(c, make(*(n * s for n, s in zip(box, scale, strict=True))), more) for c, box, more in of_image]
        part.add_image(name, size, [{"category": c, **shape, "iscrowd": 0, **more} for c, shape, more in scaled])
    return part


def _objects(row: dict[str, Any], names: list[str]) -> Iterator[tuple[str, list[float], dict[str, Any]]]:
    """Category, four numbers and other keys of COCO of each object: a list of objects, or an object of lists."""
    given = next((row[key] for key in _OBJECTS if row.get(key) is not None), row)
    if isinstance(given, list):
        given = {key: [one.get(key) for one in given] for key in (given[0] if given else ())}
    boxes = next((given[key] for key in _BOXES if given.get(key) is not None), [])
    key = next((key for key in _CATEGORIES if isinstance(given.get(key), list)), None)
    categories = given[key] if key else ["object"] * len(boxes)
    if len(categories) != len(boxes):
        raise ValueError(f"it has {len(boxes)} boxes, and {len(categories)} categories")
    crowds = given.get("iscrowd") or given.get("is_crowd") or itertools.repeat(0)
    for box, category, crowd in zip(boxes, categories, crowds, strict=False):
        if len(box) != 4:
            raise ValueError(f"a box has {len(box)} numbers, and needs 4")
        name = names[category] if names and isinstance(category, int) else str(category)
        yield name, [parse_number(str(n), "a number of a box", FARTHEST) for n in box], {"iscrowd": int(crowd)}


def _extracted(options: Options, source: Path, split: str) -> Path:
    if options.extracted is None:
        raise UserError(f"{source}: holds its images inside. Fix: run `python3 -m shared convert` first")
    return options.extracted / split


def _extract(row: dict[str, Any], number: int, folder: Path, source: Path) -> str:
    """Writes the image of a row to a file, and returns its name."""
    image = next((v for v in row.values() if isinstance(v, dict) and v.keys() >= {"bytes", "path"}), None)
    if image is None:
        raise ValueError(f"it has no image, but {', '.join(row)}")
    data = image["bytes"] or (source / image["path"]).read_bytes()
    with Image.open(io.BytesIO(data)) as opened:
        ending = {"JPEG": "jpg", "TIFF": "tif"}.get(opened.format, opened.format.lower())
    stem = Path((image["path"] or "").replace("\\", "/")).stem
    name = f"{number:08}{'_' if stem else ''}{stem}.{ending}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return name
