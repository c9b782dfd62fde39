"""The content of a disk after a power cut, from a real file system and from a record of fsync and rename."""

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_EXT4_IOC_SHUTDOWN = 2 << 30 | 4 << 16 | ord("X") << 8 | 125
_WITHOUT_FLUSHING_THE_JOURNAL = 2
_SECONDS_TO_DETACH = 10


class Ext4:
    """A mounted ext4 file system in a file."""

    def __init__(self, image: Path, mounted: Path):
        self.image, self.path = image, mounted

    def cut_the_power(self, kill: Callable[[], None] = lambda: None) -> None:
        """Drops what is not on the disk yet, calls `kill` to stop the writers, and mounts the disk again."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _EXT4_IOC_SHUTDOWN, struct.pack("I", _WITHOUT_FLUSHING_THE_JOURNAL))
        finally:
            os.close(descriptor)
        kill()
        _run("umount", self.path)
        deadline = time.monotonic() + _SECONDS_TO_DETACH
        while _run("losetup", "--associated", self.image) and time.monotonic() < deadline:
            time.sleep(0.05)  # another program may still look at the old device, and its errors are read from it
        _run("mount", "-o", "loop", self.image, self.path)


@contextlib.contextmanager
def ext4(folder: Path, megabytes: int) -> Iterator[Ext4]:
    """Skips the test if file systems cannot be mounted: not root, most containers, not Linux."""
    image, mounted = folder / "disk.img", folder / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(megabytes * 2**20)
    try:
        _run("mkfs.ext4", "-q", image)
        _run("mount", "-o", "loop", image, mounted)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a file system cannot be mounted here, which needs root and a loop device: {error}")
    try:
        yield Ext4(image, mounted)
    finally:
        _run("umount", "--lazy", mounted)


def _run(*command: object) -> bytes:
    return subprocess.run([*map(str, command)], check=True, capture_output=True).stdout


class Recorder:
    """Keeps, before each rename and deletion below `folder`, the disk as a power cut would leave it: all names, and for
    each file the content that fsync wrote, else nothing."""

    def __init__(self, folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.images = folder, images
        self._on_disk: dict[tuple[int, int], tuple[int, int]] = {}
        self.count = 0
        self._busy = False
        real = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            status = os.fstat(descriptor)
            self._on_disk[status.st_dev, status.st_ino] = (status.st_size, status.st_mtime_ns)

        monkeypatch.setattr(os, "fsync", fsync)
        renames = [(os, "rename"), (os, "replace")]
        if sys.version_info < (3, 11):  # its pathlib took them from `os` when it was imported
            renames += [(Path, "rename"), (Path, "replace")]
        for owner, name in (*renames, (shutil, "rmtree")):
            self._keep_before(owner, name, monkeypatch)

    def _keep_before(self, owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        real = getattr(owner, name)

        def call(path: object, *arguments: object, **named: object) -> object:
            if not self._busy and Path(path).is_relative_to(self.folder):
                self.keep()
            return real(path, *arguments, **named)

        monkeypatch.setattr(owner, name, call)

    def keep(self) -> None:
        """Adds an image of the current disk."""
        self._busy = True
        image = self.images / str(self.count)
        shutil.copytree(self.folder, image, copy_function=self._copy_what_is_on_disk)
        self.count += 1
        self._busy = False

    def _copy_what_is_on_disk(self, source: str, target: str) -> None:
        status = os.stat(source)
        size, written_at = self._on_disk.get((status.st_dev, status.st_ino), (0, -1))
        unchanged = (size, written_at) == (status.st_size, status.st_mtime_ns)
        with open(source, "rb") as file:
            content = file.read()
        # an appended file keeps its beginning; a new one is empty
        Path(target).write_bytes(content if unchanged else content[:size])

    def disks(self) -> list[Path]:
        return [self.images / str(number) for number in range(self.count)]
