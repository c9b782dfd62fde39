"""A report on detections: `report.html`, one page with numbers, figures, pictures and words."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from shared.data.annotations import CocoAnnotations
from shared.data.storage import ImageStorage
from shared.errors import count_of
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import for_json, iou_types_of
from shared.report.about import About
from shared.report.analysis import NAMES, RESAMPLES, Analyses, Analysis, analyse, costliest, counts_by_category
from shared.report.image_errors import ERROR_TYPES, worst_images
from shared.report.page import check_page, write_numbers, write_page
from shared.report.pictures import open_pictures, picture_of_errors, picture_of_suspect
from shared.report.plots import figures_of, svg_of
from shared.report.suspects import Suspect

if TYPE_CHECKING:
    pass


_SHOWN = 0.005  # of AP50: what costs less is not worth a word
_LOST_TO = {
    "Cls": "detections of the wrong category",
    "Loc": "boxes that are off",
    "Both": "detections that are off in box and category",
    "Dupe": "second detections of an object",
    "Bkg": "detections on background",
    "Miss": "objects that are not found",
}
assert _LOST_TO.keys() == ERROR_TYPES.keys()


def summary_of(analyses: Analyses) -> str:
    """What is found, what is lost most and to what, which annotations are worth a look."""
    boxes = analyses.of["bbox"]
    objects = sum(row.objects for row in boxes.categories)
    sentences = [_of_size(analyses, objects)]
    if not objects:
        return f"{sentences[0]} There is no object to find in these images, so that nothing can be scored."
    if boxes.curve.best is None:
        nothing = "Nothing was detected." if not len(boxes.curve.thresholds) else "No detection is right."
        return f"{sentences[0]} {nothing}"
    sentences.append(f"{_number('mAP', boxes)}, {_number('mAP_50', boxes, 'AP50')}.")
    for iou_type, of in analyses.of.items():
        if iou_type != "bbox":
            sentences.append(f"By {'masks' if iou_type == 'segm' else iou_type} {_number('mAP', of)}.")
    sentences.append(_losses(analyses))
    sentences.append(
        f"F1 is greatest, {boxes.curve.best_f1:.3f}, where detections under a score of "
        f"{boxes.curve.best_threshold:.3f} are left out."
    )
    sentences.append(_of_annotations(analyses))
    return " ".join(sentence for sentence in sentences if sentence)


def _of_size(analyses: Analyses, objects: int) -> str:
    categories = sum(1 for row in analyses.of["bbox"].categories if row.objects)
    ies = "category" if categories == 1 else "categories"
    return f"{count_of(len(analyses.indices), 'image')} with {count_of(objects, 'object')} of {categories} {ies}."


def _number(name: str, of: Analysis, called: str | None = None) -> str:
    value = of.metrics[name]
    if math.isnan(value):
        return f"{called or name} undefined"
    interval = of.intervals.get(name)
    return f"{called or name} {value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _losses(analyses: Analyses) -> str:
    names = analyses.annotations.category_names
    parts = []
    for kind, cost in costliest(analyses.of["bbox"].errors)[:3]:
        if cost < _SHOWN:
            break
        by_category = counts_by_category(analyses.wrong, kind, names)
        most = f", most on “{by_category[0][0]}”" if len(by_category) > 1 else ""
        parts.append(f"to {_LOST_TO[kind]} ({cost:.3f} of AP50{most})")
    if not parts:
        return "No type of error costs half a hundredth of AP50."
    return f"Most is lost {', then '.join(parts)}."


def _of_annotations(analyses: Analyses) -> str:
    count = len(analyses.suspects)
    if not count:
        return "No annotation stands out as wrong."
    missing = sum(suspect.kind == "missing" for suspect in analyses.suspects)
    kinds = [
        f"{number} {what}"
        for number, what in ((count - missing, "of another category"), (missing, "missing"))
        if number
    ]
    are = "annotation is" if count == 1 else "annotations are"
    return f"{count} {are} worth a look: {' and '.join(kinds)}. {expected_false(analyses.suspects)}"


def expected_false(suspects: Sequence[Suspect]) -> str:
    """How many of the flagged annotations are right, as a sentence."""
    expected = math.ceil(sum(suspect.chance_false for suspect in suspects))
    verb = "is" if expected == 1 else "are"
    return f"About {expected} of these {count_of(len(suspects), 'flag')} {verb} expected to be false."


_IMAGES_OF_A_KIND = 4
_SUSPECTS = 24
TITLES = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}


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
) -> Analyses:
    """Writes a page of what the detections are worth, and `<name>.json` with its numbers beside it.

    Args:
        detections: one for each image; an image without any counts as one on which nothing is found.
        output: the HTML file.
        images: the folder of the images, for pictures; none where None.
        iou_types: what is scored; where None boxes, and masks and keypoints where all detections have them.
        image_ids, keypoint_sigmas: as of `evaluate`.
        min_score: the lowest score that is drawn; the best threshold where None.
        resamples: of the images, for the intervals; 0 for none.

    Returns:
        The numbers.

    Raises:
        UserError: as of `evaluate`; an image's name leads out of the folder; the page cannot be written, or would
            replace the annotations.
    """
    if not isinstance(annotations, CocoAnnotations):
        annotations = CocoAnnotations.open(annotations)
    output = Path(output)
    check_page(output, [annotations.path])
    images = open_pictures(images, annotations)
    detections = list(detections)
    iou_types = iou_types_of(detections, annotations) if iou_types is None else iou_types
    analyses = analyse(annotations, detections, iou_types, image_ids, keypoint_sigmas, resamples)
    about = about or About()
    write_page("report.html.jinja", output, **_content(analyses, images, min_score, about))
    write_numbers(output, numbers_of(analyses))
    return analyses


def numbers_of(analyses: Analyses) -> dict[str, Any]:
    """What the page says, for programs: nan as None."""
    annotations = analyses.annotations

    def of_suspect(suspect: Any) -> dict[str, Any]:
        record_id = int(annotations.image_ids[suspect.image])
        row = suspect.annotation
        box = suspect.box.astype(float)
        return {
            "kind": suspect.kind,
            "image_id": record_id,
            "file_name": annotations.file_name(suspect.image),
            "annotation_id": None if row is None else int(annotations.columns["annotation_ids"][row]),
            "category_id": annotations.category_ids[suspect.label],
            "score": suspect.score,
            "chance_false": suspect.chance_false,
            "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
        }

    return {
        **for_json({"best_threshold": analyses.best_threshold}),
        "images": len(analyses.indices),
        **{
            iou_type: {
                "metrics": for_json(of.metrics),
                "intervals": of.intervals,
                **for_json({"best_f1": of.curve.best_f1, "expected_calibration_error": of.calibration["ece"]}),
                "errors": of.errors and {"delta_ap": of.errors["delta_ap"], "counts": of.errors["counts"]},
                "categories": [
                    for_json({key: value for key, value in vars(row).items() if key != "label"})
                    for row in of.categories
                ],
            }
            for iou_type, of in analyses.of.items()
        },
        "suspected_annotations": [of_suspect(suspect) for suspect in analyses.suspects],
    }


def _content(analyses: Analyses, images: ImageStorage | None, min_score: float | None, about: About) -> dict[str, Any]:
    names = analyses.annotations.category_names
    best = analyses.best_threshold
    drawn_from = min_score if min_score is not None else 0.3 if math.isnan(best) else best
    sections = [
        {
            "iou_type": iou_type,
            "title": TITLES[iou_type],
            "of": of,
            "figures": [
                (title, Markup(svg_of(figure, f"{iou_type} {title}")))
                for title, figure in figures_of(of, names).items()
            ],
        }
        for iou_type, of in analyses.of.items()
    ]
    metric_names = [name for name in NAMES if any(name in of.metrics for of in analyses.of.values())]
    return {
        "title": about.title,
        "facts": about.facts,
        "changed": about.changed,
        "shipped": about.shipped,
        "summary": summary_of(analyses),
        "curves": about.curves and Markup(svg_of(about.curves, "curves")),
        "analyses": analyses,
        "sections": sections,
        "metric_names": metric_names,
        "error_types": ERROR_TYPES,
        "worst": _worst(analyses, images, drawn_from),
        "suspects": _suspects(analyses, images),
        "expected_false": expected_false(analyses.suspects),
        "drawn_from": drawn_from,
        "has_images": images is not None,
    }


def _worst(analyses: Analyses, images: ImageStorage | None, min_score: float) -> list[dict[str, Any]]:
    annotations, names = analyses.annotations, analyses.annotations.category_names
    kinds = []
    for kind, words in ERROR_TYPES.items():
        rows = []
        for index, wrong in worst_images(analyses.wrong, kind, _IMAGES_OF_A_KIND):
            said = [
                names[one.label] if one.detection is None else f"{names[one.label]} {one.score:.2f}" for one in wrong
            ]
            rows.append(
                {
                    "file_name": annotations.file_name(index),
                    "image_id": int(annotations.image_ids[index]),
                    "picture": None if images is None else picture_of_errors(analyses, images, index, wrong, min_score),
                    "said": ", ".join(said[:8]) + (f" and {len(said) - 8} more" if len(said) > 8 else ""),
                }
            )
        if rows:
            count = sum(one.kind == kind for one in analyses.wrong)
            kinds.append({"kind": kind, "words": words, "count": count, "images": rows})
    return kinds


def _suspects(analyses: Analyses, images: ImageStorage | None) -> list[dict[str, Any]]:
    annotations, names = analyses.annotations, analyses.annotations.category_names
    columns = annotations.columns
    rows = []
    for suspect in analyses.suspects[:_SUSPECTS]:
        annotated = None if suspect.annotation is None else names[int(columns["labels"][suspect.annotation])]
        rows.append(
            {
                "file_name": annotations.file_name(suspect.image),
                "image_id": int(annotations.image_ids[suspect.image]),
                "annotation_id": None
                if suspect.annotation is None
                else int(columns["annotation_ids"][suspect.annotation]),
                "annotated": annotated,
                "detected": f"{names[suspect.label]} {suspect.score:.2f}",
                "chance_false": suspect.chance_false,
                "picture": None if images is None else picture_of_suspect(analyses, images, suspect),
            }
        )
    return rows
