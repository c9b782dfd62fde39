"""Resuming a killed run, and the content of a checkpoint, for each detector."""

import itertools
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, reports, run_model_def
from tiny_models import CONFIGS, MAIN_DETECTORS

from shared.errors import DivergedError, UserError
from shared.training.checkpoints import load_state, read_checkpoint
from shared.training.stopping import Clock
from shared.training.training_metrics import TrainingMetrics


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
    assert on_disk < size(state) + 2**21  # the code, and what a state dict is beside its tensors


KILLED = """
import sys; sys.path.insert(0, '.')
import os, psutil, time, model_def
from pathlib import Path
from shared.launch import main
from shared.training.trial import DetectionTrial

ours = [each for each in vars(model_def).values() if getattr(each, "__module__", None) == "model_def"]
(trial_class,) = [each for each in ours if isinstance(each, type) and issubclass(each, DetectionTrial)]

class Killed(trial_class):
    def after_batch(self, number):
        super().after_batch(number)
        if number == 6 and self.rank == 0:
            saved = Path(sys.argv[sys.argv.index("--output-dir") + 1], "checkpoints/last/metadata.json")
            while not saved.exists():
                time.sleep(0.01)
            others = psutil.Process(os.getppid()).children() if self.slots > 1 else []
            for process in [*others, psutil.Process()]:
                process.kill()

main(Killed)
"""


def kill_between_checkpoints(detector, config, run, processes):
    """A run whose processes are killed after batch 7, with a checkpoint of batch 4."""
    script = run.parent / "code" / "killed.py"
    script.parent.mkdir()
    script.write_text(KILLED)
    arguments = ("train", config, "--output-dir", run)
    run_model_def(*arguments, processes=processes, cwd=ROOT / detector, script=script, check=False)
    assert read_checkpoint(run / "checkpoints/last").batches == 4
    assert reports(run)[-1]["batches"] == 6


@pytest.fixture
def config(detector, shapes, tmp_path):
    path, of_detector = tmp_path / "config.yaml", CONFIGS[detector](shapes)
    of_detector["searcher"]["max_length"] = {"batches": 8}
    path.write_text(yaml.safe_dump(of_detector))
    return path


@pytest.mark.parametrize(
    ("detector", "processes"),
    [
        ("efficientdet", 2),
        *(
            pytest.param(*others, marks=pytest.mark.slow)
            for others in itertools.product(MAIN_DETECTORS, (1, 2))
            if others != ("efficientdet", 2)
        ),
    ],
    indirect=["detector"],
)
def test_a_killed_run_resumes_to_the_same_bits(detector, config, tmp_path, processes):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = {"processes": processes, "figures": False, "cwd": ROOT / detector}
    run_model_def("train", config, "--output-dir", whole, **started)
    assert_tensors_and_little_more(whole / "checkpoints/last")
    kill_between_checkpoints(detector, config, killed, processes)
    resume = ("--output-dir", killed, "--resume", "last")
    run_model_def("train", config, *resume, **started)

    assert_same_bits(final_state(killed), final_state(whole))
    ours, expected = reports(killed), reports(whole)
    assert [(r["batches"], r["split"]) for r in ours] == [(r["batches"], r["split"]) for r in expected]
    for a, b in zip(ours, expected, strict=True):
        timings = {"images_per_second", "data_wait"}
        assert {k: v for k, v in a["metrics"].items() if k not in timings} == {
            k: v for k, v in b["metrics"].items() if k not in timings
        }


@pytest.fixture
def tiny(shapes):
    config = CONFIGS["efficientdet"](shapes)
    config["data"]["workers"] = 0
    return config


def trial():
    from model_def import EfficientDetTrial

    return EfficientDetTrial


def test_a_stop_waits_for_a_whole_optimizer_step(tiny, train, tmp_path):
    tiny["optimizations"] = {"aggregation_frequency": 2}

    class Signalled(trial()):
        def losses(self, model, batch):
            if self.batches_trained == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().losses(model, batch)

    Signalled.__module__ = "model_def"
    whole = train(trial(), tiny, name="whole")
    with pytest.raises(SystemExit):
        train(Signalled, tiny)
    assert read_checkpoint(tmp_path / "run/checkpoints/last").batches == 6
    run = train(trial(), tiny, resume="last")
    assert_same_bits(final_state(run), final_state(whole))


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("min_validation_period", {"min_validation_period": {"batches": 5}}),
        ("min_checkpoint_period", {"min_checkpoint_period": {"batches": 3}}),
        ("searcher.max_length", {"searcher": {"metric": "bbox_mAP", "max_length": {"batches": 9}}}),
    ],
)
def test_a_period_that_ends_in_the_middle_of_an_optimizer_step_is_refused(tiny, train, key, changes):
    tiny["optimizations"] = {"aggregation_frequency": 2}
    tiny.update(changes)
    with pytest.raises(UserError, match=f"{key}: . batches are not a multiple of optimizations.aggregation_frequency"):
        train(trial(), tiny)


@pytest.mark.slow
def test_a_schedule_by_validations_continues_after_a_resume(tiny, train):
    tiny["hyperparameters"].update(sched="plateau", sched_on_updates=False, patience_epochs=0, decay_rate=0.5)
    tiny["min_validation_period"] = {"epochs": 1}

    def rates(run):
        return [report["metrics"]["lr"] for report in reports(run, "train")]

    tiny["searcher"]["max_length"] = {"epochs": 6}
    whole = train(trial(), tiny, name="whole")
    tiny["searcher"]["max_length"] = {"epochs": 3}
    train(trial(), tiny)
    tiny["searcher"]["max_length"] = {"epochs": 6}
    run = train(trial(), tiny, resume="last")
    assert len(set(rates(whole))) > 2
    assert rates(run) == rates(whole)
    assert_same_bits(final_state(run), final_state(whole))


