"""The model and the image processor of the hyperparameters: transformers' own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    ConditionalDetrImageProcessor,
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    RfDetrImageProcessor,
    RTDetrImageProcessor,
    YolosImageProcessor,
)

from detr_files.class_weights import weigh_categories
from detr_files.denoising import Ranks, denoising_as_one_rank
from detr_files.losses import all_boxes, counted_matches, distillation_over_all_ranks, scaled_to_all_ranks
from detr_files.masks import choose_architecture, has_masks, points_as_one_rank, scalar_mask_losses
from detr_hyperparameters import DetrHyperparameters
from shared.data.images import InputScale
from shared.errors import UserError, nearest

# the model types that transformers has losses for, and the image processor of a model without a folder
PROCESSORS = {
    "conditional_detr": ConditionalDetrImageProcessor,
    "d_fine": RTDetrImageProcessor,
    "dab-detr": ConditionalDetrImageProcessor,
    "deformable_detr": DeformableDetrImageProcessor,
    "deimv2": RTDetrImageProcessor,
    "detr": DetrImageProcessor,
    "lw_detr": DeformableDetrImageProcessor,
    "rf_detr": RfDetrImageProcessor,
    "rt_detr": RTDetrImageProcessor,
    "rt_detr_v2": RTDetrImageProcessor,
    "yolos": YolosImageProcessor,
}


@contextmanager
def refusing(key: str, what: str) -> Iterator[None]:
    """Raises UserError instead of what transformers raises for a value of the config."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers checks little, and fails in many ways
        raise UserError(f"{key}: {what} ({_in_one_line(error)}). Fix: correct the value") from error


def _in_one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join([f"{type(error).__name__}:", *lines[:3]])


def is_on_hub(model: str | None) -> bool:
    """Whether `hyperparameters.model` names a model of the Hub, and no folder."""
    return model is not None and not Path(model).is_dir()


def from_hub(load: Any, model: str, **options: Any) -> Any:
    """Loads a model of the Hub or a folder by a class of transformers. Code in it is never executed.

    Raises:
        UserError: it cannot be had; says which folder to copy.
    """
    try:
        return load(model, trust_remote_code=False, **options)
    except Exception as error:  # of the network, the Hub, the files
        if not is_on_hub(model):
            raise UserError(
                f"hyperparameters.model: {model} cannot be loaded ({_in_one_line(error)}). Fix: give a model of the "
                "Hugging Face Hub, or a folder with config.json"
            ) from error
        raise UserError(
            f"hyperparameters.model: {model!r} is not a folder, and the Hub does not send it ({type(error).__name__}). "
            "Fix: check the name; without a network, copy the model's folder (config.json, preprocessor_config.json, "
            "model.safetensors) to this machine, and give its path"
        ) from error


def model_config(hparams: DetrHyperparameters) -> PreTrainedConfig:
    """The model's config, with the changes of `hyperparameters.config`.

    Raises:
        UserError: it cannot be had, a field is unknown, or the model is no detector of the family.
    """
    changes = {name: value for name, value in hparams.config.items() if name != "model_type"}
    if hparams.model is None:
        model_type = hparams.config["model_type"]
        _check_type(model_type, "hyperparameters.config.model_type")
        known = AutoConfig.for_model(model_type).to_dict()
    else:
        found = from_hub(AutoConfig.from_pretrained, hparams.model)
        model_type, known = found.model_type, found.to_dict()
        _check_type(model_type, "hyperparameters.model")
    for name in changes:
        if name in ("num_labels", "id2label", "label2id"):
            raise UserError(f"hyperparameters.config.{name}: the data gives the categories. Fix: remove it")
        if name not in known:
            raise UserError(f"hyperparameters.config: unknown field {name!r} of {model_type}{nearest(name, known)}")
    if hparams.model is not None:
        changes = _merged(known, changes)
    with refusing("hyperparameters.config", f"{model_type} does not accept these values"):
        config = AutoConfig.for_model(model_type, **{k: v for k, v in changes.items() if k != "model_type"})
    choose_architecture(config, hparams.masks)
    return config


def _check_type(model_type: str, key: str) -> None:
    if model_type not in PROCESSORS:
        raise UserError(f"{key}: {model_type!r} is not supported{nearest(model_type, PROCESSORS)}")


