"""An evaluation between the model's output and the metrics: COCO's numbers, batches."""

import importlib
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial

os.environ.update(OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1")  # before NumPy and the evaluators start their threads
import hotcoco
import numpy as np
from command_line import main, scratch_folder, silent, trial_class_of
from memory import added_mib, in_process
from pixels import UNTRAINED
from side_by_side import config_of, device_name, local_context, now
from turns import in_turns, ratio, seconds_of

from coco_files import data_folder, truth_and_detections
from shared.data.annotations import CocoAnnotations
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator, summarize
from shared.evaluation.gathered import GatheredDetections

BOXES, CATEGORIES = 60, 80
NAMES = [f"category {label}" for label in range(CATEGORIES)]
Run = Callable[[list[Detections]], dict[str, float]]


def gathered(detections: list[Detections], masks: bool) -> GatheredDetections:
    return GatheredDetections.of(detections, masks=masks, keypoints=False)


def rows_of(detections: list[Detections]) -> np.ndarray:
    found = gathered(detections, masks=False)
    return found.rows(found.images)


def numbers(arrays: dict[str, np.ndarray], iou_type: str) -> dict[str, float]:
    return summarize(np.asarray(arrays["precision"])[..., -1], np.asarray(arrays["recall"]), iou_type, NAMES)


def of_ours(by_hotcoco: bool, coco: dict, iou_type: str) -> Run:
    evaluator, masks = CocoEvaluator(CocoAnnotations.from_dict(coco), (iou_type,)), iou_type == "segm"
    evaluator.match(iou_type, gathered([], masks)) if by_hotcoco else evaluator.open_truth()

    def run(detections: list[Detections]) -> dict[str, float]:
        if by_hotcoco:
            return numbers(evaluator.match(iou_type, gathered(detections, masks)).eval, iou_type)
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
        found = rows = rows_of(detections)
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
    """A package with pycocotools' interface; the classes are named `module.Class`."""
    classes = (name.rsplit(".", 1) for name in (coco_class, eval_class))
    of_data, of_evaluation = (getattr(importlib.import_module(module), name) for module, name in classes)
    with silent():
        truth = of_data()
        truth.dataset = coco
        truth.createIndex()

    def run(detections: list[Detections]) -> dict[str, float]:
        found = rows = rows_of(detections)
        masks = [rle for d in detections for rle in d.masks] if iou_type == "segm" else []
        if masks:
            found = [
                {"image_id": int(image), "category_id": int(label), "bbox": box, "score": score, "segmentation": rle}
                for (image, *box, score, label), rle in zip(rows.tolist(), masks, strict=True)
            ]
        with silent():
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


def added_by(name: str, iou_type: str, coco: dict, detections: list[Detections]) -> float | None:
    """The MiB that an evaluation adds; None without the package."""
    try:
        run = EVALUATORS[name](coco, iou_type)
    except ImportError as error:
        print(f"{name} is skipped: {error}", file=sys.stderr)
        return None
    with added_mib() as added:
        run(detections)
    return added[0]


def coco_numbers(images: int = 5000, masks: bool = False, repeats: int = 5, only: list[str] = [*EVALUATORS]) -> None:  # noqa: B006
    """COCO's numbers by this project's evaluator and by others: CPU seconds, memory, and whether they are equal.

    Each has its truth open and takes the same `Detections`, in turns, with one thread. The seconds are the least of the
    repeats. The memory is what one evaluation adds at its peak, in a process of its own. An evaluator that is not
    installed is skipped: `pip install ultrafast-pycocotools vernier faster-coco-eval`.

    masks: evaluate masks instead of boxes
    only: evaluators; default all
    """
    iou_type = "segm" if masks else "bbox"
    coco, detections = truth_and_detections(images, masks, BOXES, CATEGORIES, (480, 640))
    mib = {name: in_process(added_by, name, iou_type, coco, detections) for name in only}
    runs = {name: EVALUATORS[name](coco, iou_type) for name in only if mib[name] is not None}
    metrics = {}

    def evaluate(name: str) -> None:
        metrics[name] = runs[name](detections)

    sides = {name: lambda _, name=name: seconds_of(evaluate, name) for name in runs}
    seconds = in_turns(sides, repeats, warm_up=0)
    for name, found in metrics.items():
        difference = max(abs(found.get(key, np.inf) - value) for key, value in metrics[only[0]].items())
        print(f"{name:17} {min(seconds[name]):7.3f} s {mib[name]:5.0f} MiB, largest difference {difference:.1g}")


# --- batches ------------------------------------------------------------------------------------------------


def batches(detector: str = "mmdetection", batch_size: int = 4, turns: int = 5) -> dict:
    """Images per CPU second of a library's model, on images of one size: batches of one, and of several.

    The two take turns. On a GPU the seconds are the clock's.

    detector: mmdetection (RetinaNet R50-FPN) or detectron2 (Mask R-CNN R50-FPN)
    """

    class Batching(trial_class_of(detector)):
        batches_evaluations = True  # on a CPU too

    with scratch_folder() as scratch:
        folder, sides = scratch / "coco", {}
        data_folder(None, folder, train=1, val=batch_size, size=320)
        for size in (1, batch_size):
            config = config_of(folder, {"global_batch_size": size, **UNTRAINED[detector]}, fast_images=True)
            with local_context(config) as context:
                trial = Batching(context, for_training=False)
                loaded = list(trial.evaluation_loader(trial.open_val()))
            assert {len(batch) for batch in loaded} == {size}

            def detect(trial: Batching = trial, loaded: list = loaded) -> None:
                for batch in loaded:
                    trial.detect_on_host_batch(batch)

            sides[size] = lambda _, detect=detect: seconds_of(detect, clock=now)
        taken = in_turns(sides, turns)
    return {
        "device": device_name(context.device),
        "images_per_second": {size: round(batch_size / statistics.median(t), 2) for size, t in taken.items()},
        **ratio(taken[1], taken[batch_size]),
    }


if __name__ == "__main__":
    main(__doc__, coco_numbers, batches)
