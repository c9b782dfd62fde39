"""EfficientDet's hyperparameters. The README's table says what each does and what upstream calls it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from shared.config.schema import TrainingHyperparameters
from shared.errors import UserError


@dataclass
class EfficientDetHyperparameters(TrainingHyperparameters):
    """The `hyperparameters` section; defaults are those of upstream's train.py."""

    global_batch_size: int = 32

    # model
    model: str = "tf_efficientdet_d1"
    backbone: str | None = None
    model_config: dict[str, Any] = field(default_factory=dict)
    pretrained: str = "backbone"
    input_size: int | tuple[int, int] | None = None

    # loss and targets
    label_smoothing: float | None = None
    legacy_focal: bool | None = None
    labeler: Literal["loader", "device"] = "loader"

    # optimizer
    opt: str = "momentum"
    opt_eps: float | None = None
    momentum: float = 0.9
    weight_decay: float = 4e-5
    clip_grad: float | None = 10.0
    clip_mode: Literal["norm", "value", "agc"] = "norm"

    # learning rate
    lr: float = 0.01
    lr_base_batch_size: int | None = None
    sched: str = "cosine"
    sched_on_updates: bool = False
    warmup_epochs: float = 5
    warmup_lr: float = 1e-4
    min_lr: float = 1e-5
    cooldown_epochs: float = 10
    decay_epochs: float = 30
    decay_rate: float = 0.1
    patience_epochs: int = 10
    lr_noise: list[float] | None = None
    lr_noise_pct: float = 0.67
    lr_noise_std: float = 1.0
    lr_cycle_mul: float = 1.0
    lr_cycle_limit: int = 1

    # augmentation
    scale_jitter: tuple[float, float] = (0.1, 2.0)
    vertical_flip: bool = False
    train_interpolation: Literal["random", "bilinear", "bicubic", "lanczos", "hamming"] = "random"
    interpolation: Literal["bilinear", "bicubic", "lanczos", "hamming"] | None = None
    fill_color: str | int = "mean"
    random_erasing: float = 0.0
    random_erasing_mode: Literal["const", "rand", "pixel"] = "pixel"
    random_erasing_count: int = 1

    # validation
    soft_nms: bool | None = None
    val_skip: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.scale_jitter
        if not 0 < low <= high:
            raise UserError(f"hyperparameters.scale_jitter: {list(self.scale_jitter)} is not a range above 0")
        if isinstance(self.fill_color, str) and self.fill_color != "mean":
            raise UserError(f"hyperparameters.fill_color: {self.fill_color!r} is neither 'mean' nor a number 0 to 255")

    @property
    def scaled_lr(self) -> float:
        """The learning rate by the linear scaling rule, where `lr_base_batch_size` is given."""
        if self.lr_base_batch_size is None:
            return self.lr
        return self.lr * self.global_batch_size / self.lr_base_batch_size
