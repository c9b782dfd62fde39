"""A search without a cluster: what it draws, gives up, goes on with, and shares between machines."""

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
import time
from pathlib import Path

import pytest
import yaml
from conftest import run_model_def
from search_program import RANGES, share_of_better_points
from tiny_models import efficientdet_config

pytest.importorskip("optuna")

import optuna
from optuna.trial import TrialState

from shared.errors import UserError
from shared.search import study as study_module
from shared.search.halving import bracket_of, brackets_of
from shared.search.page import write_search_page
from shared.search.search import run_search
from shared.search.space import draw, grid_of, parse_searcher, points_of, ranges_of
from shared.search.study import Study, TakenOver
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
        "data": {},
        **changed,
    }


@pytest.fixture
def start(tmp_path):
    """Begins a search in a process of its own."""
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


def ended(process, code=0):
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said
    return said


def ended_page(process, output):
    ended(process)
    return (output / "search.html").read_text()


def batches_of(output):
    """What each trial has trained, batch by batch."""
    return {
        int(log.parent.name): [int(line) for line in log.read_text().split()]
        for log in sorted(output.glob("trials/*/batches.log"))
    }


def open_study(storage, config, owner="here"):
    return Study(str(storage), config["name"], config, parse_searcher(config), owner)


def status_of(config, output, storage=None):
    run_search(config, parse_searcher(config), output, [], storage, status=True)


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
    ("wrong", "said"),
    [
        ({"type": "int", "minval": 2}, "hyperparameters.a.b: a range of type int needs minval and maxval; maxval is"),
        ({"type": "double", "minval": 2, "maxval": 1}, "hyperparameters.a.b: minval 2 and maxval 1 are no range"),
        ({"type": "categorical", "vals": []}, "hyperparameters.a.b.vals: give a list"),
        ({"type": "log", "minval": 1, "maxval": 2, "base": 1}, "hyperparameters.a.b.base: 1 is not above 1"),
    ],
)
def test_a_range_that_is_none_is_said(wrong, said):
    with pytest.raises(UserError, match=said):
        ranges_of({"a": {"b": wrong}})


def test_a_grid_has_every_point():
    grid = grid_of(
        {
            "lr": {"type": "log", "base": 10, "minval": -4, "maxval": -2, "count": 3},
            "n": {"type": "int", "minval": 1, "maxval": 2},
            "c": {"type": "categorical", "vals": ["x", ["y"]]},
        }
    )
    assert grid["lr"] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert len(points_of(grid)) == 3 * 2 * 2
    with pytest.raises(UserError, match=r"hyperparameters.d.count: a grid needs how many"):
        grid_of({"d": {"type": "double", "minval": 0, "maxval": 1}})


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "adaptive"}, "searcher.name: 'adaptive'; did you mean 'adaptive_asha'"),
        ({"max_trials": None}, "searcher.max_trials is missing"),
        ({"max_trials": 0}, "searcher.max_trials: 0 is not a whole number of at least 1"),
        ({"divisor": 1}, "searcher.divisor: 1 is not a whole number of at least 2"),
        ({"mode": "fast"}, "searcher.mode: 'fast'"),
        ({"max_time": None}, "searcher.max_length is missing"),
    ],
)
def test_a_searcher_that_is_not_understood_is_said(section, said):
    with pytest.raises(UserError, match=said):
        parse_searcher(config_of(searcher=section))


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
    brackets = brackets_of(mode, max_rungs, divisor, length, max_trials)
    numbers = [bracket_of(number, brackets) for number in range(max_trials)]
    assert {bracket.rungs: numbers.count(i) for i, bracket in enumerate(brackets)} == expected


def test_bracket_rungs_are_taken_as_they_are_said():
    brackets = brackets_of("standard", 5, divisor=4, length=64, max_trials=10, bracket_rungs=[2, 3])
    assert [bracket.rungs for bracket in brackets] == [3, 2]
    assert parse_searcher(config_of(searcher={"bracket_rungs": [2, 3]})).bracket_rungs == [2, 3]
    with pytest.raises(UserError, match=r"searcher.bracket_rungs: \[0\] is no list of whole numbers of at least 1"):
        parse_searcher(config_of(searcher={"bracket_rungs": [0]}))


# --- a search -------------------------------------------------------------------------------------------


