"""The contents of a data set, and the problems that would stop training on it.

It shows the counts, tables and remarks of `check`.
"""

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
from PIL import Image
from tabulate import tabulate

from shared.config.schema import DataConfig
from shared.data.annotations import CocoAnnotations, ImageRecord, check_same_categories
from shared.data.checks import image_sizes, is_absent, under_a_pixel, why_wrong, wrong_rows
from shared.data.dataset import SampleKey
from shared.data.images import BadImageError, InputScale, darkness, read_image, value_range
from shared.data.open import SplitData, check_evaluable, check_trainable, notes_on, open_split
from shared.errors import UserError, count_of

Drawn = tuple[Image.Image, ImageRecord]

_SPLITS = ("train", "val")
_ON_THE_PAGE = 9  # images of each split
_READERS = 8
_NAMES = 10
_PERCENTILES = (1, 10, 50, 90, 99)


@dataclass
class Report:
    """The contents of the data.

    Attributes:
        stops: what would stop training.
        remarks: what to look at.
        rows: name, value for train, value for val.
        categories: name, boxes in train, boxes in val.
    """

    stops: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    categories: list[list[Any]] = field(default_factory=list)

    def stop(self, error: Exception) -> None:
        """Adds what would stop training, unless it is there already."""
        message = " ".join(str(error).split()) or type(error).__name__
        message = message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"
        if not any(message in stop or stop in message for stop in self.stops):
            self.stops.append(message)

    def __str__(self) -> str:
        parts = [tabulate(self.rows, headers=["", *_SPLITS], missingval="-")] if self.rows else []
        if self.categories:
            parts.append(tabulate(self.categories, headers=["category", *_SPLITS], missingval="-"))
        parts += [f"stops the training: {stop}" for stop in self.stops]
        parts += [f"look at: {remark}" for remark in self.remarks]
        return "\n\n".join(parts) + ("" if self.stops else "\n\nnothing stops the training")


def open_named(data: DataConfig, report: Report) -> dict[str, SplitData]:
    """The splits that the `data` section names. If one cannot be opened, the report gets the reason."""
    opened = {}
    for split in _SPLITS:
        if not data.reads_files or getattr(data, split) is not None:
            try:
                opened[split] = open_split(dataclasses.replace(data, check_images=True), split)
            except UserError as error:
                report.stop(error)
    return opened


def open_both(data: DataConfig, report: Report) -> dict[str, SplitData]:
    """The splits that can be opened. The report gets what in all their annotations would stop training."""
    for split in _SPLITS:
        if data.reads_files and getattr(data, split) is None:
            report.stop(UserError(f"data.{split} is missing. Fix: give its `annotations` and `images`"))
    opened = open_named(data, report)
    rules = ((check_trainable, ["train"]), (check_evaluable, ["val"]), (check_same_categories, _SPLITS))
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
    """Adds counts, tables and remarks of the splits to the report, and their bad images.

    Args:
        scale: the size of boxes for the model; None for their size in the images.
        images: how many to read of each split; None for all.
        skip: whether training skips bad images.
    """
    for split, of in opened.items():
        report.remarks += [f"data.{split}: {note}" for note in notes_on(of.annotations, split)]
    described = {split: _describe(f"data.{split}", of.annotations, scale, report) for split, of in opened.items()}
    report.rows += _side_by_side(described)
    report.categories = _side_by_side({split: _boxes_by_category(of.annotations) for split, of in opened.items()})
    if empty := [name for name, boxes, _ in report.categories if boxes == 0]:
        more = f", and {len(empty) - _NAMES} more" if len(empty) > _NAMES else ""
        named = ", ".join(empty[:_NAMES])
        report.remarks.append(
            f"data.train: {count_of(len(empty), 'category')} without a box to train on: {named}{more}"
        )
    if opened:
        _read_images(opened, images, skip, report)
    if len(opened) == 2:
        train, val = (_by_boxes(opened[split].annotations) for split in _SPLITS)
        _remark_on_both("with the same boxes", train, val, report)


