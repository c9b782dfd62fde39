"""The error if a GPU's memory is not enough: what takes it, and a smaller batch that trains the same."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from shared.errors import UserError


@contextlib.contextmanager
def out_of_memory_as(explain: Callable[[torch.cuda.OutOfMemoryError], UserError]) -> Iterator[None]:
    """Raises what `explain` returns if the GPU's memory is not enough."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise explain(error) from error


def out_of_memory(
    where: str,
    images: Any,
    fix: str,
    model: torch.nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    device: torch.device,
) -> UserError:
    """The error of a batch, with what to do. `images` are (B, …, height, width), or a list of (…, height, width)."""
    kept, peak = bytes_kept(model, optimizers), torch.cuda.max_memory_allocated(device)
    whole = torch.cuda.get_device_properties(device).total_memory
    sizes = _sizes_of(images)
    pixels = f" of {sizes} pixels" if sizes else ""
    return UserError(
        f"CUDA out of memory in {where}{pixels}: weights, gradients and optimizer take {_gib(kept)}, the batch takes "
        f"{_gib(max(peak - kept, 0))} and what did not fit, of {_gib(whole)}. Fix: {fix}"
    )


def out_of_memory_anywhere(error: torch.cuda.OutOfMemoryError) -> UserError:
    """The error outside of a batch: when a model is moved to the device, for example."""
    said = str(error).strip().partition("\n")[0].partition(" If reserved but")[0].rstrip(".")
    return UserError(
        f"{said}. Fix: stop other programs that use this GPU (`nvidia-smi` lists them), or give a smaller "
        "hyperparameters.global_batch_size, or hyperparameters.amp"
    )


def smaller_batch(per_slot_batch_size: int, slots: int, aggregation_frequency: int | None) -> str:
    """What to do about a batch that is too large. `aggregation_frequency` is None to evaluate or predict."""
    smaller = max((n for n in range(1, per_slot_batch_size) if per_slot_batch_size % n == 0), default=None)
    if smaller is None:
        return "a slot has one image already; give smaller images, or hyperparameters.amp"
    if aggregation_frequency is None:
        return f"--set hyperparameters.global_batch_size={smaller * slots} detects on fewer images at a time"
    frequency = aggregation_frequency * (per_slot_batch_size // smaller)
    return (
        f"hyperparameters.global_batch_size: {smaller * slots} with optimizations.aggregation_frequency: {frequency} "
        "has the same images in a step, and hyperparameters.amp takes less"
    )


def bytes_kept(model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of weights, buffers, gradients and optimizer state."""
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


# of GNU's C library, malloc.h
TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes: what it comes to by itself, as large tensors are freed
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Makes GNU's C library keep the memory that a training on the CPU frees, for its next step.

    By default it returns free memory at the end of its heap to the system, which is most of a step's memory. The next
    step then waits until the system has mapped and zeroed it again, 4 kB at a time. The peak stays the same.
    """
    if any(name in os.environ for name in _USERS_OWN):
        return
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        # the first one said ends the adaption of both
        mallopt(_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(TRIM_THRESHOLD, -1)  # never
