"""`export`: a detector as a file for another runtime, with its numbers on the user's data beside the checkpoint's."""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import shared.export
from shared import durable
from shared.commands.detection import FileDetector, check_categories, detecting_trial, with_checkpoint
from shared.config.experiment import Experiment
from shared.data.dataset import CocoDetection
from shared.data.images import read_image
from shared.data.open import SplitData, open_split
from shared.errors import UserError, count_of
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import for_json
from shared.export import formats
from shared.export.check import Differences, Side, differences, own_peak_memory, peak_memory_of
from shared.export.metadata import TRANSFORMERS, Metadata, known_thresholds, thresholds_of_report, versions_of
from shared.export.quantization import IMAGES
from shared.report.compare import Compared, compared, summary_of
from shared.report.page import write_page
from shared.training.checkpoints import Checkpoint
from shared.training.meeting import local_processes
from shared.training.saving import weights_digest
from shared.training.trial import DetectionTrial

_NUMBERS = "export.json"
_TOLERANCE = 0.001  # of mAP, in float32
_PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "openvino")


def export(trial_class: type[DetectionTrial], experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Writes the file, evaluates it and the checkpoint on data.val, and writes what differs.

    Raises:
        UserError: the detector cannot be exported, or the file detects worse or better than the checkpoint.
    """
    if arguments.format != TRANSFORMERS:
        formats.check_format(arguments.format)
        formats.check_precision(arguments.format, arguments.precision)
    output = arguments.output or Path("exports") / arguments.format
    _check_output(output)
    experiment, checkpoint = with_checkpoint(trial_class, experiment, arguments)
    with local_processes() as processes, detecting_trial(trial_class, experiment, checkpoint, processes) as trial:
        if trial.slots > 1:
            raise UserError("export: one process exports. Fix: start it without torchrun")
        with _replacing(output) as folder:
            if arguments.format == TRANSFORMERS:
                trial.save_for_transformers(folder)
            else:
                _write_checked(trial, experiment, checkpoint, arguments, folder)
    print(f"written: {output}")


def _write_checked(
    trial: DetectionTrial,
    experiment: Experiment,
    checkpoint: Checkpoint | None,
    arguments: argparse.Namespace,
    folder: Path,
) -> None:
    """Writes the file, `detect.py`, and the comparison of the file with the checkpoint."""
    exportable = copy.deepcopy(trial.exportable()).cpu().float().eval()
    formats.check_detector(exportable, arguments.format)
    data = trial.open_val()
    source = "checkpoint" if checkpoint else "pretrained"
    check_categories(trial.categories, data, source)
    indices = _indices(trial, data, arguments.images)
    print(f"detecting with the {source} on {count_of(len(indices), 'image')}")
    found, speed = _with_trial(trial, data, indices)
    sides = {source: Side(speed, own_peak_memory(), str(trial.context.device))}
    print(f"writing {formats.FORMATS[arguments.format]}")
    metadata = _metadata(exportable, trial, checkpoint, data, found, arguments.precision)
    calibration = _calibration(experiment) if arguments.precision == "int8" else ()
    path = formats.write(exportable, arguments.format, folder, metadata, calibration)
    script = shutil.copy(Path(shared.export.__file__).with_name("detect.py"), folder)
    print("detecting with the file")
    processes = (trial.context.distributed, trial.context.device)
    file = FileDetector(type(trial), experiment, path, processes)
    image_ids = [image.image_id for image in found]
    of_file, speed = _with_file(file, data, image_ids)
    sides[arguments.format] = Side(speed, peak_memory_of(Path(script), path, data, indices), file.context.device)
    comparison = compared(
        data.annotations,
        {source: found, arguments.format: of_file},
        [each for each in trial.iou_types if each in file.iou_types],
        image_ids,
        max_detections=trial.scored_detections(experiment.config["hyperparameters"]),
    )
    tolerance = arguments.tolerance
    if tolerance is None:
        tolerance = _TOLERANCE if arguments.precision == "float32" else 1.0
    _check_difference(comparison, arguments.format, tolerance)
    apart = differences(found, of_file)
    _write_page(folder, comparison, sides, apart, _facts(path, metadata, len(found), tolerance))
    for one in comparison.comparisons:
        print(summary_of(one))
    print(apart)
    for name, side in sides.items():
        memory = "" if side.peak_memory_mib is None else f", at most {side.peak_memory_mib:.0f} MiB"
        print(f"{name}: {side.images_per_second:.2f} images per second on {side.device}{memory}")


def _check_output(output: Path) -> None:
    """Raises UserError if `output` holds anything but an earlier export."""
    if output.is_dir() and any(output.iterdir()) and not (output / _NUMBERS).is_file():
        raise UserError(f"--output: {output} is not empty. Fix: give a new folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file. Fix: give a new folder")


@contextlib.contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A new folder, which takes the place of `output` at the end. An error deletes it."""
    folder = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        folder.mkdir(parents=True)
        yield folder
        durable.replace_folder(folder, output)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"--output: {output} cannot be written: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _indices(trial: DetectionTrial, data: SplitData, count: int | None) -> list[int]:
    """The images to detect on: all that a validation uses, or `count` of them, evenly spread."""
    indices = np.array(trial.evaluated_images(len(data.annotations)))
    if count is not None and count < len(indices):
        indices = indices[np.linspace(0, len(indices) - 1, count).astype(int)]
    return indices.tolist()


def _calibration(experiment: Experiment) -> Iterator[np.ndarray]:
    """Images of data.train, evenly spread."""
    train = open_split(experiment.data, "train")
    count = len(train.annotations)
    for index in np.unique(np.linspace(0, count - 1, min(IMAGES, count)).astype(int)).tolist():
        record = train.annotations[index]
        yield np.asarray(read_image(train.images, record.file_name, (record.width, record.height)))


def _with_trial(trial: DetectionTrial, data: SplitData, indices: list[int]) -> tuple[list[Detections], float]:
    """The checkpoint's detections, and how many images it handles per second."""
    dataset, collate = trial.evaluation_dataset(data), trial.collate(training=False)
    if isinstance(dataset, CocoDetection):
        dataset = replace(dataset, replaces=False)

    def detect(index: int) -> list[Detections]:
        sample = dataset[index]
        return [] if sample is None else trial.detect_on_host_batch(collate([sample]))

    return _timed(detect(index) for index in [*indices[:1], *indices])


def _with_file(file: FileDetector, data: SplitData, image_ids: list[int]) -> tuple[list[Detections], float]:
    """The same of the exported file, on the images that could be read."""
    index_of = {int(image_id): index for index, image_id in enumerate(data.annotations.image_ids)}
    seconds = {"loading": 0.0, "detecting": 0.0}
    ids = [*image_ids[:1], *image_ids]
    return _timed([file.detect_image(data, index_of[image_id], seconds)] for image_id in ids)


def _timed(found: Iterator[list[Detections]]) -> tuple[list[Detections], float]:
    """The detections of each image but the first, which warms up, and images per second."""
    next(found)
    started = time.perf_counter()
    detections = [each for of_image in found for each in of_image]
    if not detections:
        raise UserError("data.val: no image can be read. Fix: look at the lines above, each names an image")
    return detections, len(detections) / (time.perf_counter() - started)


def _metadata(
    exportable: Any,
    trial: DetectionTrial,
    checkpoint: Checkpoint | None,
    data: SplitData,
    found: list[Detections],
    precision: str,
) -> Metadata:
    thresholds = thresholds_of_report(checkpoint.path.parent.parent / "report.json") if checkpoint else None
    if thresholds is None:  # not of a run: from these images
        ids = [image.image_id for image in found]
        analyses = compared(data.annotations, {"checkpoint": found}, ("bbox",), ids, resamples=0).of["checkpoint"]
        best = analyses.best_threshold
        known = known_thresholds([vars(row) for row in analyses.of["bbox"].categories])
        thresholds = (None if math.isnan(best) else best, known)
    return Metadata(
        categories=trial.categories,
        outputs=exportable.outputs,
        any_batch=exportable.any_batch,
        input_size=exportable.input_size,
        precision=precision,
        best_threshold=thresholds[0],
        thresholds=thresholds[1],
        checkpoint=weights_digest(checkpoint.path) if checkpoint else None,
        batches=checkpoint.batches if checkpoint else None,
        versions=versions_of(_PACKAGES),
    )


def _facts(path: Path, metadata: Metadata, images: int, tolerance: float) -> dict[str, Any]:
    size = sum(each.stat().st_size for each in path.parent.glob(f"{path.stem}.*"))
    return {
        "file": f"{path.name}, {size / 2**20:.1f} MiB, {metadata.precision}",
        "checkpoint": metadata.checkpoint or "pretrained weights",
        "images": images,
        "tolerance": tolerance,
        "input size": "the image's" if metadata.input_size is None else "×".join(map(str, metadata.input_size)),
        "best threshold": metadata.best_threshold,
        **metadata.versions,
    }


def _write_page(
    folder: Path, comparison: Compared, sides: dict[str, Side], apart: Differences, facts: dict[str, Any]
) -> None:
    write_page(
        "export.html.jinja",
        folder / "export.html",
        numbers={
            "sides": {name: vars(side) for name, side in sides.items()},
            "differences": vars(apart),
            "facts": facts,
            "comparisons": comparison.numbers(),
        },
        title=f"{facts['file'].split(',')[0]} against its checkpoint",
        sides={name: for_json(vars(side)) for name, side in sides.items()},
        differences=f"{apart}.",
        facts=facts,
        **comparison.content(None),
    )


def _check_difference(comparison: Compared, name: str, tolerance: float) -> None:
    for one in comparison.comparisons:
        if math.isnan(one.overall.delta):
            raise UserError(
                "data.val: it has no objects to score, so that the file cannot be checked. Fix: give annotations with "
                "objects, or more --images"
            )
        if abs(one.overall.delta) > tolerance:
            raise UserError(
                f"--format {name}: {summary_of(one)} The difference is more than {tolerance:g}, "
                "so nothing was written. Fix: choose another format, or allow more with --tolerance"
            )
