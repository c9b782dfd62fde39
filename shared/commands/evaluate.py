"""`evaluate`: the metrics of a checkpoint, of pretrained weights or of a results.json on data.val or data.test."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from determined.core import DistributedContext

from shared import durable
from shared.config.experiment import Experiment
from shared.config.schema import key_names
from shared.data.loading import Batch
from shared.data.open import SplitData, open_split
from shared.data.storage import DiskImages
from shared.data.tiles import Tile, Tiling, cut
from shared.errors import UserError, check_outputs
from shared.evaluation.detections import Detections, from_coco_results, to_coco_results
from shared.evaluation.evaluator import CocoEvaluator, for_json, iou_types_of, metrics_table
from shared.evaluation.merging import merge
from shared.redaction import filled_in
from shared.report.analysis import best_of_boxes
from shared.training.checkpoints import Checkpoint, load_weights, read_checkpoint
from shared.training.downloads import find_checkpoint
from shared.training.meeting import local_processes
from shared.training.processes import trial_context
from shared.training.trial import DetectionTrial


def evaluate(trial_class: type[DetectionTrial], experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Prints the metrics; writes them, the results and a report if the arguments name folders."""
    if arguments.split != "val":
        experiment = experiment.with_val_of(arguments.split)
        with _named(arguments.split):
            evaluate(trial_class, experiment, argparse.Namespace(**{**vars(arguments), "split": "val"}))
        return
    if arguments.results is not None:
        most = trial_class.scored_detections(experiment.config.get("hyperparameters") or {})
        _evaluate_results(experiment, arguments, most)
        return
    experiment, checkpoint = with_checkpoint(trial_class, experiment, arguments)
    with local_processes() as processes, detecting_trial(trial_class, experiment, checkpoint, processes) as trial:
        data = trial.open_val()
        _make_output_folders(arguments, data)
        names, in_data = ([category["name"] for category in of.categories] for of in (trial, data))
        if names != in_data:
            raise UserError(
                f"data.val.annotations: its categories {in_data} are not those that the checkpoint was trained on, "
                f"{names}"
            )
        evaluator = trial.build_evaluator(data)
        if arguments.report and not isinstance(evaluator, CocoEvaluator):
            raise UserError("--report: the detector's library evaluates this data, and not by COCO's rules")
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
            write_results(arguments.output, gathered)
        if arguments.report:
            from shared.report.report import software  # importing matplotlib takes half a second

            facts = {
                "config": Path(arguments.config).absolute(),
                "weights": checkpoint.path if checkpoint else "pretrained, as the config names them",
                "validation data": f"{data.annotations.path or 'fake'}, {len(data.annotations)} images",
                "device": trial.context.device,
                **software(Path(sys.argv[0]).parent),
            }
            found = evaluator.found_by_id()
            _write_report(arguments, data, found.detections(), evaluator, facts, found.images.tolist())
        elif isinstance(evaluator, CocoEvaluator):
            _print_threshold(evaluator)


@contextlib.contextmanager
def _named(split: str) -> Iterator[None]:
    """Errors name the split's key instead of data.val."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("data.val", f"data.{split}")) from error


def _evaluate_results(experiment: Experiment, arguments: argparse.Namespace, max_detections: int | None) -> None:
    """Scores a file: boxes; masks and keypoints if every result and the data have them."""
    if arguments.checkpoint:
        raise UserError("--results: it scores a file, and no model. Fix: remove --checkpoint")
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
        _write_report(arguments, data, detections, evaluator, facts)
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
            make_folder(folder, option)


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
    arguments: argparse.Namespace,
    data: SplitData,
    detections: list[Detections],
    evaluator: CocoEvaluator,
    facts: dict[str, Any],
    image_ids: list[int] | None = None,
) -> None:
    from shared.report.report import About, report, summary_of  # importing matplotlib takes half a second

    path = arguments.report / "report.html"
    analyses = report(
        data.annotations,
        detections,
        path,
        images=data.images,
        iou_types=evaluator.iou_types,
        max_detections=evaluator.max_detections,
        image_ids=image_ids,
        min_score=None if arguments.min_score == "best" else arguments.min_score,
        about=About(
            title=f"{Path(arguments.config).stem} on {Path(data.annotations.path or 'fake').name}", facts=facts
        ),
    )
    print(f"\n{summary_of(analyses)}\nthe report: {path}")


# --- what evaluate and predict share ----------------------------------------------------------------


def with_checkpoint(
    trial_class: type[DetectionTrial], experiment: Experiment, arguments: argparse.Namespace
) -> tuple[Experiment, Checkpoint | None]:
    """The experiment and the checkpoint to detect with, see `experiment_of_checkpoint`."""
    checkpoint = read_checkpoint(find_checkpoint(arguments.checkpoint)) if arguments.checkpoint else None
    names = [o.split("=")[0].split(".")[1] for o in arguments.overrides if o.startswith("hyperparameters.")]
    return experiment_of_checkpoint(trial_class, experiment, checkpoint, names), checkpoint


def experiment_of_checkpoint(
    trial_class: type[DetectionTrial], experiment: Experiment, checkpoint: Checkpoint | None, changed: Sequence[str]
) -> Experiment:
    """The experiment to detect with. The hyperparameters are the checkpoint's; without one, the config's.

    Args:
        changed: hyperparameters of the config that replace the checkpoint's.
    """
    own = hyperparameters = experiment.config["hyperparameters"]
    if checkpoint is not None:
        if other := checkpoint.hparams.keys() - set(key_names(trial_class.hyperparameters_class)):
            raise UserError(
                f"--checkpoint: {checkpoint.path} is another detector's: its hyperparameters have "
                f"{', '.join(sorted(other))}. Fix: run the command in that detector's folder"
            )
        hyperparameters = {
            **filled_in(checkpoint.hparams, own),
            **_own_imports(checkpoint, own),
            **trial_class.hyperparameters_of_checkpoint(checkpoint.path, own),
            **{name: own[name] for name in changed},
        }
    slots = int(os.environ.get("WORLD_SIZE", 1))
    batch_size = hyperparameters.get("global_batch_size")
    if type(batch_size) is int:  # any number of processes can detect
        hyperparameters = {**hyperparameters, "global_batch_size": -(-batch_size // slots) * slots}
    return experiment.with_hyperparameters(hyperparameters)


def _own_imports(checkpoint: Checkpoint, own: Mapping[str, Any]) -> dict[str, list[str]]:
    """The modules that the user's own config imports: a checkpoint imports nothing.

    Raises:
        UserError: the checkpoint names a module that the user's config does not.
    """
    imports = own.get("custom_imports") or []
    if unknown := [name for name in checkpoint.hparams.get("custom_imports") or [] if name not in imports]:
        named = ", ".join(map(str, [*imports, *unknown]))
        raise UserError(
            f"hyperparameters.custom_imports: {checkpoint.path} names {', '.join(map(str, unknown))}, and a checkpoint "
            f"imports nothing. Fix: if you trust it, --set 'hyperparameters.custom_imports=[{named}]'"
        )
    return {"custom_imports": imports} if imports else {}


@contextlib.contextmanager
def detecting_trial(
    trial_class: type[DetectionTrial],
    experiment: Experiment,
    checkpoint: Checkpoint | None,
    processes: tuple[DistributedContext, torch.device],
) -> Iterator[DetectionTrial]:
    """A trial that does not train, with the checkpoint's weights or the pretrained ones."""
    with trial_context(experiment.config, *processes) as context:
        categories = checkpoint.categories if checkpoint else None
        trial = trial_class(context, experiment, for_training=False, categories=categories)
        if checkpoint:
            load_weights(trial.evaluation_model, checkpoint.weights, checkpoint.path)
        else:
            trial.check_pretrained()
        yield trial