def test_most_of_the_training_is_saved_and_one_of_the_best_points_is_found(start, tmp_path):
    config = config_of(searcher={"max_trials": 32}, seconds_a_batch=0, in_step=True)
    said = ended(start(config, jobs=4))
    trained = batches_of(tmp_path / "search")
    assert sorted(trained) == list(range(32))
    # 60 % are saved on average, here as by a master; what TPE draws later is better, and more or less of it goes on
    assert sum(map(len, trained.values())) <= 0.5 * 32 * 64
    best = yaml.safe_load((tmp_path / "search/best.yaml").read_text())
    assert share_of_better_points(best["hyperparameters"]) < 0.1
    assert "given up" in said
    assert f"its config: {tmp_path / 'search/best.yaml'}" in said
    page = (tmp_path / "search/search.html").read_text()
    for title in ("History", "Parallel coordinates", "Importance", "Curves of all trials"):
        assert title in page


def test_random_and_grid_train_every_trial_to_its_end(start, tmp_path):
    ranges = {"lr": {**RANGES["lr"], "count": 3}, "opt": RANGES["opt"]}
    for name, count in (("random", 4), ("grid", 6)):
        config = config_of(searcher={"name": name, "max_trials": 4, "max_time": 4}, hyperparameters=ranges)
        ended(start(config, output=name))
        assert {number: len(done) for number, done in batches_of(tmp_path / name).items()} == dict.fromkeys(
            range(count), 4
        )


def test_a_search_that_was_killed_goes_on_and_trains_nothing_twice(start, tmp_path):
    config = config_of(searcher={"name": "random", "max_trials": 6, "max_time": 20})
    draws = random.Random(1)
    for kill in range(3):
        process = start(config)
        wait_for(lambda kill=kill: sum(map(len, batches_of(tmp_path / "search").values())) > 15 * (kill + 1))
        time.sleep(draws.uniform(0, 0.3))
        process.kill()
        process.wait()
    ended(start(config))
    trained = batches_of(tmp_path / "search")
    # a run that loses its search saves a checkpoint, and goes on from it
    assert trained == {number: list(range(1, 21)) for number in range(6)}


def test_two_searches_in_one_folder_are_refused(start, tmp_path):
    config = config_of(searcher={"name": "random", "max_time": 2000})
    start(config, jobs=1)
    wait_for(lambda: batches_of(tmp_path / "search"))
    assert "a search is going on in" in ended(start(config, jobs=1), 1)


def test_ctrl_c_ends_all_trials_with_checkpoints(start, tmp_path):
    process = start(config_of(searcher={"name": "random", "max_time": 2000}))
    wait_for(lambda: len(batches_of(tmp_path / "search")) == 2 and all(batches_of(tmp_path / "search").values()))
    process.send_signal(signal.SIGINT)
    said = ended(process, 130)
    assert "stopped; the same command goes on" in said
    for number, trained in batches_of(tmp_path / "search").items():
        assert (tmp_path / f"search/trials/{number}/checkpoints/last/batches").read_text() == str(trained[-1])


def test_a_trial_that_diverges_ends_alone_and_is_told(start, tmp_path):
    ranges = {**RANGES, "diverges": {"type": "categorical", "vals": [True, False]}}
    config = config_of(hyperparameters=ranges, searcher={"name": "random", "max_trials": 8, "max_time": 3})
    said = ended(start(config))
    assert "ended with an error: error: the loss is not finite since batch 3" in said
    assert 0 < len(batches_of(tmp_path / "search")) < 8
    assert "best: trial" in said


def test_trials_killed_after_a_checkpoint_continue_and_the_search_too(start, tmp_path):
    config = config_of(searcher={"name": "random", "max_trials": 3, "max_time": 30}, checkpoint_at=4, hold_at=12)
    process = start(config)
    for number in range(3):  # the run forgets the reports of the batches 5 to 12, and writes them anew
        wait_for((tmp_path / f"search/trials/{number}/held").exists)
        pattern = f"train {tmp_path}/search/trials/{number}.yaml"
        found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True).stdout
        os.kill(int(found.split()[-1]), signal.SIGKILL)
    said = ended(process)
    assert all(f"trial {number} was killed by SIGKILL; it goes on" in said for number in range(3))
    expected = [*range(1, 13), *range(5, 31)]
    assert batches_of(tmp_path / "search") == dict.fromkeys(range(3), expected)
    trials = open_study(tmp_path / "search/search.journal", config).trials()
    assert [len(trial.intermediate_values) for trial in trials] == [30, 30, 30]


