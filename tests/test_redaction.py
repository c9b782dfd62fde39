"""No file, page, log line or logger has a config's passwords, and everything works without them."""

import copy
import json
import logging
import stat
import sys

import pytest
import yaml
from cluster_task import become_a_task
from stores import http_store
from tiny_models import efficientdet_config

from shared import launch
from shared.data.annotations import CocoAnnotations
from shared.data.synthetic import coco_split
from shared.durable import write_file
from shared.log import REDACTED, filled_in, redacted, show_log, without_secrets
from shared.report.report import About, changed_keys
from shared.training.run_folder import RunFolder

PASSWORD = "hunter2"
# every place for a secret that Determined's schema has, and others where users put them
SECRETS = {
    "environment": {
        "image": {"cpu": "registry.example.com/image:1"},
        "environment_variables": {"cpu": [f"WANDB_API_KEY={PASSWORD}", f"ANY={PASSWORD}"], "cuda": [f"ANY={PASSWORD}"]},
        "registry_auth": {
            "username": PASSWORD,
            "password": PASSWORD,
            "auth": PASSWORD,
            "identitytoken": PASSWORD,
            "registrytoken": PASSWORD,
        },
        "pod_spec": {"spec": {"containers": [{"name": "c", "env": [{"name": "ANY", "value": PASSWORD}]}]}},
    },
    "checkpoint_storage": {
        "type": "s3",
        "bucket": "checkpoints",
        "access_key": PASSWORD,
        "secret_key": PASSWORD,
        "endpoint_url": f"https://user:{PASSWORD}@store.example.com:9000",
        "connection_string": f"AccountName=a;AccountKey={PASSWORD}==;EndpointSuffix=example.com",
        "credential": PASSWORD,
        "account_url": f"https://store.example.com/container?sv=1&sig={PASSWORD}",
    },
    "integrations": {"pachyderm": {"dataset": {"repo": "images", "token": PASSWORD}}},
    "slurm": {"sbatch_args": [f"--export=ALL,API_TOKEN={PASSWORD}"]},
    "entrypoint": ["python3", "model_def.py", "--api-key", PASSWORD, f"--password={PASSWORD}"],
    "description": f"from https://user:{PASSWORD}@example.com/data",
}


@pytest.fixture
def config(shapes):
    """A config of two batches and a validation, with a password in every place."""
    config = {**efficientdet_config(shapes), **copy.deepcopy(SECRETS)}
    config["data"] |= {"workers": 0, "endpoint_url": f"http://user:{PASSWORD}@127.0.0.1:9"}
    config["searcher"]["max_length"] = {"batches": 2}
    return config


def holding_the_password(folder):
    return [path for path in folder.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]


def test_a_redacted_config_keeps_its_keys_and_no_password():
    before = copy.deepcopy(SECRETS)
    clean = without_secrets(SECRETS)
    assert before == SECRETS
    assert PASSWORD not in json.dumps(clean)
    environment, storage = clean["environment"], clean["checkpoint_storage"]
    assert environment["environment_variables"]["cpu"] == [f"WANDB_API_KEY={REDACTED}", f"ANY={REDACTED}"]
    assert environment["registry_auth"].keys() == SECRETS["environment"]["registry_auth"].keys()
    assert environment["image"] == SECRETS["environment"]["image"]
    assert (storage["type"], storage["bucket"]) == ("s3", "checkpoints")
    assert storage["endpoint_url"] == f"https://{REDACTED}@store.example.com:9000"
    assert clean["entrypoint"] == ["python3", "model_def.py", "--api-key", REDACTED, f"--password={REDACTED}"]


@pytest.mark.parametrize(
    "key", ["password", "db_password", "wandb_api_key", "apiKey", "hf-token", "aws_secret_access_key", "AWSAccessKeyId"]
)
def test_the_value_of_a_key_that_names_a_secret_is_redacted(key):
    assert without_secrets({"hyperparameters": {key: PASSWORD}}) == {"hyperparameters": {key: REDACTED}}


def test_a_number_as_a_password_is_redacted_too():
    assert without_secrets({"password": 12345, "secret": ["a", 1]}) == {
        "password": REDACTED,
        "secret": [REDACTED, REDACTED],
    }


@pytest.mark.parametrize(
    "config",
    [
        {"hyperparameters": {"lr": 0.1, "num_tokens": 5, "cls_token": True, "mask_token": 103, "token_dim": "a"}},
        {"searcher": {"metric": "bbox_mAP"}, "password": None, "secret": ""},
        {"data": {"train": {"images": "s3://bucket/a@2x/images", "annotations": "http://host:80/a.json?page=2"}}},
        {"keys": ["a"], "monkey": "b", "keyboard": "c", "bypass": "d", "design": "e"},
    ],
)
def test_values_that_are_not_secret_stay(config):
    assert without_secrets(config) == config


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://u:p@host/a cannot be read", f"http://{REDACTED}@host/a cannot be read"),
        ("http://u:p@w@host/a", f"http://{REDACTED}@host/a"),
        ("https://token@host, s3://bucket/a@b", f"https://{REDACTED}@host, s3://bucket/a@b"),
        ("https://h/a?X-Amz-Signature=ab&X-Amz-Date=1", f"https://h/a?X-Amz-Signature={REDACTED}&X-Amz-Date=1"),
        ("--set environment.registry_auth.password=p", f"--set environment.registry_auth.password={REDACTED}"),
        ("run --verbose --api-key p x", f"run --verbose --api-key {REDACTED} x"),
        ("--set hyperparameters.lr=0.1", "--set hyperparameters.lr=0.1"),
    ],
)
def test_passwords_in_a_text_are_redacted(text, clean):
    assert redacted(text) == clean


