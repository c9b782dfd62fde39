"""Which images of a data set are there: looked up once per machine, and remembered beside the annotation cache."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shared.data.file_lock import once
from shared.durable import write_file

_INCOMPLETE_IS_GOOD_FOR = 3600  # seconds until a bucket that lacks images is listed again


@dataclass
class Look:
    """What a storage has of the images of an annotation file.

    Attributes:
        missing: how many images are not there.
        first_missing: the name of the first of them.
        whole: whether every image was looked up; else some were tried.
        folders: st_mtime_ns of each folder on disk that matters, read before it was listed; None if it is missing.
        sizes: of the images in a bucket.
    """

    missing: int = 0
    first_missing: str = ""
    whole: bool = True
    folders: dict[str, int | None] = field(default_factory=dict)
    sizes: Sizes | None = None


class Sizes:
    """Bytes of files by name. Loader workers that are not forked map the arrays instead of copying them.

    Args:
        names: (N,) bytes, sorted.
        sizes: (N,) int64.
        folder: that the arrays are mapped from.
    """

    def __init__(self, names: np.ndarray, sizes: np.ndarray, folder: Path | None = None):
        self.names, self.sizes, self.folder = names, sizes, folder

    @classmethod
    def load(cls, folder: Path) -> Sizes:
        """Maps what `save` wrote. Raises OSError or ValueError if it did not write it."""
        names, sizes = (np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("names", "sizes"))
        if names.dtype.kind != "S" or sizes.dtype != np.int64 or not names.shape == sizes.shape == (len(sizes),):
            raise ValueError("not a list of sizes")
        return cls(names, sizes, folder)

    def save(self, folder: Path) -> None:
        np.save(folder / "names.npy", self.names)
        np.save(folder / "sizes.npy", self.sizes)

    def __reduce__(self):
        return (Sizes.load, (self.folder,)) if self.folder else (Sizes, (self.names, self.sizes))

    def __getitem__(self, name: str) -> int | None:
        """None if the file is not listed."""
        key = name.encode()
        if len(key) > self.names.itemsize or not len(self.names):
            return None
        at = min(int(np.searchsorted(self.names, key)), len(self.names) - 1)
        return int(self.sizes[at]) if self.names[at] == key else None


def folders_of(names: np.ndarray) -> list[str]:
    """The folders of files, sorted; "" for a name without one. `names` is (N,) bytes."""
    return sorted({name.rpartition(b"/")[0].decode() for name in names})


def find(names: np.ndarray, pages: Iterable[list[tuple[bytes, int]]]) -> Look:
    """Which of the names are listed.

    Args:
        names: (N,) bytes.
        pages: names and sizes of the files in the storage, some at a time.
    """
    wanted, rows_of_names = np.unique(names, return_inverse=True)
    sizes = np.full(len(wanted), -1)
    for page in pages:
        files = [(name, size) for name, size in page if len(name) <= wanted.itemsize]  # longer ones would be cut
        listed = np.array([name for name, _ in files], wanted.dtype)
        rows = np.minimum(np.searchsorted(wanted, listed), len(wanted) - 1)
        found = wanted[rows] == listed
        sizes[rows[found]] = np.array([size for _, size in files], np.int64)[found]
    absent = np.flatnonzero((sizes < 0)[rows_of_names])
    first = names[absent[0]].decode() if len(absent) else ""
    return Look(len(absent), first, sizes=Sizes(wanted[sizes >= 0], sizes[sizes >= 0]))


def look_once(folder: Path, look: Callable[[], Look], allow_missing: bool) -> Look:
    """The look remembered in `folder`, or a new one by one process of the machine.

    Args:
        allow_missing: whether a look that found images missing counts, for an hour if it was at a bucket.
    """
    return once([folder / "lock"], lambda: _load(folder, allow_missing), lambda: _save(look(), folder))


def modified(folder: Path) -> int | None:
    """The folder's st_mtime_ns, which changes with the names in it; None if it is missing."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def _save(look: Look, folder: Path) -> Look:
    """The look with its sizes mapped, if it could be written."""
    if not look.whole:
        return look
    header = {"missing": look.missing, "first_missing": look.first_missing, "folders": look.folders}
    try:
        if look.sizes is not None:
            new = Path(tempfile.mkdtemp(dir=folder, prefix="sizes."))  # the previous list may be mapped
            os.chmod(new, 0o755)
            look.sizes.save(new)
            header["sizes"] = new.name
        write_file(folder / "header.json", json.dumps(header))
    except OSError:
        return look
    return _load(folder, allow_missing=True) or look


def _load(folder: Path, allow_missing: bool) -> Look | None:
    """The remembered look, if there is one and it still holds."""
    try:
        header_file = folder / "header.json"
        header = json.loads(header_file.read_bytes())
        if header["missing"]:
            age = time.time() - header_file.stat().st_mtime
            if not allow_missing or ("sizes" in header and age > _INCOMPLETE_IS_GOOD_FOR):
                return None
        if any(modified(Path(path)) != time_then for path, time_then in header["folders"].items()):
            return None
        sizes = Sizes.load(folder / header["sizes"]) if "sizes" in header else None
        return Look(header["missing"], header["first_missing"], folders=header["folders"], sizes=sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # there is none, or it is damaged
