"""`--store`: a run's copy in a bucket or on another disk, after each kind of fault."""

import hashlib
import itertools
import json
import time

import pytest
import yaml
from conftest import reports, run_command
from stores import BUCKET, Faults, gcs_store, one_in_ten, s3_store, with_faults
from test_resume import assert_same_bits, final_state
from tiny_models import efficientdet_config
from without_figures import leave_out_figures

from shared.commands.train import train_locally
from shared.config.schema import StoreOptions
from shared.data import remote
from shared.data.remote import StoreError
from shared.data.storage import FolderPlace, open_place
from shared.errors import UserError
from shared.training.downloads import find_checkpoint
from shared.training.run_folder import RunFolder
from shared.training.run_store import RunStore
from shared.training.saving import check_manifest, write_manifest

TIMINGS = ("images_per_second", "data_wait")


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "unused")


@pytest.fixture
def s3(tmp_path):
    """The endpoint of an empty S3."""
    for package in ("s3fs", "moto", "boto3"):
        pytest.importorskip(package)
    (tmp_path / "empty").mkdir()
    with s3_store(tmp_path / "empty") as endpoint:
        yield endpoint


def config_of(shapes):
    config = efficientdet_config(shapes)
    config["searcher"]["max_length"] = {"batches": 8}
    config["data"]["workers"] = 0
    return config


@pytest.fixture
def config(shapes):
    """A run of 8 batches with checkpoints after 4 and 8."""
    return config_of(shapes)


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    """The folder of the same run, uninterrupted and without a store."""
    from model_def import EfficientDetTrial

    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of(shapes)))
    with pytest.MonkeyPatch.context() as patch:
        leave_out_figures(patch.setattr)
        run_command(train_locally, EfficientDetTrial, folder / "config.yaml", output_dir=folder / "run", resume=None)
    return folder / "run"


def crash_after(trial_class, number, before_crash=lambda: None):
    class Crashing(trial_class):
        def after_batch(self, batch):
            super().after_batch(batch)
            if batch == number:
                before_crash()
                raise RuntimeError("crash")

    Crashing.__module__ = trial_class.__module__
    return Crashing


def numbers(run):
    """All numbers that a run reported, without timings."""
    return [
        {**report, "metrics": {key: value for key, value in report["metrics"].items() if key not in TIMINGS}}
        for report in reports(run)
    ]


def assert_a_fresh_machine_continues(train, trial_class, config, store, whole, before_crash=lambda: None):
    """Crashes after batch 6 on one machine, continues in another folder, and compares with a run without a store."""
    with pytest.raises(RuntimeError, match="crash"):
        train(crash_after(trial_class, 6, before_crash), config, "machine_a", store=store)
    run = train(trial_class, config, "machine_b", resume="auto", store=store)
    assert_same_bits(final_state(run), final_state(whole))
    assert numbers(run) == numbers(whole)
    again = train(trial_class, config, "machine_c", resume="auto", store=store)  # it is complete
    assert_same_bits(final_state(again), final_state(whole))
    assert numbers(again) == numbers(whole)
    for name in ("best", "last"):
        check_manifest(again / "checkpoints" / name)


def test_a_fresh_machine_continues_from_another_disk_to_the_same_bits(train, trial_class, config, whole, tmp_path):
    place = tmp_path / "mounted/runs/a"
    assert_a_fresh_machine_continues(train, trial_class, config, str(place), whole)
    index = json.loads((place / "checkpoints/index.json").read_text())
    assert {entry["batches"] for entry in index.values()} <= {4, 8}
    folders = {path.name for path in (place / "checkpoints").iterdir() if path.is_dir()}
    assert folders == {entry["folder"] for entry in index.values()}
    assert {"metrics.jsonl", "config.yaml", "tensorboard"} <= {path.name for path in place.iterdir()}
    assert sorted(path.name for path in (tmp_path / "machine_c/checkpoints").iterdir()) == ["best", "last"]


def test_a_bucket_that_fails_one_request_in_ten_keeps_a_run(s3, tmp_path):
    faults = Faults(one_in_ten, counted=lambda path, command: True)
    with with_faults(s3, faults) as endpoint:
        options = StoreOptions(endpoint_url=endpoint, timeout=20)
        assert_a_run_is_kept(open_place(f"s3://{BUCKET}/runs/small", options), tmp_path)
    assert len(faults.made) >= 3


