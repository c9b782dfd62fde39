"""MMDetection's config: found, merged, overridden and checked; and who decides what in it."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
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
import numpy as np
import torch
from mmcv import Config, ConfigDict
from mmcv.runner import Fp16OptimizerHook
from mmcv.runner.hooks import HOOKS
from mmcv.utils import Registry, import_modules_from_strings
from mmcv.utils.config import DELETE_KEY
from mmdet.datasets.builder import DATASETS
from mmdet.utils import compat_cfg

from mmdetection_files.saved_config import (
    RESOLVED_CONFIG,
    imported_modules,
    places_of_code,
    read_resolved,
    shipped_teacher,
)
from mmdetection_hyperparameters import MMDetectionData, MMDetectionHyperparameters
from shared.config.file import find_path, without_ranges
from shared.config.schema import Length, is_url
from shared.data.images import InputScale
from shared.errors import UserError, nearest
from shared.library import find_library_config, import_custom_modules

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
_ANY_NAME = "custom_keys"  # of an optimizer: parts of parameters' names, each with these
_OF_A_NAME = {"lr_mult", "decay_mult"}
# keys that builders and loaders remove from a section before they call its class
_OF_THE_BUILDERS = {"type", "constructor", "paramwise_cfg", "samples_per_gpu", "workers_per_gpu"}
_PATHS = ("ann_file", "img_prefix", "seg_prefix", "proposal_file")  # of a data set, below its data_root
_SIZES = ("img_scale", "scale", "size", "crop_size", "input_size", "target_ratio", "ratio_range")


# --- found and merged -------------------------------------------------------------------------------


def shipped_configs() -> Path:
    """The folder of the configs that come with mmdet."""
    package = Path(mmdet.__file__).parent
    return next(folder for folder in (package / ".mim/configs", package.parent / "configs") if folder.is_dir())


def load_mmdet_config(hparams: MMDetectionHyperparameters, submitted: Path) -> Config:
    """`config_file`, with `merge_config` over it and `config_overrides` last.

    Raises:
        UserError: a file is not found or not a config; a key merged in is unknown to what it is merged into.
    """
    config, path = _merged(hparams, submitted)
    if "model" not in config or "data" not in config:
        raise UserError(
            f"hyperparameters.config_file: {path} has no `model` and `data`: it is a part of other configs. Fix: give "
            "a whole config"
        )
    try:
        config = compat_cfg(config)
        config.data.pop("imgs_per_gpu", None)  # samples_per_gpu replaces it, and having both is an error
        _say_fp16_once(config)
        _read_teacher(config)
        return config
    except (AssertionError, AttributeError, KeyError) as error:
        reason = str(error) or "runner.max_epochs and total_epochs, or what else is said twice, contradict each other"
        raise UserError(f"hyperparameters.config_file: {path}: {reason}. Fix: correct the file") from error


def _merged(hparams: MMDetectionHyperparameters, submitted: Path) -> tuple[Config, Path]:
    """The merged config, its modules imported, and the path of `config_file`."""
    modules = import_custom_modules(hparams.custom_imports)
    path = find_config(hparams.config_file, submitted, "config_file")
    is_saved = path.name == RESOLVED_CONFIG
    config = read_resolved(path) if is_saved else _read(path, "config_file")
    saved = deepcopy(config) if is_saved else None
    if is_saved:
        config.pop("custom_imports", None)
        if (teacher := _at(config._cfg_dict, ("model", "teacher_config"))) and isinstance(teacher, str):
            config.model.teacher_config = str(shipped_teacher(teacher, shipped_configs()) or teacher)
    own = []
    if hparams.merge_config is not None:
        merged = find_config(hparams.merge_config, submitted, "merge_config")
        own.append(dict(_read(merged, "merge_config")._cfg_dict))
        _merge(config, own[-1], "hyperparameters.merge_config", _variables(merged))
    if hparams.config_overrides:
        own.append(_expand(hparams.config_overrides))
        _refuse_variables(own[-1], path, hparams.overrides_key)
        _merge(config, own[-1], hparams.overrides_key, set())
        _refuse_other_scaling(hparams, own[-1])
    _import_custom_modules(config)
    if saved is not None:
        names = [module.__name__ for module in modules] + imported_modules(config)
        _refuse_code(path, saved, config, own, names)
    return config, path


def _refuse_code(path: Path, saved: Config, config: Config, own: list[dict[str, Any]], imported: list[str]) -> None:
    """Raises UserError if a saved config names code that the user does not name too.

    Args:
        saved: the config in the file; config: the same with the user's values merged over it.
        own: the user's values; imported: the modules that the user imported.
    """
    if unknown := [name for name in imported_modules(saved) if name not in imported]:
        raise UserError(
            f"{path}: custom_imports names {', '.join(unknown)}, and a checkpoint imports nothing. Fix: if you trust "
            f"{'them' if len(unknown) > 1 else 'it'}, name {'them' if len(unknown) > 1 else 'it'} in your config, "
            f"hyperparameters.custom_imports: [{', '.join(unknown)}]"
        )
    before = {place for place, _ in places_of_code(saved._cfg_dict, shipped_configs())}
    for place, value in places_of_code(config._cfg_dict, shipped_configs()):
        if place in before and all(_at(section, place) is None for section in own):
            raise UserError(
                f"{path}: {'.'.join(place)} names {value!r}, which MMDetection would execute, unpickle or write, and a "
                "checkpoint names no such file. Fix: if you trust it, name it in your config, "
                f"hyperparameters.config_overrides: {{{'.'.join(place)}: {value}}}"
            )


def hyperparameters_of_checkpoint(checkpoint: Path, own: Mapping[str, Any], submitted: Path) -> dict[str, Any]:
    """What replaces a checkpoint's hyperparameters to detect with it.

    Args:
        own: the hyperparameters of the user's config. Only they may name code.

    Raises:
        UserError: the folder is not an MMDetection checkpoint.
    """
    if not (checkpoint / RESOLVED_CONFIG).is_file():
        raise UserError(
            f"{checkpoint} is not a checkpoint of mmdetection/model_def.py: it has no {RESOLVED_CONFIG}. Fix: give one "
            "that it wrote"
        )
    return {
        "config_file": str(checkpoint / RESOLVED_CONFIG),
        "merge_config": None,
        "override_mmdet_config": None,
        "weights": "",  # the checkpoint's own are loaded
        "use_pretrained": None,
        "scale_schedule": None,
        **own_code(checkpoint, own, submitted),
    }


def own_code(checkpoint: Path, own: Mapping[str, Any], submitted: Path) -> dict[str, Any]:
    """The hyperparameters that name the code that a checkpoint's config may use. They come from the user's own config.

    Args:
        own: the hyperparameters of the user's experiment config.

    Raises:
        UserError: the checkpoint names code, and the user's own config cannot be read.
    """
    modules = list(own.get("custom_imports") or [])
    saved = read_resolved(checkpoint / RESOLVED_CONFIG)
    places = [place for place, _ in places_of_code(saved._cfg_dict, shipped_configs())]
    overrides: dict[str, Any] = {}
    if (places or imported_modules(saved)) and "config_file" in own:
        names = ("config_file", "merge_config", "config_overrides", "override_mmdet_config", "custom_imports")
        fixed = without_ranges({name: own[name] for name in names if own.get(name)}, lambda *_: None)
        config, _ = _merged(MMDetectionHyperparameters(**fixed), submitted)
        modules += imported_modules(config)
        for place in places:
            if (value := _at(config._cfg_dict, place)) is not None:
                *sections, key = place
                if key in _PATHS and isinstance(value, str):
                    value = os.path.join(_at(config._cfg_dict, (*sections, "data_root")) or "", value)
                section = overrides
                for part in sections:
                    section = section.setdefault(part, {})
                section[key] = value
    return {"custom_imports": modules, "config_overrides": overrides}


def _at(section: Any, place: Sequence[str]) -> Any:
    """The value at keys and positions below a section; None without one."""
    return functools.reduce(_item, place, section)


def _read_teacher(config: Config) -> None:
    """A distilling detector's teacher, which may be the name of a file, as a section."""
    name = config.model.get("teacher_config")
    if isinstance(name, str):
        own = Path(name) if Path(name).is_file() else None
        path = own or shipped_teacher(name, shipped_configs())
        if path is None:
            raise UserError(
                f"model.teacher_config: {name} is neither a file nor a config that mmdet ships. Fix: give the path of "
                "the teacher's config"
            )
        config.model.teacher_config = ConfigDict(model=_read(path, "config_file").model)


