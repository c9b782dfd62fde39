"""YOLO: a label file per image, and a data.yaml, or another file, that names the classes and the splits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from shared.data.convert import yolo_labels
from shared.data.convert.contents import Contents, Format, Options, Split, errors_in
from shared.data.convert.files import (
    by_split,
    files_below,
    files_in,
    image_size,
    images_below,
    read_text,
    split_of,
)
from shared.data.convert.shapes import is_number, parse_whole_number
from shared.data.convert.yolo_labels import Labels
from shared.data.images import is_image_name
from shared.errors import UserError

_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # in a data.yaml
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels")
_NOT_LABELS = (*_NAME_FILES, "train.txt", "val.txt", "valid.txt", "test.txt", "labels.txt", "readme.txt")
_NOT_LABELS += ("readme.dataset.txt", "readme.roboflow.txt", "requirements.txt")
_TASKS = {"detect": "boxes", "segment": "polygons", "obb": "oriented", "pose": "keypoints"}


@dataclass
class _Description:
    """What data.yaml, or another file, says of a data set.

    Attributes:
        names: class names, by number.
        places: by split: folders of images, or lists of their names.
        labels: "" or as `Options.labels`; "keypoints" if their number is missing.
    """

    file: Path
    names: dict[int, str]
    places: dict[str, list[str]] = field(default_factory=dict)
    root: str = ""
    labels: str = ""
    point_names: list[str] = field(default_factory=list)
    flips: list[int] = field(default_factory=list)


def recognise(source: Path) -> str:
    """A file that describes the classes, and label files or paths to images."""
    file = _description_file(source, None)
    if file is None:
        return ""
    if file.suffix in (".yaml", ".yml"):
        return f"{file.name} has `names`" if _has_names(file) else ""
    if file.suffix == ".data":
        return f"{file.name} names lists of images"
    labels = _label_files_below(file.parent)
    return f"{file.name} and {len(labels)} label files" if labels else ""


def read(source: Path, options: Options) -> Contents:
    file = _description_file(source, options.images) or options.categories
    if file is None:
        raise UserError(
            f"{source}: has no data.yaml, classes.txt or obj.data, which names the categories. Fix: pass --categories "
            "FILE with a name per line, or write a data.yaml with `names: [cat, dog]`"
        )
    described = _describe(file)
    notes: list[str] = []
    images = _images_by_split(described, source, options, notes)
    labels_in = source if options.images is not None else None
    of_images = {split: _label_files(files, folder, labels_in) for split, (files, folder) in images.items()}
    _note_orphans(of_images, [folder for _, folder in images.values()], notes)
    read_labels = {}
    for split, (of_image, folders) in of_images.items():
        if labels := _read_labels(of_image, folders, images[split][1], split, notes):
            read_labels[split] = labels
    if not read_labels:
        raise UserError(f"{source}: has no images. Fix: correct the paths in {file}, or give --images")
    every = [label for split in read_labels.values() for label in split.values()]
    if not options.labels and described.labels == "keypoints":
        raise UserError(f"{file}: `task: pose` needs `kpt_shape`. Fix: add `kpt_shape: [17, 3]`, for example")
    kind = yolo_labels.kind_of(every, options.labels or described.labels, file)
    if kind.name == "keypoints":
        notes.append(f"the labels are boxes with {kind.points} keypoints of {kind.numbers} numbers")
    elif kind.name != "boxes":
        notes.append(f"the labels are {kind.name}")
    splits = {}
    for split, labels in read_labels.items():
        folder = images[split][1]
        part = splits[split] = Split(folder=folder)
        for image, label in labels.items():
            size = image_size(image)
            rows = yolo_labels.annotations(label, kind, described.names, size, part.counts)
            part.add_image(image.relative_to(folder).as_posix(), size, rows)
    points = _points(described, kind, notes)
    return Contents(splits, [{"name": name, **points} for name in described.names.values()], notes)


def is_label_line(words: list[str]) -> bool:
    """Whether the words are a whole number, and shares of an image's size."""
    is_object = words[0].isdecimal() and len(words) > 4 and all(map(is_number, words))
    return is_object and all(0 <= float(word) <= 1 for word in words[1:5])


# --- the classes and the places of the images -------------------------------------------------------


