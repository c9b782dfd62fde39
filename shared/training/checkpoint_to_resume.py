"""Which checkpoint a run resumes from: one that is complete, and the same on every rank."""

from __future__ import annotations

import logging
import socket

from determined.core import DistributedContext

from shared.errors import UserError
from shared.training.checkpoint_folder import find_checkpoint
from shared.training.checkpoints import Checkpoint, read_checkpoint
from shared.training.manifest import weights_digest
from shared.training.processes import first_on_each_machine, on_chief, on_every_rank
from shared.training.run_folder import OF_THE_RUN, RunFolder

logger = logging.getLogger(__name__)


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
