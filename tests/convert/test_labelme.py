"""`convert labelme`."""

import base64
import io

import numpy as np
import pytest
from data_sets import annotations_in, converted, draw, write
from PIL import Image

from shared.errors import UserError


def shape(kind, points, label="cat", **more):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **more}


def labelme_file(file, *shapes, image="a.png", size=(100, 50)):
    content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": image, "imageData": None}
    return write(file, {**content, "imageWidth": size[0], "imageHeight": size[1]})


def test_labelme_shapes_with_an_area_are_converted_and_others_counted(tmp_path):
    draw(tmp_path / "in/a.png")
    window = io.BytesIO()
    Image.fromarray(np.array([[0, 1, 1], [0, 1, 0]], np.uint8)).save(window, "PNG")
    labelme_file(
        tmp_path / "in/a.json",
        shape("rectangle", [[30, 25], [10, 5]]),
        shape("polygon", [[10, 10], [30, 10], [30, 30]]),
        shape("circle", [[50, 25], [50, 35]]),
        shape("mask", [[40, 10], [42, 11]], mask=base64.b64encode(window.getvalue()).decode()),
        shape("point", [[1, 1]]),
        shape("linestrip", [[1, 1], [5, 5]]),
    )
    splits, said = converted(None, tmp_path / "in", tmp_path / "o.json")
    boxes = [(10, 5, 20, 20), (10, 10, 20, 20), (40, 15, 20, 20), (41, 10, 2, 2)]
    assert splits[""]["a.png"] == [("cat", *box) for box in boxes]
    assert [round(row["area"]) for row in annotations_in(tmp_path / "o.json")] == [400, 200, 314, 3]
    assert "point left out 1, linestrip left out 1" in said


def test_labelme_polygons_of_one_group_are_one_object(tmp_path):
    draw(tmp_path / "in/a.png")
    pieces = ([[0, 0], [10, 0], [10, 10]], [[20, 0], [30, 0], [30, 10]])
    grouped = [shape("polygon", points, group_id=1) for points in pieces]
    labelme_file(tmp_path / "in/a.json", *grouped, shape("polygon", pieces[0], "dog", group_id=1))
    splits, _ = converted("labelme", tmp_path / "in", tmp_path / "o.json")
    assert splits[""]["a.png"] == [("cat", 0, 0, 30, 10), ("dog", 0, 0, 10, 10)]
    assert annotations_in(tmp_path / "o.json")[0]["area"] == 100


def test_labelme_images_lie_where_image_path_says_or_have_the_same_name(tmp_path):
    draw(tmp_path / "in/images/a.png", tmp_path / "in/images/b.png")
    labelme_file(tmp_path / "in/labels/a.json", shape("rectangle", [[1, 2], [3, 4]]), image="..\\images\\a.png")
    labelme_file(tmp_path / "in/labels/b.json", image="IMG_17.jpeg")
    splits, _ = converted(None, tmp_path / "in", tmp_path / "o.json")
    assert splits[""] == {"a.png": [("cat", 1, 2, 2, 2)], "b.png": []}


def test_labelme_without_a_size_takes_the_image_s(tmp_path):
    draw(tmp_path / "in/a.png", size=(64, 48))
    labelme_file(tmp_path / "in/a.json", shape("rectangle", [[1, 2], [3, 4]]), size=(None, None))
    splits, _ = converted("labelme", tmp_path / "in", tmp_path / "o.json")
    assert splits[""] == {"a.png": [("cat", 1, 2, 2, 2)]}


def test_labelme_a_folder_per_split(tmp_path):
    for split in ("train", "val"):
        draw(tmp_path / f"in/{split}/a.png")
        labelme_file(tmp_path / f"in/{split}/a.json", shape("rectangle", [[1, 2], [3, 4]]))
    splits, _ = converted("labelme", tmp_path / "in", tmp_path / "o.json")
    assert splits == {split: {"a.png": [("cat", 1, 2, 2, 2)]} for split in ("train", "val")}


def test_labelme_a_wrong_shape_is_named(tmp_path):
    labelme_file(tmp_path / "in/a.json", shape("rectangle", [[1, 2]]))
    with pytest.raises(UserError, match=r"a\.json: shape 1 \(rectangle\): 1 points, and 2 are needed\. Fix: "):
        converted("labelme", tmp_path / "in", tmp_path / "o.json")


def test_labelme_a_file_that_is_cut_off_is_named(tmp_path):
    labelme_file(tmp_path / "in/a.json", shape("rectangle", [[1, 2], [3, 4]]))
    write(tmp_path / "in/b.json", (tmp_path / "in/a.json").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"b\.json: is not the JSON that was expected .* Fix: export it again"):
        converted("labelme", tmp_path / "in", tmp_path / "o.json")
