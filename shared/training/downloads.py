"""Weights from URLs and checkpoints of a cluster: downloaded once and whole. Imports no torch at the top."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import shutil
import tempfile
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from shared.durable import once, replace_folder, user_cache
from shared.errors import UserError

logger = logging.getLogger(__name__)

_SECONDS = 60  # that a server may send nothing
# as torch.hub and model zoos name files, resnet50-0676ba61.pth; digits alone may be a date
_SHA256_IN_NAME = re.compile(r"-(?=\d*[a-f])([a-f0-9]{8,64})\.\w+$")


def downloaded(url: str) -> Path:
    """The file of a URL, which keeps its name there. A file of torch.hub's cache is taken if its name has the start of
    its SHA-256.

    Raises:
        OSError: the server does not send it, sends a part, or sends other bytes than its name says.
        UserError: there is no place for it.
    """
    from torch import hub  # here, because the command line is read with this module and without torch

    parts = urlsplit(url)
    if parts.scheme == "file":
        return Path(urllib.request.url2pathname(parts.path))
    name = re.sub(r"[^\w.-]", "_", Path(parts.path).name)[-100:].lstrip(".") or "weights"
    place, of_hub = _place(url), Path(hub.get_dir(), "checkpoints", name)
    stated = _SHA256_IN_NAME.search(name)
    if not place.is_dir() and stated and of_hub.is_file() and sha256_of(of_hub).startswith(stated[1]):
        return of_hub

    def fill(new: Path) -> None:
        logger.info("downloading %s", url)
        new.mkdir()
        _download(url, new / name)

    return _filled(place, fill) / name


def _filled(place: Path, fill: Callable[[Path], None]) -> Path:
    """The folder `place`. If it does not exist, one process makes it by `fill`, whole or not at all."""

    def make() -> Path:
        with tempfile.TemporaryDirectory(dir=place.parent) as aside:
            new = Path(aside, place.name)
            fill(new)
            replace_folder(new, place)
        return place

    return once([place.with_name(f"{place.name}.lock")], lambda: place if any(place.glob("*")) else None, make)


def forget(url: str) -> None:
    """Deletes what was downloaded from a URL, so that the next call downloads it again."""
    shutil.rmtree(_place(url), ignore_errors=True)


def _place(url: str) -> Path:
    return private_cache("detection_weights") / hashlib.sha256(url.encode()).hexdigest()[:32]


def private_cache(name: str) -> Path:
    """A folder in the user's cache into which nobody else can put files. Raises UserError if it cannot be made, or is
    another user's."""
    try:
        folder = (user_cache() or Path(tempfile.mkdtemp())) / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise UserError(f"{folder} is another user's. Fix: set XDG_CACHE_HOME to a folder of yours")
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be made a folder ({error.strerror}). Fix: set XDG_CACHE_HOME to a folder of yours"
        ) from error
    return folder


