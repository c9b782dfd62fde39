"""The `train` command: here, alone or under torchrun, or as a task of a cluster."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import determined as det
import numpy as np

from shared.commands.data_report import save_page
from shared.config.experiment import Experiment, experiment_of, per_slot_batch_size, read_experiment
from shared.data.open import SplitData
from shared.environment import task_config
from shared.errors import UserError
from shared.evaluation import drawing
from shared.evaluation.evaluator import CocoEvaluator, metrics_table
from shared.evaluation.gathered import GatheredDetections, load_detections
from shared.report.about import About, changed_keys, software, speed
from shared.report.report import summary_of
from shared.training.checkpoints import read_checkpoint
from shared.training.cluster_run import ClusterRun
from shared.training.context import core_context, make_context, trial_context
from shared.training.engine import train
from shared.training.local_run import LocalRun, full_disk_as_error
from shared.training.loggers import Loggers
from shared.training.processes import local_processes, on_chief
from shared.training.resume import check_resume, read_checkpoint_to_resume
from shared.training.run_folder import RunFolder
from shared.training.stopping import End, Outcome
from shared.training.tensorboard import picture_of
from shared.training.training_metrics import duration
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)

_LABELS = 6  # images of each split in labels.png


def train_locally(trial_class: type[DetectionTrial], experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Trains without a cluster. Writes everything into one folder."""
    source = Path(sys.modules[trial_class.__module__].__file__).parent
    output_dir = arguments.output_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if int(os.environ.get("RANK", 0)) == 0:
        logger.info("run: %s", output_dir.absolute())
    with local_processes(experiment.hang_minutes) as (distributed, device), contextlib.ExitStack() as stack:
        if (batch_size := experiment.hyperparameters.global_batch_size) is not None:
            per_slot_batch_size(batch_size, distributed.size)
        folder = RunFolder(distributed.broadcast(output_dir).absolute())
        stack.callback(folder.free)
        on_chief(distributed, lambda: _take(folder, arguments.resume))
        stack.enter_context(full_disk_as_error(folder))
        checkpoint = read_checkpoint_to_resume(distributed, arguments.resume, folder)
        on_chief(distributed, lambda: folder.prepare(source))
        context = stack.enter_context(
            trial_context(experiment.config, distributed, device, checkpoint.batches if checkpoint else 0)
        )
        trial = trial_class(context, experiment)
        if checkpoint:
            check_resume(trial, checkpoint)
        loggers = stack.enter_context(Loggers())
        names, resumes = trial.hparams.loggers, checkpoint is not None
        on_chief(distributed, lambda: loggers.open(names, experiment.config, folder, resumes))
        if trial.rank == 0:
            _begin_reports(trial, folder, experiment.config, checkpoint)
        started = time.monotonic()
        run = LocalRun(folder, loggers, trial.searcher_metric, trial.schedule.checkpoint_policy, trial.rank == 0)
        outcome = train(trial, run, checkpoint, _draw_figures)
        if outcome.end is End.NOTHING_TO_DO:
            loggers.finish(0)
            if arguments.resume != "auto":
                raise UserError(f"--resume: {outcome}")
            if trial.rank == 0:
                logger.info("nothing to do: %s", outcome)
        elif not outcome.is_finished:
            if trial.rank == 0:
                print(f"{outcome}; go on with --output-dir {folder.path} --resume last", file=sys.stderr)
            sys.exit(outcome.exit_status)
        elif trial.rank == 0:
            seconds = time.monotonic() - started
            _end_reports(trial, folder, outcome, seconds)
            _conclude(loggers, trial, folder)
            named_alike = source / Path(arguments.config).name
            shipped = named_alike if named_alike.exists() else source / "const.yaml"
            _write_report(trial, folder, outcome, experiment.config, shipped, seconds)


def _draw_figures(evaluator: CocoEvaluator, found: GatheredDetections) -> dict[str, np.ndarray]:
    from shared.report.plots import pictures_of  # matplotlib takes half a second to import

    return pictures_of(evaluator, found)


def _take(folder: RunFolder, resume: str | None) -> None:
    folder.take()
    folder.restore_interrupted_rename()
    if resume is None:
        folder.refuse_other_run()


def _begin_reports(trial: DetectionTrial, folder: RunFolder, config: dict[str, Any], checkpoint: Any) -> None:
    if checkpoint:
        logger.info("going on after batch %d, from %s", checkpoint.batches, checkpoint.path)
    folder.write_config(config)
    folder.write_length(trial.total_batches, trial.batches_per_epoch)
    trial.save_own_config(folder.path)
    opened = {"train": trial.train_data, "val": trial.val_data}
    opened = {split: data for split, data in opened.items() if isinstance(data, SplitData)}
    if opened and not folder.labels.exists():
        save_page(opened, folder.labels, _LABELS)


def _end_reports(trial: DetectionTrial, folder: RunFolder, outcome: Outcome, seconds: float) -> None:
    reports = {name: report for name in ("best", "last") if (report := _validation_of(name, folder))}
    for name, report in list(reports.items())[:1]:
        numbers = {key: math.nan if value is None else value for key, value in report["metrics"].items()}
        print(f"\n{name}, batch {report['batches']} of {trial.total_batches}:\n")
        print(metrics_table(numbers, trial.iou_types), end="\n\n")
    wanted = trial.searcher_metric.name
    for name, report in reports.items():
        value = report["metrics"].get(wanted)
        number = "undefined" if value is None else f"{value:.4f}"
        loss = report["metrics"].get("val_loss")
        number += "" if loss is None or wanted == "val_loss" else f", val_loss {loss:.4f}"
        print(f"{name}: {wanted} {number} at batch {report['batches']}, {folder.checkpoints / name}")
    if outcome.why:
        print(outcome)
    print(f"trained for {duration(seconds)}; all of it is in {folder.path}")
    if figure := picture_of(trial, outcome.validation):
        drawing.save(figure, folder.predictions)
        print(f"predictions beside the ground truth: {folder.predictions}")


