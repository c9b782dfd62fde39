"""Small versions of the detectors, for the tests."""

import contextlib
import importlib.util
import math
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
EFFICIENTDET, MMDETECTION, DETECTRON2 = ROOT / "efficientdet", ROOT / "mmdetection", ROOT / "detectron2"


def load_model_def(detector: str = "mmdetection"):
    """A detector's model_def.py under a module name of its own."""
    name = f"{detector}_model_def"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / detector / "model_def.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


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


# COCO's 17 keypoints of a person
KEYPOINT_NAMES = [
    "nose",
    *(
        f"{side}_{part}"
        for part in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
        for side in ("left", "right")
    ),
]


def with_keypoints(coco: dict) -> dict:
    """The same COCO annotations with 17 points around each box's center. Some are invisible or unlabelled; crowds and
    each seventh object have none."""
    annotations = []
    for annotation in coco["annotations"]:
        x, y, width, height = annotation["bbox"]
        points = []
        for i in range(17):
            angle = 2 * math.pi * i / 17
            visibility = 0 if (annotation["id"] + i) % 5 == 0 else 1 + i % 2
            at = (
                round(x + width * (0.5 + 0.4 * math.cos(angle)), 1),
                round(y + height * (0.5 + 0.4 * math.sin(angle)), 1),
            )
            points += [*at, visibility] if visibility else [0, 0, 0]
        if annotation["iscrowd"] or annotation["id"] % 7 == 0:
            points = [0] * 51
        counted = sum(visibility > 0 for visibility in points[2::3])
        annotations.append({**annotation, "keypoints": points, "num_keypoints": counted})
    categories = [
        {**category, "keypoints": KEYPOINT_NAMES, "skeleton": [[6, 8], [8, 10]]} for category in coco["categories"]
    ]
    return {**coco, "annotations": annotations, "categories": categories}


SMALL_YAML = {
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 200,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 200,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 100,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 200,
    "TEST.DETECTIONS_PER_IMAGE": 30,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [16],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 16,
    "MODEL.SEM_SEG_HEAD.NORM": "",
    "INPUT.MIN_SIZE_TRAIN": [128],
    "INPUT.MIN_SIZE_TEST": 128,
    "SOLVER.WARMUP_ITERS": 2,
}
SMALL_LAZY = {
    "dataloader.train.mapper.augmentations": [
        {"_target_": "detectron2.data.transforms.RandomFlip", "horizontal": True}
    ],
    "dataloader.test.mapper.augmentations": [],
}

# transformers' models, by model type
_SMALL_ENDS = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
_STAGES = {"out_features": ["stage2", "stage3", "stage4"]}
_RT_DETR_RESNET = {"model_type": "rt_detr_resnet", **_SMALL_ENDS, "layer_type": "basic", **_STAGES}
_RESNET = {"model_type": "resnet", **_SMALL_ENDS, "layer_type": "basic", **_STAGES}
_HGNET = {
    "model_type": "hgnet_v2",
    **_SMALL_ENDS,
    **_STAGES,
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 16, 16],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 16, 16, 16],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
}
_WINDOWED = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 128,
    "patch_size": 16,
    "out_features": ["stage1", "stage2"],
}
_DINO = {"model_type": "rf_detr_dinov2", **_WINDOWED, "num_windows": 2}
_VIT = {
    "model_type": "lw_detr_vit",
    **_WINDOWED,
    "pretrain_image_size": 128,
    "num_windows": 4,
    "window_block_indices": [0],
}
_RT_DETR = {
    "freeze_backbone_batch_norms": False,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 16, 16],
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "num_queries": 20,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_denoising": 10,
}
_DETR = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 20,
    "backbone_config": _RESNET,
}
_LW_DETR = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "num_queries": 20,
    "group_detr": 2,
}
DETR_TYPES = {
    "rt_detr_v2": {**_RT_DETR, "backbone_config": _RT_DETR_RESNET},
    "rt_detr": {**_RT_DETR, "backbone_config": _RT_DETR_RESNET},
    "d_fine": {**_RT_DETR, "backbone_config": _HGNET, "lqe_hidden_dim": 8},
    "deimv2": {**_RT_DETR, "backbone_config": _HGNET, "lqe_hidden_dim": 8},
    "detr": {**_DETR, "d_model": 32, "auxiliary_loss": True},
    "conditional_detr": {**_DETR, "d_model": 32, "auxiliary_loss": True},
    "dab-detr": {**_DETR, "hidden_size": 32, "auxiliary_loss": True},
    "deformable_detr": {**_DETR, "d_model": 32, "auxiliary_loss": True, "disable_custom_kernels": True},
    "lw_detr": {**_LW_DETR, "backbone_config": _VIT, "projector_scale_factors": [1.0]},
    "rf_detr": {**_LW_DETR, "backbone_config": _DINO},
    "yolos": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": [128, 128],
        "num_detection_tokens": 20,
    },
}


def efficientdet_config(shapes: Path) -> dict:
    """A run of 12 batches, validated and saved every 4, that takes seconds."""
    return _experiment(
        shapes,
        {
            "global_batch_size": 4,
            "model": "efficientdet_d0",
            "backbone": "mobilenetv3_small_050",
            "model_config": {"fpn_channels": 16, "fpn_cell_repeats": 1, "box_class_repeats": 1},
            "pretrained": "none",
            "input_size": 128,
            "opt": "adamw",
            "lr": 0.002,
            "sched_on_updates": True,
            "warmup_epochs": 0,
            "cooldown_epochs": 0,
            "model_ema_decay": 0.9,
        },
    )


