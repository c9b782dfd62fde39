"""How the processes of a run meet: a roll call that names those that are missing, torch's group, the device of each.

The roll call uses the store that torchrun or rank 0 has at MASTER_ADDR. Strangers may reach it. Therefore nothing
secret goes through it, and nothing that could hold code.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import psutil
import torch
from determined.core import DistributedContext
from torch.distributed import PrefixStore, Store, TCPStore

from shared.environment import on_cluster
from shared.errors import DivergedError, UserError
from shared.training.processes import LONGER, LOOPBACK, Address, Place, ProcessContext, host_of_chief
from shared.training.standings import named_ranks, span

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SECONDS_FOR_CHIEF = 3
_MINUTES_A_COLLECTIVE_MAY_WAIT = 30  # at least; torch's own are 30 with Gloo and 10 with NCCL
_MOST_MINUTES = 7 * 24 * 60
_BYTES_OF_ADDRESS = 2 + 40  # a port and a key
_SECONDS_UNTIL_LOGGED = 10.0  # that the chief waits for others
_POLLS = 0.02, 0.5  # seconds between looks at the store, at first and at most
# how Gloo and NCCL report a process that is gone
_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited|ncclRemoteError")


# --- the roll call ----------------------------------------------------------------------------------


class Arrival(NamedTuple):
    """A rank's report about itself.

    Attributes:
        host: the name of its machine, for messages.
        machine: equal for two ranks on one machine.
        address: the machine's own, toward rank 0.
        chief: the address that MASTER_ADDR has there.
        token: new for each process.
    """

    host: str
    machine: str
    address: str
    chief: str
    token: str


def open_store(rank: int, seconds: float, opens: bool = False) -> Store:
    """The store at MASTER_ADDR.

    Args:
        seconds: to wait for it.
        opens: whether it is this rank's. torchrun's agent has it; otherwise rank 0 does.

    Raises:
        UserError: rank 0 cannot open it, or does not answer.
    """
    host, port, own = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), socket.gethostname()
    try:
        timeout = timedelta(seconds=seconds)
        return TCPStore(host, port, None, opens, timeout, wait_for_workers=False, multi_tenant=True)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        if opens:
            raise UserError(
                f"MASTER_PORT: rank 0 cannot open port {port} on {own} ({reason}). Fix: set MASTER_PORT to a free one, "
                "the same for all processes"
            ) from error
        raise UserError(
            f"MASTER_ADDR: rank 0 at {host}:{port} does not answer rank {rank} on {own} ({reason}). Fix: look at rank "
            "0's own error, and whether this machine reaches that port"
        ) from error


def roll_call(store: Store, rank: int, size: int, seconds: float) -> tuple[str, list[Arrival]]:
    """Waits until all ranks have come. Every rank calls this.

    A restart may find the answers of an earlier start in the store. So the chief names each start, and each rank looks
    for its own token among those that the chief found.

    Returns:
        The name of this start, and what each rank reports about itself.

    Raises:
        UserError: a rank did not come in time. Every rank names it.
    """
    chief = _address_of(os.environ["MASTER_ADDR"])
    own = Arrival(socket.gethostname(), _machine(), own_address(chief), chief, uuid.uuid4().hex)
    try:
        return _call(store, size, seconds, own) if rank == 0 else _answer(store, rank, seconds, own)
    except RuntimeError as error:
        chief = os.environ["MASTER_ADDR"]
        raise UserError(
            f"MASTER_ADDR: rank {rank} on {own.host} lost its connection to rank 0 at {chief} before all processes had "
            "come. Fix: look at the error of the process that ended first"
        ) from error


def _call(store: Store, size: int, seconds: float, own: Arrival) -> tuple[str, list[Arrival]]:
    start, came, is_logged = uuid.uuid4().hex, {0: own}, False
    store.set("start", start)
    for waited in _polling():
        for rank in range(1, size):
            if rank not in came and store.check([f"{start}/{rank}"]):
                arrival = _decoded(store.get(f"{start}/{rank}"), Arrival)
                came |= {} if arrival is None else {rank: arrival}
        missing = [rank for rank in range(size) if rank not in came]
        if not missing:
            break
        if waited > seconds:
            hosts = ", ".join(dict.fromkeys(each.host for each in came.values()))
            line = (
                f"WORLD_SIZE: {named_ranks(missing)} of {size} did not come within {span(seconds)}; the others are on "
                f"{hosts}. Fix: look at the output of the missing processes, and whether as many were started. "
                "hyperparameters.hang_minutes sets how long to wait"
            )
            store.set(f"{start}/failed", line)
            raise UserError(line)
        if waited > _SECONDS_UNTIL_LOGGED and not is_logged:
            is_logged = True
            logger.info("waiting for %s of %d", named_ranks(missing), size)
    of_ranks = [came[rank] for rank in range(size)]
    store.set(f"{start}/all", msgspec.json.encode(of_ranks).decode())
    return start, of_ranks


def _answer(store: Store, rank: int, seconds: float, own: Arrival) -> tuple[str, list[Arrival]]:
    start = None
    for waited in _polling():
        called = store.get("start").decode() if store.check(["start"]) else None
        if called != start:
            start = called
            store.set(f"{start}/{rank}", msgspec.json.encode(own).decode())
        if start and store.check([f"{start}/all"]):
            of_ranks = _decoded(store.get(f"{start}/all"), list[Arrival])
            if of_ranks and own in of_ranks[rank : rank + 1]:
                return start, of_ranks
        if start and store.check([f"{start}/failed"]):
            raise UserError(store.get(f"{start}/failed").decode())
        if waited > seconds + _SECONDS_FOR_CHIEF:
            host = os.environ["MASTER_ADDR"]
            raise UserError(
                f"WORLD_SIZE: rank 0 did not come to {host} within {span(seconds)}; rank {rank} waits on {own.host}. "
                f"Fix: look at the output of rank 0. hyperparameters.hang_minutes sets how long to wait"
            )


def _polling() -> Iterator[float]:
    """Seconds waited, at growing intervals."""
    began, interval = time.monotonic(), _POLLS[0]
    while True:
        yield time.monotonic() - began
        time.sleep(interval)
        interval = min(1.5 * interval, _POLLS[1])


def _decoded(message: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(message, type=kind)
    except msgspec.MsgspecError:  # from a stranger
        return None


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")  # two containers have it in common, and two hosts may share a name
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _address_of(host: str) -> str:
    """The IPv4 address of a host; empty without one."""
    with contextlib.suppress(OSError):
        return socket.gethostbyname(host)
    return ""


def own_address(other: str) -> str:
    """The address that this machine has toward another one; empty if it cannot reach it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # sends nothing
        return probe.getsockname()[0]
    return ""


