"""Finds a checkpoint's detector: the class in a `model_def.py` here. The checkpoint's own code never runs."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from shared.errors import UserError
from shared.training.checkpoints import Checkpoint
from shared.training.trial import DetectionTrial

_FILE = "model_def.py"


def trial_class_of(checkpoint: Checkpoint, folder: str | Path | None = None) -> type[DetectionTrial]:
    """The trial's class, from the detector's folder.

    Args:
        folder: the detector's folder. None looks in the working directory, in the repository of this file, and in the
            folders of both.

    Raises:
        UserError: no `model_def.py` there has the class, or a package of the detector is not installed.
    """
    name = checkpoint.trial_class
    places = _places() if folder is None else [Path(folder).expanduser()]
    file = next((place / _FILE for place in places if name in _classes_in(place / _FILE)), None)
    if file is None:
        where = " or ".join(dict.fromkeys(str(place) for place in (places[:1] if folder else _roots())))
        raise UserError(
            f"{checkpoint.path}: no {_FILE} in {where} has its detector, the class {name}. Fix: give the detector's "
            "folder, Predictor(…, detector=FOLDER)"
        )
    return getattr(_module(file.resolve()), name)


def _roots() -> list[Path]:
    return [Path.cwd(), Path(__file__).resolve().parents[2]]


def _places() -> list[Path]:
    """The folders to look in: not the `code` that a run and a checkpoint keep, which may come from strangers."""
    below = {root: sorted(file.parent for file in root.glob(f"*/{_FILE}")) for root in _roots()}
    return [place for root, folders in below.items() for place in (root, *folders) if place.name != "code"]


def _classes_in(file: Path) -> set[str]:
    """The classes that a file defines, without running it."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):  # not the detector that is looked for
        return set()
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def _module(file: Path) -> ModuleType:
    """The module of a file, imported once."""
    for module in list(sys.modules.values()):
        if (known := getattr(module, "__file__", None)) and known.endswith(_FILE) and Path(known).resolve() == file:
            return module
    name = f"{file.parent.name}_model_def"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # loader workers pickle by it
    sys.path.insert(0, str(file.parent))  # what stands beside it
    try:
        with _own_excepthook():
            spec.loader.exec_module(module)
    except (ImportError, SystemExit) as error:
        del sys.modules[name]
        raise UserError(
            f"{file}: the detector cannot be imported: {error}. Fix: pip install -r {file.parent / 'requirements.txt'}"
        ) from error
    return module


@contextlib.contextmanager
def _own_excepthook() -> Iterator[None]:
    """Restores `sys.excepthook`: a detector replaces that of its program, and this program is the user's."""
    kept = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = kept
