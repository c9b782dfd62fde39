"""The config that is trained: how it is found, merged, overridden, checked and saved."""

import shutil
from copy import deepcopy
from pathlib import Path

import mmcv.ops
import pytest
import torch
import yaml
from mmcv import Config
from mmdet.models import build_detector
from tiny_experiment import load_model_def
from tiny_mmdetection import MMDETECTION

from mmdetection_files.config import load_mmdet_config
from mmdetection_files.config_fields import (
    default_lengths,
    file_client_of,
    find_weights_files,
    own_batch_size,
    scale_lr,
    set_num_classes,
    set_paths,
    validation_times,
)
from mmdetection_files.config_keys import shipped_configs
from mmdetection_files.evaluation import check_evaluation, keep_detections
from mmdetection_files.model import (
    StartWeights,
    build_model,
    build_optimizer,
    load_start,
    published_checkpoints,
    published_weights,
    without_pretrained_backbone,
    without_teacher_weights,
)
from mmdetection_files.saved_config import read_resolved, write_resolved
from mmdetection_hyperparameters import MMDetectionData, MMDetectionHyperparameters
from shared.config.experiment import Sections, parse_data, parse_schedule, read_experiment
from shared.config.schema import Length, Split
from shared.errors import UserError
from shared.library import find_library_config
from shared.training.stopping import periods_of

MASK_RCNN = "mask_rcnn/mask_rcnn_r50_fpn_1x_coco.py"


def resolve(submitted=MMDETECTION, config_file=MASK_RCNN, **hparams):
    return load_mmdet_config(MMDetectionHyperparameters(config_file=config_file, **hparams), submitted)


def test_a_config_of_the_folder_comes_before_one_of_mmdetection_s(tmp_path):
    assert (
        find_library_config(MASK_RCNN, tmp_path, shipped_configs(), "config_file")
        == (shipped_configs() / MASK_RCNN).absolute()
    )
    own = tmp_path / MASK_RCNN
    own.parent.mkdir()
    shutil.copy(shipped_configs() / "retinanet/retinanet_r18_fpn_1x_coco.py", own)
    assert find_library_config(MASK_RCNN, tmp_path, shipped_configs(), "config_file") == own


@pytest.mark.parametrize("base", [MASK_RCNN, f"../{MASK_RCNN}", f"/mmdetection/configs/{MASK_RCNN}"])
def test_a_config_of_one_s_own_builds_on_a_shipped_one_by_its_name(tmp_path, base):
    (tmp_path / "mine.py").write_text(f"_base_ = {base!r}\nmodel = dict(backbone=dict(depth=18))\n")
    config = resolve(tmp_path, "mine.py")
    assert (config.model.type, config.model.backbone.depth) == ("MaskRCNN", 18)


def test_a_config_by_its_path_in_model_hub_s_image_is_the_shipped_one():
    assert resolve(config_file=f"/mmdetection/configs/{MASK_RCNN}")._cfg_dict == resolve()._cfg_dict


def test_a_missing_config_is_an_error_with_places_and_near_names(tmp_path):
    with pytest.raises(UserError) as raised:
        resolve(tmp_path, "mask_rcnn_r50_fpn_1x_coco.py")
    message = str(raised.value)
    assert message.startswith("hyperparameters.config_file: mask_rcnn_r50_fpn_1x_coco.py is neither in")
    assert str(tmp_path) in message
    assert str(shipped_configs()) in message
    assert f"did you mean '{MASK_RCNN}'?" in message


def test_an_override_wins_over_the_merged_file_and_that_over_the_config(tmp_path):
    (tmp_path / "mine.py").write_text(
        "depth = 18\n"
        "model = dict(backbone=dict(depth=depth), neck=dict(out_channels=64))\n"
        "optimizer = dict(_delete_=True, type='AdamW', lr=0.001)\n"
    )
    config = resolve(
        tmp_path,
        merge_config="mine.py",
        config_overrides={"model.neck.out_channels": 32, "optimizer": {"weight_decay": 0.1}},
    )
    assert config.model.backbone.depth == 18
    assert config.model.backbone.num_stages == 4
    assert config.model.neck.out_channels == 32
    assert dict(config.optimizer) == {"type": "AdamW", "lr": 0.001, "weight_decay": 0.1}


