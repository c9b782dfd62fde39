"""Runs of MMDetection's detectors: data sets of its own, wrappers, classes, hooks, several processes, prediction."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import reports, run_model_def
from mmcv import Config, FileClient
from mmcv.cnn.rfsearch.operator import BaseConvRFSearchOp
from mmcv.fileio import BaseStorageBackend
from mmcv.runner import BaseRunner
from mmcv.runner.hooks import HOOKS, Hook
from mmdet.core import BitmapMasks
from mmdet.datasets import DATASETS, MultiImageMixDataset
from PIL import Image
from pycocotools import mask as coco_mask
from tiny_experiment import load_model_def
from tiny_mmdetection import MMDETECTION, SMALL_BACKBONE, mmdet_config

from mmdetection_files import model as mmdetection_model
from mmdetection_files.config import load_mmdet_config
from mmdetection_files.evaluation import to_detections
from mmdetection_files.hooks import MomentumEma
from mmdetection_files.model import PYTHON_STATE, move_teacher
from mmdetection_files.own_data import MmcvImages
from mmdetection_files.receptive_field import init_receptive_fields
from mmdetection_files.repeating import ClassAwareBatchSampler, images_of_classes, labels_of_samples, repeats_by_itself
from mmdetection_files.saved_config import read_resolved
from mmdetection_hyperparameters import MMDetectionHyperparameters
from shared.data.dataset import SampleKey
from shared.errors import UserError
from shared.training.saving import python_state, restore_python_state

RETINANET = "retinanet/retinanet_r50_fpn_1x_coco.py"
FASTER_RCNN = "faster_rcnn/faster_rcnn_r50_fpn_1x_coco.py"


def in_process(config: dict, batches: int = 2, workers: int = 0) -> dict:
    config["searcher"]["max_length"] = {"batches": batches}
    config["min_validation_period"] = {"batches": batches}
    config["data"]["workers"] = workers
    return config


@pytest.fixture
def trial_class():
    return load_model_def("mmdetection").MMDetectionTrial


@pytest.mark.slow
def test_a_step_of_two_processes_is_plain_ddp_over_mmdetection_s_model(shapes, distance_from_reference):
    probe = """
from torch.nn.parallel import DistributedDataParallel
from mmdetection_files.model import build_optimizer
from shared.data.dataset import seed_all

class Probe(model_def.MMDetectionTrial):
    def losses(self, model, batch):
        if self.batches_trained == 0:
            # mmdet's own model and step, wrapped by nothing but DDP, on this process's half
            self.reference = DistributedDataParallel(copy.deepcopy(self.plain_model))
            optimizer = build_optimizer(self.reference.module, self.mmdet_config)
            for group, own in zip(optimizer.param_groups, self.optimizer.param_groups):
                group["lr"] = own["lr"]
            outputs = self.reference(img=batch.images, **copy.deepcopy(batch.targets))
            self.plain_model._parse_losses(outputs)[0].backward()
            optimizer.step()
            seed_all(self.seed, self.rank, 0, 1)  # the samplers draw the same again
        return super().losses(model, batch)
