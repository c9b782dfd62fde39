"""Determined's hyperparameter types as Optuna's: what a search draws, and the grid of all values."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import optuna

from shared.config_file import without_ranges
from shared.errors import UserError

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
