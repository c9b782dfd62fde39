"""The inputs of `predict --images`: files, folders, globs, URLs and videos."""

from __future__ import annotations

import contextlib
import glob
import io
import itertools
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from PIL import Image, ImageOps, UnidentifiedImageError

from shared.commands import videos
from shared.config.schema import StoreOptions, is_url
from shared.data import remote
from shared.data.images import is_image_name
from shared.data.remote import RemoteImages
from shared.data.storage import CachedImages, ImageStorage, open_file
from shared.data.tiles import HOW_TO_READ, open_windows
from shared.errors import UserError, same_on_any_disk
from shared.evaluation.drawing import is_drawn

logger = logging.getLogger(__name__)

_AT_ONCE = 16  # reads from a store


@dataclass(frozen=True)
class Picture:
    """An image or a video to detect on.

    Attributes:
        name: the file's own name below --output: unique, also on a disk that ignores case, and inside the folder.
        location: the file's path or URL.
        frames: how many frames a video has, as its file says, which may be wrong; None for an image.
    """

    name: str
    location: str
    width: int
    height: int
    frames: int | None = None


@dataclass
class GivenImages:
    """The bytes of the images by their names.

    Attributes:
        locations: paths and URLs by name.
        copies: an empty folder for images from URLs: each is read for its size, to detect and to draw.
    """

    locations: dict[str, str]
    options: StoreOptions
    copies: Path
    _opened: dict[str, ImageStorage] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return "--images"

    def read(self, file_name: str) -> bytes:
        location = self.locations[file_name]
        if not is_url(location):
            with open_file(location) as file:
                return file.read()
        folder, _, name = location.rpartition("/")
        if folder not in self._opened:
            self._opened[folder] = CachedImages(RemoteImages(folder, self.options), self.copies, 2**40, since=None)
        return self._opened[folder].read(unquote(name) if location.startswith("http") else name)

    def path_of(self, file_name: str) -> Path | None:
        """The file on this machine; None for a URL and an image in memory."""
        location = self.locations.get(file_name)
        return None if location is None or is_url(location) else Path(location)


def drawn_as(name: str, picture_format: str) -> str:
    """The name below --output of the picture or the video that is drawn for an input."""
    if videos.is_video(name):
        return name if name.lower().endswith(".mp4") else f"{name}.mp4"
    return f"{name}.{picture_format}"


def find_files(given: Sequence[str], options: StoreOptions, picture_format: str) -> dict[str, str]:
    """The location of each image and video by a unique name: its path below the given folder, with more of its folders
    if two files would have the same name.

    Args:
        picture_format: the ending of the pictures that are drawn.

    Raises:
        UserError: an input does not exist, or has no images.
    """
    below: dict[str, str] = {}  # by location, which counts once
    for one in given:
        for location, name in _find(one, options):
            below.setdefault(location, _inside(name))
    files, folders = {"results.json"}, set()  # below --output
    counts = Counter(map(same_on_any_disk, below.values()))

    def take(name: str) -> bool:
        """Reserves the output of a name; False if another output is in its way."""
        path = PurePosixPath(same_on_any_disk(drawn_as(name, picture_format)))
        parents = {str(folder) for folder in path.parents}
        if str(path) in files | folders or not files.isdisjoint(parents):
            return False
        files.add(str(path))
        folders.update(parents)
        return True

    return {next(filter(take, _names(location, name, counts))): location for location, name in below.items()}


def _names(location: str, name: str, counts: Counter[str]) -> Iterator[str]:
    """Names for an input, the best first: its own unless others have it too, then with more of its folders, then with a
    number, for the same path on disk and in a bucket."""
    parts = PurePosixPath(_inside(unquote(location.partition("://")[2]) or location)).parts
    longer = range(len(PurePosixPath(name).parts) + 1, len(parts) + 1)
    names = [name, *("/".join(parts[-length:]) for length in longer)]
    yield from (name for name in names if counts[same_on_any_disk(name)] < 2)
    yield names[-1]
    yield from (f"{number}/{names[-1]}" for number in itertools.count(2))


def _inside(path: str) -> str:
    """The path without parts that lead out of a folder."""
    parts = path.replace("\0", "").split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "input"


