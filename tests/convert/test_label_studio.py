"""`convert labelstudio`."""

import math

import numpy as np
import pytest
from data_sets import annotations_in, converted, draw, write

from shared.data.convert.json_labels import decode_rle
from shared.errors import UserError


def region(kind, labels=("cat",), **value):
    return {
        "id": "r1",
        "type": f"{kind}labels",
        "value": {**value, f"{kind}labels": list(labels)},
        "original_width": 200,
        "original_height": 100,
    }


def task(*regions, image="/data/upload/1/0a1b2c3d-a.png", **more):
    return {"id": 1, "data": {"image": image}, "annotations": [{"id": 1, "result": list(regions), **more}]}


BOX = region("rectangle", x=10, y=20, width=25, height=40, rotation=0)


def brush(pixels):
    """Label Studio's RLE of (N,) alpha values, each a run of its own."""
    values = np.repeat(pixels, 4)
    bits = f"{len(values):032b}" + f"{7:05b}" + "".join(f"{count - 1:04b}" for count in (3, 4, 8, 16))
    for value in values:
        bits += "1" + "00" + "000" + f"{value:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ("/data/upload/1/0a1b2c3d-a.png", "0a1b2c3d-a.png"),
        ("/data/upload/1/0a1b2c3d-a.png", "a.png"),
        ("/data/local-files/?d=photos/%C3%A9cran%201.png", "écran 1.png"),
        ("s3://bucket/photos/a%20b.png", "a b.png"),
        ("photos\\a.png", "a.png"),
    ],
)
def test_label_studio_images_are_found_by_the_address_of_the_task(image, file, tmp_path):
    draw(tmp_path / "in/images" / file, size=(200, 100))
    write(tmp_path / "in/project.json", [task(BOX, image=image)])
    splits, _ = converted(None, tmp_path / "in/project.json", tmp_path / "o.json")
    assert splits[""] == {file: [("cat", 20, 20, 50, 40)]}


def test_label_studio_rotated_boxes_ellipses_polygons_and_brushes(tmp_path):
    mask = np.zeros((100, 200), np.uint8)
    mask[10:12, 20:25] = 255
    regions = [
        region("rectangle", x=50, y=20, width=20, height=10, rotation=90),
        region("ellipse", ["dog"], x=50, y=50, radiusX=10, radiusY=10, rotation=0),
        region("polygon", points=[[10, 10], [20, 10], [20, 30]]),
        region("brush", format="rle", rle=brush(mask.ravel())),
        region("keypoint", x=1, y=1, width=1),
    ]
    splits, said = converted("labelstudio", write(tmp_path / "a.json", [task(*regions)]), tmp_path / "o.json")
    boxes = [("cat", 90, 20, 10, 40), ("dog", 80, 40, 40, 20), ("cat", 20, 10, 20, 20), ("cat", 20, 10, 5, 2)]
    assert splits[""]["0a1b2c3d-a.png"] == boxes
    areas = [row["area"] for row in annotations_in(tmp_path / "o.json")]
    assert areas == pytest.approx([400, math.pi * 200, 200, 10])
    assert "keypointlabels left out 1" in said


def test_label_studio_tasks_without_an_annotation_are_omitted(tmp_path):
    empty = {"id": 2, "data": {"image": "b.png"}, "annotations": []}
    skipped = {**task(BOX, was_cancelled=True), "id": 3}
    twice = task(BOX)
    twice["annotations"] *= 2
    file = write(tmp_path / "a.json", [twice, empty, skipped])
    splits, said = converted("labelstudio", file, tmp_path / "o.json")
    assert list(splits[""]) == ["0a1b2c3d-a.png"]
    assert "tasks left out (without an annotation) 2" in said
    assert "further annotations of a task left out 1" in said


def test_label_studio_labels_may_be_in_results_of_their_own(tmp_path):
    plain = {"id": "r1", "type": "rectangle", "original_width": 200, "original_height": 100}
    value = {"x": 10, "y": 20, "width": 25, "height": 40, "rotation": 0}
    results = [{**plain, "value": value}, {**plain, "type": "labels", "value": {**value, "labels": ["cat"]}}]
    splits, _ = converted("labelstudio", write(tmp_path / "a.json", [task(*results)]), tmp_path / "o.json")
    assert splits[""]["0a1b2c3d-a.png"] == [("cat", 20, 20, 50, 40)]


def test_label_studio_json_min_has_the_regions_beside_the_image(tmp_path):
    row = {"x": 10, "y": 20, "width": 25, "height": 40, "rotation": 0, "rectanglelabels": ["cat"]}
    row |= {"original_width": 200, "original_height": 100}
    content = [{"image": "/data/upload/1/a.png", "id": 1, "label": [row], "annotator": 1, "annotation_id": 1}]
    splits, _ = converted(None, write(tmp_path / "a.json", content), tmp_path / "o.json")
    assert splits[""] == {"a.png": [("cat", 20, 20, 50, 40)]}


def test_label_studio_a_brush_that_is_cut_off_is_named_with_its_task(tmp_path):
    file = write(tmp_path / "a.json", [task(region("brush", format="rle", rle=[0, 0, 1]))])
    with pytest.raises(UserError, match=r"a\.json: task 1: a brush's rle is cut off\. Fix: "):
        converted("labelstudio", file, tmp_path / "o.json")


def test_label_studio_runs_of_a_brush_may_be_long_or_of_single_values():
    bits = f"{9:032b}" + f"{7:05b}" + "".join(f"{count - 1:04b}" for count in (3, 4, 8, 16))
    bits += "1" + "01" + f"{5:04b}" + f"{255:08b}" + "0" + "00" + f"{2:03b}" + "".join(f"{v:08b}" for v in (1, 2, 3))
    bits += "0" * (-len(bits) % 8)
    data = [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]
    assert decode_rle(data).tolist() == [255] * 6 + [1, 2, 3]


def test_label_studio_a_storage_has_a_file_per_annotation(tmp_path):
    for number in (7, 8):
        one = {
            "id": number,
            "result": [BOX],
            "task": {"id": number, "data": {"image": f"/data/local-files/?d={number}.png"}},
        }
        write(tmp_path / f"in/export/{number}", one)
        draw(tmp_path / f"in/images/{number}.png", size=(200, 100))
    splits, said = converted(None, tmp_path / "in/export", tmp_path / "o.json", images=tmp_path / "in/images")
    assert splits[""] == {f"{number}.png": [("cat", 20, 20, 50, 40)] for number in (7, 8)}
    assert "read as labelstudio: 2 files of an annotation with its task" in said
