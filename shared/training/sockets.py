"""ZeroMQ sockets that only the processes of one run can use.

A socket that listens has a key, made anew for each run. ZeroMQ refuses a connection that does not know the key, before
it delivers any message (CURVE, which also encrypts). On one machine the socket listens on the loopback interface only.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import zmq

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


def host_of_chief(machines: int) -> str:
    """The host at which the other processes of a run find the chief."""
    return LOOPBACK if machines == 1 else os.environ.get("MASTER_ADDR", LOOPBACK)


def listen(socket: zmq.Socket, host: str) -> Address:
    """Makes a socket listen at a free port.

    Args:
        host: at which the others find this machine. If it is not `LOOPBACK`, the socket listens on all interfaces:
            many machines' own names resolve to an address that no other machine reaches.
    """
    key, socket.curve_secretkey = zmq.curve_keypair()
    socket.curve_server = True
    _keep_alive(socket)
    port = socket.bind_to_random_port(f"tcp://{LOOPBACK if host == LOOPBACK else '*'}")
    return Address(host, port, key)


def connect(socket: zmq.Socket, address: Address) -> None:
    """Connects a socket to one that listens. A wrong key is no error: the messages are never delivered."""
    socket.curve_serverkey = address.key
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    _keep_alive(socket)
    socket.connect(f"tcp://{address.host}:{address.port}")


def _keep_alive(socket: zmq.Socket) -> None:
    # by the kernel, which answers also for a process that is stopped
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = socket.tcp_keepalive_intvl = _SECONDS_BETWEEN_PROBES