def test_a_trial_killed_before_its_first_checkpoint_begins_anew(start, tmp_path):
    config = config_of(searcher={"name": "random", "max_trials": 1, "max_time": 6}, hold_at=3)
    process = start(config, jobs=1)
    wait_for((tmp_path / "search/trials/0/held").exists)
    pattern = f"train {tmp_path}/search/trials/0.yaml"
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True).stdout
    os.kill(int(found.split()[-1]), signal.SIGKILL)
    assert "trial 0: finished" in ended(process)
    assert batches_of(tmp_path / "search") == {0: [1, 2, 3, 1, 2, 3, 4, 5, 6]}


def test_a_trial_that_meets_a_full_disk_is_not_lost(start, tmp_path):
    config = config_of(searcher={"name": "random", "max_trials": 2, "max_time": 3})
    said = ended(start({**config, "full_disk": True}, jobs=1), 1)
    assert f"error: {tmp_path}/search: [Errno 28] No space left on device" in said
    assert "continue with the same command" in said
    assert "2 trials: 2 trained to their end" in ended_page(start(config, jobs=1), tmp_path / "search")


def test_each_trial_has_its_share_of_the_machine(start, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "my own")
    ended(start(config_of(searcher={"name": "random", "max_trials": 2, "max_time": 3})))
    seen = [json.loads((tmp_path / f"search/trials/{i}/environment.json").read_text()) for i in range(2)]
    assert sorted(one["CUDA_VISIBLE_DEVICES"] for one in seen) == ["3", "5"]
    assert {(one["WANDB_RUN_GROUP"], one["MLFLOW_EXPERIMENT_NAME"]) for one in seen} == {("search", "my own")}
    assert len({one["WANDB_PROJECT"] for one in seen}) == 1
    cores = [set(one["cores"]) for one in seen]
    if len(os.sched_getaffinity(0)) > 1:
        assert not cores[0] & cores[1]


def test_only_its_owner_reads_a_trial_s_config_and_it_holds_no_password_of_a_cluster(start, tmp_path):
    url = "http://user:hunter2@127.0.0.1:9"
    config = config_of(
        searcher={"name": "random", "max_trials": 1},
        checkpoint_storage={"type": "s3", "secret_key": "hunter2"},
        data={"endpoint_url": url},
    )
    ended(start(config, jobs=1))
    file = tmp_path / "search/trials/0.yaml"
    written = yaml.safe_load(file.read_text())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert written["checkpoint_storage"] == {"type": "s3", "secret_key": "(redacted)"}
    assert written["data"] == {"endpoint_url": url}


def test_a_search_of_another_config_is_refused(start, tmp_path):
    config = config_of(searcher={"name": "random", "max_trials": 1, "max_time": 2})
    ended(start(config))
    config["hyperparameters"] = {"lr": RANGES["lr"]}
    assert "begun with other hyperparameters: go on with the same file" in ended(start(config), 1)


def test_status_after_a_kill_names_the_last_progress_and_no_machine(start, tmp_path, capsys):
    config = config_of(searcher={"name": "random", "max_trials": 1, "max_time": 2000})
    process = start(config, jobs=1)
    journal = tmp_path / "search/search.journal"
    wait_for(lambda: journal.exists() and '"progress":1' in journal.read_text())
    status_of(config, tmp_path / "search")
    before = capsys.readouterr().out
    assert "under way" in before
    assert "at work: 1 machine; last progress: 2" in before
    process.kill()
    process.wait()
    written = journal.read_bytes()
    status_of(config, tmp_path / "search")
    after = capsys.readouterr().out
    assert "interrupted" in after
    assert "under way" not in after
    assert "no machine is at work on this search; last progress: 2" in after
    assert "the command without --status continues it" in after
    assert journal.read_bytes() == written


# --- files that a crash, a full disk or a resumed run left ------------------------------------------------


@pytest.fixture
def trial_process(tmp_path):
    """A trial of a program that does nothing: the test writes the files of its run."""
    folder = tmp_path / "trials/0"
    folder.mkdir(parents=True)
    program = [sys.executable, "-c", ""]
    process = TrialProcess(program, tmp_path / "0.yaml", folder, tmp_path / "0.log", Place(None, ()), {})
    yield process
    process.process.wait()


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
    assert trial_process.validations("bbox_mAP") == []  # nothing new


