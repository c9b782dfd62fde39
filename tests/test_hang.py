"""A run with a hanging process stops, names the process and the place, and can continue."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import msgspec
import psutil
import pytest
import yaml
from conftest import ROOT, reports, run_model_def, start_run, wait_for_batch
from in_threads import listening, on_all, processes, strangers
from tiny_models import efficientdet_config

from shared.training.checkpoints import read_checkpoint
from shared.training.hang import Exchange, watching
from shared.training.standings import LONGER, Mark, Phase, Standing, Standings, span

LIMIT = 60.0  # seconds, of the processes below
INTERVAL = 5.0


class Process:
    """The state that a process's thread would report."""

    def __init__(self, rank, phase=Phase.LOADING, batch=1, passed=1, waits=False):
        self.rank, self.waits, self.ticks, self.since = rank, waits, -1, 0
        self.mark = Mark(phase, batch, passed)

    def comes_to(self, phase, batch):
        self.mark, self.since = self.mark.followed_by(phase, batch), self.ticks

    def tick(self):
        self.ticks += 1
        quiet = INTERVAL * (self.ticks - self.since)
        return Standing(
            self.rank, self.mark, quiet, self.mark.patience(LIMIT, 1), self.ticks, self.waits, f"step.py:{self.rank}"
        )


def after(seconds, processes, stopped=(), standings=None):
    """The common decision after seconds without progress. The `stopped` processes have not ticked either."""
    standings = standings or Standings(INTERVAL)
    if not standings.of:
        for process in processes:
            standings.hear(process.tick())
    for _ in range(int(seconds / INTERVAL)):
        standings.tick()
        for process in processes:
            if process.rank not in stopped:
                standings.hear(process.tick())
    return standings


def test_the_rank_that_has_passed_least_is_named():
    processes = [Process(rank, Phase.BACKWARD, 6, passed=20) for rank in range(4)]
    processes[2] = Process(2, Phase.LOADING, 6, passed=18)
    standings = after(55, processes)
    assert not standings.hang()
    after(5, processes, standings=standings)
    assert standings.hang()
    assert standings.message() == (
        "no progress for 60 seconds: rank 2 is stuck at batch 6 (loading a batch, at step.py:2); the other ranks wait "
        "at batch 6 (computing the gradients and the step)"
    )


def test_the_rank_that_does_not_wait_is_behind_an_equal_one():
    evaluating = [Process(rank, Phase.EVALUATING, 6, passed=20, waits=rank > 0) for rank in range(3)]
    behind = "rank 0 is stuck at batch 6 (evaluating the detections, at step.py:0); the other ranks wait"
    assert after(600, evaluating).message().endswith(behind)
    all_wait = [Process(rank, Phase.BACKWARD, 6, passed=20, waits=True) for rank in range(3)]
    assert "ranks 0, 1, 2 wait in the same place, batch 6 (computing" in after(60, all_wait).message()


def test_a_long_evaluation_or_checkpoint_of_the_chief_is_no_hang():
    for phase in (Phase.EVALUATING, Phase.SAVING):
        chief, other = Process(0, phase, 6, passed=20), Process(1, Phase.BACKWARD, 6, passed=20, waits=True)
        standings = after(LONGER * LIMIT - INTERVAL, [chief, other])
        assert not standings.hang()
        assert after(INTERVAL, [chief, other], standings=standings).hang()


def test_the_first_batch_after_a_start_may_take_longer():
    mark = Mark(Phase.FORWARD, 101)
    assert mark.patience(LIMIT, first_batch=101) == LONGER * LIMIT
    assert mark.followed_by(Phase.FORWARD, 102).patience(LIMIT, first_batch=101) == LIMIT


def test_nobody_hangs_while_one_comes_further():
    one, other = Process(0, Phase.BACKWARD, 6), Process(1, Phase.VALIDATING, 6)
    standings = after(0, [one, other])
    for _ in range(10):
        other.comes_to(Phase.VALIDATING, 6)  # the next validation batch
        after(30, [one, other], standings=standings)
        assert not standings.hang()
    after(30, [one, other], standings=standings)
    assert standings.hang()


