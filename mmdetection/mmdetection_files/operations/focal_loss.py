"""Focal loss (https://arxiv.org/abs/1708.02002) of sigmoid and of softmax scores (mmcv/ops/focal_loss.py).

Targets are (N,) int64: a class in 0…C-1, or for the sigmoid any other number for the background. `weight` is (C,),
one factor a class, or empty.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
]

_SMALLEST = torch.finfo(torch.float32).tiny  # FLT_MIN


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Writes (N, C) losses of (N, C) scores into `output`."""
    p = input.sigmoid()
    torch.mul(p.pow(gamma), (1 - p).clamp_(min=_SMALLEST).log_(), out=output).mul_(alpha - 1)
    rows, classes = _positives(target, input.shape[1])
    p = p[rows, classes]
    output[rows, classes] = -alpha * (1 - p).pow(gamma) * p.clamp(min=_SMALLEST).log()
    _weigh(output, target, weight)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Writes (N, C), the losses' derivatives by their scores, into `grad_input`."""
    p = input.sigmoid()
    q = 1 - p
    inner = q.clamp(min=_SMALLEST).log_().mul_(q).mul_(gamma).sub_(p)
    torch.mul(p.pow(gamma), inner, out=grad_input).mul_(alpha - 1)
    rows, classes = _positives(target, input.shape[1])
    p, q = p[rows, classes], q[rows, classes]
    grad_input[rows, classes] = -alpha * q.pow(gamma) * (q - gamma * p * p.clamp(min=_SMALLEST).log())
    _weigh(grad_input, target, weight)


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Writes (N,) losses of (N, C) probabilities into `output`; a target below 0 has none."""
    p = softmax.gather(1, target.clamp(min=0)[:, None])[:, 0]
    output.copy_(-alpha * (1 - p).pow(gamma) * p.clamp(min=_SMALLEST).log())
    output[target < 0] = 0
    _weigh(output, target, weight)


def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Writes (N, C), the losses' derivatives by the scores before the softmax, into `grad_input`.

    Args:
        buff: (N,), scratch.
    """
    classes = target.clamp(min=0)[:, None]
    p = softmax.gather(1, classes)[:, 0]
    buff.copy_(alpha * (gamma * (1 - p).pow(gamma - 1) * p * p.clamp(min=_SMALLEST).log() - (1 - p).pow(gamma)))
    buff[target < 0] = 0
    _weigh(buff, target, weight)
    torch.mul(softmax, -buff[:, None], out=grad_input)
    grad_input.scatter_add_(1, classes, buff[:, None])


def _positives(target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    rows = ((target >= 0) & (target < classes)).nonzero()[:, 0]
    return rows, target[rows]


def _weigh(losses: Tensor, target: Tensor, weight: Tensor) -> None:
    if weight.numel():
        rows, classes = _positives(target, len(weight))
        losses[rows] *= weight[classes].reshape(-1, *[1] * (losses.dim() - 1))
