"""Batches one ahead of the step, with stand-ins for CUDA's streams that record what is enqueued."""

import contextlib
import random

import pytest
import torch

from shared.data import loading
from shared.data.dataset import seed_all
from shared.data.loading import Batch, PrefetchLoader


class Streams:
    """Two streams, "training" and "side"; `log` has what the host enqueues, in order, as (stream, what)."""

    def __init__(self):
        self.log = []
        self.current = Stream(self, "training")

    @contextlib.contextmanager
    def use(self, stream):
        self.current, before = stream, self.current
        yield
        self.current = before

    def enqueue(self, what):
        self.log.append((self.current.name, what))

    def before(self, stream, event):
        """Everything that `event` of `stream` waits for: earlier entries of its stream, and of streams that it waits
        for."""
        position, seen = self.log.index((stream, event)), set()
        self._collect(stream, position, seen)
        return seen

    def _collect(self, stream, end, seen):
        for i, (name, what) in enumerate(self.log[:end]):
            if name == stream and isinstance(what, Stream):
                self._collect(what.name, i, seen)
            elif name == stream:
                seen.add((name, what))


class Stream:
    def __init__(self, streams, name):
        self.streams, self.name = streams, name

    def wait_stream(self, other):
        self.streams.log.append((self.name, other))


@pytest.fixture
def streams(monkeypatch):
    fake = Streams()

    def to_device(batch, device):
        fake.enqueue(f"copy {batch.image_ids[0]}")
        return batch

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(fake, "side"))
    monkeypatch.setattr(torch.cuda, "stream", fake.use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: fake.current)
    monkeypatch.setattr(loading, "to_device", to_device)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: fake.enqueue(f"keep {int(tensor)} for {stream.name}")
    )
    return fake


def prefetching(streams, loader, first_batch=0):
    def prepare(batch, number):
        streams.enqueue(f"prepare {number}")
        return batch

    return PrefetchLoader(loader, torch.device("cuda", 0), prepare, first_batch)


def host_batches(count, broken_at=None):
    for i in range(count):
        if i == broken_at:
            raise ValueError(f"batch {i} is broken")
        yield Batch(torch.tensor(i), {}, [i])


def test_the_next_batch_is_copied_and_prepared_before_the_step_begins(streams):
    for batch in prefetching(streams, list(host_batches(4))):
        streams.enqueue(f"step {batch.image_ids[0]}")
    host_order = [what for _, what in streams.log if not isinstance(what, Stream)]
    for i in range(3):
        step = host_order.index(f"step {i}")
        assert host_order.index(f"copy {i + 1}") < host_order.index(f"prepare {i + 1}") < step
        if i < 2:
            assert step < host_order.index(f"copy {i + 2}")  # one ahead, no more


def test_a_step_waits_for_its_own_batch_and_not_for_the_next(streams):
    streams.enqueue("mean and deviation")
    for batch in prefetching(streams, list(host_batches(4))):
        streams.enqueue(f"step {batch.image_ids[0]}")
    for i in range(4):
        waited_for = streams.before("training", f"step {i}")
        assert ("side", f"prepare {i}") in waited_for
        assert ("side", f"copy {i + 1}") not in waited_for
    assert ("training", "mean and deviation") in streams.before("side", "copy 0")  # which `prepare` uses
    # the step before runs beside it
    assert not any(what.startswith("step") for _, what in streams.before("side", "prepare 3"))


def test_a_batch_s_memory_is_kept_until_its_step_has_run(streams):
    for batch in prefetching(streams, list(host_batches(3))):
        i = batch.image_ids[0]
        assert ("training", f"keep {i} for training") in streams.log
        streams.enqueue(f"step {i}")


def test_an_error_of_the_loader_comes_after_the_steps_before_it(streams):
    trained = []
    with pytest.raises(ValueError, match="batch 2 is broken"):
        trained.extend(batch.image_ids[0] for batch in prefetching(streams, host_batches(4, broken_at=2)))
    assert trained == [0, 1]
    with pytest.raises(ValueError, match="batch 0 is broken"):
        next(iter(prefetching(streams, host_batches(4, broken_at=0))))


def test_batches_are_numbered_on_from_the_first(streams):
    list(prefetching(streams, list(host_batches(2)), first_batch=7))
    assert [what for _, what in streams.log if str(what).startswith("prepare")] == ["prepare 7", "prepare 8"]


def test_waiting_counts_the_loader_s_seconds_and_not_the_step_s(streams, monkeypatch):
    clock = 0.0
    monkeypatch.setattr(loading.time, "perf_counter", lambda: clock)

    def slow_batches():
        nonlocal clock
        for batch in host_batches(3):
            clock += 2.0
            yield batch

    loader = prefetching(streams, slow_batches())
    for _ in loader:
        clock += 10.0
    assert loader.waiting == 6.0


def test_who_stops_early_leaves_the_rest_unread(streams):
    read = []

    def counted():
        for batch in host_batches(100):
            read.append(batch.image_ids[0])
            yield batch

    batches = iter(prefetching(streams, counted()))
    next(batches)
    batches.close()
    assert read == [0, 1]


def test_a_batch_s_random_numbers_follow_from_its_number(streams):
    def prepare(batch, number):
        seed_all(3, 0, number, 0)
        return Batch(torch.tensor(number), random.random(), batch.image_ids)

    def draws(device, first_batch=0):
        loader = PrefetchLoader(list(host_batches(6))[first_batch:], torch.device(device), prepare, first_batch)
        drawn = []
        for number, batch in enumerate(loader, start=first_batch):
            seed_all(3, 0, number, 1)  # as a step does
            drawn.append((batch.targets, random.random()))
        return drawn

    ahead = draws("cuda")
    assert draws("cpu") == ahead
    assert draws("cuda", first_batch=4) == ahead[4:]
    assert len({number for step in ahead for number in step}) == 12
