"""The detector of the config, and its weights."""

from __future__ import annotations

import contextlib
import functools
import logging
import urllib.error
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmcv.runner
import mmdet.core
import torch
import yaml
from mmcv import Config
from mmcv.runner import fp16_utils, wrap_fp16_model
from mmdet.core.anchor import AnchorGenerator, MlvlPointGenerator
from mmdet.models import build_detector
from torch import nn

from mmdetection_files.config_keys import shipped_configs
from shared.config.schema import PUBLISHED
from shared.data.loading import Batch
from shared.errors import UserError, nearest
from shared.library import COCO_CATEGORIES, KeptByShape, log_loaded
from shared.training.checkpoints import read_weights, without_ddp

logger = logging.getLogger(__name__)

for _library in ("mmcv", "mmdet"):  # a line for each layer that is initialized
    logging.getLogger(_library).setLevel(logging.WARNING)
_quiet = logging.getLogger(f"{__name__}.mmcv")  # mmcv's line about weights that do not fit, which ours replaces
_quiet.setLevel(logging.CRITICAL + 1)


def config_to_build(config: Config, keeps_backbone: bool, for_training: bool, on_gpu: bool) -> Config:
    """A copy of the config that loads no weights which are replaced, and no half precision without a GPU."""
    config = deepcopy(config)
    if not keeps_backbone:
        without_pretrained_backbone(config)
    if not for_training:
        without_teacher_weights(config)
    if not on_gpu:
        config.fp16 = None  # a model that was trained in half precision detects in single here
    return config


def build_model(config: Config, initialize: bool, half: bool = False) -> nn.Module:
    """mmdet's detector.

    Args:
        initialize: with the config's initial weights, pretrained backbones among them; else as PyTorch makes it,
            for weights that are loaded next.
        half: tell mmcv's decorators to cast, to float16 or in `mmcv_in_bf16`.

    Raises:
        UserError: the config does not make a detector, or the backbone's weights cannot be had.
    """
    # a copy: the config that is kept in checkpoints is that of any number of processes
    section = config.model if torch.distributed.is_initialized() else _normalized_alone(config.model)
    try:
        model = build_detector(section, train_cfg=config.get("train_cfg"), test_cfg=config.get("test_cfg"))
    except Exception as error:  # the builders raise what the modules' constructors raise
        raise UserError(
            f"hyperparameters.config_file: the model cannot be built: {type(error).__name__}: {error}. Fix: correct "
            "the model's keys"
        ) from error
    if initialize:
        try:
            model.init_weights()
        except (OSError, RuntimeError, urllib.error.URLError) as error:
            raise UserError(
                f"model.backbone.init_cfg: the backbone's pretrained weights cannot be downloaded ({error}). Fix: "
                "without internet, give a file, config_overrides: {model.backbone.init_cfg.checkpoint: PATH}, or "
                "start from random weights, {model.backbone.init_cfg: null}. A relative path is looked up beside "
                "the YAML file and in the submitted folder; .detignore keeps *.pth out of the latter"
            ) from error
    if half:
        wrap_fp16_model(model)
    _keep_priors(model)
    return model


def _keep_priors(model: nn.Module) -> None:
    """Has the heads' anchors, points and their flags built once a size: MMDetection builds them in each step, the flags
    for each image, and waits for the GPU to copy base anchors to it."""
    generators = {
        id(value): value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, (AnchorGenerator, MlvlPointGenerator))
    }
    for generator in generators.values():
        generator.grid_priors = KeptByShape(generator.grid_priors)
        generator.valid_flags = KeptByShape(generator.valid_flags)


@contextlib.contextmanager
def mmcv_in_bf16(device: str) -> Iterator[None]:
    """mmcv's mixed precision in bfloat16, where its decorators have float16: what they force to float32, the losses
    above all, stays float32. For a model that was built for `half` precision."""
    kept = fp16_utils.autocast, fp16_utils.cast_tensor_type
    dtypes = {torch.half: torch.bfloat16}

    def cast(inputs: Any, source: torch.dtype, target: torch.dtype) -> Any:
        return kept[1](inputs, dtypes.get(source, source), dtypes.get(target, target))

    # the decorators look both names up at each call
    fp16_utils.autocast = functools.partial(torch.autocast, device, torch.bfloat16)
    fp16_utils.cast_tensor_type = cast
    try:
        yield
    finally:
        fp16_utils.autocast, fp16_utils.cast_tensor_type = kept


