"""The search as Optuna keeps it: where, whose trials, how far, and which machine is at work on each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from shared.errors import UserError
from shared.search.halving import FIRST_NUMBER, RETRIED, BracketPruner, brackets_of, is_first, number_among
from shared.search.sampler import GridSampler, SamplerByNumber
from shared.search.space import Searcher, grid_of, points_of
from shared.search.storage import journal_file, open_storage

SECONDS_OF_SILENCE = 180  # after which a machine is taken for dead
SECONDS_BETWEEN_SIGNS = 20
_OWNER, ERROR = "owner", "error"
_SIGN = "alive "  # begins the key of a machine's sign of life
_START_UP_TRIALS = 10  # of TPE: before, it draws at random


class TakenOver(Exception):
    """Another machine works on the trial now, because this one was silent for too long."""


class Study:
    """A search that one machine or several are at work on.

    Args:
        storage: of Optuna: an SQL URL, redis://…, or the path of a file, on NFS too.
        name: of the search in it.
        owner: names this machine's part of the search: the same at its next start.
        is_at_work: whether a process of this machine trains trials of the search.
        only_read: opens a search that exists, and writes nothing.
    """

    def __init__(
        self,
        storage: str,
        name: str,
        config: Mapping[str, Any],
        searcher: Searcher,
        owner: str,
        is_at_work: bool = True,
        only_read: bool = False,
    ):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self.searcher, self.owner, self._is_at_work = searcher, owner, is_at_work
        self.max_trials = searcher.max_trials
        direction = "minimize" if searcher.metric.smaller_is_better else "maximize"
        file = journal_file(storage)
        if only_read and file is not None and not file.exists():
            raise UserError(f"--status: {file} does not exist. Fix: name the --output-dir or --storage of a search")
        begin = partial(optuna.create_study, direction=direction, load_if_exists=True)
        try:
            self.study = (optuna.load_study if only_read else begin)(
                storage=open_storage(storage),
                study_name=name,
                sampler=self._sampler(config["hyperparameters"]),
                pruner=self._pruner(),
            )
            self._check_same(config, only_read)
        except UserError:
            raise
        except Exception as error:  # each kind of storage has its own
            if only_read and isinstance(error, KeyError):
                raise UserError(f"--status: {storage} holds no search named {name}. Fix: name another one") from error
            raise UserError(f"--storage: {storage} cannot be used: {type(error).__name__}: {error}") from error
        self._seen: dict[str, tuple[Any, float]] = {}
        self._beat_at = 0.0
        self._progress_at = (self._signs().get(owner) or {}).get("progress")

    def _sampler(self, hyperparameters: Mapping[str, Any]) -> optuna.samplers.BaseSampler:
        seed = self.searcher.seed
        if self.searcher.name == "grid":
            points = points_of(grid_of(hyperparameters))
            self.max_trials = len(points)
            return GridSampler(points)
        if self.searcher.name == "adaptive_asha":
            return SamplerByNumber(_tpe_sampler, seed)
        return SamplerByNumber(optuna.samplers.RandomSampler, seed)

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

    def _check_same(self, config: Mapping[str, Any], only_read: bool) -> None:
        """A search goes on with the config that it began with."""
        told = {key: config.get(key) for key in ("hyperparameters", "searcher", "data")}
        digests = {
            key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for key, value in told.items()
        }
        digests.pop("data")  # machines may have it in other places
        known = self.study.user_attrs.get("config")
        if known is None:
            if not only_read:
                self.study.set_user_attr("config", digests)
        elif changed := [key for key in digests if known.get(key) != digests[key]]:
            raise UserError(
                f"this search was begun with other {' and '.join(changed)}: go on with the same file, or name another "
                "--output-dir"
            )

    # --- trials -------------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """Those that count, by their first numbers: of a trial that was taken over the last that it became."""
        every = self.study.get_trials(deepcopy=False)
        last = {number_among(trial, every): trial for trial in every}
        return [last[number] for number in sorted(last) if number < self.max_trials]

    def is_complete(self) -> bool:
        """Whether all trials have ended."""
        return len(self.trials()) >= self.max_trials and not self.has_unfinished()

    def mine(self) -> list[optuna.Trial]:
        """Trials under way that this machine was at work on before it was stopped."""
        return [
            optuna.trial.Trial(self.study, trial._trial_id)
            for trial in self.trials()
            if trial.state == TrialState.RUNNING and trial.user_attrs.get(_OWNER) == self.owner
        ]

    def ask(self) -> optuna.Trial | None:
        """The next trial; None where there is none to begin now."""
        trials = self.study.get_trials(deepcopy=False)
        waits = any(trial.state == TrialState.WAITING for trial in trials)
        if not waits and sum(map(is_first, trials)) >= self.max_trials:
            return None
        trial = self.study.ask()
        every = self.study.get_trials(deepcopy=False)
        number = number_among(every[trial.number], every)
        if number >= self.max_trials:  # another machine was faster
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        try:
            with self.owning(trial):
                trial.set_user_attr(FIRST_NUMBER, number)
                trial.set_user_attr(_OWNER, self.owner)
        except TakenOver:
            return None
        self._progress_at = time.time()
        return trial

    def report(self, trial: optuna.Trial, step: int, value: float) -> bool:
        """Records a validation; returns whether the trial should be given up.

        Raises:
            TakenOver
        """
        with self.owning(trial):
            trial.report(value, step)
            self._progress_at = time.time()
            return trial.should_prune()

    def finish(self, trial: optuna.Trial, state: TrialState, value: float | None = None, error: str = "") -> None:
        """Records how a trial ended.

        Args:
            value: the metric, for COMPLETE.
            error: what went wrong, for FAIL.

        Raises:
            TakenOver
        """
        with self.owning(trial):
            if error:
                trial.set_user_attr(ERROR, error)
            self.study.tell(trial, value, state)
        self._progress_at = time.time()

    def is_running(self, trial: optuna.Trial) -> bool:
        """False once another machine has taken the trial over."""
        return self.study.get_trials(deepcopy=False)[trial.number].state == TrialState.RUNNING

    @contextlib.contextmanager
    def owning(self, trial: optuna.Trial) -> Iterator[None]:
        """Raises TakenOver if Optuna refuses what is done with a trial because another machine has taken it over."""
        try:
            yield
        except (RuntimeError, ValueError) as error:  # Optuna has no single class for a trial that has ended
            if self.is_running(trial):
                raise
            raise TakenOver from error

    def reported(self, trial: optuna.Trial) -> Mapping[int, float]:
        """What a trial has reported so far."""
        return self.study.get_trials(deepcopy=False)[trial.number].intermediate_values

    def has_unfinished(self) -> bool:
        """Whether a trial is trained, or waits to be trained, on any machine."""
        return not all(trial.state.is_finished() for trial in self.trials())

    # --- other machines -----------------------------------------------------------------------------

    def beat(self) -> bool:
        """Gives a sign of life when it is time for one, and takes over the trials of machines that give none any more.
        Their clocks do not count: a sign is a new number.

        Returns:
            Whether it was time.
        """
        now = time.monotonic()
        if now - self._beat_at < SECONDS_BETWEEN_SIGNS:
            return False
        if now - self._beat_at > SECONDS_OF_SILENCE:
            self._seen.clear()  # this machine was silent itself, and saw no signs meanwhile
        self._beat_at = now
        self._give_sign(at_work=True)
        signs = self._signs()
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
        return True

    def leave(self) -> None:
        """Tells that this machine stops its work; its trials wait for its next start, or for other machines."""
        self._give_sign(at_work=False)

    def _give_sign(self, at_work: bool) -> None:
        # the times are for people: clocks that differ between machines change no decision
        sign = {"id": uuid.uuid4().hex, "at_work": at_work, "time": time.time(), "progress": self._progress_at}
        self.study.set_user_attr(_SIGN + self.owner, sign)

    def _signs(self) -> dict[str, Any]:
        attributes = self.study.user_attrs.items()
        # versions before 0.2 wrote an id alone
        signs = {key.removeprefix(_SIGN): value for key, value in attributes if key.startswith(_SIGN)}
        return {owner: sign if isinstance(sign, dict) else {"id": sign} for owner, sign in signs.items()}

    def machines_at_work(self) -> set[str]:
        """The owners that train trials now: of other machines those whose last sign is not too old."""
        now = time.time()
        others = {
            owner
            for owner, sign in self._signs().items()
            if owner != self.owner and sign.get("at_work") and abs(now - sign["time"]) <= SECONDS_OF_SILENCE
        }
        return others | ({self.owner} if self._is_at_work else set())

    def is_interrupted(self, trial: FrozenTrial) -> bool:
        """Whether a trial is neither finished nor trained by any machine."""
        return trial.state == TrialState.RUNNING and trial.user_attrs.get(_OWNER) not in self.machines_at_work()

    def last_progress(self) -> float | None:
        """When a trial was begun, validated or finished last, as time.time() has it; None if no machine noted it."""
        times = [sign["progress"] for sign in self._signs().values() if sign.get("progress")]
        return max(times, default=None)

    def _take_over(self, trial: FrozenTrial) -> None:
        try:
            self.study.tell(trial.number, state=TrialState.FAIL)  # one machine only can
        except (RuntimeError, ValueError, KeyError):  # another one did
            return
        logging.getLogger(__name__).warning(
            "trial %d is begun again: the machine that was at work on it gives no sign of life", self._number(trial)
        )
        self._begin_again(trial)

    def begin_lost_ones_again(self) -> None:
        """Enqueues trials whose take-over was interrupted: they have failed without an error."""
        for trial in self.trials():
            if trial.state == TrialState.FAIL and ERROR not in trial.user_attrs:
                self._begin_again(trial)

    def _begin_again(self, trial: FrozenTrial) -> None:
        number = self._number(trial)
        self.study.enqueue_trial(trial.params, user_attrs={FIRST_NUMBER: number, RETRIED: True})

    def _number(self, trial: FrozenTrial) -> int:
        return number_among(trial, self.study.get_trials(deepcopy=False))


def _tpe_sampler(seed: int) -> optuna.samplers.TPESampler:
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=_START_UP_TRIALS, multivariate=True, constant_liar=True
    )
