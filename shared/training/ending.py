"""What the config ends a run by before its length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from determined.pytorch import PyTorchCallback

from shared.errors import count_of
from shared.experiment import EarlyStopping, SearcherMetric

if TYPE_CHECKING:
    from shared.training.trial import DetectionTrial


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
