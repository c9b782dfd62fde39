"""Errors that a user can fix: shown as a single line, without a traceback. Imports no torch at the top."""

from __future__ import annotations

import contextlib
import difflib
import glob
import json
import os
import time
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

_FEW = 10  # valid names that an error lists


class UserError(ValueError):
    """Bad input. The message names the problem, its place (file, key, image id) and the fix."""


class DivergedError(ArithmeticError):
    """The loss is not finite. More training would only destroy the weights."""


def problem_of(error: Exception) -> str:
    """An error's message without its fix, for a message that has another one."""
    return str(error).partition(". Fix: ")[0]


def similar_names(name: str, valid: Iterable[str]) -> list[str]:
    """At most three valid names that may be meant by an unknown one, the nearest first."""
    valid = sorted(set(valid))
    initials = "".join(word[:1] for word in name.split("_"))
    parts = [name_ for name_ in valid if name_.startswith(f"{name}_") or name_.endswith(f"_{name}")]
    parts += [name_ for name_ in valid if name_ == initials and len(initials) > 1]  # learning_rate: lr
    other_case = [name_ for name_ in valid if name_.casefold() == name.casefold()]
    if found := other_case or parts:
        return found[:3]
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    likeness = [difflib.SequenceMatcher(None, each, name).ratio() for each in close]
    return [each for each, like in zip(close, likeness, strict=True) if like > likeness[0] - 0.1]


def any_of(names: Iterable[object]) -> str:
    """ "'a', 'b' or 'c'"."""
    *first, last = map(repr, names)
    return f"{', '.join(first)} or {last}" if first else last


def nearest(name: str, valid: Iterable[str], otherwise: str | None = None) -> str:
    """The end of an error message about an unknown name: at most three similar ones, else `otherwise`, else all of a
    few valid ones."""
    valid = sorted(set(valid))
    if close := similar_names(name, valid):
        return f"; did you mean {any_of(close)}?"
    if otherwise is None and len(valid) > _FEW:
        valid = [*difflib.get_close_matches(name, valid, n=3, cutoff=0), "…"]
    return f". Fix: {otherwise or 'use one of ' + ', '.join(valid)}"


def nearest_path(path: str) -> str:
    """The end of an error message about a path that does not exist: a similar path that does."""
    missing = Path(path)
    folder = next(parent for parent in missing.absolute().parents if parent.is_dir())
    name = missing.absolute().relative_to(folder).parts[0]
    others = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    alike = [other for other in others if same_on_any_disk(other) == same_on_any_disk(name)]
    # the endings do not count: cells.yaml and const.yaml are not alike
    near = [other for other in sorted(others) if difflib.get_close_matches(Path(name).stem, [Path(other).stem])]
    alike += difflib.get_close_matches(name, near, n=1, cutoff=0)
    deeper = sorted(str(found) for found in folder.glob(f"*/{glob.escape(name)}"))
    if alike or deeper:
        return f"did you mean {folder / alike[0] if alike else deeper[0]}?"
    return f"{folder} {'has no ' + name if others else 'is empty'}. Fix: correct the path"


def same_on_any_disk(name: str) -> str:
    """The name without upper case, and with accents encoded in one way. Two names with the same result are one file on
    some disks, as on macOS."""
    return unicodedata.normalize("NFC", name).casefold()


def check_outputs(option: str, outputs: Iterable[Path], inputs: Iterable[str | os.PathLike | None]) -> None:
    """Raises UserError if one of the files to write is an input.

    Args:
        option: the command line's option, for the error.
        inputs: files, folders, URLs or None.
    """
    there = [os.fspath(path) for path in inputs if path is not None and os.path.exists(path)]
    for output in outputs:
        if output.exists() and any(os.path.samefile(output, path) for path in there):
            raise UserError(f"{option}: {output} would be replaced, and is an input. Fix: give another name or folder")


def count_of(number: int, what: str) -> str:
    """ "1 slot", "2 slots", "2 boxes", "2 batches", "2 categories"."""
    if number == 1:
        return f"1 {what}"
    if what.endswith("y"):
        return f"{number} {what[:-1]}ies"
    return f"{number} {what}{'es' if what.endswith(('x', 'ch')) else 's'}"


@contextlib.contextmanager
def unwritable_as_error(what: object, fix: str = "free some space, or give another folder") -> Iterator[None]:
    """Raises UserError if a file cannot be written.

    Args:
        what: the file, for the error.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror or error}. Fix: {fix}") from error


def tell_torchrun(line: str) -> None:
    """Hands the line with which this process exits to torchrun, if it started the process: its report comes last."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        failure = {"message": line, "extraInfo": {"timestamp": int(time.time())}}
        Path(path).write_text(json.dumps({"message": failure}))


# --- a GPU's memory --------------------------------------------------------------------------------


@contextlib.contextmanager
def out_of_memory_as_error(
    fix: str = "stop other programs that use this GPU (`nvidia-smi` lists them), or give a smaller "
    "hyperparameters.global_batch_size, or hyperparameters.amp",
) -> Iterator[None]:
    """Raises UserError if the GPU's memory is not enough."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        said = str(error).strip().partition("\n")[0].partition(" If reserved but")[0].rstrip(".")
        raise UserError(f"{said}. Fix: {fix}") from error
