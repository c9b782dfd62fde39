"""The checkpoint that a run continues from: which one, whether the run can, and how it is taken up."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from typing import Any

from determined.core import DistributedContext

from shared.errors import UserError
from shared.training.checkpoint_folder import find_checkpoint
from shared.training.checkpoints import Checkpoint, load_weights, read_checkpoint, weights_digest
from shared.training.optimizer_state import BuiltOptimizer, merged
from shared.training.processes import first_on_each_machine, on_chief, on_every_rank
from shared.training.run_folder import OF_THE_RUN, RunFolder
from shared.training.saving import set_random_state
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)

_LISTED = 8  # category names in an error, around the first that differs


def check_resume(trial: DetectionTrial, checkpoint: Checkpoint) -> None:
    """Checks that a run can continue from a checkpoint, before anything of either is changed.

    Raises:
        UserError: the checkpoint has other categories, another model or another optimizer.
    """
    check_categories(trial.categories, checkpoint, trial.weights_key)
    load_weights(trial.plain_model, checkpoint.training_weights, checkpoint.path)
    _resumed_optimizer(trial, {"state": {}, "param_groups": checkpoint.optimizer_groups}, checkpoint.training)
    before, now = checkpoint.training.get("batches_per_epoch"), trial.batches_per_epoch
    if trial.rank == 0 and trial.first_batch and before not in (None, now):
        logger.warning(
            "an epoch now has %d batches instead of %d: the training images or hyperparameters.global_batch_size "
            "changed. The %d batches so far count as %.1f epochs, not %.1f",
            *(now, before, trial.first_batch, trial.first_batch / now, trial.first_batch / before),
        )


def load_checkpoint(trial: DetectionTrial, checkpoint: Checkpoint) -> None:
    """Continues from a checkpoint that `check_resume` allows: weights, optimizer, random numbers, and the trial's own
    state. This run's config wins over what the checkpoint's config said. Empties `checkpoint.state`, whose memory a
    training needs."""
    state, training = checkpoint.state, checkpoint.training
    trial.plain_model.load_state_dict(checkpoint.training_weights)
    (saved,) = state["optimizers_state_dict"]
    trial.optimizer.load_state_dict(_resumed_optimizer(trial, saved, training))
    if trial.scaler is not None and "scaler_state_dict" in state:
        began = training.get("scaler") or trial.built_scaler
        trial.scaler.load_state_dict(merged(trial.built_scaler, began, state["scaler_state_dict"]))
    set_random_state(state["rng_state"], trial.context.distributed.local_rank)
    trial.load_training_state({**training, "ema": checkpoint.averaged_weights})
    state.clear()


def _resumed_optimizer(trial: DetectionTrial, saved: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """The optimizer state to load, see `BuiltOptimizer.resumed`.

    Args:
        saved: the checkpoint's.
        training: its `Checkpoint.training`.

    Raises:
        UserError: this run's optimizer cannot continue from it.
    """
    began = BuiltOptimizer(**training["optimizer"]) if "optimizer" in training else None
    try:
        return trial.built_optimizer.resumed(saved, began)
    except ValueError as problem:
        raise UserError(
            f"{trial.optimizer_key}: {problem}. Fix: keep the checkpoint's value, or start a new run with "
            f"{trial.weights_key}: <the checkpoint's path>"
        ) from problem


def check_categories(own: Sequence[dict], checkpoint: Checkpoint, weights_key: str) -> None:
    """Checks that each label means the same category. The ids may differ: a model does not know them.

    Raises:
        UserError: the names differ, or their order does.
    """
    names = [[category["name"] for category in categories] for categories in (own, checkpoint.categories)]
    if names[0] == names[1]:
        return
    first = next((i for i, pair in enumerate(zip(*names, strict=False)) if pair[0] != pair[1]), min(map(len, names)))
    raise UserError(
        f"data.train: its categories are {_shortened(names[0], first)}, and those of {checkpoint.path} are "
        f"{_shortened(names[1], first)}. Categories are in the order of their ids, and a label is a position in this "
        "list. Fix: use annotations with the checkpoint's categories in its order, or start a new run with "
        f"{weights_key}: {checkpoint.path}"
    )


def _shortened(names: list[str], around: int) -> str:
    begin = max(0, min(around - _LISTED // 2, len(names) - _LISTED))
    shown = names[begin : begin + _LISTED]
    before, after = (["…"] if begin else []), (["…"] if begin + len(shown) < len(names) else [])
    return f"[{', '.join([*before, *shown, *after])}] ({len(names)})"


def read_checkpoint_to_resume(
    distributed: DistributedContext, resume: str | None, folder: RunFolder
) -> Checkpoint | None:
    """The checkpoint that `--resume` names; None if the training starts from its first batch.

    The chief chooses between `last` and `best` of the run's folder. Every rank calls this.

    Raises:
        UserError: no checkpoint is complete, or the ranks read different ones. Every rank raises the same error.
    """
    if resume is None:
        return None
    read_by_chief: list[Checkpoint] = []
    if resume in OF_THE_RUN:

        def choose() -> str | None:
            if checkpoint := _first_complete(resume, folder):
                read_by_chief.append(checkpoint)
                return checkpoint.path.name
            return None

        name = on_chief(distributed, choose)
        if name is None:
            return None
        path = folder.checkpoints / name
    else:
        path = first_on_each_machine(distributed, lambda: find_checkpoint(resume))
    checkpoint = on_every_rank(distributed, lambda: read_by_chief[0] if read_by_chief else read_checkpoint(path))
    _check_same_on_all_ranks(distributed, resume, checkpoint)
    return checkpoint


def _first_complete(resume: str, folder: RunFolder) -> Checkpoint | None:
    errors: list[UserError] = []
    for path in folder.checkpoints_to_resume(resume):
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            errors.append(error)
            continue
        if errors:
            logger.warning("--resume %s: %s; resuming from %s", resume, errors[0], path)
        return checkpoint
    if errors:
        raise errors[0]
    return None


def _check_same_on_all_ranks(distributed: DistributedContext, resume: str, checkpoint: Checkpoint) -> None:
    """Raises UserError if a rank has read another checkpoint than the chief: machines may have disks of their own."""
    own = (checkpoint.batches, weights_digest(checkpoint.path), socket.gethostname())
    of_chief, *others = distributed.allgather(own)
    for rank, other in enumerate(others, start=1):
        if other[:2] != of_chief[:2]:
            raise UserError(
                f"--resume {resume}: rank 0 on {of_chief[2]} read batch {of_chief[0]} and rank {rank} on {other[2]} "
                f"read batch {other[0]} (SHA-256 {of_chief[1][:8]} and {other[1][:8]}). "
                "Fix: put --output-dir on a disk that all machines share, or copy the checkpoint to each of them"
            )
