"""COCO files and folders for the benchmarks: small ones repeated, or made, with detections near their objects."""

import json
import shutil
from pathlib import Path

import hotcoco
import numpy as np
from pycocotools import mask as coco_mask

from shared.data import synthetic
from shared.evaluation.detections import Detections

IMAGES, ANNOTATIONS = 118_287, 1_070_000  # COCO's
HEIGHT, WIDTH, PER_IMAGE, CATEGORIES = 240, 320, 15, 20  # of what `truth_and_detections` makes


def paths_of(folder: Path, split: str) -> tuple[Path, Path]:
    """The annotation file and the images of a split, `train` or `val`, in a COCO folder."""
    return folder / f"annotations/instances_{split}2017.json", folder / f"{split}2017"


def read_source(source: Path | None) -> dict:
    """A COCO file, or that of 400 synthetic images."""
    return json.loads(source.read_text()) if source else synthetic.coco_split(0, 400)


def by_image(coco: dict) -> dict[int, list[dict]]:
    """The annotations of each image."""
    found = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        found[annotation["image_id"]].append(annotation)
    return found


def make_file(
    source: Path | dict | None, path: Path, count: int = IMAGES, per_image: float = ANNOTATIONS / IMAGES
) -> tuple[int, int]:
    """Writes a file of COCO's size that repeats `source`. Returns the numbers of its images and annotations."""
    coco, written = source if isinstance(source, dict) else read_source(source), 0
    images, own = coco["images"], by_image(coco)
    pool = [annotation for annotations in own.values() for annotation in annotations]
    with path.open("w") as file:
        file.write('{"images": [')
        for i in range(count):
            image = {**images[i % len(images)], "id": i + 1, "file_name": f"{i:012d}.jpg"}
            file.write((", " if i else "") + json.dumps(image))
        file.write('], "annotations": [')
        for i in range(count):
            annotations, first = own[images[i % len(images)]["id"]], round(i * per_image)
            while written < round((i + 1) * per_image):
                number = written - first
                annotation = annotations[number] if number < len(annotations) else pool[written % len(pool)]
                file.write((", " if written else "") + json.dumps({**annotation, "id": written + 1, "image_id": i + 1}))
                written += 1
        file.write('], "categories": ' + json.dumps(coco["categories"]) + "}")
    return count, written


def data_folder(source: Path | None, folder: Path, train: int, val: int = 4, size: int = 512) -> None:
    """Makes a COCO folder that repeats the images of the COCO folder `source`, or has synthetic images of `size`.

    A repeated image has a name of its own, so no cache of decoded images holds all of them.
    """
    (folder / "annotations").mkdir(parents=True)
    if source is None:
        synthetic.write(folder, train=train, val=val, size=size)
    for split, count in (("train", train), ("val", val)):
        path, images = paths_of(folder, split)
        if source is None:
            (folder / f"annotations/{split}.json").rename(path)
            (folder / split).rename(images)
            continue
        coco = json.loads((source / path.relative_to(folder)).read_text())
        own, repeated, rows = by_image(coco), [], []
        images.mkdir()
        for number in range(1, count + 1):
            image = coco["images"][(number - 1) % len(coco["images"])]
            name = f"{number:012d}{Path(image['file_name']).suffix}"
            shutil.copy(source / images.name / image["file_name"], images / name)
            repeated.append({**image, "id": number, "file_name": name})
            rows += [{**row, "image_id": number} for row in own[image["id"]]]
        coco["images"] = repeated
        coco["annotations"] = [{**row, "id": number} for number, row in enumerate(rows, 1)]
        path.write_text(json.dumps(coco))


def yolo_split(annotations: Path, images: Path, folder: Path, split: str) -> list[dict]:
    """Links the images of a COCO file into `images/` of a YOLO folder, by their ids, and writes `labels/`.

    Returns:
        The categories in YOLO's order.
    """
    coco, links = json.loads(annotations.read_text()), folder / "images" / split
    links.mkdir(parents=True)
    for image in coco["images"]:
        source = images / image["file_name"]
        image["file_name"] = f"{image['id']}{source.suffix}"
        (links / image["file_name"]).symlink_to(source)
    coco["annotations"] = [one for one in coco["annotations"] if min(one["bbox"][2:]) > 0]
    copied = folder / f"{split}.json"
    copied.write_text(json.dumps(coco))
    hotcoco.COCO(str(copied)).to_yolo(str(folder / "labels" / split))
    return sorted(coco["categories"], key=lambda category: category["id"])


def truth_and_detections(
    images: int,
    masks: bool,
    boxes: int = PER_IMAGE,
    categories: int = CATEGORIES,
    size: tuple[int, int] = (HEIGHT, WIDTH),
) -> tuple[dict, list[Detections]]:
    """A COCO data set, and as many detections per image as objects, near them. Masks are RLE."""
    rng, (height, width) = np.random.default_rng(0), size
    annotations, detections = [], []
    for image in range(images):
        sides = np.exp(rng.uniform(np.log(8), np.log(300), (boxes, 2)))
        truth = np.hstack([rng.uniform(0, 1, (boxes, 2)) * np.maximum([width, height] - sides, 1), sides])
        found = truth + rng.normal(size=truth.shape) * 0.08 * np.tile(sides, 2)
        found[:, 2:] = np.maximum(found[:, 2:], 1)
        labels, crowd = rng.integers(0, categories, boxes), (rng.uniform(size=boxes) < 0.01).astype(int)
        rles = [{**r, "counts": r["counts"].decode()} for r in _ellipses(rng, truth, size)] if masks else [None] * boxes
        columns = truth.tolist(), sides.prod(axis=1).tolist(), labels.tolist(), crowd.tolist(), rles
        for row in zip(*columns, strict=True):
            annotation = dict(zip(("bbox", "area", "category_id", "iscrowd", "segmentation"), row, strict=True))
            annotations.append({"id": len(annotations) + 1, "image_id": image, **annotation})
        corners = np.hstack([found[:, :2], found[:, :2] + found[:, 2:]])
        found_masks = _ellipses(rng, found, size) if masks else None
        detections.append(Detections(image, corners, rng.uniform(size=boxes), labels, found_masks))
    rows = [{"id": i, "file_name": f"{i}.jpg", "height": height, "width": width} for i in range(images)]
    named = [{"id": label, "name": f"category {label}"} for label in range(categories)]
    return {"info": {}, "images": rows, "annotations": annotations, "categories": named}, detections


def _ellipses(rng: np.random.Generator, boxes: np.ndarray, size: tuple[int, int]) -> list[dict]:
    """RLE of 24 corners near the ellipse in each box."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.42, 0.5, (len(boxes), 24, 1)) + 0.5
    polygons = (boxes[:, None, :2] + circle * boxes[:, None, 2:]).clip(0, size[::-1])
    return coco_mask.frPyObjects(polygons.reshape(len(boxes), -1).tolist(), *size)