def compiled_parts(model: nn.Module) -> list[nn.Module]:
    """The parts that take and give feature maps alone: a head's forward pass is one with its losses."""
    return [part for name in ("backbone", "neck") if isinstance(part := getattr(model, name, None), nn.Module)]


def move_teacher(model: nn.Module, device: torch.device) -> None:
    """Moves a distilling detector's teacher, which is no submodule: `model.to` leaves it where it is."""
    if (teacher := getattr(model, "teacher_model", None)) is not None:
        teacher.to(device)


class _OneProcess:
    """Replaces a group of processes."""

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


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The config's optimizer, by mmcv's constructors and MMDetection's own.

    Raises:
        UserError: it has no such optimizer or argument.
    """
    try:
        return mmdet.core.build_optimizer(model, config.optimizer)
    except (KeyError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise UserError(
            f"optimizer of the MMDetection config: {type(error).__name__}: {error}. Fix: correct the optimizer's keys"
        ) from error


def gradient_clipping(config: Config) -> Callable[[Any], None] | None:
    """What clips gradients as mmcv's OptimizerHook does; None if the config clips none.

    Raises:
        UserError: the config names an optimizer hook with a loop of its own.
    """
    optimizer_config = config.get("optimizer_config") or {}
    if optimizer_config.get("type", "OptimizerHook") != "OptimizerHook":
        raise UserError(
            f"optimizer_config.type: {optimizer_config['type']} is a training loop of its own. Fix: to accumulate "
            "gradients, set `optimizations: {aggregation_frequency: N}` in the experiment config"
        )
    if not optimizer_config.get("grad_clip"):
        return None
    arguments = dict(optimizer_config["grad_clip"])

    def clip(parameters: Any) -> None:
        with_gradient = [p for p in parameters if p.requires_grad and p.grad is not None]
        if with_gradient:
            nn.utils.clip_grad_norm_(with_gradient, **arguments)

    return clip


def without_pretrained_backbone(config: Config) -> None:
    """Takes out of the config what would be downloaded only to be overwritten by the weights loaded next."""

    def visit(section: Any) -> None:
        if isinstance(section, (list, tuple)):
            for part in section:
                visit(part)
        elif isinstance(section, dict):
            for key in ("init_cfg", "override"):
                if _is_pretrained(section.get(key)):
                    section[key] = None
            if "pretrained" in section and "type" in section:
                section["pretrained"] = None
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


def grad_scaler(fp16: dict[str, Any]) -> torch.amp.GradScaler:
    """The GradScaler of the config's `fp16`, as mmcv's Fp16OptimizerHook makes it."""
    loss_scale = fp16.get("loss_scale", 512.0)
    if loss_scale == "dynamic":
        return torch.amp.GradScaler("cuda")
    if isinstance(loss_scale, dict):
        return torch.amp.GradScaler("cuda", **loss_scale)
    return _StaticGradScaler("cuda", init_scale=float(loss_scale))


def losses_of_step(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The detector's losses and what it watches beside them, as scalars; "loss" is their sum."""
    outputs = model(img=batch.images, return_loss=True, **batch.targets)
    means = {
        name: value.mean() if isinstance(value, torch.Tensor) else sum(part.mean() for part in value)
        for name, value in outputs.items()
    }
    # as BaseDetector._parse_losses, which synchronizes with the device once a loss
    return {**means, "loss": sum(value for name, value in means.items() if "loss" in name)}


def as_after_epoch(model: nn.Module, epoch: int, mode_switch: tuple[int, Sequence[str]] | None) -> None:
    """Sets what the training losses follow from besides the weights: the epoch, counted from 0, also of a model
    that is averaged and not trained itself; and the size that a YOLOX detects at, not the random one of the next
    batches."""
    if hasattr(model, "set_epoch"):
        model.set_epoch(epoch)
    if mode_switch is not None:
        model.bbox_head.use_l1 = epoch >= mode_switch[0]
    if hasattr(model, "_random_size_interval"):
        model._input_size = model._default_input_size
        model._progress_in_iter, model._random_size_interval = 0, 2  # none is drawn after this batch


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
                name = model["Config"].removeprefix("configs/")
                if not (folder / name).is_file():  # some are said to be in another folder
                    name = f"{metafile.parent.name}/{Path(name).name}"
                published[name] = model["Weights"]
    return published