def _merged(known: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with changes, also inside of nested fields such as `backbone_config`."""
    merged = dict(known)
    for name, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if nested else value
    return merged


def image_processor(hparams: DetrHyperparameters, model_type: str) -> Any:
    """The image processor, with the changes of `hyperparameters.processor`.

    Raises:
        UserError: it cannot be had, or a field is unknown.
    """
    processor = PROCESSORS[model_type]()
    if hparams.model is not None and not _lacks_processor(hparams.model):
        processor = from_hub(AutoImageProcessor.from_pretrained, hparams.model)
    known = processor.to_dict()
    for name in hparams.processor:
        if name not in known:
            raise UserError(f"hyperparameters.processor: unknown field {name!r}{nearest(name, known)}")
    with refusing("hyperparameters.processor", "the image processor does not accept these values"):
        return type(processor)(**{**known, **hparams.processor})


def _lacks_processor(model: str) -> bool:
    return not is_on_hub(model) and not Path(model, "preprocessor_config.json").is_file()


def input_scale(hparams: DetrHyperparameters) -> InputScale | None:
    """The finest stride of the features and the size of the input; None if the model's config does not say them."""
    config = model_config(hparams)
    size = image_processor(hparams, config.model_type).size
    sides = size.get("height"), size.get("width")
    if not hasattr(config, "feat_strides") or None in sides:
        return None
    return InputScale(min(config.feat_strides), "stride", min(sides), max(sides))


def input_step(config: PreTrainedConfig) -> int:
    """The number of pixels that divides each side of an input."""
    backbone = getattr(config, "backbone_config", None) or config
    patch = getattr(backbone, "patch_size", None)
    if patch is None:
        return 32
    patch = patch if isinstance(patch, int) else max(patch)
    return patch * getattr(backbone, "num_windows_side", getattr(backbone, "num_windows", 1))


def auto_model(config: PreTrainedConfig) -> type:
    """transformers' class that loads and builds models for this config."""
    return AutoModelForInstanceSegmentation if has_masks(config) else AutoModelForObjectDetection


def build_detector(config: PreTrainedConfig, categories: list[dict]) -> PreTrainedModel:
    """transformers' model for these categories, with random weights. Changes the labels of `config`.

    Raises:
        UserError: the config does not make a model.
    """
    config.id2label = {label: category["name"] for label, category in enumerate(categories)}
    config.label2id = {name: label for label, name in config.id2label.items()}
    with refusing("hyperparameters.config", f"a {config.model_type} cannot be built of it"):
        return auto_model(config).from_config(config, dtype=torch.float32, trust_remote_code=False)


class TrainedDetr(nn.Module):
    """A model of transformers that returns its losses.

    Attributes:
        detector: the model.
        class_weights: (K,) of the categories; None for 1.
    """

    def __init__(self, detector: PreTrainedModel, class_weights: torch.Tensor | None = None):
        super().__init__()
        self.class_weights = class_weights
        if class_weights is not None:
            weigh_categories(detector, class_weights)
        self.detector = detector
        self.takes_mask = "pixel_mask" in inspect.signature(detector.forward).parameters

    def outputs(self, images: torch.Tensor, mask: torch.Tensor | None, **labels: Any) -> Any:
        """What transformers' model returns."""
        masks = {"pixel_mask": mask} if self.takes_mask and mask is not None else {}
        return self.detector(pixel_values=images, **masks, **labels)

    def forward(
        self,
        images: torch.Tensor,
        mask: torch.Tensor | None,
        labels: list[dict[str, torch.Tensor]],
        ranks: Ranks | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses of a batch: "loss", and the terms of the last layer.

        Args:
            images: (B, 3, H, W) float32, as the image processor returns them.
            mask: (B, H, W) int64, 1 on the image and 0 on the padding; None without padding.
            labels: per image `class_labels` (N,) int64 and `boxes` (N, 4), x y width height of the image from 0 to 1;
                `masks` (N, H, W) bool if the model has them.
            ranks: that compute their parts of one batch, more than one; None does not ask others.
        """
        with ExitStack() as patches:
            if has_masks(self.detector.config):
                patches.enter_context(scalar_mask_losses())
                if ranks is not None:
                    patches.enter_context(points_as_one_rank(labels, self.detector.config.num_queries, ranks))
            if ranks is not None:
                patches.enter_context(denoising_as_one_rank(self.detector, labels, ranks))
                patches.enter_context(distillation_over_all_ranks(ranks.slots))
                matches = patches.enter_context(counted_matches())
            outputs = self.outputs(images, mask, labels=labels)
        losses = {name: value for name, value in outputs.loss_dict.items() if name.startswith("loss_")}
        loss = outputs.loss
        if ranks is not None:
            counts = all_boxes(labels, outputs.logits, ranks.slots, self.class_weights, sum(matches))
            loss, losses = scaled_to_all_ranks(self.detector.config, loss, losses, counts)
        parts = {name: value.detach() for name, value in losses.items() if _is_of_last_layer(name)}
        return {"loss": loss, **parts}


def _is_of_last_layer(name: str) -> bool:
    return name.replace("_mask_", "_").count("_") == 1
