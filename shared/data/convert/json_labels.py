"""LabelMe, AnyLabeling, CreateML and Label Studio: JSON files of boxes and shapes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Set
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image

from shared.data.coco_file import FARTHEST
from shared.data.convert import shapes
from shared.data.convert.contents import Contents, Format, Options, Split, errors_in
from shared.data.convert.files import (
    ImageFinder,
    by_split,
    files_below,
    files_in,
    files_near,
    finder_for,
    json_keys,
    one_per_split,
    read_json,
)
from shared.data.convert.shapes import parse_number, parse_whole_number
from shared.data.images import is_image_name
from shared.errors import UserError

# --- LabelMe, AnyLabeling: a JSON file per image, with `shapes` -------------------------------------


def _recognise_labelme(source: Path) -> str:
    files = files_below(source, (".json",))
    for file in files[:3]:
        if "shapes" in json_keys(file):
            return f"{len(files)} JSON files with `shapes` and `imagePath`, {file.name} for example"
    return ""


def _read_labelme(source: Path, options: Options) -> Contents:
    finder = finder_for(source, options.images)
    root = source if source.is_dir() else source.parent
    splits = {}
    for split, of_split in by_split(files_below(source, (".json",)), root).items():
        part = splits[split] = Split(finder)
        for file in of_split:
            content = read_json(file)
            if isinstance(content, dict) and isinstance(content.get("shapes"), list):
                _add_labelme_image(content, file, root, part)
            else:
                part.counts["JSON files that are not annotations"] += 1
    return Contents(splits)


def _add_labelme_image(content: dict[str, Any], file: Path, root: Path, part: Split) -> None:
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
                shape = _labelme_shape(kind, item, size)
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


def _labelme_shape(kind: str, item: dict[str, Any], size: tuple[int, int]) -> dict[str, Any] | None:
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


LABELME = Format("a folder of LabelMe's JSON files, or one per split", _recognise_labelme, _read_labelme)


# --- CreateML: a JSON list of images with boxes by their middle -------------------------------------


def _recognise_createml(source: Path) -> str:
    files = _createml_files(source)
    return f"{', '.join(file.name for file in files.values())} with `image` and `coordinates`" if files else ""


def _read_createml(source: Path, options: Options) -> Contents:
    splits = {}
    for split, file in _createml_files(source).items():
        finder = finder_for(file, options.images)
        part = splits[split] = Split(finder)
        for number, image in enumerate(read_json(file, list), 1):
            with errors_in(f"{file}: image {number}"):
                name = part.find_image(str(image["image"]))
                if (size := finder.size(name)) is None:
                    continue
                rows = []
                for row in image.get("annotations", []):
                    keys = ("x", "y", "width", "height")
                    x, y, w, h = (parse_number(str(row["coordinates"][key]), key, FARTHEST) for key in keys)
                    shape = shapes.box(x - w / 2, y - h / 2, w, h)
                    rows.append({"category": str(row["label"]), **shape, "iscrowd": 0})
                part.add_image(name, size, rows)
    return Contents(splits)


def _createml_files(source: Path) -> dict[str, Path]:
    files = files_near(source, (".json",))
    return one_per_split([file for file in files if json_keys(file, of_list=True) >= {"image", "annotations"}], source)


CREATEML = Format("a JSON file of CreateML, or a folder with one per split", _recognise_createml, _read_createml)


# --- Label Studio: its JSON and JSON-MIN exports, a list of tasks -----------------------------------


_TRIED = 20  # files of a folder
_UPLOAD = 8  # hexadecimal digits and a hyphen, which an upload adds before a file name
_LABELS = "labels"


def _recognise_label_studio(source: Path) -> str:
    if file := _file(source):
        return f"{file.name} is a list of tasks"
    saved = _saved(source)
    return f"{len(saved)} files of an annotation with its task, {saved[0].name} for example" if saved else ""


def _read_label_studio(source: Path, options: Options) -> Contents:
    file = _file(source)
    tasks = read_json(file, list[dict]) if file else _tasks_of(_saved(source))
    if not tasks:
        raise UserError(f"{source}: has no list of Label Studio's tasks. Fix: export the project as JSON")
    part = Split(finder_for(source, options.images))
    for position, task in enumerate(tasks):
        with errors_in(f"{file or source}: task {task.get('id', f'number {position + 1}')}"):
            results = _results(task, part)
            if results is not None:
                _add_label_studio_image(task, results, part)
    return Contents({"": part})


def _file(source: Path) -> Path | None:
    files = files_in(source, (".json",))[:_TRIED]
    return next((file for file in files if _is_task(json_keys(file, of_list=True))), None)


def _saved(source: Path) -> list[Path]:
    """The files that Label Studio writes into a storage: one per annotation, with or without ending."""

    def is_saved(file: Path) -> bool:
        return json_keys(file) >= {"task", "result"}

    files = files_in(source, ("", ".json"))
    return list(filter(is_saved, files)) if any(map(is_saved, files[:_TRIED])) else []


def _tasks_of(files: list[Path]) -> list[dict[str, Any]]:
    """The tasks of the annotations in such files, as an export has them."""
    tasks: dict[Any, dict[str, Any]] = {}
    for file in files:
        with errors_in(file):
            annotation = read_json(file, dict)
            task = annotation.pop("task")
            tasks.setdefault(task.get("id", file), {**task, "annotations": []})["annotations"].append(annotation)
    return list(tasks.values())


def _is_task(keys: Set[str]) -> bool:
    """JSON-MIN has no `data`, but who annotated the task and when."""
    return keys >= {"data", "annotations"} or keys >= {"id", "annotation_id"} or "annotator" in keys


def _results(task: dict[str, Any], part: Split) -> list[dict] | None:
    """The regions of a task; None, counted, if nobody has annotated it."""
    if "data" not in task:  # JSON-MIN: the regions of each control tag are a list beside the image
        rows = [row for value in task.values() if isinstance(value, list) for row in value if isinstance(row, dict)]
        return [{"value": row, **row} for row in rows]
    done = [one for one in task.get("annotations") or [] if not one.get("was_cancelled")]
    if not done:
        part.counts["tasks left out (without an annotation)"] += 1
        return None
    best = next((one for one in done if one.get("ground_truth")), done[0])
    if len(done) > 1:
        part.counts["further annotations of a task left out"] += len(done) - 1
    return best.get("result") or []


def _add_label_studio_image(task: dict[str, Any], results: list[dict], part: Split) -> None:
    address = _image_address(task.get("data", task))
    if address is None:
        part.counts["tasks left out (without an image)"] += 1
        return
    name = part.find_image(_name(address, part.finder))
    sizes = ((row["original_width"], row["original_height"]) for row in results if row.get("original_width"))
    size = next(sizes, None) or part.finder.size(name)
    if size is None:
        raise ValueError(f"has no original_width, and its image {name!r} is not there; pass --images")
    # projects with separate tags for shape and label have the labels in a result of their own
    named = {r.get("id"): r["value"][_LABELS] for r in results if r.get("type") == _LABELS and _LABELS in r["value"]}
    rows = []
    for result in results:
        kind = str(result.get("type") or next((key for key in result if key.endswith(_LABELS)), "region"))
        value = result.get("value") or {}
        shape = _label_studio_shape(kind.removesuffix(_LABELS), value, size)
        if shape is None:
            if kind != _LABELS:
                part.counts[f"{kind} left out"] += 1
            continue
        labels = value.get(kind) or value.get(_LABELS) or named.get(result.get("id"), [])
        if not labels:
            part.counts["regions left out (without a label)"] += 1
        rows += [{"category": str(label), **shape, "iscrowd": 0} for label in labels]
    part.add_image(name, (int(size[0]), int(size[1])), rows)


def _image_address(data: dict[str, Any]) -> str | None:
    """The first text that names an image, unless `image` is one: each project names the key as it likes."""
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    return texts.get("image") or next((value for value in texts.values() if is_image_name(_path(value))), None)


def _path(address: str) -> str:
    """The path in `/data/upload/1/a.jpg`, `/data/local-files/?d=a.jpg`, `s3://…/a.jpg` or a plain name."""
    address = address.replace("\\", "/")
    if "?d=" in address:
        return parse_qs(urlsplit(address).query)["d"][0]
    return unquote(urlsplit(address).path) if "://" in address or address.startswith("/data/") else address


def _name(address: str, finder: ImageFinder) -> str:
    """The image's name, without what an upload adds before it if only the name without is there."""
    path = _path(address)
    base = path.rpartition("/")[2]
    mark, hyphen, plain = base.partition("-")
    is_upload = bool(hyphen) and len(mark) == _UPLOAD and all(letter in "0123456789abcdef" for letter in mark)
    if not finder:
        return base
    return plain if is_upload and finder.find(base) is None and finder.find(plain) else path


