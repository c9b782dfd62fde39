"""Losses, gradients, weights, learning rates, detections and metrics equal those of MMDetection's own code."""

import copy
import logging

import mmcv
import mmdet.datasets.coco
import numpy as np
import pytest
import torch
from determined import pytorch
from mmcv import Config
from mmcv.parallel import MMDataParallel
from mmcv.parallel import collate as mmcv_collate
from mmcv.runner import EpochBasedRunner, IterBasedRunner, build_optimizer
from mmcv.runner.hooks import Hook
from mmdet.apis import inference_detector, init_detector
from mmdet.datasets import build_dataset
from mmdet.models import build_detector
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
from tiny_experiment import load_model_def
from tiny_mmdetection import TINY, mmdet_config

from mmdetection_files.evaluation import to_detections
from mmdetection_files.hooks import StepRunner
from mmdetection_files.saved_config import write_resolved
from shared.data.annotations import CocoAnnotations
from shared.data.dataset import seed_all
from shared.evaluation.evaluator import evaluate
from shared.training.checkpoints import read_checkpoint


class UpstreamData(torch.utils.data.Dataset):
    """mmdet's own data set, with our random numbers."""

    def __init__(self, config, seed):
        self.dataset, self.seed = build_dataset(config), seed
        self.CLASSES = self.dataset.CLASSES

    def __getitem__(self, key):
        seed_all(self.seed, key.epoch, key.index)
        return self.dataset[key.index]


class Recorder(Hook):
    """Notes the losses, gradients and learning rates of MMDetection's own runner."""

    def __init__(self, records, seed):
        self.records, self.seed = records, seed

    def before_train_iter(self, runner):
        seed_all(self.seed, 0, runner.iter, 1)  # the random samplers' numbers, as in ours

    def after_train_iter(self, runner):
        self.records.append(
            {
                "losses": dict(runner.outputs["log_vars"]),
                "gradients": gradients(runner.outputs["loss"], runner.model.module),
                "lr": runner.optimizer.param_groups[0]["lr"],
            }
        )


@both_precisions
@pytest.mark.parametrize("config_file", TINY)
def test_training_equals_mmdetection_s_runner(shapes, train, config_file, dtype):
    trial_class, ours, start = recording(load_model_def("mmdetection").MMDetectionTrial, dtype)
    clip = {"optimizer_config.grad_clip": {"max_norm": 5, "norm_type": 2}, "lr_config.warmup_iters": 5}
    config = mmdet_config(shapes, config_file, **clip)
    config["searcher"]["max_length"] = {"batches": BATCHES[dtype]}
    config["data"]["workers"] = 0
    with computing_in(dtype):
        train(trial_class, config)
        trial = start["trial"]
        theirs, weights = train_by_runner(trial, start["weights"], BATCHES[dtype], dtype)
    assert_same_records(ours, theirs, dtype)
    assert_same_weights(trial.plain_model.state_dict(), weights, dtype)


def train_by_runner(trial, weights, batches, dtype):
    """MMDetection's own training. Returns the records of its steps and the final weights."""
    resolved, records = trial.mmdet_config, []
    resolved.data.train.classes = [category["name"] for category in trial.categories]
    data = UpstreamData(resolved.data.train, trial.seed)
    loader = torch.utils.data.DataLoader(
        data,
        batch_sampler=[batch for batch, _ in zip(trial.training_batches(), range(batches), strict=False)],
        collate_fn=lambda samples: mmcv_collate(samples, samples_per_gpu=4),
    )
    model = build_detector(resolved.model).to(dtype)
    model.load_state_dict(weights)
    train_step = model.train_step
    model.train_step = lambda data, optimizer: train_step(in_dtype(data, dtype), optimizer)
    runner = EpochBasedRunner(
        MMDataParallel(model),
        optimizer=build_optimizer(model, resolved.optimizer),
        logger=logging.getLogger("upstream"),
        max_epochs=1,
    )
    runner.register_training_hooks(copy.deepcopy(resolved.lr_config), copy.deepcopy(resolved.optimizer_config))
    runner.register_hook(Recorder(records, trial.seed), priority="HIGHEST")
    runner.run([loader], [("train", 1)])
    return records, model.state_dict()


