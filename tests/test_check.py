"""`check`: its findings, and when it says that training would stop."""

import copy
import json
import os
import re
import shutil

import numpy as np
import pytest
import yaml
from conftest import WITHOUT_LIBRARY, run_command
from PIL import Image
from tiny_models import CONFIGS, trial_classes

from shared.commands.check import check_with_detector, main
from shared.commands.data_report import Report, describe, open_both
from shared.config.experiment import parse_data
from shared.data.loading import TrainingBatchSampler
from shared.errors import UserError


@pytest.fixture
def data(shapes, tmp_path):
    """A copy of the shapes, to damage."""
    return shutil.copytree(shapes, tmp_path / "data")


def section(folder, **more):
    return {
        split: {"annotations": str(folder / f"annotations/{split}.json"), "images": str(folder / split)}
        for split in ("train", "val")
    } | more


def checked(folder, images=None, **more):
    report, data = Report(), parse_data({"data": section(folder, **more)})
    describe(open_both(data, report), None, images, data.on_bad_image == "skip", report)
    return report


def change(folder, change, split="train"):
    path = folder / f"annotations/{split}.json"
    coco = json.loads(path.read_text())
    change(coco)
    path.write_text(json.dumps(coco))


def test_sound_data_has_nothing_that_stops_a_training(data):
    report = checked(data)
    assert report.stops == []
    counts = {row[0].strip(): row[1:] for row in report.rows}
    assert counts["images"] == [24, 10]
    assert counts["images read"] == [24, 10]
    coco = json.loads((data / "annotations/train.json").read_text())
    by_name = {c["name"]: sum(a["category_id"] == c["id"] and not a["iscrowd"] for a in coco["annotations"])
               for c in coco["categories"]}  # fmt: skip
    assert {row[0]: row[1] for row in report.categories} == by_name


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c["annotations"][0].update(bbox=[5, 5, 0, 9]), "1 box without width or height"),
        (lambda c: c["annotations"][0].update(bbox=[500, 5, 9, 9]), "1 box outside of the image"),
        (lambda c: c["annotations"][0].update(bbox=[100, 100, 90, 9]), "1 box over the edge of the image"),
        (
            lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]),
            "1 segmentations are wrong; that of annotation 1 has a polygon of 4",
        ),
        (lambda c: c["annotations"][0].update(bbox=[5, 5, 0.5, 9]), "1 box less than a pixel wide or high"),
        (
            lambda c: c["categories"].extend({"id": 90 + i, "name": name} for i, name in enumerate("xyz")),
            "3 categories without a box to train on: x, y, z",
        ),
    ],
)
def test_oddities_are_reported_with_their_annotation(data, spoil, message):
    for split in ("train", "val"):
        change(data, spoil, split)
    report = checked(data, images=0)
    assert any(message in remark for remark in report.remarks), report.remarks
    assert report.stops == []