def test_delete_lists_and_none_in_overrides():
    config = resolve(
        config_overrides={
            "model.neck": {"_delete_": True, "type": "PAFPN", "in_channels": [1, 2], "out_channels": 3, "num_outs": 2},
            "data.train.pipeline.2.img_scale": [320, 240],
            "data.test.pipeline.1.transforms.3.size_divisor": 64,
            "optimizer_config.grad_clip": {"max_norm": 35},
            "model.backbone.init_cfg": None,
            "lr_config.step": [3, 4],
        }
    )
    assert config.model.neck.type == "PAFPN"
    assert "num_outs" in config.model.neck
    assert config.data.train.pipeline[2].img_scale == (320, 240)  # MMDetection asks for a tuple
    assert config.data.test.pipeline[1].transforms[3].size_divisor == 64
    assert config.optimizer_config.grad_clip == {"max_norm": 35}
    assert config.model.backbone.init_cfg is None
    assert config.lr_config.step == [3, 4]


WRONG = {
    "unknown key 'optimzer'; did you mean 'optimizer'?": {"optimzer.lr": 1},
    "unknown key 'optimizer.lrr'; did you mean 'lr'?": {"optimizer.lrr": 1},
    "unknown key 'model.backbone.dept'; did you mean 'depth' or 'depths'?": {"model.backbone.dept": 18},
    "unknown key 'model.test_cfg.rcnn.score_thrr'; did you mean 'score_thr'?": {"model.test_cfg.rcnn.score_thrr": 0.1},
    "unknown key 'lr_config.warmup_iter'; did you mean 'warmup_iters'?": {"lr_config.warmup_iter": 1},
    "unknown key 'optimizer_config.grad_clip.max_nrm'; did you mean 'max_norm'?": {
        "optimizer_config.grad_clip": {"max_nrm": 1}
    },
    "unknown key 'optimizer.paramwise_cfg.norm_decay'": {"optimizer.paramwise_cfg.norm_decay": 0},
    "unknown key 'fp16.loss_scal'; did you mean 'loss_scale'?": {"fp16.loss_scal": 512.0},
    "unknown key 'runner.max_epoch'; did you mean 'max_epochs'?": {"runner.max_epoch": 3},
    "unknown key 'optimizer.paramwise_cfg.custom_keys.backbone.layer1.lr_mul'; did you mean 'lr_mult'?": {
        "optimizer.paramwise_cfg.custom_keys.backbone.layer1.lr_mul": 0.1
    },
    "optimizer.type changes from SGD to AdamW, which does not take 'momentum' of the section that it is merged into. "
    "Fix: write `_delete_: true`": {"optimizer": {"type": "AdamW", "lr": 0.0001}},
    "data.train.pipeline is a list of 8. Fix: give a position from 0 to 7": {"data.train.pipeline.20.type": "x"},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_key_is_an_error_that_names_it_and_what_is_near(message, tmp_path):
    with pytest.raises(UserError) as raised:
        resolve(config_overrides=WRONG[message])
    assert str(raised.value).startswith("hyperparameters.config_overrides: " + message)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(_nested(WRONG[message])))
    if message.startswith("unknown") and "custom_keys" not in message:
        with pytest.raises(UserError, match=r"hyperparameters.merge_config: unknown key"):
            resolve(tmp_path, merge_config="mine.yaml")


def _nested(dotted):
    ((name, value),) = dotted.items()
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


RIGHT = [
    {"optimizer.paramwise_cfg": {"custom_keys": {"backbone.layer1": {"lr_mult": 0.1}}, "norm_decay_mult": 0.0}},
    {"optimizer.paramwise_cfg.custom_keys": {"backbone": {"lr_mult": 0.1}, "neck": {"lr_mult": 0.1}}},
    {"optimizer.paramwise_cfg.custom_keys.backbone.lr_mult": 0.1},
    {"momentum_config": {"policy": "cyclic", "target_ratio": [0.85, 1], "cyclic_times": 1, "step_ratio_up": 0.4}},
    {"optimizer._delete_": True, "optimizer.type": "AdamW", "optimizer.betas": [0.9, 0.99]},
    {"fp16": {"loss_scale": {"init_scale": 512}}},
    {"auto_scale_lr": {"enable": True, "base_batch_size": 16}},
    {"lr_config": {"_delete_": True, "policy": "CosineAnnealing", "min_lr_ratio": 0.1}},
    {"lr_config.warmup": "exp", "lr_config.warmup_by_epoch": True},
    {"data.train.classes": ["person"], "data.val_dataloader.samples_per_gpu": 4},
    {"custom_hooks": [{"type": "ExpMomentumEMAHook", "momentum": 0.01}]},
    {"model.backbone.dcn": {"type": "DCNv2", "deform_groups": 1}, "model.backbone.with_cp": True},
    {"evaluation.classwise": True, "find_unused_parameters": True},
]


