"""The environment of a process: threads, memory, missing packages, whether it is a cluster's task, and its rank.

torchrun's variables are the contract for the rank: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
`adopt_launcher` sets them from those of mpirun, SLURM's srun and Kubeflow. No other module reads another launcher's
variables.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import select
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from shared.errors import UserError

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
    return max(1, int(cores / int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


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


# of GNU's C library, malloc.h
TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes: what it comes to by itself, as large tensors are freed
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Makes GNU's C library keep the memory that training on the CPU frees, for its next step.

    By default it returns free memory at the end of its heap to the system, which is most of a step's memory. The next
    step then waits until the system has mapped and zeroed it again, 4 kB at a time. The peak stays the same.
    """
    if any(name in os.environ for name in _USERS_OWN):
        return
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        # the first one said ends the adaption of both
        mallopt(_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(TRIM_THRESHOLD, -1)  # never


def task_config() -> dict[str, Any]:
    """The experiment config of this cluster's task, as the master filled it in.

    Determined has no public name for it: its shape may change with the master's version.
    """
    import determined as det

    return det.get_cluster_info().trial._config


def torch_release() -> tuple[int, ...]:
    """The first two numbers of torch's version, such as (2, 3) of `2.3.0a0+ebedce2` in Determined's default image."""
    import torch  # some who import this module start without it

    return tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed, and have metadata."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def on_cluster() -> bool:
    """Whether this process is a task of a Determined trial."""
    import determined as det

    info = det.get_cluster_info()
    return info is not None and info.task_type == "TRIAL"


# --- launchers ---------------------------------------------------------------------------------------


# what SLURM, submitit, Kubernetes and a terminal that closes send before they kill
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_MAY_STOP = {each.name.removeprefix("SIG"): each for each in (*STOP_SIGNALS, signal.SIGQUIT, signal.SIGXCPU)}
# torchrun sets all numbers; if another launcher does not give the last three, they follow from where the ranks are
_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
_DEFAULT_PORT = 29500  # torchrun's
_FIRST_PORT, _PORTS = 20000, 12000  # of SLURM's jobs: below those that a system gives to connections
# a launcher's variables in the processes that it starts
_OF_LAUNCHERS = re.compile(
    r"(OMPI_COMM_WORLD|PMI|PMIX|SLURM|PET|TORCHELASTIC)_|MPI_LOCAL|"
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|GROUP_RANK|GROUP_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$"
)


class MpiNames(NamedTuple):
    """The names under which mpirun gives the rank and the number of ranks, of all and of the machine."""

    rank: str
    size: str
    local_rank: str
    local_size: str


_OPEN_MPI = MpiNames(*(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
_MPICH = MpiNames("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def adopt_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets torchrun's variables from another launcher's. Does nothing for a process that no launcher started.

    Raises:
        UserError: the launcher's variables are incomplete, or are no numbers.
    """
    if "RANK" in environment:
        found, launcher = {}, "the launcher"
        if "GROUP_RANK" not in environment and "NODE_RANK" in environment:  # Ray
            found["GROUP_RANK"] = environment["NODE_RANK"]
    elif {_OPEN_MPI.rank, _OPEN_MPI.local_rank} <= environment.keys():
        found, launcher = _of_mpi(environment, _OPEN_MPI), "mpirun"
    elif {_MPICH.rank, _MPICH.local_rank} <= environment.keys():
        found, launcher = _of_mpi(environment, _MPICH), "mpirun"
    elif "SLURM_PROCID" in environment:
        found, launcher = _of_slurm(environment), "srun"
    elif _MPICH.rank in environment:
        found, launcher = _of_mpi(environment, _MPICH), "mpirun"
    elif "PET_NNODES" in environment:
        found, launcher = _of_kubeflow(environment), "Kubeflow"
    else:
        return
    if found.get("WORLD_SIZE") == "1":
        return
    _check({**environment, **found}, launcher)
    environment.update(found)


def parse_signals(text: str) -> tuple[signal.Signals, ...]:
    """The signals of a list such as "TERM,USR1".

    Raises:
        argparse.ArgumentTypeError: a name is not one of a signal that may stop a run.
    """
    names = [name.strip().upper().removeprefix("SIG") for name in text.split(",") if name.strip()]
    for name in names:
        if name not in _MAY_STOP:
            raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(_MAY_STOP)}")
    return tuple(_MAY_STOP[name] for name in names)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a program that trains alone: the variables of all launchers are removed."""
    return {name: value for name, value in environment.items() if not _OF_LAUNCHERS.match(name)}


def _of_mpi(environment: Mapping[str, str], names: MpiNames) -> dict[str, str]:
    found = {"RANK": environment[names.rank], "WORLD_SIZE": _read(environment, names.size, "mpirun")}
    if names.local_rank in environment:
        found["LOCAL_RANK"] = environment[names.local_rank]
    if "MASTER_ADDR" not in environment and environment.get(names.local_size) == found["WORLD_SIZE"]:
        found["MASTER_ADDR"] = "127.0.0.1"
    return {"MASTER_PORT": str(_DEFAULT_PORT), **_given(environment), **found}


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    # of the step that srun started, which may have a part of the job's nodes
    size = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    in_batch_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    if size == "1" or (in_batch_script and environment["SLURM_PROCID"] == "0"):  # srun starts the others, not sbatch
        return {"WORLD_SIZE": "1"}
    nodes = environment.get("SLURM_STEP_NODELIST") or _read(environment, "SLURM_JOB_NODELIST", "srun")
    return {
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(_slurm_port(environment)),
        **_given(environment),
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": _read(environment, "SLURM_LOCALID", "srun"),
    }


def _slurm_port(environment: Mapping[str, str]) -> int:
    """The same port on each rank of a step, mostly another one for the steps and jobs of the same machine."""
    job, step = (environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _FIRST_PORT + (7 * int(job) + int(step)) % _PORTS if (job + step).isdecimal() else _DEFAULT_PORT


def first_host(nodes: str) -> str:
    """The first host of SLURM's list: "node01" of "node[01-03,07],gpu1"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _of_kubeflow(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun reads these variables. A program that is started without it can be the one process of its node."""
    nodes, processes = environment["PET_NNODES"], environment.get("PET_NPROC_PER_NODE", "1")
    if nodes == processes == "1":
        return {"WORLD_SIZE": "1"}
    if not nodes.isdecimal() or processes != "1":
        raise UserError(
            f"PET_NPROC_PER_NODE: Kubeflow asks for {processes!r} processes on each of {nodes!r} nodes, and this is "
            "one process. Fix: start the program with torchrun instead of python3"
        )
    return {
        "RANK": _read(environment, "PET_NODE_RANK", "Kubeflow"),
        "WORLD_SIZE": nodes,
        "LOCAL_RANK": "0",
        "MASTER_ADDR": _read(environment, "PET_MASTER_ADDR", "Kubeflow"),
        "MASTER_PORT": environment.get("PET_MASTER_PORT", str(_DEFAULT_PORT)),
    }


def _given(environment: Mapping[str, str]) -> dict[str, str]:
    """The user's own address of rank 0."""
    return {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if environment.get(name)}


def _read(environment: Mapping[str, str], name: str, launcher: str) -> str:
    if value := environment.get(name):
        return value
    raise _missing([name], launcher)


def _missing(names: list[str], launcher: str) -> UserError:
    them = "it" if len(names) == 1 else "them"
    return UserError(
        f"{', '.join(names)}: {launcher} started this process as one of several and does not set {them}. Fix: set "
        f"{them} for every process (MASTER_ADDR is the host of rank 0), or start the program with torchrun"
    )


def _check(environment: Mapping[str, str], launcher: str) -> None:
    if missing := [name for name in _REQUIRED if not environment.get(name)]:
        raise _missing(missing, launcher)
    for name in _NUMBERS:
        if not environment.get(name, "0").isdecimal():
            raise UserError(f"{name}: it is {environment[name]!r}. Fix: give a whole number, as torchrun does")
    if int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
        raise UserError(
            f"RANK: it is {environment['RANK']}, and WORLD_SIZE is {environment['WORLD_SIZE']}. Fix: number the "
            "processes from 0 to WORLD_SIZE - 1"
        )
