"""search: many trainings of one config, without a cluster, as Determined's searchers have them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import logging
import math
import os
import shutil
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from optuna.trial import TrialState

from shared.config.experiment import Experiment
from shared.durable import sync_folder, write_file
from shared.errors import UserError, count_of
from shared.redaction import without_secrets
from shared.search.halving import WHOLE, first_number
from shared.search.page import table_of_trials
from shared.search.space import Searcher, draw, parse_searcher, ranges_of
from shared.search.study import Study, TakenOver
from shared.search.trial_process import Place, TrialProcess, places_for
from shared.training.loggers import project_name
from shared.training.run_folder import RunFolder
from shared.training.training_metrics import duration
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.5  # at the trials
_LEAST_FREE = 2**20  # bytes of a disk that is not full
_TO_STOP = 60  # seconds that trials have for it; their batches end long before


def search(_: type[DetectionTrial], experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Draws, trains and compares; what is done is in --output-dir, and the same command goes on."""
    config = experiment.config
    searcher = parse_searcher(config)
    if not ranges_of(config.get("hyperparameters") or {}) and searcher.name != "single":
        raise UserError(
            f"{arguments.config}: no hyperparameter is a range: there is nothing to search; `train` trains it"
        )
    output = (arguments.output_dir or Path("runs/search")).absolute()
    program = [sys.executable, str(Path(sys.argv[0]).absolute())]
    run_search(config, searcher, output, program, arguments.storage, arguments.jobs, arguments.status)


def run_search(
    config: dict[str, Any],
    searcher: Searcher,
    output: Path,
    program: Sequence[str],
    storage: str | None = None,
    jobs: int | None = None,
    status: bool = False,
) -> None:
    """
    Args:
        config: its paths absolute.
        program: what `train CONFIG …` is given to.
        storage: see `Study`; a file in `output` where None.
        jobs: trials at once; where None as many as there are GPUs, or one.
        status: only say how far it is.
    """
    place = storage or str(output / "search.journal")
    name = str(config.get("name") or "search")
    with _storage_errors(output):
        if status:
            with _locked(output) as is_mine:
                is_at_work = not is_mine
            study = Study(place, name, config, searcher, _owner_of(output), is_at_work, only_read=True)
            _conclude(study, output)
            print(_activity(study))
            return
        output.mkdir(parents=True, exist_ok=True)
        sync_folder(output.parent)
        with _locked(output) as is_mine:
            if not is_mine:
                raise UserError(f"--output-dir: a search is going on in {output}; --status says how far it is")
            study = Study(place, name, config, searcher, _owner_of(output, makes_one=True))
            gpus = _gpus()
            jobs = jobs or max(len(gpus), 1)
            jobs = min(jobs, searcher.max_concurrent or jobs)
            _Search(config, searcher, study, output, program, places_for(jobs, gpus)).run()


@contextlib.contextmanager
def _storage_errors(output: Path) -> Iterator[None]:
    """Raises UserError if the disk or the storage of a search fails."""
    try:
        yield
    except (OSError, optuna.exceptions.StorageInternalError) as error:
        raise UserError(
            f"{output}: {error}. The search stopped, and no trial is lost. Fix: remove the cause (free some space if "
            "the disk is full), then continue with the same command"
        ) from error


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[bool]:
    """Locks the search of this machine in a folder; False if another process has the lock."""
    if not output.is_dir():
        yield True
        return
    # not the owner's file: writing that as a whole gives the name another file, which nobody has locked
    with (output / f".lock-{socket.gethostname()}").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            yield False
        else:
            yield True


def _owner_of(output: Path, makes_one: bool = False) -> str:
    """The name of this machine's part of the search, the same at each start; empty if it has none."""
    file = output / f".owner-{socket.gethostname()}"
    owner = file.read_text() if file.exists() else ""
    if makes_one and not owner:
        owner = uuid.uuid4().hex
        write_file(file, owner)
    return owner


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    return [str(i) for i in range(torch.cuda.device_count())]


