"""COCO's numbers by this project's evaluator and by others: CPU seconds, memory, and whether the numbers are equal.

Every evaluator has the truth open, takes the same `Detections` and gives the twelve numbers and the AP of each
category. They take turns in one process with one thread; the seconds are the least of the repeats. Memory is what a
process that evaluates once adds at its peak. An evaluator that is not installed is skipped:
`pip install ultrafast-pycocotools vernier faster-coco-eval`.
"""

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1")  # before NumPy and the evaluators start their threads
import hotcoco
import numpy as np
from pycocotools import mask as coco_mask

sys.path.insert(0, str(Path(__file__).parent.parent))

from shared.data.annotations import CocoAnnotations
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator, summarize
from shared.evaluation.gathered import GatheredDetections

CATEGORIES, HEIGHT, WIDTH = 80, 480, 640
Run = Callable[[list[Detections]], dict[str, float]]


def make(images: int, boxes: int, masks: bool) -> tuple[dict, list[Detections]]:
    """A COCO data set whose ids are positions, and detections beside its objects."""
    rng = np.random.default_rng(0)
    annotations, detections = [], []
    for image in range(images):
        sides = np.exp(rng.uniform(np.log(8), np.log(300), (boxes, 2)))
        corners = rng.uniform(0, 1, (boxes, 2)) * np.maximum([WIDTH, HEIGHT] - sides, 1)
        truth = np.hstack([corners, sides]).round(2)
        found = truth + rng.normal(size=truth.shape) * 0.08 * np.tile(sides, 2)
        found[:, 2:] = np.maximum(found[:, 2:], 1)
        labels, crowd = rng.integers(0, CATEGORIES, boxes), rng.uniform(size=boxes) < 0.01
        rles = [rounded(rng, some) if masks else [None] * boxes for some in (truth, found)]
        for row, label, is_crowd, rle in zip(truth.tolist(), labels.tolist(), crowd.tolist(), rles[0], strict=True):
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": row}
            annotation |= {"area": row[2] * row[3], "iscrowd": int(is_crowd)}
            annotations.append(annotation | ({"segmentation": rle} if masks else {}))
        found[:, 2:] += found[:, :2]
        detections.append(Detections(image, found, rng.uniform(size=boxes), labels, rles[1] if masks else None))
    coco = {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": label, "name": f"category {label}"} for label in range(CATEGORIES)],
    }
    return coco, detections


