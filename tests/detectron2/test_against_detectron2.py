"""Losses, gradients, learning rates, inputs, detections and metrics equal those of Detectron2's own code."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import retinanet
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from determined import pytorch
from fvcore.nn import sigmoid_focal_loss
from pycocotools import mask as coco_mask
from recording import (
    BATCHES,
    assert_same_records,
    assert_same_weights,
    both_precisions,
    computing_in,
    gradients,
    in_dtype,
    recording,
)
from tiny_detectron2 import detectron2_config
from tiny_experiment import load_model_def
from tiny_models import with_keypoints

from detectron2_files.config import load_detectron2_config, shipped_configs
from detectron2_files.data import inputs_of
from detectron2_files.evaluation import to_detections
from detectron2_hyperparameters import Detectron2Hyperparameters
from shared.data.annotations import CocoAnnotations
from shared.data.dataset import SampleKey, seed_all
from shared.evaluation.evaluator import evaluate
from shared.training.checkpoints import read_checkpoint

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
KEYPOINT_RCNN = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"
CONFIGS = [
    MASK_RCNN,
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    KEYPOINT_RCNN,
]


@pytest.fixture(scope="module")
def trial_class():
    return load_model_def("detectron2").Detectron2Trial


@pytest.fixture(scope="module")
def persons(shapes):
    """The shapes, with keypoints."""
    for split in ("train", "val"):
        coco = json.loads((shapes / f"annotations/{split}.json").read_text())
        (shapes / f"annotations/{split}_keypoints.json").write_text(json.dumps(with_keypoints(coco)))
    return shapes


def config_of(shapes, config_file, **overrides):
    config = detectron2_config(shapes, config_file, **overrides)
    if config_file == KEYPOINT_RCNN:
        config["hyperparameters"]["config_overrides"]["MODEL.ROI_HEADS.NUM_CLASSES"] = 3
        for split in ("train", "val"):
            config["data"][split]["annotations"] = str(shapes / f"annotations/{split}_keypoints.json")
    return config


@pytest.fixture
def without_script(monkeypatch):
    """Both sides compute RetinaNet's focal loss with the library's Python function. The compiled one rounds to float32,
    and PyTorch optimizes it after its first call, which changes its gradient by 2e-6."""
    monkeypatch.setattr(retinanet, "sigmoid_focal_loss_jit", sigmoid_focal_loss)


@pytest.mark.usefixtures("without_script")
@both_precisions
@pytest.mark.parametrize("config_file", CONFIGS)
def test_training_equals_plain_train_net(persons, train, trial_class, config_file, dtype):
    recorder, ours, start = recording(trial_class, dtype)
    batches = BATCHES[dtype]
    clip = {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.5}
    config = config_of(persons, config_file, **clip)
    config["searcher"]["max_length"] = {"batches": batches}
    config["data"]["workers"] = 0
    with computing_in(dtype):
        train(recorder, config)
        trial = start["trial"]
        theirs, weights = train_plainly(trial, start["weights"], batches, dtype)
    assert_same_records(ours, theirs, dtype)
    assert_same_weights(trial.plain_model.state_dict(), weights, dtype)


def train_plainly(trial, weights, batches, dtype):
    """do_train of Detectron2's tools/plain_train_net.py. Returns the records of its steps and the final weights."""
    cfg, records = trial.detectron2_config.cfg, []
    model = build_model(cfg).to(dtype).train()
    model.load_state_dict(weights)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    keys = [batch for batch, _ in zip(trial.training_batches(), range(batches), strict=False)]
    with EventStorage(0) as storage:
        for iteration, batch in enumerate(keys):
            data = in_dtype([trial.train_samples[key] for key in batch], dtype)
            storage.iter = iteration
            seed_all(trial.seed, 0, iteration, 1)  # the proposals' sampling, as in ours
            losses = model(data)
            loss = sum(losses.values())
            records.append(
                {
                    "losses": {**{name: value.item() for name, value in losses.items()}, "loss": loss.item()},
                    "gradients": gradients(loss, model),
                    "lr": optimizer.param_groups[0]["lr"],
                }
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return records, model.state_dict()


@pytest.mark.parametrize("config_file", [MASK_RCNN, KEYPOINT_RCNN])
def test_training_inputs_are_those_of_detectron2_s_own_data_set(persons, trial_class, config_file, monkeypatch):
    monkeypatch.chdir(persons)
    config = config_of(persons, config_file)
    with pytorch.init(hparams=config["hyperparameters"], exp_conf=config, enable_tensorboard_logging=False) as context:
        trial = trial_class(context)
    split = config["data"]["train"]
    name = f"upstream {config_file}"
    metadata = MetadataCatalog.get(name)
    dicts = load_coco_json(split["annotations"], split["images"], name)
    dicts = [d for d in dicts if any(not a["iscrowd"] for a in d["annotations"])]
    if config_file == KEYPOINT_RCNN:
        metadata.set(keypoint_names=trial.categories[0]["keypoints"])
        metadata.set(keypoint_flip_map=MetadataCatalog.get("data").keypoint_flip_map)
        dicts = [d for d in dicts if sum(v > 0 for a in d["annotations"] for v in a["keypoints"][2::3]) >= 1]
    mapper = trial.detectron2_config.mapper(training=True, names=(name,))
    assert len(dicts) == len(trial.train_samples) < 25
    for index, expected in enumerate(dicts):
        own = trial.train_samples[SampleKey(1, index)]
        seed_all(trial.seed, 1, int(trial.train_samples.indices[index]))
        theirs = mapper(expected)
        assert own["image_id"] == theirs["image_id"]
        assert torch.equal(own["image"], theirs["image"])
        assert own.keys() == theirs.keys()
        assert own["instances"].image_size == theirs["instances"].image_size
        for field, value in theirs["instances"].get_fields().items():
            mine = own["instances"].get(field)
            if field == "gt_masks":
                for own_polygons, their_polygons in zip(mine.polygons, value.polygons, strict=True):
                    for a, b in zip(own_polygons, their_polygons, strict=True):
                        np.testing.assert_array_equal(a, b)
            else:
                assert torch.equal(getattr(mine, "tensor", mine), getattr(value, "tensor", value)), field


SCHEDULES = {
    "steps": {},
    "cosine": {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.BASE_LR_END": 0.0001},
    "constant warm-up": {"SOLVER.WARMUP_METHOD": "constant"},
    "rescaled": {"SOLVER.RESCALE_INTERVAL": True},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_equals_detectron2_s_also_after_a_resume(trial_class, schedule):
    length = 900
    overrides = {"SOLVER.STEPS": [600, 800], "SOLVER.WARMUP_ITERS": 100, **SCHEDULES[schedule]}
    cfg = get_cfg()
    cfg.merge_from_file(str(shipped_configs() / MASK_RCNN))
    cfg.merge_from_list([part for pair in {**overrides, "SOLVER.MAX_ITER": length}.items() for part in pair])

    def optimizer():
        weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        return torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.002}], lr=0.02)

    upstream = optimizer()
    scheduler, expected = build_lr_scheduler(cfg, upstream), []
    for _ in range(length):
        expected.append([group["lr"] for group in upstream.param_groups])
        upstream.step()
        scheduler.step()

    for first in (0, 50, 700):
        trial = trial_class.__new__(trial_class)
        hparams = Detectron2Hyperparameters(MASK_RCNN, config_overrides=overrides)
        trial.detectron2_config = load_detectron2_config(hparams, Path("/nowhere"))
        trial.detectron2_config.set_length(length)
        trial.optimizer = optimizer()
        trial.lr_scheduler = trial.detectron2_config.lr_scheduler(trial.optimizer)
        for group in trial.optimizer.param_groups:  # a checkpoint brings the last batch's rates
            group["lr"] *= 0.3
        for number in range(first, length):
            trial.before_batch(number)
            rates = [group["lr"] for group in trial.optimizer.param_groups]
            assert rates == pytest.approx(expected[number], rel=1e-12)