POLICIES = {
    "step": {"policy": "step", "warmup": "linear", "warmup_iters": 70, "warmup_ratio": 0.001, "step": [3, 8]},
    "cosine": {"policy": "CosineAnnealing", "min_lr_ratio": 0.01, "warmup": "exp", "warmup_iters": 120},
    "poly": {"policy": "poly", "power": 0.9, "min_lr": 1e-4, "by_epoch": False},
    "one cycle": {"policy": "OneCycle", "max_lr": 0.1, "total_steps": 700, "by_epoch": False},
    "yolox": {
        "policy": "YOLOX",
        "warmup": "exp",
        "by_epoch": False,
        "warmup_by_epoch": True,
        "warmup_ratio": 1,
        "warmup_iters": 2,
        "num_last_epochs": 3,
        "min_lr_ratio": 0.05,
    },
    "cyclic": {"policy": "cyclic", "target_ratio": (10, 0.1), "cyclic_times": 2, "step_ratio_up": 0.4},
}


class Bare(torch.nn.Module):
    """The least that a runner accepts."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])

    def train_step(self, data, optimizer):
        return {"loss": sum(p.sum() for p in self.parameters()), "log_vars": {}, "num_samples": 1}

    def optimizer(self):
        a, b = ({"params": layer.parameters(), "lr": lr} for layer, lr in zip(self.layers, (0.02, 0.004), strict=True))
        return torch.optim.SGD([a, b], lr=0.02, momentum=0.9)


class Rates(Hook):
    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner):
        self.seen.append([group["lr"] for group in runner.optimizer.param_groups])


@pytest.mark.parametrize("runner", ["EpochBasedRunner", "IterBasedRunner"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_learning_rate_equals_mmcv_s_hooks_also_after_a_resume(policy, runner, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # mmcv's runners wait two seconds an epoch
    per_epoch, epochs = 47, 14  # 658 batches
    if policy == "yolox" and runner == "IterBasedRunner":
        pytest.skip("YOLOX's policy asks for epochs, which IterBasedRunner has none of")
    kind, length = (
        (EpochBasedRunner, {"max_epochs": epochs})
        if runner == "EpochBasedRunner"
        else (IterBasedRunner, {"max_iters": per_epoch * epochs})
    )
    model = Bare()
    upstream = kind(model, optimizer=model.optimizer(), logger=logging.getLogger("upstream"), **length)
    upstream.register_training_hooks(copy.deepcopy(POLICIES[policy]), {"grad_clip": None})
    rates = Rates()
    upstream.register_hook(rates)
    loader = torch.utils.data.DataLoader(range(per_epoch))
    upstream.run([loader], [("train", 1)])

    config = Config({"lr_config": POLICIES[policy], "runner": {"type": runner, **length}})
    for first in (0, 100, 3 * per_epoch):
        ours = Bare()
        optimizer = ours.optimizer()
        if first:  # a checkpoint's optimizer has the first rates, and those of the last batch
            for group, rate in zip(optimizer.param_groups, rates.seen[first - 1], strict=True):
                group["initial_lr"] = group["lr"]
                group["lr"] = rate
        steps = StepRunner(ours, optimizer, config, per_epoch, per_epoch * epochs)
        for number in range(first, per_epoch * epochs):
            steps.begin(number)
            assert [group["lr"] for group in optimizer.param_groups] == rates.seen[number]
            steps.end()


def test_detections_are_those_of_inference_detector(shapes, train, tmp_path):
    overrides = {"model.test_cfg.rcnn.score_thr": 0.01}
    config = mmdet_config(shapes, **overrides)
    config["searcher"]["max_length"] = {"batches": 4}
    trial_class = load_model_def("mmdetection").MMDetectionTrial
    checkpoint = read_checkpoint(train(trial_class, config) / "checkpoints/last")
    in_float64, *_ = recording(trial_class, torch.float64)
    with pytorch.init(hparams=config["hyperparameters"], exp_conf=config, enable_tensorboard_logging=False) as context:
        trial = in_float64(context, for_training=False)
        trial.plain_model.load_state_dict(checkpoint.weights)
        torch.save({"state_dict": checkpoint.weights, "meta": {"CLASSES": ("a", "b", "c")}}, tmp_path / "upstream.pth")
        write_resolved(trial.mmdet_config, tmp_path)
        upstream = init_detector(str(tmp_path / "mmdet_config.py"), str(tmp_path / "upstream.pth"), device="cpu")
        upstream.double().register_forward_pre_hook(
            lambda model, given, named: (given, in_dtype(named, torch.float64)), with_kwargs=True
        )

        data, compared = trial.open_val(), 0
        names = {int(i): data.annotations.file_name(n) for n, i in enumerate(data.annotations.image_ids)}
        for batch in trial.evaluation_loader(data):
            with computing_in(torch.float64):
                detected = trial.detect_on_host_batch(batch)
            for found in detected:
                with computing_in(torch.float64):
                    boxes, masks = inference_detector(upstream, str(shapes / "val" / names[found.image_id]))
                expected = np.concatenate(boxes)
                assert expected.dtype == np.float64
                # `Detections` are float32
                np.testing.assert_allclose(np.column_stack([found.boxes, found.scores]), expected, rtol=1e-6)
                np.testing.assert_array_equal(found.labels, np.repeat(range(len(boxes)), [len(b) for b in boxes]))
                stacked = [mask for of_class in masks for mask in of_class]
                for own, other in zip(found.masks, stacked, strict=True):
                    np.testing.assert_array_equal(coco_mask.decode(own), other)
                compared += len(found)
    assert compared > 50


def noisy_results(annotations, rng):
    """Results like a detector's: jittered truth and false detections, with masks."""
    results = []
    for record in annotations:
        per_class = [np.zeros((0, 5), np.float32) for _ in annotations.categories]
        masks = [[] for _ in annotations.categories]
        for i, label in enumerate(record.labels.tolist()):
            segmentation = record.segmentations[i]
            if record.iscrowd[i] or rng.random() < 0.2:
                continue
            rles = coco_mask.frPyObjects(segmentation, record.height, record.width)
            mask = coco_mask.decode(coco_mask.merge(rles)).astype(bool)
            mask = np.roll(mask, rng.integers(-4, 5, size=2), axis=(0, 1))
            box = record.boxes[i] + rng.normal(0, 4, size=4)
            if rng.random() < 0.1:
                label = int(rng.integers(len(per_class)))
            row = np.array([[*box, rng.random()]], dtype=np.float32)
            per_class[label] = np.concatenate([per_class[label], row])
            masks[label].append(mask)
        results.append((per_class, masks))
    return results


