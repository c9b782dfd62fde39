"""LabelMe, AnyLabeling: a JSON file per image, with `shapes`."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared.data.coco_file import FARTHEST
from shared.data.convert import shapes
from shared.data.convert.contents import Contents, Options, Split, errors_in
from shared.data.convert.files import by_split, files_below, finder_for, json_outline, read_json
from shared.data.convert.shapes import parse_number, parse_whole_number

ABOUT = "a folder of LabelMe's JSON files, or one per split"


def recognise(source: Path) -> str:
    files = files_below(source, (".json",))
    for file in files[:3]:
        is_list, keys = json_outline(file)
        if not is_list and "shapes" in keys:
            return f"{len(files)} JSON files with `shapes` and `imagePath`, {file.name} for example"
    return ""


def read(source: Path, options: Options) -> Contents:
    finder = finder_for(source, options.images)
    root = source if source.is_dir() else source.parent
    splits = {}
    for split, of_split in by_split(files_below(source, (".json",)), root).items():
        part = splits[split] = Split(finder)
        for file in of_split:
            if content := _content(file):
                _add_image(content, file, root, part)
            else:
                part.counts["JSON files that are no annotations"] += 1
    return Contents(splits)


def _content(file: Path) -> dict[str, Any] | None:
    content = read_json(file)
    return content if isinstance(content, dict) and isinstance(content.get("shapes"), list) else None


def _add_image(content: dict[str, Any], file: Path, root: Path, part: Split) -> None:
    finder = part.finder
    with errors_in(file):
        near = file.parent.relative_to(finder.folder if file.is_relative_to(finder.folder) else root).as_posix()
        name = part.find_image(str(content.get("imagePath") or ""), near, file.stem)
        if content.get("imageWidth") and content.get("imageHeight"):
            size = tuple(parse_whole_number(str(content[f"image{key}"]), f"image{key}") for key in ("Width", "Height"))
        else:
            size = finder.size(name)
        if size is None:
            raise ValueError("has no imageWidth and imageHeight, and its image is not there")
        together: dict[tuple, list[dict]] = {}  # shapes of one label and group are one object
        for number, item in enumerate(content["shapes"]):
            kind = item.get("shape_type") or "polygon"
            with errors_in(f"{file}: shape {number + 1} ({kind})"):
                shape = _shape(kind, item, size)
            if shape is None:
                part.counts[f"{kind} left out"] += 1
                continue
            group = item.get("group_id")
            of_object = together.setdefault((str(item["label"]), number if group is None else f"group {group}"), [])
            of_object.append({**shape, **({"attributes": flags} if (flags := item.get("flags")) else {})})
        rows = [
            {"category": label, **row, "iscrowd": 0} for (label, _), pieces in together.items() for row in _one(pieces)
        ]
        part.add_image(name, size, rows)


def _one(pieces: list[dict]) -> list[dict]:
    """The shapes of an object as one annotation, if all are polygons; else each by itself."""
    if len(pieces) == 1 or not all(isinstance(piece.get("segmentation"), list) for piece in pieces):
        return pieces
    polygons = [np.array(polygon).reshape(-1, 2) for piece in pieces for polygon in piece["segmentation"]]
    return [{**pieces[0], **shapes.polygons(polygons)}]


def _shape(kind: str, item: dict[str, Any], size: tuple[int, int]) -> dict[str, Any] | None:
    """COCO's shape; None of a kind that has no area."""
    if kind not in ("polygon", "rectangle", "rotation", "circle", "mask"):
        return None
    points = np.array([[parse_number(str(n), "a coordinate", FARTHEST) for n in point] for point in item["points"]])
    if kind in ("polygon", "rotation") or (kind == "rectangle" and len(points) == 4):
        shape = shapes.polygons([points])
        return shapes.box(*shape["bbox"]) if kind == "rectangle" else shape
    if len(points) != 2:
        raise ValueError(f"{len(points)} points, and 2 are needed")
    if kind == "circle":  # the middle, and a point of the edge
        radius = math.dist(*points)
        return shapes.ellipse(tuple(points[0].tolist()), (radius, radius))
    (x1, y1), (x2, y2) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    if kind == "rectangle":
        return shapes.box_of_corners(x1, y1, x2, y2)
    with Image.open(io.BytesIO(base64.b64decode(item["mask"]))) as image:
        window = np.asarray(image.convert("L")) > 0
    return shapes.mask(window, round(x1), round(y1), size)
