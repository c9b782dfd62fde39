"""Runs of Detectron2's detectors: two processes, evaluation and prediction, bad input."""

import copy
import json
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, reports, run_model_def
from PIL import Image
from pycocotools import mask as coco_mask
from test_resume_changes import last, of_length
from test_switches import small
from tiny_detectron2 import DETECTRON2, detectron2_config
from tiny_experiment import load_model_def
from tiny_models import with_keypoints

from shared.errors import DivergedError, UserError
from shared.training.checkpoints import read_checkpoint

RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
KEYPOINT_RCNN = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"


@pytest.fixture(scope="module")
def trial_class():
    return load_model_def("detectron2").Detectron2Trial


def in_process(config, batches=2):
    config["data"]["workers"] = 0
    config["searcher"]["max_length"] = {"batches": batches}
    return config


@pytest.mark.slow
def test_a_step_of_two_processes_is_plain_ddp_over_detectron2_s_model(shapes, distance_from_reference):
    probe = """
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from detectron2_files.data import inputs_of
from shared.data.dataset import seed_all
from torch.nn.parallel import DistributedDataParallel

class Probe(model_def.Detectron2Trial):
    def losses(self, model, batch):
        if self.batches_trained == 0:
            # plain_train_net's step, on this process's half
            self.reference = DistributedDataParallel(copy.deepcopy(self.plain_model), broadcast_buffers=False)
            optimizer = build_optimizer(self.detectron2_config.cfg, self.reference.module)
            for group, own in zip(optimizer.param_groups, self.optimizer.param_groups):
                group["lr"] = own["lr"]
            with EventStorage(0):
                sum(self.reference(copy.deepcopy(inputs_of(batch))).values()).backward()
            optimizer.step()
            seed_all(self.seed, self.rank, 0, 1)  # the samplers draw the same again
        return super().losses(model, batch)
"""
    assert distance_from_reference(DETECTRON2, in_process(detectron2_config(shapes)), probe) < 1e-5


@pytest.mark.slow
def test_a_python_config_s_options_of_ddp_train_in_two_processes(shapes, tmp_path):
    config = in_process(detectron2_config(shapes, "configs/small_retinanet.py"))
    overrides = config["hyperparameters"]["config_overrides"]
    overrides["train.ddp"] = {"find_unused_parameters": True, "fp16_compression": True}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    run_model_def("train", path, "--output-dir", tmp_path / "run", processes=2, cwd=DETECTRON2)
    assert reports(tmp_path / "run", "val")


def test_detectron2_s_own_error_about_infinite_losses_names_the_batch(shapes, train, trial_class):
    config = in_process(detectron2_config(shapes, **{"SOLVER.BASE_LR": 1e30, "SOLVER.WARMUP_ITERS": 0}))
    with pytest.raises(DivergedError, match=r"the loss is not finite since batch \d \(image ids \d"):
        train(trial_class, config)


@pytest.mark.parametrize("kind", ["yaml", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("py", "lsj"))])
def test_a_run_is_evaluated_and_predicts_by_the_config_in_its_checkpoint(
    shapes, train, command, trial_class, tmp_path, kind
):
    if kind == "yaml":
        config = detectron2_config(shapes, **{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0})
        config["searcher"]["metric"] = "segm_mAP"
    elif kind == "lsj":  # its norm is a function of the config's own file
        overrides = {
            "train.amp.enabled": False,
            "model.backbone.square_pad": 0,
            "model.proposal_generator.nms_thresh": 0.5,
        }
        overrides["model.roi_heads.box_predictor.test_score_thresh"] = 0.0
        config = detectron2_config(shapes, "new_baselines/mask_rcnn_R_50_FPN_50ep_LSJ.py", **overrides)
    else:
        config = detectron2_config(shapes, "configs/small_retinanet.py")
        config["hyperparameters"]["config_overrides"]["model.test_score_thresh"] = 0.001
    run = train(trial_class, in_process(config, batches=4))
    last = run / "checkpoints/last"
    if kind == "lsj":
        resumed = in_process(copy.deepcopy(config), batches=5)
        assert reports(train(trial_class, resumed, resume="last"), "val")[-1]["batches"] == 5
    # the file it came from may be gone
    config["hyperparameters"] = {"config_file": "gone.py"}
    path = tmp_path / "later.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = ("evaluate", path, "--checkpoint", last, "--output", tmp_path / "evaluated")
    if kind == "py":
        run_model_def(*arguments, processes=2, cwd=DETECTRON2)
    else:  # on CPUs torch has no SyncBatchNorm of several processes, which lsj has
        command(trial_class, *arguments)
    assert json.loads((tmp_path / "evaluated/metrics.json").read_text()) == reports(run, "val")[-1]["metrics"]

    out = tmp_path / "out"
    predict = ("predict", path, "--checkpoint", last, "--images", shapes / "val", "--output", out, "--min-score", 0.9)
    done = run_model_def(*predict, cwd=DETECTRON2)
    assert "seconds: loading" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert kind == "lsj" or len(results) > 5
    if kind == "yaml":
        assert all(coco_mask.decode(r["segmentation"]).shape == (128, 128) for r in results)
    assert Image.open(out / "000000.png.png").size == (128, 128)
    command(trial_class, *predict, "--format", "pdf", "--output", tmp_path / "pdf")
    assert (tmp_path / "pdf/000000.png.pdf").read_bytes().startswith(b"%PDF")