def _description_file(source: Path, images: Path | None) -> Path | None:
    if source.is_file():
        is_one = source.suffix in (".yaml", ".yml", ".data") or source.name in _NAME_FILES
        return source if is_one else None
    folders = [source, source / "labels", source / "obj_train_data", source / "train"]
    if images is not None or source.name == "labels":  # the description is above the labels' folder
        folders += list(source.absolute().parents)[:3]
    for folder in folders[:1] + folders[4:]:
        for path in (folder / "data.yaml", folder / "data.yml"):
            if path.is_file():
                return path
        others = [path for path in files_in(folder, (".yaml", ".yml")) if _has_names(path)]
        if len(others) > 1:
            raise UserError(
                f"{folder}: {' and '.join(path.name for path in others[:2])} both name classes. Fix: give the file"
            )
        if others:
            return others[0]
        if data := files_in(folder, (".data",)):
            return data[0]
    return _name_file(folders)


def _name_file(folders: Iterable[Path]) -> Path | None:
    return next((folder / name for folder in folders for name in _NAME_FILES if (folder / name).is_file()), None)


def _has_names(file: Path) -> bool:
    """Whether it is a YAML file with the key `names`."""
    try:
        content = yaml.safe_load(read_text(file))
    except (yaml.YAMLError, UserError):
        return False
    return isinstance(content, dict) and "names" in content


def _describe(file: Path) -> _Description:
    if file.suffix == ".data":
        pairs = (line.split("=", 1) for line in read_text(file).splitlines() if "=" in line)
        content: dict[str, Any] = {key.strip(): value.strip() for key, value in pairs}
        name = content.get("names", "obj.names")
        names = _found_listed(name, [file.parent]) or _found(Path(name).name, [file.parent])
        if names is None:
            raise UserError(f"{file}: the file of names, {content.get('names')}, is not there. Fix: correct its path")
        places = {split: [content[key]] for split, keys in _KEYS.items() for key in keys if content.get(key)}
        return _Description(file, _names_of_lines(names), places)
    if file.suffix not in (".yaml", ".yml"):
        return _Description(file, _names_of_lines(file))
    try:
        content = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YOLO's data.yaml: it is not YAML ({error}). Fix: correct it") from error
    with errors_in(f"{file} is not YOLO's data.yaml", "write `names: [cat, dog]`, and the keys that are wrong anew"):
        if not isinstance(content, dict):
            raise ValueError("it has no keys")
        names = content.get("names")
        if names is None and (beside := _name_file([file.parent])):
            by_number = _names_of_lines(beside)
        elif not isinstance(names, (list, dict)) or not names:
            raise ValueError("it needs `names`, the categories")
        else:
            pairs = enumerate(names) if isinstance(names, list) else names.items()
            by_number = {parse_whole_number(str(i), "a class in `names`"): str(name) for i, name in pairs}
        described = _Description(file, {i: by_number[i] for i in sorted(by_number)})
        described.root = str(content.get("path") or "")
        described.labels = _TASKS.get(str(content.get("task")), "")
        for split, keys in _KEYS.items():
            if given := next((content[key] for key in keys if content.get(key)), None):
                described.places[split] = [str(place) for place in np.atleast_1d(given)]
        if shape := content.get("kpt_shape"):
            count, numbers = (int(number) for number in shape)
            if count < 1 or numbers not in (2, 3):
                raise ValueError(f"`kpt_shape` is {shape}, and not [number of points, 2 or 3]")
            if described.labels in ("", "keypoints"):
                described.labels = f"keypoints:{count}x{numbers}"
        point_names = content.get("kpt_names") or []
        first = next(iter(point_names.values())) if isinstance(point_names, dict) else point_names
        described.point_names = [str(name) for name in first]
        described.flips = [int(i) for i in content.get("flip_idx") or []]
    return described


def _names_of_lines(file: Path) -> dict[int, str]:
    """An empty line at the end is no class."""
    return dict(enumerate(line.strip() for line in read_text(file).rstrip().splitlines()))


