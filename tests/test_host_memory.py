"""Memory that training on the CPU frees stays with the process for the next step."""

import platform
import subprocess
import sys

import pytest
from conftest import ROOT

# tensors of 1 MiB, as many as make glibc give the end of its heap back, and a step's worth of steps
PROGRAM = """
import resource, sys
import torch
from shared.environment import keep_freed_memory

keep_freed_memory()
steps = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(2**18) for _ in range(200)]
    del kept
    steps.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(steps[2:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than GNU's")
@pytest.mark.parametrize("own", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}], ids=["kept", "as the user says"])
def test_the_next_step_finds_its_memory_mapped(own, monkeypatch):
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    pages = int(done.stdout)
    assert pages > 10_000 if own else pages < 5_000, pages  # of 51,200
