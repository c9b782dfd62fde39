"""COCO files and folders for the benchmarks: small or synthetic ones repeated, and diamonds with masks."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared.data import synthetic

IMAGES, ANNOTATIONS = 118_287, 1_070_000  # COCO's
HEIGHT, WIDTH, PER_IMAGE, CATEGORIES = 240, 320, 15, 20  # of the diamonds


def read_source(source: Path | None) -> dict:
    """A COCO file, or that of 400 synthetic images."""
    return json.loads(source.read_text()) if source else synthetic.coco_split(0, 400)


def by_image(coco: dict) -> dict[int, list[dict]]:
    """The annotations of each image."""
    found = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        found[annotation["image_id"]].append(annotation)
    return found


def make_file(source: Path | None, path: Path, count: int = IMAGES) -> tuple[int, int]:
    """Writes a file of COCO's size that repeats `source`. Returns the numbers of its images and annotations."""
    coco = read_source(source)
    images, own = coco["images"], by_image(coco)
    pool = [annotation for annotations in own.values() for annotation in annotations]
    per_image, written = ANNOTATIONS / IMAGES, 0
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
    """Makes a COCO folder that repeats the images of the COCO folder `source`, or has synthetic images of `size`."""
    (folder / "annotations").mkdir(parents=True)
    if source is None:
        synthetic.write(folder, train=train, val=val, size=size)
    for split, count in (("train", train), ("val", val)):
        path, images = folder / f"annotations/instances_{split}2017.json", folder / f"{split}2017"
        if source is None:
            (folder / f"annotations/{split}.json").rename(path)
            (folder / split).rename(images)
            continue
        coco = json.loads((source / path.relative_to(folder)).read_text())
        own = by_image(coco)
        chosen = [(i + 1, coco["images"][i % len(coco["images"])]) for i in range(count)]
        rows = [{**one, "image_id": i} for i, image in chosen for one in own[image["id"]]]
        coco["images"] = [{**image, "id": i} for i, image in chosen]
        coco["annotations"] = [{**row, "id": number} for number, row in enumerate(rows, 1)]
        path.write_text(json.dumps(coco))
        images.symlink_to((source / images.name).absolute())


def diamonds(images: int) -> tuple[dict, Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]]:
    """COCO's truth of diamonds, and a detector's jittered masks of them.

    A result is an image's id, (N, 4) boxes as x1 y1 x2 y2, (N,) scores, (N,) labels and (N, height, width) masks.
    """
    rng = np.random.default_rng(0)
    radii = rng.uniform(6, 60, (images, PER_IMAGE))
    x, y = (rng.uniform(radii, side - radii) for side in (WIDTH, HEIGHT))
    labels = rng.integers(CATEGORIES, size=radii.shape)
    rows = []
    for image, place in np.ndindex(radii.shape):
        r, cx, cy = (float(values[image, place]) for values in (radii, x, y))
        rows.append({"id": len(rows) + 1, "image_id": image + 1, "category_id": int(labels[image, place]) + 1})
        rows[-1] |= {"bbox": [cx - r, cy - r, 2 * r, 2 * r], "area": 2 * r * r, "iscrowd": 0}
        rows[-1]["segmentation"] = [[cx - r, cy, cx, cy - r, cx + r, cy, cx, cy + r]]
    sizes = [{"id": i + 1, "file_name": f"{i + 1}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(images)]
    categories = [{"id": i + 1, "name": f"category {i + 1}"} for i in range(CATEGORIES)]

    def results() -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        row, column = np.ogrid[:HEIGHT, :WIDTH]
        found_x, found_y = (values + rng.normal(0, 3, values.shape) for values in (x, y))
        scores = rng.uniform(size=radii.shape)
        for i, (r, cx, cy) in enumerate(zip(radii, found_x, found_y, strict=True)):
            away = abs(column - cx[:, None, None]) + abs(row - cy[:, None, None])
            boxes = np.stack([cx - r, cy - r, cx + r, cy + r], axis=1).astype(np.float32)
            yield i + 1, boxes, scores[i], labels[i], away < r[:, None, None]

    return {"info": {}, "images": sizes, "annotations": rows, "categories": categories}, results()
