"""The `train` command: here, alone or under torchrun, or as a task of a cluster."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import determined as det
from torch.utils.tensorboard import SummaryWriter

from shared.commands.data_report import save_page
from shared.config.experiment import hang_minutes_of, per_slot_batch_size
from shared.config.file import fixed_hyperparameters, interpolated, load_config, make_paths_absolute
from shared.data.open import SplitData
from shared.evaluation import drawing
from shared.evaluation.evaluator import CocoEvaluator, metrics_table
from shared.evaluation.gathered import load_detections
from shared.report.about import About, changed_keys, software, speed
from shared.report.report import summary_of
from shared.training.local_run import LocalRun, full_disk_as_error
from shared.training.loggers import Loggers, keep_places
from shared.training.loop import RunHasEnded, fit, trial_context
from shared.training.processes import local_processes, on_chief, task_processes
from shared.training.resume import check_resume, read_checkpoint_to_resume
from shared.training.run_folder import RunFolder
from shared.training.tensorboard import picture_of_validation, table_of
from shared.training.training_metrics import duration
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)

_LABELS = 6  # images of each split in labels.png


def train_here(trial_class: type[DetectionTrial], arguments: argparse.Namespace) -> None:
    """Trains what the config says, and leaves all of it in one folder."""
    config = load_config(arguments.config, arguments.overrides)
    config["hyperparameters"] = fixed_hyperparameters(config)
    make_paths_absolute(config, trial_class.path_hyperparameters)
    source = Path(sys.modules[trial_class.__module__].__file__).parent
    output_dir = arguments.output_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if int(os.environ.get("RANK", 0)) == 0:
        logger.info("run: %s", output_dir.absolute())
    with local_processes(hang_minutes_of(config)) as (distributed, device), contextlib.ExitStack() as stack:
        if (batch_size := config["hyperparameters"].get("global_batch_size")) is not None:
            per_slot_batch_size(batch_size, distributed.size)
        folder = RunFolder(distributed.broadcast(output_dir).absolute())
        stack.callback(folder.free)
        on_chief(distributed, lambda: _take(folder, arguments.resume))
        stack.enter_context(full_disk_as_error(folder))
        checkpoint = read_checkpoint_to_resume(distributed, arguments.resume, folder)
        on_chief(distributed, lambda: folder.prepare(source))
        keep_places()
        os.chdir(folder.code)  # what Determined copies into each checkpoint
        os.environ["XDG_DATA_HOME"] = str(folder.saving)  # where it stores them
        first_batch = checkpoint.batches if checkpoint else 0
        with trial_context(config, distributed, device, first_batch) as context:
            trial = trial_class(context)
            if checkpoint:
                check_resume(trial, checkpoint)
            loggers = stack.enter_context(Loggers())
            names, goes_on = trial.hparams.loggers, checkpoint is not None
            on_chief(distributed, lambda: loggers.open(names, config, folder, goes_on))
            if distributed.rank == 0:
                _begin_reports(trial, folder, config, checkpoint)
            trial.local_callbacks["local_run"] = LocalRun(trial, folder, loggers)
            started = time.monotonic()
            with trial.stopping:
                # `best` needs a master; here every validated state is saved, and the best and the last are kept
                policy = "none" if trial.schedule.checkpoint_policy == "none" else "all"
                try:
                    fit(trial, str(checkpoint.path) if checkpoint else None, policy)
                except RunHasEnded as ended:
                    loggers.finish(0)
                    if arguments.resume != "auto":
                        raise
                    if distributed.rank == 0:
                        logger.info("nothing to do: %s", ended)
                    return  # without an error: whoever starts it again and again is to stop
            if not trial.is_finished:
                _end_by_signal(trial, folder)
            if distributed.rank == 0:
                seconds = time.monotonic() - started
                _end_reports(trial, folder, seconds)
                _conclude(loggers, trial, folder)
                named_alike = source / Path(arguments.config).name
                shipped = named_alike if named_alike.exists() else source / "const.yaml"
                _write_report(trial, folder, config, shipped, seconds)


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
    trial.tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=trial.first_batch + 1 if checkpoint else 0)
    opened = {"train": trial.train_data, "val": trial.val_data}
    opened = {split: data for split, data in opened.items() if isinstance(data, SplitData)}
    if opened and not folder.labels.exists():
        save_page(opened, folder.labels, _LABELS)


def _end_reports(trial: DetectionTrial, folder: RunFolder, seconds: float) -> None:
    trial.tensorboard.close()
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
    if trial.stopping.ended is not None:
        print(f"ended after batch {trial.batches_trained} of {trial.total_batches}: {trial.stopping.ended}")
    print(f"trained for {duration(seconds)}; all of it is in {folder.path}")
    if figure := picture_of_validation(trial):
        drawing.save(figure, folder.predictions)
        print(f"predictions beside the ground truth: {folder.predictions}")


def _conclude(loggers: Loggers, trial: DetectionTrial, folder: RunFolder) -> None:
    best, metric = _validation_of("best", folder), trial.searcher_metric.name
    value = best and best["metrics"].get(metric)
    numbers = {} if value is None else {f"best/{metric}": value, "best/batches": best["batches"]}
    picture = folder.predictions if folder.predictions.exists() else None
    loggers.conclude(trial.batches_trained, numbers, picture)


def _write_report(
    trial: DetectionTrial, folder: RunFolder, config: dict[str, Any], shipped: Path, seconds: float
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
            about=_about(trial, folder, config, shipped, seconds),
        )
    except Exception as error:  # whatever it is, the training has come to its end, and all of it is saved
        logger.exception("the report could not be written (%s); `evaluate --report` makes one", type(error).__name__)
        return
    print(f"\n{summary_of(analyses)}\nthe report: {folder.report}")


def _about(trial: DetectionTrial, folder: RunFolder, config: dict[str, Any], shipped: Path, seconds: float) -> About:
    from shared.report.plots import learning_curves

    original = load_config(str(shipped)) if shipped.is_file() else None
    if original:
        original["hyperparameters"] = fixed_hyperparameters(original)
    reports = folder.reports()
    best = _validation_of("best", folder)
    return About(
        title=f"{config.get('name') or folder.path.name}: {shipped.parent.name}",
        facts={
            "run": folder.path,
            **dict(trial.summary_lines()),
            "validation data": f"{trial.val_data.annotations.path or 'fake'}, {len(trial.val_data.annotations)} images",
            **({"best checkpoint": f"batch {best['batches']} of {trial.total_batches}"} if best else {}),
            **({"ended by": trial.stopping.ended} if trial.stopping.ended else {}),
            "device": trial.context.device,
            "time": f"{duration(seconds)}" + (f", from batch {trial.first_batch} on" if trial.first_batch else ""),
            **speed(reports),
            **software(shipped.parent),
        },
        changed=changed_keys(config, original) if original else (),
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
