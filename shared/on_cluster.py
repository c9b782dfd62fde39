"""train, as the trial that this task of a cluster is."""

from __future__ import annotations

import logging

import determined as det

from shared.config_file import interpolated
from shared.experiment import hang_minutes_of, per_slot_batch_size
from shared.training.loop import fit, trial_context
from shared.training.processes import task_processes
from shared.training.reports import table_of
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)


def train_on_cluster(trial_class: type[DetectionTrial]) -> None:
    """Trains with the config and the hyperparameters that the master gives."""
    info = det.get_cluster_info()
    config = interpolated({**info.trial._config, "hyperparameters": info.trial.hparams})
    with task_processes(len(info.gpu_uuids), hang_minutes_of(config)) as (distributed, device):
        if (batch_size := config["hyperparameters"].get("global_batch_size")) is not None:
            per_slot_batch_size(batch_size, distributed.size)
        first_batch = info.trial._steps_completed
        with trial_context(config, distributed, device, first_batch, info.trial.trial_seed) as context:
            trial = trial_class(context)
            if distributed.rank == 0:
                trial.tensorboard = context.get_tensorboard_writer()
                if trial.hparams.loggers:
                    logger.info("hyperparameters.loggers: not used on a cluster, where the master has the numbers")
            fit(trial, info.latest_checkpoint, trial.schedule.checkpoint_policy)
            if distributed.rank == 0 and trial.is_finished:
                print(table_of(trial), flush=True)
                if trial.stopping.ended is not None:
                    print(f"ended after batch {trial.batches_trained}: {trial.stopping.ended}", flush=True)
