"""What an exported detector computes around its network, in operations that every runtime has: resizing, NMS."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError


class Exportable(nn.Module, ABC):
    """A detector from images to detections, for `export`. A detector subclasses it, and defines `prepare` and `detect`.

    It takes (B, 3, H, W) uint8 RGB images of one size, and returns tensors in the order of `outputs`:

    - boxes: (B, N, 4) float32, x1 y1 x2 y2 in pixels of the images.
    - scores: (B, N) float32, the best first. Rows with score 0 are no detections.
    - labels: (B, N) int64, 0 to K-1.
    - masks: (B, N, S, S) float32, the probability that a point of the box belongs to the object.
    - image_masks: instead of these, (B, N, h, w) float32, above 0 if a point of the image belongs to the object.

    Attributes:
        outputs: the names of what `forward` returns.
        input_size: (height, width) of the network's input; None if it follows from the image.
    """

    outputs: tuple[str, ...] = ("boxes", "scores", "labels")
    input_size: tuple[int, int] | None = None

    @abstractmethod
    def prepare(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input, and the sizes that `detect` needs, such as `size_of(images)`: float32."""

    @abstractmethod
    def detect(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """The detections, of what `prepare` returns."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.detect(*self.prepare(images))


def check_rules(parts: Sequence[Any], rules: Mapping[type, Sequence[str]], key: str, fix: str) -> None:
    """Raises UserError if a part of a detector computes in a way that its export does not repeat.

    Args:
        rules: by kind of part, the methods that the export repeats. The first kind that fits counts.
    """
    for part in parts:
        kind = next((kind for kind in rules if isinstance(part, kind)), None)
        if kind is None or any(getattr(type(part), name) is not getattr(kind, name) for name in rules[kind]):
            name = type(parts[0] if part is None else part).__name__
            raise UserError(f"{key}: {name} cannot be exported: it uses its own box or mask decoding. {fix}")


def as_list(modules: nn.Module | nn.ModuleList) -> list[nn.Module]:
    """The modules of each stage of a cascade, or the only one."""
    return list(modules) if isinstance(modules, nn.ModuleList) else [modules]


def size_of(images: Tensor) -> Tensor:
    """(2,) float32, height and width of (B, 3, H, W) images."""
    return as_tensor(*images.shape[-2:])


def as_tensor(*numbers: int) -> Tensor:
    """(numbers,) float32, of numbers that may follow from the image."""
    return torch.stack([torch.ones(()) * number for number in numbers])


def within(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """The (height, width) of an image that is resized until its short side is `short`, or its long one `long` if that
    is smaller. Rounded."""
    least, most = torch.sym_min(height, width), torch.sym_max(height, width)
    return tuple(
        torch.sym_min((2 * side * long + most) // (2 * most), (2 * side * short + least) // (2 * least))
        for side in (height, width)
    )


# --- resizing ---------------------------------------------------------------------------------------

_FILTERS = ("bilinear", "bicubic")  # of Pillow


def check_filter(name: str, key: str) -> None:
    """Raises UserError if no exported file can resize by that filter of Pillow."""
    if name not in _FILTERS:
        raise UserError(f"{key}: an exported file cannot resize by {name!r}. Fix: {' or '.join(_FILTERS)}")


def resize_as_pillow(images: Tensor, height: int, width: int, name: str = "bilinear") -> Tensor:
    """(B, 3, H, W) of whole numbers to (B, 3, height, width), as Pillow resizes: columns, then rows, each rounded to 8
    bits. A level of a pixel can differ by 1, because Pillow's weights are rounded.

    A resize is two matrix products. So it has the same result in every runtime, for images of any size. ONNX Runtime
    has the operation itself, which is five times as fast.
    """
    if _resizes_in_onnx and name == "bilinear":
        return torch.ops.exported.resized(images, height, width).float()
    return _by_products(images, height, width, name)


def _by_products(images: Tensor, height: int, width: int, name: str) -> Tensor:
    wide = images.float() @ _pillow_weights(images.shape[-1], width, name).T
    wide = (wide + 0.5).floor().clamp(0, 255)
    return (_pillow_weights(images.shape[-2], height, name) @ wide + 0.5).floor().clamp(0, 255)


def _pillow_weights(size: int, new: int, name: str) -> Tensor:
    """(new, size) how much each pixel of a row counts for each new one."""
    scale = size / new
    centers = (torch.arange(new, dtype=torch.float32) + 0.5) * scale
    pixels = torch.arange(size, dtype=torch.float32) + 0.5
    away = (pixels[None] - centers[:, None]).abs() / torch.sym_max(scale, 1.0)
    if name == "bilinear":
        weights = (1 - away).clamp(min=0)
    else:
        near = (1.5 * away - 2.5) * away * away + 1
        far = ((-0.5 * away + 2.5) * away - 4) * away + 2
        weights = torch.where(away < 1, near, torch.where(away < 2, far, torch.zeros_like(away)))
    return weights / weights.sum(1, keepdim=True)


def resize_as_opencv(images: Tensor, height: int, width: int) -> Tensor:
    """The same as OpenCV resizes with INTER_LINEAR: between the two nearest pixels of each row and column."""
    resized = F.interpolate(images.float(), (height, width), mode="bilinear", align_corners=False)
    return (resized + 0.5).floor().clamp(0, 255)


def inside(height: int, width: int, most_height: int, most_width: int) -> tuple[int, int]:
    """The largest (height, width) of an image's shape that fits into another one."""
    fitted = (
        torch.sym_min(most_height, height * most_width // width),
        torch.sym_min(most_width, width * most_height // height),
    )
    return torch.sym_max(fitted[0], 1), torch.sym_max(fitted[1], 1)


# --- boxes of a level of features -------------------------------------------------------------------


def best_pairs(scores: Tensor, count: int, score_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of a place and a label, at most `count`.

    Args:
        scores: (B, places, labels).
        score_threshold: pairs must be above it.

    Returns:
        scores with 0 for no pair, places and labels: (B, count) each.
    """
    places, labels = scores.shape[1:]
    # a small level has fewer pairs than that: zeros are no detections
    best, pairs = F.pad(scores.flatten(1), (0, count)).topk(count, dim=1)
    best = torch.where(best > score_threshold, best, torch.zeros_like(best))
    return best, torch.minimum(pairs // labels, torch.ones_like(pairs) * (places - 1)), pairs % labels


# --- features and masks of regions ------------------------------------------------------------------


def pool_regions(features: Sequence[Tensor], boxes: Tensor, layers: Sequence[Any], bounds: Sequence[float]) -> Tensor:
    """(B * N, C, S, S) features of (B, N, 4) boxes, by RoIAlign on one level of a pyramid each.

    Args:
        features: (B, C, H, W) of each level.
        layers: the library's RoIAlign of each level.
        bounds: (levels - 1) how large the square root of a box's area is, at least, on the levels after the first.
    """
    from torchvision.ops import roi_align

    images = torch.arange(boxes.shape[0], dtype=boxes.dtype)[:, None, None].expand(-1, boxes.shape[1], 1)
    images, corners = images.reshape(-1, 1), boxes.reshape(-1, 4)
    sides = (corners[:, 2:] - corners[:, :2]).prod(1, keepdim=True).sqrt()
    levels = sum((sides >= bound for bound in bounds), torch.zeros_like(sides, dtype=torch.int64))
    pooled = []
    for level, (of_level, layer) in enumerate(zip(features, layers, strict=True)):
        is_here = levels == level
        regions = torch.where(is_here, corners, torch.zeros_like(corners))  # an empty box takes no samples, so no time
        arguments = layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned
        found = roi_align(of_level, torch.cat([images, regions], 1), *arguments)
        pooled.append(torch.where(is_here[..., None, None], found, torch.zeros_like(found)))
    return sum(pooled[1:], pooled[0])


def of_labels(masks: Tensor, labels: Tensor) -> Tensor:
    """(B, N, S, S) of (B * N, K, S, S) masks: that of each region's label, or the only one if K is 1."""
    if masks.shape[1] > 1:
        masks = masks.gather(1, labels.reshape(-1, 1, 1, 1).expand(-1, 1, *masks.shape[2:]))
    return masks.reshape(*labels.shape, *masks.shape[2:])


# --- non-maximum suppression ------------------------------------------------------------------------

_to_onnx = _resizes_in_onnx = False


@contextlib.contextmanager
def operations_of_onnx(resizes: bool) -> Iterator[None]:
    """In the block, `best_boxes` is traced with the operation that `onnx_translations` translates.

    Args:
        resizes: so is `resize_as_pillow`. OpenVINO has no such operation.
    """
    global _to_onnx, _resizes_in_onnx
    _register()
    _to_onnx, _resizes_in_onnx = True, resizes
    try:
        yield
    finally:
        _to_onnx = _resizes_in_onnx = False


def best_boxes(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy NMS within each image and label, and the `limit` best of what stays.

    Args:
        boxes: (B, N, 4) x1 y1 x2 y2.
        scores, labels: (B, N).
        limit: at most N.

    Returns:
        boxes (B, limit, 4), scores (B, limit) with 0 for no detection, and labels (B, limit).
    """
    # boxes of different labels do not overlap: each label has its own rows
    positive = boxes - boxes.min()
    down = labels.to(boxes.dtype) * (positive.max() + 1)
    apart = positive + torch.stack([torch.zeros_like(down), down] * 2, -1)
    top_scores, top = _kept_scores(apart, scores, iou_threshold, 0.0, limit).topk(limit, dim=1)
    return boxes.gather(1, top[..., None].expand(-1, -1, 4)), top_scores, labels.gather(1, top)


def best_of_classes(
    boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int, score_threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for regions that have a score of each class: NMS within each image and class.

    Args:
        boxes: (B, N, K, 4), or (B, N, 1, 4) if a region has the same box in all classes.
        scores: (B, N, K).

    Returns:
        boxes (B, limit, 4), scores (B, limit) with 0 for no detection, and labels (B, limit).
    """
    regions, classes = scores.shape[1:]
    limit = min(limit, regions * classes)
    boxes, scores = boxes.expand(-1, -1, classes, -1).transpose(1, 2), scores.transpose(1, 2)
    kept = _kept_scores(boxes.flatten(0, 1), scores.flatten(0, 1), iou_threshold, score_threshold, limit)
    top_scores, top = kept.reshape(-1, classes * regions).topk(limit, dim=1)
    return boxes.flatten(1, 2).gather(1, top[..., None].expand(-1, -1, 4)), top_scores, top // regions


def _kept_scores(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, limit: int) -> Tensor:
    """(B, N) the scores of boxes that no better one of the row suppresses, and 0 of the others."""
    find = torch.ops.exported.kept if _to_onnx else _kept
    kept = find(boxes, scores, iou_threshold, score_threshold, limit)
    return torch.where(kept & (scores > score_threshold), scores, torch.zeros_like(scores))


def _kept(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, limit: int) -> Tensor:
    """(B, N) bool: whether no box with a higher score suppresses the box. By torchvision's operation."""
    from torchvision.ops import nms

    batch, count = scores.shape
    # nor do boxes of different images: each has its own columns
    across = torch.arange(batch, device=boxes.device, dtype=boxes.dtype) * (boxes.max() - boxes.min() + 1)
    across = torch.stack([across, torch.zeros_like(across)] * 2, -1)
    boxes, scores = (boxes + across[:, None]).reshape(-1, 4), scores.reshape(-1)
    rows = (scores > score_threshold).nonzero()[:, 0]
    kept = rows[nms(boxes[rows], scores[rows], iou_threshold)]
    flat = torch.zeros(batch * count, dtype=torch.bool, device=boxes.device)
    return flat.index_fill(0, kept, True).reshape(batch, count)


@functools.cache
def _register() -> None:
    """Defines the operations that `onnx_translations` translates. torch 2.3 lacks what it needs."""
    operation = torch.library.custom_op("exported::kept", _kept, mutates_args=())

    @operation.register_fake
    def _(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, limit: int) -> Tensor:
        return torch.empty_like(scores, dtype=torch.bool)

    operation = torch.library.custom_op("exported::resized", _resized, mutates_args=())

    @operation.register_fake
    def _(images: Tensor, height: int, width: int) -> Tensor:
        return images.new_empty((*images.shape[:2], height, width))


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    return _by_products(images, height, width, "bilinear").to(images.dtype)


def onnx_translations() -> dict:
    """For `torch.onnx.export` in a block of `operations_of_onnx`: NMS and Pillow's resizing by ONNX's own operations.
    That NMS handles images by themselves, and stops at `limit`."""
    from onnxscript import opset18 as op

    def kept(boxes, scores, iou_threshold: float, score_threshold: float, limit: int):  # noqa: ANN001, ANN202
        selected = op.NonMaxSuppression(
            boxes,
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            op.Constant(value_ints=[limit]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[score_threshold]),
        )
        places = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
        ones = op.Expand(op.Constant(value_floats=[1.0]), op.Shape(places, end=1))
        nothing = op.Mul(scores, op.Constant(value_floats=[0.0]))
        return op.Cast(op.ScatterND(nothing, places, ones), to=9)  # BOOL

    def resized(images, height, width):  # noqa: ANN001, ANN202
        one = op.Constant(value_ints=[1])
        sizes = op.Concat(op.Shape(images, end=2), op.Reshape(height, one), op.Reshape(width, one), axis=0)
        return op.Resize(images, None, None, sizes, mode="linear", antialias=1, exclude_outside=1)

    def is_all_true(values):  # noqa: ANN001, ANN202
        return op.Cast(op.ReduceMin(op.Cast(values, to=6), keepdims=0), to=9)

    return {
        torch.ops.exported.kept.default: kept,
        torch.ops.exported.resized.default: resized,
        torch.ops.aten._is_all_true.default: is_all_true,
    }


# --- the network alone, for `export --raw` ----------------------------------------------------------


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