class _Search:
    """What this machine does of the search."""

    def __init__(
        self,
        config: dict[str, Any],
        searcher: Searcher,
        study: Study,
        output: Path,
        program: Sequence[str],
        places: list[Place],
    ):
        self.config, self.searcher, self.study, self.program = config, searcher, study, program
        self.output, self.folder = output, output / "trials"
        self.free = places
        self.running: dict[int, tuple[optuna.Trial, TrialProcess]] = {}
        self.waiting: list[optuna.Trial] = []  # to be started
        self.reported: dict[int, dict[int, float]] = {}  # value by step, by Optuna's number of the trial
        self.given_up: set[int] = set()  # others are better
        self.dropped: set[int] = set()  # the storage has their end already
        self.delayed: set[int] = set()  # their folders are not free yet
        self.restarts: dict[int, int] = {}
        self.asked_to_stop: int | None = None

    def run(self) -> None:
        self.folder.mkdir(exist_ok=True)
        logger.info("search: %s", self.output)
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._train_all()
            self._stop_all(self._look_at_all)
            self.study.leave()
        except Exception:
            self._stop_all(self._forget_ended)  # what they reported is in their folders, for the next start
            raise
        finally:
            for _, process in self.running.values():
                process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.asked_to_stop is not None:
            print(f"stopped; the same command goes on where its trials are: {self.output}", file=sys.stderr)
            sys.exit(128 + self.asked_to_stop)
        _conclude(self.study, self.output)

    def _train_all(self) -> None:
        self.study.begin_lost_ones_again()
        self.waiting = self.study.mine()
        while self.asked_to_stop is None:
            if self.study.beat():
                self._drop_taken_over()
            self._look_at_all()
            self._start_trials()
            if not (self.running or self.waiting or self.study.has_unfinished()):
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _stop(self, number: int, _: Any) -> None:
        if self.asked_to_stop is not None:  # asked twice
            raise KeyboardInterrupt
        self.asked_to_stop = number

    def _start_trials(self) -> None:
        while len(self.waiting) < len(self.free) and (trial := self.study.ask()) is not None:
            self.waiting.append(trial)
        for trial in list(self.waiting):
            folder = self.folder / str(first_number(trial))
            if not RunFolder(folder).is_free():
                # of a search that was killed, or of a machine that was silent: it may still save its checkpoint
                if trial.number not in self.delayed:
                    logger.info("trial %d waits for a run that is going on in %s", first_number(trial), folder)
                self.delayed.add(trial.number)
            elif self.free:
                self.waiting.remove(trial)
                with contextlib.suppress(TakenOver):
                    self._start(trial)

    def _start(self, trial: optuna.Trial) -> None:
        number = first_number(trial)
        file = self.folder / f"{number}.yaml"
        with self.study.owning(trial):
            hyperparameters = draw(trial, self.config.get("hyperparameters") or {})
        config = {
            **self.config,
            "hyperparameters": hyperparameters,
            "name": f"{self.config.get('name')} trial {number}",
        }
        # the trial reads its data with the passwords of `data` and `hyperparameters`: only its owner may read the file
        clean = without_secrets(config, but=("data", "hyperparameters"))
        write_file(file, yaml.safe_dump(clean, sort_keys=False), mode=0o600)
        process = TrialProcess(
            self.program,
            file,
            self.folder / str(number),
            self.folder / f"{number}.log",
            self.free[0],
            self._names_for_loggers(),
        )
        self.free.remove(process.place)
        self.reported[trial.number] = dict(self.study.reported(trial))
        self.running[trial.number] = (trial, process)
        drawn = ", ".join(f"{name} {_short(value)}" for name, value in trial.params.items())
        logger.info("trial %d: %s", number, drawn)

    def _names_for_loggers(self) -> dict[str, str]:
        """All trials in one project: the name in a trial's config is its own."""
        name = str(self.config.get("name") or self.output.name)
        return {
            "WANDB_PROJECT": project_name(name),
            "WANDB_RUN_GROUP": self.output.name,
            "MLFLOW_EXPERIMENT_NAME": name,
        }

    def _look_at_all(self) -> None:
        for number, (trial, process) in list(self.running.items()):
            code = process.process.poll()
            if code is not None:
                del self.running[number]
                self.free.append(process.place)
            if number in self.dropped:
                continue
            try:
                self._report(trial, process)
                if code is not None:
                    self._end(trial, process, code)
            except TakenOver:
                self._drop(trial, process)

    def _forget_ended(self) -> None:
        self.running = {number: it for number, it in self.running.items() if it[1].process.poll() is None}

    def _drop_taken_over(self) -> None:
        self.waiting = list(filter(self.study.is_running, self.waiting))
        for number, (trial, process) in self.running.items():
            if number not in self.dropped and not self.study.is_running(trial):
                self._drop(trial, process)

    def _drop(self, trial: optuna.Trial, process: TrialProcess) -> None:
        logger.warning(
            "trial %d: another machine has taken it over, because this one was silent; it is stopped here",
            first_number(trial),
        )
        self.dropped.add(trial.number)
        process.stop()

    def _report(self, trial: optuna.Trial, process: TrialProcess) -> None:
        reported = self.reported[trial.number]
        for step, value in self._validations(trial, process):
            if step in reported:
                continue
            reported[step] = self.searcher.metric.worst if math.isnan(value) else value
            is_worse = self.study.report(trial, step, reported[step])
            if is_worse and not process.stopped:
                self.given_up.add(trial.number)
                process.stop()

    def _validations(self, trial: optuna.Trial, process: TrialProcess) -> list[tuple[int, float]]:
        try:
            return process.validations(self.searcher.metric.name)
        except Exception as error:  # whatever it is, the other trials go on
            logger.exception("trial %d: its reports cannot be read", first_number(trial))
            self.study.finish(trial, TrialState.FAIL, error=f"its reports cannot be read: {error!r}")
            self.dropped.add(trial.number)
            process.stop()
            return []

    def _end(self, trial: optuna.Trial, process: TrialProcess, code: int) -> None:
        number, values = first_number(trial), self.reported[trial.number]
        best = self.searcher.metric.best_of(values.values())
        by_signal = _signal_of(code)
        if trial.number in self.dropped:
            return
        if trial.number in self.given_up:
            self.study.finish(trial, TrialState.PRUNED)
            logger.info(
                "trial %d: given up at %.0f %%, %s", number, 100 * max(values) / WHOLE, _said(self.searcher, best)
            )
        elif code == 0 and not math.isnan(best):
            self.study.finish(trial, TrialState.COMPLETE, best)
            logger.info("trial %d: finished, %s", number, _said(self.searcher, best))
        elif self.asked_to_stop is not None and by_signal is not None:
            pass  # it is under way still, for the next start
        elif by_signal is not None and self.restarts.get(number, 0) < self.searcher.max_restarts:
            self.restarts[number] = self.restarts.get(number, 0) + 1
            logger.warning("trial %d was killed by %s; it goes on", number, by_signal.name)
            self.waiting.insert(0, trial)
        else:
            words = process.last_words()
            if _disk_is_full(words, self.output):  # which is no fault of the trial: it is under way still
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(process.folder.path))
            self.study.finish(trial, TrialState.FAIL, error=words)
            logger.warning("trial %d ended with an error: %s", number, words)

    def _stop_all(self, look: Callable[[], None]) -> None:
        for _, process in self.running.values():
            process.stop()
        until = time.monotonic() + _TO_STOP
        while self.running and time.monotonic() < until:
            look()
            time.sleep(SECONDS_BETWEEN_LOOKS / 5)