def _found(place: str, folders: Sequence[Path]) -> Path | None:
    """The file or folder that a place means, relative to one of the folders.

    Roboflow's `../train/images` may lie beside data.yaml. If an absolute path of another machine is not there, its end
    counts: `/content/pets/train/images` is `train/images`.
    """
    plain = place.replace("\\", "/")
    below = plain
    while below.startswith("../"):
        below = below[3:]
    parts = plain.split("/")[1:] if plain.startswith("/") else []
    ends = ["/".join(parts[at:]) for at in range(1, len(parts)) if len(parts) - at > 1 or split_of(parts[at])]
    paths = (folder / name for name in (plain, below, *ends) for folder in folders)
    # a name that no disk can have is not there either, and `Path.exists` would raise
    return next((Path(os.path.abspath(path)) for path in paths if os.path.exists(path)), None)


def _found_listed(line: str, folders: Sequence[Path]) -> Path | None:
    """The image that a line of a list means. Lists have paths from elsewhere, `data/obj_train_data/a.jpg` in CVAT's, so
    their first folders are removed one by one."""
    parts = os.path.normpath(line.replace("\\", "/")).split("/")
    ends = ("/".join(parts[at:]) or "/" for at in range(max(len(parts) - 1, 1)))
    return next((path for end in ends if (path := _found(end, folders)) is not None and path.is_file()), None)


def _images_by_split(
    described: _Description, source: Path, options: Options, notes: list[str]
) -> dict[str, tuple[list[Path], Path]]:
    """The images of each split, and the folder that holds them."""
    if options.images is not None:
        return {"": (images_below(options.images.absolute()), options.images.absolute())}
    if not described.places:
        folder = _folder_without_places(described.file, source)
        by_folder = by_split(images_below(folder), folder)
        return {
            split: (files, Path(os.path.commonpath({file.parent for file in files})))
            for split, files in by_folder.items()
        }
    base = described.file.absolute().parent
    folders = [Path(os.path.abspath(base / described.root)), base]
    if described.root:
        folders.append(Path(described.root).absolute())
    images = {}
    for split, places in described.places.items():
        files: list[Path] = []
        roots: set[Path] = set()
        for place in places:
            found = _found(place, folders)
            if found is None and place.endswith(".txt"):  # `data/train.txt` of CVAT
                found = _found_listed(place, folders) or _found(Path(place).name, folders)
            if found is None:
                problem = f"{described.file}: {split}: {place} is not there, beside the file or below its `path`"
                if split == "test" or (split == "val" and options.without_val):
                    notes.append(f"{problem}; there is no {split} split")
                    break
                fix = " and pass --val 0.2" if split == "val" else ""
                raise UserError(f"{problem}. Fix: correct the path; or delete the line{fix}; or pass --images FOLDER")
            if found.is_dir():
                files += images_below(found)
                roots.add(found)
            else:
                listed = _listed(found, folders, notes)
                files += listed
                roots.update(file.parent for file in listed)
        else:
            common = Path(os.path.commonpath(roots)) if roots else base
            images[split] = list(dict.fromkeys(files)), common
    return images


def _folder_without_places(file: Path, source: Path) -> Path:
    folder = source.absolute() if source.is_dir() else file.absolute().parent
    if folder.name == "labels":
        folder = folder.parent
    if not images_below(folder):
        raise UserError(
            f"{file}: says neither `train` nor `val`, the folders of the images, and {folder} has no images; give "
            "--images. Fix: pass --images FOLDER"
        )
    return folder / "images" if (folder / "images").is_dir() else folder


def _listed(file: Path, folders: Sequence[Path], notes: list[str]) -> list[Path]:
    """The images that a list names, one per line.

    Raises:
        UserError: none of them is there.
    """
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    found = [_found_listed(line, [file.parent, *folders]) for line in lines]
    missing = [line for line, path in zip(lines, found, strict=True) if path is None]
    if len(missing) == len(lines):
        first = f", {missing[0]} for example" if missing else ""
        raise UserError(f"{file}: none of its {len(lines)} images is there{first}. Fix: correct the paths in it")
    if missing:
        notes.append(f"{file}: {len(missing)} images are not there, and are left out; the first is {missing[0]}")
    return [path for path in found if path is not None and is_image_name(path.name)]


# --- the label files --------------------------------------------------------------------------------