def _download(url: str, path: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "determined-detection"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as response, path.open("wb") as file:
            shutil.copyfileobj(response, file, 2**20)
            length = int(response.headers.get("Content-Length", -1))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise OSError(str(error) or type(error).__name__) from error
    if length not in (-1, path.stat().st_size):
        raise OSError(f"the connection was lost: {path.stat().st_size} of {length} bytes came")
    stated = _SHA256_IN_NAME.search(path.name)
    if stated and not (digest := sha256_of(path)).startswith(stated[1]):
        raise OSError(f"its SHA-256 begins with {digest[: len(stated[1])]}, and its name says {stated[1]}")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# --- checkpoints ------------------------------------------------------------------------------------


INDEX = "checkpoints/index.json"  # of a run in a store: the folders of `best` and `last`


def find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint: a path, `best` or `last` of a run in a store (s3://bucket/run/checkpoints/best), or
    the UUID of one on the cluster that DET_MASTER names. Raises UserError if there is no such folder, or the store or
    the master has no such checkpoint."""
    return checkpoint_here(name) or (_from_bucket(name) if is_bucket(name) else _downloaded(name))


def is_bucket(name: str) -> bool:
    """Whether a name is in a bucket."""
    return name.startswith(("s3://", "gs://", "gcs://"))


def checkpoint_here(name: str) -> Path | None:
    """The folder of a checkpoint on this machine; None where the name is in a bucket, or a UUID on a cluster. Raises
    UserError if there is no such folder, or no cluster to ask."""
    if is_bucket(name):
        return None
    path = Path(name).expanduser()
    path = path.parent if path.name == "state_dict.pth" else path
    if (path / "state_dict.pth").is_file():
        return path.absolute()
    if path.name in ("best", "last") and (index := path.parent / Path(INDEX).name).is_file():  # of a store on a disk
        return (path.parent / _folder_of(path.name, index.read_bytes(), path.parent.parent)).absolute()
    try:
        uuid.UUID(name)
    except ValueError:
        raise UserError(
            f"{name} is not a checkpoint. Fix: give {_example(path)}, or the UUID of a checkpoint on the cluster that "
            "DET_MASTER names"
        ) from None
    if not os.environ.get("DET_MASTER"):
        raise UserError(
            f"checkpoint {name} looks like a UUID on a cluster. Fix: set DET_MASTER to the cluster's address"
        )
    return None


def _from_bucket(url: str) -> Path:
    """The folder of a checkpoint of a run that `train --store` keeps in a bucket, downloaded once and completely."""
    from shared.config.schema import StoreOptions
    from shared.data.storage import fetch_folder, open_place  # no other source needs them

    run, _, which = url.rstrip("/").rpartition("/checkpoints/")
    if which not in ("best", "last"):
        raise UserError(f"{url} is not a checkpoint. Fix: give the folder of the run and /checkpoints/best")
    place = open_place(run, StoreOptions())
    folder = _folder_of(which, place.read(INDEX), run)
    copy = private_cache("detection_checkpoints") / folder
    return _filled(copy, lambda new: fetch_folder(place, f"checkpoints/{folder}", new))


def _folder_of(which: str, index: bytes | None, store: object) -> str:
    if stored := stored_checkpoints(index, store).get(which):
        return stored.folder
    raise UserError(f"{store} holds no checkpoint {which!r}. Fix: give the place that `train --store` got")


@dataclass(frozen=True)
class Stored:
    """A checkpoint in the store."""

    folder: Annotated[str, msgspec.Meta(pattern=r"^[\w-]+\Z")]  # its name in `checkpoints/`
    batches: int  # trained
    manifest: str  # the SHA-256 of its manifest, which holds those of its files


def stored_checkpoints(index: bytes | None, store: object) -> dict[str, Stored]:
    """The checkpoints `best` and `last` that a store's index names, by name; empty without an index. Others may have
    written it. Raises UserError if it cannot be read."""
    try:
        return msgspec.json.decode(index or b"{}", type=dict[Literal["best", "last"], Stored])
    except msgspec.MsgspecError as error:
        raise UserError(
            f"{store}/{INDEX} cannot be read ({error}). Fix: check the place and its permissions"
        ) from error


def _example(path: Path) -> str:
    """A checkpoint that the user may mean: in the run `path`, or in the newest run below runs/."""
    if path.name in ("best", "last"):
        found = sorted(Path("runs").glob(f"*/checkpoints/{path.name}"), key=lambda folder: folder.stat().st_mtime)
        return f"the folder, of the newest run here {found[-1]}" if found else "the folder: RUN/checkpoints/best"
    of_run = [folder for which in ("best", "last") if (folder := path / "checkpoints" / which).is_dir()]
    return str(of_run[0]) if of_run else "the folder that holds state_dict.pth"


def _downloaded(checkpoint: str) -> Path:
    """The folder of a cluster's checkpoint in the user's private cache, downloaded once and completely."""

    def fill(new: Path) -> None:
        from determined.experimental import client

        try:
            client.get_checkpoint(checkpoint).download(str(new))
        except Exception as error:  # the SDK has no base class for what the network and the master answer
            raise UserError(
                f"checkpoint {checkpoint} cannot be downloaded from {os.environ['DET_MASTER']}: {error}. Fix: check "
                "the UUID, the address and `det user login`"
            ) from error

    return _filled(private_cache("detection_checkpoints") / checkpoint, fill)
