"""User CPU seconds of a training step and of a start, divided by those of another checkout.

    git worktree add /tmp/before COMMIT
    python benchmarks/commits.py step --before /tmp/before

Both checkouts train a detector's `bccd.yaml` in their own processes, in turns, each on one thread. When the machine has
other work, CPU seconds change less than wall seconds.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

from bccd_runs import train_command, user_seconds
from command_line import ROOT, main, scratch_folder
from turns import in_turns, ratio

BCCD = Path("/data/bccd")


def step(before: Path, data: Path = BCCD, detector: str = "efficientdet", batches: int = 100, turns: int = 8) -> dict:
    """Seconds per batch, loader workers included.

    batches: those of a longer run that a run of one batch does not have
    turns: of each side
    """
    return compare(lambda train: (train(1 + batches) - train(1)) / batches, before, data, detector, turns)


def start(before: Path, data: Path = BCCD, detector: str = "efficientdet", turns: int = 8) -> dict:
    """Seconds of a run of one batch, with its validation and its checkpoint.

    turns: of each side
    """
    return compare(lambda train: train(1), before, data, detector, turns)


def compare(measured: Callable[[Callable], float], before: Path, data: Path, detector: str, turns: int) -> dict:
    """The ratio of the checkouts' seconds, and their medians. The first turn fills their caches.

    Args:
        measured: takes what trains a number of batches and returns its seconds.
    """
    with scratch_folder() as scratch:

        def side(turn: int, checkout: Path, name: str) -> float:
            def train(batches: int) -> float:
                run = scratch / f"{name}-{turn}-{batches}"
                changes = f"searcher.max_length={{batches: {batches}}}", f"data.cache_dir={scratch / name}-cache"
                return user_seconds(train_command(data, run, *changes), checkout / detector, run.with_suffix(".log"))

            return measured(train)

        sides = {"here_s": lambda turn: side(turn, ROOT, "here"), "before_s": lambda turn: side(turn, before, "before")}
        taken = in_turns(sides, turns)
    medians = {name: round(statistics.median(seconds), 4) for name, seconds in taken.items()}
    return {**ratio(*taken.values()), **medians}


if __name__ == "__main__":
    main(__doc__, step, start)
