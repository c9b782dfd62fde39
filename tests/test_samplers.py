"""Which images make up which batch."""

from itertools import islice

import pytest

from shared.samplers import EvaluationBatchSampler, TrainingBatchSampler


def first_batches(count, **arguments):
    return list(islice(TrainingBatchSampler(**arguments), count))


def test_an_epoch_has_every_image_once_and_the_next_another_order():
    batches = first_batches(10, dataset_size=20, per_slot_batch_size=4, seed=1)
    epochs = [[key.index for batch in batches[i : i + 5] for key in batch] for i in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert {key.epoch for batch in batches[5:] for key in batch} == {1}


def test_slots_share_each_global_batch_of_one_slot():
    whole = first_batches(12, dataset_size=21, per_slot_batch_size=6, seed=1)
    halves = [first_batches(12, dataset_size=21, per_slot_batch_size=3, seed=1, rank=r, slots=2) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


@pytest.mark.parametrize("first_batch", [1, 4, 5, 13])
def test_it_goes_on_where_it_was(first_batch):
    arguments = {"dataset_size": 19, "per_slot_batch_size": 2, "seed": 7, "rank": 1, "slots": 2}
    everything = first_batches(20, **arguments)
    assert first_batches(20 - first_batch, **arguments, first_batch=first_batch) == everything[first_batch:]


def test_fewer_images_than_a_batch_still_fill_it():
    (batch,) = first_batches(1, dataset_size=3, per_slot_batch_size=8, seed=0)
    assert len(batch) == 8


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_evaluation_sees_every_image_and_leaves_no_slot_without_a_batch(slots):
    indices = range(5)
    shares = [[i for batch in EvaluationBatchSampler(indices, 2, rank, slots) for i in batch] for rank in range(slots)]
    assert all(shares)
    assert {i for share in shares for i in share} == set(indices)
    if slots <= 5:
        assert sum(map(len, shares)) == 5
