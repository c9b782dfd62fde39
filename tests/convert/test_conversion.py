"""`python3 -m shared convert` with any format: COCO files that a training takes."""

import hotcoco
import numpy as np
import pytest
from data_sets import draw

from shared.data.annotations import CocoAnnotations
from shared.data.convert.command_line import main
from shared.data.convert.conversion import convert
from shared.errors import UserError
from shared.experiment import open_split, parse_data


@pytest.fixture
def sources(shapes, tmp_path):
    """The shapes' training data in each format."""
    coco = hotcoco.COCO(str(shapes / "annotations/train.json"))
    (tmp_path / "voc").mkdir()
    coco.to_voc(str(tmp_path / "voc"))
    coco.to_yolo(str(tmp_path / "yolo"))
    coco.to_cvat(str(tmp_path / "cvat.xml"))
    return {"voc": tmp_path / "voc", "yolo": tmp_path / "yolo", "cvat": tmp_path / "cvat.xml"}


def boxes_by_name(annotations, crowds=True):
    named = {}
    for record in annotations:
        kept = np.flatnonzero(crowds | ~record.iscrowd)
        names = [annotations.category_names[label] for label in record.labels]
        named[record.file_name] = {(names[i], *record.boxes[i].tolist()) for i in kept}
    return named


@pytest.mark.parametrize("kind", ["voc", "yolo", "cvat"])
def test_a_format_s_boxes_come_out_as_a_data_set(kind, sources, shapes, tmp_path):
    images = shapes / "train" if kind == "yolo" else None
    (written,) = convert(kind, sources[kind], tmp_path / "out/all.json", images)
    data = {"train": {"annotations": str(written.path), "images": str(shapes / "train")}}
    ours = boxes_by_name(open_split(parse_data({"data": data}), "train").annotations)
    # of which YOLO's labels have no crowds
    expected = boxes_by_name(CocoAnnotations.open(shapes / "annotations/train.json"), crowds=kind != "yolo")
    assert ours.keys() == expected.keys()
    for name, boxes in expected.items():
        assert sorted(b[0] for b in ours[name]) == sorted(b[0] for b in boxes)
        for box in boxes:
            assert any(box[0] == b[0] and np.abs(np.subtract(box[1:], b[1:])).max() <= 2 for b in ours[name])


def test_a_split_has_each_image_once(sources, shapes, tmp_path):
    train, val = (one.path for one in convert("voc", sources["voc"], tmp_path / "cells.json", val_share=0.25))
    names = [
        [annotations.file_name(i) for i in range(len(annotations))]
        for annotations in map(CocoAnnotations.open, (train, val))
    ]
    assert (train.name, val.name) == ("cells_train.json", "cells_val.json")
    assert len(names[1]) == 6
    assert sorted(names[0] + names[1]) == sorted(file.name for file in (shapes / "train").iterdir())


def test_what_is_wrong_is_one_line(sources, shapes, tmp_path):
    with pytest.raises(SystemExit, match="error: /nowhere: does not exist"):
        main(["voc", "/nowhere", str(tmp_path / "a.json")])
    with pytest.raises(UserError, match=r"neither `train` nor `val`.*give --images"):
        convert("yolo", sources["yolo"], tmp_path / "a.json")
    draw(tmp_path / "others/other.png")
    with pytest.raises(UserError, match=r"has no label file for an image .*the label file .*yolo/0000\d+\.txt"):
        convert("yolo", sources["yolo"], tmp_path / "a.json", tmp_path / "others")
    (tmp_path / "bad.xml").write_text("<no")
    with pytest.raises(UserError, match=r"bad.xml: cannot be read as cvat"):
        convert("cvat", tmp_path / "bad.xml", tmp_path / "a.json")
    (tmp_path / "other.xml").write_text("<annotations/>")
    with pytest.raises(UserError, match=r"is a folder with \d XML files: give the one to read"):
        convert("cvat", tmp_path, tmp_path / "a.json")
