"""CARAFE, content-aware upsampling (https://arxiv.org/abs/1905.02188, mmcv/ops/carafe.py), which mmcv-full has for CUDA
only.

Features are (N, C, H, W), masks (N, groups x k x k, H x scale, W x scale), the output (N, C, H x scale, W x scale):
each output pixel is the sum over the k x k features around its own, weighed by its k x k mask.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

__all__ = ["carafe_backward", "carafe_forward", "carafe_naive_backward", "carafe_naive_forward"]


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Writes the upsampled features into `output`."""
    _, channels, height, width = features.shape
    padded, weights = _laid_out(features, masks, kernel_size, group_size, scale_factor)
    upsampled = output.view(-1, group_size, channels // group_size, height, scale_factor, width, scale_factor).zero_()
    for place, rows, columns in _places(kernel_size, height, width):
        upsampled.addcmul_(padded[..., rows, columns][:, :, :, :, None, :, None], weights[:, :, place, None])


def carafe_naive_backward(
    grad_output: Tensor,
    features: Tensor,
    masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Writes the derivatives by the features and by the masks."""
    _, channels, height, width = features.shape
    padded, weights = _laid_out(features, masks, kernel_size, group_size, scale_factor)
    by_output = grad_output.reshape(-1, group_size, channels // group_size, height, scale_factor, width, scale_factor)
    by_padded = padded.new_zeros(padded.shape)
    by_weights = grad_masks.view(weights.shape)
    for place, rows, columns in _places(kernel_size, height, width):
        by_padded[..., rows, columns] += (by_output * weights[:, :, place, None]).sum((4, 6))
        seen = padded[..., rows, columns][:, :, :, :, None, :, None]
        by_weights[:, :, place] = (by_output * seen).sum(2)
    half = kernel_size // 2
    grad_input.copy_(by_padded[..., half : half + height, half : half + width].reshape(grad_input.shape))


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Writes the upsampled features into `output`, and what `carafe_backward` needs into `rfeatures`."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    grad_output: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rgrad_output: Tensor,
    rgrad_input_hs: Tensor,
    rgrad_input: Tensor,
    rgrad_masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Writes the derivatives by the features and by the masks."""
    carafe_naive_backward(grad_output, rfeatures, masks, grad_input, grad_masks, kernel_size, group_size, scale_factor)


def _laid_out(features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> tuple[Tensor, Tensor]:
    """Features with zeros around, (N, groups, C / groups, H + k - 1, W + k - 1), and masks as (N, groups, k x k, H,
    scale, W, scale)."""
    n, channels, height, width = features.shape
    padded = F.pad(features, [kernel // 2] * 4)
    return (
        padded.view(n, groups, channels // groups, *padded.shape[2:]),
        masks.reshape(n, groups, kernel * kernel, height, scale, width, scale),
    )


def _places(kernel: int, height: int, width: int) -> Iterator[tuple[int, slice, slice]]:
    for place in range(kernel * kernel):
        row, column = divmod(place, kernel)
        yield place, slice(row, row + height), slice(column, column + width)
