"""A detector's network alone, for `export --raw`. `detect_raw.py` has the steps around it, in NumPy."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from shared.errors import UserError
from shared.export.operations import Exportable, size_of


@dataclass(frozen=True)
class Decoding:
    """What `detect_raw.py` does before and after the network.

    Attributes:
        keeps_ratio: an image is resized to fit into the upper left of the input, and not to all of it.
        filter: Pillow's, "bilinear" or "bicubic".
        fill_color: RGB of the rest of the input.
        one_label: a place has its best category only; else each pair of a place and a category counts.
        candidates: the best ones that are looked at.
        iou_threshold: of NMS within each category; None without NMS.
        limit: the detections of an image.
        clips: boxes end at the image's edge.
    """

    keeps_ratio: bool
    filter: str
    fill_color: tuple[int, int, int]
    one_label: bool
    candidates: int
    iou_threshold: float | None
    limit: int
    clips: bool


class ExportableRaw(Exportable):
    """An exportable detector that can also be written as its network alone."""

    @abstractmethod
    def decoding(self) -> Decoding: ...

    @abstractmethod
    def places(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Each place's box and scores, before any of them is dropped.

        Args:
            images: (B, 3, H, W) uint8 RGB at the network's size.

        Returns:
            boxes (B, N, 4) as x1 y1 x2 y2 in pixels of the input, and scores (B, N, K) of each category.
        """


class Raw(Exportable):
    """The network alone: images at its size give the boxes and scores of all places."""

    outputs = ("boxes", "scores")

    def __init__(self, detector: ExportableRaw):
        super().__init__()
        self.detector, self.input_size = detector, detector.input_size
        self.decoding: dict[str, Any] = asdict(detector.decoding())

    def prepare(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, size_of(images)

    def detect(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        return self.detector.places(pixels)


def raw_of(detector: Exportable) -> Raw:
    """
    Raises:
        UserError: the detector has no decoder in NumPy, or the size of its input is not fixed.
    """
    if not isinstance(detector, ExportableRaw):
        raise UserError("--raw: this detector has no decoder in NumPy. Fix: export it without --raw")
    if detector.outputs != Exportable.outputs:
        raise UserError("--raw: the decoder in NumPy finds boxes alone. Fix: export it without --raw")
    if detector.input_size is None:
        raise UserError(
            "--raw: the size of the network's input follows from the image's. Fix: export it without --raw, or resize "
            "all images to one height and width"
        )
    return Raw(detector)
