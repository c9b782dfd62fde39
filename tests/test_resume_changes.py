"""A resume after changes of config or data: the new values win, or one error gives the fix."""

import contextlib
import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cluster_task import become_a_task
from conftest import other_detectors_are_slow, reports
from test_resume import assert_same_bits, final_state
from test_switches import small
from tiny_models import TINY_DETECTORS, trial_classes
from torch import nn

from shared import launch
from shared.errors import UserError
from shared.training.checkpoints import load_state, read_checkpoint
from shared.training.resume import BuiltOptimizer, merged

pytestmark = pytest.mark.usefixtures("without_figures")  # for tasks; `train` draws none


@pytest.fixture
def trial_class(detector):
    return trial_classes()[detector]


@pytest.fixture
def config(detector, shapes):
    return of_length(4, small(detector, shapes), detector)


@pytest.fixture
def tiny(shapes):
    """The same for EfficientDet alone, without averaged weights."""
    return of_length(4, small("efficientdet", shapes), "efficientdet")


def of_length(batches, config, detector=None, **hyperparameters):
    """The config with a length of `batches` batches."""
    config["searcher"]["max_length"] = {"batches": batches}
    config["hyperparameters"].update(hyperparameters)
    if detector == "efficientdet":
        # a learning rate that does not depend on the length
        config["hyperparameters"].update(model_ema_decay=None, sched="step", decay_epochs=100)
    return config


@pytest.fixture
def efficientdet():
    return trial_classes()["efficientdet"]


def override(config, changes):
    """Changes the detector's own part of the config."""
    own = config["hyperparameters"]
    own.get("config_overrides", own).update(changes)


def last(run):
    return read_checkpoint(run / "checkpoints/last")


def as_of_an_older_version(run):
    """Removes from the run's last checkpoint what older versions did not save."""
    path = run / "checkpoints/last/state_dict.pth"
    state = load_state(path)
    for name in ("optimizer", "ema_steps", "scaler", "batches_per_epoch"):
        del state["callbacks"]["training"][name]
    best = state["callbacks"]["training"].pop("patience")
    state["callbacks"]["local_run"] = {name: best[name] for name in ("best", "best_at")}
    torch.save(state, path)
    (run / "checkpoints/last/manifest.json").unlink()


# --- averaged weights ---------------------------------------------------------------------------------


@other_detectors_are_slow
def test_averaging_switched_on_at_a_resume_starts_from_the_trained_weights(config, trial_class, train):
    switch = {"model_ema_decay": 0.99}
    check_average(config, trial_class, train, switch, share=0.9)  # the first step of an average counts most


@pytest.mark.parametrize("detector", ["mmdetection"], indirect=True)
def test_a_hook_s_average_switched_on_at_a_resume_starts_from_them_too(config, trial_class, train):
    overrides = config["hyperparameters"]["config_overrides"]
    switch = {"config_overrides": {**overrides, "custom_hooks": [{"type": "EMAHook", "momentum": 0.02}]}}
    check_average(config, trial_class, train, switch, share=0.02)


def check_average(config, trial_class, train, switch, share):
    before = last(train(trial_class, config)).training_weights
    config["hyperparameters"].update(switch)
    resumed = last(train(trial_class, of_length(5, config), resume="last"))
    trained = [name for name, _ in resumed.weights.items() if name.endswith("weight")]
    assert len(trained) > 10
    for name in trained:
        expected = before[name] * (1 - share) + resumed.training_weights[name] * share
        torch.testing.assert_close(resumed.weights[name], expected)


def test_a_late_average_continues_its_warm_up_after_the_next_resume(tiny, efficientdet, train, tmp_path):
    run = train(efficientdet, tiny)
    shutil.copytree(run, tmp_path / "parts")
    tiny["hyperparameters"]["model_ema_decay"] = 0.99
    whole = train(efficientdet, of_length(8, tiny), resume="last")
    train(efficientdet, of_length(6, tiny), "parts", resume="last")
    parts = train(efficientdet, of_length(8, tiny), "parts", resume="last")
    assert_same_bits(final_state(parts)["ema"], final_state(whole)["ema"])


