"""Where the host waits for the GPU."""

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

PYTORCH = [str(Path(torch.__file__).parent) + "/"]
"""Folders whose frames are PyTorch's: an operation's site is outside of them. torchvision is not among them."""


@contextlib.contextmanager
def watch_synchronisations() -> Iterator[list[traceback.StackSummary]]:
    """The stack of each operation that made the host wait for the GPU meanwhile, as far as PyTorch detects them."""
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