@pytest.mark.parametrize("overrides", RIGHT, ids=lambda overrides: next(iter(overrides)))
def test_keys_that_mmdetection_accepts_are_accepted(overrides):
    resolve(config_overrides=overrides)


def test_a_dotted_override_keeps_the_dots_of_a_parameter_s_name():
    config = resolve(config_overrides={"optimizer.paramwise_cfg.custom_keys.backbone.layer1.lr_mult": 0.1})
    assert config.optimizer.paramwise_cfg == {"custom_keys": {"backbone.layer1": {"lr_mult": 0.1}}}


def test_both_names_of_one_hyperparameter_that_differ_are_an_error():
    same = {"optimizer.lr": 0.1}
    assert resolve(config_overrides=same, override_mmdet_config=same).optimizer.lr == 0.1
    with pytest.raises(UserError, match="config_overrides and its older name override_mmdet_config"):
        resolve(config_overrides=same, override_mmdet_config={"optimizer.lr": 0.2})
    with pytest.raises(UserError, match=r"hyperparameters.override_mmdet_config: unknown key 'optimzer'"):
        resolve(override_mmdet_config={"optimzer.lr": 0.2})
    assert MMDetectionHyperparameters(MASK_RCNN, use_pretrained=True).weights == "published"
    assert MMDetectionHyperparameters(MASK_RCNN, weights="x.pth", use_pretrained="x.pth").weights == "x.pth"
    assert MMDetectionHyperparameters(MASK_RCNN, use_pretrained=False).weights is None
    with pytest.raises(UserError, match=r"weights, 'x.pth', and its older name use_pretrained, True"):
        MMDetectionHyperparameters(MASK_RCNN, weights="x.pth", use_pretrained=True)
    with pytest.raises(UserError, match=r"scale_schedule is False, and .*auto_scale_lr.enable True"):
        resolve(scale_schedule=False, config_overrides={"auto_scale_lr.enable": True})


def test_the_resolved_config_is_read_back_and_executes_nothing(tmp_path):
    config = resolve(config_overrides={"data.train.pipeline.2.img_scale": [320, 240]})
    write_resolved(config, tmp_path)
    assert read_resolved(tmp_path / "mmdet_config.py")._cfg_dict == config._cfg_dict
    assert Config.fromfile(tmp_path / "mmdet_config.py").model == config.model  # MMDetection reads it too
    ran = tmp_path / "ran"
    (tmp_path / "mmdet_config.py").write_text(f"model = open({str(ran)!r}, 'w')\n")
    with pytest.raises(UserError, match="is not a resolved config"):
        resolve(config_file=str(tmp_path / "mmdet_config.py"))
    assert not ran.exists()


def test_custom_modules_of_the_folder_are_imported_and_missing_ones_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_necks.py").write_text(
        "from mmdet.models import NECKS\nfrom mmdet.models.necks import FPN\n"
        "@NECKS.register_module(force=True)\nclass MyNeck(FPN):\n    pass\n"
    )
    imports = {"custom_imports": {"imports": ["my_necks"], "allow_failed_imports": False}}
    config = resolve(config_overrides={**imports, "model.neck.type": "MyNeck"})
    assert config.model.neck.type == "MyNeck"
    assert resolve(custom_imports=["my_necks.py"], config_overrides={"model.neck.type": "MyNeck"}).model.neck.num_outs
    with pytest.raises(UserError, match=r"hyperparameters.custom_imports: my_neks.py cannot be imported"):
        resolve(custom_imports=["my_neks.py"])
    imports["custom_imports"]["imports"] = ["my_neks"]
    with pytest.raises(UserError, match=r"custom_imports: .*my_neks"):
        resolve(config_overrides=imports)


