"""Finds a checkpoint: a folder here, or one of a cluster by its UUID."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path

from shared.durable import once, replace_folder
from shared.errors import UserError
from shared.training.downloads import private_cache


def find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint: a path, or the UUID of one on the cluster that DET_MASTER names.

    Raises:
        UserError: there is no such folder, or the master has no such checkpoint.
    """
    return checkpoint_here(name) or _downloaded(name)


def checkpoint_here(name: str) -> Path | None:
    """The folder of a checkpoint on this machine; None where the name is a UUID on a cluster.

    Raises:
        UserError: there is no such folder, or no cluster to ask.
    """
    path = Path(name).expanduser()
    path = path.parent if path.name == "state_dict.pth" else path
    if (path / "state_dict.pth").is_file():
        return path.absolute()
    try:
        uuid.UUID(name)
    except ValueError:
        raise UserError(
            f"{name} is not a checkpoint: give {_example(path)}, or the UUID of a checkpoint on the cluster that "
            "DET_MASTER names"
        ) from None
    if not os.environ.get("DET_MASTER"):
        raise UserError(f"checkpoint {name} looks like a UUID on a cluster; set DET_MASTER to its address")
    return None


def _example(path: Path) -> str:
    """A checkpoint that the user may mean: in the run `path`, or in the newest run below runs/."""
    if path.name in ("best", "last"):
        found = sorted(Path("runs").glob(f"*/checkpoints/{path.name}"), key=lambda folder: folder.stat().st_mtime)
        return f"the folder, of the newest run here {found[-1]}" if found else "the folder: RUN/checkpoints/best"
    of_run = [folder for which in ("best", "last") if (folder := path / "checkpoints" / which).is_dir()]
    return str(of_run[0]) if of_run else "the folder that holds state_dict.pth"


def _downloaded(checkpoint: str) -> Path:
    """The folder of a cluster's checkpoint in the user's private cache, downloaded once and completely."""
    folder = private_cache("detection_checkpoints")
    place = folder / checkpoint

    def find() -> Path | None:
        return place if place.is_dir() else None

    def make() -> Path:
        from determined.experimental import client

        with tempfile.TemporaryDirectory(dir=folder) as aside:
            try:
                client.get_checkpoint(checkpoint).download(f"{aside}/{checkpoint}")
            except Exception as error:  # the SDK has no base class for what the network and the master answer
                master = os.environ["DET_MASTER"]
                raise UserError(f"checkpoint {checkpoint} cannot be had from {master}: {error}") from error
            replace_folder(Path(aside, checkpoint), place)
        return place

    return once([folder / f"{checkpoint}.lock"], find, make)
