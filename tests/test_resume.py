"""A killed run taken up again, and what a checkpoint holds, of each detector."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from conftest import ROOT, reports, run_model_def
from tiny_models import CONFIGS

from shared.training.checkpoints import load_state


def final_state(run):
    state = load_state(run / "checkpoints/last/state_dict.pth")
    return {
        "model": state["models_state_dict"][0],
        "ema": state["callbacks"]["training"]["ema"],
        "optimizer": state["optimizers_state_dict"][0]["state"],
    }


def assert_same_bits(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    else:
        assert a == b


def assert_tensors_and_little_more(folder):
    state = load_state(folder / "state_dict.pth")

    def size(value):
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return sum(map(size, value)) if isinstance(value, (list, tuple)) else 0

    on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert on_disk < size(state) + 2**20


def kill_between_checkpoints(detector, config, run, processes):
    """Starts a run and kills all of its processes after the checkpoint of batch 4."""
    program = [sys.executable]
    if processes > 1:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    process = subprocess.Popen(
        [*program, "model_def.py", "train", str(config), "--output-dir", str(run)],
        cwd=ROOT / detector,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    started = time.time()
    while not ((run / "checkpoints/last").exists() and reports(run)[-1]["batches"] >= 6):
        assert process.poll() is None
        assert time.time() - started < 120
        time.sleep(0.01)
    # torchrun's processes have sessions of their own
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.send_signal(signal.SIGKILL)
    process.wait()
    assert reports(run)[-1]["batches"] < 12


@pytest.fixture
def config(detector, shapes, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIGS[detector](shapes)))
    return path


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_run_resumes_to_the_same_bits(detector, config, tmp_path, processes):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_model_def("train", config, "--output-dir", whole, processes=processes, cwd=ROOT / detector)
    assert_tensors_and_little_more(whole / "checkpoints/last")
    kill_between_checkpoints(detector, config, killed, processes)
    resume = ("--output-dir", killed, "--resume", "last")
    run_model_def("train", config, *resume, processes=processes, cwd=ROOT / detector)

    assert_same_bits(final_state(killed), final_state(whole))
    ours, expected = reports(killed), reports(whole)
    assert [(r["batches"], r["split"]) for r in ours] == [(r["batches"], r["split"]) for r in expected]
    for a, b in zip(ours, expected, strict=True):
        timings = {"images_per_second", "data_wait"}
        assert {k: v for k, v in a["metrics"].items() if k not in timings} == {
            k: v for k, v in b["metrics"].items() if k not in timings
        }
