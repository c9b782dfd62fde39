"""`evaluate`: the metrics of a checkpoint, of pretrained weights or of a results.json on data.val or data.test."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections import ChainMap
from pathlib import Path
from typing import Any

from shared.commands.detection import (
    check_categories,
    detect_all,
    detector_of,
    tiling_of,
    with_checkpoint,
    write_json,
    write_results,
)
from shared.config.experiment import Experiment
from shared.data.open import SplitData, open_split
from shared.data.storage import DiskImages
from shared.errors import UserError, check_outputs, count_of, unwritable_as_error
from shared.evaluation.detections import Detections, from_coco_results, to_coco_results
from shared.evaluation.evaluator import CocoEvaluator, for_json, iou_types_of, metrics_table
from shared.report.analysis import best_of_boxes
from shared.training.meeting import local_processes
from shared.training.processes import on_chief
from shared.training.trial import DetectionTrial


def evaluate(trial_class: type[DetectionTrial], experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Prints the metrics; writes them, the results and a report if the arguments name folders."""
    if arguments.split != "val":
        experiment = experiment.with_val_of(arguments.split)
        try:
            evaluate(trial_class, experiment, argparse.Namespace(**{**vars(arguments), "split": "val"}))
        except UserError as error:
            raise UserError(str(error).replace("data.val", f"data.{arguments.split}")) from error
        return
    if arguments.results is not None:
        most = trial_class.scored_detections(experiment.config.get("hyperparameters") or {})
        _evaluate_results(experiment, arguments, most)
        return
    with local_processes() as processes, contextlib.ExitStack() as stack:
        experiment, checkpoint = with_checkpoint(trial_class, experiment, arguments, processes[0])
        trial = stack.enter_context(detector_of(trial_class, experiment, checkpoint, arguments.model, processes))
        data = trial.open_val()
        on_chief(processes[0], lambda: _make_output_folders(arguments, data))
        check_categories(trial.categories, data, "checkpoint" if arguments.model is None else "exported detector")
        evaluator = trial.build_evaluator(data)
        if arguments.report and not isinstance(evaluator, CocoEvaluator):
            raise UserError(
                "--report: this data is not evaluated by COCO's rules but by the detector's library. Fix: run without "
                "--report"
            )
        tiling = tiling_of(arguments)
        if tiling is not None and not isinstance(data, SplitData):
            raise UserError("--tiles: the detector's library reads and evaluates this data. Fix: remove --tiles")
        category_ids = [category["id"] for category in data.categories]
        results = {}
        for batch, detected in detect_all(trial, data, tiling=tiling):
            evaluator.update(detected)
            if batch.skipped:
                evaluator.skip(batch.skipped)
            for found in detected:
                if isinstance(found, Detections):
                    results[found.image_id] = to_coco_results(found, category_ids)
        distributed = trial.context.distributed
        gathered = distributed.gather(results)
        metrics = evaluator.cross_slot_reduce(distributed.allgather(evaluator.per_slot_reduce()))
        evaluator.raise_if_failed()
        if trial.rank > 0:
            return
        _print_metrics(metrics, trial.iou_types, arguments.output)
        if arguments.output:
            write_results(arguments.output, ChainMap(*gathered))
        if arguments.report:
            from shared.report.report import software  # importing matplotlib takes half a second

            facts = {
                "config": Path(arguments.config).absolute(),
                "weights": arguments.model or (checkpoint.path if checkpoint else "the config's pretrained ones"),
                "validation data": f"{data.annotations.path or 'fake'}, {count_of(len(data.annotations), 'image')}",
                "device": trial.context.device,
                **software(Path(sys.argv[0]).parent),
            }
            _write_report(arguments, data, evaluator, facts)
        elif isinstance(evaluator, CocoEvaluator):
            _print_threshold(evaluator)


def _evaluate_results(experiment: Experiment, arguments: argparse.Namespace, max_detections: int | None) -> None:
    """Scores a file: boxes; masks and keypoints if every result and the data have them."""
    if arguments.checkpoint or arguments.model:
        option = "--checkpoint" if arguments.checkpoint else "--model"
        raise UserError(f"--results: it scores a file, and no model. Fix: remove {option}")
    if int(os.environ.get("RANK", 0)) > 0:  # one process scores it
        return
    images = None if arguments.report else DiskImages(Path())  # only the report reads images
    data = open_split(dataclasses.replace(experiment.data, check_images=False), "val", images=images)
    detections = from_coco_results(arguments.results, data.annotations)
    _make_output_folders(arguments, data)
    iou_types = iou_types_of(detections, data.annotations)
    evaluator = CocoEvaluator(data.annotations, iou_types, max_detections=max_detections)
    evaluator.update(detections)
    _print_metrics(evaluator.compute(), evaluator.iou_types, arguments.output)
    if arguments.report:
        facts = {"detections": arguments.results.absolute(), "validation data": data.annotations.path}
        _write_report(arguments, data, evaluator, facts)
    else:
        _print_threshold(evaluator)


def _make_output_folders(arguments: argparse.Namespace, data: SplitData) -> None:
    """Raises UserError if a folder cannot be made, or an input would be replaced in it."""
    inputs = [arguments.config, arguments.results, data.annotations.path]
    numbers = ["metrics.json"] if arguments.results else ["metrics.json", "results.json"]
    for option, folder, names in (
        ("--output", arguments.output, numbers),
        ("--report", arguments.report, ["report.html", "report.json"]),
    ):
        if folder is not None:
            check_outputs(option, [folder / name for name in names], inputs)
            with unwritable_as_error(f"{option}: {folder}", "give another folder"):
                folder.mkdir(parents=True, exist_ok=True)


def _print_metrics(metrics: dict[str, float], iou_types: tuple[str, ...], output: Path | None) -> None:
    print(metrics_table(metrics, iou_types))
    if output:
        write_json(output / "metrics.json", for_json(metrics), indent=1)


def _print_threshold(evaluator: CocoEvaluator) -> None:
    curve = best_of_boxes(evaluator)
    if curve.best is not None:
        print(
            f"\nF1 is greatest, {curve.best_f1:.3f}, with detections of a score of at least {curve.best_threshold:.3f}"
        )


def _write_report(
    arguments: argparse.Namespace, data: SplitData, evaluator: CocoEvaluator, facts: dict[str, Any]
) -> None:
    from shared.report.report import About, report_of  # importing matplotlib takes half a second

    title = f"{Path(arguments.config).stem} on {Path(data.annotations.path or 'fake').name}"
    min_score = None if arguments.min_score == "best" else arguments.min_score
    path, about = arguments.report / "report.html", About(title=title, facts=facts)
    report_of(evaluator, evaluator.found, path, data.images, about, min_score)