def _find(given: str, options: StoreOptions) -> Iterator[tuple[str, str]]:
    """The locations of an input's files, and the path of each below the input."""
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
            raise UserError(f"--images: no file matches {given!r}. Fix: correct the pattern")
        for match in matches:
            if Path(match).is_dir():
                yield from _find_in(Path(match))
            elif _is_input(match):
                yield _located(Path(match)), Path(match).name
    else:
        raise UserError(f"--images: {given} does not exist. Fix: correct the path")


def _located(file: Path) -> str:
    """The file's path without links and `..` in its folder. A link keeps its name."""
    return str(file.parent.resolve() / file.name)


def _find_in(folder: Path) -> Iterator[tuple[str, str]]:
    folder = folder.resolve()
    # pictures and videos that an earlier run drew may be beside it
    written = {file.parent for file in folder.rglob("results.json")} - {folder}
    for earlier in sorted(written):
        logger.info("skipped: %s, which holds the results.json of an earlier run", earlier)
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
            f"--images: {url} does not name an image, and a web server has no list of its files. Fix: give the URL of "
            "each image"
        )
    folder = RemoteImages(url, options)
    names = [name for page in folder.pages("") for name, _ in page if _is_input(name)]
    if not names:
        raise UserError(f"--images: {url} holds no image. Fix: give a folder or a glob with images")
    for name in names:
        yield f"{folder.url}/{name}", name


def look_at(images: GivenImages, in_tiles: bool) -> list[Picture]:
    """The files that can be read, with their sizes. Logs a line for each other file, and one for earlier results.

    Args:
        in_tiles: an image may be too large to be decoded.

    Raises:
        UserError: no file can be read.
    """
    locations = images.locations
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        looked = list(threads.map(lambda name: _look_at(name, images, in_tiles), locations))
    reasons: dict[str, str] = {}
    for location, found in zip(locations.values(), looked, strict=True):
        if isinstance(found, str):
            reasons[location] = found
            logger.warning("%s is skipped: %s", location, found)
    if drawn := looked.count(None):
        logger.info("skipped: %d pictures that an earlier run drew", drawn)
    if pictures := [found for found in looked if isinstance(found, Picture)]:
        return pictures
    if len(locations) == len(reasons) == 1:
        ((location, reason),) = reasons.items()
        reason = reason if "Fix: " in reason else f"{reason}. Fix: give images or videos"
        raise UserError(f"--images: {location}: {reason}")
    raise UserError(f"--images: none of the {len(locations)} files can be read as an image. Fix: give images or videos")


def _look_at(name: str, images: GivenImages, in_tiles: bool) -> Picture | str | None:
    """The image or video. A text if it cannot be read; None if an earlier run drew it."""
    location = images.locations[name]
    try:
        if videos.is_video(location):
            if is_url(location):
                return "a video is read from disk only; download it"
            open_file(location).close()
            with contextlib.closing(videos.Video(location)) as video:
                return Picture(name, location, *video.size, frames=video.about)
        found = size_of(name, images, in_tiles)
        return None if found is None else Picture(name, location, *found)
    except remote.StoreError:
        raise
    except (UnreadableError, UserError, OSError) as error:
        return str(error).removeprefix(location).lstrip(": ")


class UnreadableError(Exception):
    """An input that is no image, in a few words."""


def size_of(name: str, images: GivenImages, in_tiles: bool) -> tuple[int, int] | None:
    """The (width, height) of an image, rotated as its EXIF says, from its header; None if an earlier run drew it.

    Args:
        in_tiles: the image may be too large to be decoded.

    Raises:
        UnreadableError: it cannot be read as an image.
    """
    location = images.locations[name]
    try:
        opened = io.BytesIO(images.read(name)) if is_url(location) else open_file(location)
        with opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(opened) as image:
                if is_drawn(image):
                    return None
                return ImageOps.exif_transpose(image).size if image.getexif() else image.size
    except remote.StoreError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError("it is not an image") from error
    except Image.DecompressionBombError as error:
        if not in_tiles:
            raise UnreadableError(f"{error}. Fix: if you trust it, set data.max_image_pixels") from error
        if (windows := open_windows(images.path_of(name))) is None:
            raise UnreadableError(f"{error}. {HOW_TO_READ}") from error
        return windows.size
    except (OSError, ValueError) as error:
        raise UnreadableError(str(error).removeprefix(location).lstrip(": ")) from error
