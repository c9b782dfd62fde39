"""A COCO file as columns: what a record holds, the cache, and what is refused."""

import json
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from shared.data import annotations, synthetic
from shared.data.annotations import CocoAnnotations, check_same_categories
from shared.errors import UserError


def write(path, coco):
    path.write_text(json.dumps(coco))
    return path


@pytest.fixture
def coco():
    return synthetic.coco_split(3, 8)


def test_a_record_holds_the_file_s_values(coco_tiny):
    path = coco_tiny / "annotations/instances_val2017.json"
    ours, reference = CocoAnnotations.open(path, cache_dir=os.devnull), COCO(path)
    assert len(ours) == 80
    for record in ours:
        image = reference.imgs[record.image_id]
        assert (record.file_name, record.height, record.width) == (image["file_name"], image["height"], image["width"])
        annotations = reference.imgToAnns[record.image_id]
        boxes = np.array([a["bbox"] for a in annotations])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_array_equal(record.boxes, boxes.astype(np.float32))
        assert record.boxes.dtype == record.areas.dtype == np.float32
        assert record.labels.dtype == np.int64
        assert [ours.category_ids[label] for label in record.labels] == [a["category_id"] for a in annotations]
        assert record.iscrowd.tolist() == [bool(a["iscrowd"]) for a in annotations]
        assert record.segmentations == [a["segmentation"] for a in annotations]


def test_the_second_open_maps_the_cache_and_gives_the_same(coco, tmp_path):
    path = write(tmp_path / "a.json", coco)
    first = CocoAnnotations.open(path)
    second = CocoAnnotations.open(path)
    assert isinstance(second.columns["boxes"].base, np.memmap)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.boxes, b.boxes)
        assert a.segmentations == b.segmentations


def test_a_changed_file_is_read_anew(coco, tmp_path):
    path = write(tmp_path / "a.json", coco)
    CocoAnnotations.open(path)
    coco["annotations"][0]["bbox"] = [1, 2, 3, 4]
    write(path, coco)
    assert CocoAnnotations.open(path)[0].boxes[0].tolist() == [1, 2, 4, 6]


def test_a_cut_off_cache_is_made_anew(coco, tmp_path):
    path = write(tmp_path / "a.json", coco)
    CocoAnnotations.open(path)
    (boxes,) = tmp_path.glob(".a.json.columns/*/boxes.npy")
    boxes.write_bytes(boxes.read_bytes()[:100])
    assert len(CocoAnnotations.open(path)[0].boxes) > 0


def test_where_no_cache_can_be_written_the_annotations_stay_in_memory(coco, tmp_path, caplog):
    path = write(tmp_path / "a.json", coco)
    opened = CocoAnnotations.open(path, cache_dir=os.devnull)
    assert len(opened) == 8
    assert "cannot be written" in caplog.text


def test_workers_that_are_not_forked_map_the_cache(coco, tmp_path):
    opened = CocoAnnotations.open(write(tmp_path / "a.json", coco))
    copy = pickle.loads(pickle.dumps(opened))
    assert len(pickle.dumps(opened)) < 1000
    np.testing.assert_array_equal(copy[3].boxes, opened[3].boxes)


def _open_and_hold(path, results, done):
    """Says what is mapped, and later what is read from it."""
    opened = CocoAnnotations.open(path)
    with open("/proc/self/maps") as maps:
        mapped = {line.split()[4] for line in maps if f"{path.parent}/" in line and "boxes.npy" in line}  # inodes
    results.put((mapped, str(opened.cache)))
    done.wait(60)
    results.put(float(sum(record.boxes.sum() for record in opened)))


def test_of_processes_that_open_a_new_file_at_once_one_parses_and_all_map_the_same_pages(coco, tmp_path, monkeypatch):
    path, parsed = write(tmp_path / "a.json", coco), tmp_path / "parsed"
    decode = annotations._decode

    def counting(data, source):
        if source == path:
            with parsed.open("a") as file:
                file.write("x")
            time.sleep(0.3)
        return decode(data, source)

    monkeypatch.setattr(annotations, "_decode", counting)
    context = multiprocessing.get_context("fork")

    def wave():
        results, done = context.Queue(), context.Event()
        processes = [context.Process(target=_open_and_hold, args=(path, results, done)) for _ in range(8)]
        for process in processes:
            process.start()
        mapped = [results.get(timeout=60) for _ in processes]
        assert all(one == mapped[0] for one in mapped)
        assert len(mapped[0][0]) == 1
        return processes, results, done, Path(mapped[0][1])

    def finish(processes, results, done, _):
        done.set()
        sums = {results.get(timeout=60) for _ in processes}
        for process in processes:
            process.join()
            assert process.exitcode == 0
        return sums

    def sum_of_boxes():
        return float(sum(record.boxes.sum() for record in CocoAnnotations.from_dict(coco)))

    first, sum_of_first = wave(), sum_of_boxes()
    assert parsed.read_text() == "x"
    parsed.write_text("")

    # a second wave with a changed file: what the first one maps stays on disk, and is read there
    del coco["annotations"][1:]
    write(path, coco)
    second, sum_of_second = wave(), sum_of_boxes()
    assert parsed.read_text() == "x"
    assert first[3].is_dir()
    assert second[3] != first[3]
    assert finish(*first) == {sum_of_first}
    assert finish(*second) == {sum_of_second}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.json.columns", "a.json", "parsed"]


