"""`hyperparameters.class_weights`: how much the objects of each category count in the classification loss.

A detector multiplies the classification loss of each anchor, proposal or query by the weight of the category that it is
assigned to. Background counts 1. Box losses do not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from shared.errors import UserError, nearest

KEY = "hyperparameters.class_weights"
BALANCED = "balanced"


def class_weights(
    given: str | Mapping[str, float], categories: Sequence[dict], labels: np.ndarray
) -> torch.Tensor | None:
    """(K,) float32: the weight of each label. None if all are 1.

    Args:
        given: "balanced": all categories count the same, and an average object counts 1. Or weights by category name, 1
            for the others.
        labels: (objects,) of the training data.

    Raises:
        UserError: a name is no category.
    """
    if given == BALANCED:
        counts = np.bincount(labels, minlength=len(categories))
        in_use = counts > 0
        weights = np.ones(len(categories))
        weights[in_use] = counts.sum() / (in_use.sum() * counts[in_use])
    else:
        names = [category["name"] for category in categories]
        for name in given:
            if name not in names:
                raise UserError(f"{KEY}: {name!r} is no category of data.train{nearest(name, names)}")
        weights = np.array([given.get(name, 1.0) for name in names])
    return None if (weights == 1).all() else torch.tensor(weights, dtype=torch.float32)


def weights_of(labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weight of each label, in the labels' shape. A label that is no category, as background, has 1."""
    known = (labels >= 0) & (labels < len(weights))
    return torch.where(known, weights[labels.where(known, 0)], 1.0)


def refused(loss: str) -> UserError:
    """The error for a loss that cannot weigh categories."""
    return UserError(
        f"{KEY}: {loss} takes no weights of categories. Fix: remove it, or repeat images of rare categories with "
        "data.repeat_threshold"
    )
