"""A search without a cluster: its draws, early stops and resumes, and several machines."""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import run_model_def
from search_program import RANGES, experiment_from, share_of_better_points
from tiny_models import efficientdet_config

pytest.importorskip("optuna")

import optuna
from optuna.trial import TrialState

from shared.config.experiment import Sections, read_experiment
from shared.errors import UserError
from shared.search import search as search_module
from shared.search import study as study_module
from shared.search.page import write_search_page
from shared.search.space import draw, grid_points, parse_searcher, ranges_of
from shared.search.study import Study, TakenOver, trial_brackets
from shared.search.trial_process import Place, TrialProcess

PROGRAM = Path(__file__).parent / "search_program.py"


def config_of(**changed):
    searcher = {"name": "adaptive_asha", "metric": "bbox_mAP", "smaller_is_better": False, "max_trials": 8}
    searcher |= {"time_metric": "batches", "max_time": 64} | changed.pop("searcher", {})
    return {
        "name": "tiny",
        "hyperparameters": RANGES,
        "searcher": searcher,
        "min_validation_period": {"batches": 1},
        "seconds_a_batch": 0.02,
        **changed,
    }


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a search in its own process, for tests that stop or kill it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # without importing torch to count GPUs
    started = []

    def call(config, output="search", jobs=2, storage=None):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [
            sys.executable,
            PROGRAM,
            "search",
            file,
            tmp_path / output,
            str(jobs),
            *([storage] if storage else []),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()


@pytest.fixture
def search(tmp_path, monkeypatch, caplog, capsys):
    """Runs a search in this process, and returns its log and output. Its trials are processes of their own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", [str(PROGRAM)])
    monkeypatch.setattr(search_module, "SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr(study_module, "SECONDS_BETWEEN_HEARTBEATS", 0.2)
    monkeypatch.setattr(study_module, "SECONDS_OF_SILENCE", 3)

    def call(config, output="search", jobs=2, storage=None, status=False):
        caplog.clear()
        capsys.readouterr()
        arguments = argparse.Namespace(
            config="config.yaml", output_dir=tmp_path / output, storage=storage, jobs=jobs, status=status
        )
        with caplog.at_level("INFO"):
            search_module.search(None, experiment_from(config), arguments)
        return "\n".join([*caplog.messages, capsys.readouterr().out])

    return call


def ended(process, code=0):
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == code, printed
    return printed


def batches_of(output):
    """The batches that each trial has trained."""
    return {
        int(log.parent.name): [int(line) for line in log.read_text().split()]
        for log in sorted(output.glob("trials/*/batches.log"))
    }


def open_study(storage, config, owner="here"):
    experiment = experiment_from(config)
    return Study(str(storage), experiment, parse_searcher(experiment), owner)


def wait_for(condition, seconds=600):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


# --- what is drawn --------------------------------------------------------------------------------------


def test_each_of_determined_s_types_is_drawn_from_nested_ones_too():
    hyperparameters = {
        "fixed": 3,
        "const": {"type": "const", "val": [1, 2]},
        "whole": {"type": "int", "minval": 2, "maxval": 4},
        "real": {"type": "double", "minval": -1, "maxval": 1},
        "nested": {"optimizer.lr": {"type": "log", "base": 10, "minval": -4, "maxval": -2}, "kept": {"a": 1}},
        "choice": {"type": "categorical", "vals": [[0.1, 2.0], "adamw", None]},
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [draw(study.ask(), hyperparameters) for _ in range(50)]
    assert all((d["fixed"], d["const"], d["nested"]["kept"]) == (3, [1, 2], {"a": 1}) for d in drawn)
    assert {d["whole"] for d in drawn} == {2, 3, 4}
    assert all(-1 <= d["real"] <= 1 for d in drawn)
    assert all(1e-4 <= d["nested"]["optimizer.lr"] <= 1e-2 for d in drawn)
    assert sum(d["nested"]["optimizer.lr"] < 1e-3 for d in drawn) > 10  # as many below as above, on a log scale
    assert {json.dumps(d["choice"]) for d in drawn} == {"[0.1, 2.0]", '"adamw"', "null"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"type": "int", "minval": 2},
            "hyperparameters.a.b: a range of type int needs minval and maxval. Fix: add maxval",
        ),
        ({"type": "double", "minval": 2, "maxval": 1}, "hyperparameters.a.b: minval 2 and maxval 1 are not a range"),
        ({"type": "categorical", "vals": []}, r"hyperparameters.a.b.vals: \[\] has no values. Fix: give a list"),
        (
            {"type": "log", "minval": 1, "maxval": 2, "base": 1},
            "hyperparameters.a.b.base: it is 1. Fix: give a number > 1",
        ),
    ],
)
def test_an_invalid_range_is_an_error_with_its_key(wrong, message):
    with pytest.raises(UserError, match=message):
        ranges_of({"a": {"b": wrong}})


def test_a_grid_has_every_point():
    points = grid_points(
        {
            "lr": {"type": "log", "base": 10, "minval": -4, "maxval": -2, "count": 3},
            "n": {"type": "int", "minval": 1, "maxval": 2},
            "c": {"type": "categorical", "vals": ["x", ["y"]]},
        }
    )
    assert sorted({point["lr"] for point in points}) == pytest.approx([1e-4, 1e-3, 1e-2])
    assert len({json.dumps(point) for point in points}) == 3 * 2 * 2
    with pytest.raises(UserError, match=r"hyperparameters.d.count: it is None. Fix: give the number of values"):
        grid_points({"d": {"type": "double", "minval": 0, "maxval": 1}})


def test_a_single_searcher_has_one_trial():
    config = config_of()
    config["searcher"] = {"name": "single", "metric": "bbox_mAP", "max_length": {"batches": 4}}
    assert parse_searcher(experiment_from(config)).max_trials == 1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"name": "adaptive"},
            "searcher.name: 'adaptive' is unknown. Fix: use one of adaptive_asha, grid, random, single",
        ),
        ({"max_trials": None}, "searcher.max_trials: it is missing. Fix: "),
        ({"max_trials": 0}, "searcher.max_trials: it is 0. Fix: give a number >= 1"),
        ({"divisor": 1}, "searcher.divisor: it is 1. Fix: give a number >= 2"),
        ({"mode": "fast"}, "searcher.mode: 'fast' is unknown. Fix: use one of aggressive, standard, conservative"),
        ({"bracket_rungs": [0]}, r"searcher.bracket_rungs: \[0\] has a number below 1. Fix: "),
        ({"max_time": None}, "searcher.max_length: it is missing. Fix: "),
    ],
)
def test_an_invalid_searcher_is_an_error_with_its_key(section, message):
    with pytest.raises(UserError, match=message):
        parse_searcher(experiment_from(config_of(searcher=section)))


@pytest.mark.parametrize(
    ("mode", "max_rungs", "divisor", "length", "max_trials", "expected"),
    [  # as Determined's master 0.38.1 answers
        ("standard", 5, 4, 20000, 1000, {5: 707, 4: 220, 3: 73}),
        ("standard", 5, 4, 20000, 32, {3: 24, 2: 8}),  # as many rungs as the trials fill
        ("standard", 5, 4, 16, 1000, {3: 728, 2: 272}),  # none is shorter than a batch
        ("standard", 5, 3, 20000, 100, {5: 63, 4: 26, 3: 11}),
        ("standard", 2, 4, 80, 8, {2: 6, 1: 2}),
        ("aggressive", 5, 4, 20000, 32, {3: 32}),
        ("aggressive", 5, 4, 100, 3, {1: 3}),
        ("conservative", 3, 4, 20000, 100, {3: 64, 2: 24, 1: 12}),
        ("conservative", 5, 4, 64, 64, {4: 43, 3: 14, 2: 5, 1: 2}),
        ("conservative", 5, 4, 20000, 5, {2: 4, 1: 1}),
    ],
)
def test_brackets_are_determined_s(mode, max_rungs, divisor, length, max_trials, expected):
    section = {"mode": mode, "max_rungs": max_rungs, "divisor": divisor, "max_time": length, "max_trials": max_trials}
    brackets = trial_brackets(parse_searcher(experiment_from(config_of(searcher=section))))
    assert {rungs: brackets.count(rungs) for rungs in set(brackets)} == expected


def test_bracket_rungs_replace_the_mode():
    section = {"max_time": 64, "max_trials": 10, "bracket_rungs": [2, 3]}
    brackets = trial_brackets(parse_searcher(experiment_from(config_of(searcher=section))))
    assert set(brackets) == {2, 3}


# --- a search -------------------------------------------------------------------------------------------


def test_most_training_is_saved_and_one_of_the_best_points_is_found(search, tmp_path):
    # validations at the rungs, after 4, 16 and 64 batches, and between them
    config = config_of(
        searcher={"max_trials": 32}, min_validation_period={"batches": 4}, seconds_a_batch=0, in_step=True
    )
    printed = search(config, jobs=4)
    trained = batches_of(tmp_path / "search")
    assert sorted(trained) == list(range(32))
    # on average 60 % is saved, as by a master; the points that TPE draws later are better, and more of them continue
    assert sum(map(len, trained.values())) <= 0.5 * 32 * 64
    best = yaml.safe_load((tmp_path / "search/best.yaml").read_text())
    assert share_of_better_points(best["hyperparameters"]) < 0.1
    assert "stopped early" in printed
    assert f"its config: {tmp_path / 'search/best.yaml'}" in printed
    page = (tmp_path / "search/search.html").read_text()
    for title in ("History", "Parallel coordinates", "Importance", "Curves of all trials"):
        assert title in page


@pytest.mark.parametrize(("name", "count"), [("random", 3), ("grid", 4)])
def test_random_and_grid_train_each_trial_to_its_end(search, tmp_path, name, count):
    ranges = {"lr": {**RANGES["lr"], "count": 2}, "opt": RANGES["opt"]}
    search(config_of(searcher={"name": name, "max_trials": 3, "max_time": 2}, hyperparameters=ranges))
    assert {number: len(done) for number, done in batches_of(tmp_path / "search").items()} == dict.fromkeys(
        range(count), 2
    )


def test_a_killed_search_continues_and_trains_no_batch_twice(start, search, tmp_path):
    config = config_of(
        searcher={"name": "random", "max_trials": 4, "max_time": 20}, min_validation_period={"batches": 5}
    )
    draws, lock = random.Random(1), tmp_path / "search/search.journal.lock"
    for kill in range(2):
        process = start(config)
        wait_for(lambda kill=kill: sum(map(len, batches_of(tmp_path / "search").values())) > 15 * (kill + 1))
        time.sleep(draws.uniform(0, 0.3))
        wait_for(lambda: not os.path.lexists(lock))  # Optuna waits 30 seconds for a lock whose holder was killed
        process.kill()
        process.wait()
    search(config)
    # a run whose search was killed saves a checkpoint, and resumes from it
    assert batches_of(tmp_path / "search") == {number: list(range(1, 21)) for number in range(4)}


def test_a_second_search_in_a_folder_is_refused(start, search, tmp_path):
    config = config_of(searcher={"name": "random", "max_time": 2000})
    start(config, jobs=1)
    wait_for(lambda: batches_of(tmp_path / "search"))
    with pytest.raises(UserError, match=r"--output-dir: a search is already running in .* Fix: --status"):
        search(config, jobs=1)


def test_ctrl_c_stops_all_trials_with_checkpoints(start, tmp_path):
    process = start(config_of(searcher={"name": "random", "max_time": 2000}))
    wait_for(lambda: len(batches_of(tmp_path / "search")) == 2 and all(batches_of(tmp_path / "search").values()))
    process.send_signal(signal.SIGINT)
    assert "stopped; the same command continues the search" in ended(process, 130)
    for number, trained in batches_of(tmp_path / "search").items():
        assert (tmp_path / f"search/trials/{number}/checkpoints/last/batches").read_text() == str(trained[-1])


def test_a_trial_that_diverges_fails_alone_with_its_error(search, tmp_path):
    ranges = {**RANGES, "diverges": {"type": "categorical", "vals": [True, False]}}
    config = config_of(hyperparameters=ranges, searcher={"name": "random", "max_trials": 4, "max_time": 2})
    printed = search(config)
    assert "failed: error: the loss is not finite since batch 3" in printed
    assert 0 < len(batches_of(tmp_path / "search")) < 4
    assert "best: trial" in printed


@pytest.fixture
def kill_held_trials(tmp_path):
    """Kills trials of a search in this process when they wait at their `hold_at`."""
    threads = []

    def kill(number):
        wait_for((tmp_path / f"search/trials/{number}/held").exists)
        pattern = f"train {tmp_path}/search/trials/{number}.yaml"
        found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True).stdout
        os.kill(int(found.split()[-1]), signal.SIGKILL)

    def call(numbers):
        threads.extend(threading.Thread(target=kill, args=(number,)) for number in numbers)
        for thread in threads:
            thread.start()

    yield call
    for thread in threads:
        thread.join()


def test_trials_killed_after_a_checkpoint_continue(search, kill_held_trials, tmp_path):
    config = config_of(searcher={"name": "random", "max_trials": 2, "max_time": 30}, checkpoint_at=4, hold_at=12)
    kill_held_trials(range(2))  # the runs forget the reports of the batches 5 to 12, and write them again
    printed = search(config)
    assert all(f"trial {number} was killed by SIGKILL and continues" in printed for number in range(2))
    assert batches_of(tmp_path / "search") == {number: [*range(1, 13), *range(5, 31)] for number in range(2)}
    trials = open_study(tmp_path / "search/search.journal", config).trials()
    assert [len(trial.intermediate_values) for trial in trials.values()] == [30, 30]


def test_a_trial_killed_before_its_first_checkpoint_starts_again(search, kill_held_trials, tmp_path):
    config = config_of(searcher={"name": "random", "max_trials": 1, "max_time": 6}, hold_at=3)
    kill_held_trials([0])
    assert "trial 0: finished" in search(config, jobs=1)
    assert batches_of(tmp_path / "search") == {0: [1, 2, 3, 1, 2, 3, 4, 5, 6]}


def test_a_trial_survives_a_full_disk(search, tmp_path):
    config = config_of(searcher={"name": "random", "max_trials": 2, "max_time": 3})
    with pytest.raises(UserError) as error:
        search({**config, "full_disk": True}, jobs=1)
    assert f"{tmp_path}/search: [Errno 28] No space left on device" in str(error.value)
    assert "continue with the same command" in str(error.value)
    search(config, jobs=1)
    assert "2 trials: 2 finished" in (tmp_path / "search/search.html").read_text()


def test_each_trial_has_its_share_of_the_machine(search, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "my own")
    search(config_of(searcher={"name": "random", "max_trials": 2, "max_time": 3}))
    seen = [json.loads((tmp_path / f"search/trials/{i}/environment.json").read_text()) for i in range(2)]
    assert sorted(one["CUDA_VISIBLE_DEVICES"] for one in seen) == ["3", "5"]
    assert {(one["WANDB_RUN_GROUP"], one["MLFLOW_EXPERIMENT_NAME"]) for one in seen} == {("search", "my own")}
    assert len({one["WANDB_PROJECT"] for one in seen}) == 1
    cores = [set(one["cores"]) for one in seen]
    if len(os.sched_getaffinity(0)) > 1:
        assert not cores[0] & cores[1]


def test_a_trial_s_config_is_private_and_lacks_the_cluster_s_passwords(search, tmp_path):
    url = "http://user:hunter2@127.0.0.1:9"
    config = config_of(
        searcher={"name": "random", "max_trials": 1},
        checkpoint_storage={"type": "s3", "secret_key": "hunter2"},
        data={"endpoint_url": url},
    )
    search(config, jobs=1)
    file = tmp_path / "search/trials/0.yaml"
    written = yaml.safe_load(file.read_text())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert written["checkpoint_storage"] == {"type": "s3", "secret_key": "(redacted)"}
    assert written["data"] == {"endpoint_url": url}


def test_a_search_with_another_config_is_refused(tmp_path):
    config = config_of(searcher={"name": "random", "max_trials": 1})
    open_study(tmp_path / "search.journal", config)
    config["hyperparameters"] = {"lr": RANGES["lr"]}
    with pytest.raises(UserError, match=r"began with other hyperparameters. Fix: continue with the same file"):
        open_study(tmp_path / "search.journal", config)


def test_status_after_a_kill_shows_the_last_progress_and_no_machine(start, search, tmp_path):
    config = config_of(searcher={"name": "random", "max_trials": 1, "max_time": 2000})
    process = start(config, jobs=1)
    journal = tmp_path / "search/search.journal"
    wait_for(lambda: journal.exists() and '"progress":1' in journal.read_text())
    before = search(config, status=True)
    assert "under way" in before
    assert "at work: 1 machine; last progress: 2" in before
    process.kill()
    process.wait()
    written = journal.read_bytes()
    after = search(config, status=True)
    assert "interrupted" in after
    assert "under way" not in after
    assert "no machine is at work on this search; last progress: 2" in after
    assert "the command without --status continues it" in after
    assert journal.read_bytes() == written


# --- files that a crash, a full disk or a resumed run left ------------------------------------------------


@pytest.fixture
def trial_process(tmp_path):
    """A trial of a program that does nothing. The test writes the files of its run."""
    folder = tmp_path / "trials/0"
    folder.mkdir(parents=True)
    program = [sys.executable, "-c", ""]
    process = TrialProcess(program, folder, Place(), {})
    yield process
    wait_for(lambda: process.exit_code() is not None)


def line_of(batches, value):
    return json.dumps({"batches": batches, "split": "val", "metrics": {"bbox_mAP": value}}) + "\n"


def test_reports_are_read_after_a_resumed_run_shortened_them(trial_process):
    folder = trial_process.folder
    folder.write_length(10, 5)
    folder.metrics.write_text(line_of(1, 0.1) + line_of(2, 0.25) + line_of(3, 0.333333))
    assert len(trial_process.validations("bbox_mAP")) == 3
    folder.forget_metrics_after(1)
    folder.append_report(2, "val", {"bbox_mAP": 0.25})
    assert trial_process.validations("bbox_mAP") == [(100_000, 0.1), (200_000, 0.25)]


@pytest.mark.parametrize("length", [None, "", '{"batches": 1', '{"batches_per_epoch": 5}', "[]", "\0\0\0"])
def test_without_its_length_a_trial_has_no_validations_yet(trial_process, length):
    folder = trial_process.folder
    folder.metrics.write_text(line_of(1, 0.1))
    if length is not None:
        folder.length.write_text(length)
    assert trial_process.validations("bbox_mAP") == []
    folder.write_length(10, 5)
    assert trial_process.validations("bbox_mAP") == [(100_000, 0.1)]


@pytest.mark.parametrize("incomplete", [line_of(5, 0.5)[:20], "\0\0", "\xff"])
def test_a_line_that_is_not_complete_is_no_report_yet(trial_process, incomplete):
    folder = trial_process.folder
    folder.write_length(10, 5)
    folder.metrics.write_bytes((line_of(1, 0.1) + line_of(4, None) + incomplete).encode("latin-1"))
    (first, second) = trial_process.validations("bbox_mAP")
    assert first == (100_000, 0.1)
    assert second == (400_000, pytest.approx(float("nan"), nan_ok=True))


def test_a_journal_that_a_full_disk_cut_off_is_repaired(tmp_path):
    journal, config = tmp_path / "search.journal", config_of(searcher={"name": "random"})
    study = open_study(journal, config)
    trial = study.ask()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + 20, limits[1]))  # as a disk that is full
    try:
        with pytest.raises(OSError, match="File too large"):
            study.report(trial, 1000, 0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not journal.read_bytes().endswith(b"\n")
    again = open_study(journal, config)
    (resumed,) = again.own_trials()
    again.report(resumed, 2000, 0.5)
    study.report(trial, 3000, 0.5)  # the process that met the full disk writes on
    assert [*open_study(journal, config).trials()[0].intermediate_values] == [2000, 3000]


def test_a_lock_that_another_machine_removed_is_no_error(tmp_path, monkeypatch):
    journal = tmp_path / "search.journal"
    study = open_study(journal, config_of(searcher={"name": "random"}))

    def while_silent(_):
        Path(f"{journal}.lock").unlink()
        return 0

    monkeypatch.setattr(study_module, "repair_last_line", while_silent)
    assert study.ask() is not None


def test_the_page_shows_names_and_values_with_dollar_signs(tmp_path):
    values = ["$\\bad{$", "$x$", "a\\$", "$", "_"]
    ranges = {"path $ a": {"type": "categorical", "vals": values}, "lr": RANGES["lr"]}
    config = config_of(hyperparameters=ranges, searcher={"name": "random", "max_trials": 12})
    study = open_study(tmp_path / "search.journal", config)
    for i in range(12):
        trial = study.ask()
        draw(trial, ranges)
        study.finish(trial, TrialState.COMPLETE, i / 12)
    assert {json.loads(trial.params["path $ a"]) for trial in study.trials().values()} == set(values)
    page = write_search_page(study, tmp_path).read_text()
    for title in ("History", "Parallel coordinates", "Importance"):
        assert f"<figcaption>{title}</figcaption>" in page
    figures = page[: page.index("<h2>Trials</h2>")]
    assert "path $ a" in figures
    assert '"$x$"' in figures
    assert "$\\\\bad{$" in figures  # as JSON has it


# --- several machines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "adaptive_asha"])
def test_machines_and_restarts_draw_the_points_of_one_machine(tmp_path, name):
    config = config_of(searcher={"name": name, "max_trials": 14})
    points = {}
    for storage in ("one", "many"):
        journal = tmp_path / f"{storage}.journal"
        study = open_study(journal, config)
        points[storage] = []
        for i in range(14):  # the last ones are TPE's in `adaptive_asha`
            if storage == "many":
                study = open_study(journal, config, f"machine {i % 3}")
            trial = study.ask()
            points[storage].append(draw(trial, RANGES))
            study.finish(trial, TrialState.COMPLETE, points[storage][-1]["lr"])
        assert study.ask() is None
    assert points["one"] == points["many"]
    assert len({point["lr"] for point in points["one"]}) == 14


def test_trials_at_once_on_several_machines_differ(tmp_path):
    config = config_of(searcher={"max_trials": 30})
    studies = [open_study(tmp_path / "journal", config, f"machine {i}") for i in range(3)]
    drawn = []
    for i in range(30):
        trial = studies[i % 3].ask()
        drawn.append(draw(trial, RANGES)["lr"])
        if i % 2:
            studies[i % 3].finish(trial, TrialState.COMPLETE, 0.5)
    assert len(set(drawn)) == 30


def test_a_search_killed_while_it_begins_a_trial_draws_the_same_point(tmp_path, monkeypatch):
    config = config_of(searcher={"name": "random", "max_trials": 4})
    whole = open_study(tmp_path / "whole.journal", config)
    expected = [draw(whole.ask(), RANGES) for _ in range(4)]
    journal = tmp_path / "search.journal"
    study = open_study(journal, config)
    draw(study.ask(), RANGES)
    study.study.ask()  # killed here: the trial has no owner, and no value yet
    killed = study.study.ask()
    killed.suggest_categorical("opt", ['"sgd"', '"adamw"'])  # and here it has one of its two values
    monkeypatch.setattr(study_module, "SECONDS_BETWEEN_HEARTBEATS", 0)
    monkeypatch.setattr(study_module, "SECONDS_OF_SILENCE", 0.2)
    other = open_study(journal, config, "other")
    while any(trial.state == TrialState.RUNNING for trial in other.trials().values()):
        other.heartbeat()
    drawn = {}
    while (trial := other.ask()) is not None:
        drawn[trial.user_attrs["first_number"]] = draw(trial, RANGES)
    assert drawn == dict(enumerate(expected))


def test_a_machine_cannot_change_a_trial_that_was_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "SECONDS_BETWEEN_HEARTBEATS", 0)
    monkeypatch.setattr(study_module, "SECONDS_OF_SILENCE", 0.2)
    config = config_of(searcher={"name": "random", "max_trials": 1})
    silent = open_study(tmp_path / "journal", config, "silent")
    trial = silent.ask()
    other = open_study(tmp_path / "journal", config, "other")
    while silent.is_running(trial):
        other.heartbeat()
    with pytest.raises(TakenOver), silent.owning(trial):
        draw(trial, RANGES)
    with pytest.raises(TakenOver):
        silent.report(trial, 1000, 0.5)
    with pytest.raises(TakenOver):
        silent.finish(trial, TrialState.COMPLETE, 0.5)
    assert not silent.is_complete()
    other.finish(other.ask(), TrialState.COMPLETE, 0.5)
    assert silent.is_complete()


def test_an_interrupted_takeover_is_completed_at_the_next_start(tmp_path):
    config = config_of(searcher={"name": "random", "max_trials": 1})
    study = open_study(tmp_path / "search.journal", config)
    trial = study.ask()
    point = draw(trial, RANGES)
    study.study.tell(trial, state=TrialState.FAIL)  # killed here, before the trial is repeated
    again = open_study(tmp_path / "search.journal", config)
    again.repeat_lost_trials()
    assert draw(again.ask(), RANGES) == point
    assert len(again.trials()) == 1


def test_status_counts_other_machines_with_a_recent_heartbeat(search, tmp_path, monkeypatch):
    config, storage = config_of(searcher={"name": "random", "max_trials": 1}), str(tmp_path / "shared.journal")
    other = open_study(storage, config, "other")
    draw(other.ask(), RANGES)
    other.heartbeat()
    (tmp_path / "here").mkdir()
    assert "at work: 1 machine" in search(config, "here", storage=storage, status=True)
    other.leave()
    assert "no machine is at work" in search(config, "here", storage=storage, status=True)
    monkeypatch.setattr(study_module, "SECONDS_BETWEEN_HEARTBEATS", 0)
    other.heartbeat()
    monkeypatch.setattr(study_module, "SECONDS_OF_SILENCE", -1)
    assert "no machine is at work" in search(config, "here", storage=storage, status=True)


def test_status_without_a_search_is_an_error_and_creates_no_file(search, tmp_path):
    config = config_of(searcher={"name": "random"})
    with pytest.raises(UserError, match=r"--status: .*search.journal does not exist. Fix: "):
        search(config, status=True)
    assert not (tmp_path / "search").exists()
    open_study(tmp_path / "search/search.journal", {**config, "name": "another"})
    with pytest.raises(UserError, match="holds no search named tiny"):
        search(config, status=True)


def test_a_machine_that_was_silent_drops_its_trials(start, search, tmp_path):
    config = config_of(searcher={"name": "random", "max_trials": 2, "max_time": 10}, hold_at=3)
    storage, held = str(tmp_path / "shared.journal"), [tmp_path / f"silent/trials/{i}/held" for i in range(2)]
    silent = start(config, "silent", 2, storage)
    wait_for(lambda: all(file.exists() for file in held))
    silent.send_signal(signal.SIGSTOP)
    held[1].unlink()  # this trial ends while its search is silent; the other one is stopped when the search is back
    for i in range(2):
        (tmp_path / f"other/trials/{i}").mkdir(parents=True)
        (tmp_path / f"other/trials/{i}/held").touch()
    printed = search(config, "other", 1, storage)  # takes over both
    assert printed.split("trial    state")[-1].count("finished") == 2
    assert batches_of(tmp_path / "silent") == {0: [1, 2, 3], 1: list(range(1, 11))}
    silent.send_signal(signal.SIGCONT)
    assert ended(silent).count("another one has taken the trial over") == 2


def share(start, tmp_path, storage):
    """Two machines with a folder each. One dies, and the other finishes its trial."""
    config = config_of(searcher={"name": "random", "max_trials": 6, "max_time": 60})
    one, other = (start(config, output, 1, storage) for output in ("one", "other"))
    wait_for(lambda: batches_of(tmp_path / "one") and batches_of(tmp_path / "other"))
    one.kill()
    printed = ended(other)
    finished = {
        number
        for machine in ("one", "other")
        for number, done in batches_of(tmp_path / machine).items()
        if done[-1] == 60
    }
    assert finished == set(range(6))
    assert "starts again: its machine was silent for 3 seconds" in printed
    assert printed.split("trial    state")[-1].count("finished") == 6


@pytest.mark.slow
def test_machines_share_a_search_by_a_file_and_outlive_one(start, tmp_path):
    share(start, tmp_path, str(tmp_path / "shared.journal"))


@pytest.fixture
def postgres(tmp_path):
    """The URL of a PostgreSQL of its own."""
    pytest.importorskip("psycopg2", reason="needs the package psycopg2")
    programs = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), Path(shutil.which("initdb") or "/none/x").parent]
    bin_folder = next((folder for folder in programs if (folder / "initdb").exists()), None)
    if bin_folder is None:
        pytest.skip("needs PostgreSQL (Debian's package `postgresql`)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "postgres"
    folder.mkdir()
    as_user = []
    if os.geteuid() == 0:  # it refuses to run as root
        for path in (folder, *tmp_path.parents):
            if path.stat().st_uid == 0 and path.is_relative_to(Path("/tmp")) and path != Path("/tmp"):
                path.chmod(0o755)
        tmp_path.chmod(0o755)
        shutil.chown(folder, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    data = folder / "data"
    subprocess.run(
        [*as_user, bin_folder / "initdb", "-D", data, "-A", "trust", "-U", "search"], check=True, capture_output=True
    )
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    control = [*as_user, bin_folder / "pg_ctl", "-D", data, "-w", "-l", folder / "log"]
    subprocess.run([*control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL)
    yield f"postgresql+psycopg2://search@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_machines_share_a_search_by_postgresql_and_outlive_one(start, tmp_path, postgres):
    share(start, tmp_path, postgres)


def test_a_storage_that_cannot_be_used_is_an_error(search):
    with pytest.raises(UserError, match="--storage: nosuch://here cannot be used"):
        search(config_of(), storage="nosuch://here")


# --- with a detector --------------------------------------------------------------------------------------


def test_a_detector_s_search_leaves_its_best_config(shapes, tmp_path):
    config = efficientdet_config(shapes)
    config["hyperparameters"]["lr"] = {"type": "log", "base": 10, "minval": -4, "maxval": -2}
    config["searcher"] |= {"name": "random", "max_trials": 1, "max_length": {"batches": 1}}
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(config))
    done = run_model_def("search", file, "--output-dir", tmp_path / "search")
    assert "best: trial 0" in done.stdout
    assert (tmp_path / "search/trials/0/checkpoints/best").is_dir()
    from efficientdet_hyperparameters import EfficientDetHyperparameters

    best = read_experiment(tmp_path / "search/best.yaml", (), Sections(EfficientDetHyperparameters))
    assert 1e-4 <= best.hyperparameters.lr <= 1e-2
