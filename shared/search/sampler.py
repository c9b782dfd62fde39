"""Which point each trial gets: it follows from the search's seed and the trial's number, not from its process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from shared.search.halving import number_among

_ODD = 2654435769  # 2 ** 32 / golden ratio: neighbouring numbers get distant seeds


class SamplerByNumber(BaseSampler):
    """Draws each trial with a sampler of its own, so that several machines and restarts draw what one machine draws.

    Args:
        make: returns a sampler for a seed of 32 bits.
        seed: of the search.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int):
        self._make, self._seed = make, seed

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # a seed for each hyperparameter: a search that is killed between two draws a second time gets the same values
        sampler = self._sampler(study, trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _sampler(self, study: optuna.Study, trial: FrozenTrial, name: str = "") -> BaseSampler:
        number = number_among(trial, study.get_trials(deepcopy=False))
        first = int.from_bytes(hashlib.sha256(f"{self._seed} {name}".encode()).digest()[:4], "big")
        return self._make((first + number * _ODD) % 2**32)  # the factor is odd: no two trials have the same seed


class GridSampler(BaseSampler):
    """The points of a grid in turn. Optuna's own draws those that are left, and ends a search that others share."""

    def __init__(self, points: list[Mapping[str, Any]]):
        self._points = points

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._points[number_among(trial, study.get_trials(deepcopy=False)) % len(self._points)][param_name]
