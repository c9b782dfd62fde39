"""After which batches a training reports, validates and saves."""

from __future__ import annotations

from dataclasses import dataclass

from shared.config.schema import Length, Schedule
from shared.errors import UserError


@dataclass(frozen=True)
class Periods:
    """When something is due, in batches from 1 over the whole training.

    Attributes:
        report: batches between two reports.
        validation, checkpoint: batches between two of them; None for the end only.
        validation_start: the first validation, from which the others are counted; 0 for one period after the start.
        validation_changes: (batch, period): from this batch on, the validation period is another.
    """

    total: int
    report: int
    validation: int | None
    checkpoint: int | None
    validation_start: int = 0
    validation_changes: tuple[tuple[int, int], ...] = ()

    @property
    def validates_before_the_end(self) -> bool:
        return self.validation is not None or bool(self.validation_changes)

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
    """The schedule in batches. Reports are due at whole optimizer steps.

    Args:
        aggregation_frequency: batches per optimizer step.

    Raises:
        UserError: the training, a validation or a checkpoint would end in the middle of an optimizer step.
    """
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
