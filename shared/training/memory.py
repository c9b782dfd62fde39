"""A GPU's memory that was not enough: what took it, and the smaller batch that learns the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from shared.errors import UserError, count_of


def out_of_memory(
    batch_number: int,
    images: Any,
    per_slot_batch_size: int,
    slots: int,
    aggregation_frequency: int,
    kept: int,
    peak: int,
    whole: int,
) -> UserError:
    """The error of a batch, counted from 0.

    Args:
        images: of the batch: (B, …, height, width), or a list of (…, height, width).
        kept: bytes of weights, gradients and the optimizer's state; see `bytes_kept`.
        peak: bytes that were taken at most; whole: those of the device.
    """
    smaller = max((n for n in range(1, per_slot_batch_size) if per_slot_batch_size % n == 0), default=None)
    if smaller is None:
        advice = "A slot has one image already: smaller images or hyperparameters.amp take less"
    else:
        frequency = aggregation_frequency * (per_slot_batch_size // smaller)
        advice = (
            f"hyperparameters.global_batch_size: {smaller * slots} with optimizations.aggregation_frequency: "
            f"{frequency} has the same images in a step, and hyperparameters.amp takes less"
        )
    sizes = _sizes_of(images)
    pixels = f" of {sizes} pixels" if sizes else ""
    return UserError(
        f"CUDA out of memory in batch {batch_number + 1}, {count_of(per_slot_batch_size, 'image')} a slot{pixels}: "
        f"weights, gradients and optimizer take {_gib(kept)}, the batch {_gib(max(peak - kept, 0))} and what did not "
        f"fit, of {_gib(whole)}. {advice}. The last checkpoint is whole"
    )


def bytes_kept(model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Of weights, buffers, gradients and optimizer state."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _sizes_of(images: Any) -> str:
    """ "1333 × 800", or "640 × 480 to 1333 × 800" of several sizes; width first."""
    tensors = images if isinstance(images, list | tuple) else [images]
    found = {(t.shape[-1], t.shape[-2]) for t in tensors if isinstance(t, torch.Tensor) and t.ndim >= 3}
    ordered = sorted(found, key=lambda size: size[0] * size[1])
    return " to ".join(dict.fromkeys(f"{width} × {height}" for width, height in (*ordered[:1], *ordered[-1:])))


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
