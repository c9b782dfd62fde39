"""Detects with a file of `export --raw`: python3 detect.py MODEL IMAGE …   Needs NumPy, Pillow and ONNX Runtime.

The file has the network alone. Here are the steps around it: resizing, and the choice among all boxes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def fitted(image: np.ndarray, size: Sequence[int], decoding: Mapping[str, Any]) -> np.ndarray:
    """(H, W, 3) uint8 at the network's size, of an image of any size."""
    (height, width), (rows, columns) = size, image.shape[:2]
    if decoding["keeps_ratio"]:
        scale = min(width / columns, height / rows)
        width, height = max(int(columns * scale), 1), max(int(rows * scale), 1)
    filled = np.empty((*size, 3), np.uint8)
    filled[:] = decoding["fill_color"]
    method = Image.Resampling[decoding["filter"].upper()]
    filled[:height, :width] = np.asarray(Image.fromarray(image).resize((width, height), method))
    return filled


def decoded(
    boxes: np.ndarray, scores: np.ndarray, image_size: Sequence[int], size: Sequence[int], decoding: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The detections of an image, the best first: boxes (M, 4), scores (M,), labels (M,).

    Args:
        boxes: (N, 4) of each place, x1 y1 x2 y2 in pixels of the network's input.
        scores: (N, K) of each place and category.
        image_size, size: (height, width) of the image, and of the network's input.
    """
    places = highest(scores.max(1), decoding["candidates"])  # the best pairs are of these places
    if decoding["one_label"]:
        labels = scores[places].argmax(1)
    else:
        pairs = highest(scores[places].ravel(), decoding["candidates"])
        places, labels = places[pairs // scores.shape[1]], pairs % scores.shape[1]
    boxes, scores = boxes[places], scores[places, labels]
    scale = np.float32(image_size) / np.float32(size)
    boxes = boxes * (scale.max() if decoding["keeps_ratio"] else np.tile(scale[::-1], 2))
    if decoding["clips"]:
        boxes = boxes.clip(0, np.tile(np.float32(image_size[::-1]), 2))
    kept = np.arange(len(boxes))[: decoding["limit"]]
    if decoding["iou_threshold"] is not None:
        kept = suppressed(boxes, labels, decoding["iou_threshold"], decoding["limit"])
    return boxes[kept], scores[kept], labels[kept]


def highest(values: np.ndarray, count: int) -> np.ndarray:
    """The positions of the highest values, at most `count`, the highest first."""
    best = np.arange(len(values))
    if count < len(values):
        best = np.sort(np.argpartition(-values, count - 1)[:count])
    return best[np.argsort(-values[best], kind="stable")]


def suppressed(boxes: np.ndarray, labels: np.ndarray, iou_threshold: float, limit: int) -> np.ndarray:
    """Rows that no better row of the same label overlaps, at most `limit`. The rows are sorted, the best first."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept, rows = [], np.arange(len(boxes))
    while len(rows) and len(kept) < limit:
        first, rows = rows[0], rows[1:]
        kept.append(first)
        low = np.maximum(boxes[first, :2], boxes[rows, :2])
        shared = (np.minimum(boxes[first, 2:], boxes[rows, 2:]) - low).clip(0).prod(1)
        union = np.maximum(areas[first] + areas[rows] - shared, 1e-9)
        rows = rows[(shared <= iou_threshold * union) | (labels[rows] != labels[first])]
    return np.array(kept, dtype=int)


def detections(
    run: Callable[[np.ndarray], Sequence[np.ndarray]],
    images: Sequence[np.ndarray],
    size: Sequence[int],
    decoding: Mapping[str, Any],
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The detections of each (H, W, 3) uint8 RGB image, see `decoded`.

    Args:
        run: from (B, 3, *size) uint8 to the file's outputs.
    """
    batch = np.stack([fitted(image, size, decoding) for image in images])
    outputs = run(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))
    return [decoded(*found, image.shape[:2], size, decoding) for image, *found in zip(images, *outputs, strict=True)]


if __name__ == "__main__":
    import onnxruntime

    session = onnxruntime.InferenceSession(sys.argv[1], providers=onnxruntime.get_available_providers())
    metadata = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    size, decoding = metadata["detector.input_size"], metadata["detector.decoding"]
    for path in sys.argv[2:]:
        image = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        (found,) = detections(lambda images: session.run(None, {"images": images}), [image], size, decoding)
        for box, score, label in zip(*found, strict=True):
            if score >= (metadata["detector.best_threshold"] or 0.3):
                print(path, metadata["detector.categories"][label]["name"], f"{score:.3f}", *box.round(1))