def rounded(rng: np.random.Generator, boxes: np.ndarray) -> list[dict]:
    """Masks of 24 corners, each in its box, as RLE."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.42, 0.5, (len(boxes), 24, 1)) + 0.5
    polygons = (boxes[:, None, :2] + circle * boxes[:, None, 2:]).clip(0, [WIDTH, HEIGHT])
    rles = coco_mask.frPyObjects(polygons.reshape(len(boxes), -1).tolist(), HEIGHT, WIDTH)
    return [{**rle, "counts": rle["counts"].decode()} for rle in rles]


def gather(detections: list[Detections], masks: bool) -> GatheredDetections:
    images = np.array([found.image_id for found in detections])
    return GatheredDetections.of(images, images[:0], detections, masks=masks, keypoints=False)


def ours(coco: dict, iou_type: str) -> Run:
    evaluator = CocoEvaluator(CocoAnnotations.from_dict(coco), (iou_type,))
    evaluator.open_truth()

    def run(detections: list[Detections]) -> dict[str, float]:
        evaluator.reset()
        evaluator.update(detections)
        return evaluator.compute()

    return run


def hotcoco_itself(coco: dict, iou_type: str) -> Run:
    evaluator = CocoEvaluator(CocoAnnotations.from_dict(coco), (iou_type,))
    found_nothing = gather([], iou_type == "segm")
    evaluator.match(iou_type, found_nothing)  # opens hotcoco's truth

    def run(detections: list[Detections]) -> dict[str, float]:
        return numbers(evaluator.match(iou_type, gather(detections, iou_type == "segm")).eval, iou_type)

    return run


def vernier(coco: dict, iou_type: str) -> Run:
    from vernier._core import CocoDataset, evaluate_bbox_grid, evaluate_segm_grid

    images, annotations = ({k: [x[k] for x in rows] for k in rows[0]} for rows in (coco["images"], coco["annotations"]))
    for columns in (images, annotations):
        columns |= {k: np.array(v) for k, v in columns.items() if k not in ("file_name", "segmentation")}
    truth = CocoDataset.from_arrays(images, annotations, coco["categories"])
    options = {"parity_mode": "strict", "max_dets_per_image": 100, "use_cats": True, "num_threads": 1}

    def run(detections: list[Detections]) -> dict[str, float]:
        if iou_type == "bbox":
            grid = evaluate_bbox_grid(truth, gather(detections, masks=False).rows(), **options)
        else:
            found = [
                {
                    "image_id": d.image_id,
                    "boxes": np.hstack([d.boxes[:, :2], d.boxes[:, 2:] - d.boxes[:, :2]]).astype(np.float64),
                    "scores": d.scores.astype(np.float64),
                    "labels": d.labels,
                    "rles": [{**rle, "counts": rle["counts"].encode()} for rle in d.masks],
                }
                for d in detections
            ]
            grid = evaluate_segm_grid(truth, found, dt_area="mask", **options)
        curves = grid.accumulate([1, 10, 100])
        return numbers({"precision": curves.precision, "recall": curves.recall}, iou_type)

    return run


def like_pycocotools(package: str, coco: dict, iou_type: str) -> Run:
    """Of a package with pycocotools' interface."""
    library = importlib.import_module(package)
    of_class = getattr(library, "COCOeval_faster", None) or importlib.import_module(f"{package}.cocoeval").COCOeval
    coco_class = getattr(library, "COCO", None) or importlib.import_module(f"{package}.coco").COCO
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_class()
        truth.dataset = coco
        truth.createIndex()

    def run(detections: list[Detections]) -> dict[str, float]:
        found = rows = gather(detections, masks=False).rows()
        if iou_type == "segm":
            masks = [rle for d in detections for rle in d.masks]
            found = [
                {"image_id": int(image), "category_id": int(label), "bbox": box, "score": score, "segmentation": rle}
                for (image, *box, score, label), rle in zip(rows.tolist(), masks, strict=True)
            ]
        with contextlib.redirect_stdout(io.StringIO()):
            results = truth.loadRes(found)
            if iou_type == "segm":
                for row, area in zip(results.dataset["annotations"], hotcoco.mask.area(masks).tolist(), strict=True):
                    row["area"] = area
            evaluation = of_class(truth, results, iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
        return numbers(evaluation.eval, iou_type)

    return run


def numbers(curves: dict[str, np.ndarray], iou_type: str) -> dict[str, float]:
    names = [f"category {label}" for label in range(CATEGORIES)]
    return summarize(np.asarray(curves["precision"])[..., -1], np.asarray(curves["recall"]), iou_type, names)


EVALUATORS = {
    "ours": ours,
    "hotcoco": hotcoco_itself,
    "ultrafast-pycocotools": functools.partial(like_pycocotools, "ultrafast_pycocotools"),
    "vernier": vernier,
    "faster-coco-eval": functools.partial(like_pycocotools, "faster_coco_eval"),
    "pycocotools": functools.partial(like_pycocotools, "pycocotools"),
}


def added_mib(name: str, iou_type: str) -> float:
    """At the peak of one evaluation, in a process of its own; `DATA` is the parent's."""
    run = EVALUATORS[name](DATA[0], iou_type)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory_mib("VmRSS")
    run(DATA[1])
    return memory_mib("VmHWM") - before


def memory_mib(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def main() -> None:
    global DATA
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--boxes", type=int, default=60, help="per image")
    parser.add_argument("--masks", action="store_true", help="evaluate masks instead of boxes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=EVALUATORS, default=list(EVALUATORS))
    arguments = parser.parse_args()
    iou_type = "segm" if arguments.masks else "bbox"
    DATA = make(arguments.images, arguments.boxes, arguments.masks)
    measured: dict[str, dict] = {}
    for name in arguments.only:
        try:
            with multiprocessing.get_context("fork").Pool(1) as pool:
                measured[name] = {"mib": round(pool.apply(added_mib, (name, iou_type)))}
        except ImportError as error:
            print(f"{name} is skipped: {error}", file=sys.stderr)
    runs = {name: EVALUATORS[name](DATA[0], iou_type) for name in measured}
    results: dict[str, dict] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            gc.collect()
            started = time.process_time()
            results[name] = run(DATA[1])
            seconds[name].append(time.process_time() - started)
    for name, result in results.items():
        measured[name]["cpu_seconds"] = round(min(seconds[name]), 3)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            measured[name]["version"] = importlib.metadata.version(name)
        first = results[arguments.only[0]]
        same = result.keys() == first.keys()
        measured[name]["largest_difference"] = max(abs(result[k] - first[k]) for k in first) if same else "other names"
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
