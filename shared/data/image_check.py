"""That the images of an annotation file are there: looked at once, and remembered beside the annotation cache."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from shared.data.annotations import CocoAnnotations
from shared.data.images import darkness
from shared.data.listing import Look, Sizes
from shared.data.once import once
from shared.data.remote import is_url
from shared.data.storage import DiskImages, ImageStorage, modified
from shared.errors import UserError

logger = logging.getLogger(__name__)

_INCOMPLETE_IS_GOOD_FOR = 3600  # seconds that a bucket without some of the images is not listed anew
_LONGEST = 4096  # bytes of a path
_TRIED_FOR_DARKNESS = 4
_MOST_SEARCHED = 200_000  # files, for what a missing one may be called


def check_images(annotations: CocoAnnotations, images: ImageStorage, where: str, skip: bool = False) -> None:
    """Looks for the images, unless that was done with this version of the annotation file. A folder on disk that has
    changed is looked at again; a bucket is not.

    Args:
        where: of the errors.
        skip: missing images are a warning, unless all are.

    Raises:
        UserError: the file of an image is missing, or the folder holds a link out of it.
    """

    def looked() -> Look:
        look = images.look(annotations.file_names)
        if look.missing and (not skip or look.missing == len(annotations)):
            found = _found_instead(images.folder, look.first_missing) if isinstance(images, DiskImages) else ""
            raise UserError(_message(look, annotations, where) + found)
        return look

    if annotations.cache is None or images.place is None:
        look = looked()
    else:
        place = annotations.cache / f"images-{hashlib.sha256(os.fsencode(images.place)).hexdigest()[:12]}"
        look = once([place / "lock"], lambda: _remembered(place, skip), lambda: _remember(looked(), place))
        if look.sizes is not None:
            images.take_sizes(look.sizes)
    if look.missing:
        logger.warning("%s; they are left out", _message(look, annotations, where))


def refuse_names_outside(annotations: CocoAnnotations, where: str, folder: Path | None = None) -> None:
    """Raises UserError where an image's name leads out of the images' folder, or can be no file's.

    Args:
        folder: the images' one, where it is on disk.
    """
    letters, offsets = annotations.columns["file_names"], annotations.columns["file_name_offsets"]
    lengths = np.diff(offsets)
    no_name = (lengths == 0) | (lengths > _LONGEST)
    suspicious = no_name.copy()
    # what each wrong name has one of: few right ones do
    first = letters[offsets[:-1][~no_name]]
    suspicious[~no_name] = (first == ord("/")) | (first == ord("\\"))
    before, here = letters[:-1], letters[1:]
    up_or_url = (here == ord(".")) & (before == ord(".")) | (here == ord("/")) & (before == ord(":"))
    for at in (np.flatnonzero(up_or_url), np.flatnonzero(letters == 0)):
        suspicious[np.searchsorted(offsets, at, side="right") - 1] = True
    for i in np.flatnonzero(suspicious).tolist():
        name = annotations.file_name(i)
        outside = "\0" in name or is_url(name) or name.startswith(("/", "\\")) or ".." in name.split("/")
        if folder is not None and name.startswith(f"{folder}/") and ".." not in name.split("/"):
            raise UserError(
                f"{where}: the image file name {name[:200]!r} is absolute, and lies in the images' folder; names are "
                f"relative to it: write {name.removeprefix(f'{folder}/')[:200]!r}"
            )
        if no_name[i] or outside:
            raise UserError(
                f"{where}: the image file name {name[:200]!r} leads out of the images' folder, or is none; names "
                "are relative to that folder"
            )


def first_dark_image(annotations: CocoAnnotations, images: ImageStorage) -> str:
    """What `darkness` says of the first of some images, spread over the file."""
    some = np.linspace(0, len(annotations) - 1, _TRIED_FOR_DARKNESS).astype(int)
    said = (darkness(images, annotations.file_name(i)) for i in np.unique(some).tolist())
    return next(filter(None, said), "")


def _message(look: Look, annotations: CocoAnnotations, where: str) -> str:
    return (
        f"{where}: {look.missing} of the {len(annotations)} images that the annotation file names are not there, the "
        f"first is {look.first_missing}"
    )


def _found_instead(folder: Path, name: str) -> str:
    """What lies in the folder, below or above it, in the place of a missing image, and what to do; "" for nothing."""
    wanted = PurePosixPath(name.replace("\\", "/"))
    above = PurePosixPath(*wanted.parts[1:])
    if len(wanted.parts) > 1 and folder.name == wanted.parts[0] and (folder / above).is_file():
        return (
            f"; {folder / above} is there: say `images: {folder.parent}`, or leave {wanted.parts[0]}/ out of the names"
        )

    def plain(path: PurePosixPath) -> str:
        return unicodedata.normalize("NFC", str(path)).casefold()

    by_stem = None
    for file in itertools.islice(_files_below(folder), _MOST_SEARCHED):
        path = PurePosixPath(file.relative_to(folder))
        told = f"; {str(path)!r} is there, and the annotation file says {name!r}: "
        if plain(path) == plain(wanted):
            if "\\" in name:
                return f"{told}write / for \\ in its names"
            if unicodedata.normalize("NFC", str(path)) == unicodedata.normalize("NFC", name):
                return f"{told}the same letters in other Unicode (NFC and NFD); rename the files or the names"
            return f"{told}upper and lower case count; rename the files or the names"
        if plain(PurePosixPath(path.name)) == plain(PurePosixPath(wanted.name)):
            deeper = path.parts[: len(path.parts) - len(wanted.parts)]
            if path.parts[len(deeper) :] == wanted.parts:
                return (
                    f"; {path} is there: say `images: {folder.joinpath(*deeper)}`, or put {'/'.join(deeper)}/ before "
                    "the names"
                )
            return f"{told}names have the folders below the one of the images"
        if by_stem is None and plain(PurePosixPath(path.stem)) == plain(PurePosixPath(wanted.stem)):
            by_stem = f"{told}correct the endings"
    return by_stem or ""


def _files_below(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(root) / file for file in files)


def _remember(look: Look, place: Path) -> Look:
    """The look as later ones find it, with mapped sizes, where it can be written."""
    if not look.whole:
        return look
    try:
        header = {"missing": look.missing, "first_missing": look.first_missing, "folders": look.folders}
        if look.sizes is not None:
            # a folder for each list: an earlier one may be mapped
            folder = Path(tempfile.mkdtemp(dir=place, prefix="sizes."))
            folder.chmod(0o755)
            look.sizes.save(folder)
            header["sizes"] = folder.name
        aside = place / "header.json.aside"
        aside.write_text(json.dumps(header))
        aside.replace(place / "header.json")
    except OSError:
        return look
    return _remembered(place, skip=True) or look


def _remembered(place: Path, skip: bool) -> Look | None:
    """The look that still holds, if there was one."""
    try:
        header_file = place / "header.json"
        header = json.loads(header_file.read_bytes())
        if header["missing"]:
            age = time.time() - header_file.stat().st_mtime
            if not skip or ("sizes" in header and age > _INCOMPLETE_IS_GOOD_FOR):
                return None
        if any(modified(Path(folder)) != time_then for folder, time_then in header["folders"].items()):
            return None
        sizes = Sizes.load(place / header["sizes"]) if "sizes" in header else None
        return Look(header["missing"], header["first_missing"], folders=header["folders"], sizes=sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # none yet, cut off or not ours
