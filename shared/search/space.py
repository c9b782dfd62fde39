"""How a search draws: the `searcher` section, Determined's hyperparameter ranges, and the samplers for Optuna."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from shared.config.experiment import Experiment
from shared.config.file import without_ranges
from shared.config.schema import SearcherMetric, SearcherSection, key_names, parse_section
from shared.errors import UserError

# user attributes of Optuna's trials: their number in the search, and whether they repeat a trial of a silent machine
NUMBER, REPEATS = "first_number", "retried"
_RANDOM_TRIALS = 10  # that TPE draws at random before it uses their results
_SEED_STEP = 2654435769  # 2 ** 32 / golden ratio: neighboring trials get distant seeds

Range = Mapping[str, Any]


# --- the searcher -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Searcher(SearcherSection):
    """How a search draws and compares its trials.

    Attributes:
        metric: compares the trials.
        length: the length of a trial of `adaptive_asha`, in batches, epochs or records.
        points: the grid's points, one per trial.
        max_restarts: how often a killed trial restarts.
    """

    metric: SearcherMetric
    length: int
    points: list[dict[str, Any]]
    seed: int
    max_restarts: int


def parse_searcher(experiment: Experiment) -> Searcher:
    """The searcher of an experiment.

    Raises:
        UserError: a key of `searcher` is missing, or its value is not valid.
    """
    section, restarts = experiment.config.get("searcher") or {}, experiment.config.get("max_restarts")
    given = {name: section[name] for name in key_names(SearcherSection) if section.get(name) is not None}
    parsed = parse_section(given, SearcherSection, "searcher")
    name = parsed.name
    points = grid_points(experiment.config.get("hyperparameters") or {}) if name == "grid" else []
    changed = {
        "metric": experiment.searcher_metric(None),
        "max_trials": {"grid": len(points), "single": 1}.get(name, parsed.max_trials),
    }
    return Searcher(
        **(vars(parsed) | changed),
        length=experiment.schedule.with_defaults().max_length.count if name == "adaptive_asha" else 1,
        points=points,
        seed=experiment.seed,
        max_restarts=5 if restarts is None else restarts,
    )


# --- ranges -----------------------------------------------------------------------------------------


def ranges_of(hyperparameters: Mapping[str, Any]) -> dict[str, Range]:
    """The hyperparameters to search, by dotted name: `config_overrides.optimizer.lr`.

    Raises:
        UserError: Determined would not accept a range.
    """
    ranges: dict[str, Range] = {}
    without_ranges(hyperparameters, lambda keys, value: ranges.update({".".join(keys): value}))
    for name, value in ranges.items():
        _check(value, f"hyperparameters.{name}")
    return ranges


def _check(value: Range, name: str) -> None:
    kind = value["type"]
    needed = ("vals",) if kind == "categorical" else ("minval", "maxval")
    if missing := [bound for bound in needed if value.get(bound) is None]:
        raise UserError(f"{name}: a range of type {kind} needs {' and '.join(needed)}. Fix: add {', '.join(missing)}")
    if kind == "categorical":
        if not isinstance(value["vals"], list) or not value["vals"]:
            raise UserError(f"{name}.vals: {value['vals']!r} has no values. Fix: give a list of values")
        return
    low, high = value["minval"], value["maxval"]
    if not all(isinstance(bound, int | float) and math.isfinite(bound) for bound in (low, high)) or low > high:
        raise UserError(f"{name}: minval {low!r} and maxval {high!r} are not a range. Fix: give two numbers in order")
    if kind == "log" and not value.get("base", 10) > 1:
        raise UserError(f"{name}.base: it is {value['base']!r}. Fix: give a number > 1")


def draw(trial: optuna.Trial, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a trial: a value that Optuna draws instead of each range. `ranges_of` has checked them."""
    return without_ranges(hyperparameters, lambda keys, value: _draw(trial, ".".join(keys), value))


def _draw(trial: optuna.Trial, name: str, value: Range) -> Any:
    if value["type"] == "int":
        return trial.suggest_int(name, value["minval"], value["maxval"])
    if value["type"] == "double":
        return trial.suggest_float(name, value["minval"], value["maxval"])
    if value["type"] == "log":
        base = value.get("base", 10)
        return trial.suggest_float(name, base ** value["minval"], base ** value["maxval"], log=True)
    # as JSON, because Optuna's storages hold no lists or dicts
    return json.loads(trial.suggest_categorical(name, [json.dumps(each) for each in value["vals"]]))


def grid_points(hyperparameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of a grid, as `draw` suggests them: all values of a category, `count` values of a range of numbers.

    Raises:
        UserError: a range is not valid, or has no `count`.
    """
    grid = {name: _grid_values(value, name) for name, value in ranges_of(hyperparameters).items()}
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _grid_values(value: Range, name: str) -> list[Any]:
    kind, count = value["type"], value.get("count")
    if kind == "categorical":
        return [json.dumps(each) for each in value["vals"]]
    low, high, base = value["minval"], value["maxval"], value.get("base", 10)
    most = high - low + 1 if kind == "int" else math.inf
    count = most if kind == "int" and count is None else count
    if type(count) is not int or count < 1:
        raise UserError(f"hyperparameters.{name}.count: it is {count!r}. Fix: give the number of values on the grid")
    count = min(count, most)
    values = [low + (high - low) * (i / (count - 1) if count > 1 else 0.5) for i in range(count)]
    values = [round(each) if kind == "int" else base**each if kind == "log" else each for each in values]
    return list(dict.fromkeys(values))


# --- samplers ---------------------------------------------------------------------------------------


def trial_numbers(trials: Sequence[FrozenTrial]) -> list[int]:
    """The number in the search of each of Optuna's trials, from 0.

    Optuna counts a trial that another machine repeats as a new one; here both have the same number.

    Args:
        trials: all trials of the study, in Optuna's order. A new trial may not have its attribute yet.
    """
    numbers, begun = [], 0
    for trial in trials:
        numbers.append(trial.user_attrs.get(NUMBER, begun))
        begun += REPEATS not in trial.user_attrs
    return numbers


class NumberedSampler(BaseSampler):
    """Draws each trial by its number, so that several machines and restarts draw what one machine draws."""

    def __init__(self, searcher: Searcher):
        self._searcher = searcher

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # a seed per hyperparameter: a search killed between two of them draws the same value for the second later
        sampler = self._sampler(study, trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _sampler(self, study: optuna.Study, trial: FrozenTrial, name: str = "") -> BaseSampler:
        """The sampler of one trial and one hyperparameter; without a name, of all together."""
        number = trial_numbers(study.get_trials(deepcopy=False))[trial.number]
        first = int.from_bytes(hashlib.sha256(f"{self._searcher.seed} {name}".encode()).digest()[:4], "big")
        seed = (first + number * _SEED_STEP) % 2**32  # the step is odd: no two trials have the same seed
        if self._searcher.name == "adaptive_asha":
            return TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS, multivariate=True, constant_liar=True)
        # Optuna's GridSampler may draw a point twice if machines share the search
        points = self._searcher.points
        fixed = points[number % len(points)] if points else {}
        return PartialFixedSampler(fixed, RandomSampler(seed))
