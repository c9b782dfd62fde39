"""COCO's numbers by this project's evaluator and by others: CPU seconds, memory, and whether the numbers are equal.

Every evaluator has its truth open, takes the same `Detections` and gives COCO's summary and the AP of each category.
They take turns in one process with one thread. The seconds are the least of the repeats; the memory is what one
evaluation adds at its peak, in a process of its own. An evaluator that is not installed is skipped:
`pip install ultrafast-pycocotools vernier faster-coco-eval`.
"""

import argparse
import contextlib
import gc
import importlib
import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial
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
    """A COCO data set whose ids are positions, and detections near its objects."""
    rng = np.random.default_rng(0)
    annotations, detections = [], []
    for image in range(images):
        sides = np.exp(rng.uniform(np.log(8), np.log(300), (boxes, 2)))
        truth = np.hstack([rng.uniform(0, 1, (boxes, 2)) * np.maximum([WIDTH, HEIGHT] - sides, 1), sides])
        found = truth + rng.normal(size=truth.shape) * 0.08 * np.tile(sides, 2)
        found[:, 2:] = np.maximum(found[:, 2:], 1)
        labels, crowd = rng.integers(0, CATEGORIES, boxes), rng.uniform(size=boxes) < 0.01
        true_rles, found_rles = (rles_in(rng, some) if masks else None for some in (truth, found))
        for i, box in enumerate(truth.tolist()):
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": int(labels[i]), "bbox": box}
            annotation |= {"area": box[2] * box[3], "iscrowd": int(crowd[i])}
            annotations.append({**annotation, "segmentation": true_rles[i]} if masks else annotation)
        found[:, 2:] += found[:, :2]
        detections.append(Detections(image, found, rng.uniform(size=boxes), labels, found_rles))
    sizes = {"height": HEIGHT, "width": WIDTH}
    coco = {"info": {}, "images": [{"id": i, "file_name": f"{i}.jpg", **sizes} for i in range(images)]}
    coco["categories"] = [{"id": label, "name": f"category {label}"} for label in range(CATEGORIES)]
    return {**coco, "annotations": annotations}, detections


