"""RF-Next, mmcv's RFSearchHook: dilations that a file fixes, or that are searched while the model trains."""

from __future__ import annotations

import json
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmcv import Config
from mmcv.cnn import RFSearchHook
from mmcv.cnn.rfsearch.operator import BaseConvRFSearchOp
from mmcv.runner import BaseRunner
from torch import nn

from shared.durable import write_file
from shared.errors import UserError

STRUCTURE_FILE = "rf_structure.json"


class DilationSearch(RFSearchHook):
    """mmcv's hook, which finds the structure that was reached in its own `config` too."""

    def __init__(self, config: dict[str, Any] | None = None, **arguments: Any):
        config = deepcopy(config or {})
        structure = config.get("structure")
        super().__init__(config=config, **arguments)
        if structure:
            self.config["structure"] = structure

    def go_on_after(self, runner: BaseRunner) -> None:
        """Counts the steps that were done before this start."""
        self.config["search"]["step"] += runner.epoch if self.by_epoch else runner.iter

    def step(self, model: nn.Module, work_dir: str | None) -> None:
        # its own file of each step is left out: the checkpoints have it
        with tempfile.TemporaryDirectory() as folder:
            super().step(model, folder)


def _hook(config: Config) -> Any:
    return next((hook for hook in config.get("custom_hooks") or [] if hook.get("type") == "RFSearchHook"), None)


def is_searching(config: Config) -> bool:
    """Whether the model's dilations change while it trains."""
    hook = _hook(config)
    return hook is not None and hook.get("mode", "search") == "search"


def init_receptive_fields(model: nn.Module, config: Config) -> None:
    """Gives the model the dilations, and the branches to choose from, of the config's RFSearchHook, as MMDetection's
    tools do. The config says them itself afterwards, whichever file they came from.

    Raises:
        UserError: the file is not there, is of another model, or an argument is missing.
    """
    hook = _hook(config)
    if hook is None:
        return
    try:
        search = DilationSearch(**{key: value for key, value in hook.items() if key not in ("type", "priority")})
        search.init_model(model)
    except OSError as error:
        raise UserError(
            f"custom_hooks: RFSearchHook.rfstructure_file: {error.filename} cannot be read: {error.strerror}. Fix: "
            f"give a file that MMDetection's README of RF-Next links to, or {STRUCTURE_FILE} of a search's checkpoint"
        ) from error
    except (KeyError, TypeError, AssertionError) as error:
        raise UserError(
            f"custom_hooks: RFSearchHook cannot be made: {type(error).__name__}: {error}. Fix: correct its keys"
        ) from error
    hook["config"]["structure"], hook["rfstructure_file"] = dict(search.config["structure"]), None


def write_structure(model: nn.Module, config: Config, folder: Path) -> None:
    """The dilations that a search has reached: into the config, and as a file for `rfstructure_file`."""
    if not is_searching(config):
        return
    structure = {
        f"module.{name}": list(module.op_layer.dilation)  # as RFSearchHook names them
        for name, module in model.named_modules()
        if isinstance(module, BaseConvRFSearchOp)
    }
    _hook(config)["config"]["structure"] = structure
    write_file(folder / STRUCTURE_FILE, json.dumps({"structure": structure}))
