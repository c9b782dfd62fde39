"""What a hang is, and which process is behind: told from what each process says of itself."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shared.errors import count_of

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
