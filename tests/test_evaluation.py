"""The evaluator gives pycocotools' numbers."""

import contextlib
import io
import json
import math
import pickle
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
from shared.evaluation.detections import Detections, from_coco_results, to_coco_results
from shared.evaluation.evaluator import CocoEvaluator, evaluate, summary_metrics
from shared.evaluation.gathered import GatheredDetections


def box_masks(boxes, height, width):
    masks = []
    for x1, y1, x2, y2 in np.asarray(boxes).round().astype(int):
        mask = np.zeros((height, width), np.uint8, order="F")
        mask[max(y1, 0) : y2, max(x1, 0) : x2] = 1
        masks.append(coco_mask.encode(mask))
    return masks


def noisy(annotations, seed=0, copies=2, jitter=0.1, tied=False, masks=True):
    """Detections like a detector's: jittered and doubled truth, some with a wrong label."""
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
    """`noisy` detections with displaced keypoints."""
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


@pytest.mark.parametrize("seed", range(5))
def test_results_of_a_file_give_the_numbers_of_pycocotools(seed):
    """Boxes with one decimal have IoUs exactly on a threshold."""
    rng = np.random.default_rng(seed)

    def box():
        return [*(rng.integers(0, 300, 2) / 10).tolist(), *(rng.integers(100, 400, 2) / 10).tolist()]

    objects = [{"id": i, "image_id": i % 20 + 1, "category_id": 1, "bbox": box(), "iscrowd": 0} for i in range(1, 101)]
    for row in objects:
        row["area"] = row["bbox"][2] * row["bbox"][3]
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(1, 21)],
        "annotations": objects,
        "categories": [{"id": 1, "name": "a"}],
    }
    results = []
    for row in objects:
        x, y, width, height = row["bbox"]
        share = rng.choice([0.5, 0.6, 0.7, 0.75, 0.8, 0.9])  # the box's IoU with the object
        narrow = [x, y, round(float(width * share), 3), height]
        row = {"image_id": row["image_id"], "category_id": 1, "score": float(rng.random()), "bbox": narrow}
        results.append(row)
    annotations = CocoAnnotations.from_dict(coco)
    detections = from_coco_results(results, annotations)
    ours = evaluate(annotations, detections)
    assert ours == pytest.approx(pycocotools_on(coco, results), abs=1e-12, nan_ok=True)
    assert [result for found in detections for result in to_coco_results(found, [1])] == sorted(
        results, key=lambda result: result["image_id"]
    )


