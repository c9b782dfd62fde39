"""A COCO file as columns: records, the cache, and refused files."""

import gzip
import json
import multiprocessing
import os
import pickle
import re
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from shared.config.experiment import parse_data
from shared.data import checks, coco_file, synthetic
from shared.data.annotations import CocoAnnotations, check_same_categories
from shared.data.checks import check_box_format
from shared.data.open import check_masks, check_trainable, notes_on, open_split
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


def test_a_changed_file_is_read_again(coco, tmp_path):
    path = write(tmp_path / "a.json", coco)
    CocoAnnotations.open(path)
    coco["annotations"][0]["bbox"] = [1, 2, 3, 4]
    write(path, coco)
    assert CocoAnnotations.open(path)[0].boxes[0].tolist() == [1, 2, 4, 6]


def test_a_truncated_cache_is_rebuilt(coco, tmp_path):
    path = write(tmp_path / "a.json", coco)
    CocoAnnotations.open(path)
    (boxes,) = tmp_path.glob(".a.json.columns/*/*/boxes.npy")
    boxes.write_bytes(boxes.read_bytes()[:100])
    assert len(CocoAnnotations.open(path)[0].boxes) > 0


def test_without_a_writable_cache_annotations_stay_in_memory(coco, tmp_path, caplog):
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
    """Prints what is mapped, and later what is read from it."""
    opened = CocoAnnotations.open(path)
    with open("/proc/self/maps") as maps:
        mapped = {line.split()[4] for line in maps if f"{path.parent}/" in line and "boxes.npy" in line}  # inodes
    results.put((mapped, str(opened.cache)))
    done.wait(600)
    results.put(float(sum(record.boxes.sum() for record in opened)))


def test_one_process_parses_a_new_file_and_all_map_the_same_pages(coco, tmp_path, monkeypatch):
    path, parsed = write(tmp_path / "a.json", coco), tmp_path / "parsed"
    parse = coco_file.parse

    def counting(data, source):
        if source == path:
            with parsed.open("a") as file:
                file.write("x")
            time.sleep(0.3)
        return parse(data, source)

    monkeypatch.setattr(coco_file, "parse", counting)
    context = multiprocessing.get_context("fork")

    def wave():
        results, done = context.Queue(), context.Event()
        processes = [context.Process(target=_open_and_hold, args=(path, results, done)) for _ in range(8)]
        for process in processes:
            process.start()
        mapped = [results.get(timeout=600) for _ in processes]
        assert all(one == mapped[0] for one in mapped)
        assert len(mapped[0][0]) == 1
        return processes, results, done, Path(mapped[0][1])

    def finish(processes, results, done, _):
        done.set()
        sums = {results.get(timeout=600) for _ in processes}
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


def test_the_last_two_caches_of_a_changing_file_stay(coco, tmp_path):
    caches = []
    for number in range(4):
        coco["images"][0]["width"] = 1000 + number
        caches.append(CocoAnnotations.open(write(tmp_path / "a.json", coco)).cache)
        (caches[0].parent / f".killed{number}").mkdir()  # as a process leaves it that is killed while it writes
        os.utime(tmp_path / "a.json", ns=(number, number))
        caches.append(CocoAnnotations.open(tmp_path / "a.json").cache)
    assert {p for p in caches[0].parent.iterdir() if p.is_dir()} == {*caches[-2:]}


def test_git_and_backups_skip_the_cache(coco, tmp_path):
    place = CocoAnnotations.open(write(tmp_path / "a.json", coco)).cache.parent
    assert (place / ".gitignore").read_text() == "*\n"
    assert (place / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")


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


def test_numbers_in_quotes_and_whole_floats_are_read(coco):
    expected = CocoAnnotations.from_dict(coco)
    for image in coco["images"]:
        image |= {"id": str(image["id"]), "width": f"{image['width']}.0", "height": float(image["height"])}
    for a in coco["annotations"]:
        a |= {"image_id": str(a["image_id"]), "id": float(a["id"]), "category_id": str(a["category_id"])}
        a |= {"bbox": [f"{number:.4f}" for number in a["bbox"]], "area": str(a["area"]), "iscrowd": str(a["iscrowd"])}
    coco["categories"] = [{**category, "id": str(category["id"])} for category in coco["categories"]]
    quoted = CocoAnnotations.from_dict(coco)
    assert quoted.category_ids == expected.category_ids
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(quoted.columns[name], column)


def test_a_category_without_annotations_and_with_another_s_name_is_omitted(coco):
    coco["categories"] = [{"id": 0, "name": "circle", "supercategory": "none"}, *coco["categories"]]
    annotations = CocoAnnotations.from_dict(coco)
    assert annotations.category_ids == [1, 2, 3]
    assert annotations.notes == ["category 0 is omitted: it has no annotations, and another has its name 'circle'"]
    coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] != 2]  # a small split uses neither
    assert CocoAnnotations.from_dict(coco).category_ids == [1, 2, 3]


