"""COCO files that training refuses: a folder per split, or names and numbers of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shared.data.coco_file import check_categories, without_namesakes
from shared.data.convert import shapes
from shared.data.convert.contents import Contents, Format, Options, Split, errors_in
from shared.data.convert.files import files_near, finder_for, json_keys, one_per_split, read_json, split_of, words_of
from shared.data.convert.shapes import parse_number, parse_whole_number
from shared.errors import UserError

_NUMBERS = ("area", "num_keypoints")


def recognise(source: Path) -> str:
    files = _files(source)
    names = ", ".join(str(file.relative_to(source)) if source.is_dir() else file.name for file in files.values())
    return f"{names} with images, annotations and categories" if files else ""


def read(source: Path, options: Options) -> Contents:
    files = _files(source)
    if not files:
        raise UserError(f"{source}: has no COCO file, with images, annotations and categories. Fix: name the file")
    if "" in files and len(files) > 1:
        raise UserError(f"{source}: has several COCO files, {' and '.join(map(str, files.values()))}. Fix: name one")
    notes: list[str] = []
    contents = {split: read_json(file, dict) for split, file in files.items()}
    categories = _categories(contents, files, notes)
    splits = {}
    for split, content in contents.items():
        splits[split] = _split(content, files[split], {c["id"]: c["name"] for c in categories}, source, options, split)
    return Contents(splits, categories, notes)


def _files(source: Path) -> dict[str, Path]:
    """The COCO file of each split; "" for the only one."""
    files = [file for file in files_near(source, (".json",)) if json_keys(file) >= {"images", "categories"}]
    return {"": files[0]} if len(files) == 1 else one_per_split(files, source)


def _categories(contents: dict[str, dict], files: dict[str, Path], notes: list[str]) -> list[dict[str, Any]]:
    """The categories of all splits, with the rules that a COCO file has in training."""
    category_of: list[int] = []
    by_id: dict[int, dict[str, Any]] = {}
    for split, content in contents.items():
        with errors_in(f"{files[split]}: categories"):
            for category in content["categories"]:
                row = {**category, "id": _whole(category["id"], "an id"), "name": str(category["name"])}
                if by_id.setdefault(row["id"], row)["name"] != row["name"]:
                    raise ValueError(f"the id {row['id']} is {row['name']!r} here, and another name in another split")
        with errors_in(f"{files[split]}: annotations"):
            category_of += [_whole(a["category_id"], "a category_id") for a in content.get("annotations", [])]
    kept = without_namesakes(list(by_id.values()), np.array(category_of), notes)
    return check_categories(kept, next(iter(files.values())))


def _split(content: dict, file: Path, names: dict[int, str], source: Path, options: Options, split: str) -> Split:
    finder = finder_for(source, options.images)
    part = Split(finder)
    near = split or next(filter(None, map(split_of, words_of(file))), "")
    if file.absolute().is_relative_to(finder.folder):
        near = f"{file.absolute().parent.relative_to(finder.folder).as_posix()}/{near}"
    of_image: dict[int, list[dict]] = {}
    for position, annotation in enumerate(content.get("annotations", [])):
        with errors_in(f"{file}: annotation {annotation.get('id', f'number {position}')}"):
            row = {k: v for k, v in annotation.items() if k not in ("category_id", "image_id") and v is not None}
            row["id"] = _whole(row["id"], "id") if "id" in row else position + 1
            category = _whole(annotation["category_id"], "category_id")
            if category not in names:
                raise ValueError(f"its category {category} is not in the file")
            row["category"], row["iscrowd"] = names[category], _whole(row.get("iscrowd") or 0, "iscrowd")
            row["bbox"] = [_number(value, "bbox") for value in row["bbox"]]
            if len(row["bbox"]) != 4:
                raise ValueError(f"its bbox has {len(row['bbox'])} numbers, and needs 4")
            for key in _NUMBERS:
                if key in row:
                    row[key] = _number(row[key], key)
            if not row.get("area"):
                if "area" in row:
                    part.counts["areas of 0 filled in"] += 1
                row["area"] = _area(row)
            if not row.get("segmentation", True):
                del row["segmentation"]  # []
            of_image.setdefault(_whole(annotation["image_id"], "image_id"), []).append(row)
    for position, image in enumerate(content["images"]):
        with errors_in(f"{file}: image {image.get('id', f'number {position}')}"):
            number = _whole(image["id"], "id")
            more = {k: v for k, v in image.items() if k not in ("file_name", "width", "height", "id")}
            name = part.find_image(str(image["file_name"]), near)
            size = finder.size(name) if not (image.get("width") and image.get("height")) else None
            size = size or (_whole(image["width"], "width"), _whole(image["height"], "height"))
            part.add_image(name, size, of_image.pop(number, []), id=number, **more)
    if of_image:
        part.counts["annotations left out (of no image)"] = sum(map(len, of_image.values()))
    return part


def _area(row: dict[str, Any]) -> float:
    """The area of the polygons, else of the box."""
    pieces = row.get("segmentation")
    if isinstance(pieces, list) and pieces and all(len(piece) >= 6 for piece in pieces):
        return shapes.polygons([np.array(piece, dtype=np.float64).reshape(-1, 2) for piece in pieces])["area"]
    return row["bbox"][2] * row["bbox"][3]


def _number(value: Any, what: str) -> float:
    """A number, also in quotes; a whole one stays one."""
    return value if isinstance(value, (int, float)) else parse_number(str(value), what)


def _whole(value: Any, what: str) -> int:
    return value if type(value) is int else parse_whole_number(str(value), what)


COCO = Format("a COCO file of Roboflow or Label Studio, or a folder with one per split", recognise, read)
