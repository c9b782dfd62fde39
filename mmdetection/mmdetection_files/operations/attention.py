"""Multi-scale deformable attention (https://arxiv.org/abs/2010.04159), which mmcv has in PyTorch for the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward"]

_Sizes = list[list[int]]
_latest: tuple[Callable[[], Tensor | None], _Sizes] = (lambda: None, [])  # the sizes read last, and their tensor


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """(N, queries, channels), of the shapes that mmcv.ops.multi_scale_deform_attn documents."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch  # imports mmcv._ext itself

    return multi_scale_deformable_attn_pytorch(value, _sizes_of(spatial_shapes), sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Writes the derivatives by the values, the locations and the weights; computes the output once more for it."""
    inputs = [given.detach().requires_grad_() for given in (value, sampling_locations, attention_weights)]
    with torch.enable_grad():
        output = ms_deform_attn_forward(inputs[0], spatial_shapes, level_start_index, inputs[1], inputs[2], im2col_step)
    derivatives = torch.autograd.grad(output, inputs, grad_output)
    for kept, derivative in zip((grad_value, grad_sampling_loc, grad_attn_weight), derivatives, strict=True):
        kept.copy_(derivative)


def _sizes_of(spatial_shapes: Tensor) -> _Sizes:
    """The tensor's numbers on the host. All layers of a model are given the same tensor, forward and backward: on a
    GPU the host waits once for it, not once per layer and direction. The caller must not write into it."""
    global _latest
    tensor, sizes = _latest
    if tensor() is not spatial_shapes:
        sizes = spatial_shapes.tolist()
        _latest = weakref.ref(spatial_shapes), sizes
    return sizes
