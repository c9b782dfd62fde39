"""Determined's DistributedContext over sockets that only the processes of the run can use.

Determined's own listens on all interfaces and unpickles what anyone sends there.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable
from typing import Any

import zmq
from determined.core import DistributedContext

from shared.training.sockets import LOOPBACK, Address, connect, listen

_MILLISECONDS_TO_SEND_THE_REST = 5000


class ProcessContext(DistributedContext):
    """The processes of a run, and what they exchange. All of them create it together.

    Args:
        rank, size: which process this is, and of how many.
        local_rank, local_size: the same among the processes of this machine.
        cross_rank, cross_size: which machine this is, and of how many.
        chief_host: at which the others find the chief.
        from_chief: given the chief's address on the chief and None elsewhere, returns it on all processes.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        local_rank: int,
        local_size: int,
        cross_rank: int,
        cross_size: int,
        chief_host: str,
        from_chief: Callable[[Address | None], Address],
    ):
        # of a single process, Determined's own opens no port
        super().__init__(rank=0, size=1, local_rank=0, local_size=1, cross_rank=0, cross_size=1)
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self.cross_rank, self.cross_size = cross_rank, cross_size
        self._of_all = self._of_machine = _Star(rank, size)
        self._of_all.meet(from_chief(self._of_all.listen(chief_host) if rank == 0 else None))
        if cross_size > 1:
            self._of_machine = _Star(local_rank, local_size)
            own = self._of_machine.listen(LOOPBACK) if local_rank == 0 else None
            hubs = {machine: address for machine, address in self.allgather((cross_rank, own)) if address}
            self._of_machine.meet(hubs[cross_rank])

    def close(self) -> None:
        self._of_all.close()
        self._of_machine.close()

    def gather(self, stuff: Any) -> list | None:
        return self._of_all.gather(stuff)

    def allgather(self, stuff: Any) -> list:
        return self._of_all.allgather(stuff)

    def broadcast(self, stuff: Any) -> Any:
        return self._of_all.broadcast(stuff)

    def gather_local(self, stuff: Any) -> list | None:
        return self._of_machine.gather(stuff)

    def allgather_local(self, stuff: Any) -> list:
        return self._of_machine.allgather(stuff)

    def broadcast_local(self, stuff: Any = None) -> Any:
        return self._of_machine.broadcast(stuff)


class _Star:
    """Processes of which the one with number 0, the hub, is connected to each of the others."""

    def __init__(self, number: int, size: int):
        self.number, self.size = number, size
        self._context = zmq.Context()
        self._context.linger = _MILLISECONDS_TO_SEND_THE_REST
        self._socket = self._context.socket(zmq.DEALER if number else zmq.ROUTER)
        self._socket.sndhwm = self._socket.rcvhwm = 0  # no message is ever dropped
        if number:
            self._socket.routing_id = _name(number)
        else:
            self._socket.router_handover = True  # to one that connects again
        self._waiting: dict[bytes, collections.deque[bytes]] = collections.defaultdict(collections.deque)

    def listen(self, host: str) -> Address:
        return listen(self._socket, host)

    def meet(self, hub: Address) -> None:
        if self.number:
            connect(self._socket, hub)
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

    def close(self) -> None:
        self._context.destroy()

    def _collect(self, stuff: Any) -> list | None:
        if self.number:
            self._socket.send_multipart([pickle.dumps(stuff)], copy=False)
            return None
        return [stuff, *(self._received_from(number) for number in range(1, self.size))]

    def _received_from(self, number: int) -> Any:
        waiting = self._waiting[_name(number)]
        while not waiting:
            sender, message = self._socket.recv_multipart()
            self._waiting[sender].append(message)
        return pickle.loads(waiting.popleft())


def _name(number: int) -> bytes:
    return str(number).encode()