def test_averaging_switched_off_at_a_resume_leaves_the_trained_weights(tiny, efficientdet, train):
    whole = train(efficientdet, of_length(6, tiny), "whole")
    train(efficientdet, of_length(4, tiny, model_ema_decay=0.9))
    run = train(efficientdet, of_length(6, tiny, model_ema_decay=None), resume="last")
    assert_same_bits(final_state(run)["model"], final_state(whole)["model"])
    assert final_state(run)["ema"] is None


# --- the best checkpoint ------------------------------------------------------------------------------

# by batch: bbox_mAP, bbox_mAP_50
VALIDATIONS = {2: (0.9, 0.1), 4: (0.5, 0.3), 6: (0.4, 0.2), 8: (0.3, 0.15), 10: (0.2, 0.05)}


@pytest.fixture
def scripted(efficientdet):
    """A trial whose validations give the metrics of VALIDATIONS."""

    class Scripted(efficientdet):
        def finish_validation(self, metrics):
            values = VALIDATIONS.get(self.batches_trained, (0, 0))
            both = dict(zip(("bbox_mAP", "bbox_mAP_50"), values, strict=True))
            return super().finish_validation({**metrics, **both})

    Scripted.__module__ = "model_def"
    return Scripted


def best_after(run):
    return read_checkpoint(run / "checkpoints/best").batches


def test_best_follows_the_metric_of_the_resume(tiny, scripted, train):
    tiny["min_validation_period"] = {"batches": 2}
    assert best_after(train(scripted, tiny)) == 2
    tiny["searcher"]["metric"] = "bbox_mAP_50"
    # 0.2 after batch 6 is better than the 0.1 of the old best
    assert best_after(train(scripted, of_length(8, tiny), resume="last")) == 6
    assert best_after(train(scripted, of_length(10, tiny), resume="last")) == 6


def test_best_starts_fresh_with_a_metric_that_was_not_reported_before(tiny, scripted, train):
    tiny["min_validation_period"] = {"batches": 2}
    assert best_after(train(scripted, tiny)) == 2
    tiny["searcher"].update(metric="val_loss", smaller_is_better=True)
    tiny["hyperparameters"]["validation_loss"] = True
    assert best_after(train(scripted, of_length(6, tiny), resume="last")) == 6


def test_best_of_an_older_checkpoint_stays(tiny, scripted, train):
    tiny["min_validation_period"] = {"batches": 2}
    as_of_an_older_version(train(scripted, tiny))
    assert best_after(train(scripted, of_length(6, tiny), resume="last")) == 2


# --- categories ---------------------------------------------------------------------------------------


def with_ids(config, ids, folder):
    """The same annotations with other category ids."""
    for split in ("train", "val"):
        coco = json.loads(Path(config["data"][split]["annotations"]).read_text())
        new = {category["id"]: ids[category["name"]] for category in coco["categories"]}
        for category in coco["categories"]:
            category["id"] = new[category["id"]]
        for annotation in coco["annotations"]:
            annotation["category_id"] = new[annotation["category_id"]]
        config["data"][split]["annotations"] = str(folder / f"{split}.json")
        (folder / f"{split}.json").write_text(json.dumps(coco))


def files_of(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "code" not in path.parts}


@other_detectors_are_slow
def test_a_resume_with_other_categories_is_refused_and_changes_nothing(config, trial_class, train, tmp_path):
    run = train(trial_class, config)
    saved = files_of(run)
    names = [category["name"] for category in last(run).categories]
    with_ids(config, {name: len(names) - i for i, name in enumerate(names)}, tmp_path)
    with pytest.raises(UserError) as error:
        train(trial_class, of_length(8, config), resume="last")
    first = f"data.train: number 1 of its categories is {names[-1]!r}, and {names[0]!r} in {run / 'checkpoints/last'}. "
    assert str(error.value).startswith(first)
    assert "Fix: use annotations with the checkpoint's categories in its order, or start a new" in str(error.value)
    assert files_of(run) == saved


def test_a_resume_with_other_ids_of_the_same_categories_continues(tiny, efficientdet, train, tmp_path):
    run = train(efficientdet, tiny)
    with_ids(tiny, {category["name"]: 10 * category["id"] for category in last(run).categories}, tmp_path)
    train(efficientdet, of_length(6, tiny), resume="last")
    assert [category["id"] % 10 for category in last(run).categories] == [0] * len(last(run).categories)