def find_config(name: str, submitted: Path, key: str) -> Path:
    """The path of a config: in the folder submitted, else among those that mmdet ships, by the name that it had in the
    image of Determined's model-hub too.

    Raises:
        UserError: it is in neither.
    """
    in_image = "/mmdetection/configs/"
    return find_library_config(
        name if Path(name).is_file() else name.removeprefix(in_image), submitted, shipped_configs(), key
    )


def _say_fp16_once(config: Config) -> None:
    """mmcv's other way to say `fp16`: Fp16OptimizerHook as optimizer_config."""
    section = config.get("optimizer_config") or {}
    if section.get("type") == "Fp16OptimizerHook":
        config.fp16 = {"loss_scale": section.pop("loss_scale", 512.0)}
        section.pop("type")


def _read(path: Path, key: str) -> Config:
    _refuse_version_3(path, key)
    try:
        with _shipped_bases():
            return Config.fromfile(path)
    except Exception as error:  # a Python config may raise anything
        reason = str(error) or str(error.__context__)
        raise UserError(
            f"hyperparameters.{key}: {path} cannot be read: {type(error).__name__}: {reason}. Fix: correct the path or "
            "the file"
        ) from error


def _refuse_version_3(path: Path, key: str) -> None:
    """Raises UserError if a Python config is one of MMDetection 3."""
    text = path.read_text(errors="replace") if path.suffix == ".py" else ""
    found = re.search(r"mmdet::|^(?:train_dataloader|val_evaluator|optim_wrapper)(?=\s*=)", text, re.MULTILINE)
    if found and (found[0] == "mmdet::" or not re.search(r"^data\s*=", text, re.MULTILINE)):
        raise UserError(
            f"hyperparameters.{key}: {path} is a config of MMDetection 3, which has {found[0]!r}, and this is "
            f"MMDetection {mmdet.__version__}. Fix: start from a config in {shipped_configs()}. `data` has what "
            "train_dataloader and val_dataloader say, `optimizer` what optim_wrapper says, `evaluation` what "
            "val_evaluator says; `_base_` is a path without mmdet::"
        )


