"""`hyperparameters.validation_loss` of each detector: the training losses on the validation images."""

import json
import math
import os
import signal

import pytest
import torch
import yaml
from conftest import ROOT, other_detectors_are_slow, reports, run_model_def
from test_resume import assert_same_bits, final_state
from tiny_models import CONFIGS, TINY_DETECTORS, trial_classes

from shared.errors import UserError
from shared.training.checkpoints import read_checkpoint
from shared.training.validation import giving_losses


def config_of(detector, shapes, *arguments, batches=2, **hyperparameters):
    config = CONFIGS[detector](shapes, *arguments)
    config["data"]["workers"] = 0
    config["hyperparameters"].update(validation_loss=True, **hyperparameters)
    config["searcher"]["max_length"] = {"batches": batches}
    config["min_validation_period"] = {"batches": 2}
    return config


def retinanet_of(detector, shapes, **changes):
    """With losses of a state of their own (Detectron2's) and without random samples (Mask R-CNN's)."""
    config_file = getattr(TINY_DETECTORS[detector], "RETINANET", None)
    return config_of(detector, shapes, *([config_file] if config_file else []), **changes)


def of_module(trial_class, **members):
    """A subclass in the module that its checkpoints name."""
    return type(trial_class.__name__, (trial_class,), {"__module__": trial_class.__module__, **members})


@pytest.fixture
def odd_val(shapes, tmp_path):
    """A validation set of 7 images, one without annotations; and the ids of the others."""
    coco = json.loads((shapes / "annotations/val.json").read_text())
    coco["images"] = coco["images"][:7]
    ids = [image["id"] for image in coco["images"]]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in ids[:2] + ids[3:]]
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(coco))
    return path, ids[:2] + ids[3:]


def test_it_is_the_mean_over_images_of_the_library_s_own_losses(detector, shapes, train, odd_val):
    trial_class, started = trial_classes()[detector], []
    size = {"input_size": 192} if detector == "efficientdet" else {}
    config = retinanet_of(detector, shapes, **size)
    config["data"]["val"]["annotations"] = str(odd_val[0])
    run = train(
        of_module(trial_class, begin_training=lambda t, f: started.append(t) or trial_class.begin_training(t, f)),
        config,
    )
    with torch.no_grad():
        of_images = list(TINY_DETECTORS[detector].losses_by_hand(started[0], odd_val[0], shapes / "val"))
    # the others do not train on images without objects
    assert len(of_images) == (7 if hasattr(TINY_DETECTORS[detector], "TRAINS_WITHOUT_OBJECTS") else 6)
    (reported,) = reports(run, "val")
    found = {name: value for name, value in reported["metrics"].items() if name.startswith("val_")}
    means = {f"val_{name}": sum(losses[name] for losses in of_images) / len(of_images) for name in of_images[0]}
    assert found == pytest.approx(means, rel=1e-5)
    assert "val_loss" in found


def of_a_first_validation(run):
    first = reports(run, "val")[0]
    assert first["batches"] == 0
    return {name: value for name, value in first["metrics"].items() if name.startswith("val_")}


@pytest.mark.slow
def test_it_is_the_same_in_two_processes_and_with_loader_workers(detector, shapes, train, odd_val, tmp_path):
    config = config_of(detector, shapes, batches=1)
    config["data"]["val"]["annotations"] = str(odd_val[0])
    config["perform_initial_validation"] = True
    alone = of_a_first_validation(train(trial_classes()[detector], config, name="alone"))
    config["data"]["workers"] = 2
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(config))
    run_model_def("train", path, "--output-dir", tmp_path / "two", processes=2, cwd=ROOT / detector)
    assert of_a_first_validation(tmp_path / "two") == alone
    assert all(math.isfinite(value) for value in alone.values())


@other_detectors_are_slow
def test_training_is_bit_for_bit_the_same_without_validation_loss(detector, shapes, train):
    make = retinanet_of if detector == "detectron2" else config_of
    runs = []
    for validates in (True, False):
        config = make(detector, shapes)
        config["min_validation_period"] = {"batches": 1}
        config["hyperparameters"]["validation_loss"] = validates
        runs.append(train(trial_classes()[detector], config, name=f"losses-{validates}"))
    assert_same_bits(*map(final_state, runs))
    beside = [
        [{k: v for k, v in line["metrics"].items() if not k.startswith("val_")} for line in reports(run, "val")]
        for run in runs
    ]
    assert beside[0] == beside[1]


def test_an_interrupted_validation_gives_the_same_losses_after_a_resume(shapes, train, tmp_path):
    trial_class = trial_classes().get("detectron2")
    if trial_class is None:
        pytest.skip("Detectron2 is not here, whose losses have a state of their own")
    config, stopped = retinanet_of("detectron2", shapes), []

    def detect(self, *arguments):
        if not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGTERM))
        return trial_class.detect(self, *arguments)

    whole = train(trial_class, config, name="whole")
    with pytest.raises(SystemExit):
        train(of_module(trial_class, detect=detect), config)
    assert not reports(tmp_path / "run", "val")
    assert reports(train(trial_class, config, resume="last"), "val") == reports(whole, "val")