def test_detections_are_those_of_default_predictor(coco_tiny, shapes, train, trial_class, tmp_path):
    config = detectron2_config(shapes, MASK_RCNN, **{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0001})
    config["searcher"]["max_length"] = {"batches": 4}
    checkpoint = read_checkpoint(train(trial_class, config) / "checkpoints/last")
    in_float64, *_ = recording(trial_class, torch.float64)
    with pytorch.init(hparams=config["hyperparameters"], exp_conf=config, enable_tensorboard_logging=False) as context:
        trial = in_float64(context, for_training=False)
        trial.plain_model.load_state_dict(checkpoint.weights)
        torch.save({"model": checkpoint.weights}, tmp_path / "upstream.pth")
        cfg = copy.deepcopy(trial.detectron2_config.cfg)
        cfg.MODEL.WEIGHTS = str(tmp_path / "upstream.pth")
        upstream = DefaultPredictor(cfg)
        upstream.model.double()

        annotations = coco_tiny / "annotations/instances_val2017.json"
        trial.data.val.annotations, trial.data.val.images = str(annotations), str(coco_tiny / "val2017")
        data, compared = trial.open_val(), 0
        names = {int(i): data.annotations.file_name(n) for n, i in enumerate(data.annotations.image_ids)}
        for number, batch in enumerate(trial.evaluation_loader(data)):
            if number == 8:
                break
            with computing_in(torch.float64):
                detected = trial.detect_on_host_batch(batch)
            for found in detected:
                image = read_image(str(data.images.folder / names[found.image_id]), format="BGR")
                with computing_in(torch.float64):
                    expected = upstream(image)["instances"]
                assert expected.scores.dtype == torch.float64
                # `Detections` are float32
                np.testing.assert_allclose(found.boxes, expected.pred_boxes.tensor.numpy(), rtol=1e-6)
                np.testing.assert_allclose(found.scores, expected.scores.numpy(), rtol=1e-6)
                np.testing.assert_array_equal(found.labels, expected.pred_classes.numpy())
                for own, other in zip(found.masks, expected.pred_masks.numpy(), strict=True):
                    np.testing.assert_array_equal(coco_mask.decode(own), other)
                compared += len(found)
    assert compared > 5


