"""search: trains many trials of one config without a cluster, as Determined's searchers do."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import yaml
from optuna.trial import TrialState

from shared.config.experiment import Experiment
from shared.durable import is_locked, sync_path, try_lock, write_file
from shared.errors import UserError, count_of
from shared.log import without_secrets
from shared.search.space import NUMBER, Searcher, draw, parse_searcher, ranges_of
from shared.search.study import Study, TakenOver, lock_file, owner_of, storage_errors
from shared.search.trial_process import WHOLE, Place, TrialProcess, places_for
from shared.training.loggers import project_name
from shared.training.run_folder import RunFolder

if TYPE_CHECKING:
    from shared.training.trial import DetectionTrial

SECONDS_BETWEEN_LOOKS = 0.5  # at the trials
_LEAST_FREE = 2**20  # bytes that are free on a disk that is not full
_SECONDS_TO_STOP = 60  # much longer than a batch takes

logger = logging.getLogger(__name__)


def search(_: type[DetectionTrial], experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Draws, trains and compares trials. The results are in --output-dir. The same command continues a search.

    Raises:
        UserError: the config has nothing to search, another search runs in the folder, or the storage fails.
    """
    searcher = parse_searcher(experiment)
    if not ranges_of(experiment.config.get("hyperparameters") or {}) and searcher.name != "single":
        raise UserError(f"{arguments.config}: no hyperparameter is a range. Fix: give ranges, or use `train`")
    output = (arguments.output_dir or Path("runs/search")).absolute()
    storage = arguments.storage or str(output / "search.journal")
    with storage_errors(output):
        if arguments.status:
            is_at_work = is_locked(lock_file(output))
            study = Study(storage, experiment, searcher, owner_of(output), is_at_work, only_read=True)
            _print_results(study, output)
            print(_activity(study))
            return
        output.mkdir(parents=True, exist_ok=True)
        sync_path(output.parent)
        lock = try_lock(lock_file(output))
        if lock is None:
            raise UserError(f"--output-dir: a search is already running in {output}. Fix: --status shows its progress")
        with lock:
            study = Study(storage, experiment, searcher, owner_of(output, create=True))
            program = [sys.executable, str(Path(sys.argv[0]).absolute())]
            places = places_for(arguments.jobs, searcher.max_concurrent_trials)
            _Search(experiment.config, searcher, study, output, program, places).run()


@dataclass
class _Run:
    """A trial that is trained on this machine now.

    Attributes:
        reported: what Optuna knows of it, by step.
        is_worse: whether it is stopped because others are better.
        is_taken_over: whether it is stopped because another machine repeats it.
    """

    trial: optuna.Trial
    process: TrialProcess
    reported: dict[int, float]
    is_worse: bool = False
    is_taken_over: bool = False


