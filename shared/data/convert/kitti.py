"""KITTI: a text file per image in `label_2`, with 15 words per object; also as NVIDIA's TAO writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.data.coco_file import FARTHEST
from shared.data.convert import shapes
from shared.data.convert.contents import Contents, Options, Split
from shared.data.convert.shapes import parse_number
from shared.data.convert.text_labels import looks_like, read_folder

ABOUT = "a folder with label_2 and image_2, or with labels and images; or one per split"

_WORDS = (15, 16)  # the last of 16 is the score of a prediction
_IGNORED = "DontCare"


def recognise(source: Path) -> str:
    return looks_like(source, _is_line)


def read(source: Path, options: Options) -> Contents:
    return read_folder(source, options, _row)


def _is_line(words: list[str]) -> bool:
    return len(words) in _WORDS and _is_number(words[4]) and not _is_number(words[0])


def _is_number(word: str) -> bool:
    try:
        parse_number(word, "a number")
    except ValueError:
        return False
    return True


def _row(line: str, part: Split) -> dict[str, Any] | None:
    words = line.split()
    if len(words) not in _WORDS:
        raise ValueError(f"{len(words)} words, and an object of KITTI has 15")
    x1, y1, x2, y2 = (parse_number(word, "an edge of the box", FARTHEST) for word in words[4:8])
    if words[0] == _IGNORED:  # regions, which have no category
        part.counts["regions left out (DontCare)"] += 1
        return None
    if len(words) == _WORDS[1]:
        part.counts["confidences left out"] += 1
    return {"category": words[0], **shapes.box_of_corners(x1, y1, x2, y2), "iscrowd": 0}
