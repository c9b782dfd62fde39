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
from detectron2.data.transforms import Augmentation
from detectron2.utils.registry import locate
from fvcore.common.param_scheduler import ParamScheduler
from fvcore.transforms.transform import Transform
from omegaconf import DictConfig, ListConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from shared.durable import write_file
from shared.errors import UserError
from shared.log import without_secrets

OF_CONFIG = "_value_of_config_"
_NAMED, _TUPLE, _PARTIAL, _KEYWORDS = "_named_", "_tuple_", "_partial_", "keywords"

# The classes that a checkpoint's config may call derive from these, ...
_BASES = (nn.Module, torch.optim.Optimizer, ParamScheduler, Augmentation, Transform, enum.Enum)
# ... and are of these parts of the libraries.
_PARTS = (
    "detectron2.data.transforms",
    "detectron2.layers",
    "detectron2.modeling",
    "detectron2.projects",
    "detectron2.solver",
    "detectron2.structures",
    "fvcore.common.param_scheduler",
    "fvcore.nn",
    "fvcore.transforms",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
)
# These derive from nn.Module too, and load what their arguments name: pickles and Python files.
_LOADERS = {f"detectron2.modeling.mmdet_wrapper.{name}" for name in ("MMDetBackbone", "MMDetDetector")}
# Everything else that a checkpoint's config may call.
_SINGLE_NAMES = {
    "detectron2.data.dataset_mapper.DatasetMapper",
    "detectron2.layers.shape_spec.ShapeSpec",
    "detectron2.modeling.backbone.resnet.ResNet.make_default_stages",
    "detectron2.modeling.backbone.resnet.ResNet.make_stage",
    "detectron2.modeling.backbone.vit.get_vit_lr_decay_rate",
    "detectron2.modeling.box_regression.Box2BoxTransform",
    "detectron2.modeling.box_regression.Box2BoxTransformLinear",
    "detectron2.modeling.box_regression.Box2BoxTransformRotated",
    "detectron2.modeling.matcher.Matcher",
    "detectron2.solver.build.get_default_optimizer_params",
    "torch._C._nn.gelu",
    "torch._C._nn.hardswish",
    "torch._C._nn.leaky_relu",
    "torch.nn.functional.gelu",
    "torch.nn.functional.hardswish",
    "torch.nn.functional.leaky_relu",
    "torch.nn.functional.mish",
    "torch.nn.functional.relu",
    "torch.nn.functional.relu6",
    "torch.nn.functional.silu",
}
# A data loader's section may name these. They are not called: the trial has loaders and evaluators of its own.
_LOADER_PARTS = ("detectron2.data", "detectron2.evaluation")
# What the trial builds from a config.
_BUILT = ("model", "optimizer", "lr_multiplier", "dataloader.train.mapper", "dataloader.test.mapper")
_GIVE_OWN = "give the config that it was trained with: --set hyperparameters.config_file=…"
# `${…}` of another key; a resolver, `${oc.create:…}`, could make a `_target_` that nobody has looked at
_REFERENCE = re.compile(r"\$\{[\w.\[\]]+\}")


def write_plain(cfg: DictConfig, path: Path, origin_of: Callable[[str], str]) -> None:
    """Writes `cfg` for `read_plain`.

    Args:
        origin_of: from a dotted key to the file of the config whose value it is.
    """
    content = OmegaConf.to_container(cfg, resolve=False, structured_config_mode=SCMode.INSTANTIATE)
    plain = without_secrets(_encoded(content, "", origin_of))
    write_file(path, yaml.safe_dump(plain, default_flow_style=None, allow_unicode=True, width=9999))


