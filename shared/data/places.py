"""A place for files that outlives a machine: a folder of a bucket, or a folder on another disk."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from shared.config.schema import StoreOptions, is_url
from shared.data.remote import StoreError, delete_folder, fetch_file, files_below, read_url, send_file, write_url
from shared.durable import sync_path, write_file, writing
from shared.errors import UserError

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
        """The same with the content of a file on this machine."""

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
            f"--store: {store!r} is no folder in a bucket. Fix: give s3://bucket/folder, gs://bucket/folder or a path"
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
class BucketPlace:
    """A folder of a bucket. Failed requests are repeated for `options.timeout` seconds."""

    url: str
    options: StoreOptions

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes | None:
        try:
            return read_url(f"{self.url}/{name}", self.options)
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        write_url(f"{self.url}/{name}", data, self.options)

    def send(self, path: Path, name: str) -> None:
        send_file(path, f"{self.url}/{name}", self.options)

    def fetch(self, name: str, path: Path) -> None:
        fetch_file(f"{self.url}/{name}", path, self.options)

    def names(self, folder: str) -> list[str]:
        return files_below(f"{self.url}/{folder}", self.options)

    def delete(self, folder: str) -> None:
        delete_folder(f"{self.url}/{folder}", self.options)


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
            raise StoreError(f"{self.root} cannot be {purpose} ({error.strerror or error})") from error
