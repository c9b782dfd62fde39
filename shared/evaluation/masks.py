"""Masks of an image's size as COCO's run-length encoding."""

from __future__ import annotations

from collections.abc import Sequence

import hotcoco
import numpy as np
import torch

PIXELS_AT_ONCE = 2**27  # of masks at an image's size that are worked on together: 128 MiB of booleans


def masks_at_once(height: int, width: int) -> int:
    """How many masks of an image of that size a GPU works on together, so that a large image fits."""
    return max(PIXELS_AT_ONCE // (height * width), 1)


def encode(masks: torch.Tensor) -> list[dict]:
    """COCO's RLE dict of each of (N, H, W) booleans, computed where they are."""
    return encode_on_device(masks) if masks.is_cuda else encode_masks(masks.numpy())


def encode_masks(masks: Sequence[np.ndarray]) -> list[dict]:
    """COCO's RLE dict of each (H, W) mask, all of one size and type: the bytes of `hotcoco.mask.encode`.

    COCO counts pixels column by column, NumPy keeps them row by row, and walking the columns of such an array takes
    most of an encoder's time. So what a mask covers, which is little of an image, is laid into an image that is kept
    column by column.
    """
    if not len(masks):
        return []
    image = np.zeros(masks[0].shape, masks[0].dtype, order="F")
    encoded = []
    for mask in masks:
        columns = _extent(mask.any(axis=0))
        part = _extent(mask[:, columns].any(axis=1)), columns
        image[part] = mask[part]
        encoded.append(hotcoco.mask.encode(image))
        image[part] = 0
    return encoded


def encode_on_device(masks: torch.Tensor) -> list[dict]:
    """The same of (N, H, W) booleans on a GPU, which sends no pixels to the host but only where runs begin."""
    if not len(masks):
        return []
    return [rle for part in masks.split(masks_at_once(*masks.shape[1:])) for rle in _encode_runs(part)]


def _encode_runs(masks: torch.Tensor) -> list[dict]:
    count, height, width = masks.shape
    pixels = masks.transpose(1, 2).flatten(1)  # in COCO's order
    begins = pixels.clone()
    begins[:, 1:] ^= pixels[:, :-1]
    mask_of, positions = begins.nonzero().cpu().numpy().T
    pieces = np.split(positions, np.searchsorted(mask_of, np.arange(1, count)))
    return [
        hotcoco.mask.frPyObjects(
            {"size": [height, width], "counts": np.diff(piece, prepend=0, append=height * width).tolist()},
            height,
            width,
        )
        for piece in pieces
    ]


def _extent(covered: np.ndarray) -> slice:
    """From the first to the last that is true."""
    found = covered.nonzero()[0]
    return slice(found[0], found[-1] + 1) if len(found) else slice(0)
