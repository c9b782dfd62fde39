"""`python3 -m shared synthetic OUT`: a learnable COCO data set of rectangles, circles and triangles.

Each picture follows from (seed, index) alone, so any of them can be drawn at any time, in any process.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

CATEGORIES = [
    {"id": 1, "name": "rectangle", "supercategory": "shape"},
    {"id": 2, "name": "circle", "supercategory": "shape"},
    {"id": 3, "name": "triangle", "supercategory": "shape"},
]
FAKE_SEEDS = {"train": 1, "val": 2}
FAKE_IMAGES = {"train": 64, "val": 16}
SIZE = 128


def draw_sample(seed: int, index: int, size: int = SIZE) -> tuple[Image.Image, list[dict]]:
    """One picture of size × size pixels and its annotations in COCO's format, without ids.

    A shape has the pixels whose centers lie in its polygon; its box and its area are of those pixels. Every sixteenth
    picture has a crowd: a heap of small shapes with one RLE mask and `iscrowd` 1.
    """
    draws = random.Random(f"{seed}/{index}")
    background = tuple(draws.randrange(100, 156) for _ in range(3))
    # coarse, so that it looks the same when an augmentation has resized the picture
    texture = np.random.default_rng([seed, index]).integers(-40, 41, (size // 8, size // 8, 3)) + background
    pixels = np.array(Image.fromarray(texture.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC))

    annotations = []
    if index % 16 == 7:
        annotations.append(_draw_crowd(pixels, draws, size))
    for _ in range(draws.randrange(1, 5)):
        category = draws.choice(CATEGORIES)["id"]
        for _ in range(10):  # a shape that hides another would be a box that nothing shows
            polygon = _shape(draws, category, size, scale=draws.uniform(0.2, 0.5))
            inside = _inside(polygon, size)
            if not inside.any():
                continue
            annotation = _annotation(category, inside, [[round(v, 2) for point in polygon for v in point]])
            if not any(_overlap(annotation["bbox"], other["bbox"]) > 0.2 for other in annotations):
                pixels[inside] = _color(draws, background)
                annotations.append(annotation)
                break
    return Image.fromarray(pixels), annotations


def coco_split(seed: int, count: int, size: int = SIZE) -> dict:
    """The COCO annotations of pictures 0 to count - 1, image ids from 1, files `000000.png` on."""
    images, annotations = [], []
    for index in range(count):
        images.append({"id": index + 1, "file_name": f"{index:06d}.png", "height": size, "width": size})
        for annotation in draw_sample(seed, index, size)[1]:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **annotation})
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def fake_split(split: str) -> dict:
    """The annotations of `backend: fake` for "train" or "val"."""
    return coco_split(FAKE_SEEDS[split], FAKE_IMAGES[split])


@dataclass(frozen=True)
class FakeImages:
    """The pictures of `fake_split`, drawn when they are read."""

    split: str

    def read(self, file_name: str) -> bytes:
        image, _ = draw_sample(FAKE_SEEDS[self.split], int(Path(file_name).stem))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()


def write(out: Path, train: int = 400, val: int = 100, size: int = SIZE, seed: int = 0) -> None:
    """`out/annotations/{train,val}.json` and the pictures in `out/{train,val}/`."""
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        split_seed = 2 * seed + number
        folder = out / split
        folder.mkdir(exist_ok=True)
        for index in range(count):
            draw_sample(split_seed, index, size)[0].save(folder / f"{index:06d}.png", compress_level=1)
        (out / "annotations" / f"{split}.json").write_text(json.dumps(coco_split(split_seed, count, size)))


def _overlap(a: list[float], b: list[float]) -> float:
    """The part of the smaller box that both share; x y width height."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])


def _color(draws: random.Random, background: tuple[int, ...]) -> tuple[int, ...]:
    while True:
        color = tuple(draws.randrange(256) for _ in range(3))
        if max(abs(a - b) for a, b in zip(color, background, strict=True)) > 70:
            return color


def _shape(
    draws: random.Random, category: int, size: int, scale: float, around: tuple[float, float] | None = None
) -> list[tuple[float, float]]:
    width, height = scale * size, scale * size * draws.uniform(0.7, 1.4)
    if category == 2:
        height = width
    height = min(height, 0.9 * size)
    if around is None:
        x, y = draws.uniform(0, size - width), draws.uniform(0, size - height)
    else:
        x = min(max(around[0], 0), size - width)
        y = min(max(around[1], 0), size - height)
    if category == 1:
        return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    if category == 2:
        turns = [2 * math.pi * k / 24 for k in range(24)]
        return [(x + width / 2 * (1 + math.cos(t)), y + height / 2 * (1 + math.sin(t))) for t in turns]
    return [(x + width / 2, y), (x + width, y + height), (x, y + height)]


def _inside(polygon: list[tuple[float, float]], size: int) -> np.ndarray:
    """(size, size) bool: the pixels whose centers lie in a convex polygon, given clockwise."""
    inside = np.zeros((size, size), dtype=bool)
    left, top = (max(math.floor(min(values)), 0) for values in zip(*polygon, strict=True))
    right, bottom = (math.ceil(max(values)) for values in zip(*polygon, strict=True))
    window = inside[top:bottom, left:right]
    window[:] = True
    y, x = np.ogrid[top : top + window.shape[0], left : left + window.shape[1]]
    for (x1, y1), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        window &= (x2 - x1) * (y + 0.5 - y1) >= (y2 - y1) * (x + 0.5 - x1)
    return inside


def _annotation(category: int, inside: np.ndarray, segmentation: list | dict, iscrowd: int = 0) -> dict:
    """The annotation of the drawn pixels. Pixel i reaches from i to i + 1."""
    columns, rows = (np.flatnonzero(inside.any(axis=axis)) for axis in (0, 1))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return {
        "category_id": category,
        "bbox": [float(v) for v in (left, top, right - left, bottom - top)],
        "area": float(inside.sum()),
        "iscrowd": iscrowd,
        "segmentation": segmentation,
    }


def _draw_crowd(pixels: np.ndarray, draws: random.Random, size: int) -> dict:
    category = draws.choice(CATEGORIES)["id"]
    covered = np.zeros((size, size), dtype=bool)
    center_x, center_y = draws.uniform(0.1, 0.7) * size, draws.uniform(0.1, 0.7) * size
    for _ in range(12):
        around = (center_x + draws.uniform(0, 0.25) * size, center_y + draws.uniform(0, 0.25) * size)
        inside = _inside(_shape(draws, category, size, scale=0.07, around=around), size)
        pixels[inside] = [draws.randrange(256) for _ in range(3)]
        covered |= inside
    rle = coco_mask.encode(np.asfortranarray(covered, dtype=np.uint8))
    return _annotation(category, covered, {"size": list(rle["size"]), "counts": rle["counts"].decode()}, iscrowd=1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python3 -m shared synthetic", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write to")
    parser.add_argument("--train", type=int, default=400, help="training images")
    parser.add_argument("--val", type=int, default=100, help="validation images")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels of a side")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    write(given.out, given.train, given.val, given.size, given.seed)
    print(f"{given.train} + {given.val} images in {given.out}")
