"""Ends a training in which no rank makes progress, and names the rank that the others wait for.

Each rank marks how far it is. A thread counts its ticks since the last mark and exchanges them with the other ranks. If
all ranks are quiet for too long, each writes its stacks, the first one writes the error, and the processes exit.
"""

from __future__ import annotations

import contextlib
import enum
import faulthandler
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import determined
import msgspec
import torch
import zmq
from determined.core import DistributedContext

from shared.environment import on_cluster
from shared.errors import count_of, tell_torchrun
from shared.training.processes import LONGER, connect, host_of_chief, listen

_LONGEST_TICK = 5.0  # seconds
_TICKS = 10  # in the shortest limit
_TICKS_UNHEARD = 5  # after which a rank does not answer: news takes two at most
_SECONDS_TO_WRITE = 5.0  # a pipe may be full, and that may be the hang
_SECONDS_TO_FLUSH = 0.5
_NAMED = 8  # ranks in a message
_OF_WORKERS = signal.SIGUSR1
# where Python is while a rank waits for others: a `ProcessContext`, torch's collectives, DDP and its backward pass
_WAITING = tuple(
    str(Path(module.__file__).parent) + os.sep
    for module in (determined, zmq, torch.distributed, torch.nn.parallel, torch.autograd)
)


class Phase(enum.Enum):
    """The activity of a rank. All ranks mark the same phases in the same order."""

    BEGINNING = "beginning"
    LOADING = "loading a batch"
    FORWARD = "computing the losses"
    BACKWARD = "computing the gradients and the step"
    STEPPED = "after the step"
    REPORTING = "reporting"
    VALIDATING = "detecting on the validation images"
    EVALUATING = "evaluating the detections"
    SAVING = "saving a checkpoint"


_LONG = {Phase.BEGINNING, Phase.REPORTING, Phase.EVALUATING, Phase.SAVING}  # the chief works while the others wait


class Mark(NamedTuple):
    """How far a rank is.

    Attributes:
        batch: that it trains, from 1; outside of a step, the batches trained.
        passed: how often phase or batch changed, alike on every rank. The rank with the least is behind.
    """

    phase: Phase
    batch: int
    passed: int = 0

    def followed_by(self, phase: Phase, batch: int) -> Mark:
        """The next mark. It is a new object even if it equals this one, as for the next validation batch."""
        return Mark(phase, batch, self.passed + (phase is not self.phase or batch != self.batch))

    def patience(self, limit: float, first_batch: int) -> float:
        """The seconds without another mark that are a hang, if `limit` seconds are one in a usual batch. In the first
        batch of a start, libraries compile and caches fill."""
        return limit * (LONGER if self.phase in _LONG or self.batch <= first_batch else 1)


@dataclass(frozen=True)
class Standing:
    """The state that a rank reports at each of its ticks."""

    rank: int
    mark: Mark
    quiet: float  # seconds since its last mark, by its own ticks
    patience: float  # seconds after which that is too long
    tick: int = 0  # how many it has counted
    waits: bool = False  # for other ranks, as far as Python shows
    where: str = ""  # the file, line and function that it is in
    reported: bool = False  # it found a hang, and wrote its stacks
    left: bool = False  # its training has ended

    def __str__(self) -> str:
        return f"batch {self.mark.batch} ({self.mark.phase.value}{self.where and f', at {self.where}'})"


class Standings:
    """What one rank knows of all. It counts time in its own ticks, not by the clock: a job that is stopped and resumed
    as a whole loses none.

    Args:
        interval: seconds per tick.
        limit: seconds after which a rank that does not answer has hung, whatever it was doing.
    """

    def __init__(self, interval: float, limit: float = math.inf):
        self.interval = interval
        self.limit = limit
        self.of: dict[int, Standing] = {}
        self._unheard: dict[int, int] = {}  # ticks

    def tick(self) -> None:
        """This rank waited one interval."""
        for rank in self._unheard:
            self._unheard[rank] += 1

    def hear(self, standing: Standing) -> None:
        """Takes a rank's report. It is a sign of life only if the rank ticked since its last one."""
        known = self.of.get(standing.rank)
        if known is None or known.tick != standing.tick:
            self._unheard[standing.rank] = 0
        self.of[standing.rank] = standing

    @property
    def present(self) -> list[Standing]:
        """Those whose training has not ended, by rank."""
        return [self.of[rank] for rank in sorted(self.of) if not self.of[rank].left]

    def quiet(self, standing: Standing) -> float:
        """Seconds since a rank's last mark, including those since its last report."""
        return standing.quiet + self.interval * self._unheard[standing.rank]

    def answers(self, standing: Standing) -> bool:
        return self._unheard[standing.rank] < _TICKS_UNHEARD

    def hang(self) -> bool:
        """Whether no rank makes progress. While one does, the others may wait for it."""
        present = self.present
        is_silent = any(self.interval * self._unheard[each.rank] >= self.limit for each in present)
        longest = self.limit if is_silent else math.inf
        return bool(present) and all(self.quiet(each) >= min(each.patience, longest) for each in present)

    def peer_reported_hang(self) -> bool:
        return any(each.reported for each in self.present)

    def message(self) -> str:
        """In one line, the rank that the others wait for."""
        return f"no progress for {span(min(map(self.quiet, self.present)))}: {self._who()}"

    def _who(self) -> str:
        present = self.present
        if len(self.of) == 1:
            return f"stuck at {present[0]}"
        silent = [each for each in present if not self.answers(each)]
        if silent:
            # the chief forwards the reports: without it, nothing is known of the others
            silent = silent[:1] if silent[0].rank == 0 else silent
            does = "does" if len(silent) == 1 else "do"
            return f"{_ranks(silent)} {does} not answer since {silent[0]}"
        # of those that are least far, the ones that do not wait are what all wait for
        least = min((each.mark.passed, each.waits) for each in present)
        behind = [each for each in present if (each.mark.passed, each.waits) == least]
        others = [each for each in present if each not in behind]
        if not others:
            return f"{_ranks(present)} wait in the same place, {present[0]}"
        is_stuck = f"{_ranks(behind)} {'is' if len(behind) == 1 else 'are'} stuck at {behind[0]}"
        furthest = max(others, key=lambda each: each.mark.passed)
        ahead = f" at batch {furthest.mark.batch} ({furthest.mark.phase.value})" * (furthest.mark.passed > least[0])
        return f"{is_stuck}; {'the other rank waits' if len(others) == 1 else 'the other ranks wait'}{ahead}"


