"""A trial of a search: an ordinary run, in a process of its own, on its share of the machine."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.search.halving import WHOLE
from shared.training.run_folder import RunFolder

_PR_SET_PDEATHSIG = 1  # of Linux' prctl


@dataclass(frozen=True)
class Place:
    """What a trial may use.

    Attributes:
        gpu: of CUDA_VISIBLE_DEVICES; None on a machine without.
        cores: ids of CPU cores; empty for all.
    """

    gpu: str | None
    cores: tuple[int, ...]


def places_for(jobs: int, gpus: Sequence[str]) -> list[Place]:
    """A place for each of so many trials at once: a GPU each, the cores shared out."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    places = []
    for job in range(jobs):
        # where there are more jobs than cores, several have the same one
        mine = cores[job * len(cores) // jobs : (job + 1) * len(cores) // jobs] or cores[job % len(cores or [0]) :][:1]
        places.append(Place(gpus[job % len(gpus)] if gpus else None, tuple(mine) if jobs > 1 else ()))
    return places


class TrialProcess:
    """A run that is under way.

    Args:
        program: what `train CONFIG …` is given to.
        config: the trial's YAML file.
        folder: of the run, in which no other process trains; one with a checkpoint goes on from it.
        log: what the run prints goes there.
        variables: of its environment, where this process's says nothing.

    Attributes:
        stopped: whether it was asked to stop.
    """

    def __init__(
        self,
        program: Sequence[str],
        config: Path,
        folder: Path,
        log: Path,
        place: Place,
        variables: Mapping[str, str],
    ):
        self.folder, self.log, self.place = RunFolder(folder), log, place
        # `auto`: a run that was killed before its first checkpoint begins anew, and a complete one is no error
        command = [*program, "train", str(config), "--output-dir", str(folder), "--resume", "auto"]
        gpu = {"CUDA_VISIBLE_DEVICES": place.gpu} if place.gpu is not None else {}
        environment = {**variables, **os.environ, **gpu}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is the search's, which tells its trials
                preexec_fn=_at_start(place.cores),
            )
        self.stopped = False
        self._text = ""

    def stop(self) -> None:
        """Lets the run save a checkpoint after its batch, and end."""
        if not self.stopped and self.process.poll() is None:
            self.stopped = True
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it at once, with its loader workers."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def validations(self, metric: str) -> list[tuple[int, float]]:
        """(millionths of the whole training, value) of each validation in metrics.jsonl; nan if the value is undefined.

        Empty if nothing has been reported since the last call. Reads the whole file, because a resumed run rewrites it.
        Skips lines that are not complete, and reads nothing before the run has written its length.
        """
        try:
            text = self.folder.metrics.read_text(errors="replace")
            total = self.folder.total_batches()
        except (OSError, ValueError, KeyError, TypeError):  # not there yet, or not complete
            return []
        if text == self._text:
            return []
        self._text = text
        reports = filter(None, map(_validation_in, text.splitlines()))
        return [(batches * WHOLE // total, _number(metrics.get(metric))) for batches, metrics in reports]

    def last_words(self) -> str:
        """The last line that says what went wrong, of what it printed."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        errors = [line for line in lines if line.startswith("error") or "Error: " in line]
        return (errors or [line for line in lines if line.strip()] or ["it printed nothing"])[-1].strip()


def _validation_in(line: str) -> tuple[int, Mapping[str, Any]] | None:
    """Batches and metrics of a validation's line of metrics.jsonl; None for any other line."""
    try:
        report = json.loads(line)
        return (int(report["batches"]), dict(report["metrics"])) if report["split"] == "val" else None
    except (ValueError, KeyError, TypeError):
        return None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _at_start(cores: tuple[int, ...]) -> Callable[[], None]:
    search = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        if prctl is not None:
            # a search that is killed leaves no run behind: each saves its checkpoint and ends
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != search:
                os._exit(1)
        if cores:
            os.sched_setaffinity(0, cores)

    return prepare
