"""When a run reports, validates and saves; and when it stops, after the same batch on every rank.

A signal (off a cluster), the searcher or a pause (on a cluster) stops it; it can continue. If the config ends it, it is
complete. `Outcome` is the one value that says what happened. Forked processes and loader workers get the signals too.
"""

from __future__ import annotations

import ctypes
import enum
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from determined.core import DistributedContext

from shared.config.schema import EarlyStopping, Length, Schedule, SearcherMetric
from shared.environment import STOP_SIGNALS
from shared.errors import UserError, count_of
from shared.training.hang import show_stacks_when_asked
from shared.training.validation import Validation

# --- signals ----------------------------------------------------------------------------------------


_PR_SET_PDEATHSIG = 1  # of Linux' prctl


class StoppedBeforeTraining(SystemExit):
    """A signal arrived before there was anything to save."""

    def __init__(self, number: signal.Signals, status: int):
        super().__init__(status)
        self.signal = number


class StopSignals:
    """Notes the signals that stop a run, for the time of a block. A second Ctrl-C stops the process at once.

    Args:
        numbers: the signals besides Ctrl-C.
        status: the exit status after one of them; None for 128 and its number, as after Ctrl-C.
    """

    def __init__(self, numbers: Sequence[signal.Signals] = STOP_SIGNALS, status: int | None = None):
        self.handled, self.status = {signal.SIGINT, *numbers}, status
        self.received: signal.Signals | None = None  # the last one that arrived during the training
        self._training = False

    def begin(self) -> None:
        """From here on a signal stops the training after a batch. Before, it stops the process at once."""
        self._training = True

    def end(self) -> None:
        self._training = False

    def exit_status(self, number: signal.Signals) -> int:
        """The status of a process that a signal stopped."""
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


# --- what is due ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Periods:
    """When something is due, in batches from 1 over the whole training."""

    total: int
    report: int  # batches between two reports
    validation: int | None  # batches between two of them; None for the end only
    checkpoint: int | None
    validation_start: int = 0  # the first validation, from which the others are counted
    validation_changes: tuple[tuple[int, int], ...] = ()  # (batch, period): from this batch on, another period

    def validates(self, batch: int) -> bool:
        period = self.validation
        for since, changed in self.validation_changes:
            period = changed if batch >= since else period
        after_start = batch - self.validation_start
        return batch == self.total or (period is not None and after_start >= 0 and after_start % period == 0)

    def saves(self, batch: int) -> bool:
        return batch == self.total or (self.checkpoint is not None and batch % self.checkpoint == 0)

    def reports(self, batch: int) -> bool:
        return batch % self.report == 0 or self.validates(batch) or self.saves(batch)


