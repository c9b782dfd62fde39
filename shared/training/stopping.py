"""When a training ends before its length: after the same batch on every process, with a checkpoint.

Asked for by a signal (off the cluster), by the searcher or by a pause (on one), to go on from there; or by the config:
then the run has come to its end.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from determined.core import DistributedContext
from determined.pytorch import PyTorchCallback

from shared.config.schema import EarlyStopping, SearcherMetric
from shared.errors import count_of

if TYPE_CHECKING:
    from shared.training.trial import DetectionTrial


class Clock:
    """The seconds from the first batch on, with validations and checkpoints; those before a resume count too.

    Args:
        max_hours, minutes_between_saves: of the config's hyperparameters; None where it says nothing.

    Attributes:
        before: seconds of training before this start.
    """

    now = staticmethod(time.monotonic)

    def __init__(self, max_hours: float | None = None, minutes_between_saves: float | None = None):
        self.max_hours = max_hours
        self.minutes_between_saves = minutes_between_saves
        self.before = 0.0
        self._began: float | None = None
        self._saved = math.inf  # nothing to save before the first batch

    def begin(self) -> None:
        """This start trains its first batch."""
        self._began = self._saved = self.now()

    def saved(self) -> None:
        """A checkpoint has just been saved."""
        self._saved = self.now()

    @property
    def seconds(self) -> float:
        return self.before + (0.0 if self._began is None else self.now() - self._began)

    @property
    def is_asked(self) -> bool:
        """Whether the config makes anything depend on it."""
        return self.max_hours is not None or self.minutes_between_saves is not None

    def save_is_due(self) -> bool:
        """Whether the last checkpoint is long enough ago for another."""
        return self.minutes_between_saves is not None and self.now() - self._saved >= 60 * self.minutes_between_saves

    def why_over(self) -> str | None:
        """Why the run has come to its end; None where it has not."""
        if self.max_hours is None or self.seconds < 3600 * self.max_hours:
            return None
        return f"max_hours: {self.max_hours:g} h of training are over"


class Patience:
    """Counts the validations without a better searcher metric; also where the config ends nothing by them, so that it
    can after a resume.

    Attributes:
        best, best_at: the best value so far, and the batch; None without a validation.
        without_better: validations since then.
    """

    def __init__(self, config: EarlyStopping | None, metric: SearcherMetric):
        self.patience = None if config is None else config.patience
        self.metric = metric
        self.best: float | None = None
        self.best_at = -1
        self.without_better = 0

    def note(self, value: float, batch: int) -> None:
        """What the validation after `batch` says."""
        value = self.metric.worst if math.isnan(value) else value
        if self.metric.is_better(value, self.best):
            self.best, self.best_at, self.without_better = value, batch, 0
        else:
            self.without_better += 1

    def why_over(self) -> str | None:
        """Why the run has come to its end; None where it has not."""
        if self.patience is None or self.without_better < self.patience:
            return None
        return (
            f"early stopping: {self.metric.name} has not been better than {self.best:.4g} at batch {self.best_at} for "
            f"{count_of(self.without_better, 'validation')}"
        )

    def state(self) -> dict[str, Any]:
        return {
            "metric": self.metric.name,
            "best": self.best,
            "best_at": self.best_at,
            "without_better": self.without_better,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave, where it is of the same metric."""
        if state.get("metric") == self.metric.name:
            self.best, self.best_at = state["best"], state["best_at"]
            self.without_better = state["without_better"]


class Ending(PyTorchCallback):
    """Asks at each validation whether the run ends with it: before that is reported and saved."""

    def __init__(self, trial: DetectionTrial):
        self.trial = trial

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        trial = self.trial
        trial.patience.note(trial.last_validation[trial.searcher_metric.name], trial.batches_trained)
        if why := trial.patience.why_over() or trial.stopping.why_time_is_over():
            trial.stopping.end(trial.batches_trained, why)


# batches between two meetings of several processes: a meeting costs some milliseconds
_BETWEEN_MEETINGS = 10


