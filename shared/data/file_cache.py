"""A folder of copies of remote files, of bounded size, which all processes of a machine share."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shared.data.listing import Look, Sizes
from shared.data.remote import RemoteImages

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
