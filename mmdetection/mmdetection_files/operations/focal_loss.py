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
    positive, classes = _positives(target, input.shape[1])
    p = p.gather(1, classes)
    _write_positives(output, positive, classes, -alpha * (1 - p).pow(gamma) * p.clamp(min=_SMALLEST).log())
    _weigh(output, target, weight)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Writes (N, C), the losses' derivatives by their scores, into `grad_input`."""
    p = input.sigmoid()
    q = 1 - p
    inner = q.clamp(min=_SMALLEST).log_().mul_(q).mul_(gamma).sub_(p)
    torch.mul(p.pow(gamma), inner, out=grad_input).mul_(alpha - 1)
    positive, classes = _positives(target, input.shape[1])
    p, q = p.gather(1, classes), q.gather(1, classes)
    by_score = -alpha * q.pow(gamma) * (q - gamma * p * p.clamp(min=_SMALLEST).log())
    _write_positives(grad_input, positive, classes, by_score)
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
    """(N, 1) whether the target is a class, and the class, else 0. On a GPU the host waits for no count."""
    positive = ((target >= 0) & (target < classes))[:, None]
    return positive, torch.where(positive, target[:, None], 0)


def _write_positives(output: Tensor, positive: Tensor, classes: Tensor, values: Tensor) -> None:
    """Writes (N, 1) values at their classes into (N, C), in rows that have one."""
    output.scatter_(1, classes, torch.where(positive, values, output.gather(1, classes)))


def _weigh(losses: Tensor, target: Tensor, weight: Tensor) -> None:
    if weight.numel():
        positive, classes = _positives(target, len(weight))
        factors = torch.where(positive, weight[classes], 1)
        losses *= factors.reshape(-1, *[1] * (losses.dim() - 1))