def periods_of(
    schedule: Schedule, batches_per_epoch: int, global_batch_size: int, aggregation_frequency: int
) -> Periods:
    """The schedule in batches. Reports are due at whole optimizer steps. Raises UserError if the training, a validation
    or a checkpoint would end in the middle of an optimizer step."""
    window = aggregation_frequency

    def batches(length: Length | None, key: str) -> int | None:
        if length is None:
            return None
        count = length.batches(batches_per_epoch, global_batch_size)
        if count % window:
            raise UserError(
                f"{key}: {count} batches are not a multiple of optimizations.aggregation_frequency, {window}, and end "
                f"in the middle of an optimizer step. Fix: give {{batches: {-(-count // window) * window}}}"
            )
        return count

    total = batches(schedule.max_length, "searcher.max_length")
    changes = [
        (since.batches(batches_per_epoch, global_batch_size), period) for since, period in schedule.validation_changes
    ]
    return Periods(
        total=total,
        report=-(-schedule.reporting_batches // window) * window,
        validation=batches(schedule.validation_period, "min_validation_period"),
        checkpoint=batches(schedule.checkpoint_period, "min_checkpoint_period"),
        validation_start=batches(schedule.validation_start, "the first validation") or 0,
        validation_changes=tuple(
            (since, batches(period, "a later validation period")) for since, period in changes if since <= total
        ),
    )


class End(enum.Enum):
    """Why a run trained no further batch."""

    COMPLETE = "has its whole length"
    ENDED = "the config ended it before its length"
    STOPPED = "was stopped, and can continue"
    NOTHING_TO_DO = "the checkpoint was at its end already"


@dataclass(frozen=True)
class Outcome:
    """Where and why a run stopped."""

    end: End
    batches: int
    total: int  # batches of the whole length
    why: str = ""  # shown in the log, the report and the command line; empty for a complete training
    signal: signal.Signals | None = None  # the one that stopped it on some rank
    validation: Validation | None = None  # the last one of this start
    seconds: float = 0.0  # of training, those before a resume included

    @property
    def is_finished(self) -> bool:
        """Whether this start trained to the end and validated there."""
        return self.end in (End.COMPLETE, End.ENDED)

    def __str__(self) -> str:
        if self.end is End.COMPLETE:
            return f"trained all of its {self.batches} batches"
        if self.end is End.ENDED:
            return f"ended after batch {self.batches} of {self.total}: {self.why}"
        if self.end is End.STOPPED:
            return f"stopped by {self.why} after batch {self.batches}, which is saved"
        return self.why


class Clock:
    """Seconds of training from the first batch on, with validations and saves. Those before a resume count too."""

    now = staticmethod(time.monotonic)

    def __init__(self, max_hours: float | None = None, minutes_between_saves: float | None = None):
        self.max_hours = max_hours
        self.minutes_between_saves = minutes_between_saves
        self._before = 0.0
        self._began: float | None = None
        self._saved = math.inf  # nothing to save before the first batch

    def resume(self, seconds: float) -> None:
        """Adds the seconds of earlier starts."""
        self._before = seconds

    def begin(self) -> None:
        """The first batch of this start begins."""
        self._began = self._saved = self.now()

    def saved(self) -> None:
        """A checkpoint was just saved."""
        self._saved = self.now()

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._began is None else self.now() - self._began)

    @property
    def is_asked(self) -> bool:
        """Whether the config makes anything depend on the time."""
        return self.max_hours is not None or self.minutes_between_saves is not None

    def save_is_due(self) -> bool:
        return self.minutes_between_saves is not None and self.now() - self._saved >= 60 * self.minutes_between_saves

    def is_over(self) -> bool:
        return self.max_hours is not None and self.seconds >= 3600 * self.max_hours

    @property
    def why(self) -> str:
        """Why the training ends if the time is over, the same on every rank."""
        return f"max_hours: {self.max_hours:g} h of training are over"


class BestSoFar:
    """The best validation so far, and the validations without improvement since. Both are counted also without early
    stopping, so that a resume can switch it on."""

    def __init__(self, config: EarlyStopping | None, metric: SearcherMetric):
        self.patience = None if config is None else config.patience
        self.metric = metric
        self.best: float | None = None  # value of the searcher metric
        self.best_at = -1  # its batch
        self.without_improvement = 0

    def update(self, value: float, batch: int) -> bool:
        """Takes the validation after `batch`. Returns whether it is the best so far."""
        value = self.metric.value_or_worst(value)
        if self.metric.is_better(value, self.best):
            self.best, self.best_at, self.without_improvement = value, batch, 0
            return True
        self.without_improvement += 1
        return False

    def why_over(self) -> str | None:
        """Why the training ends; None if it does not."""
        if self.patience is None or self.best is None or self.without_improvement < self.patience:
            return None
        return (
            f"early stopping: {self.metric.name} has not been better than {self.best:.4g} at batch {self.best_at} for "
            f"{count_of(self.without_improvement, 'validation')}"
        )

    def state(self) -> dict[str, Any]:
        best = {"metric": self.metric.name, "best": self.best, "best_at": self.best_at}
        return {**best, "without_better": self.without_improvement}

    def load(self, state: dict[str, Any], earlier_value: float | None = None) -> None:
        """Continues from what `state` gave. If it is of another metric, `earlier_value` of this one counts."""
        named = state.get("metric")  # older checkpoints do not name it
        if named == self.metric.name or (named is None and earlier_value is None):
            self.best, self.best_at = state["best"], state["best_at"]
            self.without_improvement = state.get("without_better", 0)
        elif earlier_value is not None:
            self.best, self.best_at = earlier_value, state["best_at"]

    def forget(self) -> None:
        """Makes the next validation the best."""
        self.best, self.best_at = None, -1


_BATCHES_BETWEEN_MEETINGS = 5  # of several ranks