def test_test_time_augmentation_is_of_evaluation_and_prediction(shapes, trial_class, monkeypatch):
    from determined import pytorch

    monkeypatch.chdir(shapes)
    found = {}
    for on in (False, True):
        aug = {"TEST.AUG.ENABLED": on, "TEST.AUG.MIN_SIZES": [96, 128], "TEST.AUG.MAX_SIZE": 256}
        config = in_process(detectron2_config(shapes, **aug, **{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.001}))
        hparams = config["hyperparameters"]
        with pytorch.init(hparams=hparams, exp_conf=config, enable_tensorboard_logging=False) as context:
            trial = trial_class(context, for_training=False)
        (found[on],) = trial.detect_on_host_batch(next(iter(trial.evaluation_loader(trial.open_val()))))
    assert len(found[True]) == len(found[True].masks) > 0
    assert found[True].boxes.tolist() != found[False].boxes.tolist()


def test_precise_batch_statistics_are_those_of_the_weights_at_a_validation(shapes, train, trial_class, tmp_path):
    config = in_process(detectron2_config(shapes))
    folders = {}
    for on in (False, True):
        config["hyperparameters"]["config_overrides"].update(
            {"TEST.PRECISE_BN.ENABLED": on, "TEST.PRECISE_BN.NUM_ITER": 2}
        )
        folders[on] = train(trial_class, copy.deepcopy(config), f"precise_{on}") / "checkpoints/last"
    plain, precise = (read_checkpoint(folders[on]).weights for on in (False, True))
    differing = [name for name in plain if not plain[name].equal(precise[name])]
    assert differing
    assert all("running_" in name or "num_batches" in name for name in differing)


def test_keypoints_train_are_evaluated_and_predicted(shapes, train, command, trial_class, tmp_path):
    config = in_process(detectron2_config(shapes, KEYPOINT_RCNN))
    for split in ("train", "val"):
        coco = json.loads((shapes / f"annotations/{split}.json").read_text())
        (tmp_path / f"{split}.json").write_text(json.dumps(with_keypoints(coco)))
        config["data"][split]["annotations"] = str(tmp_path / f"{split}.json")
    overrides = config["hyperparameters"]["config_overrides"]
    overrides.update({"MODEL.ROI_HEADS.NUM_CLASSES": 3, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.001})
    config["searcher"]["metric"] = "keypoints_mAP"
    run = train(trial_class, config)
    metrics = reports(run, "val")[-1]["metrics"]
    assert {"bbox_mAP", "keypoints_mAP", "keypoints_AR_m"} <= metrics.keys()

    path, out = tmp_path / "c.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(config))
    last = run / "checkpoints/last"
    command(trial_class, "predict", path, "--checkpoint", last, "--images", shapes / "val", "--output", out)
    results = json.loads((out / "results.json").read_text())
    assert all(len(result["keypoints"]) == 51 for result in results)


