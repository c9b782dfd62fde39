"""CVAT for images 1.1: one XML file with an `<image>` per image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from shared.data.coco_file import FARTHEST
from shared.data.convert import shapes
from shared.data.convert.contents import Contents, Options, Split, errors_in
from shared.data.convert.files import SPLITS, ImageFinder, files_in, finder_for, split_of
from shared.data.convert.shapes import parse_number, parse_whole_number
from shared.errors import UserError

ABOUT = "an XML file, CVAT for images 1.1, or the folder that has one"

_WITHOUT_BOX = ("polyline", "points", "cuboid", "tag")


def recognise(source: Path) -> str:
    for file in files_in(source, (".xml",)):
        if _root_tag(file) == "annotations":
            return f"{file.name} has <annotations>"
    return ""


def read(source: Path, options: Options) -> Contents:
    if source.is_dir():
        files = files_in(source, (".xml",))
        if len(files) != 1:
            raise UserError(f"{source}: is a folder with {len(files)} XML files: give the one to read. Fix: name one")
        source = files[0]
    parts: dict[str, Split] = {}
    labels: dict[str, list[str]] = {}  # the points of each, if it is a skeleton
    others: Counter[str] = Counter()
    finder = finder_for(source, options.images)
    try:
        for event, element in ElementTree.iterparse(source, events=("start", "end")):
            if event == "start":
                if element.tag == "track":
                    raise UserError(f"{source}: is of a video. Fix: export the task as `CVAT for images 1.1`")
            elif element.tag == "label" and element.find("name") is not None:
                _add_label(labels, element)
            elif element.tag == "image":
                part = parts.setdefault(split_of(element.get("subset") or ""), Split(finder))  # of a project
                _add_image(element, source, part, labels, others)
                element.clear()
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}). Fix: check the path and its rights") from error
    except ElementTree.ParseError as error:
        raise UserError(f"{source}: cannot be read as cvat ({error}). Fix: export it again") from error
    if "" in parts:  # not all subsets are splits
        parts = {"": _together(parts.values(), finder)}
    if others and not any(image["annotations"] for part in parts.values() for image in part.images):
        found = ", ".join(f"{kind} {count}" for kind, count in others.items())
        raise UserError(
            f"{source}: has no boxes, polygons, ellipses, masks or skeletons, but {found} alone. Fix: draw boxes or "
            "polygons in CVAT"
        )
    if parts:
        next(iter(parts.values())).counts.update({f"{kind} left out": count for kind, count in others.items()})
    parts = {split: parts[split] for split in ("", *SPLITS) if split in parts}
    return Contents(parts, [{"name": name, **_points(points)} for name, points in labels.items()])


def _together(parts: Iterable[Split], finder: ImageFinder) -> Split:
    whole = Split(finder)
    for part in parts:
        whole.images += part.images
        whole.counts.update(part.counts)
        whole.found |= part.found
    return whole


def _root_tag(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return next(ElementTree.iterparse(opened, events=("start",)))[1].tag
    except (OSError, ElementTree.ParseError, StopIteration):
        return ""


def _points(names: list[str]) -> dict[str, Any]:
    return {"keypoints": names, "skeleton": []} if names else {}


def _add_label(labels: dict[str, list[str]], element: ElementTree.Element) -> None:
    """Adds a label, or a skeleton's point to it; the file may have either first."""
    name, parent = element.findtext("name") or "", element.findtext("parent")
    if parent:
        points = labels.setdefault(parent, [])
        points += [name] if name not in points else []
    else:
        labels.setdefault(name, [])


def _add_image(
    element: ElementTree.Element, source: Path, part: Split, labels: dict[str, list[str]], others: Counter[str]
) -> None:
    given = element.get("name") or ""
    with errors_in(f"{source}: image {given!r}", "correct it, in pixels; or export the task again"):
        size = parse_whole_number(element.get("width"), "width"), parse_whole_number(element.get("height"), "height")
        rows = []
        for item in element:
            if item.tag in _WITHOUT_BOX:
                others[item.tag] += 1
                continue
            shape = _shape(item, size, labels)
            if shape is None:
                others[item.tag] += 1
                continue
            label = item.get("label") or ""
            labels.setdefault(label, [])
            rows.append({"category": label, **shape, **_attributes(item), "iscrowd": 0})
        part.add_image(part.find_image(given), size, rows)


def _attributes(item: ElementTree.Element) -> dict[str, Any]:
    """As CVAT's own COCO export has them."""
    found = {a.get("name") or "": a.text or "" for a in item.findall("attribute")}
    return {"attributes": found} if found else {}


def _shape(item: ElementTree.Element, size: tuple[int, int], labels: dict[str, list[str]]) -> dict[str, Any] | None:
    """COCO's shape; None of an element that is not known."""

    def number(key: str) -> float:
        return parse_number(item.get(key), key, FARTHEST)

    turned = parse_number(item.get("rotation") or "0", "rotation")
    if item.tag == "box":
        x1, y1, x2, y2 = map(number, ("xtl", "ytl", "xbr", "ybr"))
        if turned:
            return shapes.rotated_box(((x1 + x2) / 2, (y1 + y2) / 2), (x2 - x1, y2 - y1), turned)
        return shapes.box_of_corners(x1, y1, x2, y2)
    if item.tag == "polygon":
        return shapes.polygons([_coordinates(item)])
    if item.tag == "ellipse":
        return shapes.ellipse((number("cx"), number("cy")), (number("rx"), number("ry")), turned)
    if item.tag == "mask":
        return _mask(item, size)
    if item.tag == "skeleton":
        return _skeleton(item, labels.setdefault(item.get("label") or "", []))
    return None


def _coordinates(item: ElementTree.Element) -> np.ndarray:
    pairs = [pair.split(",") for pair in (item.get("points") or "").split(";")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"the points of a {item.tag} are {(item.get('points') or '')[:40]!r}")
    return np.array([[parse_number(word, "a coordinate", FARTHEST) for word in pair] for pair in pairs])


def _mask(item: ElementTree.Element, size: tuple[int, int]) -> dict[str, Any]:
    """A window of the image, row by row: how many pixels lie outside, inside, outside, …"""
    keys = ("left", "top", "width", "height")
    left, top, width, height = (parse_whole_number(item.get(key), key) for key in keys)
    counts = [parse_whole_number(word, "a number of `rle`") for word in (item.get("rle") or "").split(",")]
    if min(width, height, *counts) < 0 or sum(counts) != width * height:
        raise ValueError(f"a mask's rle has {sum(counts)} pixels, and its window {width}×{height}")
    inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return shapes.mask(inside.reshape(height, width), left, top, size)


def _skeleton(item: ElementTree.Element, names: list[str]) -> dict[str, Any]:
    """Keypoints, and the box around those that are visible or hidden; a point `outside` is not labelled."""
    keypoints = {}
    for point in item.findall("points"):
        name = point.get("label") or ""
        if name not in names:
            names.append(name)
        seen = 0 if point.get("outside") == "1" else 1 if point.get("occluded") == "1" else 2
        keypoints[name] = [*_coordinates(point)[0].tolist(), seen] if seen else [0, 0, 0]
    there = np.array([point[:2] for point in keypoints.values() if point[2]])
    if not len(there):
        return shapes.box(0.0, 0.0, 0.0, 0.0)
    shape = shapes.box_of_corners(*there.min(axis=0).tolist(), *there.max(axis=0).tolist())
    numbers = [number for name in names for number in keypoints.get(name, [0, 0, 0])]
    return {**shape, "keypoints": numbers, "num_keypoints": len(there)}
