"""Whether an exported file detects what its checkpoint detects, on the user's data."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from shared.data.images import read_image
from shared.data.open import SplitData
from shared.errors import count_of
from shared.evaluation.detections import Detections

SCORE = 0.05  # detections below it are noise, whose order is chance
_SAME_OBJECT = 0.5  # IoU
_IMAGES_FOR_MEMORY = 4
_PEAK = "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"


@dataclass(frozen=True)
class Side:
    """How one of the two detects.

    Attributes:
        images_per_second: from the image's file to the detections.
        peak_memory_mib: a process that detects needs this much; None if the system does not know it.
    """

    images_per_second: float
    peak_memory_mib: float | None
    device: str


@dataclass(frozen=True)
class Differences:
    """Detections of at least `SCORE`, and their partners: the same label, an IoU of at least 0.5, the best one first.

    Attributes:
        detections: the number that the checkpoint has.
        matched: of them, those with a partner in the file.
        box: the largest difference of a matched box's coordinate, in pixels; 0 without a match.
        score: the same of scores.
        lone_score: the highest score of a detection without a partner, of either; 0 if all have one.
        mask: the lowest IoU of the masks of a match; None without masks.
    """

    detections: int
    matched: int
    box: float
    score: float
    lone_score: float
    mask: float | None = None

    def __str__(self) -> str:
        said = (
            f"{self.matched} of {count_of(self.detections, 'detection')} with a score of at least {SCORE} are matched"
        )
        said += f"; the largest differences are {self.box:.2g} pixels and {self.score:.2g} of the score"
        said += "" if self.mask is None else f"; the lowest IoU of their masks is {self.mask:.3f}"
        return said + (f"; the highest score without a match is {self.lone_score:.2g}" if self.lone_score else "")


def differences(one: Sequence[Detections], other: Sequence[Detections]) -> Differences:
    """Compares the detections of two detectors on the same images."""
    others = {found.image_id: found for found in other}
    count, box, score, alone, overlaps = 0, 0.0, 0.0, [0.0], []
    matched = 0
    for first in one:
        second = others[first.image_id]
        pairs, lone = _partners(first, second)
        count += len(pairs) + len(lone)
        matched += len(pairs)
        for row, partner in pairs:
            box = max(box, float(np.abs(first.boxes[row] - second.boxes[partner]).max()))
            score = max(score, float(abs(first.scores[row] - second.scores[partner])))
            if first.masks is not None and second.masks is not None:
                masks = first.masks[row], second.masks[partner]
                overlaps.append(
                    1.0 if masks[0] == masks[1] else float(coco_mask.iou([masks[0]], [masks[1]], [0])[0, 0])
                )
        alone += [float(first.scores[row]) for row in lone]
        alone += [float(second.scores[row]) for row in _partners(second, first)[1]]
    return Differences(count, matched, box, score, max(alone), min(overlaps, default=None))


def _overlap(one: dict, other: dict) -> float:
    """The IoU of two masks, 1 for two empty ones."""
    return 1.0 if one == other else float(coco_mask.iou([one], [other], [0])[0, 0])


def _partners(one: Detections, other: Detections) -> tuple[list[tuple[int, int]], list[int]]:
    """The detections of `one` that are compared: those with a partner in `other` and its row, and those without."""
    rows, partners = _above(one, SCORE), _above(other, SCORE / 2)  # a partner may be on the other side of the limit
    overlaps = _ious(one.boxes[rows], other.boxes[partners])
    overlaps[one.labels[rows][:, None] != other.labels[partners][None]] = 0
    pairs, lone = [], []
    for row, overlap in zip(rows.tolist(), overlaps, strict=True):
        best = int(overlap.argmax()) if len(overlap) else 0
        if len(overlap) and overlap[best] >= _SAME_OBJECT:
            pairs.append((row, int(partners[best])))
            overlaps[:, best] = 0
        else:
            lone.append(row)
    return pairs, lone


def _above(found: Detections, score: float) -> np.ndarray:
    """Rows of detections of at least that score, the best first."""
    rows = np.argsort(-found.scores, kind="stable")
    return rows[found.scores[rows] >= score]


def _ious(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(M, N) of x1 y1 x2 y2 boxes."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = (high - low).clip(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (one, other)]
    same = np.abs(one[:, None] - other[None]).max(2) < 1  # boxes without area too
    return np.where(same, 1, shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-9))


def own_peak_memory() -> float | None:
    """The peak memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return None if found is None else int(found[1]) / 1024


def peak_memory_of(script: Path, model: Path, data: SplitData, indices: Sequence[int]) -> float | None:
    """The peak memory, in MiB, of `detect.py` with an exported file on some images; None if the system does not know
    it."""
    if own_peak_memory() is None:
        return None
    with tempfile.TemporaryDirectory(prefix="export-") as folder:
        paths = []
        for index in indices[:_IMAGES_FOR_MEMORY]:
            record = data.annotations[index]
            paths.append(f"{folder}/{index}.png")
            read_image(data.images, record.file_name, (record.width, record.height)).save(paths[-1])
        program = f"import re, runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__'); {_PEAK}"
        done = subprocess.run(
            [sys.executable, "-c", program, str(script), str(model), *paths], capture_output=True, text=True
        )
    if done.returncode != 0:
        raise RuntimeError(f"{script} fails with {model}: {done.stderr}")
    return int(done.stdout.splitlines()[-1]) / 1024