"""
    assert distance_from_reference(MMDETECTION, in_process(mmdet_config(shapes)), probe) < 1e-5


def test_evaluate_and_predict_use_the_config_in_the_checkpoint(shapes, train, command, trial_class, tmp_path):
    config = in_process(mmdet_config(shapes, **{"model.test_cfg.rcnn.score_thr": 0.01}), batches=4)
    config["searcher"]["metric"] = "segm_mAP"
    run = train(trial_class, config)
    last = run / "checkpoints/last"
    assert (run / "mmdet_config.py").read_text() == (last / "mmdet_config.py").read_text()
    # the file it came from may be gone
    config["hyperparameters"] = {"config_file": "gone.py"}
    path = tmp_path / "later.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = ("evaluate", path, "--checkpoint", last, "--output", tmp_path / "evaluated")
    command(trial_class, *arguments)
    metrics = json.loads((tmp_path / "evaluated/metrics.json").read_text())
    assert metrics == reports(run, "val")[-1]["metrics"]
    assert "segm_AP/circle" in metrics

    out = tmp_path / "out"
    predict = ("predict", path, "--checkpoint", last, "--images", shapes / "val", "--output", out, "--min-score", 0)
    run_model_def(*predict, cwd=MMDETECTION)
    results = json.loads((out / "results.json").read_text())
    assert len(results) > 10
    assert all(coco_mask.decode(r["segmentation"]).shape == (128, 128) for r in results)
    assert Image.open(out / "000000.png.png").size == (128, 128)


def test_pascal_voc_data_is_mmdetection_s_own_and_evaluated_by_itself(train, trial_class, tmp_path, voc):
    config = in_process(mmdet_config(tmp_path, FASTER_RCNN), batches=2)
    split = {"annotations": str(voc / "ImageSets/Main/some.txt"), "images": str(voc)}
    config["data"].update(train=split, val=split)
    config["searcher"]["metric"] = "mAP"
    overrides = config["hyperparameters"]["config_overrides"]
    overrides.update(
        {
            "data.train.type": "VOCDataset",
            "data.val.type": "VOCDataset",
            "data.train.classes": ["RBC", "WBC", "Platelets"],
            "data.val.classes": ["RBC", "WBC", "Platelets"],
            "evaluation.metric": "mAP",
        }
    )
    run = train(trial_class, config)
    metrics = reports(run, "val")[-1]["metrics"]
    assert {"mAP", "AP50"} <= metrics.keys()
    config["searcher"]["metric"] = "bbox_mAP"
    with pytest.raises(UserError, match=r"searcher.metric: 'bbox_mAP' is not among the metrics .*'mAP'"):
        train(trial_class, config, "wrong")


WRAPPERS = {
    "repeat": {"type": "RepeatDataset", "times": 3, "dataset": "COCO"},
    "balanced": {"type": "ClassBalancedDataset", "oversample_thr": 0.9, "dataset": "COCO"},
    "concat": {"type": "ConcatDataset", "datasets": ["COCO", "COCO"]},
    "repeat of balanced": {
        "type": "RepeatDataset",
        "times": 2,
        "dataset": {"type": "ClassBalancedDataset", "oversample_thr": 0.9, "dataset": "COCO"},
    },
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_coco_data_set_is_read_by_the_shared_loader(shapes, train, trial_class, name):
    kept = {}

    class Kept(trial_class):
        def losses(self, model, batch):
            kept.setdefault("trial", self)
            kept.setdefault("ids", []).extend(batch.image_ids)
            return super().losses(model, batch)

    config = in_process(mmdet_config(shapes, RETINANET), batches=3)
    paths = config["data"].pop("train")
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True},
        {"type": "Resize", "img_scale": [128, 128], "keep_ratio": True},
        {"type": "RandomFlip", "flip_ratio": 0.5},
        {"type": "Normalize", "mean": [0.0, 0.0, 0.0], "std": [255.0, 255.0, 255.0]},
        {"type": "Pad", "size_divisor": 32},
        {"type": "DefaultFormatBundle"},
        {"type": "Collect", "keys": ["img", "gt_bboxes", "gt_labels"]},
    ]
    leaf = {"type": "CocoDataset", "ann_file": paths["annotations"], "img_prefix": paths["images"]}

    def fill(section):
        if section == "COCO":
            return {**leaf, "pipeline": pipeline}
        if isinstance(section, list):
            return [fill(part) for part in section]
        return {k: fill(v) if k.startswith("dataset") else v for k, v in section.items()}

    overrides = config["hyperparameters"]["config_overrides"]
    del overrides["data.train.pipeline.2.img_scale"]
    overrides["data.train"] = {"_delete_": True, **fill(WRAPPERS[name])}
    train(Kept, config)
    trial = kept["trial"]
    images = int((np.diff(trial.train_data.annotations.columns["offsets"]) > 0).sum())
    assert len(trial.train_samples) >= (images if name == "balanced" else 2 * images)
    assert set(kept["ids"]) <= set(trial.train_data.annotations.image_ids.tolist())


def test_mosaic_and_mixup_train_and_end_with_yolox_s_last_epochs(shapes, train, trial_class):
    sizes = []

    class Kept(trial_class):
        def losses(self, model, batch):
            sizes.append((self.runner.epoch, self.plain_model.bbox_head.use_l1))
            self.seen = self.training_loader.loader.dataset
            return super().losses(model, batch)

    config = in_process(mmdet_config(shapes, "yolox/yolox_s_8x8_300e_coco.py"), batches=18)
    config["hyperparameters"]["config_overrides"] = {
        "model.backbone.widen_factor": 0.125,
        "model.neck.in_channels": [32, 64, 128],
        "model.neck.out_channels": 32,
        "model.bbox_head.in_channels": 32,
        "model.bbox_head.feat_channels": 32,
        "model.input_size": [64, 64],
        "model.random_size_range": [2, 4],
        "model.random_size_interval": 2,
        "data.train.pipeline.0.img_scale": [64, 64],
        "data.train.pipeline.2.img_scale": [64, 64],
        "data.train.pipeline.5.img_scale": [64, 64],
        "data.val.pipeline.1.img_scale": [64, 64],
        "custom_hooks.0.num_last_epochs": 1,
        "lr_config.num_last_epochs": 1,
        "lr_config.warmup_iters": 1,
    }
    run = train(Kept, config)
    assert [l1 for epoch, l1 in sizes] == [epoch >= 1 for epoch, _ in sizes]
    assert {epoch for epoch, _ in sizes} == {0, 1, 2}
    state = torch.load(run / "checkpoints/last/state_dict.pth", weights_only=True)["callbacks"]["training"]
    assert state["ema"] is not None
    assert state["own"][":_progress_in_iter"] == 18


def test_yolox_s_random_size_is_in_the_checkpoint():
    class YOLOX(torch.nn.Module):
        _input_size, _progress_in_iter = (320, 320), np.int64(7)

    saved, model = python_state(YOLOX(), PYTHON_STATE), YOLOX()
    model._input_size = None
    restore_python_state(model, saved)
    assert model._input_size == (320, 320)
    assert type(model._progress_in_iter) is int


def test_mosaic_stops_at_the_same_epoch_in_each_worker(shapes):
    from mmdetection_files.data import TrainingSamples

    class Mixed:
        skipped = None

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"skipped": self.skipped}

        def update_skip_type_keys(self, keys):
            self.skipped = keys

    samples = TrainingSamples(Mixed(), 0, mode_switch=(2, ("Mosaic",)))
    skipped = [samples[SampleKey(epoch, 0)][0]["skipped"] for epoch in range(4)]
    assert skipped == [None, None, ("Mosaic",), ("Mosaic",)]


def test_a_sample_with_more_boxes_than_masks_is_an_error():
    from mmdetection_files.data import TrainingSamples

    samples = TrainingSamples([{"gt_bboxes": torch.zeros(8, 4), "gt_labels": torch.zeros(8), "gt_masks": None}], 0)
    assert len(samples[SampleKey(0, 0)][0]["gt_bboxes"]) == 8
    samples.dataset[0]["gt_masks"] = torch.zeros(2, 9, 9)
    with pytest.raises(UserError, match=r"8 gt_bboxes, 8 gt_labels, 2 gt_masks .* Mosaic and MixUp"):
        samples[SampleKey(0, 0)]


class _Squares:
    """Images of two squares with masks, as MMDetection's pipeline loads them."""

    CLASSES, PALETTE = ("a", "b"), None

    def __init__(self):
        self.flag = np.zeros(len(self), dtype=np.uint8)

    def __len__(self):
        return 4

    def get_ann_info(self, index):
        return {"bboxes": self[index]["gt_bboxes"]}

    def __getitem__(self, index):
        boxes = np.array([[4, 4, 20, 20], [30, 30, 60, 60]], dtype=np.float32)
        masks = np.zeros((2, 64, 64), dtype=np.uint8)
        masks[0, 4:20, 4:20] = masks[1, 30:60, 30:60] = 1
        image = np.zeros((64, 64, 3), dtype=np.uint8)
        fields = {"img_fields": ["img"], "bbox_fields": ["gt_bboxes"], "mask_fields": ["gt_masks"]}
        truth = {"gt_bboxes": boxes, "gt_labels": np.arange(2), "gt_masks": BitmapMasks(masks, 64, 64)}
        return {"img": image, "img_shape": image.shape, "filename": f"{index}.png", **fields, **truth}


