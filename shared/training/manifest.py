"""What a checkpoint's files should be. The manifest is written last: a checkpoint with one is complete."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from shared.durable import write_file
from shared.errors import UserError

MANIFEST = "manifest.json"
METADATA = "metadata.json"
_WEIGHTS = "state_dict.pth"


def write_manifest(folder: Path, batches: int) -> None:
    """Notes size and SHA-256 of each file in a checkpoint's folder, and the batches trained.

    Determined writes metadata.json after this, so that the manifest holds what must be in it, and not its digest.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, METADATA)
    }
    write_file(folder / MANIFEST, json.dumps({"batches": batches, "files": files}, indent=1))


def check_manifest(folder: Path) -> None:
    """Checks each file against the manifest. A checkpoint without a manifest passes: those of version 0.1 have none.

    Raises:
        UserError: a file is missing, cut off or changed.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        return
    try:
        noted_at_save = json.loads(manifest.read_text())
        for name, noted in noted_at_save["files"].items():
            file = folder / name
            if not file.is_file():
                raise UserError(f"{folder} is not whole: {name} is missing")
            if (size := file.stat().st_size) != noted["bytes"]:
                raise UserError(f"{folder} is not whole: {name} has {size} bytes, and {noted['bytes']} were saved")
            if _digest(file) != noted["sha256"]:
                raise UserError(f"{folder} is not what was saved: {name} has changed since")
        batches = noted_at_save.get("batches")  # manifests of version 0.1 lack it
        if batches is not None and json.loads((folder / METADATA).read_text())["steps_completed"] != batches:
            raise UserError(f"{folder} is not what was saved: {METADATA} is not of batch {batches}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} is not whole: {MANIFEST} or {METADATA} cannot be read ({error!r})") from error


def weights_digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's state_dict.pth; from the manifest, where there is one."""
    try:
        return json.loads((folder / MANIFEST).read_text())["files"][_WEIGHTS]["sha256"]
    except FileNotFoundError:
        return _digest(folder / _WEIGHTS)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        if hasattr(hashlib, "file_digest"):  # of Python 3.11 on
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
        return digest.hexdigest()
