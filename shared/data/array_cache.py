"""Arrays on disk that all processes of a machine map, so that they take their memory once.

<folder>/header.json    names the folder of the arrays and describes them; it is replaced as a whole
         arrays.…/      one .npy file per array; never changed, because a process may map them
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from shared.durable import write_file

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


def load(folder: Path) -> tuple[Arrays, Any] | None:
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


def save(folder: Path, arrays: Arrays, about: Any) -> bool:
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
