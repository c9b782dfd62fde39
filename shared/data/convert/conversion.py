"""From any format to COCO files; which format it is, if nobody says."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shared import durable
from shared.data.annotations import CocoAnnotations
from shared.data.checks import refuse_names_outside
from shared.data.convert.coco import COCO
from shared.data.convert.contents import Contents, Options, Split, names_in_use
from shared.data.convert.files import files_below, folders_in, read_json, read_text
from shared.data.convert.hugging_face import HUGGING_FACE
from shared.data.convert.json_labels import CREATEML, LABEL_STUDIO, LABELME
from shared.data.convert.table import CSV, OPEN_IMAGES
from shared.data.convert.text_labels import DOTA, KITTI, looks_like
from shared.data.convert.tiles import TILES
from shared.data.convert.xml_labels import CVAT, VOC
from shared.data.convert.yolo import YOLO, is_label_line
from shared.errors import UserError, check_outputs, count_of, nearest, nearest_path

FORMATS = {
    "yolo": YOLO,
    "voc": VOC,
    "cvat": CVAT,
    "coco": COCO,
    "labelme": LABELME,
    "labelstudio": LABEL_STUDIO,
    "createml": CREATEML,
    "openimages": OPEN_IMAGES,
    "csv": CSV,
    "huggingface": HUGGING_FACE,
    "kitti": KITTI,
    "dota": DOTA,
    "tiles": TILES,
}

_DEPTH = 2  # folders below the source that are looked into
_MOST_FOLDERS = 50
_NAMED = 3
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")


def convert(
    kind: str | None,
    source: Path,
    output: Path,
    images: Path | None = None,
    val_share: float = 0.0,
    root: Path | None = None,
    say: Callable[[str], object] = print,
    **more: Any,
) -> list[Written]:
    """Writes a COCO file, or one per split: `…_train.json`, `…_val.json`, `…_test.json`.

    Args:
        kind: a key of FORMATS; None to recognize it.
        images: the folder of the images, if they are not in the source.
        val_share: the share of the images that becomes the validation split, of a source without one.
        root: a folder above the images; file names become relative to it.
        say: gets lines for the user: what was recognized, and the notes of the reader.
        more: other fields of `Options`.

    Raises:
        UserError: the source does not exist, is of another format, or contradicts itself.
    """
    if images is not None and not images.is_dir():
        raise UserError(f"--images: {images} is not a folder. Fix: give the folder of the images")
    if output.is_dir():
        raise UserError(f"OUTPUT: {output} is a folder. Fix: name the file to write, {output / 'annotations.json'}")
    if not 0 <= val_share < 1:
        raise UserError(
            f"--val: {val_share:g} is not a share. Fix: give a share of the images from 0 to 1, 0.2 for example"
        )
    extracted = output.with_name(f"{output.stem}_images")
    options = Options(images, without_val=val_share > 0, extracted=extracted, **more)
    contents = _read(kind, source, options, say)
    if options.categories is not None:
        contents.categories = _given_categories(options.categories, contents)
    if val_share:
        contents.splits = _with_val(contents.splits, val_share, source)
    if root is not None:
        for part in contents.splits.values():
            _name_from(root, part)
    check_outputs("OUTPUT", [path_of(output, split) for split in contents.splits], [source])
    written = write(contents, source, output)
    contents.notes += _shared_images(contents.splits)
    for note in contents.notes:
        say(note)
    return written


def annotations_of(path: Path, split: str = "", images: Path | None = None) -> tuple[dict[str, list], Path | None]:
    """A split of a data set in any format: COCO's dictionary, for `CocoAnnotations.from_dict`, and the images' folder.

    Args:
        path: YOLO's data.yaml, a folder of VOC, or any other source of `convert`.
        split: "train", "val" or "test"; without effect if the source has no splits.

    Raises:
        UserError: as `convert`, or the source does not have this split.
    """
    contents = _read(None, path, Options(images, without_val=split != "val"), lambda line: None)
    name = "" if "" in contents.splits else split
    if name not in contents.splits:
        there = ", ".join(contents.splits)
        raise UserError(f"{path}: has the splits {there}, and not {split!r}. Fix: name one of these")
    return to_coco(contents, path)[name], contents.splits[name].folder


def recognise(source: Path) -> tuple[str, Path, str]:
    """The format of a source, the source or the only folder in it that has a format, and what shows it.

    Raises:
        UserError: its format is unknown, or it may be several.
    """
    seen = _seen(source, _DEPTH)
    if not seen and (said := looks_like(source, is_label_line)):  # without a file that names the classes
        return "yolo", source, said
    if len(seen) == 1:
        return seen[0]
    if len({folder for _, folder, _ in seen}) > 1:
        folders = ", ".join(f"{folder} ({kind})" for kind, folder, _ in seen[:_NAMED])
        raise UserError(f"{source}: several folders in it have a format. Fix: give one of {folders}")
    if seen:
        found = "; ".join(f"{kind}: {said}" for kind, _, said in seen)
        raise UserError(f"{source}: may be several formats ({found}). Fix: name one, `convert {seen[0][0]} …`")
    if source.suffix.lower() in _ARCHIVES:
        raise UserError(f"{source}: is an archive. Fix: unpack it, and give the folder")
    endings = Counter(sorted(file.suffix.lower() or "without ending" for file in files_below(source))).most_common(5)
    there = ", ".join(f"{count} {ending}" for ending, count in endings) or "nothing"
    raise UserError(
        f"{source}: is not in a known format; there is {there}. Fix: give the folder or file of the "
        f"annotations, or name the format: {', '.join(FORMATS)}"
    )


def _seen(source: Path, depth: int) -> list[tuple[str, Path, str]]:
    """The formats of a source; else those of the folders in it."""
    seen, refused = [], []
    for kind, form in FORMATS.items():
        try:
            if said := form.recognise(source):
                seen.append((kind, source, said))
        except UserError as error:
            refused.append(error)
    if refused and not seen:
        raise refused[0]
    if not seen and depth:
        for folder in folders_in(source)[:_MOST_FOLDERS]:
            with contextlib.suppress(UserError):
                # what describes the files in `labels` lies above, and so was looked at before
                seen += _seen(folder, depth - 1) if folder.name != "labels" else []
    return seen


def _read(kind: str | None, source: Path, options: Options, say: Callable[[str], object]) -> Contents:
    if not source.exists():
        raise UserError(f"{source}: does not exist; {nearest_path(str(source))}")
    if kind is None:
        kind, source, said = recognise(source)
        say(f"{source}: read as {kind}: {said}")
    elif kind not in FORMATS:
        raise UserError(f"{kind}: is not a format{nearest(kind, FORMATS, 'use one of ' + ', '.join(FORMATS))}")
    for option, kinds in {"labels": ("yolo",), "boxes": ("csv", "huggingface")}.items():
        if getattr(options, option) and kind not in kinds:
            raise UserError(f"--{option}: is for {' and '.join(kinds)}, and not for {kind}. Fix: omit it")
    contents = FORMATS[kind].read(source, options)
    contents.splits = {split: part for split, part in contents.splits.items() if part.images}
    if not contents.splits:
        raise UserError(f"{source}: has no annotations that can be read as {kind}. Fix: name another format or path")
    for part in contents.splits.values():
        part.settle()
    return contents


def _shared_images(splits: dict[str, Split]) -> Iterator[str]:
    """Sentences about images that are in two splits."""
    files = {
        split: {(part.folder, image["file_name"]) for image in part.images}
        for split, part in splits.items()
        if part.folder is not None
    }
    for one, other in itertools.combinations(files, 2):
        if count := len(files[one] & files[other]):
            yield f"{one} and {other} have {count_of(count, 'image')} in common"


def _given_categories(file: Path, contents: Contents) -> list[dict[str, Any]]:
    if file.suffix.lower() == ".json":
        content = read_json(file)
        rows = content.get("categories") if isinstance(content, dict) else None
        if not rows or not all(isinstance(row, dict) and "id" in row and "name" in row for row in rows):
            raise UserError(f"--categories: {file} has no COCO categories. Fix: give a COCO file, or a name per line")
    else:
        rows = [{"name": line.strip()} for line in read_text(file).splitlines() if line.strip()]
    known = {row["name"]: row for row in rows}
    if unknown := [name for name in names_in_use(contents.splits.values()) if name not in known]:
        raise UserError(
            f"--categories: {file} lacks {unknown[0]!r}, which the annotations have. Fix: add the name to the file"
        )
    described = {c["name"]: {k: v for k, v in c.items() if k != "id"} for c in contents.categories}
    return [{**described.get(name, {}), **row} for name, row in known.items()]


def _with_val(splits: dict[str, Split], share: float, source: Path) -> dict[str, Split]:
    """The training split divided in two, alike at each call."""
    whole = "" if "" in splits else "train"
    if "val" in splits or whole not in splits:
        raise UserError(f"--val: {source} has the splits {', '.join(splits)} already. Fix: omit --val")
    if len(splits[whole].images) < 2:
        raise UserError(f"--val: {source} has one image, and a split needs two. Fix: omit --val")
    part = splits.pop(whole)
    count = min(max(round(share * len(part.images)), 1), len(part.images) - 1)
    val = set(np.random.default_rng(0).permutation(len(part.images))[:count].tolist())
    train, held_out = ([image for i, image in enumerate(part.images) if (i in val) is of] for of in (False, True))
    return {"train": replace(part, images=train), "val": replace(part, images=held_out, counts=Counter()), **splits}


def _name_from(root: Path, part: Split) -> None:
    """Makes the file names of a split relative to a folder above its images."""
    if part.folder is None:
        raise UserError("--root: the folder of the images is unknown. Fix: give it by --images")
    folder, above = (Path(os.path.abspath(path)) for path in (part.folder, root))  # without `..`
    if not folder.is_relative_to(above):
        raise UserError(f"--root: {root} does not contain {part.folder}. Fix: give a folder above the images")
    for image in part.images:
        image["file_name"] = (folder.relative_to(above) / image["file_name"]).as_posix()
    part.folder = root


def as_config(written: Sequence[Written]) -> str:
    """The lines for an experiment config, and what training also needs."""
    lines = ["data:"]
    for one in written:
        images = one.part.folder.absolute() if one.part.folder else "FOLDER OF THE IMAGES"
        lines.append(f"  {one.split or 'train'}: {{annotations: {one.path.absolute()}, images: {images}}}")
    splits = {one.split or "train" for one in written}
    if "train" in splits and "val" not in splits:
        lines += ["", "training also needs data.val: `--val 0.2` makes it from a fifth of the images"]
    return "\n".join(lines)


# --- COCO's JSON from what the readers return -------------------------------------------------------


@dataclass
class Written:
    """A COCO file that was written, and its content."""

    path: Path
    split: str
    part: Split
    categories: int

    def __str__(self) -> str:
        boxes = [annotation for image in self.part.images for annotation in image["annotations"]]
        optional = {
            "masks": sum("segmentation" in annotation for annotation in boxes),
            "boxes with keypoints": sum("keypoints" in annotation for annotation in boxes),
        }
        counts = {
            "images": len(self.part.images),
            "boxes": len(boxes),
            "categories": self.categories,
            "images without boxes": sum(not image["annotations"] for image in self.part.images),
            self.part.crowds: sum(annotation["iscrowd"] for annotation in boxes),
            **{what: count for what, count in optional.items() if count},
            **self.part.counts,
        }
        return f"{self.path}: {', '.join(f'{what} {count}' for what, count in counts.items())}"


def to_coco(contents: Contents, source: Path) -> dict[str, dict[str, list]]:
    """COCO's dictionary of each split, all with the same categories.

    Ids that the reader gives stay. The others count from 1.

    Raises:
        UserError: two images of a split have one name, a name leads out of the images' folder, or a number is not one
            that training accepts.
    """
    categories = contents.categories or [{"name": name} for name in names_in_use(contents.splits.values())]
    categories = [{"id": number, **category} for number, category in enumerate(categories, 1)]
    ids = {category["name"]: category["id"] for category in categories}
    return {split: _of_split(part, categories, ids, source) for split, part in contents.splits.items()}


def _of_split(part: Split, categories: list[dict], ids: dict[str, int], source: Path) -> dict[str, list]:
    twice = [name for name, count in Counter(image["file_name"] for image in part.images).items() if count > 1]
    if twice:
        raise UserError(
            f"{source}: two images have the file name {twice[0]!r}, so that their boxes cannot be told apart. Fix: "
            "rename one of the two, or convert each folder by itself"
        )
    if not categories:
        raise UserError(f"{source}: has no boxes, and names no categories. Fix: name another file, or draw boxes")
    coco: dict[str, list] = {"images": [], "annotations": [], "categories": categories}
    for number, image in enumerate(part.images, 1):
        plain = {"id": number, **image}
        for row in plain.pop("annotations"):
            numbered = {"id": len(coco["annotations"]) + 1, "image_id": plain["id"], **row}
            numbered["category_id"] = ids[numbered.pop("category")]
            coco["annotations"].append(numbered)
        coco["images"].append(plain)
    # training would refuse these later
    refuse_names_outside(CocoAnnotations.from_dict(coco), str(source))
    return coco


def write(contents: Contents, source: Path, output: Path) -> list[Written]:
    """Writes a COCO file per split: `<output>_train.json` and so on, or `<output>.json` alone."""
    written = []
    for split, coco in to_coco(contents, source).items():
        path = path_of(output, split)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.write_file(path, msgspec.json.encode(coco))
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}). Fix: give another OUTPUT, or make room"
            ) from error
        written.append(Written(path, split, contents.splits[split], len(coco["categories"])))
    return written


def path_of(output: Path, split: str) -> Path:
    """The file of a split."""
    return output.with_name(f"{output.stem}_{split}.json" if split else f"{output.stem}.json")


# --- the command line -------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """`python3 -m shared convert [FORMAT] INPUT OUTPUT`."""
    formats = "\n".join(f"  {kind:14} {form.about}" for kind, form in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog="python3 -m shared convert",
        description="Writes annotations of other formats as COCO files.",
        epilog=f"formats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", nargs="?", metavar="FORMAT", help="see below; without it the layout is recognized")
    parser.add_argument("source", type=Path, metavar="INPUT", help="the folder or file of the annotations")
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", help="the COCO file to write; splits add _train, _val and _test"
    )
    parser.add_argument("--images", type=Path, help="the folder of the images")
    parser.add_argument("--root", type=Path, help="a folder above the images: file names become relative to it")
    parser.add_argument(
        "--val", dest="val_share", type=float, default=0.0, metavar="SHARE", help="split off 0.2, for example, as val"
    )
    parser.add_argument(
        "--categories", type=Path, metavar="FILE", help="the categories in order: a name per line, or a COCO file"
    )
    parser.add_argument(
        "--labels",
        default="",
        metavar="KIND",
        help="yolo: what the numbers are, if data.yaml does not show it: boxes, polygons, oriented or keypoints:17x3",
    )
    parser.add_argument(
        "--boxes", default="", choices=["xywh", "xyxy"], help="csv, huggingface: what the four numbers of a box are"
    )
    parser.add_argument("--tiles", type=int, default=640, metavar="PIXELS", help="tiles: their side; default 640")
    parser.add_argument(
        "--overlap", type=float, default=0.2, help="tiles: the share that the next tile shows too; default 0.2"
    )
    written = convert(**vars(parser.parse_intermixed_args(arguments)))
    print("\n".join(map(str, written)))
    for one in written:
        if one.split == "test":
            print(f"\nthe test split is {one.path.absolute()}, its images are in {one.part.folder}")
    print(f"\nfor the experiment config:\n\n{as_config(written)}")
