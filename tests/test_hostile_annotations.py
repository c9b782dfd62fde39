"""Annotation files that are broken by chance or on purpose: a data set, or an error that names the file."""

import json
import os
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.data import synthetic
from shared.data.annotations import CocoAnnotations
from shared.errors import UserError

NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none(), st.text(max_size=4))
ANYTHING = st.recursive(
    NUMBERS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)
IDS = st.integers(-3, 3) | NUMBERS
FILES = st.fixed_dictionaries(
    {
        "images": st.lists(
            st.fixed_dictionaries(
                {"id": IDS, "file_name": st.text(max_size=8) | ANYTHING, "height": IDS, "width": IDS},
            )
            | ANYTHING,
            max_size=4,
        )
        | ANYTHING,
        "annotations": st.lists(
            st.fixed_dictionaries(
                {"id": IDS, "image_id": IDS, "category_id": IDS, "bbox": st.lists(NUMBERS, max_size=5) | ANYTHING},
                optional={"area": NUMBERS, "iscrowd": NUMBERS, "segmentation": ANYTHING, "keypoints": ANYTHING},
            )
            | ANYTHING,
            max_size=4,
        )
        | ANYTHING,
        "categories": st.lists(st.fixed_dictionaries({"id": IDS, "name": ANYTHING}) | ANYTHING, max_size=3) | ANYTHING,
    }
)


def open_and_use(path):
    """Opens without a cache and reads every record. Only errors for users are accepted."""
    error = ""
    try:
        annotations = CocoAnnotations.open(path, cache_dir=os.devnull)
        for record in annotations:
            assert np.isfinite(record.file_boxes).all()
            assert len(record.boxes) == len(record.labels)
            assert len(record.segmentations) == len(record.labels)
    except UserError as refusal:
        error = str(refusal)
    assert not error or str(path) in error or "has a bad segmentation" in error
    return None if error else annotations


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(coco=FILES)
def test_any_structure_is_a_data_set_or_an_error_with_the_file(coco, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(coco))
    open_and_use(path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"images": ' + "[" * 50_000 + "]" * 50_000 + "}",
        '{"images": [], "annotations": [{"segmentation": ' + "[" * 20_000 + "]" * 20_000 + "}]}",
        '{"images": [{"id": 1, "file_name": "\\ud800", "height": 1, "width": 1}], "annotations": [], "categories": []}',
        '{"images": [{"id": 1e400, "file_name": "a", "height": 1, "width": 1}], "annotations": [], "categories": []}',
        '{"images": [], "images": [], "annotations": {}, "categories": []}',
        "\ufeff{}",
        "null",
    ],
)
def test_content_that_breaks_parsers_is_an_error(text, tmp_path):
    path = tmp_path / "hostile.json"
    path.write_text(text)
    assert open_and_use(path) is None


def one_box(path, **changes):
    """A COCO file of an image and a box. `changes` are by section, as JSON text: {"images": {"id": "1e400"}}."""
    sections = {
        "images": {"id": "1", "file_name": '"a.png"', "height": "50", "width": "100"},
        "annotations": {"id": "1", "image_id": "1", "category_id": "1", "bbox": "[1, 2, 3, 4]"},
        "categories": {"id": "1", "name": '"cat"'},
    }
    for section, values in changes.items():
        sections[section].update(values)
    rows = {name: ", ".join(f'"{key}": {value}' for key, value in row.items()) for name, row in sections.items()}
    path.write_text("{" + ", ".join(f'"{name}": [{{{row}}}]' for name, row in rows.items()) + "}")
    return path


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("images", "id", f"{2**64}", f"the image id {2**64} does not fit in 64 bits"),
        ("annotations", "id", f"{2**63}", f"the annotation id {2**63} does not fit in 64 bits"),
        ("annotations", "image_id", f"{-(2**63) - 1}", f"annotation {-(2**63) - 1} does not fit in 64 bits"),
        ("annotations", "category_id", f"{2**64}", f"annotation {2**64} does not fit in 64 bits"),
        ("categories", "id", f"{2**64}", f"the category id {2**64} does not fit in 64 bits"),
        ("categories", "id", f"{2**63}", f"the category id {2**63} does not fit in 64 bits"),
        ("categories", "id", f"{-(2**63) - 1}", f"the category id {-(2**63) - 1} does not fit in 64 bits"),
        ("images", "id", "9" * 5000, f"{'9' * 40}…"),
        ("images", "width", f"{2**31}", "size 2147483648×50"),
        ("images", "height", "1e400", "1e400"),
        ("annotations", "bbox", "[1, 2, 1e400, 4]", "1e400"),
        ("annotations", "bbox", "[1, 2, 1e300, 4]", "annotation 1: `bbox` has 1e+300"),
        ("annotations", "bbox", "[1, 2, NaN, 4]", "annotation 1 has a non-finite bbox"),
        ("annotations", "area", "Infinity", "has the number Infinity"),
        ("annotations", "area", "1e300", "annotation 1: `area` has 1e+300"),
        ("annotations", "keypoints", "[1e300, 2, 2]", "annotation 1: `keypoints` has 1e+300"),
        ("annotations", "keypoints", "[1, -Infinity, 2]", "has the number -Infinity"),
    ],
)
def test_a_number_that_cannot_be_used_is_one_line_with_file_and_value(section, key, value, named, tmp_path):
    path = one_box(tmp_path / "numbers.json", **{section: {key: value}})
    with pytest.raises(UserError) as error:
        CocoAnnotations.open(path, cache_dir=os.devnull)
    assert str(path) in str(error.value)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("image_id", [2**63 - 1, -(2**63)])