def tiling_of(arguments: argparse.Namespace) -> Tiling | None:
    """How the arguments cut images; None if they do not."""
    return None if arguments.tiles is None else Tiling(arguments.tiles, arguments.overlap)


def detect_all(
    trial: DetectionTrial,
    data: SplitData,
    seconds: dict[str, float] | None = None,
    all_images: bool = False,
    tiling: Tiling | None = None,
    in_process: bool = False,
) -> Iterator[tuple[Batch, list[Any]]]:
    """The batches of this process's share, and their detections.

    Args:
        seconds: adds up the time for "loading" and "detecting".
        all_images: also those that a validation omits.
        tiling: detects in tiles. A batch is then one image, without its pixels.
        in_process: all of the images, by this process alone and without loader workers.
    """
    seconds = {"loading": 0.0, "detecting": 0.0} if seconds is None else seconds
    if tiling is None:
        loader = trial.evaluation_loader(data, all_images=all_images, in_process=in_process)
        yield from _detected(trial, loader, seconds)
        return
    annotations = data.annotations
    images = list(range(len(annotations)) if all_images else trial.evaluated_images(len(annotations)))
    own = images if in_process else images[trial.rank :: trial.slots] or images[:1]
    cut_up = cut(annotations, data.images, own, tiling)
    of_tiles = SplitData(cut_up.annotations, cut_up.images)
    loader = trial.evaluation_loader(of_tiles, all_images=True, is_share=True, in_process=in_process)
    missing = Counter(tile.image for tile in cut_up.tiles)
    found: dict[int, list[tuple[Tile, Any]]] = defaultdict(list)
    unread: set[int] = set()
    for batch, detected in _detected(trial, loader, seconds):
        tiles = [cut_up.tiles[number] for number in [*batch.image_ids, *batch.skipped]]
        unread.update(cut_up.tiles[number].image for number in batch.skipped)
        for tile, detections in zip(tiles, detected, strict=False):
            found[tile.image].append((tile, detections))
        missing.subtract(tile.image for tile in tiles)
        for image in dict.fromkeys(tile.image for tile in tiles):
            if missing[image] > 0:
                continue
            image_id, parts = int(annotations.image_ids[image]), found.pop(image, [])
            if image in unread:
                yield Batch(None, None, [], skipped=[image_id]), []
                continue
            size = int(annotations.columns["widths"][image]), int(annotations.columns["heights"][image])
            parts.sort(key=lambda part: (part[0].is_view, part[0].box))  # batches come in any order
            yield Batch(None, None, [image_id]), [merge(image_id, size, parts, tiling, trial.max_iou)]


def _detected(
    trial: DetectionTrial, batches: Iterable[Batch], seconds: dict[str, float]
) -> Iterator[tuple[Batch, list[Any]]]:
    batches = iter(batches)
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        loaded = time.perf_counter()
        seconds["loading"] += loaded - started
        if batch is None:
            return
        detected = trial.detect_on_host_batch(batch)
        seconds["detecting"] += time.perf_counter() - loaded
        yield batch, detected


def write_results(folder: Path, of_processes: list[dict[int, list[dict]]]) -> dict[int, list[dict]]:
    """Writes results.json in COCO's format. Returns the results by image id."""
    by_image = {image_id: found for of_process in of_processes for image_id, found in of_process.items()}
    write_json(folder / "results.json", [result for _, found in sorted(by_image.items()) for result in found])
    return by_image


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    try:
        durable.write_file(path, json.dumps(content, indent=indent))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def make_folder(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be made a folder: {error.strerror}") from error
