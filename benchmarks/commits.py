"""CPU seconds here, divided by those of another checkout: of a training step, of a start, of an evaluation.

    git worktree add /tmp/before COMMIT
    OMP_NUM_THREADS=1 python benchmarks/commits.py step --before /tmp/before

Both run a detector's `bccd.yaml` in their own processes, in short turns. When the machine has other work, CPU seconds
change less than wall seconds.
"""

import contextlib
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from busy import training
from command_line import ROOT, main
from start import first_batch, on_bccd


def step(before: Path, data: Path = Path("/data/bccd"), detector: str = "efficientdet", turns: int = 12) -> dict:
    """CPU seconds per batch, loader workers included.

    turns: of 10 batches, for each side
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no stopped process
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        runs = {
            checkout: stack.enter_context(
                training(checkout / detector, Path(scratch) / name, data, {"OMP_NUM_THREADS": "1"}, 10)
            )
            for name, checkout in (("here", ROOT), ("before", before))
        }
        return in_pairs(lambda checkout: runs[checkout].turn(0)[1], before, turns)


def start(before: Path, data: Path = Path("/data/bccd"), detector: str = "efficientdet", turns: int = 8) -> dict:
    """CPU seconds from the command to the first batch, with a warm cache.

    turns: of each side
    """
    return in_pairs(lambda checkout: first_batch(checkout / detector, data)[1], before, turns)


def evaluation(before: Path, data: Path = Path("/data/bccd"), detector: str = "efficientdet", turns: int = 8) -> dict:
    """CPU seconds of the `evaluate` command, start included, with a checkpoint after 2 batches.

    turns: of each side
    """
    with tempfile.TemporaryDirectory() as scratch:

        def run(checkout: Path, command: str, *arguments: str) -> float:
            program = [sys.executable, "model_def.py", command, "bccd.yaml", *arguments, *on_bccd(data)]
            used = cpu_of_children()
            subprocess.run(program, cwd=checkout / detector, check=True, capture_output=True)
            return cpu_of_children() - used

        folders = {ROOT: f"{scratch}/here", before: f"{scratch}/before"}
        for checkout, folder in folders.items():
            run(checkout, "train", "--output-dir", folder, "--set", "searcher.max_length={batches: 2}")
        checkpoints = {checkout: f"{folder}/checkpoints/last" for checkout, folder in folders.items()}
        return in_pairs(lambda c: run(c, "evaluate", "--checkpoint", checkpoints[c]), before, turns)


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def in_pairs(seconds_of: Callable[[Path], float], before: Path, turns: int) -> dict:
    """The median ratio of pairs, and that of their quarters. The first pair warms up."""
    taken = {ROOT: [], before: []}
    for turn in range(turns + 1):
        for checkout in (ROOT, before) if turn % 2 else (before, ROOT):
            taken[checkout].append(seconds_of(checkout))
    pairs = [here / there for here, there in list(zip(taken[ROOT], taken[before], strict=True))[1:]]
    here, there = (round(statistics.median(seconds[1:]), 4) for seconds in taken.values())
    quarters = [round(value, 3) for value in statistics.quantiles(pairs)] if turns > 1 else pairs
    return {"ratio": round(statistics.median(pairs), 4), "quarters": quarters, "here_s": here, "before_s": there}


if __name__ == "__main__":
    main(__doc__, step, start, evaluation)