@pytest.mark.parametrize("phase", [Phase.EVALUATING, Phase.SAVING, Phase.BEGINNING])
def test_a_rank_that_does_not_answer_has_hung_whatever_it_was_doing(phase):
    processes = [Process(rank, phase, 6, passed=20, waits=rank == 0) for rank in range(2)]
    standings = after(LIMIT - INTERVAL, processes, stopped=[1], standings=Standings(INTERVAL, LIMIT))
    assert not standings.hang()
    after(INTERVAL, processes, stopped=[1], standings=standings)
    assert standings.hang()
    assert "rank 1 does not answer since batch 6" in standings.message()


def test_a_stopped_process_is_named_and_a_stopped_job_is_no_hang():
    processes = [Process(0, Phase.BACKWARD, 6, passed=5), Process(1, Phase.LOADING, 7, passed=9)]
    standings = after(55, processes, stopped=[1])
    assert not standings.hang()  # whatever the clock says meanwhile: nobody ticks
    after(5, processes, stopped=[1], standings=standings)
    assert standings.hang()
    assert standings.message().endswith("rank 1 does not answer since batch 7 (loading a batch, at step.py:1)")


def test_without_the_chief_only_the_chief_is_named():
    processes = [Process(rank, Phase.BACKWARD, 6) for rank in range(3)]
    message = after(60, processes, stopped=[0, 2]).message()
    assert "rank 0 does not answer since batch 6" in message


def test_a_finished_process_is_not_behind():
    processes = [Process(rank, Phase.REPORTING, 6, passed=20) for rank in range(2)]
    standings = after(LONGER * LIMIT, processes[:1])
    standings.hear(Standing(1, Mark(Phase.REPORTING, 6, 3), 0.0, LIMIT, tick=9, left=True))
    assert standings.hang()
    assert "rank 1" not in standings.message()


def test_a_repeated_validation_batch_is_a_mark_that_is_not_counted():
    first = Mark(Phase.VALIDATING, 4, 7)
    second = first.followed_by(Phase.VALIDATING, 4)
    assert second is not first
    assert second == first
    assert second.followed_by(Phase.EVALUATING, 4).passed == 8


def test_spans():
    assert [span(seconds) for seconds in (3.2, 90, 600)] == ["3 seconds", "90 seconds", "10 minutes"]


@pytest.mark.parametrize(("machines", "interface"), [(1, "127.0.0.1"), (2, "0.0.0.0")])
def test_processes_hear_of_each_other_and_a_stranger_cannot_report_a_hang(machines, interface):
    standings = [Standing(rank, Mark(Phase.LOADING, 1), 0.0, LIMIT) for rank in (0, 1)]
    with processes(2, machines) as contexts, contextlib.ExitStack() as stack:
        before = listening()
        exchanges = on_all(Exchange, contexts)
        for exchange in exchanges:
            stack.callback(exchange.close)
        (port,) = listening().keys() - before.keys()
        assert listening()[port] == interface
        for socket in stack.enter_context(strangers([port])):
            socket.send(msgspec.json.encode([dataclasses.replace(each, reported=True) for each in standings]))
        heard = []
        for _ in range(100):
            on_chief = exchanges[0].swap(standings[0])
            assert not any(each.reported for each in on_chief)
            heard = exchanges[1].swap(standings[1]) or heard
            time.sleep(0.01)
        assert {each.rank for each in heard} == {each.rank for each in on_chief} == {0, 1}


