"""What is in a data set, and what a training would meet in it: the counts, tables and remarks of `check`."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from shared.config.schema import DataConfig
from shared.data.annotations import CocoAnnotations, check_same_categories
from shared.data.checks import image_sizes, is_absent, under_a_pixel, why_wrong, wrong_rows
from shared.data.images import BadImageError, InputScale, darkness, read_image
from shared.data.open import SplitData, check_evaluable, check_trainable, open_split
from shared.errors import UserError

SPLITS = ("train", "val")
_ON_THE_PAGE = 9  # of each split
_READERS = 8
_NAMES = 10


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

    def stop(self, error: Exception) -> None:
        """Adds what would end a training, unless it is said already."""
        message = " ".join(str(error).split()) or type(error).__name__
        message = message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"
        if not any(message in stop or stop in message for stop in self.stops):
            self.stops.append(message)

    def __str__(self) -> str:
        parts = [tabulate(self.rows, headers=["", *SPLITS], missingval="-")] if self.rows else []
        if self.categories:
            parts.append(tabulate(self.categories, headers=["category", *SPLITS], missingval="-"))
        parts += [f"stops the training: {stop}" for stop in self.stops]
        parts += [f"look at: {remark}" for remark in self.remarks]
        return "\n\n".join(parts) + ("" if self.stops else "\n\nnothing stops the training")


def open_named(data: DataConfig, report: Report) -> dict[str, SplitData]:
    """The splits that the `data` section names and that can be opened; adds to the report why one cannot."""
    opened = {}
    for split in SPLITS if data.backend == "fake" else [split for split in SPLITS if getattr(data, split) is not None]:
        try:
            opened[split] = open_split(dataclasses.replace(data, check_images=True), split)
        except UserError as error:
            report.stop(error)
    return opened


def open_both(data: DataConfig, report: Report) -> dict[str, SplitData]:
    """The splits that can be opened; adds what would stop a training by all of their annotations to the report."""
    for split in SPLITS:
        if data.backend != "fake" and getattr(data, split) is None:
            report.stop(UserError(f"data.{split} is missing; it needs the keys `annotations` and `images`"))
    opened = open_named(data, report)
    rules = ((check_trainable, ["train"]), (check_evaluable, ["val"]), (check_same_categories, SPLITS))
    for rule, splits in rules:
        if all(split in opened for split in splits):
            try:
                rule(*(opened[split].annotations for split in splits))
            except UserError as error:
                report.stop(error)
    return opened


def describe(
    opened: Mapping[str, SplitData], scale: InputScale | None, images: int | None, skip: bool, report: Report
) -> None:
    """Adds counts, tables and remarks of the splits, and the images that are bad.

    Args:
        scale: how large boxes are for the model; as in the images where None.
        images: how many of each split are read; all where None.
        skip: whether a training leaves bad images out.
    """
    described = {split: _describe(f"data.{split}", of.annotations, scale, report) for split, of in opened.items()}
    names = list(dict.fromkeys(itertools.chain.from_iterable(described.values())))
    report.rows += [[name, *(described.get(split, {}).get(name) for split in SPLITS)] for name in names]
    counts = {split: _boxes_by_category(of.annotations) for split, of in opened.items()}
    report.categories = [
        [name, *(counts.get(split, {}).get(name) for split in SPLITS)]
        for name in dict.fromkeys(itertools.chain.from_iterable(counts.values()))
    ]
    if empty := [name for name, boxes, _ in report.categories if boxes == 0]:
        what = "1 category has" if len(empty) == 1 else f"{len(empty)} categories have"
        more = f", and {len(empty) - _NAMES} more" if len(empty) > _NAMES else ""
        report.remarks.append(f"data.train: {what} no box to train on: {', '.join(empty[:_NAMES])}{more}")
    if opened:
        _read_images(opened, images, skip, report)


def _describe(where: str, annotations: CocoAnnotations, scale: InputScale | None, report: Report) -> dict[str, Any]:
    """The counts of one split; adds what is wrong to the report."""
    columns = annotations.columns
    boxes, ids, crowd = columns["boxes"], columns["annotation_ids"], columns["iscrowd"]
    widths, heights = image_sizes(annotations).T

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
    remark(under_a_pixel(annotations), "boxes are less than a pixel wide or high")
    wrong = wrong_rows(annotations)
    stops = any(stop.startswith(where) and "segmentation" in stop for stop in report.stops)
    if len(wrong) and not stops:
        report.remarks.append(
            f"{where}: {len(wrong)} segmentations are wrong; that of annotation {ids[wrong[0]]} "
            f"{why_wrong(annotations, wrong[0])}"
        )

    factor = np.ones(len(annotations)) if scale is None else scale.factor(columns["widths"], columns["heights"])
    sides = np.sqrt((boxes[:, 2] * boxes[:, 3]).clip(0)) * np.repeat(factor, np.diff(columns["offsets"]))
    objects = ~flat & ~crowd
    rows = {
        "images": len(annotations),
        "  without annotations": int((np.diff(columns["offsets"]) == 0).sum()),
        "annotations": len(ids),
        "  crowds": int(crowd.sum()),
        "  with masks": int((~is_absent(annotations)).sum()),
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


def _read_images(opened: Mapping[str, SplitData], images: int | None, skip: bool, report: Report) -> None:
    """Reads some of each split; adds what cannot be read, and what is in both."""
    digests: dict[str, dict[str, str]] = {}
    row: list[Any] = ["images read"]
    for split in SPLITS:
        if split not in opened:
            row.append(None)
            continue
        data = opened[split]
        wanted = spread(len(data.annotations), images)
        count = len(wanted)
        digests[split], bad, dark = {}, [], []
        with ThreadPoolExecutor(_READERS) as readers:
            for name, digest, error, too_dark in readers.map(lambda i, data=data: _digest(data, i), wanted):
                if error:
                    bad.append(error)
                else:
                    digests[split].setdefault(digest, name)
                    dark += [too_dark] if too_dark else []
        row.append(count)
        if bad:
            message = f"data.{split}: {len(bad)} of the {count} images that were read are bad, the first: {bad[0]}"
            (report.remarks if skip else report.stops).append(message)
        if dark:
            report.remarks.append(f"data.{split}: {len(dark)} of the {count} images that were read: {dark[0]}")
    if len(opened) == 2:
        train, val = digests["train"], digests["val"]
        _remark_on_both(
            "images that were read", [(train[digest], val[digest]) for digest in train.keys() & val], report
        )
        train, val = (_by_boxes(opened[split].annotations) for split in ("train", "val"))
        both = [(train[boxes], val[boxes]) for boxes in train.keys() & val]
        _remark_on_both("images with the very same boxes", both, report)
    report.rows.append(row)


def _digest(data: SplitData, index: int) -> tuple[str, str, str, str]:
    """The image's name, a digest of its pixels, why it is bad, and what `darkness` says of it."""
    record = data.annotations[index]
    try:
        image = read_image(data.images, record.file_name, (record.width, record.height), f"image id {record.image_id}")
    except BadImageError as error:
        return record.file_name, "", str(error), ""
    dark = darkness(data.images, record.file_name)
    return record.file_name, hashlib.sha256(image.tobytes()).hexdigest(), "", dark


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


