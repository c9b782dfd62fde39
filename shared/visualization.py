"""Detections and ground truth drawn on images, as figures: PNG, PDF or TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from pycocotools import mask as coco_mask

from shared.annotations import ImageRecord
from shared.detections import Detections

# matplotlib's "tab10" without its grey: easy to tell apart on photographs
_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "cyan")


def draw_detections(
    axes: Axes, image: Image.Image, detections: Detections, category_names: Sequence[str], min_score: float = 0.3
) -> None:
    """The image with the boxes (and masks) of at least `min_score`, each labelled with category and score."""
    keep = np.flatnonzero(detections.scores >= min_score)
    masks = None if detections.masks is None else [coco_mask.decode(detections.masks[i]) for i in keep]
    captions = [f"{category_names[detections.labels[i]]} {detections.scores[i]:.2f}" for i in keep]
    _draw(axes, image, detections.boxes[keep], detections.labels[keep], captions, masks)


def draw_truth(
    axes: Axes, image: Image.Image, record: ImageRecord, category_names: Sequence[str], with_masks: bool = False
) -> None:
    """The image with its annotated boxes (and masks); a crowd's says so."""
    captions = [
        category_names[label] + (" (crowd)" if crowd else "")
        for label, crowd in zip(record.labels, record.iscrowd, strict=True)
    ]
    masks = [_decode(piece, record) for piece in record.segmentations] if with_masks else None
    _draw(axes, image, record.boxes, record.labels, captions, masks)


def _decode(segmentation: list | dict | None, record: ImageRecord) -> np.ndarray:
    """COCO's polygons or RLE as (height, width) of 0 and 1."""
    if not segmentation:
        return np.zeros((record.height, record.width), dtype=np.uint8)
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):  # compressed already
        return coco_mask.decode(segmentation)
    rles = coco_mask.frPyObjects(segmentation, record.height, record.width)
    return coco_mask.decode(coco_mask.merge(rles) if isinstance(rles, list) else rles)


def figure_of(image: Image.Image, detections: Detections, category_names: Sequence[str], min_score: float) -> Figure:
    """A figure of exactly the image's pixels at 100 dots an inch."""
    figure = Figure(figsize=(image.width / 100, image.height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    draw_detections(axes, image, detections, category_names, min_score)
    return figure


def side_by_side(
    samples: Sequence[tuple[Image.Image, ImageRecord, Detections]],
    category_names: Sequence[str],
    min_score: float = 0.3,
) -> Figure:
    """A row a sample: the ground truth on the left, the detections on the right."""
    figure = Figure(figsize=(8, 4 * len(samples)), dpi=100, layout="tight")
    grid = figure.subplots(len(samples), 2, squeeze=False)
    for (left, right), (image, record, detections) in zip(grid, samples, strict=True):
        draw_truth(left, image, record, category_names, with_masks=detections.masks is not None)
        draw_detections(right, image, detections, category_names, min_score)
        left.set_title(f"ground truth, image {record.image_id}", fontsize=9)
        right.set_title(f"detections of score ≥ {min_score:g}", fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> None:
    """As PNG or PDF, by the path's ending."""
    figure.savefig(path)


def _draw(
    axes: Axes,
    image: Image.Image,
    boxes: np.ndarray,
    labels: np.ndarray,
    captions: Sequence[str],
    masks: Sequence[np.ndarray] | None,
) -> None:
    # COCO's coordinates: pixel 0 reaches from 0 to 1
    axes.imshow(image, extent=(0, image.width, image.height, 0))
    axes.set_axis_off()
    for i, ((x1, y1, x2, y2), label, caption) in enumerate(zip(boxes.tolist(), labels.tolist(), captions, strict=True)):
        color = _COLORS[label % len(_COLORS)]
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.5))
        axes.text(
            max(x1, 0),
            max(y1, 0),
            caption,
            color="white",
            fontsize=7,
            verticalalignment="bottom" if y1 > 12 else "top",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 1, "alpha": 0.8},
            clip_on=True,
        )
        if masks is not None:
            axes.contourf(
                masks[i], levels=[0.5, 1], colors=[color], alpha=0.4, extent=(0, image.width, 0, image.height)
            )
