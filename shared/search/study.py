"""The search as Optuna keeps it: where, whose trials, how far, and which machine is at work on each."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from shared.errors import UserError
from shared.search.halving import FIRST_NUMBER, BracketPruner, brackets_of, first_number
from shared.search.searcher import Searcher
from shared.search.space import grid_of, points_of

SECONDS_OF_SILENCE = 180  # after which a machine is taken for dead
_BEAT = 20  # seconds between its signs of life
_TAKEN_OVER, _RETRIED, _OWNER, ERROR = "taken_over", "retried", "owner", "error"
_START_UP_TRIALS = 10  # of TPE: before, it draws at random


class Study:
    """A search that one machine or several are at work on.

    Args:
        storage: of Optuna: an SQL URL, redis://…, or the path of a file, on NFS too.
        name: of the search in it.
        owner: names this machine's part of the search: the same at its next start.
    """

    def __init__(self, storage: str, name: str, config: Mapping[str, Any], searcher: Searcher, owner: str):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self.searcher, self.owner = searcher, owner
        self.max_trials = searcher.max_trials
        direction = "minimize" if searcher.metric.smaller_is_better else "maximize"
        try:
            self.study = optuna.create_study(
                storage=open_storage(storage),
                study_name=name,
                direction=direction,
                sampler=self._sampler(config["hyperparameters"]),
                pruner=self._pruner(),
                load_if_exists=True,
            )
            self._check_same(config)
        except UserError:
            raise
        except Exception as error:  # each kind of storage has its own
            raise UserError(f"--storage: {storage} cannot be used: {type(error).__name__}: {error}") from error
        self._seen: dict[str, tuple[int, float]] = {}
        self._beat_at = 0.0

    def _sampler(self, hyperparameters: Mapping[str, Any]) -> optuna.samplers.BaseSampler:
        seed = self.searcher.seed
        if self.searcher.name == "grid":
            points = points_of(grid_of(hyperparameters))
            self.max_trials = len(points)
            return _GridSampler(points)
        if self.searcher.name == "adaptive_asha":
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=_START_UP_TRIALS, multivariate=True, constant_liar=True
            )
        return optuna.samplers.RandomSampler(seed=seed)

    def _pruner(self) -> optuna.pruners.BasePruner:
        searcher = self.searcher
        if searcher.name != "adaptive_asha":
            return optuna.pruners.NopPruner()
        brackets = brackets_of(
            searcher.mode,
            searcher.max_rungs,
            searcher.divisor,
            searcher.length,
            searcher.max_trials,
            searcher.bracket_rungs,
        )
        return BracketPruner(brackets, searcher.divisor)

    def _check_same(self, config: Mapping[str, Any]) -> None:
        """A search goes on with the config that it began with."""
        told = {key: config.get(key) for key in ("hyperparameters", "searcher", "data")}
        digests = {
            key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for key, value in told.items()
        }
        digests.pop("data")  # machines may have it in other places
        known = self.study.user_attrs.get("config")
        if known is None:
            self.study.set_user_attr("config", digests)
        elif changed := [key for key in digests if known.get(key) != digests[key]]:
            raise UserError(
                f"this search was begun with other {' and '.join(changed)}: go on with the same file, or name another "
                "--output-dir"
            )

    # --- trials -------------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """Those that count, by their first numbers: of a trial that was taken over the last that it became."""
        counted = [t for t in self.study.get_trials(deepcopy=False) if not t.user_attrs.get(_TAKEN_OVER)]
        return sorted(counted, key=first_number)

    def mine(self) -> list[optuna.Trial]:
        """Trials under way that this machine was at work on before it was stopped."""
        return [
            optuna.trial.Trial(self.study, trial._trial_id)
            for trial in self.trials()
            if trial.state == TrialState.RUNNING and trial.user_attrs.get(_OWNER) == self.owner
        ]

    def ask(self) -> optuna.Trial | None:
        """The next trial; None where there is none to begin."""
        trials = self.study.get_trials(deepcopy=False)
        waits = any(trial.state == TrialState.WAITING for trial in trials)
        if not waits and sum(map(_is_first, trials)) >= self.max_trials:
            return None
        trial = self.study.ask()
        if _RETRIED not in trial.user_attrs:
            # as many as are drawn before it, on whatever machine: Optuna's numbers count what was taken over too
            before = [other for other in self.study.get_trials(deepcopy=False) if other.number < trial.number]
            trial.set_user_attr(FIRST_NUMBER, sum(map(_is_first, before)))
            if first_number(trial) >= self.max_trials:  # another machine was faster
                trial.set_user_attr(_TAKEN_OVER, True)
                self.study.tell(trial, state=TrialState.FAIL)
                return None
        trial.set_user_attr(_OWNER, self.owner)
        return trial

    def reported(self, trial: optuna.Trial) -> Mapping[int, float]:
        """What a trial has reported so far."""
        return self.study.get_trials(deepcopy=False)[trial.number].intermediate_values

    def running_elsewhere(self) -> bool:
        """Whether other machines are at work on trials."""
        return any(t.state == TrialState.RUNNING and t.user_attrs.get(_OWNER) != self.owner for t in self.trials())

    # --- other machines -----------------------------------------------------------------------------

    def beat(self) -> None:
        """Gives a sign of life, and takes over the trials of machines that give none any more. Their clocks do not
        count: a sign is a new number."""
        now = time.monotonic()
        if now - self._beat_at < _BEAT:
            return
        self._beat_at = now
        self.study.set_user_attr(f"alive {self.owner}", uuid.uuid4().hex)
        signs = {
            key.removeprefix("alive "): value
            for key, value in self.study.user_attrs.items()
            if key.startswith("alive ")
        }
        for trial in self.trials():
            owner = trial.user_attrs.get(_OWNER)
            if trial.state != TrialState.RUNNING or owner == self.owner:
                continue
            sign, since = self._seen.get(str(owner), (None, now))
            if sign != signs.get(owner):
                self._seen[str(owner)] = (signs.get(owner), now)
            elif now - since > SECONDS_OF_SILENCE:
                self._take_over(trial)
            else:
                self._seen.setdefault(str(owner), (sign, since))

    def _take_over(self, trial: FrozenTrial) -> None:
        try:
            optuna.trial.Trial(self.study, trial._trial_id).set_user_attr(_TAKEN_OVER, True)
            self.study.tell(trial.number, state=TrialState.FAIL)  # one machine only can
        except (RuntimeError, ValueError, KeyError):  # another one did
            return
        logging.getLogger(__name__).warning(
            "trial %d is begun again: the machine that was at work on it gives no sign of life", first_number(trial)
        )
        self.study.enqueue_trial(trial.params, user_attrs={FIRST_NUMBER: first_number(trial), _RETRIED: True})


def _is_first(trial: FrozenTrial) -> bool:
    return _RETRIED not in trial.user_attrs


class _GridSampler(optuna.samplers.RandomSampler):
    """The points of a grid in turn. Optuna's own draws those that are left, and ends a search that others share."""

    def __init__(self, points: list[dict[str, Any]]):
        super().__init__()
        self._points = points

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        return self._points[first_number(trial) % len(self._points)][name]


def open_storage(storage: str) -> Any:
    """What Optuna takes: an SQL URL, a journal in Redis or in a file."""
    if storage.startswith(("redis://", "rediss://", "unix://")):
        return JournalStorage(optuna.storages.journal.JournalRedisBackend(storage))
    if "://" in storage:
        return storage
    path = Path(storage).expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
