"""CSV files with a row per box: plain ones, Roboflow's, RetinaNet's, Kaggle's and Open Images'."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.data.coco_file import FARTHEST
from shared.data.convert import shapes
from shared.data.convert.contents import Contents, Format, Options, Split, errors_in
from shared.data.convert.files import by_split, files_below, files_near, finder_for, one_per_split, read_text
from shared.data.convert.shapes import parse_number, parse_whole_number
from shared.errors import UserError

_OPEN_IMAGES_COLUMNS = ("imageid", "labelname", "xmin", "xmax", "ymin", "ymax")  # in lower case
_IMAGE = ("filename", "file_name", "image_path", "path", "image", "image_name")
_IMAGE += ("img", "image_id", "imageid", "file", "name")
_CATEGORY = ("class", "label", "category", "category_name", "class_name", "labelname")
_CATEGORY += ("object", "species", "type", "tag")
_CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x_min", "y_min", "x_max", "y_max"), ("x1", "y1", "x2", "y2"))
_CORNERS += (("left", "top", "right", "bottom"), ("xtl", "ytl", "xbr", "ybr"), ("minx", "miny", "maxx", "maxy"))
_CORNER_AND_SIZE = (("x", "y", "w", "h"), ("x", "y", "width", "height"), ("left", "top", "width", "height"))
_CORNER_AND_SIZE += (("bbox_x", "bbox_y", "bbox_width", "bbox_height"), ("xmin", "ymin", "width", "height"))
_SIZES = (("width", "height"), ("image_width", "image_height"), ("img_width", "img_height"))
_WITHOUT_HEADER = ("path", "x1", "y1", "x2", "y2", "class")  # of RetinaNet's


def _recognise_csv(source: Path) -> str:
    for file in _files(source).values():
        header, _ = _rows(file)
        if columns := _columns(header):
            return f"{file.name} has the columns {', '.join([columns['image'], *columns['box']])}"
    return ""


def _read_csv(source: Path, options: Options) -> Contents:
    splits, notes = {}, []
    for split, file in _files(source).items():
        finder = finder_for(file, options.images)
        header, rows = _rows(file)
        columns = _columns(header)
        if columns is None:
            raise UserError(
                f"{file}: has no columns of an image and of a box, but {', '.join(header)}. Fix: name them filename, "
                "xmin, ymin, xmax, ymax, class"
            )
        if columns["category"] is None:
            notes.append(f"{file}: no column names the category ({', '.join(_CATEGORY)}); all boxes are 'object'")
        splits[split] = Split(finder)
        images = _images(file, rows, header, columns, splits[split])
        add_images(splits[split], list(images), columns["order"] or options.boxes, file)
    if not splits:
        raise UserError(f"{source}: has no CSV file. Fix: name one")
    return Contents(splits, notes=notes)


def _files(source: Path) -> dict[str, Path]:
    """The CSV file of each split; "" for the only one."""
    files = files_near(source, (".csv", ".tsv"))
    if source.is_file():
        return {"": source} if files else {}
    found = one_per_split([file for file in files if _columns(_rows(file)[0])], source)
    return {split: file for split, file in found.items() if split or len(found) == 1}


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
    if there.issuperset(_OPEN_IMAGES_COLUMNS) or ("file_name" in there and "objects" in there):  # another reader's
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


def _images(
    file: Path, rows: Sequence[Sequence[str]], header: Sequence[str], columns: dict[str, Any], part: Split
) -> Iterator[Image]:
    at = {name: header.index(name) for name in header}
    boxes: dict[str, list[Box]] = {}  # by image
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
                of_image.append((category, numbers, {}))
    for given, of_image in boxes.items():
        with errors_in(f"image {given!r}", "pass --images with the folder that is meant"):
            name = part.find_image(given, stem=Path(given).name)
        yield name, sizes[given] or part.finder.size(name), of_image


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


CSV = Format("a CSV file with a row per box, or a folder with one per split", _recognise_csv, _read_csv)


# --- boxes of four numbers that have no names -------------------------------------------------------

Box = tuple[str, list[float], dict[str, Any]]  # category, four numbers, more keys of COCO
Image = tuple[str, "tuple[int, int] | None", list[Box]]  # name, (width, height) if it is known, boxes


def add_images(part: Split, images: Sequence[Image], order: str, source: object) -> None:
    """Adds images to a split. All boxes together show whether their numbers are pixels or shares of the image's size.

    Args:
        order: "xywh" or "xyxy"; "" to decide from the boxes.
        source: the file, for the error.

    Raises:
        UserError: the boxes can be of either order.
    """
    boxes = np.array([box for *_, rows in images for _, box, _ in rows], np.float64).reshape(-1, 4)
    sizes = np.array([size or (0, 0) for _, size, rows in images for _ in rows]).reshape(-1, 2)
    shares = len(boxes) > 0 and bool(boxes.max() <= 1 and (boxes % 1 > 0).any())
    make = shapes.box if (order or _order(boxes, sizes, shares, source)) == "xywh" else shapes.box_of_corners
    for name, size, rows in images:
        if size is None:
            part.counts["images left out (their size is unknown, and no image is there)"] += 1
            continue
        scale = [*size, *size] if shares else [1, 1, 1, 1]
        made = [(c, make(*(n * s for n, s in zip(box, scale, strict=True))), more) for c, box, more in rows]
        part.add_image(name, size, [{"category": c, **shape, "iscrowd": 0, **more} for c, shape, more in made])


def _order(boxes: np.ndarray, sizes: np.ndarray, shares: bool, source: object) -> str:
    """ "xywh" or "xyxy". `sizes` is (N, 2), 0 if the size of a box's image is unknown."""
    limits, known = (1.0, True) if shares else (sizes, (sizes > 0).all(axis=1))
    # a pixel more: rounding, and edges that are inside
    over = ((boxes[:, :2] + boxes[:, 2:]) > limits + (0.01 if shares else 1)).any(axis=1) & known
    if (boxes[:, 2:] < boxes[:, :2]).any() or not len(boxes):
        return "xywh"
    if over.any():
        return "xyxy"
    raise UserError(
        f"{source}: its boxes may be x y width height or x1 y1 x2 y2, {boxes[0].tolist()} for example. Fix: pass "
        "`--boxes xywh` or `--boxes xyxy`"
    )


