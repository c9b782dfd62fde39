"""CPU seconds of a training step and of a start, divided by those of another checkout.

    git worktree add /tmp/before COMMIT
    OMP_NUM_THREADS=1 python benchmarks/commits.py step --before /tmp/before

Both checkouts run a detector's `bccd.yaml` in their own processes, in short turns. When the machine has other work, CPU
seconds change less than wall seconds.
"""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from command_line import ROOT, main
from turns import in_turns, ratio

SECONDS = 600  # for a batch


class Run:
    """A training run in its own process, with its loader's workers, that is stopped between its turns.

    Args:
        detector: the folder with model_def.py and bccd.yaml.
        folder: of the run.
        period: batches between two reports.
        changes: changes to the config, KEY=VALUE.
    """

    def __init__(self, detector: Path, folder: Path, data: Path, period: int, *changes: str):
        self.metrics, self.log, self.period = folder / "metrics.jsonl", folder.with_suffix(".log"), period
        changes = [*changes, f"scheduling_unit={period}", "searcher.max_length={batches: 1000000}"]
        changes += [f"min_{what}_period={{batches: 1000000}}" for what in ("validation", "checkpoint")]
        command = [sys.executable, "model_def.py", "train", "bccd.yaml", "--output-dir", str(folder), *on_bccd(data)]
        with self.log.open("w") as log:
            self.process = psutil.Popen(
                [*command, *(argument for change in changes for argument in ("--set", change))],
                cwd=detector,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def batches(self) -> int:
        reports = self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0
        return reports * self.period

    def wait_for_report(self) -> int:
        """Returns the number of batches at the next report."""
        before, end = self.batches(), time.monotonic() + SECONDS
        while (now := self.batches()) == before:
            if self.process.poll() is not None or time.monotonic() > end:
                sys.exit(f"the training does not train:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.002)
        return now

    def cpu_seconds(self) -> float:
        """CPU seconds of the process and its workers so far."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(sum(each.cpu_times()[:2]) for each in family)

    def turn(self) -> float:
        """Trains from a report to the next one. Returns CPU seconds per batch."""
        self.send(signal.SIGCONT)
        first, cpu = self.wait_for_report(), self.cpu_seconds()
        batches = self.wait_for_report() - first
        cpu = self.cpu_seconds() - cpu
        self.send(signal.SIGSTOP)
        return cpu / batches

    def send(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)


@contextlib.contextmanager
def started(*arguments) -> Iterator[Run]:
    run = Run(*arguments)
    try:
        yield run
    finally:
        run.send(signal.SIGKILL)
        run.process.wait()


def on_bccd(data: Path) -> list[str]:
    """The arguments of `train bccd.yaml` that name the data: BCCD's folder, or that of synthetic data."""
    folder, arguments = data.absolute(), []
    for split in ("train", "val"):
        images = folder / ("images" if (folder / "images").exists() else split)
        paths = f"{{annotations: {folder / 'annotations' / split}.json, images: {images}}}"
        arguments += ["--set", f"data.{split}={paths}"]
    return arguments


def first_batch(detector: Path, data: Path) -> float:
    """CPU seconds of one start in a detector's folder, until the first batch. The training is stopped then."""
    with tempfile.TemporaryDirectory() as folder, started(detector, Path(folder, "run"), data, 1) as run:
        run.wait_for_report()
        return run.cpu_seconds()


def step(before: Path, data: Path = Path("/data/bccd"), detector: str = "efficientdet", turns: int = 12) -> dict:
    """CPU seconds per batch, loader workers included.

    turns: of 10 batches, for each side
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no stopped process
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        runs = {}
        for name, checkout in (("here", ROOT), ("before", before)):
            cache = f"data.cache_dir={scratch}/{name}-cache"
            run = stack.enter_context(started(checkout / detector, Path(scratch) / name, data, 10, cache))
            runs[checkout] = run
            run.wait_for_report()  # the first one is slower
            run.send(signal.SIGSTOP)
        return compared(lambda checkout: runs[checkout].turn(), before, turns)


def start(before: Path, data: Path = Path("/data/bccd"), detector: str = "efficientdet", turns: int = 8) -> dict:
    """CPU seconds from the command to the first batch, with a warm cache.

    turns: of each side
    """
    return compared(lambda checkout: first_batch(checkout / detector, data), before, turns)


def compared(seconds_of: Callable[[Path], float], before: Path, turns: int) -> dict:
    """The ratio of the checkouts' seconds, and their medians."""
    sides = {checkout: lambda _, checkout=checkout: seconds_of(checkout) for checkout in (ROOT, before)}
    here, there = in_turns(sides, turns).values()
    return {**ratio(here, there), "here_s": statistics.median(here), "before_s": statistics.median(there)}


if __name__ == "__main__":
    main(__doc__, step, start)
