"""COCO files and folders for the benchmarks, made by repeating a small one or the synthetic data set."""

import json
from pathlib import Path

from shared.data import synthetic

IMAGES, ANNOTATIONS = 118_287, 1_070_000  # COCO's


def make_file(source: Path | None, path: Path) -> tuple[int, int]:
    """Writes the repeated file in pieces; returns how many images and annotations it has."""
    coco = json.loads(source.read_text()) if source else synthetic.coco_split(0, 400)
    images = coco["images"]
    by_image = {image["id"]: [] for image in images}
    for annotation in coco["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    per_image = ANNOTATIONS / IMAGES
    written = 0
    with path.open("w") as file:
        file.write('{"images": [')
        for i in range(IMAGES):
            image = {**images[i % len(images)], "id": i + 1, "file_name": f"{i:012d}.jpg"}
            file.write((", " if i else "") + json.dumps(image))
        file.write('], "annotations": [')
        pool = [annotation for annotations in by_image.values() for annotation in annotations]
        for i in range(IMAGES):
            own = by_image[images[i % len(images)]["id"]]
            while written < round((i + 1) * per_image):
                number = written - round(i * per_image)
                annotation = own[number] if number < len(own) else pool[written % len(pool)]
                file.write((", " if written else "") + json.dumps({**annotation, "id": written + 1, "image_id": i + 1}))
                written += 1
        file.write('], "categories": ' + json.dumps(coco["categories"]) + "}")
    return IMAGES, written


def data_folder(source: Path | None, images: int, folder: Path) -> dict[str, Path]:
    """A COCO folder with `images` images: those of `source`'s train2017 again and again, else synthetic ones."""
    (folder / "annotations").mkdir(parents=True)
    if source is None:
        synthetic.write(folder, train=images, val=4, size=512)
        for split in ("train", "val"):
            (folder / split).rename(folder / f"{split}2017")
            (folder / f"annotations/{split}.json").rename(folder / f"annotations/instances_{split}2017.json")
    else:
        for split, count in (("train", images), ("val", 8)):
            coco = json.loads((source / f"annotations/instances_{split}2017.json").read_text())
            own = {image["id"]: [] for image in coco["images"]}
            for annotation in coco["annotations"]:
                own[annotation["image_id"]].append(annotation)
            repeated: dict[str, list] = {"info": {}, "images": [], "annotations": [], "categories": coco["categories"]}
            for i in range(count):
                image = coco["images"][i % len(coco["images"])]
                repeated["images"].append({**image, "id": i + 1})
                for annotation in own[image["id"]]:
                    number = len(repeated["annotations"]) + 1
                    repeated["annotations"].append({**annotation, "id": number, "image_id": i + 1})
            (folder / f"annotations/instances_{split}2017.json").write_text(json.dumps(repeated))
            (folder / f"{split}2017").symlink_to((source / f"{split}2017").absolute())
    return {split: folder / f"annotations/instances_{split}2017.json" for split in ("train", "val")}
