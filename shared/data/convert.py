"""`python3 -m shared convert FORMAT INPUT OUTPUT`: Pascal VOC, YOLO and CVAT annotations as COCO's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import hotcoco
import msgspec
import numpy as np
import yaml
from PIL import Image, ImageOps

from shared.data.annotations import CocoAnnotations
from shared.data.checks import refuse_names_outside
from shared.data.images import is_image_name
from shared.data.numbers import FARTHEST, is_in_reach, parse_number, parse_whole_number
from shared.errors import UserError

_KINDS = {
    "voc": "a folder of XML files, or the one with Annotations and JPEGImages",
    "yolo": "data.yaml, the folder that it is in, or a folder of labels with --images",
    "cvat": "an XML file, or the folder of the only one",
}
_SPLITS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}  # and their names in a data.yaml
_HERE = "FOLDER OF THE IMAGES"
_LARGEST_SIDE = 2**31 - 1  # pixels, as COCO files have them here


@dataclass
class Part:
    """What is read for one COCO file.

    Attributes:
        images: COCO's images, without ids, each with its annotations under "annotations": category names under
            "category" in place of ids.
        folder: of the images, where it is known.
        left_out: how many boxes were left out, by why.
        crowds: what became crowds.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    crowds: str = "crowds"

    def leave_out(self, why: str) -> None:
        self.left_out[why] = self.left_out.get(why, 0) + 1


@dataclass
class Written:
    """A COCO file that was written, and what is in it."""

    path: Path
    split: str
    part: Part
    categories: int

    def __str__(self) -> str:
        boxes = [annotation for image in self.part.images for annotation in image["annotations"]]
        counts = {
            "images": len(self.part.images),
            "boxes": len(boxes),
            "categories": self.categories,
            "images without boxes": sum(not image["annotations"] for image in self.part.images),
            self.part.crowds: sum(annotation["iscrowd"] for annotation in boxes),
            **{f"boxes left out ({why})": count for why, count in self.part.left_out.items()},
        }
        return f"{self.path}: {', '.join(f'{what} {count}' for what, count in counts.items())}"


