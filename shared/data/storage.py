"""Image bytes by file name: from a folder on disk, a bucket, a web server, or made up.

A backend is an object with `read(file_name) -> bytes`, picklable for loader workers, and says which images are there.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from shared.data import listing, synthetic
from shared.data.file_cache import CachedImages
from shared.data.listing import Look
from shared.data.remote import RemoteImages, StoreOptions, is_url
from shared.errors import UserError

BACKENDS = ("disk", "s3", "gcs", "http", "fake")
BACKEND_ALIASES = {"gcp": "gcs"}

_AT_ONCE = 2**16  # directory entries


class ImageStorage(Protocol):
    """
    Attributes:
        place: what tells this storage from others, where a look at it may be remembered; None where not.
    """

    place: str | None

    def read(self, file_name: str) -> bytes:
        """The bytes of the image file."""

    def look(self, names: np.ndarray) -> Look:
        """Which of the images are there; `names` (N,) bytes."""


@dataclass(frozen=True)
class DiskImages:
    """Images in a folder and its subfolders, and no links that lead out of it."""

    folder: Path

    @property
    def place(self) -> str:
        return str(self.folder)

    def read(self, file_name: str) -> bytes:
        return (self.folder / file_name).read_bytes()

    def look(self, names: np.ndarray) -> Look:
        """One listing a folder: a look at each of 118,287 files takes minutes on a network disk.

        Raises:
            UserError: the folder holds, or its subfolder is, a link out of it.
        """
        names = _plain(names)
        folders = [PurePosixPath(folder) for folder in listing.folders_of(names)]
        counting = sorted({self.folder / path for folder in folders for path in (folder, *folder.parents)})
        times = {str(path): modified(path) for path in counting}
        pieces = [listing.as_names(some, names.itemsize) for folder in folders for some in self._list(folder)]
        listed = np.sort(np.concatenate([np.empty(0, names.dtype), *pieces]))
        look = listing.missing(names, listing.rows_of(names, listed))
        look.folders = times
        return look

    def _list(self, relative: PurePosixPath) -> Iterator[list[bytes]]:
        """The names in a folder, below the images' one."""
        folder, root = self.folder / relative, self.folder.resolve()
        if not folder.is_dir():
            return
        _refuse_link_out(folder, root)
        prefix = b"" if relative == PurePosixPath() else os.fsencode(f"{relative}/")
        with os.scandir(os.fsencode(folder)) as entries:
            while some := list(itertools.islice(entries, _AT_ONCE)):
                for entry in some:
                    if entry.is_symlink():
                        _refuse_link_out(folder / os.fsdecode(entry.name), root)
                yield [prefix + entry.name for entry in some]


def modified(path: Path) -> int | None:
    """The folder's st_mtime_ns, which changes with the names in it; None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _refuse_link_out(path: Path, root: Path) -> None:
    if not (target := path.resolve()).is_relative_to(root):
        raise UserError(f"{path} is a link out of {root}, to {target}; put the file itself there")


def _plain(names: np.ndarray) -> np.ndarray:
    """The names without `//` and `./`, as a folder lists them."""
    odd = np.flatnonzero((np.char.find(names, b"//") >= 0) | (np.char.find(names, b"./") >= 0))
    if len(odd):
        names = names.copy()
        names[odd] = [str(PurePosixPath(name.decode())).encode() for name in names[odd].tolist()]
    return names


@dataclass(frozen=True)
class FakeImages:
    """The pictures of `synthetic.fake_split`, drawn when they are read."""

    split: str
    place = None

    def read(self, file_name: str) -> bytes:
        image, _ = synthetic.draw_sample(synthetic.FAKE_SEEDS[self.split], int(Path(file_name).stem))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    def look(self, names: np.ndarray) -> Look:
        return Look()


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
