"""MMDetection's pipelines and data set wrappers over the shared loader, and its own data sets where a config asks
for one."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmcv import ConfigDict
from mmcv.fileio import FileClient
from mmcv.parallel import DataContainer
from mmcv.parallel import collate as mmcv_collate
from mmdet.datasets import CocoDataset, CustomDataset, build_dataset, replace_ImageToTensor
from mmdet.datasets.builder import DATASETS
from mmdet.datasets.pipelines import Compose

from mmdetection_files.config_fields import kind_of, leaves
from mmdetection_files.pixels import with_quick_end
from mmdetection_hyperparameters import MMDetectionData
from shared.config.schema import is_url
from shared.data.annotations import CocoAnnotations, ImageRecord
from shared.data.dataset import BadImages, CocoDetection, SampleKey, seed_all, transformed
from shared.data.images import BadImageError
from shared.data.loading import Batch, TrainingBatchSampler, aspect_ratio_groups, labels_of
from shared.data.open import check_masks
from shared.data.storage import ImageStorage
from shared.errors import UserError

logger = logging.getLogger(__name__)

cv2.setNumThreads(0)  # each loader worker has a core to itself, as in mmdet's setup_multi_processes

PROPOSAL_CATEGORIES = [{"id": 1, "name": "proposal"}]  # of RPN
_MIN_SIDE = 32  # pixels; CocoDataset leaves smaller images out of the training


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


def is_plain_coco(leaf: Any) -> bool:
    """Whether a data set's config is one that the shared loader reads."""
    if not isinstance(leaf, dict) or leaf.get("type") != "CocoDataset" or leaf.get("proposal_file"):
        return False
    pipeline = leaf.get("pipeline") or [{"type": ""}]
    return isinstance(leaf["ann_file"], str) and pipeline[0]["type"] == "LoadImageFromFile"


def selected_classes(leaf: dict[str, Any]) -> tuple[str, ...] | None:
    """The config's `classes`, which may be a file of names; None for all."""
    classes = leaf.get("classes")
    try:
        return None if classes is None else tuple(CustomDataset.get_classes(classes))
    except OSError as error:
        raise UserError(f"classes: {classes!r} is not a file of names. Fix: give a list, also for one class") from error


def loads_masks(leaf: dict[str, Any]) -> bool:
    """Whether a data set's pipeline loads its masks."""
    return any(step["type"] == "LoadAnnotations" and step.get("with_mask") for step in leaf.get("pipeline") or ())


def trains_masks(config: Any) -> bool:
    """Whether the data of a config are trained on with their masks."""

    def has_head(section: Any) -> bool:
        sections = section.values() if isinstance(section, dict) else section if isinstance(section, list) else ()
        return (isinstance(section, dict) and bool(section.get("mask_head"))) or any(map(has_head, sections))

    return any(map(loads_masks, leaves(config.data.train))) or has_head(config.model)


def classes_of(kind: str) -> tuple[str, ...] | None:
    """The names that MMDetection gives the classes of a kind of data set; None where it gives none."""
    return getattr(DATASETS.get(kind), "CLASSES", None)


def test_pipeline(section: dict[str, Any]) -> list[Any]:
    """The pipeline of a test data set, for batches of any size, as `inference_detector` has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it replaces
        return replace_ImageToTensor(section["pipeline"])


def augments(pipeline: Sequence[Any]) -> bool:
    """Whether a test pipeline makes several inputs of an image, which MMDetection takes one image at a time."""
    multi = [step for step in pipeline if step["type"] == "MultiScaleFlipAug"]
    scales = [step.get("img_scale") or step.get("scale_factor") for step in multi]
    return any(step.get("flip") for step in multi) or any(isinstance(s, list) and len(s) > 1 for s in scales)


def loss_pipeline(test: Sequence[Any], train: Any) -> list[Any]:
    """The pipeline that makes training samples without augmentation: the training's annotations and inputs, at the size
    that the test pipeline has first, and not flipped.

    Args:
        test: the test pipeline.
        train: `data.train` of the config.

    Raises:
        UserError: a step of the test pipeline moves the image, and leaves the boxes where they are.
    """
    steps, scale = list(test[1:]), {}
    if multi := next((step for step in steps if step["type"] == "MultiScaleFlipAug"), None):
        for key, name in (("img_scale", "scale"), ("scale_factor", "scale_factor")):
            if (value := multi.get(key)) is not None:
                scale[name] = value[0] if isinstance(value, list) else value
        steps = list(multi["transforms"])
    geometry = [*itertools.takewhile(lambda step: step["type"] not in _FORMATS, steps)]
    geometry = [step for step in geometry if not step["type"].startswith("Load")]
    if any(step["type"] == "RandomCenterCropPad" for step in geometry):
        raise UserError(
            "hyperparameters.validation_loss: RandomCenterCropPad of the test pipeline does not move the boxes with "
            "the image. Fix: remove validation_loss"
        )
    trained = _training_steps(train)
    formats = itertools.dropwhile(lambda step: step["type"] not in _FORMATS, trained)
    return [
        test[0],
        *(step for step in trained if step["type"].startswith("Load") and step["type"] != "LoadImageFromFile"),
        functools.partial(_unflipped, scale),
        *geometry,
        *(step for step in trained if step["type"] in ("FilterAnnotations", "SegRescale")),
        *formats,
    ]


# of these a pipeline makes the model's inputs, once the image is as it should be
_FORMATS = ("DefaultFormatBundle", "ImageToTensor", "ToTensor", "Transpose", "ToDataContainer", "Collect")


def _training_steps(dataset: Any) -> list[Any]:
    """The steps of a training data set's pipelines, its wrappers' last; of several data sets the first one's."""
    if isinstance(dataset, (list, tuple)):
        return _training_steps(dataset[0])
    within = dataset.get("dataset") or dataset.get("datasets")
    return [*(_training_steps(within) if within else ()), *(dataset.get("pipeline") or ())]