def _label_studio_shape(kind: str, value: dict[str, Any], size: tuple[int, int]) -> dict[str, Any] | None:
    """COCO's shape of a region; its numbers are percent of the image's size. None of a kind without an area."""

    def pixels(*keys: str) -> list[float]:
        sides = {"x": 0, "width": 0, "radiusX": 0}
        return [parse_number(str(value[k]), k, FARTHEST) / 100 * size[sides.get(k, 1)] for k in keys]

    turned = parse_number(str(value.get("rotation") or 0), "rotation")
    if kind == "rectangle":
        x, y, width, height = pixels("x", "y", "width", "height")
        if not turned:
            return shapes.box(x, y, width, height)
        # turned around its upper left corner
        sin, cos = math.sin(math.radians(turned)), math.cos(math.radians(turned))
        middle = x + width / 2 * cos - height / 2 * sin, y + width / 2 * sin + height / 2 * cos
        return shapes.rotated_box(middle, (width, height), turned)
    if kind == "polygon":
        return shapes.polygons([np.array(value["points"], dtype=np.float64) / 100 * size])
    if kind == "ellipse":
        x, y, rx, ry = pixels("x", "y", "radiusX", "radiusY")
        return shapes.ellipse((x, y), (rx, ry), turned)
    if kind == "brush" and value.get("format") == "rle":
        rgba = decode_rle(value["rle"])
        if len(rgba) != 4 * size[0] * size[1]:
            raise ValueError(f"a brush has {len(rgba) // 4} pixels, and the image {size[0]}×{size[1]}")
        return shapes.mask(rgba.reshape(size[1], size[0], 4)[..., 3] > 0, 0, 0, size)
    return None


