"""The detector of the config, and its weights."""

from __future__ import annotations

import functools
import logging
import urllib.error
from pathlib import Path
from typing import Any

import mmcv.runner
import torch
import yaml
from mmcv import Config, ConfigDict
from mmcv.runner import wrap_fp16_model
from mmdet.models import build_detector
from torch import nn

from mmdetection_files.config import shipped_configs
from shared.errors import UserError, nearest
from shared.training.checkpoints import count_names, read_weights, without_ddp

logger = logging.getLogger(__name__)

for _library in ("mmcv", "mmdet"):  # a line for each layer that is initialised
    logging.getLogger(_library).setLevel(logging.WARNING)


def build_model(config: Config, initialize: bool) -> nn.Module:
    """mmdet's detector.

    Args:
        initialize: with the config's initial weights, pretrained backbones among them; else as PyTorch makes it,
            for weights that are loaded next.

    Raises:
        UserError: the config does not make a detector, or the backbone's weights cannot be had.
    """
    if isinstance(config.model.get("teacher_config"), str):
        config.model.teacher_config = _teacher(config.model.teacher_config)
    # a copy: the config that is kept in checkpoints is that of any number of processes
    section = config.model if torch.distributed.is_initialized() else _normalized_alone(config.model)
    try:
        model = build_detector(section, train_cfg=config.get("train_cfg"), test_cfg=config.get("test_cfg"))
    except Exception as error:  # the builders raise what the modules' constructors raise
        raise UserError(
            f"hyperparameters.config_file: the model cannot be built: {type(error).__name__}: {error}"
        ) from error
    if initialize:
        try:
            model.init_weights()
        except (OSError, RuntimeError, urllib.error.URLError) as error:
            raise UserError(
                f"model.backbone.init_cfg: the backbone's pretrained weights cannot be had ({error}). Without a way to "
                "the internet give a file, override_mmdet_config: {model.backbone.init_cfg.checkpoint: PATH}, or start "
                "from nothing, {model.backbone.init_cfg: null}"
            ) from error
    if config.get("fp16"):
        wrap_fp16_model(model)
    return model


class _OneProcess:
    """In the place of a group of processes."""

    def size(self) -> int:
        return 1


def _normalized_alone(section: Any) -> Any:
    """A copy for one process: BN for SyncBN, which trains on no CPU, and mmcv's MMSyncBN, which is not made without a
    group, with one."""
    if isinstance(section, (list, tuple)):
        return type(section)(_normalized_alone(part) for part in section)
    if not isinstance(section, dict):
        return section
    copied = type(section)({key: _normalized_alone(part) for key, part in section.items()})
    if copied.get("type") == "SyncBN":
        copied["type"] = "BN"
        copied.pop("group", None)
    elif copied.get("type") == "MMSyncBN":
        copied["group"] = _OneProcess()
    return copied


def _teacher(name: str) -> str:
    """The config of a distilling detector's teacher: MMDetection's own say where it is from the root of its
    repository."""
    shipped = shipped_configs() / name.removeprefix("configs/")
    return str(shipped) if shipped.is_file() and not Path(name).is_file() else name


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The config's optimizer, by mmcv's constructors.

    Raises:
        UserError: it has no such optimizer or argument.
    """
    try:
        return mmcv.runner.build_optimizer(model, config.optimizer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"optimizer of the MMDetection config: {type(error).__name__}: {error}") from error


def without_pretrained_backbone(config: Config) -> None:
    """Takes out of the config what would be downloaded only to be overwritten by the weights loaded next."""

    def visit(section: Any) -> None:
        if isinstance(section, (list, tuple)):
            for part in section:
                visit(part)
        elif isinstance(section, ConfigDict):
            if _is_pretrained(section.get("init_cfg")):
                section.init_cfg = None
            if "pretrained" in section and "type" in section:
                section.pretrained = None
            for value in section.values():
                visit(value)

    visit(config.model)


def without_teacher_weights(config: Config) -> None:
    """Takes out what a distilling detector's teacher starts from: to detect, nobody asks it."""
    if config.model.get("teacher_ckpt"):
        config.model.teacher_ckpt = None


