"""Reads the frames of a video file, and writes a video, with OpenCV."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from types import ModuleType

import numpy as np
from PIL import Image

from shared.errors import UserError

SUFFIXES = frozenset((".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv"))
_FRAMES_PER_SECOND = 25.0  # if the file has no rate


def is_video(name: str) -> bool:
    return PurePath(name).suffix.lower() in SUFFIXES


def measure(path: str) -> tuple[int, int, int]:
    """The number of frames, their width and height. Counts the frames: a file's own number is often wrong.

    Raises:
        UserError: OpenCV is not installed, or cannot read the video.
    """
    count, size = 0, (0, 0)
    capture = _open(path)
    while capture.grab():
        if count == 0:
            _, pixels = capture.retrieve()
            size = pixels.shape[1::-1]
        count += 1
    if not count:
        raise UserError(f"{path} cannot be read as a video: OpenCV finds no frame in it")
    return count, *size


class FrameReader:
    """Reads frames in rising order, as a loader worker asks for its share of them."""

    def __init__(self, path: str):
        self.path = path
        self.process, self.following = None, 0

    def read(self, index: int) -> bytes:
        """The frame as the bytes of an image file.

        Raises:
            OSError: the video has no such frame.
        """
        if self.process != os.getpid() or index < self.following:  # a fork must not share its parent's decoder
            self.capture, self.process, self.following = _open(self.path), os.getpid(), 0
        while self.following < index and self.capture.grab():
            self.following += 1
        there, pixels = self.capture.read()
        self.following += 1
        if not there:
            raise OSError(f"{self.path} has no frame {index}")
        buffer = io.BytesIO()
        _image(pixels).save(buffer, format="BMP")
        return buffer.getvalue()

    def __getstate__(self) -> dict:
        return {"path": self.path, "process": None, "following": 0}


def frames(path: str) -> Iterator[Image.Image]:
    capture = _open(path)
    while (read := capture.read())[0]:
        yield _image(read[1])


class VideoWriter:
    """A context that writes an MPEG-4 file with the frame rate of the video `like`. OpenCV drops the last pixel of an
    odd side."""

    def __init__(self, path: Path, like: str):
        self.cv2, self.path, self.writer = _cv2(like), path, None
        rate = _open(like).get(self.cv2.CAP_PROP_FPS)
        self.rate = rate if math.isfinite(rate) and rate > 0 else _FRAMES_PER_SECOND

    def write(self, picture: Image.Image) -> None:
        if self.writer is None:
            codec = self.cv2.VideoWriter_fourcc(*"mp4v")
            self.writer = self.cv2.VideoWriter(str(self.path), codec, self.rate, picture.size)
            if not self.writer.isOpened():
                raise UserError(f"{self.path} cannot be written as a video")
        self.writer.write(np.asarray(picture)[:, :, ::-1])

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.release()


def _open(path: str) -> object:
    capture = _cv2(path).VideoCapture(path)
    if not capture.isOpened():
        raise UserError(f"{path} cannot be read as a video: OpenCV does not know its format, or it is cut off")
    return capture


def _cv2(path: str) -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            f"{path}: videos are read by OpenCV, which is not installed: pip install opencv-python-headless"
        ) from error
    return cv2


def _image(pixels: np.ndarray) -> Image.Image:
    """Of OpenCV's (height, width, 3) BGR."""
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1]))
