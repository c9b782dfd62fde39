"""Where a search is kept: Optuna's storage, and the files by which a machine knows its part of it."""

from __future__ import annotations

import contextlib
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalRedisBackend

from shared.durable import repair_last_line, sync_folder, write_file
from shared.errors import UserError


def open_storage(storage: str) -> BaseStorage | str:
    """The storage as Optuna accepts it.

    Args:
        storage: an SQL URL, `redis://…`, or the path of a journal file, also on NFS.
    """
    if storage.startswith(("redis://", "rediss://", "unix://")):
        return JournalStorage(JournalRedisBackend(storage))
    path = journal_file(storage)
    if path is None:
        return storage
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(path), lock_obj=_RepairingLock(path))
    sync_folder(path.parent)
    return JournalStorage(backend)


def journal_file(storage: str) -> Path | None:
    """The file of a storage; None for a URL."""
    return None if "://" in storage else Path(storage).expanduser().absolute()


class _RepairingLock(JournalFileSymlinkLock):
    """The lock for writing to the journal. It first deletes a line that a full disk or a crash cut off.

    Otherwise the next line would be appended to that part, and no search could read the journal again.
    """

    def __init__(self, journal: Path):
        super().__init__(str(journal))
        self._journal = journal

    def acquire(self) -> bool:
        super().acquire()
        try:
            with self._journal.open("r+b", buffering=0) as file:
                repair_last_line(file.fileno())
        except BaseException:
            self.release()
            raise
        return True


@contextlib.contextmanager
def storage_errors(output: Path) -> Iterator[None]:
    """Raises UserError if the disk or the storage of a search fails."""
    try:
        yield
    except (OSError, StorageInternalError) as error:
        raise UserError(
            f"{output}: {error}. The search stopped, and no trial is lost. Fix: remove the cause (free some space if "
            "the disk is full), then continue with the same command"
        ) from error


def lock_file(output: Path) -> Path:
    """The file that a search locks while it runs on this machine."""
    # not the owner's file: its replacement is a new file, which nobody has locked
    return output / f".lock-{socket.gethostname()}"


def owner_of(output: Path, create: bool = False) -> str:
    """The name of this machine's part of the search, the same after a restart. Empty if it has none."""
    file = output / f".owner-{socket.gethostname()}"
    owner = file.read_text() if file.exists() else ""
    if create and not owner:
        owner = uuid.uuid4().hex
        write_file(file, owner)
    return owner