@pytest.fixture
def run_task(monkeypatch, tmp_path, efficientdet):
    """Trains as a task of a cluster. Returns its master."""

    def call(config, **of_the_task):
        master = become_a_task(monkeypatch, tmp_path / "task", config, **of_the_task)
        monkeypatch.chdir(tmp_path / "task")
        monkeypatch.setattr(sys, "argv", ["model_def.py"])
        with contextlib.suppress(SystemExit):
            launch.main(efficientdet)
        return master

    return call


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("categories", "error: data.train: number 1 of its categories is"),
        ("optimizer", "error: hyperparameters.opt: SGD cannot continue from the state of AdamW"),
        ("model", "holds the weights of another model"),
    ],
)
def test_a_cluster_s_task_refuses_an_incompatible_checkpoint(tiny, run_task, tmp_path, caplog, changed, message):
    master = run_task(tiny)
    if changed == "categories":
        names = [category["name"] for category in read_checkpoint(master.checkpoints[-1]).categories]
        with_ids(tiny, {name: len(names) - i for i, name in enumerate(names)}, tmp_path)
    elif changed == "optimizer":
        tiny["hyperparameters"]["opt"] = "sgd"
    else:
        tiny["hyperparameters"]["model_config"] = {"fpn_channels": 24, "fpn_cell_repeats": 1}
    of_the_checkpoint = {"latest_checkpoint": master.checkpoints[-1].name, "steps_completed": 4}
    again = run_task(of_length(8, tiny), **of_the_checkpoint)
    assert not again.reports
    assert message in caplog.text


# --- hyperparameters ----------------------------------------------------------------------------------


def rates(run):
    return {report["batches"]: report["metrics"]["lr"] for report in reports(run, "train")}


@other_detectors_are_slow
def test_weight_decay_and_learning_rate_of_a_resume_win(detector, config, trial_class, train):
    train(trial_class, config)
    override(config, TINY_DETECTORS[detector].WEIGHT_DECAY_AND_RATE)
    whole = train(trial_class, of_length(8, config), "whole")
    run = train(trial_class, config, resume="last")
    assert {group["weight_decay"] for group in last(run).optimizer["param_groups"]} >= {0.3}
    assert [rates(run)[batch] for batch in (6, 8)] == [rates(whole)[batch] for batch in (6, 8)]
    assert rates(run)[2] != rates(whole)[2]
    as_built = last(whole).optimizer["param_groups"]
    assert_same_bits(
        [{**group, "initial_lr": None, "lr": None} for group in last(run).optimizer["param_groups"]],
        [{**group, "initial_lr": None, "lr": None} for group in as_built],
    )


@other_detectors_are_slow
def test_an_optimizer_that_cannot_take_the_state_is_refused(detector, config, trial_class, train):
    of_the_run, changes = TINY_DETECTORS[detector].OTHER_OPTIMIZER
    config["hyperparameters"].update(copy.deepcopy(of_the_run))
    run = train(trial_class, config)
    saved = files_of(run)
    override(config, changes)
    with pytest.raises(UserError) as error:
        train(trial_class, of_length(8, config), resume="last")
    assert str(error.value).startswith(trial_class.optimizer_key)
    assert "cannot continue from the state of" in str(error.value)
    assert f". Fix: keep the checkpoint's value, or start a new run with {trial_class.weights_key}" in str(error.value)
    assert files_of(run) == saved


@other_detectors_are_slow
def test_parts_frozen_at_a_resume_stay_and_the_rest_keeps_its_momentum(detector, config, trial_class, train):
    before = last(train(trial_class, config)).training_weights
    frozen = TINY_DETECTORS[detector].FROZEN
    config["hyperparameters"]["freeze"] = [frozen]
    after = last(train(trial_class, of_length(6, config), resume="last")).training_weights
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if frozen in name]
    del config["hyperparameters"]["freeze"]
    thawed = last(train(trial_class, of_length(8, config), resume="last")).training_weights
    assert [name for name in thawed if frozen in name and not torch.equal(thawed[name], after[name])]


def test_the_state_of_each_parameter_goes_to_the_same_parameter():
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abc"})
    whole = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.01)
    built = BuiltOptimizer.of(whole, model)
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    whole.step()
    whole.param_groups[0]["lr"] = 0.05  # as a schedule
    parts = torch.optim.AdamW(
        [
            {"params": model["c"].parameters(), "weight_decay": 0.3},
            {"params": model["a"].parameters()},
        ],
        lr=0.1,
        weight_decay=0.01,
    )
    parts.load_state_dict(BuiltOptimizer.of(parts, model).resumed(whole.state_dict(), built))
    for name in "ac":
        for parameter in model[name].parameters():
            assert_same_bits(parts.state[parameter], whole.state[parameter])
    assert [(group["weight_decay"], group["lr"]) for group in parts.param_groups] == [(0.3, 0.05), (0.01, 0.05)]


