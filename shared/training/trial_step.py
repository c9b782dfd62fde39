"""The part of a trial that trains: model, optimizer and the step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from determined.pytorch import PyTorchTrialContext
from torch import nn

from shared.config.schema import TrainingHyperparameters
from shared.data.dataset import seed_all
from shared.data.loading import Batch
from shared.errors import UserError, count_of
from shared.training.hang import Phase, Watch
from shared.training.memory import out_of_memory, out_of_memory_as, smaller_batch
from shared.training.stopping import Stopping
from shared.training.switches import AveragedWeights, autocast, freeze, train_depthwise_in_float32
from shared.training.training_metrics import STEPS_A_SCALE_MAY_SKIP, TrainingMetrics, diverged


class TrialStep:
    """What a detector says of its model and optimizer, and the step that comes of it.

    Attributes:
        model: the training model, on its device, in DDP where there are several slots; `plain_model` without it.
        ema: `.module` is the averaged model and `.update(model)` averages; None without.
        scaler: the GradScaler of fp16 training; None without.
        frozen: what `hyperparameters.freeze` leaves to train, in words; None without.
        batches_trained: so far, those before a resume too.
        on_batch_end: called after each batch.
    """

    find_unused_parameters: bool = False
    """Whether a step may leave parameters without a gradient, which DDP has to look for then."""

    fp16_key: str = "hyperparameters.amp"
    """Where fp16 is asked for, to say it in an error."""

    context: PyTorchTrialContext
    hparams: TrainingHyperparameters
    for_training: bool
    frozen: str | None = None
    model: nn.Module
    plain_model: nn.Module
    ema: Any
    scaler: Any
    optimizer: torch.optim.Optimizer
    training_metrics: TrainingMetrics
    stopping: Stopping
    watch: Watch
    rank: int
    seed: int
    slots: int
    per_slot_batch_size: int
    aggregation_frequency: int
    batches_trained: int
    on_batch_end: Callable[[], None]

    # --- what a detector says of itself ---------------------------------------------------------------

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The training model on the host, with its initial or pretrained weights."""

    @abstractmethod
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of `model`'s parameters."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Scalars on the device; "loss" is the one to minimise. `model` is the one that DDP wraps."""

    def detector(self, model: nn.Module) -> nn.Module:
        """The part of `build_model`'s model whose modules `freeze` names."""
        return model

    def compiled_parts(self, model: nn.Module) -> Sequence[nn.Module]:
        """What `torch_compile` compiles of the model: modules that take and give tensors."""
        return [model]

    def with_sync_bn(self, model: nn.Module) -> nn.Module:
        """The model with batch norm over all slots."""
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """The scaler of an fp16 training."""
        return torch.amp.GradScaler("cuda")

    def build_ema(self, model: nn.Module) -> Any:
        """Averages the weights of `model`; None without."""
        decay = self.hparams.model_ema_decay
        return None if decay is None else AveragedWeights(model, decay, self.first_batch // self.aggregation_frequency)

    def prepare_schedule(self) -> None:
        """Builds the learning rate's schedule, once the optimizer is there."""

    def warmup_batches(self) -> float:
        """For how many batches the schedule raises the learning rate, before it is what the config says."""
        return 0

    def before_batch(self, number: int) -> None:
        """Sets the learning rate of batch `number`, from 0."""

    def after_batch(self, number: int) -> None:
        """After the optimizer's step of batch `number`."""

    def clip_gradients(self) -> Callable[[Any], None] | None:
        """Clips the gradients of the parameters it is given, in place; None to leave them."""
        limit = self.hparams.clip_grad
        return None if limit is None else lambda parameters: nn.utils.clip_grad_norm_(parameters, limit)

    def autocast(self) -> AbstractContextManager:
        """The precision of the forward pass."""
        return autocast(self.hparams.amp, self.context.device)

    # --- the switches of `hyperparameters` --------------------------------------------------------------

    def switched(self, model: nn.Module) -> nn.Module:
        """The model of `build_model` with `amp`, `channels_last`, `sync_bn`, `freeze` and `torch_compile`.

        Raises:
            UserError: one of them does not go with the model or the device.
        """
        hparams = self.hparams
        if hparams.channels_last:
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    module.to(memory_format=torch.channels_last)
        if hparams.amp == "bf16" and self.context.device.type == "cpu" and self.for_training:
            train_depthwise_in_float32(model)
        if hparams.sync_bn and self.slots > 1:
            if self.context.device.type != "cuda":
                raise UserError(
                    "hyperparameters.sync_bn: PyTorch synchronises batch norm on GPUs only; set it to false"
                )
            model = self.with_sync_bn(model)
        if hparams.freeze and self.for_training:
            self.frozen = freeze(self.detector(model), hparams.freeze)
        if hparams.torch_compile and self.for_training:
            for part in self.compiled_parts(model):
                part.compile()
        return model

    def build_scaler(self) -> torch.amp.GradScaler | None:
        """The scaler of fp16; None without.

        Raises:
            UserError: there is no GPU.
        """
        if self.hparams.amp != "fp16" or not self.for_training:
            return None
        if self.context.device.type != "cuda":
            raise UserError(
                f"{self.fp16_key}: fp16 needs a GPU; take it out, or say hyperparameters.amp: bf16 in its place"
            )
        return self.context.wrap_scaler(self.grad_scaler())

    # --- the step -------------------------------------------------------------------------------------

    def train_batch(self, batch: Batch, epoch_idx: int, batch_idx: int) -> dict[str, Any]:
        self.watch.mark(Phase.FORWARD, batch_idx + 1)
        seed_all(self.seed, self.rank, batch_idx, 1)  # dropout and the like: no two slots alike, and a resume exact
        self.before_batch(batch_idx)
        try:
            with out_of_memory_as(lambda _: self.out_of_memory(f"batch {batch_idx + 1}", batch, self.smaller_batch())):
                losses = self._step(batch, batch_idx)
        except FloatingPointError as error:  # Detectron2 looks itself
            raise diverged(batch_idx, batch.image_ids) from error
        self.watch.mark(Phase.STEPPED, batch_idx + 1)
        may_skip = 0 if self.scaler is None else STEPS_A_SCALE_MAY_SKIP
        self.training_metrics.update(losses, batch_idx, batch.image_ids, len(batch.skipped), may_skip)
        self.training_metrics.waiting = self.training_loader.waiting
        self.training_metrics.lr = float(self.optimizer.param_groups[0]["lr"])
        self.batches_trained = batch_idx + 1
        self.after_batch(batch_idx)
        self.on_batch_end()
        self.stopping.after_batch(self.batches_trained)
        self.watch.mark(Phase.LOADING, batch_idx + 2)
        # a number of the host: of each tensor in here Determined makes a synchronisation a step
        return {"lr": self.training_metrics.lr}

    def _step(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        """Forward, backward, the optimizer's step and the averages; the losses."""
        with self.autocast():
            losses = self.losses(self.model, batch)
        loss = losses["loss"]
        self.watch.mark(Phase.BACKWARD, batch_idx + 1)
        self.context.backward(loss if self.scaler is None else self.scaler.scale(loss))
        self.context.step_optimizer(self.optimizer, clip_grads=self._clip(), scaler=self.scaler)
        if (batch_idx + 1) % self.aggregation_frequency == 0:
            if self.scaler is not None:
                self.scaler.update()
            if self.ema is not None:
                self.ema.update(self.plain_model)
        return losses

    def out_of_memory(self, where: str, batch: Batch, fix: str) -> UserError:
        """The error of a batch that the GPU's memory is not enough for; `where` says which, `fix` what to do."""
        where = f"{where}, {count_of(len(batch), 'image')} a slot"
        optimizers = [self.optimizer] if self.for_training else []
        fix = f"{fix}. The last checkpoint is whole" if self.for_training else fix
        return out_of_memory(where, batch.images, fix, self.plain_model, optimizers, self.context.device)

    def smaller_batch(self) -> str:
        """What to do about a batch of a training's size."""
        frequency = self.aggregation_frequency if self.for_training else None
        return smaller_batch(self.per_slot_batch_size, self.slots, frequency)

    def _clip(self) -> Callable[[Any], None] | None:
        clip = self.clip_gradients()
        if clip is None or self.scaler is None:
            return clip

        def unscale_and_clip(parameters: Any) -> None:
            self.scaler.unscale_(self.optimizer)
            clip(parameters)

        return unscale_and_clip