@pytest.mark.parametrize("names", [["CopyPaste", "MixUp"], ["MixUp", "CopyPaste"]])
def test_copy_paste_with_mixup_names_what_moves_no_masks(names):
    from mmdetection_files.data import TrainingSamples

    options = {"CopyPaste": {}, "MixUp": {"img_scale": (64, 64), "pad_val": 114.0}}
    pipeline = [{"type": name, **options[name]} for name in names] + [{"type": "DefaultFormatBundle"}]
    samples = TrainingSamples(MultiImageMixDataset(_Squares(), pipeline), 0)
    with pytest.raises(UserError, match=r"of image id \d\. Fix: .*Mosaic and MixUp do not move masks"):
        [samples[SampleKey(0, index)] for index in range(4)]


def test_an_array_that_a_mixing_pipeline_cannot_combine_names_the_image():
    from mmdetection_files.data import TrainingSamples

    class Mixed(_Squares):
        def update_skip_type_keys(self, keys):
            pass

        def __getitem__(self, index):
            return np.zeros((2, 4)) + np.zeros((4, 4))

    with pytest.raises(UserError, match=r"image id 3: operands could not be broadcast .* Fix: .*do not move masks"):
        TrainingSamples(Mixed(), 0)[SampleKey(0, 3)]


class _Labelled:
    """A data set that knows which classes its images have."""

    CLASSES, PALETTE = ("a", "b", "c"), None

    def __init__(self, *labels):
        self.of_images, self.flag = labels, np.zeros(len(labels), dtype=np.uint8)

    def __len__(self):
        return len(self.of_images)

    def get_cat_ids(self, index):
        return self.of_images[index]


