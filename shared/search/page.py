"""A search as a page, `search.html`: history, what the hyperparameters did, every trial."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import optuna
from markupsafe import Markup
from matplotlib.figure import Figure
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from optuna.visualization import matplotlib as plots
from tabulate import tabulate

from shared.report.page import write_page
from shared.report.plots import styled, svg_of
from shared.search.halving import WHOLE, first_number
from shared.search.study import ERROR, Study

_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "given up",
    TrialState.FAIL: "error",
    TrialState.RUNNING: "under way",
    TrialState.WAITING: "waiting",
}


def rows_of(study: Study) -> tuple[list[str], list[list[Any]]]:
    """Heads, and a row a trial: the best first, those that say nothing last."""
    metric = study.searcher.metric
    trials = study.trials()
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))

    def best(trial: FrozenTrial) -> float:
        return metric.best_of(trial.intermediate_values.values())

    def order(trial: FrozenTrial) -> tuple[bool, float]:
        value = best(trial)
        return math.isnan(value), value if metric.smaller_is_better else -value

    rows = []
    for trial in sorted(trials, key=order):
        done = max(trial.intermediate_values, default=0) / WHOLE
        values = [trial.params.get(name) for name in names]
        state = "interrupted" if study.is_interrupted(trial) else _STATES[trial.state]
        rows.append([first_number(trial), state, f"{done:.0%}", best(trial), *values])
    return ["trial", "state", "done", metric.name, *names], rows


def table_of_trials(study: Study) -> str:
    """With the errors of those that ended with one below it."""
    heads, rows = rows_of(study)
    shown = [[_short(cell) for cell in row] for row in rows]
    table = tabulate(shown, headers=heads, disable_numparse=True)
    failed = [t for t in study.trials() if t.state == TrialState.FAIL and ERROR in t.user_attrs]
    errors = [f"trial {first_number(t)}: {t.user_attrs[ERROR]}" for t in failed]
    return "\n".join([table, *errors])


def _short(cell: Any) -> str:
    if isinstance(cell, float):
        return "" if math.isnan(cell) else f"{cell:.4g}"
    return "" if cell is None else str(cell)


_CURVES = "Curves of all trials"


def write_search_page(study: Study, output: Path) -> Path:
    """Returns the file."""
    heads, rows = rows_of(study)
    figures = [
        # Optuna's have colours of their own, that dark pages cannot change, and logarithmic axes
        (title, Markup(svg_of(figure, title, has_math=title != _CURVES)), title != _CURVES)
        for title, figure in _figures(study).items()
        if figure is not None
    ]
    write_page(
        "search.html.jinja",
        output / "search.html",
        title=f"{study.study.study_name}: search",
        summary=_summary(study),
        figures=figures,
        heads=heads,
        rows=[[_cell(cell) for cell in row] for row in rows],
    )
    return output / "search.html"


def _summary(study: Study) -> str:
    trials = study.trials()
    counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    interrupted = sum(map(study.is_interrupted, trials))
    trained = sum(max(trial.intermediate_values, default=0) for trial in trials) / WHOLE
    under_way = f"{counts[TrialState.RUNNING] - interrupted} under way"
    if interrupted:
        under_way += f", {interrupted} interrupted"
    text = (
        f"{len(trials)} trials: {counts[TrialState.COMPLETE]} trained to their end, {counts[TrialState.PRUNED]} given "
        f"up before, {counts[TrialState.FAIL]} ended with an error, {under_way}. They were trained for as long as "
        f"{trained:.1f} whole trainings."
    )
    if counts[TrialState.COMPLETE]:
        best = study.study.best_trial
        text += f" The best is trial {first_number(best)}, {study.searcher.metric.name} {best.value:.4f}."
    return text


def _figures(study: Study) -> dict[str, Figure | None]:
    figures: dict[str, Figure | None] = {_CURVES: _curves(study)}
    drawn = _without_formulas(study)
    finished = drawn.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if finished:
        figures["History"] = _of_optuna(plots.plot_optimization_history, drawn)
        if len(finished) > 1 and len(finished[0].params) > 1:
            figures["Parallel coordinates"] = _of_optuna(plots.plot_parallel_coordinate, drawn)
        if len(finished) > 1 and finished[0].params:
            figures["Importance"] = _of_optuna(plots.plot_param_importances, drawn)
    return figures


def _without_formulas(study: Study) -> optuna.Study:
    """A copy for Optuna's figures, which have powers as formulas: a $ in a name or in a value begins none."""

    def plain(text: Any) -> Any:
        return text.replace("$", r"\$") if isinstance(text, str) else text

    def plain_choices(distribution: BaseDistribution) -> BaseDistribution:
        if isinstance(distribution, CategoricalDistribution):
            return CategoricalDistribution([plain(choice) for choice in distribution.choices])
        return distribution

    copy = optuna.create_study(direction=study.study.direction)
    for trial in study.trials():
        copy.add_trial(
            create_trial(
                state=trial.state,
                value=trial.value,
                params={plain(name): plain(value) for name, value in trial.params.items()},
                distributions={plain(name): plain_choices(each) for name, each in trial.distributions.items()},
            )
        )
    return copy


def _of_optuna(plot: Any, study: optuna.Study) -> Figure | None:
    before = dict(plt.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            figure = plot(study).figure
        except (ValueError, RuntimeError, ImportError):  # nothing that it could tell, of trials that are all alike
            return None
        finally:
            plt.rcParams.update(before)  # it sets a style of its own
    plt.close(figure)
    for axes in figure.axes:
        axes.set_title("")  # the page has it
    return figure


def _curves(study: Study) -> Figure:
    metric = study.searcher.metric
    with styled():
        figure = Figure(figsize=(6.5, 4.0), layout="constrained")
        axes = figure.subplots()
        for trial in study.trials():
            values = trial.intermediate_values
            points = sorted((step, value) for step, value in values.items() if metric.is_defined(value))
            if points:
                given_up = trial.state == TrialState.PRUNED
                axes.plot(
                    [100 * step / WHOLE for step, _ in points],
                    [value for _, value in points],
                    linewidth=1.2,
                    marker="o",
                    markersize=2.5,
                    alpha=0.4 if given_up else 0.9,
                )
        axes.set(xlabel="trained, % of the whole length", ylabel=metric.name)
    return figure


def _cell(cell: Any) -> str:
    if isinstance(cell, float):
        return "–" if math.isnan(cell) else f"{cell:.4g}"
    return "–" if cell is None else str(cell)
