"""MMDetection's pipelines on records and images of the shared loader: for training, its loss, and detection."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from mmcv import ConfigDict
from mmdet.datasets import replace_ImageToTensor
from mmdet.datasets.pipelines import Compose

from mmdetection_files.config_fields import leaves
from mmdetection_files.pixels import with_quick_end
from shared.data.annotations import ImageRecord
from shared.data.storage import ImageStorage
from shared.errors import UserError

cv2.setNumThreads(0)  # each loader worker has a core to itself, as in mmdet's setup_multi_processes


def loads_masks(leaf: dict[str, Any]) -> bool:
    """Whether a data set's pipeline loads its masks."""
    return any(step["type"] == "LoadAnnotations" and step.get("with_mask") for step in leaf.get("pipeline") or ())


def trains_masks(config: Any) -> bool:
    """Whether the data of a config are trained on with their masks."""

    def has_head(section: Any) -> bool:
        sections = section.values() if isinstance(section, dict) else section if isinstance(section, list) else ()
        return (isinstance(section, dict) and bool(section.get("mask_head"))) or any(map(has_head, sections))

    return any(map(loads_masks, leaves(config.data.train))) or has_head(config.model)


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


class EvaluationTransform:
    """The test pipeline, on record and image."""

    def __init__(self, pipeline: Sequence[Any], leaf: ConfigDict, images: ImageStorage, fast: bool = False):
        self.transform = PipelineTransform(pipeline, leaf, images, annotated=False, fast=fast)

    def __call__(self, image: np.ndarray, record: ImageRecord) -> tuple[Any, int]:
        return self.transform(image, record), record.image_id
