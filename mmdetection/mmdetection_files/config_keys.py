"""Which keys a config of MMDetection may have: what its classes take, and what the configs have that it ships."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mmcv.cnn.bricks.registry
import mmcv.runner.builder
import mmcv.runner.hooks.hook
import mmcv.runner.optimizer.builder
import mmdet
import mmdet.core.anchor.builder
import mmdet.core.bbox.builder
import mmdet.core.bbox.iou_calculators.builder
import mmdet.core.bbox.match_costs.builder
import mmdet.datasets.builder
import mmdet.models.builder
import mmdet.models.utils.builder
import torch
from mmcv.runner import Fp16OptimizerHook
from mmcv.runner.hooks import HOOKS
from mmcv.utils import Registry
from mmcv.utils.config import DELETE_KEY
from mmdet.datasets.builder import DATASETS

from shared.errors import UserError, nearest

_WITH_REGISTRIES = (
    mmcv.cnn.bricks.registry,
    mmcv.runner.builder,
    mmcv.runner.hooks.hook,
    mmcv.runner.optimizer.builder,
    mmdet.core.anchor.builder,
    mmdet.core.bbox.builder,
    mmdet.core.bbox.iou_calculators.builder,
    mmdet.core.bbox.match_costs.builder,
    mmdet.datasets.builder,
    mmdet.models.builder,
    mmdet.models.utils.builder,
)
ANY_NAME = "custom_keys"  # of an optimizer: parts of parameters' names, each with these
_OF_A_NAME = {"lr_mult", "decay_mult"}
# keys that builders and loaders remove from a section before they call its class
_OF_THE_BUILDERS = {"type", "constructor", "paramwise_cfg", "samples_per_gpu", "workers_per_gpu"}


def shipped_configs() -> Path:
    """The folder of the configs that come with mmdet."""
    package = Path(mmdet.__file__).parent
    return next(folder for folder in (package / ".mim/configs", package.parent / "configs") if folder.is_dir())


def check_keys(new: Mapping[str, Any], old: Any, path: str, where: str) -> None:
    """Raises UserError for the first key that neither is in `old` nor can be: MMDetection itself takes it silently
    and trains something else."""
    if isinstance(old, dict) and old.get("type", new.get("type")) != new.get("type", old.get("type")):
        _refuse_left_over(new, old, path, where)
    for key, value in new.items():
        if key == DELETE_KEY:
            continue
        here = f"{path}.{key}" if path else str(key)
        if isinstance(old, (list, tuple)):
            if not str(key).isdigit() or int(key) >= len(old):
                raise UserError(
                    f"{where}: {path} is a list of {len(old)}. Fix: give a position from 0 to {len(old) - 1} instead "
                    f"of {key!r}"
                )
        elif key not in old:
            # a type that is merged in brings its own arguments
            chosen = {name: new[name] for name in ("type", "policy") if name in new}
            valid = _possible_keys({**old, **chosen}, path)
            if valid is not None and key not in valid:
                raise UserError(f"{where}: unknown key {here!r}{nearest(str(key), {*map(str, old), *valid})}")
        below = item_of(old, str(key))
        if key == ANY_NAME and isinstance(value, Mapping):
            for name, arguments in value.items():
                for wrong in arguments.keys() - _OF_A_NAME if isinstance(arguments, Mapping) else ():
                    raise UserError(f"{where}: unknown key '{here}.{name}.{wrong}'{nearest(wrong, _OF_A_NAME)}")
        elif isinstance(value, Mapping):
            merges = isinstance(below, (dict, list)) and not value.get(DELETE_KEY)
            check_keys(value, below if merges else {}, here, where)


def _refuse_left_over(new: Mapping[str, Any], old: Mapping[str, Any], path: str, where: str) -> None:
    """Raises UserError where `type` changes, and the class that it names now does not take what the section has of
    the old one."""
    classes = list(_registered(new["type"]))
    if not classes or any(_takes_anything(cls) for cls in classes):
        return
    left = [key for key in old if key not in {*new, *_OF_THE_BUILDERS}.union(*map(_arguments, classes))]
    if left:
        raise UserError(
            f"{where}: {path}.type changes from {old['type']} to {new['type']}, which does not take "
            f"{', '.join(map(repr, left))} of the section that it is merged into. Fix: write `_delete_: true` beside "
            "`type`, and the keys that the section needs"
        )


def _takes_anything(callable_: Callable) -> bool:
    try:
        parameters = inspect.signature(callable_).parameters.values()
    except (TypeError, ValueError):  # built in
        return True
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _possible_keys(section: Mapping[str, Any], path: str) -> set[str] | None:
    """The keys that a section of the config may have; None where any may be."""
    name = next((part for part in reversed(path.split(".")) if not part.isdigit()), "")
    if name == "file_client_args":  # each backend's own, which are checked where they are used
        return None
    used = _keys_in_shipped_configs().get(name, set())
    taken_by = _taken_by(section, name)
    if any(callable_ is None for callable_ in taken_by):
        return None
    arguments = set().union(*(_arguments(callable_) for callable_ in taken_by))
    own = {"policy"} if name in ("lr_config", "momentum_config") else {"type"}
    return used | arguments | own if used or arguments else None


def _taken_by(section: Mapping[str, Any], name: str) -> list[Callable | None]:
    """The callables that take the section as arguments; [None] where that is not known."""
    if "type" in section:
        return list(_registered(section["type"])) or [None]
    if name == "lr_config":
        return [HOOKS.get(_policy_hook(section.get("policy", ""), "LrUpdaterHook"))]
    if name == "momentum_config":
        return [HOOKS.get(_policy_hook(section.get("policy", ""), "MomentumUpdaterHook"))]
    if name == "evaluation":
        evaluates = [data.evaluate for data in DATASETS.module_dict.values() if hasattr(data, "evaluate")]
        return [mmdet.core.EvalHook, *evaluates]
    implied = {
        "optimizer_config": HOOKS.get("OptimizerHook"),
        "checkpoint_config": HOOKS.get("CheckpointHook"),
        "fp16": Fp16OptimizerHook,
        "loss_scale": torch.amp.GradScaler,
        "grad_clip": torch.nn.utils.clip_grad_norm_,
        "paramwise_cfg": _paramwise,
    }
    return [implied[name]] if name in implied else []


def _paramwise(
    custom_keys: Any,
    bias_lr_mult: Any,
    bias_decay_mult: Any,
    norm_decay_mult: Any,
    dwconv_decay_mult: Any,
    dcn_offset_lr_mult: Any,
    bypass_duplicate: Any,
) -> None:
    """The arguments of mmcv's DefaultOptimizerConstructor, which it documents and takes as a dict."""


