"""Image bytes by file name: from a folder on disk, or from a store with copies on disk.

A storage is an object with `read(file_name) -> bytes`. Loader workers receive it, so it can be pickled. A place can be
written to as well: it outlives the machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import os
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

import numpy as np

from shared.config.schema import StoreOptions, is_url
from shared.data.cache import Look, find, folders_of, mark_as_cache, modified
from shared.data.remote import BucketPlace, RemoteImages, StoreError
from shared.durable import locked, sync_path, write_file, writing
from shared.errors import UserError

logger = logging.getLogger(__name__)

_AT_ONCE = 2**16  # directory entries
_CHECKSUM_BYTES = 4
_VERSION_BYTES = 16
_COUNT_IS_GOOD_FOR = 24 * 3600  # seconds until a full folder is counted again


class ImageStorage(Protocol):
    def read(self, file_name: str) -> bytes:
        """The bytes of the image file."""


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Opens a file on disk. Raises OSError if it is a pipe or a device, which may have no end."""
    return open(path, "rb", opener=_open_plain_file)


def _open_plain_file(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path}: it is not a regular file")
    return descriptor


@dataclass(frozen=True)
class DiskImages:
    """Images in a folder and its subfolders, without links that lead out of it, except into a Hugging Face cache."""

    folder: Path

    @property
    def place(self) -> str:
        return str(self.folder)

    def read(self, file_name: str) -> bytes:
        with open_file(self.folder / file_name) as file:
            return file.read()

    def look(self, names: np.ndarray) -> Look:
        """Lists each folder once: a `stat` of each of 118,287 files takes minutes on a network disk.

        Raises:
            UserError: a folder or a file is a link out of `folder`.
        """
        names = _plain(names)
        folders = [PurePosixPath(folder) for folder in folders_of(names)]
        with_parents = sorted({self.folder / path for folder in folders for path in (folder, *folder.parents)})
        times = {str(path): modified(path) for path in with_parents}
        look = find(names, (page for folder in folders for page in self._list(folder)))
        return dataclasses.replace(look, folders=times, sizes=None)

    def _list(self, relative: PurePosixPath) -> Iterator[list[tuple[bytes, int]]]:
        """The names in a subfolder, relative to `folder`. Their sizes are not read."""
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
                yield [(prefix + entry.name, 0) for entry in some]


def _refuse_link_out(path: Path, root: Path) -> None:
    target = path.resolve()
    # a Hugging Face cache has links in <repository>/snapshots/<revision>/ to files in <repository>/blobs/
    repositories = [parent.parent for parent in (root, *root.parents) if parent.name == "snapshots"]
    if not any(target.is_relative_to(folder) for folder in (root, *(r / "blobs" for r in repositories))):
        raise UserError(f"{path} is a link out of {root}, to {target}. Fix: put the file itself there")


def _plain(names: np.ndarray) -> np.ndarray:
    """The names without `//` and `./`, as a folder lists them."""
    odd = np.flatnonzero((np.char.find(names, b"//") >= 0) | (np.char.find(names, b"./") >= 0))
    if len(odd):
        names = names.copy()
        names[odd] = [str(PurePosixPath(name.decode())).encode() for name in names[odd].tolist()]
    return names


