"""Trainings on two machines without a shared disk. One is lost, returns, or never comes."""

import collections
import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, WITHOUT_LIBRARY, reports, run_model_def
from machines import copy_code, machines, wait_until, why_none
from tiny_models import CONFIGS

from shared.training.checkpoints import read_checkpoint

pytestmark = pytest.mark.skipif(why_none() is not None, reason=str(why_none()))

PORT = 29611
BATCHES = 120  # that torchrun trains, while machines come and go
WITHOUT_FIGURES = ROOT / "tests/without_figures.py"
# a model_def.py that draws nothing, and prints which images are in which batch
NOTING = """
import os, signal, sys, time
sys.path.insert(0, os.getcwd())
import model_def
from without_figures import leave_out_figures
from shared.launch import main

leave_out_figures()
name = next(name for name in dir(model_def) if name.endswith("Trial") and name != "DetectionTrial")

class Noting(getattr(model_def, name)):
    def losses(self, model, batch):
        os.write(1, f"BATCH {self.batches_trained} {batch.image_ids}\\n".encode())
        time.sleep(float(os.environ.get("PAUSE", 0)))
        if self.batches_trained + 1 == int(os.environ.get("STOP_AFTER", 0)):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().losses(model, batch)

Noting.__module__ = "model_def"
main(Noting)
"""


@pytest.fixture
def nodes(tmp_path):
    """Two machines."""
    with machines(tmp_path) as made:
        yield made


@pytest.fixture
def prepare(nodes, shapes, tmp_path):
    """Puts a detector's code, the data and a config on both machines. Returns the config for this machine."""

    def call(detector="efficientdet", **changes):
        config = CONFIGS[detector](shapes)
        config["hyperparameters"] |= changes.pop("hyperparameters", {})
        config |= {"scheduling_unit": 1, **changes}
        here = tmp_path / "here.yaml"
        here.write_text(yaml.safe_dump(config))
        (tmp_path / "config.yaml").write_text(here.read_text().replace(str(shapes), "shapes"))
        (tmp_path / "noting.py").write_text(NOTING)
        for node in nodes:
            copy_code(
                node, detector, tmp_path / "config.yaml", tmp_path / "noting.py", ROOT / "tests/without_figures.py"
            )
            shutil.copytree(shapes, node.own / "code/shapes")
        return here

    return call


def start(nodes, *arguments, processes=1, chief=0, command=("train", "config.yaml", "--output-dir", "runs/a")):
    """Starts torchrun on each of these machines as one run. `chief` is the position of rank 0's machine."""
    for number, node in enumerate(nodes):
        rank = (number - chief) % len(nodes)
        place = ("--nnodes", len(nodes), "--nproc-per-node", processes, "--node-rank", rank)
        where = ("--master-addr", nodes[chief].name, "--master-port", PORT)
        node.torchrun("noting.py", *command, *arguments, options=(*place, *where), OMP_NUM_THREADS="1")


