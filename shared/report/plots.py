"""The figures of a report: hotcoco's, and others in its style."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import hotcoco.plot
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from shared.evaluation.box_matching import RECALLS
from shared.evaluation.evaluator import CocoEvaluator
from shared.evaluation.gathered import GatheredDetections
from shared.report.analysis import Analysis, ThresholdCurve, analyse_one

LIGHT, DARK = "cyanotype", "cyanotype-dark"
_LONGEST_NAME = 22
_POINTS = 400  # of a curve over the score: more than a screen can show
_CURVES = 10  # categories per figure
_LEAST_SCALE = 0.75  # of a figure on a page


def figures_of(analysis: Analysis, names: Sequence[str]) -> dict[str, Figure]:
    """The figures by title, in the order of a report.

    Args:
        names: the categories by label.
    """
    names = [short_name(name) for name in names]
    figures = {}
    with styled():
        if analysis.curve.best is not None:
            figures["Precision and recall"] = _precision_of_all(analysis)
            figures["Precision and recall of categories"] = _precision_of_categories(analysis, names)
        if len(analysis.curve.thresholds):
            figures["F1 over the score threshold"] = _f1_over_threshold(analysis, names)
        if analysis.errors is not None and sum(analysis.errors["counts"].values()):
            figures["What errors cost"] = _of_hotcoco(hotcoco.plot.tide_errors, analysis.errors)
        if analysis.confusion is not None:
            side = min(max(5.0, 0.35 * min(len(names), 26)), 10.0)
            confusion = {**analysis.confusion, "cat_names": names}
            figures["Confusion matrix"] = _of_hotcoco(hotcoco.plot.confusion_matrix, confusion, side)
        if analysis.calibration["num_detections"]:
            figures["Calibration"] = _of_hotcoco(hotcoco.plot.reliability_diagram, analysis.calibration)
    return figures


def pictures_of(evaluator: CocoEvaluator, found: GatheredDetections) -> dict[str, np.ndarray]:
    """The figures of an evaluation as (height, width, 3) pictures, by TensorBoard's tags."""
    pictures = {}
    for iou_type in evaluator.iou_types:
        figures = figures_of(analyse_one(evaluator, iou_type, found), evaluator.annotations.category_names)
        for title, figure in figures.items():
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            pictures[f"report_{iou_type}/{title}"] = np.asarray(canvas.buffer_rgba())[..., :3]
    return pictures


def learning_curves(reports: Sequence[Mapping[str, Any]], metric: str, best: int | None) -> dict[str, Figure]:
    """The losses, the metric and the learning rate over the batches, by title; those that were reported.

    Args:
        reports: the lines of metrics.jsonl.
        metric: the searcher's.
        best: the batch of the best checkpoint, which is marked.
    """
    panels = {
        "loss": [("train", "train", "loss"), ("validation", "val", "val_loss")],
        metric: [("validation", "val", metric)],
        "learning rate": [("", "train", "lr")],
    }
    figures = {}
    for title, lines in panels.items():
        with styled():
            figure, axes = new_figure(4.0, 3.2)
            for label, split, name in lines:
                values = {r["batches"]: r["metrics"].get(name) for r in reports if r["split"] == split}
                values = {batch: value for batch, value in values.items() if value is not None}
                if values:
                    marker = "o" if len(values) < 30 else None
                    axes.plot([*values], [*values.values()], marker=marker, markersize=3, label=label)
                if title == metric and best in values:
                    axes.plot([best], [values[best]], "D", markersize=7, label="best checkpoint")
            axes.set(xlabel="batches")
            _legend(axes)
        if axes.lines:
            figures[title] = figure
    return figures


@contextmanager
def styled() -> Iterator[None]:
    """hotcoco's style. A $ in a name starts no formula, and the browser has the letters that the font lacks."""
    with hotcoco.plot.style(LIGHT), matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def new_figure(width: float = 5.0, height: float | None = None) -> tuple[Figure, Axes]:
    """A figure that pyplot does not keep in memory, and that any thread may draw."""
    figure = Figure(figsize=(width, height or width), layout="constrained")
    return figure, figure.subplots()


def _of_hotcoco(draw: Any, data: Any, side: float = 5.0) -> Figure:
    figure, axes = new_figure(side)
    draw(data, ax=axes, theme=LIGHT)
    axes.set_title("")  # the page has it
    figure.suptitle("")
    if legend := axes.get_legend():
        legend.remove()
        _legend(axes)
    return figure


