"""The figures of a report: hotcoco's, and its style for those that it has not."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import hotcoco.plot
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from shared.report.analysis import Analysis
from shared.report.difference import Difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LIGHT, _DARK = "cyanotype", "cyanotype-dark"
_LONGEST_NAME = 22
_POINTS = 400  # of a curve over the score: more than a screen can show
_CURVES = 10  # categories of one figure


def figures_of(analysis: Analysis, names: Sequence[str]) -> dict[str, Figure]:
    """By title, in the order of a report.

    Args:
        names: of the categories, by label.
    """
    names = [short_name(name) for name in names]
    figures = {}
    with styled():
        if analysis.curve.recall.max(initial=0) > 0:
            figures["Precision and recall"] = _precision_of_all(analysis)
            figures["Precision and recall of categories"] = _precision_of_categories(analysis, names)
        if len(analysis.curve.thresholds):
            figures["F1 over the score threshold"] = _f1_over_threshold(analysis, names)
        if analysis.errors is not None and sum(analysis.errors["counts"].values()):
            figures["What errors cost"] = _of_hotcoco(hotcoco.plot.tide_errors, analysis.errors)
        if analysis.confusion is not None:
            side = min(max(5.0, 0.35 * min(len(names), 26)), 10.0)
            figures["Confusion matrix"] = _of_hotcoco(
                hotcoco.plot.confusion_matrix, {**analysis.confusion, "cat_names": names}, size=(side, side)
            )
        if analysis.calibration["num_detections"]:
            figures["Calibration"] = _of_hotcoco(hotcoco.plot.reliability_diagram, analysis.calibration)
    return figures


def learning_curves(reports: Sequence[Mapping[str, Any]], metric: str, best: int | None) -> Figure | None:
    """Losses, the metric and the learning rate over the batches; None of a run without reports.

    Args:
        reports: the lines of metrics.jsonl.
        metric: that the searcher goes by.
        best: the batch of the best checkpoint, which is marked.
    """
    panels = [
        ("loss", [("train", "train", "loss"), ("validation", "val", "val_loss")]),
        (metric, [("validation", "val", metric)]),
        ("learning rate", [("", "train", "lr")]),
    ]
    filled = []
    for title, lines in panels:
        curves = [(label, *_series(reports, split, name)) for label, split, name in lines]
        if curves := [curve for curve in curves if len(curve[1])]:
            filled.append((title, curves))
    if not filled:
        return None
    with styled():
        figure = Figure(figsize=(3.6 * len(filled), 3.0), layout="constrained")
        for axes, (title, curves) in zip(np.atleast_1d(figure.subplots(1, len(filled))), filled, strict=True):
            for label, batches, values in curves:
                axes.plot(batches, values, marker="o" if len(batches) < 30 else None, markersize=3, label=label)
                if title == metric and best in batches:
                    axes.plot([best], [values[batches.index(best)]], "D", markersize=7, label="best checkpoint")
            axes.set(xlabel="batches")
            axes.set_title(title, fontsize=11)
            if len(axes.lines) > 1:
                axes.legend(fontsize=8)
    return figure


def _series(reports: Sequence[Mapping[str, Any]], split: str, name: str) -> tuple[list[int], list[float]]:
    points = [
        (report["batches"], value)
        for report in reports
        if report["split"] == split and (value := report["metrics"].get(name)) is not None
    ]
    return [batch for batch, _ in points], [value for _, value in points]


def differences(rows: Sequence[Difference]) -> Figure:
    """Each difference with its interval, which is coloured where it is on one side of 0."""
    with styled():
        figure = Figure(figsize=(6.0, 1.0 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for position, row in enumerate(rows):
            color = hotcoco.plot.SERIES_COLORS[{"better": 8, "worse": 1, "": 9}[row.verdict]]
            axes.plot([row.lower, row.upper], [position, position], color=color, linewidth=2)
            axes.plot([row.delta], [position], "o", color=color, markersize=6)
        axes.axvline(0, color=hotcoco.plot.CHROME["tick"], linewidth=0.75)
        axes.set_yticks(range(len(rows)), [short_name(row.name) for row in rows])
        axes.invert_yaxis()
    return figure


@contextmanager
def styled() -> Iterator[None]:
    """Names are no formulas, and letters that the font lacks are the browser's matter."""
    with hotcoco.plot.style(_LIGHT), matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _of_hotcoco(draw: Any, data: Any, size: tuple[float, float] = (5.0, 5.0), **arguments: Any) -> Figure:
    # on a figure of our own: those of pyplot stay in memory, and are one thread's
    figure = Figure(figsize=size)
    axes = figure.subplots()
    draw(data, ax=axes, theme=_LIGHT, **arguments)
    axes.set_title("")  # the page has it
    figure.suptitle("")
    return figure


