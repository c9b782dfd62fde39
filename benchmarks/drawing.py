"""A picture's time: a matplotlib figure each, as it was until November 2026, against drawing on the pixels; and both
against what a small detector takes for the image.

    OMP_NUM_THREADS=1 python3 benchmarks/drawing.py [COCO_FOLDER]

One process, all sides in turn on each image; PNG files included. COCO_FOLDER has annotations/instances_val2017.json
and val2017/, with masks; without it synthetic pictures are drawn on.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "efficientdet")]

import numpy as np
import torch
from effdet import create_model
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pycocotools import mask as coco_mask

from shared.data import synthetic
from shared.data.annotations import CocoAnnotations
from shared.data.images import read_image
from shared.data.storage import DiskImages
from shared.evaluation import drawing
from shared.evaluation.detections import Detections
from shared.evaluation.drawing import objects_of_truth

IMAGES = 24


def main(source: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if source is None:
            synthetic.write(out, train=0, val=IMAGES, size=640)
            source, file, name = out, "annotations/val.json", "val"
        else:
            file, name = "annotations/instances_val2017.json", "val2017"
        annotations, images = CocoAnnotations.open(source / file, out), DiskImages(source / name)
        model = create_model(
            "tf_efficientdet_lite0", bench_task="predict", pretrained=False, pretrained_backbone=False
        ).eval()
        for with_masks in (False, True):
            print(
                json.dumps(
                    {"with": "masks" if with_masks else "boxes", **measure(annotations, images, model, with_masks, out)}
                )
            )


def measure(annotations, images, model, with_masks: bool, out: Path) -> dict:
    seconds = {"figure": [], "pixels": [], "detector": []}
    for index in range(min(IMAGES + 1, len(annotations))):
        record = annotations[index]
        image = read_image(images, record.file_name)
        truth = objects_of_truth(record, annotations.categories, with_masks=True)
        empty = coco_mask.encode(np.zeros((record.height, record.width), np.uint8, order="F"))
        masks = [mask or empty for mask in truth.masks] if with_masks else None
        found = Detections(record.image_id, truth.boxes, np.linspace(1, 0.4, len(truth.labels)), truth.labels, masks)
        sides = {
            "figure": lambda: draw_figure(out / "a.png", image, found, annotations.categories),  # noqa: B023
            "pixels": lambda: drawing.save_picture_of(out / "b.png", image, found, annotations.categories),  # noqa: B023
            "detector": lambda: detect(model, image),  # noqa: B023
        }
        for side, call in sides.items():
            started = time.perf_counter()
            call()
            seconds[side].append(time.perf_counter() - started)
    seconds = {side: spent[1:] for side, spent in seconds.items()}  # the first warms up

    def ratio(side: str, other: str) -> list[float]:
        pairs = [a / b for a, b in zip(seconds[side], seconds[other], strict=True)]
        return [round(value, 3) for value in (statistics.median(pairs), min(pairs), max(pairs))]

    return {
        "images": len(seconds["pixels"]),
        "pixels/figure": ratio("pixels", "figure"),
        "pixels/detector": ratio("pixels", "detector"),
        "figure/detector": ratio("figure", "detector"),
        **{f"{side}_ms": round(1000 * statistics.median(spent), 1) for side, spent in seconds.items()},
    }


@torch.no_grad()
def detect(model, image) -> None:
    """EfficientDet-Lite0 at its own 320 × 320 pixels, with the boxes made of its outputs."""
    pixels = torch.from_numpy(np.array(image.resize((320, 320)))).permute(2, 0, 1)[None].float().div(128).sub(1)
    model(pixels)


def draw_figure(path: Path, image, detections: Detections, categories: list[dict]) -> None:
    """As it was."""
    figure = Figure(figsize=(image.width / 100, image.height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    extent = (0, image.width, image.height, 0)
    axes.imshow(image, extent=extent)
    axes.set(xlim=(0, image.width), ylim=(image.height, 0))
    axes.set_axis_off()
    if detections.masks is not None:
        overlay = np.zeros((image.height, image.width, 4))
        for mask in detections.masks:
            overlay[coco_mask.decode(mask) > 0] = (0.1, 0.5, 0.7, 0.45)
        axes.imshow(overlay, extent=extent, interpolation="nearest")
    for (x1, y1, x2, y2), label, score in zip(
        detections.boxes.tolist(), detections.labels.tolist(), detections.scores.tolist(), strict=True
    ):
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="tab:blue", linewidth=1.5, snap=False)
        )
        caption = f"{categories[label]['name']} {score:.2f}"
        background = {"facecolor": "tab:blue", "edgecolor": "none", "pad": 1, "alpha": 0.8}
        axes.text(max(x1, 0), max(y1, 0), caption, color="white", fontsize=7, bbox=background, clip_on=True)
    figure.savefig(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