def test_the_largest_and_the_smallest_id_are_read(image_id, tmp_path):
    numbers = {"images": {"id": image_id}, "categories": {"id": image_id}}
    path = one_box(tmp_path / "a.json", annotations={"image_id": image_id, "category_id": image_id}, **numbers)
    opened = CocoAnnotations.open(path, cache_dir=os.devnull)
    assert (opened[0].image_id, opened.category_ids) == (image_id, [image_id])


def test_one_annotation_with_many_keypoints_costs_the_others_no_memory(tmp_path):
    coco = synthetic.coco_split(0, 400)
    coco["annotations"][0]["keypoints"] = [1] * 300_000
    path = tmp_path / "keypoints.json"
    path.write_text(json.dumps(coco))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"keypoints.json: annotation \d+ has 100000 keypoints, and others far fewer"):
        CocoAnnotations.open(path, cache_dir=os.devnull)
    assert tracemalloc.get_traced_memory()[1] < 20 * path.stat().st_size
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["offsets", "labels", "segmentation_offsets", "boxes", "file_name_offsets"])
def test_a_cache_with_other_contents_is_rebuilt(name, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(synthetic.coco_split(0, 8)))
    expected = [record.boxes.tolist() for record in CocoAnnotations.open(path)]
    (file,) = tmp_path.glob(f".a.json.columns/*/*/{name}.npy")
    column = np.load(file)
    for foreign in (column.astype(np.float32), np.full_like(column, 77), -column[::-1] - 1):
        np.save(file, foreign)
        if name != "boxes" or foreign.dtype != column.dtype:  # other numbers are as good as any
            assert [record.boxes.tolist() for record in CocoAnnotations.open(path)] == expected
            assert len([record.segmentations for record in CocoAnnotations.open(path)]) == 8


def test_a_cache_that_is_a_pickle_is_not_loaded(tmp_path):
    path, trace = tmp_path / "a.json", tmp_path / "executed"
    path.write_text(json.dumps(synthetic.coco_split(0, 8)))
    CocoAnnotations.open(path)

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    (boxes,) = tmp_path.glob(".a.json.columns/*/*/boxes.npy")
    np.save(boxes, np.array([Hostile()], dtype=object), allow_pickle=True)
    assert len(CocoAnnotations.open(path)) == 8
    assert not trace.exists()


@pytest.mark.parametrize("where", ["read-only", "full", "no home"])
def test_without_room_for_a_cache_annotations_load_with_one_warning(where, tmp_path, monkeypatch, caplog):
    path = tmp_path / "data" / "a.json"
    path.parent.mkdir()
    path.write_text(json.dumps(synthetic.coco_split(0, 8)))
    real = os.mkdir

    def refuse(folder, *args, **kwargs):
        if where == "full" and "columns" not in str(folder):
            return real(folder, *args, **kwargs)
        raise OSError(28 if where == "full" else 30, "no")

    if where == "no home":
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(os, "mkdir", refuse)
    assert len(CocoAnnotations.open(path)) == 8
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1


def traced(path):
    """Whether the file is a data set, and the peak number of allocated bytes."""
    tracemalloc.start()
    opened = open_and_use(path) is not None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return opened, peak


@pytest.mark.slow
def test_ten_thousand_mutations_of_a_real_file_crash_nothing(coco_tiny, tmp_path):
    coco = json.loads((coco_tiny / "annotations/instances_val2017.json").read_text())
    kept = {image["id"] for image in coco["images"][:25]}
    coco["images"] = coco["images"][:25]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in kept]
    original = json.dumps(coco).encode()
    path, generator = tmp_path / "mutated.json", random.Random(0)
    numbers = [b"-1", b"1e999", b"9" * 400, b"null", b'"x"', b"{}", b"[]", b"NaN", b"0", b"true", b"[" * 200]
    whole = 0
    for _ in range(10_000):
        data = bytearray(original)
        for _ in range(generator.choice([1, 1, 2, 5])):
            at = generator.randrange(len(data))
            kind = generator.randrange(5)
            if kind == 0:
                data[at] = generator.randrange(256)
            elif kind == 1:
                del data[at : at + generator.choice([1, 10, 10_000])]
            elif kind == 2:
                data[at:at] = data[at : at + generator.choice([1, 100, 5_000])]
            elif kind == 3:
                end = at + 1
                while end < len(data) and data[end] in b"0123456789.":
                    end += 1
                data[at:end] = generator.choice(numbers)
            else:
                data = data[:at] or bytearray(b" ")
            data = data or bytearray(b" ")
        path.write_bytes(data)
        opened, peak = traced(path)
        whole += opened
        if peak >= 4 * len(data) + 2**20:  # the first use of something imports it
            assert traced(path)[1] < 4 * len(data) + 2**20
    assert 500 < whole < 9_500
