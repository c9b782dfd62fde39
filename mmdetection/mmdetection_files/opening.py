"""The data that an MMDetection config names: opened by the shared loader if it is plain COCO, else by MMDetection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmcv import Config

from mmdetection_files.data import CocoSamples, build_samples
from mmdetection_files.own_data import MmcvImages, OwnData, build_own_dataset, selected_classes
from mmdetection_hyperparameters import MMDetectionData
from shared.config.schema import Split
from shared.data.annotations import check_same_categories
from shared.data.dataset import BadImages
from shared.data.open import SplitData, check_evaluable, check_masks, check_trainable, open_split
from shared.errors import UserError


def how_to_evaluate(config: Config, data: MMDetectionData) -> tuple[tuple[str, ...], bool]:
    """What COCO's evaluation compares, and whether the shared evaluator does it. Else the data set's own does.

    Raises:
        UserError: the model only proposes, and the data is made up.
    """
    metrics = (config.get("evaluation") or {}).get("metric", "bbox")
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    iou_types = tuple(metric for metric in ("bbox", "segm") if metric in metrics) or ("bbox",)
    if not data.reads_files:
        if config.model.type == "RPN":
            raise UserError(
                "hyperparameters.config_file: RPN only proposes, and its recall is not measured on data.backend fake. "
                "Fix: give data.train and data.val"
            )
        return iou_types, True
    scores_masks_apart = "mask_iou_head" in (config.model.get("roi_head") or {})
    is_coco = is_plain_coco(config.data.val) and set(metrics) <= {"bbox", "segm"}
    return iou_types, is_coco and not scores_masks_apart


def open_train(config: Config, data: MMDetectionData, bad_images: BadImages) -> tuple[list[SplitData | OwnData], Any]:
    """The data sets inside `data.train`, and the samples of all of them together."""
    opened: list[SplitData | OwnData] = []

    def build_leaf(leaf: Any) -> Any:
        if is_plain_coco(leaf) or not data.reads_files:
            opened.append(_open_coco(leaf, data, "train"))
            return CocoSamples(opened[-1].annotations, opened[-1].images, leaf, bad_images, data.fast_images)
        dataset = build_own_dataset(leaf, data, training=True)
        opened.append(OwnData(dataset))
        return dataset

    return opened, build_samples(config.data.train, build_leaf)


def open_val(config: Config, data: MMDetectionData, evaluates_coco: bool, proposes: bool) -> SplitData | OwnData:
    """The data of `data.val`."""
    if evaluates_coco:
        return _open_coco(config.data.val, data, "val")
    return OwnData(build_own_dataset(config.data.val, data, training=False), proposals=proposes)


def check_together(
    train: Sequence[SplitData | OwnData], val: SplitData | OwnData, trains_masks: bool, evaluates_masks: bool
) -> None:
    """Raises UserError if the COCO files have different categories, nothing to train or evaluate on, or lack masks."""
    coco = [data.annotations for data in (*train, val) if isinstance(data, SplitData)]
    for other in coco[1:]:
        check_same_categories(coco[0], other)
    if isinstance(train[0], SplitData):
        check_trainable(train[0].annotations)
    for data in train:
        if trains_masks and isinstance(data, SplitData):
            check_masks(data.annotations, "train")
    if isinstance(val, SplitData):
        check_evaluable(val.annotations)
        if evaluates_masks:
            check_masks(val.annotations, "val")


def _open_coco(leaf: Any, data: MMDetectionData, split: str) -> SplitData:
    images = None
    if data.reads_files:
        data = replace(data, **{split: Split(leaf["ann_file"], leaf.get("img_prefix") or "")})
        if data.file_client is not None:
            images = MmcvImages(data.file_client, leaf.get("img_prefix") or "")
    opened = open_split(data, split, images)
    if (classes := selected_classes(leaf)) and data.reads_files:
        try:
            return SplitData(opened.annotations.select_categories(classes), opened.images)
        except UserError as error:
            raise UserError(f"data.{split}.classes of the MMDetection config: {error}") from error
    return opened


def is_plain_coco(leaf: Any) -> bool:
    """Whether a data set's config is one that the shared loader reads."""
    if not isinstance(leaf, dict) or leaf.get("type") != "CocoDataset" or leaf.get("proposal_file"):
        return False
    pipeline = leaf.get("pipeline") or [{"type": ""}]
    return isinstance(leaf["ann_file"], str) and pipeline[0]["type"] == "LoadImageFromFile"