def read_plain(path: Path, modules: Sequence[str]) -> DictConfig:
    """What `write_plain` wrote. It calls single classes and functions that make detectors, and what `modules` define.

    Raises:
        UserError: it is not YAML, not plain, or calls something else; says which key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is not the plain YAML that a checkpoint holds, and is not read: {reason}. Fix: {_GIVE_OWN}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no config: the checkpoint is incomplete. Fix: give another checkpoint")
    names = _Names(path, tuple(modules))
    try:
        cfg = OmegaConf.create(_decoded(content, "", names), flags={"allow_objects": True})
        for key in _BUILT:
            built = functools.reduce(
                lambda node, part: isinstance(node, DictConfig) and node.get(part), key.split("."), cfg
            )
            _check_calls(built, key, names)
    except UserError:
        raise
    except (OmegaConfBaseException, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged, or refers to itself: {reason}. Fix: {_GIVE_OWN}") from error
    return cfg


def _check_calls(node: Any, key: str, names: _Names) -> None:
    """Raises UserError if a part that is built calls what it may not. References are followed: `${…}` can bring a
    section into a model that only a data loader has."""
    if isinstance(node, DictConfig):
        below = {name: f"{key}.{name}" for name in node}
    else:
        below = {i: f"{key}[{i}]" for i in range(len(node))} if isinstance(node, ListConfig) else {}
    for name, place in below.items():
        if OmegaConf.is_missing(node, name):
            continue
        if name == "_target_" and not isinstance(node[name], DictConfig):
            names.found(node[name], place)
        else:
            _check_calls(node[name], place, names)


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
    """The dotted name under which a class or a function is found again; ValueError: the name leads to nothing."""
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
    """Names that a file may contain: what makes detectors, and what is defined in the user's `modules`."""

    path: Path
    modules: tuple[str, ...]

    def found(self, name: Any, key: str, is_called: bool = True) -> Any:
        """The object of a dotted name.

        Args:
            is_called: whether something is built of it.

        Raises:
            UserError: a checkpoint may not name it.
        """
        if not isinstance(name, str):
            raise self.refusal(name, key)
        if re.fullmatch(r"torch\.\w+", name) and isinstance(value := getattr(torch, name[6:], None), torch.dtype):
            return value
        loader_parts = () if is_called else _LOADER_PARTS
        if not _is_of(name, (*_PARTS, *_SINGLE_NAMES, *loader_parts, *self.modules)):  # `locate` imports
            raise self.refusal(name, key)
        try:
            value = locate(name)
        except Exception as error:  # it imports, and modules raise anything
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{self.path}: {key}: {name} cannot be imported: {reason}. Fix: install the package, or put the module "
                "into the detector's folder"
            ) from error
        # a module's own imports are found in it too: detectron2.data.build.pickle.loads
        defined = f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', None)}"
        if not (_is_of(defined, (*loader_parts, *self.modules)) or _makes_detectors(value, defined)):
            raise self.refusal(name, key)
        return value

    def refusal(self, name: Any, key: str) -> UserError:
        module = name.rpartition(".")[0] if isinstance(name, str) else ""
        fix = f"if you trust it, name its module in your config, hyperparameters.custom_imports: [{module}]"
        return UserError(
            f"{self.path}: {key}: {name!r} is not called because a checkpoint says so. Fix: "
            + (fix if module else _GIVE_OWN)
        )


def _is_of(name: str, parts: Sequence[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _makes_detectors(value: Any, defined: str) -> bool:
    """Whether a class or function, by the name under which it is defined, makes a part of a detector and no more."""
    if isinstance(value, enum.Enum):
        return _is_of(type(value).__module__, _PARTS)
    is_part = isinstance(value, type) and issubclass(value, _BASES) and _is_of(value.__module__, _PARTS)
    return defined in _SINGLE_NAMES or (is_part and defined not in _LOADERS)


def _decoded(value: Any, key: str, names: _Names) -> Any:
    if isinstance(value, list):
        return [_decoded(item, f"{key}[{i}]", names) for i, item in enumerate(value)]
    if isinstance(value, str) and "${" in _REFERENCE.sub("", value):
        raise UserError(
            f"{names.path}: {key}: {value!r} is not evaluated because a checkpoint says so. Fix: {_GIVE_OWN}"
        )
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
        names.found(target, f"{key}._target_", is_called=_is_of(key, _BUILT) or not _is_of(key, ("dataloader",)))
    return {k: _decoded(v, f"{key}.{k}" if key else str(k), names) for k, v in value.items()}
