"""The check that the images exist: done once, remembered, repeated after a change."""

import json
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest
from stores import BUCKET, s3_store

from shared.config.experiment import parse_data
from shared.config.schema import StoreOptions
from shared.data import remote, storage
from shared.data.cache import find, folders_of
from shared.data.open import open_split
from shared.data.remote import RemoteImages
from shared.errors import UserError


@pytest.fixture
def data(shapes, tmp_path):
    """A `data` section of the validation shapes, in the test's own folder."""
    folder = shutil.copytree(shapes, tmp_path / "data", ignore=lambda *_: [".val.json.columns", ".train.json.columns"])
    return {"val": {"annotations": str(folder / "annotations/val.json"), "images": str(folder / "val")}}


@pytest.fixture
def looks(monkeypatch, tmp_path):
    """How often folders and buckets were listed, over all processes."""
    file = tmp_path / "looks"
    file.touch()

    def count(module, name):
        real = getattr(module, name)

        def counting(*arguments):
            with file.open("a") as appended:
                appended.write("x")
            return real(*arguments)

        monkeypatch.setattr(module, name, counting)

    count(storage.DiskImages, "look")
    count(remote.RemoteImages, "look")
    return lambda: len(file.read_text())


def opened(data, **changes):
    return open_split(parse_data({"data": {**data, **changes}}), "val")


def images_of(data):
    return data["val"]["images"]


def test_a_checked_folder_is_checked_again_only_after_a_change(data, looks):
    for _ in range(3):
        opened(data)
    assert looks() == 1
    open(f"{images_of(data)}/another.png", "w").close()
    opened(data)
    opened(data)
    assert looks() == 2
    os.unlink(f"{images_of(data)}/000003.png")
    for _ in range(2):  # what failed is not remembered
        with pytest.raises(UserError, match=r"1 of the 10 .* is 000003\.png\. Fix: .* data\.on_bad_image: skip"):
            opened(data)
    assert looks() == 4


def test_a_changed_annotation_file_is_looked_at_with_its_own_names(data, looks):
    opened(data)
    path = data["val"]["annotations"]
    with open(path) as file:
        coco = json.load(file)
    coco["images"][2]["file_name"] = "nowhere.png"
    with open(path, "w") as file:
        json.dump(coco, file)
    with pytest.raises(UserError, match=r"1 of the 10 images .* the first is nowhere\.png"):
        opened(data)
    assert looks() == 2


def test_subfolders_count_and_names_need_not_be_plain(data, looks, tmp_path):
    folder = images_of(data)
    for name in ("a/b/000001.png", "a/000002.png", "c/000004.png"):
        os.makedirs(os.path.dirname(f"{folder}/{name}"), exist_ok=True)
        os.rename(f"{folder}/{name[-10:]}", f"{folder}/{name}")
    with open(data["val"]["annotations"]) as file:
        coco = json.load(file)
    for number, name in ((1, "a//b/./000001.png"), (2, "./a/000002.png"), (4, "c/000004.png")):
        coco["images"][number]["file_name"] = name
    with open(data["val"]["annotations"], "w") as file:
        json.dump(coco, file)
    opened(data)
    opened(data)
    assert looks() == 1
    os.rename(f"{folder}/a/b", f"{folder}/a/d")
    with pytest.raises(UserError, match=r"1 of the 10 images .* the first is a/b/000001\.png"):
        opened(data)
    os.rename(f"{folder}/a/d", f"{folder}/a/b")
    opened(data)
    shutil.rmtree(f"{folder}/c")
    with pytest.raises(UserError, match=r"1 of the 10 images .* the first is c/000004\.png"):
        opened(data)


@pytest.mark.parametrize(
    ("file", "named", "said"),
    [
        ("000003.PNG", "000003.png", r"'000003.PNG' is there, not '000003.png'"),
        ("a/3.png", "a\\3.png", r"'a/3.png' is there, not .*`python3 .* convert coco"),
        ("3.png", "val\\3.png", r"'3.png' is there, not .*`python3 .* convert coco"),
        ("é 0.png", "%C3%A9%200.png", r"'é 0.png' is there, not .*`python3 .* convert coco"),
        ("in/3.png", "3.png", r"/val/in/3.png is there\. Fix: give `images: \S+/val/in`"),
        ("3.png", "val/3.png", r"/val/3.png is there\. Fix: give `images: \S+/data`"),
        ("3.png", "x/y/3.png", r"'3.png' is there, .* folders"),
        ("e\u0301.png", "\u00e9.png", r"is there, .* or Unicode"),
        ("3.jpeg", "3.png", r"'3.jpeg' is there, .* ending"),
        ("another.png", "3.png", r"the first is 3.png\. Fix: add them"),
    ],
)
def test_the_error_of_a_missing_image_names_similar_files(data, file, named, said):
    folder = images_of(data)
    os.makedirs(os.path.dirname(f"{folder}/{file}"), exist_ok=True)
    os.rename(f"{folder}/000003.png", f"{folder}/{file}")
    rename_in_file(data, named)
    with pytest.raises(UserError, match=said):
        opened(data)


def rename_in_file(data, name):
    """Changes the fourth image's name in the annotation file."""
    with open(data["val"]["annotations"]) as file:
        coco = json.load(file)
    coco["images"][3]["file_name"] = name
    with open(data["val"]["annotations"], "w") as file:
        json.dump(coco, file)


def test_an_absolute_name_in_the_images_folder_is_an_error_with_a_fix(data):
    rename_in_file(data, f"{images_of(data)}/000003.png")
    with pytest.raises(UserError, match=r"000003\.png' leads out of the images' folder, .*empty\. Fix: write names"):
        opened(data)


