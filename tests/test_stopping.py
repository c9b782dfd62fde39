"""Signals, a full disk and hostile checkpoints: what a run leaves, and that it goes on from there."""

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from conftest import ROOT, reports, run_model_def
from test_resume import assert_same_bits, final_state
from tiny_models import efficientdet_config

from shared.errors import UserError
from shared.training import progress
from shared.training.checkpoints import load_state, read_checkpoint
from shared.training.stopping import StopRequest


@pytest.fixture
def trial_class():
    from model_def import EfficientDetTrial

    return EfficientDetTrial


def start(config, run, processes=1, resume=()):
    program = [sys.executable]
    if processes > 1:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*program, "model_def.py", "train", str(config), "--output-dir", str(run), *resume],
        cwd=ROOT / "efficientdet",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_batch(run, process, batch, limit=120):
    started = time.time()
    while not ((run / "metrics.jsonl").exists() and reports(run)[-1]["batches"] >= batch):
        assert process.poll() is None
        assert time.time() - started < limit
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("processes", "number"), [(1, signal.SIGINT), pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_run_with_a_checkpoint_from_which_it_goes_on_to_the_same_bits(
    run_config, tmp_path, processes, number
):
    length = {"searcher__max_length": {"batches": 40}, "min_validation_period": {"batches": 40}}
    config, run = run_config(**length), tmp_path / "run"
    process = start(config, run, processes)
    wait_for_batch(run, process, 6)
    if processes == 1:
        os.killpg(process.pid, number)  # the loaders' workers too, as Ctrl-C and a service manager do
    else:
        process.send_signal(number)  # torchrun passes it on
    started = time.time()
    _, errors = process.communicate(timeout=60)
    assert time.time() - started < 20
    assert processes > 1 or process.returncode == 128 + number
    (line,) = [line for line in errors.splitlines() if line.startswith("stopped by")]
    batch = int(line.split("after batch ")[1].split(",")[0])
    assert f"--output-dir {run} --resume last" in line
    assert read_checkpoint(run / "checkpoints/last").batches == batch < 40
    if processes == 1:  # the same bits are shown with two
        return
    run_model_def("train", config, "--output-dir", run, "--resume", "last", processes=processes)
    run_model_def("train", config, "--output-dir", tmp_path / "whole", processes=processes)
    assert_same_bits(final_state(run), final_state(tmp_path / "whole"))


def test_a_signal_in_a_validation_cuts_it_short_and_reports_nothing_of_it(shapes, train, trial_class, tmp_path):
    config = efficientdet_config(shapes)
    config["data"]["workers"] = 0

    class Signalled(trial_class):
        def detect(self, model, batch):
            if self.batches_trained == 8:
                self.detected = getattr(self, "detected", 0) + 1
                os.kill(os.getpid(), signal.SIGTERM)
            return super().detect(model, batch)

    with pytest.raises(SystemExit) as exit_status:
        train(Signalled, config)
    assert exit_status.value.code == 143
    run = tmp_path / "run"
    assert [report["batches"] for report in reports(run, "val")] == [4]
    assert read_checkpoint(run / "checkpoints/last").batches == 8
    train(trial_class, config, resume="last")
    assert reports(run)[-1]["batches"] == 12


def test_a_full_disk_is_an_error_and_the_earlier_checkpoints_are_whole(run_config, tmp_path):
    probe = tmp_path / "code" / "probe.py"
    probe.parent.mkdir()
    probe.write_text(
        "import sys; sys.path.insert(0, '.')\n"
        "import resource, signal, model_def\n"
        "from shared.launch import main\n"
        "class Probe(model_def.EfficientDetTrial):\n"
        "    def after_batch(self, number):\n"
        "        super().after_batch(number)\n"
        "        if number == 5:\n"
        "            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "main(Probe)\n"
    )
    config, run = run_config(), tmp_path / "run"
    done = run_model_def("train", config, "--output-dir", run, script=probe, check=False)
    assert done.returncode == 1
    assert f"error: {run} cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert [read_checkpoint(run / "checkpoints" / name).batches for name in ("best", "last")] == [4, 4]
    run_model_def("train", config, "--output-dir", run, "--resume", "last")
    assert reports(run)[-1]["batches"] == 12


class Hostile:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_checkpoint_whose_pickle_would_execute_code_is_refused_before_it_does(shapes, train, trial_class, tmp_path):
    config = efficientdet_config(shapes)
    config["data"]["workers"] = 0
    config["searcher"]["max_length"] = {"batches": 2}
    run, trace = train(trial_class, config), tmp_path / "executed"
    (run / "checkpoints/last/trial_state.pkl").write_bytes(pickle.dumps({"trial_id": Hostile(trace)}))
    config["searcher"]["max_length"] = {"batches": 4}
    with pytest.raises(UserError, match=r"trial_state.pkl cannot be read .*mkdir"):
        train(trial_class, config, resume="last")
    assert not trace.exists()


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(shapes, train, trial_class, monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    config = efficientdet_config(shapes)
    config["data"]["workers"] = 0
    with caplog.at_level("INFO"):
        train(trial_class, config)
    lines = [record.message for record in caplog.records if record.message.startswith("batch 3 of 12, loss ")]
    assert len(lines) == 1
    assert lines[0].endswith("0:00:00 left") or "images/s, 0:0" in lines[0]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_always_goes_on_from_a_whole_checkpoint(run_config, tmp_path):
    # a checkpoint after each batch, so that most kills come in the writing of one
    every = {"searcher__max_length": {"batches": 10_000}, "min_checkpoint_period": {"batches": 1}}
    config, run = run_config(**every, min_validation_period={"batches": 10_000}), tmp_path / "run"
    generator, trained = random.Random(0), 0
    for _ in range(20):
        resume = ("--resume", "last") if (run / "checkpoints/last").exists() else ()
        process = start(config, run, resume=resume)
        wait_for_batch(run, process, trained + 2)
        time.sleep(generator.random() * 2)
        reported = reports(run)[-1]["batches"]
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            victim.send_signal(signal.SIGKILL)
        process.communicate()
        # as `--resume last` does first
        from shared.training.local_run import RunFolder

        RunFolder(run).restore_interrupted_rename()
        last = read_checkpoint(run / "checkpoints/last").batches
        assert last >= max(trained, reported - 2)  # scheduling_unit is 2
        load_state(run / "checkpoints/last/state_dict.pth")
        trained = last
    path = run_config(searcher__max_length={"batches": trained + 2})
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "min_checkpoint_period": {"batches": 1}}))
    run_model_def("train", path, "--output-dir", run, "--resume", "last")


@pytest.mark.slow
def test_resident_memory_does_not_grow(run_config, tmp_path):
    # the first reading is 200 batches after the first validation, when everything has run once; 5 more follow
    periods = {"min_validation_period": {"batches": 400}, "min_checkpoint_period": {"batches": 400}}
    config = run_config(searcher__max_length={"batches": 2600}, data__workers=4, **periods)
    run = tmp_path / "run"
    process = start(config, run)

    def resident(batch):
        wait_for_batch(run, process, batch, limit=1200)
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        return sum(each.memory_full_info().pss for each in processes)

    early = resident(600)
    late = resident(2590)
    process.communicate(timeout=300)
    assert late < 1.05 * early


def test_processes_that_a_library_forks_meanwhile_end_as_ever():
    with StopRequest() as stop_request, multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]
        pool.terminate()
        pool.join()
    assert stop_request.signal is None