def _unflipped(scale: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """As MultiScaleFlipAug hands an image to its transforms."""
    return {**results, **scale, "flip": False, "flip_direction": None}


def decoder(load: dict[str, Any]) -> Callable[[bytes], np.ndarray]:
    """The array that a pipeline's LoadImageFromFile makes from a file's bytes: (height, width, 3), BGR by default."""
    return functools.partial(
        _decode, load.get("color_type", "color"), load.get("channel_order", "bgr"), load.get("to_float32", False)
    )


def _decode(color_type: str, channel_order: str, to_float32: bool, data: bytes) -> np.ndarray:
    try:
        image = mmcv.imfrombytes(data, flag=color_type, channel_order=channel_order)
    except cv2.error as error:
        raise ValueError(str(error)) from error
    if image is None:
        raise ValueError("OpenCV cannot decode it")
    return image.astype(np.float32) if to_float32 else image


class PipelineTransform:
    """A record and its decoded image through a pipeline without its LoadImageFromFile.

    Returns what the pipeline returns, None where it finds the image to be of no use.

    Args:
        fast: leave Normalize to the device, see `with_quick_end`.
    """

    def __init__(
        self, pipeline: Sequence[Any], leaf: ConfigDict, images: ImageStorage, annotated: bool, fast: bool = False
    ):
        try:
            self.pipeline = Compose(with_quick_end(pipeline[1:], fast, leaf["type"]))
        except Exception as error:  # the builder raises what the transforms' constructors raise
            raise UserError(
                f"a pipeline of the MMDetection config cannot be built: {error}. Fix: correct the pipeline"
            ) from error
        self.folder = str(getattr(images, "folder", ""))
        self.seg_prefix, self.seg_suffix = leaf.get("seg_prefix"), leaf.get("seg_suffix", ".png")
        self.annotated = annotated

    def __call__(self, image: np.ndarray, record: ImageRecord) -> Any:
        results = {
            "img_info": {
                "id": record.image_id,
                "filename": record.file_name,
                "file_name": record.file_name,
                "height": record.height,
                "width": record.width,
            },
            "img_prefix": self.folder,
            "seg_prefix": self.seg_prefix,
            "proposal_file": None,
            "bbox_fields": [],
            "mask_fields": [],
            "seg_fields": [],
            # as LoadImageFromFile leaves them
            "filename": str(Path(self.folder) / record.file_name),
            "ori_filename": record.file_name,
            "img": image,
            "img_shape": image.shape,
            "ori_shape": image.shape,
            "img_fields": ["img"],
        }
        if self.annotated:
            results["ann_info"] = annotation_info(record, self.seg_suffix)
        return self.pipeline(results)


def annotation_info(record: ImageRecord, seg_suffix: str = ".png") -> dict[str, Any]:
    """What CocoDataset makes of an image's annotations: crowds apart, and nothing under a pixel wide or high, without
    area or outside of the image."""
    boxes = record.file_boxes
    inside_width = np.minimum(boxes[:, 0] + boxes[:, 2], record.width) - np.maximum(boxes[:, 0], 0)
    inside_height = np.minimum(boxes[:, 1] + boxes[:, 3], record.height) - np.maximum(boxes[:, 1], 0)
    usable = (inside_width > 0) & (inside_height > 0) & (record.areas > 0) & (boxes[:, 2:] >= 1).all(axis=1)
    objects, crowds = usable & ~record.iscrowd, usable & record.iscrowd
    return {
        "bboxes": record.boxes[objects],
        "labels": record.labels[objects],
        "bboxes_ignore": record.boxes[crowds],
        "masks": _LazyMasks(record, np.flatnonzero(objects)),
        "seg_map": record.file_name.rsplit(".", 1)[0] + seg_suffix,
    }


class _LazyMasks(Sequence):
    """The objects' segmentations, decoded only where a pipeline loads masks."""

    def __init__(self, record: ImageRecord, positions: np.ndarray):
        self.record, self.positions = record, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Any:
        return self.record.segmentations[self.positions[index]]


class LossTransform:
    """A pipeline of `loss_pipeline`, on record and image; None where it finds the image to be of no use."""

    def __init__(self, pipeline: Sequence[Any], leaf: ConfigDict, images: ImageStorage, fast: bool = False):
        self.transform = PipelineTransform(pipeline, leaf, images, annotated=True, fast=fast)

    def __call__(self, image: np.ndarray, record: ImageRecord) -> tuple[Any, int] | None:
        sample = self.transform(image.copy(), record)  # the evaluation's pipeline has the image too
        return None if sample is None else (sample, record.image_id)


def loss_transform(config: Any, images: ImageStorage, fast: bool) -> LossTransform:
    """From a validation image to a training sample without augmentation.

    Raises:
        UserError: the config trains on segmentation maps, and the validation data has none.
    """
    leaf = leaves(config.data.val)[0]
    pipeline = loss_pipeline(leaf["pipeline"], config.data.train)
    if any(isinstance(step, dict) and step.get("with_seg") for step in pipeline) and not leaf.get("seg_prefix"):
        raise UserError(
            "hyperparameters.validation_loss: the config trains on segmentation maps, and there are none to validate "
            "on. Fix: set config_overrides: {data.val.seg_prefix: FOLDER}, or remove validation_loss"
        )
    return LossTransform(pipeline, leaf, images, fast)


def trained_images(annotations: CocoAnnotations, leaf: ConfigDict) -> np.ndarray:
    """(images,) whether CocoDataset trains on the image: not on small ones, nor on those without annotations unless
    `filter_empty_gt` is off."""
    columns = annotations.columns
    used = np.minimum(columns["widths"], columns["heights"]) >= _MIN_SIDE
    if leaf.get("filter_empty_gt", True):
        used &= np.diff(columns["offsets"]) > 0
    return used


class CocoSamples:
    """The shared loader under the protocol that MMDetection's data set wrappers ask for.

    Attributes:
        flag: (samples,) the aspect ratio group of each.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        images: ImageStorage,
        leaf: ConfigDict,
        bad_images: BadImages | None = None,
        fast: bool = False,
    ):
        pipeline = leaf["pipeline"]
        transform = PipelineTransform(pipeline, leaf, images, annotated=True, fast=fast)
        self.images = CocoDetection(annotations, images, transform, 0, False, bad_images, decoder(pipeline[0]))
        self.transform = transform
        self.CLASSES = tuple(annotations.category_names)
        self.PALETTE = CocoDataset.PALETTE
        columns = annotations.columns
        self.indices = np.flatnonzero(trained_images(annotations, leaf))
        if not len(self.indices):
            raise UserError(
                f"data.train: no image of {annotations.path} has both annotations and sides of {_MIN_SIDE} pixels. "
                "Fix: check the file with `check`"
            )
        self.flag = aspect_ratio_groups(columns["widths"][self.indices], columns["heights"][self.indices])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        for _ in range(max(len(self), 1000)):
            try:
                sample = transformed(self.transform, *self.images.load(int(self.indices[index])))
            except BadImageError as error:
                self.images.bad_images.leave_out(error, self.image_id(index))
                sample = None
            if sample is not None:
                return sample
            # as CustomDataset: another image of the same aspect
            index = int(np.random.choice(np.flatnonzero(self.flag == self.flag[index])))
        raise UserError(
            f"data.train: the pipeline skips every image of {self.images.annotations.path}. Fix: check the boxes' "
            "sizes, and the pipeline's crops and filters"
        )

    def image_id(self, index: int) -> int:
        return int(self.images.annotations.image_ids[self.indices[index]])

    def get_ann_info(self, index: int) -> dict[str, Any]:
        return annotation_info(self.images.annotations[int(self.indices[index])])

    def get_cat_ids(self, index: int) -> list[int]:
        return self.images.annotations[int(self.indices[index])].labels.tolist()


def build_samples(dataset: Any, build_leaf: Callable[[ConfigDict], Any]) -> Any:
    """A config's data set with MMDetection's wrappers around what `build_leaf` makes of each innermost one."""
    if isinstance(dataset, (list, tuple)):
        return DATASETS.get("ConcatDataset")([build_samples(part, build_leaf) for part in dataset])
    wrapper = DATASETS.get(dataset["type"])
    arguments = {key: value for key, value in dataset.items() if key not in ("type", "dataset", "datasets")}
    if "datasets" in dataset:
        return wrapper([build_samples(part, build_leaf) for part in dataset["datasets"]], **arguments)
    if "dataset" in dataset:
        return wrapper(build_samples(dataset["dataset"], build_leaf), **arguments)
    return build_leaf(dataset)


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


def image_id_of(dataset: Any, index: int) -> int:
    """COCO's id of a training sample's image; of data sets that have none, the position."""
    if isinstance(dataset, CocoSamples):
        return dataset.image_id(index)
    if hasattr(dataset, "cumulative_sizes"):  # ConcatDataset
        part = int(np.searchsorted(dataset.cumulative_sizes, index, side="right"))
        return image_id_of(dataset.datasets[part], index - (dataset.cumulative_sizes[part - 1] if part else 0))
    if hasattr(dataset, "repeat_indices"):  # ClassBalancedDataset
        return image_id_of(dataset.dataset, dataset.repeat_indices[index])
    if hasattr(dataset, "dataset"):  # RepeatDataset, MultiImageMixDataset
        return image_id_of(dataset.dataset, index % len(dataset.dataset))
    return index


def labels_of_samples(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """As `labels_of` gives them, of a training data set within MMDetection's wrappers.

    Raises:
        UserError: a data set does not say which classes an image has.
    """
    if isinstance(dataset, CocoSamples):
        return labels_of(dataset.images.annotations, dataset.indices)
    if hasattr(dataset, "cumulative_sizes"):  # ConcatDataset
        starts = [0, *dataset.cumulative_sizes]
        parts = [labels_of_samples(part) for part in dataset.datasets]
        samples = [samples + start for (samples, _), start in zip(parts, starts, strict=False)]
        return np.concatenate(samples), np.concatenate([labels for _, labels in parts])
    if hasattr(dataset, "dataset"):  # RepeatDataset, MultiImageMixDataset
        samples, labels = labels_of_samples(dataset.dataset)
        times, count = len(dataset) // len(dataset.dataset), len(dataset.dataset)
        return np.concatenate([samples + i * count for i in range(times)]), np.tile(labels, times)
    if not hasattr(dataset, "get_cat_ids"):
        raise UserError(
            f"data.repeat_threshold: {type(dataset).__name__} of the MMDetection config does not know the classes of "
            "an image. Fix: remove the key"
        )
    of_samples = [list(dataset.get_cat_ids(index)) for index in range(len(dataset))]
    samples = np.repeat(np.arange(len(of_samples)), list(map(len, of_samples)))
    return samples, np.asarray(list(itertools.chain.from_iterable(of_samples)), dtype=np.int64)


def repeats_by_itself(data: Any) -> str | None:
    """By what the `data` of a config repeats the images of rare classes; None where it does not."""

    def has_balanced(dataset: Any) -> bool:
        if isinstance(dataset, (list, tuple)):
            return any(map(has_balanced, dataset))
        within = [dataset.get("dataset"), *(dataset.get("datasets") or ())]
        return dataset.get("type") == "ClassBalancedDataset" or any(map(has_balanced, filter(None, within)))

    if has_balanced(data.train):
        return "ClassBalancedDataset"
    return "class_aware_sampler" if (data.get("train_dataloader") or {}).get("class_aware_sampler") else None


def images_of_classes(dataset: Any) -> list[np.ndarray]:
    """The positions in a training data set of the images that have each class; classes without any left out.

    Raises:
        UserError: the data set's wrapper does not say which classes an image has.
    """
    if not hasattr(dataset, "get_cat_ids"):
        raise UserError(
            f"data.train_dataloader.class_aware_sampler of the MMDetection config: {type(dataset).__name__} does not "
            "know the classes of an image. Fix: remove the sampler, or use another data set"
        )
    found: dict[int, list[int]] = {}
    for index in range(len(dataset)):
        for label in set(dataset.get_cat_ids(index)):
            found.setdefault(int(label), []).append(index)
    return [np.asarray(found[label]) for label in sorted(found)]


class ClassAwareBatchSampler(TrainingBatchSampler):
    """MMDetection's ClassAwareSampler: the classes take turns, in random order, and each gives its next images.

    Args:
        images_of_classes: see the function of that name.
        num_sample_class: images that a class gives at its turn.
    """

    def __init__(self, images_of_classes: list[np.ndarray], num_sample_class: int, *arguments: Any):
        super().__init__(*arguments)
        self.images_of_classes, self.num_sample_class = images_of_classes, num_sample_class
        self.length = -(-len(self.groups) // (self.slots * self.per_slot_batch_size))

    def _epoch(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])

        def shuffled_again_and_again(values: np.ndarray) -> Iterator[int]:
            while True:
                yield from generator.permutation(values).tolist()

        count = len(self) * self.slots * self.per_slot_batch_size
        classes = shuffled_again_and_again(np.arange(len(self.images_of_classes)))
        images = [shuffled_again_and_again(of_class) for of_class in self.images_of_classes]
        turns = (images[label] for label in classes for _ in range(self.num_sample_class))
        drawn = [next(of_class) for of_class in itertools.islice(turns, count)]
        return np.asarray(drawn).reshape(len(self), self.slots, self.per_slot_batch_size)


class TrainingSamples(torch.utils.data.Dataset):
    """MMDetection's training samples by `SampleKey`, with the random numbers of (seed, epoch, index).

    Args:
        mode_switch: from which epoch on to skip which transforms of a MultiImageMixDataset (YOLOXModeSwitchHook).
    """

    def __init__(self, dataset: Any, seed: int, mode_switch: tuple[int, Sequence[str]] | None = None):
        self.dataset = dataset
        self.seed = seed
        self.mode_switch = mode_switch
        self.mixes = hasattr(dataset, "update_skip_type_keys")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> tuple[Any, int]:
        if self.mode_switch is not None and key.epoch >= self.mode_switch[0] and self.mixes:
            self.dataset.update_skip_type_keys(self.mode_switch[1])
        seed_all(self.seed, *key.seeds)
        image_id = image_id_of(self.dataset, key.index)
        try:
            sample = self.dataset[key.index]
        except (ValueError, IndexError) as error:
            if not self.mixes:
                raise
            raise UserError(
                f"the train pipeline of the MMDetection config: image id {image_id}: {error}. Fix: remove the "
                "transform that raises it, or the one before it: Mosaic and MixUp do not move masks"
            ) from error
        check_counts(sample, image_id)
        return sample, image_id


def check_counts(sample: Any, image_id: Any) -> None:
    """Raises UserError if a training sample has not as many labels and masks as boxes."""
    if not isinstance(sample, dict):
        return
    names = ("gt_bboxes", "gt_labels", "gt_masks", "gt_keypoints")
    counts = {name: len(sample[name].data) for name in names if hasattr(sample.get(name), "data")}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise UserError(
            f"the train pipeline of the MMDetection config: it makes {found} of image id {image_id}. Fix: remove the "
            "transform that changes only some of them: Mosaic and MixUp do not move masks"
        )


class OwnEvaluationSamples(torch.utils.data.Dataset):
    """The images of one of MMDetection's own data sets, to detect on."""

    def __init__(self, dataset: CustomDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index], index


class EvaluationTransform:
    """The test pipeline, on record and image."""

    def __init__(self, pipeline: Sequence[Any], leaf: ConfigDict, images: ImageStorage, fast: bool = False):
        self.transform = PipelineTransform(pipeline, leaf, images, annotated=False, fast=fast)

    def __call__(self, image: np.ndarray, record: ImageRecord) -> tuple[Any, int]:
        return self.transform(image, record), record.image_id


def collate(samples: list[tuple[Any, int]]) -> Batch:
    """mmcv's batch. `images` is (B, 3, H, W), padded, or a list of such where the test pipeline augments; `targets`
    the other inputs of the detector's forward, without mmcv's containers."""
    inputs = _unwrap(mmcv_collate([sample for sample, _ in samples], samples_per_gpu=len(samples)))
    return Batch(inputs.pop("img"), inputs, [image_id for _, image_id in samples])


def _unwrap(value: Any) -> Any:
    if isinstance(value, DataContainer):
        return value.data[0]
    if isinstance(value, dict):
        return {key: _unwrap(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_unwrap(item) for item in value]
    return value
