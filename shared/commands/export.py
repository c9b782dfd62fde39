"""`export`: a detector as a file for another runtime, with its numbers on the user's data beside the checkpoint's."""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from shared import durable
from shared.commands.data_report import spread
from shared.commands.detection import FileDetector, check_categories, detecting_trial, with_checkpoint
from shared.config.experiment import Experiment
from shared.data.dataset import CocoDetection
from shared.data.images import read_image
from shared.data.open import SplitData, open_split
from shared.environment import versions_of
from shared.errors import UserError, count_of, unwritable_as_error
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import for_json
from shared.export import detect, detect_raw, formats
from shared.export.metadata import TENSORRT, TRANSFORMERS, Metadata, known_thresholds, thresholds_of_report
from shared.export.operations import ExportableRaw, Raw, raw_of
from shared.report.compare import Compared, compared, summary_of
from shared.report.image_errors import box_ious
from shared.report.page import write_page
from shared.training.checkpoints import Checkpoint
from shared.training.downloads import sha256_of
from shared.training.meeting import local_processes
from shared.training.trial import DetectionTrial

_NUMBERS = "export.json"
_MOST_IN_ENGINE = 8  # images of a batch
_TOLERANCE = 0.001  # of mAP, in float32
_PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "openvino")


def export(trial_class: type[DetectionTrial], experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Writes the file, evaluates it and the checkpoint on data.val, and writes what differs.

    Raises:
        UserError: the detector cannot be exported, or the file detects worse or better than the checkpoint.
    """
    if arguments.format != TENSORRT:
        formats.check_format(arguments.format, arguments.precision, arguments.raw)
    output = arguments.output or Path("exports") / arguments.format
    if output.is_dir() and any(output.iterdir()) and not (output / _NUMBERS).is_file():  # not an earlier export
        raise UserError(f"--output: {output} is not empty. Fix: give a new folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file. Fix: give a new folder")
    with local_processes() as processes:
        if processes[0].size > 1:
            raise UserError("export: one process exports. Fix: start it without torchrun")
        experiment, checkpoint = with_checkpoint(trial_class, experiment, arguments, processes[0])
        with detecting_trial(trial_class, experiment, checkpoint, processes) as trial:
            if arguments.format == TENSORRT:
                raise _tells_to_run_trtexec(trial)
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
    exportable = copy.deepcopy(trial.exportable()).cpu().float().eval().requires_grad_(False)
    if arguments.raw:
        exportable = raw_of(exportable)
    formats.check_detector(exportable, arguments.format)
    data = trial.open_val()
    source = "checkpoint" if checkpoint else "pretrained"
    check_categories(trial.categories, data, source)
    evaluated = trial.evaluated_images(len(data.annotations))
    indices = [int(evaluated[position]) for position in spread(len(evaluated), arguments.images)]
    print(f"detecting with the {source} on {count_of(len(indices), 'image')}")
    found, speed = _with_trial(trial, data, indices)
    sides = {source: Side(speed, own_peak_memory(), str(trial.context.device))}
    print(f"writing {formats.FORMATS[arguments.format]}")
    metadata = _metadata(exportable, trial, checkpoint, data, found, arguments.precision)
    calibration = _calibration(experiment, metadata) if arguments.precision == "int8" else ()
    path = formats.write(exportable, arguments.format, folder, metadata, calibration)
    script = Path(shutil.copy((detect_raw if arguments.raw else detect).__file__, folder / "detect.py"))
    print("detecting with the file")
    file = FileDetector(type(trial), experiment, path, (trial.context.distributed, trial.context.device))
    image_ids = [image.image_id for image in found]
    of_file, speed = _with_file(file, data, image_ids)
    sides[arguments.format] = Side(speed, peak_memory_of(script, path, data, indices), file.context.device)
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


def _tells_to_run_trtexec(trial: DetectionTrial) -> UserError:
    """An engine fits one GPU and one version of TensorRT, so that its own program builds it."""
    exportable, option = trial.exportable(), ""
    if isinstance(exportable, ExportableRaw) and exportable.input_size is not None:
        (height, width), option = exportable.input_size, " --raw"
    else:  # a file that takes images of any size gets an engine for those of one size
        first = trial.open_val().annotations[0]
        height, width = first.height, first.width
    least, most = (f"images:{count}x3x{height}x{width}" for count in (1, _MOST_IN_ENGINE))
    return UserError(
        f"--format tensorrt: TensorRT's own program builds engines. Fix: --format onnx{option}, then on the machine "
        f"with the GPU: trtexec --onnx=model.onnx --minShapes={least} --optShapes={least} --maxShapes={most} "
        "--saveEngine=model.engine"
    )


@contextlib.contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A new folder, which takes the place of `output` at the end. An error deletes it."""
    folder = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        with unwritable_as_error(f"--output: {output}", "give another folder"):
            folder.mkdir(parents=True)
            yield folder
            durable.replace_folder(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # there is none once it took the place


def _calibration(experiment: Experiment, metadata: Metadata) -> Iterator[np.ndarray]:
    """Images of data.train, evenly spread, as the file takes them."""
    train = open_split(experiment.data, "train")
    for index in spread(len(train.annotations), formats.CALIBRATION_IMAGES):
        record = train.annotations[index]
        image = np.asarray(read_image(train.images, record.file_name, (record.width, record.height)))
        yield image if metadata.decoding is None else detect_raw.fitted(image, metadata.input_size, metadata.decoding)


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
    ids = [*image_ids[:1], *image_ids]
    return _timed(file.detect_on_host_batch(file.batch_of(data, index_of[image_id])) for image_id in ids)


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
        input_size=exportable.input_size,
        precision=precision,
        best_threshold=thresholds[0],
        thresholds=thresholds[1],
        checkpoint=sha256_of(checkpoint.path / "state_dict.pth") if checkpoint else None,
        batches=checkpoint.batches if checkpoint else None,
        versions=versions_of(_PACKAGES),
        max_iou=trial.max_iou,
        decoding=exportable.decoding if isinstance(exportable, Raw) else None,
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
        "compare.html.jinja",
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


# --- whether the file detects what the checkpoint detects -------------------------------------------


SCORE = 0.05  # detections below it are noise, whose order is chance
_SAME_OBJECT = 0.5  # IoU
_IMAGES_FOR_MEMORY = 4
_PEAK = "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"


@dataclass(frozen=True)
class Side:
    """How one of the two detects.

    Attributes:
        images_per_second: from the image's file to the detections.
        peak_memory_mib: a process that detects needs this much; None if the system does not know it.
    """

    images_per_second: float
    peak_memory_mib: float | None
    device: str


@dataclass(frozen=True)
class Differences:
    """Detections of at least `SCORE`, and their partners: the same label, an IoU of at least 0.5, the best one first.

    Attributes:
        detections: the number that the checkpoint has.
        matched: of them, those with a partner in the file.
        box: the largest difference of a matched box's coordinate, in pixels; 0 without a match.
        score: the same of scores.
        lone_score: the highest score of a detection without a partner, of either; 0 if all have one.
        mask: the mean IoU of the masks of a match; None without masks.
    """

    detections: int
    matched: int
    box: float
    score: float
    lone_score: float
    mask: float | None = None

    def __str__(self) -> str:
        said = (
            f"{self.matched} of {count_of(self.detections, 'detection')} with a score of at least {SCORE} are matched"
        )
        said += f"; the largest differences are {self.box:.2g} pixels and {self.score:.2g} of the score"
        said += "" if self.mask is None else f"; the mean IoU of their masks is {self.mask:.3f}"
        return said + (f"; the highest score without a match is {self.lone_score:.2g}" if self.lone_score else "")


def differences(one: Sequence[Detections], other: Sequence[Detections]) -> Differences:
    """Compares the detections of two detectors on the same images."""
    others = {found.image_id: found for found in other}
    count, box, score, alone, overlaps = 0, 0.0, 0.0, [0.0], []
    matched = 0
    for first in one:
        second = others[first.image_id]
        pairs, lone = _partners(first, second)
        count += len(pairs) + len(lone)
        matched += len(pairs)
        for row, partner in pairs:
            box = max(box, float(np.abs(first.boxes[row] - second.boxes[partner]).max()))
            score = max(score, float(abs(first.scores[row] - second.scores[partner])))
            if first.masks is not None and second.masks is not None:
                overlaps.append(_overlap(first.masks[row], second.masks[partner]))
        alone += [float(first.scores[row]) for row in lone]
        alone += [float(second.scores[row]) for row in _partners(second, first)[1]]
    return Differences(count, matched, box, score, max(alone), float(np.mean(overlaps)) if overlaps else None)


def _overlap(one: dict, other: dict) -> float:
    """The IoU of two masks, 1 for two empty ones."""
    return 1.0 if one == other else float(coco_mask.iou([one], [other], [0])[0, 0])


def _partners(one: Detections, other: Detections) -> tuple[list[tuple[int, int]], list[int]]:
    """The detections of `one` that are compared: those with a partner in `other` and its row, and those without."""
    rows, partners = _above(one, SCORE), _above(other, SCORE / 2)  # a partner may be on the other side of the limit
    boxes, others = one.boxes[rows], other.boxes[partners]
    same = np.abs(boxes[:, None] - others[None]).max(2) < 1  # boxes without area too
    overlaps = np.where(same, 1, box_ious(boxes, others))
    overlaps[one.labels[rows][:, None] != other.labels[partners][None]] = 0
    pairs, lone = [], []
    for row, overlap in zip(rows.tolist(), overlaps, strict=True):
        best = int(overlap.argmax()) if len(overlap) else 0
        if len(overlap) and overlap[best] >= _SAME_OBJECT:
            pairs.append((row, int(partners[best])))
            overlaps[:, best] = 0
        else:
            lone.append(row)
    return pairs, lone


def _above(found: Detections, score: float) -> np.ndarray:
    """Rows of detections of at least that score, the best first."""
    rows = np.argsort(-found.scores, kind="stable")
    return rows[found.scores[rows] >= score]


def own_peak_memory() -> float | None:
    """The peak memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return None if found is None else int(found[1]) / 1024


def peak_memory_of(script: Path, model: Path, data: SplitData, indices: Sequence[int]) -> float | None:
    """The peak memory, in MiB, of `detect.py` with an exported file on some images; None if the system does not know
    it."""
    if own_peak_memory() is None:
        return None
    with tempfile.TemporaryDirectory(prefix="export-") as folder:
        paths = []
        for index in indices[:_IMAGES_FOR_MEMORY]:
            record = data.annotations[index]
            paths.append(f"{folder}/{index}.png")
            read_image(data.images, record.file_name, (record.width, record.height)).save(paths[-1])
        program = f"import re, runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__'); {_PEAK}"
        done = subprocess.run(
            [sys.executable, "-c", program, str(script), str(model), *paths], capture_output=True, text=True
        )
    if done.returncode != 0:
        raise RuntimeError(f"{script} fails with {model}: {done.stderr}")
    return int(done.stdout.splitlines()[-1]) / 1024