@contextlib.contextmanager
def _shipped_bases() -> Iterator[None]:
    """Lets `_base_` of a user's config name one that mmdet ships, as it would stand in MMDetection's `configs`."""
    read = Config._file2dict

    def read_where_it_is(name: str, *arguments: Any) -> Any:
        parts = Path(os.path.normpath(name)).parts
        below = (shipped_configs().joinpath(*parts[-count:]) for count in (4, 3, 2) if count <= len(parts))
        shipped = None if Path(name).is_file() else next((path for path in below if path.is_file()), None)
        return read(str(shipped or name), *arguments)

    Config._file2dict = staticmethod(read_where_it_is)
    try:
        yield
    finally:
        Config._file2dict = staticmethod(read)


def _refuse_other_scaling(hparams: MMDetectionHyperparameters, overrides: Mapping[str, Any]) -> None:
    enabled = (overrides.get("auto_scale_lr") or {}).get("enable")
    if None not in (enabled, hparams.scale_schedule) and enabled != hparams.scale_schedule:
        raise UserError(
            f"hyperparameters.scale_schedule is {hparams.scale_schedule}, and {hparams.overrides_key}: "
            f"auto_scale_lr.enable {enabled}. Fix: remove auto_scale_lr.enable"
        )


def _refuse_variables(overrides: Mapping[str, Any], path: Path, key: str) -> None:
    """Raises UserError for a variable of MMDetection's Python files: what was made of it is there already, and an
    override of it would change nothing."""
    for name in ("classes", "data_root", "dataset_type", "img_norm_cfg", "train_pipeline", "test_pipeline"):
        if name in overrides:
            instead = {"classes": "data.train.classes and data.val.classes", "data_root": "data.train and data.val"}
            raise UserError(
                f"{key}: {name!r} is a variable of {path.name}, and overriding it changes nothing. Fix: override what "
                f"it was for, {instead.get(name, 'data.train… and data.val…')}"
            )


def _import_custom_modules(config: Config) -> None:
    if not config.get("custom_imports"):
        return
    try:
        import_modules_from_strings(**config.custom_imports)
    except (ImportError, TypeError) as error:
        raise UserError(
            f"custom_imports: {error.__context__ or error}. Fix: install the modules, or put them into the detector's "
            "folder"
        ) from error