def test_it_steers_and_the_checkpoint_of_the_lowest_is_the_best(shapes, train):
    trial_class = trial_classes()["efficientdet"]

    def image_losses(self, *arguments):
        losses = trial_class.image_losses(self, *arguments)
        return {**losses, "loss": losses["loss"] + 100 * abs(self.batches_trained - 4)}

    config = config_of("efficientdet", shapes, batches=6)
    config["searcher"].update(metric="val_loss", smaller_is_better=True)
    run = train(of_module(trial_class, image_losses=image_losses), config)
    values = {line["batches"]: line["metrics"]["val_loss"] for line in reports(run, "val")}
    assert min(values, key=values.get) == read_checkpoint(run / "checkpoints/best").batches == 4


def test_images_that_are_skipped_or_cannot_be_read_do_not_count(shapes, train, tmp_path):
    trial_class = trial_classes()["efficientdet"]
    coco = json.loads((shapes / "annotations/val.json").read_text())
    (tmp_path / "images").mkdir()
    for image in coco["images"]:
        (tmp_path / "images" / image["file_name"]).write_bytes((shapes / "val" / image["file_name"]).read_bytes())
    broken = tmp_path / "images" / coco["images"][2]["file_name"]
    broken.write_bytes(b"no image")
    config = config_of("efficientdet", shapes, val_skip=2)
    config["data"]["on_bad_image"] = "skip"
    config["data"]["val"]["images"] = str(tmp_path / "images")
    with_broken = reports(train(trial_class, config, name="broken"), "val")[0]["metrics"]["val_loss"]

    kept = [image for image in coco["images"][::2] if image["file_name"] != broken.name]
    ids = {image["id"] for image in kept}
    annotations = [annotation for annotation in coco["annotations"] if annotation["image_id"] in ids]
    (tmp_path / "kept.json").write_text(json.dumps({**coco, "images": kept, "annotations": annotations}))
    config["hyperparameters"]["val_skip"] = 0
    config["data"]["val"] = {"annotations": str(tmp_path / "kept.json"), "images": str(shapes / "val")}
    without = reports(train(trial_class, config, name="without"), "val")[0]["metrics"]["val_loss"]
    assert with_broken == without


def test_a_library_without_validation_losses_is_an_early_error(shapes, train):
    trial_class = trial_classes()["efficientdet"]

    def image_losses(self, *arguments):
        raise KeyError("teacher")

    with pytest.raises(UserError, match="validation_loss: the losses of this model cannot be computed"):
        train(of_module(trial_class, image_losses=image_losses), config_of("efficientdet", shapes))


def test_val_loss_as_searcher_metric_needs_the_hyperparameter(refused, run_config, tmp_path):
    metric = ("--set", "searcher.metric=val_loss", "--set", "searcher.smaller_is_better=true")
    line = refused("train", run_config(), "--output-dir", tmp_path / "run", *metric)
    assert "'val_loss' is not reported. Fix: hyperparameters.validation_loss: true" in line


@pytest.mark.parametrize(
    ("detector", "config_file"),
    [
        (name, config_file)
        for name, tiny in TINY_DETECTORS.items()
        for config_file in getattr(tiny, "WITHOUT_VALIDATION_LOSS", [])
    ],
    indirect=["detector"],
)
def test_an_unavailable_validation_loss_is_one_line_before_training(detector, config_file, shapes, train):
    config = config_of(detector, shapes, config_file)
    if "cornernet" in config_file:
        # of the size alone: the error is about the pipeline
        config["hyperparameters"]["config_overrides"] = {
            "model.backbone.num_stacks": 1,
            "model.backbone.init_cfg": None,
        }
        config["hyperparameters"]["config_overrides"].update({"model.bbox_head.num_feat_levels": 1})
    with pytest.raises(UserError, match=r"^hyperparameters\.validation_loss: .*Fix: (omit|remove)"):
        train(trial_classes()[detector], config)


def test_a_model_that_gives_losses_is_as_before_afterwards():
    class Detector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = torch.nn.BatchNorm2d(3), torch.nn.Dropout()
            self.register_buffer("seen", torch.zeros(1))
            self.history = [1]

        def forward(self, images):
            assert self.training
            assert not self.norm.training
            assert not self.drop.training
            self.seen += 1
            self.seen = self.seen * 2
            self.running = self.seen
            self.history.append(2)
            return self.drop(self.norm(images)).sum()

    model = Detector().eval()
    seen, images = model.seen, torch.rand(2, 3, 4, 4)
    with torch.no_grad(), giving_losses(model, {"Detector": ("history",)}):
        model(images)
    assert model.seen is seen
    assert model.seen.item() == 0
    assert model.history == [1]
    assert not hasattr(model, "running")
    assert not any(module.training for module in model.modules())
