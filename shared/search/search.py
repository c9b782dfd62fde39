"""search: many trainings of one config, without a cluster, as Determined's searchers have them."""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from optuna.trial import TrialState

from shared.config_file import load_config, make_paths_absolute
from shared.errors import UserError
from shared.search.halving import WHOLE, first_number
from shared.search.searcher import Searcher, parse_searcher
from shared.search.space import draw, ranges_of
from shared.search.study import ERROR, Study
from shared.search.table import table_of_trials
from shared.search.trial_process import Place, TrialProcess, places_for
from shared.training.trial import DetectionTrial
from shared.training.wandb_run import project_name

logger = logging.getLogger(__name__)

_POLL = 0.5  # seconds
_TO_STOP = 60  # seconds that trials have for it; their batches end long before


def search(trial_class: type[DetectionTrial], arguments: argparse.Namespace) -> None:
    """Draws, trains and compares; what is done is in --output-dir, and the same command goes on."""
    config = load_config(arguments.config, arguments.overrides)
    searcher = parse_searcher(config)
    if not ranges_of(config.get("hyperparameters") or {}) and searcher.name != "single":
        raise UserError(
            f"{arguments.config}: no hyperparameter is a range: there is nothing to search; `train` trains it"
        )
    make_paths_absolute(config, trial_class.path_hyperparameters)
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
    if status and storage is None and not (output / "search.journal").exists():
        raise UserError(f"--status: {output} holds no search")
    output.mkdir(parents=True, exist_ok=True)
    with _as_owner(output, alone=not status) as owner:
        study = Study(place, str(config.get("name") or "search"), config, searcher, owner)
        if status:
            _conclude(study, output)
            return
        gpus = _gpus()
        jobs = jobs or max(len(gpus), 1)
        jobs = min(jobs, searcher.max_concurrent or jobs)
        _Search(config, searcher, study, output, program, places_for(jobs, gpus)).run()


@contextlib.contextmanager
def _as_owner(output: Path, alone: bool) -> Iterator[str]:
    """The name of this machine's part of the search, the same at each start.

    Raises:
        UserError: `alone` is asked for, and a search is going on here.
    """
    with (output / f".owner-{socket.gethostname()}").open("a+") as file:
        if alone:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"--output-dir: a search is going on in {output}; --status says how far it is"
                ) from error
        file.seek(0)
        owner = file.read()
        if not owner:
            owner = uuid.uuid4().hex
            file.write(owner)
            file.flush()
        yield owner


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
        self.restarts: dict[int, int] = {}
        self.asked_to_stop: int | None = None

    def run(self) -> None:
        self.folder.mkdir(exist_ok=True)
        logger.info("search: %s", self.output)
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            waiting = self.study.mine()
            while self.asked_to_stop is None:
                self.study.beat()
                self._look_at_all()
                while self.free and self.asked_to_stop is None:
                    trial = waiting.pop(0) if waiting else self.study.ask()
                    if trial is None:
                        break
                    self._start(trial)
                if not self.running and not self.study.running_elsewhere():
                    break
                time.sleep(_POLL)
            self._stop_all()
        finally:
            for _, process in self.running.values():
                process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.asked_to_stop is not None:
            print(f"stopped; the same command goes on where its trials are: {self.output}", file=sys.stderr)
            sys.exit(128 + self.asked_to_stop)
        _conclude(self.study, self.output)

    def _stop(self, number: int, _: Any) -> None:
        if self.asked_to_stop is not None:  # asked twice
            raise KeyboardInterrupt
        self.asked_to_stop = number

    def _start(self, trial: optuna.Trial) -> None:
        number = first_number(trial)
        file = self.folder / f"{number}.yaml"
        hyperparameters = draw(trial, self.config.get("hyperparameters") or {})
        config = {
            **self.config,
            "hyperparameters": hyperparameters,
            "name": f"{self.config.get('name')} trial {number}",
        }
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        process = TrialProcess(
            self.program,
            file,
            self.folder / str(number),
            self.folder / f"{number}.log",
            self.free.pop(0),
            self._names_for_loggers(),
        )
        process.reported = dict(self.study.reported(trial))
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
            ended = process.process.poll()
            self._report(trial, process)
            if ended is not None:
                del self.running[number]
                self.free.append(process.place)
                self._end(trial, process, ended)

    def _report(self, trial: optuna.Trial, process: TrialProcess) -> None:
        for batches, value in process.new_validations(self.searcher.metric.name):
            step = batches * WHOLE // process.folder.total_batches()
            if step in process.reported:  # of a run that was taken up again
                continue
            process.reported[step] = self.searcher.metric.worst if math.isnan(value) else value
            trial.report(process.reported[step], step)
            if not process.stopped and trial.should_prune():
                process.pruned = True
                process.stop()

    def _end(self, trial: optuna.Trial, process: TrialProcess, code: int) -> None:
        number, values = first_number(trial), process.reported
        best = self.searcher.metric.best_of(values.values())
        if process.pruned:
            self.study.study.tell(trial, state=TrialState.PRUNED)
            logger.info(
                "trial %d: given up at %.0f %%, %s", number, 100 * max(values) / WHOLE, _said(self.searcher, best)
            )
        elif code == 0 and not math.isnan(best):
            self.study.study.tell(trial, best)
            logger.info("trial %d: finished, %s", number, _said(self.searcher, best))
        elif self.asked_to_stop is not None and code in (128 + signal.SIGTERM, -signal.SIGTERM):
            pass  # it is under way still, for the next start
        elif code < 0 and self.restarts.get(number, 0) < self.searcher.max_restarts:
            self.restarts[number] = self.restarts.get(number, 0) + 1
            logger.warning("trial %d was killed by %s; it goes on", number, signal.Signals(-code).name)
            self._start(trial)
        else:
            words = process.last_words()
            trial.set_user_attr(ERROR, words)
            self.study.study.tell(trial, state=TrialState.FAIL)
            logger.warning("trial %d ended with an error: %s", number, words)

    def _stop_all(self) -> None:
        for _, process in self.running.values():
            process.stop()
        until = time.monotonic() + _TO_STOP
        while self.running and time.monotonic() < until:
            self._look_at_all()
            time.sleep(_POLL / 5)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _said(searcher: Searcher, value: float) -> str:
    return f"{searcher.metric.name} {value:.4f}"


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
        shutil.copy(config, output / "best.yaml")
        print(f"best: trial {number}, {_said(study.searcher, best.value)}; its config: {output / 'best.yaml'}")
    else:
        print(f"best: trial {number}, {_said(study.searcher, best.value)}, trained on another machine")
    from shared.search.page import write_search_page  # matplotlib's figures take half a second to import

    print(f"the page: {write_search_page(study, output)}")