def _policy_hook(policy: str, suffix: str) -> str:
    return (policy.title() if policy == policy.lower() else policy) + suffix


def _registered(kind: Any) -> Iterator[Callable]:
    """The classes that go by a name, in any of the registries of mmcv and mmdet."""
    for registry in _registries():
        if isinstance(kind, str) and (module := registry.module_dict.get(kind)) is not None:
            yield module


@functools.cache
def _registries() -> list[Registry]:
    return [thing for module in _WITH_REGISTRIES for thing in vars(module).values() if isinstance(thing, Registry)]


def _arguments(taken_by: Callable) -> set[str]:
    """The names of its arguments; through **kwargs those of the base classes too."""
    functions = [base.__init__ for base in taken_by.__mro__] if inspect.isclass(taken_by) else [taken_by]
    names: set[str] = set()
    for function in functions:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # built in
            continue
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return names - {"self"}


@functools.cache
def _keys_in_shipped_configs() -> dict[str, set[str]]:
    """For each section's name the keys that mmdet's own configs give it; "" for the top."""
    loader = {"samples_per_gpu", "workers_per_gpu", "persistent_workers", "pin_memory"}
    loaders = {f"{split}_dataloader" for split in ("train", "val", "test")}
    keys: dict[str, set[str]] = {  # those that MMDetection documents, and its configs do not happen to use
        "": {"custom_imports", "fp16", "classes", "momentum_config"},
        "data": loaders | loader,
        **{name: set(loader) for name in (*loaders, "val", "test")},
    }

    def walk(node: ast.AST, section: str) -> None:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
            for keyword in node.keywords:
                if keyword.arg is not None:
                    keys.setdefault(section, set()).add(keyword.arg)
                    walk(keyword.value, keyword.arg)
        elif isinstance(node, (ast.List, ast.Tuple)):
            for item in node.elts:
                walk(item, section)

    for path in shipped_configs().rglob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                name = statement.targets[0].id
                keys[""].add(name)
                walk(statement.value, name)
    return keys


def variables_of(path: Path) -> set[str]:
    """The names that a Python config assigns to use them below: no keys of the config."""
    if path.suffix != ".py":
        return set()
    tree = ast.parse(path.read_text())
    top = {s.targets[0].id for s in tree.body if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name)}
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return {name for name in top & read if name not in _keys_in_shipped_configs()[""]}


def item_of(section: Any, key: str) -> Any:
    if isinstance(section, dict):
        return section.get(key)
    if isinstance(section, list) and key.isdigit() and int(key) < len(section):
        return section[int(key)]
    return None
