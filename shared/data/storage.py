"""Image bytes by file name: from a folder on disk, a bucket, a web server, or made up.

A backend is an object with `read(file_name) -> bytes`, picklable for loader workers, and says which images are there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import itertools
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from shared.config.schema import StoreOptions, is_url
from shared.data import remote, synthetic
from shared.data.remote import Look, RemoteImages, Sizes
from shared.errors import UserError

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
        folders = [PurePosixPath(folder) for folder in remote.folders_of(names)]
        counting = sorted({self.folder / path for folder in folders for path in (folder, *folder.parents)})
        times = {str(path): modified(path) for path in counting}
        pieces = [remote.as_names(some, names.itemsize) for folder in folders for some in self._list(folder)]
        listed = np.sort(np.concatenate([np.empty(0, names.dtype), *pieces]))
        look = remote.missing(names, remote.rows_of(names, listed))
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
    images: str,
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
        UserError: the folder is not there.
    """
    if is_url(images):
        remote = RemoteImages(images, options)
        return CachedImages(remote, Path(cache_dir).absolute() / "images", cache_bytes) if cache_dir else remote
    folder = Path(images)
    if not folder.is_dir():
        raise UserError(f"data.{split}.images: {images} is not a folder")
    return DiskImages(folder.absolute())


logger = logging.getLogger(__name__)

_CHECKSUM_BYTES = 4
_VERSION_BYTES = 16
_COUNT_IS_GOOD_FOR = 24 * 3600  # seconds that a full folder is not counted anew


@dataclass
class CachedImages:
    """Images that are read from `remote` once, and from the folder then.

    A copy is its bytes and their CRC-32, written aside and renamed: half of one never counts, whoever was killed. When
    the folder is full it stays as it is: an epoch reads each image once, in random order, so that the one just read is
    the last that will be wanted again. Where the folder cannot be written, the images come from `remote`, with one
    warning.

    A copy from a web server keeps the version of its file. The server is asked for it once per run; a copy of another
    version is read again. A bucket's copy counts while its length is the one in the bucket's list.

    Args:
        folder: made where it is not there.
        limit: bytes that all copies together may take.
        since: in seconds since 1970. A web server is not asked about copies that were written or asked about later;
            None for any.
    """

    remote: RemoteImages
    folder: Path
    limit: int
    since: float | None = field(default_factory=time.time)

    def __str__(self) -> str:
        return str(self.remote)

    @property
    def place(self) -> str | None:
        return self.remote.place

    def look(self, names: np.ndarray) -> Look:
        return self.remote.look(names)

    def take_sizes(self, sizes: Sizes) -> None:
        self.remote.take_sizes(sizes)

    def read(self, file_name: str) -> bytes:
        """The bytes of the image file; the errors are those of `RemoteImages.read`."""
        location = self.remote.location(file_name)
        name = hashlib.sha256(f"{self.remote.options.endpoint_url} {location}".encode()).hexdigest()
        copy = self.folder / name[:2] / name
        expected = self.remote.size_of(file_name)
        asks = self.since is not None and self.remote.is_web_server
        data, version = _checked(copy, _VERSION_BYTES if asks else 0)
        is_whole = data is not None and expected in (None, len(data))
        if is_whole and (not asks or self._is_recent(copy)):
            return data
        current = self.remote.version(file_name) if asks else b""
        if is_whole and version == current:
            with contextlib.suppress(OSError):  # somebody else's folder: asked again at the next read
                os.utime(copy)
            return data
        data = self.remote.read(file_name)
        self._keep(copy, data, current)
        return data

    def _is_recent(self, copy: Path) -> bool:
        try:
            return self.since <= copy.stat().st_mtime <= time.time()  # a clock may have been set back
        except OSError:
            return False

    def _keep(self, copy: Path, data: bytes, version: bytes) -> None:
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            before = copy.stat().st_size if copy.exists() else 0
            if self._reserve(len(data) + len(version) + _CHECKSUM_BYTES - before):
                _write(copy, data, version)
            elif before:  # of another version, or damaged
                copy.unlink(missing_ok=True)
                self._reserve(-before)
        except OSError as error:
            if not getattr(self, "_warned", False):
                self._warned = True
                logger.warning(
                    "data.cache_dir: %s cannot be written (%s); images are read from %s",
                    self.folder,
                    error,
                    self.remote,
                )

    def _reserve(self, size: int) -> bool:
        """Whether there is room for `size` bytes, which are counted before they are there. A process that is killed in
        between leaves too much counted, and so does a user who deletes copies: a full folder is counted anew."""
        with (self.folder / "total").open("a+b") as total:
            fcntl.flock(total, fcntl.LOCK_EX)
            total.seek(0)
            text = total.read()
            taken = int(text) if text.isdigit() else None
            stale = time.time() - os.fstat(total.fileno()).st_mtime > _COUNT_IS_GOOD_FOR
            if taken is None or (taken + size > self.limit and stale):
                taken = self._count()
            elif taken + size > self.limit:
                return False
            fits = taken + size <= self.limit
            total.truncate(0)
            total.write(str(taken + size if fits else taken).encode())
            return fits

    def _count(self) -> int:
        """Bytes of all copies."""
        taken = 0
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            with contextlib.suppress(FileNotFoundError):
                taken += path.stat().st_size
        return taken


def _checked(copy: Path, version_bytes: int) -> tuple[bytes | None, bytes]:
    """What was copied, and its version; None if there is no whole copy with so long a version."""
    try:
        whole = copy.read_bytes()
    except OSError:
        return None, b""
    content, checksum = whole[:-_CHECKSUM_BYTES], whole[-_CHECKSUM_BYTES:]
    if checksum != _checksum(content, version_bytes) or len(content) <= version_bytes:
        return None, b""
    end = len(content) - version_bytes
    return content[:end], content[end:]


def _checksum(content: bytes, version_bytes: int) -> bytes:
    # it starts from the version's length, so that a copy without one is not read as one with
    return zlib.crc32(content, version_bytes).to_bytes(_CHECKSUM_BYTES, "big")


def _write(copy: Path, data: bytes, version: bytes) -> None:
    descriptor, aside = tempfile.mkstemp(dir=copy.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data + version + _checksum(data + version, len(version)))
        os.replace(aside, copy)
    except OSError:
        os.unlink(aside)
        raise
