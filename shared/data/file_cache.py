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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.data.listing import Look, Sizes
from shared.data.remote import RemoteImages

logger = logging.getLogger(__name__)

_CHECKSUM_BYTES = 4
_COUNT_IS_GOOD_FOR = 24 * 3600  # seconds that a full folder is not counted anew


@dataclass
class CachedImages:
    """Images that are read from `remote` once, and from the folder then.

    A copy is its bytes and their CRC-32, written aside and renamed: half of one never counts, whoever was killed. When
    the folder is full it stays as it is: an epoch reads each image once, in random order, so that the one just read is
    the last that will be wanted again. Where the folder cannot be written, the images come from `remote`, with one
    warning.

    Args:
        folder: made where it is not there.
        limit: bytes that all copies together may take.
    """

    remote: RemoteImages
    folder: Path
    limit: int

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
        data = _checked(copy)
        if data is None or expected not in (None, len(data)):
            data = self.remote.read(file_name)
            self._keep(copy, data)
        return data

    def _keep(self, copy: Path, data: bytes) -> None:
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            if self._reserve(len(data) + _CHECKSUM_BYTES):
                _write(copy, data)
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


def _checked(copy: Path) -> bytes | None:
    try:
        whole = copy.read_bytes()
    except OSError:
        return None
    data, checksum = whole[:-_CHECKSUM_BYTES], whole[-_CHECKSUM_BYTES:]
    return data if zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "big") == checksum and data else None


def _write(copy: Path, data: bytes) -> None:
    descriptor, aside = tempfile.mkstemp(dir=copy.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data + zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "big"))
        os.replace(aside, copy)
    except OSError:
        os.unlink(aside)
        raise
