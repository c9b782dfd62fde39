"""What each process says of itself, known to all; and none of them ever waits for another.

By ZeroMQ, which Determined brings for its own exchange: torch's `TCPStore` waits for ever for a chief that is stopped,
whatever its timeout says. `shared.training.sockets` keeps everyone else out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec
import zmq
from determined.core import DistributedContext

from shared.training.hang import Standing
from shared.training.sockets import connect, host_of_chief, listen

_MILLISECONDS_FOR_THE_LAST = 200  # to send what is not sent yet, where somebody is there to take it


class Exchange:
    """Goes by way of the chief: each process sends it its own standing, and is sent all that the chief knows.

    Made by all processes together, and then of one thread alone, which need not be the one that made it.
    """

    def __init__(self, distributed: DistributedContext):
        self.rank = distributed.rank
        self._context = zmq.Context()
        self._context.linger = _MILLISECONDS_FOR_THE_LAST
        self._socket = self._context.socket(zmq.DEALER if self.rank else zmq.ROUTER)
        host = host_of_chief(distributed.get_num_agents())
        chief = distributed.broadcast(None if self.rank else listen(self._socket, host))
        if self.rank:
            connect(self._socket, chief)
        self._heard: dict[int, Standing] = {}  # by the chief
        self._others: dict[int, bytes] = {}  # how the chief sends to them

    def swap(self, own: Standing) -> list[Standing]:
        """Says how this process stands; what it has heard of all since the last time, its own too. Never waits."""
        if self.rank:
            self._send(msgspec.json.encode([own]))
            return [standing for (message,) in self._received(1) for standing in _decoded(message)]
        for sender, message in self._received(2):
            for standing in _decoded(message):
                self._heard[standing.rank], self._others[standing.rank] = standing, sender
        self._heard[0] = own
        table = msgspec.json.encode(list(self._heard.values()))
        for sender in self._others.values():
            self._send(sender, table)
        return list(self._heard.values())

    def close(self) -> None:
        self._context.destroy()

    def _send(self, *parts: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):  # the other one does not take any more
            self._socket.send_multipart(parts, zmq.NOBLOCK)

    def _received(self, parts: int) -> Iterator[list[bytes]]:
        while True:
            try:
                message = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            if len(message) == parts:
                yield message


def _decoded(message: bytes) -> list[Standing]:
    try:
        return msgspec.json.decode(message, type=list[Standing])
    except msgspec.MsgspecError:  # from somebody else
        return []
