"""Signals and hostile checkpoints: the files that a run leaves, and its continuation."""

import json
import multiprocessing
import os
import pickle
import signal
import threading
import time

import psutil
import pytest
import torch
import yaml
from conftest import ROOT, reports, run_model_def, start_run, wait_for_batch
from determined.core import DistributedContext
from test_resume import assert_same_bits, final_state
from tiny_models import efficientdet_config

from shared.environment import STOP_SIGNALS
from shared.errors import UserError
from shared.training import training_metrics
from shared.training.checkpoints import read_checkpoint
from shared.training.stopping import Stopping, StopSignals, begin_worker


def test_ctrl_c_to_the_process_group_stops_the_run_after_the_batch(run_config, tmp_path):
    length = {"searcher__max_length": {"batches": 4000}, "min_validation_period": {"batches": 4000}}
    config, run = run_config(**length), tmp_path / "run"
    process = start_run(config, run)
    wait_for_batch(run, process, 6)
    os.killpg(process.pid, signal.SIGINT)  # the loaders' workers too, as Ctrl-C and a service manager do
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGINT
    (line,) = [line for line in errors.splitlines() if line.startswith("stopped by")]
    batch = int(line.split("after batch ")[1].split(",")[0])
    assert f"--output-dir {run} --resume last" in line
    assert read_checkpoint(run / "checkpoints/last").batches == batch < 4000


def test_a_second_ctrl_c_in_a_save_ends_the_run_at_once_with_130(run_config, tmp_path, program):
    script = program(
        "import io, torch\n"
        "from shared.training.saving import Snapshot\n"
        "def write(self, folder, code):\n"
        f"    open({str(tmp_path / 'saving')!r}, 'w').close()\n"
        "    while True:\n"
        "        torch.save(torch.zeros(10**6), io.BytesIO())\n"
        "Snapshot.write = write\n"
        "main(model_def.EfficientDetTrial)\n"
    )
    process = start_run(run_config(min_checkpoint_period={"batches": 2}), tmp_path / "run", script=script)
    while not (tmp_path / "saving").exists():
        assert process.poll() is None
        time.sleep(0.01)
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:  # the first may come before signals are handled
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    process.communicate()
    assert process.returncode == 128 + signal.SIGINT


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


# where a run of 12 batches, validated and saved every 4, is when the signal comes; and after which batch it stops
PHASES = {
    "in the first batch": ("losses", 0, 1),
    "in a step": ("losses", 5, 6),
    "between a step and its validation": ("synchronize_buffers", 8, 8),
    "in a validation": ("detect", 8, 8),
    "in the copy for a checkpoint": ("own_state", 8, 8),
    "between the last step and its validation": ("synchronize_buffers", 12, 12),
    "in the last validation": ("detect", 12, 12),
}


def signalled(trial_class, phase, number=signal.SIGTERM):
    """The trial class, sent a signal once in that phase."""
    method, batches, _ = PHASES[phase]

    def call(self, *arguments):
        if self.batches_trained == batches and not self.sent and self.for_training:
            type(self).sent = True
            send(number)
        return getattr(trial_class, method)(self, *arguments)

    return type(trial_class.__name__, (trial_class,), {method: call, "sent": False, "__module__": "model_def"})


def without_times(lines):
    return [
        {**line, "metrics": {k: v for k, v in line["metrics"].items() if k not in ("images_per_second", "data_wait")}}
        for line in lines
    ]


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    """An uninterrupted run; and its config."""
    config = efficientdet_config(shapes)
    config["data"]["workers"] = 0
    config["scheduling_unit"] = 3  # some stops cut a report short
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run_model_def("train", folder / "config.yaml", "--output-dir", folder / "run", figures=False)
    return config, folder / "run"


@pytest.mark.parametrize(
    "phase",
    [
        *("in a step", "in a validation", "in the copy for a checkpoint", "in the last validation"),
        *(
            pytest.param(phase, marks=pytest.mark.slow)
            for phase in (
                *("in the first batch", "between a step and its validation"),
                "between the last step and its validation",
            )
        ),
    ],
)
def test_resume_after_a_signal_in_any_phase_equals_an_unstopped_run(whole, train, trial_class, tmp_path, phase):
    config, unstopped = whole
    with pytest.raises(SystemExit) as exit_status:
        train(signalled(trial_class, phase), config)
    assert exit_status.value.code == 128 + signal.SIGTERM
    run = tmp_path / "run"
    assert read_checkpoint(run / "checkpoints/last").batches == PHASES[phase][2]
    train(trial_class, config, resume="last")
    assert_same_run(run, unstopped)


