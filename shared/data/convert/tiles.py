"""COCO files and their images cut into tiles, as `--tiles` cuts images to detect: a data set to train on tiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from shared.data.convert import coco, shapes
from shared.data.convert.contents import Contents, Format, Options, Split
from shared.data.storage import DiskImages
from shared.data.tiles import Box, Tile, Tiling, open_image, part_of
from shared.errors import UserError

_LEAST_VISIBLE = 0.3  # of an object's area
_LEFT_OUT = f"parts left out (under {_LEAST_VISIBLE:.0%} of the object)"


def read(source: Path, options: Options) -> Contents:
    contents = coco.read(source, options)
    tiling = Tiling(options.tiles, options.overlap)
    for name, part in contents.splits.items():
        part.settle()
        if part.folder is None:
            raise UserError(f"{source}: its images are not found. Fix: give their folder, --images DIR")
        contents.splits[name] = _cut(part, tiling, options.extracted / name)
    return contents


def _cut(part: Split, tiling: Tiling, folder: Path) -> Split:
    """The split's tiles, whose images are written to the folder."""
    cut_up = Split(folder=folder, counts=part.counts)
    images = DiskImages(part.folder)
    for image in part.images:
        size = image["width"], image["height"]
        opened = open_image(images, image["file_name"], size)
        for box in tiling.boxes(*size):
            name = f"{PurePosixPath(image['file_name']).with_suffix('')}_{box[0]}_{box[1]}.png"
            _write(folder / name, part_of(opened, Tile(0, box)))
            rows = [clipped(row, box, size) for row in image["annotations"]]
            cut_up.counts[_LEFT_OUT] += sum(row == {} for row in rows)
            tile_size = box[2] - box[0], box[3] - box[1]
            cut_up.add_image(name, tile_size, [row for row in rows if row])
    cut_up.counts = +cut_up.counts  # what is not 0
    return cut_up


def _write(file: Path, image: Any) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, compress_level=1)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error}). Fix: make room") from error


def clipped(row: dict[str, Any], tile: Box, size: tuple[int, int]) -> dict[str, Any] | None:
    """An annotation in the tile's pixels: its box, mask and keypoints as far as the tile shows them.

    Args:
        size: (width, height) of the image.

    Returns:
        None if the tile does not show it, {} if it shows too little.
    """
    left, top, right, bottom = tile
    x, y, width, height = row["bbox"]
    corners = max(x, left), max(y, top), min(x + width, right), min(y + height, bottom)
    if corners[0] >= corners[2] or corners[1] >= corners[3]:
        return None
    shape = shapes.box_of_corners(*(corner - start for corner, start in zip(corners, (left, top) * 2, strict=True)))
    whole = width * height
    if segmentation := row.get("segmentation"):
        is_mask = isinstance(segmentation, dict)
        shape = _clipped_mask(segmentation, tile, size) if is_mask else _clipped_polygons(segmentation, tile)
        if shape is None:
            return None
        whole = row["area"]
    if shape["area"] < _LEAST_VISIBLE * whole:
        return {}
    if corners == (x, y, x + width, y + height):  # the whole object: its own numbers
        shape |= {"area": row["area"], "bbox": [x - left, y - top, width, height]}
    kept = {k: v for k, v in row.items() if k not in ("id", "segmentation", "keypoints", "num_keypoints")}
    return {**kept, **shape, **_moved_keypoints(row.get("keypoints"), tile)}


def _moved_keypoints(keypoints: Sequence[float] | None, tile: Box) -> dict[str, Any]:
    """Keypoints in the tile's pixels; one that the tile does not show is not labeled."""
    if not keypoints:
        return {}
    points = np.array(keypoints, np.float64).reshape(-1, 3)
    # whole numbers are the centers of pixels
    inside = ((points[:, :2] >= np.array(tile[:2]) - 0.5) & (points[:, :2] < np.array(tile[2:]) - 0.5)).all(axis=1)
    points[:, :2] -= tile[:2]
    points[~inside | (points[:, 2] == 0)] = 0
    return {"keypoints": points.ravel().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}


def _clipped_mask(rle: dict[str, Any], tile: Box, size: tuple[int, int]) -> dict[str, Any] | None:
    left, top, right, bottom = tile
    plain = coco_mask.frPyObjects(rle, size[1], size[0]) if isinstance(rle["counts"], list) else rle
    shape = shapes.mask(coco_mask.decode(plain)[top:bottom, left:right], 0, 0, (right - left, bottom - top))
    return shape if shape["area"] else None


def _clipped_polygons(polygons: Sequence[Sequence[float]], tile: Box) -> dict[str, Any] | None:
    """The part of polygons in a tile, in its pixels; None if the tile has no part of them."""
    pieces = [_clipped_polygon(np.array(numbers, np.float64).reshape(-1, 2), tile) for numbers in polygons]
    pieces = [piece - tile[:2] for piece in pieces if len(piece) >= 3]
    found = shapes.polygons(pieces) if pieces else None
    return found if found and found["area"] > 0 else None


def _clipped_polygon(points: np.ndarray, tile: Box) -> np.ndarray:
    """(N, 2): the polygon cut at one edge of the tile after the other, by Sutherland and Hodgman."""
    for axis, limit, sign in ((0, tile[0], 1), (1, tile[1], 1), (0, tile[2], -1), (1, tile[3], -1)):
        inside = sign * (points[:, axis] - limit)  # pixels on the tile's side of the edge
        kept = []
        for i in range(len(points)):
            before, here = inside[i - 1], inside[i]
            if (before >= 0) != (here >= 0):
                share = before / (before - here)
                kept.append(points[i - 1] + share * (points[i] - points[i - 1]))
            if here >= 0:
                kept.append(points[i])
        points = np.array(kept).reshape(-1, 2)
    return points


TILES = Format(
    "a COCO file and its large images, cut into tiles for training; see --tiles and --overlap",
    lambda source: "",  # a COCO file does not show that it shall be cut
    read,
)
