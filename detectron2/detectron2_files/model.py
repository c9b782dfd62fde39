"""The meta-architecture of the config, and its optimizer."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from detectron2_files.config_protocol import Detectron2Config
from shared.errors import UserError

logging.getLogger("detectron2").setLevel(logging.WARNING)  # tables of a data set's classes, and the like

# what these keep in plain attributes while they train
PYTHON_STATE = {"RetinaNet": ("loss_normalizer",), "FCOS": ("loss_normalizer",)}


def build_model(config: Detectron2Config) -> nn.Module:
    """The meta-architecture on the host, with its initial weights.

    Raises:
        UserError: the config does not make one.
    """
    try:
        return config.build_model()
    except UserError:
        raise
    except Exception as error:  # the registries' constructors raise whatever they happen to
        raise UserError(
            f"hyperparameters.config_file: the model cannot be built: {type(error).__name__}: {error}"
        ) from error


def build_optimizer(config: Detectron2Config, model: nn.Module) -> torch.optim.Optimizer:
    """The config's optimizer.

    Raises:
        UserError: it cannot be built.
    """
    try:
        return config.build_optimizer(model)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"the config's optimizer cannot be built: {type(error).__name__}: {error}") from error


def losses_of_step(model: nn.Module, inputs: list[dict[str, Any]], number: int) -> dict[str, torch.Tensor]:
    """The model's losses in step `number`."""
    # where the models put numbers that they watch: nobody reads them, and nothing is kept from step to step
    with EventStorage(number):
        return model(inputs)
