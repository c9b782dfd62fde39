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
import PIL.Image

from shared.data.coco_file import FARTHEST
from shared.data.convert.contents import Contents, Format, Options, Split, errors_in
from shared.data.convert.files import ImageFinder, by_split, files_below, image_size, read_text
from shared.data.convert.shapes import parse_number
from shared.data.convert.table import Box, Image, add_images
from shared.errors import UserError

_METADATA = ("metadata.jsonl", "metadata.csv")
_OBJECTS = ("objects", "annotations", "object", "annotation")
_BOXES = ("bbox", "bboxes", "boxes", "box")
_CATEGORIES = ("category", "categories", "label", "labels", "category_id")
_CATEGORIES += ("class", "classes", "class_id", "name", "names")
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
    found = by_split([file for file in files_below(source) if file.name in _METADATA], source, by_name=True)
    for files in found.values():
        if len(files) > 1:
            raise UserError(f"{source}: both {files[0]} and {files[1]} may be its metadata. Fix: name one")
    return {split: file for split, (file,) in found.items()}


def _tables(source: Path) -> dict[str, list[Path]]:
    files = files_below(source, (".parquet", ".arrow"))
    tables = [file for file in files if file.suffix == ".parquet" or (file.parent / _SAVED).is_file()]
    return by_split(tables, source, by_name=True)


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
    finder, part = None, Split(folder=root)
    images: list[Image] = []
    for number, row in enumerate(rows):
        with errors_in(f"{source}: row {number + 1}", "correct the row, or delete it"):
            if "file_name" in row:
                finder = finder or ImageFinder(root)
                name = finder.find(str(row["file_name"]))
                if name is None:
                    part.counts["rows left out (their image is not there)"] += 1
                    continue
                size = finder.size(name)
            else:
                if options.extracted is None:
                    raise UserError(f"{source}: holds its images inside. Fix: run `python3 -m shared convert` first")
                part.folder = options.extracted / split
                name = _extract(row, number, part.folder, folder)
                size = image_size(part.folder / name)
            images.append((name, size, list(_objects(row, names))))
    if not images:
        raise UserError(f"{source}: none of its images is in {root}. Fix: pass --images FOLDER")
    add_images(part, images, options.boxes, source)
    return part


def _objects(row: dict[str, Any], names: list[str]) -> Iterator[Box]:
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


def _extract(row: dict[str, Any], number: int, folder: Path, source: Path) -> str:
    """Writes the image of a row to a file, and returns its name."""
    image = next((v for v in row.values() if isinstance(v, dict) and v.keys() >= {"bytes", "path"}), None)
    if image is None:
        raise ValueError(f"it has no image, but {', '.join(row)}")
    data = image["bytes"] or (source / image["path"]).read_bytes()
    with PIL.Image.open(io.BytesIO(data)) as opened:
        ending = {"JPEG": "jpg", "TIFF": "tif"}.get(opened.format, opened.format.lower())
    stem = Path((image["path"] or "").replace("\\", "/")).stem
    name = f"{number:08}{'_' if stem else ''}{stem}.{ending}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return name


HUGGING_FACE = Format(
    "an imagefolder with metadata.jsonl or metadata.csv, Parquet files, or a folder of save_to_disk", recognise, read
)
