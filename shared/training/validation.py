"""A validation: its numbers, and the losses of its images (`hyperparameters.validation_loss`).

The losses of each image are computed alone, by the model that validates. The image's id seeds what is drawn at random.
So they are the same for any number of processes and batch sizes, and leave nothing behind in the model.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from shared.config.schema import SearcherMetric
from shared.data.annotations import ImageRecord
from shared.data.dataset import Transform, kept_random_state
from shared.data.loading import Batch
from shared.errors import UserError
from shared.evaluation.detections import Detections
from shared.evaluation.gathered import ChiefReducer, Gather
from shared.training.saving import python_state, restore_python_state

PREFIX = "val_"
TOTAL = f"{PREFIX}loss"


@dataclass(frozen=True)
class Validation:
    """The results of a validation."""

    batches: int  # trained before it
    metrics: dict[str, float]  # by their names; nan if undefined
    category_ap: dict[str, float]
    pictured: list[Detections]  # on the chief's first images, to draw

    @classmethod
    def of(cls, batches: int, reduced: Mapping[str, Any], wanted: str, pictured: list[Detections]) -> Validation:
        """Splits all that the evaluator and the losses give. Raises UserError if the searcher metric, `wanted`, is not
        among them."""
        if wanted not in reduced:
            raise UserError(
                f"searcher.metric: {wanted!r} is not among the metrics of a validation. Fix: choose one of "
                f"{', '.join(map(repr, sorted(reduced)))}"
            )
        numbers = {name: float(value) for name, value in reduced.items()}
        category_ap = {name: value for name, value in numbers.items() if "_AP/" in name}
        metrics = {name: value for name, value in numbers.items() if name not in category_ap}
        return cls(batches, metrics, category_ap, pictured)

    def for_master(self, metric: SearcherMetric) -> dict[str, float]:
        """The numbers that steer a run: the master draws a chart for each name. None is undefined, because one
        undefined searcher metric puts an adaptive search, with all its trials, into ERROR."""
        kept = {
            name: value
            for name, value in self.metrics.items()
            if math.isfinite(value) and "_AR_" not in name and (name == TOTAL or not name.startswith(PREFIX))
        }
        return {**kept, metric.name: metric.value_or_worst(self.metrics[metric.name])}


# --- the samples ------------------------------------------------------------------------------------


def with_loss_sample(
    evaluation: Transform, loss: Transform, left_out: frozenset[int], image: Any, record: ImageRecord
) -> tuple[Any, Any]:
    """An image's evaluation sample, and beside it the sample whose losses are computed.

    Args:
        loss: as `evaluation`, with the training's targets. It may give None.
        left_out: ids of the images that the training would omit: the second sample is None.
    """
    for_loss = None if record.image_id in left_out else loss(image, record)
    return evaluation(image, record), for_loss


def collate_with_loss(
    evaluation: Callable[[list], Batch], training: Callable[[list], Batch], samples: list[tuple[Any, Any]]
) -> Batch:
    """The evaluation's batch of what `with_loss_sample` gave. Its `for_loss` has a batch of one for each image whose
    losses are computed."""
    batch = evaluation([sample for sample, _ in samples])
    return replace(batch, for_loss=[training([sample]) for _, sample in samples if sample is not None])


# --- the model ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def giving_losses(
    model: nn.Module, attributes: Mapping[str, Sequence[str]], state: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """For the losses of one image: the model in training mode, in which the libraries' models give losses, in one
    process. Normalization and dropout stay in evaluation mode. Afterwards all that its modules keep (modes, buffers,
    plain attributes) is as before, and so are the random generators.

    Args:
        attributes: as for `python_state`: a module may keep a list that grows, or an object that is no module.
        state: the `python_state` of another process, instead of this one's.
    """
    kept = [(module, dict(module.__dict__)) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module, _ in kept
        if not _is_at_rest(module)  # a norm's buffers are many and cannot change
        for name, buffer in module.named_buffers(recurse=False)
    ]
    own_state = python_state(model, attributes)
    try:
        for module, _ in kept:  # not by train(), which some detectors override
            module.training = not _is_at_rest(module)
        restore_python_state(model, state or {})
        # the libraries' losses average their divisor over all processes. Each of them is at another image, and one
        # that has fewer images would make the others wait without end
        with kept_random_state(), mock.patch.object(torch.distributed, "is_initialized", return_value=False):
            yield
    finally:
        for module, before in kept:
            module.__dict__.clear()
            module.__dict__.update(before)
        for module, name, buffer, before in buffers:
            setattr(module, name, buffer.copy_(before))
        restore_python_state(model, own_state)


def _is_at_rest(module: nn.Module) -> bool:
    """Whether a module differs between evaluation and training: normalization, dropout, random paths. PyTorch, timm,
    mmcv and Detectron2 have classes of their own for each."""
    name, parts = type(module).__name__.lower(), ("norm", "drop", "stochasticdepth", "rrelu")
    return isinstance(module, nn.MultiheadAttention) or any(part in name for part in parts)


def uncompiled(compiles: bool) -> contextlib.AbstractContextManager:
    """Evaluations do not compile anew what `torch_compile` compiled for the training's batches: their images have many
    sizes. PyTorch can do this from 2.6 on."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    return set_stance("force_eager") if compiles and set_stance else contextlib.nullcontext()


