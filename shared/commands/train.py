"""`train`: without a cluster, in one process or under torchrun; and as a task of a cluster."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import determined as det
import numpy as np

from shared.commands.data_report import save_page
from shared.config.experiment import Experiment, experiment_of, per_slot_batch_size, read_experiment
from shared.data.open import SplitData
from shared.data.storage import open_place
from shared.environment import task_config
from shared.errors import UserError, count_of
from shared.evaluation import drawing
from shared.evaluation.evaluator import CocoEvaluator, metrics_table
from shared.evaluation.gathered import GatheredDetections, load_detections
from shared.training.checkpoints import read_checkpoint
from shared.training.engine import check_resume, train
from shared.training.hang import watching
from shared.training.loggers import Loggers
from shared.training.meeting import local_processes
from shared.training.processes import core_context, make_context, on_chief, on_every_rank, trial_context
from shared.training.resume import read_checkpoint_to_resume
from shared.training.run import ClusterRun, LocalRun, full_disk_as_error, picture_of
from shared.training.run_folder import RunFolder
from shared.training.run_store import RunStore
from shared.training.saving import saved_batches
from shared.training.stopping import End, Outcome, StoppedBeforeTraining, StopSignals
from shared.training.trial import DetectionTrial

if TYPE_CHECKING:
    from shared.report.report import About

logger = logging.getLogger(__name__)

_LABELS = 6  # images of each split in labels.png


def train_locally(trial_class: type[DetectionTrial], experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Trains without a cluster. Writes everything into one folder, and a copy of it where `--store` says.

    A signal stops it, with a checkpoint and a mark in the folder.
    """
    name = time.strftime("%Y%m%d-%H%M%S") if arguments.store is None else PurePosixPath(arguments.store).name
    output_dir = arguments.output_dir or Path("runs", name)
    with StopSignals(arguments.stop_signals, arguments.stop_status) as signals:
        try:
            _train_in(output_dir, trial_class, experiment, arguments, signals)
        except StoppedBeforeTraining as stopped:
            if int(os.environ.get("RANK", 0)) == 0:
                RunFolder(output_dir).mark_requeue(stopped.signal, None)
            raise


def _train_in(
    output_dir: Path,
    trial_class: type[DetectionTrial],
    experiment: Experiment,
    arguments: argparse.Namespace,
    signals: StopSignals,
) -> None:
    source = Path(sys.modules[trial_class.__module__].__file__).parent
    if int(os.environ.get("RANK", 0)) == 0:
        logger.info("run: %s", output_dir.absolute())
    with local_processes(experiment.hang_minutes) as (distributed, device), contextlib.ExitStack() as stack:
        watch = stack.enter_context(watching(distributed, experiment.hang_minutes))
        _check_batch_size(experiment, distributed.size)
        folder = RunFolder(distributed.broadcast(output_dir).absolute())
        stack.callback(folder.free)
        if arguments.resume is None:
            on_every_rank(distributed, folder.refuse_other_run)  # also one of another machine
        run_store = None
        if arguments.store is not None and distributed.rank == 0:
            run_store = RunStore(open_place(arguments.store, experiment.data.store_options), folder)
        on_chief(distributed, lambda: _take(folder, arguments.resume, run_store))
        if run_store is not None:
            stack.enter_context(run_store)
        stack.enter_context(full_disk_as_error(folder))
        checkpoint = read_checkpoint_to_resume(distributed, arguments.resume, folder)
        on_chief(distributed, lambda: folder.prepare(source))
        first_batch = checkpoint.batches if checkpoint else 0
        context = stack.enter_context(trial_context(experiment.config, distributed, device, first_batch))
        trial = trial_class(context, experiment, watch=watch)
        if checkpoint:
            check_resume(trial, checkpoint)
        loggers = stack.enter_context(Loggers())
        names, resumes = trial.hparams.loggers, checkpoint is not None
        on_chief(distributed, lambda: loggers.open(names, experiment.config, folder, resumes))
        if trial.rank == 0:
            if checkpoint:
                logger.info("resuming after batch %d, from %s", checkpoint.batches, checkpoint.path)
            _begin_folder(trial, folder)
            if run_store is not None:
                run_store.begin()
        run = LocalRun(folder, loggers, trial.schedule.checkpoint_policy, signals, run_store)
        outcome = train(trial, run, checkpoint, _draw_figures)
        if outcome.end is End.NOTHING_TO_DO:
            loggers.finish(0)
            if arguments.resume != "auto":
                raise UserError(f"--resume: {outcome}. Fix: to train longer, raise searcher.max_length")
            if trial.rank == 0:
                logger.info("nothing to do: %s", outcome)
        elif not outcome.is_finished:
            if trial.rank == 0:
                print(f"{outcome}; continue with --output-dir {folder.path} --resume last", file=sys.stderr)
                if outcome.signal != signal.SIGINT:
                    folder.mark_requeue(outcome.signal, outcome.batches)
            sys.exit(signals.exit_status(outcome.signal))
        elif trial.rank == 0:
            results = Results(trial, folder, outcome)
            results.show()
            picture = folder.predictions if folder.predictions.exists() else None
            loggers.conclude(outcome.batches, results.best_numbers(), picture)
            same_name = source / Path(arguments.config).name
            results.write_report(same_name if same_name.exists() else source / "const.yaml")


