"""Data sets that are registered by name, and evaluated by Detectron2's own evaluators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.common import DatasetFromList
from detectron2.data.datasets import register_coco_instances
from torch.utils.data import Dataset

from detectron2_files.config_protocol import TrainingSet
from detectron2_files.data import mapped_by, refuse_code, sampled_positions
from shared.config.schema import is_url
from shared.data.dataset import SampleKey, seed_all
from shared.errors import UserError, nearest

TRAIN_NAME, VAL_NAME = "data.train", "data.val"


class RegisteredSamples(Dataset):
    """Samples of a data set's dicts: by `SampleKey` to train on, by index to evaluate on."""

    def __init__(self, dicts: Sequence[dict], mapper: Any, seed: int, indices: np.ndarray | None = None):
        self.dicts = DatasetFromList(list(dicts), copy=False)
        self.mapper = mapper
        self.seed = seed
        self.indices = np.arange(len(dicts)) if indices is None else indices
        self._sizes = np.array([(d.get("width", 1), d.get("height", 1)) for d in dicts]).reshape(-1, 2)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        key = key if isinstance(key, SampleKey) else SampleKey(0, key)
        dataset_dict = self.dicts[int(self.indices[key.index])]
        seed_all(self.seed, *key.seeds)
        return mapped_by(self.mapper, dataset_dict, dataset_dict["file_name"])

    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """As `labels_of` gives them.

        Raises:
            UserError: the dicts have no objects.
        """
        of_samples = [self.dicts[int(index)].get("annotations") for index in self.indices]
        if None in of_samples:
            raise UserError(
                "data.repeat_threshold: the data set to train on has images without objects' categories. Fix: remove "
                "the key"
            )
        labels = [annotation["category_id"] for annotations in of_samples for annotation in annotations]
        return np.repeat(np.arange(len(self)), list(map(len, of_samples))), np.asarray(labels, dtype=np.int64)

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """(samples,) widths, (samples,) heights."""
        return self._sizes[:, 0], self._sizes[:, 1]


@dataclass
class RegisteredData:
    """Data sets of Detectron2's catalog, with their dicts; evaluated by Detectron2's own evaluators."""

    names: tuple[str, ...]
    dicts: list[dict]
    semantic: bool

    @property
    def categories(self) -> list[dict]:
        return categories_of(self.names[0], self.semantic)

    @property
    def class_counts(self) -> dict[str, int]:
        """How many "things" and "stuff" there are."""
        metadata = MetadataCatalog.get(self.names[0])
        return {kind: len(metadata.get(f"{kind.removesuffix('s')}_classes") or ()) for kind in ("things", "stuff")}


def categories_of(name: str, semantic: bool) -> list[dict]:
    """The things of a registered data set, or its stuff, as COCO categories: the position is the label. None where
    its metadata names none."""
    if name not in MetadataCatalog.list():
        return []
    metadata = MetadataCatalog.get(name)
    kind = "stuff" if semantic else "thing"
    ids = {label: i for i, label in (metadata.get(f"{kind}_dataset_id_to_contiguous_id") or {}).items()}
    names = metadata.get(f"{kind}_classes") or ()
    points = list(metadata.get("keypoint_names") or ())
    rules = [(a, b) for a, b, *_ in metadata.get("keypoint_connection_rules") or ()]
    skeleton = [[points.index(a) + 1, points.index(b) + 1] for a, b in rules if a in points and b in points]
    keypoints = {"keypoints": points, "skeleton": skeleton} if points else {}
    return [{"id": ids.get(label, label + 1), "name": name, **keypoints} for label, name in enumerate(names)]


def open_registered(
    names: tuple[str, ...],
    semantic: bool,
    train_set: TrainingSet | None = None,
    proposal_files: Sequence[str] = (),
) -> RegisteredData:
    """Data sets by name; `train_set` for training, which leaves images out and has proposals of its own.

    Raises:
        UserError: a name is not registered, or the data is not where it is registered.
    """
    for name in names:
        if name not in DatasetCatalog:
            known = DatasetCatalog.list()
            raise UserError(
                f"the data set {name!r} is not registered{nearest(name, known)} Or register it in a Python file, named "
                "in hyperparameters.custom_imports, or give data.train and data.val"
            )
    files = list(train_set.proposal_files if train_set else proposal_files)
    try:
        refuse_code(files)
        dicts = get_detection_dataset_dicts(
            list(names),
            filter_empty=train_set is not None and train_set.filter_empty,
            min_keypoints=train_set.min_keypoints if train_set else 0,
            proposal_files=files or None,
            check_consistency=True,
        )
    except UserError:
        raise
    except Exception as error:  # each data set's loader reads files of its own format
        raise UserError(
            f"the data set {', '.join(names)} cannot be read: {type(error).__name__}: {error}. Fix: set "
            "DETECTRON2_DATASETS to the folder of Detectron2's data sets, or give data.train and data.val"
        ) from error
    return RegisteredData(names, dicts, semantic)


def check_for_rotated_evaluation(data: RegisteredData) -> None:
    """Raises UserError for crowds, which Detectron2's evaluator of rotated boxes cannot match."""
    for dataset_dict in data.dicts:
        if any(annotation.get("iscrowd") for annotation in dataset_dict["annotations"]):
            raise UserError(
                f"{', '.join(data.names)}: image id {dataset_dict['image_id']} has a crowd (iscrowd: 1), with which "
                "Detectron2 cannot evaluate rotated boxes. Fix: remove such annotations"
            )


def registered_samples(data: RegisteredData, mapper: Any, train_set: TrainingSet, seed: int) -> RegisteredSamples:
    """The training samples of registered data, as the config's sampler repeats them."""
    indices = sampled_positions(len(data.dicts), lambda: data.dicts, train_set, seed)
    return RegisteredSamples(data.dicts, mapper, seed, indices)


def as_coco_paths(name: str) -> tuple[str, str] | None:
    """The annotation file and the images' folder of a registered data set that is plain COCO; else None."""
    if name not in DatasetCatalog or MetadataCatalog.get(name).get("evaluator_type") != "coco":
        return None
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    return (json_file, image_root) if json_file and image_root else None


def register_json(name: str, annotations: str, images: str) -> None:
    """Registers COCO files for Detectron2's own loader and evaluators."""
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    if name in MetadataCatalog.list():
        MetadataCatalog.remove(name)
    if not Path(annotations).is_file():
        on_disk = (
            "is not on disk, where Detectron2's own loader of this kind of data reads" if is_url(annotations) else ""
        )
        raise UserError(f"{name}.annotations: {annotations} {on_disk or 'does not exist'}. Fix: correct the path")
    register_coco_instances(name, {}, annotations, images)
