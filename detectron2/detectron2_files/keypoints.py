"""The keypoints of COCO categories, as Detectron2's mappers ask for them, and which of them a flip swaps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.transforms import RandomFlip

from shared.errors import UserError

COCO_NAME = "data"


def describe(categories: Sequence[dict]) -> tuple[str, ...]:
    """The name of metadata that says of COCO categories what mappers ask for: their keypoints."""
    if COCO_NAME in MetadataCatalog.list():
        MetadataCatalog.remove(COCO_NAME)
    metadata = MetadataCatalog.get(COCO_NAME)
    metadata.thing_classes = [category["name"] for category in categories]
    metadata.keypoint_names = next((c["keypoints"] for c in categories if c.get("keypoints")), [])
    metadata.keypoint_flip_map = _flipped(metadata.keypoint_names)
    return (COCO_NAME,)


def _flipped(names: Sequence[str]) -> list[tuple[str, str]]:
    """Left and right of the same point, by their names: `left_eye`, `LEFT_EYE`, `L_eye`, `eye_l`, `lefteye`."""
    rights = {rest: name for name in names for side, rest in _sides(name, "startswith", "endswith") if side == "right"}
    pairs: dict[str, str] = {}
    for name in names:
        for side, rest in _sides(name, "startswith", "endswith"):
            if side == "left" and rest in rights:
                pairs.setdefault(name, rights[rest])
    return list(pairs.items())


def _sides(name: str, *tests: str) -> list[tuple[str, tuple[str, ...]]]:
    """The sides that a name may say, and the rest of it: its words say one, or how it begins or ends.

    Args:
        tests: "startswith" and "endswith", if they count: `bright` ends with a side, and has none.
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])|\d+", name)]
    sides = {"left": "left", "l": "left", "right": "right", "r": "right"}
    found = [(sides[w], (*words[:i], "", *words[i + 1 :])) for i, w in enumerate(words) if w in sides]
    whole = name.lower()
    for side in ("left", "right"):
        found += [(side, (test, whole.replace(side, "", 1))) for test in tests if getattr(whole, test)(side)]
    return found


def check_keypoint_flips(mapper: Any, categories: Sequence[dict]) -> str:
    """The keypoints that a horizontal flip of the mapper swaps, in words; "" if it does not flip keypoints.

    Raises:
        UserError: a name looks like a side, and the other side is missing.
    """
    names = next((category["keypoints"] for category in categories if category.get("keypoints")), [])
    augmentations = getattr(getattr(mapper, "augmentations", None), "augs", ())
    if not names or not any(isinstance(each, RandomFlip) and each.horizontal for each in augmentations):
        return ""
    pairs = _flipped(names)
    swapped = {name for pair in pairs for name in pair}
    for name in names:
        if name not in swapped and _sides(name, "startswith"):
            raise UserError(
                f"data.train.annotations: the keypoint {name!r} looks like a side, and no keypoint is its other side. "
                "A horizontal flip would train a wrong point. Fix: name both sides alike, such as left_eye and "
                "right_eye, or remove the flip from the config"
            )
    others = ", ".join(name for name in names if name not in swapped)
    return f"{', '.join(' ↔ '.join(pair) for pair in pairs) or 'none'}; unchanged: {others or 'none'}"
