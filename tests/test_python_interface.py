"""`shared` in your own program: docs/reference/python.md, and errors."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from setuptools.config.setupcfg import read_configuration

from shared.data import synthetic
from shared.data.annotations import CocoAnnotations
from shared.errors import UserError
from shared.evaluation.detections import Detections, from_coco_results
from shared.evaluation.evaluator import evaluate


@pytest.fixture(scope="module")
def annotations():
    return CocoAnnotations.from_dict(synthetic.coco_split(5, 4))


def test_the_python_page_runs_as_it_is_written(shapes, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(shapes)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/reference/python.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    names = {}
    for block in blocks:
        exec(block, names)
    for file in ("picture.png", "report.html", "compare.html"):
        assert (tmp_path / file).is_file()
    assert names["metrics"]["bbox_mAP"] > 0.5
    assert names["comparison"].overall.delta > 0


def test_the_installed_package_is_all_of_shared_and_nothing_else():
    packages = set(read_configuration(ROOT / "setup.cfg")["options"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "shared").rglob("*.py")}
    assert packages == {".".join(folder.parts) for folder in folders}


BOX = [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            Detections(1, [BOX] * 2, [0.5, 0.5], [0, 3]),
            "image 1: the label 3 is not valid. Fix: give labels from 0 to 2",
        ),
        (Detections(2, [BOX], [0.5], [-1]), "image 2: the label -1"),
        (Detections(99, [BOX], [0.5], [0]), "image 99: no image of the annotations has this id"),
        (Detections("1", [BOX], [0.5], [0]), "image '1': no image"),
        (Detections(3, [BOX, [1, 2, np.nan, 4]], [0.5, 0.5], [0, 0]), r"image 3: the box \[1.0, 2.0, nan, 4.0\]"),
        (Detections(3, [BOX], [np.inf], [0]), "image 3: the score inf is not finite"),
    ],
)
def test_wrong_detections_are_one_line_that_names_image_and_value(annotations, found, message):
    with pytest.raises(UserError, match=message):
        evaluate(annotations, [Detections(4, [BOX], [0.5], [0]), found], "bbox")


def test_detections_that_come_twice_and_wrong_image_ids_are_errors(annotations):
    found = Detections(1, [BOX], [0.5], [0])
    with pytest.raises(UserError, match="image 1: they are given twice"):
        evaluate(annotations, [found, found])
    with pytest.raises(UserError, match="image_ids: no image of the annotations has the id 9"):
        evaluate(annotations, [found], image_ids=[1, 9])


@pytest.mark.parametrize("boxes", [[1, 2, 3, 4], [[1, 2, 3, 4, 5]], [[1, 2], [3, 4]], np.ones((4, 2))])
def test_boxes_of_a_wrong_shape_are_an_error(boxes):
    with pytest.raises(ValueError, match=r"image 7: boxes \(.*and they are \(M, 4\)"):
        Detections(7, boxes, [0.5], [0])


def test_results_become_detections_in_the_order_of_images(annotations):
    result = {"category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5, "keypoints": [1, 2, 1]}
    square = [[10, 10, 20, 10, 20, 20, 10, 20]]
    results = [{**result, "image_id": image_id, "segmentation": square} for image_id in (2, 1, 2)]
    first, second = from_coco_results(results, annotations)
    assert (first.image_id, second.image_id, len(first), len(second)) == (1, 2, 1, 2)
    assert second.boxes.tolist() == [[1, 2, 4, 6]] * 2
    assert second.labels.tolist() == [2, 2]
    assert second.keypoints.shape == (2, 1, 3)
    assert second.masks[0]["size"] == [128, 128]
    assert {"bbox_mAP", "segm_mAP"} <= evaluate(annotations, [first, second], ("bbox", "segm")).keys()
    assert from_coco_results([], annotations) == []


def test_results_of_other_tools_are_read_as_they_write_numbers(annotations, tmp_path):
    plain = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}
    others = [
        {**plain, "image_id": 1.0, "category_id": 3.0},
        {**plain, "image_id": "1", "category_id": "3", "score": "0.5", "bbox": ["1", "2", "3", "4"]},
        {"file_name": annotations.file_name(0), "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5},
    ]
    for other in (plain, *others):
        for mark in (b"", b"\xef\xbb\xbf"):
            (tmp_path / "results.json").write_bytes(mark + json.dumps([other]).encode())
            (found,) = from_coco_results(tmp_path / "results.json", annotations)
            assert (found.image_id, found.boxes.tolist(), found.scores.tolist()) == (1, [[1, 2, 4, 6]], [0.5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segmentation": {"size": [128, 128], "counts": "!!!"}}, "result 0, of image 1: `segmentation` is not a mask"),
        ({"segmentation": {"size": [128, 128], "counts": [5]}}, "`segmentation` is not a mask of the image"),
        ({"image_id": 1.5}, "result 0: `image_id` is 1.5. Fix: name images by id or by file"),
        ({"image_id": None}, "result 0: `image_id` is None"),
        ({"bbox": [0.1, 0.2, 0.3, 0.4]}, "all 1 boxes lie between 0 and 1"),
    ],
)
def test_results_that_cannot_be_meant_are_one_line(changes, message, annotations):
    result = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5, **changes}
    with pytest.raises(UserError, match=re.escape(message)):
        from_coco_results([result], annotations)


def test_results_with_corners_for_sizes_are_refused(annotations):
    rows = [{"image_id": 1, "category_id": 3, "bbox": [x, x, x + 30, x + 30], "score": 0.5} for x in range(20, 98, 10)]
    with pytest.raises(UserError, match="its boxes look like corners, x1 y1 x2 y2, and COCO has x y width height"):
        from_coco_results(rows, annotations)


def test_a_negative_size_in_results_is_a_warning(annotations, caplog):
    result = {"image_id": 1, "category_id": 3, "bbox": [1, 2, -3, 4], "score": 0.5}
    from_coco_results([result], annotations)
    assert "negative width or height, and so without area: 1" in caplog.text
