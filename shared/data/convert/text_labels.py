"""KITTI and DOTA: a text file per image, with a line per object, in pixels. YOLO's are in yolo.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shared.data.coco_file import FARTHEST
from shared.data.convert import shapes
from shared.data.convert.contents import Contents, Format, Options, Split, errors_in
from shared.data.convert.files import by_split, files_below, finder_for, read_text
from shared.data.convert.shapes import is_number, parse_number
from shared.errors import UserError

_TRIED = 10  # files, for one with a line


def looks_like(source: Path, is_line: Callable[[list[str]], bool]) -> str:
    """A description, if the first lines of the text files in a folder are the format's; else ""."""
    files = files_below(source, (".txt",)) if source.is_dir() else []
    for file in files[:_TRIED] + files[_TRIED :: max(len(files) // _TRIED, 1)]:
        try:
            words = next((line.split() for line in read_text(file).splitlines() if line.strip()), None)
        except UserError:
            continue
        if words is not None and is_line(words):
            return f"{len(files)} text files, {file.relative_to(source)} begins with {' '.join(words)[:60]!r}"
    return ""


def read_folder(
    source: Path, options: Options, row_of: Callable[[str, Split], dict[str, Any] | None], crowds: str = "crowds"
) -> Contents:
    """
    Args:
        row_of: the annotation of a line; None for a header, and for an object that it has counted.

    Raises:
        UserError: a line is not the format's, or no label file has an image.
    """
    if not source.is_dir():
        raise UserError(f"{source}: is not a folder. Fix: give the folder of the label files, or the one above it")
    finder = finder_for(source, options.images)
    splits = {}
    for split, files in by_split(files_below(source, (".txt",)), source).items():
        part = splits[split] = Split(finder, crowds=crowds)
        for file in files:
            with errors_in(file):
                near = file.parent.relative_to(source).as_posix()
                name = finder.find_stem(file.stem, near)
            if name is None:
                part.counts["label files left out (without an image)"] += 1
                continue
            part.found[name] = name.rpartition("/")[2]
            rows = []
            for number, line in enumerate(read_text(file).splitlines(), 1):
                if line.strip():
                    with errors_in(f"{file}: line {number}", "correct the line, or delete it"):
                        rows.append(row_of(line.strip(), part))
            part.add_image(name, finder.size(name), [row for row in rows if row is not None])
    if not any(part.images for part in splits.values()):
        raise UserError(f"{source}: no label file has an image with its name. Fix: pass --images FOLDER")
    return Contents(splits)


# --- KITTI: 15 words per object, in `label_2`; also as NVIDIA's TAO writes it -----------------------


_KITTI_WORDS = (15, 16)  # the last of 16 is the score of a prediction
_IGNORED = "DontCare"


def _is_kitti_line(words: list[str]) -> bool:
    return len(words) in _KITTI_WORDS and is_number(words[4]) and not is_number(words[0])


def _kitti_row(line: str, part: Split) -> dict[str, Any] | None:
    words = line.split()
    if len(words) not in _KITTI_WORDS:
        raise ValueError(f"{len(words)} words, and an object of KITTI has 15")
    x1, y1, x2, y2 = (parse_number(word, "an edge of the box", FARTHEST) for word in words[4:8])
    if words[0] == _IGNORED:  # regions, which have no category
        part.counts["regions left out (DontCare)"] += 1
        return None
    if len(words) == _KITTI_WORDS[1]:
        part.counts["confidences left out"] += 1
    return {"category": words[0], **shapes.box_of_corners(x1, y1, x2, y2), "iscrowd": 0}


KITTI = Format(
    "a folder with label_2 and image_2, or with labels and images; or one per split",
    functools.partial(looks_like, is_line=_is_kitti_line),
    functools.partial(read_folder, row_of=_kitti_row),
)


# --- DOTA: four corners, a category and `difficult` per object, in `labelTxt` -----------------------


_CORNERS = 8  # numbers
_DOTA_HEADERS = ("imagesource:", "gsd:")


def _is_dota_line(words: list[str]) -> bool:
    is_object = len(words) in (9, 10) and all(map(is_number, words[:_CORNERS])) and words[_CORNERS][0].isalpha()
    return is_object or words[0].lower().startswith(_DOTA_HEADERS)


def _dota_row(line: str, part: Split) -> dict[str, Any] | None:
    if line.lower().startswith(_DOTA_HEADERS):
        return None
    words = line.split()
    if len(words) not in (9, 10):
        raise ValueError(f"{len(words)} words, and an object of DOTA has 8 numbers, a category and `difficult`")
    corners = np.array([parse_number(word, "a corner", FARTHEST) for word in words[:_CORNERS]])
    shape = shapes.polygons([corners.reshape(-1, 2)])
    return {"category": words[_CORNERS], **shape, "iscrowd": int(words[9:] not in ([], ["0"]))}


DOTA = Format(
    "a folder with labelTxt and images, or one per split",
    functools.partial(looks_like, is_line=_is_dota_line),
    functools.partial(read_folder, row_of=_dota_row, crowds="crowds (DOTA's `difficult`)"),
)
