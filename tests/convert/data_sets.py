"""Small data sets of other formats for the tests of `convert`, and its results."""

import json
from pathlib import Path

from PIL import Image

from shared.data.annotations import CocoAnnotations
from shared.data.convert.conversion import convert


def draw(*files, size=(100, 50)):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(file)


def write(file: Path, content: str | bytes | list | dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (list, dict)):
        content = json.dumps(content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def converted(kind, source, output, **options):
    """Per split, file name to (category, x, y, width, height) of each box; and the printed text."""
    said = []
    written = convert(kind, source, output, say=said.append, **options)
    said += map(str, written)
    return {one.split: boxes_of(one.path) for one in written}, "\n".join(said)


def boxes_of(path):
    annotations = CocoAnnotations.open(path)
    names = annotations.category_names
    return {
        record.file_name: [
            (names[label], *box) for label, box in zip(record.labels, record.file_boxes.round(3).tolist(), strict=True)
        ]
        for record in annotations
    }


def annotations_in(path):
    return json.loads(path.read_text())["annotations"]