def rles_in(rng: np.random.Generator, boxes: np.ndarray) -> list[dict]:
    """A mask of 24 corners in each box."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.42, 0.5, (len(boxes), 24, 1)) + 0.5
    polygons = (boxes[:, None, :2] + circle * boxes[:, None, 2:]).clip(0, [WIDTH, HEIGHT])
    rles = coco_mask.frPyObjects(polygons.reshape(len(boxes), -1).tolist(), HEIGHT, WIDTH)
    return [{**rle, "counts": rle["counts"].decode()} for rle in rles]


def gather(detections: list[Detections], masks: bool) -> GatheredDetections:
    images = np.array([found.image_id for found in detections], np.int64)
    return GatheredDetections.of(images, images[:0], detections, masks=masks, keypoints=False)


def numbers(precision: np.ndarray, recall: np.ndarray, iou_type: str) -> dict[str, float]:
    return summarize(precision[..., -1], recall, iou_type, [f"category {label}" for label in range(CATEGORIES)])


def of_ours(by_hotcoco: bool, coco: dict, iou_type: str) -> Run:
    evaluator, masks = CocoEvaluator(CocoAnnotations.from_dict(coco), (iou_type,)), iou_type == "segm"
    evaluator.match(iou_type, gather([], masks)) if by_hotcoco else evaluator.open_truth()

    def run(detections: list[Detections]) -> dict[str, float]:
        if by_hotcoco:
            arrays = evaluator.match(iou_type, gather(detections, masks)).eval
            return numbers(arrays["precision"], arrays["recall"], iou_type)
        evaluator.reset()
        evaluator.update(detections)
        return evaluator.compute()

    return run


def of_vernier(coco: dict, iou_type: str) -> Run:
    from vernier import _core

    images, annotations = ({k: [x[k] for x in rows] for k in rows[0]} for rows in (coco["images"], coco["annotations"]))
    for columns in (images, annotations):
        columns |= {k: np.array(v) for k, v in columns.items() if k not in ("file_name", "segmentation")}
    truth = _core.CocoDataset.from_arrays(images, annotations, coco["categories"])
    options = {"parity_mode": "strict", "max_dets_per_image": 100, "use_cats": True, "num_threads": 1}

    def as_dict(found: Detections) -> dict:
        boxes = found.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        rles = [{**rle, "counts": rle["counts"].encode()} for rle in found.masks]
        scores = found.scores.astype(np.float64)
        return {"image_id": found.image_id, "boxes": boxes, "scores": scores, "labels": found.labels, "rles": rles}

    def run(detections: list[Detections]) -> dict[str, float]:
        if iou_type == "segm":
            grid = _core.evaluate_segm_grid(truth, [as_dict(d) for d in detections], dt_area="mask", **options)
        else:
            grid = _core.evaluate_bbox_grid(truth, gather(detections, masks=False).rows(), **options)
        curves = grid.accumulate([1, 10, 100])
        return numbers(curves.precision, curves.recall, iou_type)

    return run


def like_pycocotools(coco_class: str, eval_class: str, coco: dict, iou_type: str) -> Run:
    """Of a package with pycocotools' interface; the classes are named `module.Class`."""
    classes = (name.rsplit(".", 1) for name in (coco_class, eval_class))
    of_data, of_evaluation = (getattr(importlib.import_module(module), name) for module, name in classes)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = of_data()
        truth.dataset = coco
        truth.createIndex()

    def run(detections: list[Detections]) -> dict[str, float]:
        found = rows = gather(detections, masks=False).rows()
        masks = [rle for d in detections for rle in d.masks] if iou_type == "segm" else []
        if masks:
            found = [
                {"image_id": int(image), "category_id": int(label), "bbox": box, "score": score, "segmentation": rle}
                for (image, *box, score, label), rle in zip(rows.tolist(), masks, strict=True)
            ]
        with contextlib.redirect_stdout(io.StringIO()):
            results = truth.loadRes(found)
            if masks:
                for row, area in zip(results.dataset["annotations"], hotcoco.mask.area(masks).tolist(), strict=True):
                    row["area"] = area
            evaluation = of_evaluation(truth, results, iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
        return numbers(np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"]), iou_type)

    return run


EVALUATORS = {
    "ours": partial(of_ours, False),
    "hotcoco": partial(of_ours, True),
    "ultrafast": partial(like_pycocotools, "ultrafast_pycocotools.COCO", "ultrafast_pycocotools.COCOeval"),
    "vernier": of_vernier,
    "faster-coco-eval": partial(like_pycocotools, "faster_coco_eval.COCO", "faster_coco_eval.COCOeval_faster"),
    "pycocotools": partial(like_pycocotools, "pycocotools.coco.COCO", "pycocotools.cocoeval.COCOeval"),
}


def added_mib(name: str, iou_type: str) -> float:
    run = EVALUATORS[name](DATA[0], iou_type)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = status_mib("VmRSS")
    run(DATA[1])
    return status_mib("VmHWM") - before


def status_mib(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def main() -> None:
    global DATA  # which the processes that measure memory inherit
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--boxes", type=int, default=60, help="per image")
    parser.add_argument("--masks", action="store_true", help="evaluate masks instead of boxes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=EVALUATORS, default=[*EVALUATORS], help="compares to the first")
    arguments = parser.parse_args()
    iou_type = "segm" if arguments.masks else "bbox"
    DATA = make(arguments.images, arguments.boxes, arguments.masks)
    measured: dict[str, dict] = {}
    for name in arguments.only:
        try:
            with multiprocessing.get_context("fork").Pool(1) as pool:
                measured[name] = {"mib": round(pool.apply(added_mib, (name, iou_type))), "cpu_seconds": np.inf}
        except ImportError as error:
            print(f"{name} is skipped, it is not installed: {error}", file=sys.stderr)
    runs = {name: EVALUATORS[name](DATA[0], iou_type) for name in measured}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            gc.collect()
            started = time.process_time()
            result = run(DATA[1])
            row = measured[name]
            row["cpu_seconds"] = min(row["cpu_seconds"], round(time.process_time() - started, 3))
            first = result if name == arguments.only[0] else first
            row["largest_difference"] = max(abs(result.get(key, np.inf) - value) for key, value in first.items())
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
