"""Two training loops in one process, in blocks of steps that alternate: a ratio that a noisy machine does not bend."""

import contextlib
import ctypes
import itertools
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from determined import pytorch
from local_context import device_name
from synchronisations import site, watch_synchronisations

from shared.training.memory import LARGEST_MMAP_THRESHOLD, TRIM_THRESHOLD
from shared.training.trial import DetectionTrial


def switch(given: str) -> tuple[str, Any]:
    """A hyperparameter from the command line: `channels_last=true`."""
    key, value = given.split("=", 1)
    return key, yaml.safe_load(value)


@contextlib.contextmanager
def memory_as_without_us() -> Iterator[None]:
    """Freed memory is given back to the system as glibc does by itself, which a training of ours on a CPU ends (see
    `keep_freed_memory`): the other side runs in the same process, and would gain by it."""
    if torch.cuda.is_available() or platform.libc_ver()[0] != "glibc":
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)  # what it comes to once large tensors have been freed
    try:
        yield
    finally:
        mallopt(TRIM_THRESHOLD, -1)


class _Measured(Exception):
    """Both sides have their blocks."""


def call_at_batch_end(trial: DetectionTrial, function: Callable[[], None]) -> None:
    """Calls a function after each training batch."""
    after_batch = trial.after_batch

    def after_batch_and_function(number: int) -> None:
        after_batch(number)
        function()

    trial.after_batch = after_batch_and_function


class _Side:
    """One loop's blocks: their seconds and, on a GPU, the memory that their steps take."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds: list[float] = []
        self.memory: list[int] = []

    def begin_block(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.allocated = torch.cuda.memory_allocated()
        self.started = time.perf_counter()

    def end_block(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.memory.append(torch.cuda.max_memory_allocated() - self.allocated)
        self.seconds.append(time.perf_counter() - self.started)


def time_against(
    trial: DetectionTrial,
    context: pytorch.PyTorchTrialContext,
    other: Callable[[int], None],
    blocks: int,
    block: int,
    name: str,
    report_every: int = 50,
) -> dict:
    """The trial's steps, as Determined trains them, against those of `other`.

    The first block of each warms up. On a GPU our last block is not timed: it counts where the host waits.

    Args:
        other: trains as many batches as it is told.
        blocks: how many blocks of each side are timed.
        block: batches per block.
        name: of the other side, in the result's keys.
        report_every: batches per report of ours.

    Returns:
        Times, images per second and the ratio of ours to the other side's seconds: under 1 is faster. On a GPU also the
        memory of a step of each side, above what was allocated before its block, and our waits per step, by place.
    """
    cuda = context.device.type == "cuda"
    ours, theirs = _Side(context.device), _Side(context.device)
    watch, stacks, steps = contextlib.ExitStack(), [], itertools.count(1)
    waiting = [0.0]  # of the loader, after each batch

    def at_batch_end() -> None:
        nonlocal stacks
        waiting.append(trial.training_loader.waiting)
        if next(steps) % block:
            return
        ours.end_block()
        if len(ours.seconds) == blocks + (3 if cuda else 2):
            raise _Measured
        if len(theirs.seconds) <= blocks:
            with memory_as_without_us():
                theirs.begin_block()
                other(block)
                theirs.end_block()
        elif len(ours.seconds) == blocks + 2:
            stacks = watch.enter_context(watch_synchronisations())
        ours.begin_block()

    call_at_batch_end(trial, at_batch_end)
    ours.begin_block()
    with contextlib.suppress(_Measured), watch:
        pytorch.Trainer(trial, context).fit(
            max_length=pytorch.Batch(10**9), checkpoint_policy="none", reporting_period=pytorch.Batch(report_every)
        )
    seconds = {"ours": ours.seconds[1 : blocks + 2], name: theirs.seconds[1:]}
    # block i of theirs lies between i and i + 1 of ours
    pairs = [sum(seconds["ours"][i : i + 2]) / 2 / other for i, other in enumerate(seconds[name])]
    waited = [after - before for before, after in itertools.pairwise(waiting)]
    measured = {
        "device": device_name(context.device),
        "blocks": len(pairs),
        "ratio_median": round(statistics.median(pairs), 4),
        "ratio_min_max": [round(min(pairs), 4), round(max(pairs), 4)],
    }
    for side, times in seconds.items():
        median = statistics.median(times)
        measured[f"{side}_ms_a_step"] = round(1000 * median / block, 2)
        measured[f"{side}_images_per_second"] = round(block * trial.per_slot_batch_size / median, 1)
    timed = waited[block : block * (blocks + 2)]
    measured["share_waiting_for_data"] = round(sum(timed) / sum(seconds["ours"]), 4)
    if cuda:
        for side, loop in zip(seconds, (ours, theirs), strict=True):
            measured[f"{side}_step_mib"] = round(max(loop.memory[1 : blocks + 1]) / 2**20, 1)
        measured["waits_per_step"] = round(len(stacks) / block, 2)
        frames = map(site, stacks)
        measured["waits"] = Counter(f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in frames)
    return measured