class Stopping:
    """Answers two questions, with the same answer on every process: is this the batch to stop after, and was this
    validation cut short?

    The processes do not run in step: with NCCL one may have queued several steps more than another. So they agree only
    where all of them come by: after certain batches, at each report, after each validation.

    Args:
        aggregation_frequency: batches to an optimizer step; only whole steps are stopped after.
        asked_elsewhere: the chief asks it at each report, validation and checkpoint: has somebody else (the searcher)
            ended the training?
        clock: says when the run's time is over, and when a checkpoint is due.
        total: batches at the run's end, which is no early one.

    Attributes:
        signal: the one that this process was sent; None without.
        after: the batch after which all processes stop, once they have agreed.
        ended: why the run has come to its end before its length, where the config says so; None without.
        saves_after: the last batch after which the clock asked for a checkpoint.
        ended_after: the batch after which it has, and which is to be validated.
    """

    def __init__(
        self,
        distributed: DistributedContext,
        aggregation_frequency: int = 1,
        asked_elsewhere: Callable[[], bool] = lambda: False,
        clock: Clock | None = None,
        total: int | None = None,
    ):
        self.distributed = distributed
        self.asked_elsewhere = asked_elsewhere
        self.clock = clock or Clock()
        self.total = total
        self.signal: signal.Signals | None = None
        self.after: int | None = None
        self.saves_after: int | None = None
        self.ended: str | None = None
        self.ended_after: int | None = None
        self._training = False
        self._cut = False
        self._handles_signals = False
        windows = 1 if distributed.size == 1 else -(-_BETWEEN_MEETINGS // aggregation_frequency)
        self._between_meetings = windows * aggregation_frequency

    # --- the questions -------------------------------------------------------------------------------

    def begin(self) -> None:
        """From here on a signal is obeyed after a batch; before it ends the process at once, for nothing is lost."""
        self._training = True
        self.clock.begin()

    def after_batch(self, batch: int) -> bool:
        """Whether to stop after `batch`, counted from 1, which this process has just trained."""
        if (self._handles_signals or self.clock.is_asked) and batch % self._between_meetings == 0:
            clock_says = (self.clock.why_over(), self.clock.save_is_due())
            said = self.distributed.allgather((self.signal is not None, clock_says))
            why_over, save_is_due = said[0][1]  # the chief's
            if any(signalled for signalled, _ in said):
                self.after = batch
            elif why_over is not None:
                self.end(batch, why_over)
            elif save_is_due:
                self.saves_after = batch
        return self.after == batch

    def at_boundary(self, batch: int) -> bool:
        """The same after the report, validation or checkpoint that follows on `batch`."""
        here = self.signal is not None
        if self.distributed.rank == 0:
            here = here or self.asked_elsewhere()
        if self._any(here) or self.ended is not None:
            self.after = batch
        return self.after is not None

    def cuts_validation(self) -> bool:
        """Whether this process leaves out the rest of its validation; asked before each batch of it but the first,
        without which there is nothing to reduce."""
        self._cut = self._cut or self.signal is not None
        return self._cut

    def end(self, batch: int, why: str) -> None:
        """Every process says this: the run ends with the validation after `batch`. At its length it does so anyway."""
        if batch != self.total:
            self.ended, self.ended_after = why, batch

    def why_time_is_over(self) -> str | None:
        """Why the run's time is over, asked by every process after a validation; None where it is not."""
        return self.distributed.broadcast(self.clock.why_over()) if self.clock.is_asked else None

    def validation_was_cut(self, batch: int) -> bool:
        """Whether any process has left out a part of the validation after `batch`, which just ended: then all stop
        there."""
        cut, self._cut = self._any(self._cut), False
        if cut:
            self.after = batch
            self.ended = self.ended_after = None
        return cut

    def _any(self, here: bool) -> bool:
        return any(self.distributed.allgather(here))

    # --- signals -------------------------------------------------------------------------------------

    def __enter__(self) -> Stopping:
        """Handles SIGTERM and Ctrl-C; a second Ctrl-C ends the process at once."""
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        self._handles_signals = True
        _handling.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _handling.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._handles_signals = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self.signal is not None or not self._training):
            raise KeyboardInterrupt
        if not self._training:
            sys.exit(128 + number)
        self.signal = signal.Signals(number)


_handling: list[Stopping] = []
_before_fork = threading.local()


def _block_signals() -> None:
    # a library's pool ends its processes by SIGTERM, and Python forgets what a process is sent while it is being forked
    handled = {signal.SIGTERM, signal.SIGINT} if _handling else set()
    _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, handled)


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before_fork.mask)


def _leave_signals_to_forks() -> None:
    for stopping in list(_handling):
        stopping.__exit__()
    _unblock_signals()


os.register_at_fork(before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_leave_signals_to_forks)


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
