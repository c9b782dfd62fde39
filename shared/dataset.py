"""A torch data set of annotations, images and a detector's transform."""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

from shared.annotations import CocoAnnotations, ImageRecord
from shared.errors import UserError
from shared.seeding import seed_all
from shared.storage import ImageStorage

logger = logging.getLogger(__name__)

Transform = Callable[[Any, ImageRecord], Any]


def decode_rgb(data: bytes) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says: MMDetection and Detectron2 turn theirs too."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


class SampleKey(NamedTuple):
    """Which image, and in which epoch: what the sample's random numbers follow from."""

    epoch: int
    index: int


class CocoDetection(torch.utils.data.Dataset):
    """`dataset[SampleKey(epoch, index)]` is `transform(image, record)`; `dataset[index]` is that of epoch 0.

    The transform may draw from Python's, NumPy's and PyTorch's global generators: they are seeded from
    (seed, epoch, index) before it runs.

    Args:
        transform: takes an image, as `decode` gives it, and its `ImageRecord`.
        training: leave boxes without area out of the records.
        decode: from an image file's bytes to a PIL image, or an array (height, width, …).
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        images: ImageStorage,
        transform: Transform,
        seed: int,
        training: bool,
        decode: Callable[[bytes], Any] = decode_rgb,
    ):
        self.annotations = annotations
        self.images = images
        self.transform = transform
        self.seed = seed
        self.training = training
        self.decode = decode

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: SampleKey | int) -> Any:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, record = self.load(index)
        seed_all(self.seed, epoch, index)
        return transformed(self.transform, image, record)

    def load(self, index: int) -> tuple[Any, ImageRecord]:
        """The decoded image and its record.

        Raises:
            UserError: the image cannot be read, or has another size than the annotation file says.
        """
        record = self.annotations[index]
        image = read_image(self.images, record.file_name, f"image id {record.image_id}", self.decode)
        width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        if (width, height) != (record.width, record.height):
            raise UserError(
                f"{record.file_name} (image id {record.image_id}) has {width}×{height} pixels, and the "
                f"annotation file says {record.width}×{record.height}; correct the file or the image"
            )
        return image, _with_area_only(record) if self.training else record


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


def read_image(
    images: ImageStorage, file_name: str, name: str = "", decode: Callable[[bytes], Any] = decode_rgb
) -> Any:
    """The decoded image, by default a PIL image in RGB.

    Raises:
        UserError: it cannot be read or decoded.
    """
    try:
        data = images.read(file_name)
        if not data:
            raise ValueError("the file is empty")
        return decode(data)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file_name} ({name or images}) cannot be read as an image: {error}") from error


def check_images(annotations: CocoAnnotations, images: ImageStorage, where: str) -> None:
    """Raises UserError where image files are missing."""
    missing = images.missing(annotations.file_name(i) for i in range(len(annotations)))
    if missing:
        raise UserError(
            f"{where}: {len(missing)} of the {len(annotations)} images that the annotation file names are not "
            f"there, the first is {missing[0]}"
        )


def _with_area_only(record: ImageRecord) -> ImageRecord:
    keep = (record.boxes[:, 2:] > record.boxes[:, :2]).all(axis=1)
    if keep.all():
        return record
    return dataclasses.replace(
        record,
        boxes=record.boxes[keep],
        labels=record.labels[keep],
        areas=record.areas[keep],
        iscrowd=record.iscrowd[keep],
        file_boxes=record.file_boxes[keep],
        raw_segmentations=[raw for raw, kept in zip(record.raw_segmentations, keep, strict=True) if kept],
        keypoints=None if record.keypoints is None else record.keypoints[keep],
    )