def test_a_rank_that_ends_in_the_start_is_named_with_its_machine():
    standings = Standings(INTERVAL, LIMIT, hosts=["node-a", "node-b", "node-b"])
    begun = Mark(Phase.STARTING, 0)
    with processes(3) as contexts:
        exchanges = on_all(Exchange, contexts)

        def report(rank, tick):
            return exchanges[rank].swap(Standing(rank, begun, INTERVAL * tick, begun.patience(LIMIT, 1), tick))

        for tick in range(20):
            for rank in (2, 1, 0) if tick < 5 else (1, 0):  # rank 2 has been killed
                time.sleep(0.02)  # until it is there
                for standing in report(rank, tick):
                    standings.hear(standing)
            standings.tick()
        for exchange in exchanges:
            exchange.close()
    assert standings.hang()
    assert standings.message().endswith("rank 2 on node-b does not answer since batch 0 (starting)")


@pytest.mark.parametrize("error", [None, KeyError("an error")])
def test_a_rank_that_ends_by_an_error_is_not_one_that_has_left(error):
    def join(context):
        if context.rank == 0:
            return Exchange(context)
        with contextlib.suppress(KeyError), watching(context, 0.01) as watch, watch.training(0):
            time.sleep(0.3)  # until its first reports have come
            if error is not None:
                raise error
        return None

    with processes(2) as contexts:
        (exchange, _) = on_all(join, contexts)
        time.sleep(0.1)
        heard = exchange.swap(Standing(0, Mark(Phase.STARTING, 0), 0.0, LIMIT))
        exchange.close()
    assert [each.left for each in heard if each.rank == 1] == [error is None]


@pytest.mark.parametrize("value", [0, -1.5])
def test_a_time_that_is_none_is_refused_by_its_key(run_config, refused, value):
    line = refused("train", run_config(hyperparameters__hang_minutes=value))
    assert line == (
        f"error: hyperparameters.hang_minutes: it is {value:g}. Fix: give a number > 0 (minutes without progress after "
        "which a run stops; `null` for never)"
    )


# a model_def.py whose rank 1 sleeps forever in batch 6, or whose loader worker does at its 25th image
SLEEPING = """
import os, sys, time
sys.path[:0] = [os.getcwd()]
import model_def
from shared.launch import main

class Sleeping(model_def.EfficientDetTrial):
    def losses(self, model, batch):
        if os.environ["WHERE"] == "losses" and self.rank == 1 and self.batches_trained == 5:
            time.sleep(10_000)
        return super().losses(model, batch)

    def training_dataset(self):
        dataset = super().training_dataset()
        return SleepingData(dataset) if os.environ["WHERE"] == "data" else dataset

class SleepingData:
    def __init__(self, dataset):
        self.dataset, self.read = dataset, 0
    def __len__(self):
        return len(self.dataset)
    def __getitem__(self, key):
        self.read += 1
        if self.read == 25:
            time.sleep(10_000)
        return self.dataset[key]

Sleeping.__module__ = "model_def"
main(Sleeping)
"""


@pytest.fixture
def sleeping(run_config, tmp_path):
    """Starts a run that hangs. Returns its outcome and its folder."""

    def call(where, processes, workers=0):
        script = tmp_path / "sleeping.py"
        script.write_text(SLEEPING)
        saved = {"min_validation_period": None, "min_checkpoint_period": {"batches": 4}}
        config = run_config(data__workers=workers, hyperparameters__hang_minutes=0.1, **saved)
        arguments = ("train", config, "--output-dir", tmp_path / "run")
        started = {"processes": processes, "torchrun": processes > 1, "env": {"WHERE": where}, "script": script}
        return run_model_def(*arguments, check=False, **started)

    return call


def test_a_sleeping_rank_is_named_with_its_batch_and_the_run_resumes(sleeping, train, trial_class, tmp_path):
    done = sleeping("losses", processes=2)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: no progress")]
    assert ": rank 1 is stuck at batch 6 (computing the losses, at sleeping.py:10 in losses); the other rank " in line
    assert "The stacks of all ranks are above" in line
    assert line.endswith("continue with --resume last")
    for rank in (0, 1):
        assert f"[rank {rank}] batch 6 (" in done.stderr
        assert f"[rank {rank}] thread MainThread" in done.stderr
    assert '[rank 1]   File "' + str(tmp_path / "sleeping.py") + '", line 10 in losses' in done.stderr
    run = tmp_path / "run"
    assert read_checkpoint(run / "checkpoints/last").batches == 4
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del config["hyperparameters"]["hang_minutes"]  # seconds, which would end this process too
    train(trial_class, config, resume="last")
    assert reports(run)[-1]["batches"] == 12


