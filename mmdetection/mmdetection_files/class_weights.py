"""`hyperparameters.class_weights` in mmdet's losses: they take a weight per anchor, proposal or query."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.losses import CrossEntropyLoss, FocalLoss, QualityFocalLoss, VarifocalLoss
from torch import nn

from shared.training.switches import no_class_weights, weights_of

_LOSSES = (CrossEntropyLoss, FocalLoss, QualityFocalLoss, VarifocalLoss)
_WEIGHT = 2  # the position among a loss's arguments: prediction, target, weight


def weigh_categories(model: nn.Module, weights: torch.Tensor) -> None:
    """The classification losses of the model's heads weigh each row by its category. A first stage, which tells objects
    from background only, does not.

    Args:
        weights: (K,) by label.

    Raises:
        UserError: the model has another kind of classification loss.
    """
    losses = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == "loss_cls"}
    losses = {name: module for name, module in losses.items() if "rpn" not in name}
    if not losses:
        raise no_class_weights(f"the loss of {type(model).__name__}")
    for name, module in losses.items():
        if not isinstance(module, _LOSSES):
            raise no_class_weights(f"{type(module).__name__} of the config ({name})")
        module.register_buffer("of_categories", weights, persistent=False)
        module.register_forward_pre_hook(_weigh, with_kwargs=True)


def _weigh(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    prediction, target = args[:2]
    rows = weights_of(_labels_of(target), module.of_categories)
    given = args[_WEIGHT] if len(args) > _WEIGHT else kwargs.get("weight")
    if isinstance(target, torch.Tensor) and target.dim() > 1:  # the losses take no weights of rows there
        rows = rows[:, None].expand_as(prediction)
    if given is not None:
        rows = given * (rows if given.dim() == rows.dim() else rows[:, None])
    if len(args) > _WEIGHT:
        return (*args[:_WEIGHT], rows, *args[_WEIGHT + 1 :]), kwargs
    return args, {**kwargs, "weight": rows}


def _labels_of(target: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """(N,) the label of each row, -1 without an object.

    Args:
        target: (N,) labels, (N, K) qualities that are 0 but for the label's, or a tuple that begins with labels.
    """
    if isinstance(target, tuple):
        return target[0]
    if target.dim() == 1:
        return target
    quality, labels = target.max(dim=1)
    return labels.where(quality > 0, -1)