def convert(kind: str, source: Path, output: Path, images: Path | None = None, val_share: float = 0.0) -> list[Written]:
    """Writes a COCO file; or `…_train.json` and `…_val.json`, where the source has these splits, or where a share of
    the images is for validation.

    Args:
        kind: "voc", "yolo" or "cvat".
        images: the folder of the images; of YOLO's a data.yaml may say it.

    Raises:
        UserError: the source is not there, or not of that kind; an image is missing, or has annotations twice.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist")
    if images is not None and not images.is_dir():
        raise UserError(f"--images: {images} is not a folder")
    if not 0 <= val_share < 1:
        raise UserError(f"--val {val_share:g}: give a share of the images from 0 to 1, 0.2 for example")
    names, parts = {"voc": _read_voc, "yolo": _read_yolo, "cvat": _read_cvat}[kind](source, images)
    if not any(part.images for part in parts.values()):
        raise UserError(f"{source} has no annotations that can be read as {kind}")
    for part in parts.values():
        _refuse_used_twice(part, source)
    if val_share and len(parts) > 1:
        raise UserError(f"--val: {source} has the splits {', '.join(parts)} already; leave --val out")
    if val_share:
        parts = _split(parts[""], val_share)
    return [_write(source, output, split, part, names) for split, part in parts.items() if part.images]


def _refuse_used_twice(part: Part, source: Path) -> None:
    names: set[str] = set()
    for image in part.images:
        if (name := image["file_name"]) in names:
            raise UserError(
                f"{source}: two images have the file name {name!r}, so that their boxes cannot be told apart. Fix: "
                "rename one of the two, or convert each folder by itself"
            )
        names.add(name)


def _split(part: Part, val_share: float) -> dict[str, Part]:
    """The same split at each call."""
    count = min(max(round(val_share * len(part.images)), 1), len(part.images) - 1)
    val = set(np.random.default_rng(0).permutation(len(part.images))[:count].tolist())
    train, held_out = ([image for i, image in enumerate(part.images) if (i in val) is of] for of in (False, True))
    return {
        "train": Part(train, part.folder, part.left_out, part.crowds),
        "val": Part(held_out, part.folder, crowds=part.crowds),
    }


def _write(source: Path, output: Path, split: str, part: Part, names: Sequence[str]) -> Written:
    ids = {name: i + 1 for i, name in enumerate(names)}
    coco: dict[str, list] = {"images": [], "annotations": [], "categories": []}
    for image_id, image in enumerate(part.images, 1):
        coco["images"].append({"id": image_id, **{k: v for k, v in image.items() if k != "annotations"}})
        for annotation in image["annotations"]:
            _, _, width, height = annotation["bbox"]
            plain = {key: value for key, value in annotation.items() if key != "category"}
            numbers = {"id": len(coco["annotations"]) + 1, "image_id": image_id}
            coco["annotations"].append(
                {**numbers, "category_id": ids[annotation["category"]], "area": width * height, **plain}
            )
    coco["categories"] = [{"id": i, "name": name} for name, i in ids.items()]
    # what a training would refuse is refused here
    refuse_names_outside(CocoAnnotations.from_dict(coco), str(source))
    path = output.with_name(f"{output.stem}_{split}.json" if split else f"{output.stem}.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(coco))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return Written(path, split, part, len(ids))


# --- Pascal VOC -------------------------------------------------------------------------------------


def _read_voc(source: Path, images: Path | None) -> tuple[list[str], dict[str, Part]]:
    root = source if (source / "Annotations").is_dir() else source.parent
    folder = source / "Annotations" if root == source else source
    if not folder.is_dir():
        raise UserError(f"{source} is not a folder; voc is {_KINDS['voc']}")
    beside = root / "JPEGImages"
    images = images or (beside if beside.is_dir() else None)
    lists = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val")}
    splits = {split: file.read_text().split() for split, file in lists.items() if file.is_file()}
    # only the whole folder has its lists: without it, or one of them, all files are one part
    splits = splits if root == source and len(splits) == 2 else {"": sorted(path.stem for path in folder.glob("*.xml"))}
    parts = {split: Part(folder=images, crowds="crowds (VOC's `difficult`)") for split in splits}
    by_stem = _images_by_stem(images)
    for split, stems in splits.items():
        files: dict[str, Path] = {}  # by the image's name
        for stem in dict.fromkeys(stems):
            file = folder / f"{stem}.xml"
            image = _read_voc_file(file, parts[split], by_stem)
            if (other := files.setdefault(image["file_name"], file)) != file:
                raise UserError(
                    f"{file}: its image is {image['file_name']!r}, which {other.name} has too. Fix: correct the "
                    "`filename` of one of the two files, or move it away"
                )
            parts[split].images.append(image)
    named = {a["category"] for part in parts.values() for image in part.images for a in image["annotations"]}
    return sorted(named), parts


def _images_by_stem(folder: Path | None) -> dict[str, list[str]]:
    """The names of the images that lie in a folder, by their names without the ending."""
    names: dict[str, list[str]] = {}
    for file in [] if folder is None else sorted(folder.iterdir()):
        if is_image_name(file.name) and file.is_file():
            names.setdefault(file.stem, []).append(file.name)
    return names


def _read_voc_file(path: Path, part: Part, by_stem: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (parse_whole_number(root.findtext(f"size/{key}"), key) for key in ("width", "height"))
        if not 0 < min(width, height) <= max(width, height) <= _LARGEST_SIDE:
            raise ValueError(f"the image's size is {width}×{height}")
        name = _name_of_voc_image(path, root.findtext("filename") or "", part.folder, by_stem)
        annotations = []
        for item in root.iter("object"):
            x1, y1, x2, y2 = (
                parse_number(item.findtext(f"bndbox/{key}"), key, FARTHEST) for key in ("xmin", "ymin", "xmax", "ymax")
            )
            # VOC counts pixels from 1, and its last one is inside; a 0, which many programs write, is the first too
            x1, y1 = max(x1 - 1, 0.0), max(y1 - 1, 0.0)
            if x2 <= x1 or y2 <= y1:
                part.leave_out("without area")
                continue
            difficult = int((item.findtext("difficult") or "0").strip() not in ("0", "false", "False"))
            category = (item.findtext("name") or "").strip()
            annotations.append({"category": category, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": difficult})
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ElementTree.ParseError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no annotation of Pascal VOC, or is cut off ({error})") from error
    return {"file_name": name, "width": width, "height": height, "annotations": annotations}


def _name_of_voc_image(path: Path, filename: str, folder: Path | None, by_stem: Mapping[str, Sequence[str]]) -> str:
    """The `filename` in the XML file if the folder has that image. If it does not, as after programs that rename
    images, the image with the XML file's own name.

    Raises:
        ValueError: several images have that name, with other endings.
    """
    filename = filename.replace("\\", "/")
    is_there = folder is None or (folder / filename).is_file()
    if filename and is_there and (folder is None or is_image_name(filename)):
        return filename
    found = by_stem.get(path.stem, [])
    if len(found) > 1:
        raise ValueError(f"{folder} has no image {filename!r}, and {', '.join(found)} with the name of the XML file")
    return found[0] if found else filename or f"{path.stem}.jpg"


# --- YOLO -------------------------------------------------------------------------------------------


def _read_yolo(source: Path, images: Path | None) -> tuple[list[str], dict[str, Part]]:
    file = source if source.is_file() else source / "data.yaml"
    if images is not None and not file.is_file():  # the labels' folder, a level or two below it
        above = (parent / "data.yaml" for parent in list(source.absolute().parents)[:3])
        file = next((path for path in above if path.is_file()), file)
    if not file.is_file():
        raise UserError(f"{source} has no data.yaml, which names the categories: {{names: [cat, dog]}}")
    try:
        content = yaml.safe_load(file.read_text())
        names = content["names"]
        pairs = enumerate(names) if isinstance(names, list) else names.items()
        names = {parse_whole_number(str(i), "a class in `names`"): name for i, name in pairs}
        names = {i: str(names[i]) for i in sorted(names)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{file} is not YOLO's data.yaml: it needs `names`, the categories ({error})") from error
    if images is not None:
        labels = source / "labels" if (source / "labels").is_dir() else source
        return list(names.values()), {"": _read_yolo_images([images], labels if labels.is_dir() else None, names)}
    parts = {}
    for split, keys in _SPLITS.items():
        given = next((content[key] for key in keys if content.get(key)), None)
        if given is not None:
            places = [_yolo_place(str(place), content, file, split) for place in np.atleast_1d(given)]
            parts[split] = _read_yolo_images(places, None, names)
    if not parts:
        raise UserError(f"{file} says neither `train` nor `val`, the folders of the images; give --images")
    return list(names.values()), parts


def _yolo_place(place: str, content: Mapping[str, Any], file: Path, split: str) -> Path:
    """A folder of data.yaml: relative to its `path`, to the file or, as Roboflow writes it, to a folder beside."""
    bases = [file.parent / str(content.get("path") or ""), file.parent, Path(str(content.get("path") or ""))]
    plain = place.removeprefix("../")
    found = next((b / p for b in bases for p in (place, plain) if (b / p).is_dir()), None)
    if found is None:
        raise UserError(f"{file}: {split}: {place} is not a folder of images, beside it or below its `path`")
    return found


def _read_yolo_images(folders: Sequence[Path], labels: Path | None, names: Mapping[int, str]) -> Part:
    """The images of folders, and their labels: in `labels`, else in the folder whose path has `labels` for `images`."""
    common = Path(*_common(folder.resolve().parts for folder in folders))
    part = Part(folder=common)
    for folder in (folder.resolve() for folder in folders):
        if labels is None:
            parts = list(folder.parts)
            at = len(parts) - 1 - parts[::-1].index("images") if "images" in parts else None
            of_folder = folder if at is None else Path(*parts[:at], "labels", *parts[at + 1 :])
        else:
            of_folder = labels
        files = [file for file in sorted(folder.rglob("*")) if is_image_name(file.name) and file.is_file()]
        wanted = _labels_of(files, folder)
        found = {file.relative_to(of_folder) for file in of_folder.rglob("*.txt")} if of_folder.is_dir() else set()
        if orphans := sorted(path for path in found - wanted.keys() if path.name != "classes.txt"):
            raise UserError(f"{folder} has no image for the label file {of_folder / orphans[0]}")
        if not found & wanted.keys():
            raise UserError(f"{of_folder} has no label file for an image of {folder}")
        for label, file in wanted.items():
            part.images.append(_read_yolo_image(file, of_folder / label, common, names, part))
    return part


def _labels_of(files: Iterable[Path], folder: Path) -> dict[Path, Path]:
    """The images by the relative path of their label files.

    Raises:
        UserError: two images would have the same.
    """
    of_label: dict[Path, Path] = {}
    for file in files:
        label = file.relative_to(folder).with_suffix(".txt")
        if (other := of_label.setdefault(label, file)) != file:
            raise UserError(
                f"{file}: its label file would be {label}, and that is {other.name}'s too. Fix: rename one of the two "
                "images, or move it away"
            )
    return of_label


def _common(paths: Iterator[tuple[str, ...]]) -> list[str]:
    """The parts that all begin with."""
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared


def _read_yolo_image(file: Path, label: Path, folder: Path, names: Mapping[int, str], part: Part) -> dict[str, Any]:
    try:
        with Image.open(file) as image:
            width, height = ImageOps.exif_transpose(image).size if image.getexif() else image.size
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} cannot be read as an image: {error}") from error
    try:
        lines = label.read_text().splitlines() if label.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{label} cannot be read: {error}") from error
    annotations = []
    for number, line in enumerate(lines, 1):
        try:
            if not (words := line.split()):
                continue
            name = names[parse_whole_number(words[0], "the class")]
            values = [parse_number(word, "a coordinate") for word in words[1:]]
            annotation = _of_yolo_values(values, width, height)
        except (ValueError, KeyError) as error:
            why = f"category {error}, which data.yaml does not name" if isinstance(error, KeyError) else error
            raise UserError(f"{label}: line {number}: {why}") from error
        if min(annotation["bbox"][2:]) <= 0:
            part.leave_out("without area")
            continue
        annotations.append({"category": name, **annotation, "iscrowd": 0})
    return {
        "file_name": file.relative_to(folder).as_posix(),
        "width": width,
        "height": height,
        "annotations": annotations,
    }


def _of_yolo_values(values: list[float], width: int, height: int) -> dict[str, Any]:
    """A box in pixels of x, y of its middle, width, height; or a polygon with its box, of x and y of each point; all
    shares of the image's size."""
    if not is_in_reach(np.array(values) * max(width, height)).all():
        raise ValueError(f"{max(values, key=abs):g} is not a share of an image's size")
    if len(values) == 4 or len(values) == 5:  # a prediction has its score last
        x, y, w, h = values[:4]
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        return {"bbox": box, "area": box[2] * box[3]}
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{len(values)} numbers after the category; 4 are a box, x and y of each point a polygon")
    points = np.array(values).reshape(-1, 2) * [width, height]
    (x1, y1), (x2, y2) = points.min(axis=0), points.max(axis=0)
    x, y = points.T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    box = [float(x1), float(y1), float(x2 - x1), float(y2 - y1)]
    return {"bbox": box, "area": float(area), "segmentation": [points.ravel().tolist()]}