# --- Open Images: boxes in shares of the image's size, and a file of the categories' names ----------


def _recognise_open_images(source: Path) -> str:
    files = [file for of_split in _open_images_files(source).values() for file in of_split]
    return f"{', '.join(file.name for file in files)} with ImageID, LabelName and XMin" if files else ""


def _read_open_images(source: Path, options: Options) -> Contents:
    by_split = _open_images_files(source)
    if not by_split:
        raise UserError(f"{source}: has no CSV file with ImageID, LabelName, XMin, … . Fix: name it")
    names, notes = _category_names(source), []
    if not names:
        notes.append(f"{source}: no class-descriptions file names the categories; they keep their codes")
    splits, finder = {}, finder_for(source, options.images)
    for split, files in by_split.items():
        part = splits[split] = Split(finder, crowds="crowds (IsGroupOf)")
        rows: dict[str, list[dict[str, Any]]] = {}
        found: dict[str, tuple[str, tuple[int, int]] | None] = {}  # name and size; None if it was not downloaded
        for file in files:
            for line, row in _open_images_rows(file):
                with errors_in(f"{file}: line {line}", "correct the line, or delete it"):
                    image = row["imageid"]
                    if image not in found:
                        name = finder.find_stem(image, split)
                        found[image] = None if name is None else (name, finder.size(name))
                    if found[image] is None:
                        part.counts["boxes left out (of images that are not there)"] += 1
                    else:
                        _, size = found[image]
                        rows.setdefault(image, []).append(_open_images_annotation(row, size, names))
        if missing := list(found.values()).count(None):
            part.counts["images left out (not there)"] = missing
        for image, of_image in rows.items():
            name, size = found[image]
            part.found[name] = name.rpartition("/")[2]
            part.add_image(name, size, of_image)
    if not any(part.images for part in splits.values()):
        raise UserError(f"{source}: has none of the images of its boxes. Fix: pass --images FOLDER")
    return Contents(splits, notes=notes)


def _open_images_files(source: Path) -> dict[str, list[Path]]:
    """The files of boxes of each split, by a word of their name or a folder."""
    files = [
        file for file in files_below(source, (".csv",)) if set(_OPEN_IMAGES_COLUMNS) <= set(_open_images_header(file))
    ]
    return by_split(files, source, by_name=True)


def _open_images_header(file: Path) -> list[str]:
    try:
        with file.open(encoding="utf-8-sig") as opened:
            return [name.strip().lower() for name in opened.readline().split(",")]
    except (OSError, UnicodeDecodeError):
        return []


def _open_images_rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line by line: the whole file has 14 million."""
    header = _open_images_header(file)
    with errors_in(file), file.open(encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened)
        next(reader)
        for row in reader:
            if row:
                if len(row) < len(header):
                    raise ValueError(f"line {reader.line_num} has {len(row)} cells, and the header {len(header)}")
                yield reader.line_num, dict(zip(header, row, strict=False))


def _category_names(source: Path) -> dict[str, str]:
    """The names of categories by their codes, /m/011k07."""
    folder = source if source.is_dir() else source.parent
    names = {}
    for file in files_below(folder, (".csv",)):
        if "class" in file.stem.lower():
            with errors_in(file), file.open(encoding="utf-8-sig", newline="") as opened:
                names |= {row[0]: row[1] for row in csv.reader(opened) if len(row) == 2 and row[0].startswith("/")}
    return names


def _open_images_annotation(row: dict[str, str], size: tuple[int, int], names: dict[str, str]) -> dict[str, Any]:
    x1, x2, y1, y2 = (parse_number(row[key], key, FARTHEST) for key in _OPEN_IMAGES_COLUMNS[2:])
    width, height = size
    shape = shapes.box_of_corners(x1 * width, y1 * height, x2 * width, y2 * height)
    category = row["labelname"]
    return {"category": names.get(category, category), **shape, "iscrowd": int(row.get("isgroupof") == "1")}


OPEN_IMAGES = Format(
    "the folder with …-annotations-bbox.csv, class-descriptions….csv and the images",
    _recognise_open_images,
    _read_open_images,
)