def test_a_validation_that_was_cut_short_draws_the_same_numbers_again(whole, train, trial_class):
    config, _ = whole
    drawn = []

    class Drawing(trial_class):
        def detect(self, model, batch):
            if self.batches_trained == 8:
                drawn.append(torch.rand(()).item())
            return super().detect(model, batch)

    Drawing.__module__ = "model_def"
    with pytest.raises(SystemExit):
        train(signalled(Drawing, "in a validation"), config)
    cut_short, drawn[:] = drawn[:], []
    train(Drawing, config, resume="last")
    assert cut_short
    assert drawn[: len(cut_short)] == cut_short


def assert_same_run(one, other):
    assert_same_bits(final_state(one), final_state(other))
    assert without_times(reports(one)) == without_times(reports(other))
    best = [read_checkpoint(each / "checkpoints/best").batches for each in (one, other)]
    assert best[0] == best[1]


def test_a_signal_while_a_checkpoint_is_written_stops_after_the_batch(whole, train, trial_class, tmp_path):
    config, unstopped = whole
    is_sent = threading.Event()

    class Signalled(trial_class):
        def save_own_config(self, folder):
            super().save_own_config(folder)
            if not is_sent.is_set() and self.batches_trained >= 4:
                send()
                is_sent.set()

        def after_batch(self, number):
            super().after_batch(number)
            assert number < 4 or is_sent.wait(600)

    Signalled.__module__ = "model_def"
    with pytest.raises(SystemExit) as exit_status:
        train(Signalled, config)
    assert exit_status.value.code == 128 + signal.SIGTERM
    assert read_checkpoint(tmp_path / "run/checkpoints/last").batches in (4, 5)
    train(trial_class, config, resume="last")
    assert_same_run(tmp_path / "run", unstopped)


def test_a_signal_before_the_training_leaves_the_folder_free(shapes, train, trial_class, tmp_path):
    config = efficientdet_config(shapes)
    config["data"]["workers"] = 0

    class Signalled(trial_class):
        def build_training_data_loader(self):
            send()
            return super().build_training_data_loader()

    Signalled.__module__ = "model_def"
    with pytest.raises(SystemExit) as exit_status:
        train(Signalled, config)
    assert exit_status.value.code == 143
    train(trial_class, config)
    assert reports(tmp_path / "run")[-1]["batches"] == 12


def test_a_signal_in_the_last_save_changes_nothing(whole, train, trial_class, tmp_path):
    config, unstopped = whole

    class Signalled(trial_class):
        def save_own_config(self, folder):
            if self.batches_trained == 12:
                send()
            super().save_own_config(folder)

    Signalled.__module__ = "model_def"
    run = train(Signalled, config)
    assert without_times(reports(run)) == without_times(reports(unstopped))


# a model_def.py in which one rank gets a signal in a phase
ONE_RANK = """
import os, sys
sys.path[:0] = [os.getcwd(), os.environ["TESTS"]]
import model_def
from test_stopping import signalled
from shared.launch import main
rank = int(os.environ["RANK"])
main(signalled(model_def.EfficientDetTrial, os.environ["PHASE"]) if rank == 1 else model_def.EfficientDetTrial)
"""


@pytest.fixture
def signalled_run(run_config, tmp_path):
    """A run of two processes. One gets a signal in a phase. Returns its config and folder."""

    def train(phase):
        script = tmp_path / "signalled.py"
        script.write_text(ONE_RANK)
        config, run = run_config(scheduling_unit=3, data__workers=0), tmp_path / "run"
        env = {"PHASE": phase, "TESTS": str(ROOT / "tests")}
        arguments = ("train", config, "--output-dir", run)
        done = run_model_def(*arguments, processes=2, torchrun=True, env=env, check=False, script=script)
        assert done.returncode != 0
        assert f"--output-dir {run} --resume last" in done.stderr
        return config, run

    return train


