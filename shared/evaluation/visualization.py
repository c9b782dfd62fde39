"""Detections and ground truth drawn on images, as figures: PNG, PDF or TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from pycocotools import mask as coco_mask

from shared.data.annotations import ImageRecord
from shared.evaluation.detections import Detections

_MOST_PIXELS = 4000  # on a side of a picture; larger images are drawn smaller
_KEYPOINT_SCORE = 0.05
# matplotlib's "tab10" without its grey: easy to tell apart on photographs
_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "teal")


def draw_detections(
    axes: Axes, image: Image.Image, detections: Detections, categories: Sequence[dict], min_score: float = 0.3
) -> None:
    """The image with the boxes (masks, keypoints) of at least `min_score`, each labelled with category and score.

    Args:
        categories: COCO categories by label; "skeleton", pairs of keypoints from 1 on, says which are joined.
    """
    keep = np.flatnonzero(detections.scores >= min_score)
    captions = [f"{categories[detections.labels[i]]['name']} {detections.scores[i]:.2f}" for i in keep]
    mask = None if detections.masks is None else lambda i: coco_mask.decode(detections.masks[keep[i]])
    _draw(axes, image, detections.boxes[keep], detections.labels[keep], captions, mask)
    if detections.keypoints is not None:
        for i in keep:
            points = detections.keypoints[i]
            _draw_keypoints(axes, points, points[:, 2] > _KEYPOINT_SCORE, detections.labels[i], categories)


def draw_truth(
    axes: Axes,
    image: Image.Image,
    record: ImageRecord,
    categories: Sequence[dict],
    with_masks: bool = False,
    with_keypoints: bool = False,
) -> None:
    """The image with its annotated boxes (masks, keypoints); a crowd's says so."""
    captions = [
        categories[label]["name"] + (" (crowd)" if crowd else "")
        for label, crowd in zip(record.labels, record.iscrowd, strict=True)
    ]
    mask = (lambda i: _decode(record.segmentations[i], record)) if with_masks else None
    _draw(axes, image, record.boxes, record.labels, captions, mask)
    if with_keypoints and record.keypoints is not None:
        for points, label in zip(record.keypoints, record.labels, strict=True):
            _draw_keypoints(axes, points, points[:, 2] > 0, label, categories)


def _decode(segmentation: list | dict | None, record: ImageRecord) -> np.ndarray:
    """COCO's polygons or RLE as (height, width) of 0 and 1."""
    if not segmentation:
        return np.zeros((record.height, record.width), dtype=np.uint8)
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):  # compressed already
        return coco_mask.decode(segmentation)
    if isinstance(segmentation, list):  # a polygon has three points or more
        segmentation = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not segmentation:
            return np.zeros((record.height, record.width), dtype=np.uint8)
    rles = coco_mask.frPyObjects(segmentation, record.height, record.width)
    return coco_mask.decode(coco_mask.merge(rles) if isinstance(rles, list) else rles)


def figure_of(image: Image.Image, detections: Detections, categories: Sequence[dict], min_score: float) -> Figure:
    """A figure of exactly the image's pixels at 100 dots an inch; one of more than 4,000 pixels a side is made
    smaller."""
    scale = 100 * max(max(image.size) / _MOST_PIXELS, 1)
    figure = Figure(figsize=(image.width / scale, image.height / scale), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    draw_detections(axes, image, detections, categories, min_score)
    return figure


def side_by_side(
    samples: Sequence[tuple[Image.Image, ImageRecord, Detections]],
    categories: Sequence[dict],
    min_score: float = 0.3,
    dpi: float = 100,
) -> Figure:
    """A row a sample, 14 by 6 inches: the ground truth on the left, the detections on the right."""
    figure = Figure(figsize=(14, 6 * len(samples)), dpi=dpi, layout="tight")
    grid = figure.subplots(len(samples), 2, squeeze=False)
    for (left, right), (image, record, detections) in zip(grid, samples, strict=True):
        found = detections
        draw_truth(left, image, record, categories, found.masks is not None, found.keypoints is not None)
        draw_detections(right, image, found, categories, min_score)
        left.set_title(f"ground truth, image {record.image_id}", fontsize=9)
        right.set_title(f"detections of score ≥ {min_score:g}", fontsize=9)
    return figure


def page_of_truth(samples: Sequence[tuple[Image.Image, ImageRecord]], categories: Sequence[dict]) -> Figure:
    """Images with their annotated boxes, masks and keypoints, three a row."""
    rows = -(-len(samples) // 3)
    figure = Figure(figsize=(18, 5 * rows), dpi=100, layout="tight")
    for axes in (grid := figure.subplots(rows, 3, squeeze=False)).flat:
        axes.set_axis_off()
    for axes, (image, record) in zip(grid.flat, samples, strict=False):
        draw_truth(axes, image, record, categories, with_masks=True, with_keypoints=True)
        axes.set_title(f"{record.file_name}, id {record.image_id}", fontsize=9)
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
    mask: Callable[[int], np.ndarray] | None,
) -> None:
    # COCO's coordinates: pixel 0 reaches from 0 to 1
    step = -(-max(image.size) // _MOST_PIXELS)
    shown = image if step == 1 else image.reduce(step)
    extent = (0, shown.width * step, shown.height * step, 0)  # the last pixel may reach over the edge
    axes.imshow(shown, extent=extent)
    axes.set(xlim=(0, image.width), ylim=(image.height, 0))
    axes.set_axis_off()
    if mask is not None and len(boxes):
        overlay = np.zeros((*np.asarray(shown).shape[:2], 4))
        for i, label in enumerate(labels.tolist()):
            inside = mask(i)[step // 2 :: step, step // 2 :: step][: len(overlay), : overlay.shape[1]] > 0
            overlay[: len(inside), : inside.shape[1]][inside] = to_rgba(_color(label), alpha=0.45)
        axes.imshow(overlay, extent=extent, interpolation="nearest")
        axes.set(xlim=(0, image.width), ylim=(image.height, 0))
    size = max(max(axes.get_window_extent().size) / 800, 1)  # of lines and letters
    for (x1, y1, x2, y2), label, caption in zip(boxes.tolist(), labels.tolist(), captions, strict=True):
        color = _color(label)
        # snapped to the figure's pixels, a line of odd width would lie half a pixel off
        style = {"fill": False, "edgecolor": color, "linewidth": 1.5 * size, "snap": False}
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **style))
        axes.text(
            max(x1, 0),
            max(y1, 0),
            caption,
            color="white",
            fontsize=7 * size,
            verticalalignment="bottom" if y1 > 12 else "top",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 1, "alpha": 0.8},
            clip_on=True,
        )


def _draw_keypoints(axes: Axes, points: np.ndarray, shown: np.ndarray, label: int, categories: Sequence[dict]) -> None:
    color = _color(label)
    for pair in categories[label].get("skeleton") or ():
        ends = [point - 1 for point in pair]
        if max(ends) < len(points) and shown[ends].all():
            axes.plot(points[ends, 0] + 0.5, points[ends, 1] + 0.5, color=color, linewidth=1.5)
    axes.scatter(points[shown, 0] + 0.5, points[shown, 1] + 0.5, s=8, color="white", edgecolors=[color], zorder=3)


def _color(label: int) -> str:
    return _COLORS[label % len(_COLORS)]
