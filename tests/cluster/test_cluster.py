"""Tests on the Determined cluster that DET_MASTER names; CPU slots suffice. Skipped without DET_MASTER.

On two slots, a detector takes about ten minutes, a shipped file a minute or two, the two compared searches ten. The
data are mounted from this machine. The task that a test kills kills itself, once.
"""

import functools
import json
import math
import os
import posixpath
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_model_def
from determined.common.api import bindings
from determined.experimental import client
from determined_master import OF_THE_CLUSTER, handed_over
from search_program import RANGES, share_of_better_points
from tiny_models import CONFIGS

from shared.data import synthetic

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("DET_MASTER"), reason="DET_MASTER names no Determined cluster"),
]
SHIPPED = [path for detector in CONFIGS for path in sorted((ROOT / detector).glob("*.yaml"))]
LIMIT = 180  # seconds from its start in which const_fake.yaml must end
SEARCH = {
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

# a trial whose curve is that of tests/search_program.py, stopped as those of the detectors are
CURVE = """
import determined
from determined import core
from search_program import value_after
from shared.training.run import trial_is_stopping

trial = determined.get_cluster_info().trial
length = trial._config["searcher"]["max_time"]
with core.init(tensorboard_mode=core.TensorboardMode.MANUAL) as context:
    for batch in range(1, length + 1):
        metrics = {"bbox_mAP": value_after(batch / length, trial.hparams), "batches": batch}
        context.train.report_validation_metrics(batch, metrics)
        if trial_is_stopping(trial.trial_id, batch):
            break
"""


def det(*arguments: object, cwd: Path = ROOT) -> str:
    program = str(Path(sys.executable).parent / "det")
    done = subprocess.run([program, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(cwd: Path, config: str = "const_fake.yaml", *overrides: str):
    """`det experiment create CONFIG .`. Returns the experiment of the SDK."""
    options = [part for override in overrides for part in ("--config", override)]
    printed = det("experiment", "create", config, ".", *options, cwd=cwd)
    return client.get_experiment(int(re.search(r"Created experiment (\d+)", printed)[1]))


def wait(experiment, seconds: float = 600) -> str:
    """The experiment's final state."""
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


def wait_for_trial(experiment):
    end = time.time() + 60
    while not experiment.get_trials() and time.time() < end:
        time.sleep(0.5)
    return the_trial(experiment)


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


def restarts(trial) -> int:
    return bindings.get_GetTrial(client._get_singleton_session(), trialId=trial.id).trial.restarts


def assert_ends_with_its_error(trial, message: str) -> None:
    """The last line of the first process, at level ERROR, names the problem. torchrun's own lines have no rank."""
    last = [line for line in trial.logs() if "[rank=0]" in line][-1]
    assert re.search(rf"ERROR: (.*\b)?not retried: error: .*{re.escape(message)}", last), last


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request) -> Path:
    """The folder that a user submits, per detector."""
    return ROOT / request.param


@pytest.fixture
def context(folder, tmp_path) -> Path:
    """A copy of that folder, to change."""
    return shutil.copytree(folder, tmp_path / "context", ignore=shutil.ignore_patterns("runs", "__pycache__"))


@pytest.fixture(scope="module")
def validated(folder) -> list[int]:
    """The batches after which const_fake.yaml validates."""
    config = yaml.safe_load((folder / "const_fake.yaml").read_text())
    period, length = config["min_validation_period"]["batches"], config["searcher"]["max_length"]["batches"]
    return list(range(period, length + 1, period))


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run of const_fake.yaml."""
    started = time.time()
    experiment = submit(folder)
    assert wait(experiment) == "COMPLETED"
    assert time.time() - started < LIMIT
    return the_trial(experiment)


def test_one_slot_completes_with_validations_and_checkpoints(whole, validated):
    assert list(validations(whole)) == validated
    saved = {c.metadata["steps_completed"] for c in whole.list_checkpoints()}
    assert saved == set(validated)
    assert not any("AP/" in name for name in validations(whole)[validated[-1]])
    values = [metrics["bbox_mAP"] for metrics in validations(whole).values()]
    assert values[-1] > 2 * values[0]  # the chart rises


def test_a_checkpoint_s_uuid_is_evaluated_off_the_cluster(whole, folder, validated, tmp_path):
    (last,) = [c for c in whole.list_checkpoints() if c.metadata["steps_completed"] == validated[-1]]
    run_model_def("evaluate", "const_fake.yaml", "--checkpoint", last.uuid, "--output", tmp_path, cwd=folder)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["bbox_mAP"] == validations(whole)[validated[-1]]["bbox_mAP"]


def test_two_slots_complete(folder, validated):
    started = time.time()
    experiment = submit(folder, "const_fake.yaml", "resources.slots_per_trial=2")
    assert wait(experiment) == "COMPLETED"
    assert time.time() - started < LIMIT
    assert list(validations(the_trial(experiment))) == validated


def test_a_killed_container_resumes_from_the_last_checkpoint(whole, folder, context):
    (trial,) = re.findall(r"^class (\w+Trial)\(", (folder / "model_def.py").read_text(), re.MULTILINE)
    (context / "killed.py").write_text(KILLED.replace("TRIAL", trial))
    config = yaml.safe_load((context / "const_fake.yaml").read_text())
    config["entrypoint"] = config["entrypoint"].replace("model_def.py", "killed.py")
    (context / "killed.yaml").write_text(yaml.safe_dump(config))
    experiment = submit(context, "killed.yaml")
    assert wait(experiment) == "COMPLETED"
    trial = the_trial(experiment)
    assert any("resumes after batch 40" in line for line in trial.logs())
    assert_same_metrics(validations(trial), validations(whole))


def test_a_paused_trial_resumes_when_it_is_activated(whole, folder, validated):
    experiment = submit(folder)
    trial = wait_for_trial(experiment)
    wait_for_validation(trial, validated[0])
    experiment.pause()
    time.sleep(15)
    assert max(validations(trial)) < validated[-1]
    experiment.activate()
    assert wait(experiment) == "COMPLETED"
    assert_same_metrics(validations(trial), validations(whole))


def test_det_continue_with_a_greater_length_starts_at_the_end(folder, validated):
    experiment = submit(folder, "const_fake.yaml", "searcher.max_length.batches=40")
    assert wait(experiment) == "COMPLETED"
    longer = ("--config", "searcher.name=single", "--config", "searcher.max_length.batches=60")
    det("experiment", "continue", experiment.id, *longer)
    assert wait(experiment) == "COMPLETED"
    trial = the_trial(experiment)
    assert list(validations(trial)) == sorted({*range(validated[0], 61, validated[0]), 40, 60})
    reports = [report.steps_completed for report in trial.iter_metrics("training")]
    assert sorted(set(reports)) == reports == list(range(10, 61, 10))


def test_det_continue_with_more_slots_resumes_on_all_agents(folder, validated):
    slots = sum(len(agent.slots) for agent in bindings.get_GetAgents(client._get_singleton_session()).agents)
    if slots == 1 or 8 % slots:
        pytest.skip(f"needs a cluster with 2, 4 or 8 slots, not {slots}")
    experiment = submit(folder)
    wait_for_validation(wait_for_trial(experiment), validated[0])
    det("experiment", "cancel", experiment.id)
    assert wait(experiment) == "CANCELED"
    det("experiment", "continue", experiment.id, "--config", f"resources.slots_per_trial={slots}")
    assert wait(experiment) == "COMPLETED"
    trial = the_trial(experiment)
    assert list(validations(trial)) == validated
    log = "".join(trial.logs())
    assert re.search(rf"global batch +\d+ on {slots} slots", log)
    assert re.search(r"length .*; resumes after batch \d+", log)


# --- every file as it is shipped ----------------------------------------------------------------------


@functools.cache
def slots_of_an_agent() -> int:
    return max(len(agent.slots) for agent in bindings.get_GetAgents(client._get_singleton_session()).agents)


def write_tiny_coco(config: dict, root: Path) -> list[dict]:
    """Writes 8 images below `root`, at the paths that the config names, and returns the mount that takes them there."""
    splits = {split: config["data"][split] for split in ("train", "val")}
    inside = {
        (split, key): posixpath.normpath(posixpath.join("/run/determined/workdir", path))
        for split, paths in splits.items()
        for key, path in paths.items()
    }
    coco = synthetic.coco_split(seed=0, count=8)
    for split, count in (("train", 8), ("val", 2)):
        images = coco["images"][:count]
        ids = {image["id"] for image in images}
        annotations = [annotation for annotation in coco["annotations"] if annotation["image_id"] in ids]
        file, folder = (root / inside[split, key].lstrip("/") for key in ("annotations", "images"))
        file.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**coco, "images": images, "annotations": annotations}))
        for index, image in enumerate(images):
            synthetic.draw_sample(0, index)[0].save(folder / image["file_name"])
    mounted = posixpath.commonpath(inside.values())
    return [{"host_path": str(root / mounted.lstrip("/")), "container_path": mounted}]


def made_short(config: dict, detector: str) -> dict:
    """The config for one batch on CPU slots: one image per slot for a big model, no downloads, nothing that needs a
    GPU."""
    hyperparameters, searcher = config["hyperparameters"], config["searcher"]
    if searcher["name"] == "single":
        searcher["max_length"] = {"batches": 1}
    else:
        searcher.update(max_trials=1, max_time=1, max_rungs=1)
    if Path(config["data"].get("train", {}).get("annotations", "")).is_relative_to("/data/coco"):
        slots = min(config["resources"]["slots_per_trial"], slots_of_an_agent())
        config["resources"]["slots_per_trial"] = hyperparameters["global_batch_size"] = slots
        hyperparameters.pop("use_pretrained", None)
        hyperparameters.pop("weights", None)
        if detector == "efficientdet":
            # the cool-down is part of the length
            hyperparameters.update(cooldown_epochs=0, pretrained="none", amp=None, sync_bn=False)
        elif detector == "mmdetection":
            hyperparameters.setdefault("config_overrides", {})["model.backbone.init_cfg"] = None
        else:
            hyperparameters["weights"] = ""
    return config


@pytest.mark.parametrize("path", SHIPPED, ids=[f"{path.parent.name}/{path.name}" for path in SHIPPED])
def test_a_shipped_file_passes_its_first_validation(path, tmp_path):
    context = shutil.copytree(path.parent, tmp_path / "context", ignore=shutil.ignore_patterns("runs", "__pycache__"))
    config = made_short(yaml.safe_load(path.read_text()), path.parent.name)
    if "train" in config["data"]:
        config["bind_mounts"] = write_tiny_coco(config, tmp_path / "mounted")
    (context / "shipped.yaml").write_text(yaml.safe_dump(config))
    experiment = submit(context, "shipped.yaml")
    assert wait(experiment, 900) == "COMPLETED", "".join(experiment.get_trials()[0].logs())
    trial = the_trial(experiment)
    assert restarts(trial) == 0
    assert [metrics["bbox_mAP"] >= 0 for metrics in validations(trial).values()] == [True]
    answered, expected = experiment.config, handed_over(config)
    for key in OF_THE_CLUSTER:
        section, _, name = key.rpartition(".")
        for filled in (answered, expected):
            (filled[section] if section else filled).pop(name)
    assert answered == expected


# --- what is wrong ------------------------------------------------------------------------------------


def without_data(context: Path, **changes: object) -> dict:
    """const_fake.yaml with a wrong path, as wrong.yaml in the context."""
    config = yaml.safe_load((context / "const_fake.yaml").read_text())
    nowhere = {"annotations": "/nowhere/train.json", "images": "/nowhere/train"}
    config.update(data={"train": nowhere, "val": nowhere, "workers": 0}, **changes)
    (context / "wrong.yaml").write_text(yaml.safe_dump(config))
    return config


def test_a_wrong_path_is_an_error_after_one_start(context):
    without_data(context)
    experiment = submit(context, "wrong.yaml")
    assert wait(experiment) == "ERROR"
    trial = the_trial(experiment)
    assert restarts(trial) == 0
    assert_ends_with_its_error(trial, "data.train.annotations: /nowhere/train.json does not exist")


def test_a_wrong_path_without_the_policy_is_an_error_after_all_restarts(context):
    without_data(context, log_policies=[], max_restarts=1)
    experiment = submit(context, "wrong.yaml")
    assert wait(experiment) == "ERROR"
    trial = the_trial(experiment)
    assert sum("ERROR: not retried: error: " in line for line in trial.logs()) == 2
    assert_ends_with_its_error(trial, "data.train.annotations: /nowhere/train.json does not exist")


def test_a_search_whose_every_trial_is_wrong_is_an_error(context):
    without_data(context, searcher={**SEARCH, "max_trials": 3})
    experiment = submit(context, "wrong.yaml")
    assert wait(experiment) == "ERROR"
    for trial in experiment.get_trials():
        assert trial.state.name == "ERROR"
        assert restarts(trial) == 0


def test_bad_input_is_an_error_that_names_the_key(folder):
    experiment = submit(folder, "const_fake.yaml", "hyperparameters.global_batchsize=4")
    assert wait(experiment) == "ERROR"
    trial = the_trial(experiment)
    assert restarts(trial) == 0
    message = "hyperparameters: unknown key 'global_batchsize'; did you mean 'global_batch_size'?"
    assert_ends_with_its_error(trial, message)


def test_a_batch_smaller_than_the_slots_is_an_error_after_one_start(folder):
    changes = ("hyperparameters.global_batch_size=1", "resources.slots_per_trial=2")
    experiment = submit(folder, "const_fake.yaml", *changes)
    assert wait(experiment) == "ERROR"
    trial = the_trial(experiment)
    assert restarts(trial) == 0
    assert_ends_with_its_error(trial, "hyperparameters.global_batch_size")


def test_a_search_stops_trials_early_and_outlives_one_that_diverges(folder, context):
    config = yaml.safe_load((context / "const_fake.yaml").read_text())
    # a categorical that every trial draws: the third value cannot end in anything but NaN
    rates = {"type": "categorical", "vals": [0.003, 0.0003, 1e30]}
    if folder.name == "efficientdet":
        config["hyperparameters"].update(lr=rates, warmup_epochs=0, clip_grad=None)
    elif folder.name == "mmdetection":
        config["hyperparameters"]["config_overrides"] = {"optimizer.lr": rates, "lr_config.warmup": None}
    else:
        config["hyperparameters"]["config_overrides"]["SOLVER"] = {"BASE_LR": rates, "WARMUP_ITERS": 0}
    config["searcher"] = SEARCH
    config["min_validation_period"] = {"batches": 10}
    (context / "search.yaml").write_text(yaml.safe_dump(config))
    experiment = submit(context, "search.yaml")
    assert wait(experiment, 900) == "COMPLETED"
    trials = experiment.get_trials()
    assert len(trials) == 8  # all are drawn, whatever diverges
    lengths, diverged = [], 0
    for trial in trials:
        metrics = validations(trial)
        assert all(math.isfinite(m["bbox_mAP"]) for m in metrics.values())
        if "1e+30" in json.dumps(trial.hparams):
            diverged += 1
            assert trial.state.name == "ERROR"
            assert restarts(trial) == 0
            assert_ends_with_its_error(trial, "the loss is not finite since batch")
        else:
            assert trial.state.name == "COMPLETED"
            lengths.append(max(metrics))
    assert diverged
    assert max(lengths) == 80
    assert min(lengths) < 80  # stopped by the searcher, at its next report


def test_a_search_saves_and_finds_as_much_here_as_on_the_cluster(tmp_path):
    config = {
        "name": "curves",
        "hyperparameters": RANGES,
        "searcher": {
            "name": "adaptive_asha",
            "metric": "bbox_mAP",
            "smaller_is_better": False,
            "max_trials": 32,
            "time_metric": "batches",
            "max_time": 64,
            "max_concurrent_trials": 2,
        },
        "min_validation_period": {"batches": 1},
        "reproducibility": {"experiment_seed": 0},
        "data": {},
        "max_restarts": 0,
        "entrypoint": "python3 curve.py",
    }
    context = tmp_path / "context"
    shutil.copytree(ROOT / "shared", context / "shared", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests/search_program.py", context)
    (context / "curve.py").write_text(CURVE)
    (context / "search.yaml").write_text(yaml.safe_dump(config))
    experiment = submit(context, "search.yaml")
    assert wait(experiment, 1800) == "COMPLETED"
    curves = [(validations(trial), trial.hparams) for trial in experiment.get_trials()]
    lengths_there = [max(curve) for curve, _ in curves]
    assert set(lengths_there) == {4, 16, 64}  # each hears at once that it is stopped
    _, chosen_there = max(curves, key=lambda trial: max(metrics["bbox_mAP"] for metrics in trial[0].values()))

    (tmp_path / "here.yaml").write_text(yaml.safe_dump({**config, "seconds_a_batch": 0.06}))
    program = [sys.executable, ROOT / "tests/search_program.py", "search", tmp_path / "here.yaml", tmp_path / "here"]
    subprocess.run([*program, "2"], check=True)
    lengths_here = [len(log.read_text().split()) for log in (tmp_path / "here").glob("trials/*/batches.log")]
    chosen_here = yaml.safe_load((tmp_path / "here/best.yaml").read_text())["hyperparameters"]

    for where, lengths, chosen in (("there", lengths_there, chosen_there), ("here", lengths_here, chosen_here)):
        saved, better = 1 - sum(lengths) / (32 * 64), share_of_better_points(chosen)
        print(f"{where}: {saved:.0%} of the batches saved, {better:.1%} of all points are better than the chosen one")
        assert len(lengths) == 32
        assert saved >= 0.6
        assert better < 0.1
