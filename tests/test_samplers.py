"""Which images make up which batch."""

from itertools import islice

import numpy as np
import pytest

from shared.data.samplers import EvaluationBatchSampler, TrainingBatchSampler, aspect_ratio_groups


def first_batches(count, **arguments):
    return list(islice(TrainingBatchSampler(**arguments), count))


def test_an_epoch_has_every_image_once_and_the_next_another_order():
    batches = first_batches(10, groups=np.zeros(20), per_slot_batch_size=4, seed=1)
    epochs = [[key.index for batch in batches[i : i + 5] for key in batch] for i in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert {key.epoch for batch in batches[5:] for key in batch} == {1}


def test_slots_share_each_global_batch_of_one_slot():
    whole = first_batches(12, groups=np.zeros(21), per_slot_batch_size=6, seed=1)
    halves = [first_batches(12, groups=np.zeros(21), per_slot_batch_size=3, seed=1, rank=r, slots=2) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


@pytest.mark.parametrize("first_batch", [1, 4, 5, 13])
def test_it_goes_on_where_it_was(first_batch):
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


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_evaluation_sees_every_image_and_leaves_no_slot_without_a_batch(slots):
    indices = range(5)
    shares = [[i for batch in EvaluationBatchSampler(indices, 2, rank, slots) for i in batch] for rank in range(slots)]
    assert all(shares)
    assert {i for share in shares for i in share} == set(indices)
    if slots <= 5:
        assert sum(map(len, shares)) == 5
