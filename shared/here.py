"""train, off the cluster: alone or under torchrun."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from determined.core import DistributedContext
from torch.utils.tensorboard import SummaryWriter

from shared.errors import UserError
from shared.evaluation import visualization
from shared.experiment import fixed_hyperparameters, load_config, make_paths_absolute, per_slot_batch_size
from shared.training.checkpoint_folder import find_checkpoint
from shared.training.checkpoints import load_weights, read_checkpoint
from shared.training.local_run import LocalRun, full_disk_as_error
from shared.training.loop import fit, trial_context
from shared.training.processes import first_on_each_machine, local_processes, on_chief
from shared.training.progress import log_above_the_bar
from shared.training.reports import picture_of_validation, table_of
from shared.training.run_folder import RunFolder
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)


def train_here(trial_class: type[DetectionTrial], arguments: argparse.Namespace) -> None:
    """Trains what the config says, and leaves all of it in one folder."""
    if arguments.resume == "last" and arguments.output_dir is None:
        raise UserError("--resume last: say of which run, by --output-dir")
    config = load_config(arguments.config, arguments.overrides)
    config["hyperparameters"] = fixed_hyperparameters(config)
    make_paths_absolute(config, trial_class.path_hyperparameters)
    source = Path(sys.modules[trial_class.__module__].__file__).parent
    with local_processes() as (distributed, device), contextlib.ExitStack() as stack:
        if (batch_size := config["hyperparameters"].get("global_batch_size")) is not None:
            per_slot_batch_size(batch_size, distributed.size)
        folder = RunFolder(_output_dir(arguments.output_dir, distributed))
        stack.callback(folder.free)
        on_chief(distributed, lambda: _take(folder, arguments.resume))
        path = first_on_each_machine(distributed, lambda: _checkpoint_to_resume(arguments.resume, folder))
        checkpoint = read_checkpoint(path) if path else None
        on_chief(distributed, lambda: folder.prepare(source))
        os.chdir(folder.code)  # what Determined copies into each checkpoint
        os.environ["XDG_DATA_HOME"] = str(folder.saving)  # where it stores them
        first_batch = checkpoint.batches if checkpoint else 0
        with trial_context(config, distributed, device, first_batch) as context:
            trial = trial_class(context)
            if checkpoint:
                load_weights(trial.plain_model, checkpoint.training_weights, checkpoint.path)
            if distributed.rank == 0:
                _begin_reports(trial, folder, config, checkpoint)
            trial.local_callbacks["local_run"] = LocalRun(trial, folder)
            with log_above_the_bar(), full_disk_as_error(folder), trial.stopping:
                # `best` needs a master; here every validated state is saved, and the best and the last are kept
                policy = "none" if trial.schedule.checkpoint_policy == "none" else "all"
                fit(trial, str(checkpoint.path) if checkpoint else None, policy)
            if not trial.is_finished:
                _end_by_signal(trial, folder)
            if distributed.rank == 0:
                _end_reports(trial, folder)


def _output_dir(given: Path | None, distributed: DistributedContext) -> Path:
    return distributed.broadcast(given or Path("runs") / time.strftime("%Y%m%d-%H%M%S")).absolute()


def _take(folder: RunFolder, resume: str | None) -> None:
    folder.take()
    folder.restore_interrupted_rename()
    if resume is None:
        folder.refuse_other_run()


def _checkpoint_to_resume(resume: str | None, folder: RunFolder) -> Path | None:
    if resume is None or resume != "last":
        return resume and find_checkpoint(resume)
    last = folder.checkpoints / "last"
    if not last.exists():
        raise UserError(f"--resume last: {folder.path} has no checkpoint yet; leave --resume out and start anew")
    return last


def _begin_reports(trial: DetectionTrial, folder: RunFolder, config: dict[str, Any], checkpoint: Any) -> None:
    if checkpoint:
        logger.info("going on after batch %d, from %s", checkpoint.batches, checkpoint.path)
    folder.config.write_text(yaml.safe_dump(config, sort_keys=False))
    trial.save_own_config(folder.path)
    trial.tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=trial.first_batch + 1)


def _end_reports(trial: DetectionTrial, folder: RunFolder) -> None:
    trial.tensorboard.close()
    print(table_of(trial))
    print("checkpoints:", " and ".join(str(path) for path in sorted(folder.checkpoints.glob("[bl]*st"))))
    if figure := picture_of_validation(trial):
        picture = folder.path / "predictions.png"
        visualization.save(figure, picture)
        print(f"predictions beside the ground truth: {picture}")


def _end_by_signal(trial: DetectionTrial, folder: RunFolder) -> None:
    number = trial.stopping.signal or signal.SIGTERM  # another process was sent it
    if trial.rank == 0:
        trial.tensorboard.close()
        print(
            f"stopped by {number.name} after batch {trial.batches_trained}, which is saved; go on with --output-dir "
            f"{folder.path} --resume last",
            file=sys.stderr,
        )
    sys.exit(128 + number)
