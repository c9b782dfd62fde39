"""CreateML: a JSON list of images with boxes by their middle; also a folder per split, as Roboflow writes it."""

from __future__ import annotations

from pathlib import Path

from shared.data.coco_file import FARTHEST
from shared.data.convert import shapes
from shared.data.convert.contents import Contents, Options, Split, errors_in
from shared.data.convert.files import files_near, finder_for, json_outline, one_per_split, read_json
from shared.data.convert.shapes import parse_number

ABOUT = "a JSON file of CreateML, or a folder with one per split"


def recognise(source: Path) -> str:
    files = _files(source)
    return f"{', '.join(file.name for file in files.values())} with `image` and `coordinates`" if files else ""


def read(source: Path, options: Options) -> Contents:
    splits = {}
    for split, file in _files(source).items():
        finder = finder_for(file if source.is_file() else file.parent, options.images)
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


def _files(source: Path) -> dict[str, Path]:
    return one_per_split(filter(_is_createml, files_near(source, (".json",))), source)


def _is_createml(file: Path) -> bool:
    is_list, keys = json_outline(file)
    return is_list and keys.keys() >= {"image", "annotations"}
