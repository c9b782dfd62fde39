"""A report on detections: `report.html`, one page with numbers, figures, pictures and words."""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from shared.config.file import flattened
from shared.data.annotations import CocoAnnotations
from shared.data.storage import ImageStorage
from shared.environment import versions_of
from shared.errors import count_of
from shared.evaluation.detections import Detections, from_coco_results
from shared.evaluation.evaluator import CocoEvaluator, iou_types_of
from shared.evaluation.gathered import GatheredDetections
from shared.log import redacted, without_secrets
from shared.report.analysis import RESAMPLES, Analyses, Analysis, analyse
from shared.report.image_errors import ERROR_TYPES, Suspect, worst_images
from shared.report.page import (
    TITLES,
    check_page,
    open_page,
    parse_page_options,
    picture_of_errors,
    picture_of_suspect,
    write_page,
)
from shared.report.plots import figures_of, svg_of

_NOT_THERE = "–"


@dataclass
class About:
    """The run that a report describes.

    Attributes:
        title: of the page.
        facts: name and value, the first table.
        changed: keys of the config that differ from the shipped file: key, the file's value, this one's.
        shipped: the name of that file.
        curves: learning curves by title.
    """

    title: str = "Detections"
    facts: Mapping[str, Any] = field(default_factory=dict)
    changed: Sequence[tuple[str, Any, Any]] = ()
    shipped: str = ""
    curves: Mapping[str, Figure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.title = redacted(self.title)
        self.facts = {name: redacted(value) if isinstance(value, str) else value for name, value in self.facts.items()}


def software(code: Path) -> dict[str, str]:
    """The versions of the packages, and the git commit if the folder is part of a repository.

    Args:
        code: the detector's folder, whose requirements.txt names the packages of the detector.
    """
    requirements = code / "requirements.txt"
    own = re.findall(r"^[\w.-]+", requirements.read_text(), re.MULTILINE) if requirements.is_file() else []
    versions = {
        "Python": sys.version.split()[0],
        **versions_of(["torch", "torchvision", "determined", "hotcoco", *own]),
    }
    facts = {"versions": ", ".join(f"{package} {version}" for package, version in versions.items())}
    if commit := _git(code, "rev-parse", "--short=12", "HEAD"):
        changed = _git(code, "status", "--porcelain", "--untracked-files=no")
        facts["git commit"] = f"{commit}{', with changes' if changed else ''}"
    return facts


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", folder, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def speed(reports: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Images per second, and the share of the time that the training waited for data: the medians of the reports."""

    def median(name: str) -> float | None:
        values = [report["metrics"].get(name) for report in reports if report["split"] == "train"]
        values = [value for value in values if value is not None]
        return float(np.median(values)) if values else None

    facts = {}
    if (images := median("images_per_second")) is not None:
        facts["images/s in training"] = f"{images:.1f}"
    if (waiting := median("data_wait")) is not None:
        facts["waiting for data"] = f"{100 * waiting:.1f} % of the time"
    return facts


def changed_keys(config: Mapping[str, Any], original: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs between two resolved configs: the key, the original's value, this one's."""
    there, here = flattened(without_secrets(original)), flattened(without_secrets(config))
    rows = [(key, there.get(key, _NOT_THERE), here.get(key, _NOT_THERE)) for key in sorted(there.keys() | here.keys())]
    return [row for row in rows if row[1] != row[2]]


_IMAGES_PER_TYPE = 4
_SUSPECTS = 24
_LEAST_COST = 0.005  # of AP50: lower costs are not worth a word
_LOST_TO = {
    "Cls": "detections of the wrong category",
    "Loc": "inexact boxes",
    "Both": "detections with a wrong category and an inexact box",
    "Dupe": "second detections of an object",
    "Bkg": "detections on background",
    "Miss": "objects that are not found",
}


def report(
    annotations: CocoAnnotations | str | os.PathLike,
    detections: Iterable[Detections],
    output: str | os.PathLike,
    images: ImageStorage | str | os.PathLike | None = None,
    iou_types: Sequence[str] | None = None,
    image_ids: Iterable[int] | None = None,
    keypoint_sigmas: Sequence[float] | None = None,
    min_score: float | None = None,
    resamples: int = RESAMPLES,
    about: About | None = None,
    max_detections: int | None = None,
) -> Analyses:
    """Write a page on how good the detections are, and `<name>.json` with its numbers.

    Args:
        detections: one per image. On an image without one nothing is found.
        output: the HTML file.
        images: the folder of the images, for pictures; None for no pictures.
        iou_types: None for boxes, and masks and keypoints if all detections have them.
        image_ids: see `evaluate`.
        keypoint_sigmas: see `evaluate`.
        max_detections: see `evaluate`.
        min_score: the lowest score that is drawn; None for the best threshold.
        resamples: how often images are drawn again for the intervals; 0 for no intervals.

    Returns:
        The numbers.

    Raises:
        UserError: see `evaluate`; an image's name leads out of the folder; the page cannot be written, or would replace
            the annotations.
    """
    annotations, output, images = open_page(annotations, output, images)
    detections, about = list(detections), about or About()
    iou_types = iou_types_of(detections, annotations) if iou_types is None else iou_types
    analyses = analyse(annotations, detections, iou_types, image_ids, keypoint_sigmas, resamples, max_detections)
    if min_score is None:
        min_score = 0.3 if math.isnan(analyses.best_threshold) else analyses.best_threshold
    write_page(
        "report.html.jinja",
        output,
        numbers=_numbers(analyses),
        about=about,
        summary=summary_of(analyses),
        curves=_drawn(about.curves, "curves"),
        analyses=analyses,
        sections=[
            {"iou_type": iou_type, "of": of, "figures": _drawn(figures_of(of, annotations.category_names), iou_type)}
            for iou_type, of in analyses.of.items()
        ],
        metric_names=list(dict.fromkeys(name for of in analyses.of.values() for name in of.metrics)),
        error_types=ERROR_TYPES,
        worst=_worst_images(analyses, images, min_score),
        suspects=[
            {**numbers, "picture": picture_of_suspect(analyses, images, suspect)}
            for numbers, suspect in zip(_suspects(analyses)[:_SUSPECTS], analyses.suspects, strict=False)
        ],
        expected_false=_expected_false(analyses.suspects),
        drawn_from=min_score,
        has_images=images is not None,
    )
    return analyses


def report_of(
    evaluator: CocoEvaluator,
    found: GatheredDetections,
    output: Path,
    images: ImageStorage,
    about: About,
    min_score: float | None = None,
) -> None:
    """Writes the `report` of an evaluation, and prints its summary."""
    analyses = report(
        evaluator.annotations,
        found.detections(),
        output,
        images,
        evaluator.iou_types,
        np.setdiff1d(evaluator.image_ids, found.skipped).tolist(),
        evaluator.keypoint_sigmas,
        min_score,
        about=about,
        max_detections=evaluator.max_detections,
    )
    print(f"\n{summary_of(analyses)}\nthe report: {output}")


def _drawn(figures: dict[str, Any], salt: str) -> dict[str, str]:
    return {title: svg_of(figure, f"{salt} {title}") for title, figure in figures.items()}


def _worst_images(analyses: Analyses, images: ImageStorage | None, min_score: float) -> dict[str, dict[str, Any]]:
    """By error type, how many errors there are, and the images with most of them."""
    names, types = analyses.annotations.category_names, {}
    for kind in ERROR_TYPES:
        of_kind, rows = [one for one in analyses.wrong if one.kind == kind], []
        for index, wrong in worst_images(of_kind, _IMAGES_PER_TYPE):
            said = [names[one.label] + ("" if one.detection is None else f" {one.score:.2f}") for one in wrong]
            rows.append(
                {
                    **analyses.named(index),
                    "picture": picture_of_errors(analyses, images, index, wrong, min_score),
                    "said": ", ".join(said[:8]) + (f" and {len(said) - 8} more" if len(said) > 8 else ""),
                }
            )
        if rows:
            types[kind] = {"count": len(of_kind), "images": rows}
    return types


def _suspects(analyses: Analyses) -> list[dict[str, Any]]:
    annotations, rows = analyses.annotations, []
    names, ids, columns = annotations.category_names, annotations.category_ids, annotations.columns
    for suspect in analyses.suspects:
        row, box = suspect.annotation, suspect.box.astype(float)
        rows.append(
            {
                "kind": suspect.kind,
                **analyses.named(suspect.image),
                "annotation_id": None if row is None else int(columns["annotation_ids"][row]),
                "annotated": None if row is None else names[int(columns["labels"][row])],
                "detected": names[suspect.label],
                "category_id": ids[suspect.label],
                "score": suspect.score,
                "chance_false": suspect.chance_false,
                "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
            }
        )
    return rows


def _numbers(analyses: Analyses) -> dict[str, Any]:
    """The page for programs."""
    numbers = {"best_threshold": analyses.best_threshold, "images": len(analyses.indices)}
    for iou_type, of in analyses.of.items():
        numbers[iou_type] = {
            "metrics": of.metrics,
            "intervals": of.intervals,
            "best_f1": of.curve.best_f1,
            "expected_calibration_error": of.calibration["ece"],
            "errors": of.errors and {name: of.errors[name] for name in ("delta_ap", "counts")},
            "categories": [vars(row) for row in of.categories],
        }
    return {**numbers, "suspected_annotations": _suspects(analyses)}


# --- in words


def summary_of(analyses: Analyses) -> str:
    """The result in words: the metrics, the costliest errors, and annotations worth a look."""
    boxes = analyses.of["bbox"]
    counted = [row.objects for row in boxes.categories if row.objects]
    size = f"{count_of(len(analyses.indices), 'image')} with {count_of(sum(counted), 'object')}"
    size += f" of {len(counted)} {'category' if len(counted) == 1 else 'categories'}."
    if not counted:
        return f"{size} There is no object to find in these images, so that nothing can be scored."
    if boxes.curve.best is None:
        return f"{size} {'No detection is right.' if len(boxes.curve.thresholds) else 'Nothing was detected.'}"
    sentences = [size, *_crowded_images(analyses), f"{_number('mAP', boxes)}, {_number('mAP_50', boxes, 'AP50')}."]
    for iou_type, of in analyses.of.items():
        if iou_type != "bbox":
            sentences.append(f"By {TITLES[iou_type]} {_number('mAP', of)}.")
    sentences += [
        _losses(analyses),
        f"F1 is greatest, {boxes.curve.best_f1:.3f}, with detections of a score of at least "
        f"{boxes.curve.best_threshold:.3f}.",
        _annotations_worth_a_look(analyses.suspects),
    ]
    return " ".join(sentences)


def _crowded_images(analyses: Analyses) -> list[str]:
    """Sentences if images hold more objects than detections are scored."""
    annotations, boxes = analyses.annotations, analyses.of["bbox"]
    limit = max(boxes.evaluation.params.max_dets)
    objects = boxes.verdicts.objects
    cells = np.stack([annotations.image_rows[objects], annotations.columns["labels"][objects]])
    cells, counts = np.unique(cells, axis=1, return_counts=True)
    images = len(np.unique(cells[0, counts > limit]))
    if not images:
        return []
    hold = "image holds" if images == 1 else "images hold"
    return [
        f"{images} {hold} more than {limit} objects of one category.",
        f"Only {limit} detections of a category are scored per image, so that some objects count as missed; "
        "max_detections sets another number.",
    ]


def _number(name: str, of: Analysis, called: str | None = None) -> str:
    value, called = of.metrics[name], called or name
    if math.isnan(value):
        return f"{called} undefined"
    interval = of.intervals.get(name)
    return f"{called} {value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _losses(analyses: Analyses) -> str:
    names, costs = analyses.annotations.category_names, analyses.of["bbox"].errors["delta_ap"]
    parts = []
    for kind in sorted(ERROR_TYPES, key=lambda kind: -costs[kind])[:3]:
        if costs[kind] < _LEAST_COST:
            break
        counts = np.bincount([one.label for one in analyses.wrong if one.kind == kind], minlength=len(names))
        most = f", most on “{names[counts.argmax()]}”" if np.count_nonzero(counts) > 1 else ""
        parts.append(f"to {_LOST_TO[kind]} ({costs[kind]:.3f} of AP50{most})")
    if not parts:
        return "No type of error costs half a hundredth of AP50."
    return f"Most is lost {', then '.join(parts)}."


def _annotations_worth_a_look(suspects: Sequence[Suspect]) -> str:
    if not suspects:
        return "No annotation stands out as wrong."
    missing = sum(suspect.kind == "missing" for suspect in suspects)
    kinds = ((len(suspects) - missing, "of another category"), (missing, "missing"))
    said = " and ".join(f"{number} {what}" for number, what in kinds if number)
    are = "annotation is" if len(suspects) == 1 else "annotations are"
    return f"{len(suspects)} {are} worth a look: {said}. {_expected_false(suspects)}"


def _expected_false(suspects: Sequence[Suspect]) -> str:
    """How many of the flagged annotations are right, as a sentence."""
    expected = math.ceil(sum(suspect.chance_false for suspect in suspects))
    verb = "is" if expected == 1 else "are"
    return f"About {expected} of these {count_of(len(suspects), 'flag')} {verb} expected to be false."


# --- the command


def report_main(arguments: Sequence[str]) -> None:
    """`python3 -m shared report`."""
    parser = argparse.ArgumentParser(
        prog="python3 -m shared report", description="Write a page on how good any detections in COCO's format are."
    )
    parser.add_argument("annotations", type=Path, help="COCO annotations")
    parser.add_argument("results", type=Path, help="detections in COCO's result format")
    given = parse_page_options(parser, "report.html", arguments)
    check_page(given.output, [given.annotations, given.results])
    annotations = CocoAnnotations.open(given.annotations)
    detections = from_coco_results(given.results, annotations)
    facts = {"annotations": given.annotations, "detections": given.results}
    about = About(title=f"{given.results.name} on {given.annotations.name}", facts=facts)
    analyses = report(
        annotations,
        detections,
        given.output,
        given.images,
        resamples=given.resamples,
        about=about,
        max_detections=given.max_detections,
    )
    print(summary_of(analyses))
    print(f"the page: {given.output}; its numbers: {given.output.with_suffix('.json')}")
