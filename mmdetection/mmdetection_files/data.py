"""MMDetection's training samples over the shared loader, within its data set wrappers, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from mmcv import ConfigDict
from mmcv.parallel import DataContainer
from mmcv.parallel import collate as mmcv_collate
from mmdet.datasets import CocoDataset
from mmdet.datasets.builder import DATASETS

from mmdetection_files.pipelines import PipelineTransform, annotation_info, decoder
from shared.data.annotations import CocoAnnotations
from shared.data.dataset import BadImages, CocoDetection, SampleKey, seed_all, transformed
from shared.data.images import BadImageError
from shared.data.loading import Batch, aspect_ratio_groups
from shared.data.storage import ImageStorage
from shared.errors import UserError

_MIN_SIDE = 32  # pixels; CocoDataset leaves smaller images out of the training


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
