"""How far each rank is, and which one all others wait for: what the watch over hangs decides by."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shared.errors import count_of
from shared.training.processes import LONGER

_TICKS_UNHEARD = 5  # after which a rank does not answer: news takes two at most
_NAMED = 8  # ranks in a message


class Phase(enum.Enum):
    """The activity of a rank. All ranks mark the same phases in the same order."""

    STARTING = "starting"
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
        """The seconds without another mark that are a hang, if `limit` seconds are one in a usual batch. A start may
        read all images of a large data set. In its first batch, libraries compile and caches fill."""
        if self.phase is Phase.STARTING:
            return limit * LONGER**2
        return limit * (LONGER if self.phase in _LONG or self.batch <= first_batch else 1)


@dataclass(frozen=True)
class Standing:
    """The state that a rank reports at each of its ticks.

    Attributes:
        quiet: seconds since its last mark, by its own ticks.
        patience: seconds after which that is too long.
        tick: how many it has counted.
        waits: whether it waits for other ranks, as far as Python shows.
        where: the file, line and function that it is in.
        reported: whether it found a hang, and wrote its stacks.
        left: whether its training has ended.
    """

    rank: int
    mark: Mark
    quiet: float
    patience: float
    tick: int = 0
    waits: bool = False
    where: str = ""
    reported: bool = False
    left: bool = False

    def __str__(self) -> str:
        return f"batch {self.mark.batch} ({self.mark.phase.value}{self.where and f', at {self.where}'})"


class Standings:
    """What one rank knows of all. It counts time in its own ticks, not by the clock: a job that is stopped and resumed
    as a whole loses none.

    Args:
        interval: seconds per tick.
        limit: seconds after which a rank that does not answer has hung, whatever it was doing.
        hosts: the machine of each rank; empty if there is only one.
    """

    def __init__(self, interval: float, limit: float = math.inf, hosts: Sequence[str] = ()):
        self.interval, self.limit, self.hosts = interval, limit, hosts
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
            return f"{self._named(silent)} {does} not answer since {silent[0]}"
        # of those that are least far, the ones that do not wait are what all wait for
        least = min((each.mark.passed, each.waits) for each in present)
        behind = [each for each in present if (each.mark.passed, each.waits) == least]
        others = [each for each in present if each not in behind]
        if not others:
            return f"{self._named(present)} wait in the same place, {present[0]}"
        is_stuck = f"{self._named(behind)} {'is' if len(behind) == 1 else 'are'} stuck at {behind[0]}"
        furthest = max(others, key=lambda each: each.mark.passed)
        ahead = f" at batch {furthest.mark.batch} ({furthest.mark.phase.value})" * (furthest.mark.passed > least[0])
        return f"{is_stuck}; {'the other rank waits' if len(others) == 1 else 'the other ranks wait'}{ahead}"

    def _named(self, standings: Sequence[Standing]) -> str:
        return named_ranks([each.rank for each in standings], self.hosts)


def span(seconds: float) -> str:
    """ "45 seconds", "10 minutes"."""
    return count_of(round(seconds / 60), "minute") if seconds >= 120 else count_of(round(seconds), "second")


def named_ranks(ranks: Sequence[int], hosts: Sequence[str] = ()) -> str:
    """ "rank 1 on node-b", "ranks 0, 1". `hosts` has the machine of each rank, or is empty."""
    named = ", ".join(f"{rank} on {hosts[rank]}" if hosts else str(rank) for rank in ranks[:_NAMED])
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {named}{more}"