class Stopping:
    """Agrees on every rank which batch is the last one, and whether a validation was cut short.

    Ranks do not run in step: with NCCL one may have queued several steps more than another. So they agree only where
    all of them come by: after certain batches, at each report, after each validation. A meeting after a batch takes
    place beside the next batches, and the next meeting applies its result. So no step waits for it.

    Args:
        aggregation_frequency: batches per optimizer step; a run stops after whole steps only.
        signals: those that stop the training; None on a cluster, which sends none.
    """

    def __init__(
        self,
        distributed: DistributedContext,
        aggregation_frequency: int = 1,
        clock: Clock | None = None,
        signals: StopSignals | None = None,
    ):
        self.distributed, self.clock, self.signals = distributed, clock or Clock(), signals
        self.stopped_by: signal.Signals | None = None  # the signal of some rank, once all ranks know
        self.stopped_elsewhere_by: str | None = None  # what else stops the run, once all ranks know
        self.after: int | None = None  # the batch after which all ranks stop
        self.saves_after: int | None = None  # the last batch after which the clock asked for a checkpoint
        self.ended: str | None = None  # why the config ends the training with the validation of this batch
        self._cut = False
        self._last_meeting: Callable[[], list[int]] = lambda: [0, 0, 0]
        windows = 1 if distributed.size == 1 else -(-_BATCHES_BETWEEN_MEETINGS // aggregation_frequency)
        self._between_meetings = windows * aggregation_frequency

    # --- what the ranks agree on --------------------------------------------------------------------------

    @property
    def signal(self) -> signal.Signals | None:
        """The one that this rank received."""
        return None if self.signals is None else self.signals.received

    def begin(self) -> None:
        """The first batch of this start begins."""
        if self.signals is not None:
            self.signals.begin()
        self.clock.begin()

    def after_batch(self, batch: int) -> bool:
        """Whether to stop after `batch`, counted from 1, which this rank just trained. Several ranks act on what they
        knew at the last meeting. The chief's clock counts."""
        if (self.signals is not None or self.clock.is_asked) and batch % self._between_meetings == 0:
            agreed = self._last_meeting()
            own = [self.signal or 0, 0, 0]
            if self.distributed.rank == 0:
                own[1:] = self.clock.is_over(), self.clock.save_is_due() and not agreed[2]
            if self.distributed.size > 1:
                self._last_meeting = self.distributed.begin_max(own)
            number, is_over, save_is_due = own if self.distributed.size == 1 else agreed
            if number:
                self.after, self.stopped_by = batch, signal.Signals(number)
            elif is_over:
                self.ended = self.clock.why
            elif save_is_due:
                self.saves_after = batch
        return self.after == batch

    def at_boundary(self, batch: int, elsewhere: str | None = None) -> bool:
        """The same after the report, the validation and the checkpoint of `batch`. `elsewhere`: what stops the run on a
        cluster, as far as this rank knows."""
        signals, others = zip(*self.distributed.allgather((self.signal, elsewhere)), strict=True)
        self.stopped_elsewhere_by = next((each for each in others if each is not None), None)
        if self._some_received(signals) or self.stopped_elsewhere_by is not None or self.ended is not None:
            self.after = batch
        return self.after is not None

    def cuts_validation(self) -> bool:
        """Whether this rank omits the rest of its validation. Asked before each of its batches but the first, without
        which there is nothing to reduce."""
        self._cut = self._cut or self.signal is not None
        return self._cut

    def after_validation(self, why: str | None) -> None:
        """Ends the training if the validation gives a reason, `why`, or the time is over by the chief's clock; called
        on every rank."""
        is_over = self.clock.is_asked and self.distributed.broadcast(self.clock.is_over())
        self.ended = why or (self.clock.why if is_over else None)

    def validation_was_cut(self, batch: int) -> bool:
        """Whether some rank omitted a part of the validation after `batch`. Then all stop there."""
        of_ranks = self.distributed.allgather(self.signal if self._cut else None)
        self._cut = False
        if not self._some_received(of_ranks):
            return False
        self.after = batch
        self.ended = None
        return True

    def _some_received(self, signals: Iterable[signal.Signals | None]) -> bool:
        received = [number for number in signals if number is not None]
        self.stopped_by = received[0] if received else self.stopped_by
        return bool(received)
