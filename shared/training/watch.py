"""Ends a training that hangs, and says where: a thread beside it, in each process."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import determined
import torch
import zmq
from determined.core import DistributedContext

from shared.errors import tell_torchrun
from shared.training.exchange import Exchange
from shared.training.hang import Mark, Phase, Standing, Standings
from shared.training.task import on_cluster

_LONGEST_TICK = 5.0  # seconds
_TICKS = 10  # in the shortest limit
_SECONDS_TO_WRITE = 5.0  # a pipe may be full, and that the hang
# where Python is while a process waits for others: in a `ProcessContext`, in torch's exchange, in DDP and its backward
# pass
_WAITING = tuple(
    str(Path(module.__file__).parent) + os.sep
    for module in (determined, zmq, torch.distributed, torch.nn.parallel, torch.autograd)
)
_OF_WORKERS = signal.SIGUSR1


class Watch:
    """Notes how far this process is, and finds out when none comes further.

    Args:
        hang_minutes: of the config's hyperparameters; None to find out nothing.
    """

    def __init__(self, distributed: DistributedContext, hang_minutes: float | None):
        self.distributed = distributed
        self.limit = None if hang_minutes is None else 60 * hang_minutes
        self._mark = Mark(Phase.BEGINNING, 0)
        self._over = threading.Event()
        self._first_batch = 0
        self._watched = 0

    def mark(self, phase: Phase, batch: int) -> None:
        """This process has come to here: costs about a microsecond.

        Args:
            batch: that it trains, from 1; outside of the training, the batches trained.
        """
        self._mark = self._mark.followed_by(phase, batch)

    @contextlib.contextmanager
    def watching(self, batches: int) -> Iterator[None]:
        """Watches the thread that calls this, on every process: once the loaders' workers are there.

        Args:
            batches: trained before this start.
        """
        if self.limit is None:
            yield
            return
        self.mark(Phase.BEGINNING, batches)
        self._first_batch, self._watched = batches + 1, threading.get_ident()
        self._over.clear()
        exchange = Exchange(self.distributed) if self.distributed.size > 1 else None
        thread = threading.Thread(target=_Watcher(self, exchange).run, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def standing(self, tick: int, quiet: float, mark: Mark) -> Standing:
        """What this process says of itself."""
        frame = sys._current_frames().get(self._watched)
        return Standing(
            rank=self.distributed.rank,
            mark=mark,
            quiet=quiet,
            patience=mark.patience(self.limit, self._first_batch),
            tick=tick,
            waits=frame is not None and frame.f_code.co_filename.startswith(_WAITING),
            where="" if frame is None else _place(frame),
        )


class _Watcher:
    """The thread's own part of a `Watch`."""

    def __init__(self, watch: Watch, exchange: Exchange | None):
        self.watch = watch
        self.exchange = exchange
        self.interval = min(watch.limit / _TICKS, _LONGEST_TICK)
        self.standings = Standings(self.interval)
        self.rank = watch.distributed.rank
        self.ticks = 0
        self.marked_at = 0
        self.seen: Mark | None = None
        self.told = self.left = False

    def run(self) -> None:
        watch = self.watch
        self._expect_others()
        try:
            while not watch._over.wait(self.interval):
                self._tick()
                if self.standings.hang() or self.standings.someone_has_told():
                    self._end_the_process()
            self.left = True
            self._tick()
        finally:
            if self.exchange is not None:
                self.exchange.close()

    def _expect_others(self) -> None:
        # who was never heard of begins
        begun = Mark(Phase.BEGINNING, self.watch._first_batch - 1)
        for rank in range(self.watch.distributed.size):
            self.standings.hear(Standing(rank, begun, 0.0, begun.patience(self.watch.limit, 0), tick=-1))

    def _tick(self) -> None:
        self.ticks += 1
        mark = self.watch._mark
        if mark is not self.seen:
            self.seen, self.marked_at = mark, self.ticks
        own = self.watch.standing(self.ticks, self.interval * (self.ticks - self.marked_at), mark)
        own = dataclasses.replace(own, told=self.told, left=self.left)
        self.standings.tick()
        for standing in self.exchange.swap(own) if self.exchange is not None else [own]:
            if standing.rank != self.rank:
                self.standings.hear(standing)
        self.standings.hear(own)

    def _end_the_process(self) -> None:
        standings = self.standings
        message, own = standings.message(), standings.of[self.rank]
        answering = [each.rank for each in standings.present if standings.answers(each)]
        stacks = _stacks(self.rank, own, self.watch._watched)
        _within(_SECONDS_TO_WRITE, lambda: _write(stacks))
        _within(_SECONDS_TO_WRITE, lambda: _show_workers(self.rank))
        self.told = True
        until = time.monotonic() + _SECONDS_TO_WRITE + 2 * self.interval
        while True:  # until all others that answer have written theirs
            self._tick()
            if all(standings.of[rank].told for rank in answering) or time.monotonic() > until:
                break
            time.sleep(self.interval / _TICKS)
        line = (
            f"error: {message}. hyperparameters.hang_minutes is how long to wait; the stacks {_whose(standings)} above"
        )
        line += "" if on_cluster() else "; go on with --resume last"
        # the others wait for its line: the first one that ends has torchrun end them all
        if self.rank == min(answering):
            _within(_SECONDS_TO_WRITE, lambda: _write(f"{line}\n"))
        else:
            time.sleep(1)
        _within(_SECONDS_TO_WRITE, lambda: (tell_torchrun(line), sys.stdout.flush()))
        for worker in multiprocessing.active_children():
            worker.kill()  # one that hangs would outlive its parent
        os._exit(1)  # the thread that hangs may be anywhere, and cannot be interrupted


def show_stacks_when_asked() -> None:
    """Lets a loader worker write its stacks when the process that it loads for hangs."""
    faulthandler.register(_OF_WORKERS, file=2, all_threads=True)  # in a notebook sys.stderr is no file


def _show_workers(rank: int) -> None:
    for worker in multiprocessing.active_children():
        _write(f"[rank {rank}] its worker {worker.name}:\n")
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, _OF_WORKERS)
        time.sleep(0.05)  # it writes by itself


def _stacks(rank: int, own: Standing, first: int) -> str:
    """The stacks of all threads, `first` before the others. Reads no source: the disk may be what hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    lines = [f"{own}, for {own.quiet:.0f} s; its threads, the innermost call first:"]
    for ident in sorted(frames, key=lambda ident: ident != first):
        lines.append(f"thread {names.get(ident, ident)}")
        frame: FrameType | None = frames[ident]
        while frame is not None:
            lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}')
            frame = frame.f_back
    return "".join(f"[rank {rank}] {line}\n" for line in lines)


def _place(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _whose(standings: Standings) -> str:
    if len(standings.of) == 1:
        return "are"
    everybody = all(each.told for each in standings.present)
    return "of all processes are" if everybody else "of the processes that answer are"


def _write(text: str) -> None:
    # past Python's own stream, whose lock the thread that hangs may have
    data = text.encode(errors="replace")
    while data:
        data = data[os.write(2, data) :]


def _within(seconds: float, function: Callable[[], object]) -> None:
    """Waits so long for a function, and no longer."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