def test_the_config_s_lengths_are_the_defaults():
    assert default_lengths(resolve()) == {
        "searcher.max_length": Length("epochs", 12),
        "min_validation_period": Length("epochs", 1),
        "min_checkpoint_period": Length("epochs", 1),
    }
    by_iterations = {"runner": {"_delete_": True, "type": "IterBasedRunner", "max_iters": 90000}}
    lengths = default_lengths(resolve(config_overrides={**by_iterations, "evaluation.interval": 5000}))
    assert lengths["searcher.max_length"] == Length("batches", 90000)
    assert lengths["min_validation_period"] == Length("batches", 5000)


def test_the_library_config_sets_the_validation_interval_by_default():
    intervals = {"evaluation": {"interval": 4, "start": 2, "dynamic_intervals": [[10, 1]]}}
    times = validation_times(resolve(config_overrides=intervals))
    config = {"searcher": {"max_length": {"epochs": 12}}}
    defaults = {"min_validation_period": Length("epochs", 4)}

    def validated(config):
        periods = periods_of(parse_schedule(config).with_defaults(defaults, times), 5, 2, 1)
        return [batch for batch in range(1, periods.total + 1) if periods.validates(batch)]

    assert validated(config) == [10, 30, 50, 55, 60]
    assert validated({"searcher": {"max_length": {"epochs": 9}}}) == [10, 30, 45]
    assert validated({**config, "min_validation_period": {"epochs": 5}}) == [25, 50, 60]
    with pytest.raises(UserError, match=r"perform_initial_validation"):
        validation_times(resolve(config_overrides={"evaluation.start": 0}))


@pytest.mark.parametrize(
    ("config_file", "images"),
    [("yolox/yolox_s_8x8_300e_coco.py", 64), (MASK_RCNN, 16), ("yolact/yolact_r50_1x8_coco.py", 8)],
)
def test_the_batch_of_a_config_is_its_own_where_none_is_given(config_file, images):
    assert own_batch_size(resolve(config_file=config_file)) == images


def test_the_learning_rate_follows_the_batch_by_either_name_of_the_wish():
    for wish in ({"scale_schedule": True}, {"config_overrides": {"auto_scale_lr.enable": True}}):
        config = resolve(**wish)
        hparams = MMDetectionHyperparameters(MASK_RCNN, global_batch_size=2, **wish)
        scale_lr(config, hparams)
        assert config.optimizer.lr == 0.02 / 8
        assert config.auto_scale_lr.enable is False
    config = resolve()
    scale_lr(config, MMDetectionHyperparameters(MASK_RCNN, global_batch_size=2))
    assert config.optimizer.lr == 0.02


def test_fp16_by_the_optimizer_s_hook_is_fp16():
    hook = {"type": "Fp16OptimizerHook", "loss_scale": "dynamic", "grad_clip": {"max_norm": 35}}
    config = resolve(config_overrides={"optimizer_config": hook})
    assert config.fp16 == {"loss_scale": "dynamic"}
    assert config.optimizer_config == {"grad_clip": {"max_norm": 35}}


def test_a_pipeline_reads_images_as_the_data_section_says():
    s3 = {"backend": "s3", "bucket": "x"}
    steps = {f"data.{split}.pipeline.0.file_client_args": s3 for split in ("train", "val")}
    assert file_client_of(resolve()) is None
    assert file_client_of(resolve(config_overrides=steps)) == s3
    steps["data.val.pipeline.0.file_client_args"] = {"backend": "petrel"}
    with pytest.raises(UserError, match="differ between its data sets"):
        file_client_of(resolve(config_overrides=steps))


def test_an_optimizer_constructor_of_mmdetection_s_own_is_found():
    config = Config(
        {
            "optimizer": {
                "type": "SGD",
                "lr": 0.1,
                "weight_decay": 0.1,
                "constructor": "LearningRateDecayOptimizerConstructor",
                "paramwise_cfg": {"decay_rate": 0.5, "decay_type": "layer_wise", "num_layers": 6},
            }
        }
    )
    ConvNeXt = type("ConvNeXt", (torch.nn.Module,), {})  # the constructor asks what it is
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.backbone = ConvNeXt()
    assert build_optimizer(model, config).param_groups


