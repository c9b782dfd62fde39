"""What a hang is, and which process is behind: told from what each process says of itself."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import faulthandler
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
from shared.training.sockets import connect, host_of_chief, listen

LONGER = 6  # how many times as long a phase may last that is no training or validation batch
_TICKS_UNHEARD = 5  # then a process does not answer: news takes two at most
_NAMED = 8  # ranks in a message


class Phase(enum.Enum):
    """What a process does. Each marks the same phases, one after the other, as every other process."""

    BEGINNING = "beginning"
    LOADING = "loading a batch"
    FORWARD = "computing the losses"
    BACKWARD = "computing the gradients and the step"
    STEPPED = "after the step"
    REPORTING = "reporting"
    VALIDATING = "detecting on the validation images"
    EVALUATING = "evaluating the detections"
    SAVING = "saving a checkpoint"


# in these the chief works while the others wait
_LONG = {Phase.BEGINNING, Phase.REPORTING, Phase.EVALUATING, Phase.SAVING}


class Mark(NamedTuple):
    """Where a process has come to.

    Attributes:
        batch: that it trains, from 1; outside of the training, the batches trained.
        passed: how often phase or batch have changed. It grows alike on every process: the least is behind.
    """

    phase: Phase
    batch: int
    passed: int = 0

    def followed_by(self, phase: Phase, batch: int) -> Mark:
        """The next one; a new object also where it says the same, of the next validation batch for one."""
        return Mark(phase, batch, self.passed + (phase is not self.phase or batch != self.batch))

    def patience(self, limit: float, first_batch: int) -> float:
        """The seconds without another mark after which it is a hang, where `limit` is that of a usual batch;
        `first_batch` is the first one that is trained since the start, when libraries compile and caches fill."""
        return limit * (LONGER if self.phase in _LONG or self.batch <= first_batch else 1)


@dataclass(frozen=True)
class Standing:
    """What a process says of itself at each of its ticks.

    Attributes:
        mark: its last one.
        quiet: seconds since then, by its own ticks.
        patience: seconds after which that is too long.
        tick: how many it has counted.
        waits: whether it is in an exchange with the others, as far as Python can tell.
        where: file, line and function that it is in.
        told: whether it has found a hang, and written its stacks.
        left: whether its training has ended.
    """

    rank: int
    mark: Mark
    quiet: float
    patience: float
    tick: int = 0
    waits: bool = False
    where: str = ""
    told: bool = False
    left: bool = False

    def __str__(self) -> str:
        return f"batch {self.mark.batch}, {self.mark.phase.value}"


class Standings:
    """What one process knows of all, itself among them; time is counted in its own ticks, not by the clock: a job that
    is stopped as a whole, and goes on, has lost none.

    Args:
        interval: seconds of a tick.
    """

    def __init__(self, interval: float):
        self.interval = interval
        self.of: dict[int, Standing] = {}
        self._unheard: dict[int, int] = {}  # ticks

    def tick(self) -> None:
        """This process has waited one interval."""
        for rank in self._unheard:
            self._unheard[rank] += 1

    def hear(self, standing: Standing) -> None:
        """What a process says of itself. It counts as heard of only where it has ticked since."""
        known = self.of.get(standing.rank)
        if known is None or known.tick != standing.tick:
            self._unheard[standing.rank] = 0
        self.of[standing.rank] = standing

    @property
    def present(self) -> list[Standing]:
        """All whose training has not ended, by rank."""
        return [self.of[rank] for rank in sorted(self.of) if not self.of[rank].left]

    def quiet(self, standing: Standing) -> float:
        """Seconds since a process's last mark, with those in which nothing was heard of it."""
        return standing.quiet + self.interval * self._unheard[standing.rank]

    def answers(self, standing: Standing) -> bool:
        return self._unheard[standing.rank] < _TICKS_UNHEARD

    def hang(self) -> bool:
        """Whether no process comes further: while one does, the others may wait for it."""
        return bool(self.present) and all(self.quiet(each) >= each.patience for each in self.present)

    def someone_has_told(self) -> bool:
        """Whether another process has found the hang before this one."""
        return any(each.told for each in self.present)

    def message(self) -> str:
        """Which process is behind, in a line."""
        waited = span(min(map(self.quiet, self.present)))
        if len(self.of) == 1:
            (only,) = self.of.values()
            return f"the training has not come further for {waited}: {only}{_at(only)}"
        return f"no process has come further for {waited}: {self._who()}"

    def _who(self) -> str:
        present = self.present
        silent = [each for each in present if not self.answers(each)]
        if silent:
            if silent[0].rank == 0:  # by way of which the others are heard of
                silent = silent[:1]
            does = "does" if len(silent) == 1 else "do"
            return f"{_ranks(silent)} {does} not answer any more (last heard of at {silent[0]})"
        # of those that have come as far, one that does not wait for the others is what they wait for
        least = min((each.mark.passed, each.waits) for each in present)
        behind = [each for each in present if (each.mark.passed, each.waits) == least]
        others = [each for each in present if each not in behind]
        if not others:
            return f"{_ranks(present)} wait in the same place ({present[0]}{_at(present[0])})"
        furthest = max(others, key=lambda each: each.mark.passed)
        have = "the other has" if len(others) == 1 else "the others have"
        # where they are as far, the ones wait there for the others
        they = f"{have} come to {furthest}" if furthest.mark.passed > least[0] else f"{have} to wait"
        return f"{_ranks(behind)} {'is' if len(behind) == 1 else 'are'} behind ({behind[0]}{_at(behind[0])}; {they})"


def span(seconds: float) -> str:
    """ "45 seconds", "10 minutes"."""
    return count_of(round(seconds / 60), "minute") if seconds >= 120 else count_of(round(seconds), "second")


def _at(standing: Standing) -> str:
    return f", at {standing.where}" if standing.where else ""


def _ranks(standings: Sequence[Standing]) -> str:
    named = ", ".join(str(each.rank) for each in standings[:_NAMED])
    more = f" and {len(standings) - _NAMED} more" if len(standings) > _NAMED else ""
    return f"rank{'' if len(standings) == 1 else 's'} {named}{more}"


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
