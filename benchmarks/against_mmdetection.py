"""MMDetection's detectors here against MMDetection itself: `step`, `memory` or `evaluation`.

step: seconds a training iteration, in a Determined trial as users run it, against mmcv's EpochBasedRunner with mmdet's
data set and loader; the same config, weights and loader settings. Blocks of the two alternate in one process; reported
is the ratio of each pair of blocks.
memory: what the data set and four loader workers, each of which has read every training record, add (sum of PSS), on
a file of COCO's size, beside mmdet's CocoDataset.
evaluation: 5,000 images with masks, both sides from the same results with the masks encoded, against the data set's own
`evaluate`; and encoding those masks against mmdet's `encode_mask_results`.
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "mmdetection")]

import mmdetection_files  # noqa: F401 before mmcv.ops, where mmcv is not compiled

# isort: split
from annotations import in_new_process
from diamonds import AN_IMAGE, CATEGORIES, diamonds
from interleaved import switch, time_against
from local_context import local_context
from mmcv.parallel import MMDataParallel, _functions
from mmcv.runner import EpochBasedRunner, build_optimizer
from mmdet.core import encode_mask_results
from mmdet.datasets import build_dataloader, build_dataset

from coco_files import data_folder, make_file
from mmdetection_files.data import CocoSamples
from mmdetection_files.evaluation import to_detections
from mmdetection_files.model import build_model, without_pretrained_backbone
from model_def import MMDetectionTrial
from shared.data.annotations import CocoAnnotations
from shared.data.storage import DiskImages
from shared.evaluation.evaluator import CocoEvaluator

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


# --- step -------------------------------------------------------------------------------------------


def upstream_loop(trial: MMDetectionTrial, workers: int):
    """mmcv's runner over mmdet's own data set, with the trial's weights. Returns what trains `count` batches."""
    config = trial.mmdet_config
    config.data.train.classes = [category["name"] for category in trial.categories]
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = build_dataset(config.data.train)
    loader = build_dataloader(dataset, trial.per_slot_batch_size, workers, dist=False, seed=0, persistent_workers=True)
    without_pretrained_backbone(config)
    model = build_model(config, initialize=False)
    model.load_state_dict(trial.plain_model.state_dict())
    model = MMDataParallel(model.to(trial.context.device), device_ids=[0] if torch.cuda.is_available() else None)
    runner = EpochBasedRunner(
        model, optimizer=build_optimizer(model, config.optimizer), logger=logging.getLogger("upstream"), max_epochs=100
    )
    log_config = {"interval": 50, "hooks": [{"type": "TextLoggerHook"}]}
    runner.work_dir = tempfile.mkdtemp()
    runner.register_training_hooks(config.lr_config, config.optimizer_config, None, log_config)
    runner.data_loader, runner.mode = loader, "train"
    runner._max_iters = 10**9
    runner.call_hook("before_run")
    runner.call_hook("before_train_epoch")
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    model.train()

    def train(count: int) -> None:
        # EpochBasedRunner.train's loop, a part at a time
        for batch in itertools.islice(batches, count):
            runner._inner_iter = runner._iter % len(loader)
            runner.call_hook("before_train_iter")
            runner.run_iter(batch, train_mode=True)
            runner.call_hook("after_train_iter")
            runner._iter += 1

    return train


def step(arguments: argparse.Namespace) -> dict:
    folder = Path(tempfile.mkdtemp())
    annotations = data_folder(arguments.source, 400, folder)
    config = {
        "data": {
            **{s: {"annotations": str(p), "images": str(folder / f"{s}2017")} for s, p in annotations.items()},
            "cache_dir": str(folder / "cache"),
            "workers": arguments.workers,
        },
        "hyperparameters": {
            "global_batch_size": arguments.batch_size,
            **(FULL if arguments.full else SMALL),
            **dict(arguments.set),
        },
        "searcher": {"max_length": {"batches": 10**6}, "metric": "bbox_mAP", "smaller_is_better": False},
        "scheduling_unit": 50,
        "checkpoint_policy": "none",
    }
    with local_context(config) as context:
        trial = MMDetectionTrial(context)
        other = upstream_loop(trial, arguments.workers)
        measured = time_against(trial, context, other, arguments.blocks, arguments.block, "mmdetection")
    return {"config": config["hyperparameters"]["config_file"], **dict(arguments.set), **measured}