def train_on_cluster(trial_class: type[DetectionTrial]) -> None:
    """Trains with the config and the hyperparameters that the master gives."""
    info = det.get_cluster_info()
    experiment = experiment_of(task_config(), info.trial.hparams, trial_class.sections())
    with (
        local_processes(experiment.hang_minutes, len(info.gpu_uuids)) as (distributed, device),
        watching(distributed, experiment.hang_minutes) as watch,
        core_context(distributed) as core,
    ):
        _check_batch_size(experiment, distributed.size)
        checkpoint = None
        if info.latest_checkpoint is not None:
            with core.checkpoint.restore_path(info.latest_checkpoint) as path:
                checkpoint = read_checkpoint(Path(path))
        # the checkpoint of another trial gives weights only
        is_own = checkpoint is not None and checkpoint.counts.get("trial_id") == info.trial.trial_id
        first_batch = checkpoint.batches if is_own else 0
        context = make_context(core, experiment.config, device, first_batch, info.trial.trial_seed)
        trial = trial_class(context, experiment, watch=watch)
        if checkpoint:
            check_resume(trial, checkpoint)
        if trial.rank == 0 and trial.hparams.loggers:
            logger.info("hyperparameters.loggers: not used on a cluster, where the master has the numbers")
        if trial.schedule.profiling:
            core.profiler.on()
        run = ClusterRun(core, info.trial.trial_id, trial.searcher_metric, trial.schedule.checkpoint_policy)
        outcome = train(trial, run, checkpoint, _draw_figures)
        if trial.rank > 0:
            return
        if outcome.is_finished:
            print(metrics_table({**outcome.validation.metrics, **outcome.validation.category_ap}, trial.iou_types))
        print(outcome, flush=True)


def _check_batch_size(experiment: Experiment, slots: int) -> None:
    """Raises UserError if the batch does not divide by the slots, before anything is opened or written."""
    batch_size = experiment.hyperparameters.global_batch_size
    if batch_size is not None:  # else the detector's own config has it
        per_slot_batch_size(batch_size, slots)


def _draw_figures(evaluator: CocoEvaluator, found: GatheredDetections) -> dict[str, np.ndarray]:
    from shared.report.plots import pictures_of  # matplotlib takes half a second to import

    return pictures_of(evaluator, found)


def _take(folder: RunFolder, resume: str | None, run_store: RunStore | None) -> None:
    folder.take()
    folder.restore_interrupted_rename()
    if resume is None:
        folder.refuse_other_run()
    if run_store is not None:
        run_store.take(resume)


def _begin_folder(trial: DetectionTrial, folder: RunFolder) -> None:
    folder.write_config(trial.experiment.config)
    folder.write_length(trial.total_batches, trial.batches_per_epoch)
    trial.save_own_config(folder.path)
    both = {"train": trial.train_data, "val": trial.val_data}
    opened = {split: data for split, data in both.items() if isinstance(data, SplitData)}
    if opened and not folder.labels.exists():
        save_page(opened, folder.labels, count=_LABELS)


