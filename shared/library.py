"""What detectors of a library with configs of its own have in common: configs, modules of the user's, weights."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

from shared.errors import UserError, nearest

logger = logging.getLogger(__name__)

# `weights`: what the library publishes for `config_file`
PUBLISHED = "published"
_LEAST = 0.25  # of a model's weights: a backbone is more


def find_library_config(name: str, submitted: Path, shipped: Path, key: str) -> Path:
    """The path of a detector library's config: in the folder submitted, else among those that the library ships.

    Raises:
        UserError: it is in neither; says where it was looked for, and near names.
    """
    for place in (submitted, shipped):
        if (place / name).is_file():
            return (place / name).absolute()
    folders = (submitted / "configs", shipped)
    files = [(path, folder) for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".yaml")]
    known = {str(path.relative_to(submitted if folder != shipped else shipped)) for path, folder in files}
    alike = [other for other in known if Path(other).stem == Path(name).stem]
    by_file_name = sorted(alike, key=lambda other: (Path(other).suffix != Path(name).suffix, other))
    listed = f"they are listed in {shipped}"
    near = f"did you mean {by_file_name[0]!r}?" if by_file_name else nearest(name, known, otherwise=listed)
    raise UserError(f"hyperparameters.{key}: {name} is neither in {submitted} nor in {shipped}; {near}")


def import_custom_modules(names: Iterable[str]) -> list[ModuleType]:
    """The user's own modules, of `hyperparameters.custom_imports`: files of the folder submitted (`my_data.py`), or
    names of modules.

    Raises:
        UserError: one cannot be imported.
    """
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name.removesuffix(".py").replace("/", ".")))
        except Exception as error:  # the user's own module may raise anything
            raise UserError(
                f"hyperparameters.custom_imports: {name} cannot be imported: {type(error).__name__}: {error}; it must "
                "lie in the folder that is submitted, or be installed"
            ) from error
    return modules


def log_loaded(loaded: int, total: int, source: str, anew: Mapping[str, list[str]]) -> None:
    """One line of how many of a model's weights came from `source`, and which start anew.

    Args:
        anew: names of weights, by the reason.

    Raises:
        UserError: they are so few that the weights are another model's, of which some names are the same by chance.
    """
    parts = [
        f"; {len(names)} {reason} and start anew ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for reason, names in anew.items()
        if names
    ]
    if loaded < _LEAST * total:
        raise UserError(
            f"{source} is of another model: only {loaded} of this one's {total} weights are in it{''.join(parts)}; use "
            "the config that it was trained with"
        )
    logger.info("weights: %d of the model's %d from %s%s", loaded, total, source, "".join(parts))
