"""Small versions of all detectors. tests/<detector>/tiny_<detector>.py has one each.

Such a file has `config`, an experiment config for the shapes, and `trial_class`, whose library may be missing. Its
constants say what the tests of all detectors need to know of this one.
"""

import contextlib
import importlib
import math
import sys
from types import ModuleType

from tiny_experiment import ROOT

# COCO's 17 keypoints of a person
KEYPOINT_NAMES = [
    "nose",
    *(
        f"{side}_{part}"
        for part in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
        for side in ("left", "right")
    ),
]


def with_keypoints(coco: dict) -> dict:
    """The same COCO annotations with 17 points around each box's center. Some are invisible or unlabeled; crowds and
    each seventh object have none."""
    annotations = []
    for annotation in coco["annotations"]:
        x, y, width, height = annotation["bbox"]
        points = []
        for i in range(17):
            angle = 2 * math.pi * i / 17
            visibility = 0 if (annotation["id"] + i) % 5 == 0 else 1 + i % 2
            at = (
                round(x + width * (0.5 + 0.4 * math.cos(angle)), 1),
                round(y + height * (0.5 + 0.4 * math.sin(angle)), 1),
            )
            points += [*at, visibility] if visibility else [0, 0, 0]
        if annotation["iscrowd"] or annotation["id"] % 7 == 0:
            points = [0] * 51
        counted = sum(visibility > 0 for visibility in points[2::3])
        annotations.append({**annotation, "keypoints": points, "num_keypoints": counted})
    categories = [
        {**category, "keypoints": KEYPOINT_NAMES, "skeleton": [[6, 8], [8, 10]]} for category in coco["categories"]
    ]
    return {**coco, "annotations": annotations, "categories": categories}


def _tiny_detectors() -> dict[str, ModuleType]:
    """Those files by detector, the quickest first."""
    folders = [path.parent for path in ROOT.glob("tests/*/tiny_*.py")]
    sys.path.extend(map(str, folders))
    names = sorted((folder.name for folder in folders), key=lambda name: (name != "efficientdet", name))
    return {name: importlib.import_module(f"tiny_{name}") for name in names}


TINY_DETECTORS = _tiny_detectors()
EFFICIENTDET = ROOT / "efficientdet"  # the quickest, for the tests that need one detector
efficientdet_config = TINY_DETECTORS["efficientdet"].config
CONFIGS = {name: tiny.config for name, tiny in TINY_DETECTORS.items()}
MAIN_DETECTORS = [name for name, tiny in TINY_DETECTORS.items() if not hasattr(tiny, "HAS_TESTS_OF_ITS_OWN")]


def trial_classes() -> dict[str, type]:
    """The trial of each detector whose library is installed."""
    trials = {}
    for name, tiny in TINY_DETECTORS.items():
        with contextlib.suppress(ImportError, SystemExit):
            trials[name] = tiny.trial_class()
    return trials
