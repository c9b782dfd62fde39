"""The schedule of the learning rate, by timm."""

from __future__ import annotations

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from efficientdet_hyperparameters import EfficientDetHyperparameters
from shared.errors import UserError, nearest

_SCHEDULES = ("cosine", "multistep", "plateau", "poly", "step", "tanh")


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    hparams: EfficientDetHyperparameters,
    batches_per_epoch: int,
    total_batches: int,
    smaller_is_better: bool,
    seed: int,
) -> Scheduler:
    """The scheduler that `hparams.sched` names. Raises UserError if timm has none, or if no epoch is left for it.

    Args:
        smaller_is_better: direction of the searcher metric, which `plateau` follows.
        seed: seed of `lr_noise`.
    """
    if hparams.sched not in _SCHEDULES:
        raise UserError(
            f"hyperparameters.sched: {hparams.sched!r} is not a scheduler of timm{nearest(hparams.sched, _SCHEDULES)}"
        )
    epochs = total_batches / batches_per_epoch - hparams.cooldown_epochs
    if epochs <= 0:
        raise UserError(
            f"hyperparameters.cooldown_epochs: {hparams.cooldown_epochs} is not less than the "
            f"{total_batches / batches_per_epoch:.1f} epochs of the training. Fix: give fewer, or train longer"
        )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=hparams.sched,
        num_epochs=epochs,
        decay_epochs=hparams.decay_epochs,
        cooldown_epochs=hparams.cooldown_epochs,
        patience_epochs=hparams.patience_epochs,
        plateau_mode="min" if smaller_is_better else "max",
        decay_rate=hparams.decay_rate,
        min_lr=hparams.min_lr,
        warmup_lr=hparams.warmup_lr,
        warmup_epochs=hparams.warmup_epochs,
        noise=hparams.lr_noise,
        noise_pct=hparams.lr_noise_pct,
        noise_std=hparams.lr_noise_std,
        noise_seed=seed,
        cycle_mul=hparams.lr_cycle_mul,
        cycle_limit=hparams.lr_cycle_limit,
        step_on_epochs=not hparams.sched_on_updates,
        updates_per_epoch=batches_per_epoch,
    )
    return scheduler
