"""`Predictor`: detections of a run from a Python program, equal to `predict`."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from conftest import ROOT, other_detectors_are_slow, run_command
from PIL import Image
from tiny_models import CONFIGS, trial_classes
from without_figures import leave_out_figures

from shared.commands.train import train_locally
from shared.errors import UserError
from shared.predictor import Predictor


def train_a_batch(folder, shapes, detector="efficientdet", trial_class=None):
    """Trains a tiny detector for one batch. Returns the run's folder."""
    config = CONFIGS[detector](shapes)
    config["searcher"]["max_length"] = {"batches": 1}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        leave_out_figures(patch.setattr)
        trial_class = trial_class or trial_classes()[detector]
        run_command(train_locally, trial_class, folder / "run.yaml", output_dir=folder / "run", resume=None)
    return folder / "run"


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """A run of a tiny EfficientDet."""
    return train_a_batch(tmp_path_factory.mktemp("trained"), shapes)


@other_detectors_are_slow
def test_python_gives_the_numbers_of_predict(detector, command, shapes, tmp_path):
    run, out = train_a_batch(tmp_path, shapes, detector), tmp_path / "out"
    arguments = ("--checkpoint", run / "checkpoints/best", "--images", shapes / "val", "--output", out)
    command(trial_classes()[detector], "predict", run / "config.yaml", *arguments)
    paths = sorted((shapes / "val").iterdir())
    with Predictor(run) as predictor:
        found = predictor(paths)
    results = [{**result, "image_id": i + 1} for i, each in enumerate(found) for result in each.to_coco()]
    written = json.loads((out / "results.json").read_text())
    assert len(results) > 10
    assert results == [{key: value for key, value in result.items() if key != "file_name"} for result in written]


def test_a_path_an_array_and_a_pillow_image_give_the_same(run, shapes):
    path = min((shapes / "val").iterdir())
    predictor = Predictor(run / "checkpoints/last")
    image = Image.open(path)
    found = [predictor(one) for one in (path, str(path), np.asarray(image), image)]
    assert len(found[0]) > 10
    for other in found[1:]:
        np.testing.assert_array_equal(other.boxes, found[0].boxes)
        np.testing.assert_array_equal(other.scores, found[0].scores)
    assert predictor([]) == []
    assert predictor(path, min_score=0.999).scores.tolist() == []
    assert set(found[0].names) <= {category["name"] for category in predictor.categories}


def test_python_detects_in_tiles_as_predict_does(run, command, shapes, tmp_path):
    large = Image.new("RGB", (300, 200), "gray")
    for i, path in enumerate(sorted((shapes / "val").iterdir())[:2]):
        large.paste(Image.open(path), (20 + 140 * i, 40))
    large.save(tmp_path / "large.png")
    arguments = ("--checkpoint", run / "checkpoints/best", "--images", tmp_path / "large.png", "--tiles", 128)
    command(trial_classes()["efficientdet"], "predict", run / "config.yaml", *arguments, "--output", tmp_path / "out")
    written = json.loads((tmp_path / "out/results.json").read_text())
    found = Predictor(run)(large, tiles=128)
    assert [result["bbox"] for result in written] == [result["bbox"] for result in found.to_coco()]
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_the_lines_of_the_predict_page_run_as_written(run, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/cells").symlink_to(run)
    shutil.copy(min((shapes / "val").iterdir()), "image.jpg")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/predict.md").read_text(), re.DOTALL)
    assert len(block.strip().splitlines()) == 6
    exec(block, {})
    assert Image.open("found.png").size == Image.open("image.jpg").size


def test_detections_become_those_of_supervision(run, shapes):
    supervision = pytest.importorskip("supervision")
    found = Predictor(run)(min((shapes / "val").iterdir()))
    theirs = found.to_supervision()
    assert isinstance(theirs, supervision.Detections)
    np.testing.assert_array_equal(theirs.xyxy, found.boxes)
    assert theirs["class_name"].tolist() == found.names


def test_a_detector_in_the_working_directory_is_found(shapes, tmp_path, monkeypatch):
    from model_def import EfficientDetTrial

    mine = type("MyTrial", (EfficientDetTrial,), {"__module__": EfficientDetTrial.__module__})
    run = train_a_batch(tmp_path, shapes, trial_class=mine)
    with pytest.raises(UserError, match=r"has its detector, the class MyTrial\. Fix: give the detector's folder"):
        Predictor(run)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model_def.py").write_text(
        "from model_def import EfficientDetTrial\n\n\nclass MyTrial(EfficientDetTrial):\n    pass\n"
    )
    picture = np.zeros((64, 64, 3), np.uint8)
    found = Predictor(run, detector=folder)(picture)
    monkeypatch.chdir(tmp_path)
    assert Predictor(run)(picture).to_coco() == found.to_coco()


def test_the_code_in_a_checkpoint_is_not_run(run, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(run / "checkpoints/best", checkpoint)
    (checkpoint / "manifest.json").unlink()  # as a stranger's
    (checkpoint / "code").mkdir(exist_ok=True)
    (checkpoint / "code/model_def.py").write_text("class EfficientDetTrial:\n    pass\n\n\nraise SystemError\n")
    monkeypatch.chdir(checkpoint)
    assert Predictor(".").categories


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.png", "nowhere.png: .*No such file"),
        (__file__, "test_predictor.py: it is not an image"),
        (np.zeros((3, 64, 64), np.float32), r"image 0: it is an array \(3, 64, 64\) of float32\. Fix: give a path"),
        (7, "image 0: it is 'int'. Fix: give a path, a Pillow image"),
    ],
)
def test_an_image_that_cannot_be_read_is_one_line(run, given, message):
    with pytest.raises(UserError, match=message):
        Predictor(run)(given)


def test_a_run_without_checkpoint_is_one_line(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run: the run has no checkpoint yet\. Fix: wait"):
        Predictor(tmp_path / "run")
    with pytest.raises(UserError, match=r"is not a checkpoint\. Fix: give"):
        Predictor(tmp_path / "nothing")


def test_hyperparameters_given_in_python_replace_those_of_the_run(run, shapes):
    path = min((shapes / "val").iterdir())
    assert len(Predictor(run, hyperparameters={"max_detections": 5})(path)) == 5
    with pytest.raises(UserError, match=r"unknown key .max_detektions.; did you mean .max_detections"):
        Predictor(run, hyperparameters={"max_detektions": 5})
