"""Losses that do not depend on the number of ranks.

transformers divides each term by a count over this rank's batch. DDP then averages over ranks. So a box counts more on
a rank with few boxes. The terms are linear in 1/count. So a factor per term makes the average over ranks equal to the
loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import distributed
from transformers import PreTrainedConfig

from shared.training.class_weights import weights_of

# transformers divides by the boxes of all ranks itself
_REDUCED = ("lw_detr", "rf_detr")
# the class loss is a mean, weighted by class, over all queries
_WEIGHTED_MEAN = ("detr", "yolos")
# a distillation between decoder layers: no term of a box count, and no linear one
_OF_LAYERS = "loss_ddf"


@dataclass(frozen=True)
class Counts:
    """Of one step, as tensors on the device.

    Attributes:
        boxes, matched, queries: on this rank: boxes, queries that a box is assigned to, queries.
        weighted: `matched`, each by the weight of its category.
        all_boxes, all_matched, all_queries, all_weighted: the same on all ranks.
        slots: the number of ranks.
    """

    boxes: torch.Tensor
    matched: torch.Tensor
    queries: torch.Tensor
    weighted: torch.Tensor
    all_boxes: torch.Tensor
    all_matched: torch.Tensor
    all_queries: torch.Tensor
    all_weighted: torch.Tensor
    slots: int


def all_boxes(
    labels: list[dict[str, torch.Tensor]], logits: torch.Tensor, slots: int, weights: torch.Tensor | None = None
) -> Counts:
    """The counts of a step. All ranks call it together, once per step.

    Args:
        logits: (B, Q, K) of the last layer.
        weights: (K,) of the categories; None for 1.
    """
    images, queries = logits.shape[:2]
    boxes = [len(label["class_labels"]) for label in labels]
    matched = [min(count, queries) for count in boxes]
    weighted = list(matched)
    if weights is not None:  # of more boxes than queries, those that are matched are not known here
        means = [weights_of(label["class_labels"].cpu(), weights.cpu()).mean().item() for label in labels]
        weighted = [count * mean if count else 0 for count, mean in zip(matched, means, strict=True)]
    counts = (sum(boxes), sum(matched), images * queries, sum(weighted))
    own = torch.tensor(counts, dtype=torch.float32, device=logits.device)
    everywhere = own.clone()
    distributed.all_reduce(everywhere)
    return Counts(*own, *everywhere, slots)


def scaled_to_all_ranks(
    config: PreTrainedConfig, loss: torch.Tensor, terms: Mapping[str, torch.Tensor], counts: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and its terms. Their mean over ranks equals the loss of the whole batch.

    Args:
        terms: the model's `loss_dict`; in `loss` they are weighted.
    """
    of_boxes, of_classes = _box_scale(config, counts), None
    if config.model_type in _WEIGHTED_MEAN:
        of_classes = _class_scale(config, counts)
    scaled = {}
    total = loss * of_boxes
    for name, term in terms.items():
        scale = of_boxes
        if name.startswith("loss_ce") and of_classes is not None:
            scale = of_classes
        elif name.startswith(_OF_LAYERS):
            scale = 1.0
        if scale is not of_boxes:  # in `loss` with weight 1, or weighted already
            total = total + term * (scale - of_boxes)
        scaled[name] = term * scale
    return total, scaled


def _box_scale(config: PreTrainedConfig, counts: Counts) -> torch.Tensor:
    if config.model_type in _REDUCED:
        # `group_detr` copies of the queries; transformers takes at least one box per rank
        groups = config.group_detr
        upstream = (groups * counts.all_boxes / counts.slots).clamp(min=1)
        return counts.slots * upstream / (groups * counts.all_boxes).clamp(min=1)
    return counts.slots * counts.boxes.clamp(min=1) / counts.all_boxes.clamp(min=1)


def _class_scale(config: PreTrainedConfig, counts: Counts) -> torch.Tensor:
    def weight(weighted: torch.Tensor, matched: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        return weighted + config.eos_coefficient * (queries - matched)

    own = weight(counts.weighted, counts.matched, counts.queries)
    everywhere = weight(counts.all_weighted, counts.all_matched, counts.all_queries)
    return counts.slots * own / everywhere
