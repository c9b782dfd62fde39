"""The hyperparameters of the DETR family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from shared.config.schema import PUBLISHED, Positive, TrainingHyperparameters, key
from shared.errors import UserError

BACKBONE = "backbone"
Share = Annotated[float, Meta(ge=0, le=1)]


@dataclass
class DetrHyperparameters(TrainingHyperparameters):
    """The `hyperparameters` section; the optimizer's defaults are those of RT-DETR."""

    global_batch_size: int = key(16, "images per step, over all slots")
    model: str | None = key(
        None, "a model of the Hub (`PekingU/rtdetr_v2_r18vd`), or a folder with its `config.json`", is_path=True
    )
    config: dict[str, Any] = key({}, "fields of the model's config; without `model`, all of it: `{model_type: d_fine}`")
    weights: str | None = key(
        None,
        "start from `published`, `backbone` (the published one), a safetensors file, a folder, a checkpoint folder or "
        "UUID; `null`: random weights",
        is_path=True,
    )
    masks: bool | None = key(None, "train and detect instance masks (`rf_detr`); `null`: as the model's config says")
    processor: dict[str, Any] = key({}, "fields of the image processor: `{size: {height: 320, width: 320}}`")

    lr: Positive = key(1e-4, "the learning rate of AdamW")
    backbone_lr: Annotated[float, Meta(ge=0)] | None = key(
        1e-5, "the learning rate of the backbone; `null`: the same, 0: it stays as it is"
    )
    weight_decay: Annotated[float, Meta(ge=0)] = key(1e-4, "weight decay, without biases and norms")
    clip_grad: Positive | None = key(0.1, "the norm to which the gradient of all parameters is clipped")
    sched: Literal["constant", "cosine", "linear"] = key("constant", "the schedule of the learning rate")
    warmup_batches: Annotated[int, Meta(ge=0)] = key(0, "batches over which the rate rises from 0")

    horizontal_flip: Share = key(0.5, "the probability of flipping a training image")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and "model_type" not in self.config:
            raise UserError(
                "hyperparameters.model: it is missing. Fix: name a model of the Hub or a folder, or give "
                "hyperparameters.config with its model_type"
            )
        if self.model is None and self.weights in (PUBLISHED, BACKBONE):
            raise UserError(
                f"hyperparameters.weights: {self.weights!r} are those of hyperparameters.model, which is missing. "
                "Fix: give the model, or weights: null"
            )
