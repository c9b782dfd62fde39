"""Deformable convolution v1 and v2 (https://arxiv.org/abs/1703.06211, 1811.11168), by torchvision's operators.

The offsets are (N, deformable groups x kernel height x kernel width x 2, H', W'), each y then x, the mask half as
many channels: both libraries have the layout of the authors' code (mmcv/ops/deform_conv.py, modulated_deform_conv.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
]


# mmcv's names of what torchvision's operators take in this order, of v1 and v2
_SIZES = (
    ("dH", "dW", "padH", "padW", "dilationH", "dilationW", "group", "deformable_group"),
    ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "group", "deformable_group"),
)


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **sizes: int
) -> None:
    """Writes the convolution of (N, C, H, W) into the (N, C', H', W') `output`."""
    output.copy_(_forward(input, weight, offset, None, None, sizes))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **sizes: int,
) -> None:
    """Writes the derivatives by the input and the offsets; leaves that by the weight in the scratch `columns`."""
    by_input, by_weight, by_offset, _, _ = _backward(grad_output, input, weight, offset, None, None, sizes)
    grad_input.copy_(by_input)
    grad_offset.copy_(by_offset)
    # torchvision has one operator for all derivatives, mmcv calls for the weight's next, with the same scratch
    columns.set_(by_weight)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float,
    **sizes: int,
) -> None:
    """Adds the derivative by the weight."""
    if columns.shape != grad_weight.shape:  # the input and the offsets need no derivative
        columns = _backward(grad_output, input, grad_weight, offset, None, None, sizes)[1]
    grad_weight.add_(columns, alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **sizes: int,
) -> None:
    """Writes the convolution of (N, C, H, W) into the (N, C', H', W') `output`."""
    offset, mask = _as_read(offset, output.shape), _as_read(mask, output.shape)
    output.copy_(_forward(input, weight, offset, mask, bias if with_bias else None, sizes))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **sizes: int,
) -> None:
    """Writes the derivatives by all of them."""
    read = (_as_read(offset, grad_output.shape), _as_read(mask, grad_output.shape))
    by_input, by_weight, by_offset, by_mask, by_bias = _backward(
        grad_output, input, weight, *read, bias if with_bias else None, sizes
    )
    grad_input.copy_(by_input)
    grad_weight.copy_(by_weight)
    _as_read(grad_offset, grad_output.shape).copy_(by_offset)
    _as_read(grad_mask, grad_output.shape).copy_(by_mask)
    if with_bias:
        grad_bias.copy_(by_bias)


def _as_read(given: Tensor, output: torch.Size) -> Tensor:
    """Offsets or a mask that are larger than the output, as mmcv reads them: an image's numbers one after the other.

    DyHead (mmdet/models/necks/dyhead.py) has such, of the level below, and was trained so.
    """
    if given.shape[2:] == output[2:]:
        return given
    shape = (given.shape[1], *output[2:])
    return given.flatten(1)[:, : shape[0] * shape[1] * shape[2]].view(-1, *shape)


def _forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sizes: Mapping[str, int],
) -> Tensor:
    return torch.ops.torchvision.deform_conv2d(input, weight, offset, *_given(input, weight, mask, bias, sizes))


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sizes: Mapping[str, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = _given(input, weight, mask, bias, sizes)
    return torch.ops.torchvision._deform_conv2d_backward(grad_output.contiguous(), input, weight, offset, *given)


def _given(
    input: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, sizes: Mapping[str, int]
) -> tuple[Any, ...]:
    """The rest of what the operators take, with what torchvision.ops.deform_conv2d has for a mask or bias that is not
    given."""
    return (
        input.new_zeros(input.shape[0], 1) if mask is None else mask,
        weight.new_zeros(weight.shape[0]) if bias is None else bias,
        *(sizes[name] for name in _SIZES[mask is not None]),
        mask is not None,
    )
