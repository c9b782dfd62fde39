"""A search in Optuna's storage: its trials, the machines that train them, and the brackets in which trials compete."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
import socket
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalRedisBackend
from optuna.trial import FrozenTrial, TrialState

from shared.config.experiment import Experiment
from shared.durable import repair_last_line, sync_path, write_file
from shared.errors import UserError
from shared.search.space import NUMBER, REPEATS, NumberedSampler, Searcher, trial_numbers
from shared.search.trial_process import WHOLE

SECONDS_BETWEEN_HEARTBEATS = 20
SECONDS_OF_SILENCE = 180  # after which another machine repeats a machine's trials
ERROR = "error"  # the user attribute of a failed trial with its error
_OWNER = "owner"  # the user attribute of a trial with the machine that trains it
_HEARTBEAT = "alive "  # starts the study's attribute of each machine

logger = logging.getLogger(__name__)


class TakenOver(Exception):
    """Another machine repeats the trial, because this machine was silent for too long."""


class Study:
    """A search that one or several machines work on.

    Args:
        storage: as `open_storage` takes it.
        owner: the name of this machine's part of the search, the same after a restart.
        is_at_work: whether a process of this machine trains trials.
        only_read: opens an existing search and writes nothing.

    Raises:
        UserError: the storage cannot be used, or holds a search with another config.
    """

    def __init__(
        self,
        storage: str,
        experiment: Experiment,
        searcher: Searcher,
        owner: str,
        is_at_work: bool = True,
        only_read: bool = False,
    ):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self.name = str(experiment.config.get("name") or "search")
        self.metric, self.max_trials = searcher.metric, searcher.max_trials
        self.owner, self._is_at_work = owner, is_at_work
        file = journal_file(storage)
        if only_read and file is not None and not file.exists():
            raise UserError(f"--status: {file} does not exist. Fix: name the --output-dir or --storage of a search")
        direction = "minimize" if self.metric.smaller_is_better else "maximize"
        options = {} if only_read else {"direction": direction, "load_if_exists": True}
        try:
            self.study = (optuna.load_study if only_read else optuna.create_study)(
                storage=open_storage(storage),
                study_name=self.name,
                sampler=NumberedSampler(searcher),
                pruner=BracketPruner(searcher) if searcher.name == "adaptive_asha" else NopPruner(),
                **options,
            )
        except Exception as error:  # each storage has its own errors
            if only_read and isinstance(error, KeyError):
                problem = f"--status: {storage} holds no search named {self.name}. Fix: name another one"
            else:
                reason = f"{type(error).__name__}: {error}"
                problem = f"--storage: {storage} cannot be used: {reason}. Fix: correct the URL, or start the database"
            raise UserError(problem) from error
        self._check_config(experiment.config, only_read)
        self._seen: dict[str | None, tuple[Any, float]] = {}  # the last heartbeat of each machine, and when it was new
        self._heartbeat_at = 0.0
        self._progress_at = self._heartbeats().get(owner, {}).get("progress")

    def _check_config(self, config: Mapping[str, Any], only_read: bool) -> None:
        """Raises UserError if the search began with other hyperparameters or another searcher. Data may have moved."""
        digests = {
            section: hashlib.sha256(json.dumps(config.get(section), sort_keys=True).encode()).hexdigest()
            for section in ("hyperparameters", "searcher")
        }
        known = self.study.user_attrs.get("config")
        if known is None:
            if not only_read:
                self.study.set_user_attr("config", digests)
        elif changed := [section for section in digests if known.get(section) != digests[section]]:
            raise UserError(
                f"--output-dir: this search began with other {' and '.join(changed)}. Fix: continue with the same "
                "file, or name another --output-dir"
            )

    # --- trials -------------------------------------------------------------------------------------

    def trials(self) -> dict[int, FrozenTrial]:
        """The trials by number. For a trial that was repeated, the last repetition."""
        trials = self._all()
        last = dict(zip(trial_numbers(trials), trials, strict=True))
        return {number: last[number] for number in sorted(last) if number < self.max_trials}

    def _all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def best(self) -> tuple[int, float] | None:
        """The number and the metric of the best trial that finished; None if none did."""
        finished = {number: t.value for number, t in self.trials().items() if t.state == TrialState.COMPLETE}
        best = min if self.metric.smaller_is_better else max
        return best(finished.items(), key=lambda item: item[1], default=None)

    def own_trials(self) -> list[optuna.Trial]:
        """The unfinished trials of this machine, from before it was stopped."""
        return [
            optuna.trial.Trial(self.study, trial._trial_id)
            for trial in self.trials().values()
            if trial.state == TrialState.RUNNING and trial.user_attrs.get(_OWNER) == self.owner
        ]

    def ask(self) -> optuna.Trial | None:
        """Returns the next trial to train, or None."""
        trials = self._all()
        is_waiting = any(trial.state == TrialState.WAITING for trial in trials)
        if not is_waiting and len(set(trial_numbers(trials))) >= self.max_trials:
            return None
        trial = self.study.ask()
        number = trial_numbers(self._all())[trial.number]
        if number >= self.max_trials:  # another machine was faster
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        try:
            with self.owning(trial):
                trial.set_user_attr(NUMBER, number)
                trial.set_user_attr(_OWNER, self.owner)
        except TakenOver:
            return None
        self._progress_at = time.time()
        return trial

    def report(self, trial: optuna.Trial, step: int, value: float) -> bool:
        """Records a validation. Returns whether to stop the trial, because others are better. May raise TakenOver."""
        with self.owning(trial):
            trial.report(value, step)
            self._progress_at = time.time()
            return trial.should_prune()

    def finish(self, trial: optuna.Trial, state: TrialState, value: float | None = None, error: str = "") -> None:
        """Records how a trial ended, with its metric or its error. May raise TakenOver."""
        with self.owning(trial):
            if error:
                trial.set_user_attr(ERROR, error)
            self.study.tell(trial, value, state)
        self._progress_at = time.time()

    def is_running(self, trial: optuna.Trial) -> bool:
        """False if another machine repeats the trial."""
        return self._all()[trial.number].state == TrialState.RUNNING

    @contextlib.contextmanager
    def owning(self, trial: optuna.Trial) -> Iterator[None]:
        """Raises TakenOver if Optuna refuses a change of the trial because another machine repeats it."""
        try:
            yield
        except (RuntimeError, ValueError) as error:  # Optuna has no single class for a change of a finished trial
            if self.is_running(trial):
                raise
            raise TakenOver from error

    def reported(self, trial: optuna.Trial) -> dict[int, float]:
        """The values that a trial has reported, by step."""
        return dict(self._all()[trial.number].intermediate_values)

    def is_complete(self) -> bool:
        """Whether all trials have ended, on any machine."""
        trials = self.trials().values()
        return len(trials) >= self.max_trials and all(trial.state.is_finished() for trial in trials)

    # --- machines -----------------------------------------------------------------------------------
    #
    # Optuna's own heartbeat (`RDBStorage(heartbeat_interval=…)`) cannot replace this one. Optuna 5.0 has it for SQL,
    # and not for journal files and Redis. Only `Study.optimize` sends it. A machine that dies between failing a silent
    # trial and repeating it loses the trial.

    def heartbeat(self) -> bool:
        """Shows that this machine is alive, and repeats the trials of silent machines. Returns whether it was time to.

        Clocks of different machines are never compared: a machine is alive if its heartbeat changes.
        """
        now = time.monotonic()
        if now - self._heartbeat_at < SECONDS_BETWEEN_HEARTBEATS:
            return False
        if now - self._heartbeat_at > SECONDS_OF_SILENCE:
            self._seen.clear()  # this machine was silent itself and missed heartbeats
        self._heartbeat_at = now
        self._write_heartbeat(at_work=True)
        heartbeats = self._heartbeats()
        for number, trial in self.trials().items():
            owner = trial.user_attrs.get(_OWNER)
            if trial.state != TrialState.RUNNING or owner == self.owner:
                continue
            last, since = self._seen.setdefault(owner, (heartbeats.get(owner), now))
            if last != heartbeats.get(owner):
                self._seen[owner] = (heartbeats.get(owner), now)
            elif now - since > SECONDS_OF_SILENCE:
                self._take_over(number, trial)
        return True

    def leave(self) -> None:
        """Shows that this machine stops. Its trials wait until it starts again, or another machine takes them over."""
        self._write_heartbeat(at_work=False)

    def _write_heartbeat(self, at_work: bool) -> None:
        # the times are shown to users, and decide nothing
        beat = {"id": uuid.uuid4().hex, "at_work": at_work, "time": time.time(), "progress": self._progress_at}
        self.study.set_user_attr(_HEARTBEAT + self.owner, beat)

    def _heartbeats(self) -> dict[str, dict[str, Any]]:
        attributes = self.study.user_attrs.items()
        beats = {key.removeprefix(_HEARTBEAT): value for key, value in attributes if key.startswith(_HEARTBEAT)}
        # versions before 0.2 wrote only the id
        return {owner: beat if isinstance(beat, dict) else {"id": beat} for owner, beat in beats.items()}

    def machines_at_work(self) -> set[str]:
        """The machines that train trials now."""
        now = time.time()
        others = {
            owner
            for owner, beat in self._heartbeats().items()
            if owner != self.owner and beat.get("at_work") and abs(now - beat["time"]) <= SECONDS_OF_SILENCE
        }
        return others | ({self.owner} if self._is_at_work else set())

    def is_interrupted(self, trial: FrozenTrial) -> bool:
        """Whether a trial has not ended, and no machine trains it."""
        return trial.state == TrialState.RUNNING and trial.user_attrs.get(_OWNER) not in self.machines_at_work()

    def last_progress(self) -> float | None:
        """When a trial last started, validated or ended, as `time.time()`; None if no machine recorded it."""
        return max((beat["progress"] for beat in self._heartbeats().values() if beat.get("progress")), default=None)

    def _take_over(self, number: int, trial: FrozenTrial) -> None:
        try:
            self.study.tell(trial.number, state=TrialState.FAIL)  # only one machine succeeds
        except (RuntimeError, ValueError, KeyError):
            return
        logger.warning("trial %d starts again: its machine was silent for %d seconds", number, SECONDS_OF_SILENCE)
        self._repeat(number, trial)

    def repeat_lost_trials(self) -> None:
        """Repeats trials that failed without an error: a machine died while it took them over."""
        for number, trial in self.trials().items():
            if trial.state == TrialState.FAIL and ERROR not in trial.user_attrs:
                self._repeat(number, trial)

    def _repeat(self, number: int, trial: FrozenTrial) -> None:
        self.study.enqueue_trial(trial.params, user_attrs={NUMBER: number, REPEATS: True})


# --- brackets ---------------------------------------------------------------------------------------


def trial_brackets(searcher: Searcher) -> list[int]:
    """The bracket of each trial by number, as in Determined. A bracket is named by the number of its rungs.

    At each rung, a bracket's trials are compared. Their end is the last rung. `aggressive` has one bracket,
    `conservative` one for each number of rungs, and `standard` the half with more rungs. More rungs get more trials.
    """
    divisor, max_trials = searcher.divisor, searcher.max_trials
    # no rung is shorter than one unit of the length, and one trial reaches the last rung
    limits = (int(math.log(max(count, 1), divisor) + 1e-9) + 1 for count in (searcher.length, max_trials))
    most = min(searcher.max_rungs, *limits)
    fewest = {"aggressive": most, "standard": (most - 1) // 2 + 1, "conservative": 1}[searcher.mode]
    brackets = sorted(set(searcher.bracket_rungs), reverse=True) or range(most, fewest - 1, -1)
    weights = {rungs: divisor ** (rungs - 1) / rungs for rungs in brackets}
    sizes = {rungs: max(int(weight / sum(weights.values()) * max_trials), 1) for rungs, weight in weights.items()}
    sizes[brackets[0]] += max(max_trials - sum(sizes.values()), 0)
    total, begun, chosen = sum(sizes.values()), dict.fromkeys(brackets, 0), []
    for number in range(1, max_trials + 1):  # from the first trial on, each bracket is filled at its share
        lacking = {rungs: size / total * number - begun[rungs] for rungs, size in sizes.items()}
        chosen.append(max(lacking, key=lacking.get))
        begun[chosen[-1]] += 1
    return chosen


class BracketPruner(BasePruner):
    """Stops a trial at a rung if it is not among the best 1 / divisor of its bracket: ASHA in brackets.

    Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020.
    """

    def __init__(self, searcher: Searcher):
        self._bracket_of = dict(enumerate(trial_brackets(searcher)))
        self._pruners = {
            rungs: SuccessiveHalvingPruner(
                min_resource=max(WHOLE // searcher.divisor ** (rungs - 1), 1), reduction_factor=searcher.divisor
            )
            for rungs in set(self._bracket_of.values())
        }

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        if (trial.last_step or 0) >= WHOLE:  # trained to its end
            return False
        trials = study.get_trials(deepcopy=False)
        brackets = [self._bracket_of.get(number) for number in trial_numbers(trials)]
        bracket = brackets[trial.number]
        rivals = [rival for rival, other in zip(trials, brackets, strict=True) if other == bracket]
        of_bracket = copy.copy(study)
        of_bracket.get_trials = lambda **_: rivals  # all that the pruner compares with
        return self._pruners[bracket].prune(of_bracket, trial)


# --- storage ----------------------------------------------------------------------------------------


def open_storage(storage: str) -> BaseStorage | str:
    """The storage as Optuna accepts it.

    Args:
        storage: an SQL URL, `redis://…`, or the path of a journal file, also on NFS.
    """
    if storage.startswith(("redis://", "rediss://", "unix://")):
        return JournalStorage(JournalRedisBackend(storage))
    path = journal_file(storage)
    if path is None:
        return storage
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(path), lock_obj=_RepairingLock(path))
    sync_path(path.parent)
    return JournalStorage(backend)


def journal_file(storage: str) -> Path | None:
    """The file of a storage; None for a URL."""
    return None if "://" in storage else Path(storage).expanduser().absolute()


class _RepairingLock(JournalFileSymlinkLock):
    """The lock for writing to the journal. It first deletes a line that a full disk or a crash cut off.

    Otherwise the next line would be appended to that part, and no search could read the journal again.
    """

    def __init__(self, journal: Path):
        super().__init__(str(journal))
        self._journal = journal

    def acquire(self) -> bool:
        super().acquire()  # one that a killed search left is removed after 30 seconds
        try:
            with self._journal.open("r+b", buffering=0) as file:
                repair_last_line(file.fileno())
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        with contextlib.suppress(RuntimeError):  # this machine was silent, and another one has removed the lock
            super().release()


@contextlib.contextmanager
def storage_errors(output: Path) -> Iterator[None]:
    """Raises UserError if the disk or the storage of a search fails."""
    try:
        yield
    except (OSError, StorageInternalError) as error:
        raise UserError(
            f"{output}: {error}. The search stopped, and no trial is lost. Fix: remove the cause (free some space if "
            "the disk is full), then continue with the same command"
        ) from error


def lock_file(output: Path) -> Path:
    """The file that a search locks while it runs on this machine."""
    # not the owner's file: its replacement is a new file, which nobody has locked
    return output / f".lock-{socket.gethostname()}"


def owner_of(output: Path, create: bool = False) -> str:
    """The name of this machine's part of the search, the same after a restart. Empty if it has none."""
    file = output / f".owner-{socket.gethostname()}"
    owner = file.read_text() if file.exists() else ""
    if create and not owner:
        owner = uuid.uuid4().hex
        write_file(file, owner)
    return owner
