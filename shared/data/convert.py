"""`python3 -m shared convert FORMAT INPUT OUTPUT`: Pascal VOC, YOLO and CVAT annotations as COCO's, by hotcoco."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hotcoco
import msgspec
from PIL import Image

from shared.data.annotations import CocoAnnotations
from shared.errors import UserError

_READERS = {"voc": hotcoco.COCO.from_voc, "yolo": hotcoco.COCO.from_yolo, "cvat": hotcoco.COCO.from_cvat}


def convert(kind: str, source: Path, output: Path, images: Path | None = None, val_share: float = 0.0) -> list[Path]:
    """Writes a COCO file; or two, `…_train.json` and `…_val.json`, where a share of the images is for validation.

    Args:
        kind: "voc", a folder of XML files; "yolo", a folder of labels with its data.yaml; "cvat", an XML file.
        images: the folder of the images, which YOLO's labels say nothing of.

    Returns:
        The files written.

    Raises:
        UserError: the source is not there, or not of that kind; an image is missing.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist")
    if (kind == "yolo") != (images is not None):
        raise UserError("--images goes with yolo, whose labels do not say how large the images are, and with no other")
    if not 0 <= val_share < 1:
        raise UserError(f"--val {val_share:g}: give a share of the images from 0 to 1, 0.2 for example")
    try:
        with warnings.catch_warnings(record=True) as shown:
            options = {"images_dir": str(images)} if images is not None else {}
            coco = _READERS[kind](str(source), **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{source} cannot be read as {kind}: {error}") from error
    for warning in shown:
        logging.warning("%s", warning.message)
    parts = {"": coco}
    if val_share:
        parts = dict(zip(("_train", "_val"), coco.split(val_frac=val_share), strict=True))
    written = []
    for suffix, part in parts.items():
        plain = _plain(part.dataset, images)
        CocoAnnotations.from_dict(plain)  # what a training would refuse is refused here
        path = output.with_name(f"{output.stem}{suffix}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(plain))
        written.append(path)
    return written


def _plain(dataset: dict[str, Any], images: Path | None) -> dict[str, list[dict]]:
    """The data set without keys that say nothing, and with whole file names: of YOLO's hotcoco knows the stems."""
    plain = {
        section: [{key: value for key, value in row.items() if value not in (None, [], ())} for row in dataset[section]]
        for section in ("images", "annotations", "categories")
    }
    if images is not None:
        endings = Image.registered_extensions()
        names = {path.stem: path.name for path in sorted(images.iterdir()) if path.suffix.lower() in endings}
        for image in plain["images"]:
            if image["file_name"] not in names:
                raise UserError(f"--images: {images} has no image for the label file {image['file_name']}.txt")
            image["file_name"] = names[image["file_name"]]
    return plain


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python3 -m shared convert", description="Other annotations as COCO's.")
    parser.add_argument("kind", choices=sorted(_READERS), help="what the annotations are")
    parser.add_argument("source", type=Path, help="voc: a folder of XML files; yolo: of labels; cvat: an XML file")
    parser.add_argument("output", type=Path, help="the COCO file to write")
    parser.add_argument("--images", type=Path, help="with yolo: the folder of the images")
    parser.add_argument(
        "--val", type=float, default=0.0, metavar="SHARE", help="split: 0.2 for validation, for example"
    )
    given = parser.parse_args(arguments)
    try:
        for path in convert(given.kind, given.source, given.output, given.images, given.val):
            print(path)
    except UserError as error:
        sys.exit(f"error: {error}")
