"""What `evaluate` and `predict` share: the trial that detects, its weights, and the files with what it detected."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from determined.core import DistributedContext

from shared import durable
from shared.config.experiment import Experiment
from shared.config.schema import key_names
from shared.data.dataset import BadImages
from shared.data.images import BadImageError, read_image
from shared.data.loading import Batch
from shared.data.open import SplitData, open_split
from shared.errors import UserError
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator
from shared.export.runtime import ExportedDetector
from shared.redaction import filled_in
from shared.training.checkpoint_folder import find_checkpoint
from shared.training.checkpoints import Checkpoint, load_weights, read_checkpoint
from shared.training.context import trial_context
from shared.training.trial import DetectionTrial


def with_checkpoint(
    trial_class: type[DetectionTrial], experiment: Experiment, arguments: argparse.Namespace
) -> tuple[Experiment, Checkpoint | None]:
    """The experiment and the checkpoint to detect with.

    The hyperparameters are the checkpoint's, with --set applied; without a checkpoint the config's. An exported file
    needs neither.
    """
    if arguments.model is not None:
        if arguments.checkpoint:
            raise UserError("--model: it holds the weights itself. Fix: remove --checkpoint")
        return experiment, None
    own = hyperparameters = experiment.config["hyperparameters"]
    checkpoint = None
    if arguments.checkpoint:
        checkpoint = read_checkpoint(find_checkpoint(arguments.checkpoint))
        if other := checkpoint.hparams.keys() - set(key_names(trial_class.hyperparameters_class)):
            raise UserError(
                f"--checkpoint: {checkpoint.path} is another detector's: its hyperparameters have "
                f"{', '.join(sorted(other))}. Fix: run the command in that detector's folder"
            )
        names = [o.split("=")[0].split(".")[1] for o in arguments.overrides if o.startswith("hyperparameters.")]
        hyperparameters = {
            **filled_in(checkpoint.hparams, own),
            **_own_imports(checkpoint, own),
            **trial_class.hyperparameters_of_checkpoint(checkpoint.path, own),
            **{name: own[name] for name in names},
        }
    slots = int(os.environ.get("WORLD_SIZE", 1))
    batch_size = hyperparameters.get("global_batch_size")
    if type(batch_size) is int:  # any number of processes can detect
        hyperparameters = {**hyperparameters, "global_batch_size": -(-batch_size // slots) * slots}
    return experiment.with_hyperparameters(hyperparameters), checkpoint


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


class FileDetector:
    """Detects with an exported file. It has what `evaluate` and `predict` use of a trial.

    Args:
        trial_class: of the detector whose folder the command runs in.
    """

    def __init__(
        self,
        trial_class: type[DetectionTrial],
        experiment: Experiment,
        model: Path,
        processes: tuple[DistributedContext, torch.device],
    ):
        self.model = ExportedDetector(model)
        self.data, self.categories = experiment.data, self.model.categories
        distributed = processes[0]
        self.context = SimpleNamespace(distributed=distributed, device=self.model.device)
        self.rank, self.slots = distributed.rank, distributed.size
        self.iou_types = ("bbox", "segm") if "masks" in self.model.metadata.outputs else ("bbox",)
        self._max_detections = trial_class.scored_detections(experiment.config.get("hyperparameters") or {})

    def open_val(self) -> SplitData:
        return open_split(self.data, "val")

    def build_evaluator(self, data: SplitData) -> CocoEvaluator:
        gather = self.context.distributed.gather
        return CocoEvaluator(data.annotations, self.iou_types, gather=gather, max_detections=self._max_detections)

    def detect_image(self, data: SplitData, index: int, seconds: dict[str, float]) -> Detections:
        """The detections of the image at a position.

        Raises:
            BadImageError: it cannot be read.
        """
        started = time.perf_counter()
        record = data.annotations[index]
        size, name = (record.width, record.height), f"image id {record.image_id}"
        image = np.asarray(read_image(data.images, record.file_name, size, name))
        loaded = time.perf_counter()
        (found,) = self.model.detect([image], [record.image_id])
        seconds["loading"] += loaded - started
        seconds["detecting"] += time.perf_counter() - loaded
        return found

    def detect_all(self, data: SplitData, seconds: dict[str, float]) -> Iterator[tuple[Batch, list[Detections]]]:
        bad_images = BadImages(skip=self.data.on_bad_image == "skip")
        for index in range(self.rank, len(data.annotations), self.slots):
            image_id = int(data.annotations.image_ids[index])
            try:
                found = [self.detect_image(data, index, seconds)]
            except BadImageError as error:
                bad_images.leave_out(error, image_id)
                found = []
            yield Batch(None, None, [image_id] * len(found), skipped=bad_images.take()), found


@contextlib.contextmanager
def detector_of(
    trial_class: type[DetectionTrial],
    experiment: Experiment,
    checkpoint: Checkpoint | None,
    model: Path | None,
    processes: tuple[DistributedContext, torch.device],
) -> Iterator[DetectionTrial | FileDetector]:
    """The exported file `model`, or the trial of `detecting_trial` without one."""
    if model is not None:
        yield FileDetector(trial_class, experiment, model, processes)
        return
    with detecting_trial(trial_class, experiment, checkpoint, processes) as trial:
        yield trial


def detect_all(
    trial: DetectionTrial | FileDetector,
    data: SplitData,
    seconds: dict[str, float] | None = None,
    all_images: bool = False,
) -> Iterator[tuple[Batch, list[Any]]]:
    """The batches of this process's share, and their detections.

    Args:
        seconds: adds up the time for "loading" and "detecting".
        all_images: also those that a validation omits.
    """
    seconds = {"loading": 0.0, "detecting": 0.0} if seconds is None else seconds
    if isinstance(trial, FileDetector):
        yield from trial.detect_all(data, seconds)
        return
    batches = iter(trial.evaluation_loader(data, all_images=all_images))
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


def check_categories(categories: list[dict], data: SplitData, source: str) -> None:
    """Raises UserError if data.val has other categories than what detects.

    Args:
        source: what detects, for the error.
    """
    names, in_data = ([category["name"] for category in of] for of in (categories, data.categories))
    if names != in_data:
        raise UserError(
            f"data.val.annotations: its categories {in_data} are not those that the {source} was trained on, {names}"
        )


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