def test_an_area_of_zero_becomes_that_of_the_mask_or_the_box(coco):
    right = CocoAnnotations.from_dict(coco)
    for annotation in coco["annotations"]:
        annotation["area"] = 0
    coco["annotations"][0]["segmentation"] = None
    coco["annotations"][1]["bbox"] = [5, 5, 0, 5]
    filled = CocoAnnotations.from_dict(coco)
    width, height = coco["annotations"][0]["bbox"][2:]
    assert filled.columns["areas"][:2].tolist() == [width * height, 0]
    np.testing.assert_allclose(filled.columns["areas"][2:], right.columns["areas"][2:], rtol=0.1)  # drawn pixels
    count = len(coco["annotations"]) - 1
    assert filled.notes == [f"{count} boxes with `area: 0`; the area of the mask or the box is used"]


def test_annotations_to_ignore_are_not_trained_on_and_counted(shapes, tmp_path, caplog):
    coco = json.loads((shapes / "annotations/val.json").read_text())
    for annotation in coco["annotations"]:
        annotation["ignore"] = int(annotation["category_id"] == 1)
    ignored = sum(annotation["ignore"] for annotation in coco["annotations"])
    split = {"annotations": str(write(tmp_path / "a.json", coco)), "images": str(shapes / "val")}
    data = parse_data({"data": {"train": split, "val": split}})
    for _ in range(2):  # parsed, and mapped
        train, val = (open_split(data, name).annotations for name in ("train", "val"))
        assert len(val.columns["labels"]) - len(train.columns["labels"]) == ignored > 0
        assert 0 not in train.columns["labels"]
    assert (
        f"data.train.annotations: training omits {ignored} annotation{'s' * (ignored > 1)} with `ignore: 1`"
        in caplog.text
    )
    assert len(train) == len(val)


def test_an_annotation_id_of_zero_is_a_note_on_validation_data_alone(coco):
    assert notes_on(CocoAnnotations.from_dict(coco), "val") == []
    coco["annotations"][0]["id"] = 0
    zero = CocoAnnotations.from_dict(coco)
    assert notes_on(zero, "train") == []
    (note,) = notes_on(zero, "val")
    assert "pycocotools counts as not found" in note


BROKEN = {
    "points to image 99": lambda c: c["annotations"][0].update(image_id=99),
    "points to category 99": lambda c: c["annotations"][0].update(category_id=99),
    "the image id 1 occurs more than once": lambda c: c["images"][1].update(id=1),
    "the annotation id 1 occurs more than once": lambda c: c["annotations"][1].update(id=1),
    "the category id 1 occurs more than once": lambda c: c["categories"].append({"id": 1, "name": "x"}),
    "two categories have the name 'circle'": lambda c: c.update(
        categories=[{"id": i, "name": "circle"} for i in (1, 2, 3)]
    ),
    "annotation 1 has a non-finite bbox": lambda c: c["annotations"][0].update(bbox=[0, 0, float("nan"), 1]),
    "annotation 2 has a non-finite bbox": lambda c: c["annotations"][1].update(bbox=[0, float("inf"), 1, 1]),
    "missing required field `bbox`": lambda c: c["annotations"][0].pop("bbox"),
    r"annotation 1: Expected `float`, got `str` - at `\$.annotations\[0\].bbox": lambda c: c["annotations"][0].update(
        bbox=["a", 0, 1, 1]
    ),
    "missing required field `categories`": lambda c: c.pop("categories"),
    'image "img_7": Expected `int`, got `str`': lambda c: c["images"][0].update(id="img_7"),
    "has no images": lambda c: c["images"].clear(),
    "has the size 0×": lambda c: c["images"][0].update(width=0),
}


