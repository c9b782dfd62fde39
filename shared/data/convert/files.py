"""Files of a data set: what counts as one, which text is in it, which image a name means."""

from __future__ import annotations

import codecs
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from urllib.parse import unquote

import msgspec
from PIL import ExifTags, Image

from shared.data.images import SIDEWAYS, is_image_name
from shared.errors import UserError, same_on_any_disk

SPLITS = {
    "train": ("train", "training", "train2017"),
    "val": ("val", "valid", "validation", "dev", "val2017"),
    "test": ("test", "testing", "test2017"),
}
_IMAGES = ("images", "image", "imgs", "img", "jpegimages", "image_2", "photos", "pictures")  # usual folders of them
_NO_DATA = ("__MACOSX", "@eaDir")  # folders that macOS' archives and network disks add
_MOST_FILES = 1_000_000  # a folder with more is not a data set but a whole disk
_TRIED = 20  # files of a folder
_MOST_TAILS = 8  # folders of a name that are tried away, one by one
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def is_hidden(name: str) -> bool:
    """Whether a file or folder holds no data: `._a.jpg` and `.DS_Store` from macOS, for example."""
    return name.startswith(".") or name in _NO_DATA


def files_below(source: Path, endings: Sequence[str] = ()) -> list[Path]:
    """The visible files in a folder and its subfolders, sorted; or the source, if it is such a file.

    Args:
        endings: in lower case, ".xml"; () for all files.
    """
    return sorted(_walk(source, lambda name: not endings or name.lower().endswith(tuple(endings))))


def images_below(folder: Path) -> list[Path]:
    """The visible images in a folder and its subfolders, sorted."""
    return sorted(_walk(folder, is_image_name))


def files_in(source: Path, endings: Sequence[str] = ()) -> list[Path]:
    """The visible files in a folder itself, sorted; or the source, if it is such a file."""
    paths = source.iterdir() if source.is_dir() else [source]
    files = (path for path in paths if not is_hidden(path.name) and path.is_file())
    return sorted(path for path in files if not endings or path.suffix.lower() in endings)


def files_near(source: Path, endings: Sequence[str]) -> list[Path]:
    """The same, and the first files of each folder in the source: a data set with a file per image has thousands."""
    return [file for folder in (source, *folders_in(source)) for file in files_in(folder, endings)[:_TRIED]]


def folders_in(folder: Path) -> list[Path]:
    """The visible folders in a folder, sorted."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name) and path.is_dir())


def split_of(name: str) -> str:
    """The split that a folder or file is named after; "" for none."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), "")


def by_split(files: Iterable[Path], root: Path, by_name: bool = False) -> dict[str, list[Path]]:
    """Files by the split that a folder of their path, below the root, is named after.

    Args:
        by_name: a word of a file's own name counts too, and files of no split may be beside others.

    Raises:
        UserError: some files are in a split, and others are not.
    """
    parts: dict[str, list[Path]] = {}
    for file in files:
        names = [*file.relative_to(root).parts[:-1], *(words_of(file) if by_name else ())]
        parts.setdefault(next(filter(None, map(split_of, names)), ""), []).append(file)
    if len(parts) > 1 and "" in parts and not by_name:
        raise UserError(
            f"{root}: {len(parts[''])} files lie in no folder of a split, {parts[''][0]} for example, and "
            f"others are in {', '.join(sorted(parts.keys() - {''}))}. Fix: convert the folders one by one"
        )
    return {split: parts[split] for split in ("", *SPLITS) if split in parts}


def one_per_split(files: Iterable[Path], root: Path) -> dict[str, Path]:
    """The first file of each split, by folder and by name; "" for a file of no split."""
    return {split: of_split[0] for split, of_split in by_split(files, root, by_name=True).items()}


def words_of(file: Path) -> list[str]:
    return re.split("[-_.]", file.stem)


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
        UserError: the file cannot be read, or is in another encoding.
    """
    try:
        data = path.read_bytes()
        return data.decode("utf-16" if data.startswith(_UTF_16) else "utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Fix: check the path and its rights") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not text in UTF-8 ({error}). Fix: save it in UTF-8") from error


def read_json(path: Path, into: type = object) -> object:
    """
    Raises:
        UserError: the file cannot be read, is not JSON, or has other content than `into`.
    """
    text = read_text(path)
    try:
        return msgspec.json.decode(text, type=into)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not the JSON that was expected ({error}). Fix: export it again") from error


def json_keys(file: Path, of_list: bool = False) -> Set[str]:
    """The keys of a JSON file's object, or of the first object of its list; none if the file is anything else. Takes a
    fraction of the time and memory of `read_json`."""
    try:
        text = read_text(file)
        if of_list:
            rows = msgspec.json.decode(text, type=list[msgspec.Raw])
            text = rows[0] if rows else "{}"
        return msgspec.json.decode(text, type=dict[str, msgspec.Raw]).keys()
    except (UserError, msgspec.DecodeError, RecursionError):
        return set()


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) as the image is shown, after EXIF rotation. Reads the header alone, of images of any size.

    Raises:
        UserError: the file is not an image.
    """
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # an orthomosaic is no decompression bomb
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                width, height = image.size
                turned = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}). Fix: replace it, or move it away") from error
    finally:
        Image.MAX_IMAGE_PIXELS = most
    return (height, width) if turned else (width, height)


