"""Deformable convolutions, of both versions, by torchvision's: differentiable on the CPU and on GPUs."""

from __future__ import annotations

import torchvision
from torch import Tensor
from torch.nn.modules.utils import _pair

Pair = int | tuple[int, int]


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deformable_groups: int = 1,
    im2col_step: int = 64,
) -> Tensor:
    """Deformable convolution, version 1; `detectron2.layers.deform_conv.deform_conv` with its arguments in its order.

    Args:
        input: (N, C, H, W); N may be 0.
        offset: (N, 2 · deformable_groups · kH · kW, H', W') pixels that each tap is moved by, y before x.
        weight: (O, C / groups, kH, kW).
        groups, deformable_groups: as the shapes of `weight` and `offset` say; not asked for again.
        im2col_step: of upstream's kernel; means nothing here.

    Returns:
        (N, O, H', W'), of the size of the plain convolution.

    Raises:
        ValueError: the input has not four dimensions, or is smaller than the kernel.
    """
    return _convolve(input, offset, None, weight, None, stride, padding, dilation)


def modulated_deform_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deformable_groups: int = 1,
) -> Tensor:
    """Deformable convolution, version 2; `detectron2.layers.deform_conv.modulated_deform_conv`.

    Args:
        mask: (N, deformable_groups · kH · kW, H', W'), what each tap is multiplied by.
        bias: (O,) or None. The others as for `deform_conv`.
    """
    return _convolve(input, offset, mask, weight, bias, stride, padding, dilation)


def _convolve(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    if input.dim() != 4:
        raise ValueError(f"Expected 4D tensor as input, got {input.dim()}D tensor instead.")
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    size = [
        (side + 2 * pad - step * (kernel - 1) - 1) // skip + 1
        for side, pad, step, kernel, skip in zip(
            input.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
        )
    ]
    if min(size) <= 0:
        raise ValueError(f"convolution input is too small (output would be {size[0]}x{size[1]})")
    if not len(input):
        # torchvision's has no gradient there; a sum over nothing leaves every parameter in the graph, as under DDP
        nothing = sum(tensor.sum() for tensor in (input, offset, mask, weight, bias) if tensor is not None)
        return input.new_zeros(0, len(weight), *size) + 0 * nothing
    return torchvision.ops.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
