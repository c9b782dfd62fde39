"""`hyperparameters.amp`: the precision of the forward pass."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(amp: str | None, device: torch.device) -> torch.autocast:
    """PyTorch's autocast. What was trained in fp16 detects in float32 on a CPU, whose half precision is slower."""
    dtype = DTYPES.get(amp)
    if device.type != "cuda" and dtype == torch.float16:
        dtype = None
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
