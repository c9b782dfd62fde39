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
    detect_all,
    detector_of,
    score_limits,
    tiling_of,
    with_checkpoint,
    write_results,
)
from shared.commands.predict_inputs import GivenImages, Picture, drawn_as, find_files, look_at
from shared.commands.videos import Video, VideoWriter, detect_frames, tracker
from shared.config.experiment import Experiment
from shared.config.schema import DataConfig
from shared.data.annotations import CocoAnnotations
from shared.data.images import allow_pixels, read_image
from shared.data.open import SplitData
from shared.data.storage import DiskImages
from shared.data.tiles import open_image
from shared.errors import UserError, count_of, unwritable_as_error
from shared.evaluation import drawing
from shared.evaluation.detections import Detections, to_coco_results
from shared.training.meeting import local_processes
from shared.training.processes import on_chief
from shared.training.training_metrics import Progress
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)


def predict(trial_class: type[DetectionTrial], experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Detects on images and videos, and draws what has at least `--min-score`."""
    # as the inputs whose header cannot be read
    experiment = replace(experiment, data=replace(experiment.data, on_bad_image="skip"))
    options, tiling = experiment.data.store_options, tiling_of(arguments)
    allow_pixels(experiment.data.max_image_pixels)
    with local_processes() as processes, contextlib.ExitStack() as stack:
        distributed = processes[0]
        experiment, checkpoint = with_checkpoint(trial_class, experiment, arguments, distributed)
        if distributed.rank == 0:  # not in data.cache_dir: training reads its images again, prediction does not
            copies = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="predict-")))
        checkpoint_path = checkpoint and checkpoint.path

        def open_inputs() -> tuple[list[Picture], GivenImages]:
            if arguments.model is None:  # what it refuses, before the model is built
                score_limits(arguments.min_score, [], checkpoint_path)
            _check_is_empty(arguments.output)
            images = GivenImages(find_files(arguments.images, options, arguments.format), options, copies)
            pictures = look_at(images, in_tiles=tiling is not None)
            if arguments.track and all(picture.frames is None for picture in pictures):
                raise UserError("--track: it follows objects in videos, and --images has none. Fix: remove --track")
            with unwritable_as_error(f"--output: {arguments.output}", "give another folder"):
                arguments.output.mkdir(parents=True, exist_ok=True)
            return pictures, images

        pictures, images = on_chief(distributed, open_inputs)
        with detector_of(trial_class, experiment, checkpoint, arguments.model, processes) as trial:
            limits = on_chief(  # the report is there
                distributed, lambda: score_limits(arguments.min_score, trial.categories, checkpoint_path, trial)
            )
            prediction = _Prediction(trial, pictures, images, arguments, limits)
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
    """The images as data without annotations. The image ids are those in data.val if it has all the file names, else
    the positions."""
    known = _val_image_ids(trial.data)
    in_val = all(picture.name in known for picture in pictures)
    rows = [
        {"id": known[p.name] if in_val else i, "file_name": p.name, "height": p.height, "width": p.width}
        for i, p in enumerate(pictures)
    ]
    annotations = CocoAnnotations.from_dict({"images": rows, "annotations": [], "categories": trial.categories})
    annotations.path = "--images"
    folder = Path(given[0]).expanduser().resolve()
    in_folder = all(p.location == str(folder / p.name) for p in pictures)
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
    """The detections of this process's share of the images and videos.

    Attributes:
        results: COCO's results by the input's position and, of a video, the frame's number.
    """

    def __init__(
        self,
        trial: DetectionTrial | FileDetector,
        pictures: list[Picture],
        images: GivenImages,
        arguments: argparse.Namespace,
        limits: tuple[np.ndarray, str],
    ):
        self.trial, self.pictures = trial, pictures
        self.output, self.format, self.tracks = arguments.output, arguments.format, arguments.track
        self.tiling, (self.min_scores, self.drawn) = tiling_of(arguments), limits
        self.category_ids = [category["id"] for category in trial.categories]
        still = [position for position, picture in enumerate(pictures) if picture.frames is None]
        self.data, self.positions = None, {}
        if still:
            self.data = pictures_as_data([pictures[i] for i in still], images, arguments.images, trial)
            self.positions = dict(zip(self.data.annotations.image_ids.tolist(), still, strict=True))
        self.results: dict[tuple[int, int], list[dict]] = {}
        self.seconds = dict.fromkeys(("loading", "detecting", "drawing"), 0.0)

    def run(self) -> None:
        distributed = self.trial.context.distributed
        videos = [position for position, picture in enumerate(self.pictures) if picture.frames is not None]
        own = videos[distributed.rank :: distributed.size]
        frames = sum(self.pictures[position].frames for position in own)
        count = -(-len(self.positions) // distributed.size) + frames
        with contextlib.closing(Progress(0, count, "image")) as progress:
            if self.data is not None:
                for batch, detected in detect_all(self.trial, self.data, self.seconds, True, self.tiling):
                    with self._drawing():
                        for detections in detected:
                            self._take(detections)
                    progress.update(len(detected) + len(batch.skipped))
            for position in own:
                self._take_video(position, progress)
        gathered = distributed.gather(self.results)
        if self.trial.rank == 0:
            if not any(gathered):
                raise UserError("--images: none of the images can be read, see the lines above. Fix: give others")
            read = {position for results in gathered for position, _ in results}
            if skipped := len(self.pictures) - len(read):
                logger.warning("skipped: %d of %d images, see the lines above", skipped, len(self.pictures))
            self._print_summary(self._write(gathered))

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds["drawing"] += time.perf_counter() - started

    def _take(self, detections: Detections) -> None:
        position = self.positions[detections.image_id]
        picture = self.pictures[position]
        image, shown = self._to_draw(picture, detections)
        with self._writing(picture) as path:
            drawing.save_picture_of(path, image, shown, self.trial.categories, self.min_scores)
        results = to_coco_results(detections, self.category_ids)
        self.results[position, 0] = [{**result, "file_name": picture.name} for result in results]

    def _to_draw(self, picture: Picture, detections: Detections) -> tuple[Image.Image, Detections]:
        """The image and what is drawn on it. An image that is read by windows is drawn reduced, without masks."""
        if self.tiling is None:
            return read_image(self.data.images, picture.name), detections
        image = open_image(self.data.images, picture.name, (picture.width, picture.height))
        if isinstance(image, Image.Image):
            return image, detections
        factor = -(-max(image.size) // drawing.LARGEST_SIDE)
        points = detections.keypoints
        if points is not None:
            points = np.dstack([(points[..., :2] + 0.5) / factor - 0.5, points[..., 2]])
        small = replace(detections, boxes=detections.boxes / factor, masks=None, keypoints=points)
        return image.reduced(factor), small

    def _take_video(self, position: int, progress: Progress) -> None:
        """Detects in all frames of a video, and draws a video with as many."""
        picture = self.pictures[position]
        with (
            contextlib.closing(Video(picture.location)) as video,
            self._writing(picture) as path,
            contextlib.closing(VideoWriter(path, video.rate)) as writer,
        ):
            track = tracker(video.rate, float(self.min_scores.min())) if self.tracks else None
            for frame, detections in detect_frames(self.trial, video, self.tiling, self.seconds):
                with self._drawing():
                    found = detections if track is None else track(detections)
                    objects = drawing.objects_of_detections(found, self.trial.categories, self.min_scores)
                    writer.write(drawing.draw(frame, objects) if len(objects.boxes) else frame)
                about = {"file_name": picture.name, "frame": detections.image_id}
                results = to_coco_results(found, self.category_ids)
                self.results[position, detections.image_id] = [{**result, **about} for result in results]
                progress.update()

    def _write(self, gathered: list[dict[tuple[int, int], list[dict]]]) -> dict[int, list[dict]]:
        """Writes results.json. The image ids are those of the data, or count images and frames together."""
        results = dict(sorted((key, found) for of_process in gathered for key, found in of_process.items()))
        ids = {(position, 0): image_id for image_id, position in self.positions.items()}
        if len(self.positions) < len(self.pictures):  # the frames of a video are known only now
            read = {position for position, _ in results}
            unread = [(position, 0) for position in self.positions.values() if position not in read]
            ids = {key: number for number, key in enumerate(sorted([*results, *unread]))}
        by_id = {ids[key]: [{**row, "image_id": ids[key]} for row in rows] for key, rows in results.items()}
        write_results(self.output, by_id)
        return by_id

    @contextlib.contextmanager
    def _writing(self, picture: Picture) -> Iterator[Path]:
        """The path of a picture's file, which is deleted unless it is written completely."""
        path = self.output / drawn_as(picture.name, self.format)
        try:
            with unwritable_as_error(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                yield path
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _print_summary(self, by_image: dict[int, list[dict]]) -> None:
        limits = dict(zip(self.category_ids, self.min_scores.astype(np.float32), strict=True))
        rows = [row for found in by_image.values() for row in found]
        drawn = sum(np.float32(row["score"]) >= limits[row["category_id"]] for row in rows)
        print(
            f"{count_of(len(rows), 'detection')} on {count_of(len(by_image), 'image')} in "
            f"{self.output / 'results.json'}; the {drawn} {self.drawn} are drawn in the pictures beside it"
        )
        each = 1000 * sum(self.seconds.values()) / max(len(self.results), 1)
        print(
            "seconds: " + ", ".join(f"{stage} {spent:.2f}" for stage, spent in self.seconds.items()),
            f"{each:.1f} ms per image" + (" in each process" if self.trial.slots > 1 else ""),
            sep="; ",
        )

    def write_interrupted(self) -> None:
        """After Ctrl-C: writes what is done to results.json, if this is the only process."""
        count = len(self.positions) + sum(picture.frames or 0 for picture in self.pictures)
        done = f"stopped: {len(self.results)} of {count_of(count, 'image')} are done"
        if self.trial.slots > 1:
            print(f"{done} by process {self.trial.rank}, drawn in {self.output}; no results.json", file=sys.stderr)
            return
        self._write([self.results])
        of_videos = "; a video that is not done is not drawn" if len(self.positions) < len(self.pictures) else ""
        print(f"{done}, their detections in {self.output / 'results.json'}{of_videos}", file=sys.stderr)
