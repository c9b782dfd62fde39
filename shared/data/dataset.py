"""A torch data set of annotations, images and a detector's transform."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from shared.data.annotations import CocoAnnotations, ImageRecord
from shared.data.images import BadImageError, read_image
from shared.data.seeding import seed_all
from shared.data.storage import ImageStorage
from shared.errors import UserError

logger = logging.getLogger(__name__)

Transform = Callable[[Any, ImageRecord], Any]


class SampleKey(NamedTuple):
    """Which image, in which epoch, and which of its copies there: what the sample's random numbers follow from."""

    epoch: int
    index: int
    copy: int = 0

    @property
    def seeds(self) -> tuple[int, ...]:
        return (self.epoch, self.index, self.copy, 4) if self.copy else (self.epoch, self.index)


class BadImages:
    """What becomes of images that cannot be read: `data.on_bad_image`.

    Attributes:
        skip: leave them out; else the first one ends the run.
        skipped: the ids of those left out since `take` was last called in this process, a loader worker for most.
    """

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.skipped: list[int] = []
        self._known: set[int] = set()

    def leave_out(self, error: BadImageError, image_id: int) -> None:
        """Notes the image.

        Raises:
            BadImageError: the given one, where bad images are errors.
        """
        if not self.skip:
            raise error
        self.skipped.append(image_id)
        if image_id not in self._known:
            self._known.add(image_id)
            logger.warning("left out: %s", error)

    def take(self) -> list[int]:
        """The ids noted since the last time."""
        taken, self.skipped = self.skipped, []
        return taken


class CocoDetection(torch.utils.data.Dataset):
    """`dataset[SampleKey(epoch, index)]` is `transform(image, record)`; `dataset[index]` is that of epoch 0.

    The transform may draw from Python's, NumPy's and PyTorch's global generators: they are seeded from
    (seed, epoch, index) before it runs, and the copy of an image that comes several times an epoch.

    Args:
        transform: takes an image, as `decode` gives it, and its `ImageRecord`.
        training: leave boxes without area out of the records.
        bad_images: what becomes of images that cannot be read. The next one of the same size takes the place of one
            that is left out, so that batches are as large, and the same in every run. Where none of that size can be
            read, one of the same shape (wide or not) does, the same for all of that size, as a batch may be of one.
        decode: from the bytes of an image of 8 bits to what `transform` takes; a PIL image in RGB where None.
        in_use: the indices that may stand in for another; all where None.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        images: ImageStorage,
        transform: Transform,
        seed: int,
        training: bool,
        bad_images: BadImages | None = None,
        decode: Callable[[bytes], Any] | None = None,
        in_use: np.ndarray | None = None,
    ):
        self.annotations = annotations
        self.images = images
        self.transform = transform
        self.seed = seed
        self.training = training
        self.bad_images = bad_images or BadImages()
        self.decode = decode
        self.in_use = in_use

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: SampleKey | int) -> Any:
        key = key if isinstance(key, SampleKey) else SampleKey(0, key)
        for candidate in self._candidates(key.index):
            try:
                image, record = self.load(candidate)
                seed_all(self.seed, *key.seeds)
                return transformed(self.transform, image, record)
            except BadImageError as error:
                self.bad_images.leave_out(error, int(self.annotations.image_ids[candidate]))
        raise UserError(f"{self.annotations.path}: none of the images that it names can be read, see the lines above")

    def load(self, index: int) -> tuple[Any, ImageRecord]:
        """The decoded image and its record.

        Raises:
            BadImageError: the image cannot be read, or has another size than the annotation file says.
        """
        record = self.annotations[index]
        size = (record.width, record.height)
        image = read_image(self.images, record.file_name, size, f"image id {record.image_id}", self.decode)
        return image, _with_area_only(record) if self.training else record

    def _candidates(self, index: int) -> Iterator[int]:
        """The image, then those that may stand in for it."""
        yield index
        widths, heights = self.annotations.columns["widths"], self.annotations.columns["heights"]
        alike = self._by_shape[int(widths[index] > heights[index])]
        is_as_large = (widths[alike] == widths[index]) & (heights[alike] == heights[index])
        as_large, others = alike[is_as_large], alike[~is_as_large]
        start = np.searchsorted(as_large, index, side="right")
        start_of_others = np.searchsorted(others, as_large[0] if len(as_large) else index)
        for other in itertools.chain(
            as_large[start:], as_large[:start], others[start_of_others:], others[:start_of_others]
        ):
            if other != index:
                yield int(other)

    @cached_property
    def _by_shape(self) -> tuple[np.ndarray, np.ndarray]:
        """The indices in use, in order: of images that are not wide, and of those that are."""
        in_use = np.arange(len(self)) if self.in_use is None else np.unique(self.in_use)
        wide = (self.annotations.columns["widths"] > self.annotations.columns["heights"])[in_use]
        return in_use[~wide], in_use[wide]


def transformed(transform: Transform, image: Any, record: ImageRecord) -> Any:
    """`transform(image, record)`.

    Raises:
        UserError: it fails, on annotations that nothing can be made of for the most part; says of which image.
    """
    try:
        return transform(image, record)
    except UserError:
        raise
    except Exception as error:  # libraries fail in as many ways as annotations are wrong
        raise UserError(
            f"{record.file_name} (image id {record.image_id}) cannot be made a sample; look at its annotations "
            f"({type(error).__name__}: {error})"
        ) from error


def _with_area_only(record: ImageRecord) -> ImageRecord:
    keep = (record.boxes[:, 2:] > record.boxes[:, :2]).all(axis=1)
    return record if keep.all() else record.only(keep)
