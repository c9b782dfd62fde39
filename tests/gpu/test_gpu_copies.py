"""Copies on their own stream, while the device is late and its memory is short."""

import random

import pytest
import torch

from shared.data.loading import Batch, PrefetchLoader
from shared.training.saving import HostCopy

pytestmark = pytest.mark.gpu

SIDE = 2048
BATCH = 4 * SIDE * SIDE  # bytes on the host; prepared, four times that on the device
LIMIT = 2**30


class PinnedBatches:
    """`count` batches of different bytes in new pinned memory. `sums` has their expected sums."""

    def __init__(self, count):
        self.count = count
        self.base = torch.randint(0, 256, (4, SIDE, SIDE), dtype=torch.uint8)
        self.sums = []

    def __iter__(self):
        for i in range(self.count):
            images = self.base + i
            self.sums.append(int(images.sum(dtype=torch.int64)))
            yield Batch(images, {"numbers": [torch.tensor([i])]}, [i]).pin_memory()


def prepare(batch, number):
    return Batch(batch.images.int() + number, batch.targets, batch.image_ids)  # leaves a block of the side stream free


@pytest.fixture
def short_of_memory():
    """Limits the process to `LIMIT` bytes, so that freed blocks are used again at once."""
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + LIMIT) / total)
    yield
    torch.cuda.synchronize()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_every_batch_is_complete_when_its_step_reads_it_late(short_of_memory):
    count, draws = 60, random.Random(0)
    loader = PinnedBatches(count)
    seen = []
    for number, batch in enumerate(PrefetchLoader(loader, torch.device("cuda", 0), prepare)):
        torch.cuda._sleep(100_000_000)  # some 60 ms: the host is ahead by then
        for _ in range(4):  # a step's own blocks, on the training's stream
            torch.empty(draws.randrange(1, BATCH), dtype=torch.uint8, device="cuda").fill_(255)
        seen.append((batch.images.sum() - number * BATCH, batch.targets["numbers"][0]))
        del batch
    assert [(int(total), int(number)) for total, number in seen] == [(loader.sums[i], i) for i in range(count)]
    assert len(set(loader.sums)) > 1


def test_the_host_does_not_wait_for_a_copy():
    torch.cuda.synchronize()
    batches = iter(PrefetchLoader(PinnedBatches(6), torch.device("cuda", 0), prepare))
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            next(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_the_copy_for_a_checkpoint_holds_the_state_at_its_creation():
    host_copy, weight = HostCopy(), torch.zeros(1 << 24, device="cuda")
    for number in range(1, 4):
        weight += 1
        copied = host_copy.of({"weight": weight, "transposed": weight.view(1 << 12, -1).T})
        weight *= 2  # enqueued at once, after the copy
        assert copied["weight"].is_pinned()
        assert copied["weight"].unique().tolist() == copied["transposed"].unique().tolist() == [2**number - 1]