# --- CVAT -------------------------------------------------------------------------------------------


def _read_cvat(source: Path, images: Path | None) -> tuple[list[str], dict[str, Part]]:
    if source.is_dir():
        files = sorted(source.glob("*.xml"))
        if len(files) != 1:
            raise UserError(f"{source} is a folder with {len(files)} XML files: give the one to read")
        source = files[0]
    try:
        dataset = hotcoco.COCO.from_cvat(str(source)).dataset
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{source} cannot be read as cvat: {error}") from error
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    file_names = {image["id"]: image["file_name"] for image in dataset["images"]}
    of_image: dict[int, list[dict]] = {}
    for annotation in dataset["annotations"]:
        _refuse_out_of_reach(annotation, f"{source}: image {file_names[annotation['image_id']]!r}")
        row = {key: annotation[key] for key in ("bbox", "area", "segmentation") if annotation.get(key)}
        row |= {"category": names[annotation["category_id"]], "iscrowd": int(annotation.get("iscrowd") or 0)}
        of_image.setdefault(annotation["image_id"], []).append(row)
    rows = [
        {**{key: image[key] for key in ("file_name", "width", "height")}, "annotations": of_image.get(image["id"], [])}
        for image in dataset["images"]
    ]
    return list(names.values()), {"": Part(rows, images)}


