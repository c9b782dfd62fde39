"""The part of a trial that validates, and what becomes of a validation's numbers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from determined.pytorch import PyTorchCallback, PyTorchTrialContext
from torch import nn

from shared.data.loading import Batch, to_device
from shared.errors import UserError
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import summary_metrics
from shared.evaluation.reducer import ChiefReducer

if TYPE_CHECKING:
    from shared.training.trial import DetectionTrial

PICTURES = 4  # images that are kept to be drawn


class TrialValidation:
    """What a detector says of its detections, and the validation that comes of it.

    Attributes:
        last_validation: the numbers of the last validation; `category_ap` the AP of each category.
        validated_at: the batches trained until then.
        pictured: detections of the chief's first images in it, to be drawn.
    """

    iou_types: tuple[str, ...] = ("bbox",)

    context: PyTorchTrialContext
    plain_model: nn.Module
    ema: Any
    evaluator: ChiefReducer
    slots: int

    # --- what a detector says of itself ---------------------------------------------------------------

    @abstractmethod
    def detect(self, model: nn.Module, batch: Batch) -> list[Detections]:
        """The detections of each image of a prepared batch."""

    @abstractmethod
    def check_pretrained(self) -> None:
        """Raises UserError where the config's weights detect nothing, and no checkpoint is given."""

    def reported_metrics(self) -> list[str] | None:
        """The names that a validation reports, one of which the searcher goes by; None where they are not known."""
        return [f"{iou_type}_{name}" for iou_type in self.iou_types for name in summary_metrics(iou_type)]

    # --- validation -----------------------------------------------------------------------------------

    @property
    def evaluation_model(self) -> nn.Module:
        """The model that validates, is best and predicts: the averaged one where there is one."""
        return self.plain_model if self.ema is None else self.ema.module

    def evaluate_batch(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        detected = self.detect_on_host_batch(batch)
        self.evaluator.update(detected)
        if batch.skipped:
            self.evaluator.skip(batch.skipped)
        self._keep_to_draw(detected)
        return {}

    @torch.no_grad()
    def detect_on_host_batch(self, batch: Batch) -> list[Detections]:
        """The detections of a batch as the evaluation loader yields it."""
        model = self.evaluation_model.eval()
        batch = self.prepare(to_device(batch, self.context.device), None)
        with self.autocast():
            return self.detect(model, batch)

    def _keep_to_draw(self, detected: Iterable[Any]) -> None:
        kept = [found for found in detected if isinstance(found, Detections)]
        self.pictured += kept[: PICTURES - len(self.pictured)]

    def synchronize_buffers(self) -> None:
        """Gives every slot the chief's running statistics, which the checkpoint holds: DDP aligns them only at
        the next training step, and the averaged model's never."""
        if self.slots > 1:
            for model in dict.fromkeys((self.plain_model, self.evaluation_model)):
                for buffer in model.buffers():
                    torch.distributed.broadcast(buffer, src=0)


class ValidationResult(PyTorchCallback):
    """Keeps a validation's numbers, and leaves the master those that steer: it draws a chart for each name."""

    def __init__(self, trial: DetectionTrial):
        self.trial = trial

    def on_validation_start(self) -> None:
        self.trial.synchronize_buffers()
        self.trial.pictured = []

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        trial = self.trial
        trial.evaluator.raise_if_failed()
        wanted = trial.searcher_metric.name
        if wanted not in metrics:
            raise UserError(
                f"searcher.metric: {wanted!r} is not among the metrics that a validation gives: "
                f"{', '.join(map(repr, sorted(metrics)))}"
            )
        metrics.update({name: float(value) for name, value in metrics.items()})
        trial.category_ap = {name: metrics.pop(name) for name in list(metrics) if "_AP/" in name}
        trial.last_validation, trial.validated_at = dict(metrics), trial.batches_trained
        for name, value in trial.last_validation.items():
            if name != wanted and ("_AR_" in name or not math.isfinite(value)):
                del metrics[name]
