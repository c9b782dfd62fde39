"""Denoising queries that do not depend on the number of ranks.

transformers pads an image's noisy boxes to the most boxes per image of this rank, and draws the noise for this rank
alone. Here each rank pads to the most boxes of all ranks. It draws the noise of the whole batch as one rank would, and
takes its own rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import distributed, nn
from torch.overrides import TorchFunctionMode

# transformers' function that makes the queries, in the module of each model that has them
_MAKES_QUERIES = "get_contrastive_denoising_training_group"


@dataclass(frozen=True)
class Ranks:
    """The ranks that compute their parts of one batch.

    Attributes:
        rank, slots: which part this is, and of how many.
        random_state: state of the device's generator when one rank computes the whole batch.
    """

    rank: int
    slots: int
    random_state: torch.Tensor


@contextmanager
def denoising_as_one_rank(detector: nn.Module, labels: list[dict[str, torch.Tensor]], ranks: Ranks) -> Iterator[None]:
    """Inside, the model's denoising queries are this rank's part of those of the whole batch. All ranks enter it."""
    module = sys.modules[type(detector).__module__]
    make_queries = getattr(module, _MAKES_QUERIES, None)
    if make_queries is None:
        yield
        return
    device = labels[0]["boxes"].device
    most = torch.tensor(max(len(label["class_labels"]) for label in labels), device=device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    generator = torch.Generator(device)
    generator.set_state(ranks.random_state)
    part = _of_whole_batch(make_queries, int(most), ranks, generator)
    with mock.patch.object(module, _MAKES_QUERIES, part):
        yield


def _of_whole_batch(make_queries: Callable, most: int, ranks: Ranks, generator: torch.Generator) -> Callable:
    def part(targets: list[dict[str, torch.Tensor]], *arguments: Any, **named: Any) -> tuple:
        like = targets[0]
        # one more image sets how many boxes the others are padded to
        fullest = {
            "class_labels": like["class_labels"].new_zeros(most),
            "boxes": like["boxes"].new_full((most, 4), 0.5),
        }
        with _NoiseOfWholeBatch(ranks, generator):
            classes, boxes, mask, about = make_queries([*targets, fullest], *arguments, **named)
        if classes is None:
            return classes, boxes, mask, about
        return classes[:-1], boxes[:-1], mask, {**about, "dn_positive_idx": about["dn_positive_idx"][:-1]}

    return part


class _NoiseOfWholeBatch(TorchFunctionMode):
    """Random tensors like one of this rank's images and one more: the rows of a tensor like all images of all ranks."""

    def __init__(self, ranks: Ranks, generator: torch.Generator):
        super().__init__()
        self.ranks, self.generator = ranks, generator

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        drawers = {torch.rand_like: torch.rand, torch.randint_like: torch.randint}
        if function not in drawers:
            return function(*arguments, **named)
        like, *bounds = arguments
        own = len(like) - 1
        options = {"dtype": named.get("dtype", like.dtype), "device": like.device, "generator": self.generator}
        whole = drawers[function](*bounds, (own * self.ranks.slots, *like.shape[1:]), **options)
        rows = whole[own * self.ranks.rank : own * (self.ranks.rank + 1)]
        return torch.cat([rows, torch.zeros_like(rows[:1])])