# --- the processes ----------------------------------------------------------------------------------


def place_of(rank: int, arrivals: Sequence[Arrival]) -> Place:
    """A rank's place: as its launcher gives it, or from the machines of all ranks."""
    machines = [arrival.machine for arrival in arrivals]
    distinct = list(dict.fromkeys(machines))
    derived = {
        "LOCAL_RANK": machines[:rank].count(machines[rank]),
        "LOCAL_WORLD_SIZE": machines.count(machines[rank]),
        "GROUP_RANK": distinct.index(machines[rank]),
        "GROUP_WORLD_SIZE": len(distinct),
    }
    given = {name: int(os.environ[name]) for name in derived if name in os.environ}
    found = given if given.keys() == derived.keys() else derived
    # many hosts' own name leads to a loopback address there, but not on the other machines
    chief, *_ = [*(each.chief for each in arrivals if not each.chief.startswith("127.")), ""]
    names = {each.address: each.host for each in arrivals} | {chief: arrivals[0].host}
    return Place(rank, len(arrivals), *found.values(), [each.host for each in arrivals], names, chief)


@contextlib.contextmanager
def local_processes(
    hang_minutes: float | None = None, gpus_given: int = 0
) -> Iterator[tuple[DistributedContext, torch.device]]:
    """The processes that a launcher started, or this one alone; and this one's device.

    Args:
        hang_minutes: a run's; None without a watch over hangs.
        gpus_given: GPUs that a cluster reserved for the processes of this machine.

    Raises:
        UserError: not all processes came, or they have too few GPUs.
    """
    if "RANK" not in os.environ:
        device = choose_device(0, 1, gpus_given)
        yield DistributedContext(rank=0, size=1, local_rank=0, local_size=1, cross_rank=0, cross_size=1), device
        return
    seconds = 60 * (_MINUTES_A_COLLECTIVE_MAY_WAIT if hang_minutes is None else min(hang_minutes, _MOST_MINUTES))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = open_store(rank, seconds, rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
    start, arrivals = roll_call(store, rank, size, seconds)
    place = place_of(rank, arrivals)
    device, beside = _join_group(place, gpus_given, hang_minutes, PrefixStore(start, store))
    from_chief = functools.partial(_address_from_chief, host_of_chief(place.machines), device)
    distributed = ProcessContext(place, from_chief, beside)
    with _closing(distributed), lost_connection_as_error(rank, place.names):
        yield distributed, device


def _join_group(
    place: Place, gpus_given: int, hang_minutes: float | None, store: Store
) -> tuple[torch.device, torch.distributed.ProcessGroup | None]:
    """This rank's device, and the group for `ProcessContext.begin_max`."""
    device = choose_device(place.local_rank, place.local_size, gpus_given)
    os.environ["USE_TORCH_DISTRIBUTED"] = "True"  # what determined.launch.torch_distributed sets
    if place.machines == 1:
        # Gloo and NCCL would listen where the rest of the network reaches them
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, interface_towards(LOOPBACK) or "lo")
    elif place.chief and (interface := interface_towards(place.chief)):
        # Gloo would listen where this host's own name leads
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = None  # torch's own
    if hang_minutes is not None:
        # long enough for the watch to come first: it names the rank that is stuck
        minutes = min(max(2 * LONGER * hang_minutes, _MINUTES_A_COLLECTIVE_MAY_WAIT), _MOST_MINUTES)
        timeout = timedelta(minutes=minutes)
        store.set_timeout(timeout)
    torch.distributed.init_process_group(backend, timeout=timeout, store=store, rank=place.rank, world_size=place.size)
    # NCCL would make the host wait for the device
    return device, None if backend == "gloo" else torch.distributed.new_group(backend="gloo", timeout=timeout)