def _signal_of(code: int) -> signal.Signals | None:
    """The signal that stopped a run: by the kernel, or by its own exit after a checkpoint."""
    if code == 128 + signal.SIGTERM:
        return signal.SIGTERM
    return signal.Signals(-code) if code < 0 else None


def _disk_is_full(words: str, folder: Path) -> bool:
    said = any(os.strerror(number) in words for number in (errno.ENOSPC, errno.EDQUOT))
    return said or shutil.disk_usage(folder).free < _LEAST_FREE


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _said(searcher: Searcher, value: float) -> str:
    return f"{searcher.metric.name} {value:.4f}"


def _activity(study: Study) -> str:
    """Whether the search is under way, and when it made progress last."""
    at_work, progress = len(study.machines_at_work()), study.last_progress()
    text = f"at work: {count_of(at_work, 'machine')}" if at_work else "no machine is at work on this search"
    if progress is not None:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(progress))
        text += f"; last progress: {at}, {duration(max(time.time() - progress, 0))} ago"
    if not at_work and not study.is_complete():
        text += "; the command without --status continues it"
    return text


def _conclude(study: Study, output: Path) -> None:
    """The table, best.yaml and the page."""
    print(table_of_trials(study))
    finished = [trial for trial in study.trials() if trial.state == TrialState.COMPLETE]
    if not finished:
        print("no trial has been trained to its end")
        return
    best = study.study.best_trial
    number = first_number(best)
    config = output / "trials" / str(number) / "config.yaml"
    if config.exists():
        write_file(output / "best.yaml", config.read_bytes())
        print(f"best: trial {number}, {_said(study.searcher, best.value)}; its config: {output / 'best.yaml'}")
    else:
        print(f"best: trial {number}, {_said(study.searcher, best.value)}, trained on another machine")
    from shared.search.page import write_search_page  # matplotlib's figures take half a second to import

    print(f"the page: {write_search_page(study, output)}")
