"""Whether one detector is better than another: `compare.html`, differences with their bootstrap intervals."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from markupsafe import Markup

from shared.data.annotations import CocoAnnotations
from shared.data.storage import ImageStorage
from shared.errors import UserError
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import for_json, iou_types_of
from shared.report.analysis import NAMES, RESAMPLES, SEED, Analyses, analyse
from shared.report.difference import Difference
from shared.report.page import check_page, write_numbers, write_page
from shared.report.pictures import open_pictures, picture_of_difference
from shared.report.plots import differences, svg_of
from shared.report.report import TITLES

_IMAGES = 8
_CATEGORIES_OF_FIGURE = 20


@dataclass
class Comparison:
    """B against A, by one IoU type.

    Attributes:
        a, b: their names.
        metrics: overall, and by size.
        categories: AP of each that has objects.
    """

    a: str
    b: str
    iou_type: str
    metrics: list[Difference]
    categories: list[Difference]

    @property
    def overall(self) -> Difference:
        return self.metrics[0]


def compare(
    annotations: CocoAnnotations | str | os.PathLike,
    detections: Mapping[str, Sequence[Detections]],
    output: str | os.PathLike,
    images: ImageStorage | str | os.PathLike | None = None,
    iou_types: Sequence[str] | None = None,
    image_ids: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
) -> list[Comparison]:
    """Writes a page on how far the second and each further set of detections is from the first, and `<name>.json` with
    its numbers beside it.

    Args:
        detections: by name, two sets or more; of each one `Detections` for each image.
        output: the HTML file.
        images: the folder of the images, for pictures; none where None.
        iou_types: what is compared; where None boxes, and masks and keypoints where all have them.
        image_ids: the images to evaluate on; all of the file where None.
        resamples: of the images, for the intervals; 0 for none.

    Returns:
        Each further set against the first, by each IoU type.

    Raises:
        UserError: as of `evaluate`; an image's name leads out of the folder; the page cannot be written, or would
            replace the annotations.
    """
    if len(detections) < 2:
        raise UserError("compare: give two sets of detections, or more")
    if not isinstance(annotations, CocoAnnotations):
        annotations = CocoAnnotations.open(annotations)
    output = Path(output)
    check_page(output, [annotations.path])
    images = open_pictures(images, annotations)
    if iou_types is None:
        scored = [iou_types_of(list(found), annotations) for found in detections.values()]
        iou_types = [iou_type for iou_type in scored[0] if all(iou_type in each for each in scored)]
    of = {name: analyse(annotations, found, iou_types, image_ids, resamples=0) for name, found in detections.items()}
    first, *others = of
    comparisons = [
        _compare(of[first], of[name], first, name, iou_type, resamples) for name in others for iou_type in of[first].of
    ]
    write_page("compare.html.jinja", output, **_content(of, comparisons, images))
    write_numbers(output, [_plain(comparison) for comparison in comparisons])
    return comparisons


def _compare(a: Analyses, b: Analyses, name_a: str, name_b: str, iou_type: str, resamples: int) -> Comparison:
    one, other = a.of[iou_type], b.of[iou_type]
    errors = _standard_errors(one.evaluation, other.evaluation, resamples)
    metrics = [
        Difference.of(name, one.metrics[name], other.metrics[name], errors.get(NAMES[name], math.nan))
        for name in one.metrics
        if name in NAMES
    ]
    categories = []
    image_of = np.repeat(np.arange(len(a.annotations)), np.diff(a.annotations.columns["offsets"]))
    objects = one.verdicts.objects
    labels = a.annotations.columns["labels"][objects]
    for row, there in zip(one.categories, other.categories, strict=True):
        if row.objects:
            # the objects of a single image come with it or not at all: nothing varies
            images = len(np.unique(image_of[objects[labels == row.label]]))
            pair = (_of_category(each.evaluation, row.label, iou_type) for each in (one, other))
            own = _standard_errors(*pair, resamples if images > 1 else 0)
            categories.append(Difference.of(row.name, row.ap, there.ap, own.get("AP", math.nan)))
    return Comparison(name_a, name_b, iou_type, metrics, categories)


def _standard_errors(one: hotcoco.COCOeval, other: hotcoco.COCOeval, resamples: int) -> dict[str, float]:
    """Of the difference of each number, by hotcoco's name for it: by a bootstrap over images, the same for both."""
    if resamples < 2 or len(one.params.img_ids) < 2:
        return {}
    compared = hotcoco.compare(one, other, n_bootstrap=resamples, seed=SEED)
    return {name: found["std_err"] for name, found in compared["ci"].items()}


