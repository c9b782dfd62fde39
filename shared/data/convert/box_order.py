"""Whether four numbers are x y width height or x1 y1 x2 y2, from all boxes of a file."""

from __future__ import annotations

import numpy as np

from shared.errors import UserError


def box_order(boxes: np.ndarray, sizes: np.ndarray, given: str, source: object) -> str:
    """ "xywh" or "xyxy".

    Args:
        boxes: (N, 4).
        sizes: (N, 2) width and height of each box's image; 0 if they are unknown.
        given: "" or the user's answer.
        source: the file, for the error.

    Raises:
        UserError: the boxes can be either.
    """
    if given or not len(boxes):
        return given or "xywh"
    shares = bool(boxes.max() <= 1 and (boxes % 1 > 0).any())
    limits, known = (1.0, True) if shares else (sizes, (sizes > 0).all(axis=1))
    # a pixel more: rounding, and edges that are inside
    over = ((boxes[:, :2] + boxes[:, 2:]) > limits + (0.01 if shares else 1)).any(axis=1) & known
    are_corners = (boxes[:, 2:] >= boxes[:, :2]).all()
    if not are_corners:
        return "xywh"
    if over.any():
        return "xyxy"
    raise UserError(
        f"{source}: its boxes may be x y width height or x1 y1 x2 y2, {boxes[0].tolist()} for example. Fix: pass "
        "`--boxes xywh` or `--boxes xyxy`"
    )
