"""Work that several processes of a machine need the result of, done by one of them."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


def once(locks: Sequence[Path], find: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What `find` finds, else what `make` makes, which other processes then find: ranks of a run, other runs, workers.

    One process makes at a time. The lock goes with its process, whatever that dies of. Where none can be had (the
    place cannot be written, or its file system has no locks), each process makes its own.

    Args:
        locks: files to lock, which are made with their folders, and stay: the first that can be locked is.
        find: gives None where there is nothing yet; called again under the lock.
        make: leaves its result where `find` looks.
    """
    if (found := find()) is not None:
        return found
    with contextlib.ExitStack() as stack:
        for path in locks:
            with contextlib.suppress(OSError):
                stack.enter_context(_locked(path))
                break
        return made if (made := find()) is not None else make()


def user_cache() -> Path | None:
    """The user's cache directory; None where there is neither that nor a home."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if cache.startswith("~") else Path(cache)  # without a home directory `~` stays as it is


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # flock itself: where a network disk has no locks, versions of the library filelock wait for ever
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for the process that holds %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
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
