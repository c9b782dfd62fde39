"""The signals that stop a training after its batch. Forked processes and loader workers get them too."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from shared.launchers import STOP_SIGNALS
from shared.training.hang import show_stacks_when_asked

_PR_SET_PDEATHSIG = 1  # of Linux' prctl


class StoppedBeforeTraining(SystemExit):
    """A signal arrived before there was anything to save.

    Attributes:
        signal: which one.
    """

    def __init__(self, number: signal.Signals, status: int):
        super().__init__(status)
        self.signal = number


class StopSignals:
    """Notes the signals that stop a training, for the time of a block. A second Ctrl-C stops the process at once.

    Args:
        numbers: the signals besides Ctrl-C.
        status: the exit status after one of them; None for 128 and its number, as after Ctrl-C.

    Attributes:
        received: the last one that arrived during the training.
    """

    def __init__(self, numbers: Sequence[signal.Signals] = STOP_SIGNALS, status: int | None = None):
        self.numbers, self.status = tuple(numbers), status
        self.received: signal.Signals | None = None
        self._training = False

    @property
    def handled(self) -> set[signal.Signals]:
        return {signal.SIGINT, *self.numbers}

    def begin(self) -> None:
        """From here on a signal stops the training after a batch. Before, it stops the process at once."""
        self._training = True

    def end(self) -> None:
        self._training = False

    def exit_status(self, number: signal.Signals | None) -> int:
        """The status of a process that a signal stopped."""
        if number is None:
            return 0
        return 128 + number if self.status is None or number == signal.SIGINT else self.status

    def __enter__(self) -> StopSignals:
        # one that is ignored stays so: after `nohup`, a terminal that closes stops nothing
        taken = [each for each in self.handled if each == signal.SIGINT or signal.getsignal(each) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in taken}
        _handling.append(self)
        _of_workers.update(self.handled)
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            # a torchrun that is killed, also by a signal that it does not know, would leave this process behind
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        return self

    def __exit__(self, *_: Any) -> None:
        _handling.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        number = signal.Signals(number)
        if number == signal.SIGINT and (self.received is not None or not self._training):
            raise KeyboardInterrupt
        if not self._training:
            raise StoppedBeforeTraining(number, self.exit_status(number))
        self.received = number


_handling: list[StopSignals] = []
_of_workers = {signal.SIGINT, *STOP_SIGNALS}  # what loader workers outlive
_before_fork = threading.local()


def _block_signals() -> None:
    # a library's pool stops its processes by SIGTERM, and Python forgets a signal that arrives during a fork
    handled = set().union(*(each.handled for each in _handling))
    _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, handled)


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before_fork.mask)


def _leave_signals_to_forks() -> None:
    for each in list(_handling):
        each.__exit__()
    _unblock_signals()


os.register_at_fork(before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_leave_signals_to_forks)


def begin_worker(worker_id: int) -> None:
    """Keeps a loader worker alive when its whole group receives a signal, as by torchrun, SLURM and Ctrl-C. The process
    that it loads for stops it, and asks for its stacks when that process hangs."""
    show_stacks_when_asked()
    for number in _of_workers - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # tells who sent the signal; on macOS the worker stops
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_stop_at_the_parent_s_signal, daemon=True).start()


def _stop_at_the_parent_s_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
