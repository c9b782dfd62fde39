"""The rank of this process among those of a run, as its launcher gives it.

torchrun's variables are the contract: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. `adopt_launcher` sets
them from those of mpirun, SLURM's srun and Kubeflow. No other module reads another launcher's variables.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from shared.errors import UserError

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


class Places(NamedTuple):
    """The names under which a launcher gives the rank, the number of ranks and the rank on the machine."""

    launcher: str
    rank: str
    size: str
    local_rank: str


_MPI = (
    Places("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    Places("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


def adopt_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets torchrun's variables from another launcher's. Does nothing for a process that no launcher started.

    Raises:
        UserError: the launcher's variables are incomplete, or are no numbers.
    """
    if "RANK" in environment:
        found, launcher = {}, "the launcher"
        if "GROUP_RANK" not in environment and "NODE_RANK" in environment:  # Ray
            found["GROUP_RANK"] = environment["NODE_RANK"]
    elif mpi := next((each for each in _MPI if {each.rank, each.local_rank} <= environment.keys()), None):
        found, launcher = _of_mpi(environment, mpi), mpi.launcher
    elif "SLURM_PROCID" in environment:
        found, launcher = _of_slurm(environment), "srun"
    elif "PMI_RANK" in environment:
        found, launcher = _of_mpi(environment, _MPI[1]), "mpirun"
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
        ValueError: a name is not one of a signal that may stop a training.
    """
    names = [name.strip().upper().removeprefix("SIG") for name in text.split(",") if name.strip()]
    for name in names:
        if name not in _MAY_STOP:
            raise ValueError(f"{name} is not one of {', '.join(_MAY_STOP)}")
    return tuple(_MAY_STOP[name] for name in names)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a program that trains alone: the variables of all launchers are removed."""
    return {name: value for name, value in environment.items() if not _OF_LAUNCHERS.match(name)}


def _of_mpi(environment: Mapping[str, str], names: Places) -> dict[str, str]:
    found = {"RANK": environment[names.rank], "WORLD_SIZE": _read(environment, names.size, names.launcher)}
    if names.local_rank in environment:
        found["LOCAL_RANK"] = environment[names.local_rank]
    if "MASTER_ADDR" not in environment and _local_size(environment) == found["WORLD_SIZE"]:
        found["MASTER_ADDR"] = "127.0.0.1"
    return {"MASTER_PORT": str(_DEFAULT_PORT), **_given(environment), **found}


def _local_size(environment: Mapping[str, str]) -> str | None:
    return environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or environment.get("MPI_LOCALNRANKS")


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