def noisy_instances(record, rng, keypoints=False):
    """A model's output for an image: most of the truth, jittered."""
    keep = ~record.iscrowd & (rng.random(len(record.boxes)) > 0.2)
    instances = Instances((record.height, record.width))
    boxes = record.boxes[keep] + rng.normal(0, 3, size=(keep.sum(), 4))
    instances.pred_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
    instances.scores = torch.as_tensor(rng.random(keep.sum()), dtype=torch.float32)
    instances.pred_classes = torch.as_tensor(record.labels[keep])
    if keypoints:
        points = record.keypoints[keep].copy()
        points[..., :2] += 0.5 + rng.normal(0, 2, size=points[..., :2].shape)
        instances.pred_keypoints = torch.as_tensor(points, dtype=torch.float32)
        return instances
    masks = []
    for i in np.flatnonzero(keep):
        rles = coco_mask.frPyObjects(record.segmentations[i], record.height, record.width)
        mask = coco_mask.decode(coco_mask.merge(rles)).astype(bool)
        masks.append(np.roll(mask, rng.integers(-3, 4, size=2), axis=(0, 1)))
    stacked = np.stack(masks) if masks else np.zeros((0, record.height, record.width), dtype=bool)
    instances.pred_masks = torch.as_tensor(stacked)
    return instances


OF_COCO_EVALUATOR = {"AP": "mAP", "AP50": "mAP_50", "AP75": "mAP_75", "APs": "mAP_s", "APm": "mAP_m", "APl": "mAP_l"}


def assert_metrics_of_coco_evaluator(path, outputs, iou_types):
    annotations = CocoAnnotations.open(path)
    ours = evaluate(annotations, [to_detections(o, i) for i, o in outputs.items()], iou_types)
    name = f"evaluated {path}"
    load_coco_json(str(path), "", name)  # which tells the evaluator the categories' ids
    MetadataCatalog.get(name).set(json_file=str(path))
    evaluator = COCOEvaluator(name, tasks=iou_types, distributed=False, use_fast_impl=False)
    evaluator.reset()
    for image_id, output in outputs.items():
        evaluator.process([{"image_id": image_id}], [{"instances": output}])
    theirs = evaluator.evaluate()
    for iou_type in iou_types:
        assert 5 < theirs[iou_type]["AP"] < 95
        for name, value in theirs[iou_type].items():
            if name in OF_COCO_EVALUATOR:
                own = ours[f"{iou_type}_{OF_COCO_EVALUATOR[name]}"] * 100
            else:
                own = ours.get(f"{iou_type}_AP/{name.removeprefix('AP-')}", float("nan")) * 100
            assert own == pytest.approx(value, abs=1e-6, nan_ok=True), (iou_type, name)


def test_metrics_are_those_of_coco_evaluator(coco_tiny):
    path = coco_tiny / "annotations/instances_val2017.json"
    rng = np.random.default_rng(0)
    outputs = {r.image_id: noisy_instances(r, rng) for r in CocoAnnotations.open(path)}
    assert_metrics_of_coco_evaluator(path, outputs, ("bbox", "segm"))


def test_keypoint_metrics_are_those_of_coco_evaluator(persons):
    path = persons / "annotations/val_keypoints.json"
    rng = np.random.default_rng(0)
    outputs = {r.image_id: noisy_instances(r, rng, keypoints=True) for r in CocoAnnotations.open(path)}
    assert_metrics_of_coco_evaluator(path, outputs, ("bbox", "keypoints"))


def test_a_batch_goes_to_the_model_as_it_came_from_the_mapper(shapes, trial_class, monkeypatch):
    monkeypatch.chdir(shapes)
    config = detectron2_config(shapes)
    config["data"]["workers"] = 0
    with pytorch.init(hparams=config["hyperparameters"], exp_conf=config, enable_tensorboard_logging=False) as context:
        trial = trial_class(context)
        batch = next(iter(trial.build_training_data_loader()))
    keys = next(iter(trial.training_batches()))
    for given, key in zip(inputs_of(batch), keys, strict=True):
        expected = trial.train_samples[key]
        assert given.keys() == expected.keys()
        assert torch.equal(given["image"], expected["image"])
        assert torch.equal(given["instances"].gt_boxes.tensor, expected["instances"].gt_boxes.tensor)
