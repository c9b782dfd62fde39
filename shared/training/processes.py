"""The processes of a run: how they talk, and what one of them does for the others.

They exchange data over ZeroMQ sockets that no other process can use. A socket that listens has a key, made anew for
each run. ZeroMQ refuses a connection that does not know the key, before it delivers any message (CURVE, which also
encrypts). On one machine the socket listens on the loopback interface only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import zmq
from determined import core, pytorch
from determined.core import DistributedContext

from shared.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

LONGER = 6  # how many times hang_minutes a phase may last that is no training or validation batch
LOOPBACK = "127.0.0.1"
_SECONDS_BETWEEN_PROBES = 60  # of an idle connection, which routers between machines forget


class Address(NamedTuple):
    """Where a socket listens.

    Attributes:
        key: 40 bytes. ZeroMQ calls it a public key, but it never goes over the connection: only who knows it connects.
    """

    host: str
    port: int
    key: bytes


class Place(NamedTuple):
    """Where a process is among those of its run.

    Attributes:
        rank, size: which process it is, and of how many; local_rank and local_size count those of its machine.
        machine, machines: which machine it is on, and of how many.
        hosts: the names of the machines, by rank.
        names: the names of the machines, by address.
        chief: the address of the chief's machine in the network; empty if no rank knows it.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    machine: int
    machines: int
    hosts: Sequence[str]
    names: Mapping[str, str]
    chief: str


def host_of_chief(machines: int) -> str:
    """The host at which the other processes of a run find the chief."""
    return LOOPBACK if machines == 1 else os.environ.get("MASTER_ADDR", LOOPBACK)


class ProcessContext(DistributedContext):
    """The processes of a run, and what they exchange. All of them create it together.

    Args:
        from_chief: given the chief's address on the chief and None elsewhere, returns it on all processes.
        beside: a group of Gloo for `begin_max`; None if the default group is one.

    Attributes:
        hosts: the names of the machines, by rank; empty on one machine.
    """

    def __init__(
        self,
        place: Place,
        from_chief: Callable[[Address | None], Address],
        beside: torch.distributed.ProcessGroup | None = None,
    ):
        # of a single process, Determined's own opens no port
        super().__init__(rank=0, size=1, local_rank=0, local_size=1, cross_rank=0, cross_size=1)
        self.rank, self.size = place.rank, place.size
        self.local_rank, self.local_size = place.local_rank, place.local_size
        self.cross_rank, self.cross_size = place.machine, place.machines
        self.hosts = place.hosts if self.cross_size > 1 else ()
        self._beside = beside
        host = host_of_chief(self.cross_size)
        self._of_all = self._of_machine = self._of_firsts = Star(self.rank, self.size)
        self._of_all.meet(from_chief(self._of_all.listen(host) if self.rank == 0 else None))
        if self.cross_size > 1:
            self._of_machine = Star(self.local_rank, self.local_size)
            self._of_firsts = Star(self.cross_rank, self.cross_size)
            own = self._of_machine.listen(LOOPBACK) if self.local_rank == 0 else None
            hub = self._of_firsts.listen(host) if self.rank == 0 else None
            of_ranks = self.allgather((self.cross_rank, own, hub))
            self._of_machine.meet({machine: address for machine, address, _ in of_ranks if address}[self.cross_rank])
            if self.local_rank == 0:
                self._of_firsts.meet(of_ranks[0][2])

    def close(self) -> None:
        for star in {self._of_all, self._of_machine, self._of_firsts}:
            star.close()

    def gather(self, stuff: Any) -> list | None:
        return self._of_all.gather(stuff)

    def allgather(self, stuff: Any) -> list:
        return self._of_all.allgather(stuff)

    def broadcast(self, stuff: Any) -> Any:
        return self._of_all.broadcast(stuff)

    def begin_max(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """Begins to find the greatest number of all ranks at each position, without waiting for any rank. Returns the
        function that waits for the result. Every rank calls this equally often."""
        tensor = torch.tensor(numbers)
        work = torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, self._beside, async_op=True)

        def result() -> list[int]:
            work.wait()
            return tensor.tolist()

        return result

    def gather_local(self, stuff: Any) -> list | None:
        return self._of_machine.gather(stuff)

    def allgather_local(self, stuff: Any) -> list:
        return self._of_machine.allgather(stuff)

    def broadcast_local(self, stuff: Any = None) -> Any:
        return self._of_machine.broadcast(stuff)

    def relay(self, stuff: Any, machine: int) -> Any:
        """The stuff of one machine, on the first rank of each. It waits until all have taken the last one."""
        return self._of_firsts.relay(stuff, machine)


