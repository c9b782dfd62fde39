"""`hyperparameters.model_ema_decay`: averaged weights."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn


class AveragedWeights:
    """The exponential moving average of a model's weights and running statistics.

    After step n, counted from 0, the decay is at most (1 + n) / (10 + n), as that of TensorFlow's
    `ExponentialMovingAverage`, with which EfficientDet was published: a short run's average is not its initial weights.

    Args:
        decay: of the average, in [0, 1).
        steps: optimizer steps that were taken before this start.

    Attributes:
        module: the averaged model, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float, steps: int = 0):
        self.module = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = steps

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the weights in, after an optimizer step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        own, new = self.module.state_dict(), model.state_dict()
        averaged = [name for name, tensor in own.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([own[name] for name in averaged], [new[name] for name in averaged], 1 - decay)
        for name in own.keys() - set(averaged):
            own[name].copy_(new[name])
