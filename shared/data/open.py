"""The data that a config names: opened and checked."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.config.schema import DataConfig, Split, is_url
from shared.data import checks, synthetic
from shared.data.annotations import CocoAnnotations, check_same_categories
from shared.data.checks import check_box_format, check_images, first_dark_image, refuse_names_outside, under_a_pixel
from shared.data.images import allow_pixels
from shared.data.remote import RemoteImages, StoreError
from shared.data.storage import CachedImages, DiskImages, ImageStorage
from shared.errors import UserError, count_of

logger = logging.getLogger(__name__)


@dataclass
class SplitData:
    """An opened split of the data."""

    annotations: CocoAnnotations
    images: ImageStorage

    @property
    def categories(self) -> list[dict]:
        return self.annotations.categories


def open_split(data: DataConfig, split: str, images: ImageStorage | None = None) -> SplitData:
    """Opens and checks the annotations and images of "train", "val" or "test".

    Args:
        images: replaces the folder in `data`.

    Raises:
        UserError: a path is missing, the annotations are not COCO or contradict themselves, image files are missing.
    """
    paths: Split | None = getattr(data, split)
    if not data.reads_files:
        if paths is not None:
            logger.warning("data.%s is not read, because data.backend: fake draws its own data. Fix: write disk", split)
        return SplitData(CocoAnnotations.from_dict(synthetic.fake_split(split)), synthetic.FakeImages(split))
    if paths is None:
        raise UserError(f"data.{split} is missing. Fix: give its `annotations` and `images`")
    try:
        annotations, found = _open_annotations(data, split, paths)
    except UserError as error:
        raise UserError(f"data.{split}.annotations: {error}") from error
    allow_pixels(data.max_image_pixels)
    folder = data.located(paths.images or found)
    if images is None:
        images = _open_images(data, split, folder)
    where = f"data.{split}.images ({folder})"
    try:
        refuse_names_outside(annotations, where)
        check_box_format(annotations, f"data.{split}.annotations")
        if data.check_images:
            source = images.remote if isinstance(images, CachedImages) else images
            if isinstance(source, (DiskImages, RemoteImages)):  # they tell which images they have
                check_images(annotations, source, where, skip=data.on_bad_image == "skip")
            if _is_first_process() and (dark := first_dark_image(annotations, images)):
                logger.warning("data.%s: %s", split, dark)
    except StoreError as error:
        raise StoreError(f"data.{split}.images: {error}") from error
    if _is_first_process():
        for note in notes_on(annotations, split):
            logger.warning("data.%s.annotations: %s", split, note)
    if split == "train" and "ignore" in annotations.columns:
        annotations = annotations.select(~annotations.columns["ignore"])
    return SplitData(annotations, images)


def _open_images(data: DataConfig, split: str, folder: str) -> ImageStorage:
    """The images in a folder or below its URL; `data.cache_dir` keeps copies of those below a URL."""
    if is_url(folder):
        store, cache_bytes = RemoteImages(folder, data.store_options), int(data.cache_gb * 2**30)
        return CachedImages(store, Path(data.cache_dir).absolute() / "images", cache_bytes) if data.cache_dir else store
    if not Path(folder).is_dir():
        raise UserError(f"data.{split}.images: {folder} is not a folder. Fix: give the folder of the images")
    return DiskImages(Path(folder).absolute())


def _open_annotations(data: DataConfig, split: str, paths: Split) -> tuple[CocoAnnotations, str]:
    """A split's annotations in any format, and the folder of its images if the format names it."""
    if paths.is_coco or data.located(paths.annotations) != paths.annotations:
        return CocoAnnotations.open(data.located(paths.annotations), data.cache_dir, data.store_options), ""
    from shared.data.convert.conversion import annotations_of  # COCO files need no reader of other formats

    source = Path(paths.annotations)
    coco, folder = annotations_of(source, split, Path(paths.images) if paths.images else None)
    if folder is None and not paths.images:
        raise UserError(f"{source}: does not name its images' folder. Fix: give data.{split}.images")
    annotations = CocoAnnotations.from_dict(coco)
    annotations.path = str(source)
    if _is_first_process():
        logger.info("data.%s: %s is converted at each start: %s", split, source, count_of(len(annotations), "image"))
    return annotations, str(folder)


def notes_on(annotations: CocoAnnotations, split: str) -> list[str]:
    """Sentences about what was changed in reading the annotations, and about numbers that others compute from them."""
    notes = list(annotations.notes)
    if split == "val" and (annotations.columns["annotation_ids"] == 0).any():
        notes.append(
            "an annotation has the id 0, which pycocotools counts as not found: its mAP is too low. The results here "
            "are right"
        )
    return notes


def open_train_and_val(data: DataConfig) -> tuple[SplitData, SplitData]:
    """Opens both splits, which must have the same categories.

    Raises:
        UserError: as for `open_split`; the categories differ; there is nothing to train on or to validate on.
    """
    train, val = open_split(data, "train"), open_split(data, "val")
    check_same_categories(train.annotations, val.annotations)
    check_trainable(train.annotations)
    check_evaluable(val.annotations)
    return train, val


def check_trainable(annotations: CocoAnnotations) -> None:
    """Raises UserError if there is nothing to train on, and warns of boxes smaller than a pixel."""
    objects, small = ~annotations.without_area & ~annotations.columns["iscrowd"], under_a_pixel(annotations)
    if not objects.any():
        raise UserError(
            f"data.train.annotations: {annotations.path} has no box to train on. Fix: give a file with boxes"
        )
    if small[objects].all():
        raise UserError(
            f"data.train.annotations: {annotations.path} has no box to train on: all {int(objects.sum())} are less "
            "than a pixel wide or high. Fix: write boxes as x y width height in pixels"
        )
    if small.any() and _is_first_process():
        logger.warning("data.train: %s less than a pixel wide or high", count_of(int(small.sum()), "box"))


def _is_first_process() -> bool:
    """Whether this process logs what all processes find."""
    return os.environ.get("RANK", "0") == "0"


def check_evaluable(annotations: CocoAnnotations) -> None:
    """Raises UserError if there is nothing to validate on."""
    if not (~annotations.columns["iscrowd"]).any():
        raise UserError(
            f"data.val.annotations: {annotations.path} has no box to evaluate detections with. Fix: give a file with "
            "boxes"
        )


def check_masks(annotations: CocoAnnotations, split: str) -> None:
    """Raises UserError if masks are needed, and an annotation has none or a wrong one."""
    columns, wrong = annotations.columns, checks.wrong_rows(annotations)
    counting = ~columns["iscrowd"] & ~annotations.without_area
    absent = np.flatnonzero(checks.is_absent(annotations) & counting)
    wrong = wrong[counting[wrong]]
    for rows, what in ((absent, "have no segmentation"), (wrong, "have a segmentation that is wrong")):
        if len(rows):
            ids = columns["annotation_ids"]
            why = f": it {checks.why_wrong(annotations, rows[0])}" if rows is wrong else ""
            raise UserError(
                f"data.{split}.annotations: {len(rows)} annotations of {annotations.path} {what}, the first has id "
                f"{ids[rows[0]]}{why}; the model detects masks. Fix: choose one of boxes alone, or "
                f"{'correct' if why else 'add'} the masks"
            )
