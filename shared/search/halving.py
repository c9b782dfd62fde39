"""ASHA in brackets, as Determined's `adaptive_asha` has it, by Optuna's pruner.

Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020. What a trial has been given is counted
in millionths of its whole length, the same for batches and epochs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial

WHOLE = 10**6
FIRST_NUMBER, RETRIED = "first_number", "retried"


@dataclass(frozen=True)
class Bracket:
    """Trials that are compared with each other.

    Attributes:
        rungs: how often they are compared, the end included.
        share: of all trials.
    """

    rungs: int
    share: float


def brackets_of(
    mode: str, max_rungs: int, divisor: int, length: float, max_trials: int, bracket_rungs: Sequence[int] = ()
) -> list[Bracket]:
    """Determined's: `aggressive` has one, `conservative` one for each number of rungs, `standard` the half of them; the
    more rungs, the more trials.

    Args:
        length: of a trial, in the units of the searcher: so that no rung is shorter than one.
        max_trials: so that one of them comes to the last rung.
        bracket_rungs: the rungs of each bracket, in the place of `mode` and `max_rungs`.
    """
    most = min(max_rungs, *(int(math.log(max(count, 1), divisor) + 1e-9) + 1 for count in (length, max_trials)))
    fewest = {"aggressive": most, "standard": (most - 1) // 2 + 1, "conservative": 1}[mode]
    all_rungs = sorted(set(bracket_rungs), reverse=True) or range(most, fewest - 1, -1)
    weights = {rungs: divisor ** (rungs - 1) / rungs for rungs in all_rungs}
    counts = [max(int(weight / sum(weights.values()) * max_trials), 1) for weight in weights.values()]
    counts[0] += max(max_trials - sum(counts), 0)
    return [Bracket(rungs, count / sum(counts)) for rungs, count in zip(weights, counts, strict=True)]


def bracket_of(number: int, brackets: Sequence[Bracket]) -> int:
    """Which bracket a trial is in, by its number: each is filled at its share, from the first trial on."""
    counts = [0] * len(brackets)
    for so_far in range(1, number + 2):
        lacking = [bracket.share * so_far - count for bracket, count in zip(brackets, counts, strict=True)]
        chosen = max(range(len(brackets)), key=lambda i: (lacking[i], -i))
        counts[chosen] += 1
    return chosen


class BracketPruner(optuna.pruners.BasePruner):
    """Gives up the trials that are not among the best 1 / divisor of their bracket at a rung."""

    def __init__(self, brackets: Sequence[Bracket], divisor: int):
        self.brackets = brackets
        self.pruners = [
            optuna.pruners.SuccessiveHalvingPruner(
                min_resource=max(WHOLE // divisor ** (bracket.rungs - 1), 1), reduction_factor=divisor
            )
            for bracket in brackets
        ]

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        if (trial.last_step or 0) >= WHOLE:  # it has been trained to its end already
            return False
        mine = self._bracket_of(trial)
        among = _Among(study, lambda other: self._bracket_of(other) == mine)
        return self.pruners[mine].prune(among, trial)

    def _bracket_of(self, trial: FrozenTrial) -> int:
        return bracket_of(first_number(trial), self.brackets)


def first_number(trial: optuna.Trial | FrozenTrial) -> int:
    """Which trial of the search it is, from 0 on: one that another machine takes over is to Optuna one more."""
    return trial.user_attrs.get(FIRST_NUMBER, trial.number)


def number_among(trial: FrozenTrial, trials: Iterable[FrozenTrial]) -> int:
    """The same of a trial that may not have been given its number yet: how many `trials` were begun before it."""
    if FIRST_NUMBER in trial.user_attrs:
        return first_number(trial)
    return sum(is_first(other) for other in trials if other.number < trial.number)


def is_first(trial: FrozenTrial) -> bool:
    """Whether it is not one that a machine took over from another."""
    return RETRIED not in trial.user_attrs


class _Among:
    """A study that has some of its trials."""

    def __init__(self, study: optuna.Study, has: Any):
        self._study, self._has = study, has

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        return [trial for trial in self._study.get_trials(deepcopy, states) if self._has(trial)]
