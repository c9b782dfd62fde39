"""The `searcher` section of an experiment config, for a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.errors import UserError, nearest
from shared.experiment import SearcherMetric, parse_schedule, parse_searcher_metric

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
        length=parse_schedule(config).max_length.count if name == "adaptive_asha" else 1,
        mode=mode,
        max_rungs=number("max_rungs", 5),
        bracket_rungs=rungs,
        divisor=number("divisor", 4, 2),
        seed=(config.get("reproducibility") or {}).get("experiment_seed") or 0,
        max_restarts=5 if restarts is None else restarts,
    )
