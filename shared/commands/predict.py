"""`predict`: a picture with the detections for each image, a video for each video, and one results.json."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from shared.commands.detection import (
    FileDetector,
    ScoreLimits,
    detect_all,
    detector_of,
    make_folder,
    score_limits,
    tiling_of,
    with_checkpoint,
    write_results,
)
from shared.commands.predict_inputs import (
    GivenImages,
    Picture,
    VideoWriter,
    drawn_as,
    find_files,
    look_at,
    video_frames,
)
from shared.config.experiment import Experiment
from shared.config.schema import DataConfig
from shared.data.annotations import CocoAnnotations
from shared.data.images import allow_pixels, read_image
from shared.data.open import SplitData
from shared.data.storage import DiskImages
from shared.data.tiles import Tiling, open_image
from shared.errors import UserError, count_of
from shared.evaluation import drawing
from shared.evaluation.detections import Detections, to_coco_results
from shared.training.meeting import local_processes
from shared.training.processes import on_chief
from shared.training.training_metrics import Progress
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)


def predict(trial_class: type[DetectionTrial], experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Detects on images and videos, and draws what has at least `--min-score`."""
    experiment, checkpoint = with_checkpoint(trial_class, experiment, arguments)
    # as the inputs whose header cannot be read
    experiment = replace(experiment, data=replace(experiment.data, on_bad_image="skip"))
    if arguments.model is None:  # what it refuses, before the model is built
        score_limits(arguments.min_score, [], checkpoint and checkpoint.path)
    options, tiling = experiment.data.store_options, tiling_of(arguments)
    allow_pixels(experiment.data.max_image_pixels)
    with local_processes() as processes, contextlib.ExitStack() as stack:
        distributed = processes[0]
        if distributed.rank == 0:  # not in data.cache_dir: a training reads its images again, a prediction does not
            copies = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="predict-")))

        def open_inputs() -> tuple[list[Picture], GivenImages]:
            _check_is_empty(arguments.output)
            files = find_files(arguments.images, options, arguments.format)
            images = GivenImages(files, options, copies)
            pictures = look_at(files, images, in_tiles=tiling is not None)
            make_folder(arguments.output, "--output")
            return pictures, images

        pictures, images = on_chief(distributed, open_inputs)
        with detector_of(trial_class, experiment, checkpoint, arguments.model, processes) as trial:
            data = pictures_as_data(pictures, images, arguments.images, trial)
            exported = trial if isinstance(trial, FileDetector) else None
            limits = score_limits(arguments.min_score, trial.categories, checkpoint and checkpoint.path, exported)
            prediction = _Prediction(trial, data, pictures, arguments.output, arguments.format, limits, tiling)
            try:
                prediction.run()
            except KeyboardInterrupt:
                prediction.write_interrupted()
                sys.exit(130)