@dataclass
class StartWeights:
    """Weights to start from, read.

    Attributes:
        key: the hyperparameter that names the source.
        state: tensors by name, with the versions of their modules in `_metadata` where the file has them.
        categories: COCO categories that they detect; None where they do not say.
    """

    source: str
    key: str
    state: dict[str, torch.Tensor]
    categories: list[dict] | None


def read_start(source: str, key: str, config_file: Path) -> StartWeights:
    """What `weights` names: what MMDetection publishes for the config ("published"), a path, a URL or a checkpoint of
    ours.

    Raises:
        UserError: it cannot be had, or holds code.
    """
    if source == PUBLISHED:
        source = published_weights(config_file, key)
    held, checkpoint = read_weights(source, key, repr(PUBLISHED))
    if checkpoint is not None:
        return StartWeights(source, key, without_ddp(held), checkpoint.categories)
    names = (held.get("meta") or {}).get("CLASSES")
    names = (names,) if isinstance(names, str) else names
    return StartWeights(source, key, without_ddp(held.get("state_dict", held)), names and categories_named(names))


def published_weights(config_file: Path, key: str) -> str:
    """The URL of what MMDetection publishes for one of its configs.

    Raises:
        UserError: it publishes nothing.
    """
    published = published_checkpoints()
    shipped = shipped_configs().absolute()
    name = str(config_file.relative_to(shipped) if config_file.is_relative_to(shipped) else config_file)
    if name not in published:
        near = nearest(name, published, otherwise="give a config that its metafiles list, a path or a URL")
        raise UserError(f"{key}: MMDetection publishes no weights for {name}{near}")
    return published[name]


def categories_named(names: Sequence[str]) -> list[dict]:
    """COCO categories of these names: with COCO's own ids where its 80 come first, else counted from 1."""
    coco = [category["name"] for category in COCO_CATEGORIES]
    ids = [category["id"] for category in COCO_CATEGORIES] if list(names[:80]) == coco else []
    first = ids[-1] + 1 if ids else 1
    ids += range(first, first + len(names) - len(ids))
    return [{"id": category_id, "name": str(name)} for category_id, name in zip(ids, names, strict=True)]


class _Renamed(OrderedDict):
    """A state dict that mmcv's `load_state_dict` does not copy, so that the names its modules give are seen after."""

    def copy(self) -> _Renamed:
        return self


def load_start(model: nn.Module, start: StartWeights, for_training: bool) -> None:
    """Loads weights, through the modules' own renaming of what older versions called otherwise. In training those of
    another shape (a head for other classes) and those that are missing start anew, said in one line.

    Raises:
        UserError: the weights are of another model; or nothing is trained, and a parameter would be random.
    """
    key, source = start.key, start.source
    weights = _Renamed(start.state)
    if versions := getattr(start.state, "_metadata", None):
        weights._metadata = versions
    own = model.state_dict()
    mmcv.runner.checkpoint.load_state_dict(model, weights, strict=False, logger=_quiet)
    other_shape = [name for name, weight in weights.items() if name in own and own[name].shape != weight.shape]
    absent = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    loaded = sum(name in own for name in weights) - len(other_shape)
    if not loaded:
        raise UserError(
            f"{key}: none of the {len(weights)} weights in {source} is one of this model's {len(own)}. Fix: use the "
            "config that it was trained with"
        )
    if not for_training:
        _refuse_random(model, weights, other_shape, absent, start)
    log_loaded(loaded, len(own), source, {"are of another shape": other_shape, "are not in it": absent})


def _refuse_random(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    other_shape: list[str],
    absent: list[str],
    start: StartWeights,
) -> None:
    instead = (
        "give the config that the weights were trained with (config_file, merge_config, config_overrides), or train "
        "from them first"
    )
    own = model.state_dict()
    if other_shape:
        name = other_shape[0]
        raise UserError(
            f"{start.key}: {name} has the shape {tuple(weights[name].shape)} in {start.source}, and "
            f"{tuple(own[name].shape)} in this model. Fix: {instead}"
        )
    # buffers that older versions did not have are constants; a teacher is asked in training alone
    of_model = {name for name, _ in model.named_parameters() if not name.startswith("teacher_model.")}
    if missing := [name for name in absent if name in of_model]:
        raise UserError(
            f"{start.key}: {start.source} has no {missing[0]}{f' and {len(missing) - 1} others' * (len(missing) > 1)}, "
            f"which this model has. Fix: {instead}"
        )
