"""MMDetection's own data sets, for configs whose data the shared loader does not read."""

from __future__ import annotations

import logging
import os
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from mmcv.fileio import FileClient
from mmdet.datasets import CustomDataset, build_dataset
from mmdet.datasets.builder import DATASETS

from mmdetection_files.config_fields import kind_of, leaves
from mmdetection_files.pipelines import loads_masks
from mmdetection_hyperparameters import MMDetectionData
from shared.config.schema import is_url
from shared.data.annotations import CocoAnnotations
from shared.data.open import check_masks
from shared.errors import UserError

logger = logging.getLogger(__name__)

PROPOSAL_CATEGORIES = [{"id": 1, "name": "proposal"}]  # of RPN


class MmcvImages:
    """Images through one of mmcv's own file clients (petrel, lmdb, …)."""

    def __init__(self, file_client_args: dict[str, Any], prefix: str):
        self.file_client_args = file_client_args
        self.prefix = prefix
        self._client: FileClient | None = None

    def read(self, file_name: str) -> bytes:
        if self._client is None:  # a client of each process
            self._client = FileClient(**self.file_client_args)
        # as LoadImageFromFile joins them: not every client has a join_path
        return bytes(self._client.get(os.path.join(self.prefix, file_name)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}


@dataclass
class OwnData:
    """One of MMDetection's own data sets, which evaluates itself.

    Attributes:
        proposals: whether it is for a model that only proposes, whatever the classes.
    """

    dataset: Any
    proposals: bool = False

    @property
    def categories(self) -> list[dict]:
        if self.proposals:
            return PROPOSAL_CATEGORIES
        return [{"id": label + 1, "name": name} for label, name in enumerate(self.dataset.CLASSES or ())]


def selected_classes(leaf: dict[str, Any]) -> tuple[str, ...] | None:
    """The config's `classes`, which may be a file of names; None for all."""
    classes = leaf.get("classes")
    try:
        return None if classes is None else tuple(CustomDataset.get_classes(classes))
    except OSError as error:
        raise UserError(f"classes: {classes!r} is not a file of names. Fix: give a list, also for one class") from error


def classes_of(kind: str) -> tuple[str, ...] | None:
    """The names that MMDetection gives the classes of a kind of data set; None where it gives none."""
    return getattr(DATASETS.get(kind), "CLASSES", None)


def build_own_dataset(section: Any, data: MMDetectionData, training: bool) -> Any:
    """MMDetection's own data set, read with mmcv's file client of `data`.

    Raises:
        UserError: it cannot be built, or has no names for its classes.
    """
    section, split = deepcopy(section), "train" if training else "val"
    if data.fast_images:
        logger.warning("data.fast_images does nothing for data.%s: MMDetection's own data set reads it", split)
    for leaf in leaves(section):
        leaf.pop("samples_per_gpu", None)
        if is_url(data.located(str(leaf.get("ann_file")))):
            raise UserError(
                f"data.{split}: the config's {leaf['type']} reads from disk, not {leaf['ann_file']}. Fix: copy the "
                "annotations to a disk"
            )
        if leaf["type"] == "CocoDataset" and isinstance(leaf["ann_file"], str):
            annotations = CocoAnnotations.open(leaf["ann_file"], cache_dir=data.cache_dir)
            if not leaf.get("classes"):  # CocoDataset itself looks for COCO's names, whatever the file has
                leaf["classes"] = annotations.category_names
            if loads_masks(leaf):
                of_both = [name for name in selected_classes(leaf) if name in annotations.category_names]
                check_masks(annotations.select_categories(of_both), split)
        if data.file_client is not None:
            leaf["file_client_args"] = data.file_client
            for step in leaf["pipeline"]:
                if step["type"].startswith("Load"):
                    step["file_client_args"] = data.file_client
    try:
        dataset = build_dataset(section, None if training else {"test_mode": True})
    except Exception as error:  # each reads files of its own format
        paths = ", ".join(str(leaf.get("ann_file")) for leaf in leaves(section))
        raise UserError(
            f"data.{split}: the config's {kind_of(section)} cannot be built from {paths}: {type(error).__name__}: "
            f"{error}. Fix: correct its keys"
        ) from error
    if not dataset.CLASSES:
        raise UserError(f"data.{split}: the config's {kind_of(section)} has no class names. Fix: give it `classes`")
    return dataset


class OwnEvaluationSamples(torch.utils.data.Dataset):
    """The images of one of MMDetection's own data sets, to detect on."""

    def __init__(self, dataset: CustomDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index], index
