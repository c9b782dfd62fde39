"""mmcv's hooks, which set the learning rate and whatever else a config asks for, called as its runners call them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmcv import Config
from mmcv.runner import BaseRunner
from mmcv.runner.hooks import HOOKS, LoggerHook
from torch import nn

from mmdetection_files.config_fields import runner_type
from mmdetection_files.receptive_field import DilationSearch
from shared.errors import UserError
from shared.training.switches import AveragedWeights

logger = logging.getLogger(__name__)

EMA_HOOKS = ("EMAHook", "ExpMomentumEMAHook", "LinearMomentumEMAHook")
# what these do is done in another place: divergence by shared/training/training_metrics.py, equal buffers by DDP,
# and the number of classes follows the data
_DONE_ELSEWHERE = ("CheckInvalidLossHook", "NumClassCheckHook", "SyncNormHook", "YOLOXModeSwitchHook", *EMA_HOOKS)


class _Batches:
    """What hooks ask of a data loader: its length and its data set."""

    def __init__(self, count: int, dataset: Any):
        self.count, self.dataset = count, dataset

    def __len__(self) -> int:
        return self.count


class StepRunner(BaseRunner):
    """An mmcv runner whose loop is ours: `begin` and `end` call the hooks around one training batch.

    Args:
        batches_per_epoch, total_batches: counted over all slots together.
        dataset: MMDetection's training samples.

    Attributes:
        outputs: result of mmdet's `train_step` for the last batch; tensors on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        batches_per_epoch: int,
        total_batches: int,
        dataset: Any = None,
    ):
        super().__init__(model, optimizer=optimizer, logger=logger, meta={})
        self._max_iters = total_batches
        self._max_epochs = math.ceil(total_batches / batches_per_epoch)
        self.batches_per_epoch = batches_per_epoch
        self.data_loader = self.training_loader = _Batches(batches_per_epoch, dataset)
        self.outputs: dict[str, Any] = {}
        self.has_own_hooks = False
        self.by_epoch = runner_type(config) != "IterBasedRunner"
        self.begun = False
        try:
            self._register(config)
        except (KeyError, TypeError, ValueError, AssertionError, AttributeError) as error:
            raise UserError(
                f"lr_config or a hook of the config: {type(error).__name__}: {error}. Fix: correct its keys"
            ) from error

    def _register(self, config: Config) -> None:
        lr_config, momentum_config = deepcopy(config.get("lr_config")), deepcopy(config.get("momentum_config"))
        if not self.by_epoch and lr_config is not None:
            lr_config.setdefault("by_epoch", False)  # as IterBasedRunner
        self.register_lr_hook(lr_config)
        self.register_momentum_hook(momentum_config)
        for hook in deepcopy(config.get("custom_hooks") or []):
            if "type" not in hook:
                raise UserError(f"custom_hooks: {dict(hook)} has no `type`. Fix: give its type")
            name = hook["type"]
            if name == "RFSearchHook":
                arguments = {key: value for key, value in hook.items() if key not in ("type", "priority")}
                self.register_hook(DilationSearch(**arguments), hook.get("priority", "NORMAL"))
                continue
            kind = HOOKS.get(name)
            if name not in _DONE_ELSEWHERE and not (kind is not None and issubclass(kind, LoggerHook)):
                self.register_hook_from_cfg(hook)
                self.has_own_hooks = True

    def begin_run(self, work_dir: Path) -> None:
        """Gives custom hooks a folder to write into."""
        self.work_dir = str(work_dir)
        if self.has_own_hooks:
            work_dir.mkdir(parents=True, exist_ok=True)

    def begin(self, number: int) -> None:
        """Before training batch `number`, counted from 0 over the whole training."""
        self._epoch, self._inner_iter = divmod(number, self.batches_per_epoch)
        self._iter = number
        self.mode = "train"
        if not self.begun:
            for hook in self.hooks:
                if isinstance(hook, DilationSearch):
                    hook.go_on_after(self)
            self.call_hook("before_run")
            if not self.by_epoch:
                self.call_hook("before_epoch")
        if self.by_epoch and (self._inner_iter == 0 or not self.begun):
            self.call_hook("before_train_epoch")
        self.begun = True
        self.call_hook("before_train_iter")

    def end(self) -> None:
        """After the batch."""
        self.call_hook("after_train_iter")
        if self.by_epoch and self._inner_iter + 1 == self.batches_per_epoch:
            self.call_hook("after_train_epoch")

    def note_step(self, losses: Mapping[str, torch.Tensor], data_batch: dict[str, Any], images: int) -> None:
        """What hooks find of the step: `outputs` and `data_batch`."""
        log_vars = {name: value.detach() for name, value in losses.items()}
        self.data_batch = data_batch
        self.outputs = {"loss": losses["loss"], "log_vars": log_vars, "num_samples": images}

    def begin_validation_batch(self, number: int, inputs: dict[str, Any]) -> None:
        """Before validation batch `number`, from 0."""
        self._inner_iter, self.data_batch = number, inputs
        self.call_hook("before_val_iter")

    def begin_validation(self, batches: int, dataset: Any) -> None:
        """Before the first batch of a validation, given the number of batches."""
        self.mode, self.data_loader = "val", _Batches(batches, dataset)
        self.call_hook("before_val_epoch")

    def end_validation(self) -> None:
        self.call_hook("after_val_epoch")
        self.mode, self.data_loader = "train", self.training_loader

    def train(self) -> None:
        raise NotImplementedError("the trial has the loop")

    val = run = save_checkpoint = train


