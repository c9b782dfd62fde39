"""evaluate · predict: what a checkpoint, or pretrained weights, detect."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from shared.config_file import fixed_hyperparameters, load_config, make_paths_absolute
from shared.data.annotations import CocoAnnotations
from shared.data.images import read_image
from shared.data.loading import Batch
from shared.data.storage import DiskImages
from shared.errors import UserError
from shared.evaluation import visualization
from shared.evaluation.detections import Detections, to_coco_results
from shared.evaluation.table import metrics_table
from shared.experiment import DataConfig, SplitData
from shared.training.checkpoint_folder import find_checkpoint
from shared.training.checkpoints import Checkpoint, load_weights, read_checkpoint
from shared.training.loop import trial_context
from shared.training.processes import local_processes
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)


def evaluate(trial_class: type[DetectionTrial], arguments: argparse.Namespace) -> None:
    """The metrics of a checkpoint, or of the pretrained weights, on data.val."""
    config, checkpoint = _config_to_detect_with(trial_class, arguments)
    with _detecting_trial(trial_class, config, checkpoint) as trial:
        data = trial.open_val()
        _make_folder(arguments.output, "--output")
        names, in_data = ([category["name"] for category in of.categories] for of in (trial, data))
        if names != in_data:
            raise UserError(
                f"data.val.annotations: its categories {in_data} are not those that the checkpoint was trained on, "
                f"{names}"
            )
        evaluator = trial.build_evaluator(data)
        category_ids = [category["id"] for category in data.categories]
        results = {}
        for batch, detected in _detect_all(trial, data):
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
        if trial.rank == 0:
            print(metrics_table(metrics, trial.iou_types))
            if arguments.output:
                plain = {name: None if value != value else value for name, value in metrics.items()}
                (arguments.output / "metrics.json").write_text(json.dumps(plain, indent=1))
                _write_results(arguments.output, gathered)


def predict(trial_class: type[DetectionTrial], arguments: argparse.Namespace) -> None:
    """Detections on a folder of images: a picture for each and one results.json."""
    config, checkpoint = _config_to_detect_with(trial_class, arguments)
    files = _image_files(arguments.images)
    _make_folder(arguments.output, "--output")
    with _detecting_trial(trial_class, config, checkpoint) as trial:
        data = _folder_as_data(arguments.images, files, trial)
        annotations, suffix = data.annotations, arguments.format
        index_of = {int(image_id): i for i, image_id in enumerate(annotations.image_ids)}
        trial.bad_images.skip = True  # as those of which not even the header can be read
        results, seconds = {}, dict.fromkeys(("loading", "detecting", "drawing"), 0.0)
        for detections in (one for _, detected in _detect_all(trial, data, seconds) for one in detected):
            started = time.perf_counter()
            file_name = annotations.file_name(index_of[detections.image_id])
            image = read_image(data.images, file_name)
            figure = visualization.figure_of(image, detections, annotations.categories, arguments.min_score)
            picture = arguments.output / f"{file_name}.{suffix}"
            picture.parent.mkdir(parents=True, exist_ok=True)
            visualization.save(figure, picture)
            results[detections.image_id] = [
                {**result, "file_name": file_name} for result in to_coco_results(detections, annotations.category_ids)
            ]
            seconds["drawing"] += time.perf_counter() - started
        gathered = trial.context.distributed.gather(results)
        if trial.rank == 0:
            images, count, drawn = _write_results(arguments.output, gathered, arguments.min_score)
            print(
                f"{count} detections on {images} images in {arguments.output / 'results.json'}; the {drawn} of "
                f"at least {arguments.min_score:g} are drawn in the pictures beside it"
            )
            print("seconds: " + ", ".join(f"{stage} {spent:.2f}" for stage, spent in seconds.items()))


def _make_folder(path: Path | None, option: str) -> None:
    try:
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be made a folder: {error.strerror}") from error


def _config_to_detect_with(
    trial_class: type[DetectionTrial], arguments: argparse.Namespace
) -> tuple[dict[str, Any], Checkpoint | None]:
    """The config; its hyperparameters are the checkpoint's, with --set over them."""
    config = load_config(arguments.config, arguments.overrides)
    checkpoint = None
    if arguments.checkpoint:
        checkpoint = read_checkpoint(find_checkpoint(arguments.checkpoint))
        known = {field.name for field in dataclasses.fields(trial_class.hyperparameters_class)}
        if other := checkpoint.hparams.keys() - known:
            raise UserError(
                f"{checkpoint.path} is another detector's: its hyperparameters have {', '.join(sorted(other))}"
            )
        overridden = [o.split("=")[0].split(".")[1] for o in arguments.overrides if o.startswith("hyperparameters.")]
        config["hyperparameters"] = {
            **checkpoint.hparams,
            **trial_class.hyperparameters_of_checkpoint(checkpoint.path),
            **{name: config["hyperparameters"][name] for name in overridden},
        }
    else:
        config["hyperparameters"] = fixed_hyperparameters(config)
    slots = int(os.environ.get("WORLD_SIZE", 1))
    batch_size = config["hyperparameters"].get("global_batch_size")
    if type(batch_size) is int:
        config["hyperparameters"]["global_batch_size"] = -(-batch_size // slots) * slots  # any number of processes
    make_paths_absolute(config, trial_class.path_hyperparameters)
    return config, checkpoint


@contextlib.contextmanager
def _detecting_trial(
    trial_class: type[DetectionTrial], config: dict, checkpoint: Checkpoint | None
) -> Iterator[DetectionTrial]:
    with local_processes() as (distributed, device), trial_context(config, distributed, device) as context:
        trial = trial_class(context, for_training=False, categories=checkpoint.categories if checkpoint else None)
        if checkpoint:
            load_weights(trial.evaluation_model, checkpoint.weights, checkpoint.path)
        else:
            trial.check_pretrained()
        yield trial


def _detect_all(
    trial: DetectionTrial, data: SplitData, seconds: dict[str, float] | None = None
) -> Iterator[tuple[Batch, list[Any]]]:
    """The batches of this process's share and their detections; `seconds` adds up its waiting for "loading" and for
    "detecting"."""
    seconds = {"loading": 0.0, "detecting": 0.0} if seconds is None else seconds
    batches = iter(trial.evaluation_loader(data))
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


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"--images: {folder} is not a folder")
    suffixes = Image.registered_extensions()
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix.lower() in suffixes]