def test_the_labels_of_samples_are_found_within_wrappers():
    first, second = _Labelled([0, 2], []), _Labelled([1])
    concat, repeat = DATASETS.get("ConcatDataset"), DATASETS.get("RepeatDataset")
    samples, labels = labels_of_samples(concat([repeat(first, 2), second]))
    assert list(zip(samples.tolist(), labels.tolist(), strict=True)) == [(0, 0), (0, 2), (2, 0), (2, 2), (4, 1)]
    balanced = {"type": "ClassBalancedDataset", "dataset": {"type": "CocoDataset"}}
    assert repeats_by_itself(Config({"train": {"type": "MultiImageMixDataset", "dataset": balanced}})) is not None
    assert repeats_by_itself(Config({"train": [{"type": "CocoDataset"}, balanced]})) is not None
    assert repeats_by_itself(Config({"train": {"type": "RepeatDataset", "dataset": {"type": "CocoDataset"}}})) is None


def test_a_class_aware_sampler_is_the_same_on_any_number_of_slots():
    class Labelled:
        labels = [[0]] * 90 + [[1]] * 9 + [[2, 1]]

        def __len__(self):
            return len(self.labels)

        def get_cat_ids(self, index):
            return self.labels[index]

    images, groups = images_of_classes(Labelled()), np.zeros(100, np.uint8)
    alone = ClassAwareBatchSampler(images, 2, groups, 12, 0)
    drawn = alone._epoch(1)
    assert len(alone) == 9
    assert (drawn < 90).sum() == 36
    several = [ClassAwareBatchSampler(images, 2, groups, 6, 0, rank, 2)._epoch(1)[:, rank] for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(several, axis=1), drawn[:, 0])


