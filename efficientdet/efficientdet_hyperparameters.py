"""EfficientDet's hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shared.config.schema import Positive, TrainingHyperparameters, key
from shared.errors import UserError


@dataclass
class EfficientDetHyperparameters(TrainingHyperparameters):
    """The `hyperparameters` section; defaults are those of upstream's train.py."""

    global_batch_size: int = key(32, "images per step, over all slots", upstream="-b")

    # model
    model: str = key("tf_efficientdet_d1", "the model, one of effdet's names", upstream="--model")
    backbone: str | None = key(None, "the backbone, any timm model that gives features; default: the model's")
    model_config: dict[str, Any] = key({}, "changes to the model's config, such as `fpn_channels`")
    pretrained: str = key(
        "backbone",
        "start from `none`, `backbone`, `effdet`, a file, a URL, a checkpoint folder or UUID",
        is_path=True,
        upstream="--pretrained",
    )
    input_size: int | tuple[int, int] | None = key(None, "input pixels per side, or `[height, width]`")

    # loss and targets
    label_smoothing: float | None = key(
        None, "label smoothing of the new focal loss; default: the model's", upstream="--smoothing"
    )
    legacy_focal: bool | None = key(
        None, "use the focal loss of the first models; default: the model's", upstream="--legacy-focal"
    )
    labeler: Literal["loader", "device"] = key(
        "loader", "where anchors are matched: loader workers or the device", upstream="--bench-labeler"
    )

    # optimizer
    opt: str = key("momentum", "the optimizer, any of timm's", upstream="--opt")
    opt_eps: float | None = key(None, "the optimizer's epsilon; default: the optimizer's own", upstream="--opt-eps")
    momentum: float = key(0.9, "the optimizer's momentum", upstream="--momentum")
    weight_decay: float = key(4e-5, "weight decay, without biases and norms", upstream="--weight-decay")
    clip_grad: Positive | None = key(
        10.0, "the size to which gradients are clipped; `null` for no clipping", upstream="--clip-grad"
    )
    clip_mode: Literal["norm", "value", "agc"] = key(
        "norm", "how to clip; `agc` omits the heads' last layers", upstream="--clip-mode"
    )

    # learning rate
    lr: float = key(0.01, "the learning rate", upstream="--lr")
    lr_base_batch_size: int | None = key(None, "scale the rate: `lr` × `global_batch_size` / this")
    sched: str = key(
        "cosine", "the schedule: `cosine`, `multistep`, `plateau`, `poly`, `step` or `tanh`", upstream="--sched"
    )
    sched_on_updates: bool = key(False, "change the rate at each batch instead of each epoch")
    warmup_epochs: float = key(5, "epochs of warm-up", upstream="--warmup-epochs")
    warmup_lr: float = key(1e-4, "the rate at which the warm-up starts", upstream="--warmup-lr")
    min_lr: float = key(1e-5, "the lowest rate", upstream="--min-lr")
    cooldown_epochs: float = key(10, "epochs at `min_lr` at the end of the training", upstream="--cooldown-epochs")
    decay_epochs: float = key(30, "epochs between two decays of `step` and `multistep`", upstream="--decay-epochs")
    decay_rate: float = key(0.1, "the factor of a decay of `step` and `multistep`", upstream="--decay-rate")
    patience_epochs: int = key(
        10, "epochs that `plateau` waits for a better searcher metric", upstream="--patience-epochs"
    )
    lr_noise: list[float] | None = key(
        None, "the part of the training with a noisy rate, `[0.4, 0.9]`", upstream="--lr-noise"
    )
    lr_noise_pct: float = key(0.67, "the largest noise, as a share of the rate", upstream="--lr-noise-pct")
    lr_noise_std: float = key(1.0, "the standard deviation of the noise", upstream="--lr-noise-std")
    lr_cycle_mul: float = key(
        1.0, "the factor by which a cycle of `cosine` is longer than the last", upstream="--lr-cycle-mul"
    )
    lr_cycle_limit: int = key(1, "cycles of `cosine`", upstream="--lr-cycle-limit")

    # augmentation
    scale_jitter: tuple[float, float] = key((0.1, 2.0), "the range of the random scale")
    vertical_flip: bool = key(False, "also flip images upside down; horizontal flips are always on")
    train_interpolation: Literal["random", "bilinear", "bicubic", "lanczos", "hamming"] = key(
        "random", "how to resize training images; `random` is bilinear or bicubic", upstream="--train-interpolation"
    )
    interpolation: Literal["bilinear", "bicubic", "lanczos", "hamming"] | None = key(
        None, "how to resize validation images; default: the model's", upstream="--interpolation"
    )
    fill_color: str | int = key(
        "mean", "the color around the image: `mean`, or a gray level from 0 to 255", upstream="--fill-color"
    )
    random_erasing: float = key(0.0, "the probability of erasing rectangles of an image", upstream="--reprob")
    random_erasing_mode: Literal["const", "rand", "pixel"] = key(
        "pixel", "what fills an erased rectangle", upstream="--remode"
    )
    random_erasing_count: int = key(1, "the most rectangles per image", upstream="--recount")

    # validation
    soft_nms: bool | None = key(None, "suppress overlapping boxes softly; default: the model's", upstream="--soft-nms")
    val_skip: int = key(0, "validate on every Nth image only", upstream="--val-skip")

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.scale_jitter
        if not 0 < low <= high:
            raise UserError(
                f"hyperparameters.scale_jitter: {list(self.scale_jitter)} is not a range above 0. Fix: give [low, "
                "high], such as [0.5, 1.5]"
            )
        if isinstance(self.fill_color, str) and self.fill_color != "mean":
            raise UserError(
                f"hyperparameters.fill_color: {self.fill_color!r} is unknown. Fix: give mean or a number from 0 to 255"
            )

    @property
    def scaled_lr(self) -> float:
        """The learning rate, scaled linearly with the batch if `lr_base_batch_size` is given."""
        if self.lr_base_batch_size is None:
            return self.lr
        return self.lr * self.global_batch_size / self.lr_base_batch_size