class Star:
    """Processes that are all connected to the one with number 0, the hub.

    Args:
        linger: milliseconds that `close` takes at most to send the rest.
    """

    def __init__(self, number: int, size: int, linger: int = 5000):
        self.number, self.size = number, size
        self._context = zmq.Context()
        self._context.linger = linger
        self._socket = self._context.socket(zmq.DEALER if number else zmq.ROUTER)
        self._socket.sndhwm = self._socket.rcvhwm = 0  # no message is ever dropped
        # by the kernel, which answers also for a process that is stopped
        self._socket.tcp_keepalive = 1
        self._socket.tcp_keepalive_idle = self._socket.tcp_keepalive_intvl = _SECONDS_BETWEEN_PROBES
        if number:
            self._socket.routing_id = _name(number)
        else:
            self._socket.router_handover = True  # to one that connects again

    def listen(self, host: str) -> Address:
        """Makes the hub listen at a free port.

        Args:
            host: at which the others find this machine. If it is not `LOOPBACK`, the hub listens on all interfaces:
                many machines' own names resolve to an address that no other machine reaches.
        """
        key, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.curve_server = True
        port = self._socket.bind_to_random_port(f"tcp://{LOOPBACK if host == LOOPBACK else '*'}")
        return Address(host, port, key)

    def meet(self, hub: Address) -> None:
        """Connects to the hub. A wrong key is no error: the messages are never delivered."""
        if self.number:
            self._socket.curve_serverkey = hub.key
            self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
            self._socket.connect(f"tcp://{hub.host}:{hub.port}")
        self.gather(None)  # the hub knows a process only once it has heard from it

    def gather(self, stuff: Any) -> list | None:
        """All processes' stuff in their order, on the hub; None on the others. Returns once the hub has all of it."""
        gathered = self._collect(stuff)
        self.broadcast(None)
        return gathered

    def allgather(self, stuff: Any) -> list:
        return self.broadcast(self._collect(stuff))

    def broadcast(self, stuff: Any) -> Any:
        """The hub's stuff, on all processes."""
        if self.number:
            (message,) = self._socket.recv_multipart()
            return pickle.loads(message)
        if self.size > 1:
            message = pickle.dumps(stuff)
            for number in range(1, self.size):
                self._socket.send_multipart([_name(number), message], copy=False)
        return stuff

    def relay(self, stuff: Any, number: int) -> Any:
        """The stuff of one process, on all of them."""
        collected = self._collect(stuff if self.number == number else None)
        return self.broadcast(None if collected is None else collected[number])

    def post(self, stuff: Any, number: int = 0) -> None:
        """Sends something to one process, without waiting. For a star that gathers and broadcasts nothing."""
        address = [] if self.number else [_name(number)]
        with contextlib.suppress(zmq.ZMQError):  # the other side accepts no more
            self._socket.send_multipart([*address, pickle.dumps(stuff)], zmq.NOBLOCK)

    def arrived(self) -> Iterator[Any]:
        """What was posted to this process."""
        with contextlib.suppress(zmq.Again):
            while True:
                yield pickle.loads(self._socket.recv_multipart(zmq.NOBLOCK)[-1])

    def close(self) -> None:
        self._context.destroy()

    def _collect(self, stuff: Any) -> list | None:
        if self.number:
            self._socket.send_multipart([pickle.dumps(stuff)], copy=False)
            return None
        collected = {0: stuff}
        while len(collected) < self.size:  # a process sends its next message only after the hub's answer
            sender, message = self._socket.recv_multipart()
            collected[int(sender)] = pickle.loads(message)
        return [collected[number] for number in range(self.size)]


def _name(number: int) -> bytes:
    return str(number).encode()


def on_every_rank(distributed: DistributedContext, function: Callable[[], T]) -> T:
    """`function` on each rank. If it raises UserError on one of them, every rank raises that error."""
    result = error = None
    try:
        result = function()
    except UserError as own:
        error = str(own)
    if errors := [each for each in distributed.allgather(error) if each is not None]:
        raise UserError(errors[0])
    return result


def on_chief(distributed: DistributedContext, function: Callable[[], T]) -> T:
    """The chief's result of `function`, on every rank, or its UserError. The others wait until it is done."""
    is_chief = distributed.rank == 0
    return distributed.broadcast(on_every_rank(distributed, lambda: function() if is_chief else None))


def first_on_each_machine(distributed: DistributedContext, function: Callable[[], T]) -> T:
    """`function` on one rank of each machine, and then on the others. They find what the first one left: a parsed
    annotation file, a checked folder, a download. Every rank raises the UserError of a first one."""
    is_first = distributed.local_rank == 0
    result = on_every_rank(distributed, lambda: function() if is_first else None)
    return result if is_first else function()


@torch.no_grad()
def broadcast_from_chief(tensors: Iterable[torch.Tensor]) -> None:
    """Writes the chief's values into each rank's tensors, in one broadcast per data type instead of one per tensor: a
    model has hundreds of small buffers. Every rank calls this with tensors of the same shapes."""
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for together in by_type.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in together])
        torch.distributed.broadcast(flat, src=0)
        for tensor, values in zip(together, flat.split([tensor.numel() for tensor in together]), strict=True):
            tensor.copy_(values.view(tensor.shape))


# --- the context of a trial -------------------------------------------------------------------------


def core_context(distributed: DistributedContext) -> core.Context:
    """The core context of these processes; off a cluster it reports to nobody."""
    return core.init(
        distributed=distributed,
        preempt_mode=core.PreemptMode.WorkersAskChief,
        tensorboard_mode=core.TensorboardMode.MANUAL,
    )


@contextlib.contextmanager
def trial_context(
    config: dict[str, Any], distributed: DistributedContext, device: torch.device, first_batch: int = 0
) -> Iterator[pytorch.PyTorchTrialContext]:
    """The context of a trial with a core context of its own, see `make_context`."""
    with core_context(distributed) as opened:
        yield make_context(opened, config, device, first_batch)


def make_context(
    opened: core.Context,
    config: dict[str, Any],
    device: torch.device,
    first_batch: int = 0,
    trial_seed: int | None = None,
) -> pytorch.PyTorchTrialContext:
    """What `pytorch.init` makes, with two differences. The device is the one that torch can use instead of the one that
    nvidia-smi lists. A resumed run counts its earlier batches, `first_batch`, off the cluster too."""
    return pytorch.PyTorchTrialContext(
        core_context=opened,
        trial_seed=trial_seed,
        hparams=config["hyperparameters"],
        slots_per_trial=opened.distributed.size,
        num_gpus=opened.distributed.local_size if device.type == "cuda" else 0,
        exp_conf=config,
        aggregation_frequency=1,  # the trial makes its own optimizer steps
        steps_completed=first_batch,
        managed_training=True,
        debug_enabled=False,
        enable_tensorboard_logging=False,
    )