def mmdet_config(
    shapes: Path, config_file: str = "mask_rcnn/mask_rcnn_r50_fpn_1x_coco.py", **overrides: object
) -> dict:
    """The same for one of MMDetection's configs."""
    return _experiment(
        shapes,
        {
            "global_batch_size": 4,
            "config_file": config_file,
            "config_overrides": {**TINY.get(config_file, {}), **overrides},
        },
    )


def detectron2_config(
    shapes: Path, config_file: str = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", **overrides: object
) -> dict:
    """The same for one of Detectron2's configs."""
    return _experiment(
        shapes,
        {
            "global_batch_size": 4,
            "config_file": config_file,
            "weights": "",
            "config_overrides": {**(SMALL_LAZY if config_file.endswith(".py") else SMALL_YAML), **overrides},
        },
    )


def detr_config(shapes: Path, model_type: str = "rt_detr_v2", **changes: object) -> dict:
    """The same for one of transformers' model types."""
    return _experiment(
        shapes,
        {
            "global_batch_size": 4,
            "config": {"model_type": model_type, **DETR_TYPES[model_type], **changes},
            "processor": {"size": {"height": 128, "width": 128}},
            "lr": 0.001,
            "backbone_lr": None,
        },
    )


def detectron2_config_by_name(config_file, train, val, metric, **overrides):
    """A config of two batches on registered data sets."""
    names = {"DATASETS.TRAIN": [train], "DATASETS.TEST": [val]}
    config = detectron2_config(Path(), config_file, **names, **overrides)
    config["data"] = {"workers": 0}
    config["searcher"].update(metric=metric, max_length={"batches": 2})
    return config


def trial_classes() -> dict[str, type]:
    """The trial of each detector whose library is installed."""
    from model_def import EfficientDetTrial

    trials = {"efficientdet": EfficientDetTrial}
    with contextlib.suppress(ImportError, SystemExit):
        trials["mmdetection"] = load_model_def().MMDetectionTrial
    with contextlib.suppress(ImportError, SystemExit):
        trials["detectron2"] = load_model_def("detectron2").Detectron2Trial
    with contextlib.suppress(ImportError, SystemExit):
        trials["detr"] = load_model_def("detr").DetrTrial
    return trials


CONFIGS = {
    "efficientdet": efficientdet_config,
    "mmdetection": mmdet_config,
    "detectron2": detectron2_config,
    "detr": detr_config,
}
# detr has tests of its own for most promises
MAIN_DETECTORS = [name for name in CONFIGS if name != "detr"]
# so small that rounding does not grow from step to step
SMALL_RATES = {
    "efficientdet": {"lr": 0.0002},
    "mmdetection": {"optimizer.lr": 0.002},
    "detectron2": {"SOLVER.BASE_LR": 0.0002},
    "detr": {"lr": 0.00002},
}
FROZEN = {"efficientdet": "backbone.blocks", "mmdetection": "backbone.layer1", "detectron2": "backbone.bottom_up.res2"}
FROZEN["detr"] = "model.backbone.model.encoder.stages.1"
# bytes of the tensors of an image in a batch, at most: to train on and to validate on
BYTES_OF_AN_IMAGE = {
    "efficientdet": (1_965_000, 787_000),  # uint8 and the labelled anchors, 512 x 512
    "mmdetection": (3 * 1344 * 800 * 4, 3 * 1344 * 800 * 4),  # float32
    "detectron2": (3 * 1333 * 800, 3 * 1333 * 800),  # uint8
    "detr": (3 * 640 * 640 * 4, 3 * 640 * 640 * 4),  # float32
}
# what makes any point of a search small
SMALL_POINT = {
    "efficientdet": {
        "backbone": "mobilenetv3_small_050",
        "model_config": {"fpn_channels": 16, "fpn_cell_repeats": 1},
        "input_size": 128,
        "pretrained": "none",
        "amp": "bf16",
        "global_batch_size": 4,
    },
    "mmdetection": {"weights": None, "global_batch_size": 4},
    "detectron2": {"use_pretrained": False, "weights": "", "global_batch_size": 4},
    "detr": {
        "model": None,
        "config": {"model_type": "rt_detr_v2", **DETR_TYPES["rt_detr_v2"]},
        "processor": {"size": {"height": 128, "width": 128}},
        "weights": None,
        "global_batch_size": 4,
    },
}


def _experiment(shapes: Path, hyperparameters: dict) -> dict:
    return {
        "name": "test",
        "data": {
            "train": {"annotations": str(shapes / "annotations/train.json"), "images": str(shapes / "train")},
            "val": {"annotations": str(shapes / "annotations/val.json"), "images": str(shapes / "val")},
            "workers": 0,
        },
        "hyperparameters": hyperparameters,
        "searcher": {
            "name": "single",
            "metric": "bbox_mAP",
            "smaller_is_better": False,
            "max_length": {"batches": 12},
        },
        "min_validation_period": {"batches": 4},
        "scheduling_unit": 2,
        "reproducibility": {"experiment_seed": 3},
        "entrypoint": "python3 model_def.py",
    }


def use_operations_in_pytorch(monkeypatch):
    """mmcv.ops over the operations in PyTorch, even if mmcv-full is installed."""
    from mmdetection_files import operations

    for name, module in list(sys.modules.items()):
        if name.startswith("mmcv.ops.") and hasattr(module, "ext_module"):
            monkeypatch.setattr(module, "ext_module", operations.InPyTorch())
