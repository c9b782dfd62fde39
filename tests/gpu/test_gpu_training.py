"""Every detector on one GPU, and on two if there are two: what only a GPU can show.

Two equal runs show whether a detector's kernels are deterministic. If they are, a resumed run must be bit-for-bit
equal. If not, as with RoIAlign's backward, its losses may differ as much as those of the two equal runs. A warning then
names the detector.
"""

import contextlib
import functools
import gc
import json
import os
import re
import sys
import warnings

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product of matrices

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, WITHOUT_LIBRARY, reports, run_model_def
from test_resume import assert_same_bits, final_state
from tiny_models import TINY_DETECTORS
from torchvision.ops import box_iou

from shared.data import loading
from shared.data.loading import map_tensors
from shared.training.checkpoints import load_state

sys.path.append(str(ROOT / "benchmarks"))
from side_by_side import site, watch_synchronisations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]

ON_GPUS = {name: tiny for name, tiny in TINY_DETECTORS.items() if hasattr(tiny, "GPU_CASES")}


def named(detector, model):
    return f"{detector} {model}".strip()


# (the detector's folder, its config for the shapes)
FLOAT32 = {named(name, model): (name, make) for name, tiny in ON_GPUS.items() for model, make in tiny.GPU_CASES.items()}
MAIN = {name: list(tiny.GPU_CASES)[-1] for name, tiny in ON_GPUS.items()}
FLOAT16 = {
    f"{name} fp16": (name, functools.partial(tiny.GPU_CASES[MAIN[name]], **tiny.FP16)) for name, tiny in ON_GPUS.items()
}
ONE_EACH = [named(*each) for each in MAIN.items()]


@pytest.fixture
def case(request):
    """A detector's folder and config by the name in `FLOAT32` or `FLOAT16`; skipped where its library is not here."""
    detector, config = {**FLOAT32, **FLOAT16}[request.param]
    if detector in WITHOUT_LIBRARY:
        pytest.skip(WITHOUT_LIBRARY[detector])
    return detector, config


@pytest.fixture
def reproducible(monkeypatch):
    """Deterministic kernels, if they exist, without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def empty_device():
    """A test leaves nothing on the device."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


class Killed(Exception):
    """Ends a run without a word to it."""


def probe(detector, at_batch_end=lambda trial, batches: None, at_losses=lambda trial, batch, losses: None):
    """The detector's trial, which calls `at_batch_end` after each batch and `at_losses` after each forward pass."""
    trial_class = TINY_DETECTORS[detector].trial_class()

    class Probe(trial_class):
        def build_model(self):
            model = super().build_model()
            torch.backends.cudnn.benchmark = False  # it chooses kernels by their time, and another run others
            return model

        def losses(self, model, batch):
            losses = super().losses(model, batch)
            at_losses(self, batch, losses)
            return losses

        def after_batch(self, number):
            super().after_batch(number)
            at_batch_end(self, number + 1)

    Probe.__module__ = trial_class.__module__  # whose folder is the run's code
    return Probe


def losses_of(run):
    """The training losses of each report, by batches."""
    return {
        report["batches"]: {k: v for k, v in report["metrics"].items() if "loss" in k}
        for report in reports(run, "train")
    }


def same_bits(a, b):
    try:
        assert_same_bits(a, b)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("case", [*FLOAT32, *FLOAT16], indirect=True)
