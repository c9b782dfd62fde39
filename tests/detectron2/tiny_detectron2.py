"""Small Detectron2 models, and what the tests of all detectors need to know about them."""

import functools
from pathlib import Path

from tiny_experiment import ROOT, experiment, load_model_def

DETECTRON2 = ROOT / "detectron2"
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


def detectron2_config(
    shapes: Path, config_file: str = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", **overrides: object
) -> dict:
    """The same for one of Detectron2's configs."""
    return experiment(
        shapes,
        {
            "global_batch_size": 4,
            "config_file": config_file,
            "weights": "",
            "config_overrides": {**(SMALL_LAZY if config_file.endswith(".py") else SMALL_YAML), **overrides},
        },
    )


def detectron2_config_by_name(config_file, train, val, metric, **overrides):
    """A config of two batches on registered data sets."""
    names = {"DATASETS.TRAIN": [train], "DATASETS.TEST": [val]}
    config = detectron2_config(Path(), config_file, **names, **overrides)
    config["data"] = {"workers": 0}
    config["searcher"].update(metric=metric, max_length={"batches": 2})
    return config


def trial_class() -> type:
    return load_model_def("detectron2").Detectron2Trial


config = detectron2_config
SMALL_RATE = {"SOLVER.BASE_LR": 0.0002}
FROZEN = "backbone.bottom_up.res2"
BYTES_OF_AN_IMAGE = (3 * 1333 * 800, 3 * 1333 * 800)  # uint8
SMALL_POINT = {"use_pretrained": False, "weights": "", "global_batch_size": 4}
WEIGHT_DECAY_AND_RATE = {"SOLVER.WEIGHT_DECAY": 0.3, "SOLVER.BASE_LR": 0.0004}
OTHER_OPTIMIZER = (
    {"config_file": "configs/small_retinanet.py", "config_overrides": {}},
    {"optimizer._target_": "torch.optim.NAdam"},
)
OWN_PIPELINE = ("Detectron2Data", "INPUT")
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
WEIGHTED_LOSSES = {
    "mask r-cnn": (detectron2_config, ["loss_cls"]),
    "retinanet": (functools.partial(detectron2_config, config_file=RETINANET), ["loss_cls"]),
}
WITHOUT_VALIDATION_LOSS = ["Misc/semantic_R_50_FPN_1x.yaml"]
GPU_CASES = {
    "retinanet": functools.partial(
        detectron2_config, config_file=RETINANET, **{"MODEL.RETINANET.SCORE_THRESH_TEST": 0.0}
    ),
    "mask r-cnn": functools.partial(detectron2_config, **{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}),
}
FP16 = {"SOLVER.AMP.ENABLED": True}
SYNC_BN = ("config_overrides", {"MODEL.RESNETS.NORM": "SyncBN"})
GPU_WAITS = [
    ("retinanet", "shared/training/trial.py: train_batch", 2, "gradients of masked indexing"),
    ("mask r-cnn", "shared/training/trial.py: train_batch", 3, "gradients of masked indexing"),
]


def import_library() -> None:
    import detectron2.config  # noqa: F401 without the library, `detectron2` is the folder


def losses_by_hand(trial, path, images):
    """Losses of Detectron2's own loader, mapper and training model, with batch norm in evaluation mode."""
    import torch
    from detectron2.config import get_cfg
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T
    from detectron2.data.datasets import load_coco_json
    from detectron2.utils.events import EventStorage

    state = dict(vars(trial.evaluation_model))
    mapper = DatasetMapper(get_cfg(), is_train=True, augmentations=[T.ResizeShortestEdge(128, 1333)])
    for of_image in load_coco_json(str(path), str(images), "by_hand"):  # a name, for labels from 0
        if not of_image["annotations"]:
            continue
        vars(trial.evaluation_model).update(state)  # its loss is over a running mean of what was seen before
        trial.evaluation_model.train()
        for module in trial.evaluation_model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        with EventStorage():
            losses = {name: value.item() for name, value in trial.evaluation_model([mapper(of_image)]).items()}
        yield {**losses, "loss": sum(losses.values())}
