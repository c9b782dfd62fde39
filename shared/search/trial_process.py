"""A trial of a search: an ordinary run, in its own process, on its share of the machine."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.environment import without_launcher
from shared.training.run_folder import RunFolder

WHOLE = 10**6  # the length of a run: validations are counted in millionths, the same for batches and epochs
_PR_SET_PDEATHSIG = 1  # of Linux' prctl


@dataclass(frozen=True)
class Place:
    """The part of the machine that a trial may use.

    Attributes:
        gpu: for CUDA_VISIBLE_DEVICES; None on a machine without GPUs.
        cores: ids of CPU cores; empty for all.
    """

    gpu: str | None = None
    cores: tuple[int, ...] = ()


def places_for(jobs: int | None, at_most: int) -> list[Place]:
    """A place for each of the trials that run at once. They have a GPU each and share the cores.

    Args:
        jobs: the number of trials; None for one per GPU, or one.
        at_most: limits the number; 0 for no limit.
    """
    gpus = _gpus()
    jobs = jobs or max(len(gpus), 1)
    jobs = min(jobs, at_most or jobs)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") and jobs > 1 else []
    places = []
    for job in range(jobs):
        own = cores[job * len(cores) // jobs : (job + 1) * len(cores) // jobs]
        if cores and not own:  # there are more jobs than cores
            own = [cores[job % len(cores)]]
        places.append(Place(gpus[job % len(gpus)] if gpus else None, tuple(own)))
    return places


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    import torch  # takes seconds

    return [str(i) for i in range(torch.cuda.device_count())]


class TrialProcess:
    """A run that is under way. Its config and its log are beside its folder: `N.yaml`, `N.log`.

    Args:
        program: the command to which `train CONFIG …` is added.
        folder: the folder of the run, in which no other process trains. The run resumes from a checkpoint in it.
        variables: for its environment, if this process has no such variables.

    Attributes:
        is_stopping: whether it was asked to stop.
    """

    def __init__(self, program: Sequence[str], folder: Path, place: Place, variables: Mapping[str, str]):
        self.folder, self.place = RunFolder(folder), place
        self.log = folder.with_suffix(".log")
        # `auto`: a run that was killed before its first checkpoint starts anew, and a complete run is no error
        config = folder.with_suffix(".yaml")
        command = [*program, "train", str(config), "--output-dir", str(folder), "--resume", "auto"]
        gpu = {"CUDA_VISIBLE_DEVICES": place.gpu} if place.gpu is not None else {}
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**variables, **without_launcher(os.environ), **gpu},  # it trains alone
                start_new_session=True,  # Ctrl-C reaches the search, which stops its trials
                preexec_fn=_before_start(place.cores),
            )
        self.is_stopping = False

    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._process.poll()

    def stop(self) -> None:
        """Lets the run save a checkpoint after its batch and exit."""
        if not self.is_stopping and self.exit_code() is None:
            self.is_stopping = True
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kills it with its loader workers."""
        if self.exit_code() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def validations(self, metric: str) -> list[tuple[int, float]]:
        """(millionths of the whole training, value) of each validation in metrics.jsonl; nan for an undefined value.

        Empty if the run has not written its length yet. Reads the whole file, because a resumed run rewrites it.
        """
        try:
            reports, total = self.folder.reports(), self.folder.total_batches()
        except (OSError, ValueError, KeyError, TypeError):  # not there yet, or incomplete
            return []
        of_validations = (report for report in reports if report["split"] == "val")
        found = [(report["batches"] * WHOLE // total, report["metrics"].get(metric)) for report in of_validations]
        return [(step, math.nan if value is None else value) for step, value in found]

    def last_error(self) -> str:
        """The last line of its log that looks like an error; else the last line."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        errors = [line for line in lines if line.startswith("error") or "Error: " in line]
        return (errors or [line for line in lines if line.strip()] or ["it printed nothing"])[-1].strip()


def _before_start(cores: tuple[int, ...]) -> Callable[[], None]:
    search = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        if prctl is not None:
            # if the search is killed, its runs save a checkpoint and exit
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != search:
                os._exit(1)
        if cores:
            os.sched_setaffinity(0, cores)

    return prepare
