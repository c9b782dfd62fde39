"""Data in buckets and behind a web server: reads, failures, copies."""

import contextlib
import os
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import reports
from stores import BUCKET, Faults, gcs_store, http_store, refusing, s3_store, with_faults
from tiny_models import CONFIGS, efficientdet_config, trial_classes

from shared.config.experiment import parse_data
from shared.config.schema import StoreOptions
from shared.data import remote
from shared.data.dataset import CocoDetection, SampleKey
from shared.data.open import open_split
from shared.data.remote import RemoteImages, StoreError
from shared.data.storage import CachedImages
from shared.errors import UserError
from shared.training.checkpoints import load_state


@pytest.fixture(autouse=True)
def credentials(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


@contextlib.contextmanager
def serving(kind, folder):
    """The `data` section for the content of `folder` in that kind of store."""
    packages = {"s3": ("s3fs", "moto", "boto3"), "gcs": ("gcsfs", "gcp_storage_emulator"), "http": ("aiohttp",)}[kind]
    for package in packages:
        pytest.importorskip(package)
    with {"s3": s3_store, "gcs": gcs_store, "http": http_store}[kind](folder) as endpoint:
        data = {"store_timeout": 60, "workers": 2}
        if kind == "http":
            data |= splits(f"{endpoint}/")
        else:
            data |= {
                "backend": kind,
                "bucket": BUCKET,
                "endpoint_url": endpoint,
                "anonymous": kind == "gcs",
                **splits(""),
            }
        yield data


def splits(place):
    return {
        split: {"annotations": f"{place}annotations/{split}.json", "images": f"{place}{split}"}
        for split in ("train", "val")
    }


def opened(data, split="train"):
    return open_split(parse_data({"data": data}), split)


def as_sample(image, record):
    return np.asarray(image), record.boxes, record.labels, record.image_id


def samples(split_data):
    data = CocoDetection(split_data.annotations, split_data.images, as_sample, seed=0, training=True)
    loader = torch.utils.data.DataLoader(
        data, batch_size=4, sampler=[SampleKey(0, i) for i in range(len(data))], num_workers=2, collate_fn=list
    )
    return [sample for batch in loader for sample in batch]


@pytest.mark.parametrize("kind", ["s3", "gcs", "http"])
def test_a_store_gives_what_the_disk_gives(kind, shapes):
    with serving(kind, shapes) as data:
        remote = samples(opened(data))
    on_disk = samples(opened(splits(f"{shapes}/")))
    assert len(remote) == len(on_disk) == 24
    for ours, expected in zip(remote, on_disk, strict=True):
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_local_annotations_with_images_in_a_public_bucket(shapes, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with serving("s3", shapes) as data:
        mixed = {"annotations": str(shapes / "annotations/val.json"), "images": f"s3://{BUCKET}/val"}
        public = {"val": mixed, "endpoint_url": data["endpoint_url"], "store_timeout": 40}
        with pytest.raises(StoreError, match=r"data\.val\.images: s3://.*credentials.*AWS_ACCESS_KEY_ID"):
            opened(public, "val")
        assert len(samples(opened({**public, "anonymous": True}, "val"))) == 10


@pytest.mark.parametrize("kind", ["s3", "gcs", "http"])
def test_images_missing_in_the_store_are_named_before_training(kind, shapes):
    with serving(kind, shapes) as data:
        place = data["train"]["images"].removesuffix("train")
        wrong = {**data, "train": {**data["train"], "annotations": f"{place}annotations/nope.json"}}
        with pytest.raises(UserError, match=r"data\.train\.annotations: \S+annotations/nope.json does not exist"):
            opened(wrong)
        wrong = {**data, "train": {**data["train"], "images": f"{place}nowhere"}}
        with pytest.raises(UserError, match=r"data\.train\.images \(\S+nowhere\): \d+ of the 24 images"):
            opened(wrong)


def test_permanent_store_errors_stop_at_once_with_one_line(shapes, monkeypatch):
    """A missing bucket, a refused login, an unsupported protocol, a port without a server. A store that has answered
    before is retried."""
    monkeypatch.setattr(remote, "_PAUSES_TO_CONNECT", (0.01, 0))
    patient = {"store_timeout": 3600}  # whoever waits for these stores waits for longer than this test may take
    with serving("s3", shapes) as data:
        data |= patient
        wrong = {**data, **splits(f"s3://no{BUCKET}/")}
        with pytest.raises(UserError, match=f"there is no bucket 'no{BUCKET}'. Fix: correct the bucket$"):
            opened(wrong)
        images = {**data["train"], "images": f"s3://no{BUCKET}/train"}
        with pytest.raises(
            UserError, match=rf"data\.train\.images: .* there is no bucket 'no{BUCKET}'. Fix: correct the bucket$"
        ):
            opened({**data, "train": images})
    with refusing() as endpoint, pytest.raises(UserError, match=r"Forbidden\)\. Fix: set AWS_ACCESS_KEY_ID and"):
        opened({**data, **patient, "endpoint_url": endpoint})
    for place, port in (("s3://bucket/", {"endpoint_url": "http://127.0.0.1:9"}), ("http://127.0.0.1:9/", {})):
        with pytest.raises(
            UserError, match=r"nothing answers at 127.0.0.1, port 9 \(Connection refused\)\. Fix: correct "
        ):
            opened({**splits(place), **port, **patient})
    with pytest.raises(UserError, match=r"ftp:// is not supported. Fix: use a path on disk, or one of s3://, gs://"):
        opened(splits("ftp://host/"))
    with pytest.raises(UserError, match=r"data\.train\.images: az://.* az:// is not supported"):
        opened({"train": {"annotations": str(shapes / "annotations/train.json"), "images": "az://container/train"}})
    away = False
    with http_store(shapes) as url, with_faults(url, Faults(lambda number: "away" if away else None)) as proxy:
        opened(splits(f"{proxy}/"))
        away = True
        with pytest.raises(UserError, match="cannot be read, for 1 seconds"):
            opened({**splits(f"{proxy}/"), "store_timeout": 1})


def test_annotations_of_a_url_are_parsed_again_when_the_file_has_changed(shapes, tmp_path):
    folder = shutil.copytree(shapes, tmp_path / "data")
    with http_store(folder) as url:
        data = {**splits(f"{url}/"), "cache_dir": str(tmp_path / "cache")}
        assert len(opened(data).annotations) == 24
        assert len(opened(data).annotations) == 24
        shutil.copy(folder / "annotations/val.json", folder / "annotations/train.json")
        shutil.copytree(folder / "val", folder / "train", dirs_exist_ok=True)
        assert len(opened(data).annotations) == 10


@pytest.mark.parametrize("kind", ["s3", "gcs", "http"])
def test_reads_that_fail_are_made_again(kind, shapes):
    # "short" cannot be told from a whole file by a web server's answer alone
    kinds = {3: "error", 7: "reset", 11: "cut", 15: "late", 19: "short" if kind != "http" else "cut"}
    faults = Faults(kinds.get, late=8)
    with serving(kind, shapes) as data, contextlib.ExitStack() as stack:
        endpoint = data.get("endpoint_url") or data["train"]["images"].removesuffix("/train")
        proxy = stack.enter_context(with_faults(endpoint, faults))
        data = {**data, "endpoint_url": proxy} if kind != "http" else splits(f"{proxy}/")
        split_data = opened({**data, "store_timeout": 16})
        faults.reads, faults.made = 0, []  # the check before training may read some
        for name in sorted((shapes / "train").iterdir()):
            assert split_data.images.read(name.name) == name.read_bytes()
    assert faults.made == list(kinds.values())


def test_training_through_faults_ends_with_the_same_weights(shapes, train):
    from model_def import EfficientDetTrial

    config = efficientdet_config(shapes)
    config["searcher"]["max_length"] = {"batches": 8}
    config["data"]["workers"] = 0
    whole = train(EfficientDetTrial, config, "whole")
    faults = Faults(lambda number: {4: "error", 9: "reset", 14: "cut", 23: "short"}.get(number % 24))
    with serving("s3", shapes) as data, with_faults(data["endpoint_url"], faults) as proxy:
        config["data"] = {**data, "endpoint_url": proxy, "workers": 0}
        faulty = train(EfficientDetTrial, config, "faulty")
    assert len(faults.made) > 4
    ours, expected = (
        load_state(run / "checkpoints/last/state_dict.pth")["models_state_dict"][0] for run in (faulty, whole)
    )
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_an_unreachable_store_is_an_error_and_the_run_resumes_later(shapes, train):
    from model_def import EfficientDetTrial

    config = efficientdet_config(shapes)
    config["searcher"]["max_length"] = {"batches": 8}
    config["data"]["workers"] = 0
    config["min_checkpoint_period"] = config["min_validation_period"] = {"batches": 2}
    whole = train(EfficientDetTrial, config, "whole")
    away = False
    faults = Faults(lambda number: "away" if away else None)
    with serving("s3", shapes) as data, with_faults(data["endpoint_url"], faults) as proxy:
        config["data"] = {**data, "endpoint_url": proxy, "store_timeout": 12, "workers": 0}

        class Probe(EfficientDetTrial):
            def after_batch(self, number):
                nonlocal away
                super().after_batch(number)
                away = number >= 4

        with pytest.raises(UserError, match=rf"s3://{BUCKET}/\S+ cannot be read, for 12 seconds"):
            train(Probe, config, "away")
        away = False
        run = train(EfficientDetTrial, config, "away", resume="last")
    ours, expected = (load_state(r / "checkpoints/last/state_dict.pth")["models_state_dict"][0] for r in (run, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_each_detector_trains_from_a_bucket(detector, shapes, train):
    config = CONFIGS[detector](shapes)
    config["searcher"]["max_length"] = {"batches": 2}
    with serving("s3", shapes) as data:
        config["data"] = {**data, "workers": 0}
        if detector == "mmdetection":  # model-hub's name for it
            del config["data"]["backend"], config["data"]["bucket"]
            config["data"]["file_client_args"] = {"backend": "s3", "bucket_name": BUCKET}
        run = train(trial_classes()[detector], config)
    assert {report["split"] for report in reports(run)} == {"train", "val"}


# --- copies kept on disk ----------------------------------------------------------------------------


class Counting(RemoteImages):
    """Files of 1,000 bytes that count their reads."""

    def __init__(self):
        super().__init__("s3://store", StoreOptions())
        self.count = {}

    def read(self, file_name):
        self.count[file_name] = self.count.get(file_name, 0) + 1
        return file_name.encode().ljust(1000, b".")


def test_the_second_epoch_reads_from_disk(shapes, tmp_path):
    faults = Faults(lambda number: None)
    with http_store(shapes) as url, with_faults(url, faults) as proxy:
        data = {**splits(f"{proxy}/"), "cache_dir": str(tmp_path / "cache"), "workers": 2}
        first = samples(opened(data))
        downloads = faults.downloads
        second = samples(opened(data))
        assert faults.downloads == downloads > 0
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def reading(url, tmp_path, limit=10**6, **since):
    """The images as a new run reads them, with the copies of earlier runs."""
    return CachedImages(RemoteImages(url, StoreOptions()), tmp_path / "cache", limit, **since)


def test_an_image_that_a_web_server_replaced_is_read_again_in_the_next_run(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web/a.png").write_bytes(b"first")
    faults = Faults(lambda number: None)
    with http_store(tmp_path / "web") as web, with_faults(web, faults) as url:
        run = reading(url, tmp_path)
        assert run.read("a.png") == b"first"
        (tmp_path / "web/a.png").write_bytes(b"other")  # of the same length
        os.utime(tmp_path / "web/a.png", (1, 1))  # as files from an archive are: older than the copy
        asked = faults.reads
        assert run.read("a.png") == b"first"  # one run, one version
        assert faults.reads == asked
        following = reading(url, tmp_path)
        assert [following.read("a.png") for _ in range(2)] == [b"other"] * 2
        assert reading(url, tmp_path).read("a.png") == b"other"
        assert faults.downloads == 2
        (tmp_path / "web/a.png").unlink()
        with pytest.raises(FileNotFoundError):
            reading(url, tmp_path).read("a.png")


def test_each_run_asks_a_web_server_once_for_an_image(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web/a.png").write_bytes(b"first")
    faults = Faults(lambda number: None)
    with http_store(tmp_path / "web") as web, with_faults(web, faults) as url:
        for run in range(3):
            images = reading(url, tmp_path)
            for _ in range(4):
                images.read("a.png")
            assert (faults.downloads, faults.reads - faults.downloads) == (1, run + 1)


def test_a_copy_of_another_version_leaves_a_full_folder(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web/a.png").write_bytes(b"." * 100)
    with http_store(tmp_path / "web") as url:
        reading(url, tmp_path, limit=150).read("a.png")
        assert len(copies(tmp_path)) == 1
        (tmp_path / "web/a.png").write_bytes(b"." * 200)
        assert len(reading(url, tmp_path, limit=150).read("a.png")) == 200
        assert copies(tmp_path) == []
        (tmp_path / "web/a.png").write_bytes(b"." * 90)
        reading(url, tmp_path, limit=150).read("a.png")
        assert len(copies(tmp_path)) == 1


def test_a_copy_without_a_version_is_read_again_from_a_web_server(tmp_path):
    """Earlier releases left such copies."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web/a.png").write_bytes(b"." * 100)
    with http_store(tmp_path / "web") as url:
        reading(url, tmp_path, since=None).read("a.png")
        (tmp_path / "web/a.png").write_bytes(b"+" * 100)
        assert reading(url, tmp_path, since=None).read("a.png") == b"." * 100
        assert reading(url, tmp_path).read("a.png") == b"+" * 100


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_full_cache_keeps_its_files(share, tmp_path):
    store, names = Counting(), [f"{number}.png" for number in range(100)]
    rng = np.random.default_rng(0)
    for epoch in range(3):
        # 1,000 bytes and a checksum each; a restarted run uses the same folder
        cached = CachedImages(store, tmp_path / "cache", limit=int(share * len(names) * 1004))
        for name in rng.permutation(names):
            cached.read(str(name))
        read = sum(store.count.values())
        assert read == 100 + epoch * round(100 * (1 - share))
    assert sum(file.stat().st_size for file in copies(tmp_path)) == share * 100 * 1004


def test_a_smaller_limit_keeps_copies_and_recounts_them_after_a_day(tmp_path):
    store = Counting()
    for number in range(10):
        CachedImages(store, tmp_path / "cache", limit=10_040).read(f"{number}.png")
    small = CachedImages(store, tmp_path / "cache", limit=5_000)
    for name in ("0.png", "a.png", "9.png"):
        small.read(name)
    assert len(copies(tmp_path)) == 10
    assert sum(store.count.values()) == 11
    for file in copies(tmp_path):
        file.unlink()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / "cache/total", (two_days_ago, two_days_ago))
    small.read("b.png")
    assert len(copies(tmp_path)) == 1


def copies(folder):
    return list((folder / "cache").glob("[0-9a-f][0-9a-f]/*"))


def test_git_and_backups_skip_the_copies(tmp_path):
    CachedImages(Counting(), tmp_path / "cache", limit=10**6).read("a.png")
    assert (tmp_path / "cache/.gitignore").read_text() == "*\n"
    assert (tmp_path / "cache/CACHEDIR.TAG").is_file()


def test_an_incomplete_copy_is_ignored(tmp_path):
    store = Counting()
    cached = CachedImages(store, tmp_path / "cache", limit=10**6)
    data = cached.read("a.png")
    (copy,) = copies(tmp_path)
    for damaged in (copy.read_bytes()[:500], b"", b"\0" * 1004):
        copy.write_bytes(damaged)
        assert cached.read("a.png") == data
    assert store.count["a.png"] == 4


def _read_all(cached, names, results):
    results.put([len(cached.read(name)) for name in names])


def test_processes_that_fill_the_folder_at_once_agree(tmp_path):
    import multiprocessing

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    names = [f"{number}.png" for number in range(30)]
    cached = CachedImages(Counting(), tmp_path / "cache", limit=20_000)
    processes = [context.Process(target=_read_all, args=(cached, names, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=600) for _ in processes] == [[1000] * 30] * 4
    for process in processes:
        process.join()
    assert sum(file.stat().st_size for file in copies(tmp_path)) <= 20_000


def test_without_a_writable_cache_images_come_from_the_store(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    cached = CachedImages(Counting(), tmp_path / "file" / "cache", limit=10**6)
    assert [len(cached.read(name)) for name in ("a.png", "b.png")] == [1000, 1000]
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1
