"""The PyTorch data set of annotations, images and a detector's transform, and its random numbers.

Random numbers follow from what they are for, not from what was drawn before. So a resumed run, another number of loader
workers or another number of slots draws the same numbers for the same sample.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from shared.data.annotations import CocoAnnotations, ImageRecord
from shared.data.images import BadImageError, read_image
from shared.data.storage import ImageStorage
from shared.errors import UserError, problem_of

logger = logging.getLogger(__name__)

Transform = Callable[[Any, ImageRecord], Any]
Loaded = tuple[Any, ImageRecord]


def seed_all(*key: int) -> None:
    """Seeds Python, NumPy and PyTorch (on the CPU and the current device) from `key`, non-negative integers."""
    words = np.random.SeedSequence(key).generate_state(4, dtype=np.uint64).tolist()
    random.seed(words[0])
    np.random.seed(words[1] & 0xFFFFFFFF)
    torch.default_generator.manual_seed(words[2] >> 1)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(words[3] >> 1)


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Restores the state of all random generators at the end of the block."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


class Augmenter(Protocol):
    """What changes training images at random. `load` and `other` give the image of an index and its record."""

    def loaded(self, index: int, load: Callable[[int], Loaded]) -> Loaded:
        """`load(index)`, or what it gave lately."""

    def __call__(
        self,
        image: Any,
        record: ImageRecord,
        key: SampleKey,
        seed: int,
        other: Callable[[int], Loaded | None],
        count: int,
    ) -> Loaded:
        """The changed image and its record. `count` is the number of images."""


class SampleKey(NamedTuple):
    """The epoch, the image's index, and which of its copies in the epoch: the seeds of a sample.

    `others` are indices of images that the sample may be combined with.
    """

    epoch: int
    index: int
    copy: int = 0
    others: tuple[int, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        return (self.epoch, self.index, self.copy, 4) if self.copy else (self.epoch, self.index)


@dataclass
class BadImages:
    """What happens to images that cannot be read: `data.on_bad_image`.

    Attributes:
        skip: skip them; else the first one stops the run.
        skipped: ids of the images skipped since the last `take` in this process, which usually is a loader worker.
    """

    skip: bool = False
    skipped: list[int] = field(default_factory=list)
    _known: set[int] = field(default_factory=set)

    def leave_out(self, error: BadImageError, image_id: int) -> None:
        """Notes the image, or raises the error if bad images are not skipped."""
        if not self.skip:
            raise error
        self.skipped.append(image_id)
        if image_id not in self._known:
            self._known.add(image_id)
            logger.warning("skipped: %s", problem_of(error))

    def take(self) -> list[int]:
        """The ids noted since the last call."""
        taken, self.skipped = self.skipped, []
        return taken


@dataclass(eq=False)
class CocoDetection(torch.utils.data.Dataset):
    """`dataset[SampleKey(epoch, index)]` is `transform(image, record)`; `dataset[index]` is that of epoch 0.

    The transform may draw from the global generators of Python, NumPy and PyTorch. They are seeded from the seed and
    the sample's key before it runs.

    Attributes:
        transform: takes an image, as `decode` returns it, and its `ImageRecord`.
        training: omit boxes without area from the records.
        bad_images: what happens to images that cannot be read. The next image of the same size replaces a skipped one,
            so batches keep their size, and are the same in every run. Without one, an image of the same shape (wide or
            not) replaces it: the same image for all of that size, because a batch may have one size.
        decode: takes the bytes of an 8-bit image, and returns what `transform` takes. None for a PIL image in RGB.
        in_use: indices that may replace another; None for all.
        replaces: replace a skipped image. Without it, a skipped image gives None.
        augmenter: changes images and records before `transform`, see `shared.data.augment.augmenter`.
    """

    annotations: CocoAnnotations
    images: ImageStorage
    transform: Transform
    seed: int
    training: bool
    bad_images: BadImages | None = None
    decode: Callable[[bytes], Any] | None = None
    in_use: np.ndarray | None = None
    replaces: bool = True
    augmenter: Augmenter | None = None

    def __post_init__(self) -> None:
        self.bad_images = self.bad_images or BadImages()

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: SampleKey | int) -> Any:
        key = key if isinstance(key, SampleKey) else SampleKey(0, key)
        return self._first_readable(key.index, lambda index: self._sample(index, key))

    def augmented(self, index: int, key: SampleKey) -> Loaded:
        """The input of a sample's transform. Afterwards the global generators are seeded for the sample.

        Args:
            index: position of the image: `key.index`, or of the image that replaces it.
        """
        image, record = self.load(index) if self.augmenter is None else self.augmenter.loaded(index, self.load)
        seed_all(self.seed, *key.seeds)
        if self.augmenter is None:
            return image, record

        def other(index: int) -> Loaded | None:
            return self._first_readable(index, lambda index: self.augmenter.loaded(index, self.load))

        changed = functools.partial(self.augmenter, key=key, seed=self.seed, other=other, count=len(self))
        return transformed(changed, image, record)

    def _sample(self, index: int, key: SampleKey) -> Any:
        return transformed(self.transform, *self.augmented(index, key))

    def _first_readable(self, index: int, get: Callable[[int], Any]) -> Any:
        """`get(index)`. If the image is bad and `bad_images` skips it, that of its replacement, or None without one."""
        for candidate in self._candidates(index):
            try:
                return get(candidate)
            except BadImageError as error:
                self.bad_images.leave_out(error, int(self.annotations.image_ids[candidate]))
                if not self.replaces:
                    return None
        raise UserError(
            f"{self.annotations.path}: none of the images that it names can be read; the lines above show why. Fix: "
            "check the images' folder"
        )

    def load(self, index: int) -> tuple[Any, ImageRecord]:
        """The decoded image and its record.

        Raises:
            BadImageError: the image cannot be read, or has another size than in the annotation file.
        """
        record = self.annotations[index]
        size = (record.width, record.height)
        image = read_image(self.images, record.file_name, size, f"image id {record.image_id}", self.decode)
        has_area = (record.boxes[:, 2:] > record.boxes[:, :2]).all(axis=1)
        return image, record.only(has_area) if self.training and not has_area.all() else record

    def _candidates(self, index: int) -> Iterator[int]:
        """The image, and then its possible replacements in order."""
        yield index
        widths, heights = self.annotations.columns["widths"], self.annotations.columns["heights"]
        alike = self._by_shape[int(widths[index] > heights[index])]
        is_as_large = (widths[alike] == widths[index]) & (heights[alike] == heights[index])
        as_large, others = alike[is_as_large], alike[~is_as_large]
        for group, after in ((as_large, index), (others, as_large[0] if len(as_large) else index)):
            start = np.searchsorted(group, after, side="right")
            yield from (int(other) for other in np.roll(group, -start) if other != index)

    @cached_property
    def _by_shape(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted indices in use: of images that are not wide, and of wide ones."""
        in_use = np.arange(len(self)) if self.in_use is None else np.unique(self.in_use)
        wide = (self.annotations.columns["widths"] > self.annotations.columns["heights"])[in_use]
        return in_use[~wide], in_use[wide]


def transformed(transform: Transform, image: Any, record: ImageRecord) -> Any:
    """`transform(image, record)`.

    Raises:
        UserError: it fails, mostly because of odd annotations; names the image.
    """
    try:
        return transform(image, record)
    except UserError:
        raise
    except Exception as error:  # libraries fail in many ways
        raise UserError(
            f"{record.file_name} (image id {record.image_id}) cannot be made a sample ({type(error).__name__}: "
            f"{error}). Fix: check its annotations"
        ) from error
