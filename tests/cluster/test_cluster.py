"""On a real Determined cluster, the one that DET_MASTER names: CPU slots do. Skipped where there is none.

Takes about eight minutes a detector on two slots. The task that is to be killed kills itself, once.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_model_def

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("DET_MASTER"), reason="DET_MASTER names no Determined cluster"),
]
TRIALS = {"efficientdet": "EfficientDetTrial", "mmdetection": "MMDetectionTrial", "detectron2": "Detectron2Trial"}
LIMIT = 180  # seconds from its start in which const_fake.yaml must end

# a model_def.py that kills the processes of its container, but the first, after batch 50 of a fresh start
KILLED = """
import os, signal
import psutil
import model_def
from shared.launch import main

class Killed(model_def.TRIAL):
    def before_batch(self, number):
        super().before_batch(number)
        if number == 50 and self.first_batch == 0:
            for process in [*psutil.Process().parents(), psutil.Process()]:
                if process.pid != 1:
                    process.send_signal(signal.SIGKILL)

main(Killed)
"""


def det(*arguments: object, cwd: Path = ROOT) -> str:
    program = str(Path(sys.executable).parent / "det")
    done = subprocess.run([program, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(cwd: Path, config: str = "const_fake.yaml", *overrides: str):
    """`det experiment create CONFIG .`; the experiment, by the SDK."""
    from determined.experimental import client

    options = [part for override in overrides for part in ("--config", override)]
    printed = det("experiment", "create", config, ".", *options, cwd=cwd)
    return client.get_experiment(int(re.search(r"Created experiment (\d+)", printed)[1]))


def wait(experiment, seconds: float = 600) -> str:
    """The state that the experiment ends in."""
    end = time.time() + seconds
    while time.time() < end:
        experiment.reload()
        if experiment.state.name in ("COMPLETED", "ERROR", "CANCELED"):
            return experiment.state.name
        time.sleep(2)
    raise TimeoutError(f"experiment {experiment.id} is {experiment.state.name} after {seconds} s")


def the_trial(experiment):
    (trial,) = experiment.get_trials()
    return trial


def validations(trial) -> dict[int, dict]:
    return {
        report.steps_completed: {k: v for k, v in report.metrics.items() if k not in ("epochs", "batches")}
        for report in trial.iter_metrics("validation")
    }


def wait_for_validation(trial, batches: int) -> None:
    end = time.time() + 120
    while batches not in validations(trial):
        assert time.time() < end
        time.sleep(0.5)


def assert_same_metrics(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for batches in a:
        for name, value in a[batches].items():
            assert value == b[batches][name] or (math.isnan(float(value)) and math.isnan(float(b[batches][name])))


@pytest.fixture(scope="module", params=list(TRIALS))
def folder(request) -> Path:
    """What a user submits, of each detector."""
    return ROOT / request.param


@pytest.fixture
def context(folder, tmp_path) -> Path:
    """A copy of it, to change."""
    return shutil.copytree(folder, tmp_path / "context", ignore=shutil.ignore_patterns("runs", "__pycache__"))


@pytest.fixture(scope="module")
def whole(folder):
    """const_fake.yaml, never interrupted."""
    started = time.time()
    experiment = submit(folder)
    assert wait(experiment) == "COMPLETED"
    assert time.time() - started < LIMIT
    return the_trial(experiment)


def test_one_slot_completes_with_validations_and_checkpoints(whole):
    assert list(validations(whole)) == [20, 40, 60, 80]
    saved = {c.metadata["steps_completed"] for c in whole.list_checkpoints()}
    assert saved == {20, 40, 60, 80}
    assert not any("AP/" in name for name in validations(whole)[80])
    assert all(math.isfinite(metrics["bbox_mAP"]) for metrics in validations(whole).values())


def test_a_checkpoint_s_uuid_is_evaluated_off_the_cluster(whole, folder, tmp_path):
    (last,) = [c for c in whole.list_checkpoints() if c.metadata["steps_completed"] == 80]
    run_model_def("evaluate", "const_fake.yaml", "--checkpoint", last.uuid, "--output", tmp_path, cwd=folder)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["bbox_mAP"] == validations(whole)[80]["bbox_mAP"]


def test_two_slots_complete(folder):
    started = time.time()
    experiment = submit(folder, "const_fake.yaml", "resources.slots_per_trial=2")
    assert wait(experiment) == "COMPLETED"
    assert time.time() - started < LIMIT
    assert list(validations(the_trial(experiment))) == [20, 40, 60, 80]


def test_a_killed_container_goes_on_from_the_last_checkpoint(whole, folder, context):
    (context / "killed.py").write_text(KILLED.replace("TRIAL", TRIALS[folder.name]))
    config = yaml.safe_load((context / "const_fake.yaml").read_text())
    config["entrypoint"] = config["entrypoint"].replace("model_def.py", "killed.py")
    (context / "killed.yaml").write_text(yaml.safe_dump(config))
    experiment = submit(context, "killed.yaml")
    assert wait(experiment) == "COMPLETED"
    trial = the_trial(experiment)
    assert any("Restoring trial from checkpoint" in line or "resum" in line.lower() for line in trial.logs())
    assert_same_metrics(validations(trial), validations(whole))


def test_a_paused_trial_goes_on_when_it_is_activated(whole, folder):
    experiment = submit(folder)
    end = time.time() + 60
    while not experiment.get_trials() and time.time() < end:
        time.sleep(0.5)
    trial = the_trial(experiment)
    wait_for_validation(trial, 20)
    experiment.pause()
    time.sleep(15)
    assert max(validations(trial)) < 80
    experiment.activate()
    assert wait(experiment) == "COMPLETED"
    assert_same_metrics(validations(trial), validations(whole))


def test_continue_with_a_greater_length_goes_on_from_the_end(folder):
    experiment = submit(folder, "const_fake.yaml", "searcher.max_length.batches=40")
    assert wait(experiment) == "COMPLETED"
    longer = ("--config", "searcher.name=single", "--config", "searcher.max_length.batches=60")
    det("experiment", "continue", experiment.id, *longer)
    assert wait(experiment) == "COMPLETED"
    trial = the_trial(experiment)
    assert list(validations(trial)) == [20, 40, 60]
    reports = [report.steps_completed for report in trial.iter_metrics("training")]
    assert sorted(set(reports)) == reports == list(range(10, 61, 10))


def test_bad_input_is_an_error_that_names_the_key(folder):
    experiment = submit(folder, "const_fake.yaml", "hyperparameters.global_batchsize=4", "max_restarts=0")
    assert wait(experiment, 120) == "ERROR"
    lines = "".join(the_trial(experiment).logs())
    assert "error: hyperparameters: unknown key 'global_batchsize'; did you mean 'global_batch_size'?" in lines


def test_a_search_stops_trials_early_and_outlives_one_that_diverges(folder, context):
    config = yaml.safe_load((context / "const_fake.yaml").read_text())
    # a categorical that every trial draws: the third value cannot end in anything but NaN
    rates = {"type": "categorical", "vals": [0.003, 0.0003, 1e30]}
    if folder.name == "efficientdet":
        config["hyperparameters"].update(lr=rates, warmup_epochs=0, clip_grad=None)
    elif folder.name == "mmdetection":
        config["hyperparameters"]["override_mmdet_config"] = {"optimizer.lr": rates, "lr_config.warmup": None}
    else:
        config["hyperparameters"]["config_overrides"]["SOLVER"] = {"BASE_LR": rates, "WARMUP_ITERS": 0}
    config["searcher"] = {
        "name": "adaptive_asha",
        "metric": "bbox_mAP",
        "smaller_is_better": False,
        "mode": "aggressive",
        "max_trials": 8,
        "time_metric": "batches",
        "max_time": 80,
        "max_rungs": 2,
        "divisor": 4,
        "max_concurrent_trials": 2,
    }
    config["min_validation_period"] = {"batches": 10}
    (context / "search.yaml").write_text(yaml.safe_dump(config))
    experiment = submit(context, "search.yaml")
    assert wait(experiment, 900) == "COMPLETED"
    trials = experiment.get_trials()
    assert len(trials) >= 4
    lengths, diverged = [], 0
    for trial in trials:
        metrics = validations(trial)
        assert all(math.isfinite(m["bbox_mAP"]) for m in metrics.values())
        if "1e+30" in json.dumps(trial.hparams):
            diverged += 1
            assert any("the loss is not finite since batch" in line for line in trial.logs())
        elif metrics:
            lengths.append(max(metrics))
    assert diverged
    assert max(lengths) == 80
    assert min(lengths) < 80  # stopped by the searcher, at its next report
