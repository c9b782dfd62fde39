"""`--store`: a copy of a run's folder that outlives the machine, and from which another machine continues the run.

The place holds the folder's files (metrics.jsonl, config.yaml, report.html, …), besides:

    owner.json                          the start that may write; the latest start replaces it
    checkpoints/index.json              the folders of `best` and `last`
    checkpoints/batch-400-1a2b3c4d/     a checkpoint

A checkpoint gets a folder of its own, manifest last. Then one write of the index makes it `last`, or `best` and `last`.
Then the folders that the index no longer names are deleted. So the index always names complete checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import threading
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.data.remote import StoreError
from shared.data.storage import Place, fetch_folder
from shared.durable import write_file
from shared.errors import UserError, problem_of
from shared.training.downloads import INDEX, Stored, stored_checkpoints
from shared.training.run_folder import OF_THE_RUN, RunFolder
from shared.training.saving import MANIFEST, Background, saved_batches

logger = logging.getLogger(__name__)

OWNER = "owner.json"
_TO_CONTINUE = ("metrics.jsonl", "loggers.json", "detections.npz")  # besides the checkpoints
_NOT_STORED = ("checkpoints", "code", "requeue")  # of this machine; each checkpoint has a copy of the code
UPLOADS_AT_ONCE = 8  # small files wait for the store's answer, not for the network
_PAUSE = 10.0  # seconds until a store that failed is tried again


class RunStore:
    """Keeps a run's copy in a place. Only the chief has one.

    Uploads run in a thread of their own, and training never waits for them. If the store fails, they are repeated until
    it answers. After a long outage only the newest checkpoint is sent.
    """

    def __init__(self, place: Place, folder: RunFolder):
        self.place, self.folder = place, folder
        self._kept = folder.checkpoints / ".uploading"  # checkpoints that wait for their upload
        self._owner = json.dumps({"start": uuid.uuid4().hex, "host": socket.gethostname()})
        self._changed = threading.Lock()
        self._wanted: dict[str, Stored] = {}
        self._is_queued = False
        # the thread's own
        self._index: dict[str, Stored] = {}
        # by the folders of checkpoints in the store, perhaps incomplete ones, the files that this start has sent
        self._in_store: dict[str, set[str]] = {}
        self._sent: dict[str, tuple[int, int]] = {}  # the time and the size at which each other file was sent
        self._ending = threading.Event()
        self._background = Background("uploading")

    # --- the start ----------------------------------------------------------------------------------------

    def take(self, resume: str | None) -> None:
        """Makes this start the store's owner. Fetches the run if the store has more of it than the folder.

        Raises:
            UserError: the store cannot be read or written, or holds a run and `resume` is None.
        """
        if resume is None and any(self.place.read(name) is not None for name in (INDEX, "metrics.jsonl")):
            raise UserError(
                f"--store: {self.place} holds a run already. Fix: add `--resume auto` to continue it, or name "
                "another folder"
            )
        self.place.write(OWNER, self._owner.encode())
        self._index = stored_checkpoints(self.place.read(INDEX), self.place)
        self._wanted = dict(self._index)
        self._in_store = {name.partition("/")[0]: set() for name in self.place.names("checkpoints") if "/" in name}
        if resume in OF_THE_RUN and "last" in self._index:
            batches = saved_batches(self.folder.checkpoints / "last")
            if self._index["last"].batches > batches:
                logger.info("continuing batch %d of %s", self._index["last"].batches, self.place)
                self._fetch()

    def begin(self) -> None:
        """Takes the checkpoints that the folder holds. The first validation sends those that the store lacks."""
        shutil.rmtree(self._kept, ignore_errors=True)
        for name in ("best", "last"):
            if (self.folder.checkpoints / name).exists():
                self._want(name)

    def _fetch(self) -> None:
        """Replaces the folder's checkpoints and reports by the store's."""
        received = self.folder.received
        shutil.rmtree(received, ignore_errors=True)
        for name, stored in self._index.items():  # the manifest is checked at the reading
            fetch_folder(self.place, f"checkpoints/{stored.folder}", received / "checkpoints" / name)
        for name in _TO_CONTINUE:
            if (data := self.place.read(name)) is not None:
                write_file(received / name, data)
        self.folder.adopt_received()

    # --- during the training ------------------------------------------------------------------------------

    def add_checkpoint(self, is_best: bool) -> None:
        """Sends the folder's `last`, and `best` if it is the same. Nothing replaces them during this call."""
        self._want(*(("last", "best") if is_best else ("last",)))
        self.send()

    def send(self) -> None:
        """Begins to send what the store lacks."""
        with self._changed:
            is_queued, self._is_queued = self._is_queued, True
        if not is_queued:
            self._background.begin(self._send_until_stored)

    def wait(self) -> None:
        """Waits until all is sent, however long the store is away."""
        self._background.wait()

    def raise_if_failed(self) -> None:
        """Raises UserError if another start of the run owns the store."""
        self._background.raise_if_failed()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        """Finishes, also after an error and a signal. A second Ctrl-C does not wait."""
        if isinstance(error, KeyboardInterrupt):
            return
        try:
            self.finish()
        except UserError as own:
            if error is None:
                raise
            logger.error("%s", own)

    def finish(self) -> None:
        """Sends what is not there yet, and waits for it.

        Raises:
            UserError: the store fails. It names what is missing there.
        """
        self._ending.set()
        self.send()
        try:
            self._background.wait()
        except StoreError as error:
            raise UserError(
                f"--store: {', '.join(self._missing())}: not in {self.place} ({error}). Nothing is lost: "
                f"{self.folder.path} has all of it. Fix: run the same command with --resume auto once the store answers"
            ) from error
        logger.info("the whole run is in %s", self.place)

    # --- the upload ---------------------------------------------------------------------------------------

    def _want(self, *names: str) -> None:
        """Wants a checkpoint of the folder in the store, under these names at once. Keeps its files for the upload: no
        file of a checkpoint is ever changed in place."""
        checkpoint = self.folder.checkpoints / names[0]
        digest, batches = _digest(checkpoint), saved_batches(checkpoint)
        with self._changed:
            stored = next((known for known in self._wanted.values() if known.manifest == digest), None)
            if stored is None:
                stored = Stored(f"batch-{batches}-{uuid.uuid4().hex[:8]}", batches, digest)
                shutil.copytree(checkpoint, self._kept / stored.folder, copy_function=_link)
            self._wanted |= dict.fromkeys(names, stored)

    def _send_until_stored(self) -> None:
        complains = False
        while True:
            is_last_try = self._ending.is_set()
            try:
                self._send()
                break
            except StoreError as error:
                if is_last_try:
                    raise
                if not complains:
                    logger.warning(
                        "--store: %s; training continues, and uploads are repeated until it answers", problem_of(error)
                    )
                complains = True
                self._ending.wait(_PAUSE)
        if complains:
            logger.info("--store: %s answers again, and has all checkpoints", self.place)

    def _send(self) -> None:
        """Sends what the store lacks. After an error, the next call continues."""
        with self._changed:
            self._is_queued = False
            wanted = dict(self._wanted)
        self._check_owner()
        for name in self._files():
            self._send_file(name)
        if wanted != self._index:
            for stored in dict.fromkeys(wanted.values()):
                if stored not in self._index.values():
                    self._send_checkpoint(stored)
            self._check_owner()
            index = {name: asdict(stored) for name, stored in wanted.items()}
            self.place.write(INDEX, json.dumps(index, indent=1).encode())
            self._index = wanted
        in_index = {stored.folder for stored in self._index.values()}
        for folder in sorted(self._in_store.keys() - in_index):
            self.place.delete(f"checkpoints/{folder}")
            del self._in_store[folder]
        with self._changed:
            waiting = {stored.folder for stored in self._wanted.values()} - in_index
            for kept in self._kept.glob("*"):
                if kept.name not in waiting:
                    shutil.rmtree(kept, ignore_errors=True)
            with contextlib.suppress(OSError):  # unless some wait
                self._kept.rmdir()

    def _files(self) -> list[str]:
        """The run's files that the store keeps, besides its checkpoints."""
        found = []
        for parent, folders, names in os.walk(self.folder.path):
            above = Path(parent).relative_to(self.folder.path)
            excluded = _NOT_STORED if above == Path() else ()
            folders[:] = [name for name in folders if name not in excluded and not name.startswith(".")]
            found += [above / name for name in names if name not in excluded and not name.startswith(".")]
        return sorted(path.as_posix() for path in found)

    def _send_file(self, name: str) -> None:
        """Sends a file if it has changed. It may be replaced or continued at the same time."""
        with contextlib.suppress(FileNotFoundError):
            version = self._version(name)
            if self._sent.get(name) != version:
                self.place.write(name, (self.folder.path / name).read_bytes())
                self._sent[name] = version

    def _version(self, name: str) -> tuple[int, int]:
        state = (self.folder.path / name).stat()
        return state.st_mtime_ns, state.st_size

    def _send_checkpoint(self, stored: Stored) -> None:
        """Sends the files of a checkpoint, several at once: most of them are small files of code. The manifest follows
        when the others are there."""
        source = self._kept / stored.folder
        done = self._in_store.setdefault(stored.folder, set())
        names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
        waiting = iter(sorted(names - done - {MANIFEST}))  # the threads share it

        def send() -> None:
            for name in waiting:
                self.place.send(source / name, f"checkpoints/{stored.folder}/{name}")
                done.add(name)

        errors: list[Exception] = []
        threads = [Background("uploading", errors.append) for _ in range(UPLOADS_AT_ONCE)]
        for thread in threads:
            thread.begin(send)
        for thread in threads:
            thread.wait()
        if errors:
            raise errors[0]
        if (source / MANIFEST).exists():  # older versions wrote none
            self.place.send(source / MANIFEST, f"checkpoints/{stored.folder}/{MANIFEST}")

    def _check_owner(self) -> None:
        owner = (self.place.read(OWNER) or b"").decode()
        if owner != self._owner:
            raise UserError(
                f"--store: a later start of the run owns {self.place}: {owner or 'its owner.json is gone'}. "
                "Fix: run one at a time"
            )

    def _missing(self) -> list[str]:
        with self._changed:
            late = [(name, stored) for name, stored in sorted(self._wanted.items()) if self._index.get(name) != stored]
        checkpoints = [f"{name} (batch {stored.batches})" for name, stored in late]
        return checkpoints + [name for name in self._files() if self._sent.get(name) != self._version(name)]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copy2(source, target)


def _digest(checkpoint: Path) -> str:
    """SHA-256 of the manifest, or of no bytes without one."""
    manifest = checkpoint / MANIFEST
    return hashlib.sha256(manifest.read_bytes() if manifest.exists() else b"").hexdigest()