def _precision_of_all(analysis: Analysis) -> Figure:
    """hotcoco's own wants `summarize()` called, which prints."""
    figure = Figure(figsize=(5.0, 5.0))
    axes = figure.subplots()
    recall = np.asarray(analysis.evaluation.params.rec_thrs)
    for iou, index in (("0.50", 0), ("0.75", 5), ("0.90", 8)):
        precision = analysis.evaluation.eval["precision"][index, :, :, 0, -1]
        scored = precision[:, (precision > -1).all(axis=0)]
        axes.plot(recall, scored.mean(axis=1), linewidth=2, label=f"IoU {iou}")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="Recall", ylabel="Precision")
    axes.set_title("mean over categories", fontsize=11)
    _legend(axes)
    return figure


def _precision_of_categories(analysis: Analysis, names: Sequence[str]) -> Figure:
    counted = [row for row in analysis.categories if row.objects]
    shown = sorted(counted, key=lambda row: -row.objects)[:_CURVES]
    figure = Figure(figsize=(5.0, 5.0))
    axes = figure.subplots()
    recall = np.asarray(analysis.evaluation.params.rec_thrs)
    for row in shown:
        precision = analysis.evaluation.eval["precision"][0, :, row.label, 0, -1]
        axes.plot(recall, np.where(precision < 0, np.nan, precision), linewidth=1.5, label=names[row.label])
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="Recall", ylabel="Precision")
    of_all = "" if len(shown) == len(counted) else f", the {len(shown)} with most objects"
    axes.set_title(f"IoU 0.50{of_all}", fontsize=11)
    _legend(axes)
    return figure


def _f1_over_threshold(analysis: Analysis, names: Sequence[str]) -> Figure:
    figure = Figure(figsize=(5.0, 5.0))
    axes = figure.subplots()
    counted = [row for row in analysis.categories if row.objects]
    for row in sorted(counted, key=lambda row: -row.objects)[:_CURVES] if len(counted) > 1 else []:
        curve = analysis.category_curves[row.label]
        if len(curve.thresholds):
            kept = _spread(len(curve.thresholds))
            axes.plot(curve.thresholds[kept], curve.f1[kept], linewidth=1, alpha=0.7, label=names[row.label])
    kept = _spread(len(analysis.curve.thresholds))
    axes.plot(analysis.curve.thresholds[kept], analysis.curve.f1[kept], "k", linewidth=2.5, label="all")
    axes.lines[-1].set_color(hotcoco.plot.CHROME["text"])
    if analysis.curve.best is not None:
        best, f1 = analysis.curve.best_threshold, analysis.curve.best_f1
        axes.plot([best], [f1], "D", color=hotcoco.plot.CHROME["text"], markersize=7)
        axes.annotate(f"{f1:.2f} at {best:.2f}", (best, f1), textcoords="offset points", xytext=(7, 5), fontsize=9)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="Lowest score that counts", ylabel="F1")
    _legend(axes)
    return figure


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, loc="lower left")


def _spread(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, _POINTS)).astype(int))


def short_name(name: str) -> str:
    """Of a category in a figure; what begins with _ has no place in a legend otherwise."""
    name = " ".join(name.split()) or "(no name)"
    name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    return f"\u200b{name}" if name.startswith("_") else name


# --- SVG ------------------------------------------------------------------------------------------------


def svg_of(figure: Figure, salt: str, has_math: bool = False) -> str:
    """The figure as an element of a page. Its colours are the page's variables, see `style_sheet`, and its letters
    the page's own.

    Args:
        salt: no two figures of a page have the same: their parts' names follow from it.
        has_math: whether $…$ is a formula, as the powers of a logarithmic axis are, and not part of a name.
    """
    buffer = io.StringIO()
    options = {"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": has_math}
    with matplotlib.rc_context(options), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # the date and the name of the library in each would say nothing
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg [^>]*?)width="[\d.]+pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[\d.]+pt"', r"\1", svg, count=1)
    return re.sub(r"(?<=[:\s])#[0-9a-f]{6}\b(?=[;\"])", _as_variable, svg)


def _colors(theme: str) -> dict[str, str]:
    series, chrome = (
        (hotcoco.plot.SERIES_COLORS, hotcoco.plot.CHROME)
        if theme == _LIGHT
        else (hotcoco.plot.SERIES_COLORS_DARK, hotcoco.plot.CHROME_DARK)
    )
    return {**{f"series-{i}": color for i, color in enumerate(series)}, **chrome}


def _as_variable(color: re.Match[str]) -> str:
    name = _NAME_OF_COLOR.get(color[0])
    return f"var(--{name})" if name else color[0]


_NAME_OF_COLOR = {color.lower(): name for name, color in _colors(_LIGHT).items()}


def style_sheet() -> tuple[str, str]:
    """The variables of light and of dark pages, as declarations."""
    light, dark = (
        " ".join(f"--{name}: {color};" for name, color in _colors(theme).items()) for theme in (_LIGHT, _DARK)
    )
    return light, dark
