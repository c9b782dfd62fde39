"""AdamW with the groups that the family trains with: the backbone apart, no decay of biases and norms."""

from __future__ import annotations

import torch
from torch import nn

from detr_hyperparameters import DetrHyperparameters
from shared.errors import UserError


def build_optimizer(model: nn.Module, hparams: DetrHyperparameters) -> torch.optim.AdamW:
    """The optimizer of the parameters that are not frozen.

    Raises:
        UserError: the rate of the backbone is 0 and no other parameter is trained.
    """
    backbone_lr = hparams.lr if hparams.backbone_lr is None else hparams.backbone_lr
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        lr = backbone_lr if "backbone." in name else hparams.lr
        if not parameter.requires_grad:
            continue
        decay = hparams.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    if not groups:
        raise UserError("hyperparameters.freeze: nothing is left to train. Fix: freeze less")
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr, "weight_decay": decay}
            for (lr, decay), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
        ]
    )
