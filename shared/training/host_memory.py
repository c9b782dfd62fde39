"""The host's memory, kept from step to step of a training on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os

# of GNU's C library, malloc.h
TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes: what it comes to by itself, as large tensors are freed
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Has GNU's C library keep what a training on the CPU frees, for its next step.

    By itself it gives free memory at its end back to the system, which is most of what a step took: the next step has
    it mapped and zeroed anew, a page of 4 kB at a time. What is taken at most is the same.
    """
    if any(name in os.environ for name in _USERS_OWN):
        return
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        # the first one said ends the adaption of both
        mallopt(_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(TRIM_THRESHOLD, -1)  # never
