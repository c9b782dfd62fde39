"""What the GPU kit says on a machine without a GPU."""

import os
import subprocess
import sys

from conftest import ROOT

WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PY": sys.executable}


def test_without_a_gpu_its_tests_are_collected_and_skipped_with_what_is_missing():
    program = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu"]
    done = subprocess.run(program, cwd=ROOT, env=WITHOUT_GPU, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs a GPU: torch" in done.stdout
    assert " skipped" in done.stdout.splitlines()[-1]
    assert " passed" not in done.stdout.splitlines()[-1]


def test_without_a_gpu_the_benchmarks_end_with_one_line_and_leave_no_report(tmp_path):
    done = subprocess.run(
        ["benchmarks/gpu.sh"],
        cwd=ROOT,
        env={**WITHOUT_GPU, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert "finds no GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