def interface_towards(address: str) -> str | None:
    """The network interface over which this machine reaches an IPv4 address; None if that is unknown."""
    own = own_address(address)
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if own in {each.address for each in addresses}), None)


def choose_device(local_rank: int, local_size: int, gpus_given: int = 0) -> torch.device:
    """The device of this process: a GPU of its own if torch can use one, else the CPU. Logs which.

    Args:
        local_rank, local_size: which process of this machine it is, and of how many.
        gpus_given: GPUs that a cluster reserved for the processes of this machine.

    Raises:
        UserError: there are fewer GPUs than processes, or torch cannot use the reserved ones.
    """
    if not torch.cuda.is_available():
        reason = _why_no_gpu()
        if gpus_given:
            raise UserError(
                f"the cluster gave this task {gpus_given} GPUs, and torch cannot use them: {reason}. Fix: use an image "
                "whose CUDA fits the driver"
            )
        if local_rank == 0:
            logger.info("device: the CPU (%s)", reason)
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_size > count:
        raise UserError(
            f"{local_size} processes start on a machine where torch sees {count} GPUs. Fix: start one per GPU "
            f"(--nproc-per-node {count}), or use no GPU: CUDA_VISIBLE_DEVICES="
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)  # before the first collective, which would put every process on the first GPU
    if local_rank == 0:
        logger.info("device: %d of %d GPUs, %s", local_size, count, torch.cuda.get_device_name(device))
    return device


def _why_no_gpu() -> str:
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides the GPUs"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split("\n")[0].split(". ")[0]
    return "torch finds no GPU"


def _address_from_chief(host: str, device: torch.device, address: Address | None) -> Address:
    """The chief's address, on all processes. Each knows the host itself: torchrun's port is open to strangers, and one
    of them might pose as the chief. The message is plain bytes for the same reason: they cannot hold code."""
    sent = bytes(_BYTES_OF_ADDRESS) if address is None else address.port.to_bytes(2, "big") + address.key
    tensor = torch.frombuffer(bytearray(sent), dtype=torch.uint8).to(device)
    torch.distributed.broadcast(tensor, src=0)
    received = bytes(tensor.tolist())
    return Address(host, int.from_bytes(received[:2], "big"), received[2:])


@contextlib.contextmanager
def lost_connection_as_error(rank: int, names: Mapping[str, str]) -> Iterator[None]:
    """Raises UserError if torch's exchange fails because another process is gone. On a cluster the error stays what it
    is: the master starts the trial again.

    Args:
        names: the machines' names, by address.
    """
    try:
        yield
    except RuntimeError as error:
        if on_cluster() or not _LOST.search(str(error)):
            raise
        found = re.search(r"\[([\d.]+)\]:\d+", str(error))
        other = "another process" if found is None or found[1].startswith("127.") else f"a process on {found[1]}"
        if found is not None and found[1] in names:
            other = f"a process on {names[found[1]]}"
        raise UserError(
            f"rank {rank}: the connection to {other} is lost, because it ended or its machine did. Fix: look at its "
            "own output, then start the command again; a run continues with --resume auto"
        ) from error


@contextlib.contextmanager
def _closing(distributed: DistributedContext) -> Iterator[None]:
    try:
        yield
    except (UserError, DivergedError):
        if distributed.rank > 0:
            # the chief mostly has the same error, and may still be in a collective with this process: without it, a
            # lost connection would replace the message
            time.sleep(_SECONDS_FOR_CHIEF)
        raise
    finally:
        distributed.close()
        torch.distributed.destroy_process_group()
