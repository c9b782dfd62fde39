"""The choice of the config, its values, and its errors."""

import copy
import re

import pytest
import torch
import yaml
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from omegaconf import OmegaConf
from tiny_detectron2 import DETECTRON2
from tiny_experiment import load_model_def

from detectron2_files.config import config_of_checkpoint, load_detectron2_config, set_class_counts, shipped_configs
from detectron2_files.data import training_images
from detectron2_files.keypoints import describe
from detectron2_files.model import apply_backend_options, build_model, keep_detections
from detectron2_hyperparameters import Detectron2Hyperparameters
from shared.config.schema import Length
from shared.data.annotations import CocoAnnotations
from shared.errors import UserError
from shared.training.switches import fuse

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
LAZY_RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.py"


def load(config_file=MASK_RCNN, submitted=DETECTRON2, **hyperparameters):
    return load_detectron2_config(Detectron2Hyperparameters(config_file, **hyperparameters), submitted)


def test_a_config_of_the_folder_comes_before_one_of_the_zoo(tmp_path):
    assert load(submitted=tmp_path).path == shipped_configs() / MASK_RCNN
    own = tmp_path / MASK_RCNN
    own.parent.mkdir()
    own.write_text("VERSION: 2\nSOLVER: {MAX_ITER: 7}\n")
    assert load(submitted=tmp_path).max_iter == 7


def test_a_missing_config_is_an_error_with_places_and_near_names(tmp_path):
    with pytest.raises(
        UserError, match=r"mask_rcnn_R_50_FPN_1x.yaml is neither in .* nor in .*; did you mean"
    ) as error:
        load("mask_rcnn_R_50_FPN_1x.yaml", tmp_path)
    assert repr(MASK_RCNN) in str(error.value)


@pytest.mark.parametrize(
    ("config_file", "overrides"),
    [
        (MASK_RCNN, {"SOLVER.BASE_LR": 1, "SOLVER": {"MAX_ITER": 9, "IMS_PER_BATCH": 8}}),
        (LAZY_RETINANET, {"optimizer.lr": 1, "train": {"max_iter": 9}, "dataloader.train.total_batch_size": 8}),
    ],
)
def test_overrides_are_dotted_or_nested_in_both_kinds_of_config(config_file, overrides, tmp_path):
    config = load(config_file, config_overrides=overrides)
    assert (config.learning_rate, config.max_iter, config.batch_size) == (1, 9, 8)

    config.write(tmp_path)
    again = load(str(config_of_checkpoint(tmp_path)))
    assert type(again) is type(config)
    assert (again.learning_rate, again.max_iter, again.batch_size) == (1, 9, 8)
    assert again.class_counts() == config.class_counts()