def _check_is_empty(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise UserError(
            f"--output: {output} is not empty, and the new pictures would be mixed with its files. Fix: give a new "
            "folder, or empty this one"
        )


def pictures_as_data(
    pictures: list[Picture], images: GivenImages, given: Sequence[str], trial: DetectionTrial | FileDetector
) -> SplitData:
    """The pictures as data without annotations. The image ids are those in data.val if it has all the file names, else
    the positions."""
    known = _val_image_ids(trial.data)
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


def _val_image_ids(data: DataConfig) -> dict[str, int]:
    if not data.reads_files or not data.has_val_annotations:
        return {}
    try:
        annotations = CocoAnnotations.open(data.located(data.val.annotations), data.cache_dir, data.store_options)
    except UserError:  # data in another format has no COCO ids
        return {}
    return {annotations.file_name(i): int(image_id) for i, image_id in enumerate(annotations.image_ids)}


class _Prediction:
    """The detections of this process's share of the pictures."""

    def __init__(
        self,
        trial: DetectionTrial | FileDetector,
        data: SplitData,
        pictures: list[Picture],
        output: Path,
        picture_format: str,
        limits: ScoreLimits,
        tiling: Tiling | None,
    ):
        self.trial, self.data, self.tiling = trial, data, tiling
        self.output, self.format, self.limits = output, picture_format, limits
        self.pictures = dict(zip(data.annotations.image_ids.tolist(), pictures, strict=True))
        self.results: dict[int, list[dict]] = {}
        self.drawn = 0
        self.frames: dict[int, Detections] = {}
        self.seconds = dict.fromkeys(("loading", "detecting", "drawing"), 0.0)

    def run(self) -> None:
        distributed = self.trial.context.distributed
        progress = Progress(0, -(-len(self.pictures) // distributed.size), "image")
        with contextlib.closing(progress):
            for batch, detected in detect_all(self.trial, self.data, self.seconds, True, self.tiling):
                with self._drawing():
                    for detections in detected:
                        self._take(detections)
                progress.update(len(detected) + len(batch.skipped))
        gathered = distributed.gather((self.results, self.frames, self.drawn))
        if self.trial.rank == 0:
            if not any(results for results, *_ in gathered):
                raise UserError("--images: none of the images can be read, see the lines above. Fix: give others")
            with self._drawing():
                self._write_videos({image_id: found for _, frames, _ in gathered for image_id, found in frames.items()})
            written = write_results(self.output, [results for results, *_ in gathered])
            self._print_summary(written, sum(drawn for *_, drawn in gathered))

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds["drawing"] += time.perf_counter() - started

    def _take(self, detections: Detections) -> None:
        picture = self.pictures[detections.image_id]
        if detections.image_id in self.results:  # it replaces an image that cannot be read
            return
        self.drawn += int(self.limits.allow(detections).sum())
        about = {"file_name": picture.name} | ({} if picture.frame is None else {"frame": picture.frame})
        results = to_coco_results(detections, self.data.annotations.category_ids)
        if picture.frame is not None:  # drawn at the end, in order
            self.frames[detections.image_id] = detections
        else:
            image, shown = self._to_draw(picture, detections)
            with self._writing(picture) as path:
                drawing.save_picture_of(path, image, shown, self.data.annotations.categories, self.limits.scores)
        self.results[detections.image_id] = [{**result, **about} for result in results]

    def _to_draw(self, picture: Picture, detections: Detections) -> tuple[Image.Image, Detections]:
        """The image and what is drawn on it. An image that is read by windows is drawn reduced, without masks."""
        if self.tiling is None:
            return read_image(self.data.images, picture.key), detections
        image = open_image(self.data.images, picture.key, (picture.width, picture.height))
        if isinstance(image, Image.Image):
            return image, detections
        factor = -(-max(image.size) // drawing.LARGEST_SIDE)
        points = detections.keypoints
        if points is not None:
            points = np.dstack([(points[..., :2] + 0.5) / factor - 0.5, points[..., 2]])
        small = replace(detections, boxes=detections.boxes / factor, masks=None, keypoints=points)
        return image.reduced(factor), small

    def _write_videos(self, found: dict[int, Detections]) -> None:
        """A video with the same frames for each video. A frame without detections stays unchanged."""
        of_video: dict[tuple[str, str], list[int]] = {}
        for image_id, picture in self.pictures.items():
            if picture.frame is not None:
                of_video.setdefault((picture.name, picture.location), []).append(image_id)
        categories = self.data.annotations.categories
        for (_, location), image_ids in of_video.items():
            with self._writing(self.pictures[image_ids[0]]) as path, VideoWriter(path, location) as writer:
                for image_id, frame in zip(image_ids, video_frames(location), strict=False):
                    if (detections := found.get(image_id)) is not None:
                        objects = drawing.objects_of_detections(detections, categories, self.limits.scores)
                        frame = drawing.draw(frame, objects)
                    writer.write(frame)

    @contextlib.contextmanager
    def _writing(self, picture: Picture) -> Iterator[Path]:
        """The path of a picture's file, which is deleted unless it is written completely."""
        path = self.output / drawn_as(picture.name, self.format)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
            raise

    def _print_summary(self, by_image: dict[int, list[dict]], drawn: int) -> None:
        if skipped := len(self.pictures) - len(by_image):
            logger.warning("skipped: %d of %d images, see the lines above", skipped, len(self.pictures))
        print(
            f"{count_of(sum(map(len, by_image.values())), 'detection')} on {count_of(len(by_image), 'image')} in "
            f"{self.output / 'results.json'}; the {drawn} {self.limits.text} are drawn in the pictures beside it"
        )
        each = 1000 * sum(self.seconds.values()) / max(len(self.results), 1)
        print(
            "seconds: " + ", ".join(f"{stage} {spent:.2f}" for stage, spent in self.seconds.items()),
            f"{each:.1f} ms per image" + (" in each process" if self.trial.slots > 1 else ""),
            sep="; ",
        )

    def write_interrupted(self) -> None:
        """After Ctrl-C: writes what is done to results.json, if this is the only process."""
        done = f"stopped: {len(self.results)} of {count_of(len(self.pictures), 'image')} are done"
        if self.trial.slots > 1:
            print(f"{done} by process {self.trial.rank}, drawn in {self.output}; no results.json", file=sys.stderr)
            return
        write_results(self.output, [self.results])
        of_videos = "; videos are not drawn" if self.frames else ""
        print(f"{done}, their detections in {self.output / 'results.json'}{of_videos}", file=sys.stderr)
