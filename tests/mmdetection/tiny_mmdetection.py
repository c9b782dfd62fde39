"""Small MMDetection models, and what the tests of all detectors need to know about them."""

import functools
import sys
from pathlib import Path

from tiny_experiment import ROOT, experiment, load_model_def

MMDETECTION = ROOT / "mmdetection"
SMALL_BACKBONE = {
    "model.backbone.depth": 18,
    "model.backbone.base_channels": 16,
    "model.backbone.frozen_stages": -1,
    "model.backbone.norm_eval": False,
    "model.backbone.init_cfg": None,
    "model.neck.in_channels": [16, 32, 64, 128],
    "model.neck.out_channels": 32,
    "data.train.pipeline.2.img_scale": [128, 128],
    "data.val.pipeline.1.img_scale": [128, 128],
    "data.test.pipeline.1.img_scale": [128, 128],
}
DENSE_HEAD = {
    "model.test_cfg.nms_pre": 200,
    "model.test_cfg.max_per_img": 30,
    "model.bbox_head.in_channels": 32,
    "model.bbox_head.feat_channels": 32,
    "model.bbox_head.stacked_convs": 1,
}
ROI_HEAD = {
    "model.rpn_head.in_channels": 32,
    "model.rpn_head.feat_channels": 32,
    "model.roi_head.bbox_roi_extractor.out_channels": 32,
    "model.roi_head.bbox_head.in_channels": 32,
    "model.roi_head.bbox_head.fc_out_channels": 64,
    "model.train_cfg.rpn_proposal.nms_pre": 200,
    "model.train_cfg.rpn_proposal.max_per_img": 100,
    "model.test_cfg.rpn.nms_pre": 200,
    "model.test_cfg.rpn.max_per_img": 100,
    "model.test_cfg.rcnn.max_per_img": 30,
    "model.train_cfg.rcnn.sampler.num": 64,
}
MASK_HEAD = {
    "model.roi_head.mask_roi_extractor.out_channels": 32,
    "model.roi_head.mask_head.in_channels": 32,
    "model.roi_head.mask_head.conv_out_channels": 32,
    "model.roi_head.mask_head.num_convs": 1,
}
TINY = {
    "mask_rcnn/mask_rcnn_r50_fpn_1x_coco.py": {**SMALL_BACKBONE, **ROI_HEAD, **MASK_HEAD},
    "faster_rcnn/faster_rcnn_r50_fpn_1x_coco.py": {**SMALL_BACKBONE, **ROI_HEAD},
    "retinanet/retinanet_r50_fpn_1x_coco.py": {**SMALL_BACKBONE, **DENSE_HEAD},
    "gfl/gfl_r50_fpn_1x_coco.py": {
        **SMALL_BACKBONE,
        **DENSE_HEAD,
        "model.bbox_head.norm_cfg": {"type": "GN", "num_groups": 8, "requires_grad": True},
    },
}


def mmdet_config(
    shapes: Path, config_file: str = "mask_rcnn/mask_rcnn_r50_fpn_1x_coco.py", **overrides: object
) -> dict:
    """The same for one of MMDetection's configs."""
    return experiment(
        shapes,
        {
            "global_batch_size": 4,
            "config_file": config_file,
            "config_overrides": {**TINY.get(config_file, {}), **overrides},
        },
    )


def trial_class() -> type:
    return load_model_def("mmdetection").MMDetectionTrial


config = mmdet_config
SMALL_RATE = {"optimizer.lr": 0.002}
FROZEN = "backbone.layer1"
BYTES_OF_AN_IMAGE = (3 * 1344 * 800 * 4, 3 * 1344 * 800 * 4)  # float32
SMALL_POINT = {"weights": None, "global_batch_size": 4}
WEIGHT_DECAY_AND_RATE = {"optimizer.weight_decay": 0.3, "optimizer.lr": 0.004}
OTHER_OPTIMIZER = ({}, {"optimizer": {"_delete_": True, "type": "AdamW", "lr": 0.001}})
OWN_PIPELINE = ("MMDetectionData", "pipeline")  # the section of `data`, and the key that data.augment is refused for
RETINANET, MASK_RCNN = "retinanet/retinanet_r50_fpn_1x_coco.py", "mask_rcnn/mask_rcnn_r50_fpn_1x_coco.py"
WEIGHTED_LOSSES = {
    "mask r-cnn": (mmdet_config, ["loss_cls"]),
    "retinanet": (functools.partial(mmdet_config, config_file=RETINANET), ["loss_cls"]),
    "gfl": (functools.partial(mmdet_config, config_file="gfl/gfl_r50_fpn_1x_coco.py"), ["loss_cls"]),
}
WITHOUT_VALIDATION_LOSS = [
    "rpn/rpn_r50_fpn_1x_coco.py",
    "cornernet/cornernet_hourglass104_mstest_32x3_210e_coco.py",
]
# untrained models' scores are low, and detections without a threshold tell more
GPU_CASES = {
    "retinanet": functools.partial(mmdet_config, config_file=RETINANET, **{"model.test_cfg.score_thr": 0.0}),
    "mask r-cnn": functools.partial(mmdet_config, **{"model.test_cfg.rcnn.score_thr": 0.0}),
}
FP16 = {"fp16": {"loss_scale": "dynamic"}}
SYNC_BN = ("config_overrides", {"model.backbone.norm_cfg": {"type": "SyncBN", "requires_grad": True}})
GPU_WAITS = [
    ("mask r-cnn", "shared/training/trial.py: train_batch", 1, "gradients of masked indexing"),
    ("mask r-cnn", "mmdetection/mmdetection_files/masks.py: encode_two_stage", 1, "labels of all masks"),
]


def import_library() -> None:
    import mmdet  # noqa: F401

    import mmdetection_files  # noqa: F401 before mmcv.ops, where mmcv is not compiled


def losses_by_hand(trial, path, images):
    """Losses of mmdet's own data set without augmentation, and its own step."""
    from mmcv.parallel import collate
    from mmdet.datasets import build_dataset

    norm = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True}
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True},
        {"type": "Resize", "img_scale": (128, 128), "keep_ratio": True},
        {"type": "RandomFlip", "flip_ratio": 0.0},
        {"type": "Normalize", **norm},
        {"type": "Pad", "size_divisor": 32},
        {"type": "DefaultFormatBundle"},
        {"type": "Collect", "keys": ["img", "gt_bboxes", "gt_labels"]},
    ]
    classes = [category["name"] for category in trial.categories]
    section = {"type": "CocoDataset", "ann_file": str(path), "img_prefix": str(images), "classes": classes}
    for sample in build_dataset({**section, "pipeline": pipeline}):
        inputs = {key: value.data[0] for key, value in collate([sample], samples_per_gpu=1).items()}
        yield trial.evaluation_model.eval().train_step(inputs, None)["log_vars"]


def use_operations_in_pytorch(monkeypatch):
    """mmcv.ops over the operations in PyTorch, even if mmcv-full is installed."""
    from mmdetection_files import operations

    for name, module in list(sys.modules.items()):
        if name.startswith("mmcv.ops.") and hasattr(module, "ext_module"):
            monkeypatch.setattr(module, "ext_module", operations.InPyTorch())
