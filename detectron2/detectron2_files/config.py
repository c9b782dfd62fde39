"""A Detectron2 config of either kind: found, overridden, and given the data's number of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import detectron2.config

from detectron2_files.config_protocol import Detectron2Config
from detectron2_files.lazy_config import LazyConfigFile
from detectron2_files.yaml_config import YamlConfig
from detectron2_hyperparameters import Detectron2Hyperparameters
from shared.config.file import flattened
from shared.errors import UserError
from shared.library import find_library_config, import_custom_modules

# the class counts of zoo configs: COCO's things, and its stuff in panoptic segmentation
COCO_CLASSES, COCO_STUFF_CLASSES = 80, 54


def shipped_configs() -> Path:
    """The folder of the model zoo's configs, which the package brings along."""
    return Path(detectron2.config.__file__).parent.parent / "model_zoo" / "configs"


def load_detectron2_config(hparams: Detectron2Hyperparameters, submitted: Path) -> Detectron2Config:
    """`config_file` with `config_overrides` over it.

    Raises:
        UserError: the file is not found or not a config, or a key does not exist.
    """
    path = find_library_config(hparams.config_file, submitted, shipped_configs(), "config_file")
    modules = [name.removesuffix(".py") for name in hparams.custom_imports]
    if path.name in (YamlConfig.resolved_name, LazyConfigFile.resolved_name):
        _refuse_modules_of(path.parent, modules, submitted)
    imported = import_custom_modules(hparams.custom_imports)
    overrides = flattened(hparams.config_overrides)
    if path.suffix == ".py" or path.name == LazyConfigFile.resolved_name:
        places = (submitted.resolve(), shipped_configs().resolve())
        return LazyConfigFile(path, overrides, places, modules, lambda: _functions_config(hparams, submitted))
    return YamlConfig(path, overrides, imported)


def config_of_checkpoint(checkpoint: Path) -> Path:
    """The resolved config that lies in a checkpoint.

    Raises:
        UserError: there is none.
    """
    for name in (YamlConfig.resolved_name, LazyConfigFile.resolved_name):
        if (checkpoint / name).is_file():
            return checkpoint / name
    raise UserError(f"{checkpoint} holds no Detectron2 config. Fix: give a checkpoint of detectron2/model_def.py")


def set_class_counts(config: Detectron2Config, in_data: Mapping[str, int], overridden: Sequence[str]) -> None:
    """Gives the model the data's number of classes, where the config has COCO's.

    Args:
        in_data: how many "things" and "stuff" the data has, if it is known.

    Raises:
        UserError: the config says another number, which is neither the data's nor the zoo's for COCO; or the data
            has none of what the model tells apart.
    """
    for key, stated in config.class_counts().items():
        is_stuff = config.semantic or "sem_seg" in key.lower()
        kind, of_zoo = ("stuff", COCO_STUFF_CLASSES) if is_stuff else ("things", COCO_CLASSES)
        count = in_data.get(kind, stated)
        if stated == count:
            continue
        if count == 0:
            raise UserError(
                f"{key} is {stated}, and the data has no {kind}: semantic and panoptic configs train on data sets that "
                f"are registered, with {kind.removesuffix('s')}_classes in their metadata. Fix: name them in "
                "config_overrides, and remove data.train and data.val"
            )
        if stated != of_zoo or key in overridden:
            raise UserError(
                f"{key} is {stated}, and the data has {count} categories. Fix: set config_overrides: {{{key}: "
                f"{count}}}, or correct the data"
            )
        config.set_class_count(key, count)


def stated_class_count(config: Detectron2Config) -> tuple[str, int] | None:
    """The key that says how many classes are detected, of things or of a semantic model's stuff, and its number; None
    where the config says none."""
    return next(((k, n) for k, n in config.class_counts().items() if ("sem_seg" in k.lower()) == config.semantic), None)


def _functions_config(hparams: Detectron2Hyperparameters, submitted: Path) -> Path | None:
    if hparams.functions_of is None:
        return None
    return find_library_config(hparams.functions_of, submitted, shipped_configs(), "functions_of")


def _refuse_modules_of(checkpoint: Path, names: Sequence[str], submitted: Path) -> None:
    """Raises UserError for a Python file that a checkpoint has brought along and would have imported."""
    for name in names:
        if submitted.joinpath(*name.split(".")).resolve().is_relative_to(checkpoint.resolve()):
            raise UserError(
                f"hyperparameters.custom_imports: {name} comes from the checkpoint, and is not executed. Fix: if "
                "you trust it, copy it into the detector's folder"
            )
