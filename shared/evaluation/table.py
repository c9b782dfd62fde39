"""COCO's numbers as text, and for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from shared.evaluation.evaluator import summary_metrics


def metrics_table(metrics: dict[str, float], iou_types: tuple[str, ...]) -> str:
    """COCO's numbers, and the AP of each category, as text; other metrics a line each."""
    if not all(f"{iou_types[0]}_{name}" in metrics for name in summary_metrics(iou_types[0])):
        return tabulate(list(metrics.items()), floatfmt=".4f")
    names = list(dict.fromkeys(name for iou_type in iou_types for name in summary_metrics(iou_type)))
    names += [name.removeprefix(f"{iou_types[0]}_") for name in metrics if name.startswith(f"{iou_types[0]}_AP/")]
    rows = [[name, *(metrics.get(f"{iou_type}_{name}") for iou_type in iou_types)] for name in names]
    return tabulate(rows, headers=["", *iou_types], floatfmt=".4f", missingval="-")


def for_json(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """With None in the place of nan and infinity, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in numbers.items()
    }
