"""Folders that go from one machine of a run to another. The machines need not share a disk.

The first rank of each machine takes part. A file goes in pieces over the run's own sockets, and its SHA-256 after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from determined.core import DistributedContext

from shared.errors import UserError
from shared.training.processes import on_every_rank
from shared.training.saving import MANIFEST

_PIECE = 2**24  # bytes, of which each machine has a few in memory


@contextlib.contextmanager
def on_each_machine(distributed: DistributedContext, folder: Path) -> Iterator[Path]:
    """The chief's folder of a checkpoint, on every rank: the folder itself, or a copy for the time of the block.

    A machine whose own `folder` has the same manifest, as on a shared disk, needs no copy.

    Raises:
        UserError: a machine cannot write the copy, or it is not what was sent. Every rank raises it.
    """
    if distributed.cross_size == 1:
        yield folder
        return
    manifest = distributed.broadcast(_read(folder / MANIFEST))
    needs = distributed.cross_rank > 0 and (manifest is None or _read(folder / MANIFEST) != manifest)
    if not any(distributed.allgather(needs)):
        yield folder
        return
    with contextlib.ExitStack() as stack:

        def make_folder() -> Path | None:
            if not needs or distributed.local_rank > 0:
                return None
            try:
                return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="checkpoint-")))
            except OSError as error:
                raise _unwritable(error.filename, error) from error

        copy = on_every_rank(distributed, make_folder)
        send(distributed, 0, folder, copy)
        yield distributed.broadcast_local(copy) if needs else folder
        distributed.allgather(None)  # every rank has read it


def send(
    distributed: DistributedContext, sender: int, source: Path, target: Path | None, omitted: Iterable[str] = ()
) -> None:
    """Copies a folder of one machine to others. Every rank calls this.

    Args:
        sender: the number of the machine that has `source`.
        target: where this rank writes the copy; None if it needs none.
        omitted: names of files and folders that are not sent.

    Raises:
        UserError: the folder cannot be read, or a copy cannot be written or is not what was sent. Every rank raises it.
    """

    def messages() -> Iterator[tuple[str, str | bytes]]:
        own = _messages(source, set(omitted)) if distributed.cross_rank == sender else iter(())
        while (message := distributed.relay(next(own, None), sender)) is not None:
            yield message

    on_every_rank(distributed, lambda: _write(messages(), target) if distributed.local_rank == 0 else None)


def _messages(folder: Path, omitted: set[str]) -> Iterator[tuple[str, str | bytes]]:
    """For each file its name, its pieces and its digest."""
    try:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_file() and not omitted & set(name.parts):
                yield "file", name.as_posix()
                digest = hashlib.sha256()
                with path.open("rb") as file:
                    while piece := file.read(_PIECE):
                        digest.update(piece)
                        yield "piece", piece
                yield "digest", digest.hexdigest()
    except OSError as error:
        yield (
            "error",
            f"{error.filename or folder}: it cannot be read ({error.strerror}). Fix: look at its machine's disk",
        )


def _write(messages: Iterator[tuple[str, str | bytes]], target: Path | None) -> None:
    """Writes the files. Takes all messages, also after an error: the sender waits for each machine."""
    problem: UserError | None = None
    path = file = digest = None
    for kind, content in messages:
        if kind == "error":
            problem = UserError(content)
        if target is None or problem is not None:
            continue
        try:
            if kind == "file":
                path, digest = target / content, hashlib.sha256()
                path.parent.mkdir(parents=True, exist_ok=True)
                file = path.open("wb")
            elif kind == "piece":
                digest.update(content)
                file.write(content)
            else:
                file.close()
                if digest.hexdigest() != content:
                    problem = UserError(f"{path}: it is not what was sent. Fix: try again, and check the network")
        except OSError as error:
            problem = _unwritable(path, error)
    if problem is not None:
        raise problem


def _unwritable(path: Path | str | None, error: OSError) -> UserError:
    place = f"{path} on {socket.gethostname()}"
    return UserError(f"{place}: it cannot be written ({error.strerror}). Fix: make room there, or set TMPDIR")


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