def _conclude(loggers: Loggers, trial: DetectionTrial, folder: RunFolder) -> None:
    best, metric = _validation_of("best", folder), trial.searcher_metric.name
    value = best and best["metrics"].get(metric)
    numbers = {} if value is None else {f"best/{metric}": value, "best/batches": best["batches"]}
    picture = folder.predictions if folder.predictions.exists() else None
    loggers.conclude(trial.batches_trained, numbers, picture)


def _write_report(
    trial: DetectionTrial, folder: RunFolder, outcome: Outcome, config: dict[str, Any], shipped: Path, seconds: float
) -> None:
    """report.html, of the best validation; not where the detector's library evaluates data of its own."""
    if not (isinstance(trial.evaluator, CocoEvaluator) and folder.detections.exists()):
        return
    from shared.report.report import report  # matplotlib's figures take half a second to import

    try:
        found, _ = load_detections(folder.detections)
        analyses = report(
            trial.val_data.annotations,
            found.detections(),
            folder.report,
            images=trial.val_data.images,
            iou_types=trial.iou_types,
            image_ids=found.images.tolist(),
            keypoint_sigmas=trial.evaluator.keypoint_sigmas,
            about=_about(trial, folder, outcome, config, shipped, seconds),
        )
    except Exception as error:  # whatever it is, the training has come to its end, and all of it is saved
        logger.exception("the report could not be written (%s); `evaluate --report` makes one", type(error).__name__)
        return
    print(f"\n{summary_of(analyses)}\nthe report: {folder.report}")


def _about(
    trial: DetectionTrial, folder: RunFolder, outcome: Outcome, config: dict[str, Any], shipped: Path, seconds: float
) -> About:
    from shared.report.plots import learning_curves

    original = None
    if shipped.is_file():
        original = read_experiment(shipped, (), type(trial).sections(), with_hyperparameters=False).config

    reports = folder.reports()
    best = _validation_of("best", folder)
    return About(
        title=f"{config.get('name') or folder.path.name}: {shipped.parent.name}",
        facts={
            "run": folder.path,
            **dict(trial.summary_lines()),
            "validation data": f"{trial.val_data.annotations.path or 'fake'}, {len(trial.val_data.annotations)} images",
            **({"best checkpoint": f"batch {best['batches']} of {trial.total_batches}"} if best else {}),
            **({"ended by": outcome.why} if outcome.why else {}),
            "device": trial.context.device,
            "time": f"{duration(seconds)}" + (f", from batch {trial.first_batch} on" if trial.first_batch else ""),
            **speed(reports),
            **software(shipped.parent),
        },
        changed=changed_keys(config, original) if original else [],
        shipped=shipped.name,
        curves=learning_curves(reports, trial.searcher_metric.name, best and best["batches"]),
    )


def _validation_of(checkpoint: str, folder: RunFolder) -> dict[str, Any] | None:
    """The report of the validation that a checkpoint was saved at; None where there is no such checkpoint, or where
    another run made it."""
    metadata = folder.checkpoints / checkpoint / "metadata.json"
    if not metadata.exists():
        return None
    return folder.validation_after(json.loads(metadata.read_text())["steps_completed"])


def train_on_cluster(trial_class: type[DetectionTrial]) -> None:
    """Trains with the config and the hyperparameters that the master gives."""
    info = det.get_cluster_info()
    experiment = experiment_of(task_config(), info.trial.hparams, trial_class.sections())
    with (
        local_processes(experiment.hang_minutes, len(info.gpu_uuids)) as (distributed, device),
        core_context(distributed) as core,
    ):
        if (batch_size := experiment.hyperparameters.global_batch_size) is not None:
            per_slot_batch_size(batch_size, distributed.size)
        checkpoint = None
        if info.latest_checkpoint is not None:
            with core.checkpoint.restore_path(info.latest_checkpoint) as path:
                checkpoint = read_checkpoint(Path(path))
        # the checkpoint of another trial gives weights only
        is_own = checkpoint is not None and checkpoint.counts.get("trial_id") == info.trial.trial_id
        first_batch = checkpoint.batches if is_own else 0
        context = make_context(core, experiment.config, device, first_batch, info.trial.trial_seed)
        trial = trial_class(context, experiment)
        if checkpoint:
            check_resume(trial, checkpoint)
        if trial.rank == 0 and trial.hparams.loggers:
            logger.info("hyperparameters.loggers: not used on a cluster, where the master has the numbers")
        run = ClusterRun(core, info.trial.trial_id, trial.searcher_metric, trial.schedule.checkpoint_policy)
        outcome = train(trial, run, checkpoint, _draw_figures)
        if trial.rank > 0:
            return
        if outcome.is_finished:
            print(metrics_table({**outcome.validation.metrics, **outcome.validation.category_ap}, trial.iou_types))
        print(outcome, flush=True)
