"""Detections of a checkpoint or an exported file, for `evaluate`, `predict`, `export` and the Python interface."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from shared.data.tiles import Tile, Tiling, cut
from shared.errors import UserError
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator
from shared.evaluation.merging import merge
from shared.export.metadata import thresholds_of_report
from shared.export.runtime import ExportedDetector
from shared.log import filled_in
from shared.training.checkpoints import Checkpoint, load_weights, read_checkpoint
from shared.training.downloads import find_checkpoint
from shared.training.processes import on_chief, on_every_rank, trial_context
from shared.training.resume import on_each_machine
from shared.training.trial import DetectionTrial


def with_checkpoint(
    trial_class: type[DetectionTrial],
    experiment: Experiment,
    arguments: argparse.Namespace,
    distributed: DistributedContext,
) -> tuple[Experiment, Checkpoint | None]:
    """The experiment and the checkpoint to detect with, see `experiment_of_checkpoint`. An exported file needs
    neither. The chief finds the checkpoint, and other machines get a copy of it. Every rank raises the same error."""
    if arguments.model is not None:
        if arguments.checkpoint:
            raise UserError("--model: it holds the weights itself. Fix: remove --checkpoint")
        return experiment, None
    names = [o.split("=")[0].split(".")[1] for o in arguments.overrides if o.startswith("hyperparameters.")]
    if not arguments.checkpoint:
        return experiment_of_checkpoint(trial_class, experiment, None, names), None
    path = on_chief(distributed, lambda: find_checkpoint(arguments.checkpoint))

    def read() -> tuple[Experiment, Checkpoint]:
        checkpoint = read_checkpoint(own)
        found = experiment_of_checkpoint(trial_class, experiment, checkpoint, names)
        return found, replace(checkpoint, path=path)

    with on_each_machine(distributed, path) as own:
        return on_every_rank(distributed, read)


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


class FileDetector:
    """Detects with an exported file. It has what `evaluate` and `predict` use of a trial.

    Args:
        trial_class: the detector whose folder the command runs in.
    """

    evaluation_batch_size = 1

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
        self.max_iou = self.model.metadata.max_iou
        self.iou_types = self.model.iou_types
        self._max_detections = trial_class.scored_detections(experiment.config.get("hyperparameters") or {})

    def open_val(self) -> SplitData:
        return open_split(self.data, "val")

    def evaluated_images(self, count: int) -> range:
        return range(count)

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

    def detect_all(
        self, data: SplitData, seconds: dict[str, float], is_share: bool
    ) -> Iterator[tuple[Batch, list[Detections]]]:
        """See `detect_all`.

        Args:
            is_share: the data are this process's share of the images.
        """
        bad_images = BadImages(skip=self.data.on_bad_image == "skip")
        rank, slots = (0, 1) if is_share else (self.rank, self.slots)
        for index in range(rank, len(data.annotations), slots):
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


def check_categories(categories: list[dict], data: SplitData, source: str) -> None:
    """Raises UserError if data.val has other categories than what detects.

    Args:
        source: what detects, for the error.
    """
    names, in_data = ([category["name"] for category in of] for of in (categories, data.categories))
    if names != in_data:
        raise UserError(
            f"data.val.annotations: its categories {in_data} differ from those that the {source} was trained on, "
            f"{names}. Fix: give data with the same categories"
        )


def tiling_of(arguments: argparse.Namespace) -> Tiling | None:
    """How the arguments cut images; None if they do not."""
    return None if arguments.tiles is None else Tiling(arguments.tiles, arguments.overlap)


def detect_all(
    trial: DetectionTrial | FileDetector,
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
        yield from _batches(trial, data, seconds, all_images=all_images, in_process=in_process)
        return
    annotations = data.annotations
    images = list(range(len(annotations)) if all_images else trial.evaluated_images(len(annotations)))
    own = images if in_process else images[trial.rank :: trial.slots] or images[:1]
    all_tiles, tile_annotations, tile_images = cut(annotations, data.images, own, tiling)
    of_tiles = SplitData(tile_annotations, tile_images)
    missing = Counter(tile.image for tile in all_tiles)
    found: dict[int, list[tuple[Tile, Any]]] = defaultdict(list)
    unread: set[int] = set()
    for batch, detected in _batches(trial, of_tiles, seconds, all_images=True, is_share=True, in_process=in_process):
        tiles = [all_tiles[number] for number in [*batch.image_ids, *batch.skipped]]
        unread.update(all_tiles[number].image for number in batch.skipped)
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


def _batches(
    trial: DetectionTrial | FileDetector,
    data: SplitData,
    seconds: dict[str, float],
    all_images: bool,
    in_process: bool,
    is_share: bool = False,
) -> Iterator[tuple[Batch, list[Any]]]:
    """Batches of whole images, and their detections. See `detect_all` and `DetectionTrial.evaluation_loader`."""
    if isinstance(trial, FileDetector):
        yield from trial.detect_all(data, seconds, is_share or in_process)
        return
    batches = iter(trial.evaluation_loader(data, all_images=all_images, is_share=is_share, in_process=in_process))
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
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Fix: free some space, or give another folder"
        ) from error


def make_folder(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{option}: {path} cannot be made a folder: {error.strerror}. Fix: give another folder"
        ) from error


# --- the lowest scores that are drawn: a number, or the best thresholds in the report of the checkpoint's run

BEST, PER_CATEGORY = "best", "best-per-category"


@dataclass(frozen=True)
class ScoreLimits:
    """The lowest score of each category.

    Attributes:
        scores: (K,) float64 by label.
        text: which detections have at least these, in words.
    """

    scores: np.ndarray
    text: str

    def allow(self, detections: Detections) -> np.ndarray:
        """(M,) bool: which detections have the lowest score or more."""
        return detections.scores >= self.scores.astype(detections.scores.dtype)[detections.labels]


def score_limits(
    given: float | str, categories: Sequence[dict], checkpoint: Path | None, exported: FileDetector | None = None
) -> ScoreLimits:
    """The limits of `--min-score`.

    Args:
        given: a number; "best", the threshold with the greatest F1; or "best-per-category", that of each category. A
            category without a correct detection has the threshold over all categories.
        checkpoint: its folder, in a run with a report; None for pretrained weights.
        exported: an exported file holds the thresholds itself.

    Raises:
        UserError: the checkpoint is of no run with a report, or no detection in the report is correct.
    """
    if isinstance(given, str):
        if exported is None:
            source, (best, known) = _thresholds_of_run(given, checkpoint)
        else:
            metadata = exported.model.metadata
            source, best, known = exported.model.path, metadata.best_threshold, metadata.thresholds
        if best is None:
            raise UserError(f"--min-score {given}: no detection is correct in {source}. Fix: give a number")
        if given == PER_CATEGORY:
            scores = np.array([known.get(category["name"], best) for category in categories], np.float64)
            return ScoreLimits(scores, "of at least their category's best score")
        given = best
    return ScoreLimits(np.full(len(categories), given, np.float64), f"of at least {given:g}")


def _thresholds_of_run(given: str, checkpoint: Path | None) -> tuple[Path, tuple[float | None, dict[str, float]]]:
    report = checkpoint and checkpoint.parent.parent / "report.json"
    thresholds = report and thresholds_of_report(report)
    if thresholds is None:
        raise UserError(
            f"--min-score {given}: {checkpoint or 'the pretrained weight file'} is of no run with "
            "a report. Fix: give a number; `evaluate` prints the best one"
        )
    return report, thresholds
