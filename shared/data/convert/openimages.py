"""Open Images: a CSV file of boxes in shares of the image's size, and one of the categories' names."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.data.coco_file import FARTHEST
from shared.data.convert import shapes
from shared.data.convert.contents import Contents, Options, Split, errors_in
from shared.data.convert.files import by_split, files_below, finder_for
from shared.data.convert.shapes import parse_number
from shared.errors import UserError

ABOUT = "the folder with …-annotations-bbox.csv, class-descriptions….csv and the images"

COLUMNS = ("imageid", "labelname", "xmin", "xmax", "ymin", "ymax")  # in lower case


def recognise(source: Path) -> str:
    files = [file for of_split in _files(source).values() for file in of_split]
    return f"{', '.join(file.name for file in files)} with ImageID, LabelName and XMin" if files else ""


def read(source: Path, options: Options) -> Contents:
    by_split = _files(source)
    if not by_split:
        raise UserError(f"{source}: has no CSV file with ImageID, LabelName, XMin, … . Fix: name it")
    names, notes = _names(source), []
    if not names:
        notes.append(f"{source}: no class-descriptions file names the categories; they keep their codes")
    splits = {}
    for split, files in by_split.items():
        finder = finder_for(source, options.images)
        part = splits[split] = Split(finder, crowds="crowds (IsGroupOf)")
        rows: dict[str, list[dict[str, Any]]] = {}
        found: dict[str, str | None] = {}  # the name of each image; None if it was not downloaded
        sizes: dict[str, tuple[int, int]] = {}
        for file in files:
            for line, row in _rows(file):
                with errors_in(f"{file}: line {line}", "correct the line, or delete it"):
                    image = row["imageid"]
                    if image not in found:
                        found[image] = finder.find_stem(image, split)
                        if found[image] is not None:
                            sizes[image] = finder.size(found[image])
                    if found[image] is not None:
                        rows.setdefault(image, []).append(_annotation(row, sizes[image], names))
                    else:
                        part.counts["boxes left out (of images that are not there)"] += 1
        missing = sum(name is None for name in found.values())
        part.counts.update({"images left out (not there)": missing} if missing else {})
        for image, of_image in rows.items():
            part.found[found[image]] = found[image].rpartition("/")[2]
            part.add_image(found[image], sizes[image], of_image)
    if not any(part.images for part in splits.values()):
        raise UserError(f"{source}: has none of the images of its boxes. Fix: pass --images FOLDER")
    return Contents(splits, notes=notes)


def _files(source: Path) -> dict[str, list[Path]]:
    """The files of boxes of each split, by a word of their name or a folder."""
    files = [file for file in files_below(source, (".csv",)) if set(COLUMNS) <= set(_header(file))]
    return by_split(files, source, by_name=True)


def _header(file: Path) -> list[str]:
    try:
        with file.open(encoding="utf-8-sig") as opened:
            return [name.strip().lower() for name in opened.readline().split(",")]
    except (OSError, UnicodeDecodeError):
        return []


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line by line: the whole file has 14 million."""
    header = _header(file)
    with errors_in(file), file.open(encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened)
        next(reader)
        for row in reader:
            if row:
                if len(row) < len(header):
                    raise ValueError(f"line {reader.line_num} has {len(row)} cells, and the header {len(header)}")
                yield reader.line_num, dict(zip(header, row, strict=False))


def _names(source: Path) -> dict[str, str]:
    """The names of categories by their codes, /m/011k07."""
    folder = source if source.is_dir() else source.parent
    names = {}
    for file in files_below(folder, (".csv",)):
        if "class" in file.stem.lower():
            with errors_in(file), file.open(encoding="utf-8-sig", newline="") as opened:
                names |= {row[0]: row[1] for row in csv.reader(opened) if len(row) == 2 and row[0].startswith("/")}
    return names


def _annotation(row: dict[str, str], size: tuple[int, int], names: dict[str, str]) -> dict[str, Any]:
    x1, x2, y1, y2 = (parse_number(row[key], key, FARTHEST) for key in COLUMNS[2:])
    width, height = size
    shape = shapes.box_of_corners(x1 * width, y1 * height, x2 * width, y2 * height)
    category = row["labelname"]
    return {"category": names.get(category, category), **shape, "iscrowd": int(row.get("isgroupof") == "1")}