def _precision_of_all(analysis: Analysis) -> Figure:
    """Unlike hotcoco's, this needs no `summarize()`, which prints."""
    figure, axes = new_figure()
    for iou, index in (("0.50", 0), ("0.75", 5), ("0.90", 8)):
        precision = analysis.evaluation.eval["precision"][index, :, :, 0, -1]
        scored = precision[:, (precision > -1).all(axis=0)]
        axes.plot(RECALLS, scored.mean(axis=1), linewidth=2, label=f"IoU {iou}")
    return _finished(figure, axes, "Recall", "Precision", "mean over categories")


def _precision_of_categories(analysis: Analysis, names: Sequence[str]) -> Figure:
    figure, axes = new_figure()
    labels, of_all = _commonest(analysis)
    for label in labels:
        precision = analysis.evaluation.eval["precision"][0, :, label, 0, -1]
        axes.plot(RECALLS, np.where(precision < 0, np.nan, precision), linewidth=1.5, label=names[label])
    return _finished(figure, axes, "Recall", "Precision", f"IoU 0.50{of_all}")


def _f1_over_threshold(analysis: Analysis, names: Sequence[str]) -> Figure:
    figure, axes = new_figure()

    def plot(curve: ThresholdCurve, label: str, **style: Any) -> None:
        count = len(curve.thresholds)
        kept = np.unique(np.linspace(0, count - 1, min(count, _POINTS)).astype(int))
        axes.plot(curve.thresholds[kept], curve.f1[kept], label=label, **style)

    labels, of_all = _commonest(analysis)
    for label in labels if len(labels) > 1 else []:
        if len(analysis.category_curves[label].thresholds):
            plot(analysis.category_curves[label], names[label], linewidth=1, alpha=0.7)
    text = hotcoco.plot.CHROME["text"]
    plot(analysis.curve, "all", color=text, linewidth=2.5)
    if analysis.curve.best is not None:
        best, f1 = analysis.curve.best_threshold, analysis.curve.best_f1
        axes.plot([best], [f1], "D", color=text, markersize=7)
        axes.annotate(f"{f1:.2f} at {best:.2f}", (best, f1), textcoords="offset points", xytext=(7, 5), fontsize=9)
    return _finished(figure, axes, "Lowest score that counts", "F1", f"IoU 0.50{of_all}")


def _commonest(analysis: Analysis) -> tuple[list[int], str]:
    """The labels of the categories with most objects, and what a title says if there are more."""
    objects = np.array([row.objects for row in analysis.categories])
    labels = np.argsort(-objects, kind="stable")[: np.count_nonzero(objects)].tolist()
    return labels[:_CURVES], "" if len(labels) <= _CURVES else f", the {_CURVES} with most objects"


def _finished(figure: Figure, axes: Axes, x: str, y: str, title: str) -> Figure:
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=11)
    _legend(axes)
    return figure


def _legend(axes: Axes) -> None:
    """Below the axes, where it hides no curve."""
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > 1:
        columns = 3 if max(map(len, labels)) < 14 else 2
        axes.figure.legend(fontsize=8, loc="outside lower center", ncols=columns)


def short_name(name: str) -> str:
    """The name of a category in a figure. A legend omits names that begin with _."""
    name = " ".join(name.split()) or "(no name)"
    name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    return f"\u200b{name}" if name.startswith("_") else name


def svg_of(figure: Figure, salt: str) -> Markup:
    """The figure as an element of a page, in the colors of `style_sheet` and in the page's font.

    Args:
        salt: unique on the page: the names of the figure's parts follow from it.
    """
    for text in figure.findobj(Text):
        if text.get_weight() == 400:  # as hotcoco sets it; matplotlib before 3.10 writes names only
            text.set_weight("normal")
    buffer = io.StringIO()
    options = {"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False}
    with matplotlib.rc_context(options), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        without = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata=without)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    size = re.search(r' width="([.\d]+)pt" height="[.\d]+pt"', svg)
    # a figure scrolls on a small screen instead of shrinking until nobody can read it
    svg = svg.replace(size[0], f' style="min-width: {_LEAST_SCALE * float(size[1]):.0f}pt"', 1)
    names = {color.lower(): f"var(--{name})" for name, color in _colors(LIGHT).items()}
    return Markup(re.sub(r"(?<=[:\s])#[0-9a-f]{6}\b(?=[;\"])", lambda color: names.get(color[0], color[0]), svg))


def style_sheet(theme: str) -> Markup:
    """The colors of a theme of pages, as declarations of variables."""
    return Markup(" ".join(f"--{name}: {color};" for name, color in _colors(theme).items()))


def _colors(theme: str) -> dict[str, str]:
    ending = "" if theme == LIGHT else "_DARK"
    series, chrome = (getattr(hotcoco.plot, f"{name}{ending}") for name in ("SERIES_COLORS", "CHROME"))
    return {**{f"series-{i}": color for i, color in enumerate(series)}, **chrome}
