"""The processes of a run as threads of this one, and strangers that know where they listen."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import Any
from unittest import mock

import psutil
import torch
import zmq

from shared.training.meeting import interface_towards
from shared.training.processes import LOOPBACK, Place, ProcessContext

SECONDS = 30  # after which a thread that waits is an error


def on_all(function: Callable[..., Any], *arguments: list) -> list:
    """The results of calls that wait for each other: one for each item of the lists."""
    results: list[Future] = []
    for each in zip(*arguments, strict=True):
        results.append(future := Future())
        # a daemon: one that waits for ever does not keep pytest
        threading.Thread(target=_call, args=(future, function, each), daemon=True).start()
    return [future.result(SECONDS) for future in results]


def _call(future: Future, function: Callable[..., Any], arguments: tuple) -> None:
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)


@contextlib.contextmanager
def processes(size: int, machines: int = 1, gloo: bool = False) -> Iterator[list[ProcessContext]]:
    """The contexts of `size` processes, by rank. With several machines, the chief listens on all interfaces.

    Args:
        gloo: `begin_max` works too.
    """
    address: Future = Future()
    store, timeout = torch.distributed.HashStore(), timedelta(seconds=SECONDS)

    def from_chief(own: Any) -> Any:
        if own is not None:
            address.set_result(own)
        return address.result(SECONDS)

    def join(rank: int) -> ProcessContext:
        machine, local_rank = divmod(rank, size // machines)
        place = Place(rank, size, local_rank, size // machines, machine, machines, hosts=(), names={}, chief="")
        beside = torch.distributed.ProcessGroupGloo(store, rank, size, timeout) if gloo else None
        return ProcessContext(place, from_chief, beside)

    variables = {"MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": interface_towards(LOOPBACK)}
    with mock.patch.dict(os.environ, variables), contextlib.ExitStack() as stack:
        contexts = on_all(join, list(range(size)))
        for context in contexts:
            stack.callback(context.close)
        yield contexts


def listening() -> dict[int, str]:
    """The addresses at which this process's sockets listen, by port."""
    return {
        each.laddr.port: each.laddr.ip
        for each in psutil.Process().net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }


@contextlib.contextmanager
def strangers(ports: Iterable[int]) -> Iterator[list[zmq.Socket]]:
    """Sockets that are connected to these ports as someone can who does not know the key."""
    context = zmq.Context()
    context.linger = 0
    sockets = []
    for port, has_a_key in itertools.product(ports, (False, True)):
        sockets.append(socket := context.socket(zmq.DEALER))
        socket.routing_id = b"1"  # as the process of rank 1 has it
        if has_a_key:
            socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
            socket.curve_serverkey = zmq.curve_keypair()[0]
        socket.connect(f"tcp://127.0.0.1:{port}")
    yield sockets
    context.destroy()
