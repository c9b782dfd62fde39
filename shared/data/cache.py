"""What one process of a machine finds out and all use: arrays on disk, and which images of a data set are there.

Processes map the arrays, so that they take their memory once.

<folder>/header.json    names the folder of the arrays and describes them; it is replaced as a whole
         arrays.…/      one .npy file per array; never changed, because a process may map them
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared.durable import once, write_file

Arrays = dict[str, np.ndarray]

_TAG = """Signature: 8a477f597d28d172789f06886806bc55
# This directory is a cache, see https://bford.info/cachedir/
"""


def mark_as_cache(folder: Path) -> None:
    """Creates a folder whose content Git and backups skip, if it can be written."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in ((".gitignore", "*\n"), ("CACHEDIR.TAG", _TAG)):
            if not (folder / name).exists():
                (folder / name).write_text(content)


def load_arrays(folder: Path) -> tuple[Arrays, Any] | None:
    """The arrays, mapped, and what was saved about them. None if they are missing, cut off or damaged."""
    try:
        header = json.loads((folder / "header.json").read_bytes())
        arrays = {}
        for name, (dtype, shape) in header["arrays"].items():
            # asarray keeps the mapped pages, and drops the slow indexing of np.memmap
            array = np.asarray(np.load(folder / header["folder"] / f"{name}.npy", mmap_mode="r"))
            if (array.dtype.str, list(array.shape)) != (dtype, shape):
                return None
            arrays[name] = array
        return arrays, header["about"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save_arrays(folder: Path, arrays: Arrays, about: Any) -> bool:
    """Whether the arrays could be written.

    Args:
        about: anything that JSON can hold.
    """
    new = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=folder, prefix="arrays."))
        new.chmod(0o755)
        for name, array in arrays.items():
            np.save(new / f"{name}.npy", array)
        described = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
        write_file(folder / "header.json", json.dumps({"folder": new.name, "arrays": described, "about": about}))
        return True
    except OSError:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
        return False


_INCOMPLETE_IS_GOOD_FOR = 3600  # seconds until a bucket that lacks images is listed again


@dataclass
class Look:
    """Which images of an annotation file a storage has.

    Attributes:
        missing: how many images are not there.
        first_missing: the name of the first of them.
        whole: whether every image was looked up; else some were tried.
        folders: st_mtime_ns of each folder on disk that matters, read before it was listed; None if it is missing.
        sizes: bytes of each image in a bucket.
    """

    missing: int = 0
    first_missing: str = ""
    whole: bool = True
    folders: dict[str, int | None] = field(default_factory=dict)
    sizes: Sizes | None = None


@dataclass
class Sizes:
    """Bytes of files by name.

    Attributes:
        names: (N,) bytes, sorted.
        sizes: (N,) int64.
        folder: that the arrays are mapped from. Loader workers that are not forked map them again.
    """

    names: np.ndarray
    sizes: np.ndarray
    folder: Path | None = None

    def __reduce__(self):
        if self.folder is not None:
            return _map_sizes, (self.folder,)
        return Sizes, (self.names, self.sizes)

    def __getitem__(self, name: str) -> int | None:
        """None if the file is not listed."""
        key = name.encode()
        if len(key) > self.names.itemsize or not len(self.names):
            return None
        at = min(int(np.searchsorted(self.names, key)), len(self.names) - 1)
        return int(self.sizes[at]) if self.names[at] == key else None


def _map_sizes(folder: Path) -> Sizes:
    return Sizes(**load_arrays(folder)[0], folder=folder)


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

    def remembered() -> Look | None:
        try:
            arrays, about = load_arrays(folder)
            found = Look(**about, sizes=Sizes(**arrays, folder=folder) if arrays else None)
            is_old = time.time() - (folder / "header.json").stat().st_mtime > _INCOMPLETE_IS_GOOD_FOR
            is_changed = any(modified(Path(path)) != time_then for path, time_then in found.folders.items())
        except (OSError, TypeError, ValueError, AttributeError):
            return None  # there is none, or it is damaged
        counts = not found.missing or (allow_missing and not (found.sizes is not None and is_old))
        return found if counts and not is_changed else None

    def remember() -> Look:
        new = look()
        about = {"missing": new.missing, "first_missing": new.first_missing, "folders": new.folders}
        arrays = {} if new.sizes is None else {"names": new.sizes.names, "sizes": new.sizes.sizes}
        if new.whole and save_arrays(folder, arrays, about):
            return remembered() or new
        return new

    return once([folder / "lock"], remembered, remember)


def modified(folder: Path) -> int | None:
    """The folder's st_mtime_ns, which changes with the names in it; None if it is missing."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None
