"""evaluate · predict: what a checkpoint, or pretrained weights, detect."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from determined.core import DistributedContext

from shared import durable
from shared.commands import videos
from shared.commands.predict_inputs import GivenImages, Picture, drawn_as, find_files, look_at
from shared.config.experiment import parse_data
from shared.config.file import fixed_hyperparameters, load_config, make_paths_absolute
from shared.config.schema import DataConfig
from shared.data.annotations import CocoAnnotations
from shared.data.images import read_image
from shared.data.loading import Batch
from shared.data.open import SplitData, open_split
from shared.data.storage import DiskImages
from shared.errors import UserError, check_outputs
from shared.evaluation import drawing
from shared.evaluation.detections import Detections, from_coco_results, to_coco_results
from shared.evaluation.drawing import draw, objects_of_detections
from shared.evaluation.evaluator import CocoEvaluator, for_json, iou_types_of, metrics_table
from shared.redaction import filled_in
from shared.report.about import About, software
from shared.report.analysis import ThresholdCurve, best_of_boxes
from shared.report.report import summary_of
from shared.training.checkpoint_folder import find_checkpoint
from shared.training.checkpoints import Checkpoint, load_weights, read_checkpoint
from shared.training.context import trial_context
from shared.training.processes import local_processes, on_chief
from shared.training.training_metrics import Progress
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)


def evaluate(trial_class: type[DetectionTrial], arguments: argparse.Namespace) -> None:
    """The metrics of a checkpoint, of the pretrained weights, or of a results.json, on data.val."""
    if arguments.results is not None:
        _evaluate_results(trial_class, arguments)
        return
    config, checkpoint = _config_to_detect_with(trial_class, arguments)
    with local_processes() as processes, _detecting_trial(trial_class, config, checkpoint, processes) as trial:
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
            raise UserError("--report: the detector's library evaluates this data by itself, and not by COCO's rules")
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
            _say_metrics(metrics, trial.iou_types, arguments.output)
            if arguments.output:
                _write_results(arguments.output, gathered)
            if arguments.report:
                facts = {
                    "config": Path(arguments.config).absolute(),
                    "weights": checkpoint.path if checkpoint else "pretrained, as the config says",
                    "validation data": f"{data.annotations.path or 'fake'}, {len(data.annotations)} images",
                    "device": trial.context.device,
                    **software(Path(sys.argv[0]).parent),
                }
                found = evaluator.found_by_id()
                _report(arguments, data, found.detections(), trial.iou_types, facts, found.images.tolist())
            elif isinstance(evaluator, CocoEvaluator):
                _say_threshold(best_of_boxes(evaluator))


def _evaluate_results(trial_class: type[DetectionTrial], arguments: argparse.Namespace) -> None:
    """Without a model: boxes, and masks and keypoints where every result has them and the data too."""
    if arguments.checkpoint:
        raise UserError("--results: what is in the file is scored, and no model; leave --checkpoint out")
    if int(os.environ.get("RANK", 0)) > 0:  # one process does it
        return
    data_config = parse_data(load_config(arguments.config, arguments.overrides), trial_class.data_class)
    # the images themselves are not looked at
    images = None if arguments.report else DiskImages(Path())
    data = open_split(dataclasses.replace(data_config, check_images=False), "val", images=images)
    detections = from_coco_results(arguments.results, data.annotations)
    _make_output_folders(arguments, data)
    evaluator = CocoEvaluator(data.annotations, iou_types_of(detections, data.annotations))
    evaluator.update(detections)
    _say_metrics(evaluator.compute(), evaluator.iou_types, arguments.output)
    if arguments.report:
        facts = {"detections": arguments.results.absolute(), "validation data": data.annotations.path}
        _report(arguments, data, detections, evaluator.iou_types, facts)
    else:
        _say_threshold(best_of_boxes(evaluator))


def _say_threshold(curve: ThresholdCurve) -> None:
    if curve.best is not None:
        print(
            f"\nF1 is greatest, {curve.best_f1:.3f}, with detections of a score of at least {curve.best_threshold:.3f}"
        )


def _report(
    arguments: argparse.Namespace,
    data: SplitData,
    detections: list[Detections],
    iou_types: tuple[str, ...],
    facts: dict[str, Any],
    image_ids: list[int] | None = None,
) -> None:
    from shared.report.report import report  # matplotlib's figures take half a second to import

    about = About(title=f"{Path(arguments.config).stem} on {Path(data.annotations.path or 'fake').name}", facts=facts)
    analyses = report(
        data.annotations,
        detections,
        arguments.report / "report.html",
        images=data.images,
        iou_types=iou_types,
        image_ids=image_ids,
        min_score=None if arguments.min_score == "best" else arguments.min_score,
        about=about,
    )
    print(f"\n{summary_of(analyses)}\nthe report: {arguments.report / 'report.html'}")


def _say_metrics(metrics: dict[str, float], iou_types: tuple[str, ...], output: Path | None) -> None:
    print(metrics_table(metrics, iou_types))
    if output:
        _write_text(output / "metrics.json", json.dumps(for_json(metrics), indent=1))


def predict(trial_class: type[DetectionTrial], arguments: argparse.Namespace) -> None:
    """Detections on images and videos: a picture or a video for each, and one results.json."""
    config, checkpoint = _config_to_detect_with(trial_class, arguments)
    if arguments.min_score == "best":
        arguments.min_score = _best_threshold(checkpoint)
    data_config = parse_data(config, trial_class.data_class)
    with local_processes() as processes, contextlib.ExitStack() as stack:
        distributed = processes[0]
        if distributed.rank == 0:  # not in data.cache_dir: a training reads its images again, a prediction does not
            copies = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="predict-")))

        def look() -> tuple[list[Picture], GivenImages]:
            _refuse_filled(arguments.output)
            files = find_files(arguments.images, data_config.store_options, arguments.format)
            images = GivenImages(files, data_config.store_options, copies)
            pictures = look_at(files, images)
            _make_folder(arguments.output, "--output")
            return pictures, images

        pictures, images = on_chief(distributed, look)
        with _detecting_trial(trial_class, config, checkpoint, processes) as trial:
            prediction = _Prediction(trial, arguments, pictures, images)
            try:
                prediction.run()
            except KeyboardInterrupt:
                prediction.end_early()
                sys.exit(130)


def _best_threshold(checkpoint: Checkpoint | None) -> float:
    """That of the report of the run that the checkpoint is of.

    Raises:
        UserError: there is none, or nothing was right in it.
    """
    written = checkpoint and checkpoint.path.parent.parent / "report.json"
    if written is None or not written.is_file():
        raise UserError(
            f"--min-score best: {checkpoint.path if checkpoint else 'what is not trained here'} is of no run with a "
            "report; `evaluate` says which score is best: give that number"
        )
    if (best := json.loads(written.read_text())["best_threshold"]) is None:
        raise UserError(f"--min-score best: no detection is right in {written}; give a number")
    return best


class _Prediction:
    """What is detected, and drawn, of the pictures of this process's share."""

    def __init__(
        self, trial: DetectionTrial, arguments: argparse.Namespace, pictures: list[Picture], images: GivenImages
    ):
        self.trial, self.output, self.suffix = trial, arguments.output, arguments.format
        self.min_score = arguments.min_score
        self.data = pictures_as_data(pictures, images, arguments.images, trial)
        self.pictures = dict(zip(self.data.annotations.image_ids.tolist(), pictures, strict=True))
        self.results: dict[int, list[dict]] = {}
        self.frames: dict[int, Detections] = {}
        self.seconds = dict.fromkeys(("loading", "detecting", "drawing"), 0.0)

    def run(self) -> None:
        distributed = self.trial.context.distributed
        self.trial.bad_images.skip = True  # as those of which not even the header can be read
        self.trial.evaluated_images = range  # a validation may leave some out
        progress = Progress(0, -(-len(self.pictures) // distributed.size), "image")
        with contextlib.closing(progress):
            for _, detected in _detect_all(self.trial, self.data, self.seconds):
                started = time.perf_counter()
                for detections in detected:
                    self._take(detections)
                self.seconds["drawing"] += time.perf_counter() - started
                progress.update(len(detected))
        gathered = distributed.gather((self.results, self.frames))
        if self.trial.rank == 0:
            started = time.perf_counter()
            self._write_videos({image_id: found for _, frames in gathered for image_id, found in frames.items()})
            self.seconds["drawing"] += time.perf_counter() - started
            self._write_results([results for results, _ in gathered])

    def _take(self, detections: Detections) -> None:
        picture = self.pictures[detections.image_id]
        if detections.image_id in self.results:  # it stands in for one that cannot be read
            return
        results = to_coco_results(detections, self.data.annotations.category_ids)
        about = {"file_name": picture.name} | ({} if picture.frame is None else {"frame": picture.frame})
        if picture.frame is not None:  # drawn at the end, in their order
            self.frames[detections.image_id] = detections
        else:
            path = self.output / drawn_as(picture.name, self.suffix)
            image = read_image(self.data.images, picture.key)
            with _writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                drawing.save_picture_of(path, image, detections, self.data.annotations.categories, self.min_score)
        self.results[detections.image_id] = [{**result, **about} for result in results]

    def _write_videos(self, found: dict[int, Detections]) -> None:
        """A video for each, of the same frames; one on which nothing could be detected is in it as it is."""
        of_video: dict[tuple[str, str], list[int]] = {}
        for image_id, picture in self.pictures.items():
            if picture.frame is not None:
                of_video.setdefault((picture.name, picture.location), []).append(image_id)
        for (name, location), image_ids in of_video.items():
            path = self.output / drawn_as(name, self.suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            with _writing(path), videos.VideoWriter(path, location) as writer:
                for image_id, frame in zip(image_ids, videos.frames(location), strict=False):
                    if (detections := found.get(image_id)) is not None:
                        categories = self.data.annotations.categories
                        objects = objects_of_detections(detections, categories, self.min_score)
                        frame = draw(frame, objects)
                    writer.write(frame)

    def _write_results(self, gathered: list[dict[int, list[dict]]]) -> None:
        images, count, drawn = _write_results(self.output, gathered, self.min_score)
        if left_out := len(self.pictures) - images:
            logger.warning("left out: %d of %d images, see the lines above", left_out, len(self.pictures))
        print(
            f"{count} detections on {images} images in {self.output / 'results.json'}; the {drawn} of at least "
            f"{self.min_score:g} are drawn in the pictures beside it"
        )
        each = 1000 * sum(self.seconds.values()) / max(len(self.results), 1)
        print(
            "seconds: " + ", ".join(f"{stage} {spent:.2f}" for stage, spent in self.seconds.items()),
            f"{each:.1f} ms an image" + (" in each process" if self.trial.slots > 1 else ""),
            sep="; ",
        )

    def end_early(self) -> None:
        """After Ctrl-C: results.json has what is done, where this process has done all of it."""
        done = f"stopped: {len(self.results)} of {len(self.pictures)} images are done"
        if self.trial.slots > 1:
            print(f"{done} by process {self.trial.rank}, drawn in {self.output}; no results.json", file=sys.stderr)
            return
        _write_results(self.output, [self.results])
        videos_too = "" if not self.frames else "; of videos there are no pictures"
        print(f"{done}, their detections in {self.output / 'results.json'}{videos_too}", file=sys.stderr)


def _write_text(path: Path, text: str) -> None:
    try:
        durable.write_file(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A new file that is whole, or not there."""
    try:
        yield
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
        raise


def _refuse_filled(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise UserError(
            f"--output: {output} is not empty, and the new pictures would be mixed with what is in it; give a new "
            f"folder, or empty this one"
        )


def _make_output_folders(arguments: argparse.Namespace, data: SplitData) -> None:
    """Of `evaluate`.

    Raises:
        UserError: they cannot be made, or an input would be replaced in them.
    """
    inputs = [arguments.config, arguments.results, data.annotations.path]
    numbers = ["metrics.json"] if arguments.results else ["metrics.json", "results.json"]
    for option, folder, names in (
        ("--output", arguments.output, numbers),
        ("--report", arguments.report, ["report.html", "report.json"]),
    ):
        if folder is not None:
            check_outputs(option, [folder / name for name in names], inputs)
            _make_folder(folder, option)


def _make_folder(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be made a folder: {error.strerror}") from error


def _config_to_detect_with(
    trial_class: type[DetectionTrial], arguments: argparse.Namespace
) -> tuple[dict[str, Any], Checkpoint | None]:
    """The config; its hyperparameters are the checkpoint's, with --set over them."""
    config = load_config(arguments.config, arguments.overrides)
    config["hyperparameters"] = own = config.get("hyperparameters") or {}
    make_paths_absolute(config, trial_class.path_hyperparameters)
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
            **filled_in(checkpoint.hparams, own),
            **_own_imports(checkpoint, own),
            **trial_class.hyperparameters_of_checkpoint(checkpoint.path, own),
            **{name: own[name] for name in overridden},
        }
    else:
        config["hyperparameters"] = fixed_hyperparameters(config)
    slots = int(os.environ.get("WORLD_SIZE", 1))
    batch_size = config["hyperparameters"].get("global_batch_size")
    if type(batch_size) is int:
        config["hyperparameters"]["global_batch_size"] = -(-batch_size // slots) * slots  # any number of processes
    make_paths_absolute(config, trial_class.path_hyperparameters)
    return config, checkpoint


def _own_imports(checkpoint: Checkpoint, own: dict[str, Any]) -> dict[str, list[str]]:
    """The modules of the user's own config: a checkpoint imports nothing.

    Raises:
        UserError: the checkpoint names one that the user's config does not.
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
def _detecting_trial(
    trial_class: type[DetectionTrial],
    config: dict,
    checkpoint: Checkpoint | None,
    processes: tuple[DistributedContext, torch.device],
) -> Iterator[DetectionTrial]:
    with trial_context(config, *processes) as context:
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


def pictures_as_data(
    pictures: list[Picture], images: GivenImages, given: Sequence[str], trial: DetectionTrial
) -> SplitData:
    """The pictures as a data set without annotations: ids from data.val where the file names are there, else the
    position."""
    known = _known_image_ids(trial.data)
    in_val = all(picture.key in known for picture in pictures)
    rows = [
        {"id": known[p.key] if in_val else i, "file_name": p.key, "height": p.height, "width": p.width}
        for i, p in enumerate(pictures)
    ]
    annotations = CocoAnnotations.from_dict({"images": rows, "annotations": [], "categories": trial.categories})
    annotations.path = "--images"
    folder = Path(given[0]).expanduser().resolve()
    in_folder = all(p.frame is None and p.location == str(folder / p.name) for p in pictures)
    return SplitData(annotations, DiskImages(folder) if in_folder else images)


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
    _write_text(folder / "results.json", json.dumps(results))
    return len(by_image), len(results), sum(result["score"] >= min_score for result in results)
