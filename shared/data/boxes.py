"""Boxes that are written in another way than COCO's, told by where they lie."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shared.data.annotations import CocoAnnotations
from shared.errors import UserError

# Boxes are corners, x1 y1 x2 y2, where nearly all fit into their image as such, and many reach far over its edge as x y
# width height. Of right files (COCO, BCCD) none do, and a tenth fits; of the same boxes made corners 70 to 76 % do:
# those whose middle is in the right or the lower half. Large objects that are annotated beyond the edge (amodal ones)
# reach over too, and fit where they start near the image's corner; not a quarter of a file's by a twentieth.
_FIT_AS_CORNERS = 0.98
_REACH_OVER = 0.25
_FAR = 0.05  # of the image's side, and a pixel at least
_FEWEST = 5
_AT_ONCE = 2**12  # images: what each process of a machine takes for a moment


def check_box_format(annotations: CocoAnnotations, where: str) -> None:
    """Raises UserError where all boxes are shares of the image's size, or corners, in place of pixels as x y width
    height."""
    count = largest_side = reaching_over = fitting = 0
    within_one, has_fractions = True, False
    for boxes, sizes in _boxes_in_use(annotations):
        count += len(boxes)
        largest_side = max(largest_side, int(sizes.max()))
        within_one &= bool(boxes.min() >= 0 and boxes.max() <= 1)
        has_fractions = has_fractions or (within_one and bool((boxes % 1 > 0).any()))
        far = np.maximum(_FAR * sizes, 1)
        reaching_over += int((boxes[:, :2] + boxes[:, 2:] > sizes + far).any(axis=1).sum())
        fit = (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= sizes + 1) & (boxes[:, :2] >= -1)
        fitting += int(fit.all(axis=1).sum())
    # an image of a few pixels may have such boxes rightly; whole numbers are those of an image's first pixel
    if count and within_one and largest_side > 8 and has_fractions:
        raise UserError(
            f"{where}: all {count} boxes of {annotations.path} lie between 0 and 1: they are shares of the "
            "image's size, and COCO has pixels; multiply x and width by the image's width, y and height by its height"
        )
    if count >= _FEWEST and reaching_over / count >= _REACH_OVER and fitting / count >= _FIT_AS_CORNERS:
        raise UserError(
            f"{where}: the boxes of {annotations.path} look like corners, x1 y1 x2 y2, and COCO has x y width height: "
            f"{reaching_over / count:.0%} of them reach far over the edge of their image as COCO's, and "
            f"{fitting / count:.0%} fit as corners; write [x1, y1, x2 - x1, y2 - y1]"
        )


def _boxes_in_use(annotations: CocoAnnotations) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Boxes that have an area, and the sizes of their images, some images at a time."""
    for first in range(0, len(annotations), _AT_ONCE):
        images = slice(first, first + _AT_ONCE)
        offsets = annotations.columns["offsets"][first : first + _AT_ONCE + 1]
        boxes = annotations.columns["boxes"][offsets[0] : offsets[-1]]
        in_use = (boxes[:, 2:] > 0).all(axis=1)
        if in_use.any():
            yield boxes[in_use], image_sizes(annotations, images)[in_use]


def image_sizes(annotations: CocoAnnotations, images: slice = slice(None)) -> np.ndarray:
    """(annotations, 2) int32: width and height of the image of each, of some of the images."""
    columns = annotations.columns
    sizes = np.stack([columns["widths"][images], columns["heights"][images]], axis=1)
    return np.repeat(sizes, np.diff(columns["offsets"])[images], axis=0)


def under_a_pixel(annotations: CocoAnnotations) -> np.ndarray:
    """(annotations,) bool: boxes with an area, that are less than a pixel wide or high."""
    return (annotations.columns["boxes"][:, 2:] < 1).any(axis=1) & ~annotations.without_area