@dataclass
class CachedImages:
    """Images that are read from `remote` once, and from a folder on disk afterwards.

    A copy is the image's bytes, its version and a CRC-32. It is written under another name and renamed, so that half a
    copy never counts. A full folder keeps what it has: an epoch reads each image once in random order, so no copy is
    less useful than another. If the folder cannot be written, the images come from `remote`, with one warning.

    A copy from a web server counts if the server gives the same version, asked for once per run. A bucket's copy counts
    if its length is the one in the bucket's list.

    Args:
        folder: is created.
        limit: bytes of all copies together.
        since: seconds since 1970. Copies that were written or asked about later need no question to a web server;
            with None no copy needs one.
    """

    remote: RemoteImages
    folder: Path
    limit: int
    since: float | None = field(default_factory=time.time)
    _warned: bool = field(default=False, repr=False)

    def __str__(self) -> str:
        return str(self.remote)

    def read(self, file_name: str) -> bytes:
        """The bytes of the image file. The errors are those of `RemoteImages.read`."""
        location = self.remote.location(file_name)
        name = hashlib.sha256(f"{self.remote.options.endpoint_url} {location}".encode()).hexdigest()
        copy = self.folder / name[:2] / name
        asks = self.since is not None and self.remote.is_web_server
        data, version = _read_copy(copy, _VERSION_BYTES if asks else 0)
        is_whole = data is not None and self.remote.size_of(file_name) in (None, len(data))
        if is_whole and (not asks or self._is_recent(copy)):
            return data
        current = self.remote.version(file_name) if asks else b""
        if is_whole and version == current:
            with contextlib.suppress(OSError):  # another user's folder: the next read asks again
                os.utime(copy)
            return data
        data = self.remote.read(file_name)
        try:
            self._keep(copy, data, current)
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "data.cache_dir: %s cannot be written (%s); images are read from %s", self.folder, error, self
                )
        return data

    def _is_recent(self, copy: Path) -> bool:
        try:
            return self.since <= copy.stat().st_mtime <= time.time()  # a clock may have been set back
        except OSError:
            return False

    def _keep(self, copy: Path, data: bytes, version: bytes) -> None:
        if not copy.parent.exists():
            mark_as_cache(self.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
        before = copy.stat().st_size if copy.exists() else 0
        if self._reserve(len(data) + len(version) + _CHECKSUM_BYTES - before):
            _write_copy(copy, data, version)
        elif before:  # of another version, or damaged
            copy.unlink(missing_ok=True)
            self._reserve(-before)

    def _reserve(self, size: int) -> bool:
        """Whether there is room for `size` bytes, which are counted before they are written. The count is too high
        after a process was killed in between, or a user deleted copies. So a full folder is counted again."""
        with locked(self.folder / "total") as total:
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


def _read_copy(copy: Path, version_bytes: int) -> tuple[bytes | None, bytes]:
    """The image and its version; None if there is no whole copy with a version of that length."""
    try:
        whole = copy.read_bytes()
    except OSError:
        return None, b""
    content, checksum = whole[:-_CHECKSUM_BYTES], whole[-_CHECKSUM_BYTES:]
    if checksum != _checksum(content, version_bytes) or len(content) <= version_bytes:
        return None, b""
    end = len(content) - version_bytes
    return content[:end], content[end:]


def _write_copy(copy: Path, data: bytes, version: bytes) -> None:
    descriptor, new = tempfile.mkstemp(dir=copy.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data + version + _checksum(data + version, len(version)))
        os.replace(new, copy)
    except OSError:
        os.unlink(new)
        raise


def _checksum(content: bytes, version_bytes: int) -> bytes:
    # it starts from the version's length, so that a copy without a version is not read as one with
    return zlib.crc32(content, version_bytes).to_bytes(_CHECKSUM_BYTES, "big")


# --- a place that outlives a machine ----------------------------------------------------------------


_BUCKETS = ("s3", "gs", "gcs")


class Place(Protocol):
    """Files by their names below the place, with `/` between folders.

    Every method raises StoreError if the place does not answer, or refuses.
    """

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if it does not exist."""

    def write(self, name: str, data: bytes) -> None:
        """Replaces a file as a whole. Readers get the old content or the new one."""

    def send(self, path: Path, name: str) -> None:
        """The same with the content of a file on this machine, which is not read into memory as a whole."""

    def fetch(self, name: str, path: Path) -> None:
        """Copies a file to this machine.

        Raises:
            FileNotFoundError: it does not exist.
        """

    def names(self, folder: str) -> list[str]:
        """The files in a folder and its subfolders, relative to it."""

    def delete(self, folder: str) -> None:
        """Deletes a folder with all below it. It may be absent."""


def open_place(store: str, options: StoreOptions) -> Place:
    """The place that `--store` names. Opens no connection.

    Args:
        store: s3://bucket/folder, gs://bucket/folder, or a path.
        options: of the data; credentials are always used.

    Raises:
        UserError: nothing can be written there.
    """
    if not is_url(store):
        return FolderPlace(Path(store).expanduser().absolute())
    scheme, _, rest = store.partition("://")
    bucket, _, folder = rest.strip("/").partition("/")
    if scheme not in _BUCKETS or not bucket or not folder:
        raise UserError(
            f"--store: {store!r} is not a folder in a bucket. Fix: give s3://bucket/folder, gs://bucket/folder "
            "or a path"
        )
    return BucketPlace(store.rstrip("/"), dataclasses.replace(options, anonymous=False))


def fetch_folder(place: Place, folder: str, new: Path) -> None:
    """Copies a folder of a place to this machine. `new` is made. A file that is deleted meanwhile is omitted.

    Raises:
        UserError: a name leads out of the folder.
    """
    new.mkdir(parents=True)
    for name in place.names(folder):
        if ".." in PurePosixPath(name).parts or name.startswith("/"):
            raise UserError(f"{place}/{folder} holds a file outside of it: {name!r}. Fix: delete that file")
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            place.fetch(f"{folder}/{name}", new / name)


@dataclass(frozen=True)
class FolderPlace:
    """A folder on a disk that several machines can reach, or that outlives this one."""

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    def read(self, name: str) -> bytes | None:
        with self._named("read"):
            try:
                return (self.root / name).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        with self._named("written"):
            write_file(self._made(name), data)

    def send(self, path: Path, name: str) -> None:
        with self._named("written"), path.open("rb") as source, writing(self._made(name)) as target:
            shutil.copyfileobj(source, target)

    def fetch(self, name: str, path: Path) -> None:
        if not (self.root / name).is_file():
            raise FileNotFoundError(self.root / name)
        with self._named("read"):
            shutil.copyfile(self.root / name, path)

    def names(self, folder: str) -> list[str]:
        place = self.root / folder
        with self._named("read"):
            found = [Path(parent, name) for parent, _, names in os.walk(place) for name in names]
        return sorted(path.relative_to(place).as_posix() for path in found)

    def delete(self, folder: str) -> None:
        with self._named("deleted"), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.root / folder)

    def _made(self, name: str) -> Path:
        """The path of a file whose folders exist, also after a power cut."""
        path = self.root / name
        missing = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in reversed(missing):
            sync_path(folder.parent)
        return path

    @contextlib.contextmanager
    def _named(self, purpose: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self.root} cannot be {purpose} ({error.strerror or error}). Fix: check it") from error
