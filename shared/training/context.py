"""The context of a trial: Determined's, over the processes and the device that were chosen here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from determined import core, pytorch
from determined.core import DistributedContext


class TrialContext(pytorch.PyTorchTrialContext):
    """Determined's context of a trial.

    Attributes:
        core: its core context, for which Determined's own class has no public name.
    """

    def __init__(self, core_context: core.Context, **arguments: Any):
        super().__init__(core_context=core_context, **arguments)
        self.core = core_context


def core_context(distributed: DistributedContext) -> core.Context:
    """The core context of these processes; off a cluster it reports to nobody."""
    return core.init(
        distributed=distributed,
        preempt_mode=core.PreemptMode.WorkersAskChief,
        tensorboard_mode=core.TensorboardMode.MANUAL,
    )


@contextlib.contextmanager
def trial_context(
    config: dict[str, Any],
    distributed: DistributedContext,
    device: torch.device,
    first_batch: int = 0,
    trial_seed: int | None = None,
) -> Iterator[TrialContext]:
    """The context of a trial with a core context of its own, see `make_context`."""
    with core_context(distributed) as opened:
        yield make_context(opened, config, device, first_batch, trial_seed)


def make_context(
    opened: core.Context,
    config: dict[str, Any],
    device: torch.device,
    first_batch: int = 0,
    trial_seed: int | None = None,
) -> TrialContext:
    """What `pytorch.init` makes, with two differences: the device is the one that torch can use instead of the one that
    nvidia-smi lists, and a resumed run counts its earlier batches off the cluster too.

    Args:
        config: the experiment config, with fixed hyperparameters.
        first_batch: batches that were trained before this start.
    """
    return TrialContext(
        core_context=opened,
        trial_seed=trial_seed,
        hparams=config["hyperparameters"],
        slots_per_trial=opened.distributed.size,
        num_gpus=opened.distributed.local_size if device.type == "cuda" else 0,
        exp_conf=config,
        aggregation_frequency=1,  # the trial makes its own optimizer steps
        steps_completed=first_batch,
        managed_training=True,
        debug_enabled=False,
        enable_tensorboard_logging=False,
    )
