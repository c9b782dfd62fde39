"""Config keys that stop a run before its length, and its continuation."""

import json
import signal
import sys
from types import SimpleNamespace

import pytest
import yaml
from cluster_task import become_a_task
from conftest import ROOT, reports, run_model_def
from in_threads import on_all, processes
from test_resume import assert_same_bits, final_state
from test_stopping import without_times
from tiny_models import efficientdet_config

from shared import launch
from shared.config.schema import EarlyStopping, SearcherMetric, parse_section
from shared.errors import UserError
from shared.training.checkpoints import read_checkpoint
from shared.training.stopping import BestSoFar, Clock, Stopping

# the metric of each validation: best at batch 4, and not better any more
SCRIPT = {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.3, 9: 0.2, 10: 0.25, 12: 0.2}


def scripted(trial_class):
    """The trial class with the metrics of the script."""

    class Scripted(trial_class):
        def finish_validation(self, metrics):
            return super().finish_validation({**metrics, "bbox_mAP": SCRIPT[self.batches_trained]})

    Scripted.__module__ = "model_def"
    return Scripted


@pytest.fixture
def trial_class():
    from model_def import EfficientDetTrial

    return scripted(EfficientDetTrial)


@pytest.fixture
def config(shapes):
    config = efficientdet_config(shapes)
    config["data"]["workers"] = 0
    config["min_validation_period"] = {"batches": 2}
    return config


WHY = "early stopping: bbox_mAP has not been better than 0.3 at batch 4 for 2 validations"