def hook_config(config: Config, names: Sequence[str]) -> dict[str, Any] | None:
    """The first of the config's custom hooks that goes by one of the names."""
    return next((hook for hook in config.get("custom_hooks") or [] if hook.get("type") in names), None)


def mode_switch(config: Config, total_epochs: int) -> tuple[int, Sequence[str]] | None:
    """From which epoch on YOLOXModeSwitchHook skips which transforms and adds the L1 loss; None without that hook, or
    where the training is shorter than its last epochs, as upstream."""
    hook = hook_config(config, ("YOLOXModeSwitchHook",))
    if hook is None:
        return None
    epoch = total_epochs - hook.get("num_last_epochs", 15) - 1
    skipped = hook.get("skip_type_keys", ("Mosaic", "RandomAffine", "MixUp"))
    return (epoch, tuple(skipped)) if epoch >= 0 else None


class MomentumEma(AveragedWeights):
    """The averaged weights of mmcv's and mmdet's EMA hooks, by the hook's own momentum.

    The hooks count the run's steps, also those before a resume that switched the average on.
    """

    def __init__(self, model: nn.Module, hook: dict[str, Any], steps: int):
        arguments = {key: value for key, value in hook.items() if key not in ("type", "priority", "resume_from")}
        self.hook = HOOKS.get(hook["type"])(**arguments)
        self.is_mmcv = hook["type"] == "EMAHook"
        super().__init__(model, 1 - self.hook.momentum, steps)

    def begin(self) -> None:
        self.module.load_state_dict(self.model.state_dict())

    @torch.no_grad()
    def update(self) -> None:
        number, self.steps = self.steps, self.steps + 1
        momentum = self._momentum(number)
        if momentum is None:
            return
        averaged = dict(self.module.named_parameters())
        averages_buffers = not self.is_mmcv and not self.hook.skip_buffers
        owns, values = [], []
        for name, value in self.model.state_dict().items():
            own = averaged.get(name)
            if own is None:
                own = self.module.get_buffer(name)
                if not averages_buffers or not own.dtype.is_floating_point:
                    own.copy_(value)
                    continue
            owns.append(own)
            values.append(value)
        # a few kernels for all
        torch._foreach_mul_(owns, 1 - momentum)
        torch._foreach_add_(owns, values, alpha=momentum)

    def _momentum(self, number: int) -> float | None:
        """The value that the hook's after_train_iter would take for this batch; None where it leaves the average."""
        if self.is_mmcv:
            if number % self.hook.interval != 0:
                return None
            return min(self.hook.momentum, (1 + number) / (self.hook.warm_up + number))
        if (number + 1) % self.hook.interval != 0:
            return None
        return self.hook.momentum_fun(number) if self.hook.momentum_fun else self.hook.momentum
