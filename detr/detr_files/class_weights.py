"""`hyperparameters.class_weights` in transformers' losses, which have no weights of categories themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel

from shared.training.switches import weights_of

# the losses of classes, by transformers' names: sums over queries; DETR's own "labels" is a softmax instead
_SUMS = ("labels", "bce", "focal", "mal", "vfl")


def weigh_categories(detector: PreTrainedModel, weights: torch.Tensor) -> None:
    """The classification loss weighs each query by the category of the box that it is assigned to.

    Args:
        weights: (K,) by label.
    """
    detector.loss_function = WeightedLoss(detector.loss_function, weights)


class WeightedLoss:
    """A loss function of transformers, whose criteria weigh categories.

    Args:
        loss: transformers' own. It makes a criterion for each batch, of a class in its module.
    """

    def __init__(self, loss: Callable[..., Any], weights: torch.Tensor):
        self.loss, self.weights = loss, weights
        classes = {name: value for name, value in vars(sys.modules[loss.__module__]).items() if _is_criterion(value)}
        self._weighted = {name: _weighted(kind, weights) for name, kind in classes.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with patch.multiple(self.loss.__module__, **self._weighted):
            return self.loss(*args, **kwargs)


def _is_criterion(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and hasattr(value, "get_loss")


def _weighted(kind: type[nn.Module], weights: torch.Tensor) -> type[nn.Module]:
    """A criterion's class that weighs categories."""

    class Weighted(kind):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            if hasattr(self, "empty_weight"):  # of the softmax
                self.empty_weight[:-1] = weights.to(self.empty_weight)

        def get_loss(
            self, loss: str, outputs: Mapping[str, Any], targets: list[Any], indices: list[Any], num_boxes: Any
        ) -> dict[str, torch.Tensor]:
            losses = super().get_loss(loss, outputs, targets, indices, num_boxes)
            has_softmax = loss == "labels" and hasattr(self, "empty_weight")
            if loss not in _SUMS or has_softmax:
                return losses
            labels = torch.cat([each["class_labels"][j] for each, (_, j) in zip(targets, indices, strict=True)])
            rows = weights_of(labels, weights.to(labels.device))
            for weight in rows[rows != 1].unique():
                part = super().get_loss(loss, *_queries(outputs, targets, indices, rows == weight), num_boxes)
                losses = {name: value + (weight - 1) * part[name] for name, value in losses.items()}
            return losses

    Weighted.__name__ = kind.__name__
    return Weighted


def _queries(outputs: Mapping[str, Any], targets: list[Any], indices: list[Any], chosen: torch.Tensor) -> tuple:
    """The outputs, targets and indices of some of the queries that have a box, as one image's.

    Args:
        chosen: (boxes,) bool, in the order of `indices`.
    """
    images = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(indices)])[chosen.cpu()]
    queries = torch.cat([queries for queries, _ in indices])[chosen.cpu()]
    target = {
        name: torch.cat([each[name][j] for each, (_, j) in zip(targets, indices, strict=True)])[chosen]
        for name in ("class_labels", "boxes")
    }
    positions = torch.arange(len(queries))
    few = {name: outputs[name][images, queries][None] for name in ("logits", "pred_boxes")}
    return few, [target], [(positions, positions)]
