"""Metrics that the chief computes of what all slots have seen."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from determined.pytorch import MetricReducer

from shared.errors import UserError

Gather = Callable[[Any], "list | None"]
"""Sends a slot's value to the chief, which gets all slots' values in the order of ranks; the others get None. Every
slot calls it. Determined's is `context.distributed.gather`."""


def alone(share: Any) -> list:
    """The `Gather` of a single process."""
    return [share]


@dataclass
class _Failure:
    """What went wrong on some slot, as every slot gets it."""

    message: str
    is_user_error: bool


class ChiefReducer(MetricReducer):
    """A metric that the chief computes of what all slots have seen, and that no error of it leaves.

    What `per_slot_reduce` returns Determined sends to every slot, and prints where `cross_slot_reduce` raises. So the
    first does everything: the slots' shares go to the chief alone, and it returns the metrics, or what went wrong,
    which `raise_if_failed` raises on every slot.

    Args:
        gather: the way to the chief; `alone` where there is one process.
    """

    def __init__(self, gather: Gather = alone):
        self.gather = gather
        self._failure: _Failure | None = None
        self._cause: Exception | None = None

    @abstractmethod
    def share(self) -> Any:
        """What this slot has seen, small to send: arrays rather than objects."""

    @abstractmethod
    def metrics_of(self, shares: list) -> dict[str, float]:
        """The metrics of all slots' shares, in the order of ranks; called on the chief only."""

    def per_slot_reduce(self) -> dict[str, float] | _Failure | None:
        """The metrics on the chief, None on the other slots; what failed where something did."""
        shares = self.gather(self._carried(self.share))
        if shares is None:
            return None
        failed = [share for share in shares if isinstance(share, _Failure)]
        return failed[0] if failed else self._carried(self.metrics_of, shares)

    def cross_slot_reduce(self, per_slot_metrics: Sequence[dict[str, float] | _Failure | None]) -> dict[str, float]:
        """The metrics, on every slot; {} where they failed, see `raise_if_failed`."""
        chief = per_slot_metrics[0]
        self._failure = chief if isinstance(chief, _Failure) else None
        return {} if self._failure else chief

    def raise_if_failed(self) -> None:
        """Raises on every slot what went wrong on one, after `cross_slot_reduce`.

        Raises:
            UserError: it was one.
            RuntimeError: anything else; where it went wrong, from the error itself.
        """
        if self._failure is not None:
            error = UserError if self._failure.is_user_error else RuntimeError
            raise error(self._failure.message) from self._cause

    def compute(self) -> dict[str, float]:
        """The metrics of what a single process has seen."""
        metrics = self.cross_slot_reduce([self.per_slot_reduce()])
        self.raise_if_failed()
        return metrics

    def _carried(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        self._cause = None
        try:
            return compute(*arguments)
        except UserError as error:
            self._cause = error
            return _Failure(str(error), is_user_error=True)
        except Exception as error:  # whatever it is, all slots must hear of it
            self._cause = error
            return _Failure(f"the evaluation failed: {type(error).__name__}: {error}", is_user_error=False)