def _read_labels(
    of_image: Mapping[Path, Path], folders: set[Path], folder: Path, split: str, notes: list[str]
) -> dict[Path, Labels]:
    """The labels of each image; {} of a test split that is not labeled.

    Raises:
        UserError: no image has a label file.
    """
    if not of_image:
        return {}
    if not any(label.is_file() for label in of_image.values()):
        if split == "test":
            notes.append(f"{folder}: no image of the test split has a label file; there is no test split")
            return {}
        other = next((path for place in sorted(folders) for path in _label_files_below(place)), None)
        also = f", and {folder} has no image for the label file {other}" if other else ""
        raise UserError(
            f"{sorted(folders)[0]}: has no label file for an image of {folder}{also}. Fix: correct the folders; labels "
            "lie in `labels` beside `images`, or beside the images"
        )
    return {image: yolo_labels.read(label) for image, label in of_image.items()}


def _note_orphans(
    of_images: Mapping[str, tuple[dict[Path, Path], set[Path]]], folders: Sequence[Path], notes: list[str]
) -> None:
    """Counts label files without an image. An image that is in no split's list is no reason to name its labels."""
    wanted = {label for of_image, _ in of_images.values() for label in of_image.values()}
    there = {path for _, places in of_images.values() for place in places for path in _label_files_below(place)}
    if orphans := there - wanted:
        stems = {image.stem for folder in folders for image in images_below(folder)}
        orphans = {path for path in orphans if path.stem not in stems}
    if orphans:
        notes.append(f"{len(orphans)} label files have no image, and are left out; the first is {min(orphans)}")


def _label_files_below(folder: Path) -> list[Path]:
    return [path for path in files_below(folder, (".txt",)) if path.name.lower() not in _NOT_LABELS]


def _label_files(files: Sequence[Path], folder: Path, source: Path | None) -> tuple[dict[Path, Path], set[Path]]:
    """The label file of each image, there or not, and the folders that hold such files.

    Args:
        source: the labels' folder, or the one with `labels` in it; None to take the folder whose path has `labels`
            for the last `images`, else the images' own.

    Raises:
        UserError: two images would share a label file.
    """
    if source is None:
        beside = {parent: _labels_for(parent) for parent in {file.parent for file in files}}
        folders = set(beside.values())
        of_image = {file: beside[file.parent] / f"{file.stem}.txt" for file in files}
    else:
        labels = source.absolute() if source.is_dir() else source.absolute().parent
        labels = labels / "labels" if (labels / "labels").is_dir() else labels
        folders = {labels}
        of_image = {file: labels / file.relative_to(folder).with_suffix(".txt") for file in files}
    claimed: dict[Path, Path] = {}
    for file, label in of_image.items():
        if (other := claimed.setdefault(label, file)) != file:
            raise UserError(
                f"{file}: its label file would be {label.name}, and that is {other.name}'s too. Fix: rename one of the "
                "two images, or move it away"
            )
    return of_image, folders


def _labels_for(folder: Path) -> Path:
    parts = folder.parts
    at = [i for i, part in enumerate(parts) if part == "images"]
    beside = Path(*parts[: at[-1]], "labels", *parts[at[-1] + 1 :]) if at else folder
    return beside if beside.is_dir() else folder


# --- keypoints --------------------------------------------------------------------------------------


def _points(described: _Description, kind: yolo_labels.Kind, notes: list[str]) -> Mapping[str, Any]:
    """COCO's `keypoints` and `skeleton` of a category; {} without keypoints."""
    if not kind.points:
        return {}
    names = described.point_names or [f"point_{i + 1}" for i in range(kind.points)]
    flips = described.flips
    if len(names) != kind.points or (flips and sorted(flips) != list(range(kind.points))):
        raise UserError(
            f"{described.file}: `kpt_names` or `flip_idx` do not have the {kind.points} points of `kpt_shape`. Fix: "
            "correct one of them"
        )
    if flips and not described.point_names:
        # a mirrored image swaps points by the names of their sides
        for i, other in enumerate(flips):
            if i < other:
                names[i], names[other] = f"left_{i + 1}", f"right_{i + 1}"
        notes.append(f"keypoints have no names in {described.file.name}; left_… and right_… follow from its flip_idx")
    return {"keypoints": names, "skeleton": []}


YOLO = Format("data.yaml, its folder, obj.data, or a folder with labels and classes.txt", recognise, read)
