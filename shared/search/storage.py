"""Where Optuna keeps a search: an SQL database, Redis or a journal file."""

from __future__ import annotations

import os
from pathlib import Path

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalRedisBackend

from shared.durable import repair_last_line, sync_folder


def open_storage(storage: str) -> BaseStorage | str:
    """What Optuna takes: an SQL URL, a journal in Redis or in a file."""
    if storage.startswith(("redis://", "rediss://", "unix://")):
        return JournalStorage(JournalRedisBackend(storage))
    if "://" in storage:
        return storage
    path = journal_file(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(path), lock_obj=_RepairingLock(path))
    sync_folder(path.parent)
    return JournalStorage(backend)


def journal_file(storage: str) -> Path | None:
    """The file of a storage that is one."""
    return None if "://" in storage else Path(storage).expanduser().absolute()


class _RepairingLock(JournalFileSymlinkLock):
    """The lock that each writer of the journal takes. Its holder first deletes the part of a line that a full disk or
    a crash left: the next line would be appended to that part, and no search could read the journal again."""

    def __init__(self, journal: Path):
        super().__init__(str(journal))
        self._journal = journal

    def acquire(self) -> bool:
        super().acquire()
        try:
            descriptor = os.open(self._journal, os.O_RDWR)
            try:
                repair_last_line(descriptor)
            finally:
                os.close(descriptor)
        except BaseException:
            self.release()
            raise
        return True
