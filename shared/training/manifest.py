"""What a checkpoint's files should be, written last: whether it is whole, and what was saved."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from shared.errors import UserError

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Notes size and SHA-256 of each file that is in a checkpoint's folder."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    new = folder / f".{MANIFEST}.new"
    new.write_text(json.dumps({"files": files}, indent=1))
    new.replace(folder / MANIFEST)


def check_manifest(folder: Path) -> None:
    """Nothing where there is no manifest: older checkpoints have none.

    Raises:
        UserError: a file is missing, cut off or changed.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        return
    try:
        files = json.loads(manifest.read_text())["files"]
        for name, noted in files.items():
            file = folder / name
            if not file.is_file():
                raise UserError(f"{folder} is not whole: {name} is missing")
            if (size := file.stat().st_size) != noted["bytes"]:
                raise UserError(f"{folder} is not whole: {name} has {size} bytes, and {noted['bytes']} were saved")
            if _digest(file) != noted["sha256"]:
                raise UserError(f"{folder} is not what was saved: {name} has changed since")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{manifest} cannot be read ({error!r}); the checkpoint is not whole") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        if hasattr(hashlib, "file_digest"):  # of Python 3.11 on
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
        return digest.hexdigest()