def _of_category(evaluation: hotcoco.COCOeval, label: int, iou_type: str) -> hotcoco.COCOeval:
    """The same detections, evaluated on one category: hotcoco has intervals of all categories together only."""
    own = hotcoco.COCOeval(evaluation.coco_gt, evaluation.coco_dt, iou_type)
    params = own.params
    params.img_ids = evaluation.params.img_ids
    params.cat_ids = [label]
    own.params = params
    own.evaluate()
    own.accumulate()
    return own


def summary_of(comparison: Comparison) -> str:
    """In words: which is better, how sure that is, and on what."""
    difference, a, b = comparison.overall, comparison.a, comparison.b
    by = TITLES[comparison.iou_type]
    if math.isnan(difference.delta):
        return f"By {by} there is nothing to compare {b} and {a} by."
    numbers = f"mAP of {by} {difference.b:.3f} against {difference.a:.3f}"
    if math.isnan(difference.lower):
        return f"{b} against {a}: {numbers}, {difference.delta:+.3f}; how sure that is was not asked."
    interval = f"{difference.delta:+.3f} ({difference.lower:+.3f} to {difference.upper:+.3f})"
    if difference.verdict:
        said = f"{b} is {difference.verdict} than {a}: {numbers}, {interval}."
    elif difference.lower == difference.upper == 0:
        return f"{b} and {a} are the same: {numbers}."
    else:
        said = f"These images do not show which of {b} and {a} is better: {numbers}, {interval}."
    if not math.isnan(difference.better):
        said += f" With other images of the same kind, {b} is above with a probability of {difference.better:.0%}."
    for verdict, side in (("better", "above"), ("worse", "below")):
        clear = sorted(
            (one for one in comparison.categories if one.verdict == verdict), key=lambda one: -abs(one.delta)
        )
        if clear:
            named = ", ".join(f"“{one.name}” ({one.delta:+.3f})" for one in clear[:3])
            named += f" and {len(clear) - 3} more" if len(clear) > 3 else ""
            said += f" Its interval is {side} 0 on {len(clear)} of {len(comparison.categories)} categories: {named}."
    return said


def _plain(comparison: Comparison) -> dict[str, Any]:
    return {
        "a": comparison.a,
        "b": comparison.b,
        "iou_type": comparison.iou_type,
        "metrics": [for_json(vars(one)) for one in comparison.metrics],
        "categories": [for_json(vars(one)) for one in comparison.categories],
    }


def _content(
    of: Mapping[str, Analyses], comparisons: Sequence[Comparison], images: ImageStorage | None
) -> dict[str, Any]:
    first = next(iter(of))
    iou_types = list(of[first].of)
    sections = []
    for comparison in comparisons:
        changed = [one for one in comparison.categories if not math.isnan(one.delta)]
        shown = sorted(changed, key=lambda one: -abs(one.delta))[:_CATEGORIES_OF_FIGURE]
        shown.sort(key=lambda one: -one.delta)
        figures = []
        for title, rows in (("Numbers", comparison.metrics), ("Categories", shown)):
            rows = [one for one in rows if not math.isnan(one.lower)]
            if rows:
                salt = f"{comparison.b} {comparison.iou_type} {title}"
                figures.append((title, Markup(svg_of(differences(rows), salt))))
        sections.append({"comparison": comparison, "summary": summary_of(comparison), "figures": figures})
    return {
        "title": f"{', '.join(list(of)[1:])} against {first}",
        "names": list(of),
        "of": of,
        "iou_types": iou_types,
        "titles": TITLES,
        "sections": sections,
        "pictures": {name: _pictures(of, first, name, images) for name in list(of)[1:]},
    }


def _pictures(of: Mapping[str, Analyses], first: str, name: str, images: ImageStorage | None) -> list[dict[str, Any]]:
    """The images on which F1 differs most, each at its detector's best threshold."""
    a, b = of[first], of[name]
    delta = b.f1_of_images() - a.f1_of_images()
    annotations = a.annotations
    rows = []
    for position in np.argsort(-np.abs(delta), kind="stable")[:_IMAGES].tolist():
        if delta[position] == 0:
            break
        index = int(a.indices[position])
        picture = None if images is None else picture_of_difference(a, b, images, index)
        rows.append(
            {
                "file_name": annotations.file_name(index),
                "image_id": int(annotations.image_ids[index]),
                "delta": float(delta[position]),
                "picture": picture,
            }
        )
    return rows