def stop(node, after):
    """Kills a machine's programs after some seconds if they still run."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        node.wait(after)
    node.lose()


def batches_in(*logs):
    """The images of each batch, over all ranks and starts."""
    found = collections.defaultdict(set)
    for log in logs:
        for number, ids in re.findall(r"BATCH (\d+) (\[[\d, ]*\])", log):
            found[int(number)] |= set(yaml.safe_load(ids))
    return found


def losses_of(run):
    return {report["batches"]: report["metrics"]["loss"] for report in reports(run, "train")}


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_two_machines_train_as_two_processes_and_the_chief_alone_writes(nodes, prepare, tmp_path):
    here = prepare(searcher={**CONFIGS["efficientdet"](tmp_path)["searcher"], "max_length": {"batches": 4}})
    before = files_below(nodes[1].own / "code")
    start(nodes)
    run_model_def("train", here, "--output-dir", tmp_path / "run", processes=2)
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].log + nodes[1].log
    run = nodes[0].own / "code/runs/a"
    assert losses_of(run) == pytest.approx(losses_of(tmp_path / "run"), rel=1e-4)
    assert read_checkpoint(run / "checkpoints/last").batches == 4
    images = batches_in(nodes[0].log, nodes[1].log)
    assert [len(images[number]) for number in range(4)] == [4] * 4
    written = {name for name in files_below(nodes[1].own / "code") - before if "__pycache__" not in name}
    assert written
    assert all(name.startswith("shapes/annotations/.") for name in written)  # its own caches, beside its own data


@pytest.mark.slow
def test_two_machines_evaluate_a_checkpoint_that_only_the_chief_has(nodes, prepare, tmp_path):
    here = prepare(searcher={**CONFIGS["efficientdet"](tmp_path)["searcher"], "max_length": {"batches": 4}})
    run_model_def("train", here, "--output-dir", tmp_path / "run", figures=False)
    run_model_def("evaluate", here, "--checkpoint", tmp_path / "run/checkpoints/last", "--output", tmp_path / "here")
    shutil.copytree(tmp_path / "run/checkpoints/last", nodes[0].own / "code/trained")
    evaluate = ("evaluate", "config.yaml", "--output", "evaluated", "--checkpoint")
    start(nodes, "trained", command=evaluate)
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].log + nodes[1].log
    folders = tmp_path / "here", nodes[0].own / "code/evaluated"
    metrics = [json.loads((folder / "metrics.json").read_text())["bbox_mAP"] for folder in folders]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)
    assert not (nodes[1].own / "code/evaluated").exists()

    start(nodes, "missing", command=evaluate)
    assert [node.wait() for node in nodes] == [1, 1]
    assert all("missing is not a checkpoint" in node.log for node in nodes), nodes[1].log


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["efficientdet", "mmdetection"])
def test_a_machine_killed_at_random_moments_changes_no_sample(nodes, prepare, tmp_path, detector):
    """Each start has two processes, on two machines or on one. A library's statistics are per process."""
    if detector in WITHOUT_LIBRARY:
        pytest.skip(WITHOUT_LIBRARY[detector])
    here = prepare(detector, hyperparameters={"hang_minutes": 0.5})
    began = time.monotonic()
    run_model_def("train", here, "--output-dir", tmp_path / "run", processes=2, cwd=ROOT / detector)
    seconds = 2 * (time.monotonic() - began)  # torchrun loads the libraries on each machine
    chance, logs, run = random.Random(7), [], "code/runs/a"

    def train(count, chief):
        on = nodes if count == 2 else [nodes[chief]]
        start(on, "--resume", "auto", processes=2 // count, chief=chief if count == 2 else 0)
        return on

    for kill in range(5):
        on = train(count=2 - kill % 2, chief=chance.randrange(2))
        lost = chance.choice(on)
        stop(lost, after=chance.uniform(0.2, 1.0) * seconds)
        for node in on:  # the rest stops by itself, unless its torchrun still waits for the other one
            stop(node, after=90)
        logs += [node.log for node in on]
    for chief in (0, 1):  # with one machine, and at last with two
        on = train(count=1 + chief, chief=chief)
        assert [node.wait() for node in on] == [0] * len(on), "\n".join(node.log for node in on)
        logs += [node.log for node in on]
    own = nodes[1].own / run
    assert losses_of(own) == pytest.approx(losses_of(tmp_path / "run"), rel=1e-4)
    ended = read_checkpoint(own / "checkpoints/last"), read_checkpoint(tmp_path / "run/checkpoints/last")
    assert ended[0].batches == ended[1].batches == 12
    images = batches_in(*logs)
    assert sorted(images) == list(range(12))
    assert [len(images[number]) for number in range(12)] == [4] * 12  # the same in each start: there are no others


def test_a_machine_that_never_comes_is_named(nodes, prepare):
    prepare(hyperparameters={"hang_minutes": 0.05})
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node-0", "MASTER_PORT": str(PORT)}
    nodes[0].start(sys.executable, "noting.py", "train", "config.yaml", "--output-dir", "runs/a", **variables)
    assert nodes[0].wait() == 1
    line = nodes[0].log.splitlines()[-1]
    assert line.startswith(
        "error: WORLD_SIZE: rank 1 of 2 did not come within 3 seconds; the others are on node-0. Fix"
    )


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["efficientdet", "mmdetection"])
def test_torchrun_continues_with_remaining_and_with_new_machines(nodes, prepare, tmp_path, detector):
    """The losses are those of a run that is stopped after the same batches, and continued with as many processes."""
    if detector in WITHOUT_LIBRARY:
        pytest.skip(WITHOUT_LIBRARY[detector])
    here = prepare(detector, searcher={**CONFIGS[detector](tmp_path)["searcher"], "max_length": {"batches": BATCHES}})

    def join(node):
        elastic = ("--nnodes", "1:2", "--nproc-per-node", 1, "--max-restarts", 5, "--rdzv-backend", "c10d")
        meet = ("--rdzv-id", "a", "--rdzv-endpoint", f"node-0:{PORT}", "--rdzv-conf", "last_call_timeout=5")
        train = ("train", "config.yaml", "--output-dir", "runs/a", "--resume", "auto")
        # with the store that it shares between starts, torchrun leaves a machine waiting that comes later
        alone = {"OMP_NUM_THREADS": "1", "PAUSE": "0.5", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        node.torchrun("noting.py", *train, options=(*elastic, *meet), **alone)

    def batches():
        found = batches_in(nodes[0].log)
        return max(found, default=0)

    logs = []
    for node in nodes:
        join(node)
    wait_until(lambda: batches() >= 10, of=nodes[:1])
    logs.append(nodes[1].log)
    nodes[1].lose()
    at_loss = batches()
    wait_until(lambda: batches() >= at_loss + 10, of=nodes[:1])
    assert nodes[0].log.count("resuming after batch") == 1
    join(nodes[1])
    assert nodes[0].wait(900) == 0, nodes[0].log
    resumed = [int(batch) for batch in re.findall(r"resuming after batch (\d+)", nodes[0].log)]
    assert len(resumed) == 2
    images = batches_in(nodes[0].log, *logs, nodes[1].log)
    assert [len(images[number]) for number in range(BATCHES)] == [4] * BATCHES

    script, run = tmp_path / "noting.py", tmp_path / "run"
    for processes, last in ((2, resumed[0]), (1, resumed[1]), (2, BATCHES)):
        stop = {"STOP_AFTER": str(last % BATCHES), "PYTHONPATH": str(ROOT / "tests")}
        arguments = ("train", here, "--output-dir", run, "--resume", "auto")
        run_model_def(
            *arguments, processes=processes, script=script, env=stop, check=last == BATCHES, cwd=ROOT / detector
        )
        assert read_checkpoint(run / "checkpoints/last").batches == last
    assert len(losses_of(run)) == BATCHES
    assert losses_of(nodes[0].own / "code/runs/a") == pytest.approx(losses_of(run), rel=1e-4)
