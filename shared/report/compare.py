"""Whether one detector is better than another: `compare.html`, differences with their bootstrap intervals."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from matplotlib.figure import Figure

from shared.data.annotations import CocoAnnotations
from shared.data.storage import ImageStorage
from shared.errors import UserError
from shared.evaluation.detections import Detections, from_coco_results
from shared.evaluation.evaluator import iou_types_of
from shared.evaluation.gathered import load_detections
from shared.report.analysis import RESAMPLES, Analyses, analyse, interval_around, standard_errors
from shared.report.page import TITLES, check_page, open_page, parse_page_options, picture_of_difference, write_page
from shared.report.plots import new_figure, short_name, styled, svg_of

_IMAGES = 8
_CATEGORIES_OF_FIGURE = 20
_FILES_OF_A_RUN = ("detections.npz", "results.json")  # the first that is there is compared


@dataclass(frozen=True)
class Difference:
    """By how much B is above A; nan if one of them has nothing to score.

    Attributes:
        name: a metric or a category.
        a, b, delta: the numbers, and b - a.
        lower, upper: the ends of the 95 % interval around delta, see `interval_around`; nan without a bootstrap.
        better: the probability that B is above A, by the interval's normal distribution; nan without a bootstrap, and
            if the two are the same.
    """

    name: str
    a: float
    b: float
    delta: float
    lower: float = math.nan
    upper: float = math.nan
    better: float = math.nan

    @classmethod
    def of(cls, name: str, a: float, b: float, standard_error: float) -> Difference:
        """The difference of two shares.

        Args:
            standard_error: of b - a, by a bootstrap over the same images for both; nan without one.
        """
        delta = b - a
        if math.isnan(delta) or math.isnan(standard_error):
            return cls(name, a, b, delta)
        better = statistics.NormalDist().cdf(delta / standard_error) if standard_error > 0 else math.nan
        return cls(name, a, b, delta, *interval_around(delta, standard_error, -1.0, 1.0), better)

    @property
    def verdict(self) -> str:
        """ "better" or "worse" if the interval is on one side of 0, else ""."""
        return "better" if self.lower > 0 else "worse" if self.upper < 0 else ""


@dataclass(frozen=True)
class Comparison:
    """B against A, by one IoU type.

    Attributes:
        a, b: their names.
        metrics: overall, and by size.
        categories: AP of each category that has objects.
    """

    a: str
    b: str
    iou_type: str
    metrics: list[Difference]
    categories: list[Difference]

    @property
    def overall(self) -> Difference:
        return self.metrics[0]


@dataclass(frozen=True)
class Compared:
    """Each further set of detections against the first, by each IoU type.

    Attributes:
        of: the numbers of each set by itself, by name.
    """

    of: dict[str, Analyses]
    comparisons: list[Comparison]

    def numbers(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [dataclasses.asdict(comparison) for comparison in self.comparisons]

    def content(self, images: ImageStorage | None) -> dict[str, Any]:
        """The values for the template `compare.html.jinja`."""
        first, *others = self.of
        sections = [
            {"comparison": one, "summary": summary_of(one), "figures": _figures(one)} for one in self.comparisons
        ]
        pictures = {name: _pictures(self.of[first], self.of[name], images) for name in others}
        return {"of": self.of, "sections": sections, "pictures": pictures}


def compared(
    annotations: CocoAnnotations,
    detections: Mapping[str, Sequence[Detections]],
    iou_types: Sequence[str],
    image_ids: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
    max_detections: int | None = None,
) -> Compared:
    """As `compare`, without a page."""
    of = {
        name: analyse(annotations, found, iou_types, image_ids, resamples=0, max_detections=max_detections)
        for name, found in detections.items()
    }
    first, *others = of
    return Compared(
        of,
        [
            _compare(of[first], of[name], first, name, iou_type, resamples)
            for name in others
            for iou_type in of[first].of
        ],
    )


def compare(
    annotations: CocoAnnotations | str | os.PathLike,
    detections: Mapping[str, Sequence[Detections]],
    output: str | os.PathLike,
    images: ImageStorage | str | os.PathLike | None = None,
    iou_types: Sequence[str] | None = None,
    image_ids: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
    max_detections: int | None = None,
) -> list[Comparison]:
    """Write a page on how far each further set of detections is from the first, and `<name>.json` with its numbers.

    Args:
        detections: two sets or more, by name, each with one `Detections` per image.
        output: the HTML file.
        images: the folder of the images, for pictures; None for no pictures.
        iou_types: None for boxes, and masks and keypoints if all sets have them.
        image_ids: the images to evaluate on; None for all of the file.
        resamples: how often images are drawn again for the intervals; 0 for no intervals.
        max_detections: see `evaluate`.

    Returns:
        Each further set against the first, by each IoU type.

    Raises:
        UserError: see `evaluate`; an image's name leads out of the folder; the page cannot be written, or would replace
            the annotations.
    """
    if len(detections) < 2:
        raise UserError("compare: fewer than two sets of detections. Fix: give two or more")
    annotations, output, images = open_page(annotations, output, images)
    if iou_types is None:
        scored = [iou_types_of(found, annotations) for found in detections.values()]
        iou_types = [iou_type for iou_type in scored[0] if all(iou_type in each for each in scored)]
    found = compared(annotations, detections, iou_types, image_ids, resamples, max_detections)
    first, *others = found.of
    write_page(
        "compare.html.jinja",
        output,
        numbers=found.numbers(),
        title=f"{', '.join(others)} against {first}",
        **found.content(images),
    )
    return found.comparisons


def _compare(a: Analyses, b: Analyses, name_a: str, name_b: str, iou_type: str, resamples: int) -> Comparison:
    one, other = a.of[iou_type], b.of[iou_type]
    errors = standard_errors(one.evaluation, other.evaluation, resamples)
    metrics = [
        Difference.of(name, one.metrics[name], other.metrics[name], errors.get(name, math.nan)) for name in one.metrics
    ]
    categories = []
    objects = one.verdicts.objects
    image_of, labels = a.annotations.image_rows[objects], a.annotations.columns["labels"][objects]
    for label, (row, there) in enumerate(zip(one.categories, other.categories, strict=True)):
        if row.objects:
            # the objects of a single image are all in a resample or all out: nothing varies
            varies = len(np.unique(image_of[labels == label])) > 1
            pair = (_of_category(each.evaluation, label) for each in (one, other))
            own = standard_errors(*pair, resamples if varies else 0)
            categories.append(Difference.of(row.name, row.ap, there.ap, own.get("mAP", math.nan)))
    return Comparison(name_a, name_b, iou_type, metrics, categories)


def _of_category(evaluation: hotcoco.COCOeval, label: int) -> hotcoco.COCOeval:
    """The same detections, evaluated on one category: hotcoco has intervals of all categories together only."""
    own = hotcoco.COCOeval(evaluation.coco_gt, evaluation.coco_dt, evaluation.params.iou_type)
    for name in ("img_ids", "max_dets", "kpt_oks_sigmas"):
        setattr(own.params, name, getattr(evaluation.params, name))
    own.params.cat_ids = [label]
    own.evaluate()
    own.accumulate()
    return own


def summary_of(comparison: Comparison) -> str:
    """In words: which is better, how certain that is, and on which categories."""
    difference, a, b = comparison.overall, comparison.a, comparison.b
    by = TITLES[comparison.iou_type]
    if math.isnan(difference.delta):
        return f"By {by} there is nothing to compare {b} and {a} by."
    numbers = f"mAP of {by} {difference.b:.3f} against {difference.a:.3f}"
    if math.isnan(difference.lower):
        return f"{b} against {a}: {numbers}, {difference.delta:+.3f}, without an interval."
    if difference.lower == difference.upper == 0:
        return f"{b} and {a} are the same: {numbers}."
    interval = f"{difference.delta:+.3f} ({difference.lower:+.3f} to {difference.upper:+.3f})"
    if difference.verdict:
        said = f"{b} is {difference.verdict} than {a}: {numbers}, {interval}."
    else:
        said = f"These images do not show which of {b} and {a} is better: {numbers}, {interval}."
    if not math.isnan(difference.better):
        said += f" With other images of the same kind, {b} is above with a probability of {difference.better:.0%}."
    for verdict, side in (("better", "above"), ("worse", "below")):
        clear = [one for one in comparison.categories if one.verdict == verdict]
        if clear:
            clear.sort(key=lambda one: -abs(one.delta))
            named = ", ".join(f"“{one.name}” ({one.delta:+.3f})" for one in clear[:3])
            named += f" and {len(clear) - 3} more" if len(clear) > 3 else ""
            of_all = len(comparison.categories)
            categories = "category" if of_all == 1 else "categories"
            said += f" Its interval is {side} 0 on {len(clear)} of {of_all} {categories}: {named}."
    return said


def _figures(comparison: Comparison) -> list[tuple[str, str]]:
    """Title and figure: the numbers, and the categories with the largest differences."""
    changed = [one for one in comparison.categories if not math.isnan(one.delta)]
    shown = sorted(changed, key=lambda one: -abs(one.delta))[:_CATEGORIES_OF_FIGURE]
    figures = []
    for title, rows in (("Numbers", comparison.metrics), ("Categories", sorted(shown, key=lambda one: -one.delta))):
        if rows := [one for one in rows if not math.isnan(one.lower)]:
            figures.append((title, svg_of(_figure_of(rows), f"{comparison.b} {comparison.iou_type} {title}")))
    return figures


def _figure_of(rows: Sequence[Difference]) -> Figure:
    """Each difference with its interval, in color if the interval is on one side of 0."""
    with styled():
        figure, axes = new_figure(6.0, 1.0 + 0.3 * len(rows))
        for position, row in enumerate(rows):
            color = hotcoco.plot.SERIES_COLORS[{"better": 8, "worse": 1, "": 9}[row.verdict]]
            axes.plot([row.lower, row.upper], [position, position], color=color, linewidth=2)
            axes.plot([row.delta], [position], "o", color=color, markersize=6)
        axes.axvline(0, color=hotcoco.plot.CHROME["tick"], linewidth=0.75)
        axes.set_yticks(range(len(rows)), [short_name(row.name) for row in rows])
        axes.invert_yaxis()
    return figure


def _pictures(a: Analyses, b: Analyses, images: ImageStorage | None) -> list[dict[str, Any]]:
    """The images on which F1 differs most, each detector at its best threshold."""
    delta = _f1_of_images(b) - _f1_of_images(a)
    rows = []
    for position in np.argsort(-np.abs(delta), kind="stable")[:_IMAGES].tolist():
        if delta[position]:
            index = int(a.indices[position])
            picture = picture_of_difference(a, b, images, index)
            rows.append({**a.named(index), "delta": float(delta[position]), "picture": picture})
    return rows


def _f1_of_images(analyses: Analyses) -> np.ndarray:
    """(images,) F1 of boxes of at least the best threshold; 1 if there is nothing and nothing is found."""
    count = len(analyses.annotations)
    image_of = analyses.annotations.image_rows
    objects = np.bincount(image_of[analyses.of["bbox"].verdicts.objects], minlength=count)
    invented = np.bincount([one.image for one in analyses.wrong if one.detection is not None], minlength=count)
    right = np.bincount(image_of[analyses.found_objects], minlength=count)
    sums = right + invented + objects
    return np.divide(2 * right, sums, out=np.ones(count), where=sums > 0)[analyses.indices]


# --- the command


def compare_main(arguments: Sequence[str]) -> None:
    """`python3 -m shared compare`."""
    parser = argparse.ArgumentParser(
        prog="python3 -m shared compare",
        description="Whether one detector is better than another: B, C … against A.",
    )
    parser.add_argument("detections", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a results.json")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="COCO annotations")
    given = parse_page_options(parser, "compare.html", arguments)
    read = [path / name if path.is_dir() else path for path in given.detections for name in _FILES_OF_A_RUN]
    check_page(given.output, [given.annotations, *read])
    annotations = CocoAnnotations.open(given.annotations)
    runs = [_open(path, annotations) for path in given.detections]
    categories = [name for name in annotations.category_names if all(name in run.category_names for run in runs)]
    if not categories:
        raise UserError("compare: the runs have no category in common. Fix: compare runs that share one")
    if len(categories) < len(annotations.category_names):
        annotations = annotations.select_categories(categories)
        print(f"compared by the categories that all have: {', '.join(categories)}")
    evaluated = [set(run.image_ids) for run in runs if run.image_ids is not None]
    image_ids = sorted(set.intersection(*evaluated)) if evaluated else None
    detections = {name: run.of(categories) for name, run in zip(_names(given.detections), runs, strict=True)}
    comparisons = compare(
        annotations,
        detections,
        given.output,
        given.images,
        image_ids=image_ids,
        resamples=given.resamples,
        max_detections=given.max_detections or _max_detections(given.detections, runs),
    )
    print("\n".join(summary_of(comparison) for comparison in comparisons))
    print(f"the page: {given.output}; its numbers: {given.output.with_suffix('.json')}")


@dataclass(frozen=True)
class _Run:
    """Detections to compare.

    Attributes:
        category_names: by label.
        image_ids: the images that were evaluated; None for all.
        max_detections: per image and category, that the run scored; None for COCO's number.
    """

    detections: list[Detections]
    category_names: list[str]
    image_ids: list[int] | None
    max_detections: int | None = None

    def of(self, categories: Sequence[str]) -> list[Detections]:
        """The detections of some categories, whose labels are their order."""
        if [*categories] == self.category_names:
            return self.detections
        new_labels = [categories.index(name) if name in categories else -1 for name in self.category_names]
        kept = []
        for found in self.detections:
            labels = np.array(new_labels)[found.labels]
            rows = np.flatnonzero(labels >= 0)
            kept.append(dataclasses.replace(found.only(rows), labels=labels[rows]))
        return kept


def _open(path: Path, annotations: CocoAnnotations) -> _Run:
    saved, results = (path / name for name in _FILES_OF_A_RUN)
    if saved.exists():
        found, names, most = load_detections(saved)
        if unknown := [name for name in names if name not in annotations.category_names]:
            raise UserError(
                f"{path} has detections of the categories {unknown}, and {annotations.path} has only "
                f"{annotations.category_names}. Fix: give the annotations that the run was validated on"
            )
        return _Run(found.detections(), names, found.images.tolist(), most)
    if path.is_dir() and not results.exists():
        raise UserError(
            f"{path} has neither {saved.name}, which a run with a validation writes, nor {results.name}. Fix: write "
            "it with `evaluate --output`"
        )
    found = from_coco_results(results if path.is_dir() else path, annotations)
    return _Run(found, annotations.category_names, None)


def _max_detections(paths: Sequence[Path], runs: Sequence[_Run]) -> int | None:
    """The number that all runs scored with; files of results have none."""
    scored = {path: run.max_detections for path, run in zip(paths, runs, strict=True) if run.image_ids is not None}
    if len(set(scored.values())) > 1:
        numbers = ", ".join(f"{path}: {most or 'the default'}" for path, most in scored.items())
        raise UserError(
            f"compare: the runs scored different numbers of detections ({numbers}). Fix: pass --max-detections"
        )
    return next(iter(scored.values()), None)


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names, no two alike."""
    parts = [path.absolute().resolve().with_suffix("").parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part[-2:])} ({number})" for number, part in enumerate(parts, 1)]