def check_losses(samples: Iterator[Any], compute: Callable[[Any], object]) -> None:
    """Computes the losses of the first sample that is not None, before the training. Raises UserError if the first
    hundred have none, or the detector's library cannot compute them."""
    # a pipeline that makes no sample of the first images most likely makes none of any
    sample = next((sample for sample in itertools.islice(samples, 100) if sample is not None), None)
    if sample is None:
        raise UserError("hyperparameters.validation_loss: no image of data.val gives a training sample. Fix: omit it")
    try:
        compute(sample)
    except UserError:
        raise
    except Exception as error:  # a library's losses may need anything that training has
        raise UserError(
            "hyperparameters.validation_loss: the losses of this model cannot be computed on the validation images "
            f"({type(error).__name__}: {error}). Fix: omit it"
        ) from error


# --- the mean ---------------------------------------------------------------------------------------


class ValidationLoss(ChiefReducer):
    """Means over the images `image_ids` of what `update` was given, with "val_" before the names.

    An image that several slots saw counts once. The sums are in the order of ids. A loss that an image lacks counts as
    0, as in the image's total. Other values, such as an accuracy, are averaged over the images that have it.
    """

    def __init__(self, image_ids: np.ndarray, gather: Gather):
        super().__init__(gather)
        self.image_ids = set(image_ids.tolist())
        self.reset()

    def reset(self) -> None:
        self._losses: dict[int, tuple[tuple[str, ...], torch.Tensor]] = {}

    def update(self, image_id: int, losses: Mapping[str, torch.Tensor]) -> None:
        """Adds an image's losses, scalars on the device; nothing is read from there."""
        self._losses[image_id] = tuple(losses), torch.stack([value.detach().float() for value in losses.values()])

    def share(self) -> dict[int, dict[str, float]]:
        """Each image's losses, by its id. They are read from the device at once."""
        if not self._losses:
            return {}
        numbers = iter(torch.cat([values for _, values in self._losses.values()]).tolist())
        return {image_id: {name: next(numbers) for name in names} for image_id, (names, _) in self._losses.items()}

    def metrics_of(self, shares: list[dict[int, dict[str, float]]]) -> dict[str, float]:
        seen = {image_id: losses for share in shares for image_id, losses in share.items()}
        of_images = {image_id: losses for image_id, losses in seen.items() if image_id in self.image_ids}
        if not of_images:  # a validation that was cut short
            return {TOTAL: math.nan}
        ordered = [of_images[image_id] for image_id in sorted(of_images)]
        metrics = {}
        for name in dict.fromkeys(["loss", *(name for losses in ordered for name in losses)]):
            values = [losses[name] for losses in ordered if name in losses]
            metrics[f"{PREFIX}{name}"] = sum(values) / (len(ordered) if "loss" in name else len(values))
        return metrics
