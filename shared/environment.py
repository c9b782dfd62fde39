"""The environment of a process: threads, missing packages, whether it is a cluster's task."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

_INSTALL = (
    "`make demo` in the project's folder makes a complete environment (.venv/bin/python). To use your own, which needs "
    "torch, torchvision and determined: python3 -m shared.container, in the detector's folder"
)
_PACKAGES = {"cv2": "opencv-python-headless", "PIL": "pillow", "sklearn": "scikit-learn", "yaml": "PyYAML"}
# not installed by their name alone: each must go with the version of torch
_OF_TORCH = ("", "detectron2", "mmcv", "mmdet", "shared", "torch", "torchvision", "determined")


def _print_what_is_missing(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not isinstance(error, ModuleNotFoundError):
        sys.__excepthook__(kind, error, traceback)
        return
    package = (error.name or "").split(".")[0]
    pip = "" if package in _OF_TORCH else f"{sys.executable} -m pip install {_PACKAGES.get(package, package)}. Or: "
    print(f"error: {sys.executable} lacks the package {error.name!r}. Fix: {pip}{_INSTALL}", file=sys.stderr)


@contextlib.contextmanager
def quiet_if_output_is_closed() -> Iterator[None]:
    """Exits without a traceback when the reader of the output, such as `head`, closes it."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout.fileno(), select.POLLOUT)
        if not any(events & select.POLLERR for _, events in output.poll(0)):
            raise  # another pipe's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again
        sys.exit(128 + signal.SIGPIPE)


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def prepare_process() -> None:
    """Prepares a program. Call it first, before torch and the packages that may be missing are imported.

    - A missing package ends the program in one line that says how to install it.
    - A thread of torch's OpenMP that waits yields its core. By default it spins for milliseconds; on a busy machine the
      threads then spin through the time that the slowest of them needs. OpenMP reads this when torch loads it.
    """
    if sys.version_info < (3, 10):  # noqa: UP036 the code runs from its folders, which no installer looked at
        sys.exit(
            f"error: Python 3.10 or later is needed, and {sys.executable} is {sys.version.split()[0]}. Fix: {_INSTALL}"
        )
    sys.excepthook = _print_what_is_missing
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        # GNU's OpenMP, which torch's wheels have, would wake its threads thousands of times a step: they spin for some
        # microseconds first, a hundredth of its own default
        os.environ["GOMP_SPINCOUNT"] = "3000"


def use_available_cores() -> None:
    """Gives torch no more threads than this process has cores, unless the user sets a number.

    torchrun sets `OMP_NUM_THREADS=1` for several processes on a machine. It looks like the user's own, and stays.
    """
    import torch

    if not any(name in os.environ for name in COUNTS):
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))


def available_cores(root: Path = Path("/")) -> int:
    """The cores of this process, at least 1: those on which it may run and for which its control groups give it time,
    divided by the processes that torchrun started on the machine. `root` has the folders proc and sys."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min([cores, *_quotas(root)])
    return max(1, math.floor(cores / int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _quotas(root: Path) -> Iterator[float]:
    """The number of cores whose time each control group above this process allows. Reads versions 1 and 2."""
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = mount / path.lstrip("/")
        # in a container the path may be the host's; then only the mount, which is the container's, exists
        while group.is_relative_to(mount):
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            if all((group / name).exists() for name in names):
                quota, period = " ".join((group / name).read_text().strip() for name in names).split()
                if quota not in ("max", "-1"):
                    yield int(quota) / int(period)
            group = group.parent


def task_config() -> dict[str, Any]:
    """The experiment config of this cluster's task, as the master filled it in.

    Determined has no public name for it: its shape may change with the master's version.
    """
    import determined as det

    return det.get_cluster_info().trial._config


def on_cluster() -> bool:
    """Whether this process is a task of a Determined trial."""
    import determined as det

    info = det.get_cluster_info()
    return info is not None and info.task_type == "TRIAL"
