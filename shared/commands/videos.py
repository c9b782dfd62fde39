"""Videos: frames decoded once by OpenCV, tracks by the package trackers, and the video that is drawn."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePath
from types import ModuleType

import numpy as np
from PIL import Image

from shared.commands.detection import FileDetector, detect_all
from shared.data.annotations import CocoAnnotations
from shared.data.open import SplitData
from shared.data.tiles import Tiling
from shared.errors import UserError
from shared.evaluation.detections import Detections
from shared.training.trial import DetectionTrial

_SUFFIXES = frozenset((".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv"))
_FRAMES_PER_SECOND = 25.0  # if the file has no rate
_FRAMES_AT_ONCE = 8  # or more, in whole batches: decoded while the detector works on those before them


def is_video(name: str) -> bool:
    return PurePath(name).suffix.lower() in _SUFFIXES


class Video:
    """An opened video file, to be closed.

    Attributes:
        size: (width, height).
        rate: frames per second.
        about: the number of frames, as the file says, which may be wrong.

    Raises:
        UserError: OpenCV is not installed, or finds no frame.
    """

    def __init__(self, path: str):
        cv2 = _cv2(path)
        self._capture = cv2.VideoCapture(path)
        if not self._capture.isOpened():
            raise UserError(
                f"{path} cannot be read as a video: OpenCV does not know its format, or it is cut off. Fix: convert it "
                "to MP4"
            )
        self._first = self._read()
        if self._first is None:
            raise UserError(f"{path} cannot be read as a video: OpenCV finds no frame in it. Fix: convert it to MP4")
        self.size = self._first.size
        rate, count = (self._capture.get(name) for name in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
        self.rate = rate if math.isfinite(rate) and rate > 0 else _FRAMES_PER_SECOND
        self.about = int(count) if math.isfinite(count) and count > 0 else 1

    def batches(self, size: int) -> Iterator[list[Image.Image]]:
        """All frames in order, `size` at once; a thread decodes ahead."""
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(self._some, size)
            while frames := ahead.result():
                ahead = thread.submit(self._some, size)
                yield frames

    def _some(self, count: int) -> list[Image.Image]:
        frames = []
        while len(frames) < count and (frame := self._first or self._read()) is not None:
            self._first = None
            frames.append(frame)
        return frames

    def _read(self) -> Image.Image | None:
        there, pixels = self._capture.read()
        return Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1])) if there else None

    def close(self) -> None:
        self._capture.release()


class VideoWriter:
    """Writes an MPEG-4 file, which is to be closed. OpenCV drops the last pixel of an odd side."""

    def __init__(self, path: Path, rate: float):
        self.cv2, self.path, self.rate, self.writer = _cv2(str(path)), path, rate, None

    def write(self, picture: Image.Image) -> None:
        if self.writer is None:
            codec = self.cv2.VideoWriter_fourcc(*"mp4v")
            self.writer = self.cv2.VideoWriter(str(self.path), codec, self.rate, picture.size)
            if not self.writer.isOpened():
                raise UserError(f"{self.path} cannot be written as a video. Fix: give another folder for --output")
        self.writer.write(np.asarray(picture)[:, :, ::-1])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()


def _cv2(path: str) -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"{path}: reading videos needs OpenCV. Fix: pip install opencv-python-headless") from error
    return cv2


# --- detection --------------------------------------------------------------------------------------


def detect_frames(
    trial: DetectionTrial | FileDetector, video: Video, tiling: Tiling | None, seconds: dict[str, float]
) -> Iterator[tuple[Image.Image, Detections]]:
    """Each frame with its detections, in order. The image id is the frame's number, from 0."""
    per_batch, number = trial.evaluation_batch_size, 0
    for frames in video.batches(-(-_FRAMES_AT_ONCE // per_batch) * per_batch):
        annotations = CocoAnnotations.of_sizes((frame.size for frame in frames), trial.categories)
        data = SplitData(annotations, _Frames(frames))
        detected = detect_all(trial, data, seconds, True, tiling, in_process=True)
        found = {each.image_id: each for _, of_batch in detected for each in of_batch}
        for i, frame in enumerate(frames):
            yield frame, replace(found[i], image_id=number)
            number += 1


class _Frames:
    """Frames as the bytes of image files."""

    def __init__(self, frames: Sequence[Image.Image]):
        self._frames = frames

    def __str__(self) -> str:
        return "the video"

    def read(self, file_name: str) -> bytes:
        buffer = io.BytesIO()
        self._frames[int(file_name)].save(buffer, format="BMP")
        return buffer.getvalue()


# --- tracking ---------------------------------------------------------------------------------------


def tracker(rate: float, least_score: float) -> Callable[[Detections], Detections]:
    """A function that gives the detections of one frame after the other the ids of their tracks, by ByteTrack.

    Args:
        rate: frames per second.
        least_score: a detection of this score begins a track; one with a lower score may continue it.

    Raises:
        UserError: the package trackers is not installed.
    """
    try:
        import supervision
        from trackers import ByteTrackTracker
    except ImportError as error:
        raise UserError(
            f"--track: it needs the package trackers ({error}). Fix: pip install trackers opencv-python-headless"
        ) from error
    by_bytetrack = ByteTrackTracker(
        frame_rate=rate, track_activation_threshold=least_score, high_conf_det_threshold=least_score
    )

    def track(detections: Detections) -> Detections:
        given = supervision.Detections(
            xyxy=detections.boxes, confidence=detections.scores, data={"row": np.arange(len(detections))}
        )
        tracked = by_bytetrack.update(given)
        ids = np.full(len(detections), -1)
        with contextlib.suppress(KeyError):  # without detections it has no rows
            ids[tracked.data["row"]] = tracked.tracker_id
        return replace(detections, track_ids=ids)

    return track
