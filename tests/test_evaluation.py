"""The evaluator gives pycocotools' numbers."""

import contextlib
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_models import with_keypoints

from shared.data import synthetic
from shared.data.annotations import CocoAnnotations
from shared.errors import UserError
from shared.evaluation.detections import Detections, to_coco_results
from shared.evaluation.evaluator import CocoEvaluator, evaluate, summary_metrics


def box_masks(boxes, height, width):
    masks = []
    for x1, y1, x2, y2 in np.asarray(boxes).round().astype(int):
        mask = np.zeros((height, width), np.uint8, order="F")
        mask[max(y1, 0) : y2, max(x1, 0) : x2] = 1
        masks.append(coco_mask.encode(mask))
    return masks


def noisy(annotations, seed=0, copies=2, jitter=0.1, tied=False, masks=True):
    """Detections like a detector's: the truth, jittered and doubled, some with a wrong label."""
    rng = np.random.default_rng(seed)
    detections = []
    for record in annotations:
        boxes = np.repeat(record.boxes, copies, axis=0)
        sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        boxes = boxes + rng.normal(size=boxes.shape) * jitter * sides
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = np.repeat(record.labels, copies)
        wrong = rng.uniform(size=len(labels)) < 0.2
        labels = np.where(wrong, rng.integers(len(annotations.categories), size=len(labels)), labels)
        scores = rng.uniform(size=len(labels))
        detection = Detections(record.image_id, boxes, scores.round(1) if tied else scores, labels)
        if masks:
            detection = replace(detection, masks=box_masks(detection.boxes, record.height, record.width))
        detections.append(detection)
    return detections


def noisy_keypoints(annotations, seed=0):
    """`noisy` detections, with the truth's keypoints beside their places."""
    rng = np.random.default_rng(seed)
    detections = []
    for record, detection in zip(annotations, noisy(annotations, masks=False), strict=True):
        points = np.repeat(record.keypoints, 2, axis=0).copy()
        points[..., :2] += rng.normal(size=points[..., :2].shape) * 2
        detections.append(replace(detection, keypoints=points))
    return detections


def pycocotools_metrics(coco: dict, annotations, detections, iou_type, sigmas=None):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **json.loads(json.dumps(coco))}
        truth.createIndex()
        results = [r for d in detections for r in to_coco_results(d, annotations.category_ids)]
        # a result's area is its box's where it has one: MMDetection and Detectron2 take the box from a mask's too
        left_out = {"bbox": "segmentation", "segm": "bbox", "keypoints": "segmentation"}[iou_type]
        results = [{k: v for k, v in r.items() if k != left_out} for r in results]
        found = truth.loadRes(results) if results else COCO()
        if not results:
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, iou_type)
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = {
        f"{iou_type}_{name}": value for name, value in zip(summary_metrics(iou_type), evaluation.stats, strict=True)
    }
    for label, category in enumerate(annotations.categories):
        precision = evaluation.eval["precision"][:, :, label, 0, -1]
        precision = precision[precision > -1]
        if precision.size:
            expected[f"{iou_type}_AP/{category['name']}"] = precision.mean()
    return {name: math.nan if value == -1 else value for name, value in expected.items()}


def assert_like_pycocotools(coco, detections, iou_types=("bbox", "segm")):
    annotations = CocoAnnotations.from_dict(coco)
    for iou_type in iou_types:
        ours = evaluate(annotations, detections, (iou_type,))
        expected = pycocotools_metrics(coco, annotations, detections, iou_type)
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name


def shapes_with(count=16, **changes):
    coco = synthetic.coco_split(5, count)
    return {**coco, **changes}


def test_coco_images_with_noisy_detections(coco_tiny):
    coco = json.loads((coco_tiny / "annotations/instances_val2017.json").read_text())
    assert any(annotation["iscrowd"] for annotation in coco["annotations"])
    assert_like_pycocotools(coco, noisy(CocoAnnotations.from_dict(coco)))


def test_crowds():
    coco = shapes_with()
    assert any(annotation["iscrowd"] for annotation in coco["annotations"])
    assert_like_pycocotools(coco, noisy(CocoAnnotations.from_dict(coco)))


def test_ties_in_score():
    coco = shapes_with()
    assert_like_pycocotools(coco, noisy(CocoAnnotations.from_dict(coco), tied=True, copies=3))


def test_keypoints():
    coco = with_keypoints(shapes_with())
    detections = noisy_keypoints(CocoAnnotations.from_dict(coco))
    assert_like_pycocotools(coco, detections, ("bbox", "keypoints"))
    assert 0.1 < evaluate(CocoAnnotations.from_dict(coco), detections, ("keypoints",))["keypoints_mAP"] < 0.9
    assert_like_pycocotools(coco, [], ("keypoints",))


