"""A plugin of pytest: runs tests/gpu on the pretended GPU. A race or an unpinned copy fails its test.

PYTHONPATH=tests python -m pytest -p pretended_gpu.plugin -m gpu tests/gpu
"""

import sys
from pathlib import Path

import pytest
import torch

from pretended_gpu.cuda import install
from pretended_gpu.streams import HERE, RECORD, synchronize

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

install()
torch.version.cuda = torch.version.cuda or "pretended"

import side_by_side

from shared.commands import train

side_by_side.PYTORCH.append(HERE)
_train_locally = train.train_locally


def train_locally(*arguments):
    """Finishes a run as its process would: the next one must not race with an unused batch."""
    try:
        _train_locally(*arguments)
    finally:
        synchronize()


train.train_locally = train_locally


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    RECORD.races.clear()
    RECORD.unpinned.clear()
    result = yield
    assert not RECORD.races
    assert not RECORD.unpinned
    return result
