"""Formats with a text file per image, a line per object, in pixels: the files and their images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.data.convert.contents import Contents, Options, Split, errors_in
from shared.data.convert.files import by_split, files_below, finder_for, read_text
from shared.errors import UserError

_TRIED = 10  # files, for one with a line


def looks_like(source: Path, is_line: Callable[[list[str]], bool]) -> str:
    """A description, if the first lines of the text files in a folder are the format's; else ""."""
    files = files_below(source, (".txt",)) if source.is_dir() else []
    for file in files[:_TRIED] + files[_TRIED :: max(len(files) // _TRIED, 1)]:
        try:
            words = next((line.split() for line in read_text(file).splitlines() if line.strip()), None)
        except UserError:
            continue
        if words is not None and is_line(words):
            return f"{len(files)} text files, {file.relative_to(source)} begins with {' '.join(words)[:60]!r}"
    return ""


def read_folder(
    source: Path, options: Options, row_of: Callable[[str, Split], dict[str, Any] | None], crowds: str = "crowds"
) -> Contents:
    """
    Args:
        row_of: the annotation of a line; None for a header, and for an object that it has counted.

    Raises:
        UserError: a line is not the format's, or no label file has an image.
    """
    if not source.is_dir():
        raise UserError(f"{source}: is not a folder. Fix: give the folder of the label files, or the one above it")
    finder = finder_for(source, options.images)
    splits = {}
    for split, files in by_split(files_below(source, (".txt",)), source).items():
        part = splits[split] = Split(finder, crowds=crowds)
        for file in files:
            with errors_in(file):
                near = file.parent.relative_to(source).as_posix()
                name = finder.find_stem(file.stem, near)
            if name is None:
                part.counts["label files left out (without an image)"] += 1
                continue
            part.found[name] = name.rpartition("/")[2]
            rows = []
            for number, line in enumerate(read_text(file).splitlines(), 1):
                if line.strip():
                    with errors_in(f"{file}: line {number}", "correct the line, or delete it"):
                        rows.append(row_of(line.strip(), part))
            part.add_image(name, finder.size(name), [row for row in rows if row is not None])
    if not any(part.images for part in splits.values()):
        raise UserError(f"{source}: no label file has an image with its name. Fix: pass --images FOLDER")
    return Contents(splits)
