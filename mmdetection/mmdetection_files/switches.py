"""The switches of `hyperparameters` that MMDetection's configs have words of their own for."""

from __future__ import annotations

import math
from typing import Any

from mmcv import Config, ConfigDict

from mmdetection_files.hooks import EMA_HOOKS, hook_config
from mmdetection_files.receptive_field import is_searching
from mmdetection_hyperparameters import MMDetectionHyperparameters
from shared.errors import UserError


def take_up_switches(config: Config, hparams: MMDetectionHyperparameters) -> None:
    """`amp` and `clip_grad` as the config's own words, and the config's `fp16` as `amp`.

    Raises:
        UserError: both say something, and not the same; or the weights of a model that changes would be averaged.
    """
    if config.get("fp16"):
        if hparams.amp == "bf16":
            raise _contradiction("amp: bf16", "fp16", "fp16: null")
        hparams.amp = "fp16"
    elif hparams.amp == "fp16":
        config.fp16 = ConfigDict(loss_scale="dynamic")

    if hparams.clip_grad is not None:
        section = config.get("optimizer_config") or ConfigDict()
        wanted = {"max_norm": hparams.clip_grad, "norm_type": 2}
        own = section.get("grad_clip")
        if own and {"norm_type": 2, **own} != wanted:
            raise _contradiction(
                f"clip_grad: {hparams.clip_grad:g}",
                f"optimizer_config.grad_clip, {dict(own)}",
                "optimizer_config.grad_clip: null",
            )
        config.optimizer_config = ConfigDict(section, grad_clip=wanted)

    hook: dict[str, Any] | None = hook_config(config, EMA_HOOKS)
    if hook is not None and hparams.model_ema_decay is not None:
        momentum = hook.get("momentum", 0.0002)  # the default of all of them
        if not math.isclose(1 - hparams.model_ema_decay, momentum, rel_tol=1e-6):
            raise _contradiction(
                f"model_ema_decay: {hparams.model_ema_decay:g}",
                f"{hook['type']} with a momentum of {momentum:g}, which is a decay of {1 - momentum:g},",
                "custom_hooks: […]",
            )
    if is_searching(config) and (hook or hparams.model_ema_decay is not None):
        said_by = f"custom_hooks: {hook['type']}" if hook else "hyperparameters.model_ema_decay"
        raise UserError(
            f"{said_by} averages the weights of a model whose layers RFSearchHook changes. Fix: remove one of the two"
        )


def _contradiction(key: str, own: str, without: str) -> UserError:
    return UserError(
        f"hyperparameters.{key}: the MMDetection config sets {own} as well. Fix: remove the key, or the config's: "
        f"config_overrides: {{{without}}}"
    )
