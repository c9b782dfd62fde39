"""A search as text and as a page, `search.html`: its curves, what the hyperparameters did, and every trial."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as plots
from tabulate import tabulate

from shared.report.page import write_page
from shared.report.plots import styled, svg_of
from shared.search.study import ERROR, Study
from shared.search.trial_process import WHOLE

_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "error",
    TrialState.RUNNING: "under way",
    TrialState.WAITING: "waiting",
}


def table_of_trials(study: Study) -> str:
    """The trials as text, with the errors of failed ones below."""
    heads, rows = _rows(study, undefined="")
    failed = {number: trial for number, trial in study.trials().items() if trial.state == TrialState.FAIL}
    errors = [f"trial {number}: {t.user_attrs[ERROR]}" for number, t in failed.items() if ERROR in t.user_attrs]
    return "\n".join([tabulate(rows, headers=heads, disable_numparse=True), *errors])


def write_search_page(study: Study, output: Path) -> Path:
    """Writes `search.html` and returns its path."""
    heads, rows = _rows(study, undefined="–")
    # all but the first are Optuna's, and have colors that a dark page cannot change
    drawn = [("Curves of all trials", _curves(study)), *_optuna_figures(study)]
    figures = [(title, svg_of(figure, title), i > 0) for i, (title, figure) in enumerate(drawn)]
    page = output / "search.html"
    title = f"{study.name}: search"
    write_page("search.html.jinja", page, title=title, summary=_summary(study), figures=figures, heads=heads, rows=rows)
    return page


def _rows(study: Study, undefined: str) -> tuple[list[str], list[list[str]]]:
    """Heads, and a row per trial, the best first, and trials without a value last."""
    metric, trials = study.metric, study.trials()
    names = list(dict.fromkeys(name for trial in trials.values() for name in trial.params))
    best = {number: metric.best_of(trial.intermediate_values.values()) for number, trial in trials.items()}

    def order(number: int) -> tuple[bool, float]:
        return math.isnan(best[number]), best[number] if metric.smaller_is_better else -best[number]

    def text(value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return undefined
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    rows = []
    for number in sorted(trials, key=order):
        trial = trials[number]
        state = "interrupted" if study.is_interrupted(trial) else _STATES[trial.state]
        values = [text(trial.params.get(name)) for name in names]
        rows.append([str(number), state, f"{_trained(trial):.0%}", text(best[number]), *values])
    return ["trial", "state", "done", metric.name, *names], rows


def _trained(trial: FrozenTrial) -> float:
    """The part of the whole training that a trial had at its last validation."""
    return max(trial.intermediate_values, default=0) / WHOLE


def _summary(study: Study) -> str:
    trials = study.trials().values()
    states = ["interrupted" if study.is_interrupted(trial) else _STATES[trial.state] for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    trained = sum(map(_trained, trials))
    text = f"{len(trials)} trials: {counts}. Together they trained as long as {trained:.1f} whole trials."
    if (best := study.best()) is not None:
        text += f" The best is trial {best[0]}, {study.metric.name} {best[1]:.4f}."
    return text


# --- figures ----------------------------------------------------------------------------------------


def _curves(study: Study) -> Figure:
    with styled():
        figure = Figure(figsize=(6.5, 4.0), layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel="trained, % of the whole length", ylabel=study.metric.name)
        for trial in study.trials().values():
            values = sorted(trial.intermediate_values.items())
            points = [(100 * step / WHOLE, value) for step, value in values if study.metric.is_defined(value)]
            alpha = 0.4 if trial.state == TrialState.PRUNED else 0.9
            steps, values = [step for step, _ in points], [value for _, value in points]
            axes.plot(steps, values, linewidth=1.2, marker="o", markersize=2.5, alpha=alpha)
    return figure


def _optuna_figures(study: Study) -> list[tuple[str, Figure]]:
    """Title and figure. Empty if no trial has finished."""
    finished = study.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        return []
    plot_by_title = {"History": plots.plot_optimization_history}
    if len(finished) > 1 and len(finished[0].params) > 1:
        plot_by_title["Parallel coordinates"] = plots.plot_parallel_coordinate
    if len(finished) > 1 and finished[0].params:
        plot_by_title["Importance"] = plots.plot_param_importances
    figures = [(title, _optuna_figure(plot, study.study)) for title, plot in plot_by_title.items()]
    return [(title, figure) for title, figure in figures if figure is not None]


def _optuna_figure(plot: Any, study: optuna.Study) -> Figure | None:
    """The figure; None if Optuna cannot draw it, such as importances of equal trials."""
    # Optuna sets its own style. A $ in a name or a value starts no formula
    with plt.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            figure = plot(study).figure
        except (ValueError, RuntimeError, ImportError):
            return None
        plt.close(figure)
        for axes in figure.axes:
            axes.set_title("")  # the page has it
            for axis in (axes.xaxis, axes.yaxis):
                if axis.get_scale() == "log":  # by default, labels are formulas
                    axis.set_major_formatter(LogFormatter())
    return figure
