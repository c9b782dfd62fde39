"""`model_def.py` as a cluster's task, with the config as a master fills it in. tests/cluster has a real master."""

import errno
import math
import os
import pickle
import sys
import threading

import pytest
import torch
from cluster_task import become_a_task
from conftest import reports
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import efficientdet_config
from torch.torch_version import TorchVersion
from without_figures import leave_out_figures

from shared import launch
from shared.training.checkpoints import load_state, read_checkpoint
from shared.training.saving import write_manifest


@pytest.fixture
def config(shapes):
    config = efficientdet_config(shapes)
    config["data"]["workers"] = 0
    config["checkpoint_policy"] = "all"
    return config


@pytest.fixture
def run_task(monkeypatch, tmp_path, trial_class):
    """Trains as a task in this process. Returns its master. `figures=True` draws them, which takes half of the time."""

    def call(config, name="task", trial_class=trial_class, figures=False, **of_the_task):
        if not figures:
            leave_out_figures(monkeypatch.setattr)
        folder = tmp_path / name
        master = become_a_task(monkeypatch, folder, config, **of_the_task)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["model_def.py"])
        try:
            launch.main(trial_class)
        except SystemExit as ended:
            master.exit_status = ended.code
        return master

    return call


def test_a_task_trains_with_the_defaults_that_a_master_fills_in(config, run_task, capsys):
    del config["min_validation_period"]
    master = run_task(config)
    assert list(master.of("validation")) == [12]
    assert read_checkpoint(master.checkpoints[-1]).batches == 12
    assert "AP/rectangle" in capsys.readouterr().out  # the table that a run off the cluster ends with


def test_the_master_gets_the_numbers_that_steer_and_none_that_is_undefined(config, run_task):
    config["searcher"]["metric"] = "bbox_mAP_50"
    master = run_task(config)
    for metrics in master.of("validation").values():
        assert {"bbox_mAP", "bbox_mAP_50", "bbox_mAP_75"} <= metrics.keys()
        assert not any("_AR_" in name or "AP/" in name for name in metrics)
        assert all(math.isfinite(value) for value in metrics.values())
    for metrics in master.of("training").values():
        assert metrics.keys() == {"loss", "class_loss", "box_loss", "lr", "batches", "epochs"}
        assert isinstance(float(metrics["lr"]), float)


def test_the_master_gets_the_total_validation_loss_and_tensorboard_all(config, run_task):
    config["hyperparameters"]["validation_loss"] = True
    config["searcher"].update(metric="val_loss", smaller_is_better=True)
    master = run_task(config)
    for metrics in master.of("validation").values():
        assert [name for name in metrics if name.startswith("val_")] == ["val_loss"]
        assert "bbox_mAP" in metrics
    events = EventAccumulator(str(master.tensorboard))
    events.Reload()
    assert {"val/val_loss", "val/val_class_loss", "val/val_box_loss"} <= set(events.Tags()["scalars"])


def test_tensorboard_has_groups_pictures_and_the_last_validation(config, run_task):
    master = run_task(config, figures=True)
    events = EventAccumulator(str(master.tensorboard))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"train/loss", "train/images_per_second", "val/bbox_mAP", "val/bbox_AR_100"} <= set(scalars)
    assert "categories/bbox_AP/circle" in scalars
    assert [event.step for event in events.Scalars("val/bbox_mAP")] == [4, 8, 12]
    assert [event.step for event in events.Images("val/detections")] == [4, 8, 12]
    figures = {tag for tag in events.Tags()["images"] if tag.startswith("report_bbox/")}
    assert "report_bbox/F1 over the score threshold" in figures
    assert all([event.step for event in events.Images(tag)][-1] == 12 for tag in figures)
    assert master.uploads[-1] == len(master.reports)


def test_a_run_shorter_than_a_report_logs_its_progress(config, run_task):
    config["scheduling_unit"] = 100
    master = run_task(config)
    assert master.progress[0] == pytest.approx(1 / 3)
    assert master.progress[-1] == 1.0


def test_a_trial_stopped_by_the_searcher_trains_no_further_batch(config, run_task):
    master = run_task(config, stops_at=8)
    assert list(master.of("validation")) == [4, 8]
    assert max(master.of("training")) == 8
    assert read_checkpoint(master.checkpoints[-1]).batches == 8


class Harmful:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", ["trial_state.pkl", "state_dict.pth"])
def test_a_task_refuses_a_checkpoint_with_code(name, config, run_task, tmp_path, monkeypatch, caplog):
    config["searcher"]["max_length"] = {"batches": 4}
    saved = run_task(config).checkpoints[-1]
    trace = tmp_path / "ran"
    write = torch.save if name.endswith("pth") else lambda value, path: path.write_bytes(pickle.dumps(value))
    write({"trial_id": Harmful(trace)}, saved / name)
    write_manifest(saved, 4)  # whoever changes the one changes the other
    config["searcher"]["max_length"] = {"batches": 8}
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.3.0a0+ebedce2"))  # of Determined's default image
    assert run_task(config, latest_checkpoint=saved.name, steps_completed=4).exit_status == 1
    assert f"{name} cannot be read" in caplog.text
    assert not trace.exists()