def _side_by_side(of_splits: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Rows of a name and its value in each split; None if the split lacks it."""
    names = dict.fromkeys(itertools.chain.from_iterable(of_splits.values()))
    return [[name, *(of_splits.get(split, {}).get(name) for split in _SPLITS)] for name in names]


def _describe(where: str, annotations: CocoAnnotations, scale: InputScale | None, report: Report) -> dict[str, Any]:
    """The counts of one split. The report gets what is wrong."""
    columns = annotations.columns
    boxes, ids, crowd, offsets = (columns[name] for name in ("boxes", "annotation_ids", "iscrowd", "offsets"))
    widths, heights = image_sizes(annotations).T

    def remark(found: np.ndarray, what: str) -> None:
        if count := int(found.sum()):
            first = ids[found.argmax()]
            report.remarks.append(f"{where}: {count_of(count, 'box')} {what}, the first is annotation {first}")

    left, top, right, bottom = boxes[:, 0], boxes[:, 1], boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]
    flat = annotations.without_area
    outside = (right <= 0) | (bottom <= 0) | (left >= widths) | (top >= heights)
    over_the_edge = (left < -1) | (top < -1) | (right > widths + 1) | (bottom > heights + 1)
    remark(flat, "without width or height, which training omits")
    remark(~flat & outside, "outside of the image")
    remark(~flat & over_the_edge, "over the edge of the image by more than a pixel")
    remark(under_a_pixel(annotations), "less than a pixel wide or high")
    wrong = wrong_rows(annotations)
    if len(wrong) and not any(stop.startswith(where) and "segmentation" in stop for stop in report.stops):
        report.remarks.append(
            f"{where}: {len(wrong)} segmentations are wrong; that of annotation {ids[wrong[0]]} "
            f"{why_wrong(annotations, wrong[0])}"
        )

    factor = np.ones(len(annotations)) if scale is None else scale.factor(columns["widths"], columns["heights"])
    objects = ~flat & ~crowd
    sides = (np.sqrt((boxes[:, 2] * boxes[:, 3]).clip(0)) * np.repeat(factor, np.diff(offsets)))[objects]
    rows = {
        "images": len(annotations),
        "  without annotations": int((np.diff(offsets) == 0).sum()),
        "annotations": len(ids),
        "  crowds": int(crowd.sum()),
        "  with masks": int((~is_absent(annotations)).sum()),
        "largest image": f"{columns['widths'].max()}×{columns['heights'].max()}",
    }
    unit = "box side, pixels of the image" if scale is None else "box side, pixels of the model's input"
    for percent in _PERCENTILES:
        rows[f"{unit}: {percent} %"] = f"{np.percentile(sides, percent):.0f}" if len(sides) else None
    if scale is not None and len(sides):
        share = (sides < scale.smallest).mean()
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
    """Reads some images of each split. The report gets those that cannot be read, and those that are in both splits."""
    rows: dict[str, dict[str, Any]] = {}
    names: dict[str, dict[str, str]] = {}
    for split, data in opened.items():
        wanted = spread(len(data.annotations), images)
        with ThreadPoolExecutor(_READERS) as readers:
            read = list(readers.map(lambda index, data=data: _read(data, index), wanted))
        # the first image of several equal ones counts
        names[split] = {digest: name for name, digest, *_ in reversed(read) if digest}
        bad = [reason for _, _, reason, _ in read if reason]
        dark = list(filter(None, (darkness(name, found) for name, digest, _, found in read if digest)))
        which = f"data.{split}: {{}} of the {len(wanted)} images that were read"
        if bad:
            message = f"{which.format(len(bad))} are bad, the first: {bad[0]}"
            (report.remarks if skip else report.stops).append(message)
        if dark:
            report.remarks.append(f"{which.format(len(dark))}: {dark[0]}")
        ranges: dict[str, list[float]] = {}
        for mode, *ends in filter(None, (found for *_, found in read)):
            ranges.setdefault(mode, []).extend(ends)
        of_modes = {f"  values of mode {mode}": f"{min(ends):g} to {max(ends):g}" for mode, ends in ranges.items()}
        rows[split] = {"images read": len(wanted), **of_modes}
    report.rows += _side_by_side(rows)
    if len(opened) == 2:
        _remark_on_both("of those that were read", names["train"], names["val"], report)


def _read(data: SplitData, index: int) -> tuple[str, str, str, tuple[str, float, float] | None]:
    """The image's name, a digest of its pixels, why it is bad, and its `value_range`; each may be empty."""
    record, digest, reason = data.annotations[index], "", ""
    try:
        image = read_image(data.images, record.file_name, (record.width, record.height), f"image id {record.image_id}")
        digest = hashlib.sha256(image.tobytes()).hexdigest()
    except BadImageError as error:
        reason = str(error)
    return record.file_name, digest, reason, value_range(data.images, record.file_name)


def _by_boxes(annotations: CocoAnnotations) -> dict[bytes, str]:
    """The first image of each size and set of boxes. Chance does not repeat two boxes or more; fewer do not count."""
    columns = annotations.columns
    offsets, boxes = columns["offsets"].tolist(), columns["boxes"]
    sizes = list(zip(columns["widths"].tolist(), columns["heights"].tolist(), strict=True))
    found: dict[bytes, str] = {}
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        if end - start >= 2:
            key = hashlib.blake2b(repr(sizes[i]).encode() + boxes[start:end].tobytes(), digest_size=16).digest()
            found.setdefault(key, annotations.file_name(i))
    return found


def _remark_on_both(what: str, train: Mapping[Any, str], val: Mapping[Any, str], report: Report) -> None:
    if both := [(train[key], val[key]) for key in train.keys() & val]:
        first = " and ".join(min(both))
        report.remarks.append(
            f"data.train and data.val share {count_of(len(both), 'image')} {what}, the first is {first}"
        )


def augmented_samples(dataset: Any) -> list[Drawn]:
    """Some training images as `data.augment` changes them in the first epoch; empty without it."""
    augmenter = getattr(dataset, "augmenter", None)
    if augmenter is None:
        return []
    with_masks, samples = dataclasses.replace(dataset, augmenter=augmenter.with_masks()), []
    for index in spread(len(dataset), _ON_THE_PAGE):
        try:
            pixels, record = with_masks.augmented(index, SampleKey(0, index))
        except BadImageError:  # the report has it
            continue
        named = dataclasses.replace(record, file_name=f"train, augmented: {record.file_name}")
        samples.append((Image.fromarray(pixels), named))
    return samples


def save_page(
    opened: Mapping[str, SplitData], path: Path, augmented: Sequence[Drawn] = (), count: int = _ON_THE_PAGE
) -> None:
    """Draws some images of each split, spread over the file, with their labels, as PNG or PDF.

    Args:
        augmented: images and records to draw after them.
    """
    from shared.evaluation import drawing  # importing it takes a while

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
    samples += augmented
    if not samples:
        raise UserError(
            "none of the images can be read, so no labels can be drawn. Fix: check data.train.images and "
            "data.val.images"
        )
    categories = next(iter(opened.values())).categories
    drawing.save(drawing.page_of_truth(samples, categories), path)


def spread(length: int, count: int | None) -> Sequence[int]:
    """At most `count` positions, evenly spread over a sequence and the same at each call; all if None."""
    count = length if count is None else min(count, length)
    return np.linspace(0, length - 1, count).astype(int).tolist() if count else []
