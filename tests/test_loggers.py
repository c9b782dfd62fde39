"""The numbers of metrics.jsonl in W&B and MLflow."""

import importlib.util
import json
import logging
import os
import struct
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from cluster_task import become_a_task
from conftest import reports, run_model_def
from tiny_models import efficientdet_config

from shared import launch
from shared.config.schema import TrainingHyperparameters, parse_section
from shared.errors import UserError
from shared.training import loggers
from shared.training.loggers import Loggers, MlflowRun, WandbRun, _flat, check_loggers, metric_name
from shared.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def without_the_users_own(monkeypatch, tmp_path):
    """Hides the account, servers and home of whoever runs the tests."""
    for key in [key for key in os.environ if key.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(key)
    for key, value in {
        "WANDB_MODE": "offline",
        "HOME": str(tmp_path / "home"),
        "NETRC": str(tmp_path / "home/.netrc"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }.items():
        monkeypatch.setenv(key, value)


@pytest.fixture
def config(shapes):
    """Four batches. Each is reported, each second one validated."""
    config = efficientdet_config(shapes)
    config["data"]["workers"] = 0
    config["scheduling_unit"] = 1
    config["min_validation_period"] = {"batches": 2}
    config["searcher"]["max_length"] = {"batches": 4}
    return config


@pytest.fixture
def trial_class(monkeypatch):
    """EfficientDet's trial, without figures and reports."""
    from model_def import EfficientDetTrial

    monkeypatch.setattr("shared.training.run.TensorBoard.draw_figures", lambda *_: None)
    monkeypatch.setattr("shared.commands.train.Results.write_report", lambda *_: None)
    return EfficientDetTrial


def wandb_records(run: Path) -> list[list]:
    """W&B's records of each start of a run, oldest first."""
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.parent.name)
    until = time.monotonic() + 60
    # W&B's own process writes it, and does not wait for the end of it when the run is finished
    while not all(of_kind(records_in(file), "exit") for file in files) and time.monotonic() < until:
        time.sleep(0.1)
    return [records_in(file) for file in files]


def records_in(file: Path) -> list:
    """The records of a file in LevelDB's log format: blocks of 32 KiB after W&B's header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if at + 7 + length > len(data):
            break
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or the last of its parts
            records.append(Record.FromString(whole))
            whole = b""
    return records


def of_kind(records: list, kind: str) -> list:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def wandb_numbers(run: Path) -> list[tuple[str, int, float]]:
    """(name, batches, value) in W&B's records."""
    numbers = []
    for records in wandb_records(run):
        for history in of_kind(records, "history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
            numbers += [
                (name, items["batches"], value) for name, value in items.items() if name.startswith(("train", "val"))
            ]
    return sorted(numbers)


def mlflow_client(run: Path):
    from mlflow import MlflowClient

    return MlflowClient((run.parent / "mlruns").as_uri())


def mlflow_numbers(run: Path) -> list[tuple[str, int, float]]:
    client, run_id = mlflow_client(run), ids(run)["mlflow"]
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith(("train", "val"))]
    return sorted((name, m.step, m.value) for name in names for m in client.get_metric_history(run_id, name))


def ids(run: Path) -> dict[str, str]:
    return json.loads((run / "loggers.json").read_text())


def written(lines: list[dict]) -> list[tuple[str, int, float]]:
    return sorted(
        (f"{line['split']}/{name}", line["batches"], value)
        for line in lines
        for name, value in line["metrics"].items()
        if value is not None
    )


def test_loggers_equal_metrics_jsonl_and_continue_their_runs(config, train, trial_class, tmp_path):
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    pytest.importorskip("mlflow", reason="neither mlflow-skinny nor mlflow is installed")
    config["hyperparameters"]["loggers"] = ["wandb", "mlflow"]
    config["environment"] = {"registry_auth": {"password": "secret"}}

    class Killed(trial_class):
        def losses(self, model, batch):
            if self.batches_trained == 3:
                raise RuntimeError("killed")
            return super().losses(model, batch)

    Killed.__module__ = "model_def"
    with pytest.raises(RuntimeError, match="killed"):
        train(Killed, config)
    run = tmp_path / "run"
    first, began = reports(run), ids(run)
    assert [line["batches"] for line in first] == [1, 2, 2, 3]
    assert wandb_numbers(run) == written(first)
    assert mlflow_numbers(run) == written(first)
    assert mlflow_client(run).get_run(began["mlflow"]).info.status == "FAILED"

    train(trial_class, config, resume="last", report=True)
    twice = [line for line in first if line["batches"] > 2]
    assert len(twice) == 1
    assert ids(run) == began
    assert wandb_numbers(run) == written(reports(run) + twice)
    assert mlflow_numbers(run) == written(reports(run) + twice)

    starts = wandb_records(run)
    settings = [of_kind(records, "run")[0] for records in starts]
    assert [(each.run_id, each.project, each.display_name) for each in settings] == [
        (began["wandb"], "test", "run")
    ] * 2
    assert [of_kind(records, "exit")[0].exit_code for records in starts] == [1, 0]
    assert "secret" not in str(settings)
    assert {item.key: json.loads(item.value_json) for item in settings[1].config.update}["hyperparameters"][
        "lr"
    ] == 0.002
    best = max(reports(run, "val"), key=lambda line: line["metrics"]["bbox_mAP"])["metrics"]["bbox_mAP"]
    summary = {item.key: item.value_json for each in of_kind(starts[1], "summary") for item in each.update}
    assert json.loads(summary["best/bbox_mAP"]) == best
    assert list(run.glob("wandb/*/files/media/images/predictions_*.png"))

    client = mlflow_client(run)
    kept = client.get_run(began["mlflow"])
    assert (kept.info.status, kept.info.run_name) == ("FINISHED", "run")
    assert client.get_experiment(kept.info.experiment_id).name == "test"
    assert kept.data.params["hyperparameters.lr"] == "0.002"
    assert kept.data.params["searcher.max_length.batches"] == "4"
    assert "secret" not in str(kept.data.params)
    assert kept.data.metrics["best/bbox_mAP"] == best
    assert [file.path for file in client.list_artifacts(began["mlflow"])] == ["predictions.png"]


def test_w_and_b_gets_no_password_from_the_config_or_the_command_line(trial_class, config, train, monkeypatch):
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    config["hyperparameters"]["loggers"] = ["wandb"]
    config["tensorboard_storage"] = {"type": "s3", "bucket": "b", "secret_key": "hunter2"}
    given = ["--set", "tensorboard_storage.secret_key=hunter2"]
    monkeypatch.setattr(sys, "argv", ["model_def.py", "train", "config.yaml", *given])
    run = train(trial_class, config)
    (records,) = wandb_records(run)
    assert "tensorboard_storage" in str(of_kind(records, "run"))
    files = [path for path in (run / "wandb").rglob("*") if path.is_file()]
    assert not [path for path in files if b"hunter2" in path.read_bytes()]


class Fake:
    """A logger's run that keeps its calls."""

    place = "here"
    opened: ClassVar[list] = []

    def __init__(self, config, project, folder, kept):
        self.id, self.project, self.config, self.told = kept or "new", project, config, []
        Fake.opened.append(self)

    def report(self, batches, values):
        self.told.append((batches, values))

    def conclude(self, batches, best, picture):
        self.told.append((batches, best, picture))

    def finish(self, code):
        self.told.append(code)


class Failing(Fake):
    def report(self, batches, values):
        raise ConnectionError("no network\nat all")

    conclude = report


class Unreachable(Fake):
    def __init__(self, *_):
        raise ConnectionError("no network")


@pytest.fixture
def fakes(monkeypatch):
    """Replaces the loggers, whatever is installed."""
    Fake.opened = []
    monkeypatch.setattr(loggers, "check_loggers", lambda _: None)
    return lambda **classes: [monkeypatch.setitem(loggers._RUNS, name, fake) for name, fake in classes.items()]


def opened(tmp_path: Path, names: list[str], goes_on: bool = False, **config: object) -> Loggers:
    folder = RunFolder(tmp_path / "runs/one")
    folder.path.mkdir(parents=True, exist_ok=True)
    made = Loggers()
    made.open(names, config, folder, goes_on)
    return made


def test_a_failing_logger_stops_neither_training_nor_other_loggers(config, train, trial_class, fakes, caplog):
    config["hyperparameters"]["loggers"] = ["wandb", "mlflow"]
    config["searcher"]["max_length"] = {"batches": 2}
    fakes(wandb=Failing, mlflow=Fake)
    run = train(trial_class, config)
    assert [line["batches"] for line in reports(run)] == [1, 2, 2]
    warnings = [record.message for record in caplog.records if "fails" in record.message]
    assert warnings == ["wandb fails, and the training continues: ConnectionError: no network"]
    failing, fake = Fake.opened
    assert failing.told == [0]
    assert [told[0] for told in fake.told[:-1]] == [1, 2, 2, 2]
    assert fake.told[-1] == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (SystemExit(143), 143), (SystemExit("error: x"), 1), (KeyboardInterrupt(), 130), (UserError("x"), 1)],
)
def test_the_runs_end_as_the_program_does(fakes, tmp_path, error, code):
    fakes(wandb=Fake)
    loggers_ = opened(tmp_path, ["wandb", "wandb"], environment={"x": 1}, searcher={})
    loggers_.report(3, "val", {"bbox_mAP": 0.5, "bbox_mAP_l": None})
    loggers_.__exit__(type(error) if error else None, error, None)
    (fake,) = Fake.opened
    assert fake.told == [(3, {"val/bbox_mAP": 0.5}), code]
    assert (fake.config, fake.project) == ({"searcher": {}}, "runs")