def test_the_data_section_overrides_the_library_config_s_paths(tmp_path):
    config = resolve()
    data = MMDetectionData(train=Split("/x/train.json", "/x/images"))
    set_paths(config, data, tmp_path)
    assert config.data.train.ann_file == "/x/train.json"
    assert config.data.train.img_prefix == "/x/images"
    assert config.data.val.ann_file == f"{tmp_path}/data/coco/annotations/instances_val2017.json"
    config = resolve(config_overrides={"data.train": {"_delete_": True, "type": "ConcatDataset", "datasets": []}})
    with pytest.raises(UserError, match=r"data\.train gives one data set, and the MMDetection config has 0"):
        set_paths(config, data, tmp_path)


def test_the_heads_get_the_data_s_number_of_classes():
    for config_file in (
        MASK_RCNN,
        "cascade_rcnn/cascade_mask_rcnn_r50_fpn_1x_coco.py",
        "detr/detr_r50_8x2_150e_coco.py",
    ):
        config = resolve(config_file=config_file)
        set_num_classes(config, 3)
        found = repr(config._cfg_dict).split("'num_classes': ")[1:]
        assert found
        assert all(line.startswith("3") for line in found)
    config = resolve(config_file="solov2/solov2_r50_fpn_1x_coco.py")
    set_num_classes(config, 3)
    assert config.model.mask_head.num_classes == 3
    config = resolve(config_file="htc/htc_r50_fpn_1x_coco.py")
    set_num_classes(config, 3)
    assert config.model.roi_head.semantic_head.num_classes == 183
    assert config.model.roi_head.bbox_head[2].num_classes == 3
    panoptic = resolve(config_file="mask2former/mask2former_r50_lsj_8x2_50e_coco.py")
    with pytest.raises(UserError, match="is for 80 things and 0 stuff classes, and the data has 3 categories"):
        set_num_classes(panoptic, 3)


def test_a_panoptic_model_s_boxes_are_of_its_things_alone():
    config = resolve(config_file="panoptic_fpn/panoptic_fpn_r50_fpn_1x_coco.py")
    set_num_classes(config, 133)
    assert config.model.roi_head.bbox_head.num_classes == config.model.roi_head.mask_head.num_classes == 80
    assert config.model.semantic_head.num_things_classes == 80


def test_a_loss_that_counts_by_class_gets_the_data_s_number_of_classes():
    config = resolve(config_file="seesaw_loss/mask_rcnn_r50_fpn_random_seesaw_loss_mstrain_2x_lvis_v1.py")
    assert config.model.roi_head.bbox_head.loss_cls.num_classes == 1203
    set_num_classes(config, 3)
    assert config.model.roi_head.bbox_head.loss_cls.num_classes == config.model.roi_head.bbox_head.num_classes == 3


def test_a_config_of_mmdetection_1_s_keys_is_read_back(tmp_path):
    config = resolve(config_file="deepfashion/mask_rcnn_r50_fpn_15e_deepfashion.py")
    write_resolved(config, tmp_path)
    again = resolve(config_file=str(tmp_path / "mmdet_config.py"))
    assert again._cfg_dict == config._cfg_dict
    assert again.data.train_dataloader.samples_per_gpu == 2


@pytest.mark.parametrize(
    "config_file", ["retinanet/retinanet_r50_fpn_1x_coco.py", "pvt/retinanet_pvtv2-b0_fpn_1x_coco.py"]
)
def test_a_backbone_s_weights_are_not_downloaded_where_others_are_loaded(config_file):
    config = resolve(config_file=config_file)
    assert config.model.backbone.init_cfg.checkpoint
    without_pretrained_backbone(config)
    assert config.model.backbone.init_cfg is None


def test_relative_weights_are_found_in_the_submission_or_beside_yaml(tmp_path, monkeypatch):
    submitted, beside = tmp_path / "submitted", tmp_path / "beside"
    for file in (submitted / "backbone.pth", beside / "start.pth"):
        file.parent.mkdir()
        file.touch()
    (beside / "const.yaml").write_text("name: x\n")
    monkeypatch.chdir("/")
    places = read_experiment(beside / "const.yaml", (), Sections(), with_hyperparameters=False).places
    config = resolve(config_overrides={"model.backbone.init_cfg.checkpoint": "backbone.pth", "load_from": "start.pth"})
    find_weights_files(config, (submitted, *places))
    assert config.model.backbone.init_cfg.checkpoint == str(submitted / "backbone.pth")
    assert config.load_from == str(beside / "start.pth")