def span(seconds: float) -> str:
    """ "45 seconds", "10 minutes"."""
    return count_of(round(seconds / 60), "minute") if seconds >= 120 else count_of(round(seconds), "second")


def _ranks(standings: Sequence[Standing]) -> str:
    named = ", ".join(str(each.rank) for each in standings[:_NAMED])
    more = f" and {len(standings) - _NAMED} more" if len(standings) > _NAMED else ""
    return f"rank{'' if len(standings) == 1 else 's'} {named}{more}"


class Exchange:
    """Each rank sends the chief its own standing, and the chief sends back all that it knows.

    All ranks create it together. Then one thread of each uses it.
    """

    def __init__(self, distributed: DistributedContext):
        self.rank = distributed.rank
        self._context = zmq.Context()
        self._context.linger = 200  # milliseconds, to send the rest
        self._socket = self._context.socket(zmq.DEALER if self.rank else zmq.ROUTER)
        host = host_of_chief(distributed.get_num_agents())
        chief = distributed.broadcast(None if self.rank else listen(self._socket, host))
        if self.rank:
            connect(self._socket, chief)
        self._heard: dict[int, Standing] = {}  # by the chief
        self._senders: dict[int, bytes] = {}  # how the chief addresses the others

    def swap(self, own: Standing) -> list[Standing]:
        """Sends this rank's standing. Returns what it heard of all since the last call, without waiting."""
        if self.rank:
            self._send(msgspec.json.encode([own]))
            return [standing for (message,) in self._received(1) for standing in _decoded(message)]
        for sender, message in self._received(2):
            for standing in _decoded(message):
                self._heard[standing.rank], self._senders[standing.rank] = standing, sender
        self._heard[0] = own
        table = msgspec.json.encode(list(self._heard.values()))
        for sender in self._senders.values():
            self._send(sender, table)
        return list(self._heard.values())

    def close(self) -> None:
        self._context.destroy()

    def _send(self, *parts: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):  # the other side accepts no more
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
    except msgspec.MsgspecError:  # from a stranger
        return []


class Watch:
    """Marks how far this rank is, and ends the process if no rank makes progress. Without `hang_minutes` it watches
    nothing."""

    def __init__(self, distributed: DistributedContext, hang_minutes: float | None):
        self.distributed = distributed
        self.limit = None if hang_minutes is None else 60 * hang_minutes
        self.last_mark = Mark(Phase.BEGINNING, 0)

    def mark(self, phase: Phase, batch: int) -> None:
        """Notes how far this rank is, see `Mark`; costs about a microsecond."""
        self.last_mark = self.last_mark.followed_by(phase, batch)

    @contextlib.contextmanager
    def watching(self, batches: int) -> Iterator[None]:
        """Watches the calling thread, on every rank, after `batches` of earlier starts. The loaders' workers run."""
        if self.limit is None:
            yield
            return
        self.mark(Phase.BEGINNING, batches)
        watcher = _Watcher(self, batches + 1)
        thread = threading.Thread(target=watcher.run, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            watcher.over.set()
            thread.join()


class _Watcher:
    """The thread of a `Watch`."""

    def __init__(self, watch: Watch, first_batch: int):
        self.watch, self.limit, self.first_batch = watch, watch.limit, first_batch
        self.watched = threading.get_ident()
        self.over = threading.Event()
        self.rank, size = watch.distributed.rank, watch.distributed.size
        self.exchange = Exchange(watch.distributed) if size > 1 else None
        self.interval = min(self.limit / _TICKS, _LONGEST_TICK)
        self.standings = Standings(self.interval, self.limit)
        self.ticks = self.marked_at = 0
        self.seen: Mark | None = None
        self.reported = self.left = False
        begun = Mark(Phase.BEGINNING, first_batch - 1)  # of those that have not reported yet
        for rank in range(size):
            self.standings.hear(Standing(rank, begun, 0.0, begun.patience(self.limit, 0), tick=-1))

    def run(self) -> None:
        try:
            while not self.over.wait(self.interval):
                self._tick()
                if self.standings.hang() or self.standings.peer_reported_hang():
                    self._end_the_process()
            self.left = True
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
            patience=mark.patience(self.limit, self.first_batch),
            tick=self.ticks,
            waits=frame is not None and frame.f_code.co_filename.startswith(_WAITING),
            where="" if frame is None else _place(frame),
            reported=self.reported,
            left=self.left,
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
