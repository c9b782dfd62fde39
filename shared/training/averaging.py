"""`hyperparameters.model_ema_decay`: averaged weights."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn


class AveragedWeights:
    """The exponential moving average of a model's weights and running statistics.

    After step n, counted from 0, the decay is at most (1 + n) / (10 + n), as that of TensorFlow's
    `ExponentialMovingAverage`, with which EfficientDet was published: a short run's average is not its initial weights.

    Args:
        decay: of the average, in [0, 1).
        steps: optimizer steps that it has averaged before this start.

    Attributes:
        module: the averaged model, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float, steps: int = 0):
        self.module = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = steps
        state = model.state_dict()
        self._averaged = [name.rpartition(".") for name in state if state[name].is_floating_point()]
        self._copied = [name.rpartition(".") for name in state if not state[name].is_floating_point()]
        self._own_modules = _modules(self.module)
        self._modules_of: tuple[nn.Module | None, dict[str, nn.Module]] = (None, {})

    def begin(self, model: nn.Module) -> None:
        """Starts the average from the model's weights, and its decay's warm-up too."""
        self.module.load_state_dict(model.state_dict())
        self.steps = 0

    def load(self, weights: Mapping[str, Any], steps: int | None) -> None:
        """Continues the average of a checkpoint.

        Args:
            steps: that it has averaged; None in older checkpoints, whose average began with the run.
        """
        self.module.load_state_dict(weights)
        self.steps = self.steps if steps is None else steps

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the weights in, after an optimizer step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        if self._modules_of[0] is not model:
            self._modules_of = model, _modules(model)
        own, new = self._own_modules, self._modules_of[1]
        torch._foreach_lerp_(_tensors(own, self._averaged), _tensors(new, self._averaged), 1 - decay)
        if self._copied:
            torch._foreach_copy_(_tensors(own, self._copied), _tensors(new, self._copied))


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _tensors(modules: dict[str, nn.Module], names: list[tuple[str, str, str]]) -> list[torch.Tensor]:
    """Those of a state dict, by their modules: `state_dict` itself takes as long as the average of a small detector."""
    return [getattr(modules[path], name) for path, _, name in names]
