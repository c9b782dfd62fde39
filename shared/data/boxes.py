"""Boxes that are written in another way than COCO's, told by where they lie."""

from __future__ import annotations

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


def check_box_format(annotations: CocoAnnotations, where: str) -> None:
    """Raises UserError where all boxes are shares of the image's size, or corners, in place of pixels as x y width
    height."""
    boxes = annotations.columns["boxes"]
    boxes_in_use = (boxes[:, 2:] > 0).all(axis=1)
    boxes, sizes = boxes[boxes_in_use], image_sizes(annotations)[boxes_in_use]
    if not len(boxes):
        return
    # an image of a few pixels may have such boxes rightly; whole numbers are those of an image's first pixel
    if boxes.min() >= 0 and boxes.max() <= 1 and sizes.max() > 8 and (boxes % 1 > 0).any():
        raise UserError(
            f"{where}: all {len(boxes)} boxes of {annotations.path} lie between 0 and 1: they are shares of the "
            "image's size, and COCO has pixels; multiply x and width by the image's width, y and height by its height"
        )
    far = np.maximum(_FAR * sizes, 1)
    reach_over = (boxes[:, :2] + boxes[:, 2:] > sizes + far).any(axis=1)
    fit = ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= sizes + 1) & (boxes[:, :2] >= -1)).all(axis=1)
    if len(boxes) >= _FEWEST and reach_over.mean() >= _REACH_OVER and fit.mean() >= _FIT_AS_CORNERS:
        raise UserError(
            f"{where}: the boxes of {annotations.path} look like corners, x1 y1 x2 y2, and COCO has x y width height: "
            f"{reach_over.mean():.0%} of them reach far over the edge of their image as COCO's, and {fit.mean():.0%} "
            "fit as corners; write [x1, y1, x2 - x1, y2 - y1]"
        )


def image_sizes(annotations: CocoAnnotations) -> np.ndarray:
    """(annotations, 2) int32: width and height of the image of each."""
    columns = annotations.columns
    return np.repeat(np.stack([columns["widths"], columns["heights"]], axis=1), np.diff(columns["offsets"]), axis=0)


def under_a_pixel(annotations: CocoAnnotations) -> np.ndarray:
    """(annotations,) bool: boxes with an area, that are less than a pixel wide or high."""
    return (annotations.columns["boxes"][:, 2:] < 1).any(axis=1) & ~annotations.without_area