def test_trained_values_continue_and_changed_config_values_win():
    scale = {"scale": 65536.0, "growth_interval": 2000}
    saved = {"scale": 512.0, "growth_interval": 2000, "_growth_tracker": 7}
    assert merged(scale, scale, saved) == saved
    assert merged({**scale, "growth_interval": 100}, scale, saved) == {**saved, "growth_interval": 100}
    assert merged({**scale, "scale": 1024.0}, scale, saved)["scale"] == 1024.0


def test_an_older_checkpoint_takes_a_new_weight_decay_but_not_freeze(tiny, efficientdet, train):
    as_of_an_older_version(train(efficientdet, tiny))
    tiny["hyperparameters"]["freeze"] = ["backbone"]
    with pytest.raises(UserError, match=r"older version does not name them. Fix: keep"):
        train(efficientdet, of_length(6, tiny), resume="last")
    tiny["hyperparameters"].update(freeze=[], opt="sgd")
    with pytest.raises(UserError, match=r"hyperparameters.opt: SGD cannot continue from the state of the checkpoint's"):
        train(efficientdet, tiny, resume="last")
    tiny["hyperparameters"].update(opt="adamw", weight_decay=0.3)
    run = train(efficientdet, tiny, resume="last")
    assert 0.3 in {group["weight_decay"] for group in last(run).optimizer["param_groups"]}


@pytest.mark.parametrize(
    "detector", ["efficientdet", pytest.param("mmdetection", marks=pytest.mark.slow)], indirect=True
)
def test_an_older_checkpoint_resumes_to_the_same_bits(config, trial_class, train):
    config["hyperparameters"]["model_ema_decay"] = 0.9
    whole = train(trial_class, of_length(6, config), "whole")
    as_of_an_older_version(train(trial_class, of_length(4, config)))
    run = train(trial_class, of_length(6, config), resume="last")
    assert_same_bits(final_state(run), final_state(whole))
    assert rates(run) == rates(whole)


def test_a_plateau_schedule_continues_after_a_resume(tiny, scripted, train):
    plateau = {"sched": "plateau", "sched_on_updates": False, "patience_epochs": 0, "decay_rate": 0.5, "min_lr": 0}
    tiny["hyperparameters"].update(plateau)
    tiny["min_validation_period"], tiny["scheduling_unit"] = {"epochs": 1}, 6
    train(scripted, of_length(18, tiny))
    run = train(scripted, of_length(24, tiny, decay_rate=0.1), resume="last")
    assert rates(run) == pytest.approx({6: 1e-4, 12: 1e-4, 18: 5e-5, 24: 5e-6})
    run = train(scripted, of_length(30, tiny, lr=0.1), resume="last")
    assert rates(run)[30] == pytest.approx(0.1 * 0.1)


def test_a_length_that_the_checkpoint_is_past_is_refused(tiny, efficientdet, train):
    tiny["min_checkpoint_period"] = {"batches": 3}  # without a validation

    class Killed(efficientdet):
        def losses(self, model, batch):
            if self.batches_trained == 3:
                raise RuntimeError("killed")
            return super().losses(model, batch)

    Killed.__module__ = "model_def"
    with pytest.raises(RuntimeError, match="killed"):
        train(Killed, tiny)
    with pytest.raises(UserError, match=r"trained for 3 batches, and searcher.max_length is 2\. Fix: give a greater"):
        train(efficientdet, of_length(2, tiny), resume="last")


def test_another_batch_size_continues_and_logs_the_new_epochs(tiny, efficientdet, train, caplog):
    train(efficientdet, tiny)
    tiny["optimizations"] = {"aggregation_frequency": 2}
    run = train(efficientdet, of_length(8, tiny, global_batch_size=2), resume="last")
    assert "an epoch now has 12 batches instead of 6" in caplog.text
    assert "The 4 batches so far count as 0.3 epochs, not 0.7" in caplog.text
    assert [report["batches"] for report in reports(run, "val")] == [4, 8]
