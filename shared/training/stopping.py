"""SIGTERM and Ctrl-C end a run off the cluster with a checkpoint, after the same batch on every process."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch

_KEY = "stop_after"


class StopRequest:
    """Asked for by a signal to any of the processes; a second Ctrl-C ends the process at once.

    Args:
        aggregation_frequency: batches between two optimizer steps, at which the processes wait for each other.

    Attributes:
        signal: the one that this process was sent; None without.
        after: the batch after which all processes stop, as far as this one knows.
    """

    def __init__(self, aggregation_frequency: int = 1):
        self.aggregation_frequency = aggregation_frequency
        self.signal: signal.Signals | None = None
        self.after: int | None = None
        self._store = None
        if "RANK" in os.environ:
            self._store = torch.distributed.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
            )

    def __enter__(self) -> StopRequest:
        self._process = os.getpid()
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # forked from it, by a library's pool for one, which ends its own so
            signal.signal(number, self._previous[number])
            os.kill(os.getpid(), number)
            return
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def reached(self, batch: int) -> bool:
        """Whether to stop after `batch`, counted from 1, which this process has just trained."""
        if self._store is None:
            if self.signal is not None:
                self.after = batch
        elif self.signal is not None:
            # no process is beyond the next step that all take together, and each looks here after it
            next_step = (batch // self.aggregation_frequency + 1) * self.aggregation_frequency
            self._agree_on(next_step)
        else:
            self.look()
        return self.after is not None and batch >= self.after

    def in_validation(self, batch: int) -> bool:
        """Whether to cut the validation after `batch` short, because this process was sent a signal."""
        if self.signal is not None:
            self._agree_on(batch)
        return self.signal is not None

    def look(self) -> None:
        """Learns whether another process has set the batch to stop after."""
        if self.after is None and self._store is not None and self._store.check([_KEY]):
            self.after = int(self._store.get(_KEY))

    def _agree_on(self, batch: int) -> None:
        if self.after is None:
            self.after = batch if self._store is None else int(self._store.compare_set(_KEY, "", str(batch)))


def outlive_signals(worker_id: int) -> None:
    """A loader worker goes on when its whole group is sent a signal, as torchrun and Ctrl-C do: the process that it
    loads for ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which alone tells who sent it; on macOS the worker ends
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


def _end_when_the_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
