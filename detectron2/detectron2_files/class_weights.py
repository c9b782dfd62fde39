"""`hyperparameters.class_weights` in Detectron2's losses, which have no weights of categories themselves."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from fvcore.nn import sigmoid_focal_loss
from torch import nn
from torch.nn import functional as F

from shared.training.switches import no_class_weights, weights_of


def weigh_categories(model: nn.Module, weights: torch.Tensor) -> None:
    """The classification losses of the model's box heads weigh each proposal and anchor by its category.

    Args:
        weights: (K,) by label.

    Raises:
        UserError: the model has another kind of classification loss.
    """
    heads = [module for module in model.modules() if isinstance(module, (FastRCNNOutputLayers, RetinaNet))]
    if not heads:
        raise no_class_weights(f"the loss of {type(model).__name__}")
    for head in heads:
        if getattr(head, "use_fed_loss", False):
            raise no_class_weights("the federated loss (use_fed_loss) of the config")
        mixin = _WeightedBoxHead if isinstance(head, FastRCNNOutputLayers) else _WeightedRetinaNet
        # the name stays: what a class keeps in plain attributes is looked up by it
        head.__class__ = type(type(head).__name__, (mixin, type(head)), {"__module__": type(head).__module__})
        head.register_buffer("class_weights", weights, persistent=False)


class _WeightedBoxHead:
    """Second stages."""

    def losses(self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Any]) -> dict[str, torch.Tensor]:
        losses = super().losses(predictions, proposals)
        logits, labels = predictions[0], torch.cat([each.gt_classes for each in proposals])
        if not len(labels):
            return losses
        rows = weights_of(labels, self.class_weights)
        if self.use_sigmoid_ce:
            classes = F.one_hot(labels, logits.shape[1])[:, :-1].to(logits.dtype)
            loss = F.binary_cross_entropy_with_logits(logits[:, :-1], classes, reduction="none").sum(dim=1)
        else:
            loss = F.cross_entropy(logits, labels, reduction="none")
        return {**losses, "loss_cls": (loss * rows).mean() * self.loss_weight.get("loss_cls", 1.0)}


class _WeightedRetinaNet:
    def losses(
        self,
        anchors: list[Any],
        pred_logits: list[torch.Tensor],
        gt_labels: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        gt_boxes: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        losses = super().losses(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes)
        labels = torch.stack(gt_labels)
        counted = labels >= 0
        labels, logits = labels[counted], torch.cat(pred_logits, dim=1)[counted]
        classes = F.one_hot(labels, self.num_classes + 1)[:, :-1].to(logits.dtype)
        loss = sigmoid_focal_loss(logits, classes, self.focal_loss_alpha, self.focal_loss_gamma, "none")
        rows = weights_of(labels, self.class_weights)
        return {**losses, "loss_cls": (loss * rows[:, None]).sum() / self.loss_normalizer}
