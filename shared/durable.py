"""Files that survive a crash and a power cut, and locks: all that a run writes and must not lose goes through here.

A file system may keep a rename and lose the content behind it. So content is written to the disk before the rename,
and the rename before anything old is deleted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, BinaryIO, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


def write_file(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Replaces a file's content as a whole.

    After a crash or a power cut at any moment, the file holds the old content or the new one. Other processes never
    read a part of it.

    Args:
        content: text is written as UTF-8.
        mode: who may read and write the file, as for `os.open`.

    Raises:
        OSError: the disk is full, or the folder cannot be written. The old content stays.
    """
    with writing(path, mode) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def writing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """The same for content that is written in pieces; an error in the block leaves the old content."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        with open(new, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            _sync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def delete_unfinished(folder: Path) -> None:
    """Deletes what a process that was killed in `writing` left in a folder where nobody else writes now."""
    for path in folder.glob(".*.new"):
        path.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file, which is made where it does not exist.

    A line that a full disk or a crash cut off earlier is deleted first.

    Raises:
        OSError: the disk is full, or the file cannot be written. No part of the line stays, if the disk allows it.
    """
    is_new = not path.exists()
    with path.open("a+b") as file:
        end = repair_last_line(file.fileno())
        try:
            file.write(line.encode() + b"\n")
            file.flush()
            _sync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise
    if is_new:
        sync_path(path.parent)


def repair_last_line(descriptor: int) -> int:
    """Cuts an open file off after its last whole line; returns its length in bytes."""
    length = end = os.fstat(descriptor).st_size
    while end:
        start = max(end - 2**16, 0)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < length:
        os.ftruncate(descriptor, end)
    return end


def sync_tree(folder: Path) -> None:
    """Writes all files and folders below `folder`, and itself, to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync_path(path)


def sync_path(path: Path) -> None:
    """Writes a file to the disk, or the names in a folder: files made, renamed and deleted in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, place: Path) -> None:
    """Replaces the folder `place`, with all below it, by the folder `new`.

    The old folder is deleted once the new one is on the disk. One that cannot be deleted (on NFS while somebody reads
    from it) stays under a name of its own, for `restore_folder`. Between the two renames `place` does not exist.
    """
    sync_tree(new)
    leftovers = _leftovers(place)
    old = place.with_name(f".{place.name}.{max(leftovers, default=0) + 1}.old")
    if place.exists():
        place.rename(old)
    new.rename(place)
    sync_path(place.parent)
    for leftover in (*leftovers.values(), old):
        shutil.rmtree(leftover, ignore_errors=True)


def restore_folder(place: Path) -> None:
    """Puts back what `replace_folder` had moved aside when it was interrupted, and deletes what it left."""
    leftovers = _leftovers(place)
    if leftovers and not place.exists():
        leftovers.pop(max(leftovers)).rename(place)
        sync_path(place.parent)
    for leftover in leftovers.values():
        shutil.rmtree(leftover, ignore_errors=True)


def _leftovers(place: Path) -> dict[int, Path]:
    """The folders that `place` was before, by their numbers: the greatest is the newest. Clocks do not count."""
    found = {0: place.with_name(f".{place.name}.old")}  # the name that versions before 0.2 gave
    for path in place.parent.glob(f".{glob.escape(place.name)}.*.old"):
        if (number := path.name.split(".")[-2]).isdecimal():
            found[int(number)] = path
    return {number: path for number, path in found.items() if path.exists()}


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems cannot: FUSE's and network disks', for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


# --- work that several processes share --------------------------------------------------------------


def once(locks: Sequence[Path], find: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What `find` returns. If it finds nothing, one process calls `make`, and the others wait and find its result.

    The lock is released when its process dies. If no lock file can be written or locked, each process calls `make`.

    Args:
        locks: files to lock. The first that can be locked is used; it is created with its folder, and stays.
        find: returns None if there is nothing yet. It is called again under the lock.
        make: leaves its result where `find` looks.
    """
    if (found := find()) is not None:
        return found
    with contextlib.ExitStack() as stack:
        for path in locks:
            with contextlib.suppress(OSError):
                stack.enter_context(locked(path, log_waiting=True))
                break
        return made if (made := find()) is not None else make()


@contextlib.contextmanager
def locked(path: Path, log_waiting: bool = False) -> Iterator[BinaryIO]:
    """Locks a file, which is created with its folder, for this process alone, and gives it opened.

    Raises:
        OSError: it cannot be written, or its file system has no locks.
    """
    # flock itself: on a network disk without locks, versions of the library filelock wait for ever
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if log_waiting:
                logger.info("waiting for the process that holds %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield file
        finally:
            file.flush()
            fcntl.flock(file, fcntl.LOCK_UN)  # a process that was forked meanwhile has the file open too


def try_lock(path: Path) -> IO | None:
    """Locks a file until it is closed or this process ends; None if another process has the lock.

    A forked process does not share the lock: a run's loader workers may outlive it by some seconds.

    Raises:
        OSError: the file cannot be written, or its file system has no locks.
    """
    file = path.open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, (BlockingIOError, PermissionError)):
            return None
        raise
    return file


def is_locked(path: Path) -> bool:
    """Whether another process has a file locked with `try_lock`. Creates no file."""
    try:
        with path.open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (BlockingIOError, PermissionError):
        return True
    return False


def user_cache() -> Path | None:
    """The user's cache directory; None if there is neither that nor a home."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if cache.startswith("~") else Path(cache)  # without a home directory `~` stays as it is
