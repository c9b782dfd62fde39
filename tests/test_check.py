"""`python3 -m shared check`: what it finds, and when it says that a training would stop."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from PIL import Image
from tiny_models import CONFIGS

from shared.check import check, main
from shared.experiment import parse_data


@pytest.fixture
def data(shapes, tmp_path):
    """A copy of the shapes, to spoil."""
    return shutil.copytree(shapes, tmp_path / "data")


def section(folder, **more):
    return {
        split: {"annotations": str(folder / f"annotations/{split}.json"), "images": str(folder / split)}
        for split in ("train", "val")
    } | more


def checked(folder, images=None, **more):
    return check(parse_data({"data": section(folder, **more)}), images=images)


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
        (lambda c: c["annotations"][0].update(bbox=[5, 5, 0, 9]), "1 boxes have no width or no height"),
        (lambda c: c["annotations"][0].update(bbox=[500, 5, 9, 9]), "1 boxes lie outside of their image"),
        (lambda c: c["annotations"][0].update(bbox=[100, 100, 90, 9]), "1 boxes reach over the edge"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "1 segmentations are no polygons"),
        (
            lambda c: c["annotations"][0].update(segmentation={"size": [9, 9], "counts": [81]}),
            "1 segmentations are no polygons",
        ),
        (lambda c: c["categories"].append({"id": 99, "name": "unicorn"}), "'unicorn' has no box to train on"),
    ],
)
def test_what_is_odd_in_the_annotations_is_named_with_its_annotation(data, spoil, message):
    for split in ("train", "val"):
        change(data, spoil, split)
    report = checked(data, images=0)
    assert any(message in remark for remark in report.remarks), report.remarks
    assert report.stops == []


def test_images_in_both_splits_are_found_by_their_pixels_and_by_their_boxes(data):
    shutil.copy(data / "val/000002.png", data / "train/000005.png")
    assert any("1 images that were read are in data.train and in data.val" in r for r in checked(data).remarks)

    def as_in_val(coco):
        val = json.loads((data / "annotations/val.json").read_text())
        own = [a for a in val["annotations"] if a["image_id"] == val["images"][0]["id"]] * 2
        first = coco["images"][0]["id"]
        coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != first]
        coco["annotations"] += [{**copy.deepcopy(a), "id": 9000 + i, "image_id": first} for i, a in enumerate(own)]
        change(data, lambda c: c.update(annotations=[*c["annotations"], *({**a, "id": 9500 + i} for i, a in
               enumerate(own[: len(own) // 2]))]), "val")  # fmt: skip

    change(data, as_in_val)
    assert any("1 images with the very same boxes" in remark for remark in checked(data, images=0).remarks)


def test_what_would_stop_a_training_stops_it_here(data, capsys):
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


def test_the_command_reports_in_a_table_draws_a_page_and_ends_with_a_status(data, tmp_path, capsys):
    config, page = tmp_path / "config.yaml", tmp_path / "page.png"
    config.write_text(yaml.safe_dump({"data": section(data)}))
    with pytest.raises(SystemExit) as ended:
        main([str(config), "--images", "all", "--page", str(page)])
    assert ended.value.code == 0
    assert "nothing stops the training" in capsys.readouterr().out
    assert Image.open(page).size[0] == 1800
    with pytest.raises(SystemExit) as ended:
        main([str(config), "--set", "data.val.annotations=/nowhere.json"])
    assert ended.value.code == 1
    assert "stops the training: data.val.annotations: /nowhere.json does not exist" in capsys.readouterr().out


def test_box_sizes_are_compared_with_the_detector_s_smallest_anchor_or_stride(detector, shapes, tmp_path):
    folder = ROOT / detector
    config = CONFIGS[detector](shapes)
    path = folder / "const_fake.yaml"
    overrides = [
        f"data.{split}.{key}={value}" for split in ("train", "val") for key, value in config["data"][split].items()
    ]
    sets = [argument for override in ["data.backend=disk", *overrides] for argument in ("--set", override)]
    done = subprocess.run(
        [sys.executable, "-m", "shared", "check", path.name, "--images", "2", *sets],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "box side, pixels of the model's input" in done.stdout
    assert "under the model's smallest " + ("stride" if detector == "mmdetection" else "anchor") in done.stdout
