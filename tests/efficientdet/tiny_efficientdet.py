"""A small EfficientDet, and what the tests of all detectors need to know about it."""

import json
from pathlib import Path

from tiny_experiment import experiment


def config(shapes: Path, **hyperparameters: object) -> dict:
    """A run of 12 batches, validated and saved every 4, that takes seconds."""
    return experiment(
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
            **hyperparameters,
        },
    )


def trial_class() -> type:
    from model_def import EfficientDetTrial

    return EfficientDetTrial


SMALL_RATE = {"lr": 0.0002}
FROZEN = "backbone.blocks"
BYTES_OF_AN_IMAGE = (1_965_000, 787_000)  # uint8 and the labeled anchors, 512 x 512
SMALL_POINT = {
    "backbone": "mobilenetv3_small_050",
    "model_config": {"fpn_channels": 16, "fpn_cell_repeats": 1},
    "input_size": 128,
    "pretrained": "none",
    "amp": "bf16",
    "global_batch_size": 4,
}
WEIGHT_DECAY_AND_RATE = {"weight_decay": 0.3, "lr": 0.0004}
OTHER_OPTIMIZER = ({}, {"opt": "sgd"})  # hyperparameters of a run; changes that its checkpoint does not fit
WEIGHTED_LOSSES = {"": (config, ["class_loss"])}  # by model: its config, and the terms that class weights change
TRAINS_WITHOUT_OBJECTS = True  # on images without any
GPU_CASES = {"": config}  # the main one last
FP16 = {"amp": "fp16"}
SYNC_BN = ("hyperparameters", {"sync_bn": True})


def import_library() -> None:
    """Does nothing: the default environment has effdet."""


def losses_by_hand(trial, path, images):
    """Losses of effdet's training bench, which also labels anchors in an evaluation."""
    import numpy as np
    import torch
    from effdet.bench import DetBenchTrain
    from PIL import Image

    bench = DetBenchTrain(trial.evaluation_model.model).eval()
    coco = json.loads(path.read_text())
    for image in coco["images"]:
        scale = 192 / 128  # of the input over the images
        pixels = np.asarray(Image.open(images / image["file_name"]).resize((192, 192), Image.Resampling.BICUBIC))
        of_image = [a for a in coco["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        boxes = np.array([a["bbox"] for a in of_image], dtype=np.float32).reshape(-1, 4) * scale
        corners = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 1] + boxes[:, 3], boxes[:, 0] + boxes[:, 2]], axis=1)
        target = {
            "bbox": [torch.tensor(corners.clip(0, 192))],
            "cls": [torch.tensor([a["category_id"] for a in of_image])],  # the shapes' ids are 1, 2, 3
            "img_scale": torch.tensor([1 / scale]),
            "img_size": torch.tensor([[128, 128]]),
        }
        inputs = (torch.tensor(pixels).permute(2, 0, 1).float() - trial.mean[0]) / trial.std[0]
        losses = bench(inputs[None], target)
        yield {name: losses[name].item() for name in ("loss", "class_loss", "box_loss")}