@pytest.mark.slow
def test_an_rpn_is_evaluated_by_its_recall_and_predicts_proposals(shapes, train, trial_class, tmp_path):
    overrides = {
        **SMALL_BACKBONE,
        "model.rpn_head.in_channels": 32,
        "model.rpn_head.feat_channels": 32,
        "model.test_cfg.rpn.max_per_img": 50,  # to draw
    }
    config = in_process(mmdet_config(shapes, "rpn/rpn_r50_fpn_1x_coco.py", **overrides))
    config["searcher"]["metric"] = "AR@100"
    run = train(trial_class, config)
    assert {"AR@100", "AR@300", "AR@1000"} <= reports(run, "val")[-1]["metrics"].keys()
    arguments = ("--checkpoint", run / "checkpoints/last", "--output", tmp_path / "out")
    run_model_def("predict", tmp_path / "run.yaml", *arguments, "--images", shapes / "val", cwd=MMDETECTION)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {result["category_id"] for result in results} == {1}
    assert json.loads((run / "checkpoints/last/categories.json").read_text()) == [{"id": 1, "name": "proposal"}]
    evaluated = run_model_def("evaluate", tmp_path / "run.yaml", *arguments, cwd=MMDETECTION)
    assert "AR@1000" in evaluated.stdout


def test_the_things_of_a_panoptic_result_are_detections():
    segments = np.full((10, 12), 90)  # stuff
    segments[2:5, 3:9] = 7 + 1000
    segments[6:8, 0:2] = 7 + 2000
    found = to_detections({"pan_results": segments}, image_id=5)
    assert found.boxes.tolist() == [[3, 2, 9, 5], [0, 6, 2, 8]]
    assert found.labels.tolist() == [7, 7]
    assert coco_mask.decode(found.masks[0]).sum() == 18


def test_a_teacher_is_where_its_pupil_is():
    pupil = torch.nn.Linear(1, 1)
    object.__setattr__(pupil, "teacher_model", torch.nn.Linear(1, 1))  # as mmdet has it
    move_teacher(pupil, torch.device("meta"))
    assert pupil.teacher_model.weight.is_meta


def test_lists_of_data_sets_train_validate_and_predict(shapes, train, command, trial_class, tmp_path):
    config = in_process(mmdet_config(shapes, RETINANET, **{"model.test_cfg.score_thr": 0.0}), batches=1)
    shipped = load_mmdet_config(MMDetectionHyperparameters(RETINANET), MMDETECTION)
    small = {}
    for split in ("train", "val"):
        paths = config["data"].pop(split)
        leaf = {"type": "CocoDataset", "ann_file": paths["annotations"], "img_prefix": paths["images"]}
        small[split] = [{**leaf, "pipeline": shipped.data[split].pipeline}] * 2
    (tmp_path / "lists.py").write_text(
        f"_base_ = {RETINANET!r}\ndata = dict(train={small['train']}, val={small['val']})"
    )
    overrides = config["hyperparameters"]["config_overrides"]
    config["hyperparameters"]["config_overrides"] = {k: v for k, v in overrides.items() if k[:4] != "data"}
    config["hyperparameters"]["config_file"] = str(tmp_path / "lists.py")
    config["searcher"]["metric"] = "0_bbox_mAP"
    run = train(trial_class, config)
    assert {"0_bbox_mAP", "1_bbox_mAP"} <= reports(run, "val")[-1]["metrics"].keys()
    arguments = ("--checkpoint", run / "checkpoints/last", "--output", tmp_path / "out", "--images", shapes / "val")
    command(trial_class, "predict", tmp_path / "run.yaml", *arguments)
    assert json.loads((tmp_path / "out/results.json").read_text())


def test_images_are_read_from_a_client_that_joins_no_paths(monkeypatch):
    class Lmdb(BaseStorageBackend):
        def get(self, key):
            return key.encode()

        get_text = get

    monkeypatch.setitem(FileClient._backends, "tiny_lmdb", Lmdb)
    assert MmcvImages({"backend": "tiny_lmdb"}, "train").read("1.jpg") == b"train/1.jpg"
    assert MmcvImages({"backend": "tiny_lmdb"}, "").read("1.jpg") == b"1.jpg"


