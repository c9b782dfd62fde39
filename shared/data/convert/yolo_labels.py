"""The numbers of YOLO's label files: boxes, polygons, oriented boxes or keypoints; a confidence and a track id.

A line is `class x y width height`, or `class x1 y1 x2 y2 …`, or a box and then keypoints; all are shares of the
image's size.
Predictions have more columns at the end: a confidence, a track id, or both. A line alone does not show which it is;
`kind_of` decides from data.yaml and all lines together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.data.convert import shapes
from shared.data.convert.contents import errors_in
from shared.data.convert.files import read_text
from shared.data.convert.shapes import parse_number, parse_whole_number
from shared.errors import UserError

_BOX = 4  # numbers
_LEAST, _MOST = -1.0, 2.0  # shares of an image's size; objects may reach over its edge, and pixels are far greater
_EDGE = 0.01  # a share that rounding, and boxes drawn over the edge, go over it
_TRIANGLE = 6


@dataclass(frozen=True)
class Labels:
    """A label file.

    Attributes:
        lines: the number, the class and the numbers after it of each line.
    """

    file: Path
    lines: list[tuple[int, int, np.ndarray]]


@dataclass(frozen=True)
class Kind:
    """The meaning of the numbers.

    Attributes:
        name: "boxes", "polygons", "oriented" or "keypoints".
        points: the number of keypoints, and `numbers` of each: 2, or 3 with its visibility.
        confidence, track: polygons and keypoints end with such a column. Lines of boxes show it by their length.
    """

    name: str
    points: int = 0
    numbers: int = 0
    confidence: bool = False
    track: bool = False

    @property
    def length(self) -> int:
        """For a line with keypoints."""
        return _BOX + self.points * self.numbers


def read(file: Path) -> Labels:
    """The lines; [] if there is no such file.

    Raises:
        UserError: a word is not a number, or not a share of an image's size.
    """
    lines = []
    text = read_text(file) if file.exists() else ""
    for number, line in enumerate(text.splitlines(), 1):
        if words := line.split():
            with errors_in(f"{file}: line {number}", "correct the line, or delete it"):
                category = parse_whole_number(words[0], "the class")
                values = np.array([parse_number(word, "a coordinate") for word in words[1:]])
                if len(values) < _BOX:
                    raise ValueError(f"{len(values)} numbers after the class; a box has 4")
            lines.append((number, category, values))
    return Labels(file, lines)


def kind_of(files: Iterable[Labels], given: str, described: Path) -> Kind:
    """
    Args:
        given: "" or as `Options.labels`.
        described: the data.yaml, for errors.

    Raises:
        UserError: all lines together can be read in two ways.
    """
    lines = [values for labels in files for _, _, values in labels.lines]
    more = [values for values in lines if len(values) > _BOX]
    if given.startswith("keypoints"):
        return _keypoints(given, lines)
    if given in ("polygons", "oriented"):
        return _polygons(given, [values for values in more if len(values) > 5])
    if given not in ("", "boxes"):
        raise UserError(f"--labels: {given!r} is not a kind. Fix: pass boxes, polygons, oriented or keypoints:17x3")
    lengths = {len(values) for values in more}
    if given == "boxes" or lengths <= {5}:
        return _boxes(more, described)
    if lengths <= {5, 6}:
        return _boxes_or_triangles(more, described)
    _refuse_keypoints(more, described)
    return _polygons("polygons", [values for values in more if len(values) > 5])


def _boxes(lines: Sequence[np.ndarray], described: Path) -> Kind:
    for values in lines:
        if len(values) == 5 and not (0 <= values[4] <= 1 or _is_whole(values[4])):
            raise UserError(
                f"{described}: a label line has {values[4]:g} after a box's four numbers, which is neither a "
                "confidence nor a track id; it may be an angle. Fix: export oriented boxes with four corners"
            )
    return Kind("boxes")


def _boxes_or_triangles(lines: Sequence[np.ndarray], described: Path) -> Kind:
    """Lines of 6 numbers, and of 5: boxes with a confidence and a track id, or triangles."""
    six = [values for values in lines if len(values) == _TRIANGLE]
    tracks = all(0 <= values[4] <= 1 and _is_whole(values[5]) for values in six)
    triangles = len(six) == len(lines) and all(((values >= -_EDGE) & (values <= 1 + _EDGE)).all() for values in six)
    if tracks and not triangles:
        return Kind("boxes")
    if not tracks and not _may_be_keypoints(six, 2):
        return Kind("polygons")
    raise _ambiguous(six[0], described, ["boxes", "polygons", "keypoints:1x2"])


def _refuse_keypoints(lines: Sequence[np.ndarray], described: Path) -> None:
    """Raises UserError if the lines can be keypoints: all have one length, each begins with
    a box inside the image, and the points lie in it."""
    if len({len(values) for values in lines}) != 1:
        return
    length = len(lines[0])
    found = [n for n in (2, 3) if (length - _BOX) % n == 0 and _may_be_keypoints(lines, n)]
    if found:
        kinds = [f"keypoints:{(length - _BOX) // n}x{n}" for n in reversed(found)]
        raise _ambiguous(lines[0], described, [*kinds, "polygons", *(["oriented"] if length == 8 else [])])


def _may_be_keypoints(lines: Sequence[np.ndarray], numbers: int) -> bool:
    rows = np.stack(list(lines))
    middle, half = rows[:, None, :2], rows[:, None, 2:4] / 2
    points = rows[:, _BOX:].reshape(len(rows), -1, numbers)
    if numbers == 3 and not np.isin(points[..., 2], (0, 1, 2)).all():
        return False
    inside = (np.abs(points[..., :2] - middle) <= half + _EDGE).all(axis=2) | (points[..., :2] == 0).all(axis=2)
    box_fits = (np.abs(middle - 0.5) + half <= 0.5 + _EDGE).all() and (half > 0).all()
    return bool(box_fits and inside.all())


def _polygons(name: str, lines: Sequence[np.ndarray]) -> Kind:
    """Predictions have a confidence, a track id, or both after the points, in all lines alike."""
    if not lines:
        return Kind(name)
    last = np.array([values[-1] for values in lines])
    track = bool(_is_whole(last).all() and (last > 1 + _EDGE).any())
    rest = [values[:-1] for values in lines] if track else lines
    confidence = all(len(values) % 2 and 0 <= values[-1] <= 1 for values in rest)
    return Kind(name, confidence=confidence, track=track)


def _keypoints(given: str, lines: Sequence[np.ndarray]) -> Kind:
    try:
        points, numbers = (int(number) for number in given.partition(":")[2].split("x"))
        if points < 1 or numbers not in (2, 3):
            raise ValueError
    except ValueError as error:
        raise UserError(
            f"--labels: {given!r} is not a kind. Fix: pass keypoints:17x3, for 17 points of x, y, visibility"
        ) from error
    kind = Kind("keypoints", points, numbers)
    after = [values[kind.length :] for values in lines if len(values) > kind.length]
    confidence = bool(after) and all(0 <= rest[0] <= 1 for rest in after)
    return replace(kind, confidence=confidence, track=any(len(rest) > confidence for rest in after))


def _ambiguous(values: np.ndarray, described: Path, kinds: Sequence[str]) -> UserError:
    options = ", ".join(f"`--labels {kind}`" for kind in kinds)
    return UserError(
        f"{described}: the labels have {len(values)} numbers after the class, and do not show what they are. Fix: pass "
        f"one of {options}; or write `task` or `kpt_shape` into data.yaml"
    )


def annotations(
    labels: Labels, kind: Kind, names: Mapping[int, str], size: tuple[int, int], counts: Counter[str]
) -> list[dict[str, Any]]:
    """COCO's annotations of a label file.

    Args:
        size: (width, height) of the image.
        counts: gets what was left out.

    Raises:
        UserError: a line does not have the kind's numbers, or a class has no name.
    """
    rows = []
    for number, category, values in labels.lines:
        with errors_in(f"{labels.file}: line {number}", "correct the line, or delete it"):
            if category not in names:
                raise ValueError(f"category {category}, which data.yaml does not name")
            shape = _shape(values, kind, np.array(size, dtype=np.float64), counts)
        rows.append({"category": names[category], **shape, "iscrowd": 0})
    return rows


def _shape(values: np.ndarray, kind: Kind, size: np.ndarray, counts: Counter[str]) -> dict[str, Any]:
    if kind.name == "keypoints":
        return _box_with_keypoints(values, kind, size, counts)
    if kind.name == "boxes" or len(values) <= 5:
        if len(values) > _TRIANGLE:
            raise ValueError(f"{len(values)} numbers after the class; 4 are a box")
        _count_columns(values[_BOX:], counts)
        return _box(values, size)
    end = len(values) - kind.confidence - kind.track
    if end < 6 or end % 2:
        raise ValueError(f"{len(values)} numbers after the category; 4 are a box, x and y of each point a polygon")
    if kind.name == "oriented" and end != 8:
        raise ValueError(f"{len(values)} numbers after the class; x and y of the four corners are an oriented box")
    counts.update(_names_of_columns(kind))
    _refuse_pixels(values[:end])
    return shapes.polygons([values[:end].reshape(-1, 2) * size])


def _box(values: np.ndarray, size: np.ndarray) -> dict[str, Any]:
    _refuse_pixels(values[:_BOX])
    (x, y, w, h), (width, height) = values[:_BOX].tolist(), size.tolist()
    return shapes.box((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)


def _box_with_keypoints(values: np.ndarray, kind: Kind, size: np.ndarray, counts: Counter[str]) -> dict[str, Any]:
    shape = _box(values, size)
    if len(values) == _BOX:
        return shape
    if not kind.length <= len(values) <= kind.length + 2:
        raise ValueError(f"{len(values)} numbers after the class; a box and {kind.points} keypoints are {kind.length}")
    points = values[_BOX : kind.length].reshape(kind.points, kind.numbers)
    if len(values) > kind.length:
        counts.update(_names_of_columns(kind))
    if kind.numbers == 2:
        seen = np.where((points == 0).all(axis=1), 0, 2)
    else:
        seen = points[:, 2]
        others = seen[~np.isin(seen, (0, 1, 2))]
        if len(others):  # predictions have a confidence there
            if not ((seen >= 0) & (seen <= 1)).all():
                raise ValueError(f"a keypoint's visibility is {others[0]:g}, and not 0, 1 or 2")
            counts["keypoints with a confidence, visible from 0.5 on"] += kind.points
            seen = np.where(seen >= 0.5, 2, 0)
    _refuse_pixels(points[:, :2].ravel())
    pixels = np.where(seen[:, None] > 0, points[:, :2] * size, 0)
    keypoints = np.concatenate([pixels, seen[:, None]], axis=1)
    return {**shape, "keypoints": keypoints.ravel().tolist(), "num_keypoints": int((seen > 0).sum())}


def _refuse_pixels(values: np.ndarray) -> None:
    wrong = (values < _LEAST) | (values > _MOST)
    if wrong.any():
        raise ValueError(f"{values[wrong][0]:g} is not a share of an image's size")


def _count_columns(values: np.ndarray, counts: Counter[str]) -> None:
    """What follows a box's four numbers: one is a confidence if it is a share, else a track id."""
    if len(values) == 2 or (len(values) == 1 and 0 <= values[0] <= 1):
        counts["confidences left out"] += 1
    if len(values) == 2 or (len(values) == 1 and values[0] > 1):
        counts["track ids left out"] += 1


def _names_of_columns(kind: Kind) -> list[str]:
    return ["confidences left out"] * kind.confidence + ["track ids left out"] * kind.track


def _is_whole(values: np.ndarray | float) -> Any:
    return (values == np.floor(values)) & (values >= 0)
