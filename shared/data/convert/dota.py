"""DOTA: a text file per image in `labelTxt`, with four corners, a category and `difficult` per object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.data.coco_file import FARTHEST
from shared.data.convert import shapes
from shared.data.convert.contents import Contents, Options, Split
from shared.data.convert.shapes import parse_number
from shared.data.convert.text_labels import looks_like, read_folder

ABOUT = "a folder with labelTxt and images, or one per split"

_CORNERS = 8  # numbers
_HEADERS = ("imagesource:", "gsd:")


def recognise(source: Path) -> str:
    return looks_like(source, _is_line)


def read(source: Path, options: Options) -> Contents:
    return read_folder(source, options, _row, "crowds (DOTA's `difficult`)")


def _is_line(words: list[str]) -> bool:
    if words[0].lower().startswith(_HEADERS):
        return True
    try:
        [parse_number(word, "a corner") for word in words[:_CORNERS]]
    except ValueError:
        return False
    return len(words) in (9, 10) and words[_CORNERS][0].isalpha()


def _row(line: str, part: Split) -> dict[str, Any] | None:
    if line.lower().startswith(_HEADERS):
        return None
    words = line.split()
    if len(words) not in (9, 10):
        raise ValueError(f"{len(words)} words, and an object of DOTA has 8 numbers, a category and `difficult`")
    shape = shapes.polygon([parse_number(word, "a corner", FARTHEST) for word in words[:_CORNERS]])
    return {"category": words[_CORNERS], **shape, "iscrowd": int(words[9:] not in ([], ["0"]))}
