"""`convert kitti` and `convert dota`: a text file per image, in pixels."""

import pytest
from data_sets import annotations_in, converted, draw, write

from shared.data.annotations import CocoAnnotations
from shared.errors import UserError

CAR = "Car 0.00 0 1.85 10.00 5.00 30.50 25.00 1.67 1.87 3.69 -16.53 2.39 58.49 1.57"
REGION = "DontCare -1 -1 -10 50.0 1.0 60.0 9.0 -1 -1 -1 -1000 -1000 -1000 -10"


@pytest.mark.parametrize("folders", [("training/label_2", "training/image_2"), ("labels", "images")])
def test_kitti_boxes_are_corners_and_dont_care_regions_are_counted(folders, tmp_path):
    root = tmp_path / "in"
    draw(root / folders[1] / "000000.png", root / folders[1] / "000001.png")
    write(root / folders[0] / "000000.txt", f"{CAR}\n{REGION}\n{CAR.replace('Car', 'Van')} 0.97\n")
    write(root / folders[0] / "000001.txt", "")
    splits, said = converted(None, root, tmp_path / "o.json")
    (images,) = splits.values()
    assert images == {"000000.png": [("Car", 10, 5, 20.5, 20), ("Van", 10, 5, 20.5, 20)], "000001.png": []}
    assert "regions left out (DontCare) 1, confidences left out 1" in said


def test_kitti_a_line_that_is_cut_off_is_named(tmp_path):
    draw(tmp_path / "in/images/a.png")
    write(tmp_path / "in/labels/a.txt", f"{CAR}\nCar 0.00 0\n")
    with pytest.raises(UserError, match=r"a\.txt: line 2: 3 words, and an object of KITTI has 15\. Fix: "):
        converted("kitti", tmp_path / "in", tmp_path / "o.json")


def test_dota_oriented_boxes_have_an_enclosing_box_and_their_corners(tmp_path):
    for split in ("train", "val"):
        draw(tmp_path / f"in/{split}/images/P0001.png")
        lines = "imagesource:GoogleEarth\ngsd:0.146\n20 5 40 25 20 45 0 25 small-vehicle 0\n1 1 9 1 9 9 1 9 ship 1\n"
        write(tmp_path / f"in/{split}/labelTxt/P0001.txt", lines)
    splits, said = converted(None, tmp_path / "in", tmp_path / "o.json")
    assert splits["val"] == {"P0001.png": [("small-vehicle", 0, 5, 40, 40), ("ship", 1, 1, 8, 8)]}
    first, second = annotations_in(tmp_path / "o_train.json")
    assert (first["area"], first["segmentation"]) == (800, [[20, 5, 40, 25, 20, 45, 0, 25]])
    assert (first["iscrowd"], second["iscrowd"]) == (0, 1)
    assert "crowds (DOTA's `difficult`) 1" in said


def test_dota_a_label_file_without_an_image_is_counted(tmp_path):
    draw(tmp_path / "in/images/a.png")
    for stem in "ab":
        write(tmp_path / f"in/labelTxt/{stem}.txt", "1 1 9 1 9 9 1 9 ship 0\n")
    _, said = converted("dota", tmp_path / "in", tmp_path / "o.json")
    assert "label files left out (without an image) 1" in said


def test_dota_an_image_too_large_to_decode_is_only_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    draw(tmp_path / "in/images/a.png")
    write(tmp_path / "in/labelTxt/a.txt", "1 1 9 1 9 9 1 9 ship 0\n")
    converted("dota", tmp_path / "in", tmp_path / "o.json")
    record = CocoAnnotations.open(tmp_path / "o.json")[0]
    assert (record.width, record.height) == (100, 50)
