"""Files that survive a crash and a power cut: all that a run writes and must not lose goes through here.

A file system may keep a rename and lose the content behind it. So content is written to the disk before the rename,
and the rename before anything old is deleted.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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
    sync_folder(path.parent)


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
        sync_folder(path.parent)


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
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                _sync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Writes the names in a folder to the disk: files made, renamed and deleted in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, place: Path) -> None:
    """Puts the folder `new`, with all below it, in the place of the folder `place`.

    The old folder is deleted once the new one is on the disk. One that cannot be deleted (on NFS while somebody reads
    from it) stays under a name of its own, for `restore_folder`. Between the two renames `place` does not exist.
    """
    sync_tree(new)
    leftovers = _leftovers(place)
    old = place.with_name(f".{place.name}.{max(leftovers, default=0) + 1}.old")
    if place.exists():
        place.rename(old)
    new.rename(place)
    sync_folder(place.parent)
    for leftover in (*leftovers.values(), old):
        shutil.rmtree(leftover, ignore_errors=True)


def restore_folder(place: Path) -> None:
    """Puts back what `replace_folder` had moved aside when it was interrupted, and deletes what it left."""
    leftovers = _leftovers(place)
    if leftovers and not place.exists():
        leftovers.pop(max(leftovers)).rename(place)
        sync_folder(place.parent)
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
