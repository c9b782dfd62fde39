"""Convolution at chosen places, for guided anchoring (mmcv/ops/masked_conv.py), which mmcv-full has for CUDA only."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["masked_col2im_forward", "masked_im2col_forward"]


def masked_im2col_forward(
    features: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    data_col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Writes what the kernel sees at M places into `data_col`.

    Args:
        features: (1, C, H, W).
        mask_h_idx: (M,) int64, the places' rows in the convolution's output; `mask_w_idx` their columns.
        data_col: (C x kernel height x kernel width, M).
    """
    # an output may be larger than the features by the padding: zeros as far as the kernel reaches
    padded = F.pad(features[0], (pad_w, pad_w + kernel_w, pad_h, pad_h + kernel_h))
    columns = data_col.view(features.shape[1], kernel_h, kernel_w, len(mask_h_idx))
    for i in range(kernel_h):
        for j in range(kernel_w):
            columns[:, i, j] = padded[:, mask_h_idx + i, mask_w_idx + j]


def masked_col2im_forward(
    masked_output: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    output: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Writes (C, M) results to their places in the (1, C, H, W) `output`."""
    output[0, :, mask_h_idx, mask_w_idx] = masked_output