WRONG = {
    r"unknown key 'SOLVER.BASE_LRR'; did you mean 'SOLVER.BASE_LR'": (MASK_RCNN, {"SOLVER.BASE_LRR": 1}),
    r"unknown key 'train.max_itr'; did you mean 'max_iter'": (LAZY_RETINANET, {"train.max_itr": 1}),
    r"unknown key 'model.backbon'; did you mean 'backbone'": (LAZY_RETINANET, {"model.backbon.out_channels": 1}),
    r"unknown key 'model.head.conv_dim'; did you mean 'conv_dims'": (LAZY_RETINANET, {"model.head.conv_dim": 1}),
    r"SOLVER.MAX_ITER": (MASK_RCNN, {"SOLVER.MAX_ITER": "long"}),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_override_is_an_error_that_names_it_and_what_is_near(message):
    config_file, overrides = WRONG[message]
    with pytest.raises(UserError, match=message):
        load(config_file, config_overrides=overrides)


def test_an_argument_that_a_python_config_does_not_mention_can_be_given():
    config = load(LAZY_RETINANET, config_overrides={"model.test_score_thresh": 0.3})
    assert config.build_model().test_score_thresh == 0.3


@pytest.mark.parametrize("config_file", ["COCO-Detection/retinanet_R_50_FPN_1x.yaml", MASK_RCNN])
def test_anchors_of_a_size_are_built_once_and_are_detectron2_s(config_file):
    config = load(config_file, config_overrides={"MODEL.DEVICE": "cpu"})
    model, plain = build_model(config), config.build_model()
    of_model, upstream = (
        getattr(each, "anchor_generator", None) or each.proposal_generator.anchor_generator for each in (model, plain)
    )
    for height, width in ((64, 96), (96, 64)):
        maps = [torch.zeros(2, 1, height // stride, width // stride) for stride in upstream.strides]
        found, expected = of_model(maps), upstream(maps)
        again = of_model([torch.ones_like(each) for each in maps])
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(found, expected, strict=True))
        assert all(a.tensor is b.tensor and a is not b for a, b in zip(found, again, strict=True))
    averaged = copy.deepcopy(of_model)
    assert averaged.forward.function.__self__ is averaged


def test_yaml_configs_use_the_fused_optimizer_and_python_configs_their_own():
    layer = torch.nn.Linear(2, 2)
    assert load(MASK_RCNN).build_optimizer(layer).param_groups[0]["foreach"] is None
    own = load(LAZY_RETINANET, config_overrides={"optimizer.foreach": True}).build_optimizer(layer)
    assert fuse(own).param_groups[0]["foreach"] is True


def test_a_key_that_yacs_does_not_know_is_named_with_its_place(tmp_path):
    (tmp_path / "mine.yaml").write_text("SOLVER: {BASE_LERNING_RATE: 1}\n")
    with pytest.raises(UserError, match=r"mine.yaml: .*SOLVER.BASE_LERNING_RATE"):
        load("mine.yaml", tmp_path)


def test_a_part_of_a_python_config_is_an_error():
    with pytest.raises(UserError, match="has no dataloader, lr_multiplier, model, optimizer"):
        load("common/train.py")


def test_a_function_of_a_python_config_is_restored_from_a_checkpoint(tmp_path):
    key, config = "roi_heads.box_head.conv_norm", load("new_baselines/mask_rcnn_R_50_FPN_200ep_LSJ.py")
    for folder in (tmp_path / "first", tmp_path / "second"):  # a run, and one that starts from its checkpoint
        folder.mkdir()
        config.write(folder)
        config = load(str(config_of_checkpoint(folder)))
        assert type(OmegaConf.select(config.cfg.model, key)(8)).__name__ == "NaiveSyncBatchNorm"
        assert config.max_iter == 368750


def test_a_missing_config_function_is_an_error_that_names_its_file(tmp_path):
    own = tmp_path / "configs/own.py"
    own.parent.mkdir()
    zoo = "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"
    own.write_text(
        "from detectron2.config import LazyConfig\n"
        f"_zoo = LazyConfig.load({str(shipped_configs() / zoo)!r})\n"
        "model, optimizer, lr_multiplier = _zoo.model, _zoo.optimizer, _zoo.lr_multiplier\n"
        "dataloader, train = _zoo.dataloader, _zoo.train\n"
        "model.roi_heads.box_head.conv_norm = lambda channels: None\n"
        "model.roi_heads.mask_head.conv_norm = ''\n"
    )
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    load("configs/own.py", tmp_path).write(checkpoint)
    path = str(config_of_checkpoint(checkpoint))
    again = load(path, tmp_path, functions_of="configs/own.py")
    assert again.cfg.model.roi_heads.box_head.conv_norm(8) is None
    own.unlink()
    with pytest.raises(UserError, match=r"hyperparameters.functions_of: configs/own.py is neither in"):
        load(path, tmp_path, functions_of="configs/own.py")


def test_a_python_config_of_another_task_is_an_error():
    config = load("Misc/torchvision_imagenet_R_50.py")
    with pytest.raises(UserError, match=r"has no dataloader.train.mapper.*Fix: give the config of a detector"):
        config.mapper(True, ())


def test_the_learning_rate_scales_with_the_images_per_batch():
    config = load()
    config.scale_schedule(4)
    solver = config.cfg.SOLVER
    assert (solver.BASE_LR, solver.MAX_ITER, solver.STEPS) == (0.005, 360000, (240000, 320000))
    assert (solver.WARMUP_ITERS, config.batch_size) == (4000, 4)

    lazy = load(LAZY_RETINANET)
    lazy.scale_schedule(32)
    assert (lazy.learning_rate, lazy.max_iter, lazy.batch_size, lazy.eval_period) == (0.02, 45000, 32, 2500)


@pytest.mark.parametrize(
    ("config_file", "batch"),
    [
        ("LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", 16),
        ("Cityscapes/mask_rcnn_R_50_FPN.yaml", 8),
        ("new_baselines/mask_rcnn_R_50_FPN_50ep_LSJ.py", 64),
    ],
)
def test_the_batch_is_the_config_s_own_where_none_is_given(config_file, batch, monkeypatch, unbuilt):
    monkeypatch.setattr("detectron2_files.model.group_processes_of_machine", lambda count: None)
    trial_class = load_model_def("detectron2").Detectron2Trial
    config = {"hyperparameters": {"config_file": config_file, "weights": ""}, "data": {"backend": "fake"}}
    assert unbuilt(trial_class, config).global_batch_size == batch
    assert unbuilt(trial_class, config, slots=3, for_training=False).global_batch_size % 3 == 0


def test_a_length_that_ends_at_a_step_of_the_schedule_trains():
    config = load(config_overrides={"SOLVER.STEPS": [30, 60], "SOLVER.MAX_ITER": 60, "SOLVER.WARMUP_ITERS": 0})
    scheduler = config.lr_scheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02))
    for _ in range(59):
        scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(0.002)]


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_the_tutorial_s_schedules_are_detectron_s_for_as_many_gpus(gpus):
    # tutorial_{1,2,4,8}gpu_e2e_faster_rcnn_R-50-FPN.yaml of Detectron: learning rate, iterations and steps
    published = {
        1: (0.0025, 60000, (30000, 40000)),
        2: (0.005, 30000, (15000, 20000)),
        4: (0.01, 15000, (7500, 10000)),
        8: (0.02, 7500, (3750, 5000)),
    }
    experiment = yaml.safe_load((DETECTRON2 / f"tutorial_{gpus}gpu.yaml").read_text())
    hparams = Detectron2Hyperparameters(**experiment["hyperparameters"])
    assert hparams.scale_schedule
    assert experiment["resources"]["slots_per_trial"] == gpus
    assert hparams.global_batch_size == 2 * gpus
    config = load_detectron2_config(hparams, DETECTRON2)
    config.scale_schedule(hparams.global_batch_size)
    solver = config.cfg.SOLVER
    assert published[gpus] == (solver.BASE_LR, solver.MAX_ITER, solver.STEPS)
    stated = (DETECTRON2 / f"tutorial_{gpus}gpu.yaml").read_text().replace("\n# ", " ")
    lr, length, (first, second) = published[gpus]
    assert f"{length:,} batches, learning rate {lr:g}, divided by 10 after {first:,} and {second:,}" in stated