def test_a_custom_hook_is_called_everywhere_with_mmcv_s_runner_values(shapes, train, trial_class):
    called = []

    @HOOKS.register_module(force=True)
    class Watch(Hook):
        def after_train_iter(self, runner):
            assert float(runner.outputs["loss"]) == float(runner.outputs["log_vars"]["loss"])
            assert runner.outputs["num_samples"] == len(runner.data_batch["img_metas"]) == 4
            assert len(runner.data_loader.dataset.CLASSES) == 3
            called.append("after_train_iter")

        def before_val_epoch(self, runner):
            called.append(("before_val_epoch", len(runner.data_loader), runner.mode))

        def after_val_epoch(self, runner):
            called.append("after_val_epoch")

        def after_run(self, runner):
            (Path(runner.work_dir) / "mine.txt").write_text("done")
            called.append("after_run")

    overrides = {"custom_hooks": [{"type": "Watch"}]}
    run = train(trial_class, in_process(mmdet_config(shapes, RETINANET, **overrides), batches=1))
    assert called[0] == "after_train_iter"
    assert called[1][0] == "before_val_epoch"
    assert called[2:] == ["after_val_epoch", "after_run"]
    assert (run / "work_dir/mine.txt").read_text() == "done"


def test_classes_of_a_subset_train_and_evaluate_on_it_alone(shapes, train, trial_class):
    config = in_process(mmdet_config(shapes, RETINANET))
    overrides = config["hyperparameters"]["config_overrides"]
    overrides.update({"data.train.classes": ["circle"], "data.val.classes": ["circle"]})
    run = train(trial_class, config)
    metrics = reports(run, "val")[-1]["metrics"]
    assert [name for name in metrics if "_AP/" in name] == ["bbox_AP/circle"]
    assert json.loads((run / "checkpoints/last/categories.json").read_text())[0]["name"] == "circle"
    overrides["data.val.classes"] = ["cirkel"]
    with pytest.raises(UserError, match=r"data.val.classes .*'cirkel' is not a category .*did you mean 'circle'"):
        train(trial_class, config, "wrong")


@pytest.mark.parametrize(
    "hook",
    [
        {"type": "ExpMomentumEMAHook", "momentum": 0.1, "total_iter": 20},
        {"type": "ExpMomentumEMAHook", "momentum": 0.1, "total_iter": 20, "skip_buffers": True, "interval": 3},
        {"type": "LinearMomentumEMAHook", "momentum": 0.2, "warm_up": 5},
    ],
)
def test_the_averaged_weights_are_those_of_mmdetection_s_hook(hook):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    upstream_model = copy.deepcopy(model)

    class Runner(BaseRunner):
        train = val = run = save_checkpoint = None

        def __init__(self):
            self.model, self._iter = upstream_model, 0

    runner, upstream = Runner(), HOOKS.build({"resume_from": None, **hook})
    upstream.before_run(runner)
    ours = MomentumEma(model, hook, steps=0)
    for number in range(7):
        with torch.no_grad():
            for parameter, other in zip(model.parameters(), upstream_model.parameters(), strict=True):
                parameter.add_(torch.randn_like(parameter))
                other.copy_(parameter)
            model[1].running_mean.add_(1.0)
            upstream_model[1].running_mean.copy_(model[1].running_mean)
        runner._iter = number
        upstream.after_train_iter(runner)
        ours.update()
    averaged = ours.module.state_dict()
    buffers = dict(upstream_model.named_buffers())
    for name, buffer in upstream.param_ema_buffer.items():
        if averaged[name].dtype.is_floating_point:
            torch.testing.assert_close(averaged[name], buffers[buffer])


def test_a_loop_of_its_own_is_refused(shapes, train, trial_class):
    config = in_process(mmdet_config(shapes, RETINANET))
    overrides = config["hyperparameters"]["config_overrides"]
    overrides["optimizer_config"] = {"type": "GradientCumulativeOptimizerHook", "cumulative_iters": 2}
    with pytest.raises(UserError, match="aggregation_frequency"):
        train(trial_class, config, "b")


def rf_search(**arguments):
    search = dict(step=0, max_step=9, search_interval=2, exp_rate=0.5, init_alphas=0.01, mmin=1, mmax=24)
    config = {"search": {**search, "num_branches": 2, "skip_layer": ["stem", "layer4"]}}
    return [{"type": "RFSearchHook", "by_epoch": False, "config": config, **arguments}]


def rates_of(model):
    return {name: m.dilation_rates for name, m in model.named_modules() if isinstance(m, BaseConvRFSearchOp)}


