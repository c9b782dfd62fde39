"""How torch's OpenMP threads wait, and how many there are. Imported before torch: OpenMP reads how as it is loaded.

By itself a thread that waits for the others spins for milliseconds. Where other work has one of the cores, the others
spin through the time that it would need to catch up, at each of a step's thousands of operations.

Loader workers are not taken off the cores: they sleep for most of a step, and threads that sleep too yield to them.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # GNU's OpenMP, which torch's wheels have, would wake its threads thousands of times a step: they spin for some
    # microseconds first, a hundredth of its own default
    os.environ["GOMP_SPINCOUNT"] = "3000"


def use_available_cores() -> None:
    """Gives torch no more threads than this process has cores, where the user has not said how many.

    torchrun says `OMP_NUM_THREADS=1` for several processes on a machine, which looks like the user's own, and stays.
    """
    import torch

    if not any(name in os.environ for name in COUNTS):
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))


def available_cores(root: Path = Path("/")) -> int:
    """The cores of this process: those it may run on, as far as its control groups give it their time, divided by the
    processes that torchrun started on the machine; at least 1.

    Args:
        root: of the file system, with proc and sys.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min([cores, *_quotas(root)])
    return max(1, math.floor(cores / int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _quotas(root: Path) -> Iterator[float]:
    """The cores' worth of time that each control group above this process allows, of version 1 or 2."""
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = mount / path.lstrip("/")
        # in a container the path may be the host's, and of it only the mount, which is the container's, is there
        while group.is_relative_to(mount):
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            if all((group / name).exists() for name in names):
                quota, period = " ".join((group / name).read_text().strip() for name in names).split()
                if quota not in ("max", "-1"):
                    yield int(quota) / int(period)
            group = group.parent
