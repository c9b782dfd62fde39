"""The first paragraph of a report, and of a comparison: what the numbers say, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shared.errors import count_of
from shared.report.analysis import Analyses, Analysis, costliest, counts_by_category
from shared.report.image_errors import ERROR_TYPES
from shared.report.suspects import Suspect

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
