"""The resolved config in a run's folder and in checkpoints: data, which names no code, whoever wrote it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmcv import Config

from shared.durable import write_file
from shared.errors import UserError
from shared.log import without_secrets

RESOLVED_CONFIG = "mmdet_config.py"
# mmcv.load unpickles some files, and a YAML file may call any function there
_EXECUTED = {"py", "pyc", "so", "pkl", "pickle", "yaml", "yml"}
# weights, which are read without executing anything
_WEIGHTS = {"checkpoint", "pretrained", "teacher_ckpt", "load_from", "resume_from"}


def write_resolved(config: Config, folder: Path) -> None:
    """The resolved config as a file that MMDetection reads too, of literals only."""
    plain = without_secrets(config._cfg_dict.to_dict())
    lines = [f"{name} = {value!r}\n" for name, value in plain.items()]
    write_file(folder / RESOLVED_CONFIG, "".join(lines))


def read_resolved(path: Path) -> Config:
    """What `write_resolved` wrote, without executing it.

    Raises:
        UserError: it holds more than literals.
    """
    try:
        statements = ast.parse(path.read_text()).body
        return Config({statement.targets[0].id: ast.literal_eval(statement.value) for statement in statements})
    except (SyntaxError, ValueError, AttributeError, TypeError, OSError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{path} is not a resolved config of this project: {error}. Fix: give a checkpoint of "
            "mmdetection/model_def.py"
        ) from error


def imported_modules(config: Config) -> list[str]:
    """The names in a config's `custom_imports`."""
    section = config.get("custom_imports") or {}
    names = section.get("imports") or [] if isinstance(section, Mapping) else section
    return [names] if isinstance(names, str) else [str(name) for name in names]


def places_of_code(section: Any, shipped: Path, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Where a config names what MMDetection executes, unpickles or imports from, or a file that it writes.

    Args:
        shipped: the folder of the configs that come with mmdet, which a config may name.

    Returns:
        The keys that lead to each value, and the value.
    """
    if isinstance(section, Mapping):
        items = section.items()
    else:
        items = enumerate(section) if isinstance(section, (list, tuple)) else ()
    for key, value in items:
        here = (*place, str(key))
        if key == "sys_path" or (isinstance(value, str) and _is_code(here, value, shipped)):
            yield here, value
        else:
            yield from places_of_code(value, shipped, here)


def _is_code(place: tuple[str, ...], value: str, shipped: Path) -> bool:
    key = place[-1]
    if key == "teacher_config":
        return place != ("model", key) or shipped_teacher(value, shipped) is None
    if key == "hierarchy_file":  # of OpenImages: np.load unpickles it, whatever its name
        return not value.endswith(".json")
    if key.endswith("file_prefix"):  # of `evaluation`: results are written there
        return True
    return key not in _WEIGHTS and value.lower().rpartition(".")[2] in _EXECUTED


def shipped_teacher(name: str, shipped: Path) -> Path | None:
    """A teacher's config among those that mmdet ships, which say where it is from the root of its repository."""
    path = (shipped / name.removeprefix("configs/")).resolve()
    return path if path.is_relative_to(shipped.resolve()) and path.is_file() else None
