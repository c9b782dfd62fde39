"""A Detectron2 config of either kind: found, overridden, and what the trial asks of it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import detectron2.config
import torch
from detectron2.solver import LRMultiplier
from torch import nn

from detectron2_files.hyperparameters import Detectron2Hyperparameters
from shared.data.input_scale import InputScale
from shared.errors import UserError
from shared.experiment import find_library_config

# what a zoo config says of COCO's things, and of its stuff in panoptic segmentation
COCO_CLASSES, COCO_STUFF_CLASSES = 80, 54


@dataclass
class TrainingSet:
    """Which registered data sets a config trains on, and which of their images."""

    names: tuple[str, ...]
    filter_empty: bool
    min_keypoints: int
    proposal_files: tuple[str, ...]
    group_by_aspect_ratio: bool
    repeat_threshold: float | None
    subset_ratio: float | None


class Detectron2Config(Protocol):
    """What the trial asks of a config; `YamlConfig` and `LazyConfigFile` answer."""

    path: Path
    weights: str
    batch_size: int
    max_iter: int
    eval_period: int
    checkpoint_period: int
    mixed_precision: bool
    train_set: TrainingSet
    val_names: tuple[str, ...]
    iou_types: tuple[str, ...]
    keypoint_sigmas: tuple[float, ...]
    polygon_masks: bool
    detects_instances: bool
    semantic: bool
    rotated: bool
    learning_rate: float
    schedule_name: str
    input_scale: InputScale | None

    def scale_schedule(self, global_batch_size: int) -> None:
        """The linear scaling rule of "Accurate, Large Minibatch SGD" (https://arxiv.org/abs/1706.02677): learning rate,
        warm-up, steps and length for another global batch than the recipe's."""

    def set_length(self, batches: int) -> None:
        """The number of iterations."""

    def class_counts(self) -> dict[str, int]:
        """Dotted key to number of classes, wherever the config says one."""

    def set_class_count(self, key: str, count: int) -> None:
        """Sets one of `class_counts`."""

    def mapper(self, training: bool, names: tuple[str, ...]) -> Any:
        """The config's mapper, from a data set's dict to the model's input; `names` of the data whose metadata it asks
        for."""

    def build_model(self) -> nn.Module:
        """The meta-architecture on the host, with its initial weights."""

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer, with the config's gradient clipping."""

    def lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        """The learning rate's schedule."""

    def write(self, folder: Path) -> None:
        """Writes the resolved config, to be read by `config_of_checkpoint`."""


def shipped_configs() -> Path:
    """The folder of the model zoo's configs, which the package brings along."""
    return Path(detectron2.config.__file__).parent.parent / "model_zoo" / "configs"


def load_config(hparams: Detectron2Hyperparameters, submitted: Path) -> Detectron2Config:
    """`config_file` with `config_overrides` over it.

    Raises:
        UserError: the file is not found or not a config, or a key does not exist.
    """
    from detectron2_files.lazy_config import LazyConfigFile
    from detectron2_files.yaml_config import YamlConfig

    _import_custom_modules(hparams.custom_imports)
    path = find_library_config(hparams.config_file, submitted, shipped_configs(), "config_file")
    kind = LazyConfigFile if path.suffix == ".py" or path.name == LazyConfigFile.resolved_name else YamlConfig
    return kind(path, flatten(hparams.config_overrides))


def config_of_checkpoint(checkpoint: Path) -> Path:
    """The resolved config that lies in a checkpoint.

    Raises:
        UserError: there is none.
    """
    from detectron2_files.lazy_config import LazyConfigFile
    from detectron2_files.yaml_config import YamlConfig

    for name in (YamlConfig.resolved_name, LazyConfigFile.resolved_name):
        if (checkpoint / name).is_file():
            return checkpoint / name
    raise UserError(f"{checkpoint} holds no Detectron2 config; it is no checkpoint of detectron2/model_def.py")


def flatten(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """{"SOLVER": {"STEPS": [1]}, "A.B": 2} as {"SOLVER.STEPS": [1], "A.B": 2}."""

    def walk(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in section.items():
            if isinstance(value, Mapping) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(overrides, ""))


def set_class_counts(config: Detectron2Config, in_data: Mapping[str, int], overridden: Sequence[str]) -> None:
    """Gives the model the data's number of classes, where the config has COCO's.

    Args:
        in_data: how many "things" and "stuff" the data has, as far as it is known.

    Raises:
        UserError: the config says another number, which is neither the data's nor the zoo's for COCO.
    """
    for key, stated in config.class_counts().items():
        kind, of_zoo = ("stuff", COCO_STUFF_CLASSES) if "sem_seg" in key.lower() else ("things", COCO_CLASSES)
        count = in_data.get(kind, stated)
        if stated == count:
            continue
        if stated != of_zoo or key in overridden:
            raise UserError(
                f"{key} is {stated}, and the data has {count} categories; say config_overrides: {{{key}: {count}}}, or "
                "correct the data"
            )
        config.set_class_count(key, count)


def _import_custom_modules(names: Sequence[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name.removesuffix(".py"))
        except Exception as error:  # the user's own module may raise anything
            raise UserError(
                f"hyperparameters.custom_imports: {name} cannot be imported: {type(error).__name__}: {error}; it must "
                "lie in the folder that is submitted"
            ) from error