# a task of a cluster that hangs, with a line that standard output still holds
HANGING_TASK = """
import time
from types import SimpleNamespace
import determined
from determined.core import DistributedContext

determined.get_cluster_info = lambda: SimpleNamespace(task_type="TRIAL")
from shared.training.hang import watching

alone = DistributedContext(rank=0, size=1, local_rank=0, local_size=1, cross_rank=0, cross_size=1)
print("a line of the training")
with watching(alone, hang_minutes=0.002) as watch, watch.training(0):
    time.sleep(100)
"""


def test_on_a_cluster_the_last_line_of_a_hang_is_its_error_at_level_error():
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([sys.executable, "-c", HANGING_TASK], cwd=ROOT, **output)
    *before, last = done.stdout.splitlines()
    assert done.returncode == 1
    assert last.startswith("ERROR: no progress for ")
    assert "stuck at batch 0 (beginning, at " in last
    assert "a line of the training" in before
    assert not [line for line in before if "no progress" in line]


def test_a_loader_worker_that_sleeps_is_shown_and_does_not_outlive_the_run(sleeping, tmp_path):
    done = sleeping("data", processes=1, workers=1)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: no progress for ")
    assert " (loading a batch, at " in line
    assert "its worker " in done.stderr
    assert f'File "{tmp_path / "sleeping.py"}", line 25 in __getitem__' in done.stderr
    left = [" ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
    assert not [command for command in left if str(tmp_path) in command]


@pytest.mark.parametrize("minutes", [10, None])
def test_the_watch_thread_ends_with_the_training_and_null_starts_none(shapes, train, trial_class, minutes):
    config = efficientdet_config(shapes)
    config["data"]["workers"] = 0
    config["hyperparameters"]["hang_minutes"] = minutes
    watched = []

    class Ending(trial_class):
        def after_batch(self, number):
            super().after_batch(number)
            watched.append("watch" in {thread.name for thread in threading.enumerate()})
            if number == 2:
                raise RuntimeError("ended")

    Ending.__module__ = "model_def"
    with pytest.raises(RuntimeError, match="ended"):
        train(Ending, config)
    assert watched == [minutes is not None] * 3
    assert "watch" not in {thread.name for thread in threading.enumerate()}


def processes_of(parent):
    """The training processes that torchrun started, by rank."""
    found = {}
    for child in psutil.Process(parent.pid).children():
        with contextlib.suppress(psutil.Error, KeyError):
            found[int(child.environ()["RANK"])] = child
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_stopped_is_named_also_where_it_is_the_chief(run_config, tmp_path, rank):
    length = {"searcher__max_length": {"batches": 10_000}, "min_validation_period": {"batches": 10_000}}
    config, run = run_config(**length, hyperparameters__hang_minutes=0.1), tmp_path / "run"
    process = start_run(config, run, processes=2)
    wait_for_batch(run, process, 6)
    os.kill(processes_of(process)[rank].pid, signal.SIGSTOP)
    _, errors = process.communicate(timeout=600)  # torchrun kills the one that is stopped after 30 seconds
    assert process.returncode != 0
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert f": rank {rank} does not answer since batch " in line
    assert f"[rank {1 - rank}] thread MainThread" in errors


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_suspended_and_continued_job_has_not_hung(run_config, tmp_path, count):
    config, run = run_config(hyperparameters__hang_minutes=0.1, searcher__max_length={"batches": 40}), tmp_path / "run"
    process = start_run(config, run, processes=count)
    wait_for_batch(run, process, 6)
    everybody = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in everybody:
        each.send_signal(signal.SIGSTOP)
    time.sleep(15)
    for each in everybody:
        each.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
