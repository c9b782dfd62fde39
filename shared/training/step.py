"""The optimizer step: DistributedDataParallel, gradient accumulation, clipping and the scaler of fp16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from determined.pytorch import PyTorchTrialContext
from torch import nn
from torch.nn.parallel import DistributedDataParallel

Clip = Callable[[Sequence[nn.Parameter]], object]


def wrap_model(context: PyTorchTrialContext, model: nn.Module, find_unused_parameters: bool) -> nn.Module:
    """The model on its device; in DDP if there are several slots.

    `context.wrap_model` passes no option to DDP. Without `find_unused_parameters`, a model that does not use all of its
    parameters in each step fails with "Expected to have finished reduction in the prior iteration".
    """
    if context.distributed.size == 1 or not find_unused_parameters:
        return context.wrap_model(model)
    wrapped = DistributedDataParallel(model.to(context.device), find_unused_parameters=True)
    context.models.append(wrapped)
    return wrapped


def accumulating(model: nn.Module, ends_step: bool) -> AbstractContextManager:
    """For the forward and backward pass of a batch: DDP averages gradients over slots only in the batch that ends an
    optimizer step."""
    return nullcontext() if ends_step or not hasattr(model, "no_sync") else model.no_sync()


def step(
    optimizer: torch.optim.Optimizer, batches: int, clip: Clip | None, scaler: torch.amp.GradScaler | None
) -> None:
    """One optimizer step with the mean gradients of `batches` batches; then zeroes the gradients.

    Args:
        clip: clips the gradients of the parameters that it is given, in place.
        scaler: what scaled the loss. It may skip the step.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if batches > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(float(batches))
    if clip is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        clip(parameters)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
