"""The part of a trial that validates, and what becomes of a validation's numbers."""

from __future__ import annotations

import contextlib
import itertools
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from determined.pytorch import PyTorchCallback, PyTorchTrialContext
from torch import nn

from shared.config.schema import TrainingHyperparameters
from shared.data.dataset import kept_random_state, seed_all
from shared.data.loading import Batch, to_device
from shared.data.open import SplitData
from shared.errors import UserError
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import summary_metrics
from shared.evaluation.gathered import ChiefReducer
from shared.training.hang import Phase, Watch
from shared.training.memory import out_of_memory_as
from shared.training.processes import broadcast_from_chief
from shared.training.saving import python_state
from shared.training.validation_loss import PREFIX, TOTAL, ValidationLoss, as_one_process, giving_losses

if TYPE_CHECKING:
    from shared.training.trial import DetectionTrial

PICTURES = 4  # images that are kept to be drawn


class TrialValidation:
    """What a detector says of its detections, and the validation that comes of it.

    Attributes:
        last_validation: the numbers of the last validation; `category_ap` the AP of each category.
        validated_at: the batches trained until then.
        pictured: detections of the chief's first images in it, to be drawn.
        validates_loss: whether it gives the training's losses too, which `validation_loss` gathers then.
    """

    iou_types: tuple[str, ...] = ("bbox",)
    chief_python_state: Mapping[str, Any] | None = None  # where there are several slots

    context: PyTorchTrialContext
    hparams: TrainingHyperparameters
    plain_model: nn.Module
    ema: Any
    evaluator: ChiefReducer
    validates_loss: bool = False
    validation_loss: ValidationLoss | None = None
    python_attributes: Mapping[str, Sequence[str]]
    val_data: SplitData
    seed: int
    slots: int
    per_slot_batch_size: int
    batches_trained: int
    for_training: bool
    watch: Watch

    # --- what a detector says of itself ---------------------------------------------------------------

    @abstractmethod
    def detect(self, model: nn.Module, batch: Batch) -> list[Detections]:
        """The detections of each image of a prepared batch."""

    @abstractmethod
    def check_pretrained(self) -> None:
        """Raises UserError where the config's weights detect nothing, and no checkpoint is given."""

    def reported_metrics(self) -> list[str] | None:
        """The names that a validation reports, one of which the searcher goes by; None where they are not known."""
        names = [f"{iou_type}_{name}" for iou_type in self.iou_types for name in summary_metrics(iou_type)]
        return [*names, *([TOTAL] if self.validates_loss else [])]

    def image_losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """As `losses`, of a batch of one validation image and the model that validates."""
        return self.losses(model, batch)

    # --- validation -----------------------------------------------------------------------------------

    @property
    def evaluation_model(self) -> nn.Module:
        """The model that validates, is best and predicts: the averaged one where there is one."""
        return self.plain_model if self.ema is None else self.ema.module

    def evaluate_batch(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        self.watch.mark(Phase.VALIDATING, self.batches_trained)
        for_loss, batch.for_loss = batch.for_loss, []
        detected = self.detect_on_host_batch(batch)
        self.evaluator.update(detected)
        if batch.skipped:
            self.evaluator.skip(batch.skipped)
        self._keep_to_draw(detected)
        for image in for_loss:
            self.validation_loss.update(image.image_ids[0], self.losses_of_image(image))
            self.watch.mark(Phase.VALIDATING, self.batches_trained)
        return {}

    @torch.no_grad()
    def detect_on_host_batch(self, batch: Batch) -> list[Detections]:
        """The detections of a batch as the evaluation loader yields it."""
        model = self.evaluation_model.eval()
        with out_of_memory_as(lambda _: self._evaluation_out_of_memory(batch)):
            prepared = self.prepare(to_device(batch, self.context.device), None)
            with self.autocast(), self._uncompiled():
                return self.detect(model, prepared)

    def _evaluation_out_of_memory(self, batch: Batch) -> UserError:
        where = f"the validation after batch {self.batches_trained}" if self.for_training else "detecting"
        if len(batch) > 1 and self.evaluation_batch_size != self.per_slot_batch_size:
            fix = "give fewer images per validation batch in the detector's config"
        elif len(batch) > 1:
            fix = self.smaller_batch()
        else:
            fix = "it detects on one image at a time already; give smaller images, or hyperparameters.amp"
        return self.out_of_memory(where, batch, fix)

    @torch.no_grad()
    def losses_of_image(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The losses of a batch of one image on the host, one of `for_loss`: scalars on the device, not finite where
        the library finds that they would be."""
        fix = "leave hyperparameters.validation_loss out, or give smaller images"
        with out_of_memory_as(lambda _: self.out_of_memory("the losses of a validation image", batch, fix)):
            return self._losses_of_image(batch)

    def _losses_of_image(self, batch: Batch) -> dict[str, torch.Tensor]:
        model = self.evaluation_model.eval()
        batch = self.prepare(to_device(batch, self.context.device), None)
        precision = self.autocast()  # the evaluation's: asked for before the model is in training mode
        of_chief = self.chief_python_state
        with (
            precision,
            self._uncompiled(),
            kept_random_state(),
            as_one_process(),
            giving_losses(model, self.python_attributes, of_chief),
        ):
            seed_all(self.seed, batch.image_ids[0] % 2**63, 3)
            try:
                return self.image_losses(model, batch)
            except FloatingPointError:  # Detectron2 looks itself
                return {"loss": torch.tensor(math.nan, device=self.context.device)}

    def _uncompiled(self) -> contextlib.AbstractContextManager:
        """What `torch_compile` has compiled for the training's batches is not compiled anew for evaluations, whose
        images have many sizes; where PyTorch can leave it out, from 2.6 on."""
        set_stance = getattr(torch.compiler, "set_stance", None)
        if not self.hparams.torch_compile or set_stance is None:
            return contextlib.nullcontext()
        return set_stance("force_eager")

    def check_validation_loss(self) -> None:
        """Computes the losses of one image.

        Raises:
            UserError: there is no image to compute any of, or the detector's library cannot.
        """
        data = self.val_data
        dataset, collate = self.dataset_with_losses(data), self.collate(True)
        trained = self.trained_images(data.annotations)
        samples = (dataset[i][1] for i in self.evaluated_images(len(dataset)) if trained[i])
        # a pipeline that makes a sample of none of these makes none of any, most likely
        sample = next((sample for sample in itertools.islice(samples, 100) if sample is not None), None)
        if sample is None:
            raise UserError(
                "hyperparameters.validation_loss: of no image of data.val would a training make a sample; leave it out"
            )
        try:
            self.losses_of_image(collate([sample]))
        except UserError:
            raise
        except Exception as error:  # a library's losses may ask for whatever a training has
            raise UserError(
                "hyperparameters.validation_loss: the losses of this model cannot be computed on the validation images "
                f"({type(error).__name__}: {error}); leave it out"
            ) from error

    def share_python_state(self) -> None:
        """Gives every slot what the chief's modules keep beside buffers, for the losses of a validation."""
        if self.validates_loss and self.slots > 1:
            state = python_state(self.evaluation_model, self.python_attributes)
            self.chief_python_state = self.context.distributed.broadcast(state)

    def _keep_to_draw(self, detected: Iterable[Any]) -> None:
        kept = [found for found in detected if isinstance(found, Detections)]
        self.pictured += kept[: PICTURES - len(self.pictured)]

    def synchronize_buffers(self) -> None:
        """Gives every slot the chief's running statistics, which the checkpoint holds: DDP aligns them only at
        the next training step, and the averaged model's never."""
        if self.slots > 1:
            models = dict.fromkeys((self.plain_model, self.evaluation_model))
            broadcast_from_chief(buffer for model in models for buffer in model.buffers())


class ValidationResult(PyTorchCallback):
    """Keeps a validation's numbers, and leaves the master those that steer: it draws a chart for each name."""

    def __init__(self, trial: DetectionTrial):
        self.trial = trial

    def on_validation_start(self) -> None:
        self.trial.synchronize_buffers()
        self.trial.share_python_state()
        self.trial.pictured = []

    def on_validation_epoch_end(self, outputs: list) -> None:
        self.trial.watch.mark(Phase.EVALUATING, self.trial.batches_trained)

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        trial = self.trial
        trial.evaluator.raise_if_failed()
        if trial.validation_loss is not None:
            trial.validation_loss.raise_if_failed()
        wanted = trial.searcher_metric.name
        if wanted not in metrics:
            raise UserError(
                f"searcher.metric: {wanted!r} is not among the metrics that a validation gives: "
                f"{', '.join(map(repr, sorted(metrics)))}"
            )
        metrics.update({name: float(value) for name, value in metrics.items()})
        trial.category_ap = {name: metrics.pop(name) for name in list(metrics) if "_AP/" in name}
        trial.last_validation, trial.validated_at = dict(metrics), trial.batches_trained
        for name, value in trial.last_validation.items():
            is_part = trial.validates_loss and name.startswith(PREFIX) and name != TOTAL
            if name != wanted and ("_AR_" in name or is_part or not math.isfinite(value)):
                del metrics[name]
