"""The GPU branches of the code on a pretended GPU (tests/pretended_gpu). No test needs a GPU."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, WITHOUT_LIBRARY
from tiny_models import TINY_DETECTORS

KNOWN_TO_WORK = ("2.11.", "2.15.")  # versions of PyTorch; others are tried
# by case, its detector and model
OTHERS = {
    f"{detector} {model}": (detector, model)
    for detector, tiny in TINY_DETECTORS.items()
    for model in getattr(tiny, "GPU_CASES", {})
    if detector != "efficientdet"
}
CASES = [
    "efficientdet",
    *(pytest.param(case, marks=pytest.mark.slow) for case in ("efficientdet fp16", "efficientdet bf16", *OTHERS)),
]
# how far losses may be from those of the CPU's training, where the precision is another
NEAR = {"efficientdet fp16": 0.05, "efficientdet bf16": 0.05}
# Where our code, or Determined for us, makes the host wait: the cases, the place, how often per batch, why.
WAITS = [
    (".*", "shared/training/training_metrics.py: per_slot_reduce", 1, "a report reads the losses"),
    (".*", "shared/training/saving.py: raise_if_undefined", 1, "a checkpoint is of finite weights"),
    (".*", "shared/training/saving.py: of", 1, "the copy for a checkpoint is complete before the next step"),
    (".* fp16", "shared/training/saving.py: checkpoint_state", 2, "a checkpoint holds the scaler's two numbers"),
    ("efficientdet|.* retinanet", "shared/training/validation.py: share", 1, "a validation reads its losses"),
    ("efficientdet.*", "efficientdet/model_def.py: detect", 2, "it reads boxes; the first batch moves the predictor"),
    (".* mask r-cnn", "shared/evaluation/detections.py: _encode_runs", 2, "where the runs of all masks begin"),
    *(
        (f"{name} {model}", *wait)
        for name, tiny in TINY_DETECTORS.items()
        for model, *wait in getattr(tiny, "GPU_WAITS", [])
    ),
]


def run_program(module, *arguments, processes=1):
    """Runs a program of tests/pretended_gpu without real GPUs. Returns its standard output."""
    program = [sys.executable]
    if processes > 1:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*program, "-m", f"pretended_gpu.{module}", *map(str, arguments)],
        cwd=ROOT / "tests",
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "unsupported: " in done.stderr:
        pytest.skip(done.stderr.split("unsupported: ")[1].splitlines()[0])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def pytorch_allows_it():
    """Skips these tests if this version of PyTorch cannot be given a pretended GPU."""
    if torch.__version__.startswith(KNOWN_TO_WORK):
        return
    try:
        run_program("cuda")
    except AssertionError as error:
        reason = str(error).strip().splitlines()[-1]
        pytest.skip(f"torch {torch.__version__} cannot be given a pretended GPU: {reason}")


def losses_of(reports):
    return {
        (report["split"], report["batches"], name): value
        for report in reports
        for name, value in report["metrics"].items()
        if "loss" in name
    }


def metrics_of(reports):
    return [
        {name: value for name, value in report["metrics"].items() if "loss" not in name}
        for report in reports
        if report["split"] == "val"
    ]


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_training_equals_the_cpu_s_and_waits_only_where_listed(case, shapes, tmp_path):
    if (detector := case.split()[0]) in WITHOUT_LIBRARY:
        pytest.skip(WITHOUT_LIBRARY[detector])
    run_program("train", shapes, tmp_path, case)
    found = json.loads((tmp_path / "results.json").read_text())[case]
    assert found["operations"] > 10_000
    expected = losses_of(found["cpu"])
    if case == "efficientdet fp16":  # the reference has the losses of the validations too
        expected = {key: value for key, value in expected.items() if key[0] == "train"}
    assert losses_of(found["gpu"]) == pytest.approx(expected, rel=NEAR.get(case, 1e-4))
    if case not in NEAR:
        for ours, reference in zip(metrics_of(found["gpu"]), metrics_of(found["cpu"]), strict=True):
            assert ours == pytest.approx(reference, abs=1e-3, nan_ok=True)
    assert (found["races"], found["unpinned"], found["mixed"]) == ([], [], [])
    assert found["waits"] == {place: count for cases, place, count, _ in WAITS if re.fullmatch(cases, case)}


def test_a_copy_without_one_of_its_safeguards_is_a_race():
    found = json.loads(run_program("safeguards"))
    races, refused = found["races"], found["refused"]
    assert races.pop("prefetcher") == races.pop("saver") == []
    assert len(races) == 4
    for without, texts in races.items():
        assert texts, without
    assert refused.pop("allowed") is None
    assert refused == {
        "no device": "no process has chosen its device: NCCL would put all of them on the first",
        "gloo": "processes with GPUs must use nccl, not gloo",
        "of the host": "c10d::broadcast_: No backend type associated with device type cpu",
        "not contiguous": "c10d::allreduce_: Tensors must be contiguous: (3, 2)",
        "int16": "c10d::allreduce_: Unconvertible NCCL type torch.int16",
    }


TWO_PROCESSES = [
    "efficientdet",
    *(pytest.param(case, marks=pytest.mark.slow) for case, (_, model) in OTHERS.items() if model == "mask r-cnn"),
]


@pytest.mark.parametrize("case", TWO_PROCESSES)
def test_two_processes_train_by_the_rules_of_nccl(case, shapes, tmp_path):
    if (detector := case.split()[0]) in WITHOUT_LIBRARY:
        pytest.skip(WITHOUT_LIBRARY[detector])
    run_program("nccl", shapes, tmp_path, case, processes=2)
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(report["split"], report["batches"]) for report in found["reports"]] == [
        *(("train", 2), ("train", 4), ("val", 4)),
        *(("train", 6), ("val", 6)),
    ]
    assert found["collectives"]["c10d::broadcast_"] > 0
    assert found["collectives"]["c10d::allreduce_"] > 0
    assert found["races"] == []


def test_the_gpu_kit_s_quick_tests_pass_on_a_pretended_gpu(tmp_path):
    quick = "bytes or (steady and efficientdet and not fp16)"
    done = subprocess.run(
        ["benchmarks/gpu_kit.sh", "run", "tests", "--pretended", "-k", quick],
        cwd=ROOT,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "PY": sys.executable,
            "KIT": str(tmp_path / "no kit"),
            "OUT": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("tests-pretended-GPU-*.json")
    report = json.loads(path.read_text())
    results = {result["test"].split("::")[1]: result for result in report["results"]}
    assert report["failed"] == 0
    assert report["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert results["test_masks_have_the_bytes_of_the_cpu"]["outcome"] == "passed"
    (steady,) = (result for test, result in results.items() if "steady_step" in test)
    assert steady["measured"] == {"waits_per_step": 0}


@pytest.mark.slow
def test_the_gpu_kit_passes_on_a_pretended_gpu():
    program = [sys.executable, "-m", "pytest", "-p", "pretended_gpu.plugin", "-m", "gpu", "tests/gpu"]
    done = subprocess.run(
        [*program, "-k", "not torch_compile"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "tests"), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_gpu_kit_s_benchmarks_run_on_a_pretended_gpu(tmp_path):
    done = subprocess.run(
        ["benchmarks/gpu_kit.sh", "run", "benchmarks", "--pretended"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PY": sys.executable, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=700,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("benchmarks-pretended-GPU-*.json")
    for result in json.loads(path.read_text())["results"]:
        if result["outcome"] != "skipped":
            assert {"ratio_median", "ours_images_per_second", "ours_step_mib", "waits"} <= result["measured"].keys()
