"""CSV files with a row per box: plain ones, Roboflow's, RetinaNet's and Kaggle's."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.data.coco_file import FARTHEST
from shared.data.convert import shapes
from shared.data.convert.contents import Contents, Options, Split, errors_in
from shared.data.convert.files import (
    SPLITS,
    ImageFinder,
    files_in,
    finder_for,
    folders_in,
    is_hidden,
    read_text,
    split_of,
)
from shared.data.convert.openimages import COLUMNS as OPEN_IMAGES
from shared.data.convert.shapes import box_order, parse_number, parse_whole_number
from shared.errors import UserError

ABOUT = "a CSV file with a row per box, or a folder with one per split"

_IMAGE = (
    "filename",
    "file_name",
    "image_path",
    "path",
    "image",
    "image_name",
    "img",
    "image_id",
    "imageid",
    "file",
    "name",
)
_CATEGORY = (
    "class",
    "label",
    "category",
    "category_name",
    "class_name",
    "labelname",
    "object",
    "species",
    "type",
    "tag",
)
_CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x_min", "y_min", "x_max", "y_max"), ("x1", "y1", "x2", "y2"))
_CORNERS += (("left", "top", "right", "bottom"), ("xtl", "ytl", "xbr", "ybr"), ("minx", "miny", "maxx", "maxy"))
_CORNER_AND_SIZE = (("x", "y", "w", "h"), ("x", "y", "width", "height"), ("left", "top", "width", "height"))
_CORNER_AND_SIZE += (("bbox_x", "bbox_y", "bbox_width", "bbox_height"), ("xmin", "ymin", "width", "height"))
_SIZES = (("width", "height"), ("image_width", "image_height"), ("img_width", "img_height"))
_WITHOUT_HEADER = ("path", "x1", "y1", "x2", "y2", "class")  # of RetinaNet's


def recognise(source: Path) -> str:
    for file in _files(source).values():
        header, _ = _rows(file)
        if columns := _columns(header):
            return f"{file.name} has the columns {', '.join([columns['image'], *columns['box']])}"
    return ""


def read(source: Path, options: Options) -> Contents:
    splits, notes = {}, []
    for split, file in _files(source).items():
        finder = finder_for(file.parent if source.is_dir() else source, options.images)
        header, rows = _rows(file)
        columns = _columns(header)
        if columns is None:
            raise UserError(
                f"{file}: has no columns of an image and of a box, but {', '.join(header)}. Fix: name them filename, "
                "xmin, ymin, xmax, ymax, class"
            )
        if columns["category"] is None:
            notes.append(f"{file}: no column names the category ({', '.join(_CATEGORY)}); all boxes are 'object'")
        splits[split] = _split(file, rows, header, columns, finder, options)
        splits[split].settle(finder, options.images is not None)
    if not splits:
        raise UserError(f"{source}: has no CSV file. Fix: name one")
    return Contents(splits, notes=notes)


def _files(source: Path) -> dict[str, Path]:
    """The CSV file of each split; "" for the only one."""
    if source.is_file():
        return {"": source} if source.suffix.lower() in (".csv", ".tsv") and not is_hidden(source.name) else {}
    found: dict[str, Path] = {}
    for folder in (source, *folders_in(source)):
        for file in files_in(folder, (".csv", ".tsv")):
            words = file.stem.replace("-", "_").split("_")
            split = (split_of(folder.name) if folder != source else "") or next(filter(None, map(split_of, words)), "")
            header, _ = _rows(file)
            if split not in found and _columns(header):
                found[split] = file
    if len(found) > 1:
        found.pop("", None)
    return {split: found[split] for split in ("", *SPLITS) if split in found}


def _rows(file: Path) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, in lower case, and the rows."""
    lines = read_text(file).splitlines()
    first = lines[0] if lines else ""
    delimiter = max(",;\t", key=first.count)
    with errors_in(file):
        rows = [row for row in csv.reader(lines, delimiter=delimiter) if any(cell.strip() for cell in row)]
    if rows and len(rows[0]) == len(_WITHOUT_HEADER) and _is_plain(rows[0]):
        return list(_WITHOUT_HEADER), rows
    return [cell.strip().lower() for cell in rows[0]] if rows else [], rows[1:]


