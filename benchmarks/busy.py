"""Training on a machine that has other work too, as `shared/environment.py` has it and as torch does by itself.

Two processes train the same config by `model_def.py train`, and take turns of a few seconds: the other one is stopped.
Reported are the batches a second of both and their ratio, on the machine as it is and with two `yes` beside it.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from shared import environment as threads
from shared.data import synthetic

LIBRARIES = {"mmdetection": "mmdet", "efficientdet": "effdet"}
TORCH_S = {"GOMP_SPINCOUNT": "300000"}  # GNU's OpenMP's own: some milliseconds before a thread sleeps
SECONDS = 600  # for a batch, where threads spin and much other work runs


class Run:
    """A training in a process of its own, with its loader's workers, that stands still between its turns."""

    def __init__(self, config: Path, folder: Path, changes: list[str], environment: dict[str, str]):
        left_out = (*threads.WAITING, *threads.COUNTS)
        others = {name: value for name, value in os.environ.items() if name not in left_out}
        self.metrics, self.log = folder / "metrics.jsonl", folder.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "model_def.py", "train", config.name, "--output-dir", str(folder)]
                + [argument for change in changes for argument in ("--set", change)],
                cwd=config.parent,
                env={**others, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, batches: int) -> None:
        end = time.monotonic() + SECONDS
        while self.batches() < batches:
            if self.process.poll() is not None or time.monotonic() > end:
                sys.exit(f"the training does not train:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.005)

    def batches(self) -> int:  # a line each
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    def turn(self, seconds: float) -> float:
        """Trains for so long, and to the end of a batch; returns batches a second."""
        first, started = self.batches(), time.monotonic()
        self.send(signal.SIGCONT)
        time.sleep(seconds)
        self.wait_for(self.batches() + 1)
        took = time.monotonic() - started
        self.send(signal.SIGSTOP)
        return (self.batches() - first) / took

    def send(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)


@contextlib.contextmanager
def training(*arguments) -> Iterator[Run]:
    run = Run(*arguments)
    try:
        run.wait_for(1)  # the first one is slower
        run.send(signal.SIGSTOP)
        yield run
    finally:
        run.send(signal.SIGKILL)
        run.process.wait()


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    beside = [subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) for _ in range(processes)]
    try:
        yield
    finally:
        for process in beside:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", choices=LIBRARIES, help="default: the first whose library is here")
    parser.add_argument("--data", type=Path, help="BCCD in COCO's format; default: shapes of the same size")
    parser.add_argument(
        "--ours", metavar="NAME=VALUE", nargs="*", default=[], help="variables to try in the place of those that we set"
    )
    parser.add_argument("--yes", type=int, nargs="*", default=[0, 2], help="how many run beside it; default 0 2")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5, help="of a turn, at least")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no process that stands still
    here = [name for name, library in LIBRARIES.items() if importlib.util.find_spec(library)]
    if not here:
        parser.error(f"none of the libraries {', '.join(LIBRARIES.values())} is here")
    config = ROOT / (arguments.detector or here[0]) / "bccd.yaml"

    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        scratch = Path(scratch)
        data, images = arguments.data and arguments.data.absolute(), {"train": "images", "val": "images"}
        if data is None:
            data, images = scratch / "shapes", {"train": "train", "val": "val"}
            synthetic.write(data, train=200, val=4, size=320)
        changes = [
            f"data.{split}={{annotations: {data / 'annotations' / split}.json, images: {data / folder}}}"
            for split, folder in images.items()
        ]
        changes += [
            f"data.cache_dir={scratch / 'cache'}",
            "scheduling_unit=1",
            "searcher.max_length={batches: 1000000}",
        ]
        changes += [f"min_{what}_period={{batches: 1000000}}" for what in ("validation", "checkpoint")]
        sides = {
            name: stack.enter_context(training(config, scratch / name, changes, environment))
            for name, environment in (
                ("ours", dict(each.split("=", 1) for each in arguments.ours)),
                ("torch", TORCH_S),
            )
        }
        for yes in arguments.yes:
            with busy(yes):
                rates = {name: [] for name in sides}
                for turn in range(arguments.turns):
                    for name in list(sides)[:: -1 if turn % 2 else 1]:
                        rates[name].append(sides[name].turn(arguments.seconds))
            pairs = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
            result = {
                "config": str(config.relative_to(ROOT)),
                "yes": yes,
                "ratio_median": round(statistics.median(pairs), 3),
                "ratio_min_max": [round(min(pairs), 3), round(max(pairs), 3)],
                **{f"{name}_batches_a_second": round(statistics.median(side), 3) for name, side in rates.items()},
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
