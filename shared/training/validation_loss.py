"""The training's losses on the validation images as they are: `hyperparameters.validation_loss`.

The losses of each image are computed alone, by the model that validates, with what is drawn at random seeded by the
image. So they are the same for any number of processes and batch sizes, and leave nothing behind in the model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.data.annotations import ImageRecord
from shared.data.dataset import Transform
from shared.data.loading import Batch
from shared.evaluation.gathered import ChiefReducer, Gather
from shared.training.saving import python_state, restore_python_state

PREFIX = "val_"
TOTAL = f"{PREFIX}loss"


# --- samples ----------------------------------------------------------------------------------------


class WithLossSample:
    """A transform that gives an image's evaluation sample, and beside it the one whose losses are computed; None for an
    image that the training would leave out.

    Args:
        evaluation: the transform to detect on.
        loss: the same without augmentation, with the training's targets; may give None.
        left_out: ids of the images that the training would leave out.
    """

    def __init__(self, evaluation: Transform, loss: Transform, left_out: frozenset[int]):
        self.evaluation, self.loss, self.left_out = evaluation, loss, left_out

    def __call__(self, image: Any, record: ImageRecord) -> tuple[Any, Any]:
        for_loss = None if record.image_id in self.left_out else self.loss(image, record)
        return self.evaluation(image, record), for_loss


class CollateWithLoss:
    """A collate function for `WithLossSample`: the evaluation's batch, which has a batch of one for each image whose
    losses are computed in `for_loss`."""

    def __init__(self, evaluation: Callable[[list], Batch], training: Callable[[list], Batch]):
        self.evaluation, self.training = evaluation, training

    def __call__(self, samples: list[tuple[Any, Any]]) -> Batch:
        batch = self.evaluation([sample for sample, _ in samples])
        batch.for_loss = [self.training([sample]) for _, sample in samples if sample is not None]
        return batch


# --- the model --------------------------------------------------------------------------------------


@contextlib.contextmanager
def giving_losses(
    model: nn.Module, attributes: Mapping[str, Sequence[str]], state: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """The model in training mode, in which the libraries' models give losses, but for normalisation and dropout, which
    stay as they are in an evaluation. All that its modules keep (modes, buffers, plain attributes) is as before
    afterwards.

    Args:
        attributes: what `python_state` is asked for: a module's attribute may be a list that grows, or belong to an
            object that is no module.
        state: `python_state` of another process, in the place of this one's.
    """
    kept = [(module, dict(module.__dict__)) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module, _ in kept
        if not _is_at_rest(module)  # a norm's cannot change, and are many
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    own_state = python_state(model, attributes)
    try:
        for module, _ in kept:  # not by train(), which detectors have ways of their own with
            module.training = not _is_at_rest(module)
        restore_python_state(model, state or {})
        yield
    finally:
        for module, before in kept:
            module.__dict__.clear()
            module.__dict__.update(before)
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer.copy_(before)
        restore_python_state(model, own_state)


def _is_at_rest(module: nn.Module) -> bool:
    """Whether a module is what an evaluation has otherwise than a training: normalisation, dropout, random paths.
    PyTorch, timm, mmcv and Detectron2 have classes of their own for each."""
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.MultiheadAttention)):
        return True
    name = type(module).__name__.lower()
    return any(part in name for part in ("norm", "drop", "stochasticdepth", "rrelu"))


@contextlib.contextmanager
def as_one_process() -> Iterator[None]:
    """torch.distributed says that there is no group. The libraries' losses average what they divide by over all
    processes: each is at another image, which would be mixed, and one that has fewer images would be waited for without
    end."""
    asked = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_initialized = asked


# --- the mean ---------------------------------------------------------------------------------------


class ValidationLoss(ChiefReducer):
    """Means over images of what `update` was given, "val_" before the names: an image that several slots have seen
    counts once, and the sums are in the order of ids. A loss that an image has not is 0 there, as it is in the image's
    total; of what is no loss (an accuracy) the mean is over the images that have it.

    Args:
        image_ids: of the images that count.
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

    def share(self) -> dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]]:
        """By names: (images,) ids and (images, names) values."""
        shared = {}
        for names in {names for names, _ in self._losses.values()}:
            of_names = {image_id: values for image_id, (own, values) in self._losses.items() if own == names}
            values = torch.stack(list(of_names.values())).cpu().numpy()
            shared[names] = np.asarray(list(of_names)), values.astype(np.float64)
        return shared

    def metrics_of(self, shares: list[dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]]]) -> dict[str, float]:
        of_images = {
            image_id: dict(zip(names, row, strict=True))
            for share in shares
            for names, (ids, rows) in share.items()
            for image_id, row in zip(ids.tolist(), rows.tolist(), strict=True)
            if image_id in self.image_ids
        }
        if not of_images:  # a validation that was cut short
            return {TOTAL: math.nan}
        ordered = [of_images[image_id] for image_id in sorted(of_images)]
        metrics = {}
        for name in dict.fromkeys(["loss", *(name for losses in ordered for name in losses)]):
            values = [losses[name] for losses in ordered if name in losses]
            metrics[f"{PREFIX}{name}"] = sum(values) / (len(ordered) if "loss" in name else len(values))
        return metrics
