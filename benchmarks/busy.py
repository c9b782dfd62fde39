"""Training on a machine that has other work too: with the threads of `shared/environment.py`, and with torch's own.

Two processes train the same config and take turns of a few seconds, while the other one is stopped. The result is the
batches per second of both and their ratio, on the machine alone and with two `yes` beside it.
"""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from command_line import ROOT, main
from start import on_bccd

from shared import environment as threads
from shared.data import synthetic

TORCH_DEFAULTS = {"GOMP_SPINCOUNT": "300000"}  # of GNU's OpenMP: some milliseconds until a thread sleeps
SECONDS = 600  # for a batch, while threads spin and much other work runs


class Run:
    """A training in its own process, with its loader's workers, that is stopped between its turns.

    Args:
        detector: the folder with model_def.py and bccd.yaml.
        folder: of the run.
        period: batches between two reports.
    """

    def __init__(self, detector: Path, folder: Path, data: Path, environment: dict[str, str], period: int = 1):
        inherited = {n: v for n, v in os.environ.items() if n not in (*threads.WAITING, *threads.COUNTS)}
        self.metrics, self.log, self.period = folder / "metrics.jsonl", folder.with_suffix(".log"), period
        changes = [f"scheduling_unit={period}", f"data.cache_dir={folder}-cache"]
        changes += ["searcher.max_length={batches: 1000000}"]
        changes += [f"min_{what}_period={{batches: 1000000}}" for what in ("validation", "checkpoint")]
        command = [sys.executable, "model_def.py", "train", "bccd.yaml", "--output-dir", str(folder), *on_bccd(data)]
        with self.log.open("w") as log:
            self.process = psutil.Popen(
                [*command, *(argument for change in changes for argument in ("--set", change))],
                cwd=detector,
                env={**inherited, **environment},
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

    def turn(self, seconds: float) -> tuple[float, float]:
        """Trains for at least `seconds`, from a report to a later one. Returns batches per second, and CPU seconds per
        batch."""
        self.send(signal.SIGCONT)
        first, started, cpu = self.wait_for_report(), time.monotonic(), self.cpu_seconds()
        time.sleep(seconds)
        batches = self.wait_for_report() - first
        took, cpu = time.monotonic() - started, self.cpu_seconds() - cpu
        self.send(signal.SIGSTOP)
        return batches / took, cpu / batches

    def send(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)


@contextlib.contextmanager
def training(*arguments) -> Iterator[Run]:
    run = Run(*arguments)
    try:
        run.wait_for_report()  # the first one is slower
        run.send(signal.SIGSTOP)
        yield run
    finally:
        run.send(signal.SIGKILL)
        run.process.wait()


@contextlib.contextmanager
def other_work(processes: int) -> Iterator[None]:
    beside = [subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) for _ in range(processes)]
    try:
        yield
    finally:
        for process in beside:
            process.kill()
            process.wait()


def busy(
    detector: str = "efficientdet",
    data: Path | None = None,
    yes: list[int] = [0, 2],  # noqa: B006
    turns: int = 8,
    seconds: float = 5,
) -> dict:
    """
    data: BCCD in COCO's format; default: synthetic images of its size
    yes: how many run beside it; default 0 2
    seconds: of a turn, at least
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no stopped process
    results = {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        scratch = Path(name)
        if data is None:
            data = scratch / "shapes"
            synthetic.write(data, train=200, val=4, size=320)
        sides = {
            side: stack.enter_context(training(ROOT / detector, scratch / side, data, environment))
            for side, environment in (("ours", {}), ("torch", TORCH_DEFAULTS))
        }
        for count in yes:
            rates = {side: [] for side in sides}
            with other_work(count):
                for turn in range(turns):
                    for side in list(sides)[:: -1 if turn % 2 else 1]:
                        rates[side].append(sides[side].turn(seconds)[0])
            pairs = [ours / torch for ours, torch in zip(*rates.values(), strict=True)]
            medians = {f"{side}_batches_per_second": round(statistics.median(of), 3) for side, of in rates.items()}
            spread = [round(min(pairs), 3), round(max(pairs), 3)]
            results[f"{count} yes"] = {"ratio": round(statistics.median(pairs), 3), "min_max": spread, **medians}
    return results


if __name__ == "__main__":
    main(__doc__, busy)