def test_a_killed_run_resumes_to_the_same_bits(case, shapes, train, request, reproducible, record_property):
    detector, config = case[0], case[1](shapes)

    def kill(trial, batches):
        if batches == 7:  # the last checkpoint is of batch 4
            raise Killed

    def on_the_device(trial, batch, losses):
        expected = torch.device("cuda", torch.cuda.current_device())
        tensors = []
        map_tensors(batch, lambda tensor: tensors.append(tensor) or tensor)
        assert tensors
        assert {tensor.device for tensor in (*tensors, *losses.values(), *trial.model.parameters())} == {expected}

    trial_class = probe(detector, at_losses=on_the_device)
    whole, again = (train(trial_class, config, name) for name in ("whole", "again"))
    with pytest.raises(Killed):
        train(probe(detector, kill), config, "killed")
    resumed = train(trial_class, config, "killed", resume="last")

    assert [(r["batches"], r["split"]) for r in reports(resumed)] == [
        (r["batches"], r["split"]) for r in reports(whole)
    ]
    is_deterministic = same_bits(final_state(whole), final_state(again))
    record_property("two_equal_runs_have_the_same_bits", is_deterministic)
    if is_deterministic:
        assert_same_bits(final_state(resumed), final_state(whole))
        return
    warnings.warn(
        f"{request.node.callspec.id}: two equal runs differ in their bits; the resumed one is compared by its losses",
        stacklevel=1,
    )
    expected, other, ours = losses_of(whole), losses_of(again), losses_of(resumed)
    for batches, losses in expected.items():
        near = 0.01 if batches <= 6 else 0.05  # differences grow from step to step
        for name, value in losses.items():
            spread = abs(other[batches][name] - value)
            assert ours[batches][name] == pytest.approx(value, rel=near, abs=10 * spread + 1e-4), (batches, name)


@pytest.mark.parametrize("case", FLOAT16, indirect=True)
def test_half_precision_scales_its_losses_and_takes_steps(case, shapes, train):
    detector, config = case[0], case[1](shapes)
    config["searcher"]["max_length"] = {"batches": 12}
    before = {}

    def note(trial, batch, losses):
        assert trial.scaler.is_enabled()
        if not before:
            before.update({name: weight.clone() for name, weight in trial.plain_model.named_parameters()})

    def look(trial, batches):
        if batches == 12:
            before["moved"] = sum(
                not torch.equal(weight, before[name]) for name, weight in trial.plain_model.named_parameters()
            )

    run = train(probe(detector, look, note), config)
    scale = load_state(run / "checkpoints/last/state_dict.pth")["scaler_state_dict"]["scale"]
    assert 1 <= scale <= 2**16  # halved where gradients overflowed
    assert before["moved"] > 0
    for losses in losses_of(run).values():
        assert all(np.isfinite(list(losses.values())))


VARIANTS = {
    "bf16": ({"amp": "bf16"}, 0.03),
    "fp16": ({"amp": "fp16"}, 0.01),
    "channels_last": ({"channels_last": True}, 0.001),
    "torch_compile": ({"torch_compile": True}, 0.001),
    "bf16, channels_last": ({"amp": "bf16", "channels_last": True}, 0.03),
}
SWITCHES = [
    *((case, *VARIANTS[name]) for case in ONE_EACH for name in VARIANTS),
    ("efficientdet", {"labeler": "device"}, 0.001),
]


@pytest.mark.parametrize(("case", "options", "near"), SWITCHES, indirect=["case"])
def test_a_switch_changes_the_speed_and_not_the_loss(case, options, near, shapes, train, reproducible):
    if "torch_compile" in options:
        pytest.importorskip("triton", reason="torch.compile needs triton on a GPU")
    detector, seen = case[0], {}

    def note(trial, batch, losses):
        seen.setdefault("loss", losses["loss"].item())
        if isinstance(batch.images, torch.Tensor):
            seen["channels_last"] = batch.images.is_contiguous(memory_format=torch.channels_last)

    def run(name, hyperparameters):
        seen.clear()
        config = case[1](shapes)
        config["hyperparameters"].update(hyperparameters)
        config["searcher"]["max_length"] = config["min_validation_period"] = {"batches": 4}
        losses = losses_of(train(probe(detector, at_losses=note), config, name))
        assert all(np.isfinite(list(values.values())).all() for values in losses.values())
        return dict(seen)

    plain, changed = run("plain", {}), run("changed", options)
    assert changed["loss"] == pytest.approx(plain["loss"], rel=near)
    if "channels_last" in changed:  # Detectron2's images are batched in its model
        assert changed["channels_last"] == options.get("channels_last", False)


