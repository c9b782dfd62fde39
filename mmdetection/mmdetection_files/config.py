"""MMDetection's config: found, merged, overridden and checked."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import mmdet
import mmdet.core.anchor.builder
import mmdet.core.bbox.builder
import mmdet.core.bbox.iou_calculators.builder
import mmdet.core.bbox.match_costs.builder
import mmdet.datasets.builder
import mmdet.models.builder
import mmdet.models.utils.builder
from mmcv import Config, ConfigDict
from mmcv.utils import import_modules_from_strings
from mmcv.utils.config import DELETE_KEY
from mmdet.utils import compat_cfg

from mmdetection_files.config_fields import PATHS
from mmdetection_files.config_keys import ANY_NAME, check_keys, item_of, shipped_configs, variables_of
from mmdetection_files.saved_config import (
    RESOLVED_CONFIG,
    imported_modules,
    places_of_code,
    read_resolved,
    shipped_teacher,
)
from mmdetection_hyperparameters import MMDetectionHyperparameters
from shared.config.file import without_ranges
from shared.errors import UserError
from shared.library import find_library_config, import_custom_modules

_SIZES = ("img_scale", "scale", "size", "crop_size", "input_size", "target_ratio", "ratio_range")


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
        _merge(config, own[-1], "hyperparameters.merge_config", variables_of(merged))
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
                if key in PATHS and isinstance(value, str):
                    value = os.path.join(_at(config._cfg_dict, (*sections, "data_root")) or "", value)
                section = overrides
                for part in sections:
                    section = section.setdefault(part, {})
                section[key] = value
    return {"custom_imports": modules, "config_overrides": overrides}


def _at(section: Any, place: Sequence[str]) -> Any:
    """The value at keys and positions below a section; None without one."""
    return functools.reduce(item_of, place, section)


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
        before, custom_keys, parameter = str(name).partition(f"{ANY_NAME}.")
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
    check_keys(new, config._cfg_dict, "", key)
    new = _as_mmdet_takes_it(new, config._cfg_dict)
    try:
        config.merge_from_dict(new)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{key}: {error}. Fix: correct the key") from error


def _as_mmdet_takes_it(new: Any, old: Any, name: str = "") -> Any:
    """Values that MMDetection takes: YAML has no tuples, which it asks for where there was one and for sizes and
    ratios; and a section may take the place of None."""
    if isinstance(new, dict):
        section = {key: _as_mmdet_takes_it(value, item_of(old, key), key) for key, value in new.items()}
        for key, value in section.items():
            if isinstance(value, dict) and isinstance(old, dict) and key in old and old[key] is None:
                section[key] = {**value, DELETE_KEY: True}
        return section
    if not isinstance(new, list):
        return new
    if new and all(isinstance(item, (int, float)) for item in new):
        return tuple(new) if isinstance(old, tuple) or name in _SIZES else new
    return [_as_mmdet_takes_it(item, None, name) for item in new]