@pytest.mark.parametrize("length", [None, "", '{"batches": 1', '{"batches_per_epoch": 5}', "[]", "\0\0\0"])
def test_without_a_whole_length_there_is_no_report_yet(trial_process, length):
    folder = trial_process.folder
    folder.metrics.write_text(line_of(1, 0.1))
    if length is not None:
        folder.length.write_text(length)
    assert trial_process.validations("bbox_mAP") == []
    folder.write_length(10, 5)
    assert trial_process.validations("bbox_mAP") == [(100_000, 0.1)]


def test_lines_that_are_no_reports_are_skipped(trial_process):
    folder = trial_process.folder
    folder.write_length(10, 5)
    broken = ['{"batches": 2, "spl\n', "\0\0\n", "17\n", '{"batches": 3, "split": "val"}\n', "\xff\n"]
    folder.metrics.write_bytes((line_of(1, 0.1) + "".join(broken) + line_of(4, None)).encode("latin-1"))
    (first, second) = trial_process.validations("bbox_mAP")
    assert first == (100_000, 0.1)
    assert second == (400_000, pytest.approx(float("nan"), nan_ok=True))
    with folder.metrics.open("a") as file:
        file.write(line_of(5, 0.5)[:20])
    assert len(trial_process.validations("bbox_mAP")) == 2


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
    (resumed,) = again.mine()
    again.report(resumed, 2000, 0.5)
    study.report(trial, 3000, 0.5)  # the process that met the full disk writes on
    assert [*open_study(journal, config).trials()[0].intermediate_values] == [2000, 3000]


def test_values_with_formulas_that_are_none_are_drawn(tmp_path):
    values = ["$\\bad{$", "$x$", "a\\$", "$", "_"]
    ranges = {"path $ a": {"type": "categorical", "vals": values}, "lr": RANGES["lr"]}
    config = config_of(hyperparameters=ranges, searcher={"name": "random", "max_trials": 12})
    study = open_study(tmp_path / "search.journal", config)
    for i in range(12):
        trial = study.ask()
        draw(trial, ranges)
        study.finish(trial, TrialState.COMPLETE, i / 12)
    assert {json.loads(trial.params["path $ a"]) for trial in study.trials()} == set(values)
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
    monkeypatch.setattr(study_module, "SECONDS_BETWEEN_SIGNS", 0)
    monkeypatch.setattr(study_module, "SECONDS_OF_SILENCE", 0.2)
    other = open_study(journal, config, "other")
    while any(trial.state == TrialState.RUNNING for trial in other.trials()):
        other.beat()
    drawn = {}
    while (trial := other.ask()) is not None:
        drawn[trial.user_attrs["first_number"]] = draw(trial, RANGES)
    assert drawn == dict(enumerate(expected))


def test_what_a_machine_does_with_a_trial_taken_over_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "SECONDS_BETWEEN_SIGNS", 0)
    monkeypatch.setattr(study_module, "SECONDS_OF_SILENCE", 0.2)
    config = config_of(searcher={"name": "random", "max_trials": 1})
    silent = open_study(tmp_path / "journal", config, "silent")
    trial = silent.ask()
    other = open_study(tmp_path / "journal", config, "other")
    while silent.is_running(trial):
        other.beat()
    with pytest.raises(TakenOver), silent.owning(trial):
        draw(trial, RANGES)
    with pytest.raises(TakenOver):
        silent.report(trial, 1000, 0.5)
    with pytest.raises(TakenOver):
        silent.finish(trial, TrialState.COMPLETE, 0.5)
    assert silent.has_unfinished()
    other.finish(other.ask(), TrialState.COMPLETE, 0.5)
    assert silent.is_complete()


def test_a_take_over_that_was_interrupted_is_done_at_the_next_start(tmp_path):
    config = config_of(searcher={"name": "random", "max_trials": 1})
    study = open_study(tmp_path / "search.journal", config)
    trial = study.ask()
    point = draw(trial, RANGES)
    study.study.tell(trial, state=TrialState.FAIL)  # killed here: nobody has begun it again
    again = open_study(tmp_path / "search.journal", config)
    again.begin_lost_ones_again()
    assert draw(again.ask(), RANGES) == point
    assert len(again.trials()) == 1