def test_a_signal_to_one_of_two_processes_stops_both(signalled_run):
    _, run = signalled_run("in a step")
    assert read_checkpoint(run / "checkpoints/last").batches == 6  # at the report, where they meet


@pytest.mark.slow
@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "in the copy for a checkpoint"])  # the chief's
def test_two_processes_resume_after_a_signal_to_one_of_them(signalled_run, tmp_path, phase):
    config, run = signalled_run(phase)
    run_model_def("train", config, "--output-dir", run, "--resume", "last", processes=2)
    run_model_def("train", config, "--output-dir", tmp_path / "unstopped", processes=2)
    assert_same_bits(final_state(run), final_state(tmp_path / "unstopped"))
    assert without_times(reports(run)) == without_times(reports(tmp_path / "unstopped"))


@pytest.mark.parametrize(("status", "expected"), [(None, 128 + signal.SIGUSR1), (0, 0)])
def test_the_warning_of_a_batch_system_saves_and_leaves_a_mark(shapes, train, trial_class, tmp_path, status, expected):
    config = efficientdet_config(shapes)
    with pytest.raises(SystemExit) as exit_status:
        train(signalled(trial_class, "in a step", signal.SIGUSR1), config, stop_status=status)
    assert exit_status.value.code == expected
    run = tmp_path / "run"
    assert json.loads((run / "requeue").read_text()) == {"signal": "SIGUSR1", "batches": 6}
    assert read_checkpoint(run / "checkpoints/last").batches == 6
    config["searcher"]["max_length"] = {"batches": 8}
    train(trial_class, config, resume="auto")
    assert not (run / "requeue").exists()


def test_a_signal_before_the_training_leaves_the_mark_too(shapes, train, trial_class, tmp_path):
    class Signalled(trial_class):
        def open_data(self):
            send(signal.SIGUSR2)
            super().open_data()

    Signalled.__module__ = "model_def"
    with pytest.raises(SystemExit) as exit_status:
        train(Signalled, efficientdet_config(shapes))
    assert exit_status.value.code == 128 + signal.SIGUSR2
    assert json.loads((tmp_path / "run/requeue").read_text()) == {"signal": "SIGUSR2", "batches": None}


@pytest.mark.slow
def test_the_processes_of_a_torchrun_that_a_signal_kills_save_and_stop(run_config, tmp_path):
    length = {"searcher__max_length": {"batches": 4000}, "min_validation_period": {"batches": 4000}}
    run = tmp_path / "run"
    process = start_run(run_config(**length), run, processes=2)
    wait_for_batch(run, process, 6)
    process.send_signal(signal.SIGUSR1)  # torchrun does not forward it by itself
    process.communicate(timeout=600)  # until its processes have closed their output
    assert process.returncode == -signal.SIGUSR1
    mark = json.loads((run / "requeue").read_text())
    assert mark["signal"] == "SIGTERM"
    assert read_checkpoint(run / "checkpoints/last").batches == mark["batches"] >= 6


