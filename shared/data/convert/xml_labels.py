"""Pascal VOC and CVAT: XML files."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np

from shared.data.coco_file import FARTHEST
from shared.data.convert import shapes
from shared.data.convert.contents import Contents, Format, Options, Split, errors_in
from shared.data.convert.files import (
    SPLITS,
    ImageFinder,
    by_split,
    files_below,
    files_in,
    finder_for,
    folders_in,
    read_text,
    split_of,
)
from shared.data.convert.shapes import parse_number, parse_whole_number
from shared.errors import UserError, same_on_any_disk


def _root_tag(file: Path) -> str:
    """ "" for a file that is not XML."""
    try:
        with file.open("rb") as opened:
            return next(ElementTree.iterparse(opened, events=("start",)))[1].tag
    except (OSError, ValueError, LookupError, ElementTree.ParseError, StopIteration):
        return ""


# --- Pascal VOC: a file per image, with `<object>` and `<bndbox>` -----------------------------------


_LARGEST_SIDE = 2**31 - 1  # pixels, as COCO files have them here
_LISTS = {"train": ("train", "trainval"), "val": ("val",), "test": ("test",)}


def _recognise_voc(source: Path) -> str:
    files = files_below(source, (".xml",)) if source.is_dir() else []
    for file in files[:20]:  # a folder may hold other XML files too
        if _root_tag(file) == "annotation":
            return f"{len(files)} XML files with <annotation>, {file.relative_to(source)} for example"
    return ""


def _read_voc(source: Path, options: Options) -> Contents:
    if not source.is_dir():
        raise UserError(f"{source}: is not a folder. Fix: give the folder of the XML files, or the one above it")
    inside = [folder for folder in folders_in(source) if (folder / "Annotations").is_dir()]
    if len(inside) == 1:  # VOCdevkit
        source = inside[0]
    folder = source / "Annotations" if (source / "Annotations").is_dir() else source
    files = files_below(folder, (".xml",))
    if not files:
        raise UserError(f"{source}: has no XML files, and so no annotations of Pascal VOC. Fix: give their folder")
    finder, beside = finder_for(source, options.images), folder.parent / "JPEGImages"
    notes: list[str] = []
    splits = {}
    for split, of_split in (_listed(source, folder, files, notes) or by_split(files, source)).items():
        images = beside if beside.is_dir() else None
        splits[split] = Split(finder, folder=images, crowds="crowds (VOC's `difficult`)")
        _read_files(of_split, folder, splits[split])
    return Contents(splits, notes=notes)


def _listed(source: Path, folder: Path, files: list[Path], notes: list[str]) -> dict[str, list[Path]]:
    """The XML files of each split that the lists in ImageSets/Main name; {} unless there are lists for both training
    and validation: one list alone is no reason to drop the other files."""
    lists = {}
    for split, names in _LISTS.items():
        places = (source / "ImageSets" / "Main" / f"{name}.txt" for name in names)
        if file := next(filter(Path.is_file, places), None):
            lists[split] = file
    if len(lists) < 2:
        return {}
    known = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    splits, used = {}, set()
    for split, file in lists.items():
        names = dict.fromkeys(filter(None, (line.strip() for line in read_text(file).splitlines())))
        of_split = [known.get(_name_in_list(name, known)) for name in names]
        if missing := [name for name, found in zip(names, of_split, strict=True) if found is None]:
            if len(missing) == len(names) and split != "test":
                raise UserError(
                    f"{file}: {folder} has no XML file for any of its {len(names)} names, {missing[0]!r} for example. "
                    "Fix: correct the names, which have no folder and no ending, or delete the list"
                )
            notes.append(
                f"{file}: {len(missing)} names have no XML file, and are left out; the first is {missing[0]!r}"
            )
        if any(of_split):
            splits[split] = list(filter(None, of_split))
            used.update(splits[split])
    if unused := len(known) - len(used):
        notes.append(f"{unused} XML files are in none of the lists {', '.join(map(str, lists.values()))}")
    return splits


def _name_in_list(line: str, known: dict[str, Path]) -> str:
    """A line is a name, which may have spaces; some programs add an ending, and VOC's lists per category a flag."""
    name = line.replace("\\", "/")
    if name not in known and name.rpartition(" ")[2] in ("1", "0", "-1"):
        name = name.rpartition(" ")[0].strip()
    if name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name if name in known else name.rpartition("/")[2]


def _read_files(files: list[Path], folder: Path, part: Split) -> None:
    finder = part.finder
    claimed: dict[str, Path] = {}  # by the image's name
    for file in files:
        with errors_in(file, "export it again, correct it, or move it away"):
            try:
                root = ElementTree.parse(file).getroot()
            except ElementTree.ParseError as error:
                raise ValueError(f"is not an annotation of Pascal VOC, or is cut off ({error})") from error
            if root.tag != "annotation":
                part.counts["XML files that are not annotations"] += 1
                continue
            root_of_file = finder.folder if file.is_relative_to(finder.folder) else folder
            near = file.parent.relative_to(root_of_file).as_posix()
            # spaces at the ends are the indentation of the XML
            name = _image_of(file, (root.findtext("filename") or "").strip(), near, part)
            if (other := claimed.setdefault(name, file)) != file:
                raise UserError(
                    f"{file}: its image is {name!r}, which {other.name} has too. Fix: correct the `filename` of one of "
                    "the two files, or move it away"
                )
            size = _size(root, finder, name)
            part.add_image(name, size, [row for item in root.iter("object") if (row := _object(item, part))])


