"""`python3 -m shared check CONFIG`: what a training would meet in its data, before it is paid for."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import itertools
import logging
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tabulate import tabulate

from shared.config_file import load_config
from shared.data.annotations import CocoAnnotations, check_same_categories
from shared.data.images import BadImageError, read_image
from shared.data.input_scale import InputScale
from shared.errors import UserError
from shared.evaluation import visualization
from shared.experiment import DataConfig, SplitData, check_evaluable, check_trainable, open_split, parse_data
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)

_SAMPLE = 200  # images that are read where nothing else is said
_ON_THE_PAGE = 12
_READERS = 8


@dataclass
class Report:
    """What is in the data.

    Attributes:
        stops: what would end a training.
        remarks: what one should look at.
        rows: name, of train, of val.
        categories: name, boxes in train, boxes in val.
    """

    stops: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    categories: list[list[Any]] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [tabulate(self.rows, headers=["", "train", "val"], missingval="-")]
        if self.categories:
            parts.append(tabulate(self.categories, headers=["category", "train", "val"], missingval="-"))
        parts += [f"stops the training: {stop}" for stop in self.stops]
        parts += [f"look at: {remark}" for remark in self.remarks]
        return "\n\n".join(parts) + ("" if self.stops else "\n\nnothing stops the training")


def check(data: DataConfig, scale: InputScale | None = None, images: int | None = _SAMPLE) -> Report:
    """Looks at annotations and images.

    Args:
        scale: how large boxes are for the model; as in the images where None.
        images: how many of each split are read; all where None.
    """
    report, opened = Report(), {}
    for split in ("train", "val"):
        try:
            opened[split] = open_split(dataclasses.replace(data, check_images=True), split)
        except UserError as error:
            report.stops.append(str(error))
    for rule, splits in (
        (check_trainable, ["train"]),
        (check_evaluable, ["val"]),
        (check_same_categories, ["train", "val"]),
    ):
        if all(split in opened for split in splits):
            try:
                rule(*(opened[split].annotations for split in splits))
            except UserError as error:
                report.stops.append(str(error))
    described = {split: _describe(f"data.{split}", of.annotations, scale, report) for split, of in opened.items()}
    names = list(dict.fromkeys(itertools.chain.from_iterable(described.values())))
    report.rows = [[name, *(described.get(split, {}).get(name) for split in ("train", "val"))] for name in names]
    counts = {split: _boxes_by_category(of.annotations) for split, of in opened.items()}
    report.categories = [
        [name, *(counts.get(split, {}).get(name) for split in ("train", "val"))]
        for name in dict.fromkeys(itertools.chain.from_iterable(counts.values()))
    ]
    for name, boxes, _ in report.categories:
        if boxes == 0:
            report.remarks.append(f"data.train: the category {name!r} has no box to train on")
    _read_images(opened, images, data.on_bad_image == "skip", report)
    return report


def _describe(where: str, annotations: CocoAnnotations, scale: InputScale | None, report: Report) -> dict[str, Any]:
    """The counts of one split; adds what is wrong to the report."""
    columns = annotations.columns
    boxes, ids, crowd = columns["boxes"], columns["annotation_ids"], columns["iscrowd"]
    image_of = np.repeat(np.arange(len(annotations)), np.diff(columns["offsets"]))
    widths, heights = columns["widths"][image_of], columns["heights"][image_of]

    def remark(found: np.ndarray, what: str) -> None:
        if found.any():
            report.remarks.append(f"{where}: {int(found.sum())} {what}, the first is annotation {ids[found.argmax()]}")

    right, bottom = boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]
    flat = annotations.without_area
    remark(flat, "boxes have no width or no height; they are left out of the training")
    remark(~flat & ((right <= 0) | (bottom <= 0) | (boxes[:, 0] >= widths) | (boxes[:, 1] >= heights)),
           "boxes lie outside of their image")  # fmt: skip
    remark(~flat & ((boxes[:, :2] < -1).any(axis=1) | (right > widths + 1) | (bottom > heights + 1)),
           "boxes reach over the edge of their image by more than a pixel")  # fmt: skip
    with_masks = np.diff(columns["segmentation_offsets"]) > len(b"[]")
    invalid = _invalid_segmentations(annotations)
    remark(invalid, "segmentations are no polygons of three points or more, and no RLE of the image's size")

    factor = np.ones(len(annotations)) if scale is None else scale.factor(columns["widths"], columns["heights"])
    sides = np.sqrt((boxes[:, 2] * boxes[:, 3]).clip(0)) * factor[image_of]
    objects = ~flat & ~crowd
    rows = {
        "images": len(annotations),
        "  without annotations": int((np.diff(columns["offsets"]) == 0).sum()),
        "annotations": len(ids),
        "  crowds": int(crowd.sum()),
        "  with masks": int(with_masks.sum()),
        "largest image": "×".join(str(columns[name].max()) for name in ("widths", "heights")),
    }
    unit = "box side, pixels of the image" if scale is None else "box side, pixels of the model's input"
    for percent in (1, 10, 50, 90, 99):
        rows[f"{unit}: {percent} %"] = f"{np.percentile(sides[objects], percent):.0f}" if objects.any() else None
    if scale is not None and objects.any():
        small = objects & (sides < scale.smallest)
        share = small.sum() / objects.sum()
        rows[f"  under the model's smallest {scale.kind}, {scale.smallest:g}"] = f"{share:.1%}"
        if share > 0.2:
            report.remarks.append(
                f"{where}: {share:.0%} of the boxes are smaller than the model's smallest {scale.kind} "
                f"({scale.smallest:g} pixels of its input); it will find few of them. Larger input images help"
            )
    return rows


def _boxes_by_category(annotations: CocoAnnotations) -> dict[str, int]:
    columns = annotations.columns
    labels = columns["labels"][~columns["iscrowd"] & ~annotations.without_area]
    counts = np.bincount(labels, minlength=len(annotations.categories))
    return dict(zip(annotations.category_names, counts.tolist(), strict=True))


def _invalid_segmentations(annotations: CocoAnnotations) -> np.ndarray:
    """(annotations,) bool."""
    columns = annotations.columns
    offsets = columns["segmentation_offsets"]
    found = np.zeros(len(offsets) - 1, dtype=bool)
    image_of = np.repeat(np.arange(len(annotations)), np.diff(columns["offsets"]))
    decoder = msgspec.json.Decoder()
    for at in np.flatnonzero(np.diff(offsets) > len(b"[]")).tolist():
        try:
            value = decoder.decode(columns["segmentations"][offsets[at] : offsets[at + 1]])
        except msgspec.DecodeError:
            value = "unreadable"
        if isinstance(value, list):
            found[at] = not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in value)
        elif isinstance(value, dict):
            height, width = (int(columns[name][image_of[at]]) for name in ("heights", "widths"))
            found[at] = list(value.get("size", ())) != [height, width]
            if isinstance(counts := value.get("counts"), list) and not found[at]:
                found[at] = sum(counts) != height * width
        elif value is not None:
            found[at] = True
    return found


def _read_images(opened: dict[str, SplitData], images: int | None, skip: bool, report: Report) -> None:
    """Reads some of each split; adds what cannot be read, and what is in both."""
    digests: dict[str, dict[str, str]] = {}
    row: list[Any] = ["images read"]
    for split in ("train", "val"):
        if split not in opened:
            row.append(None)
            continue
        data = opened[split]
        count = len(data.annotations) if images is None else min(images, len(data.annotations))
        # spread over the file, the same at each call
        wanted = np.linspace(0, len(data.annotations) - 1, count).astype(int).tolist() if count else []
        digests[split], bad = {}, []
        with ThreadPoolExecutor(_READERS) as readers:
            for name, digest, error in readers.map(lambda i, data=data: _digest(data, i), wanted):
                if error:
                    bad.append(error)
                else:
                    digests[split].setdefault(digest, name)
        row.append(count)
        if bad:
            message = f"data.{split}: {len(bad)} of the {count} images that were read are bad, the first: {bad[0]}"
            (report.remarks if skip else report.stops).append(message)
    if len(opened) == 2:
        train, val = digests["train"], digests["val"]
        _remark_on_both(
            "images that were read", [(train[digest], val[digest]) for digest in train.keys() & val], report
        )
        train, val = (_by_boxes(opened[split].annotations) for split in ("train", "val"))
        both = [(train[boxes], val[boxes]) for boxes in train.keys() & val]
        _remark_on_both("images with the very same boxes", both, report)
    report.rows.append(row)


def _digest(data: SplitData, index: int) -> tuple[str, str, str]:
    record = data.annotations[index]
    try:
        image = read_image(data.images, record.file_name, (record.width, record.height), f"image id {record.image_id}")
    except BadImageError as error:
        return record.file_name, "", str(error)
    return record.file_name, hashlib.sha256(image.tobytes()).hexdigest(), ""


def _by_boxes(annotations: CocoAnnotations) -> dict[bytes, str]:
    """The first image of each size and set of boxes; of those with two boxes or more, which chance does not repeat."""
    columns = annotations.columns
    offsets, boxes = columns["offsets"].tolist(), columns["boxes"]
    sizes = list(zip(columns["widths"].tolist(), columns["heights"].tolist(), strict=True))
    found: dict[bytes, str] = {}
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        if end - start >= 2:
            key = hashlib.blake2b(repr(sizes[i]).encode() + boxes[start:end].tobytes(), digest_size=16).digest()
            found.setdefault(key, annotations.file_name(i))
    return found


def _remark_on_both(what: str, both: Sequence[tuple[str, str]], report: Report) -> None:
    if both:
        train, val = min(both)
        report.remarks.append(f"{len(both)} {what} are in data.train and in data.val, the first is {train} and {val}")


def save_page(data: SplitData, path: Path, count: int = _ON_THE_PAGE) -> None:
    """A page of images with their labels, spread over the file, as PNG or PDF."""
    samples = []
    for index in np.linspace(0, len(data.annotations) - 1, min(count, len(data.annotations))).astype(int).tolist():
        record = data.annotations[index]
        image = read_image(data.images, record.file_name, (record.width, record.height), f"image id {record.image_id}")
        samples.append((image, record))
    visualization.save(visualization.page_of_truth(samples, data.categories), path)


def _trial_of(config_file: Path) -> type[DetectionTrial] | None:
    """The detector whose folder the config is in."""
    if not (config_file.parent / "model_def.py").is_file():
        return None
    sys.path.insert(0, str(config_file.absolute().parent))
    classes = vars(importlib.import_module("model_def")).values()
    return next(
        (c for c in classes if isinstance(c, type) and issubclass(c, DetectionTrial) and c is not DetectionTrial), None
    )


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m shared check", description="What a training would meet in the data of an experiment config."
    )
    parser.add_argument("config", type=Path, help="the experiment config, const.yaml for example")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
    parser.add_argument(
        "--images", default=str(_SAMPLE), help=f"how many of each split are read, or `all`; default {_SAMPLE}"
    )
    parser.add_argument("--page", type=Path, metavar="PNG", help="draw a page of images with their labels")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if given.images != "all" and not given.images.isdigit():
        parser.error(f"--images: {given.images!r} is neither a number nor `all`")
    try:
        config = load_config(str(given.config), given.overrides)
        trial_class = _trial_of(given.config)
        data = parse_data(config, trial_class.data_class if trial_class else DataConfig)
        scale = trial_class.input_scale(config) if trial_class else None
        report = check(data, scale, None if given.images == "all" else int(given.images))
        print(report)
        if given.page:
            save_page(open_split(data, "train"), given.page)
            print(f"\nlabels of data.train: {given.page}")
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if report.stops else 0)
