"""MMDetection's detectors here against MMDetection itself.

step: against mmcv's EpochBasedRunner with mmdet's data set and loader; the same config, weights and loader settings.
memory: against mmdet's CocoDataset. evaluation: against `encode_mask_results` and the data set's `evaluate`.
"""

import itertools
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from command_line import silent, trial_class_of

MMDetectionTrial = trial_class_of("mmdetection")  # before mmcv.ops, which may have no compiled operations

# isort: split
from against import run
from mmcv.parallel import MMDataParallel, _functions
from mmcv.runner import EpochBasedRunner, build_optimizer
from mmdet.core import encode_mask_results
from mmdet.datasets import build_dataloader, build_dataset

from coco_files import CATEGORIES
from mmdetection_files.data import CocoSamples
from mmdetection_files.evaluation import to_detections  # noqa: F401 `run` takes it from here
from mmdetection_files.model import build_model, without_pretrained_backbone
from shared.data.annotations import CocoAnnotations
from shared.data.storage import DiskImages

NAME, TRIAL_CLASS, RANKS = "mmdetection", MMDetectionTrial, (1,)
SMALL = {
    "config_file": "retinanet/retinanet_r18_fpn_1x_coco.py",
    "config_overrides": {
        "model.backbone.init_cfg": None,
        "data.train.pipeline.2.img_scale": [320, 240],
        "data.val.pipeline.1.img_scale": [320, 240],
        "optimizer.lr": 0.001,
    },
}
FULL = {
    "config_file": "mask_rcnn/mask_rcnn_r50_fpn_1x_coco.py",
    "config_overrides": {"model.backbone.init_cfg": None, "optimizer.lr": 0.001},
}

# mmcv names a GPU by its number, and torch asks for the device
_get_stream = _functions._get_stream
_functions._get_stream = lambda gpu: _get_stream(torch.device("cuda", gpu))


def loop(trial: MMDetectionTrial, folder: Path, workers: int, _: dict) -> Callable[[int], None]:
    """mmcv's runner over mmdet's own data set, with the trial's weights."""
    config = trial.mmdet_config
    config.data.train.classes = [category["name"] for category in trial.categories]
    with silent():
        dataset = build_dataset(config.data.train)
    loader = build_dataloader(
        dataset, trial.per_slot_batch_size, workers, dist=False, seed=0, persistent_workers=workers > 0
    )
    without_pretrained_backbone(config)
    model = build_model(config, initialize=False)
    model.load_state_dict(trial.plain_model.state_dict())
    model = MMDataParallel(model.to(trial.context.device), device_ids=[0] if torch.cuda.is_available() else None)
    runner = EpochBasedRunner(
        model, optimizer=build_optimizer(model, config.optimizer), logger=logging.getLogger("upstream"), max_epochs=100
    )
    runner.work_dir = tempfile.mkdtemp()
    log_config = {"interval": 50, "hooks": [{"type": "TextLoggerHook"}]}
    runner.register_training_hooks(config.lr_config, config.optimizer_config, None, log_config)
    runner.data_loader, runner.mode = loader, "train"
    runner._max_iters = 10**9
    runner.call_hook("before_run")
    runner.call_hook("before_train_epoch")
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    model.train()

    def train(count: int) -> None:
        # the loop of EpochBasedRunner.train, in parts
        for batch in itertools.islice(batches, count):
            runner._inner_iter = runner._iter % len(loader)
            runner.call_hook("before_train_iter")
            runner.run_iter(batch, train_mode=True)
            runner.call_hook("after_train_iter")
            runner._iter += 1

    return train


def data_set(path: Path, pipeline: list[dict], **options) -> object:
    leaf = {"type": "CocoDataset", "ann_file": str(path), "pipeline": pipeline}
    classes = CocoAnnotations.open(path).category_names
    with silent():
        return build_dataset({**leaf, "classes": classes, **options})


def data_sets(path: Path) -> tuple:
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}]
    leaf = {"type": "CocoDataset", "ann_file": str(path), "pipeline": pipeline}

    def read(dataset) -> None:
        for index in range(len(dataset)):
            dataset.get_ann_info(index)

    def ours() -> CocoSamples:
        return CocoSamples(CocoAnnotations.open(path), DiskImages(path.parent), leaf)

    return (ours, read), (lambda: data_set(path, pipeline), read)


def output(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, masks: np.ndarray | None) -> object:
    rows = np.column_stack([boxes, scores]).astype(np.float32)
    by_class = [rows[labels == label] for label in range(CATEGORIES)]
    return by_class if masks is None else (by_class, [list(masks[labels == label]) for label in range(CATEGORIES)])


def evaluations(path: Path, iou_types: tuple[str, ...]) -> dict[str, tuple]:
    dataset, results = data_set(path, [], test_mode=True), []

    def add(result, _: int) -> None:
        results.append((result[0], encode_mask_results(result[1])) if isinstance(result, tuple) else result)

    def compute() -> float:
        return dataset.evaluate(results, metric=[*iou_types])[f"{iou_types[-1]}_mAP"]

    return {"mmdetection": (add, compute)}


if __name__ == "__main__":
    run(sys.modules["__main__"])
