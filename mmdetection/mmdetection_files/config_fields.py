"""What a config of MMDetection decides, and what the experiment config sets in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmcv import Config, ConfigDict

from mmdetection_hyperparameters import MMDetectionData, MMDetectionHyperparameters
from shared.config.file import find_path
from shared.config.schema import Length, is_url
from shared.data.images import InputScale
from shared.errors import UserError

PATHS = ("ann_file", "img_prefix", "seg_prefix", "proposal_file")  # of a data set, below its data_root


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
            for key in PATHS:
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