def test_a_large_image_is_detected_on_with_few_masks_in_memory_at_once(shapes, train, trial_class, monkeypatch):
    import numpy as np
    from determined import pytorch

    from detectron2_files import evaluation
    from shared.commands.predict import pictures_as_data
    from shared.commands.predict_inputs import Picture
    from shared.evaluation import detections

    config = in_process(detectron2_config(shapes, **{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.001}))
    monkeypatch.chdir(shapes)
    with pytorch.init(hparams=config["hyperparameters"], exp_conf=config, enable_tensorboard_logging=False) as context:
        trial = trial_class(context, for_training=False)
    folder = shapes / "large"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (1500, 1000), "gray").save(folder / "one.TIF")
    picture = Picture("one.TIF", str(folder / "one.TIF"), 1500, 1000)
    data = pictures_as_data([picture], None, [str(folder)], trial)

    def detected():
        (batch,) = trial.evaluation_loader(data)
        (found,) = trial.detect_on_host_batch(batch)
        return found

    at_once = detected()
    pasted, real = [], evaluation.detector_postprocess
    monkeypatch.setattr(detections, "PIXELS_AT_ONCE", 3 * 1500 * 1000)
    monkeypatch.setattr(evaluation, "detector_postprocess", lambda i, *a: pasted.append(len(i)) or real(i, *a))
    few = detected()
    assert len(at_once) > 3
    assert max(pasted) == 3
    assert sum(pasted) >= len(few)  # some are empty, and left out after
    np.testing.assert_array_equal(few.boxes, at_once.boxes)
    assert few.masks == at_once.masks


def bad(shapes, **changes):
    config = in_process(detectron2_config(shapes))
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[key] = value
    return config


