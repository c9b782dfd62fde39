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

from shared.data.annotations import ImageRecord
from shared.data.augment.placement import Layout, Picture, Placement, as_raw, decoded_rle, filled, with_boxes
from shared.errors import UserError, nearest

_KEY = "data.augment.transforms"
_ALBUMENTATIONS = "albumentations."
Drawn = tuple[np.ndarray, ImageRecord]


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
        self.steps = [
            _of_albumentations(*each) if each[0].startswith(_ALBUMENTATIONS) else _of_torchvision(*each)
            for each in named
        ]
        for (name, _), step in zip(named, self.steps, strict=True):
            with torch.random.fork_rng(devices=[]):
                _try(name, step)

    def __call__(self, pixels: np.ndarray, record: ImageRecord, seed: int) -> Drawn:
        """The changed image and its record.

        Args:
            seed: for libraries that have their own random numbers.
        """
        canvas = pixels.shape[1], pixels.shape[0]
        for step in self.steps:
            pixels, record = step(pixels, record, seed)
        if (pixels.shape[1], pixels.shape[0]) != canvas:
            picture, fitted = Picture(np.ascontiguousarray(pixels)), filled(canvas, self.layout.fill)
            size = np.minimum(self.layout.fit(*picture.size), canvas).tolist()
            placement = Placement((0, 0, *picture.size), (0, 0, *size))
            placement.draw(picture, fitted)
            has_masks = any(segmentation is not None for segmentation in record.segmentations)
            pixels, record = fitted, placement.record(record, canvas, has_masks)
        return pixels, record


def _try(name: str, step: Callable[[np.ndarray, ImageRecord, int], Drawn]) -> None:
    """Raises UserError if the transform does not give an image and boxes for them."""
    box = np.array([[8.0, 8.0, 24.0, 24.0]])

    record = ImageRecord(
        image_id=0,
        file_name="",
        height=32,
        width=32,
        boxes=box.astype(np.float32),
        labels=np.zeros(1, np.int64),
        areas=np.zeros(1, np.float32),
        iscrowd=np.zeros(1, bool),
        file_boxes=box,
        raw_segmentations=[b""],
    )
    try:
        step(np.zeros((32, 32, 3), np.uint8), record, 0)
    except UserError:
        raise
    except Exception as error:  # transforms fail in many ways
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{_KEY}: {name} cannot change an image with boxes ({message}). Fix: remove it") from error


def _kept(record: ImageRecord, rows: np.ndarray, boxes: np.ndarray, size: tuple[int, int], **more: Any) -> ImageRecord:
    """The objects `rows` with new boxes, without those that lie outside of the image.

    Args:
        more: `masks` (N, H, W) uint8 and `keypoints` (N, K, 3) of these objects, or None.
    """
    boxes = np.clip(np.asarray(boxes, np.float64).reshape(-1, 4), 0, np.tile(size, 2))
    masks, keypoints = more["masks"], more["keypoints"]
    kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1)
    changed = with_boxes(record.only(rows[kept]), boxes[kept], size)
    if masks is not None:
        has_mask = [record.segmentations[row] is not None for row in rows]
        raw = [as_raw(masks[i]) if has_mask[i] else b"" for i in np.flatnonzero(kept)]
        changed = dataclasses.replace(changed, raw_segmentations=raw)
    if keypoints is not None:
        points = keypoints[kept]
        inside = ((points[..., :2] >= 0) & (points[..., :2] <= size)).all(axis=-1) & (points[..., 2] > 0)
        changed = dataclasses.replace(changed, keypoints=np.where(inside[..., None], points, 0.0))
    return changed


def _masks_of(record: ImageRecord) -> np.ndarray | None:
    """(N, H, W) uint8, empty for objects without a mask; None if no object has one."""
    if all(segmentation is None for segmentation in record.segmentations):
        return None
    empty = np.zeros((record.height, record.width), np.uint8)
    return np.stack([empty if each is None else decoded_rle(each) for each in record.segmentations])


# --- torchvision --------------------------------------------------------------------------------------


def _of_torchvision(name: str, arguments: dict[str, Any]) -> Callable[[np.ndarray, ImageRecord, int], Drawn]:
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

    def step(pixels: np.ndarray, record: ImageRecord, seed: int) -> Drawn:
        size = (record.height, record.width)
        given: dict[str, Any] = {
            "image": tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)),
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(record.boxes.astype(np.float32)), format="XYXY", canvas_size=size
            ),
            "labels": torch.arange(len(record.boxes)),  # which objects remain
        }
        masks, points = _masks_of(record), record.keypoints
        if masks is not None:
            given["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        if points is not None:
            given["keypoints"] = _as_key_points(name, points, size)
        found = transform(given)
        image = found["image"]
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
            raise UserError(f"{_KEY}: {name} does not give 8-bit RGB images. Fix: remove it, the detector normalizes")
        rows = found["labels"].numpy()
        if points is not None:
            at = found["keypoints"].reshape(*points.shape[:2], 2).numpy()[rows]
            points = np.concatenate([at, points[rows][..., 2:]], axis=-1)
        new = _kept(
            record, rows, found["boxes"].numpy(), (image.shape[2], image.shape[1]),
            masks=None if masks is None else found["masks"].numpy(), keypoints=points,
        )  # fmt: skip
        return image.permute(1, 2, 0).contiguous().numpy(), new

    return step


def _as_key_points(name: str, points: np.ndarray, size: tuple[int, int]) -> Any:
    if not hasattr(tv_tensors, "KeyPoints"):
        raise UserError(f"{_KEY}: {name} needs torchvision 0.23 for keypoints. Fix: install it, or remove {name}")
    return tv_tensors.KeyPoints(torch.from_numpy(points[..., :2].reshape(-1, 2)), canvas_size=size)


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


def _of_albumentations(name: str, arguments: dict[str, Any]) -> Callable[[np.ndarray, ImageRecord, int], Drawn]:
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

    def step(pixels: np.ndarray, record: ImageRecord, seed: int) -> Drawn:
        transform.set_random_seed(seed)
        masks, points = _masks_of(record), record.keypoints
        given: dict[str, Any] = {
            "image": np.ascontiguousarray(pixels),
            "bboxes": record.boxes.astype(np.float64),
            "rows": np.arange(len(record.boxes)),
            "keypoints": np.zeros((0, 2)) if points is None else points[..., :2].reshape(-1, 2),
        }
        if masks is not None:
            given["masks"] = list(masks)
        found = transform(**given)
        image = found["image"]
        if image.dtype != np.uint8 or image.shape[2:] != (3,):
            raise UserError(f"{_KEY}: {name} does not give 8-bit RGB images. Fix: remove it, the detector normalizes")
        rows = np.asarray(found["rows"], dtype=np.int64).reshape(-1)
        if points is not None:
            at = np.asarray(found["keypoints"], dtype=np.float64).reshape(*points.shape[:2], 2)[rows]
            points = np.concatenate([at, points[rows][..., 2:]], axis=-1)
        kept_masks = None if masks is None else np.stack([found["masks"][row] for row in rows] or [masks[0]])
        size = (image.shape[1], image.shape[0])
        return image, _kept(record, rows, found["bboxes"], size, masks=kept_masks, keypoints=points)

    return step
