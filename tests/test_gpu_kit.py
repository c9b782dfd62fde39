"""The GPU kit on a machine without a GPU: its contents and its reports."""

import json
import os
import re
import subprocess
import sys
import tarfile

import pytest
import torch
from conftest import ROOT
from determined import gpu
from tiny_models import MAIN_DETECTORS

WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PY": sys.executable}


def test_without_a_gpu_its_tests_are_skipped_with_the_reason():
    program = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu"]
    done = subprocess.run(program, cwd=ROOT, env=WITHOUT_GPU, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs a GPU: torch" in done.stdout
    assert " skipped" in done.stdout.splitlines()[-1]
    assert " passed" not in done.stdout.splitlines()[-1]


def test_without_a_gpu_benchmarks_print_one_line_and_write_no_report(tmp_path):
    done = subprocess.run(
        ["benchmarks/gpu_kit.sh", "run", "benchmarks"],
        cwd=ROOT,
        env={**WITHOUT_GPU, "OUT": str(tmp_path), "KIT": str(tmp_path / "no kit")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert "finds no GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def gpu_kit(monkeypatch):
    """The module benchmarks/gpu_kit.py."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_kit

    return gpu_kit


def packages_in(path):
    lines = (line.split(" #")[0].strip() for line in path.read_text().splitlines())
    return {re.split(r"[<>=\[ @]", line)[0].lower() for line in lines if line and line[0] not in "#-"}


def test_the_kit_has_every_package_that_the_detectors_require(gpu_kit):
    folders = ("shared", *MAIN_DETECTORS)
    required = set().union(*(packages_in(ROOT / folder / "requirements.txt") for folder in folders))
    of_torchvision = {"fsspec", "jinja2", "numpy", "pillow", "torch", "torchvision"}
    small, rest = (packages_in(ROOT / "benchmarks" / name) for name in ("gpu_kit.txt", "gpu_kit_all.txt"))
    assert small.isdisjoint(rest)
    assert required - small - rest - of_torchvision - set(gpu_kit.PURE_PYTHON) == set()


def test_the_kit_takes_detectron2_from_a_checkout(gpu_kit, tmp_path, monkeypatch):
    checkout, kit = tmp_path / "checkout", tmp_path / "kit"
    for name in ("detectron2/__init__.py", "detectron2/_C.so", "configs/base.yaml"):
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    kit.mkdir()
    monkeypatch.setenv("DETECTRON2", str(checkout))
    gpu_kit.trees(kit)
    with tarfile.open(kit / "trees.tar.gz") as tar:
        names = [name for name in tar.getnames() if name.endswith((".py", ".yaml", ".so"))]
    assert [name for name in names if name.startswith("detectron2/")] == [
        "detectron2/__init__.py",
        "detectron2/model_zoo/configs/base.yaml",
    ]
    assert not [name for name in names if name.endswith(".so")]


def test_a_program_that_hangs_is_stopped_at_its_limit(gpu_kit):
    assert gpu_kit.run_program(["-c", "import time; time.sleep(600)"], 1) is None
    assert gpu_kit.run_program(["-c", "raise SystemExit(3)"], 60) == 3


def test_a_test_that_finds_no_time_left_is_not_run(tmp_path):
    program, record = tmp_path / "test_both.py", tmp_path / "record.jsonl"
    program.write_text("def test_late(): assert False\ndef test_copies(): assert False\n")
    environment = {"PYTHONPATH": str(ROOT / "benchmarks"), "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment |= {"GPU_KIT_RECORD": str(record), "GPU_KIT_DEADLINE": "0"}
    command = [sys.executable, "-m", "pytest", "-p", "gpu_kit_plugin", "-c", os.devnull, str(program)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, timeout=600)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    outcomes = [(line["test"].split("::")[1], line["outcome"]) for line in lines]
    assert outcomes == [("test_copies", "not run"), ("test_late", "not run")] * 2


@pytest.mark.parametrize("of_torch", [False, True])
def test_benchmarks_measure_the_device_that_torch_can_use(tmp_path, monkeypatch, of_torch):
    """nvidia-smi may list a GPU that torch does not support, or be missing although torch has one."""
    lists_gpu = tmp_path / "nvidia-smi"
    lists_gpu.write_text("#!/bin/sh\n" if of_torch else "#!/bin/sh\necho 0, GPU-0, 1, 1, 1\n")
    lists_gpu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from side_by_side import config_of, device_name, local_context

    monkeypatch.setattr(torch.cuda, "is_available", lambda: of_torch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert len(gpu.get_gpu_uuids()) == (not of_torch)
    with local_context(config_of(None, {"global_batch_size": 2})) as context:
        assert context.device.type == ("cuda" if of_torch else "cpu")
        assert device_name(context.device) == ("a GPU" if of_torch else "cpu")


def test_no_benchmark_asks_nvidia_smi_for_its_device():
    for program in (ROOT / "benchmarks").glob("*.py"):
        assert "pytorch.init(" not in program.read_text(), program.name
