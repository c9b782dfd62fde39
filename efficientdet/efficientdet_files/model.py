"""The effdet model of the hyperparameters, and its weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import timm
import torch
from effdet import create_model_from_config, get_efficientdet_config
from effdet.anchors import get_feat_sizes
from effdet.bench import DetBenchTrain
from effdet.config.model_config import efficientdet_model_param_dict
from effdet.loss import DetectionLoss, focal_loss_legacy, new_focal_loss, one_hot

from efficientdet_hyperparameters import EfficientDetHyperparameters
from shared.errors import UserError, nearest
from shared.library import COCO_CATEGORIES
from shared.training.checkpoints import load_weights, read_weights, without_ddp
from shared.training.switches import weights_of

logger = logging.getLogger(__name__)

# effdet's COCO heads have a row for each id from 1 to 90; COCO does not use ten of them
COCO_ROWS = 90


def model_config(hparams: EfficientDetHyperparameters, num_classes: int) -> Any:
    """effdet's config of the model.

    Raises:
        UserError: the model or a key of `model_config` is not effdet's, the backbone not timm's, the size does not fit.
    """
    if hparams.model not in efficientdet_model_param_dict:
        raise UserError(
            f"hyperparameters.model: {hparams.model!r} is not a model of effdet"
            f"{nearest(hparams.model, efficientdet_model_param_dict)}"
        )
    config = get_efficientdet_config(hparams.model)
    if hparams.backbone is not None:
        config.backbone_name, config.backbone_args = hparams.backbone, {}
    if hparams.max_detections is not None:
        config.max_det_per_image = hparams.max_detections
    for key, value in hparams.model_config.items():
        if key not in config:
            raise UserError(f"hyperparameters.model_config: unknown key {key!r}{nearest(key, map(str, config))}")
        config[key] = value
    if not timm.is_model(str(config.backbone_name).split(".")[0]):
        raise UserError(
            f"hyperparameters.backbone: {config.backbone_name!r} is not a model of timm"
            f"{nearest(str(config.backbone_name), timm.list_models())}"
        )
    if "checkpoint_path" in (config.backbone_args or {}):
        raise UserError(
            "hyperparameters.model_config: backbone_args.checkpoint_path is a file that timm may execute. Fix: remove "
            "it, and give the detector's weights, hyperparameters.pretrained"
        )
    config.num_levels = config.max_level - config.min_level + 1
    config.num_classes = num_classes
    if hparams.input_size is not None:
        size = hparams.input_size
        config.image_size = (size, size) if isinstance(size, int) else tuple(size)
    stride = 2**config.max_level
    for side in config.image_size:
        if side < stride:
            raise UserError(
                f"hyperparameters.input_size: {side} is less than {stride}, the coarsest stride. Fix: give {stride} or "
                "more"
            )
    for name in ("label_smoothing", "legacy_focal", "soft_nms"):
        if getattr(hparams, name) is not None:
            config[name] = getattr(hparams, name)
    # effdet takes the best 5,000 of all scores, and small inputs have fewer
    sizes = get_feat_sizes(config.image_size, config.max_level)[config.min_level :]
    anchors = sum(height * width for height, width in sizes)
    scores = anchors * config.num_scales * len(config.aspect_ratios) * num_classes
    config.max_detection_points = min(config.max_detection_points, scores)
    return config


def build_model(hparams: EfficientDetHyperparameters, categories: list[dict]) -> DetBenchTrain:
    """effdet's training bench: images and targets to losses. `bench.model` is the detector.

    Raises:
        UserError: the config is wrong, or the pretrained weights cannot be had or are of another model.
    """
    config = model_config(hparams, len(categories))
    try:
        bench = create_model_from_config(
            config,
            bench_task="train",
            bench_labeler=hparams.labeler == "device",
            pretrained_backbone=hparams.pretrained == "backbone",
        )
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, IndexError) as error:
        what, fix = "", "correct hyperparameters.model_config"
        if hparams.pretrained == "backbone":
            what, fix = f" with the weights of {config.backbone_name}", f"{fix}; without internet, set pretrained: none"
        raise UserError(f"hyperparameters.model: {hparams.model} cannot be built{what}: {error}. Fix: {fix}") from error
    if hparams.pretrained not in ("none", "backbone"):
        load_pretrained(bench, hparams, config, categories)
    return bench


class WeightedLoss(DetectionLoss):
    """effdet's loss, in which an anchor's classification counts by the category of its object.

    Args:
        weights: (K,) by label.
    """

    def __init__(self, config: Any, weights: torch.Tensor):
        super().__init__(config)
        self.register_buffer("weights", weights, persistent=False)

    def forward(
        self,
        cls_outputs: list[torch.Tensor],
        box_outputs: list[torch.Tensor],
        cls_targets: list[torch.Tensor],
        box_targets: list[torch.Tensor],
        num_positives: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The total, the classification's and the boxes' loss."""
        _, _, boxes = super().forward(cls_outputs, box_outputs, cls_targets, box_targets, num_positives)
        normalizer = (num_positives.sum() + 1.0).float()
        classes = torch.stack(
            [self._of_level(*level, normalizer) for level in zip(cls_outputs, cls_targets, strict=False)]
        ).sum()
        return classes + self.box_loss_weight * boxes, classes, boxes

    def _of_level(self, outputs: torch.Tensor, targets: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor:
        """
        Args:
            outputs: (B, A·K, H, W) logits.
            targets: (B, H, W, A) labels from 0; -1 is background, -2 is ignored.
        """
        classes = one_hot(targets, self.num_classes)
        logits = outputs.permute(0, 2, 3, 1).float().view(classes.shape)
        if self.legacy_focal:
            loss = focal_loss_legacy(logits, classes, self.alpha, self.gamma, normalizer)
        else:
            loss = new_focal_loss(logits, classes, self.alpha, self.gamma, normalizer, self.label_smoothing)
        return (loss * ((targets != -2) * weights_of(targets, self.weights)).unsqueeze(-1)).sum()


def load_pretrained(
    bench: DetBenchTrain, hparams: EfficientDetHyperparameters, config: Any, categories: list[dict]
) -> None:
    """Start from `hparams.pretrained`: "effdet", a file, a URL or a checkpoint of ours.

    Raises:
        UserError: it cannot be had, holds code, or is of another model.
    """
    source = config.url if hparams.pretrained == "effdet" else hparams.pretrained
    if not source:
        other = "name another model" if hparams.model.startswith("tf_") else "choose a tf_… variant"
        raise UserError(
            f"hyperparameters.pretrained: effdet has no weights for {hparams.model}. Fix: {other}, or set "
            "hyperparameters.pretrained: backbone"
        )
    weights, known = read_detector_weights(source)
    weights = adapt_head(weights, bench.model.state_dict(), known, categories, source)
    load_weights(bench.model, weights, f"hyperparameters.pretrained: {source}")


def read_detector_weights(source: str) -> tuple[dict[str, torch.Tensor], list[dict] | None]:
    """The detector's state dict, and the categories that its head was trained on, None where it does not say."""
    state, checkpoint = read_weights(source, "hyperparameters.pretrained", "none, backbone, effdet")
    if checkpoint is not None:
        return _without_bench(state), checkpoint.categories
    # timm's checkpoints: the averaged weights first
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    return _without_bench(without_ddp(state)), None


def _without_bench(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    inner = {name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}
    return inner or dict(weights)


def adapt_head(
    weights: Mapping[str, torch.Tensor],
    initial: Mapping[str, torch.Tensor],
    known: list[dict] | None,
    categories: list[dict],
    source: str,
) -> dict[str, torch.Tensor]:
    """The weights with a class head for `categories`: the rows of those that are in `known` too, by name or,
    for a category without a name of its own, by COCO id. The rest keep their initial values.

    Args:
        initial: the state dict of the model that the weights are for.
        known: the categories of the weights' rows; None where they do not say: COCO's if it has 90 rows.
    """
    adapted = dict(weights)
    heads = [name for name in initial if name.startswith("class_net.predict.") and name in weights]
    sizes = [name for name in heads if name.endswith("bias")]
    if not sizes:
        return adapted
    anchors = len(initial[sizes[0]]) // len(categories)
    rows = len(weights[sizes[0]]) // anchors
    if known is None and rows == COCO_ROWS:
        row_of = {category["name"].lower(): category["id"] - 1 for category in COCO_CATEGORIES}
        row_of_id = {category["id"]: category["id"] - 1 for category in COCO_CATEGORIES}
    elif known is not None:
        row_of = {category["name"].lower(): row for row, category in enumerate(known)}
        row_of_id = {category["id"]: row for row, category in enumerate(known)}
    elif rows == len(categories):
        return adapted  # no names to go by: the same number of classes is taken for the same classes
    else:
        row_of, row_of_id = {}, {}

    pairs = []
    for label, category in enumerate(categories):
        name = category["name"].lower()
        row = row_of_id.get(category["id"]) if name in ("", str(category["id"])) else row_of.get(name)
        if row is not None:
            pairs.append((label, row))
    labels, source_rows = [label for label, _ in pairs], [row for _, row in pairs]
    for name in heads:
        # depthwise weights have no rows for classes, and another model's are left for `load_weights` to refuse
        old, new = weights[name], initial[name]
        if len(new) == anchors * len(categories) and len(old) == anchors * rows and new.shape[1:] == old.shape[1:]:
            # laid out anchor by anchor, class by class
            head = new.clone().unflatten(0, (anchors, len(categories)))
            head[:, labels] = old.unflatten(0, (anchors, rows))[:, source_rows].to(head.dtype)
            adapted[name] = head.flatten(0, 1)
    anew = [category["name"] for label, category in enumerate(categories) if label not in labels]
    logger.info(
        "pretrained: of %d categories, %d take their row of the head in %s, %d start anew%s",
        len(categories),
        len(pairs),
        source,
        len(anew),
        f" ({', '.join(anew[:5])}{', …' if len(anew) > 5 else ''})" if anew else "",
    )
    return adapted