OF_A_LIBRARY = re.compile(r"-packages/(effdet|timm|torchvision|mm|detectron2|fvcore)")


@pytest.mark.parametrize("case", [*ONE_EACH, "efficientdet fp16"], indirect=True)
def test_a_steady_step_waits_for_the_device_only_where_the_library_does(case, shapes, train, record_property):
    detector, config = case[0], case[1](shapes)
    stacks = []

    class Watched(probe(detector)):
        def train_batch(self, batch, epoch_idx, batch_idx):
            with contextlib.ExitStack() as watch:
                found = watch.enter_context(watch_synchronisations()) if 5 <= batch_idx < 9 else []
                metrics = super().train_batch(batch, epoch_idx, batch_idx)
            stacks.extend(found)
            return metrics

    Watched.__module__ = Watched.__base__.__module__
    train(Watched, config)
    sites = [site(stack) for stack in stacks]
    record_property("waits_per_step", len(sites) / 4)
    if detector != "efficientdet":  # mmdet and detectron2 wait many times in each step, also in its backward pass
        sites = [
            frame
            for frame in sites
            if not OF_A_LIBRARY.search(frame.filename)
            and not (frame.name == "backward" and "determined" in frame.filename)
        ]
    assert [f"{frame.filename}:{frame.lineno} {frame.line}" for frame in sites] == []


@pytest.mark.parametrize("case", ONE_EACH, indirect=True)
def test_memory_does_not_grow_from_step_to_step(case, shapes, train, record_property):
    detector, config = case[0], case[1](shapes)
    config["searcher"]["max_length"] = config["min_validation_period"] = {"batches": 200}
    config["scheduling_unit"] = 50
    allocated = {}

    def look(trial, batches):
        torch.cuda.synchronize()
        allocated[batches] = torch.cuda.memory_allocated()

    train(probe(detector, look), config)
    # batches differ in size: the greatest of many steps, early and late
    early, late = (max(allocated[i] for i in range(first, first + 50)) for first in (50, 150))
    record_property("allocated_mib", [round(value / 2**20, 1) for value in (early, late)])
    assert late <= early + 2**20


@pytest.mark.parametrize("case", ONE_EACH, indirect=True)
def test_a_batch_s_targets_arrive_as_they_left_the_host(case, shapes, train, monkeypatch):
    detector, config = case[0], case[1](shapes)
    config["searcher"]["max_length"] = config["min_validation_period"] = {"batches": 12}
    to_device, sent, arrived = loading.to_device, {}, {}

    def sums(targets):
        found = []
        map_tensors(targets, lambda tensor: found.append(tensor.double().sum()) or tensor)
        return found

    def note_on_host(batch, device):
        sent[tuple(batch.image_ids)] = [float(value) for value in sums(batch.targets)]
        return to_device(batch, device)

    def note_on_device(trial, batch, losses):
        arrived[tuple(batch.image_ids)] = sums(batch.targets)

    monkeypatch.setattr(loading, "to_device", note_on_host)
    train(probe(detector, at_losses=note_on_device), config)
    assert len(arrived) > 6
    for image_ids, values in arrived.items():
        assert [float(value) for value in values] == pytest.approx(sent[image_ids], rel=1e-9, abs=1e-6)


# --- processes of their own: evaluation, and two GPUs ---------------------------------------------------


def evaluated(detector, path, checkpoint, output, processes=1, **env):
    """The metrics and the detections of `model_def.py evaluate`, without TF32."""
    run_model_def(
        *("evaluate", path, "--checkpoint", checkpoint, "--output", output),
        processes=processes,
        cwd=ROOT / detector,
        env={"NVIDIA_TF32_OVERRIDE": "0", **env},
    )
    return tuple(json.loads((output / name).read_text()) for name in ("metrics.json", "results.json"))


