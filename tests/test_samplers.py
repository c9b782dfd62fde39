"""The choice of the images in each batch."""

import json
import tracemalloc
from itertools import islice

import numpy as np
import pytest
from tiny_models import CONFIGS, trial_classes

from shared.data.annotations import CocoAnnotations
from shared.data.dataset import SampleKey
from shared.data.loading import (
    EvaluationBatchSampler,
    TrainingBatchSampler,
    aspect_ratio_groups,
    labels_of,
    repeat_factors,
    size_groups,
)
from shared.errors import UserError


def first_batches(count, **arguments):
    return list(islice(TrainingBatchSampler(**arguments), count))


def test_an_epoch_has_every_image_once_and_the_next_another_order():
    batches = first_batches(10, groups=np.zeros(20), per_slot_batch_size=4, seed=1)
    epochs = [[key.index for batch in batches[i : i + 5] for key in batch] for i in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert {key.epoch for batch in batches[5:] for key in batch} == {1}


def test_a_slot_keeps_only_its_own_numbers_of_an_epoch():
    def kept(slots):
        tracemalloc.start()
        batches = iter(TrainingBatchSampler(np.zeros(100_000, np.uint8), 4, seed=1, slots=slots))
        next(batches)
        bytes_kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return bytes_kept / 100_000

    kept(1)  # what is made once
    assert kept(1) < 12
    assert kept(8) < 3


def test_slots_share_each_global_batch_of_one_slot():
    whole = first_batches(12, groups=np.zeros(21), per_slot_batch_size=6, seed=1)
    halves = [first_batches(12, groups=np.zeros(21), per_slot_batch_size=3, seed=1, rank=r, slots=2) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


@pytest.mark.parametrize("first_batch", [1, 4, 5, 13])
def test_a_sampler_continues_where_it_stopped(first_batch):
    arguments = {"groups": np.zeros(19), "per_slot_batch_size": 2, "seed": 7, "rank": 1, "slots": 2}
    everything = first_batches(20, **arguments)
    assert first_batches(20 - first_batch, **arguments, first_batch=first_batch) == everything[first_batch:]


def test_fewer_images_than_a_batch_still_fill_it():
    (batch,) = first_batches(1, groups=np.zeros(3), per_slot_batch_size=8, seed=0)
    assert len(batch) == 8


def test_a_batch_holds_images_of_one_aspect_and_an_epoch_still_every_image():
    widths, heights = np.tile([640, 480, 500], 7), np.tile([480, 640, 500], 7)
    groups = aspect_ratio_groups(widths, heights)
    assert groups.tolist() == [1, 0, 0] * 7
    length = len(TrainingBatchSampler(groups, 4, seed=2))
    assert length == 2 + 4  # 7 wide images, 14 others
    batches = first_batches(length, groups=groups, per_slot_batch_size=4, seed=2)
    kinds = [{groups[key.index] for key in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    assert {key.index for batch in batches for key in batch} == set(range(21))
    assert kinds != sorted(kinds, key=min)  # the groups are mixed over the epoch


def test_batches_of_one_aspect_are_shared_by_the_slots_and_resumed():
    groups = aspect_ratio_groups(np.tile([3, 2], 10), np.tile([2, 3], 10))
    whole = first_batches(9, groups=groups, per_slot_batch_size=4, seed=5)
    halves = [first_batches(9, groups=groups, per_slot_batch_size=2, seed=5, rank=r, slots=2) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert first_batches(2, groups=groups, per_slot_batch_size=4, seed=5, first_batch=7) == whole[7:]


def rare(images=200, seed=0):
    """Labels of each image: some rare, some repeated, and images without any."""
    generator = np.random.default_rng(seed)
    return [
        generator.choice(6, generator.integers(0, 5), p=[0.5, 0.3, 0.14, 0.04, 0.015, 0.005]) for _ in range(images)
    ]


def flat(labels):
    return np.repeat(np.arange(len(labels)), list(map(len, labels))), np.concatenate(labels)


@pytest.mark.parametrize("threshold", [0.01, 0.2, 1.0])
def test_an_image_comes_as_often_as_lvis_has_it(threshold):
    labels = rare()
    having = {label: sum(label in of_image for of_image in labels) for label in range(6)}
    factor = {c: max(1.0, (threshold * len(labels) / count) ** 0.5) for c, count in having.items() if count}
    expected = [max((factor[label] for label in of_image), default=1.0) for of_image in labels]
    np.testing.assert_allclose(repeat_factors(*flat(labels), len(labels), threshold), expected)


def test_without_any_object_every_image_comes_once():
    nothing = np.empty(0, dtype=np.int64)
    assert repeat_factors(nothing, nothing.astype(np.int32), 3, 0.5).tolist() == [1, 1, 1]


def test_the_factors_are_those_of_detectron2():
    samplers = pytest.importorskip("detectron2.data.samplers", exc_type=ImportError)
    labels = rare()
    dicts = [{"annotations": [{"category_id": int(label)} for label in of_image]} for of_image in labels]
    theirs = samplers.RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, 0.3)
    assert theirs.max() > 2
    np.testing.assert_allclose(repeat_factors(*flat(labels), len(labels), 0.3), theirs.numpy(), rtol=1e-6)


def test_the_labels_of_images_are_those_of_their_records(shapes):
    annotations = CocoAnnotations.open(str(shapes / "annotations/train.json"))
    chosen = np.array([5, 2, 5, 9])
    samples, labels = labels_of(annotations, chosen)
    for position, index in enumerate(chosen):
        assert labels[samples == position].tolist() == annotations[int(index)].labels.tolist()
    assert len(labels_of(annotations)[0]) == len(annotations.columns["labels"])


REPEATS = np.random.default_rng(3).choice([1.0, 1.0, 1.3, 2.5, 4.2], 40)


def test_each_epoch_repeats_each_image_by_its_factor():
    sampler = TrainingBatchSampler(np.zeros(40), 1, 1, repeats=REPEATS)
    assert len(sampler) == int(np.ceil(REPEATS.sum()))
    assert len(TrainingBatchSampler(np.zeros(40), 4, 1, repeats=REPEATS)) == -(-len(sampler) // 4)
    counts, epochs = np.zeros(40), 400
    for batch in islice(sampler, epochs * len(sampler)):
        for key in batch:
            counts[key.index] += 1
    assert np.abs(counts / epochs - REPEATS).max() < 0.15
    assert (counts >= epochs * np.floor(REPEATS)).all()
    one, other = (
        first_batches(len(sampler), groups=np.zeros(40), per_slot_batch_size=4, seed=s, repeats=REPEATS) for s in (1, 2)
    )
    assert one != other


def test_the_copies_of_an_image_in_an_epoch_are_samples_of_their_own():
    batches = first_batches(12, groups=np.zeros(3), per_slot_batch_size=2, seed=0, repeats=np.array([3.0, 1.0, 2.0]))
    epoch = [key for batch in batches[:3] for key in batch]
    assert sorted((key.index, key.copy) for key in epoch) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    assert len({key.seeds for key in epoch}) == 6
    assert SampleKey(4, 7).seeds == (4, 7)


@pytest.mark.parametrize("groups", [np.zeros(40), np.arange(40) % 3 == 0], ids=["one group", "two"])
def test_with_repeats_slots_and_a_resume_see_the_same_images(groups):
    arguments = {"groups": groups, "seed": 5, "repeats": REPEATS}
    whole = first_batches(60, per_slot_batch_size=4, **arguments)
    halves = [first_batches(60, per_slot_batch_size=2, rank=rank, slots=2, **arguments) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert first_batches(23, per_slot_batch_size=4, first_batch=37, **arguments) == whole[37:]
    assert all(len({groups[key.index] for key in batch}) == 1 for batch in whole)


def test_each_detector_repeats_the_images_of_a_rare_category(detector, shapes, train, tmp_path):
    coco = json.loads((shapes / "annotations/train.json").read_text())
    kept = sorted({a["image_id"] for a in coco["annotations"] if a["category_id"] == 3})[:2]
    coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] != 3 or a["image_id"] in kept]
    (tmp_path / "rare.json").write_text(json.dumps(coco))
    images = {image["id"]: set() for image in coco["images"]}
    for annotation in coco["annotations"]:
        images[annotation["image_id"]].add(annotation["category_id"])
    if detector in OWN:  # as their configs say
        images = {image: labels for image, labels in images.items() if labels}
    shares = {c: sum(c in labels for labels in images.values()) / len(images) for c in (1, 2, 3)}
    expected = [max([1.0, *((0.5 / shares[c]) ** 0.5 for c in labels)]) for labels in images.values()]
    config = CONFIGS[detector](shapes)
    config["data"].update(workers=0, repeat_threshold=0.5)
    config["data"]["train"]["annotations"] = str(tmp_path / "rare.json")
    trial_class, seen = trial_classes()[detector], []

    def build_training_data_loader(self):
        seen.extend([self.repeats, self.batches_per_epoch, dict(self.summary_lines())["repeated"]])
        next(iter(super(cls, self).build_training_data_loader()))
        raise UserError("seen")

    cls = type(trial_class.__name__, (trial_class,), {"build_training_data_loader": build_training_data_loader})
    cls.__module__ = trial_class.__module__
    with pytest.raises(UserError, match="seen"):
        train(cls, config)
    repeats, batches, said = seen
    assert max(expected) > 2
    np.testing.assert_allclose(sorted(repeats), sorted(expected))
    assert batches == -(-int(np.ceil(sum(expected))) // 4)
    assert said.startswith(f"{sum(factor > 1 for factor in expected)} of {len(images)} images, up to")


OWN = {
    "mmdetection": {"data.train_dataloader": {"class_aware_sampler": {"num_sample_class": 1}}},
    "detectron2": {"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD": 0.1},
}


@pytest.mark.parametrize("detector", OWN, indirect=True)
def test_a_config_that_repeats_images_itself_is_refused_with_a_threshold(detector, shapes, train):
    config = CONFIGS[detector](shapes, **OWN[detector])
    config["data"].update(workers=0, repeat_threshold=0.5)
    with pytest.raises(
        UserError, match=r"data.repeat_threshold: the .*onfig repeats images itself, by .*. Fix: remove one"
    ):
        train(trial_classes()[detector], config)


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_evaluation_sees_every_image_and_leaves_no_slot_without_a_batch(slots):
    indices = range(5)
    shares = [[i for batch in EvaluationBatchSampler(indices, 2, rank, slots) for i in batch] for rank in range(slots)]
    assert all(shares)
    assert {i for share in shares for i in share} == set(indices)
    if slots <= 5:
        assert sum(map(len, shares)) == 5


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_evaluation_batches_have_one_size_shared_evenly_by_slots(slots):
    widths, heights = np.array([4, 6, 4, 4, 6, 9, 4, 6, 4, 4]), np.array([3, 3, 3, 8, 3, 9, 3, 3, 8, 3])
    groups = size_groups(widths, heights)
    indices = range(1, 10)
    of_slots = [EvaluationBatchSampler(indices, 2, rank, slots, groups=groups).batches for rank in range(slots)]
    seen = [i for batches in of_slots for batch in batches for i in batch]
    assert sorted(seen) == list(indices)
    assert all(len(batch) <= 2 and len({(widths[i], heights[i]) for i in batch}) == 1 for b in of_slots for batch in b)
    for group in (groups, np.zeros_like(groups)):  # each size, and all images
        for number in np.unique(group):
            counts = [sum(group[i] == number for batch in batches for i in batch) for batches in of_slots]
            assert max(counts) - min(counts) <= 1
    assert EvaluationBatchSampler(indices, 2, 9, 10, groups=groups).batches == [[2]]  # which another slot has too


def test_a_validation_by_sizes_that_is_cut_short_ends_after_a_batch():
    asked = iter([False, True])
    sampler = EvaluationBatchSampler(range(6), 2, stop=lambda: next(asked), groups=np.array([0, 1, 0, 1, 1, 2]))
    assert list(sampler) == [[0, 2], [1, 3]]
    assert len(sampler) == 4
