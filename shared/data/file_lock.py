"""Work that one process does and several use, such as a cache of parsed data."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, BinaryIO, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:
        file.close()
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
