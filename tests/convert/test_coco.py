"""`convert coco`: files of Roboflow and Label Studio as training takes them."""

import json

import pytest
from data_sets import annotations_in, converted, draw, write

from shared.data.annotations import CocoAnnotations
from shared.data.convert.conversion import convert
from shared.errors import UserError


def coco(names=("a.png",), categories=((1, "cat"), (2, "dog")), **more):
    """Images of 64×48 with these names, each with a box of the first category."""
    first = categories[0][0]
    return {
        "images": [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(names, 1)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": first, "bbox": [4, 4, 24, 20], "area": 480, "iscrowd": 0, **more}
            for i in range(1, len(names) + 1)
        ],
        "categories": [{"id": number, "name": name} for number, name in categories],
    }


BOX = ("cat", 4, 4, 24, 20)


@pytest.mark.parametrize(
    "written", ["%C3%A9cran%200.png", "images\\écran 0.png", "e\u0301cran 0.png", "../../media/upload/1/écran 0.png"]
)
def test_coco_names_of_label_studio_become_those_of_the_images(written, tmp_path):
    draw(tmp_path / "in/images/écran 0.png", size=(64, 48))
    write(tmp_path / "in/result.json", coco([written]))
    splits, _ = converted(None, tmp_path / "in/result.json", tmp_path / "o.json", images=tmp_path / "in/images")
    assert splits[""] == {"écran 0.png": [BOX]}


def test_coco_a_folder_of_roboflow_is_read_by_its_path_alone(tmp_path):
    for split in ("train", "valid", "test"):
        draw(tmp_path / f"in/{split}/a.png", size=(64, 48))
        write(tmp_path / f"in/{split}/_annotations.coco.json", coco(categories=((1, "cat"), (2, "dog"))))
    splits, said = converted(None, tmp_path / "in", tmp_path / "o.json")
    assert list(splits) == ["train", "val", "test"]
    assert splits["val"] == {"a.png": [BOX]}
    assert "read as coco: " in said


def test_coco_an_unused_root_category_with_a_duplicate_name_is_omitted(tmp_path):
    content = coco(categories=((1, "fish"), (0, "fish")))
    _, said = converted("coco", write(tmp_path / "a.json", content), tmp_path / "o.json")
    assert CocoAnnotations.open(tmp_path / "o.json").categories == [{"id": 1, "name": "fish"}]
    assert "category 0 is omitted: it has no annotations" in said


def test_coco_numbers_in_quotes_are_read(tmp_path):
    content = coco()
    content["images"][0] |= {"id": "7", "width": "64", "height": "48.0"}
    content["annotations"][0] |= {"image_id": "7", "bbox": [4, 4, "24", "20.0"], "category_id": "1", "area": "480"}
    splits, _ = converted("coco", write(tmp_path / "a.json", content), tmp_path / "o.json")
    assert splits[""] == {"a.png": [BOX]}
    assert CocoAnnotations.open(tmp_path / "o.json").image_ids.tolist() == [7]


def test_coco_a_number_that_is_none_is_named_with_its_annotation(tmp_path):
    content = coco(bbox=[4, 4, "wide", 20])
    with pytest.raises(UserError, match=r"a\.json: annotation 1: bbox is 'wide', which is not a finite number\. Fix: "):
        converted("coco", write(tmp_path / "a.json", content), tmp_path / "o.json")


def test_coco_an_area_of_0_is_filled_in_and_counted(tmp_path):
    content = coco(["a.png", "b.png"], area=0)
    content["annotations"][1]["segmentation"] = [[4, 4, 28, 4, 28, 24]]
    _, said = converted("coco", write(tmp_path / "a.json", content), tmp_path / "o.json")
    assert [row["area"] for row in annotations_in(tmp_path / "o.json")] == [480, 240]
    assert "areas of 0 filled in 2" in said


def test_coco_ids_keypoints_and_other_keys_stay(tmp_path):
    content = coco(keypoints=[5, 5, 2], num_keypoints=1, score=0.5)
    content["categories"][0] |= {"keypoints": ["nose"], "skeleton": []}
    converted("coco", write(tmp_path / "a.json", content), tmp_path / "o.json")
    again = json.loads((tmp_path / "o.json").read_text())
    assert again["categories"] == content["categories"]
    assert again["annotations"][0] == content["annotations"][0]


def test_coco_an_output_that_is_the_input_is_refused(tmp_path):
    file = write(tmp_path / "a.json", coco())
    with pytest.raises(UserError, match=r"OUTPUT: .*a\.json would be replaced, and is an input\. Fix: "):
        converted("coco", file, file)


def test_coco_images_lie_in_the_folders_of_the_splits_as_coco_has_them(tmp_path):
    for split in ("train", "val"):
        draw(tmp_path / f"in/set/{split}2017/a.png", size=(64, 48))
        write(tmp_path / f"in/set/annotations/instances_{split}2017.json", coco())
    for source in (tmp_path / "in", tmp_path / "in/set"):
        written = convert(None, source, tmp_path / "o.json")
        assert [one.part.folder for one in written] == [
            tmp_path / f"in/set/{name}" for name in ("train2017", "val2017")
        ]
    (one,) = convert("coco", tmp_path / "in/set/annotations/instances_val2017.json", tmp_path / "o.json")
    assert one.part.folder == tmp_path / "in/set/val2017"
