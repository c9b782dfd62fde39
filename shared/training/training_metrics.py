"""Loss and speed since the last report, summed on the device: one synchronization per report, none per step."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from determined.pytorch import MetricReducer
from tqdm import tqdm

from shared.errors import DivergedError

# a scale of fp16 that starts at 65536 is 1 after as many: what overflows still is no matter of the scale
STEPS_A_SCALE_MAY_SKIP = 16


@dataclass
class _SlotReport:
    sums: dict[str, float]
    batches: int
    images: int
    seconds: float
    waiting: float
    first_bad: tuple[int, list[int]] | None
    skipped: int


class TrainingMetrics(MetricReducer):
    """Means of the losses, images/s over all slots, and the first batch whose loss was not finite. The means omit
    batches whose step a GradScaler skipped.

    Args:
        counts_skipped: report how many images were skipped too.

    Attributes:
        last: all numbers of the last report, on every slot. A reduction returns those that steer, the losses
            and the learning rate: the master draws one chart per name.
    """

    def __init__(self, counts_skipped: bool = False) -> None:
        self.counts_skipped = counts_skipped
        self._lr = self._waited = 0.0
        self.last: dict[str, float] = {}
        self._slots: list[_SlotReport] = []
        self._begun: dict[str, Any] | None = None
        self._in_a_row: torch.Tensor | int = 0  # batches without a finite loss, up to the last
        self.reset()

    def reset(self) -> None:
        self._sums: torch.Tensor | None = None
        self._names: list[str] = []
        self._first_bad: torch.Tensor | None = None
        self._image_ids: list[list[int]] = []
        self._dropped: torch.Tensor | None = None
        self._first_batch = self._skipped = self._before = 0
        self._started = time.perf_counter()
        self._waited_before = self._waited

    def update(
        self,
        losses: Mapping[str, torch.Tensor],
        batch_number: int,
        image_ids: list[int],
        skipped: int = 0,
        may_skip: int = 0,
        lr: float = 0.0,
        waited: float = 0.0,
    ) -> None:
        """Adds one batch. Nothing is read from the device.

        Args:
            skipped: images that it lacks.
            may_skip: how many batches in a row may have no finite loss: a GradScaler skips their steps.
            waited: seconds that this process has spent waiting for data, in all.
        """
        self._lr, self._waited = lr, waited
        names = list(losses)
        values = torch.stack([losses[name].detach().float() for name in names])
        position = len(self._image_ids)
        if self._sums is None:
            self._names, self._first_batch = names, batch_number
            self._sums = torch.zeros_like(values)
            self._first_bad = torch.full((), -1, dtype=torch.int64, device=values.device)
            self._dropped = torch.zeros_like(self._first_bad)
            self._take_up_begun()
        is_bad = ~values.isfinite().all()
        self._in_a_row = (self._in_a_row + 1) * is_bad
        is_first_bad = (self._first_bad < 0) & (self._in_a_row > may_skip)
        self._first_bad += is_first_bad * (position + 1)
        if may_skip:
            values = torch.where(is_bad, 0, values)
            self._dropped += is_bad
        self._sums += values
        self._image_ids.append(image_ids)
        self._skipped += skipped

    def per_slot_reduce(self) -> _SlotReport:
        sums, first_bad, dropped = {}, None, 0
        if self._sums is not None:
            counts = torch.stack([self._first_bad, self._dropped]).double()
            *values, position, dropped = torch.cat([self._sums.double(), counts]).tolist()
            sums = dict(zip(self._names, values, strict=True))
            if position >= 0:
                first_bad = (self._first_batch + int(position), self._image_ids[int(position)])
        return _SlotReport(
            sums=sums,
            batches=self._before + len(self._image_ids) - int(dropped),
            images=sum(map(len, self._image_ids)),
            seconds=time.perf_counter() - self._started,
            waiting=self._waited - self._waited_before,
            first_bad=first_bad,
            skipped=self._skipped,
        )

    def cross_slot_reduce(self, per_slot_metrics: Sequence[_SlotReport]) -> dict[str, Any]:
        slots = self._slots = list(per_slot_metrics)
        batches = sum(slot.batches for slot in slots)
        if not batches:
            self.last = {}
            return {}
        seconds = max(slot.seconds for slot in slots)
        metrics = {name: sum(slot.sums.get(name, 0.0) for slot in slots) / batches for name in slots[0].sums}
        metrics["lr"] = self._lr
        steering = {name: value for name, value in metrics.items() if "loss" in name or name == "lr"}
        metrics["images_per_second"] = sum(slot.images for slot in slots) / seconds
        metrics["data_wait"] = max(slot.waiting for slot in slots) / seconds
        if self.counts_skipped:
            metrics["skipped_images"] = sum(slot.skipped for slot in slots)
        self.last = metrics
        return steering

    def raise_if_diverged(self) -> None:
        """Raises DivergedError on every slot if a batch since the last report had no finite loss."""
        bad = [slot.first_bad for slot in self._slots if slot.first_bad is not None]
        if bad:
            raise diverged(*min(bad))

    def begun(self) -> list[dict[str, Any]]:
        """What each slot had added up at the last reduction, for a report that a stop or a save cut short."""
        return [{"sums": slot.sums, "batches": slot.batches, "skipped": slot.skipped} for slot in self._slots]

    def continue_with(self, begun: Sequence[dict[str, Any]], rank: int, slots: int) -> None:
        """Takes what `begun` gave into the next report, slot by slot. If the number of slots changed, the first slot
        takes all of it."""
        if len(begun) == slots:
            self._begun = begun[rank]
        elif begun and rank == 0:
            scale = slots / len(begun)
            self._begun = {
                "sums": {name: scale * sum(slot["sums"][name] for slot in begun) for name in begun[0]["sums"]},
                "batches": scale * sum(slot["batches"] for slot in begun),
                "skipped": sum(slot["skipped"] for slot in begun),
            }

    def _take_up_begun(self) -> None:
        begun, self._begun = self._begun, None
        if begun is not None and begun["sums"].keys() == set(self._names):
            self._sums += torch.tensor([begun["sums"][name] for name in self._names], device=self._sums.device)
            self._before, self._skipped = begun["batches"], begun["skipped"]


def diverged(batch_number: int, image_ids: Sequence[int]) -> DivergedError:
    """The error of a batch, counted from 0, whose loss is not finite."""
    return DivergedError(
        f"the loss is not finite since batch {batch_number + 1} (image ids {', '.join(map(str, image_ids))}). "
        "Fix: lower the learning rate, clip the gradients, or use bf16 instead of fp16. If it is always this batch, "
        "look at its annotations"
    )


logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """The progress bar of a run, or of other work in steps from `first` to `total`. Without a terminal, lines."""

    def __init__(self, first: int, total: int, unit: str = "batch"):
        self.first, self.total, self.unit = first, total, unit
        self.batches, self.text = first, ""
        self.started = self.last_line = time.monotonic()
        # `disable=None`: without a terminal
        self.bar = tqdm(initial=first, total=total, unit=unit, mininterval=0.5, dynamic_ncols=True, disable=None)

    def update(self, count: int = 1) -> None:
        """Counts `count` more batches."""
        self.batches += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            seconds = (now - self.started) / (self.batches - self.first) * (self.total - self.batches)
            left = timedelta(seconds=int(seconds))
            text = self.text and f", {self.text}"
            logger.info("%s %d of %d%s, %s left", self.unit, self.batches, self.total, text, left)

    def describe(self, text: str) -> None:
        """Sets the text of the bar or the line, besides the batches."""
        self.text = text
        self.bar.set_postfix_str(text)

    def close(self) -> None:
        self.bar.close()
