"""Transforms by name, `data.augment.transforms`: torchvision's transforms v2, or Albumentations' if installed.

A transform takes and gives the image with its boxes, masks and keypoints. Each is tried once before the training.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from shared.data.annotations import CocoAnnotations, ImageRecord
from shared.data.augment.placement import Drawn, Layout, Picture, Placement, as_raw, decoded_rle, filled, with_boxes
from shared.errors import UserError, nearest

_KEY = "data.augment.transforms"
_ALBUMENTATIONS = "albumentations."
# From pixels (H, W, 3), boxes (N, 4), masks (N, H, W) or None, points (P, 2) or None, and a seed for libraries with
# random numbers of their own. To pixels, the rows that remain, their boxes and masks, and all points.
Change = Callable[[np.ndarray, np.ndarray, Any, np.ndarray | None, int], tuple]


class NamedTransforms:
    """Calls the transforms in the order of the config.

    Args:
        named: (name, arguments) of each.
        layout: a result of another size is fitted into the input again.

    Raises:
        UserError: a name is unknown, or a transform does not accept its arguments or images with boxes.
    """

    def __init__(self, named: Sequence[tuple[str, dict[str, Any]]], layout: Layout):
        self.layout = layout
        self.steps: list[tuple[str, Change]] = []
        for name, arguments in named:
            build = _of_albumentations if name.startswith(_ALBUMENTATIONS) else _of_torchvision
            self.steps.append((name, build(name, arguments)))
            with torch.random.fork_rng(devices=[]):
                _try(*self.steps[-1])

    def __call__(self, pixels: np.ndarray, record: ImageRecord, seed: int) -> Drawn:
        """The changed image and its record."""
        canvas = pixels.shape[1], pixels.shape[0]
        for name, change in self.steps:
            pixels, record = _changed(name, change, pixels, record, seed)
        if (pixels.shape[1], pixels.shape[0]) != canvas:
            picture, fitted = Picture(np.ascontiguousarray(pixels)), filled(canvas, self.layout.fill)
            size = np.minimum(self.layout.fit(*picture.size), canvas).tolist()
            placement = Placement((0, 0, *picture.size), (0, 0, *size))
            placement.draw(picture, fitted)
            has_masks = any(segmentation is not None for segmentation in record.segmentations)
            pixels, record = fitted, placement.record(record, canvas, has_masks)
        return pixels, record


def _try(name: str, change: Change) -> None:
    """Raises UserError if the transform does not give an image and boxes for them."""
    coco = {
        "images": [{"id": 1, "file_name": "", "width": 32, "height": 32}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 16, 16]}],
        "categories": [{"id": 1, "name": ""}],
    }
    try:
        _changed(name, change, np.zeros((32, 32, 3), np.uint8), CocoAnnotations.from_dict(coco)[0], 0)
    except UserError:
        raise
    except Exception as error:  # transforms fail in many ways
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{_KEY}: {name} cannot change an image with boxes ({message}). Fix: remove it") from error


def _changed(name: str, change: Change, pixels: np.ndarray, record: ImageRecord, seed: int) -> Drawn:
    """The image and its record after a transform, without the objects that lie outside of the image."""
    segmentations, points, masks = record.segmentations, record.keypoints, None
    if any(segmentation is not None for segmentation in segmentations):
        empty = np.zeros((record.height, record.width), np.uint8)
        masks = np.stack([empty if each is None else decoded_rle(each) for each in segmentations])
    flat = None if points is None else points[..., :2].reshape(-1, 2)
    pixels, rows, boxes, masks, at = change(np.ascontiguousarray(pixels), record.boxes.copy(), masks, flat, seed)
    if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
        raise UserError(f"{_KEY}: {name} does not give 8-bit RGB images. Fix: remove it, the detector normalizes")
    size = pixels.shape[1], pixels.shape[0]
    boxes = np.clip(np.asarray(boxes, np.float64).reshape(-1, 4), 0, np.tile(size, 2))
    kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1))
    rows = rows[kept]
    changed = with_boxes(record.only(rows), boxes[kept], size)
    if masks is not None:
        raw = [b"" if segmentations[row] is None else as_raw(masks[i]) for i, row in zip(kept, rows, strict=True)]
        changed = dataclasses.replace(changed, raw_segmentations=raw)
    if points is not None:
        at = np.asarray(at, np.float64).reshape(*points.shape[:2], 2)[rows]
        visibility = points[rows][..., 2:]
        inside = ((at >= 0) & (at <= size)).all(axis=-1, keepdims=True) & (visibility > 0)
        keypoints = np.where(inside, np.concatenate([at, visibility], axis=-1), 0.0)
        changed = dataclasses.replace(changed, keypoints=keypoints)
    return pixels, changed


# --- torchvision --------------------------------------------------------------------------------------


def _of_torchvision(name: str, arguments: dict[str, Any]) -> Change:
    known = [each for each, kind in vars(v2).items() if inspect.isclass(kind) and issubclass(kind, v2.Transform)]
    if name not in known:
        raise UserError(
            f"{_KEY}: {name!r} is not a transform of torchvision"
            f"{nearest(name, known, f'name one of torchvision.transforms.v2, or {_ALBUMENTATIONS}NAME')}"
        )
    arguments, kind = dict(arguments), getattr(v2, name)
    has_probability = "p" in inspect.signature(kind).parameters
    probability = None if has_probability else arguments.pop("p", None)
    transform = _built(name, kind, arguments)
    if probability is not None:
        transform = v2.RandomApply([transform], p=probability)

    def change(pixels: np.ndarray, boxes: np.ndarray, masks: Any, points: np.ndarray | None, seed: int) -> tuple:
        size = pixels.shape[:2]
        given: dict[str, Any] = {
            "image": tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)),
            "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=size),
            "labels": torch.arange(len(boxes)),  # which objects remain
        }
        if masks is not None:
            given["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        if points is not None:
            given["keypoints"] = _as_key_points(name, points, size)
        found = transform(given)
        image = found["image"].permute(1, 2, 0).contiguous().numpy()
        masks, points = (found[key].numpy() if key in found else None for key in ("masks", "keypoints"))
        return image, found["labels"].numpy(), found["boxes"].numpy(), masks, points

    return change


def _as_key_points(name: str, points: np.ndarray, size: tuple[int, int]) -> Any:
    if not hasattr(tv_tensors, "KeyPoints"):
        raise UserError(f"{_KEY}: {name} needs torchvision 0.23 for keypoints. Fix: install it, or remove {name}")
    return tv_tensors.KeyPoints(torch.from_numpy(points), canvas_size=size)


def _built(name: str, kind: type, arguments: dict[str, Any]) -> Any:
    try:
        return kind(**arguments)
    except Exception as error:  # of a wrong argument
        known = [each for each in inspect.signature(kind).parameters if each != "self"]
        unknown = next((each for each in arguments if each not in known), None)
        if unknown is not None and "kwargs" not in known:
            raise UserError(f"{_KEY}: {name} has no argument {unknown!r}{nearest(unknown, known)}") from error
        raise UserError(f"{_KEY}: {name} does not accept {arguments} ({error}). Fix: correct the arguments") from error


# --- Albumentations -----------------------------------------------------------------------------------


def _of_albumentations(name: str, arguments: dict[str, Any]) -> Change:
    short = name.removeprefix(_ALBUMENTATIONS)
    try:
        import albumentations
    except ImportError as error:
        raise UserError(f"{_KEY}: {name} needs the package. Fix: pip install albumentations==2.0.8") from error
    base = albumentations.BasicTransform
    known = [each for each, kind in vars(albumentations).items() if inspect.isclass(kind) and issubclass(kind, base)]
    if short not in known:
        raise UserError(f"{_KEY}: {short!r} is not a transform of Albumentations{nearest(short, known)}")
    transform = albumentations.Compose(
        [_built(short, getattr(albumentations, short), arguments)],
        bbox_params=albumentations.BboxParams(format="pascal_voc", label_fields=["rows"]),
        keypoint_params=albumentations.KeypointParams(format="xy", remove_invisible=False),
    )

    def change(pixels: np.ndarray, boxes: np.ndarray, masks: Any, points: np.ndarray | None, seed: int) -> tuple:
        transform.set_random_seed(seed)
        given: dict[str, Any] = {
            "image": pixels,
            "bboxes": boxes.astype(np.float64),
            "rows": np.arange(len(boxes)),
            "keypoints": np.zeros((0, 2)) if points is None else points,
        }
        if masks is not None:
            given["masks"] = list(masks)
        found = transform(**given)
        rows = np.asarray(found["rows"], dtype=np.int64).reshape(-1)
        masks = None if masks is None else [found["masks"][row] for row in rows]
        return found["image"], rows, found["bboxes"], masks, found["keypoints"]

    return change
