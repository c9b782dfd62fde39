"""File names of a folder or a bucket as sorted arrays: 2 million are 50 MB so, and 3 GiB in dicts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class Look:
    """What was seen where the images of an annotation file should be.

    Attributes:
        missing: how many of the images are not there.
        first_missing: the name of the first of them.
        whole: every image was looked for; else some were tried.
        folders: st_mtime_ns of each folder on disk that counts, from before it was listed; None where there is none.
        sizes: of the images in a bucket.
    """

    missing: int = 0
    first_missing: str = ""
    whole: bool = True
    folders: dict[str, int | None] = field(default_factory=dict)
    sizes: Sizes | None = None


class Sizes:
    """Bytes of files by name. Loader workers that are not forked map the arrays' files again.

    Args:
        names: (N,) bytes, sorted.
        sizes: (N,) int64.
        folder: that the arrays are mapped from.
    """

    def __init__(self, names: np.ndarray, sizes: np.ndarray, folder: Path | None = None):
        self.names, self.sizes, self.folder = names, sizes, folder

    @classmethod
    def load(cls, folder: Path) -> Sizes:
        """Maps what `save` wrote; raises OSError or ValueError where it did not."""
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
        """None where the file is not listed."""
        key = name.encode()
        if len(key) > self.names.itemsize or not len(self.names):
            return None
        at = min(int(np.searchsorted(self.names, key)), len(self.names) - 1)
        return int(self.sizes[at]) if self.names[at] == key else None


def folders_of(names: np.ndarray) -> list[str]:
    """The folders that files are in, "" where a name has none; `names` (N,) bytes."""
    letters = _letters(names)
    slashes = letters == ord("/")
    if not slashes.any():
        return [""]
    last = np.where(slashes.any(axis=1), names.itemsize - 1 - slashes[:, ::-1].argmax(axis=1), 0)
    letters = np.where(np.arange(names.itemsize) < last[:, None], letters, np.uint8(0))
    return [folder.decode() for folder in np.unique(letters.view(names.dtype).ravel()).tolist()]


def as_names(names: Iterable[bytes], width: int) -> np.ndarray:
    """(N,) bytes of `width`; a longer name, which would be cut, becomes an empty one."""
    return np.array([name if len(name) <= width else b"" for name in names], dtype=f"S{width}")


def rows_of(names: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """(N,) int64: the row of each name in `listed`, which is sorted; -1 where it is not there."""
    if not len(listed):
        return np.full(len(names), -1)
    rows = np.minimum(np.searchsorted(listed, names), len(listed) - 1)
    return np.where(listed[rows] == names, rows, -1)


def missing(names: np.ndarray, rows: np.ndarray) -> Look:
    """The look that found the names at those rows, -1 where it did not."""
    absent = rows < 0
    first = names[absent.argmax()].decode() if absent.any() else ""
    return Look(int(absent.sum()), first)


def _letters(names: np.ndarray) -> np.ndarray:
    """(N, width) uint8."""
    return np.ascontiguousarray(names).view(np.uint8).reshape(len(names), names.itemsize)