def test_images_in_both_splits_are_found_by_pixels_and_boxes(data):
    shutil.copy(data / "val/000002.png", data / "train/000005.png")
    assert any("data.train and data.val share 1 image of those that were read" in r for r in checked(data).remarks)

    def as_in_val(coco):
        val = json.loads((data / "annotations/val.json").read_text())
        own = [a for a in val["annotations"] if a["image_id"] == val["images"][0]["id"]] * 2
        first = coco["images"][0]["id"]
        coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != first]
        coco["annotations"] += [{**copy.deepcopy(a), "id": 9000 + i, "image_id": first} for i, a in enumerate(own)]
        change(data, lambda c: c.update(annotations=[*c["annotations"], *({**a, "id": 9500 + i} for i, a in
               enumerate(own[: len(own) // 2]))]), "val")  # fmt: skip

    change(data, as_in_val)
    assert any("share 1 image with the same boxes" in remark for remark in checked(data, images=0).remarks)


def test_check_fails_where_a_training_would_stop(data, capsys):
    (data / "train/000003.png").write_bytes(b"")
    Image.new("RGB", (5, 5)).save(data / "val/000004.png")
    stops = checked(data).stops
    assert any("data.train: 1 of the 24 images" in stop and "000003.png (image id 4)" in stop for stop in stops)
    assert any("000004.png (image id 5) has 5×5 pixels" in stop for stop in stops)
    report = checked(data, on_bad_image="skip")
    assert report.stops == []
    assert any("000003.png" in remark for remark in report.remarks)

    change(data, lambda coco: coco["categories"][0].update(name="other"))
    (data / "val/000001.png").unlink()
    stops = checked(data, images=0).stops
    assert any("data.val.images" in stop and "000001.png" in stop for stop in stops)


def test_different_categories_stop_a_training(data):
    change(data, lambda coco: coco["categories"][0].update(name="other"))
    assert any("have different categories" in stop for stop in checked(data, images=0).stops)


def test_a_batch_larger_than_the_data_is_a_warning(caplog):
    for _ in range(2):
        TrainingBatchSampler(np.zeros(7), per_slot_batch_size=9, seed=0, slots=2)
    assert [record.message for record in caplog.records] == [
        "hyperparameters.global_batch_size: 18 is more than the 7 training images; each batch has images several times"
    ]


def test_a_key_of_one_detector_is_left_to_the_check_of_that_detector(data, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": section(data, file_client_args={"backend": "disk"})}))
    line = run_main(config)
    assert "data: unknown key 'file_client_args'" in line
    assert "use `python3 model_def.py check` in the detector's folder" in line


def test_paths_beside_the_yaml_file_are_found_without_the_detector(data, tmp_path, monkeypatch, capsys):
    text = yaml.safe_dump({"data": section(data)})
    (data / "config.yaml").write_text(text.replace(f"{data}/", ""))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_main("../data/config.yaml", "--images", "0") == 0
    assert "nothing stops the training" in capsys.readouterr().out


def run_main(*arguments):
    with pytest.raises((SystemExit, UserError)) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.args[0]


def test_check_prints_a_table_draws_a_page_and_sets_the_exit_status(data, tmp_path, capsys):
    config, page = tmp_path / "config.yaml", tmp_path / "page.png"
    config.write_text(yaml.safe_dump({"data": section(data)}))
    assert run_main(config, "--images", "all", "--page", page) == 0
    said = capsys.readouterr().out
    assert "nothing stops the training" in said
    assert "`python3 model_def.py check` in the detector's folder also checks the detector" in said
    assert "labels of data.train and data.val" in said
    assert Image.open(page).size[0] == 1800
    assert run_main(config, "--set", "data.val.annotations=/nowhere.json") == 1
    assert "stops the training: data.val.annotations: /nowhere.json does not exist" in capsys.readouterr().out
    assert "has neither data.train nor data.val" in run_main(config, "--set=data.train=", "--set=data.val=")
    assert run_main(config, "--page", "/nowhere/page.png") == "--page: /nowhere is not a folder. Fix: create it"
    first = sorted((data / "train").iterdir())[0]
    before = first.read_bytes()
    assert "is a file among the images and would be replaced" in run_main(config, "--page", first)
    assert first.read_bytes() == before
    assert "x.xyz is not a picture. Fix: give a name that ends with .png" in run_main(config, "--page", "x.xyz")
    assert "--images: 'few' is unknown. Fix: give a number or `all`" in run_main(config, "--images", "few")


# --- with the detector ------------------------------------------------------------------------------


def check_as_user(detector, config, folder, capsys, *overrides):
    """`python3 model_def.py check` with a config outside the detector's folder. Returns status and output."""
    path = folder / "anywhere.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as ended:
        run_command(check_with_detector, trial_classes()[detector], path, overrides, images="3", page=None)
    return ended.value.code, capsys.readouterr().out


def test_check_compares_boxes_with_the_model_s_smallest_anchor(detector, shapes, tmp_path, capsys):
    config = CONFIGS[detector](shapes)
    code, said = check_as_user(detector, config, tmp_path, capsys)
    assert code == 0, said
    assert "box side, pixels of the model's input" in said
    kind = "anchor" if detector in ("efficientdet", "detectron2") else "stride"
    assert f"under the model's smallest {kind}" in said
    assert re.search(r"samples made of them +3 +3", said)
    assert os.listdir(tmp_path) == ["anywhere.yaml"]


def test_a_python_config_s_smallest_anchor_is_known_too():
    if "detectron2" in WITHOUT_LIBRARY:
        pytest.skip(WITHOUT_LIBRARY["detectron2"])
    detector = trial_classes()["detectron2"]
    scale = detector.input_scale(detector.hyperparameters_class("configs/small_retinanet.py"))
    assert (scale.smallest, scale.kind, scale.short, scale.long) == (16, "anchor", 240, 320)


def test_check_reports_what_stops_a_training_with_a_fix(detector, data, tmp_path, capsys):
    """Invalid masks for a mask model, a rate that the optimizer refuses, missing images."""
    config = CONFIGS[detector](data)
    change(data, lambda coco: coco["annotations"][4].update(segmentation="mask"))
    wrong = "have a segmentation that is wrong, the first has id 5: it is neither polygons nor RLE"
    code, said = check_as_user(detector, config, tmp_path, capsys)
    assert code == (0 if detector in ("efficientdet", "detr") else 1)
    assert (f"stops the training: data.train.annotations: 1 annotations of {data}" in said) is (code == 1)
    assert (wrong in said) is (code == 1)
    change(data, lambda coco: coco["annotations"][4].update(segmentation=[]))

    if detector == "efficientdet":
        code, said = check_as_user(detector, config, tmp_path, capsys, "hyperparameters.lr=-1")
        assert (code, "(ValueError: Invalid learning rate: -1" in said) == (1, True)
    (data / "val/000002.png").unlink()
    code, said = check_as_user(detector, config, tmp_path, capsys)
    assert code == 1
    assert said.count("stops the training: data.val.images") == 1


def test_data_that_only_a_detector_s_library_opens_is_checked_by_it(data, tmp_path, capsys):
    if "detectron2" in WITHOUT_LIBRARY:
        pytest.skip(WITHOUT_LIBRARY["detectron2"])
    config = CONFIGS["detectron2"](data, "COCO-Detection/rpn_R_50_FPN_1x.yaml")
    config["searcher"]["metric"] = "box_proposals/AR@100"
    (data / "train/000000.png").write_bytes(b"no image")
    code, said = check_as_user("detectron2", config, tmp_path, capsys)
    assert code == 1
    assert re.search(r"stops the training: data.train: 1 of 3 samples cannot be made, the first: .*000000.png", said)
