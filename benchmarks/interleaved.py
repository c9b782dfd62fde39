"""Two training loops in one process, in blocks of steps that alternate: a ratio that a noisy machine does not bend."""

import contextlib
import ctypes
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import yaml
from determined import pytorch
from local_context import device_name
from torch.utils.tensorboard import SummaryWriter

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
    """Calls a function after each training batch, in the place of the progress bar. What the trial reports goes to a
    folder that nobody reads."""
    trial.tensorboard = SummaryWriter(tempfile.mkdtemp())
    trial.local_callbacks["measured"] = _AtBatchEnd(trial, function)


class _AtBatchEnd(pytorch.PyTorchCallback):
    def __init__(self, trial: DetectionTrial, function: Callable[[], None]):
        self.trial, self.function = trial, function

    def on_training_start(self) -> None:
        self.trial.on_batch_end = self.function


def time_against(
    trial: DetectionTrial,
    context: pytorch.PyTorchTrialContext,
    other: Callable[[int], None],
    blocks: int,
    block: int,
    name: str,
) -> dict:
    """The trial's steps, as Determined trains them, against those of `other`, which trains as many as it is told.

    The first block of each warms up.
    """
    cuda = context.device.type == "cuda"
    ours, theirs, steps = [], [], itertools.count(1)
    started = time.perf_counter()

    def at_batch_end() -> None:
        nonlocal started
        if next(steps) % block:
            return
        if cuda:
            torch.cuda.synchronize()
        ours.append(time.perf_counter() - started)
        if len(theirs) > blocks:
            raise _Measured
        started = time.perf_counter()
        with memory_as_without_us():
            other(block)
        if cuda:
            torch.cuda.synchronize()
        theirs.append(time.perf_counter() - started)
        started = time.perf_counter()

    call_at_batch_end(trial, at_batch_end)
    with contextlib.suppress(_Measured):
        pytorch.Trainer(trial, context).fit(
            max_length=pytorch.Batch(10**6), checkpoint_policy="none", reporting_period=pytorch.Batch(50)
        )
    # block i of theirs lies between i and i + 1 of ours
    pairs = [(ours[i] + ours[i + 1]) / 2 / theirs[i] for i in range(1, len(theirs))]
    return {
        "device": device_name(context.device),
        "blocks": len(pairs),
        "ratio_median": round(statistics.median(pairs), 4),
        "ratio_min_max": [round(min(pairs), 4), round(max(pairs), 4)],
        "ours_ms_a_step": round(1000 * statistics.median(ours[1:]) / block, 2),
        f"{name}_ms_a_step": round(1000 * statistics.median(theirs[1:]) / block, 2),
    }