def _refuse_out_of_reach(annotation: Mapping[str, Any], where: str) -> None:
    """Raises UserError if a number of the box or of its polygons is not finite, or no image is large enough for it."""
    polygons = annotation.get("segmentation")
    lists = [annotation["bbox"], *(polygons if isinstance(polygons, list) else [])]
    for wrong in (number for numbers in lists for number in numbers if not is_in_reach(number)):
        raise UserError(f"{where}: a coordinate is {wrong:g}. Fix: write a finite number of pixels")


def _as_config(written: Sequence[Written]) -> str:
    """What to put into an experiment config."""
    lines = ["data:"]
    for one in written:
        if one.split != "test":
            images = one.part.folder.absolute() if one.part.folder else _HERE
            lines.append(f"  {one.split or 'train'}: {{annotations: {one.path.absolute()}, images: {images}}}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python3 -m shared convert", description="Other annotations as COCO's.")
    parser.add_argument("kind", choices=sorted(_KINDS), help="what the annotations are")
    parser.add_argument("source", type=Path, help="; ".join(f"{kind}: {what}" for kind, what in _KINDS.items()))
    parser.add_argument("output", type=Path, help="the COCO file to write; of splits, _train and _val are added")
    parser.add_argument("--images", type=Path, help="the folder of the images")
    parser.add_argument(
        "--val", type=float, default=0.0, metavar="SHARE", help="split: 0.2 for validation, for example"
    )
    given = parser.parse_args(arguments)
    try:
        written = convert(given.kind, given.source, given.output, given.images, given.val)
    except UserError as error:
        sys.exit(f"error: {error}")
    print("\n".join(map(str, written)))
    print(f"\nfor the experiment config:\n\n{_as_config(written)}")