def test_a_logger_that_fails_stops_a_new_run_but_not_a_running_one(fakes, tmp_path, caplog):
    fakes(wandb=Fake, mlflow=Unreachable)
    with pytest.raises(UserError, match=r"mlflow cannot begin a run \(ConnectionError: no network\)\. Fix: remove it"):
        opened(tmp_path, ["wandb", "mlflow"])
    assert Fake.opened[0].told == [1]
    logged = opened(tmp_path, ["wandb", "mlflow"], goes_on=True)
    assert "mlflow does not continue its run: ConnectionError: no network" in caplog.text
    logged.finish(0)
    logged.finish(1)  # once
    assert Fake.opened[1].told == [0]


def test_a_missing_package_and_an_unknown_name_are_errors(monkeypatch, shapes):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        check_loggers(["wandb"])
    message = "hyperparameters.loggers: wandb is not installed. Fix: python3 -m pip install wandb, or remove it"
    assert str(error.value) == message
    with pytest.raises(
        UserError, match=r"mlflow is not installed. Fix: python3 -m pip install mlflow-skinny, or remove"
    ):
        check_loggers(["mlflow"])
    ranges = {"lr": {"type": "log", "minval": -4, "maxval": -2, "base": 10}, "loggers": ["wandb"]}
    with pytest.raises(UserError, match="wandb is not installed"):
        launch.check_loggers_of_search({"hyperparameters": ranges})
    with pytest.raises(UserError, match=r"hyperparameters.loggers: 'wandbb' is unknown; did you mean 'wandb'\?"):
        parse_section({"loggers": ["wandbb"]}, TrainingHyperparameters, "hyperparameters")
    with pytest.raises(UserError, match=r"hyperparameters.loggers: Expected `array`, got `str`"):
        parse_section({"loggers": "wandb"}, TrainingHyperparameters, "hyperparameters")


