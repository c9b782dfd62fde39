"""Instance masks of RF-DETR: training targets, losses that do not depend on the number of ranks, and detections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import distributed
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig
from transformers.loss.loss_rf_detr import RfDetrHungarianMatcher, RfDetrImageLoss

from detr_files.denoising import Ranks
from shared.data.annotations import ImageRecord
from shared.errors import UserError
from shared.evaluation.detections import as_rle, encode, masks_at_once

# by model type: transformers' model with masks, and the one of boxes alone
_ARCHITECTURES = {"rf_detr": ("RfDetrForInstanceSegmentation", "RfDetrForObjectDetection")}


def has_masks(config: PreTrainedConfig) -> bool:
    """Whether the config's model finds an instance mask for each box."""
    with_masks, _ = _ARCHITECTURES.get(config.model_type, (None, None))
    return with_masks in (config.architectures or ())


def choose_architecture(config: PreTrainedConfig, masks: bool | None) -> None:
    """Makes the config one of a model with or without masks; None leaves it.

    Raises:
        UserError: the model type has no masks.
    """
    if masks and config.model_type not in _ARCHITECTURES:
        raise UserError(
            f"hyperparameters.masks: {config.model_type!r} has no instance masks here. Fix: choose a model of "
            f"{' or '.join(_ARCHITECTURES)}, or set it to null"
        )
    if masks is not None and config.model_type in _ARCHITECTURES:
        config.architectures = [_ARCHITECTURES[config.model_type][0 if masks else 1]]


# --- training targets -------------------------------------------------------------------------------------


def masks_of(record: ImageRecord, rows: np.ndarray, size: tuple[int, int], processor: Any) -> torch.Tensor:
    """(N, h, w) bool: the masks of some objects at the size of the input, as transformers' image processor resizes.

    Args:
        rows: positions of the objects, which have a segmentation.
        size: h and w, without padding.
    """
    if not len(rows):
        return torch.zeros(0, *size, dtype=torch.bool)
    whole = record.height, record.width
    decoded = [coco_mask.decode(as_rle(record.segmentations[row], *whole)) for row in rows]
    masks = torch.from_numpy(np.stack(decoded)).bool()
    return processor.resize_annotation({"masks": masks}, whole, size)["masks"]


# --- losses -----------------------------------------------------------------------------------------------


@contextmanager
def scalar_mask_losses() -> Iterator[None]:
    """Inside, the mask losses of a batch without objects are 0. transformers gives them the shape of no masks."""
    compute = RfDetrImageLoss.loss_masks

    def scalars(loss: RfDetrImageLoss, *arguments: Any) -> dict[str, torch.Tensor]:
        return {name: value.sum() for name, value in compute(loss, *arguments).items()}

    with mock.patch.object(RfDetrImageLoss, "loss_masks", scalars):
        yield


@contextmanager
def points_as_one_rank(labels: Sequence[Mapping[str, torch.Tensor]], queries: int, ranks: Ranks) -> Iterator[None]:
    """Inside, masks are compared at this rank's part of the random points of the whole batch. All ranks enter it.

    transformers draws the same points for all masks to assign boxes, and points for each assigned mask in the losses.

    Args:
        queries: of an image, in one group.
    """
    device = labels[0]["boxes"].device
    matched = torch.zeros(ranks.slots, dtype=torch.int64, device=device)
    matched[ranks.rank] = sum(min(len(label["class_labels"]), queries) for label in labels)
    distributed.all_reduce(matched)
    before, everywhere = int(matched[: ranks.rank].sum()), int(matched.sum())
    generator = torch.Generator(device)
    generator.set_state(ranks.random_state)
    match, compute = RfDetrHungarianMatcher.forward, RfDetrImageLoss.loss_masks

    def match_as_one(
        matcher: RfDetrHungarianMatcher, outputs: Mapping[str, torch.Tensor], *arguments: Any, **named: Any
    ) -> Any:
        images, count, sides = outputs["pred_boxes"].shape
        ratio = matcher.mask_point_sample_ratio

        def points(one: int, number: int, *rest: int) -> torch.Tensor:
            if number == images * count * sides // ratio:  # their number follows from the size of the batch
                number = images * ranks.slots * count * sides // ratio
            return torch.rand(one, number, *rest, device=device, generator=generator)

        with _Draws(points):
            return match(matcher, outputs, *arguments, **named)

    def compute_as_one(loss: RfDetrImageLoss, *arguments: Any) -> dict[str, torch.Tensor]:
        groups = loss.group_detr

        def points(own: int, *rest: int) -> torch.Tensor:
            whole = torch.rand(everywhere * groups, *rest, device=device, generator=generator)
            return whole[before * groups : before * groups + own]

        with _Draws(points):
            return compute(loss, *arguments)

    with (
        mock.patch.object(RfDetrHungarianMatcher, "forward", match_as_one),
        mock.patch.object(RfDetrImageLoss, "loss_masks", compute_as_one),
    ):
        yield


class _Draws(TorchFunctionMode):
    """`torch.rand(*size, device=…)` is `points(*size)`."""

    def __init__(self, points: Callable[..., torch.Tensor]):
        super().__init__()
        self.points = points

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is torch.rand:
            return self.points(*arguments)  # a mode is not active inside of itself
        return function(*arguments, **(named or {}))


# --- detections -------------------------------------------------------------------------------------------


def found_masks(logits: torch.Tensor, masks: torch.Tensor, size: tuple[int, int]) -> list[dict]:
    """COCO's RLE of an image's detections, in the order of `post_process_object_detection` with threshold 0.

    Args:
        logits: (Q, K) of classes.
        masks: (Q, h, w) logits.
        size: height and width of the image.
    """
    queries, classes = logits.shape
    scores, places = logits.sigmoid().flatten().topk(queries)
    rows = (places // classes)[scores > 0]
    encoded: list[dict] = []
    for part in masks[rows].split(masks_at_once(*size)):
        whole = functional.interpolate(part[:, None].float(), size, mode="bilinear", align_corners=False)
        encoded += encode(whole[:, 0] > 0)
    return encoded