def test_the_default_is_detectron_s_comparison_without_augmentation():
    lengths = {
        "const.yaml": (2, 720000, 0.0025, (480000, 640000)),
        "distributed.yaml": (16, 90000, 0.02, (60000, 80000)),
    }
    for name, (batch, length, lr, steps) in lengths.items():
        hparams = Detectron2Hyperparameters(**yaml.safe_load((DETECTRON2 / name).read_text())["hyperparameters"])
        assert hparams.global_batch_size == batch
        config = load_detectron2_config(hparams, DETECTRON2)
        assert (config.max_iter, config.batch_size) == (90000, 16)
        assert config.cfg.INPUT.MIN_SIZE_TRAIN == (800,)
        assert config.iou_types == ("bbox", "segm")
        if hparams.scale_schedule:
            config.scale_schedule(batch)
        assert (config.max_iter, config.learning_rate, config.cfg.SOLVER.STEPS) == (length, lr, steps)


@pytest.mark.parametrize("path", sorted(DETECTRON2.glob("*.yaml")), ids=lambda path: path.name)
def test_commented_lines_of_shipped_files_are_valid(path):
    written = path.read_text()
    head, tail = written.split("\nresources:", 1)
    text = f"{head}\nresources:" + re.sub(r"(?m)^( *)# ", r"\1", tail)
    before, after = yaml.safe_load(written), yaml.safe_load(text)
    assert len(after.get("bind_mounts", [])) == (0 if path.name == "const_fake.yaml" else 2)
    assert any("DETECTRON2_DATASETS=" in variable for variable in after["environment"]["environment_variables"])
    if "/data/coco" in written:
        assert {"host_path": "/data/coco", "container_path": "/data/coco", "read_only": True} in before["bind_mounts"]


