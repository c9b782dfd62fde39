"""The interface that a trial needs from a Detectron2 config of any kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from detectron2.solver import LRMultiplier
from torch import nn

from shared.data.images import InputScale
from shared.errors import UserError, nearest


@dataclass
class TrainingSet:
    """Which registered data sets a config trains on, and which of their images."""

    names: tuple[str, ...]
    filter_empty: bool
    min_keypoints: int
    proposal_files: tuple[str, ...]
    group_by_aspect_ratio: bool
    repeat_threshold: float | None
    repeat_sqrt: bool
    subset_ratio: float | None


class Detectron2Config(Protocol):
    """The interface that a trial needs from a config; `YamlConfig` and `LazyConfigFile` answer."""

    path: Path
    weights: str
    batch_size: int
    max_iter: int
    eval_period: int
    checkpoint_period: int
    mixed_precision: bool
    clips_gradients: bool
    cudnn_benchmark: bool
    float32_precision: str
    find_unused_parameters: bool
    halves_gradients: bool
    precise_bn_batches: int
    augments_tests: bool
    train_set: TrainingSet
    val_names: tuple[str, ...]
    val_proposal_files: tuple[str, ...]
    iou_types: tuple[str, ...]
    keypoint_sigmas: tuple[float, ...]
    scored_detections: int | None
    polygon_masks: bool
    detects_instances: bool
    semantic: bool
    rotated: bool
    learning_rate: float
    warmup_iters: int
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

    def with_test_augmentation(self, model: nn.Module) -> nn.Module:
        """The model that detects in an image's augmented versions, where `augments_tests`; its images are on the
        host."""

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer, with the config's gradient clipping."""

    def lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        """The learning rate's schedule."""

    def write(self, folder: Path) -> None:
        """Writes the resolved config, to be read by `config_of_checkpoint`."""


SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")


def check_sampler(name: str, key: str) -> None:
    """Raises UserError for a sampler that is not known, or cannot be had from a config."""
    if name in ("WeightedTrainingSampler", "WeightedCategoryTrainingSampler"):
        raise UserError(
            f"{key}: {name} needs DATASETS.TRAIN_REPEAT_FACTOR, a key that Detectron2's own configs do not have. Fix: "
            "use RepeatFactorTrainingSampler, or name a data set several times in DATASETS.TRAIN"
        )
    if name not in SAMPLERS:
        raise UserError(f"{key}: {name!r} is not known here{nearest(name, SAMPLERS)}")