WRONG = {
    r"hyperparameters: unknown key 'config'; did you mean 'config_file'": {"hyperparameters__config": "x"},
    r"use_pretrained: true means weights: published, but weights is ''": {"hyperparameters__use_pretrained": True},
    r"data.val.annotations: .*nowhere.json does not exist": {"data__val__annotations": "/tmp/nowhere.json"},
    r"MODEL.ROI_HEADS.NUM_CLASSES is 7, and the data has 3 categories": {
        "hyperparameters__config_overrides": {"MODEL.ROI_HEADS.NUM_CLASSES": 7}
    },
    r"MODEL.ROI_HEADS.NUM_CLASSES is 80, and the data has 3 categories": {
        "hyperparameters__config_overrides": {"MODEL.ROI_HEADS.NUM_CLASSES": 80}
    },
    r"data set 'coco_2017_trian' is not registered; did you mean 'coco_2017_train' or .* Or register it": {
        "data__train": None,
        "hyperparameters__config_overrides": {"DATASETS.TRAIN": ["coco_2017_trian"]},
    },
    r"data.train.annotations: .*datasets/coco/annotations/instances_train2017.json does not exist": {
        "data__train": None
    },
    r"has no keypoints, which the config trains": {
        "hyperparameters__config_file": KEYPOINT_RCNN,
        "hyperparameters__config_overrides": {"MODEL.ROI_HEADS.NUM_CLASSES": 3},
    },
    r"SOLVER.AMP.ENABLED, .*, of the config: fp16 needs a GPU. Fix: remove it": {
        "hyperparameters__config_overrides": {"SOLVER.AMP.ENABLED": True}
    },
    r"DATALOADER.SAMPLER_TRAIN: 'RepeatFactorTrainingSampeler' is not known here; did you mean 'RepeatFactorTra": {
        "hyperparameters__config_overrides": {"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampeler"}
    },
    r"DATALOADER.SAMPLER_TRAIN: WeightedTrainingSampler needs DATASETS.TRAIN_REPEAT_FACTOR": {
        "hyperparameters__config_overrides": {"DATALOADER.SAMPLER_TRAIN": "WeightedTrainingSampler"}
    },
    r"config names 2 data sets to validate on \(coco_2017_val, coco_2014_val\).* Fix: .*one": {
        "data__val": None,
        "hyperparameters__config_overrides": {"DATASETS.TEST": ["coco_2017_val", "coco_2014_val"]},
    },
    r"config names 2 data sets to validate on .*voc_2007_test, voc_2012_val.* Fix: .*one": {
        "data__val": None,
        "hyperparameters__config_file": "COCO-Detection/rpn_R_50_FPN_1x.yaml",
        "hyperparameters__config_overrides": {"DATASETS.TEST": ["voc_2007_test", "voc_2012_val"]},
    },
    r"custom_imports: nothing_here.py cannot be imported": {"hyperparameters__custom_imports": ["nothing_here.py"]},
    r"the config's weights: .*R-50.pkl cannot be downloaded: .*weights: ''": {"hyperparameters__weights": None},
    r"searcher.metric: 'bbox_map' is not reported; did you mean 'bbox_mAP'": {"searcher__metric": "bbox_map"},
    r"global_batch_size: 0 is not a number of images": {"hyperparameters__global_batch_size": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_an_error_before_training(message, shapes, train, trial_class, tmp_path):
    with pytest.raises(UserError, match=message):
        train(trial_class, bad(shapes, **copy.deepcopy(WRONG[message])))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_masks_as_rle_ask_for_bitmasks_and_train_then(shapes, train, trial_class, tmp_path):
    coco = json.loads((shapes / "annotations/train.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    for annotation in coco["annotations"]:
        if not annotation["iscrowd"]:
            rles = coco_mask.frPyObjects(annotation["segmentation"], *sizes[annotation["image_id"]])
            rle = coco_mask.merge(rles)
            annotation["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    (tmp_path / "rle.json").write_text(json.dumps(coco))
    config = bad(shapes, data__train__annotations=str(tmp_path / "rle.json"))
    with pytest.raises(UserError, match=r"masks of .*rle.json are RLE, .*INPUT.MASK_FORMAT: bitmask"):
        train(trial_class, config)
    config["hyperparameters"]["config_overrides"]["INPUT.MASK_FORMAT"] = "bitmask"
    assert reports(train(trial_class, config, "second"), "val")


def test_masks_cannot_be_trained_on_boxes_alone(shapes, train, trial_class, tmp_path):
    coco = json.loads((shapes / "annotations/train.json").read_text())
    for annotation in coco["annotations"]:
        annotation.pop("segmentation")
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    with pytest.raises(UserError, match=r"have no segmentation, the first has id \d+"):
        train(trial_class, bad(shapes, data__train__annotations=str(tmp_path / "boxes.json")))


def test_an_untrained_model_is_not_evaluated(shapes, command, trial_class, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(detectron2_config(shapes)))
    with pytest.raises(SystemExit, match=r"error: an untrained model detects nothing. Fix: give --checkpoint"):
        command(trial_class, "evaluate", path)


IMPORTS = "import detectron2, detectron2.modeling; print(detectron2.__file__)"


@pytest.mark.parametrize(
    ("folder", "path"),
    [
        (".", str(ROOT)),
        *(
            pytest.param(folder, path, marks=pytest.mark.slow)
            for folder in (".", "detectron2", "tests", "tests/detectron2")
            for path in ("", str(ROOT))
            if (folder, path) != (".", str(ROOT))
        ),
    ],
)
def test_the_folder_s_name_never_hides_the_library(folder, path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        cwd=ROOT / folder,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "site-packages" in done.stdout or "dist-packages" in done.stdout


def test_without_the_library_one_line_says_how_to_install_it(tmp_path):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2/__init__.py").write_text("raise ImportError('No module named detectron2')")
    done = run_model_def("train", "const_fake.yaml", cwd=DETECTRON2, env={"PYTHONPATH": str(tmp_path)}, check=False)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: Detectron2 cannot be imported")
    assert line.endswith("in the folder detectron2: python3 -m shared.container")


def test_gradient_clipping_switched_on_at_a_resume_keeps_the_optimizer(shapes, train):
    config, trial_class = of_length(4, small("detectron2", shapes)), load_model_def("detectron2").Detectron2Trial
    train(trial_class, config)
    config["hyperparameters"]["config_overrides"]["SOLVER.CLIP_GRADIENTS.ENABLED"] = True  # a class of its own
    run = train(trial_class, of_length(6, config), resume="last")
    assert last(run).batches == 6
