"""Machines that share only a bucket. If one is lost with its disk, the run continues from the bucket."""

import contextlib
import json
import random
import shutil
import sys

import pytest
import yaml
from conftest import ROOT, WITHOUT_LIBRARY, reports
from machines import copy_code, machines, wait_until, why_none
from stores import BUCKET
from tiny_models import CONFIGS

PORT = 9000
BATCHES = 48
PERIOD = 12  # batches between checkpoints
KILLS = 5
# serves an empty bucket, through a proxy that fails one request in ten, and is cut off for 20 s in the third save
STORE = """
import sys, tempfile, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from stores import Faults, one_in_ten, s3_store, with_faults
saves = []

def counted(path, command):
    if command == "PUT" and path.endswith("state_dict.pth"):
        saves.append(time.monotonic())
        if len(saves) == 3:
            print("cut off", flush=True)
    return True

def fault(number):
    return "away" if len(saves) >= 3 and time.monotonic() < saves[2] + 20 else one_in_ten(number)

faults = Faults(fault, counted=counted)
with s3_store(Path(tempfile.mkdtemp())) as s3, with_faults(s3, faults, sys.argv[2], int(sys.argv[3])):
    print("serving", flush=True)
    time.sleep(3600)
"""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_none() is not None, reason=f"needs machines: {why_none()}"),
]


@pytest.fixture(params=["efficientdet", "mmdetection"])
def detector(request):
    if request.param in WITHOUT_LIBRARY:
        pytest.skip(WITHOUT_LIBRARY[request.param])
    return request.param


def start(nodes, number, *arguments):
    """Starts one process on each of these machines. Each start has a new port, because a killed process may linger."""
    port = 29500 + number
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{nodes[0].name}:{port}", "--rdzv-id", "a")
    for node in nodes:
        options = ("--nnodes", str(len(nodes)), "--nproc-per-node", "1", *meeting)
        node.torchrun("train", "config.yaml", "--output-dir", "run", *arguments, options=options, **CREDENTIALS)


def trained(node):
    """The batches that the chief on this machine has reported."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return json.loads((node.own / "code/run/metrics.jsonl").read_text().splitlines()[-1])["batches"]
    return 0


def has_sent_a_checkpoint(node):
    """Whether the bucket has the last checkpoint of the chief on this machine."""
    checkpoints = node.own / "code/run/checkpoints"
    return (checkpoints / "last").exists() and not (checkpoints / ".uploading").exists()


def losses(run):
    found = [(report["batches"], report["metrics"]["loss"]) for report in reports(run) if report["split"] == "train"]
    assert [batch for batch, _ in found] == list(range(2, BATCHES + 1, 2))
    return [loss for _, loss in found]


def test_machines_that_share_a_bucket_alone_lose_nothing_but_batches(detector, shapes, tmp_path):
    """Kills a machine at random moments, deletes both disks, and continues on one machine or on two."""
    choose = random.Random(5)
    with machines(tmp_path, 3) as (*nodes, store):
        (store.own / "code/store.py").write_text(STORE)
        store.start(sys.executable, "store.py", ROOT / "tests", store.address, PORT)
        config = CONFIGS[detector](nodes[0].disk / "code" / shapes.name)
        config["searcher"]["max_length"] = {"batches": BATCHES}
        config |= {key: {"batches": PERIOD} for key in ("min_validation_period", "min_checkpoint_period")}
        config["data"] |= {"workers": 0, "endpoint_url": f"http://{store.address}:{PORT}"}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        for node in nodes:
            copy_code(node, detector, shapes, tmp_path / "config.yaml")
        wait_until(lambda: "serving" in store.log, of=(store,))

        start(nodes, 0)
        assert [node.wait() for node in nodes] == [0, 0], nodes[0].log
        whole = losses(nodes[0].own / "code/run")

        begun = 0
        for kill in range(KILLS):
            for node in nodes:
                shutil.rmtree(node.own / "code/run", ignore_errors=True)
            used = nodes if kill % 2 == 0 else nodes[:1]
            start(used, 1 + kill, "--store", f"s3://{BUCKET}/runs/a", "--resume", "auto")
            at = min(begun + choose.randint(PERIOD, 2 * PERIOD), BATCHES - 1)
            wait_until(lambda used=used, at=at: trained(used[0]) >= at, of=used)
            if kill % 2 == 0:  # else an upload may be cut off
                wait_until(lambda used=used: has_sent_a_checkpoint(used[0]), of=used)
            choose.choice(used).lose()
            for node in used:
                node.lose()
            begun = at - at % PERIOD
        for node in nodes:
            shutil.rmtree(node.own / "code/run", ignore_errors=True)
        start(nodes, 1 + KILLS, "--store", f"s3://{BUCKET}/runs/a", "--resume", "auto")
        assert [node.wait() for node in nodes] == [0, 0], nodes[0].log
        assert "continuing batch" in nodes[0].log
        assert "cut off" in store.log
        assert losses(nodes[0].own / "code/run") == pytest.approx(whole, rel=1e-4)