@pytest.mark.parametrize("which", ["averages", "statistics"])
def test_averages_and_running_statistics_that_are_not_finite_are_not_saved(tiny, train, tmp_path, which):
    class Poisoned(trial()):
        def after_batch(self, number):
            super().after_batch(number)
            if number == 5:
                if which == "averages":
                    poisoned = next(self.ema.module.parameters())
                else:
                    poisoned = next(buffer for name, buffer in self.plain_model.named_buffers() if "var" in name)
                poisoned.data.fill_(float("inf"))

    Poisoned.__module__ = "model_def"
    with pytest.raises(DivergedError, match="are not finite, and were not saved"):
        train(Poisoned, tiny)
    assert read_checkpoint(tmp_path / "run/checkpoints/last").batches == 4


def test_the_time_of_a_resumed_run_counts_all_its_pieces(tiny, train, monkeypatch, capsys):
    minutes = itertools.count(0, 60)
    monkeypatch.setattr(Clock, "now", staticmethod(lambda: next(minutes)))

    def trained(batches, **options):
        tiny["searcher"]["max_length"] = {"batches": batches}
        train(trial(), tiny, **options)
        hours, minutes, _ = re.search(r"trained for (\d+):(\d+):(\d+)", capsys.readouterr().out).groups()
        return 60 * int(hours) + int(minutes)

    first = trained(4)
    assert trained(8, resume="last") > 1.5 * first


def test_an_error_of_a_training_names_the_last_checkpoint_if_there_is_one(tiny, train):
    class Diverging(trial()):
        def losses(self, model, batch):
            losses = super().losses(model, batch)
            return {**losses, "loss": losses["loss"] * (math.nan if self.batches_trained >= at else 1)}

    Diverging.__module__ = "model_def"
    for at, named in ((1, ""), (5, r"\. The last checkpoint is of batch 4")):
        with pytest.raises(DivergedError, match=rf"look at its annotations{named}$"):
            train(Diverging, tiny, f"run-{at}")


def test_resuming_a_finished_run_says_how_to_train_longer(tiny, train):
    tiny["searcher"]["max_length"] = {"batches": 4}
    train(trial(), tiny)
    with pytest.raises(
        UserError, match=r"has been trained for 4 batches, and searcher.max_length is 4\. Fix: give a greater"
    ):
        train(trial(), tiny, resume="last")


def test_resume_auto_starts_continues_or_keeps_a_finished_run(tiny, train):
    tiny["searcher"]["max_length"], tiny["perform_initial_validation"] = {"batches": 8}, True

    def killed_after(batch):
        class Killed(trial()):
            def losses(self, model, batch_of_images):
                if self.batches_trained == batch:
                    raise RuntimeError("killed")
                return super().losses(model, batch_of_images)

        Killed.__module__ = "model_def"
        return Killed

    for batch in (2, 6):  # before and after the checkpoint of batch 4; the folder is not there at first
        with pytest.raises(RuntimeError, match="killed"):
            train(killed_after(batch), tiny, resume="auto")
    run = train(trial(), tiny, resume="auto")
    assert [report["batches"] for report in reports(run)] == [0, 2, 4, 4, 6, 8, 8]
    saved = (run / "checkpoints/last/state_dict.pth").stat().st_mtime_ns
    train(trial(), tiny, resume="auto")
    assert (run / "checkpoints/last/state_dict.pth").stat().st_mtime_ns == saved
    assert not list((run / "checkpoints").glob(".*"))


# a model_def.py whose rank 1 is killed once, after the checkpoint of batch 4
KILLED_ONCE = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
import model_def
from shared.launch import main

class Killed(model_def.EfficientDetTrial):
    def losses(self, model, batch):
        mark = Path(os.environ["MARK"])
        if self.rank == 1 and self.batches_trained == 6 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(model, batch)

main(Killed)
"""


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_from_the_last_checkpoint(tiny, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny))
    script, mark, run = tmp_path / "killed.py", tmp_path / "mark", tmp_path / "run"
    script.write_text(KILLED_ONCE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["train", tmp_path / "config.yaml", "--output-dir", run, "--resume", "auto"]
    done = subprocess.run(
        [*torchrun, "--max-restarts", "3", script, *train],
        cwd=ROOT / "efficientdet",
        env={**os.environ, "MARK": str(mark)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert mark.exists()
    assert "resuming after batch 4" in done.stderr
    assert [report["batches"] for report in reports(run)] == [2, 4, 4, 6, 8, 8, 10, 12, 12]


def test_a_skipped_fp16_step_continues_and_a_diverging_one_stops():
    def report(losses, may_skip):
        for number, loss in enumerate(losses):
            metrics.update({"loss": torch.tensor(loss)}, number, [number], may_skip=may_skip)
        reported = metrics.cross_slot_reduce([metrics.per_slot_reduce()])
        metrics.raise_if_diverged()
        metrics.reset()
        return reported

    metrics, nan = TrainingMetrics(), float("nan")
    assert report([1.0, nan, 3.0, nan], may_skip=2)["loss"] == 2.0
    assert report([nan, 5.0], may_skip=2)["loss"] == 5.0
    report([1.0, nan, nan], may_skip=2)
    with pytest.raises(DivergedError):  # counted over reports
        report([nan, 1.0], may_skip=2)
    metrics = TrainingMetrics()
    with pytest.raises(DivergedError, match="since batch 2"):
        report([1.0, nan], may_skip=0)