@pytest.mark.slow
def test_a_fresh_machine_continues_from_a_bucket_with_faults(train, trial_class, config, whole, s3):
    faults = Faults(one_in_ten, counted=lambda path, command: True)
    with with_faults(s3, faults) as endpoint:
        config["data"] |= {"endpoint_url": endpoint}
        assert_a_fresh_machine_continues(train, trial_class, config, f"s3://{BUCKET}/runs/a", whole)
    assert {"error", "reset", "lost"} == set(faults.made)


@pytest.mark.slow
def test_a_store_that_is_cut_off_in_a_save_delays_nothing(train, trial_class, config, whole, s3, caplog):
    """The store is away for 20 s, more than twice the time that one request is repeated."""
    cut_off, was_away = [], []

    def is_away():
        return bool(cut_off) and time.monotonic() < cut_off[0] + 20

    def of(number):
        return "away" if is_away() else None

    def wait_until_it_is_back():  # two batches after the save
        while not cut_off:
            time.sleep(0.1)
        was_away.append(is_away())
        while is_away():
            time.sleep(0.1)

    def is_weights(path, command):
        if command == "PUT" and path.endswith("state_dict.pth") and not cut_off:
            cut_off.append(time.monotonic())
        return True

    with with_faults(s3, Faults(of, counted=is_weights)) as endpoint:
        config["data"] |= {"endpoint_url": endpoint, "store_timeout": 8}
        place = f"s3://{BUCKET}/runs/cut_off"
        assert_a_fresh_machine_continues(train, trial_class, config, place, whole, wait_until_it_is_back)
    assert was_away == [True]
    assert "uploads are repeated until it answers" in caplog.text


def test_a_run_in_a_bucket_of_gcs(tmp_path):
    for package in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(package)
    (tmp_path / "empty").mkdir()
    with gcs_store(tmp_path / "empty") as endpoint:
        place = open_place(f"gs://{BUCKET}/runs/a", StoreOptions(endpoint_url=endpoint, timeout=20))
        assert_a_run_is_kept(place, tmp_path)


# --- the order of the writes --------------------------------------------------------------------------


def saved(folder, batches, is_best):
    """Saves a small checkpoint as a run does."""
    folder.saving.mkdir(parents=True, exist_ok=True)
    new = folder.saving / "last"
    (new / "code").mkdir(parents=True)
    (new / "code/model_def.py").write_text("pass\n")
    (new / "state_dict.pth").write_bytes(hashlib.sha256(str(batches).encode()).digest() * 10)
    (new / "metadata.json").write_text(json.dumps({"steps_completed": batches}))
    write_manifest(new, batches)
    folder.append_report(batches, "val", {"bbox_mAP": batches / 100})
    folder.keep(new, is_best)


def whole_batches(folder):
    """The batches of the folder's checkpoints, which must be complete."""
    found = {}
    for name in ("best", "last"):
        if (folder.checkpoints / name).exists():
            check_manifest(folder.checkpoints / name)
            found[name] = json.loads((folder.checkpoints / name / "metadata.json").read_text())["steps_completed"]
    return found


def train_and_store(place, folder, waits=True):
    """Two checkpoints; the first is the best.

    Args:
        waits: until a checkpoint is in the store, before the next one.
    """
    store = RunStore(place, folder)
    store.take(None)
    with store:
        store.begin()
        for batches, is_best in ((4, True), (8, False)):
            saved(folder, batches, is_best)
            store.add_checkpoint(is_best)
            if waits:
                store.wait()


def fetched(place, path):
    """The folder of a fresh machine that continues from a store."""
    folder = RunFolder(path)
    folder.saving.mkdir(parents=True)
    RunStore(place, folder).take("auto")
    return folder


def assert_a_run_is_kept(place, tmp_path):
    train_and_store(place, RunFolder(tmp_path / "a"))
    folder = fetched(place, tmp_path / "b")
    assert whole_batches(folder) == {"best": 4, "last": 8}
    assert [report["batches"] for report in folder.reports()] == [4, 8]


