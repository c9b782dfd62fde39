"""The formats of exported files, and what a file says about itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shared.errors import UserError

# by name, the file that holds the detector
FORMATS = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2"}
TRANSFORMERS = "transformers"  # the format of a folder that the package transformers loads
TENSORRT = "tensorrt"  # is refused with the command that makes an engine of an ONNX file
PREFIX = "detector."  # of the names in a file, which its format shares with other programs


@dataclass(frozen=True)
class Metadata:
    """Attributes:
    categories: COCO categories; the position is the label.
    outputs: the names of the file's outputs, see `Exportable` and `Raw`.
    input_size: (height, width) of the network's input; None if it follows from the image.
    precision: "float32", "float16" or "int8".
    best_threshold: the score with the highest F1 over all categories; None if it is not known.
    thresholds: the same of each category, by name, for those that have one.
    checkpoint: the SHA-256 of the checkpoint's weights; None for pretrained weights.
    batches: that the checkpoint was trained for.
    versions: the packages that wrote the file.
    max_iou: the IoU above which the detector drops the lower-scoring of two detections of a category.
    decoding: a raw file's, see `Decoding`; None if the file finds detections itself.
    """

    categories: list[dict]
    outputs: tuple[str, ...]
    input_size: tuple[int, int] | None
    precision: str
    best_threshold: float | None
    thresholds: dict[str, float]
    checkpoint: str | None
    batches: int | None
    versions: dict[str, str]
    max_iou: float = 0.5
    decoding: dict[str, Any] | None = None

    def strings(self) -> dict[str, str]:
        """For a file: JSON by name."""
        return {PREFIX + name: json.dumps(value) for name, value in asdict(self).items()}

    @classmethod
    def of_strings(cls, strings: Mapping[str, str], path: Path) -> Metadata:
        """
        Raises:
            UserError: the file is not one of `export`.
        """
        try:
            names = [field.name for field in fields(cls)]
            values = {name: json.loads(strings[PREFIX + name]) for name in names if PREFIX + name in strings}
            return cls(**{**values, "outputs": tuple(values["outputs"])})
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"--model: {path} has no metadata of a detector. Fix: give a file that `model_def.py export` wrote"
            ) from error


def thresholds_of_report(report: Path) -> tuple[float | None, dict[str, float]] | None:
    """The best threshold of all detections and of each category, from a run's report.json; None without a report."""
    if not report.is_file():
        return None
    written = json.loads(report.read_text())
    return written["best_threshold"], known_thresholds(written["bbox"]["categories"])


def known_thresholds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By name, of the rows of a report's table of categories."""
    known = {row["name"]: row["threshold"] for row in rows}
    return {name: threshold for name, threshold in known.items() if threshold is not None and math.isfinite(threshold)}
