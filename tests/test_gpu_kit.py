"""What the GPU kit says on a machine without a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from determined import gpu

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


@pytest.mark.parametrize("of_torch", [False, True])
def test_benchmarks_measure_the_device_that_torch_can_use(tmp_path, monkeypatch, of_torch):
    """nvidia-smi may list a GPU that torch was built without, or be missing where torch has one."""
    lists_gpu = tmp_path / "nvidia-smi"
    lists_gpu.write_text("#!/bin/sh\n" if of_torch else "#!/bin/sh\necho 0, GPU-0, 1, 1, 1\n")
    lists_gpu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from local_context import device_name, local_context

    monkeypatch.setattr(torch.cuda, "is_available", lambda: of_torch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert len(gpu.get_gpu_uuids()) == (not of_torch)
    with local_context({"hyperparameters": {"global_batch_size": 2}}) as context:
        assert context.device.type == ("cuda" if of_torch else "cpu")
        assert device_name(context.device) == ("a GPU" if of_torch else "cpu")


def test_no_benchmark_asks_nvidia_smi_for_its_device():
    for program in (ROOT / "benchmarks").glob("*.py"):
        assert "pytorch.init(" not in program.read_text(), program.name