def test_status_counts_other_machines_whose_sign_is_recent(tmp_path, capsys, monkeypatch):
    config, storage = config_of(searcher={"name": "random", "max_trials": 1}), str(tmp_path / "shared.journal")
    other = open_study(storage, config, "other")
    draw(other.ask(), RANGES)
    other.beat()
    (tmp_path / "here").mkdir()
    status_of(config, tmp_path / "here", storage)
    assert "at work: 1 machine" in capsys.readouterr().out
    other.leave()
    status_of(config, tmp_path / "here", storage)
    assert "no machine is at work" in capsys.readouterr().out
    monkeypatch.setattr(study_module, "SECONDS_BETWEEN_SIGNS", 0)
    other.beat()
    monkeypatch.setattr(study_module, "SECONDS_OF_SILENCE", -1)
    status_of(config, tmp_path / "here", storage)
    assert "no machine is at work" in capsys.readouterr().out


def test_status_of_no_search_says_so_and_makes_no_file(tmp_path):
    config = config_of(searcher={"name": "random"})
    with pytest.raises(UserError, match=r"--status: .*search.journal does not exist. Fix: "):
        status_of(config, tmp_path)
    open_study(tmp_path / "search.journal", {**config, "name": "another"})
    with pytest.raises(UserError, match="holds no search named tiny"):
        status_of(config, tmp_path)


def test_a_machine_that_was_silent_drops_its_trial_and_continues(start, tmp_path):
    config = config_of(searcher={"name": "random", "max_trials": 2, "max_time": 10}, hold_at=3)
    storage, held = str(tmp_path / "shared.journal"), [tmp_path / f"silent/trials/{i}/held" for i in range(2)]
    silent = start(config, "silent", 2, storage)
    wait_for(lambda: all(file.exists() for file in held))
    silent.send_signal(signal.SIGSTOP)
    held[1].unlink()  # this one ends while its search is silent; the other one is stopped when it comes back
    for i in range(2):
        (tmp_path / f"other/trials/{i}").mkdir(parents=True)
        (tmp_path / f"other/trials/{i}/held").touch()
    other = start(config, "other", 1, storage)
    said = ended(other)  # it has taken over both
    assert said.split("trial    state")[-1].count("finished") == 2
    assert batches_of(tmp_path / "silent") == {0: [1, 2, 3], 1: list(range(1, 11))}
    silent.send_signal(signal.SIGCONT)
    assert ended(silent).count("another machine has taken it over") == 2


def share(start, tmp_path, storage):
    """Two machines with a folder each; one dies, and the other one ends what it was at."""
    config = config_of(searcher={"name": "random", "max_trials": 6, "max_time": 60})
    one, other = (start(config, output, 1, storage) for output in ("one", "other"))
    wait_for(lambda: batches_of(tmp_path / "one") and batches_of(tmp_path / "other"))
    one.kill()
    said = ended(other)
    finished = {
        number
        for machine in ("one", "other")
        for number, done in batches_of(tmp_path / machine).items()
        if done[-1] == 60
    }
    assert finished == set(range(6))
    assert "the machine that was at work on it gives no sign of life" in said
    assert said.split("trial    state")[-1].count("finished") == 6


@pytest.mark.slow
def test_machines_share_a_search_by_a_file_and_take_over_from_one_that_died(start, tmp_path):
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
def test_machines_share_a_search_by_postgresql(start, tmp_path, postgres):
    share(start, tmp_path, postgres)


def test_a_storage_that_cannot_be_used_is_one_line(start):
    said = ended(start(config_of(), storage="nosuch://here"), 1)
    assert "error: --storage: nosuch://here cannot be used" in said


# --- with a detector --------------------------------------------------------------------------------------


def test_a_detector_s_search_leaves_a_config_that_trains(shapes, tmp_path):
    config = efficientdet_config(shapes)
    config["hyperparameters"]["lr"] = {"type": "log", "base": 10, "minval": -4, "maxval": -2}
    config["searcher"] |= {"name": "random", "max_trials": 2, "max_length": {"batches": 2}}
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(config))
    done = run_model_def("search", file, "--output-dir", tmp_path / "search", "--jobs", 2)
    assert "best: trial" in done.stdout
    best = yaml.safe_load((tmp_path / "search/best.yaml").read_text())
    assert 1e-4 <= best["hyperparameters"]["lr"] <= 1e-2
    assert (tmp_path / "search/trials/0/checkpoints/best").is_dir()
    done = run_model_def("search", file, "--output-dir", tmp_path / "search", "--status")
    assert done.stdout.count("finished") == 2
