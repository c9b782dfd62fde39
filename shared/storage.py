"""Image bytes by file name: from a folder on disk, or made up.

A backend is an object with `read(file_name) -> bytes` and `missing(file_names) -> list`, picklable for loader workers.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from shared import synthetic
from shared.errors import UserError

BACKENDS = ("disk", "fake")


class ImageStorage(Protocol):
    def read(self, file_name: str) -> bytes:
        """The bytes of the image file."""

    def missing(self, file_names: Iterable[str]) -> list[str]:
        """Those of the names that cannot be read."""


@dataclass(frozen=True)
class DiskImages:
    """Images in a folder and its subfolders."""

    folder: Path

    def read(self, file_name: str) -> bytes:
        return (self.folder / file_name).read_bytes()

    def missing(self, file_names: Iterable[str]) -> list[str]:
        # one listing a folder: a look at each of 118,287 files takes minutes on a network disk
        listed: dict[PurePosixPath, set[str]] = {}
        absent = []
        for name in map(PurePosixPath, file_names):
            if name.parent not in listed:
                folder = self.folder / name.parent
                listed[name.parent] = set(os.listdir(folder)) if folder.is_dir() else set()
            if name.name not in listed[name.parent]:
                absent.append(str(name))
        return absent


@dataclass(frozen=True)
class FakeImages:
    """The pictures of `synthetic.fake_split`, drawn when they are read."""

    split: str

    def read(self, file_name: str) -> bytes:
        image, _ = synthetic.draw_sample(synthetic.FAKE_SEEDS[self.split], int(Path(file_name).stem))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    def missing(self, file_names: Iterable[str]) -> list[str]:
        return []


def open_images(backend: str, images: str | None, split: str) -> ImageStorage:
    """The storage of one split.

    Raises:
        UserError: the folder is not there, or the backend is not known.
    """
    if backend == "fake":
        return FakeImages(split)
    if backend != "disk":
        raise UserError(f"data.backend: {backend!r} is not one of {', '.join(BACKENDS)}")
    folder = Path(images)
    if not folder.is_dir():
        raise UserError(f"data.{split}.images: {images} is not a folder")
    return DiskImages(folder.absolute())
