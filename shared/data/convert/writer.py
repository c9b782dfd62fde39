"""COCO's JSON from what the readers return."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shared import durable
from shared.data.annotations import CocoAnnotations
from shared.data.checks import refuse_names_outside
from shared.data.convert.contents import Contents, Split, names_in_use
from shared.errors import UserError


@dataclass
class Written:
    """A COCO file that was written, and its content."""

    path: Path
    split: str
    part: Split
    categories: int

    def __str__(self) -> str:
        boxes = [annotation for image in self.part.images for annotation in image["annotations"]]
        counts = {
            "images": len(self.part.images),
            "boxes": len(boxes),
            "categories": self.categories,
            "images without boxes": sum(not image["annotations"] for image in self.part.images),
            self.part.crowds: sum(annotation["iscrowd"] for annotation in boxes),
            **_if_any("masks", sum("segmentation" in annotation for annotation in boxes)),
            **_if_any("boxes with keypoints", sum("keypoints" in annotation for annotation in boxes)),
            **self.part.counts,
        }
        return f"{self.path}: {', '.join(f'{what} {count}' for what, count in counts.items())}"


def to_coco(contents: Contents, source: Path) -> dict[str, dict[str, list]]:
    """COCO's dictionary of each split, all with the same categories.

    Ids that the reader gives stay. The others count from 1.

    Raises:
        UserError: two images of a split have one name, a name leads out of the images' folder, or a number is not one
            that a training accepts.
    """
    categories = contents.categories or [{"name": name} for name in names_in_use(contents.splits.values())]
    categories = [{"id": number, **category} for number, category in enumerate(categories, 1)]
    ids = {category["name"]: category["id"] for category in categories}
    return {split: _of_split(part, categories, ids, source) for split, part in contents.splits.items()}


def _of_split(part: Split, categories: list[dict], ids: dict[str, int], source: Path) -> dict[str, list]:
    twice = [name for name, count in Counter(image["file_name"] for image in part.images).items() if count > 1]
    if twice:
        raise UserError(
            f"{source}: two images have the file name {twice[0]!r}, so that their boxes cannot be told apart. Fix: "
            "rename one of the two, or convert each folder by itself"
        )
    if not categories:
        raise UserError(f"{source}: has no boxes, and names no categories. Fix: name another file, or draw boxes")
    coco: dict[str, list] = {"images": [], "annotations": [], "categories": categories}
    for number, image in enumerate(part.images, 1):
        rows = image["annotations"]
        coco["images"].append({"id": number, **{k: v for k, v in image.items() if k != "annotations"}})
        for row in rows:
            plain: dict[str, Any] = {"id": len(coco["annotations"]) + 1, "image_id": coco["images"][-1]["id"]}
            plain["category_id"] = ids[row["category"]]
            plain |= {key: value for key, value in row.items() if key != "category"}
            coco["annotations"].append(plain)
    # a training would refuse these later
    refuse_names_outside(CocoAnnotations.from_dict(coco), str(source))
    return coco


def write(contents: Contents, source: Path, output: Path) -> list[Written]:
    """Writes a COCO file per split: `<output>_train.json` and so on, or `<output>.json` alone."""
    written = []
    for split, coco in to_coco(contents, source).items():
        path = path_of(output, split)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.write_file(path, msgspec.json.encode(coco))
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}). Fix: give another OUTPUT, or make room"
            ) from error
        written.append(Written(path, split, contents.splits[split], len(coco["categories"])))
    return written


def path_of(output: Path, split: str) -> Path:
    """The file of a split."""
    return output.with_name(f"{output.stem}_{split}.json" if split else f"{output.stem}.json")


def _if_any(what: str, count: int) -> dict[str, int]:
    return {what: count} if count else {}