def save_page(opened: Mapping[str, SplitData], path: Path, count: int = _ON_THE_PAGE) -> None:
    """A page of images with their labels, of each split some that are spread over the file, as PNG or PDF."""
    from shared.evaluation import drawing  # which takes a while to import

    samples = []
    for split, data in opened.items():
        wrong = set(wrong_rows(data.annotations).tolist())
        for index in spread(len(data.annotations), count):
            record, first = data.annotations[index], int(data.annotations.columns["offsets"][index])
            masks = [b"" if first + i in wrong else raw for i, raw in enumerate(record.raw_segmentations)]
            name = f"image id {record.image_id}"
            try:
                image = read_image(data.images, record.file_name, (record.width, record.height), name)
            except BadImageError:  # the report has it
                continue
            named = dataclasses.replace(record, file_name=f"{split}: {record.file_name}", raw_segmentations=masks)
            samples.append((image, named))
    if not samples:
        raise UserError("none of the images can be read, to draw their labels")
    categories = next(iter(opened.values())).categories
    drawing.save(drawing.page_of_truth(samples, categories), path)


def spread(length: int, count: int | None) -> list[int]:
    """At most `count` positions, all where None, spread over a sequence: the same at each call."""
    count = length if count is None else min(count, length)
    return np.linspace(0, length - 1, count).astype(int).tolist() if count else []