def test_a_restarted_task_continues_from_its_checkpoint(config, run_task, caplog):
    caplog.set_level("INFO")
    whole = run_task(config, "whole")
    first = run_task(config, "restarted")
    saved = next(path for path in first.checkpoints if read_checkpoint(path).batches == 4)
    again = run_task(config, "restarted", latest_checkpoint=saved.name, steps_completed=4)
    assert "resumes after batch 4" in caplog.text
    assert list(again.of("validation")) == [8, 12]
    expected = whole.of("validation")
    assert again.of("validation") == {batches: expected[batches] for batches in (8, 12)}
    states = [
        load_state(master.checkpoints[-1] / "state_dict.pth")["models_state_dict"][0] for master in (again, whole)
    ]
    assert all((states[0][name] == weight).all() for name, weight in states[1].items())


def test_training_continues_while_a_checkpoint_is_written_and_uploaded(config, run_task, trial_class):
    trained, weights = [threading.Event() for _ in range(12)], {}

    class Noting(trial_class):
        def after_batch(self, number):
            super().after_batch(number)
            weights[number + 1] = {name: value.clone() for name, value in self.plain_model.state_dict().items()}
            trained[number].set()

    went_on = []
    Noting.__module__ = "model_def"
    # the first upload ends only when three more batches are trained
    master = run_task(config, trial_class=Noting, on_upload=lambda _: went_on.append(trained[6].wait(600)))
    assert went_on == [True] * 3
    saved = [read_checkpoint(folder) for folder in master.checkpoints]
    assert [checkpoint.batches for checkpoint in saved] == [4, 8, 12]
    for checkpoint in saved:
        for name, value in weights[checkpoint.batches].items():
            assert torch.equal(checkpoint.training_weights[name], value), name


def test_an_upload_that_fails_ends_the_run_at_its_next_report(config, run_task):
    def fail_at_the_second(folder):
        if read_checkpoint(folder).batches > 4:
            raise OSError(errno.EIO, "the storage is gone")

    with pytest.raises(OSError, match="the storage is gone"):
        run_task(config, on_upload=fail_at_the_second)


def errors(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


SEARCH = {"name": "adaptive_asha", "max_trials": 2, "time_metric": "batches", "max_time": 12}


@pytest.mark.parametrize("searcher", [{}, SEARCH], ids=["single", "search"])
def test_an_error_that_no_restart_fixes_is_one_line_for_the_log_policy(config, run_task, caplog, searcher):
    config["data"]["val"]["annotations"] = "/x/val.json"
    config["searcher"].update(searcher)
    caplog.set_level("INFO")
    master = run_task(config)
    assert master.exit_status == 1  # and no early exit as an invalid hyperparameter, which a master calls completed
    assert errors(caplog) == [
        "not retried: error: data.val.annotations: /x/val.json does not exist or cannot be read "
        "(No such file or directory). Fix: correct the path or its permissions"
    ]
    assert caplog.records[-1].levelname == "ERROR"
    assert "its config lacks the `log_policies`" in caplog.messages[-2]


def test_a_batch_smaller_than_the_slots_ends_so_too(config, run_task, caplog):
    config["hyperparameters"]["global_batch_size"] = 0
    assert run_task(config).exit_status == 1
    assert errors(caplog)[-1].startswith("not retried: error: hyperparameters.global_batch_size: 0")


def test_a_diverging_training_fails_and_reports_nothing_more(config, run_task, trial_class, caplog):
    class Diverging(trial_class):
        def losses(self, model, batch):
            losses = super().losses(model, batch)
            return {**losses, "loss": losses["loss"] * (math.nan if self.batches_trained >= 5 else 1)}

    Diverging.__module__ = "model_def"
    master = run_task(config, trial_class=Diverging)
    assert master.exit_status == 1
    assert errors(caplog)[-1].startswith("not retried: error: the loss is not finite since batch 6")
    assert list(master.of("validation")) == [4]


def test_gpus_that_torch_cannot_use_are_an_error(config, run_task, caplog):
    master = run_task(config, gpu_uuids=("GPU-1", "GPU-2"))
    assert master.exit_status == 1
    assert "the cluster gave this task 2 GPUs, and torch cannot use them" in errors(caplog)[-1]


def test_a_cluster_s_checkpoint_resumes_locally_at_the_same_batch(config, run_task, train, trial_class, monkeypatch):
    master = run_task(config)
    saved = next(path for path in master.checkpoints if read_checkpoint(path).batches == 8)
    monkeypatch.undo()  # off the cluster
    run = train(trial_class, config, name="here", resume=str(saved))
    assert [report["batches"] for report in reports(run)] == [10, 12, 12]
    assert read_checkpoint(run / "checkpoints/last").batches == 12