def _expand(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}; as MMDetection's --cfg-options, not below the first level. What stands in
    `custom_keys` is a part of a parameter's name, which may have dots: custom_keys.backbone.layer1.lr_mult."""
    expanded: dict[str, Any] = {}
    for name, value in dotted.items():
        before, custom_keys, parameter = str(name).partition(f"{_ANY_NAME}.")
        *sections, last = (before + custom_keys).rstrip(".").split(".")
        if custom_keys and isinstance(value, Mapping):
            sections, last = [*sections, last], parameter
        elif custom_keys:
            parameter, _, argument = parameter.rpartition(".")
            sections, last = [*sections, last, parameter], argument
        section = expanded
        for part in sections:
            section = section.setdefault(part, {})
        both = isinstance(value, Mapping) and isinstance(section.get(last), dict)
        section[last] = {**section[last], **value} if both else deepcopy(value)
    return expanded


def _merge(config: Config, new: dict[str, Any], key: str, variables: set[str]) -> None:
    new = {name: value for name, value in new.items() if name not in variables}
    _check_keys(new, config._cfg_dict, "", key)
    new = _as_mmdet_takes_it(new, config._cfg_dict)
    try:
        config.merge_from_dict(new)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{key}: {error}. Fix: correct the key") from error


def _as_mmdet_takes_it(new: Any, old: Any, name: str = "") -> Any:
    """Values that MMDetection takes: YAML has no tuples, which it asks for where there was one and for sizes and
    ratios; and a section may take the place of None."""
    if isinstance(new, dict):
        section = {key: _as_mmdet_takes_it(value, _item(old, key), key) for key, value in new.items()}
        for key, value in section.items():
            if isinstance(value, dict) and isinstance(old, dict) and key in old and old[key] is None:
                section[key] = {**value, DELETE_KEY: True}
        return section
    if not isinstance(new, list):
        return new
    if new and all(isinstance(item, (int, float)) for item in new):
        return tuple(new) if isinstance(old, tuple) or name in _SIZES else new
    return [_as_mmdet_takes_it(item, None, name) for item in new]


def _item(section: Any, key: str) -> Any:
    if isinstance(section, dict):
        return section.get(key)
    if isinstance(section, list) and key.isdigit() and int(key) < len(section):
        return section[int(key)]
    return None


# --- keys that exist --------------------------------------------------------------------------------


def _check_keys(new: Mapping[str, Any], old: Any, path: str, where: str) -> None:
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
        below = _item(old, str(key))
        if key == _ANY_NAME and isinstance(value, Mapping):
            for name, arguments in value.items():
                for wrong in arguments.keys() - _OF_A_NAME if isinstance(arguments, Mapping) else ():
                    raise UserError(f"{where}: unknown key '{here}.{name}.{wrong}'{nearest(wrong, _OF_A_NAME)}")
        elif isinstance(value, Mapping):
            merges = isinstance(below, (dict, list)) and not value.get(DELETE_KEY)
            _check_keys(value, below if merges else {}, here, where)


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


def _variables(path: Path) -> set[str]:
    """The names that a Python config assigns to use them below: no keys of the config."""
    if path.suffix != ".py":
        return set()
    tree = ast.parse(path.read_text())
    top = {s.targets[0].id for s in tree.body if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name)}
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return {name for name in top & read if name not in _keys_in_shipped_configs()[""]}


# --- who decides ------------------------------------------------------------------------------------


def default_lengths(config: Config) -> dict[str, Length]:
    """The config's own lengths, by the experiment config's keys for them."""
    by_epoch = runner_type(config) != "IterBasedRunner"
    unit = "epochs" if by_epoch else "batches"
    runner = config.get("runner") or {}
    count = runner.get("max_epochs" if by_epoch else "max_iters") or config.get("total_epochs")
    lengths = {"searcher.max_length": count}
    for key, section in (("min_validation_period", "evaluation"), ("min_checkpoint_period", "checkpoint_config")):
        lengths[key] = (config.get(section) or {}).get("interval", 1)
    return {key: Length(unit, count) for key, count in lengths.items() if isinstance(count, int) and count > 0}


