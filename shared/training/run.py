"""The interface that the engine needs from a run: a place for its reports and checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from shared.evaluation.gathered import ChiefReducer
from shared.training.saving import Snapshot
from shared.training.tensorboard import TensorBoard
from shared.training.validation import Validation


class Run:
    """Takes a training's reports and checkpoints. Only the chief calls a method, unless it says "on every rank".

    Attributes:
        trial_id: of the cluster's trial, 0 off a cluster. A checkpoint of another trial starts a new count of batches.
        handles_signals: whether SIGTERM and Ctrl-C stop the training after a batch.
        folder: for what a detector's library writes.
        code: the folder of the code that a checkpoint holds.
    """

    trial_id: int = 0
    handles_signals: bool = False
    folder: Path
    code: Path

    def begin(self, first_batch: int, profiling: bool) -> None:
        """Before the first batch, on every rank."""

    @abstractmethod
    def open_tensorboard(self, first_batch: int) -> SummaryWriter:
        """The writer of TensorBoard's files."""

    def set_status(self, status: str) -> None:
        """The current activity of the training, in a word."""

    @abstractmethod
    def report_training(self, batches: int, epochs: int, metrics: dict[str, float], steering: dict[str, float]) -> None:
        """The numbers since the last report. `steering` are the losses and the learning rate."""

    @abstractmethod
    def report_validation(self, validation: Validation, epochs: int, evaluator: ChiefReducer, is_best: bool) -> bool:
        """The numbers of a validation. Returns whether `checkpoint_policy` asks for a checkpoint of it."""

    def last_validation(self) -> int | None:
        """The batches of the last validation that an earlier start reported; None if unknown."""
        return None

    def earlier_value(self, batches: int, metric: str) -> float | None:
        """The value of a metric in the validation after `batches`; None if unknown."""
        return None

    def holds(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is this run's own."""
        return True

    @abstractmethod
    def store(self, snapshot: Snapshot, write_own: Callable[[Path], None]) -> None:
        """Writes a checkpoint; called in a thread. `write_own` adds the detector's own files to a folder."""

    def is_stopped_elsewhere(self) -> bool:
        """Whether the searcher stopped the trial."""
        return False

    def at_boundary(self, progress: float, tensorboard: TensorBoard | None) -> bool:
        """After reports and checkpoints, on every rank. Returns whether the cluster pauses the trial."""
        return False

    def finish(self, tensorboard: TensorBoard | None) -> None:
        """After the last checkpoint of this start, on every rank."""

    def close(self, is_saved: bool) -> None:
        """At the end, also of an error. `is_saved`: no checkpoint is being written."""
