"""The result of a reader: images with their annotations, per split, before they become COCO's."""

from __future__ import annotations

import contextlib
import csv
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from shared.data.convert.files import ImageFinder
from shared.errors import UserError


@dataclass(frozen=True)
class Options:
    """The options of the command line that a reader needs.

    Attributes:
        images: the folder of the images.
        labels: "" or what the numbers of YOLO's labels mean: "boxes", "polygons", "oriented" or "keypoints:17x3".
        boxes: "" or what the four numbers of a table's boxes are: "xywh" or "xyxy".
        categories: the categories and their order: a text file with a name per line, or a COCO file.
        without_val: a validation split that the source names, and that does not exist, is a note instead of an error.
        extracted: the folder for images that are written: those inside the source's own files, or tiles.
        tiles, overlap: pixels of a tile's side, and the share of it that the next one shows too.
    """

    images: Path | None = None
    labels: str = ""
    boxes: str = ""
    categories: Path | None = None
    without_val: bool = False
    extracted: Path | None = None
    tiles: int = 640
    overlap: float = 0.2


@dataclass
class Split:
    """The content of one COCO file.

    Attributes:
        finder: finds the images that the annotation files name; None if their folder is known.
        images: COCO images; "annotations" holds each image's annotations, "category" the category's name in each.
        folder: the folder that the file names are relative to, if it is known.
        counts: how many things the reader omitted or changed, by a phrase for the summary.
        crowds: the summary's name for annotations with `iscrowd`.
        found: the names in the annotation files of images, by the names in the folder.
    """

    finder: ImageFinder | None = field(default=None, compare=False)
    images: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None
    counts: Counter[str] = field(default_factory=Counter)
    crowds: str = "crowds"
    found: dict[str, str] = field(default_factory=dict)

    def find_image(self, wanted: str, near: str = "", stem: str = "") -> str:
        """The name of an image in the finder's folder. An image that is not there keeps its name, and is counted.

        Args:
            near: the folder of the annotation file, relative to the finder's; of several images a near one is meant.
            stem: the name without ending to look for next, of the annotation file itself.

        Raises:
            ValueError: several images may be meant.
        """
        found = self.finder.find(wanted, near) if wanted else None
        name = PurePosixPath(wanted.replace("\\", "/"))
        # an annotation file's own name, then names with another ending, or without one
        for one in filter(None, (stem, name.name, name.stem)):
            found = found or self.finder.find_stem(one, near)
        if found is None:
            if self.finder:
                self.counts["images that are not in the folder"] += 1
            return wanted.replace("\\", "/") or stem
        self.found[found] = wanted
        return found

    def settle(self) -> None:
        """Sets the folder to the deepest one that suits all images that were found, and their names to match. The
        folder of `--images` stays."""
        if self.finder is None or not (self.finder.is_given or self.found):
            return
        self.folder = self.finder.folder
        if self.finder.is_given:
            return
        are_ends = all(f"/{name}".endswith(f"/{wanted}") for name, wanted in self.found.items())
        prefix, *others = {name.removesuffix(wanted) for name, wanted in self.found.items()}
        if others or not are_ends:
            folders = {name.rpartition("/")[0] for name in self.found}
            common = "" if "" in folders else os.path.commonpath(folders)
            prefix = f"{common}/" if common else ""
        self.folder = self.finder.folder / prefix
        for image in self.images:
            if image["file_name"] in self.found:
                image["file_name"] = image["file_name"][len(prefix) :]

    def add_image(self, file_name: str, size: tuple[int, int], annotations: list[dict[str, Any]], **more: Any) -> None:
        """
        Args:
            size: (width, height) in pixels.
            annotations: those without area are omitted and counted.
        """
        kept = [annotation for annotation in annotations if min(annotation["bbox"][2:]) > 0]
        if len(kept) < len(annotations):
            self.counts["boxes left out (without area)"] += len(annotations) - len(kept)
        width, height = size
        self.images.append({**more, "file_name": file_name, "width": width, "height": height, "annotations": kept})


@dataclass
class Contents:
    """A whole source.

    Attributes:
        splits: by name: "train", "val", "test"; "" if the source has no splits.
        categories: COCO's, with or without ids, in the order of the ids; [] to collect and sort the names in use.
        notes: sentences for the user.
    """

    splits: dict[str, Split]
    categories: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Format(NamedTuple):
    """A format that can be converted.

    Attributes:
        about: the source, in a few words.
        recognise: what it saw in a source, or "".
        read: reads a source.
    """

    about: str
    recognise: Callable[[Path], str]
    read: Callable[[Path, Options], Contents]


def names_in_use(splits: Iterable[Split]) -> list[str]:
    """The names of the categories that the annotations have, sorted."""
    return sorted({a["category"] for split in splits for image in split.images for a in image["annotations"]})


# what readers and libraries raise about the content of a file
_WRONG_CONTENT = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, SyntaxError, RecursionError)
_WRONG_CONTENT += (MemoryError, csv.Error)


@contextlib.contextmanager
def errors_in(place: object, fix: str = "correct the file, or move it away") -> Iterator[None]:
    """Raises what goes wrong with a file as a UserError that names the place."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{place}: cannot be read ({error.strerror or error}). Fix: check the path and its rights"
        ) from error
    except KeyError as error:
        raise UserError(f"{place}: {error} is missing. Fix: {fix}") from error
    except _WRONG_CONTENT as error:
        raise UserError(f"{place}: {error}. Fix: {fix}") from error