class Results:
    """The results that a finished training shows, logs and reports.

    Attributes:
        validations: those of the checkpoints `best` and `last` that this run saved and validated.
    """

    def __init__(self, trial: DetectionTrial, folder: RunFolder, outcome: Outcome):
        self.trial, self.folder, self.outcome = trial, folder, outcome
        self.metric = trial.searcher_metric.name
        batches = {name: saved_batches(folder.checkpoints / name) for name in ("best", "last")}
        found = {name: folder.validation_after(count) for name, count in batches.items()}
        self.validations = {name: report for name, report in found.items() if report}

    def show(self) -> None:
        """Prints the metrics and where the results are; draws the last validation."""
        for name, report in list(self.validations.items())[:1]:
            numbers = {key: math.nan if value is None else value for key, value in report["metrics"].items()}
            print(f"\n{name}, batch {report['batches']} of {self.outcome.total}:\n")
            print(metrics_table(numbers, self.trial.iou_types), end="\n\n")
        for name, report in self.validations.items():
            value, loss = (report["metrics"].get(key) for key in (self.metric, "val_loss"))
            number = "undefined" if value is None else f"{value:.4f}"
            number += "" if loss is None or self.metric == "val_loss" else f", val_loss {loss:.4f}"
            print(f"{name}: {self.metric} {number} at batch {report['batches']}, {self.folder.checkpoints / name}")
        if self.outcome.why:
            print(self.outcome)
        print(f"trained for {timedelta(seconds=int(self.outcome.seconds))}; the run's folder is {self.folder.path}")
        if figure := picture_of(self.trial, self.outcome.validation):
            drawing.save(figure, self.folder.predictions)
            print(f"predictions beside the ground truth: {self.folder.predictions}")

    def best_numbers(self) -> dict[str, float]:
        """The best validation's searcher metric and batch."""
        best = self.validations.get("best")
        value = best and best["metrics"].get(self.metric)
        return {} if value is None else {f"best/{self.metric}": value, "best/batches": best["batches"]}

    def write_report(self, shipped: Path) -> None:
        """Writes report.html of the best validation, unless the detector's library evaluates data of its own.

        Args:
            shipped: the config file that the run's config is compared with.
        """
        trial, folder = self.trial, self.folder
        if not (isinstance(trial.evaluator, CocoEvaluator) and folder.detections.exists()):
            return
        from shared.report.report import report_of  # importing matplotlib takes half a second

        try:
            found, *_ = load_detections(folder.detections)
            report_of(trial.evaluator, found, folder.report, trial.val_data.images, self._about(shipped))
        except Exception as error:  # whatever it is, the training is complete and saved
            name = type(error).__name__
            logger.exception("the report could not be written (%s); `evaluate --report` makes one", name)

    def _about(self, shipped: Path) -> About:
        from shared.report.plots import learning_curves
        from shared.report.report import About, changed_keys, software, speed

        trial, folder, outcome = self.trial, self.folder, self.outcome
        config, annotations = trial.experiment.config, trial.val_data.annotations
        original = config
        if shipped.is_file():
            original = read_experiment(shipped, (), trial.sections(), with_hyperparameters=False).config
        reports = folder.reports()
        best = self.validations["best"]["batches"] if "best" in self.validations else None
        return About(
            title=f"{config.get('name') or folder.path.name}: {shipped.parent.name}",
            facts={
                "run": folder.path,
                **dict(trial.summary_lines()),
                "validation data": f"{annotations.path or 'fake'}, {count_of(len(annotations), 'image')}",
                **({} if best is None else {"best checkpoint": f"batch {best} of {outcome.total}"}),
                **({"ended by": outcome.why} if outcome.why else {}),
                "device": trial.context.device,
                "time": timedelta(seconds=int(outcome.seconds)),
                **speed(reports),
                **software(shipped.parent),
            },
            changed=changed_keys(config, original),
            shipped=shipped.name,
            curves=learning_curves(reports, self.metric, best),
        )
