"""A few pictures in the formats of COCO, Pascal VOC, WIDER FACE and Open Images, with any classes."""

import csv
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared.data import synthetic

PICTURES, SIZE = 4, 128


def write_pictures(folder: Path) -> list[list[dict[str, Any]]]:
    """Writes `folder/000000.jpg` and more. Returns the annotations of each, with classes 1 to 3, without crowds."""
    folder.mkdir(parents=True, exist_ok=True)
    annotations = []
    for index in range(PICTURES):
        image, own = synthetic.draw_sample(0, index)
        image.save(folder / f"{index:06d}.jpg")
        annotations.append(own)
    return annotations


def coco(names: Sequence[str], annotations: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """COCO's instances file, with Cityscapes' extra keys."""
    images = [
        {"id": i + 1, "file_name": f"{i:06d}.jpg", "height": SIZE, "width": SIZE, "segm_file": f"{i:06d}.png"}
        for i in range(len(annotations))
    ]
    of_all = [
        {**annotation, "image_id": i + 1, "category_id": min(annotation["category_id"], len(names))}
        for i, of_image in enumerate(annotations)
        for annotation in of_image
    ]
    return {
        "images": images,
        "annotations": [{**annotation, "id": i + 1} for i, annotation in enumerate(of_all)],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
    }


def write_coco(path: Path, names: Sequence[str], annotations: list[list[dict[str, Any]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(coco(names, annotations)))


def write_semantic(folder: Path, classes: int = 3) -> None:
    """A class map for each picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(PICTURES):
        map_ = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE) % classes
        Image.fromarray(map_).save(folder / f"{index:06d}.png")


def write_panoptic(path: Path, segments: Path, things: Sequence[str], stuff: Sequence[str]) -> None:
    """COCO's panoptic file: half of each picture is the first thing, half the first stuff class."""
    segments.mkdir(parents=True, exist_ok=True)
    annotations = []
    for index in range(PICTURES):
        ids = np.ones((SIZE, SIZE, 3), dtype=np.uint8)
        ids[:, :, 1:] = 0
        ids[: SIZE // 2, :, 0] = 2
        Image.fromarray(ids).save(segments / f"{index:06d}.png")
        area, half = SIZE * SIZE // 2, SIZE // 2
        segment = {"area": area, "iscrowd": 0}
        of_picture = [
            {**segment, "id": 1, "category_id": len(things) + 1, "bbox": [0, half, SIZE, half]},
            {**segment, "id": 2, "category_id": 1, "bbox": [0, 0, SIZE, half]},
        ]
        annotations.append({"image_id": index + 1, "file_name": f"{index:06d}.png", "segments_info": of_picture})
    names = [*things, *stuff]
    categories = [{"id": i + 1, "name": name, "isthing": int(i < len(things))} for i, name in enumerate(names)]
    images = coco(names, [[]] * PICTURES)["images"]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def write_xml(folder: Path, names: Sequence[str], image_folder: str) -> Path:
    """Pascal VOC's and WIDER FACE's layout. Returns the list of pictures."""
    annotations = write_pictures(folder / image_folder)
    (folder / "Annotations").mkdir()
    for index, of_image in enumerate(annotations):
        objects = ""
        for a in of_image:
            x, y, width, height = a["bbox"]
            name = names[min(a["category_id"], len(names)) - 1]
            objects += (
                f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x:.0f}</xmin><ymin>{y:.0f}</ymin>"
                f"<xmax>{x + width:.0f}</xmax><ymax>{y + height:.0f}</ymax></bndbox></object>"
            )
        (folder / f"Annotations/{index:06d}.xml").write_text(
            f"<annotation><folder>{image_folder}</folder><size><width>{SIZE}</width><height>{SIZE}</height>"
            f"<depth>3</depth></size>{objects}</annotation>"
        )
    listing = folder / "listing.txt"
    listing.write_text("".join(f"{index:06d}\n" for index in range(PICTURES)))
    return listing


def write_open_images(folder: Path, classes: int, challenge: bool) -> dict[str, str]:
    """Open Images' files, of the data set or the challenge. Returns the arguments that name them."""
    annotations = write_pictures(folder / "images")
    columns = "ImageID Source LabelName Confidence XMin XMax YMin YMax IsOccluded IsTruncated IsGroupOf IsDepiction"
    with (folder / "boxes.csv").open("w") as file:
        csv.writer(file).writerow([*columns.split(), "IsInside"])
        for index, of_image in enumerate(annotations):
            for a in of_image:
                x, y, width, height = (value / SIZE for value in a["bbox"])
                box = [x, x + width, y, y + height]
                csv.writer(file).writerow([f"{index:06d}", "", f"/m/{a['category_id']}", 1, *box, 0, 0, 0, 0, 0])
    lines = []
    for index, of_image in enumerate(annotations):
        lines += [f"images/{index:06d}.jpg", "1", str(len(of_image))]
        for a in of_image:
            x, y, width, height = (value / SIZE for value in a["bbox"])
            lines.append(f"{a['category_id']} {x} {y} {x + width} {y + height} 0")
    (folder / "boxes.txt").write_text("\n".join(lines) + "\n")
    with (folder / "labels.csv").open("w") as file:
        for label in range(1, classes + 1):
            row = [f"/m/{label}", f"class {label}"]
            csv.writer(file).writerow([row[1], row[0], label] if challenge else row)
    (folder / "hierarchy.json").write_text(json.dumps({"LabelName": "/m/0", "Subcategory": [{"LabelName": "/m/1"}]}))
    with (folder / "hierarchy.np").open("wb") as file:
        np.save(file, np.eye(classes))
    metas = [{"filename": f"{index:06d}.jpg", "ori_shape": (SIZE, SIZE, 3)} for index in range(PICTURES)]
    (folder / "metas.pkl").write_bytes(pickle.dumps(metas))
    (folder / "image_labels.csv").write_text("ImageID,Source,LabelName,Confidence\n")
    return {
        "ann_file": str(folder / ("boxes.txt" if challenge else "boxes.csv")),
        "img_prefix": str(folder if challenge else folder / "images"),
        "label_file": str(folder / "labels.csv"),
        "hierarchy_file": str(folder / ("hierarchy.np" if challenge else "hierarchy.json")),
        "meta_file": str(folder / "metas.pkl"),
        "image_level_ann_file": str(folder / "image_labels.csv"),
    }


def write_proposals(path: Path) -> None:
    """MMDetection's proposals: (n, 5) boxes and scores per picture."""
    proposals = np.array([[10, 10, 90, 90, 0.9], [20, 30, 60, 70, 0.8]], dtype=np.float32)
    path.write_bytes(pickle.dumps([proposals] * PICTURES))