class ImageFinder:
    """Finds the images that annotation files name, in a folder and its subfolders.

    Names in annotation files have other folders, `\\` for `/`, `%C3%A9` for é, Unicode in another form, or upper case.

    Attributes:
        is_given: whether the user chose the folder.
    """

    def __init__(self, folder: Path, is_given: bool = False):
        self.folder, self.is_given = folder, is_given
        self._names: dict[str, list[str]] = {}  # by the whole name, and by each of its ends
        self._stems: dict[str, list[str]] = {}
        for path in images_below(folder):
            name = path.relative_to(folder).as_posix()
            for end in _ends(same_on_any_disk(name)):
                self._names.setdefault(end, []).append(name)
            self._stems.setdefault(same_on_any_disk(path.stem), []).append(name)

    def __bool__(self) -> bool:
        return bool(self._names)

    def find(self, wanted: str, near: str = "") -> str | None:
        """The name of an image relative to the folder; None if it has no such image.

        Args:
            near: a folder, relative too; of several images the one whose path begins alike is meant.

        Raises:
            ValueError: several images may be meant.
        """
        wanted = wanted.replace("\\", "/")
        for name in dict.fromkeys((wanted, unquote(wanted))):
            if ".." in name.split("/") and not name.startswith(".."):
                continue
            for end in _ends(same_on_any_disk(name)):
                if found := self._names.get(end):
                    return _nearest(found, wanted, near)
        return None

    def find_stem(self, stem: str, near: str = "") -> str | None:
        """The same by the name without folders and ending."""
        found = self._stems.get(same_on_any_disk(stem), [])
        return _nearest(found, stem, near) if found else None

    def size(self, name: str) -> tuple[int, int] | None:
        """(width, height) of an image by the name that `find` returned; None if that is no image's."""
        return image_size(self.folder / name) if (self.folder / name).is_file() else None


def finder_for(source: Path, images: Path | None) -> ImageFinder:
    """The images of `--images`; else those in the source's folder and below; else those of `images` beside it; else
    those of `train2017` and `val2017` beside it."""
    if images is not None:
        return ImageFinder(images, is_given=True)
    folder = source.absolute() if source.is_dir() else source.absolute().parent
    places = folders_in(folder.parent)
    beside = [path for path in places if path.name.lower() in _IMAGES]
    above = [folder.parent] if any(split_of(path.name) for path in places) else []
    finders = (ImageFinder(place) for place in (folder, *beside, *above))
    return next(filter(None, finders), None) or ImageFinder(folder)


def _walk(source: Path, is_wanted: Callable[[str], bool]) -> Iterator[Path]:
    seen = 0
    tree = [(source.parent, [], [source.name])] if source.is_file() else os.walk(source)
    for root, folders, files in tree:
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(root, name) for name in files if is_wanted(name) and not is_hidden(name))
        if (seen := seen + len(files)) > _MOST_FILES:
            break


def _ends(name: str) -> list[str]:
    """ "a/b/c.jpg", "b/c.jpg", "c.jpg"."""
    parts = name.strip("/").split("/")
    return ["/".join(parts[at:]) for at in range(max(len(parts) - _MOST_TAILS, 0), len(parts))]


def _nearest(found: list[str], wanted: str, near: str) -> str:
    exact = [name for name in found if name == wanted] or [n for n in found if n == f"{near}/{wanted}"]
    if len(found) == 1 or exact:
        return (exact or found)[0]

    def alike(name: str) -> tuple[int, int]:
        """How many folders both have, and how many at the beginning; `valid` is `val`."""
        one, other = ([split_of(part) or part for part in path] for path in (name.split("/")[:-1], near.split("/")))
        at_start = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
        return len(set(one) & set(other)), len(list(at_start))

    closest = max(map(alike, found))
    best = [name for name in found if alike(name) == closest]
    usual = [name for name in best if any(part.lower() in _IMAGES for part in name.split("/")[:-1])]
    best = usual if len(usual) == 1 else best
    if len(best) > 1:
        raise ValueError(f"the image {wanted!r} may be {' or '.join(best[:3])}")
    return best[0]