@pytest.fixture
def hangup_is_ignored():
    """Ignores SIGHUP, as `nohup` does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_signal_that_is_ignored_at_the_start_stays_so(hangup_is_ignored):
    with StopSignals() as signals:
        signals.begin()
        send(signal.SIGHUP)
        assert signals.received is None
        send(signal.SIGUSR2)
        assert signals.received == signal.SIGUSR2


@pytest.mark.parametrize("number", [each for each in STOP_SIGNALS if each != signal.SIGTERM])
def test_a_loader_worker_outlives_a_signal_to_its_group(number):
    worker = multiprocessing.get_context("fork").Process(target=outlive, args=(number,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0


def outlive(number):
    begin_worker(0)
    send(number)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("--stop-signals=KILL", "KILL is not one of TERM, USR1, USR2, HUP, QUIT, XCPU"),
        ("--stop-status=300", "300 is not a whole number from 0 to 255"),
    ],
)
def test_a_signal_or_status_that_cannot_be_is_refused(command, trial_class, run_config, capsys, option, problem):
    with pytest.raises(SystemExit):
        command(trial_class, "train", run_config(), option)
    assert problem in capsys.readouterr().err


def test_two_runs_never_work_in_one_folder_at_once(shapes, train, trial_class, tmp_path):
    config = efficientdet_config(shapes)
    config["data"]["workers"] = 0
    refusals = []

    class Second(trial_class):
        def after_batch(self, number):
            super().after_batch(number)
            if number == 5:
                path = tmp_path / "second.yaml"
                path.write_text(yaml.safe_dump(config))
                done = run_model_def("train", path, "--output-dir", tmp_path / "run", "--resume", "last", check=False)
                refusals.append((done.returncode, done.stderr.splitlines()[-1]))

    Second.__module__ = "model_def"
    run = train(Second, config)
    assert refusals == [
        (1, f"error: --output-dir: another process uses {run}. Fix: wait for its run, or name another folder")
    ]
    assert reports(run)[-1]["batches"] == 12


class Hostile:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_checkpoint_that_would_execute_code_is_refused(shapes, train, trial_class, tmp_path):
    config = efficientdet_config(shapes)
    config["data"]["workers"] = 0
    config["searcher"]["max_length"] = {"batches": 2}
    run, trace = train(trial_class, config), tmp_path / "executed"
    for name in ("best", "last"):
        (run / "checkpoints" / name / "trial_state.pkl").write_bytes(pickle.dumps({"trial_id": Hostile(trace)}))
        (run / "checkpoints" / name / "manifest.json").unlink()  # whoever changes the one changes the other
    config["searcher"]["max_length"] = {"batches": 4}
    with pytest.raises(UserError, match=r"trial_state.pkl cannot be read .*mkdir"):
        train(trial_class, config, resume="last")
    assert not trace.exists()


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(shapes, train, trial_class, monkeypatch, caplog):
    monkeypatch.setattr(training_metrics, "SECONDS_BETWEEN_LINES", 0.0)
    config = efficientdet_config(shapes)
    config["data"]["workers"] = 0
    with caplog.at_level("INFO"):
        train(trial_class, config)
    lines = [record.message for record in caplog.records if record.message.startswith("batch 3 of 12, loss ")]
    assert len(lines) == 1
    assert lines[0].endswith("0:00:00 left") or "images/s, 0:0" in lines[0]


@pytest.mark.slow
def test_resident_memory_does_not_grow(run_config, tmp_path):
    # the first reading is 200 batches after the first validation, when everything has run once; 5 more follow
    periods = {"min_validation_period": {"batches": 400}, "min_checkpoint_period": {"batches": 400}}
    config = run_config(searcher__max_length={"batches": 2600}, data__workers=4, **periods)
    run = tmp_path / "run"
    process = start_run(config, run)

    def resident(batch):
        wait_for_batch(run, process, batch, limit=1200)
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        return sum(each.memory_full_info().pss for each in processes)

    early = resident(600)
    late = resident(2590)
    process.communicate(timeout=600)
    assert late < 1.05 * early


def test_processes_that_a_library_forks_meanwhile_end_as_ever():
    for _ in range(20):  # a SIGTERM may come at any moment of a process's start
        with StopSignals() as signals, multiprocessing.get_context("fork").Pool(2) as pool:
            signals.begin()
            assert pool.map(abs, [-1, -2]) == [1, 2]
            pool.terminate()
            pool.join()
        assert signals.received is None


def test_a_process_that_is_ended_while_it_is_forked_ends():
    with StopSignals() as signals:
        signals.begin()
        for _ in range(40):
            process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
            process.start()
            process.terminate()
            process.join(60)
            assert process.exitcode == -signal.SIGTERM


def test_a_training_without_a_signal_or_a_searcher_s_word_is_never_stopped():
    alone = DistributedContext(rank=0, size=1, local_rank=0, local_size=1, cross_rank=0, cross_size=1)
    stopping = Stopping(alone)
    assert not stopping.after_batch(10)
    assert not stopping.at_boundary(10)
    assert not stopping.validation_was_cut(10)


def test_the_searcher_s_word_to_the_chief_stops_at_the_next_boundary():
    alone = DistributedContext(rank=0, size=1, local_rank=0, local_size=1, cross_rank=0, cross_size=1)
    stopping = Stopping(alone)
    assert stopping.at_boundary(20, "the searcher")
    assert stopping.after == 20