def test_wandb_without_a_key_is_an_error_before_anything_is_loaded(config, tmp_path):
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    config["hyperparameters"]["loggers"] = ["wandb"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ("train", tmp_path / "config.yaml", "--output-dir", tmp_path / "run")
    done = run_model_def(*arguments, check=False, env={"WANDB_MODE": "online"})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: hyperparameters.loggers: wandb has no API key. Fix: run `wandb login`, or set WANDB_API_"
    )
    assert "WANDB_MODE=offline" in line
    assert not (tmp_path / "run").exists()


def test_on_a_cluster_nothing_is_logged_nor_needed(config, trial_class, monkeypatch, tmp_path, caplog):
    config["hyperparameters"]["loggers"] = ["wandb", "mlflow"]
    config["searcher"]["max_length"] = {"batches": 2}
    monkeypatch.setattr(loggers, "check_loggers", lambda _: pytest.fail("it was looked at"))
    monkeypatch.setattr(Loggers, "open", lambda *_: pytest.fail("it was opened"))
    caplog.set_level(logging.INFO)
    master = become_a_task(monkeypatch, tmp_path / "task", config)
    monkeypatch.chdir(tmp_path / "task")
    monkeypatch.setattr(sys, "argv", ["model_def.py"])
    launch.main(trial_class)
    assert list(master.of("validation")) == [2]
    assert "hyperparameters.loggers: not used on a cluster, where the master has the numbers" in caplog.text


@pytest.mark.parametrize(
    ("name", "of_mlflow"),
    [
        ("val/bbox_AP/circle", "val/bbox_AP/circle"),
        ("val/bbox_AP/cup & spoon (blue)", "val/bbox_AP/cup _ spoon _blue_"),
        ("val/bbox_AP/a/b", "val/bbox_AP/a_b"),
        ("val/bbox_AP/..", "val/bbox_AP/_"),
        ("val/bbox_AP/Ärger 杯", "val/bbox_AP/Ärger 杯"),
    ],
)
def test_a_name_is_one_that_mlflow_allows(name, of_mlflow):
    assert metric_name(name) == of_mlflow
    validation = pytest.importorskip("mlflow.utils.validation", reason="neither mlflow-skinny nor mlflow is installed")
    validation._validate_metric_name(of_mlflow)


def test_parameters_are_the_leaves_of_the_config_as_text():
    config = {"a": {"b.c": {"d/e": True}, "f": [1, {"g": None}], "h": {}}, "i": "x" * 7000, "j": None}
    assert _flat(config) == {
        "a.b.c.d_e": "true",
        "a.f": '[1, {"g": null}]',
        "a.h": "{}",
        "i": "x" * 6000,
        "j": "null",
    }


def test_the_libraries_own_variables_win(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    pytest.importorskip("mlflow", reason="neither mlflow-skinny nor mlflow is installed")
    folder = tmp_path / "runs/one"
    folder.mkdir(parents=True)
    (tmp_path / "logs").mkdir()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    wandb_run = WandbRun({}, "a/b", folder, None)
    wandb_run.finish(0)
    assert wandb_run.run.project == "mine"
    assert list((tmp_path / "logs/wandb").glob("offline-run-*"))
    mlflow_run = MlflowRun({}, "a/b", folder, "0" * 32)  # an id that this store does not know
    mlflow_run.report(
        1, {f"val/bbox_AP/{number}": 0.5 for number in range(1203)}
    )  # LVIS's, more than MLflow takes at once
    mlflow_run.finish(143)
    kept = mlflow_run.client.get_run(mlflow_run.id)
    assert mlflow_run.client.get_experiment(kept.info.experiment_id).name == "mine"
    assert (kept.info.status, len(kept.data.metrics)) == ("KILLED", 1203)
    assert not (tmp_path / "runs/mlruns").exists()
