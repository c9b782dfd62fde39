"""A trial's context as `train` makes it: on the device that torch can use, whatever nvidia-smi lists."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from determined.pytorch import PyTorchTrialContext

from shared.training.context import trial_context
from shared.training.processes import local_processes


@contextlib.contextmanager
def local_context(config: dict[str, Any]) -> Iterator[PyTorchTrialContext]:
    with local_processes() as (distributed, device), trial_context(config, distributed, device) as context:
        yield context


def device_name(device: torch.device) -> str:
    """Of the device that was measured."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
