"""`hyperparameters.freeze`: parts of a model that stay as they are."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import nn

from shared.errors import UserError, nearest


def freeze(model: nn.Module, names: Sequence[str]) -> str:
    """Trains no parameter of the parts any more, and keeps the running statistics of their batch norm, whatever mode
    the model is put into.

    Args:
        names: of modules or parameters: `backbone` is all of it, `backbone.layer1` a part.

    Returns:
        How many parameters that leaves.

    Raises:
        UserError: a name is none of the model's, or nothing is left to train.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name in names:
        if name not in parameters and name not in modules:
            parts = f"its parts are {', '.join(part for part, _ in model.named_children())}"
            raise UserError(
                f"hyperparameters.freeze: the model has no part {name!r}; "
                f"{nearest(name, [*modules, *parameters], otherwise=parts)}"
            )
        if name in modules:
            for module in modules[name].modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
                    module.train = functools.partial(_keep_mode, module)
            modules[name].requires_grad_(False)
        else:
            parameters[name].requires_grad_(False)
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    if not trained:
        raise UserError(f"hyperparameters.freeze: {', '.join(names)} is the whole model, and nothing is left to train")
    whole = sum(p.numel() for p in parameters.values())
    return f"{', '.join(names)}; {trained:,} of {whole:,} parameters are trained"


def _keep_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """In the place of `train` of a module that stays in evaluation mode."""
    return module