def test_keypoints_that_are_not_cocos_have_sigmas_of_their_own():
    coco = with_keypoints(shapes_with())
    for annotation in coco["annotations"]:
        annotation["keypoints"] = annotation["keypoints"][:9]
    annotations = CocoAnnotations.from_dict(coco)
    with pytest.raises(UserError, match="3 keypoints an object, and there are 17 sigmas"):
        evaluate(annotations, [], ("keypoints",))
    detections = noisy_keypoints(annotations)
    sigmas = [0.05, 0.1, 0.02]
    for annotation in coco["annotations"]:
        annotation["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])
    ours = evaluate(annotations, detections, ("keypoints",), keypoint_sigmas=sigmas)
    for name, value in pycocotools_metrics(coco, annotations, detections, "keypoints", sigmas).items():
        assert ours[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name


def test_more_than_100_detections_an_image():
    coco = shapes_with(4)
    assert_like_pycocotools(coco, noisy(CocoAnnotations.from_dict(coco), copies=120), ("bbox",))


def test_images_without_ground_truth():
    coco = shapes_with()
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] > 4]
    detections = noisy(CocoAnnotations.from_dict(shapes_with()))
    assert_like_pycocotools(coco, detections)


def test_no_detections_at_all():
    coco = shapes_with()
    empty = [Detections(i["id"], np.zeros((0, 4)), np.zeros(0), np.zeros(0), masks=[]) for i in coco["images"]]
    assert_like_pycocotools(coco, empty)
    assert_like_pycocotools(coco, [])


def test_categories_without_ground_truth_and_ids_that_are_not_contiguous():
    coco = shapes_with()
    new_id = {1: 7, 2: 90, 3: 12}
    for annotation in coco["annotations"]:
        annotation["category_id"] = new_id[annotation["category_id"]]
    coco["categories"] = [
        {"id": 90, "name": "b"},
        {"id": 12, "name": "c"},
        {"id": 7, "name": "a"},
        {"id": 40, "name": "never"},
    ]
    annotations = CocoAnnotations.from_dict(coco)
    assert annotations.category_names == ["a", "c", "never", "b"]
    assert_like_pycocotools(coco, noisy(annotations))
    assert "bbox_AP/never" not in evaluate(annotations, noisy(annotations))


def test_nothing_to_score_is_nan():
    coco = shapes_with(2)
    coco["annotations"] = []
    metrics = evaluate(CocoAnnotations.from_dict(coco), [])
    assert all(math.isnan(value) for value in metrics.values())


def test_a_file_path_evaluates_like_its_annotations(shapes):
    path = shapes / "annotations/val.json"
    detections = noisy(CocoAnnotations.open(path))
    assert evaluate(path, detections) == evaluate(CocoAnnotations.open(path), detections)


def test_boxes_without_area_stay_in_the_evaluation():
    coco = shapes_with(4)
    coco["annotations"][0]["bbox"][2] = 0
    assert_like_pycocotools(coco, noisy(CocoAnnotations.from_dict(shapes_with(4))), ("bbox",))


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_any_number_of_slots_gives_the_same_bits_and_counts_each_image_once(slots):
    annotations = CocoAnnotations.from_dict(shapes_with(16))
    detections = noisy(annotations)
    whole = evaluate(annotations, detections, ("bbox", "segm"))
    per_slot = []
    for rank in range(slots):
        evaluator = CocoEvaluator(annotations, ("bbox", "segm"), compute_here=rank == 0)
        share = detections[rank::slots]
        evaluator.update(share)
        evaluator.update([detections[0]])  # as a slot that had to fill up a batch
        per_slot.append(evaluator.per_slot_reduce())
    chief = CocoEvaluator(annotations, ("bbox", "segm"))
    assert chief.cross_slot_reduce(per_slot) == whole


def test_only_the_chosen_images_count():
    coco = shapes_with(8)
    annotations = CocoAnnotations.from_dict(coco)
    detections = noisy(annotations)
    chosen = [1, 3, 5]
    part = {
        **coco,
        "images": [i for i in coco["images"] if i["id"] in chosen],
        "annotations": [a for a in coco["annotations"] if a["image_id"] in chosen],
    }
    expected = evaluate(CocoAnnotations.from_dict(part), [d for d in detections if d.image_id in chosen])
    assert evaluate(annotations, detections, image_ids=chosen) == expected


def test_masks_that_are_missing_are_an_error():
    annotations = CocoAnnotations.from_dict(shapes_with(2))
    with pytest.raises(ValueError, match="needs the detections' masks"):
        evaluate(annotations, noisy(annotations, masks=False), ("segm",))
