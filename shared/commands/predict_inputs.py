"""What `predict --images` names: files, folders, globs, URLs and videos, as a data set without annotations."""

from __future__ import annotations

import glob
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from shared.commands import videos
from shared.config.schema import StoreOptions, is_url
from shared.data import remote
from shared.data.image_list import Look
from shared.data.images import is_image_name
from shared.data.remote import RemoteImages
from shared.data.storage import CachedImages, ImageStorage
from shared.errors import UserError, same_on_any_disk
from shared.evaluation.drawing import is_drawn

logger = logging.getLogger(__name__)

_AT_ONCE = 16  # reads from a store


@dataclass(frozen=True)
class Picture:
    """An image to detect on, or a frame of a video.

    Attributes:
        name: of the file: no two are alike, on a disk that ignores case neither, and none leads out of a folder.
        location: the file's path, or its URL.
        frame: of a video, from 0 on; None of an image.
    """

    name: str
    location: str
    width: int
    height: int
    frame: int | None = None

    @property
    def key(self) -> str:
        """The file name in the data set."""
        return self.name if self.frame is None else f"{self.name}/{self.frame}"


@dataclass
class GivenImages:
    """The bytes of images by the name that each was given, wherever they are.

    Attributes:
        locations: by name.
        copies: an empty folder for those from a URL: each is read to tell its size, to detect and to draw.
    """

    locations: dict[str, str]
    options: StoreOptions
    copies: Path
    place = None
    _opened: dict[str, ImageStorage | videos.FrameReader] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return "--images"

    def read(self, file_name: str) -> bytes:
        if (location := self.locations.get(file_name)) is None:  # a video's frame
            name, _, frame = file_name.rpartition("/")
            video = self.locations[name]
            return self._opened.setdefault(video, videos.FrameReader(video)).read(int(frame))
        if not is_url(location):
            return Path(location).read_bytes()
        folder, _, name = location.rpartition("/")
        if folder not in self._opened:
            self._opened[folder] = CachedImages(RemoteImages(folder, self.options), self.copies, 2**40, since=None)
        return self._opened[folder].read(unquote(name) if location.startswith("http") else name)

    def look(self, names: np.ndarray) -> Look:
        return Look()


def drawn_as(name: str, picture_format: str) -> str:
    """The file below --output that the picture, or the video, of an input is written to."""
    if videos.is_video(name):
        return name if name.lower().endswith(".mp4") else f"{name}.mp4"
    return f"{name}.{picture_format}"


def find_files(given: Sequence[str], options: StoreOptions, picture_format: str = "png") -> dict[str, str]:
    """The location of each image and video that is named, by a name of its own: its path below the folder that was
    given, with folders before it where two files would have the same.

    Args:
        picture_format: the ending of what is drawn of images.

    Raises:
        UserError: something that is named is not there, or has no images.
    """
    below: dict[str, str] = {}  # by location, which counts once
    for one in given:
        for location, name in _find(one, options):
            below.setdefault(location, _inside(name))
    outputs = _Outputs(picture_format)
    names: dict[str, str] = {}
    same = Counter(map(same_on_any_disk, below.values()))
    for location, name in below.items():
        parts = PurePosixPath(_inside(unquote(location.partition("://")[2]) or location)).parts
        length = len(PurePosixPath(name).parts)
        while (same[same_on_any_disk(name)] > 1 or not outputs.has_room_for(name)) and length < len(parts):
            length += 1
            name = "/".join(parts[-length:])
        numbered, number = name, 1
        while not outputs.has_room_for(numbered):  # the same path here and in a bucket
            number += 1
            numbered = f"{number}/{name}"
        outputs.take(numbered)
        names[numbered] = location
    return names


def _inside(path: str) -> str:
    """The path as one that leads out of no folder."""
    parts = path.replace("\0", "").split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "input"


class _Outputs:
    """What will be written below --output, no file in the place of another or of a folder."""

    def __init__(self, picture_format: str):
        self.picture_format = picture_format
        self.files, self.folders = {"results.json"}, set()

    def has_room_for(self, name: str) -> bool:
        file, folders = self._of(name)
        return file not in self.files and file not in self.folders and self.files.isdisjoint(folders)

    def take(self, name: str) -> None:
        file, folders = self._of(name)
        self.files.add(file)
        self.folders.update(folders)

    def _of(self, name: str) -> tuple[str, set[str]]:
        path = PurePosixPath(same_on_any_disk(drawn_as(name, self.picture_format)))
        return str(path), {str(folder) for folder in path.parents}


