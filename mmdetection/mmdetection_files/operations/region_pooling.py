"""Pooling of regions of a feature map: RoIAlign, RoIPool and deformable RoI pooling.

Features are (N, C, H, W), regions (R, 5): the image's index, then x1 y1 x2 y2 in the image's pixels, which
`spatial_scale` takes to the features'. Outputs are (R, C, pooled height, pooled width).

RoIAlign's mean is torchvision's. Its maximum, RoIPool (which does not round, as torchvision's does) and deformable
pooling (https://arxiv.org/abs/1703.06211) follow mmcv/ops/csrc/common/cuda; mmcv-full has the last two for CUDA only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "deform_roi_pool_backward",
    "deform_roi_pool_forward",
    "roi_align_backward",
    "roi_align_forward",
    "roi_pool_backward",
    "roi_pool_forward",
]

_ELEMENTS_AT_ONCE = 2**24
_LOWEST = -10000  # RoIAlign's maximum of nothing


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Writes the pooled features into `output`.

    Args:
        argmax_y: for the maximum, of the output's shape: the row where it was found, -1 for nowhere; `argmax_x` its
            column.
        sampling_ratio: points a bin in each direction; 0 for about one a pixel.
        pool_mode: 0 for the maximum, 1 for the mean.
        aligned: moves the regions by half a pixel; if not, they are one pixel large at least.
    """
    size = (aligned_height, aligned_width)
    if pool_mode == 1:
        pooled = torch.ops.torchvision.roi_align(input, rois, spatial_scale, *size, sampling_ratio, aligned)
        output.copy_(pooled)
        return
    output.fill_(_LOWEST)
    argmax_y.fill_(-1)
    argmax_x.fill_(-1)
    pixels = _by_pixel(input)
    for points in _sampled(rois, size, spatial_scale, sampling_ratio, input.shape[1], aligned, 0 if aligned else 1):
        corners = _corners(points, input.shape[2:])
        values = sum(weight[..., None] * pixels[index] for index, weight in corners)
        best, where = values.max(3)
        found = (best > _LOWEST).permute(0, 3, 1, 2)
        output[points.rows] = torch.where(found, best.permute(0, 3, 1, 2), output[points.rows])
        for argmax, coordinate in ((argmax_y, points.y), (argmax_x, points.x)):
            at = coordinate.gather(3, where).permute(0, 3, 1, 2)
            argmax[points.rows] = torch.where(found, at, argmax[points.rows])


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Writes the derivative by the features into the zeros of `grad_input`."""
    if pool_mode == 1:
        sizes = (aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned)
        grad_input.copy_(torch.ops.torchvision._roi_align_backward(grad_output, rois, spatial_scale, *sizes))
        return
    channels, height, width = grad_input.shape[1:]
    plane = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)
    points = _Points(slice(None), plane[:, :, None, None].expand(argmax_y.shape), argmax_y, argmax_x)
    flat = grad_input.view(-1)
    for index, weight in _corners(points, (height, width)):
        weight = torch.where(argmax_y == -1, 0, weight)
        flat.index_add_(0, index.flatten(), (weight * grad_output).flatten())


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Writes each bin's maximum into `output` (0 where a bin has no pixel) and where it is into `argmax`.

    Args:
        argmax: int32, of the output's shape: row x W + column, -1 for nowhere.
    """
    channels, height, width = input.shape[1:]
    argmax.fill_(-1)
    # x2 and y2 are the last pixels
    top, bottom = _bins(rois[:, 2] * spatial_scale, (rois[:, 4] + 1) * spatial_scale, pooled_height, height)
    left, right = _bins(rois[:, 1] * spatial_scale, (rois[:, 3] + 1) * spatial_scale, pooled_width, width)
    if not len(rois):
        return
    rows, columns = torch.stack([(bottom - top).max(), (right - left).max()]).tolist()
    if rows * columns == 0:
        return
    pixels = _by_pixel(input)
    image = rois[:, 0].long() * height * width
    at_once = max(_ELEMENTS_AT_ONCE // (pooled_height * pooled_width * rows * columns * channels), 1)
    for chosen in torch.arange(len(rois), device=rois.device).split(at_once):
        # past a bin's end its last row and column once more: the maximum stays
        y = torch.minimum(top[chosen, :, None] + torch.arange(rows, device=rois.device), bottom[chosen, :, None] - 1)
        x = torch.minimum(left[chosen, :, None] + torch.arange(columns, device=rois.device), right[chosen, :, None] - 1)
        place = (y[:, :, None, :, None] * width + x[:, None, :, None, :]).flatten(3)
        some = ((bottom > top)[chosen, :, None] & (right > left)[chosen, None, :])[:, :, :, None]
        place = torch.where(some, place, 0)
        best, where = pixels[image[chosen, None, None, None] + place].max(3)
        output[chosen] = torch.where(some, best, 0).permute(0, 3, 1, 2)
        argmax[chosen] = torch.where(some, place.gather(3, where), -1).permute(0, 3, 1, 2).int()


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Writes the derivative by the features into the zeros of `grad_input`."""
    channels, height, width = grad_input.shape[1:]
    plane = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)
    index = plane[:, :, None, None] * (height * width) + argmax.clamp(min=0)
    grad = torch.where(argmax >= 0, grad_output, 0)
    grad_input.view(-1).index_add_(0, index.flatten(), grad.flatten())


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Writes each bin's mean into `output`.

    Args:
        offset: (R, 2, pooled height, pooled width), x then y, in regions of the size `gamma`; empty for none.
    """
    output.zero_()
    size = (pooled_height, pooled_width)
    pixels = _by_pixel(input)
    for points in _sampled(rois, size, spatial_scale, sampling_ratio, input.shape[1], True, None, offset, gamma):
        corners = _corners(points, input.shape[2:])
        values = sum(weight[..., None] * pixels[index] for index, weight in corners)
        output[points.rows] = values.mean(3).permute(0, 3, 1, 2)


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Writes the derivatives by the features and by the offsets, if given, into the zeros given.

    A point off the features by less than a pixel counts as at their edge; as in mmcv, its offset's derivative does not.
    """
    size = (pooled_height, pooled_width)
    pixels = _by_pixel(input)
    by_pixel = torch.zeros_like(pixels)
    extent = (rois[:, 3:] - rois[:, 1:3]) * spatial_scale
    for points in _sampled(rois, size, spatial_scale, sampling_ratio, input.shape[1], True, None, offset, gamma):
        grad = grad_output[points.rows].permute(0, 2, 3, 1)[:, :, :, None] / points.y.shape[3]
        corners = _corners(points, input.shape[2:])
        for index, weight in corners:
            by_pixel.index_add_(0, index.flatten(), (weight[..., None] * grad).flatten(0, 3))
        if not offset.numel():
            continue
        (y_low, x_low), (y_high, x_high), inside = _neighbours(points, input.shape[2:])
        low_low, low_high, high_low, high_high = ((pixels[index] * grad).sum(4) for index, _ in corners)
        below, above, before, behind = points.y - y_low, y_high - points.y, points.x - x_low, x_high - points.x
        by_x = high_high * below + low_high * above - high_low * below - low_low * above
        by_y = high_high * before + high_low * behind - low_high * before - low_low * behind
        by_point = torch.stack([by_x, by_y], 1) * inside[:, None]
        grad_offset[points.rows] = gamma * extent[points.rows][:, :, None, None] * by_point.sum(4)
    grad_input.copy_(by_pixel.view(input.shape[0], *input.shape[2:], input.shape[1]).permute(0, 3, 1, 2))


@dataclass
class _Points:
    """Where features are sampled for some of the regions."""

    rows: Tensor | slice  # which regions
    plane: Tensor  # int64, the place of the feature map in what is sampled
    y: Tensor  # in the features' pixels, of one shape with x: (r, pooled height, pooled width, points a bin)
    x: Tensor


def _sampled(
    rois: Tensor,
    size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    channels: int,
    aligned: bool,
    smallest: int | None,
    offset: Tensor | None = None,
    gamma: float = 0.0,
) -> Iterator[_Points]:
    """The points of regions that have the same number a bin, not too many at once; none for regions without one.

    Args:
        smallest: the least height and width of a region in features; None for no limit.
    """
    # flipped, not indexed by a list: a GPU is sent a list, and the host waits
    first, last = rois[:, 1:3].flip(1), rois[:, 3:5].flip(1)  # y, x
    start = first * spatial_scale - 0.5 * aligned
    extent = (last - first) * spatial_scale
    if smallest is not None:
        extent = extent.clamp(min=smallest)
    bins = extent / torch.stack([extent.new_full((), count) for count in size])
    start = start[:, :, None, None]  # (R, 2, 1, 1)
    if offset is not None and offset.numel():
        start = start + gamma * extent[:, :, None, None] * offset.flip(1)
    for (height, width), rows_of_grid in _by_grid(bins, sampling_ratio):
        if height * width == 0:
            continue
        at_once = max(_ELEMENTS_AT_ONCE // (size[0] * size[1] * height * width * channels), 1)
        for rows in rows_of_grid.split(at_once):
            # in mmcv's order of additions: a point may lie on the border of what counts as on the features
            y, x = (
                start[rows, axis, :, :, None, None]
                + _along(torch.arange(size[axis], device=rois.device) * bins[rows, axis, None], axis - 4)
                + _along((torch.arange(count, device=rois.device) + 0.5) * bins[rows, axis, None] / count, axis - 2)
                for axis, count in enumerate((height, width))
            )
            y, x = (each.flatten(3) for each in torch.broadcast_tensors(y, x))
            yield _Points(rows, rois[rows, 0].long()[:, None, None, None], y, x)


def _by_grid(bins: Tensor, sampling_ratio: int) -> list[tuple[tuple[int, int], Tensor]]:
    """Each height and width of a grid of points, and which regions have it. On a GPU one copy to the host has them all:
    the wait does not grow with the number of grids."""
    if not len(bins):
        return []
    if sampling_ratio > 0:
        return [((sampling_ratio, sampling_ratio), torch.arange(len(bins), device=bins.device))]
    grids = bins.ceil().long().clamp(min=0)
    distinct, grid_of, counts = grids.unique(dim=0, return_inverse=True, return_counts=True)
    sizes = torch.cat([distinct, counts[:, None]], 1).tolist()
    rows = grid_of.argsort(stable=True).split([count for _, _, count in sizes])
    return [((height, width), of_grid) for (height, width, _), of_grid in zip(sizes, rows, strict=True)]


def _along(values: Tensor, axis: int) -> Tensor:
    """(r, count) as (r, 1, 1, 1, 1) with the count at that axis."""
    return values.view(len(values), *(values.shape[1] if place == axis else 1 for place in range(-4, 0)))


def _neighbours(
    points: _Points, feature_size: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """The rows and columns before and behind each point, and whether it is on the features, to within a pixel."""
    inside = torch.ones_like(points.y, dtype=torch.bool)
    low, high = [], []
    for coordinate, size in zip((points.y, points.x), feature_size, strict=True):
        inside &= (coordinate >= -1) & (coordinate <= size)
        before = coordinate.clamp(0, size - 1).floor().long()
        low.append(before)
        high.append((before + 1).clamp(max=size - 1))
    return (low[0], low[1]), (high[0], high[1]), inside


def _corners(points: _Points, feature_size: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """The four pixels around each point (upper left, upper right, lower left, lower right): their place in the features
    laid out as rows of pixels, and their weight."""
    (y_low, x_low), (y_high, x_high), inside = _neighbours(points, feature_size)
    height, width = feature_size
    y, x = points.y.clamp(0, height - 1) - y_low, points.x.clamp(0, width - 1) - x_low
    first = points.plane * (height * width)
    return [
        (first + row * width + column, inside * by_row * by_column)
        for row, by_row in ((y_low, 1 - y), (y_high, y))
        for column, by_column in ((x_low, 1 - x), (x_high, x))
    ]


def _by_pixel(input: Tensor) -> Tensor:
    """(N, C, H, W) as (N x H x W, C)."""
    return input.permute(0, 2, 3, 1).reshape(-1, input.shape[1])


def _bins(start: Tensor, end: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """(R, bins) first pixel and the one after the last; none where a region is empty or off the features."""
    extent = end - start
    edges = torch.arange(count + 1, device=start.device) * (extent / count)[:, None] + start[:, None]
    first = edges[:, :-1].floor().clamp(0, size).long()
    after = edges[:, 1:].ceil().clamp(0, size).long()
    return first, torch.where((extent > 0)[:, None], after, first)