def test_best_and_last_of_a_store_are_checkpoints(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number, run in enumerate((f"s3://{BUCKET}/runs/best", str(tmp_path / "disk/a"))):
        train_and_store(open_place(run, StoreOptions(timeout=20)), RunFolder(tmp_path / f"run_{number}"))
        for which, batches in (("best", 4), ("last", 8), ("last", 8)):
            folder = find_checkpoint(f"{run}/checkpoints/{which}")
            check_manifest(folder)
            assert json.loads((folder / "metadata.json").read_text())["steps_completed"] == batches
    with pytest.raises(UserError, match=f"s3://{BUCKET}/runs/none holds no checkpoint 'best'"):
        find_checkpoint(f"s3://{BUCKET}/runs/none/checkpoints/best")


class Killed(Exception):
    pass


class CutOff(FolderPlace):
    """A disk that fails after a number of writes and deletions."""

    def __init__(self, root, left, error):
        super().__init__(root)
        object.__setattr__(self, "left", itertools.count(left, -1))
        object.__setattr__(self, "error", error)

    def _count(self):
        if next(self.left) <= 0:
            raise self.error

    def write(self, name, data):
        self._count()
        super().write(name, data)

    def send(self, path, name):
        self._count()
        super().send(path, name)

    def delete(self, folder):
        self._count()
        super().delete(folder)


def test_a_kill_at_any_write_to_a_store_leaves_complete_checkpoints(tmp_path):
    seen = set()
    for number in range(1, 40):
        root = tmp_path / f"store_{number}"
        is_complete = True
        try:
            train_and_store(CutOff(root, number, Killed()), RunFolder(tmp_path / f"a_{number}"))
        except Killed:
            is_complete = False
        found = whole_batches(fetched(FolderPlace(root), tmp_path / f"b_{number}"))
        seen.add(tuple(sorted(found.items())))
        if is_complete:
            break
    assert is_complete
    assert seen == {(), (("best", 4), ("last", 4)), (("best", 4), ("last", 8))}


def test_the_next_start_deletes_what_a_killed_upload_left(tmp_path):
    place = FolderPlace(tmp_path / "store")
    folder = RunFolder(tmp_path / "a")
    train_and_store(place, folder)
    place.write("checkpoints/batch-12-unfinished/state_dict.pth", b"half")
    store = RunStore(place, folder)
    store.take("auto")
    with store:
        store.begin()
    folders = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "store/checkpoints").iterdir())
    assert folders == ["", "batch-4", "batch-8"]


def test_a_store_that_stays_away_ends_a_run_with_what_it_lacks(tmp_path):
    place = CutOff(tmp_path / "store", 1, StoreError("it is away"))
    with pytest.raises(UserError) as failed:
        train_and_store(place, RunFolder(tmp_path / "a"), waits=False)
    assert str(failed.value).startswith("--store: best (batch 4), last (batch 8), metrics.jsonl: not in ")
    assert "it is away" in str(failed.value)
    assert "--resume auto" in str(failed.value)
    store = RunStore(FolderPlace(tmp_path / "store"), RunFolder(tmp_path / "a"))
    store.take("auto")
    with store:
        store.begin()
    assert whole_batches(fetched(FolderPlace(tmp_path / "store"), tmp_path / "b")) == {"best": 4, "last": 8}


def test_the_folder_or_the_store_continues_whichever_is_ahead(tmp_path):
    place = FolderPlace(tmp_path / "store")
    train_and_store(place, RunFolder(tmp_path / "a"))
    behind, ahead = RunFolder(tmp_path / "behind"), RunFolder(tmp_path / "ahead")
    for folder, batches in ((behind, 6), (ahead, 10)):
        saved(folder, batches, is_best=True)
        RunStore(place, folder).take("auto")
    assert whole_batches(behind) == {"best": 4, "last": 8}
    assert whole_batches(ahead) == {"best": 10, "last": 10}


def test_a_later_start_takes_the_store_over(tmp_path):
    place, folder = FolderPlace(tmp_path / "store"), RunFolder(tmp_path / "a")
    first = RunStore(place, folder)
    first.take(None)
    later = RunStore(place, RunFolder(tmp_path / "b"))
    later.take("auto")
    saved(folder, 4, is_best=True)
    first.add_checkpoint(is_best=True)
    with pytest.raises(UserError, match="a later start of the run owns"):
        first.wait()
    assert not (tmp_path / "store/checkpoints").exists()


def test_a_store_that_holds_a_run_needs_resume(tmp_path):
    place = FolderPlace(tmp_path / "store")
    train_and_store(place, RunFolder(tmp_path / "a"))
    with pytest.raises(UserError, match=r"--store: .* holds a run already. Fix: add `--resume auto`"):
        RunStore(place, RunFolder(tmp_path / "b")).take(None)


def test_a_store_where_nothing_can_be_written_is_refused(refused, run_config, monkeypatch):
    for store in ("https://host/run", "s3://bucket", "ftp://host/run"):
        assert refused("train", run_config(), "--store", store).startswith(f"error: --store: {store!r} is not a folder")
    monkeypatch.setattr(remote, "_PAUSES_TO_CONNECT", (0.01, 0))
    nowhere = ("--set", "data.endpoint_url=http://127.0.0.1:9", "--store", "s3://bucket/run")
    assert "nothing answers at 127.0.0.1, port 9" in refused("train", run_config(), *nowhere)