def test_an_early_stop_is_a_finished_run_with_a_reason(config, train, trial_class, capsys):
    config["hyperparameters"]["early_stopping"] = {"patience": 2}
    run = train(trial_class, config, report=True)
    assert [report["batches"] for report in reports(run, "val")] == [2, 4, 6, 8]
    assert [read_checkpoint(run / "checkpoints" / name).batches for name in ("best", "last")] == [4, 8]
    printed = capsys.readouterr().out
    assert f"ended after batch 8 of 12: {WHY}" in printed
    assert "AP/circle" in printed  # the end's table
    assert WHY in (run / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_an_early_stopped_run_continues_with_more_patience_bit_for_bit(config, train, trial_class):
    whole = train(trial_class, config, name="whole")
    config["hyperparameters"]["early_stopping"] = {"patience": 2}
    run = train(trial_class, config)
    with pytest.raises(
        UserError, match=rf"last has ended by {WHY}\. Fix: give a patience of more than 2, or omit hyperp"
    ):
        train(trial_class, config, resume="last")
    assert read_checkpoint(run / "checkpoints/last").batches == 8
    config["hyperparameters"]["early_stopping"] = {"patience": 4}
    train(trial_class, config, resume="last")
    assert_same_bits(final_state(run), final_state(whole))
    assert without_times(reports(run)) == without_times(reports(whole))
    assert reports(run)[-1]["batches"] == 12  # a patience of 4 is over with the last validation, which is no early one


def test_the_count_of_validations_outlives_a_resume():
    metric = SearcherMetric("bbox_mAP", smaller_is_better=False)
    first, second = BestSoFar(None, metric), BestSoFar(EarlyStopping(3), metric)
    for batch, value in ((2, 0.1), (4, 0.5), (6, float("nan")), (8, 0.5)):
        first.update(value, batch)
    second.load(json.loads(json.dumps(first.state())))
    assert second.why_over() is None
    second.update(0.4, 10)
    assert second.why_over() == "early stopping: bbox_mAP has not been better than 0.5 at batch 4 for 3 validations"
    second.update(0.6, 12)
    assert second.why_over() is None
    by_loss = BestSoFar(EarlyStopping(1), SearcherMetric("val_loss", smaller_is_better=True))
    by_loss.load(first.state())  # of another metric
    by_loss.update(2.0, 2)
    by_loss.update(1.0, 4)
    assert by_loss.why_over() is None
    by_loss.update(1.5, 6)
    assert "val_loss has not been better than 1 at batch 4 for 1 validation" in by_loss.why_over()


@pytest.fixture
def run_task(monkeypatch, tmp_path, trial_class):
    """Trains as a task of a cluster. Returns its master."""

    def call(config, **of_the_task):
        master = become_a_task(monkeypatch, tmp_path / "task", config, **of_the_task)
        monkeypatch.chdir(tmp_path / "task")
        monkeypatch.setattr(sys, "argv", ["model_def.py"])
        launch.main(trial_class)  # no SystemExit: the master calls the trial COMPLETED
        return master

    return call


@pytest.mark.usefixtures("without_figures")
def test_on_a_cluster_the_trial_ends_as_completed_and_a_restart_of_it_too(config, run_task, capsys):
    config["hyperparameters"]["early_stopping"] = {"patience": 2}
    master = run_task(config)
    assert list(master.of("validation")) == [2, 4, 6, 8]
    assert read_checkpoint(master.checkpoints[-1]).batches == 8
    printed = capsys.readouterr().out
    assert f"ended after batch 8 of 12: {WHY}" in printed
    assert "AP/circle" in printed
    again = run_task(config, latest_checkpoint=master.checkpoints[-1].name, steps_completed=8)
    assert not again.reports
    assert not again.checkpoints


# a model_def.py whose metrics are the script's
SCRIPTED = """
import os, sys
sys.path[:0] = [os.getcwd(), os.environ["TESTS"]]
import model_def
from test_ending import scripted
from shared.launch import main
main(scripted(model_def.EfficientDetTrial))
"""


@pytest.mark.slow
def test_two_slots_end_together(config, tmp_path):
    config["hyperparameters"]["early_stopping"] = {"patience": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    script, run = tmp_path / "scripted.py", tmp_path / "run"
    script.write_text(SCRIPTED)
    arguments = ("train", tmp_path / "config.yaml", "--output-dir", run)
    done = run_model_def(*arguments, processes=2, script=script, env={"TESTS": str(ROOT / "tests")})
    assert f"ended after batch 8 of 12: {WHY}" in done.stdout
    assert read_checkpoint(run / "checkpoints/last").batches == 8


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (5, "hyperparameters.early_stopping: 5 is not a section. Fix: give {patience: …}"),
        ({"patience": 0}, "hyperparameters.early_stopping.patience: it is 0. Fix: give a number >= 1"),
        ({"patience": "a"}, "hyperparameters.early_stopping.patience: Expected `int`, got `str`"),
        ({"patiens": 3}, "hyperparameters.early_stopping: unknown key 'patiens'; did you mean 'patience'?"),
        ({}, "hyperparameters.early_stopping.patience is missing"),
    ],
)
def test_an_early_stopping_that_is_none_is_refused_by_its_key(config, section, message):
    from model_def import EfficientDetHyperparameters

    hyperparameters = {**config["hyperparameters"], "early_stopping": section}
    with pytest.raises(UserError) as error:
        parse_section(hyperparameters, EfficientDetHyperparameters, "hyperparameters")
    assert str(error.value).startswith(message)


def test_early_stopping_without_a_validation_to_stop_at_is_refused(config, train, trial_class):
    del config["min_validation_period"]
    config["hyperparameters"]["early_stopping"] = {"patience": 2}
    with pytest.raises(UserError, match=r"early_stopping: the only validation is at the end\. Fix: give min_v"):
        train(trial_class, config)


def ticking(trial_class, monkeypatch):
    """The trial class with batches of ten minutes each."""
    clock = {"now": 0.0}
    monkeypatch.setattr(Clock, "now", staticmethod(lambda: clock["now"]))

    def after_batch(self, number):
        trial_class.after_batch(self, number)
        clock["now"] += 600

    return type("Ticking", (trial_class,), {"after_batch": after_batch, "__module__": "model_def"})