def validation_times(config: Config) -> tuple[Length | None, tuple[tuple[Length, Length], ...]]:
    """`evaluation.start`, and `evaluation.dynamic_intervals`: from when on the interval is another.

    Raises:
        UserError: they are not understood.
    """
    evaluation = config.get("evaluation") or {}
    unit = "epochs" if runner_type(config) != "IterBasedRunner" else "batches"
    start, changes = evaluation.get("start"), evaluation.get("dynamic_intervals") or ()
    try:
        counts = [(int(since), int(interval)) for since, interval in changes]
        if (start is not None and int(start) < 0) or any(min(pair) < 1 for pair in counts):
            raise ValueError("it is not positive")
    except (TypeError, ValueError) as error:
        raise UserError(
            f"evaluation of the MMDetection config: start {start!r} is not a number of {unit}, or dynamic_intervals "
            f"{changes!r} are not pairs (since, interval). Fix: correct them"
        ) from error
    if start == 0:
        raise UserError(
            "evaluation.start of the MMDetection config is 0, a validation before the training. Fix: write "
            "`perform_initial_validation: true` in the experiment config, and override start with null"
        )
    return (
        Length(unit, int(start)) if start is not None else None,
        tuple((Length(unit, since), Length(unit, interval)) for since, interval in counts),
    )


def warmup_batches(config: Config, batches_per_epoch: int) -> float:
    """For how many batches the schedule raises the learning rate."""
    lr_config = config.get("lr_config") or {}
    if not lr_config.get("warmup"):
        return 0
    return lr_config.get("warmup_iters", 0) * (batches_per_epoch if lr_config.get("warmup_by_epoch") else 1)


def runner_type(config: Config) -> str:
    return (config.get("runner") or {}).get("type", "EpochBasedRunner")


def own_batch_size(config: Config) -> int:
    """The images of a step that the config is made for: as it says, or of 8 GPUs."""
    stated = (config.get("auto_scale_lr") or {}).get("base_batch_size")
    loader = config.data.get("train_dataloader") or {}
    return stated or 8 * (loader.get("samples_per_gpu") or config.data.get("samples_per_gpu") or 2)


def scale_lr(config: Config, hparams: MMDetectionHyperparameters) -> None:
    """`scale_schedule`, or the config's own auto_scale_lr: the learning rate by the linear scaling rule, of the global
    batch over the config's own. A length in epochs needs no scaling."""
    auto = config.get("auto_scale_lr") or {}
    wanted = auto.get("enable") and auto.get("base_batch_size")
    if wanted if hparams.scale_schedule is None else hparams.scale_schedule:
        config.optimizer.lr *= hparams.global_batch_size / own_batch_size(config)
    if auto:
        auto["enable"] = False  # the resolved config has the rate that follows


def file_client_of(config: Config) -> dict[str, Any] | None:
    """The `file_client_args` of the config's own data sets and of the steps that load their images; None where they
    read from disk.

    Raises:
        UserError: they differ.
    """
    found = []
    for split in ("train", "val"):
        for leaf in leaves(config.data[split]):
            steps = [step for step in leaf.get("pipeline") or () if step["type"] == "LoadImageFromFile"]
            found += [section.get("file_client_args") for section in (leaf, *steps)]
    given = [dict(arguments) for arguments in found if arguments and arguments.get("backend", "disk") != "disk"]
    if any(arguments != given[0] for arguments in given):
        raise UserError(
            "file_client_args of the MMDetection config differ between its data sets. Fix: give one for all, "
            "data.file_client_args"
        )
    return given[0] if given else None


def leaves(dataset: Any) -> list[ConfigDict]:
    """The data sets within a config's wrappers (RepeatDataset, ConcatDataset, …)."""
    if isinstance(dataset, (list, tuple)):
        return [leaf for part in dataset for leaf in leaves(part)]
    if "datasets" in dataset:
        return leaves(dataset["datasets"])
    return leaves(dataset["dataset"]) if "dataset" in dataset else [dataset]


def input_scale(config: Config) -> InputScale | None:
    """The smallest stride of the heads, and the size that the test pipeline makes images; None where either is not
    said."""

    def strides(section: Any) -> Iterator[int]:
        if isinstance(section, Mapping):
            for key, value in section.items():
                if key in ("strides", "featmap_strides") and isinstance(value, (list, tuple)):
                    yield from np.ravel(value).tolist()
                else:
                    yield from strides(value)

    found = [*strides({key: value for key, value in config.model.items() if key.endswith("head")})]
    pipeline = leaves(config.data.val)[0].get("pipeline") or []
    size = next((step["img_scale"] for step in pipeline if isinstance(step.get("img_scale"), tuple)), None)
    if not found or size is None:
        return None
    return InputScale(min(found), "stride", min(size), max(size))


