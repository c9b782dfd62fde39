"""Evaluation against pycocotools: 5,000 images with 60 detections each, from `Detections` in memory to metrics.

Both sides have the truth open, give per-category AP and run in this process, in turn; the times are the minimum of
five, of several slots what the chief takes from all shares to the metrics. Memory is what a process that does it once
adds to what it had with truth and detections in memory.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).parent.parent))

from shared.data.annotations import CocoAnnotations
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator, summary_metrics

CATEGORIES = 80


def make_truth(images: int, boxes: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    annotations = []
    for image in range(images):
        sides = np.exp(rng.uniform(np.log(8), np.log(300), (boxes, 2)))
        corners = rng.uniform(0, 1, (boxes, 2)) * np.maximum([640, 480] - sides, 1)
        categories = rng.integers(1, CATEGORIES + 1, boxes)
        for i in range(boxes):
            (x, y), (w, h) = corners[i].round(2).tolist(), sides[i].round(2).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image + 1,
                    "category_id": int(categories[i]),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(rng.uniform() < 0.01),
                }
            )
    return {
        "info": {},
        "images": [{"id": i + 1, "file_name": f"{i}.jpg", "height": 480, "width": 640} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": f"category {i + 1}"} for i in range(CATEGORIES)],
    }


def jittered(annotations: CocoAnnotations, seed: int) -> list[Detections]:
    rng = np.random.default_rng(seed)
    detections = []
    for record in annotations:
        sides = np.tile(record.boxes[:, 2:] - record.boxes[:, :2], 2)
        boxes = record.boxes + rng.normal(size=record.boxes.shape) * 0.08 * sides
        detections.append(Detections(record.image_id, boxes, rng.uniform(size=len(boxes)), record.labels))
    return detections


def ours(evaluator: CocoEvaluator, detections: list[Detections]) -> dict[str, float]:
    evaluator.reset()
    evaluator.update(detections)
    return evaluator.compute()


def chief_seconds(annotations: CocoAnnotations, detections: list[Detections], slots: int, repeats: int) -> float:
    """From the slots' shares to the metrics: the least of the repeats, by the clock."""
    shares = []
    for rank in range(slots):
        evaluator = CocoEvaluator(annotations)
        evaluator.update(detections[rank::slots])
        shares.append(evaluator.share())
    chief = CocoEvaluator(annotations)
    chief.open_truth()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        chief.metrics_of(shares)
        taken.append(time.perf_counter() - started)
    return min(taken)


def theirs(truth: COCO, detections: list[Detections]) -> dict[str, float]:
    rows = np.concatenate(
        [
            np.column_stack(
                [
                    np.full(len(d), d.image_id),
                    d.boxes[:, :2].astype(float),
                    d.boxes[:, 2:].astype(float) - d.boxes[:, :2].astype(float),
                    d.scores,
                    d.labels + 1,
                ]
            )
            for d in detections
        ]
    )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = {f"bbox_{name}": value for name, value in zip(summary_metrics("bbox"), evaluation.stats, strict=True)}
    for label in range(CATEGORIES):
        precision = evaluation.eval["precision"][:, :, label, 0, 2]
        metrics[f"bbox_AP/category {label + 1}"] = precision[precision > -1].mean()
    return metrics


def prepare(side: str, coco: dict):
    annotations = CocoAnnotations.from_dict(coco)
    detections = jittered(annotations, seed=1)
    if side == "ours":
        evaluator = CocoEvaluator(annotations)
        evaluator.open_truth()
        return lambda: ours(evaluator, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco
        truth.createIndex()
    return lambda: theirs(truth, detections)


def memory_added(side: str, coco: dict, queue) -> None:
    run = prepare(side, coco)
    process, peak, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    queue.put((peak[0] - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--boxes", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8, 64])
    arguments = parser.parse_args()
    coco = make_truth(arguments.images, arguments.boxes, seed=0)

    memory = {}
    for side in ("ours", "theirs"):
        queue = multiprocessing.get_context("spawn").Queue()
        process = multiprocessing.get_context("spawn").Process(target=memory_added, args=(side, coco, queue))
        process.start()
        memory[side] = queue.get()
        process.join()

    run_ours, run_theirs = prepare("ours", coco), prepare("theirs", coco)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    results = {}
    for _ in range(arguments.repeats):
        for side, run in (("ours", run_ours), ("theirs", run_theirs)):
            started = time.perf_counter()
            results[side] = run()
            times[side].append(time.perf_counter() - started)
    annotations = CocoAnnotations.from_dict(coco)
    detections = jittered(annotations, seed=1)
    of_slots = {n: round(chief_seconds(annotations, detections, n, arguments.repeats), 3) for n in arguments.slots}
    difference = max(abs(results["ours"][name] - value) for name, value in results["theirs"].items())
    summary = {
        "ours_seconds": round(min(times["ours"]), 3),
        "chief_seconds_by_slots": of_slots,
        "pycocotools_seconds": round(min(times["theirs"]), 2),
        "times_faster": round(min(times["theirs"]) / min(times["ours"]), 1),
        "ours_mib": round(memory["ours"]),
        "pycocotools_mib": round(memory["theirs"]),
        "memory_ratio": round(memory["ours"] / memory["theirs"], 3),
        "largest_difference": difference,
    }
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
