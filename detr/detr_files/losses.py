"""Losses that do not depend on the number of ranks.

transformers divides each term by a count over this rank's batch. DDP then averages over ranks. So a box counts more on
a rank with few boxes. The terms are linear in 1/count. So a factor per term makes the average over ranks equal to the
loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import distributed
from transformers import PreTrainedConfig
from transformers.loss.loss_d_fine import DFineLoss
from transformers.loss.loss_deimv2 import Deimv2Loss

from shared.training.switches import weights_of

# transformers divides by the boxes of all ranks itself
_REDUCED = ("lw_detr", "rf_detr")
# the class loss is a mean, weighted by class, over all queries
_WEIGHTED_MEAN = ("detr", "yolos")
# a distillation between decoder layers, see `distillation_over_all_ranks`
_OF_LAYERS = "loss_ddf"
# divided by the dense matches, apart from those of denoising queries
_OF_MATCHES = ("loss_bbox", "loss_giou", "loss_fgl")


@dataclass(frozen=True)
class Counts:
    """Of one step, as tensors on the device.

    Attributes:
        boxes, matched, queries: on this rank: boxes, queries that a box is assigned to, queries.
        weighted: `matched`, each by the weight of its category.
        dense: queries that a box is assigned to in some layer, on this rank; 0 if the model has no dense matches.
        all_boxes, all_matched, all_queries, all_weighted, all_dense: the same on all ranks.
        slots: the number of ranks.
    """

    boxes: torch.Tensor
    matched: torch.Tensor
    queries: torch.Tensor
    weighted: torch.Tensor
    dense: torch.Tensor
    all_boxes: torch.Tensor
    all_matched: torch.Tensor
    all_queries: torch.Tensor
    all_weighted: torch.Tensor
    all_dense: torch.Tensor
    slots: int


@contextmanager
def counted_matches() -> Iterator[list[int]]:
    """Collects the number of DEIMv2's dense matches, by which it divides, and which it does not report."""
    counts: list[int] = []
    match = Deimv2Loss._get_dense_o2o_indices

    def counting(loss: Deimv2Loss, *indices: Any) -> list:
        found = match(loss, *indices)
        counts.append(sum(len(queries) for queries, _ in found))
        return found

    with mock.patch.object(Deimv2Loss, "_get_dense_o2o_indices", counting):
        yield counts


@contextmanager
def distillation_over_all_ranks(slots: int) -> Iterator[None]:
    """Inside, the mean over ranks of `loss_ddf` equals the loss of the whole batch.

    It is a weighted mean of two means, over the matched and over the other queries. The weights are the roots of their
    counts, `num_pos` and `num_neg`. Here they are this rank's shares of both means. All ranks compute the same layers.
    """
    compute = DFineLoss.loss_local
    weights: list[torch.Tensor] = []

    def local(loss: DFineLoss, outputs: dict, targets: list, indices: list, *arguments: Any, **named: Any) -> dict:
        batch, queries = outputs["pred_boxes"].shape[:2]
        matched = sum(len(of_image) for of_image, _ in indices)
        own = outputs["pred_boxes"].new_tensor([matched, batch * queries - matched])
        everywhere = own.clone()
        distributed.all_reduce(everywhere)
        shares = own / everywhere.clamp(min=1) * everywhere.sqrt() / everywhere.sqrt().sum()
        weights[:] = shares.unbind()
        terms = compute(loss, outputs, targets, indices, *arguments, **named)
        if _OF_LAYERS in terms:  # a mean by these weights: their sum makes it this rank's part
            terms[_OF_LAYERS] = terms[_OF_LAYERS] * shares.sum() * slots
        return terms

    def weight(position: int) -> property:
        return property(lambda _: weights[position], lambda *_: None)

    with (
        mock.patch.object(DFineLoss, "loss_local", local),
        mock.patch.object(DFineLoss, "num_pos", weight(0), create=True),
        mock.patch.object(DFineLoss, "num_neg", weight(1), create=True),
    ):
        yield


def all_boxes(
    labels: list[dict[str, torch.Tensor]],
    logits: torch.Tensor,
    slots: int,
    weights: torch.Tensor | None = None,
    dense: int = 0,
) -> Counts:
    """The counts of a step. All ranks call it together, once per step.

    Args:
        logits: (B, Q, K) of the last layer.
        weights: (K,) of the categories; None for 1.
        dense: see `counted_matches`.
    """
    images, queries = logits.shape[:2]
    boxes = [len(label["class_labels"]) for label in labels]
    matched = [min(count, queries) for count in boxes]
    weighted = list(matched)
    if weights is not None:  # of more boxes than queries, those that are matched are not known here
        means = [weights_of(label["class_labels"].cpu(), weights.cpu()).mean().item() for label in labels]
        weighted = [count * mean if count else 0 for count, mean in zip(matched, means, strict=True)]
    counts = (sum(boxes), sum(matched), images * queries, sum(weighted), dense)
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
    of_matches = None
    if getattr(config, "use_dense_one_to_one", False):
        of_matches = counts.slots * counts.dense.clamp(min=1) / counts.all_dense.clamp(min=1)
    scaled = {}
    total = loss * of_boxes
    for name, term in terms.items():
        scale = of_boxes
        if name.startswith("loss_ce") and of_classes is not None:
            scale = of_classes
        elif name.startswith(_OF_LAYERS):
            scale = 1.0
        elif of_matches is not None and name.startswith(_OF_MATCHES) and "_dn_" not in name:
            scale = of_matches
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