def set_paths(config: Config, data: MMDetectionData, submitted: Path) -> None:
    """Makes one of the experiment config's `data` and the config's own paths: `data` wins where it says something, and
    the config's relative paths are relative to the folder that is submitted.

    Raises:
        UserError: `data` gives one data set, and the config has several.
    """
    for split in ("train", "val"):
        section, given = config.data[split], getattr(data, split)
        found = leaves(section)
        if given is not None:
            if len(found) != 1:
                raise UserError(
                    f"data.{split} gives one data set, and the MMDetection config has {len(found)}. Fix: remove "
                    f"data.{split}, and give their paths in the config"
                )
            found[0].update(ann_file=given.annotations, img_prefix=given.images)
            found[0].pop("data_root", None)
        for leaf in found:
            root = leaf.pop("data_root", None) or ""
            for key in _PATHS:
                if key == "img_prefix" and data.file_client is not None:  # a key of the client's, as lmdb's
                    leaf[key] = os.path.join(root, leaf.get(key) or "")
                elif leaf.get(key):
                    leaf[key] = _below(root, leaf[key], data, submitted)


def find_weights_files(config: Config, places: Sequence[Path]) -> None:
    """Makes the config's own relative paths of weights absolute (`init_cfg.checkpoint`, `pretrained`, `teacher_ckpt`,
    `load_from`), if one of the places has their file."""

    def visit(section: Any) -> None:
        if isinstance(section, (list, tuple)):
            for part in section:
                visit(part)
        elif isinstance(section, dict):
            for key, value in section.items():
                if key in ("checkpoint", "pretrained", "teacher_ckpt") and isinstance(value, str):
                    section[key] = str(find_path(value, places) or value)
                else:
                    visit(value)

    visit(config.model)
    if isinstance(config.get("load_from"), str):
        config.load_from = str(find_path(config.load_from, places) or config.load_from)


def _below(root: str, path: Any, data: MMDetectionData, submitted: Path) -> Any:
    """The path below the data's root, in the bucket of `data` or in the folder that is submitted."""
    if isinstance(path, (list, tuple)):
        return [_below(root, part, data, submitted) for part in path]
    located = path if is_url(path) else data.located(os.path.join(root, path))
    return located if is_url(located) else str(submitted / located)


def kind_of(dataset: Any) -> str:
    """The type of a config's data set; a list is concatenated."""
    return "ConcatDataset" if isinstance(dataset, (list, tuple)) else dataset["type"]


def set_num_classes(config: Config, num_classes: int) -> None:
    """Gives the heads that classify objects as many classes as the data has; semantic heads keep theirs.

    Raises:
        UserError: the model counts things and stuff apart, and does not come to as many.
    """
    heads = list(_heads(config.model))
    for name, head in heads:
        if "num_things_classes" in head:
            counted = head["num_things_classes"] + head.get("num_stuff_classes", 0)
            if counted != num_classes:
                raise UserError(
                    f"hyperparameters.config_file: model.{name} is for {head['num_things_classes']} things and "
                    f"{head.get('num_stuff_classes', 0)} stuff classes, and the data has {num_classes} categories. "
                    "Fix: set them, and the loss's class_weight, in config_overrides"
                )
    if any(head.get("num_stuff_classes") for _, head in heads):
        return  # its other heads are for the things alone
    # SOLO and the like have no head for boxes
    classifies = "bbox_head" if any(name == "bbox_head" for name, _ in heads) else "mask_head"
    of_objects = {head.get("num_classes") for name, head in heads if name == classifies}
    for name, head in heads:
        if name in _OBJECT_HEADS and "num_classes" in head and head["num_classes"] in of_objects:
            for part in head.values():  # losses that count by class
                if isinstance(part, dict) and part.get("num_classes") == head["num_classes"]:
                    part["num_classes"] = num_classes
            head["num_classes"] = num_classes


def _heads(section: Any, name: str = "model") -> Iterator[tuple[str, ConfigDict]]:
    """Each section of the model that is called a head, with its name."""
    if isinstance(section, (list, tuple)):
        for part in section:
            yield from _heads(part, name)
    elif isinstance(section, dict):
        if name.endswith("_head"):
            yield name, section
        for key, value in section.items():
            if key != "teacher_config":  # which stays as it was trained
                yield from _heads(value, key)


_OBJECT_HEADS = ("bbox_head", "mask_head", "point_head", "mask_iou_head", "segm_head")
