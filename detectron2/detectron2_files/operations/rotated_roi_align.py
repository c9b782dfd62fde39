"""RoIAlign of rotated regions: the mean of bilinear samples on a grid in each bin.

Both ways are one product with the sparse matrix of the samples' weights, (bins, pixels): the output's bins times the
pixels' channels, and for the gradient its transpose. `embedding_bag` is that product, without a row a sample in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_SAMPLES = 2**20  # that are held at once, unless a single bin has more: some 300 MiB


class _Weights(NamedTuple):
    """Some rows of the matrix: entries in order of their bins."""

    bins: slice  # among all bins
    bin: Tensor  # (E,) counted from bins.start
    pixel: Tensor  # (E,) index into batch × height × width
    weight: Tensor  # (E,)
    starts: Tensor  # (bins,) where each bin's entries start


def roi_align_rotated_forward(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, sampling_ratio: int
) -> Tensor:
    """`torch.ops.detectron2.roi_align_rotated_forward` (upstream's csrc/ROIAlignRotated).

    Args:
        input: (B, C, H, W) features, of any floating type.
        rois: (R, 6): an index into B, and a rotated box (center x, center y, width, height, degrees counter-clockwise)
            in the image's pixels, the first pixel's center at 0.5.
        spatial_scale: what makes the image's pixels the features'.
        sampling_ratio: samples along each side of a bin; 0 for one a pixel, ceil(side / pooled side).

    Returns:
        (R, C, pooled_height, pooled_width) of the input's type. A sample more than one pixel off the features is 0.
    """
    batch, channels, height, width = input.shape
    dtype = _computed_in(input)
    bins = len(rois) * pooled_height * pooled_width
    output = torch.zeros(bins, channels, dtype=dtype, device=input.device)
    if output.numel() and input.numel():
        pixels = input.to(dtype).permute(0, 2, 3, 1).reshape(batch * height * width, channels)
        pooled = (pooled_height, pooled_width)
        for part in _weights(rois.to(dtype), spatial_scale, pooled, (height, width), sampling_ratio):
            output[part.bins] = _weighted_sums(pixels, part.pixel, part.starts, part.weight)
    return output.view(-1, pooled_height, pooled_width, channels).permute(0, 3, 1, 2).to(input.dtype).contiguous()


def roi_align_rotated_backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
    sampling_ratio: int,
) -> Tensor:
    """The gradient of the forward's input; `torch.ops.detectron2.roi_align_rotated_backward`. Deterministic.

    Args:
        grad: (R, C, pooled_height, pooled_width), of the forward's output.
        batch_size, channels, height, width: the input's shape. The others as the forward's.

    Returns:
        (batch_size, channels, height, width) of the type of `grad`.
    """
    dtype = _computed_in(grad)
    count = batch_size * height * width
    result = torch.zeros(count, channels, dtype=dtype, device=grad.device)
    if grad.numel() and result.numel():
        of_bins = grad.to(dtype).permute(0, 2, 3, 1).reshape(-1, channels)
        pooled = (pooled_height, pooled_width)
        for part in _weights(rois.to(dtype), spatial_scale, pooled, (height, width), sampling_ratio):
            pixel, order = part.pixel.sort(stable=True)
            starts = torch.searchsorted(pixel, torch.arange(count, device=pixel.device))
            result += _weighted_sums(of_bins[part.bins], part.bin[order], starts, part.weight[order])
    return result.view(batch_size, height, width, channels).permute(0, 3, 1, 2).to(grad.dtype).contiguous()


def _weighted_sums(rows: Tensor, index: Tensor, starts: Tensor, weight: Tensor) -> Tensor:
    """(len(starts), C): the sum of weight[e] * rows[index[e]] over the entries e of each bag."""
    if not len(index):
        return rows.new_zeros(len(starts), rows.shape[1])
    return F.embedding_bag(index, rows, starts, mode="sum", per_sample_weights=weight)


def _weights(
    rois: Tensor, scale: float, pooled: tuple[int, int], size: tuple[int, int], sampling_ratio: int
) -> Iterator[_Weights]:
    """The matrix, some bins at a time.

    Raises:
        ValueError: a region's width or height is negative.
    """
    if bool((rois[:, 3:5] < 0).any()):
        raise ValueError("ROIAlignRotated: a region has a negative width or height")
    if sampling_ratio > 0:
        grid = torch.full((len(rois), 2), sampling_ratio, device=rois.device)
        samples = np.full(len(rois), sampling_ratio**2)
    else:
        grid = (rois[:, 3:5].flip(1) * scale / rois.new_tensor(pooled)).ceil().long()
        samples = grid.prod(1).cpu().numpy()  # to the host once, for the lengths of all that follows
    ends = samples.repeat(pooled[0] * pooled[1]).cumsum()
    start, before = 0, 0
    while start < len(ends):
        stop = max(int(ends.searchsorted(before + _SAMPLES, side="right")), start + 1)
        yield _weights_of(rois, scale, pooled, size, grid, slice(start, stop), int(ends[stop - 1]) - before)
        start, before = stop, int(ends[stop - 1])


def _weights_of(
    rois: Tensor,
    scale: float,
    pooled: tuple[int, int],
    size: tuple[int, int],
    grid: Tensor,
    bins: slice,
    samples: int,
) -> _Weights:
    device = rois.device
    all_bins = torch.arange(bins.start, bins.stop, device=device)
    of_bin = grid.prod(1)[all_bins // (pooled[0] * pooled[1])]  # samples in each bin
    starts = of_bin.cumsum(0) - of_bin
    local = torch.arange(len(of_bin), device=device).repeat_interleave(of_bin, output_size=samples)
    bin_ = all_bins[local]
    roi = bin_ // (pooled[0] * pooled[1])
    number = torch.arange(samples, device=device) - starts[local]
    row, column = number // grid[roi, 1], number % grid[roi, 1]

    # in upstream's order of operations: a sample that lies on the features' edge falls on the same side of it
    centre_x, centre_y = rois[:, 1] * scale - 0.5, rois[:, 2] * scale - 0.5
    width, height = rois[:, 3] * scale, rois[:, 4] * scale
    angle = torch.deg2rad(rois[:, 5].double()).to(rois)
    cos, sin = angle.cos()[roi], angle.sin()[roi]

    def along(side: Tensor, pooled_side: int, bin_index: Tensor, index: Tensor, count: Tensor) -> Tensor:
        bin_side = (side / pooled_side)[roi]
        return (-side / 2)[roi] + bin_index * bin_side + (index + 0.5) * bin_side / count[roi]

    down = along(height, pooled[0], bin_ // pooled[1] % pooled[0], row, grid[:, 0])
    right = along(width, pooled[1], bin_ % pooled[1], column, grid[:, 1])
    y = down * cos - right * sin + centre_y[roi]
    x = down * sin + right * cos + centre_x[roi]

    inside = (y >= -1) & (y <= size[0]) & (x >= -1) & (x <= size[1])
    weight = inside.to(rois) / of_bin[local]
    y_low, y_high, y_part = _neighbours(y, size[0])
    x_low, x_high, x_part = _neighbours(x, size[1])
    image = rois[:, 0].long()[roi] * size[0]
    pixels = torch.stack([(image + i) * size[1] + j for i in (y_low, y_high) for j in (x_low, x_high)], 1)
    parts = torch.stack([by * bx * weight for by in (1 - y_part, y_part) for bx in (1 - x_part, x_part)], 1)
    return _Weights(bins, local.repeat_interleave(4), pixels.flatten(), parts.flatten(), starts * 4)


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels before and after a position, held inside, and how far it is from the one to the other."""
    position = position.clamp(0, size - 1)
    low = position.long()
    return low, (low + 1).clamp_(max=size - 1), position - low


def _computed_in(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
