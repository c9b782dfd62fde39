"""Random numbers that follow from what they are for, not from what was drawn before.

A resumed run, another number of loader workers or of slots then draw the same numbers for the same sample.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_all(*key: int) -> None:
    """Seed Python, NumPy and PyTorch (the devices in use too) from `key`, non-negative integers."""
    words = np.random.SeedSequence(key).generate_state(4, dtype=np.uint64).tolist()
    random.seed(words[0])
    np.random.seed(words[1] & 0xFFFFFFFF)
    torch.default_generator.manual_seed(words[2] >> 1)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(words[3] >> 1)


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """What is drawn and seeded inside changes no number that is drawn afterwards."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