def _folder_as_data(folder: Path, files: list[Path], trial: DetectionTrial) -> SplitData:
    """The image files below `folder` as a data set without annotations: ids from data.val where the file names
    are there, else the position in sorted order."""
    known = _known_image_ids(trial.data)
    images = []
    for file in files:
        name = str(file.relative_to(folder))
        try:
            with Image.open(file) as image:
                width, height = ImageOps.exif_transpose(image).size if image.getexif() else image.size
        except (OSError, Image.DecompressionBombError) as error:
            logger.warning("%s is left out: %s", file, error)
            continue
        images.append({"id": known.get(name, len(images)), "file_name": name, "height": height, "width": width})
    if not images:
        raise UserError(f"--images: {folder} holds no image that can be read")
    if not all(image["file_name"] in known for image in images):
        images = [{**image, "id": position} for position, image in enumerate(images)]
    coco = {"images": images, "annotations": [], "categories": trial.categories}
    return SplitData(CocoAnnotations.from_dict(coco), DiskImages(folder.absolute()))


def _known_image_ids(data: DataConfig) -> dict[str, int]:
    if data.backend == "fake" or not data.has_val_annotations:
        return {}
    try:
        annotations = CocoAnnotations.open(data.located(data.val.annotations), data.cache_dir, data.store_options)
    except UserError:  # a data set in another format: its files have no COCO ids
        return {}
    return {annotations.file_name(i): int(image_id) for i, image_id in enumerate(annotations.image_ids)}


def _write_results(folder: Path, gathered: list[dict[int, list[dict]]], min_score: float = 0.0) -> tuple[int, int, int]:
    """Returns how many images and detections there are, and how many detections of at least `min_score`."""
    by_image = {image_id: found for results in gathered for image_id, found in results.items()}
    results = [result for _, found in sorted(by_image.items()) for result in found]
    (folder / "results.json").write_text(json.dumps(results))
    return len(by_image), len(results), sum(result["score"] >= min_score for result in results)