def _image_of(file: Path, given: str, near: str, part: Split) -> str:
    """The image's name. If `filename` is another image's, the image with the XML file's own name counts, as for
    torchvision, MMDetection and Detectron2."""
    found = part.finder.find(given, near) if given else None
    if found is not None and same_on_any_disk(PurePosixPath(found).stem) != same_on_any_disk(file.stem):
        with contextlib.suppress(ValueError):  # several images have the XML file's name
            if own := part.finder.find_stem(file.stem, near):
                part.counts["`filename`s of another image (the image with the XML file's name is taken)"] += 1
                path = PurePosixPath(own)
                given, near = path.name, path.parent.as_posix()
    return part.find_image(given, near, file.stem)


def _size(root: ElementTree.Element, finder: ImageFinder, name: str) -> tuple[int, int]:
    texts = [root.findtext(f"size/{key}") for key in ("width", "height")]
    if all((text or "0").strip() == "0" for text in texts) and (size := finder.size(name)):
        return size  # some programs leave it empty
    width, height = (parse_whole_number(text, key) for text, key in zip(texts, ("width", "height"), strict=True))
    if not 0 < min(width, height) <= max(width, height) <= _LARGEST_SIDE:
        raise ValueError(f"the image's size is {width}×{height}")
    return width, height


def _object(item: ElementTree.Element, part: Split) -> dict[str, Any] | None:
    """COCO's annotation; None, counted, if it has no box."""
    if parts := len(item.findall("part")):
        part.counts["parts of objects left out"] += parts
    shape: dict[str, Any]
    if item.find("robndbox") is not None:  # of roLabelImg, in radians
        keys = ("cx", "cy", "w", "h", "angle")
        cx, cy, w, h, angle = (parse_number(item.findtext(f"robndbox/{key}"), key, FARTHEST) for key in keys)
        shape = shapes.rotated_box((cx, cy), (w, h), float(np.degrees(angle)))
    elif item.find("bndbox") is not None:
        keys = ("xmin", "ymin", "xmax", "ymax")
        x1, y1, x2, y2 = (parse_number(item.findtext(f"bndbox/{key}"), key, FARTHEST) for key in keys)
        # VOC counts pixels from 1, and its last one is inside; a 0, which many programs write, is the first too
        shape = shapes.box_of_corners(max(x1 - 1, 0.0), max(y1 - 1, 0.0), x2, y2)
        shape |= _polygon(item)
    else:
        part.counts["objects left out (without a box)"] += 1
        return None
    difficult = int((item.findtext("difficult") or "0").strip() not in ("0", "false", "False"))
    return {"category": (item.findtext("name") or "").strip(), **shape, "iscrowd": difficult}


def _polygon(item: ElementTree.Element) -> dict[str, Any]:
    """The mask of an object with a polygon, as Roboflow writes it: <x1>, <y1>, <x2>, … ."""
    numbers = {child.tag: parse_number(child.text, child.tag, FARTHEST) for child in item.findall("polygon/*")}
    count = len(numbers) // 2
    if count < 3 or any(f"{axis}{i}" not in numbers for i in range(1, count + 1) for axis in "xy"):
        return {}
    shape = shapes.polygons([np.array([[numbers[f"x{i}"], numbers[f"y{i}"]] for i in range(1, count + 1)])])
    return {"segmentation": shape["segmentation"], "area": shape["area"]}


VOC = Format(
    "a folder of XML files; a folder per split; or the folder with Annotations, JPEGImages and ImageSets",
    _recognise_voc,
    _read_voc,
)


# --- CVAT for images 1.1: one file with an `<image>` per image --------------------------------------


def _recognise_cvat(source: Path) -> str:
    for file in files_in(source, (".xml",)):
        if _root_tag(file) == "annotations":
            return f"{file.name} has <annotations>"
    return ""


def _read_cvat(source: Path, options: Options) -> Contents:
    if source.is_dir():
        files = files_in(source, (".xml",))
        if len(files) != 1:
            raise UserError(f"{source}: is a folder with {len(files)} XML files: give the one to read. Fix: name one")
        source = files[0]
    parts: dict[str, Split] = {}
    labels: dict[str, list[str]] = {}  # the points of each, if it is a skeleton
    others: Counter[str] = Counter()
    finder = finder_for(source, options.images)
    with errors_in(f"{source}: cannot be read as cvat", "export it again"):
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
    if "" in parts:  # not all subsets are splits
        whole = Split(finder)
        for part in parts.values():
            whole.images += part.images
            whole.counts.update(part.counts)
            whole.found |= part.found
        parts = {"": whole}
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
            shape = _shape(item, size, labels)
            if shape is None:
                others[item.tag] += 1
                continue
            label = item.get("label") or ""
            labels.setdefault(label, [])
            rows.append({"category": label, **shape, "iscrowd": 0})
            if attributes := {a.get("name") or "": a.text or "" for a in item.findall("attribute")}:
                rows[-1]["attributes"] = attributes  # as CVAT's own COCO export has them
        part.add_image(part.find_image(given), size, rows)


def _shape(item: ElementTree.Element, size: tuple[int, int], labels: dict[str, list[str]]) -> dict[str, Any] | None:
    """COCO's shape; None of an element without a box, such as a polyline or a tag."""

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
    """Keypoints, and the box around those that are visible or hidden; a point `outside` is not labeled."""
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


CVAT = Format("an XML file, CVAT for images 1.1, or the folder that has one", _recognise_cvat, _read_cvat)