def share_found_again(some, others):
    """The share of the 20 best detections of each image for which `others` has one of the same category and score in
    the same place."""
    found, count = 0, 0
    assert some
    for image_id in {result["image_id"] for result in some}:
        best, rest = (
            sorted((r for r in results if r["image_id"] == image_id), key=lambda r: -r["score"])
            for results in (some, others)
        )
        boxes, candidates = (torch.tensor([r["bbox"] for r in each]).reshape(-1, 4) for each in (best[:20], rest))
        for each in (boxes, candidates):
            each[:, 2:] += each[:, :2]
        overlaps = box_iou(boxes, candidates)
        for i, result in enumerate(best[:20]):
            count += 1
            found += any(
                overlaps[i, k] > 0.9
                and rest[k]["category_id"] == result["category_id"]
                and abs(rest[k]["score"] - result["score"]) < 0.01
                for k in range(len(rest))
            )
    return found / count


def assert_same_evaluation(ours, expected):
    (metrics, results), (expected_metrics, expected_results) = ours, expected
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert metrics[name] == (value if value is None else pytest.approx(value, abs=0.02)), name
    assert share_found_again(results, expected_results) > 0.95
    assert share_found_again(expected_results, results) > 0.95


@pytest.mark.parametrize("case", FLOAT32, indirect=True)
def test_a_gpu_evaluates_as_the_cpu_does(case, shapes, train, tmp_path, record_property):
    detector, config = case[0], case[1](shapes)
    config["searcher"]["max_length"] = config["min_validation_period"] = {"batches": 12}
    checkpoint = train(probe(detector), config) / "checkpoints/last"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    on_gpu = evaluated(detector, path, checkpoint, tmp_path / "gpu")
    on_cpu = evaluated(detector, path, checkpoint, tmp_path / "cpu", CUDA_VISIBLE_DEVICES="")
    record_property("share_of_detections_found_again", share_found_again(on_gpu[1], on_cpu[1]))
    assert_same_evaluation(on_gpu, on_cpu)


PROBE = """
import os, sys
sys.path.insert(0, ".")
import torch
import model_def
from shared.launch import main
from shared.training.trial import DetectionTrial

trial_class = next(
    value for value in vars(model_def).values()
    if isinstance(value, type) and issubclass(value, DetectionTrial) and value.__module__ == "model_def"
)

class Probe(trial_class):
    def after_batch(self, number):
        super().after_batch(number)
        means = [b.double().sum() for n, b in self.plain_model.named_buffers() if n.endswith("running_mean")]
        devices = {str(tensor.device) for tensor in self.plain_model.state_dict().values()}
        line = ["RANK", os.environ["LOCAL_RANK"], torch.cuda.current_device(), *devices, float(sum(means))]
        os.write(1, (" ".join(map(str, line)) + "\\n").encode())

main(Probe)
"""


@pytest.mark.gpu(2)
@pytest.mark.parametrize("case", ONE_EACH, indirect=True)
def test_two_processes_train_on_a_gpu_each_and_evaluate_as_one(case, shapes, tmp_path):
    detector, config = case[0], case[1](shapes)
    section, values = TINY_DETECTORS[detector].SYNC_BN
    {**config, **config["hyperparameters"]}[section].update(values)
    config["searcher"]["max_length"] = config["min_validation_period"] = {"batches": 4}
    path, script, run = tmp_path / "config.yaml", tmp_path / "probe.py", tmp_path / "run"
    path.write_text(yaml.safe_dump(config))
    script.write_text(PROBE)
    done = run_model_def("train", path, "--output-dir", run, processes=2, cwd=ROOT / detector, script=script)
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RANK")]
    assert len(lines) == 8
    for rank, current, device, _ in lines:
        assert current == rank
        assert device == f"cuda:{rank}"
    of_rank = [[float(line[3]) for line in lines if line[0] == rank] for rank in ("0", "1")]
    assert of_rank[0] == pytest.approx(of_rank[1], rel=1e-4)  # else each has those of its own images
    checkpoint = run / "checkpoints/last"
    one = evaluated(detector, path, checkpoint, tmp_path / "one")
    assert_same_evaluation(evaluated(detector, path, checkpoint, tmp_path / "two", processes=2), one)
