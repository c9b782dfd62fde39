"""COCO's numbers by this project's evaluator and by others: CPU seconds, memory, and whether the numbers are equal.

Each has its truth open and takes the same `Detections`, in turns, with one thread. The seconds are the least of the
repeats. The memory is what one evaluation adds at its peak, in a process of its own. An evaluator that is not installed
is skipped: `pip install ultrafast-pycocotools vernier faster-coco-eval`.
"""

import argparse
import contextlib
import importlib
import io
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
import psutil
from pycocotools import mask as coco_mask

sys.path.insert(0, str(Path(__file__).parent.parent))

from shared.data.annotations import CocoAnnotations
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator, summarize
from shared.evaluation.gathered import GatheredDetections

BOXES, CATEGORIES, HEIGHT, WIDTH = 60, 80, 480, 640
NAMES = [f"category {label}" for label in range(CATEGORIES)]
Run = Callable[[list[Detections]], dict[str, float]]


def make(images: int, masks: bool) -> tuple[dict, list[Detections]]:
    """A COCO data set whose ids are positions, and detections near its objects."""
    rng = np.random.default_rng(0)
    annotations, detections = [], []
    for image in range(images):
        sides = np.exp(rng.uniform(np.log(8), np.log(300), (BOXES, 2)))
        truth = np.hstack([rng.uniform(0, 1, (BOXES, 2)) * np.maximum([WIDTH, HEIGHT] - sides, 1), sides])
        found = truth + rng.normal(size=truth.shape) * 0.08 * np.tile(sides, 2)
        found[:, 2:] = np.maximum(found[:, 2:], 1)
        labels, crowd = rng.integers(0, CATEGORIES, BOXES), (rng.uniform(size=BOXES) < 0.01).astype(int)
        rles = [{**r, "counts": r["counts"].decode()} for r in masks_in(rng, truth)] if masks else [None] * BOXES
        columns = truth.tolist(), sides.prod(axis=1).tolist(), labels.tolist(), crowd.tolist(), rles
        for row in zip(*columns, strict=True):
            annotation = dict(zip(("bbox", "area", "category_id", "iscrowd", "segmentation"), row, strict=True))
            annotations.append({"id": len(annotations) + 1, "image_id": image, **annotation})
        corners = np.hstack([found[:, :2], found[:, :2] + found[:, 2:]])
        found_masks = masks_in(rng, found) if masks else None
        detections.append(Detections(image, corners, rng.uniform(size=BOXES), labels, found_masks))
    coco_images = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(images)]
    categories = [{"id": label, "name": name} for label, name in enumerate(NAMES)]
    return {"info": {}, "images": coco_images, "annotations": annotations, "categories": categories}, detections


def masks_in(rng: np.random.Generator, boxes: np.ndarray) -> list[dict]:
    """RLE of 24 corners near the ellipse in each box."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.42, 0.5, (BOXES, 24, 1)) + 0.5
    polygons = (boxes[:, None, :2] + circle * boxes[:, None, 2:]).clip(0, [WIDTH, HEIGHT])
    return coco_mask.frPyObjects(polygons.reshape(BOXES, -1).tolist(), HEIGHT, WIDTH)


def gather(detections: list[Detections], masks: bool) -> GatheredDetections:
    images = np.array([found.image_id for found in detections], np.int64)
    return GatheredDetections.of(images, images[:0], detections, masks=masks, keypoints=False)


def numbers(arrays: dict[str, np.ndarray], iou_type: str) -> dict[str, float]:
    return summarize(np.asarray(arrays["precision"])[..., -1], np.asarray(arrays["recall"]), iou_type, NAMES)


def of_ours(by_hotcoco: bool, coco: dict, iou_type: str) -> Run:
    evaluator, masks = CocoEvaluator(CocoAnnotations.from_dict(coco), (iou_type,)), iou_type == "segm"
    evaluator.match(iou_type, gather([], masks)) if by_hotcoco else evaluator.open_truth()

    def run(detections: list[Detections]) -> dict[str, float]:
        if by_hotcoco:
            return numbers(evaluator.match(iou_type, gather(detections, masks)).eval, iou_type)
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
    evaluate = _core.evaluate_segm_grid if iou_type == "segm" else _core.evaluate_bbox_grid
    options = {"parity_mode": "strict", "max_dets_per_image": 100, "use_cats": True, "num_threads": 1}
    options |= {"dt_area": "mask"} if iou_type == "segm" else {}

    def run(detections: list[Detections]) -> dict[str, float]:
        found = rows = gather(detections, masks=False).rows()
        if iou_type == "segm":
            boxes, scores = rows[:, 1:5].copy().reshape(-1, BOXES, 4), rows[:, 5].copy().reshape(-1, BOXES)
            found = [
                {"image_id": d.image_id, "boxes": boxes[i], "scores": scores[i], "labels": d.labels, "rles": d.masks}
                for i, d in enumerate(detections)
            ]
        curves = evaluate(truth, found, **options).accumulate([1, 10, 100])
        return numbers({"precision": curves.precision, "recall": curves.recall}, iou_type)

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
        return numbers(evaluation.eval, iou_type)

    return run


EVALUATORS = {
    "ours": partial(of_ours, False),
    "hotcoco": partial(of_ours, True),
    "ultrafast": partial(like_pycocotools, "ultrafast_pycocotools.COCO", "ultrafast_pycocotools.COCOeval"),
    "vernier": of_vernier,
    "faster-coco-eval": partial(like_pycocotools, "faster_coco_eval.COCO", "faster_coco_eval.COCOeval_faster"),
    "pycocotools": partial(like_pycocotools, "pycocotools.coco.COCO", "pycocotools.cocoeval.COCOeval"),
}


def added_mib(name: str, iou_type: str) -> int:
    """Of `DATA`, in a forked process."""
    run = EVALUATORS[name](DATA[0], iou_type)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = psutil.Process().memory_info().rss
    run(DATA[1])
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return round((peak - before) / 2**20)


def main() -> None:
    global DATA
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--masks", action="store_true", help="evaluate masks instead of boxes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=EVALUATORS, default=[*EVALUATORS])
    arguments = parser.parse_args()
    iou_type = "segm" if arguments.masks else "bbox"
    DATA = coco, detections = make(arguments.images, arguments.masks)
    mib, runs, seconds, metrics = {}, {}, {}, {}
    for name in arguments.only:
        try:
            with multiprocessing.get_context("fork").Pool(1) as pool:
                mib[name] = pool.apply(added_mib, (name, iou_type))
        except ImportError as error:
            print(f"{name} is skipped: {error}", file=sys.stderr)
    for name in mib:
        runs[name], seconds[name] = EVALUATORS[name](coco, iou_type), []
    for name, run in [*runs.items()] * arguments.repeats:
        started = time.process_time()
        metrics[name] = run(detections)
        seconds[name].append(time.process_time() - started)
    for name, of_it in metrics.items():
        differences = [abs(of_it.get(key, np.inf) - value) for key, value in metrics[arguments.only[0]].items()]
        print(f"{name:17} {min(seconds[name]):7.3f} s {mib[name]:5} MiB, largest difference {max(differences):.1g}")


if __name__ == "__main__":
    main()
