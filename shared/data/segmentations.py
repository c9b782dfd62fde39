"""What a segmentation must be to train masks on and to be scored, and which annotations of a file have a wrong one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import hotcoco
import msgspec
import numpy as np

from shared.data.annotations import CocoAnnotations
from shared.data.once import once

# COCO's own polygons in one call each: 860,000 of them are two seconds so, and ten in plain Python
_FARTHEST = 1e6  # pixels; pycocotools walks along each edge, and dies of memory on those without end
_Coordinate = Annotated[float, msgspec.Meta(ge=-_FARTHEST, le=_FARTHEST)]
_POLYGONS = msgspec.json.Decoder(
    Annotated[list[Annotated[list[_Coordinate], msgspec.Meta(min_length=6)]], msgspec.Meta(min_length=1)]
)
_NOTHING = len(b"[]")  # no segmentation is no bytes, or an empty list


def wrong_segmentation(segmentation: Any, height: int, width: int) -> str | None:
    """What is wrong with a decoded segmentation of an image of that size, as the end of a sentence; None where it is
    polygons or RLE that every detector and the evaluator take."""
    if segmentation in ([], {}):
        return "is empty"
    if isinstance(segmentation, list):
        if not all(isinstance(polygon, list) and set(map(type, polygon)) <= {int, float} for polygon in segmentation):
            return "is not a list of polygons, each a list of numbers"
        bad = next((len(polygon) for polygon in segmentation if len(polygon) < 6 or len(polygon) % 2), None)
        if bad is not None:
            return f"has a polygon of {bad} numbers, and not x and y of three points or more"
        farthest = max(max(map(abs, polygon)) for polygon in segmentation)
        return None if farthest <= _FARTHEST else f"has a point at {farthest:g} pixels"
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        kind = {str: "a string", dict: "other keys"}.get(type(segmentation), "a number")
        return f"is neither polygons nor RLE with `size` and `counts`, but {kind}"
    if segmentation["size"] != [height, width]:
        return f"is RLE of the size {segmentation['size']}, and the image's is {[height, width]}"
    try:
        hotcoco.mask.area(segmentation)
        counts = segmentation["counts"]
        total = sum(counts) if isinstance(counts, list) else _total(counts)
    except (TypeError, ValueError, OverflowError) as error:
        return f"has RLE that cannot be read ({error})"
    return None if total == height * width else f"has RLE of {total} pixels, and the image has {height * width}"


def _total(counts: str) -> int:
    """The pixels that compressed counts are of: five bits a letter, the lowest first, 32 where more follow; from the
    fourth on each number is the difference to the one before the last."""
    total, before, last, number, shift = 0, 0, 0, 0, 0
    position = 0
    for letter in counts.encode():
        bits = letter - 48
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        number += before if position > 2 else 0
        before, last = last, number
        total, number, shift, position = total + number, 0, 0, position + 1
    return total


def is_absent(annotations: CocoAnnotations) -> np.ndarray:
    """(annotations,) bool: no segmentation, or an empty list."""
    return np.diff(annotations.columns["segmentation_offsets"]) <= _NOTHING


def wrong_rows(annotations: CocoAnnotations) -> np.ndarray:
    """(N,) int64: the rows of `annotations.columns` whose segmentation is there and wrong, looked for once and
    remembered beside the annotation cache."""
    if annotations.selected_from is not None:
        whole, kept = annotations.selected_from
        wrong = np.zeros(len(kept), dtype=bool)
        wrong[wrong_rows(whole)] = True
        return np.flatnonzero(wrong[kept])
    if annotations.cache is None:
        return _look(annotations)
    file, count = annotations.cache / "segmentations" / "wrong.npy", len(annotations.columns["annotation_ids"])
    return once(
        [file.parent / "lock"], lambda: _remembered_rows(file, count), lambda: _remember_rows(_look(annotations), file)
    )


def why_wrong(annotations: CocoAnnotations, row: int) -> str:
    """What is wrong with the segmentation of an annotation, "" where nothing is."""
    image = int(np.searchsorted(annotations.columns["offsets"], row, side="right")) - 1
    height, width = (int(annotations.columns[name][image]) for name in ("heights", "widths"))
    try:
        return wrong_segmentation(msgspec.json.decode(_raw(annotations, row)), height, width) or ""
    except (msgspec.DecodeError, RecursionError) as error:
        return f"cannot be read ({error})"


def _look(annotations: CocoAnnotations) -> np.ndarray:
    columns = annotations.columns
    offsets, data = columns["segmentation_offsets"].tolist(), memoryview(columns["segmentations"])
    present = np.flatnonzero(~is_absent(annotations)).tolist()
    wrong = []
    for row in present:
        try:
            for polygon in _POLYGONS.decode(data[offsets[row] : offsets[row + 1]]):
                if len(polygon) % 2:
                    raise ValueError
        except (ValueError, RecursionError):  # no good polygons, which is RLE for the most part
            if why_wrong(annotations, row):
                wrong.append(row)
    return np.array(wrong, dtype=np.int64)


def _raw(annotations: CocoAnnotations, row: int) -> bytes:
    start, end = annotations.columns["segmentation_offsets"][row : row + 2]
    return annotations.columns["segmentations"][start:end].tobytes()


def _remember_rows(rows: np.ndarray, file: Path) -> np.ndarray:
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as aside:
            np.save(aside, rows)
        os.chmod(aside.name, 0o644)
        os.replace(aside.name, file)
    except OSError:  # looked for again at the next start
        pass
    return rows


def _remembered_rows(file: Path, count: int) -> np.ndarray | None:
    try:
        rows = np.load(file)
    except (OSError, ValueError, EOFError):
        return None  # none yet, cut off or not ours
    sound = rows.dtype == np.int64 and rows.ndim == 1 and (not len(rows) or 0 <= rows.min() <= rows.max() < count)
    return rows if sound else None