@pytest.mark.parametrize("message", BROKEN)
def test_contradictory_annotations_are_refused_with_their_place(message, tmp_path):
    coco = synthetic.coco_split(3, 8)
    coco["categories"] = [dict(category) for category in coco["categories"]]
    BROKEN[message](coco)
    path = write(tmp_path / "broken.json", coco)
    with pytest.raises(UserError, match=message) as error:
        CocoAnnotations.open(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"{", "not JSON, or is truncated"),
        (b"[1]", "not a COCO"),
        (b'{"a": 1}', "not a COCO"),
        ('{"images": []}'.encode("utf-16"), "is in UTF-16. Fix: save it as UTF-8"),
        ('{"images": []}'.encode("utf-16-le"), "is in UTF-16. Fix: save it as UTF-8"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page, not the file itself"),
        (b"<annotation></annotation>", "is XML. Fix: convert it with `python3 -m shared convert`"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
        (b"PK\x03\x04abc", "is a ZIP archive. Fix: unpack it"),
        (gzip.compress(b"{" * 99)[:-20], "is packed with gzip, and cannot be unpacked"),
    ],
)
def test_files_that_are_not_coco_are_refused(content, message, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        CocoAnnotations.open(path)


def test_a_file_that_gzip_unpacks_without_end_is_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(gzip.compress(b" " * 2**22) * 64)
    with pytest.raises(UserError, match=r"a.json: its .* bytes unpack with gzip to more than .* Fix: "):
        CocoAnnotations.open(tmp_path / "a.json")


@pytest.mark.parametrize("pack", [gzip.compress, lambda data: b"\xef\xbb\xbf" + data], ids=["gzip", "BOM"])
def test_a_packed_file_and_one_with_a_mark_before_it_are_read(pack, coco, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(pack(json.dumps(coco).encode()))
    for _ in range(2):
        assert [r.segmentations for r in CocoAnnotations.open(path)] == [
            r.segmentations for r in CocoAnnotations.from_dict(coco)
        ]


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
    with pytest.raises(UserError, match=r"'circel' is not a category of .*; did you mean 'circle'"):
        everything.select_categories(["circel"])


# --- boxes and masks that no detector can learn from ------------------------------------------------


def with_boxes(coco, box_of):
    """The same file with other boxes: `box_of` takes x, y, width, height and the image's width and height."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    changed = [{**a, "bbox": box_of(*a["bbox"], *sizes[a["image_id"]])} for a in coco["annotations"]]
    return CocoAnnotations.from_dict({**coco, "annotations": changed})


@pytest.mark.parametrize("at_once", [7, 2**14])
def test_boxes_that_are_written_in_another_way_are_recognised(coco_tiny, monkeypatch, at_once):
    monkeypatch.setattr(checks, "_AT_ONCE", at_once)
    coco = json.loads((coco_tiny / "annotations/instances_train2017.json").read_text())
    check_box_format(CocoAnnotations.from_dict(coco), "data.train.annotations")
    shares = with_boxes(coco, lambda x, y, w, h, width, height: [x / width, y / height, w / width, h / height])
    with pytest.raises(UserError, match=r"data.train.annotations: all 705 boxes .* are shares of the image's size"):
        check_box_format(shares, "data.train.annotations")
    corners = with_boxes(coco, lambda x, y, w, h, *_: [x, y, x + w, y + h])
    with pytest.raises(UserError, match=r"look like corners, x1 y1 x2 y2, .* 7\d% of them reach far over the edge"):
        check_box_format(corners, "data.train.annotations")


@pytest.mark.parametrize(
    "box",
    [
        lambda x, y, w, h, width, height: [0, 0, width, height],
        lambda x, y, w, h, width, height: [1, 1, width - 1, height + 1],  # sloppy by a pixel
        lambda x, y, w, h, width, height: [-20, 5, width + 30, height - 5],  # beyond the edges (amodal)
        lambda x, y, w, h, *_: [x, y, 1, 1],
        lambda *_: [0, 0, 1, 1],
    ],
)
def test_right_boxes_are_not_taken_for_wrong_ones(box, coco):
    check_box_format(with_boxes(coco, box), "data.train.annotations")


def test_a_look_at_the_boxes_takes_less_memory_than_they_do(monkeypatch):
    monkeypatch.setattr(checks, "_AT_ONCE", 50)
    many = CocoAnnotations.from_dict(synthetic.coco_split(0, 2000))
    tracemalloc.start()
    check_box_format(many, "data.train.annotations")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < many.columns["boxes"].nbytes / 3


def test_some_boxes_under_a_pixel_are_a_warning_and_only_those_an_error(coco, caplog):
    tiny = with_boxes(coco, lambda x, y, *_: [x, y, 0.5, 3])
    with pytest.raises(UserError, match=r"has no box to train on: all .* are less than a pixel wide or high"):
        check_trainable(tiny)
    coco["annotations"][0]["bbox"] = [5, 5, 0.5, 3]
    check_trainable(CocoAnnotations.from_dict(coco))
    assert "data.train: 1 box less than a pixel wide or high" in caplog.text


WRONG_MASKS = {
    "have no segmentation": [None, []],
    "neither polygons nor RLE": ["mask", 777, {"size": [128, 128]}],
    "not a list of polygons, each a list of numbers": [
        [1, 2, 3, 4],
        [1, 1, 5, 1, 5, 5],
        [["a"] * 6],
        [[1] * 5 + [None]],
    ],
    "has a polygon of 4 numbers": [[[1, 1, 5, 5]], [[1, 1, 5, 1, 5, 5], [1, 1, 5, 5]]],
    "has a polygon of 7 numbers": [[[1, 1, 5, 1, 5, 5, 7]]],
    r"has a point at 1e\+300 pixels": [[[1, 1, 5, 1, 5, 1e300]]],
    "has a polygon of 0 numbers": [[[]]],
    r"RLE of the size \[9, 9\], and the image's is \[128, 128\]": [{"size": [9, 9], "counts": [81]}],
    "RLE of 81 pixels, and the image has 16384": [{"size": [128, 128], "counts": [80, 1]}],
    "RLE that cannot be read": [{"size": [128, 128], "counts": [-1, 5]}, {"size": [128, 128], "counts": ["a"]}],
}


@pytest.mark.parametrize("message", WRONG_MASKS)
def test_masks_to_train_on_are_there_and_valid_or_named(message, coco, tmp_path):
    objects = [a for a in coco["annotations"] if not a["iscrowd"]]
    for segmentation in WRONG_MASKS[message]:
        objects[3]["segmentation"] = segmentation
        names = [category["name"] for category in coco["categories"]]
        selected = CocoAnnotations.open(write(tmp_path / "a.json", coco)).select_categories(names)
        for opened in (CocoAnnotations.from_dict(coco), selected):
            with pytest.raises(UserError, match=rf"data.val.*1 annotations .* has id {objects[3]['id']}.*") as error:
                check_masks(opened, "val")
            assert re.search(message, str(error.value))
    objects[3]["bbox"] = [5, 5, 0, 5]  # not trained on, as crowds are not
    check_masks(CocoAnnotations.from_dict(coco), "val")


def test_masks_are_looked_at_once(coco, tmp_path, monkeypatch):
    coco["annotations"][2]["segmentation"] = "mask"
    path = write(tmp_path / "a.json", coco)
    assert checks.wrong_rows(CocoAnnotations.open(path)).tolist() == [2]
    monkeypatch.setattr(checks, "why_wrong", None)
    opened = CocoAnnotations.open(path)
    assert checks.wrong_rows(opened).tolist() == [2]
    monkeypatch.undo()
    (file,) = opened.cache.glob("segmentations/*/wrong.npy")
    np.save(file, np.array([999_999]))  # not ours
    assert checks.wrong_rows(opened).tolist() == [2]


def test_compressed_masks_of_every_size_are_valid():
    generator = np.random.default_rng(0)
    for _ in range(50):
        height, width = generator.integers(1, 60, 2).tolist()
        mask = (generator.random((height, width)) < generator.random()).astype(np.uint8)
        rle = coco_mask.encode(np.asfortranarray(mask))
        whole = {"size": [height, width], "counts": rle["counts"].decode()}
        assert checks.wrong_segmentation(whole, height, width) is None
        assert checks.wrong_segmentation({**whole, "counts": whole["counts"] + "1"}, height, width)