def test_redacted_hyperparameters_are_filled_in_from_the_config():
    hparams = {"lr": 0.1, "weights": "https://u:p@host/w.pth", "client": {"token": "t", "list": ["http://u@h"]}}
    clean = without_secrets(hparams)
    assert clean != hparams
    assert filled_in(clean, {**hparams, "lr": 0.2}) == hparams
    assert filled_in(clean, {}) == clean


def test_a_run_folder_has_no_password_and_can_be_resumed(config, train, command, trial_class, tmp_path, capsys):
    run = train(trial_class, config, report=True)
    assert (run / "report.html").exists()
    assert not holding_the_password(run)
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept.keys() == config.keys()
    assert kept["hyperparameters"] == config["hyperparameters"]
    assert kept["environment"] == without_secrets(SECRETS)["environment"]
    config["searcher"]["max_length"] = {"batches": 4}
    train(trial_class, config, resume="last")
    checkpoint = run / "checkpoints/last"
    assert json.loads((checkpoint / "metadata.json").read_text())["steps_completed"] == 4
    assert not holding_the_password(run)
    arguments = ("evaluate", tmp_path / "run.yaml", "--checkpoint", checkpoint, "--report", tmp_path / "report")
    command(trial_class, *arguments)
    assert "mAP_50" in capsys.readouterr().out
    assert not holding_the_password(tmp_path / "report")


def test_a_checkpoint_of_a_cluster_s_task_holds_no_password(config, trial_class, tmp_path, monkeypatch):
    config["checkpoint_policy"] = "all"
    master = become_a_task(monkeypatch, tmp_path / "task", config)
    (tmp_path / "task/model/mine.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path / "task")
    monkeypatch.setattr(sys, "argv", ["model_def.py"])
    launch.main(trial_class)
    checkpoint = master.checkpoints[-1]
    assert yaml.safe_load((checkpoint / "code/mine.yaml").read_text())["data"]["workers"] == 0
    assert json.loads((checkpoint / "load_data.json").read_text())["hparams"] == config["hyperparameters"]
    assert not holding_the_password(checkpoint)


def test_a_run_s_copy_of_the_code_has_no_password(config, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "mine.yaml").write_text(yaml.safe_dump(config))
    (source / "tagged.yaml").write_text(f"a: !own {{}}\nurl: http://u:{PASSWORD}@host\n")
    (source / "const.yaml").write_text("a: 1  # a comment\n")
    folder = RunFolder(tmp_path / "run")
    folder.prepare(source)
    assert not holding_the_password(folder.path)
    assert yaml.safe_load((folder.code / "mine.yaml").read_text()) == without_secrets(config)
    assert (folder.code / "const.yaml").read_text() == "a: 1  # a comment\n"


def test_a_report_shows_that_a_secret_changed_but_not_its_value(config):
    rows = changed_keys(config, {key: value for key, value in config.items() if key != "checkpoint_storage"})
    assert ("checkpoint_storage.secret_key", "–", REDACTED) in rows
    assert PASSWORD not in str(rows)
    about = About(facts={"validation data": f"http://u:{PASSWORD}@host/val.json, 5 images", "time": 3})
    assert about.facts == {"validation data": f"http://{REDACTED}@host/val.json, 5 images", "time": 3}


def test_error_messages_and_the_log_name_no_password(run_config, refused, capfd, monkeypatch):
    url = f"http://user:{PASSWORD}@127.0.0.1:9/val.json"
    line = refused("train", run_config(data__val={"annotations": url, "images": "http://127.0.0.1:9"}))
    assert line.startswith(f"error: data.val.annotations: http://{REDACTED}@127.0.0.1:9/val.json cannot be read")
    for attribute, value in {"handlers": [], "level": logging.INFO}.items():
        monkeypatch.setattr(logging.getLogger(), attribute, value)
    show_log()
    logging.getLogger("shared").warning("%s does not answer", url)
    assert f"WARNING: http://{REDACTED}@127.0.0.1:9/val.json does not answer" in capfd.readouterr().err


def test_a_file_can_be_written_for_its_owner_alone(tmp_path):
    path = tmp_path / "trial.yaml"
    write_file(path, "a: 1\n", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "a: 1\n"


def test_the_cache_of_annotations_from_a_signed_url_names_no_signature(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served/val.json").write_text(json.dumps(coco_split(seed=1, count=2)))
    with http_store(tmp_path / "served") as url:
        CocoAnnotations.open(f"{url}/val.json?X-Amz-Signature={PASSWORD}", tmp_path / "cache")
    (cache,) = (tmp_path / "cache").iterdir()
    assert cache.name.startswith("val.json")
    assert not [path for path in cache.rglob("*") if PASSWORD in str(path)]