@dataclass
class _Search:
    """The part of a search that this machine does."""

    config: dict[str, Any]
    searcher: Searcher
    study: Study
    output: Path
    program: Sequence[str]
    places: list[Place]  # free ones
    running: list[_Run] = field(default_factory=list)
    waiting: list[optuna.Trial] = field(default_factory=list)
    delayed: set[int] = field(default_factory=set)  # numbers of trials whose folder another process uses
    restarts: Counter[int] = field(default_factory=Counter)  # by number
    signal: int | None = None  # that asked the search to stop

    def run(self) -> None:
        (self.output / "trials").mkdir(exist_ok=True)
        logger.info("search: %s", self.output)
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._train_all()
            self._stop_all()
            self._look_at_all()
            self.study.leave()
        except Exception:
            self._stop_all()  # the next start reads their reports
            raise
        finally:
            for run in self.running:
                run.process.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.signal is not None:
            print(f"stopped; the same command continues the search: {self.output}", file=sys.stderr)
            sys.exit(128 + self.signal)
        _print_results(self.study, self.output)

    def _train_all(self) -> None:
        self.study.repeat_lost_trials()
        self.waiting = self.study.own_trials()
        while self.signal is None:
            if self.study.heartbeat():
                self._drop_taken_over()
            self._look_at_all()
            self._start_trials()
            if not (self.running or self.waiting) and self.study.is_complete():
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _stop_all(self) -> None:
        """Lets all runs save a checkpoint and exit, and waits for it."""
        for run in self.running:
            run.process.stop()
        until = time.monotonic() + _SECONDS_TO_STOP
        while any(run.process.exit_code() is None for run in self.running) and time.monotonic() < until:
            time.sleep(SECONDS_BETWEEN_LOOKS / 5)

    def _on_signal(self, number: int, _: Any) -> None:
        if self.signal is not None:  # the second one
            raise KeyboardInterrupt
        self.signal = number

    # --- starting -----------------------------------------------------------------------------------

    def _start_trials(self) -> None:
        while len(self.waiting) < len(self.places) and (trial := self.study.ask()) is not None:
            self.waiting.append(trial)
        for trial in list(self.waiting):
            number = trial.user_attrs[NUMBER]
            folder = self.output / "trials" / str(number)
            if not RunFolder(folder).is_free():  # a run of a killed search or a silent machine saves its checkpoint
                if number not in self.delayed:
                    logger.info("trial %d waits for another process that trains in %s", number, folder)
                self.delayed.add(number)
            elif self.places:
                self.waiting.remove(trial)
                with contextlib.suppress(TakenOver):
                    self._start(trial, number, folder)

    def _start(self, trial: optuna.Trial, number: int, folder: Path) -> None:
        with self.study.owning(trial):
            hyperparameters = draw(trial, self.config.get("hyperparameters") or {})
        name = str(self.config.get("name") or self.output.name)
        config = {**self.config, "hyperparameters": hyperparameters, "name": f"{name} trial {number}"}
        needed = {key: config[key] for key in ("data", "hyperparameters") if key in config}
        # only its owner may read it: the trial needs the passwords that are in these
        config = without_secrets(config) | needed
        write_file(folder.with_suffix(".yaml"), yaml.safe_dump(config, sort_keys=False), mode=0o600)
        # all trials belong to one project, though each config has its own name
        variables = {
            "WANDB_PROJECT": project_name(name),
            "WANDB_RUN_GROUP": self.output.name,
            "MLFLOW_EXPERIMENT_NAME": name,
        }
        process = TrialProcess(self.program, folder, self.places.pop(0), variables)
        self.running.append(_Run(trial, process, self.study.reported(trial)))
        values = (
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in trial.params.items()
        )
        logger.info("trial %d: %s", number, ", ".join(values))

    # --- looking at trials --------------------------------------------------------------------------

    def _look_at_all(self) -> None:
        for run in list(self.running):
            code = run.process.exit_code()
            if code is not None:
                self.running.remove(run)
                self.places.append(run.process.place)
            if run.is_taken_over:
                continue
            try:
                self._report(run)
                if code is not None:
                    self._end(run, code)
            except TakenOver:
                self._drop(run)

    def _drop_taken_over(self) -> None:
        self.waiting = list(filter(self.study.is_running, self.waiting))
        for run in self.running:
            if not run.is_taken_over and not self.study.is_running(run.trial):
                self._drop(run)

    def _drop(self, run: _Run) -> None:
        number = run.trial.user_attrs[NUMBER]
        logger.warning("trial %d stops here: this machine was silent, and another one has taken the trial over", number)
        run.is_taken_over = True
        run.process.stop()

    def _report(self, run: _Run) -> None:
        for step, value in run.process.validations(self.searcher.metric.name):
            if step in run.reported:
                continue
            run.reported[step] = self.searcher.metric.value_or_worst(value)
            is_worse = self.study.report(run.trial, step, run.reported[step])
            if is_worse and not run.process.is_stopping:
                run.is_worse = True
                run.process.stop()

    def _end(self, run: _Run, code: int) -> None:
        number, best = run.trial.user_attrs[NUMBER], self.searcher.metric.best_of(run.reported.values())
        result = f"{self.searcher.metric.name} {best:.4f}"
        killed_by = _signal_of(code)
        if run.is_worse:
            self.study.finish(run.trial, TrialState.PRUNED)
            logger.info("trial %d: stopped early at %.0f %%, %s", number, 100 * max(run.reported) / WHOLE, result)
        elif code == 0 and not math.isnan(best):
            self.study.finish(run.trial, TrialState.COMPLETE, best)
            logger.info("trial %d: finished, %s", number, result)
        elif self.signal is not None and killed_by is not None:
            pass  # the next start continues it
        elif killed_by is not None and self.restarts[number] < self.searcher.max_restarts:
            self.restarts[number] += 1
            logger.warning("trial %d was killed by %s and continues", number, killed_by.name)
            self.waiting.insert(0, run.trial)
        else:
            error = run.process.last_error()
            if _disk_is_full(error, self.output):  # the next start continues the trial
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.process.folder.path))
            self.study.finish(run.trial, TrialState.FAIL, error=error)
            logger.warning("trial %d failed: %s", number, error)


def _signal_of(code: int) -> signal.Signals | None:
    """The signal that stopped a run, also one after which it saved a checkpoint and exited."""
    if code == 128 + signal.SIGTERM:
        return signal.SIGTERM
    return signal.Signals(-code) if code < 0 else None


def _disk_is_full(error: str, folder: Path) -> bool:
    is_named = any(os.strerror(number) in error for number in (errno.ENOSPC, errno.EDQUOT))
    return is_named or shutil.disk_usage(folder).free < _LEAST_FREE


def _activity(study: Study) -> str:
    """Whether machines work on the search, and when it last made progress."""
    at_work, progress = len(study.machines_at_work()), study.last_progress()
    text = f"at work: {count_of(at_work, 'machine')}" if at_work else "no machine is at work on this search"
    if progress is not None:
        ago = datetime.timedelta(seconds=max(int(time.time() - progress), 0))
        text += f"; last progress: {datetime.datetime.fromtimestamp(int(progress))}, {ago} ago"
    if not at_work and not study.is_complete():
        text += "; the command without --status continues it"
    return text


def _print_results(study: Study, output: Path) -> None:
    """Prints the table, and writes best.yaml and the page."""
    from shared.search.page import table_of_trials, write_search_page  # their figures take seconds to import

    print(table_of_trials(study))
    best = study.best()
    if best is None:
        print("no trial has finished")
        return
    number, value = best
    config = output / "trials" / str(number) / "config.yaml"
    if config.exists():
        write_file(output / "best.yaml", config.read_bytes())
        place = f"its config: {output / 'best.yaml'}"
    else:
        place = "trained on another machine"
    print(f"best: trial {number}, {study.metric.name} {value:.4f}; {place}")
    print(f"the page: {write_search_page(study, output)}")
