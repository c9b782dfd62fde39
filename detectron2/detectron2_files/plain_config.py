"""A LazyConfig as plain YAML, and back without executing what a checkpoint says.

What YAML cannot hold stands as a mapping: `{_named_: torch.nn.LayerNorm}` for a class, a function, a dtype or a member
of an enum, `{_tuple_: […]}`, `{_partial_: […], keywords: {…}}`, and `{_value_of_config_: file}` for what only the
config's own file can give, a lambda for one.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf, SCMode

from shared.errors import UserError
from shared.redaction import without_secrets

OF_CONFIG = "_value_of_config_"
_NAMED, _TUPLE, _PARTIAL, _KEYWORDS = "_named_", "_tuple_", "_partial_", "keywords"

# whose classes and functions make a detector, and do nothing else; detectron2.config or torch.hub execute files
_PACKAGES = (
    "detectron2.data",
    "detectron2.evaluation",
    "detectron2.layers",
    "detectron2.modeling",
    "detectron2.projects",
    "detectron2.solver",
    "detectron2.structures",
    "fvcore.common.param_scheduler",
    "fvcore.nn",
    "fvcore.transforms",
    "torch.nn",
    "torch._C._nn",
    "torch.optim",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
)
# `${…}` of another key; a resolver, `${oc.create:…}`, could make a `_target_` that nobody has looked at
_REFERENCE = re.compile(r"\$\{[\w.\[\]]+\}")


def write_plain(cfg: DictConfig, path: Path, origin_of: Callable[[str], str]) -> None:
    """Writes `cfg` for `read_plain`.

    Args:
        origin_of: from a dotted key to the file of the config whose value it is.
    """
    content = OmegaConf.to_container(cfg, resolve=False, structured_config_mode=SCMode.INSTANTIATE)
    plain = without_secrets(_encoded(content, "", origin_of))
    path.write_text(yaml.safe_dump(plain, default_flow_style=None, allow_unicode=True, width=9999), encoding="utf-8")


def read_plain(path: Path, modules: Sequence[str]) -> DictConfig:
    """What `write_plain` wrote. What it names is of the libraries' parts that make detectors, or of `modules`.

    Raises:
        UserError: it is not YAML, not plain, or names something else; says which key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is not the plain YAML that a checkpoint holds, and is not read: {reason}. Give the config that it "
            "was trained with: --set hyperparameters.config_file=…"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no config; the checkpoint is not whole")
    decoded = _decoded(content, "", _Names(path, (*_PACKAGES, *modules)))
    return OmegaConf.create(decoded, flags={"allow_objects": True})


# --- writing ----------------------------------------------------------------------------------------


def _encoded(value: Any, key: str, origin_of: Callable[[str], str]) -> Any:
    """The plain form of a value at a dotted key."""
    if isinstance(value, dict):
        return {k: _encoded(v, f"{key}.{k}" if key else str(k), origin_of) for k, v in value.items()}
    if isinstance(value, list):
        return [_encoded(item, f"{key}[{i}]", origin_of) for i, item in enumerate(value)]
    try:
        plain = _plain(value)
    except ValueError:
        return {OF_CONFIG: origin_of(key)}
    return plain[_NAMED] if key.endswith("_target_") and isinstance(plain, dict) and _NAMED in plain else plain


def _plain(value: Any) -> Any:
    """Raises ValueError for what has no plain form."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.dtype):
        return {_NAMED: str(value)}
    if isinstance(value, enum.Enum):
        return {_NAMED: f"{_name_of(type(value))}.{value.name}"}
    if isinstance(value, functools.partial):
        return {
            _PARTIAL: [_plain(value.func), *map(_plain, value.args)],
            _KEYWORDS: {name: _plain(item) for name, item in value.keywords.items()},
        }
    if isinstance(value, tuple):
        return {_TUPLE: [_plain(item) for item in value]}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"_target_": _name_of(type(value)), **fields}
    return {_NAMED: _name_of(value)}


def _name_of(value: Any) -> str:
    """The dotted name under which a class or a function is found again; ValueError where there is none."""
    name = f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', None)}"
    try:
        found = locate(name)
    except Exception as error:  # it imports, and modules raise anything
        raise ValueError(name) from error
    if found is not value and found != value:
        raise ValueError(name)
    return name


# --- reading ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Names:
    """What a file may name: what is defined in `packages`."""

    path: Path
    packages: tuple[str, ...]

    def found(self, name: Any, key: str) -> Any:
        """What a dotted name stands for; UserError for one that is not to be had from a checkpoint."""
        if not isinstance(name, str):
            raise self.refusal(name, key)
        if re.fullmatch(r"torch\.\w+", name) and isinstance(value := getattr(torch, name[6:], None), torch.dtype):
            return value
        if name == "functools.partial":
            return functools.partial
        if not self._has(name):
            raise self.refusal(name, key)
        try:
            value = locate(name)
        except Exception as error:  # it imports, and modules raise anything
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{self.path}: {key}: {name} cannot be imported: {reason}") from error
        # a module's own imports are found in it too: detectron2.data.build.pickle.loads
        if not self._has(f"{getattr(value, '__module__', None)}."):
            raise self.refusal(name, key)
        return value

    def _has(self, name: str) -> bool:
        return any(name.startswith(f"{package}.") for package in self.packages)

    def refusal(self, name: Any, key: str) -> UserError:
        return UserError(
            f"{self.path}: {key}: {name!r} is not called because a checkpoint says so; what it may name is of "
            f"{', '.join(self.packages)}. Is it of a Python file of yours, name that: "
            "--set 'hyperparameters.custom_imports=[file.py]'"
        )


def _decoded(value: Any, key: str, names: _Names) -> Any:
    if isinstance(value, list):
        return [_decoded(item, f"{key}[{i}]", names) for i, item in enumerate(value)]
    if isinstance(value, str) and "${" in _REFERENCE.sub("", value):
        raise UserError(f"{names.path}: {key}: {value!r} is not evaluated because a checkpoint says so")
    if not isinstance(value, Mapping):
        return value
    if set(value) == {_NAMED}:
        return names.found(value[_NAMED], key)
    if set(value) == {_TUPLE}:
        return tuple(_decoded(value[_TUPLE], key, names))
    if set(value) == {_PARTIAL, _KEYWORDS}:
        function, *arguments = _decoded(value[_PARTIAL], key, names)
        return functools.partial(function, *arguments, **_decoded(value[_KEYWORDS], key, names))
    if isinstance(target := value.get("_target_"), Mapping) and set(target) == {OF_CONFIG}:
        pass  # of the user's own file
    elif target is not None or "_target_" in value:
        names.found(target, f"{key}._target_")
    return {k: _decoded(v, f"{key}.{k}" if key else str(k), names) for k, v in value.items()}