def test_a_search_of_receptive_fields_resumes_from_its_checkpoint(shapes, train, trial_class):
    def trained(name, batches, resume=None):
        config = in_process(mmdet_config(shapes, RETINANET), batches)
        config["hyperparameters"]["config_overrides"]["custom_hooks"] = rf_search()
        trials = []

        class Watched(trial_class):
            def prepare_schedule(self):
                trials.append(self)
                super().prepare_schedule()

            def losses(self, model, batch):
                # as if the wider branches were the better ones
                for module in self.plain_model.modules():
                    if isinstance(module, BaseConvRFSearchOp):
                        module.branch_weights.data.copy_(torch.tensor([0.01, 1.0]))
                return super().losses(model, batch)

        return train(Watched, config, name, resume), rates_of(trials[0].plain_model)

    run, rates = trained("whole", 5)  # two steps, of two batches each
    assert max(rate for of_one in rates.values() for rate, _ in of_one) > 2

    stopped, _ = trained("stopped", 3)
    assert trained("stopped", 5, resume="last") == (stopped, rates)

    # as `evaluate` and `predict` build it
    checkpoint = run / "checkpoints/last"
    config = read_resolved(checkpoint / "mmdet_config.py")
    model = mmdetection_model.build_model(config, initialize=False)
    init_receptive_fields(model, config)
    assert rates_of(model) == rates

    # what was found, fixed in another run
    fixed = rf_search(mode="fixed_single_branch", rfstructure_file=str(checkpoint / "rf_structure.json"))
    config = read_resolved(checkpoint / "mmdet_config.py")
    config.custom_hooks = fixed
    model = mmdetection_model.build_model(config, initialize=False)
    init_receptive_fields(model, config)
    structure = json.loads((checkpoint / "rf_structure.json").read_text())["structure"]
    for name, dilation in structure.items():
        assert list(model.get_submodule(name.removeprefix("module.")).dilation) == dilation


WRONG_SEARCHES = {
    "rfstructure_file: none.json cannot be read: No such file": rf_search(rfstructure_file="none.json"),
    "RFSearchHook cannot be made: KeyError: 'search'": [{"type": "RFSearchHook", "mode": "search"}],
    "ExpMomentumEMAHook averages the weights of a model whose layers RFSearchHook changes": [
        *rf_search(),
        {"type": "ExpMomentumEMAHook"},
    ],
}


@pytest.mark.parametrize("message", WRONG_SEARCHES)
def test_an_impossible_search_of_receptive_fields_is_an_error(shapes, train, trial_class, message):
    config = in_process(mmdet_config(shapes, RETINANET))
    config["hyperparameters"]["config_overrides"]["custom_hooks"] = WRONG_SEARCHES[message]
    with pytest.raises(UserError, match=message):
        train(trial_class, config)


def test_masks_cannot_be_trained_on_boxes_alone(shapes, train, trial_class, tmp_path):
    coco = json.loads((shapes / "annotations/train.json").read_text())
    del coco["annotations"][3]["segmentation"]
    coco["annotations"][4]["segmentation"] = []
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(coco))
    config = in_process(mmdet_config(shapes))
    config["data"]["train"]["annotations"] = str(path)
    identifier = coco["annotations"][3]["id"]
    message = rf"2 annotations of .*boxes.json have no segmentation, the first has id {identifier}"
    with pytest.raises(UserError, match=message):
        train(trial_class, config)