def pycocotools_on(coco, results):
    """The twelve numbers, and the AP of the only category."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **json.loads(json.dumps(coco))}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = dict(zip((f"bbox_{name}" for name in summary_metrics("bbox")), evaluation.stats.tolist(), strict=True))
    numbers = {name: math.nan if value == -1 else value for name, value in numbers.items()}
    return {**numbers, "bbox_AP/a": numbers["bbox_mAP"]}


@pytest.mark.parametrize(("most", "mean"), [(None, 0.634), (5, 0.04), (160, 1.0), (1000, 1.0)])
def test_max_detections_is_how_many_are_scored(most, mean):
    places = [(12 * (i % 20), 12 * (i // 20)) for i in range(160)]
    objects = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [x, y, 10, 10], "area": 100, "iscrowd": 0}
        for i, (x, y) in enumerate(places, 1)
    ]
    image = {"id": 1, "file_name": "a.png", "width": 240, "height": 96}
    coco = {"images": [image], "annotations": objects, "categories": [{"id": 1, "name": "a"}]}
    annotations = CocoAnnotations.from_dict(coco)
    boxes = annotations[0].boxes
    masks = box_masks(boxes, 96, 240)
    found = [Detections(1, boxes, np.linspace(1, 0.5, 160), np.zeros(160, int), masks)]
    metrics = evaluate(annotations, found, max_detections=most)
    assert metrics["bbox_mAP"] == metrics["bbox_mAP_50"] == pytest.approx(mean, abs=0.02)
    assert metrics["bbox_AR_100"] == min(most or 100, 100) / 160
    assert metrics["bbox_AR_s"] == min(most or 100, 160) / 160


def test_keypoints():
    coco = with_keypoints(shapes_with())
    detections = noisy_keypoints(CocoAnnotations.from_dict(coco))
    assert_like_pycocotools(coco, detections, ("bbox", "keypoints"))
    assert 0.1 < evaluate(CocoAnnotations.from_dict(coco), detections, ("keypoints",))["keypoints_mAP"] < 0.9
    assert_like_pycocotools(coco, [], ("keypoints",))


def test_an_image_without_detections_has_no_keypoints():
    annotations = CocoAnnotations.from_dict(with_keypoints(shapes_with()))
    first, *others = noisy_keypoints(annotations)
    evaluator = CocoEvaluator(annotations, ("bbox", "keypoints"))
    evaluator.update([first.only([]), *others])
    evaluator.compute()
    found = evaluator.found.detections()
    assert [each.keypoints.shape for each in found] == [(len(each), 17, 3) for each in (first.only([]), *others)]


def test_keypoints_that_are_not_cocos_have_sigmas_of_their_own():
    coco = with_keypoints(shapes_with())
    for annotation in coco["annotations"]:
        annotation["keypoints"] = annotation["keypoints"][:9]
    annotations = CocoAnnotations.from_dict(coco)
    with pytest.raises(UserError, match="3 keypoints per object, but 17 sigmas"):
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


def test_crowded_images_with_equal_boxes_and_areas_at_the_limits():
    rng = np.random.default_rng(0)
    sides = rng.choice([31, 32, 33, 95, 96, 97], size=(240, 2))
    boxes = np.hstack([rng.integers(0, 40, (240, 2)) * 2, sides])
    boxes[120:] = boxes[:120]  # each twice: equal IoU
    annotations = [
        {"id": i + 1, "image_id": i % 4 + 1, "category_id": i % 3 + 1, "bbox": box, "area": box[2] * box[3]}
        | {"iscrowd": int(i % 10 == 0)}
        for i, box in enumerate(boxes.tolist())
    ]
    coco = shapes_with(4, annotations=annotations)
    detections = noisy(CocoAnnotations.from_dict(coco), copies=3, jitter=0.05, tied=True, masks=False)
    assert 0.1 < evaluate(CocoAnnotations.from_dict(coco), detections)["bbox_mAP"] < 0.9
    assert_like_pycocotools(coco, detections, ("bbox",))


def test_the_last_of_two_objects_with_equal_iou_is_matched():
    objects = [{"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [20 * i, 0, 60, 60]} for i in range(2)]
    coco = shapes_with(1, annotations=[{**one, "area": 3600, "iscrowd": 0} for one in objects])
    between, on_the_last = [10, 0, 70, 60], [20, 0, 80, 60]
    assert_like_pycocotools(coco, [Detections(1, [between, on_the_last], [0.9, 0.8], [0, 0])], ("bbox",))


def test_a_skipped_image_does_not_count_though_it_has_detections():
    coco = shapes_with(8)
    annotations = CocoAnnotations.from_dict(coco)
    evaluator = CocoEvaluator(annotations, ("bbox", "segm"))
    evaluator.update(noisy(annotations))
    evaluator.skip([3, 5])
    rest = [i["id"] for i in coco["images"] if i["id"] not in (3, 5)]
    expected = evaluate(annotations, noisy(annotations), ("bbox", "segm"), image_ids=rest)
    assert evaluator.compute() == {**expected, "skipped_images": 2}


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


def on_slots(evaluators):
    """The results of each slot's evaluator, in the order of Determined's calls. The chief reaches the gather last."""
    shares = [None] * len(evaluators)

    def gather_of(rank):
        def gather(share):
            shares[rank] = pickle.loads(pickle.dumps(share))
            return shares if rank == 0 else None

        return gather

    per_slot = [None] * len(evaluators)
    for rank, evaluator in reversed(list(enumerate(evaluators))):
        evaluator.gather = gather_of(rank)
        per_slot[rank] = evaluator.per_slot_reduce()
    per_slot = pickle.loads(pickle.dumps(per_slot))
    return [evaluator.cross_slot_reduce(per_slot) for evaluator in evaluators], len(pickle.dumps(per_slot))


@pytest.mark.parametrize(("masks", "keypoints"), [(False, True), (True, False)])
def test_gathered_detections_are_given_back(masks, keypoints):
    annotations = CocoAnnotations.from_dict(with_keypoints(shapes_with(4)))
    detections = noisy_keypoints(annotations) if keypoints else noisy(annotations)
    detections[1] = detections[1].only([])
    back = GatheredDetections.of(detections, masks, keypoints).detections()
    for one, other in zip(detections, back, strict=True):
        assert one.image_id == other.image_id
        assert np.array_equal(one.boxes, other.boxes)
        assert np.array_equal(one.labels, other.labels)
        assert not masks or one.masks == other.masks
        assert not keypoints or np.array_equal(one.keypoints, other.keypoints)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("iou_types", [("bbox", "segm"), ("bbox", "keypoints")])
def test_any_number_of_slots_gives_identical_metrics(slots, iou_types):
    annotations = CocoAnnotations.from_dict(with_keypoints(shapes_with(16)))
    detections = noisy(annotations) if "segm" in iou_types else noisy_keypoints(annotations)
    whole = evaluate(annotations, detections, iou_types)
    evaluators = []
    for rank in range(slots):
        evaluator = CocoEvaluator(annotations, iou_types)
        evaluator.update(detections[rank::slots])
        evaluator.update([detections[0]])  # as a slot that had to fill up a batch
        evaluators.append(evaluator)
    metrics, size = on_slots(evaluators)
    assert repr(metrics) == repr([whole] * slots)  # nan is not nan
    assert size < 4000  # what every slot gets


def test_a_slot_without_detections_adds_none():
    annotations = CocoAnnotations.from_dict(with_keypoints(shapes_with(4)))
    for detections, iou_types in ((noisy(annotations), ("segm",)), (noisy_keypoints(annotations), ("keypoints",))):
        full, empty = (CocoEvaluator(annotations, iou_types) for _ in range(2))
        full.update(detections)
        for evaluators in ([full, empty], [empty, full]):
            assert repr(on_slots(evaluators)[0]) == repr([evaluate(annotations, detections, iou_types)] * 2)


@pytest.mark.parametrize(("failing", "kind"), [(0, ValueError), (1, ValueError), (0, UserError)])
def test_an_error_of_one_slot_is_raised_on_every_slot_after_the_reducers(failing, kind, monkeypatch):
    annotations = CocoAnnotations.from_dict(shapes_with(4))
    detections = noisy(annotations)
    evaluators = [CocoEvaluator(annotations) for _ in range(2)]
    for evaluator in evaluators:
        evaluator.update(detections)

    def fail():
        raise kind("no such thing")

    monkeypatch.setattr(evaluators[failing], "share" if failing else "open_truth", fail)
    metrics, _ = on_slots(evaluators)
    assert metrics == [{}, {}]
    for evaluator in evaluators:
        with pytest.raises(UserError if kind is UserError else RuntimeError, match="no such thing"):
            evaluator.raise_if_failed()
    monkeypatch.undo()
    assert repr(on_slots(evaluators)[0]) == repr([evaluate(annotations, detections)] * 2)
    for evaluator in evaluators:
        evaluator.raise_if_failed()


@pytest.mark.parametrize("first", [2**60, 2**63 - 17, -(2**60)])
def test_ids_that_float64_cannot_hold(first):
    coco, large = with_keypoints(shapes_with(16)), with_keypoints(shapes_with(16))
    annotations = CocoAnnotations.from_dict(coco)
    for image in large["images"]:
        image["id"] += first
    for annotation in large["annotations"]:
        annotation["image_id"] += first
        annotation["id"] = first + annotation["id"] % 2**53 if first < 0 else 2**63 - annotation["id"]
        annotation["category_id"] += 2**60
    large["categories"] = [{**category, "id": category["id"] + 2**60} for category in coco["categories"]]
    for detections, iou_types in (
        (noisy(annotations, tied=True), ("bbox", "segm")),
        (noisy_keypoints(annotations), ("keypoints",)),
    ):
        expected = evaluate(annotations, detections, iou_types)
        for name, value in pycocotools_metrics(coco, annotations, detections, iou_types[-1]).items():
            assert expected[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name
        moved = [replace(detection, image_id=detection.image_id + first) for detection in detections]
        ours = evaluate(CocoAnnotations.from_dict(large), moved, iou_types, [d.image_id for d in moved])
        assert ours == pytest.approx(expected, nan_ok=True, abs=0)


def test_images_in_another_order_than_their_ids():
    coco = shapes_with(16)
    coco["images"] = coco["images"][::-1]
    assert_like_pycocotools(coco, noisy(CocoAnnotations.from_dict(coco), tied=True))


def rle(height, width, counts=None):
    full = coco_mask.encode(np.ones((height, width), np.uint8, order="F"))["counts"].decode()
    return {"size": [height, width], "counts": full if counts is None else counts}


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (rle(64, 256), r"size \[64, 256\], and the image's is \[128, 128\]"),
        (rle(128, 128, "zzz~~~!"), "RLE that cannot be read"),
        (rle(128, 128, [0, 5_000_000]), "RLE that cannot be read"),
        (rle(128, 128, [-1, 5]), "RLE that cannot be read"),
        ({"size": [128, 128]}, "neither polygons nor RLE"),
        ({"size": None, "counts": [0, 128 * 128]}, "size None"),
        ([1, 1, 5, 1, 5, 5], "not a list of polygons"),
        ([[1, 1, None, 1, 5, 5]], "not a list of polygons"),
        ([["1"] * 6], "not a list of polygons"),
        ("mask", "neither polygons nor RLE"),
        (7, "neither polygons nor RLE"),
    ],
)
def test_an_invalid_segmentation_is_an_error_when_the_truth_is_opened(segmentation, message):
    coco = shapes_with(4)
    wrong = coco["annotations"][3]
    wrong["segmentation"] = segmentation
    annotations = CocoAnnotations.from_dict(coco)
    where = f"annotation {wrong['id']}, on image {wrong['image_id']}, "
    for iou_types in (("segm",), ("bbox", "segm")):
        with pytest.raises(UserError, match=f"{where}.*{message}"):
            CocoEvaluator(annotations, iou_types).open_truth()
    CocoEvaluator(annotations, ("bbox",)).open_truth()


@pytest.mark.parametrize("segmentation", [None, [], [[]], [[1, 1, 5, 5]], {}, rle(128, 128), rle(128, 128, [16384])])
def test_an_object_without_a_mask_stays_in_the_evaluation(segmentation):
    coco = shapes_with(4)
    coco["annotations"][0]["segmentation"] = segmentation
    annotations = CocoAnnotations.from_dict(coco)
    metrics = evaluate(annotations, noisy(CocoAnnotations.from_dict(shapes_with(4))), ("segm",))
    assert metrics.keys() == evaluate(annotations, [], ("segm",)).keys()
    assert 0 < metrics["segm_mAP"] < 1


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
