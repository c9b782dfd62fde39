"""Detectron2's detectors here against Detectron2 itself: `step`, `memory` or `evaluation`.

step: seconds a training iteration, in a Determined trial as users run it, against the loop of Detectron2's
tools/plain_train_net.py with its own data set and loader; the same config, weights and loader settings. Blocks of the
two alternate in one process; reported is the ratio of each pair of blocks.
memory: what the data set and four loader workers a rank, each of which has read every training record, add (sum of PSS)
on a file of COCO's size, with one rank and with two, beside Detectron2's loader.
evaluation: 5,000 images with masks, everything outside of the model's forward pass: from its output to the metrics,
against COCOEvaluator with pycocotools and with its compiled fast path.
"""

import argparse
import contextlib
import io
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "detectron2")]

from annotations import in_new_process
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.common import DatasetFromList
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from diamonds import AN_IMAGE, HEIGHT, WIDTH, diamonds
from interleaved import switch, time_against
from local_context import local_context

from coco_files import data_folder, make_file
from detectron2_files.config import load_detectron2_config
from detectron2_files.data import CocoSamples
from detectron2_files.evaluation import to_detections
from detectron2_hyperparameters import Detectron2Hyperparameters
from model_def import Detectron2Trial
from shared.data.annotations import CocoAnnotations
from shared.data.open import SplitData
from shared.data.storage import DiskImages
from shared.evaluation.evaluator import CocoEvaluator

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


# --- step -------------------------------------------------------------------------------------------


def upstream_loop(trial: Detectron2Trial, annotations: Path, images: Path, workers: int):
    """plain_train_net's loop over Detectron2's own data set, with the trial's weights. Returns what trains `count`
    batches."""
    name = "benchmark_train"
    register_coco_instances(name, {}, str(annotations), str(images))
    cfg = trial.detectron2_config.cfg.clone()
    cfg.DATASETS.TRAIN = (name,)
    cfg.SOLVER.IMS_PER_BATCH = trial.global_batch_size
    cfg.DATALOADER.NUM_WORKERS = workers
    model = build_model(cfg).to(trial.context.device).train()
    model.load_state_dict(trial.plain_model.state_dict())
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    batches = iter(build_detection_train_loader(cfg))
    numbers = itertools.count()

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
        trial = Detectron2Trial(context)
        other = upstream_loop(trial, annotations["train"], folder / "train2017", arguments.workers)
        measured = time_against(trial, context, other, arguments.blocks, arguments.block, "detectron2")
    return {"config": config["hyperparameters"]["config_file"], **dict(arguments.set), **measured}


# --- memory -----------------------------------------------------------------------------------------


def memory(arguments: argparse.Namespace) -> dict:
    folder = Path(tempfile.mkdtemp())
    path = folder / "instances.json"
    images, annotations = make_file(arguments.source, path)
    CocoAnnotations.open(path)
    config = load_detectron2_config(Detectron2Hyperparameters(FULL["config_file"]), ROOT)

    def open_ours():
        data = SplitData(CocoAnnotations.open(path), DiskImages(folder))
        return CocoSamples(data, None, config.train_set, seed=0)

    def read_ours(samples) -> None:
        records = samples.images.annotations
        for index in range(len(samples)):
            records[int(samples.indices[index])]

    def open_theirs():
        with contextlib.redirect_stdout(io.StringIO()):
            return DatasetFromList(load_coco_json(str(path), str(folder), "benchmark_memory"), copy=False)

    def read_theirs(dicts) -> None:
        for index in range(len(dicts)):
            _ = dicts[index]

    measured = {"images": images, "annotations": annotations}
    for ranks in (1, 2):
        ours_seconds, ours = in_new_process(open_ours, read_ours, ranks)
        theirs_seconds, theirs = in_new_process(open_theirs, read_theirs, ranks)
        measured[f"{ranks} ranks"] = {
            "ours_open_seconds": round(ours_seconds, 3),
            "ours_added_gib": round(ours, 3),
            "detectron2_open_seconds": round(theirs_seconds, 1),
            "detectron2_added_gib": round(theirs, 2),
            "share": round(ours / theirs, 4),
        }
    return measured


# --- evaluation -------------------------------------------------------------------------------------


def evaluation(arguments: argparse.Namespace) -> dict:
    folder = Path(tempfile.mkdtemp())
    coco, results = diamonds(arguments.images)
    kinds = {"bbox": ("bbox",), "bbox and segm": ("bbox", "segm")}
    sides = ("ours", "pycocotools", "fast path")
    seconds = {(kind, side): 0.0 for kind in kinds for side in sides}
    outputs = []
    for image_id, boxes, scores, labels, masks in results:
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_boxes, instances.scores = Boxes(torch.as_tensor(boxes)), torch.as_tensor(scores)
        instances.pred_classes = torch.as_tensor(labels)
        # kept as bytes: all masks at once are 5.8 GB
        outputs.append((image_id, instances, masks.tobytes()))
    path = folder / "truth.json"
    path.write_text(json.dumps(coco))
    name = "benchmark_val"
    register_coco_instances(name, {}, str(path), str(folder))
    with contextlib.redirect_stdout(io.StringIO()):
        DatasetCatalog.get(name)
    MetadataCatalog.get(name).set(evaluator_type="coco")
    measured = {"images": arguments.images, "detections": arguments.images * AN_IMAGE}
    for kind, tasks in kinds.items():
        ours = CocoEvaluator(CocoAnnotations.open(path), tasks)
        ours.open_truth()
        theirs = {
            side: COCOEvaluator(name, tasks, distributed=False, use_fast_impl=side == "fast path") for side in sides[1:]
        }
        for evaluator in (ours, *theirs.values()):
            evaluator.reset()
        for image_id, plain, mask_bytes in outputs:
            instances = Instances((HEIGHT, WIDTH), **plain.get_fields())
            if "segm" in tasks:
                masks = torch.frombuffer(bytearray(mask_bytes), dtype=torch.bool)
                instances.pred_masks = masks.reshape(AN_IMAGE, HEIGHT, WIDTH)
            started = time.perf_counter()
            ours.update([to_detections(instances, image_id)])
            seconds[kind, "ours"] += time.perf_counter() - started
            for side, evaluator in theirs.items():
                started = time.perf_counter()
                evaluator.process([{"image_id": image_id}], [{"instances": instances}])
                seconds[kind, side] += time.perf_counter() - started
        started = time.perf_counter()
        metrics = ours.compute()
        seconds[kind, "ours"] += time.perf_counter() - started
        for side, evaluator in theirs.items():
            with contextlib.redirect_stdout(io.StringIO()):
                started = time.perf_counter()
                expected = evaluator.evaluate()
                seconds[kind, side] += time.perf_counter() - started
        measured[kind] = {
            **{f"{side}_seconds": round(seconds[kind, side], 2) for side in sides},
            **{f"times_faster_than_{s}": round(seconds[kind, s] / seconds[kind, "ours"], 1) for s in sides[1:]},
            "mAP": [round(100 * metrics[f"{tasks[-1]}_mAP"], 4), round(expected[tasks[-1]]["AP"], 4)],
        }
    return measured


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
    arguments = parser.parse_args()
    print(json.dumps({"step": step, "memory": memory, "evaluation": evaluation}[arguments.what](arguments), indent=1))


if __name__ == "__main__":
    main()