def test_metrics_are_those_of_the_data_set_s_own_evaluate(coco_tiny, monkeypatch):
    path = coco_tiny / "annotations/instances_val2017.json"
    path = path if path.exists() else next(coco_tiny.rglob("*val*.json"))
    annotations = CocoAnnotations.open(path)
    results = noisy_results(annotations, np.random.default_rng(0))
    ours = evaluate(
        annotations,
        [to_detections(result, int(i)) for result, i in zip(results, annotations.image_ids, strict=True)],
        iou_types=("bbox", "segm"),
    )
    dataset = build_dataset(
        {"type": "CocoDataset", "ann_file": str(path), "pipeline": [], "test_mode": True},
        {"classes": annotations.category_names},
    )
    encoded = [
        (boxes, [[coco_mask.encode(np.asfortranarray(m.astype(np.uint8))) for m in of_class] for of_class in masks])
        for boxes, masks in results
    ]
    # its dictionary is rounded to three digits: the whole numbers are in its evaluator
    evaluators = []

    class Kept(mmdet.datasets.coco.COCOeval):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            evaluators.append(self)

    monkeypatch.setattr(mmdet.datasets.coco, "COCOeval", Kept)
    dataset.evaluate(encoded, metric=["bbox", "segm"])
    for iou_type, evaluator in zip(("bbox", "segm"), evaluators, strict=True):
        for position, metric in enumerate(("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")):
            assert ours[f"{iou_type}_{metric}"] == pytest.approx(evaluator.stats[position], abs=1e-6)
    assert ours["segm_mAP"] > 0.1


def test_the_image_is_decoded_as_by_mmdetection(coco_tiny):
    from mmdetection_files.pipelines import decoder

    path = next(coco_tiny.rglob("*.jpg"))
    expected = mmcv.imread(str(path))
    np.testing.assert_array_equal(decoder({"type": "LoadImageFromFile"})(path.read_bytes()), expected)
