"""The part of a trial that says what a checkpoint holds beside weights and optimizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from determined.pytorch import PyTorchCallback
from torch import nn

from shared.errors import DivergedError, UserError
from shared.training.checkpoints import CATEGORIES_FILE
from shared.training.resume import BuiltOptimizer, merged
from shared.training.saving import python_state, restore_python_state

if TYPE_CHECKING:
    from shared.training.trial import DetectionTrial


class TrialCheckpoint:
    """What a detector keeps in a checkpoint, and how it takes one up."""

    path_hyperparameters: tuple[str, ...] = ()
    """Hyperparameters that may be paths, relative to where the run is started."""
    without_pretrained: ClassVar[dict[str, Any]] = {}
    """The hyperparameters of a model whose weights a checkpoint will give."""
    python_attributes: ClassVar[Mapping[str, Sequence[str]]] = {}
    """By the class of a module, what it keeps in plain attributes while it trains, see `python_state`."""

    optimizer_key: str = "hyperparameters.opt"
    """Where the optimizer's class is chosen, for an error message."""
    weights_key: str = "hyperparameters.weights"
    """Where a new run names the weights that it starts from, for an error message."""

    plain_model: nn.Module
    built_optimizer: BuiltOptimizer

    @classmethod
    def hyperparameters_of_checkpoint(cls, checkpoint: Path, own: Mapping[str, Any]) -> dict[str, Any]:
        """What takes the place of a checkpoint's hyperparameters, to detect with it.

        Args:
            own: the hyperparameters of the user's config, which alone may name code.
        """
        return cls.without_pretrained

    def save_own_config(self, folder: Path) -> None:
        """Writes the detector's own configuration, resolved, into the run's or a checkpoint's folder."""

    def own_state(self) -> dict[str, Any]:
        """What must outlive a restart beside weights and buffers, a schedule's state for one: plain values and
        tensors."""
        return python_state(self.plain_model, self.python_attributes)

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes back what `own_state` gave."""
        restore_python_state(self.plain_model, state)

    def resumed_optimizer(self, saved: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
        """The optimizer state to load, see `BuiltOptimizer.resumed`.

        Args:
            saved: the checkpoint's; training: the state of its `CheckpointedState`.

        Raises:
            UserError: this run's optimizer cannot use it.
        """
        began = BuiltOptimizer(**training["optimizer"]) if "optimizer" in training else None
        try:
            return self.built_optimizer.resumed(saved, began)
        except ValueError as problem:
            raise UserError(
                f"{self.optimizer_key}: {problem}. Fix: keep the checkpoint's value, or start a new run with "
                f"{self.weights_key}: <the checkpoint's path>"
            ) from problem


class CheckpointedState(PyTorchCallback):
    """The averaged weights, the detector's own state, what may end the run, and what a stop left begun; nothing that is
    not finite."""

    def __init__(self, trial: DetectionTrial):
        self.trial = trial
        self.built_scaler = None if trial.scaler is None else trial.scaler.state_dict()
        # an attention mask of -inf, say, is as it should be
        self.never_finite = {name for name, tensor in self._tensors() if not tensor.isfinite().all()}

    def state_dict(self) -> dict[str, Any]:
        trial = self.trial
        return {
            "ema": None if trial.ema is None else trial.ema.module.state_dict(),
            "ema_steps": None if trial.ema is None else trial.ema.steps,
            "optimizer": dict(vars(trial.built_optimizer)),
            "scaler": self.built_scaler,
            "batches_per_epoch": trial.batches_per_epoch,
            "last_validation": {name: float(value) for name, value in trial.last_validation.items()},
            "own": trial.own_state(),
            "patience": trial.patience.state(),
            "seconds": trial.stopping.clock.seconds,
            "begun_report": [] if trial.report_is_whole() else trial.training_metrics.begun(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        trial = self.trial
        if trial.ema is not None:
            if state["ema"] is None:
                trial.ema.begin(trial.plain_model)
            else:
                trial.ema.load(state["ema"], state.get("ema_steps"))
        trial.last_validation = dict(state["last_validation"])
        trial.load_own_state(state["own"])
        trial.patience.load(state.get("patience") or {})
        trial.stopping.clock.before = state.get("seconds", 0.0)
        if begun := state.get("begun_report"):
            trial.training_metrics.go_on_with(begun, trial.rank, trial.slots)

    def on_checkpoint_load_start(self, checkpoint: dict[str, Any]) -> None:
        # loaded next: this run's config wins
        training = checkpoint["callbacks"]["training"]
        (saved,) = checkpoint["optimizers_state_dict"]
        checkpoint["optimizers_state_dict"] = [self.trial.resumed_optimizer(saved, training)]
        if self.built_scaler and "scaler_state_dict" in checkpoint:
            began = training.get("scaler") or self.built_scaler
            checkpoint["scaler_state_dict"] = merged(self.built_scaler, began, checkpoint["scaler_state_dict"])

    def on_checkpoint_save_start(self, checkpoint: dict[str, Any]) -> None:
        checked = [tensor for name, tensor in self._tensors() if name not in self.never_finite]
        # the largest of each: one number a tensor, and one synchronisation in all
        if not torch.stack([tensor.abs().max().float() for tensor in checked]).isfinite().all():
            raise DivergedError(
                "the weights, their averages or the running statistics are not finite, and were not saved; the last "
                "checkpoint is from before"
            )

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What trains and what validates, with the statistics of its normalisation."""
        for model in dict.fromkeys((self.trial.plain_model, self.trial.evaluation_model)):
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point() and tensor.numel():
                    yield f"{id(model)} {name}", tensor

    def on_checkpoint_write_end(self, checkpoint_dir: str) -> None:
        (Path(checkpoint_dir) / CATEGORIES_FILE).write_text(json.dumps(self.trial.categories))
        self.trial.save_own_config(Path(checkpoint_dir))
