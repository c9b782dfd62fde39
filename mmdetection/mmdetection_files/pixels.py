"""The end of a pipeline, Normalize, Pad and DefaultFormatBundle, in one step: MMDetection's numbers, bit for bit.

A channel of an 8-bit image has at most 256 values after Normalize. With `data.fast_images` even these are made on
the device, and the host's samples stay of 8 bits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from mmcv import imnormalize
from mmdet.datasets.builder import PIPELINES

from shared.errors import UserError

logger = logging.getLogger(__name__)

_STEPS = ["Normalize", "Pad", "DefaultFormatBundle"]
_META = ("img_shape", "img_norm_cfg")  # of an image, of which the device makes its numbers


def with_quick_end(pipeline: Sequence[Any], fast: bool, where: str) -> list[Any]:
    """A pipeline's configs with those three steps as one, within MultiScaleFlipAug too; unchanged if they do not
    follow each other.

    Args:
        fast: leave the numbers to `Normalization`; where that cannot be, the log says why.
        where: of the log.
    """
    quick, why_not = _quick(list(pipeline), fast)
    if fast and why_not:
        logger.warning("data.fast_images does nothing for %s: %s", where, why_not)
    return quick


def _quick(steps: list[Any], fast: bool) -> tuple[list[Any], str | None]:
    """The steps, and why they are not fast."""
    kinds = [step["type"] if isinstance(step, dict) else "" for step in steps]
    if "MultiScaleFlipAug" in kinds:
        at = kinds.index("MultiScaleFlipAug")
        within, why_not = _quick(list(steps[at]["transforms"]), fast)
        return [*steps[:at], {**steps[at], "transforms": within}, *steps[at + 1 :]], why_not
    at = next((i for i in range(len(kinds)) if kinds[i : i + 3] == _STEPS), None)
    if at is None:
        return steps, f"its pipeline has no {', '.join(_STEPS)} one after the other"
    normalize, pad, bundle = ({**step} for step in steps[at : at + 3])
    collect = next((step for step in steps[at + 3 :] if isinstance(step, dict) and step["type"] == "Collect"), {})
    if not _pads_with_zeros(pad) or not _pads_with_zeros(bundle):
        return steps, "its pipeline pads images with another value than 0"
    why_not = None
    if any(key not in collect.get("meta_keys", _META) for key in _META):
        why_not = f"its Collect leaves out {' or '.join(_META)}"
    end = {"type": QuickEnd.__name__, "normalize": normalize, "pad": pad, "bundle": bundle}
    return [*steps[:at], {**end, "fast": fast and not why_not}, *steps[at + 3 :]], why_not


def _pads_with_zeros(step: dict[str, Any]) -> bool:
    value = step.get("pad_val", {})
    return (value.get("img", 0) if isinstance(value, dict) else value) == 0


@PIPELINES.register_module()
class QuickEnd:
    """Normalize, Pad and DefaultFormatBundle, given as their configs.

    Args:
        fast: the image stays (3, H, W) uint8, its channels in the order that Normalize has them in.
    """

    def __init__(self, normalize: dict[str, Any], pad: dict[str, Any], bundle: dict[str, Any], fast: bool):
        self.fast = fast
        self.normalize, self.pad = PIPELINES.build(normalize), PIPELINES.build(pad)
        self.bundle = PIPELINES.build({**bundle, "img_to_float": False} if fast else bundle)
        levels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(256, 1, 3)
        mean, std, to_rgb = self.normalize.mean, self.normalize.std, self.normalize.to_rgb
        in_color = len(mean) == len(std) == 3
        self.tables = np.ascontiguousarray(imnormalize(levels, mean, std, to_rgb)[:, 0].T) if in_color else None

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        image = results["img"]
        plain = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and self.tables is not None
        if not plain or list(results.get("img_fields", ["img"])) != ["img"]:
            return self.bundle(self.pad(self.normalize(results)))
        height, width = image.shape[:2]
        if self.fast and tuple(results["img_shape"][:2]) != (height, width):
            raise UserError(
                "data.fast_images: a step of the pipeline changes the image's size and not its img_shape. Fix: remove "
                "fast_images"
            )
        results["img_norm_cfg"] = {
            "mean": self.normalize.mean,
            "std": self.normalize.std,
            "to_rgb": self.normalize.to_rgb,
        }
        results = self.pad(results)
        planes = np.empty((3, *results["img"].shape[:2]), np.uint8 if self.fast else np.float32)
        channels = cv2.split(_straight(image))
        if self.normalize.to_rgb:
            channels = channels[::-1]
        for plane, channel, table in zip(planes, channels, self.tables, strict=True):
            if self.fast:
                plane[:height, :width] = channel
            else:
                cv2.LUT(channel, table, dst=plane[:height, :width])
        planes[:, height:] = 0
        planes[:, :height, width:] = 0
        results["img"] = planes.transpose(1, 2, 0)  # the bundle turns it back, and copies nothing
        return self.bundle(results)


def _straight(image: np.ndarray) -> np.ndarray:
    """The image in an order that OpenCV reads quickly: a flipped one is NumPy's view."""
    down, right = image.strides[0] < 0, image.strides[1] < 0
    if not (down or right):
        return image
    return cv2.flip(image[:: -1 if down else 1, :: -1 if right else 1], -1 if down and right else int(right))


class Normalization:
    """Makes on the device what Normalize and Pad make on the host, of a batch that has 8 bits; any other stays."""

    def __init__(self, device: torch.device):
        self.device = device
        self._on_device: dict[tuple[bytes, bytes], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, images: Any, metas: Any) -> Any:
        """Float32 of (B, 3, H, W) uint8 and B dicts, or of lists of such, where the test pipeline augments."""
        if isinstance(images, (list, tuple)):
            return [self(*parts) for parts in zip(images, metas, strict=True)]
        if images.dtype != torch.uint8:
            return images
        normalized = torch.zeros_like(images, dtype=torch.float32)
        for image, of_image, meta in zip(images, normalized, metas, strict=True):
            height, width = meta["img_shape"][:2]
            mean, factor = self._constants(meta["img_norm_cfg"])
            # OpenCV subtracts in float32, and multiplies by a float64
            visible = image[:, :height, :width].float().sub_(mean)
            of_image[:, :height, :width] = visible.double().mul_(factor)
        return normalized

    def _constants(self, config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        key = config["mean"].tobytes(), config["std"].tobytes()
        if key not in self._on_device:  # once: the host waits for such a copy
            factor = 1 / config["std"].astype(np.float64)
            self._on_device[key] = tuple(
                torch.as_tensor(values, device=self.device).view(3, 1, 1) for values in (config["mean"], factor)
            )
        return self._on_device[key]