def decode_rle(data: list[int]) -> np.ndarray:
    """(pixels · 4,) uint8, R G B A of each: the RLE of Label Studio's brush, as its converter decodes it.

    The bits are: 32 for the number of values, 5 for the length of a value, 4 × 4 for lengths of counts; then runs: a
    bit, 1 for a value that repeats, 2 bits that choose the count's length, the count less 1, and one value or all.

    Raises:
        ValueError: the data are cut off.
    """
    bits = "".join(np.binary_repr(byte, 8) for byte in bytes(data))
    position = 0

    def take(count: int) -> int:
        nonlocal position
        if position + count > len(bits):
            raise ValueError("a brush's rle is cut off")
        position += count
        return int(bits[position - count : position], 2)

    total, length = take(32), take(5) + 1
    counts = [take(4) + 1 for _ in range(4)]
    values = np.zeros(total, np.uint8)
    at = 0
    while at < total:
        repeats = take(1)
        end = at + take(counts[take(2)]) + 1
        if repeats:
            values[at:end] = take(length)
        else:
            values[at:end] = [take(length) for _ in range(min(end, total) - at)]
        at = end
    return values


LABEL_STUDIO = Format(
    "the JSON or JSON-MIN file that Label Studio exports", _recognise_label_studio, _read_label_studio
)
