"""A model of transformers from images to detections, as `export` writes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_transforms import center_to_corners_format

from detr_files.masks import has_masks
from shared.errors import UserError
from shared.export.operations import Decoding, ExportableRaw, check_filter, resize_as_pillow, size_of

_FILTERS = {Image.BILINEAR: "bilinear", Image.BICUBIC: "bicubic"}


class ExportableDetr(ExportableRaw):
    """The steps of the image processor, the model, and `post_process_object_detection`.

    Args:
        detector: transformers' model.
        processor: its image processor.

    Raises:
        UserError: the image processor does what an exported file cannot do.
    """

    def __init__(self, detector: PreTrainedModel, processor: Any):
        super().__init__()
        self.detector = detector
        self.size, self.resizes = processor.size, processor.do_resize
        if self.resizes and not (self.size.get("height") or self.size.get("shortest_edge")):
            raise UserError(
                f"hyperparameters.processor.size: an exported file cannot resize to {dict(self.size)}. Fix: give "
                "height and width, or shortest_edge and longest_edge"
            )
        if processor.do_pad and processor.pad_size is not None:
            raise UserError("hyperparameters.processor.pad_size: an exported file does not pad. Fix: remove it")
        self.filter = _FILTERS.get(processor.resample, str(processor.resample))
        check_filter(self.filter, "hyperparameters.processor.resample")
        if self.resizes and self.size.get("height"):
            self.input_size = (self.size["height"], self.size["width"])
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) / factor)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) / factor)
        self.uses_softmax, self.limit = _post_processing(processor, detector)
        if has_masks(detector.config):
            self.outputs = (*self.outputs, "image_masks")

    def prepare(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = images.float()
        if self.resizes:
            pixels = resize_as_pillow(images, *self._new_size(*images.shape[-2:]), self.filter)
        return (pixels - self.mean) / self.std, size_of(images)

    def _new_size(self, height: int, width: int) -> tuple[int, int]:
        if self.input_size is not None:
            return self.input_size
        short, long = torch.sym_min(height, width), torch.sym_max(height, width)
        least, most = self.size["shortest_edge"], self.size.get("longest_edge")
        if most is None:
            return least * height // short, least * width // short
        # the longest edge limits both sides, and the short one is rounded
        return tuple(
            torch.sym_min(least * side // short, (2 * most * side + long) // (2 * long)) for side in (height, width)
        )

    def detect(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        outputs = self.detector(pixel_values=pixels)
        logits, boxes = outputs.logits, outputs.pred_boxes
        classes = logits.shape[-1]
        if self.uses_softmax:
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
            scores, rows = scores.topk(self.limit, dim=1)
            labels = labels.gather(1, rows)
        else:
            scores, places = logits.sigmoid().flatten(1).topk(self.limit, dim=1)
            rows, labels = places // classes, places % classes
        boxes = center_to_corners_format(boxes).gather(1, rows[..., None].expand(-1, -1, 4))
        masks = ()
        if "image_masks" in self.outputs:
            of_queries = outputs.pred_masks
            masks = (of_queries.gather(1, rows[..., None, None].expand(-1, -1, *of_queries.shape[2:])),)
        return boxes * sizes.flip(0).repeat(2), scores, labels, *masks

    def decoding(self) -> Decoding:
        return Decoding(
            keeps_ratio=False,
            filter=self.filter,
            fill_color=(0, 0, 0),
            one_label=self.uses_softmax,
            candidates=self.limit,
            iou_threshold=None,
            limit=self.limit,
            clips=False,
        )

    def places(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.detector(pixel_values=(images.float() - self.mean) / self.std)
        scores = outputs.logits.softmax(-1)[..., :-1] if self.uses_softmax else outputs.logits.sigmoid()
        size = torch.tensor(self.input_size, dtype=torch.float32).flip(0).repeat(2)
        return center_to_corners_format(outputs.pred_boxes) * size, scores


def _post_processing(processor: Any, detector: PreTrainedModel) -> tuple[bool, int]:
    """Whether an image processor computes scores by softmax, and how many detections it keeps."""
    queries = getattr(detector.config, "num_queries", None) or detector.config.num_detection_tokens
    logits, boxes = torch.ones(1, queries, detector.config.num_labels), torch.ones(1, queries, 4)
    (found,) = processor.post_process_object_detection(SimpleNamespace(logits=logits, pred_boxes=boxes), 0.0)
    return not torch.allclose(found["scores"][0], torch.ones(()).sigmoid()), len(found["scores"])