def test_a_teacher_is_found_among_mmdetection_s_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve(config_file="ld/ld_r18_gflv1_r101_fpn_coco_1x.py")
    assert config.model.teacher_config.model.bbox_head.num_classes == 80
    without_teacher_weights(config)
    with torch.device("meta"):
        model = build_model(config, initialize=False)
    assert model.teacher_model.backbone.depth == 101


def test_one_process_also_builds_layers_that_normalize_over_processes():
    config = resolve(config_file="strong_baselines/mask_rcnn_r50_fpn_syncbn-all_rpn-2conv_lsj_100e_coco.py")
    without_pretrained_backbone(config)
    before = deepcopy(config.model)
    with torch.device("meta"):
        model = build_model(config, initialize=False)
    assert type(model.backbone.bn1) is torch.nn.BatchNorm2d
    # with the names of the weights that it has among several
    head = model.roi_head.bbox_head.shared_convs[0].bn
    assert (type(head), head.group_size) == (mmcv.ops.SyncBatchNorm, 1)
    assert config.model == before  # what checkpoints say, for any number of processes


@pytest.mark.parametrize(
    "config_file", ["retinanet/retinanet_r50_fpn_1x_coco.py", "fcos/fcos_r50_caffe_fpn_gn-head_1x_coco.py"]
)
def test_priors_of_a_size_are_built_once_and_are_mmdetection_s(config_file):
    config = resolve(config_file=config_file)
    without_pretrained_backbone(config)
    with torch.device("meta"):
        model = build_model(config, initialize=False)
        plain = build_detector(config.model)
    generator, upstream = model.bbox_head.prior_generator, plain.bbox_head.prior_generator
    if base := getattr(upstream, "base_anchors", None):  # numbers, where the models are on "meta"
        generator.base_anchors = upstream.base_anchors = [torch.rand(each.shape, device="cpu") for each in base]
    for height, width in ((64, 96), (96, 64)):
        sizes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(3, 8)]
        image = (height - 9, width - 3, 3)
        for name, arguments in (("grid_priors", ()), ("valid_flags", (image,))):
            found = getattr(generator, name)(sizes, *arguments, device="cpu")
            expected = getattr(upstream, name)(sizes, *arguments, device="cpu")
            assert all(map(torch.equal, found, expected))
            again = getattr(generator, name)([torch.Size(size) for size in sizes], *arguments, device="cpu")
            assert all(a is b for a, b in zip(found, again, strict=True))
    averaged = deepcopy(model).bbox_head.prior_generator
    assert averaged.grid_priors.function.__self__ is averaged


def test_file_client_args_are_an_alias_for_the_backend():
    data = parse_data({"data": {"file_client_args": {"backend": "fake"}}}, MMDetectionData)
    assert data.backend == "fake"
    assert data.file_client is None
    assert parse_data({"data": {}}, MMDetectionData).backend == "disk"
    with pytest.raises(
        UserError, match=r"data.file_client_args.backend: 'petrell' is not available; did you mean 'petrel'"
    ):
        parse_data({"data": {"file_client_args": {"backend": "petrell"}}}, MMDetectionData)
    with pytest.raises(UserError, match="'petrel' cannot be used"):  # without its library and credentials
        parse_data({"data": {"file_client_args": {"backend": "petrel"}}}, MMDetectionData)
    s3 = {"backend": "s3", "bucket": "x", "endpoint_url": "http://minio:9000"}
    assert (
        parse_data({"data": {"file_client_args": s3}}, MMDetectionData).store_options.endpoint_url == s3["endpoint_url"]
    )
    with pytest.raises(UserError, match="the backend 'disk' has no option 'bukket'"):
        parse_data({"data": {"file_client_args": {"backend": "disk", "bukket": "x"}}}, MMDetectionData)


def test_mmdetection_s_published_weights_are_known_by_config():
    published = published_checkpoints()
    assert len(published) > 300
    assert all((shipped_configs() / name).is_file() for name in published)
    assert published[MASK_RCNN].endswith("mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth")
    with pytest.raises(UserError, match=r"publishes no weights for yolox/yolox_m.*; did you mean"):
        published_weights(Path("yolox/yolox_m_8x8_300e_coco.py"), "hyperparameters.weights")


SMALL = {"model.backbone.depth": 18, "model.neck.in_channels": [64, 128, 256, 512], "model.backbone.init_cfg": None}