def _find(given: str, options: StoreOptions) -> Iterator[tuple[str, str]]:
    """Locations, and each one's path below what was given."""
    if is_url(given):
        yield from _find_remote(given, options)
        return
    path = Path(given).expanduser()
    if path.is_dir():
        yield from _find_in(path)
    elif path.exists():
        yield _located(path), path.name
    elif glob.has_magic(given):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise UserError(f"--images: no file is matched by {given!r}")
        for match in matches:
            if Path(match).is_dir():
                yield from _find_in(Path(match))
            elif _is_input(match):
                yield _located(Path(match)), Path(match).name
    else:
        raise UserError(f"--images: {given} does not exist")


def _located(file: Path) -> str:
    """The file's path without links and `..` in its folder. A link keeps its own name."""
    return str(file.parent.resolve() / file.name)


def _find_in(folder: Path) -> Iterator[tuple[str, str]]:
    folder = folder.resolve()
    # there may be pictures and videos beside it, that an earlier predict has drawn
    written = {file.parent for file in folder.rglob("results.json")} - {folder}
    for earlier in sorted(written):
        logger.info("left out: %s, which holds the results.json of an earlier run", earlier)
    for file in sorted(folder.rglob("*")):
        if _is_input(file.name) and file.is_file() and written.isdisjoint(file.parents):
            yield str(file), file.relative_to(folder).as_posix()


def _is_input(name: str) -> bool:
    return videos.is_video(name) or is_image_name(name)


def _find_remote(url: str, options: StoreOptions) -> Iterator[tuple[str, str]]:
    if _is_input(url):
        name = url.rpartition("/")[2]
        yield url, unquote(name) if url.startswith("http") else name
        return
    if url.startswith("http"):
        raise UserError(
            f"--images: {url} is no image by its name, and a web server has no list of its files; give the URL of each "
            f"image"
        )
    folder, count = RemoteImages(url, options), 0
    for page in folder.pages(""):
        for name, _ in page:
            if _is_input(name):
                count += 1
                yield f"{folder.url}/{name}", name
    if not count:
        raise UserError(f"--images: {url} holds no image")


def look_at(files: dict[str, str], images: GivenImages) -> list[Picture]:
    """Those that can be read, with their sizes; a line for each that cannot, and one for pictures that were drawn.

    Raises:
        UserError: none can be read.
    """
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        looked = list(threads.map(lambda name: _look_at(name, files[name], images), files))
    pictures: list[Picture] = []
    drawn = 0
    for name, found in zip(files, looked, strict=True):
        if isinstance(found, str):
            logger.warning("%s is left out: %s", files[name], found)
        elif found is None:
            drawn += 1
        else:
            pictures += found
    if drawn:
        logger.info("left out: %d pictures that an earlier run has drawn", drawn)
    if not pictures and len(files) == 1 and isinstance(looked[0], str):
        raise UserError(f"--images: {next(iter(files.values()))}: {looked[0]}")
    if not pictures:
        raise UserError(f"--images: none of the {len(files)} files is an image that can be read")
    return pictures


def _look_at(name: str, location: str, images: GivenImages) -> list[Picture] | str | None:
    """The image, or the video's frames; what is wrong; None where it was drawn by us."""
    try:
        if videos.is_video(location):
            if is_url(location):
                return "a video is read from disk only; download it"
            count, width, height = videos.measure(location)
            return [Picture(name, location, width, height, frame) for frame in range(count)]
        file = io.BytesIO(images.read(name)) if is_url(location) else location
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                if is_drawn(image):
                    return None
                width, height = ImageOps.exif_transpose(image).size if image.getexif() else image.size
        return [Picture(name, location, width, height)]
    except remote.StoreError:
        raise
    except UnidentifiedImageError:
        return "it is no image"
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return str(error).removeprefix(location).lstrip(": ")
