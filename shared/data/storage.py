"""Image bytes by file name: from a folder on disk, a bucket, a web server, or made up.

A backend is an object with `read(file_name) -> bytes` and `missing(file_names) -> list`, picklable for loader workers.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from shared.data import synthetic
from shared.data.file_cache import CachedImages
from shared.data.remote import RemoteImages, StoreOptions, is_url
from shared.errors import UserError

BACKENDS = ("disk", "s3", "gcs", "http", "fake")
BACKEND_ALIASES = {"gcp": "gcs"}


class ImageStorage(Protocol):
    def read(self, file_name: str) -> bytes:
        """The bytes of the image file."""

    def missing(self, file_names: Iterable[str]) -> list[str]:
        """Those of the names that are not there."""


@dataclass(frozen=True)
class DiskImages:
    """Images in a folder and its subfolders, and no links that lead out of it."""

    folder: Path

    def read(self, file_name: str) -> bytes:
        return (self.folder / file_name).read_bytes()

    def missing(self, file_names: Iterable[str]) -> list[str]:
        # one listing a folder: a look at each of 118,287 files takes minutes on a network disk
        listed: dict[PurePosixPath, set[str]] = {}
        absent = []
        for name in map(PurePosixPath, file_names):
            if name.parent not in listed:
                listed[name.parent] = self._list(self.folder / name.parent)
            if name.name not in listed[name.parent]:
                absent.append(str(name))
        return absent

    def _list(self, folder: Path) -> set[str]:
        """The names in a folder.

        Raises:
            UserError: it is, or holds, a link out of the images' folder.
        """
        if not folder.is_dir():
            return set()
        root = self.folder.resolve()
        with os.scandir(folder) as entries:
            found = {entry.name: entry.is_symlink() for entry in entries}
        for path in (folder, *(folder / name for name, is_link in found.items() if is_link)):
            if not (target := path.resolve()).is_relative_to(root):
                raise UserError(f"{path} is a link out of {self.folder}, to {target}; put the file itself there")
        return found.keys()


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


def open_images(
    backend: str,
    images: str | None,
    split: str,
    options: StoreOptions = StoreOptions(),  # noqa: B008, it is frozen
    cache_dir: str | None = None,
    cache_bytes: int = 0,
) -> ImageStorage:
    """The storage of one split.

    Args:
        images: a folder, or its URL.
        cache_dir: where copies of remote images are kept, `cache_bytes` of them; none where it is None.

    Raises:
        UserError: the folder is not there, or the backend is not known.
    """
    if backend == "fake":
        return FakeImages(split)
    if is_url(images):
        remote = RemoteImages(images, options)
        return CachedImages(remote, Path(cache_dir).absolute() / "images", cache_bytes) if cache_dir else remote
    folder = Path(images)
    if not folder.is_dir():
        raise UserError(f"data.{split}.images: {images} is not a folder")
    return DiskImages(folder.absolute())


def refuse_names_outside(file_names: Iterable[str], where: object) -> None:
    """Raises UserError where a name leads out of the images' folder, or can be no file's."""
    for name in file_names:
        if "\0" in name or not name or is_url(name) or name.startswith(("/", "\\")) or ".." in name.split("/"):
            raise UserError(
                f"{where}: the image file name {name!r} leads out of the images' folder, or is none; names "
                "are relative to that folder"
            )
