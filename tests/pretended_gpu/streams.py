"""The order of reads and writes on the pretended GPU, by vector clocks.

A clock maps a stream's number to how many operations of that stream have certainly ended. Each operation raises its
stream's own count. Waiting for a stream or an event merges clocks. Two accesses to memory are a race if one
writes, and the later one's clock does not cover the earlier one.
"""

import collections
import dataclasses
import os
import sys
import threading
import traceback
import warnings
from pathlib import Path

import torch

GPU = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # each process has one
HERE, PYTORCH = (str(Path(file).parent) + "/" for file in (__file__, torch.__file__))


class Clock(dict):
    """How many operations of each stream have ended, by the stream's number."""

    def merge(self, other):
        for number, count in other.items():
            self[number] = max(count, self.get(number, 0))

    def covers(self, number, count):
        return self.get(number, 0) >= count


@dataclasses.dataclass
class Wait:
    """An operation that made the host wait. The last frame of the stack is the innermost."""

    operation: str
    stack: list[traceback.FrameSummary]


class Record:
    """What happened on the pretended GPU.

    Attributes:
        waits: the host's waits since the list was last emptied.
        races, unpinned, mixed: texts, with how often each happened.
        operations: how many there were.
        allocated, peak: bytes of memory in use, now and at most.
        sync_debug_mode: as `torch.cuda.set_sync_debug_mode` has it.
    """

    def __init__(self):
        self.waits: list[Wait] = []
        self.races = collections.Counter()
        self.unpinned = collections.Counter()
        self.mixed = collections.Counter()
        self.operations = 0
        self.allocated = self.peak = 0
        self.sync_debug_mode = "default"

    def wait(self, operation, warns=True):
        """Notes that the host waits. `warns`: whether PyTorch's debug mode detects this operation."""
        if warns and self.sync_debug_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation ({operation})")
        if warns and self.sync_debug_mode == "warn":
            warnings.warn(f"called a synchronizing CUDA operation ({operation})", stacklevel=2)
        self.waits.append(Wait(operation, stack()))

    def race(self, text):
        lines = [f"{frame.filename}:{frame.lineno}" for frame in stack() if not frame.filename.startswith(PYTORCH)][-6:]
        self.races[f"{text}, at {' > '.join(lines)}"] += 1

    def odd(self, counter, text):
        frame = place_of(stack())
        counter[f"{text}, at {frame.filename}:{frame.lineno}"] += 1


def stack():
    """The frames outside the pretended GPU, innermost last."""
    frames = traceback.StackSummary.extract(traceback.walk_stack(sys._getframe(1)), lookup_lines=False)
    return [frame for frame in reversed(frames) if not frame.filename.startswith(HERE)]


def place_of(frames):
    """The innermost frame outside PyTorch."""
    return next((frame for frame in reversed(frames) if not frame.filename.startswith(PYTORCH)), frames[-1])


RECORD = Record()
HOST = Clock()
_LOCAL = threading.local()


class Stream:
    """Replaces `torch.cuda.Stream`."""

    all: list["Stream"] = []  # noqa: RUF012 as long as the process

    def __init__(self, device=None, priority=0, **_):
        self.number, self.count, self.clock = len(Stream.all), 0, Clock()
        self.device, self.device_index, self.cuda_stream, self.stream_id = GPU, GPU.index, self.number, self.number
        Stream.all.append(self)

    def enqueue(self):
        """Adds an operation after those of the stream and those that the host has waited for."""
        self.count += 1
        self.clock.merge(HOST)
        self.clock[self.number] = self.count

    def wait_stream(self, other):
        self.clock.merge(other.clock)

    def wait_event(self, event):
        self.clock.merge(event.clock)

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self):
        RECORD.wait("Stream.synchronize")
        HOST.merge(self.clock)

    def query(self):
        return all(HOST.covers(number, count) for number, count in self.clock.items())

    def is_capturing(self):  # optimizers of PyTorch 2.15 ask
        return False

    def __eq__(self, other):
        return isinstance(other, Stream) and self.number == other.number

    def __hash__(self):
        return self.number

    def __repr__(self):
        return "the training's stream" if self.number == 0 else f"side stream {self.number}"


DEFAULT = Stream()


def current_stream(device=None):
    return getattr(_LOCAL, "stream", DEFAULT)


def set_stream(stream):
    _LOCAL.stream = stream


class StreamContext:
    """Replaces `torch.cuda.stream(…)`."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        self.before = current_stream()
        set_stream(self.stream or self.before)

    def __exit__(self, *_):
        set_stream(self.before)


class Event:
    """Replaces `torch.cuda.Event`."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self.clock = Clock()

    def record(self, stream=None):
        self.clock = Clock((stream or current_stream()).clock)

    def wait(self, stream=None):
        (stream or current_stream()).wait_event(self)

    def query(self):
        return True

    def synchronize(self):
        RECORD.wait("Event.synchronize", warns=False)
        HOST.merge(self.clock)

    def elapsed_time(self, other):
        return 1.0


def synchronize(device=None):
    """Replaces `torch.cuda.synchronize`."""
    RECORD.wait("torch.cuda.synchronize", warns=False)
    for stream in Stream.all:
        HOST.merge(stream.clock)


def host_waits(operation):
    """The host waits for the current stream."""
    RECORD.wait(operation)
    HOST.merge(current_stream().clock)


class Block:
    """A block of device memory, from allocation to release. It belongs to the stream that was current at its
    allocation."""

    def __init__(self, size):
        self.owner, self.size = current_stream(), size
        self.writer = None  # the last one: (stream, its count)
        self.readers = {}  # since then
        self.recorded = set()  # by `record_stream`
        RECORD.allocated += size
        RECORD.peak = max(RECORD.peak, RECORD.allocated)

    def access(self, stream, writes):
        if self.writer is not None and not stream.clock.covers(self.writer[0].number, self.writer[1]):
            RECORD.race(f"{stream} {'writes' if writes else 'reads'} what {self.writer[0]} may still write")
        if not writes:
            self.readers[stream] = stream.count
            return
        for reader, count in self.readers.items():
            if not stream.clock.covers(reader.number, count):
                RECORD.race(f"{stream} writes what {reader} may still read")
        self.writer, self.readers = (stream, stream.count), {}

    def __del__(self):
        if sys.is_finalizing():
            return
        RECORD.allocated -= self.size
        uses = [*self.readers.items(), *([self.writer] if self.writer else [])]
        for stream, count in uses:
            in_order = self.owner.clock.covers(stream.number, count) or HOST.covers(stream.number, count)
            if stream is not self.owner and stream not in self.recorded and not in_order:
                RECORD.race(f"memory of {self.owner} is free while {stream} may still use it: no record_stream")


class PinnedCopy:
    """A copy from or to pinned memory that the host has not yet waited for."""

    def __init__(self, stream, to_host):
        self.stream, self.count, self.to_host = stream, stream.count, to_host

    def host_accesses(self, writes):
        if HOST.covers(self.stream.number, self.count):
            return
        if self.to_host:
            RECORD.race(f"the host {'writes' if writes else 'reads'} pinned memory that a copy may still write")
        elif writes:
            RECORD.race("the host writes pinned memory that a copy may still read")
