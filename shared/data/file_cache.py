"""A folder of copies of remote files, of bounded size, which all processes of a machine share."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shared.data.remote import RemoteImages

logger = logging.getLogger(__name__)

_CHECKSUM_BYTES = 4


@dataclass
class CachedImages:
    """Images that are read from `remote` once, and from the folder then.

    A copy is its bytes and their CRC-32, written aside and renamed: half of one never counts, whoever was killed. The
    oldest go first. Where the folder cannot be written, the images come from `remote`, with one warning.

    Args:
        folder: made where it is not there.
        limit: bytes that all copies together may take.
    """

    remote: RemoteImages
    folder: Path
    limit: int

    def __str__(self) -> str:
        return str(self.remote)

    def missing(self, file_names: Iterable[str]) -> list[str]:
        return self.remote.missing(file_names)

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
        if len(data) > self.limit:
            return
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            self._reserve(len(data) + _CHECKSUM_BYTES)
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

    def _reserve(self, size: int) -> None:
        """Makes room for `size` bytes and counts them, before they are there: a process that is killed in between
        leaves too much counted, which the next search for the oldest puts right."""
        with (self.folder / "total").open("a+b") as total:
            fcntl.flock(total, fcntl.LOCK_EX)
            total.seek(0)
            text = total.read()
            taken = int(text) if text.isdigit() else self._remove_oldest(0)
            if taken + size > self.limit:
                taken = self._remove_oldest(size)
            total.truncate(0)
            total.write(str(taken + size).encode())

    def _remove_oldest(self, size: int) -> int:
        """Makes room for `size` bytes, and a tenth of the limit so that not each file searches anew; the bytes left."""
        files = []
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime_ns, path, status.st_size))
        taken = sum(size for _, _, size in files)
        wanted = self.limit - size - (self.limit // 10 if size else 0)
        for _, path, size_of_it in sorted(files):
            if taken <= wanted:
                break
            path.unlink(missing_ok=True)
            taken -= size_of_it
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