def test_the_config_s_lengths_are_the_defaults(unbuilt):
    overrides = {"TEST.EVAL_PERIOD": 500}
    config = {"hyperparameters": {"config_file": MASK_RCNN, "config_overrides": overrides}, "data": {"backend": "fake"}}
    trial = unbuilt(load_model_def("detectron2").Detectron2Trial, config)
    assert trial.default_lengths() == {
        "searcher.max_length": Length("batches", 90000),
        "min_validation_period": Length("batches", 500),
        "min_checkpoint_period": Length("batches", 5000),
    }


def test_the_backend_s_options_of_a_config_are_set(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    try:
        apply_backend_options(load(config_overrides={"CUDNN_BENCHMARK": True, "FLOAT32_PRECISION": "high"}), True)
        assert torch.backends.cudnn.benchmark
        assert torch.get_float32_matmul_precision() == "high"
        apply_backend_options(load(config_overrides={"CUDNN_BENCHMARK": True}), False)
        assert not torch.backends.cudnn.benchmark
        with pytest.raises(UserError, match=r"FLOAT32_PRECISION: .*fast"):
            apply_backend_options(load(config_overrides={"FLOAT32_PRECISION": "fast"}), True)
    finally:
        torch.set_float32_matmul_precision(before)


def test_repeat_factors_are_square_roots_if_the_config_sets_it(shapes):
    annotations = CocoAnnotations.open(str(shapes / "annotations/train.json"))
    common = {"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD": 50.0}
    counts = [
        len(training_images(annotations, load(config_overrides={**common, "DATALOADER.REPEAT_SQRT": on}).train_set, 0))
        for on in (True, False)
    ]
    assert counts[1] > 3 * counts[0]


def test_ddp_s_options_of_a_python_config_are_taken():
    on = load(
        LAZY_RETINANET, config_overrides={"train.ddp": {"find_unused_parameters": True, "fp16_compression": True}}
    )
    assert (on.find_unused_parameters, on.halves_gradients) == (True, True)
    off = load(LAZY_RETINANET)
    assert (off.find_unused_parameters, off.halves_gradients) == (False, False)


def test_masks_of_a_python_config_are_scored_wherever_their_head_is():
    assert load("Misc/mmdet_mask_rcnn_R_50_FPN_1x.py").iou_types == ("bbox", "segm")
    assert load("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.py").iou_types == ("bbox", "keypoints")
    assert load(LAZY_RETINANET).iou_types == ("bbox",)


INSTALLED = "detectron2.projects."
PROJECT = "_BASE_: {base}\nMODEL: {{ROI_HEADS: {{NUM_CLASSES: 80}}, WEIGHTS: '', {model}}}\n"


def test_a_detectron2_project_is_loaded_by_custom_imports(tmp_path):
    base = shipped_configs() / "Base-RCNN-FPN.yaml"
    head = "{NAME: PointRendMaskHead, POINT_HEAD_ON: true, POOLER_TYPE: '', OUTPUT_SIDE_RESOLUTION: 7}"
    point = f"MASK_ON: true, ROI_MASK_HEAD: {head}"
    (tmp_path / "point.yaml").write_text(PROJECT.format(base=base, model=point))
    with pytest.raises(UserError, match=r"OUTPUT_SIDE_RESOLUTION|POINT_HEAD_ON"):
        load("point.yaml", tmp_path)
    config = load("point.yaml", tmp_path, custom_imports=[f"{INSTALLED}point_rend"])
    set_class_counts(config, {"things": 3}, [])
    assert config.class_counts() == {"MODEL.ROI_HEADS.NUM_CLASSES": 3, "MODEL.POINT_HEAD.NUM_CLASSES": 3}
    predictor = config.build_model().roi_heads.mask_head.point_head.predictor
    assert predictor.out_channels == 3


@pytest.mark.slow
def test_deeplab_has_its_own_schedule(tmp_path):
    text = (
        f"_BASE_: {shipped_configs() / 'Misc/semantic_R_50_FPN_1x.yaml'}\n"
        "MODEL: {SEM_SEG_HEAD: {NAME: DeepLabV3PlusHead, NUM_CLASSES: 54, NORM: BN, COMMON_STRIDE: 4,\n"
        "  IN_FEATURES: [p2, p5], PROJECT_FEATURES: [p2], PROJECT_CHANNELS: [48]}}\n"
        "SOLVER: {LR_SCHEDULER_NAME: WarmupPolyLR, MAX_ITER: 100, WARMUP_ITERS: 0, BASE_LR: 0.01}\n"
        "INPUT: {CROP: {ENABLED: true, SINGLE_CATEGORY_MAX_AREA: 0.75}}\n"
    )
    (tmp_path / "deeplab.yaml").write_text(text)
    config = load("deeplab.yaml", tmp_path, custom_imports=[f"{INSTALLED}deeplab"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = config.lr_scheduler(optimizer)
    scheduler.last_epoch = 50
    assert scheduler.get_lr() == [pytest.approx(0.01 * 0.5**0.9)]
    crops = [type(augmentation).__name__ for augmentation in config.mapper(True, ()).augmentations.augs]
    assert crops == ["ResizeShortestEdge", "RandomCrop_CategoryAreaConstraint", "RandomFlip"]
    assert config.class_counts() == {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 54}


def test_keys_of_a_module_of_the_user_s_are_there_before_the_file_is_read(tmp_path, monkeypatch):
    (tmp_path / "tensor_mask_of_test.py").write_text(
        "from detectron2.config import CfgNode\n"
        "def add_tensormask_config(cfg):\n"
        "    cfg.MODEL.TENSOR_MASK = CfgNode({'NUM_CLASSES': 80})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.yaml").write_text("MODEL: {META_ARCHITECTURE: TensorMask, TENSOR_MASK: {NUM_CLASSES: 80}}\n")
    config = load("mine.yaml", tmp_path, custom_imports=["tensor_mask_of_test.py"])
    assert config.class_counts() == {"MODEL.TENSOR_MASK.NUM_CLASSES": 80}


def test_keypoints_of_a_python_config_flip_as_the_data_s_names_say():
    config = load("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.py")
    names = describe([{"name": "hand", "keypoints": ["tip", "left_side", "right_side"]}])
    assert list(config.mapper(True, names).keypoint_hflip_indices) == [0, 2, 1]


def test_max_detections_is_what_the_heads_keep():
    box = Box2BoxTransform((10, 10, 5, 5))
    head = FastRCNNOutputLayers(ShapeSpec(channels=4), box2box_transform=box, num_classes=1)
    keep_detections(torch.nn.Sequential(head), 300)
    assert head.test_topk_per_image == 300
    with pytest.raises(UserError, match=r"hyperparameters\.max_detections: the model has no such number"):
        keep_detections(torch.nn.Linear(1, 1), 300)


@pytest.mark.parametrize("base", ["../COCO-Detection/retinanet_R_50_FPN_1x.yaml", "Base-RetinaNet.yaml"])
def test_base_of_a_yaml_config_names_one_of_the_zoo(tmp_path, base):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/mine.yaml").write_text(f"_BASE_: {base}\nSOLVER: {{BASE_LR: 0.5}}\n")
    config = load("configs/mine.yaml", tmp_path)
    assert config.cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert config.learning_rate == 0.5
