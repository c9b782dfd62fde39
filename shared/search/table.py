"""A search's trials as a table."""

from __future__ import annotations

import math
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from tabulate import tabulate

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