def test_of_the_caches_of_a_file_that_changes_the_last_two_stay(coco, tmp_path):
    caches = []
    for number in range(4):
        coco["images"][0]["width"] = 1000 + number
        caches.append(CocoAnnotations.open(write(tmp_path / "a.json", coco)).cache)
        (caches[0].parent / f".killed{number}").mkdir()  # as a process leaves it that is killed while it writes
        os.utime(tmp_path / "a.json", ns=(number, number))
        caches.append(CocoAnnotations.open(tmp_path / "a.json").cache)
    assert {p for p in caches[0].parent.iterdir() if p.name != "lock"} == {*caches[-2:]}


def test_keypoints_are_the_file_s_and_go_with_their_annotations(coco, tmp_path):
    del coco["annotations"][1:]
    coco["annotations"] += [
        {**coco["annotations"][0], "id": 901, "keypoints": [1.5, 2, 2, 0, 0, 0]},
        {**coco["annotations"][0], "id": 902, "keypoints": [3, 4.25, 1]},
    ]
    annotations = CocoAnnotations.from_dict(coco)
    (record,) = [record for record in annotations if len(record.boxes)]
    assert record.keypoints.tolist() == [[[0, 0, 0]] * 2, [[1.5, 2, 2], [0, 0, 0]], [[3, 4.25, 1], [0, 0, 0]]]
    name = annotations.category_names[record.labels[0]]
    assert annotations.select_categories([name]).columns["keypoints"].shape == (3, 2, 3)

    coco["annotations"][-1]["keypoints"] = [3, 4]
    with pytest.raises(UserError, match="annotation 902 has 2 numbers in `keypoints`"):
        CocoAnnotations.from_dict(coco)


def test_area_and_iscrowd_may_be_missing(coco):
    for annotation in coco["annotations"]:
        del annotation["area"], annotation["iscrowd"], annotation["segmentation"]
    record = CocoAnnotations.from_dict(coco)[0]
    sides = record.boxes[:, 2:] - record.boxes[:, :2]
    np.testing.assert_allclose(record.areas, sides.prod(axis=1), rtol=1e-5)
    assert not record.iscrowd.any()
    assert set(record.segmentations) == {None}


def broken(change):
    coco = synthetic.coco_split(3, 8)
    change(coco)
    return coco


BROKEN = {
    "points to image 99": lambda c: c["annotations"][0].update(image_id=99),
    "points to category 99": lambda c: c["annotations"][0].update(category_id=99),
    "image ids occur more than once": lambda c: c["images"][1].update(id=1),
    "annotation ids occur more than once": lambda c: c["annotations"][1].update(id=1),
    "category ids occur more than once": lambda c: c["categories"].append({"id": 1, "name": "x"}),
    "two categories have the name 'circle'": lambda c: c["categories"].append({"id": 9, "name": "circle"}),
    "annotation 1 has a non-finite bbox": lambda c: c["annotations"][0].update(bbox=[0, 0, float("nan"), 1]),
    "annotation 2 has a non-finite bbox": lambda c: c["annotations"][1].update(bbox=[0, float("inf"), 1, 1]),
    "missing required field `bbox`": lambda c: c["annotations"][0].pop("bbox"),
    r"got `str` - at `\$.annotations\[0\].bbox": lambda c: c["annotations"][0].update(bbox=["a", 0, 1, 1]),
    "missing required field `categories`": lambda c: c.pop("categories"),
    "has no images": lambda c: c["images"].clear(),
    "has the size 0×": lambda c: c["images"][0].update(width=0),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_contradicts_itself_is_refused_with_the_place(message, tmp_path):
    coco = synthetic.coco_split(3, 8)
    coco["categories"] = [dict(category) for category in coco["categories"]]
    BROKEN[message](coco)
    path = write(tmp_path / "broken.json", coco)
    with pytest.raises(UserError, match=message) as error:
        CocoAnnotations.open(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("{", "not JSON, or is cut off"), ("[1]", "not a COCO"), ('{"a": 1}', "not a COCO")],
)
def test_what_is_not_coco_is_refused(content, message, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        CocoAnnotations.open(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        CocoAnnotations.open(tmp_path / "nowhere.json")


def test_categories_that_differ_are_named(coco):
    other = {
        **coco,
        "categories": [{**c, "name": c["name"].upper()} if c["id"] == 2 else c for c in coco["categories"]],
    }
    with pytest.raises(UserError, match="id 2 is 'circle' in the first and 'CIRCLE' in the second"):
        check_same_categories(CocoAnnotations.from_dict(coco), CocoAnnotations.from_dict(other))


def test_some_of_the_categories_keep_all_images_and_their_own_annotations(shapes):
    everything = CocoAnnotations.open(shapes / "annotations/train.json")
    names = [category["name"] for category in everything.categories]
    some = everything.select_categories([names[2], names[0]])
    assert some.categories == [everything.categories[0], everything.categories[2]]  # in the order of ids
    assert len(some) == len(everything)
    for a, b in zip(everything, some, strict=True):
        kept = a.labels != 1
        np.testing.assert_array_equal(b.boxes, a.boxes[kept])
        np.testing.assert_array_equal(b.labels, a.labels[kept] // 2)
        assert b.segmentations == [piece for piece, keep in zip(a.segmentations, kept, strict=True) if keep]
    with pytest.raises(UserError, match=r"'circel' is no category of .*; did you mean 'circle'"):
        everything.select_categories(["circel"])
