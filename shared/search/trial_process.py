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

from shared.training.run_folder import RunFolder

_PR_SET_PDEATHSIG = 1  # of Linux' prctl
_SECONDS_TO_END = 120  # that a run may have left, of a search that was killed


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
        folder: of the run; one with a checkpoint goes on from it.
        log: what the run prints goes there.
        variables: of its environment, where this process's says nothing.

    Attributes:
        reported: the values that the search was told of, by step.
        stopped: whether it was asked to stop; `pruned` whether because others are better.
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
        self.folder.wait_until_free(_SECONDS_TO_END)
        command = [*program, "train", str(config), "--output-dir", str(folder)]
        if (self.folder.checkpoints / "last").exists():
            command += ["--resume", "last"]
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
        self.reported: dict[int, float] = {}
        self.stopped = self.pruned = False
        self._read = 0

    def stop(self) -> None:
        """Lets the run save a checkpoint after its batch, and end."""
        if not self.stopped and self.process.poll() is None:
            self.stopped = True
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it at once, with its loader workers."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def new_validations(self, metric: str) -> list[tuple[int, float]]:
        """(batches, value) of each that has been reported since the last call; nan where it is undefined."""
        if not self.folder.metrics.exists():
            return []
        with self.folder.metrics.open() as file:
            file.seek(self._read)
            lines = file.read()
        whole = lines[: lines.rfind("\n") + 1]
        self._read += len(whole.encode())
        reports = map(json.loads, whole.splitlines())
        return [
            (report["batches"], math.nan if (value := report["metrics"].get(metric)) is None else value)
            for report in reports
            if report["split"] == "val"
        ]

    def last_words(self) -> str:
        """The last line that says what went wrong, of what it printed."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        errors = [line for line in lines if line.startswith("error") or "Error: " in line]
        return (errors or [line for line in lines if line.strip()] or ["it printed nothing"])[-1].strip()


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
