"""The data that a Detectron2 config names: opened by the shared loader if it is plain COCO, else by Detectron2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from detectron2_files.data import check_for_training
from detectron2_files.registered import (
    TRAIN_NAME,
    VAL_NAME,
    RegisteredData,
    as_coco_paths,
    check_for_rotated_evaluation,
    open_registered,
    register_json,
)
from shared.config.schema import DataConfig, Split
from shared.data.annotations import check_same_categories
from shared.data.open import SplitData, check_evaluable, check_masks, check_trainable, open_split
from shared.errors import UserError

Opened = SplitData | RegisteredData


def coco_paths_of_val(config: Any, data: DataConfig) -> tuple[str, str] | None:
    """The annotations and images that the shared evaluator validates on; None if Detectron2's own evaluator does.

    Raises:
        UserError: neither config names one data set to validate on.
    """
    if config.rotated or not config.detects_instances:
        return None
    if not data.reads_files:
        return "", ""
    if data.val is not None:
        return data.val.annotations, data.val.images
    if len(config.val_names) != 1:
        raise UserError(
            f"data.val is missing, and the config names {len(config.val_names)} data sets to validate on "
            f"({', '.join(config.val_names) or 'none'}). Fix: give data.val, or name one data set in config_overrides"
        )
    return as_coco_paths(config.val_names[0])


def open_train(config: Any, data: DataConfig, evaluates_coco: bool) -> Opened:
    """The data to train on: `data.train`, else the config's data sets by name.

    Raises:
        UserError: no data is named, or it cannot be opened.
    """
    names = config.train_set.names
    if evaluates_coco and (data.train is not None or not data.reads_files):
        return open_split(data, "train")
    if data.train is not None:
        register_json(TRAIN_NAME, data.train.annotations, data.train.images)
        return open_registered((TRAIN_NAME,), config.semantic, config.train_set)
    paths = as_coco_paths(names[0]) if evaluates_coco and len(names) == 1 else None
    if paths:
        return open_split(replace(data, train=Split(*paths)), "train")
    if not names:
        raise UserError("data.train is missing, and the config names no data set to train on. Fix: give data.train")
    return open_registered(names, config.semantic, config.train_set)


def open_val(config: Any, data: DataConfig, coco_paths: tuple[str, str] | None) -> Opened:
    """The data to validate on.

    Args:
        coco_paths: as `coco_paths_of_val` gives them.

    Raises:
        UserError: the config names several data sets, or the data cannot be opened.
    """
    if coco_paths is not None:
        return open_split(replace(data, val=Split(*coco_paths)) if data.reads_files else data, "val")
    names = config.val_names
    if data.val is None and len(names) > 1:
        raise UserError(
            f"the config names {len(names)} data sets to validate on ({', '.join(names)}), but only one can be scored. "
            "Fix: name one in config_overrides"
        )
    if data.val is not None:
        register_json(VAL_NAME, data.val.annotations, data.val.images)
        names = (VAL_NAME,)
    opened = open_registered(names, config.semantic, proposal_files=config.val_proposal_files)
    if config.rotated:
        check_for_rotated_evaluation(opened)
    return opened


def check_together(config: Any, train: SplitData, val: Opened, validates_loss: bool) -> None:
    """Raises UserError if the data lacks what the model trains on, or what its evaluation needs."""
    check_trainable(train.annotations)
    check_for_training(train.annotations, config.iou_types, config.polygon_masks)
    if isinstance(val, SplitData):
        check_same_categories(train.annotations, val.annotations)
        check_evaluable(val.annotations)
        if validates_loss:
            check_for_training(val.annotations, config.iou_types, config.polygon_masks, "val")
        elif "segm" in config.iou_types:
            check_masks(val.annotations, "val")