def test_skipped_missing_images_are_remembered_only_for_runs_that_skip(data, looks, caplog):
    os.unlink(f"{images_of(data)}/000003.png")
    for _ in range(2):
        opened(data, on_bad_image="skip")
    assert looks() == 1
    assert caplog.text.count("1 of the 10 images") == 2
    with pytest.raises(UserError, match="1 of the 10 images"):
        opened(data)


def test_check_images_false_skips_the_check(data, looks):
    os.unlink(f"{images_of(data)}/000003.png")
    assert len(opened(data, check_images=False).annotations) == 10
    assert looks() == 0


def _open(data, results):
    split = opened(data)
    results.put(len(split.images.read(split.annotations.file_name(3))))


def in_processes(count, data):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_open, args=(data, results)) for _ in range(count)]
    for process in processes:
        process.start()
    sizes = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return sizes


def test_one_of_the_processes_of_a_machine_looks(data, looks):
    size = os.path.getsize(f"{images_of(data)}/000003.png")
    assert in_processes(4, data) == [size] * 4
    assert looks() == 1


# --- buckets ----------------------------------------------------------------------------------------


@pytest.fixture
def bucket(shapes, data, monkeypatch):
    """The same with images in an S3 that lists 3 names per page. Also returns the requested pages."""
    for package in ("s3fs", "moto", "boto3"):
        pytest.importorskip(package)
    from s3fs import S3FileSystem

    for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    call, pages = S3FileSystem.call_s3, []

    def short_pages(self, method, **kwargs):
        pages.append(kwargs)
        if len(pages) == 3:
            raise ConnectionResetError("lost")
        return call(self, method, MaxKeys=3, **kwargs)

    monkeypatch.setattr(S3FileSystem, "call_s3", short_pages)
    with s3_store(shapes) as endpoint:
        val = {"annotations": data["val"]["annotations"], "images": f"s3://{BUCKET}/val"}
        yield {"val": val, "endpoint_url": endpoint, "store_timeout": 40}, pages


def test_a_bucket_is_listed_page_by_page_once_and_its_sizes_are_kept(shapes, bucket, looks):
    data, pages = bucket
    first, second = opened(data), opened(data)
    assert looks() == 1
    assert len(pages) == 5  # of 10 names, and the page that failed once more
    for name in sorted(os.listdir(shapes / "val")):
        size = (shapes / "val" / name).stat().st_size
        assert first.images.size_of(name) == second.images.size_of(name) == size
    assert second.images.size_of("000001.pn") is second.images.size_of("000001.png.longer") is None
    workers = pickle.dumps(second.images)
    assert len(workers) < 1000  # they map the sizes
    assert pickle.loads(workers).size_of("000001.png") == second.images.size_of("000001.png")


def test_gcs_is_listed_page_by_page(monkeypatch):
    pytest.importorskip("gcsfs")
    from gcsfs.core import GCSFileSystem

    pages = {None: (["val/a.png", "val/", "val/b.png"], {"nextPageToken": "2nd"}), "2nd": (["val/c.png"], {})}

    def call(self, method, path, bucket, *, json_out, prefix, delimiter, pageToken=None, **_):
        assert (method, path, bucket, prefix, delimiter) == ("GET", "b/{}/o", BUCKET, "val/", "/")
        names, following = pages[pageToken]
        return {"items": [{"name": name, "size": str(len(name))} for name in names], **following}

    monkeypatch.setattr(GCSFileSystem, "call", call)
    images = RemoteImages(f"gs://{BUCKET}/val", StoreOptions(anonymous=True))
    look = images.look(np.array([b"a.png", b"c.png", b"d.png"]))
    assert (look.missing, look.first_missing) == (1, "d.png")
    assert look.sizes["c.png"] == len("val/c.png")


def test_one_of_the_processes_lists_a_bucket(shapes, bucket, looks):
    data, _ = bucket
    assert in_processes(3, data) == [(shapes / "val/000003.png").stat().st_size] * 3
    assert looks() == 1


def test_a_bucket_that_lacks_images_is_named_each_time(bucket, looks):
    data, _ = bucket
    data["val"]["images"] = f"s3://{BUCKET}/nowhere"
    for _ in range(2):
        with pytest.raises(UserError, match=r"s3://\S+nowhere\): 10 of the 10 images .* the first is 000000\.png"):
            opened(data)
    assert looks() == 2


def test_names_in_folders_are_found_among_those_listed():
    names = np.array([b"a/b/1.png", b"2.png", b"a/3.png", b"a/b/4.png", b"2.png"])
    assert folders_of(names) == ["", "a", "a/b"]
    assert folders_of(np.array([b"1.png", b"2.png"])) == [""]
    pages = [[(b"2.png", 7), (b"a/b/4.png.longer", 1)], [], [(b"a/b/4.png", 9), (b"a/b/4", 1)]]
    look = find(names, pages)
    assert (look.missing, look.first_missing) == (2, "a/b/1.png")
    assert [look.sizes[name.decode()] for name in names] == [None, 7, None, 9, 7]
    assert find(names, []).missing == 5


def test_a_bucket_whose_remembered_list_is_damaged_is_listed_again(bucket, looks):
    data, _ = bucket
    (sizes,) = opened(data).annotations.cache.glob("images-*/*/sizes.npy")
    size = opened(data).images.size_of("000003.png")
    np.save(sizes, np.array([1, 2]))
    assert opened(data).images.size_of("000003.png") == size
    assert looks() == 2
    assert RemoteImages("s3://bucket/a", StoreOptions()).size_of("a.png") is None