def _is_plain(row: Sequence[str]) -> bool:
    """Whether a first row is a box already, or an image without one, as RetinaNet's files begin."""
    return all(cell.strip().replace(".", "", 1).lstrip("-").isdigit() or not cell.strip() for cell in row[1:5])


def _columns(header: Sequence[str]) -> dict[str, Any] | None:
    """The names of the columns: "image", "box" with one or four, "order" of these, "category" and "size"."""
    there = set(header)
    if there.issuperset(OPEN_IMAGES) or ("file_name" in there and "objects" in there):  # another reader's
        return None
    image = next((name for name in _IMAGE if name in there), None)
    boxes = [(names, "xyxy") for names in _CORNERS] + [(names, "xywh") for names in _CORNER_AND_SIZE]
    boxes += [(("bbox",), ""), (("box",), "")]
    box, order = next(((names, order) for names, order in boxes if there.issuperset(names)), (None, ""))
    if image is None or box is None:
        return None
    size = next((names for names in _SIZES if there.issuperset(names) and not set(names) & set(box)), None)
    category = next((name for name in _CATEGORY if name in there and name != image), None)
    return {"image": image, "box": box, "order": order, "size": size, "category": category}


def _split(
    file: Path,
    rows: Sequence[Sequence[str]],
    header: Sequence[str],
    columns: dict[str, Any],
    finder: ImageFinder,
    options: Options,
) -> Split:
    part = Split()
    at = {name: header.index(name) for name in header}
    boxes: dict[str, list[tuple[str, list[float]]]] = {}  # by image: category, four numbers
    sizes: dict[str, tuple[int, int] | None] = {}
    for number, row in enumerate(rows, 1):
        with errors_in(f"{file}: row {number}", "correct the row, or delete it"):
            if len(row) < len(header):
                raise ValueError(f"{len(row)} cells, and the header has {len(header)}")
            given = row[at[columns["image"]]].strip()
            if given not in sizes:
                sizes[given] = _size_in(row, at, columns["size"])
            numbers = _numbers(row, at, columns["box"])
            of_image = boxes.setdefault(given, [])
            if numbers:
                category = row[at[columns["category"]]].strip() if columns["category"] else "object"
                of_image.append((category, numbers))
    names = {given: _name(given, finder, part) for given in boxes}
    sizes = {given: size or finder.size(names[given]) for given, size in sizes.items()}
    every = np.array([numbers for rows_ in boxes.values() for _, numbers in rows_]).reshape(-1, 4)
    of_each = np.array([sizes[given] or (0, 0) for given, rows_ in boxes.items() for _ in rows_]).reshape(-1, 2)
    order = columns["order"] or box_order(every, of_each, options.boxes, file)
    shares = len(every) > 0 and bool(every.max() <= 1 and (every % 1 > 0).any())
    for given, of_image in boxes.items():
        if (size := sizes[given]) is None:
            part.counts["images left out (their size is unknown, and no image is there)"] += 1
            continue
        width, height = size
        scale = np.array([width, height, width, height]) if shares else 1
        scaled = [(category, (np.array(numbers) * scale).tolist()) for category, numbers in of_image]
        make = shapes.box if order == "xywh" else shapes.box_of_corners
        part.add_image(names[given], size, [{"category": c, **make(*n), "iscrowd": 0} for c, n in scaled])
    return part


def _name(given: str, finder: ImageFinder, part: Split) -> str:
    with errors_in(f"image {given!r}", "pass --images with the folder that is meant"):
        return part.find_image(finder, given, stem=Path(given).name)


def _size_in(row: Sequence[str], at: dict[str, int], size: Iterable[str] | None) -> tuple[int, int] | None:
    if size is None or not all(row[at[name]].strip() for name in size):
        return None
    width, height = (parse_whole_number(row[at[name]], name) for name in size)
    return width, height


def _numbers(row: Sequence[str], at: dict[str, int], box: Sequence[str]) -> list[float]:
    """Four numbers; [] of a row for an image without a box."""
    cells = [row[at[name]].strip() for name in box]
    if len(box) == 1 and cells[0]:
        cells = [str(number) for number in json.loads(cells[0].replace("(", "[").replace(")", "]"))]
        if len(cells) != 4:
            raise ValueError(f"its {box[0]} has {len(cells)} numbers, and needs 4")
    if not any(cells):
        return []
    return [parse_number(cell, "a number of the box", FARTHEST) for cell in cells]
