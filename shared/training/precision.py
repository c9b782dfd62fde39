"""`hyperparameters.amp`: the precision of the forward pass."""

from __future__ import annotations

import functools

import torch
from torch import nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(amp: str | None, device: torch.device) -> torch.autocast:
    """PyTorch's autocast. What was trained in fp16 detects in float32 on a CPU, whose half precision is slower."""
    dtype = DTYPES.get(amp)
    if device.type != "cuda" and dtype == torch.float16:
        dtype = None
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def train_depthwise_in_float32(model: nn.Module) -> None:
    """Has depthwise convolutions trained in float32, between tensors of the type that they are given.

    For a training in bf16 on a CPU, where oneDNN takes four times as long for their gradients in bf16 as in float32
    (EfficientDet-D0's at 512 pixels in channels_last, PyTorch 2.11).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
            module.__class__ = _trained_in_float32(type(module))


@functools.cache
def _trained_in_float32(convolution: type[nn.Conv2d]) -> type[nn.Conv2d]:
    # another class, and no function in the module's place: a copy of the module is one of its own
    class TrainedInFloat32(convolution):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled():
                return super().forward(images)
            with torch.autocast(images.device.type, enabled=False):
                return super().forward(images.float()).to(images.dtype)

    TrainedInFloat32.__name__, TrainedInFloat32.__qualname__ = convolution.__name__, convolution.__qualname__
    return TrainedInFloat32
