"""How often a config trains on the images of rare classes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from mmdetection_files.data import CocoSamples
from shared.data.loading import TrainingBatchSampler, labels_of
from shared.errors import UserError


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
