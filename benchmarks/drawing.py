"""Seconds per picture with its boxes, and with masks too: ours, and by `torchvision.utils`.

Both take turns on each image in one process, and write PNG files.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from command_line import main
from pycocotools import mask as coco_mask
from side_by_side import ratio
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from coco_files import data_folder
from shared.data.annotations import CocoAnnotations
from shared.data.images import read_image
from shared.data.storage import DiskImages
from shared.evaluation import drawing as ours
from shared.evaluation.detections import Detections
from shared.evaluation.lettering import DEFAULT_FONT, color_of


def drawing(source: Path | None = None, images: int = 24) -> dict:
    """
    source: a COCO folder; default: synthetic images
    images: of its val2017
    """
    with tempfile.TemporaryDirectory() as name:
        out, folder = Path(name), source
        if source is None:
            folder = out / "coco"
            data_folder(None, folder, train=1, val=images + 1, size=640)
        annotations = CocoAnnotations.open(folder / "annotations/instances_val2017.json", out)
        stored = DiskImages(folder / "val2017")
        return {
            "masks" if masks else "boxes": measure(annotations, stored, masks, images, out) for masks in (False, True)
        }


def measure(annotations: CocoAnnotations, images: DiskImages, with_masks: bool, count: int, out: Path) -> dict:
    seconds = {"torchvision": [], "ours": []}
    for index in range(min(count + 1, len(annotations))):
        record = annotations[index]
        image = read_image(images, record.file_name)
        truth = ours.objects_of_truth(record, annotations.categories, with_masks=True)
        empty = coco_mask.encode(np.zeros((record.height, record.width), np.uint8, order="F"))
        masks = [mask or empty for mask in truth.masks] if with_masks else None
        found = Detections(record.image_id, truth.boxes, np.linspace(1, 0.4, len(truth.labels)), truth.labels, masks)
        for side, draw in (("torchvision", draw_with_torchvision), ("ours", ours.save_picture_of)):
            started = time.perf_counter()
            draw(out / f"{side}.png", image, found, annotations.categories)
            seconds[side].append(time.perf_counter() - started)
    seconds = {side: spent[1:] for side, spent in seconds.items()}  # the first warms up
    pairs = [mine / theirs for theirs, mine in zip(*seconds.values(), strict=True)]
    milliseconds = {f"{side}_ms": round(1000 * statistics.median(spent), 1) for side, spent in seconds.items()}
    return {"images": len(pairs), **ratio(pairs), **milliseconds}


def draw_with_torchvision(path: Path, image, detections: Detections, categories: list[dict]) -> None:
    """The same boxes, masks and captions with `torchvision.utils`."""
    pixels = pil_to_tensor(image)
    colors = [color_of(label) for label in detections.labels.tolist()]
    if detections.masks is not None:
        masks = np.ascontiguousarray(coco_mask.decode(detections.masks).transpose(2, 0, 1))
        pixels = draw_segmentation_masks(pixels, torch.from_numpy(masks).bool(), 0.45, colors)
    captions = [
        f"{categories[label]['name']} {score:.2f}"
        for label, score in zip(detections.labels.tolist(), detections.scores.tolist(), strict=True)
    ]
    size = ours.letter_size(image.size)
    boxes = torch.from_numpy(detections.boxes)
    font = {"font": DEFAULT_FONT, "font_size": size, "fill_labels": True}
    ours.save(to_pil_image(draw_bounding_boxes(pixels, boxes, captions, colors, width=2, **font)), path)


if __name__ == "__main__":
    main(__doc__, drawing)
