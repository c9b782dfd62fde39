"""Ends a run in which no rank makes progress, and names the rank that the others wait for, and its machine.

Each rank marks how far it is. A thread counts its ticks since the last mark and exchanges them with the other ranks. If
all ranks are quiet for too long, each writes its stacks, the first one writes the error, and the processes exit.
"""

from __future__ import annotations

import contextlib
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

from shared.environment import on_cluster
from shared.errors import tell_torchrun
from shared.training import processes
from shared.training.processes import ProcessContext, Star, host_of_chief
from shared.training.standings import Mark, Phase, Standing, Standings

_LONGEST_TICK = 5.0  # seconds
_TICKS = 10  # in the shortest limit
_SECONDS_TO_WRITE = 5.0  # a pipe may be full, and that may be the hang
_SECONDS_TO_FLUSH = 0.5
_MILLISECONDS_TO_SEND_THE_REST = 200
_OF_WORKERS = signal.SIGURG  # which no launcher sends, and which stops no process
# where Python is while a rank waits for others: a `ProcessContext`, torch's collectives, DDP and its backward pass
_WAITING = (
    processes.__file__,
    *(
        str(Path(module.__file__).parent) + os.sep
        for module in (determined, zmq, torch.distributed, torch.nn.parallel, torch.autograd)
    ),
)


class Exchange:
    """Each rank sends the chief its own standing, and the chief sends back all that it knows.

    All ranks create it together. Then one thread of each uses it.
    """

    def __init__(self, distributed: DistributedContext):
        self.rank, self.size = distributed.rank, distributed.size
        self._star = Star(self.rank, self.size, _MILLISECONDS_TO_SEND_THE_REST)
        host = host_of_chief(distributed.get_num_agents())
        self._star.meet(distributed.broadcast(None if self.rank else self._star.listen(host)))
        self._heard: dict[int, Standing] = {}  # by the chief

    def swap(self, own: Standing) -> list[Standing]:
        """Sends this rank's standing. Returns what it heard of all since the last call, without waiting."""
        heard = [standing for table in self._star.arrived() for standing in table]
        if self.rank:
            self._star.post([own])
            return heard
        self._heard |= {standing.rank: standing for standing in [*heard, own]}
        for number in range(1, self.size):
            self._star.post(list(self._heard.values()), number)
        return list(self._heard.values())

    def close(self) -> None:
        self._star.close()


class Watch:
    """How far this rank is. `watching` gives one that is watched."""

    def __init__(self) -> None:
        self.last_mark = Mark(Phase.STARTING, 0)
        self.first_batch = 1  # of this start
        self.left = False  # whether the training has ended: the other ranks need not wait for this one
        self.over = threading.Event()

    def mark(self, phase: Phase, batch: int) -> None:
        """Notes how far this rank is, see `Mark`; costs about a microsecond."""
        self.last_mark = self.last_mark.followed_by(phase, batch)

    @contextlib.contextmanager
    def training(self, batches: int) -> Iterator[None]:
        """The training, after `batches` of earlier starts. After an error this rank does not leave: to the others it is
        one that does not answer any more."""
        self.first_batch = batches + 1
        self.mark(Phase.BEGINNING, batches)
        try:
            yield
            self.left = True
        finally:
            self.over.set()


@contextlib.contextmanager
def watching(distributed: DistributedContext, hang_minutes: float | None) -> Iterator[Watch]:
    """Watches the calling thread, on every rank, from here to the end of the training. None watches nothing."""
    watch = Watch()
    if hang_minutes is None:
        yield watch
        return
    watcher = _Watcher(watch, distributed, 60 * hang_minutes)
    try:
        yield watch
    finally:
        watch.over.set()
        watcher.thread.join()


class _Watcher:
    """A thread that watches the calling one. All ranks create it together."""

    def __init__(self, watch: Watch, distributed: DistributedContext, limit: float):
        self.watch, self.rank, self.limit = watch, distributed.rank, limit
        self.exchange = Exchange(distributed) if distributed.size > 1 else None
        self.watched = threading.get_ident()
        self.interval = min(limit / _TICKS, _LONGEST_TICK)
        hosts = distributed.hosts if isinstance(distributed, ProcessContext) else ()
        self.standings = Standings(self.interval, limit, hosts)
        self.ticks = self.marked_at = 0
        self.seen: Mark | None = None
        self.reported = False
        for each in range(distributed.size):  # those that have not reported yet
            self.standings.hear(Standing(each, watch.last_mark, 0.0, watch.last_mark.patience(limit, 1), tick=-1))
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            while not self.watch.over.wait(self.interval):
                self._tick()
                if self.standings.hang() or self.standings.peer_reported_hang():
                    self._end_the_process()
            if self.watch.left:
                self._tick()
        finally:
            if self.exchange is not None:
                self.exchange.close()

    def _tick(self) -> None:
        self.ticks += 1
        mark = self.watch.last_mark
        if mark is not self.seen:
            self.seen, self.marked_at = mark, self.ticks
        frame = sys._current_frames().get(self.watched)
        own = Standing(
            rank=self.rank,
            mark=mark,
            quiet=self.interval * (self.ticks - self.marked_at),
            patience=mark.patience(self.limit, self.watch.first_batch),
            tick=self.ticks,
            waits=frame is not None and frame.f_code.co_filename.startswith(_WAITING),
            where="" if frame is None else _place(frame),
            reported=self.reported,
            left=self.watch.left,
        )
        self.standings.tick()
        for standing in self.exchange.swap(own) if self.exchange is not None else ():
            if standing.rank != self.rank:
                self.standings.hear(standing)
        self.standings.hear(own)

    def _end_the_process(self) -> None:
        standings = self.standings
        message, own = standings.message(), standings.of[self.rank]
        answering = [each.rank for each in standings.present if standings.answers(each)]
        stacks = _stacks(self.rank, own, self.watched)
        _within(_SECONDS_TO_WRITE, lambda: _write(stacks))
        _within(_SECONDS_TO_WRITE, lambda: _show_workers(self.rank))
        self.reported = True
        until = time.monotonic() + _SECONDS_TO_WRITE + 2 * self.interval
        while True:  # until all others that answer have written theirs
            self._tick()
            if all(standings.of[rank].reported for rank in answering) or time.monotonic() > until:
                break
            time.sleep(self.interval / _TICKS)
        of_ranks = "of all ranks " if all(each.reported for each in standings.present) else "of the ranks that answer "
        level, fix = "error", ". Fix: correct the cause, then continue with --resume last"
        if on_cluster():  # which reads the level from the line, and continues by itself
            level, fix = "ERROR", ""
        line = f"{level}: {message}. The stacks {of_ranks if len(standings.of) > 1 else ''}are above. "
        line += f"hyperparameters.hang_minutes sets how long to wait{fix}"
        _within(_SECONDS_TO_FLUSH, sys.stdout.flush)  # before the line, which is the last one
        if self.rank == min(answering):
            _within(_SECONDS_TO_WRITE, lambda: _write(f"{line}\n"))
        _within(_SECONDS_TO_WRITE, lambda: tell_torchrun(line))
        # torchrun ends all processes as soon as one exits, and the others log that its connection is lost
        time.sleep(2 * _SECONDS_TO_FLUSH)
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


def _write(text: str) -> None:
    # past Python's own stream, whose lock the thread that hangs may hold
    data = text.encode(errors="replace")
    while data:
        data = data[os.write(2, data) :]


def _within(seconds: float, function: Callable[[], object]) -> None:
    """Waits for a function, but no longer than that."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