def _is_pretrained(init_cfg: Any) -> bool:
    if isinstance(init_cfg, (list, tuple)):
        return any(map(_is_pretrained, init_cfg))
    # PVT's has no type
    return isinstance(init_cfg, dict) and bool(init_cfg.get("type") == "Pretrained" or init_cfg.get("checkpoint"))


class _StaticGradScaler(torch.amp.GradScaler):
    """A scale that stays, which mmcv's hook sets anew after each step."""

    def update(self, new_scale: float | None = None) -> None:
        super().update(self._init_scale if new_scale is None else new_scale)


def build_scaler(fp16: dict[str, Any]) -> torch.amp.GradScaler:
    """The GradScaler of the config's `fp16`, as mmcv's Fp16OptimizerHook makes it."""
    loss_scale = fp16.get("loss_scale", 512.0)
    if loss_scale == "dynamic":
        return torch.amp.GradScaler("cuda")
    if isinstance(loss_scale, dict):
        return torch.amp.GradScaler("cuda", **loss_scale)
    return _StaticGradScaler("cuda", init_scale=float(loss_scale))


# what these modules keep in plain attributes while they train
PYTHON_STATE = {
    "Conv2dRFSearchOp": ("dilation_rates", "op_layer.dilation"),
    "YOLOX": ("_input_size", "_progress_in_iter"),
    "DynamicRoIHead": (
        "iou_history",
        "beta_history",
        "bbox_assigner.pos_iou_thr",
        "bbox_assigner.neg_iou_thr",
        "bbox_assigner.min_pos_iou",
        "bbox_head.loss_bbox.beta",
    ),
}


@functools.cache
def published_checkpoints() -> dict[str, str]:
    """The URL of the weights that MMDetection publishes for each of its configs, by the config's path."""
    folder = shipped_configs()
    published = {}
    for metafile in sorted(folder.glob("*/metafile.yml")):
        content = yaml.safe_load(metafile.read_text())
        for model in content.get("Models", []) if isinstance(content, dict) else content:
            if model.get("Weights"):
                published[model["Config"].removeprefix("configs/")] = model["Weights"]
    return published


def load_pretrained(model: nn.Module, source: str | bool, config_file: str) -> None:
    """Start from `use_pretrained`: what MMDetection publishes for the config (True), a path, a URL or a checkpoint of
    ours. Weights of another shape (a head for other classes) keep their initial values, said in one line.

    Raises:
        UserError: it cannot be had, holds code, or is of another model.
    """
    key = "hyperparameters.use_pretrained"
    if source is True:
        published = published_checkpoints()
        name = str(Path(config_file)).removeprefix(str(shipped_configs()) + "/")
        if name not in published:
            near = nearest(name, published, otherwise="they are listed in its metafiles")
            raise UserError(f"{key}: MMDetection publishes no weights for {name}; {near}; or give a path or a URL")
        source = published[name]
    state, _ = read_weights(source, key, "true")
    weights = without_ddp(state.get("state_dict", state))
    own = model.state_dict()
    fitting = {name: w for name, w in weights.items() if name in own and own[name].shape == w.shape}
    if not fitting:
        raise UserError(
            f"{key}: none of the {len(weights)} weights in {source} is one of this model's {len(own)}; "
            "use the config that it was trained with"
        )
    other_shape = [name for name in weights if name in own and name not in fitting]
    absent = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    model.load_state_dict(fitting, strict=False)
    logger.info(
        "pretrained: %d of the model's %d weights from %s%s%s",
        len(fitting),
        len(own),
        source,
        count_names(other_shape, "of another shape start anew"),
        count_names(absent, "are not in it and start anew"),
    )