# --- memory -----------------------------------------------------------------------------------------


def memory(arguments: argparse.Namespace) -> dict:
    folder = Path(tempfile.mkdtemp())
    path = folder / "instances.json"
    images, annotations = make_file(arguments.source, path)
    names = json.loads(arguments.source.read_text())["categories"] if arguments.source else None
    opened = CocoAnnotations.open(path)
    classes = opened.category_names if names is None else [category["name"] for category in names]
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}]
    leaf = {"type": "CocoDataset", "ann_file": str(path), "pipeline": pipeline}

    def open_ours():
        return CocoSamples(CocoAnnotations.open(path), DiskImages(folder), leaf)

    def open_theirs():
        with contextlib.redirect_stdout(io.StringIO()):
            return build_dataset({**leaf, "classes": classes})

    def read(dataset) -> None:
        for index in range(len(dataset)):
            dataset.get_ann_info(index)

    ours_seconds, ours_added = in_new_process(open_ours, read)
    theirs_seconds, theirs_added = in_new_process(open_theirs, read)
    return {
        "images": images,
        "annotations": annotations,
        "ours_open_seconds": round(ours_seconds, 3),
        "ours_added_gib": round(ours_added, 3),
        "mmdetection_open_seconds": round(theirs_seconds, 1),
        "mmdetection_added_gib": round(theirs_added, 2),
        "share": round(ours_added / theirs_added, 4),
    }


# --- evaluation -------------------------------------------------------------------------------------


def evaluation(arguments: argparse.Namespace) -> dict:
    folder = Path(tempfile.mkdtemp())
    coco, results = diamonds(arguments.images)
    plain, encoded = [], []
    encode_ours = encode_theirs = 0.0
    for image_id, boxes, scores, labels, masks in results:
        rows = np.column_stack([boxes, scores]).astype(np.float32)
        of_class = [rows[labels == label] for label in range(CATEGORIES)]
        masks_of_class = [list(masks[labels == label]) for label in range(CATEGORIES)]
        started = time.perf_counter()
        plain.append(to_detections((of_class, masks_of_class), image_id))
        encode_ours += time.perf_counter() - started
        started = time.perf_counter()
        encoded.append((of_class, encode_mask_results(masks_of_class)))
        encode_theirs += time.perf_counter() - started
    path = folder / "truth.json"
    path.write_text(json.dumps(coco))

    evaluator = CocoEvaluator(CocoAnnotations.open(path), ("bbox", "segm"))
    evaluator.open_truth()
    with contextlib.redirect_stdout(io.StringIO()):
        leaf = {"type": "CocoDataset", "ann_file": str(path), "pipeline": [], "test_mode": True}
        dataset = build_dataset({**leaf, "classes": [category["name"] for category in coco["categories"]]})
    ours, theirs = [], []
    for _ in range(arguments.repeats):
        started = time.perf_counter()
        evaluator.reset()
        evaluator.update(plain)
        metrics = evaluator.compute()
        ours.append(time.perf_counter() - started)
        with contextlib.redirect_stdout(io.StringIO()):
            started = time.perf_counter()
            expected = dataset.evaluate(encoded, metric=["bbox", "segm"])
            theirs.append(time.perf_counter() - started)
    return {
        "images": arguments.images,
        "masks": arguments.images * AN_IMAGE,
        "ours_seconds": round(min(ours), 2),
        "mmdetection_seconds": round(min(theirs), 2),
        "share": round(min(ours) / min(theirs), 4),
        "segm_mAP": [round(metrics["segm_mAP"], 4), expected["segm_mAP"]],
        "encode_ours_seconds": round(encode_ours, 2),
        "encode_mmdetection_seconds": round(encode_theirs, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "memory", "evaluation"))
    parser.add_argument("--source", type=Path, help="step: a COCO folder; memory: a COCO file; default: synthetic data")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--block", type=int, default=10, help="batches a block")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--set", type=switch, nargs="+", default=[], metavar="KEY=VALUE", help="step: of our side, such as amp=bf16"
    )
    parser.add_argument("--full", action="store_true", help="step: Mask R-CNN R50-FPN at its full size, for a GPU")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    print(json.dumps({"step": step, "memory": memory, "evaluation": evaluation}[arguments.what](arguments), indent=1))


if __name__ == "__main__":
    main()
