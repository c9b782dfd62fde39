"""Shapes with panoptic and semantic annotations, in COCO's layout."""

import json

import numpy as np
from PIL import Image

from shared.data import synthetic


def write_panoptic_shapes(folder):
    """Writes three things and one stuff class, the background."""
    from panopticapi.utils import id2rgb
    from pycocotools import mask as coco_mask

    synthetic.write(folder, train=8, val=4)
    for split in ("train", "val"):
        coco = json.loads((folder / f"annotations/{split}.json").read_text())
        (folder / f"{split}_panoptic").mkdir()
        (folder / f"{split}_semantic").mkdir()
        annotations = []
        for image in coco["images"]:
            name = image["file_name"]
            # Detectron2's semantic data has JPEG images
            image["file_name"] = name.replace(".png", ".jpg")
            Image.open(folder / split / name).save(folder / split / image["file_name"])
            (folder / split / name).unlink()
            ids = np.full((128, 128), 1000 * image["id"], dtype=np.uint32)
            segments = [{"id": 1000 * image["id"], "category_id": 4, "iscrowd": 0, "bbox": [0, 0, 128, 128]}]
            for annotation in coco["annotations"]:
                if annotation["image_id"] != image["id"] or annotation["iscrowd"]:
                    continue
                mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], 128, 128)))
                number = 1000 * image["id"] + annotation["id"]
                ids[mask > 0] = number
                segments.append({**annotation, "id": number})
            segments = [{**s, "area": int((ids == s["id"]).sum())} for s in segments if (ids == s["id"]).any()]
            Image.fromarray(id2rgb(ids)).save(folder / f"{split}_panoptic" / name)
            # 0 is all things together, 1 the background
            background = (ids == 1000 * image["id"]).astype(np.uint8)
            Image.fromarray(background).save(folder / f"{split}_semantic" / name)
            annotations.append({"image_id": image["id"], "file_name": name, "segments_info": segments})
        categories = [{**category, "isthing": 1} for category in coco["categories"]]
        categories.append({"id": 4, "name": "background", "isthing": 0})
        panoptic = {"images": coco["images"], "annotations": annotations, "categories": categories}
        (folder / f"annotations/{split}.json").write_text(json.dumps(coco))
        (folder / f"annotations/{split}_panoptic.json").write_text(json.dumps(panoptic))
    return folder


# how a user registers them for Detectron2
REGISTER_PANOPTIC = """
from detectron2.data.datasets import register_coco_panoptic_separated

things = ["rectangle", "circle", "triangle"]
metadata = dict(
    thing_dataset_id_to_contiguous_id={{1: 0, 2: 1, 3: 2}},
    stuff_dataset_id_to_contiguous_id={{0: 0, 4: 1}},
    thing_classes=things,
    stuff_classes=["things", "background"],
    thing_colors=[(0, 0, 0)] * 3,
    stuff_colors=[(0, 0, 0)] * 2,
)
for split in ("train", "val"):
    folder = {folder!r}
    register_coco_panoptic_separated(
        f"pan_{{split}}", metadata, f"{{folder}}/{{split}}", f"{{folder}}/{{split}}_panoptic",
        f"{{folder}}/annotations/{{split}}_panoptic.json", f"{{folder}}/{{split}}_semantic",
        f"{{folder}}/annotations/{{split}}.json",
    )
"""
