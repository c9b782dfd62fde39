"""Detectron2's detectors here against Detectron2 itself.

step: against the loop of Detectron2's tools/plain_train_net.py with its own data set and loader; the same config,
weights and loader settings. memory: against its loader, with one and two processes. evaluation: against COCOEvaluator,
with pycocotools and with its compiled fast path.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from command_line import trial_class_of

Detectron2Trial = trial_class_of("detectron2")

# isort: split
from against import run
from command_line import ROOT, silent
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.common import DatasetFromList
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from memory import read_all

from coco_files import HEIGHT, WIDTH, paths_of
from detectron2_files.config import load_detectron2_config
from detectron2_files.data import CocoSamples
from detectron2_files.evaluation import to_detections  # noqa: F401 `run` takes it from here
from detectron2_hyperparameters import Detectron2Hyperparameters
from shared.data.annotations import CocoAnnotations
from shared.data.open import SplitData
from shared.data.storage import DiskImages

NAME, TRIAL_CLASS, RANKS = "detectron2", Detectron2Trial, (1, 2)
SMALL = {
    "config_file": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "weights": "",
    "config_overrides": {
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS": {"DEPTH": 18, "RES2_OUT_CHANNELS": 64, "NORM": "BN"},
        "INPUT": {"MIN_SIZE_TRAIN": [240], "MAX_SIZE_TRAIN": 320, "MIN_SIZE_TEST": 240, "MAX_SIZE_TEST": 320},
        "SOLVER.BASE_LR": 0.001,
    },
}
FULL = {
    "config_file": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "weights": "",
    "config_overrides": {"SOLVER.BASE_LR": 0.001},
}


def loop(trial: Detectron2Trial, folder: Path, workers: int, _: dict) -> Callable[[int], None]:
    """plain_train_net's loop over Detectron2's own data set, with the trial's weights."""
    annotations, images = paths_of(folder, "train")
    register_coco_instances("benchmark_train", {}, str(annotations), str(images))
    cfg = trial.detectron2_config.cfg.clone()
    cfg.DATASETS.TRAIN = ("benchmark_train",)
    cfg.SOLVER.IMS_PER_BATCH = trial.global_batch_size
    cfg.DATALOADER.NUM_WORKERS = workers
    model = build_model(cfg).to(trial.context.device).train()
    model.load_state_dict(trial.plain_model.state_dict())
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    batches, numbers = iter(build_detection_train_loader(cfg)), itertools.count()

    def train(count: int) -> None:
        with EventStorage(0) as storage:
            for data, iteration in zip(batches, itertools.islice(numbers, count), strict=False):
                storage.iter = iteration
                loss_dict = model(data)
                losses = sum(loss_dict.values())
                assert torch.isfinite(losses).all(), loss_dict
                reduced = {k: v.item() for k, v in comm.reduce_dict(loss_dict).items()}
                storage.put_scalars(total_loss=sum(reduced.values()), **reduced)
                optimizer.zero_grad()
                losses.backward()
                optimizer.step()
                storage.put_scalar("lr", optimizer.param_groups[0]["lr"], smoothing_hint=False)
                scheduler.step()

    return train


def data_sets(path: Path) -> tuple:
    config = load_detectron2_config(Detectron2Hyperparameters(FULL["config_file"]), ROOT)

    def open_ours() -> CocoSamples:
        return CocoSamples(SplitData(CocoAnnotations.open(path), DiskImages(path.parent)), None, config.train_set, 0)

    def open_theirs() -> DatasetFromList:
        with silent():
            return DatasetFromList(load_coco_json(str(path), str(path.parent), "benchmark_memory"), copy=False)

    return (open_ours, lambda samples: read_all(samples.images.annotations)), (open_theirs, read_all)


def output(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, masks: np.ndarray | None) -> Instances:
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes, instances.scores = Boxes(torch.as_tensor(boxes)), torch.as_tensor(scores)
    instances.pred_classes = torch.as_tensor(labels)
    if masks is not None:
        instances.pred_masks = torch.as_tensor(masks)
    return instances


def evaluations(path: Path, iou_types: tuple[str, ...]) -> dict[str, tuple]:
    name = f"benchmark_val_{len(iou_types)}"
    register_coco_instances(name, {}, str(path), str(path.parent))
    DatasetCatalog.get(name)
    MetadataCatalog.get(name).set(evaluator_type="coco")

    def of(fast: bool) -> tuple:
        evaluator = COCOEvaluator(name, iou_types, distributed=False, use_fast_impl=fast)
        evaluator.reset()
        return (
            lambda found, image_id: evaluator.process([{"image_id": image_id}], [{"instances": found}]),
            lambda: evaluator.evaluate()[iou_types[-1]]["AP"] / 100,
        )

    return {"pycocotools": of(False), "fast path": of(True)}


if __name__ == "__main__":
    run(sys.modules["__main__"])