@pytest.mark.usefixtures("without_figures")
def test_max_hours_includes_the_time_before_a_resume(config, train, trial_class, monkeypatch, capsys):
    config["min_validation_period"] = {"batches": 8}
    config["scheduling_unit"] = 4
    whole, timed = train(trial_class, config, name="whole"), ticking(trial_class, monkeypatch)
    config["hyperparameters"]["max_hours"] = 1
    run = train(timed, config)
    assert [report["batches"] for report in reports(run, "val")] == [6]
    assert read_checkpoint(run / "checkpoints/last").batches == 6
    assert "ended after batch 6 of 12: max_hours: 1 h of training are over" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"last has ended by max_hours: 1 h of training are over\. Fix: give more hours, or omit"
    ):
        train(timed, config, resume="last")
    config["hyperparameters"]["max_hours"] = 1.5
    train(timed, config, resume="last")
    assert [report["batches"] for report in reports(run, "val")] == [6, 8, 9]
    config["hyperparameters"]["max_hours"] = 100.0
    train(timed, config, resume="last")
    assert_same_bits(final_state(run), final_state(whole))
    assert without_times(reports(run, "train")) == without_times(reports(whole, "train"))


@pytest.mark.usefixtures("without_figures")
def test_a_timed_checkpoint_changes_nothing_and_a_killed_run_resumes(config, train, trial_class, monkeypatch):
    config["min_validation_period"] = {"batches": 8}
    config["scheduling_unit"] = 4
    whole, timed = train(trial_class, config, name="whole"), ticking(trial_class, monkeypatch)
    config["hyperparameters"]["checkpoint_every_minutes"] = 25
    saved = []

    class Killed(timed):
        def own_state(self):
            saved.append(self.batches_trained)
            return super().own_state()

        def losses(self, model, batch):
            if self.batches_trained == 7 and saved[-1] == 6 and 8 not in saved:
                raise RuntimeError("killed")
            return super().losses(model, batch)

    Killed.__module__ = "model_def"
    with pytest.raises(RuntimeError, match="killed"):
        train(Killed, config)
    run = train(timed, config, resume="last")
    assert saved == [3, 6]
    assert_same_bits(final_state(run), final_state(whole))
    assert without_times(reports(run)) == without_times(reports(whole))


@pytest.mark.parametrize(
    ("received", "limits", "acts"),
    [
        (None, (2.0, 120), {}),
        (signal.SIGUSR1, (None, None), {"after": 20, "stopped_by": signal.SIGUSR1}),
        (None, (1.0, None), {"ended": "max_hours: 1 h of training are over"}),
        (None, (None, 60), {"saves_after": 20}),
    ],
)
def test_two_ranks_act_together_on_what_one_of_them_knows(monkeypatch, received, limits, acts):
    """At batch 14 rank 1 gets a signal, and an hour is over by the chief's clock, which began first."""
    now = {"seconds": 0.0}
    monkeypatch.setattr(Clock, "now", staticmethod(lambda: now["seconds"]))
    signals = [SimpleNamespace(received=None, begin=lambda: None) for _ in range(2)]
    with processes(2, gloo=True) as contexts:
        ranks = [Stopping(contexts[rank], clock=Clock(*limits), signals=signals[rank]) for rank in range(2)]
        for rank in ranks:
            rank.begin()
            now["seconds"] += 600
        for batch in range(1, 31):
            if batch == 14:
                now["seconds"], signals[1].received = 3600.0, received
            stops = on_all(Stopping.after_batch, ranks, [batch] * 2)
            assert stops == [batch == acts.get("after")] * 2
            if ranks[0].after == batch or ranks[0].ended is not None:
                break
            if batch == ranks[0].saves_after:
                ranks[0].clock.saved()
    for rank in ranks:
        assert batch == (20 if "after" in acts or "ended" in acts else 30)
        found = {name: getattr(rank, name) for name in ("after", "stopped_by", "ended", "saves_after")}
        assert {name: value for name, value in found.items() if value is not None} == acts


@pytest.mark.parametrize("key", ["max_hours", "checkpoint_every_minutes"])
def test_a_time_that_is_none_is_refused(config, key):
    from model_def import EfficientDetHyperparameters

    hyperparameters = {**config["hyperparameters"], key: 0}
    with pytest.raises(UserError, match=f"hyperparameters.{key}: it is 0. Fix: give a number > 0"):
        parse_section(hyperparameters, EfficientDetHyperparameters, "hyperparameters")
