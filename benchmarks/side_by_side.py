"""A trial as users train it, beside another loop in the same process. Their blocks of steps alternate, so that noise on
the machine changes both."""

import contextlib
import ctypes
import itertools
import platform
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from command_line import scratch_folder
from determined.pytorch import PyTorchTrialContext
from turns import ratio

from coco_files import paths_of
from shared.environment import LARGEST_MMAP_THRESHOLD, TRIM_THRESHOLD
from shared.training.engine import train
from shared.training.loggers import Loggers
from shared.training.meeting import local_processes
from shared.training.processes import trial_context
from shared.training.run import LocalRun
from shared.training.run_folder import RunFolder
from shared.training.trial import DetectionTrial

PYTORCH = [str(Path(torch.__file__).parent) + "/"]
"""Folders of PyTorch's own frames, which `site` skips. torchvision's is not among them."""


# --- a trial ------------------------------------------------------------------------------------------------


def config_of(folder: Path | None, hyperparameters: dict[str, Any], **data: Any) -> dict[str, Any]:
    """An experiment config that trains on a COCO folder, or on the fake backend, for a long time.

    Args:
        data: more keys of the `data` section.
    """
    splits = {"backend": "fake"} if folder is None else {"cache_dir": str(folder / "cache")}
    for split in () if folder is None else ("train", "val"):
        splits[split] = dict(zip(("annotations", "images"), map(str, paths_of(folder, split)), strict=True))
    return {
        "data": {**splits, "workers": 0, **data},
        "hyperparameters": hyperparameters,
        "searcher": {"max_length": {"batches": 10**6}, "metric": "bbox_mAP", "smaller_is_better": False},
        "scheduling_unit": 50,
        "min_validation_period": {"batches": 10**6},
        "checkpoint_policy": "none",
    }


@contextlib.contextmanager
def local_context(config: dict[str, Any]) -> Iterator[PyTorchTrialContext]:
    """The context that `train` makes, on the device that torch can use."""
    with local_processes() as (distributed, device), trial_context(config, distributed, device) as context:
        yield context


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


class BenchmarkRun(LocalRun):
    """A run that a signal stops at once."""

    handles_signals = False


class Measured(Exception):
    """Ends a training run whose measurement is complete."""


def train_until_measured(trial: DetectionTrial, folder: Path, kind: type[LocalRun] = BenchmarkRun) -> None:
    """Trains with the engine that `train` uses, until the trial raises `Measured`. Its files go to the folder."""
    run_folder = RunFolder(folder)
    run_folder.prepare(Path(sys.modules[type(trial).__module__].__file__).parent)
    with contextlib.suppress(Measured):
        train(trial, kind(run_folder, Loggers(), "none"))


# --- two loops ----------------------------------------------------------------------------------------------


class _Side:
    """The blocks of one loop: their seconds and, on a GPU, the memory that their steps take."""

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
    trial_class: type[DetectionTrial], config: dict, other_of: Callable, blocks: int, block: int, name: str
) -> dict:
    """The trial's steps in the engine, against those of another loop.

    The first block of each side warms up. On a GPU our last block is not timed: it counts the waits for the device.

    Args:
        other_of: takes the trial, and returns the function that trains as many batches as its argument.
        blocks: timed blocks of each side.
        block: batches per block.
        name: the other side's, in the result's keys.

    Returns:
        Times, images per second and the ratio of our seconds to the other side's: below 1 is faster. On a GPU also each
        side's memory per step, above what was allocated before its block. And our waits per step, by place.
    """
    stacks, steps, waiting = [], itertools.count(1), [0.0]  # a report sets the loader's waiting to 0
    watch = contextlib.ExitStack()

    class Watched(trial_class):
        __module__ = trial_class.__module__

        def after_batch(self, number: int) -> None:
            nonlocal stacks
            super().after_batch(number)
            waiting.append(self.training_loader.waiting)
            if next(steps) % block:
                return
            ours.end_block()
            if len(ours.seconds) == blocks + (3 if cuda else 2):
                raise Measured
            if len(theirs.seconds) <= blocks:
                with memory_as_without_us():
                    theirs.begin_block()
                    other(block)
                    theirs.end_block()
            elif len(ours.seconds) == blocks + 2:
                stacks = watch.enter_context(watch_synchronisations())
            ours.begin_block()

    with local_context(config) as context, scratch_folder() as folder:
        cuda = context.device.type == "cuda"
        ours, theirs = _Side(context.device), _Side(context.device)
        trial = Watched(context)
        other = other_of(trial)
        ours.begin_block()
        with watch:
            train_until_measured(trial, folder)
    seconds = {"ours": ours.seconds[1 : blocks + 2], name: theirs.seconds[1:]}
    # block i of theirs lies between i and i + 1 of ours
    around = [statistics.mean(two) for two in itertools.pairwise(seconds["ours"])]
    waited = [after - before if after >= before else after for before, after in itertools.pairwise(waiting)]
    timed = waited[block : block * (blocks + 2)]
    measured = {"device": device_name(context.device), "blocks": len(around), **ratio(around, seconds[name])}
    for side, times in seconds.items():
        median = statistics.median(times)
        measured[f"{side}_ms_per_step"] = round(1000 * median / block, 2)
        measured[f"{side}_images_per_second"] = round(block * trial.per_slot_batch_size / median, 1)
    measured["share_waiting_for_data"] = round(sum(timed) / sum(seconds["ours"]), 4)
    if cuda:
        for side, loop in zip(seconds, (ours, theirs), strict=True):
            measured[f"{side}_step_mib"] = round(max(loop.memory[1 : blocks + 1]) / 2**20, 1)
        measured["waits_per_step"] = round(len(stacks) / block, 2)
        frames = map(site, stacks)
        measured["waits"] = Counter(f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in frames)
    return measured


def now() -> float:
    """Seconds of the CPU, or of the clock if a GPU computes."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def memory_as_without_us() -> Iterator[None]:
    """Undoes `keep_freed_memory`, by which our training on a CPU speeds up the whole process, for the other side."""
    if torch.cuda.is_available() or platform.libc_ver()[0] != "glibc":
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)  # glibc's own, once large tensors have been freed
    try:
        yield
    finally:
        mallopt(TRIM_THRESHOLD, -1)


# --- waits --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watch_synchronisations() -> Iterator[list[traceback.StackSummary]]:
    """The stack of each operation that makes the host wait for the GPU, as far as PyTorch detects them."""
    stacks = []

    def note(message, category, filename, lineno, file=None, line=None):
        if "synchronizing CUDA operation" in str(message):
            frames = traceback.extract_stack()[:-1]
            stacks.append(traceback.StackSummary.from_list([f for f in frames if "warnings" not in f.filename]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield stacks
        finally:
            torch.cuda.set_sync_debug_mode("default")


def site(stack: traceback.StackSummary) -> traceback.FrameSummary:
    """The innermost frame outside of PyTorch."""
    pytorch = tuple(PYTORCH)
    return next((frame for frame in reversed(stack) if not frame.filename.startswith(pytorch)), stack[-1])
