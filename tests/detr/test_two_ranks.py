"""Two ranks with half of a batch each compute the loss and the gradients of one rank with the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_detr import DETR_TYPES

BATCHES = ("uneven", "one-rank", "none", "alike")


@pytest.fixture(scope="module")
def differences() -> dict[tuple[str, str], tuple[float, float]]:
    """Largest differences of losses and gradients, by model type and batch."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = Path(__file__).with_name("two_ranks.py")
    done = subprocess.run([*torchrun, script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(line[0], line[1]): (float(line[2]), float(line[3])) for line in lines if len(line) == 4}


@pytest.mark.parametrize("model_type", [*DETR_TYPES, "rf_detr-masks"])
def test_two_ranks_have_the_losses_and_gradients_of_one(model_type, differences):
    for batch in BATCHES:
        of_losses, of_gradients = differences[model_type, batch]
        assert of_losses < 1e-5, batch
        assert of_gradients < 1e-5, batch
