"""COCO annotations as hotcoco's ground truth."""

from __future__ import annotations

import hotcoco
import numpy as np

from shared.data.annotations import CocoAnnotations
from shared.data.segmentations import wrong_segmentation
from shared.errors import UserError


def to_hotcoco(annotations: CocoAnnotations, masks: bool = True, keypoints: bool = False) -> hotcoco.COCO:
    """The annotations as hotcoco's data set, in the file's own float64.

    Its images have the positions of their ids among all of the file's, sorted, its categories the labels, and its
    annotations their rows in `annotations.columns` from 1 on: ids of a file may be negative, or greater than the
    float64 of hotcoco's results can hold.

    Raises:
        UserError: a segmentation that is no polygon or RLE, an RLE of another size than its image.
    """
    columns = annotations.columns
    positions = np.empty(len(annotations), dtype=np.int64)
    positions[np.argsort(annotations.image_ids)] = np.arange(len(annotations))
    segmentation = _segmentations(annotations) if masks else None
    images = [
        {"id": position, "height": height, "width": width, "file_name": ""}
        for position, height, width in zip(
            positions.tolist(), columns["heights"].tolist(), columns["widths"].tolist(), strict=True
        )
    ]
    categories = [{**category, "id": label} for label, category in enumerate(annotations.categories)]
    image_of = np.repeat(positions, np.diff(columns["offsets"]))
    try:
        if keypoints:  # which hotcoco takes a dict an annotation only
            rows = _annotation_dicts(columns, image_of, segmentation)
            return hotcoco.COCO({"images": images, "categories": categories, "annotations": rows})
        return hotcoco.COCO.from_arrays(
            images=images,
            categories=categories,
            image_ids=image_of,
            category_ids=columns["labels"],
            boxes=columns["boxes"],
            area=columns["areas"],
            iscrowd=columns["iscrowd"],
            segmentation=segmentation,
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{annotations.path or 'the annotations'} cannot be evaluated on: {error}") from error


def _segmentations(annotations: CocoAnnotations) -> list[list | dict]:
    """The segmentation of each annotation, [] where there is none, each one that hotcoco can score: polygons of less
    than three points, which enclose nothing, are left out."""
    segmentations = []
    for record in annotations:
        for piece in record.segmentations:
            if isinstance(piece, list):
                piece = [polygon for polygon in piece if not (isinstance(polygon, list) and len(polygon) < 6)]
            if wrong := wrong_segmentation(piece, record.height, record.width) if piece else None:
                annotation_id = annotations.columns["annotation_ids"][len(segmentations)]
                raise UserError(
                    f"{annotations.path or 'the annotations'}: the segmentation of annotation {annotation_id}, on "
                    f"image {record.image_id}, {wrong}; correct it, or leave it out"
                )
            segmentations.append(piece or [])
    return segmentations


def _annotation_dicts(columns: dict[str, np.ndarray], image_of: np.ndarray, segmentation: list | None) -> list[dict]:
    rows = []
    for i, image in enumerate(image_of.tolist()):
        points = columns["keypoints"][i]
        row = {
            "id": i + 1,
            "image_id": image,
            "category_id": int(columns["labels"][i]),
            "bbox": columns["boxes"][i].tolist(),
            "area": float(columns["areas"][i]),
            "iscrowd": int(columns["iscrowd"][i]),
            "keypoints": points.ravel().tolist(),
            "num_keypoints": int((points[:, 2] > 0).sum()),
        }
        rows.append(row if segmentation is None else {**row, "segmentation": segmentation[i]})
    return rows