def test_weights_of_an_older_version_s_names_are_loaded_whole(caplog):
    config = resolve(
        config_file="fcos/fcos_r50_caffe_fpn_gn-head_1x_coco.py",
        config_overrides={**SMALL, "model.bbox_head.stacked_convs": 1},
    )
    saved = build_model(config, initialize=False).state_dict()
    old = {name.replace("head.conv_", "head.fcos_"): torch.full_like(weight, 7) for name, weight in saved.items()}
    assert old.keys() != saved.keys()
    model = build_model(config, initialize=False)
    caplog.set_level("INFO")
    load_start(model, StartWeights("old.pth", "hyperparameters.weights", old, None), for_training=False)
    assert all((weight == 7).all() for weight in model.state_dict().values())
    assert f"weights: {len(saved)} of the model's {len(saved)} from" in caplog.text


def test_a_head_of_other_classes_is_new_in_training_an_error_elsewhere(caplog):
    config = resolve(config_file="retinanet/retinanet_r50_fpn_1x_coco.py", config_overrides=SMALL)
    model = build_model(config, initialize=False)
    weights = model.state_dict()
    weights["bbox_head.retina_cls.bias"] = torch.zeros(27)
    start = StartWeights("mine.pth", "hyperparameters.weights", weights, None)
    with pytest.raises(
        UserError, match=r"retina_cls.bias has the shape \(27,\) in mine.pth, and \(720,\) in this model"
    ):
        load_start(model, start, for_training=False)
    caplog.set_level("INFO")
    load_start(model, start, for_training=True)
    assert "1 are of another shape and start anew (bbox_head.retina_cls.bias)" in caplog.text
    del weights["bbox_head.retina_cls.bias"]
    with pytest.raises(UserError, match=r"mine.pth has no bbox_head.retina_cls.bias, which this model has"):
        load_start(model, start, for_training=False)


def test_the_library_s_numbers_of_scored_detections_are_honoured():
    hyperparameters = {"config_file": "retinanet/retinanet_r18_fpn_1x_coco.py", "global_batch_size": 2}
    scored = load_model_def("mmdetection").MMDetectionTrial.scored_detections
    assert scored(hyperparameters) is None
    assert scored({**hyperparameters, "config_overrides": {"evaluation.proposal_nums": [100, 300, 1000]}}) == 1000
    assert scored({**hyperparameters, "max_detections": 7}) == 7


@pytest.mark.parametrize(
    ("evaluation", "error"),
    [
        ({"iou_thrs": [0.5]}, r"evaluation\.iou_thrs: COCO's ten thresholds"),
        ({"save_best": "bbox_mAP_50"}, r"evaluation\.save_best: searcher\.metric chooses"),
    ],
)
def test_evaluation_words_without_effect_are_refused(evaluation, error):
    with pytest.raises(UserError, match=error):
        check_evaluation(Config({"evaluation": evaluation}))
    check_evaluation(Config({"evaluation": {"save_best": "auto", "metric": "bbox"}}))


def test_max_detections_is_what_the_head_keeps():
    config = Config({"model": {"test_cfg": {"rpn": {"max_per_img": 1000}, "rcnn": {"max_per_img": 100}}}})
    keep_detections(config, 300)
    assert config.model.test_cfg.rcnn.max_per_img == 300
    assert config.model.test_cfg.rpn.max_per_img == 1000
    with pytest.raises(UserError, match=r"hyperparameters\.max_detections: test_cfg .* has no max_per_img"):
        keep_detections(Config({"model": {"test_cfg": {}}}), 300)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'\n", "mmdet::"),
        ("model = dict(type='RetinaNet')\noptim_wrapper = dict(type='OptimWrapper')\n", "optim_wrapper"),
        ("train_dataloader=dict(batch_size=2)\nmodel = dict(type='RetinaNet')\n", "train_dataloader"),
    ],
)
def test_a_config_of_mmdetection_3_is_named_as_one(tmp_path, text, found):
    (tmp_path / "three.py").write_text(text)
    hparams = MMDetectionHyperparameters(config_file=str(tmp_path / "three.py"), global_batch_size=2)
    with pytest.raises(UserError, match=rf"three\.py is a config of MMDetection 3, which has '{found}'"):
        load_mmdet_config(hparams, tmp_path)
