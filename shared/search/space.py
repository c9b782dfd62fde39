"""Determined's hyperparameter types as Optuna's: what a search draws, and the grid of all values."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import optuna

from shared.config.experiment import parse_schedule, parse_searcher_metric
from shared.config.file import without_ranges
from shared.config.schema import SearcherMetric
from shared.errors import UserError, nearest

NAMES = ("adaptive_asha", "grid", "random", "single")
_MODES = ("aggressive", "standard", "conservative")


@dataclass(frozen=True)
class Searcher:
    """
    Attributes:
        metric: by which trials are compared.
        max_trials: None of a grid, which has its own.
        max_concurrent: trials at once; None for as many as there is room for.
        length: of a trial of `adaptive_asha`, in batches, epochs or records.
    """

    name: str
    metric: SearcherMetric
    max_trials: int | None
    max_concurrent: int | None
    length: float
    mode: str
    max_rungs: int
    bracket_rungs: list[int]
    divisor: int
    seed: int
    max_restarts: int


def parse_searcher(config: dict[str, Any]) -> Searcher:
    """
    Raises:
        UserError: the searcher is none of `NAMES`, or a key of it is missing or not understood.
    """
    section = config.get("searcher") or {}
    name = section.get("name") or "single"
    if name not in NAMES:
        raise UserError(f"searcher.name: {name!r}; {nearest(str(name), NAMES)}")

    def number(key: str, default: int | None, least: int = 1) -> int | None:
        value = section.get(key)
        value = default if value is None else value
        if value is not None and (type(value) is not int or value < least):
            raise UserError(f"searcher.{key}: {value!r} is not a whole number of at least {least}")
        return value

    if name in ("adaptive_asha", "random") and section.get("max_trials") is None:
        raise UserError("searcher.max_trials is missing: how many trials the search has")
    mode = section.get("mode") or "standard"
    if mode not in _MODES:
        raise UserError(f"searcher.mode: {mode!r}; {nearest(str(mode), _MODES)}")
    rungs = section.get("bracket_rungs") or []
    if not isinstance(rungs, list) or not all(type(count) is int and count >= 1 for count in rungs):
        raise UserError(f"searcher.bracket_rungs: {rungs!r} is no list of whole numbers of at least 1")
    restarts = config.get("max_restarts")
    return Searcher(
        name=name,
        metric=parse_searcher_metric(config, None),
        max_trials=1 if name == "single" else None if name == "grid" else number("max_trials", None),
        max_concurrent=number("max_concurrent_trials", None, 0) or None,
        length=parse_schedule(config).with_defaults().max_length.count if name == "adaptive_asha" else 1,
        mode=mode,
        max_rungs=number("max_rungs", 5),
        bracket_rungs=rungs,
        divisor=number("divisor", 4, 2),
        seed=(config.get("reproducibility") or {}).get("experiment_seed") or 0,
        max_restarts=5 if restarts is None else restarts,
    )


Range = Mapping[str, Any]


def ranges_of(hyperparameters: Mapping[str, Any]) -> dict[tuple[str, ...], Range]:
    """The searched hyperparameters by where they are: ("config_overrides", "optimizer.lr").

    Raises:
        UserError: a range is not what Determined takes.
    """
    ranges: dict[tuple[str, ...], Range] = {}

    def note(at: tuple[str, ...], value: Range) -> None:
        _check(value, at)
        ranges[at] = value

    without_ranges(hyperparameters, note)
    return ranges


def name_of(at: tuple[str, ...]) -> str:
    """As Optuna, the tables and the pages have it."""
    return ".".join(at)


def _check(value: Range, at: tuple[str, ...]) -> None:
    name, kind = f"hyperparameters.{name_of(at)}", value["type"]
    needed = ("vals",) if kind == "categorical" else ("minval", "maxval")
    if missing := [key for key in needed if value.get(key) is None]:
        raise UserError(f"{name}: a range of type {kind} needs {' and '.join(needed)}; {', '.join(missing)} is missing")
    if kind == "categorical":
        if not isinstance(value["vals"], list) or not value["vals"]:
            raise UserError(f"{name}.vals: give a list of values")
        return
    low, high = value["minval"], value["maxval"]
    if not all(isinstance(bound, int | float) and math.isfinite(bound) for bound in (low, high)) or low > high:
        raise UserError(f"{name}: minval {low!r} and maxval {high!r} are no range")
    if kind == "log" and not value.get("base", 10) > 1:
        raise UserError(f"{name}.base: {value['base']!r} is not above 1")


def draw(trial: optuna.Trial, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a trial: each range has a value that Optuna draws in its place."""
    ranges_of(hyperparameters)  # what it refuses, before anything is drawn
    return without_ranges(hyperparameters, lambda at, value: _draw(trial, name_of(at), value))


def _draw(trial: optuna.Trial, name: str, value: Range) -> Any:
    if value["type"] == "int":
        return trial.suggest_int(name, value["minval"], value["maxval"])
    if value["type"] == "double":
        return trial.suggest_float(name, value["minval"], value["maxval"])
    if value["type"] == "log":
        base = value.get("base", 10)
        return trial.suggest_float(name, base ** value["minval"], base ** value["maxval"], log=True)
    # lists and dicts too, which Optuna's storages cannot hold
    return json.loads(trial.suggest_categorical(name, [json.dumps(each) for each in value["vals"]]))


def grid_of(hyperparameters: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of each searched hyperparameter on a grid, as `draw` suggests them: `count` of a range of numbers.

    Raises:
        UserError: a range has no `count`.
    """
    grid = {}
    for at, value in ranges_of(hyperparameters).items():
        kind, count = value["type"], value.get("count")
        if kind == "categorical":
            grid[name_of(at)] = [json.dumps(each) for each in value["vals"]]
            continue
        low, high = value["minval"], value["maxval"]
        if kind == "int" and count is None:
            count = high - low + 1
        if type(count) is not int or count < 1:
            raise UserError(f"hyperparameters.{name_of(at)}.count: a grid needs how many values to take, not {count!r}")
        if kind == "int":
            count = min(count, high - low + 1)
        grid[name_of(at)] = list(dict.fromkeys(_spread(kind, low, high, count, value.get("base", 10))))
    return grid


def _spread(kind: str, low: float, high: float, count: int, base: float) -> Iterator[float]:
    for i in range(count):
        at = low + (high - low) * (i / (count - 1) if count > 1 else 0.5)
        yield round(at) if kind == "int" else base**at if kind == "log" else at


def points_of(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Each point of a grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