WRONG = {
    "hyperparameters.config_file: nowhere.py is neither in": {"config_file": "nowhere.py"},
    "hyperparameters.config_file is missing": {"config_file": None},
    "hyperparameters: unknown key 'overide_mmdet_config'; did you mean": {"overide_mmdet_config": {}},
    "hyperparameters.config_file: the model cannot be built: KeyError": {
        "config_overrides": {"model.neck": {"_delete_": True, "type": "NoSuchNeck"}}
    },
    "hyperparameters.weights: nowhere.pth is not a checkpoint": {"weights": "nowhere.pth"},
    "optimizer of the MMDetection config": {"config_overrides": {"optimizer.type": "Adamm"}},
    "fp16 of the MMDetection config: fp16 needs a GPU": {"config_overrides": {"fp16": {"loss_scale": 512.0}}},
    "a pipeline of the MMDetection config cannot be built": {
        "config_overrides": {"data.train.pipeline.3.type": "RandomFlp"}
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_hyperparameter_is_an_error_before_training(message, shapes, train, trial_class, tmp_path):
    if torch.cuda.is_available() and "fp16" in message:
        pytest.skip("there is a GPU")
    config = in_process(mmdet_config(shapes, RETINANET))
    changes = dict(WRONG[message])
    overrides = changes.pop("config_overrides", {})
    config["hyperparameters"]["config_overrides"].update(overrides)
    config["hyperparameters"].update(changes)
    config["hyperparameters"] = {k: v for k, v in config["hyperparameters"].items() if v is not None}
    with pytest.raises(UserError) as raised:
        train(trial_class, config)
    assert str(raised.value).startswith(message)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_an_mmcv_of_another_version_says_how_to_install_the_right_one(tmp_path):
    other = tmp_path / "mmcv"
    other.mkdir()
    (other / "__init__.py").write_text("__version__ = '2.1.0'")
    done = subprocess.run(
        [sys.executable, "model_def.py", "train", "const_fake.yaml"],
        cwd=MMDETECTION,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: mmdet 2.28 or the mmcv 1.7 it needs cannot be imported" in done.stderr
    assert done.stderr.strip().endswith("in the folder mmdetection: python3 -m shared.container")


@pytest.mark.parametrize("by_load_from", [False, True])
def test_pretrained_weights_of_another_head_start_fresh_with_one_line(
    shapes, train, trial_class, tmp_path, caplog, by_load_from
):
    config = in_process(mmdet_config(shapes, RETINANET))
    run = train(trial_class, config)
    weights = torch.load(run / "checkpoints/last/state_dict.pth", weights_only=True)["models_state_dict"][0]
    weights["bbox_head.retina_cls.weight"] = torch.zeros(720, 32, 3, 3)
    weights["bbox_head.retina_cls.bias"] = torch.zeros(720)
    torch.save({"state_dict": weights, "meta": {"CLASSES": ("a",)}}, tmp_path / "published.pth")
    config["hyperparameters"]["weights"] = str(tmp_path / "published.pth")
    caplog.set_level("INFO")
    started = {}

    class Kept(trial_class):
        def losses(self, model, batch):
            started.setdefault("weights", copy.deepcopy(self.plain_model.state_dict()))
            return super().losses(model, batch)

    if by_load_from:
        path = config["hyperparameters"].pop("weights")
        config["hyperparameters"]["config_overrides"]["load_from"] = path
    train(Kept, config, "fine")
    assert "published.pth (load_from of the config)" in caplog.text or not by_load_from
    (line,) = [r.message for r in caplog.records if r.message.startswith("weights:")]
    assert "2 are of another shape and start anew (bbox_head.retina_cls.weight, bbox_head.retina_cls.bias)" in line
    torch.testing.assert_close(started["weights"]["backbone.conv1.weight"], weights["backbone.conv1.weight"])


def test_weights_detect_the_categories_that_they_name_themselves(shapes, train, command, trial_class, tmp_path):
    config = in_process(mmdet_config(shapes, RETINANET, **{"model.test_cfg.score_thr": 0.0}), batches=1)
    run = train(trial_class, config)
    weights = torch.load(run / "checkpoints/last/state_dict.pth", weights_only=True)["models_state_dict"][0]
    torch.save({"state_dict": weights, "meta": {"CLASSES": ("a", "b", "c")}}, tmp_path / "mine.pth")
    del config["data"]["val"]
    config["searcher"]["metric"] = "mAP"  # no matter where nothing is trained
    config["hyperparameters"]["weights"] = str(tmp_path / "mine.pth")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    predict = ("predict", tmp_path / "config.yaml", "--images", shapes / "val", "--output", tmp_path / "out")
    command(trial_class, *predict)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {result["category_id"] for result in results} <= {1, 2, 3}
    assert results
