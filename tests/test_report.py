"""The report: its numbers equal the libraries', planted faults are found, and any data gives a page."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import hotcoco
import numpy as np
import pytest
from conftest import SHARED_DATA
from PIL import Image

from shared.__main__ import main as shared_main
from shared.data import synthetic
from shared.data.annotations import CocoAnnotations
from shared.errors import UserError
from shared.evaluation.detections import Detections, from_coco_results
from shared.evaluation.evaluator import evaluate
from shared.report.analysis import analyse
from shared.report.plots import figures_of, learning_curves
from shared.report.report import About, report

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def data_set(tmp_path, boxes, categories=CATEGORIES, images=1, **more):
    """An annotation file with `boxes`, each (image id, category id, [x, y, w, h]), on images of 100 × 80 pixels."""
    annotations = [
        {"id": i + 1, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        | {name: values[i] for name, values in more.items()}
        for i, (image, category, box) in enumerate(boxes)
    ]
    rows = [{"id": i + 1, "file_name": f"{i + 1}.png", "width": 100, "height": 80} for i in range(images)]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"images": rows, "annotations": annotations, "categories": categories}))
    return CocoAnnotations.open(path)


@pytest.fixture(scope="module")
def noisy(coco_tiny, tmp_path_factory):
    """coco_tiny's validation data, and results with noise, swaps, omissions and inventions."""
    path = coco_tiny / "annotations/instances_val2017.json"
    data, rng = json.loads(path.read_text()), np.random.default_rng(0)
    ids = [category["id"] for category in data["categories"]]
    results = []
    for row in data["annotations"]:
        if rng.random() < 0.15:
            continue
        _, _, w, h = row["bbox"]
        box = np.array(row["bbox"]) + rng.normal(0, 0.08, 4) * [w, h, w, h]
        category = row["category_id"] if rng.random() > 0.1 else int(rng.choice(ids))
        score = float(rng.beta(4, 2))
        results.append(
            {"image_id": row["image_id"], "category_id": category, "bbox": box.clip(1).tolist(), "score": score}
        )
    for image in data["images"]:
        for _ in range(5):
            box = [*(rng.random(2) * 200).tolist(), *(rng.random(2) * 100 + 5).tolist()]
            category, score = int(rng.choice(ids)), float(rng.beta(2, 5))
            results.append({"image_id": image["id"], "category_id": category, "bbox": box, "score": score})
    file = tmp_path_factory.mktemp("noisy") / "results.json"
    file.write_text(json.dumps(results))
    return path, file


@pytest.fixture(scope="module")
def noisy_analyses(noisy):
    annotations = CocoAnnotations.open(noisy[0])
    return analyse(annotations, from_coco_results(noisy[1], annotations), ("bbox",), resamples=0)


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


# --- the numbers ----------------------------------------------------------------------------------------


def test_its_numbers_are_those_of_evaluate_and_of_hotcoco(noisy, noisy_analyses):
    annotations = CocoAnnotations.open(noisy[0])
    metrics = evaluate(annotations, from_coco_results(noisy[1], annotations))
    boxes = noisy_analyses.of["bbox"]
    assert {f"bbox_{name}": value for name, value in boxes.metrics.items()} == {
        name: value for name, value in metrics.items() if "_AP/" not in name
    }
    table = {row.name: row.ap for row in boxes.categories if row.objects}
    assert table == {name[len("bbox_AP/") :]: value for name, value in metrics.items() if "_AP/" in name}

    truth = hotcoco.COCO(str(noisy[0]))
    own = hotcoco.COCOeval(truth, truth.load_res(str(noisy[1])), "bbox")
    own.evaluate()
    own.accumulate()
    assert boxes.errors["delta_ap"] == pytest.approx(own.tide_errors()["delta_ap"], abs=1e-6)
    assert boxes.errors["counts"] == own.tide_errors()["counts"]
    assert boxes.calibration["ece"] == pytest.approx(own.calibration()["ece"], abs=1e-6)
    matrix = own.confusion_matrix(min_score=noisy_analyses.best_threshold)["matrix"]
    assert (boxes.confusion["matrix"] == matrix).all()


def test_f1_and_the_best_thresholds_are_those_of_a_few_lines_of_numpy(noisy_analyses):
    boxes = noisy_analyses.of["bbox"]
    verdicts = boxes.evaluation.image_diagnostics()["dt_status"]
    truth = boxes.evaluation.image_diagnostics()["gt_status"]
    rows = np.array(sorted(verdicts))
    right = np.array([verdicts[row] == "tp" for row in rows])
    dets = [d for index in noisy_analyses.indices for d in [noisy_analyses.detections.get(int(index))] if d]
    dets.sort(key=lambda found: found.image_id)
    scores = np.concatenate([found.scores for found in dets])[rows - 1]
    labels = np.concatenate([found.labels for found in dets])[rows - 1]
    counts = np.bincount(noisy_analyses.annotations.columns["labels"][np.array(sorted(truth)) - 1], minlength=80)

    def best(of, objects):
        f1 = {t: 2 * right[of & (scores >= t)].sum() / ((of & (scores >= t)).sum() + objects) for t in scores[of]}
        return max(f1.items(), key=lambda pair: (pair[1], pair[0]))

    for label, row in enumerate(boxes.categories):
        if row.objects and not np.isnan(row.f1):
            threshold, f1 = best(labels == label, counts[label])
            assert (row.objects, row.threshold, row.f1) == (counts[label], threshold, pytest.approx(f1))
    threshold, f1 = best(np.ones(len(scores), bool), counts.sum())
    assert (boxes.curve.best_threshold, boxes.curve.best_f1) == (threshold, pytest.approx(f1))


def test_the_costs_of_errors_equal_tidecv_s(noisy, noisy_analyses):
    """To a thousandth: the two count a detection that overlaps a crowd, or two objects equally, differently."""
    tidecv = pytest.importorskip("tidecv", reason="needs the package tidecv")
    tide = tidecv.TIDE()
    tide.evaluate_range(
        tidecv.datasets.COCO(str(noisy[0])), tidecv.datasets.COCOResult(str(noisy[1])), mode=tidecv.TIDE.BOX
    )
    (theirs,) = tide.get_main_errors().values()
    ours = noisy_analyses.of["bbox"].errors
    for kind, cost in theirs.items():
        assert ours["delta_ap"][kind] == pytest.approx(cost / 100, abs=1e-3)


def test_intervals_are_those_of_images_drawn_again_with_replacement(noisy):
    annotations = CocoAnnotations.open(noisy[0])
    detections = {found.image_id: found for found in from_coco_results(noisy[1], annotations)}
    analyses = analyse(annotations, detections.values(), ("bbox",), resamples=100)
    lower, upper = analyses.of["bbox"].intervals["mAP"]
    data, rng = json.loads(noisy[0].read_text()), np.random.default_rng(1)
    results = json.loads(noisy[1].read_text())
    ids, drawn = [image["id"] for image in data["images"]], []
    for _ in range(40):
        images, truth, found = [], [], []
        for position, image_id in enumerate(rng.choice(ids, len(ids)).tolist()):
            images.append({"id": position, "width": 640, "height": 640, "file_name": ""})
            truth += [{**row, "image_id": position} for row in data["annotations"] if row["image_id"] == image_id]
            found += [{**row, "image_id": position} for row in results if row["image_id"] == image_id]
        truth = [{**row, "id": i + 1} for i, row in enumerate(truth)]
        coco = hotcoco.COCO({"images": images, "annotations": truth, "categories": data["categories"]})
        own = hotcoco.COCOeval(coco, coco.load_res(found), "bbox")
        own.evaluate()
        own.accumulate()
        precision = own.eval["precision"][..., 0, -1]
        drawn.append(precision[precision > -1].mean())
    assert lower < analyses.of["bbox"].metrics["mAP"] < upper
    assert upper - lower == pytest.approx(4 * np.std(drawn), rel=0.3)


# --- what is wrong --------------------------------------------------------------------------------------


def test_swapped_categories_and_missing_boxes_are_found(coco_tiny, tmp_path):
    data = json.loads((coco_tiny / "annotations/instances_val2017.json").read_text())
    rng = np.random.default_rng(3)
    objects = [row for row in data["annotations"] if not row["iscrowd"]]
    crowded = {row["image_id"] for row in data["annotations"] if row["iscrowd"]}
    results = []
    for row in objects:  # of a detector that is good, not perfect
        _, _, w, h = row["bbox"]
        box = np.array(row["bbox"]) + rng.normal(0, 0.03, 4) * [w, h, w, h]
        score = float(rng.beta(8, 2))
        results.append(
            {k: row[k] for k in ("image_id", "category_id")} | {"bbox": box.clip(0).tolist(), "score": score}
        )
    ids = [category["id"] for category in data["categories"]]
    for image in data["images"]:
        box = [*(rng.random(2) * 300).tolist(), *(rng.random(2) * 100 + 5).tolist()]
        category, score = int(rng.choice(ids)), float(rng.beta(2, 8))
        results.append({"image_id": image["id"], "category_id": category, "bbox": box, "score": score})
    candidates = [row for row in objects if row["image_id"] not in crowded and row["area"] > 400]
    planted = [candidates[i] for i in rng.choice(len(candidates), 40, replace=False)]
    swapped, removed = {row["id"] for row in planted[:20]}, planted[20:]
    removed_ids = {row["id"] for row in removed}
    for row in data["annotations"]:
        if row["id"] in swapped:
            row["category_id"] = ids[(ids.index(row["category_id"]) + 7) % len(ids)]
    data["annotations"] = [row for row in data["annotations"] if row["id"] not in removed_ids]
    (tmp_path / "planted.json").write_text(json.dumps(data))
    annotations = CocoAnnotations.open(tmp_path / "planted.json")

    analyses = report(annotations, from_coco_results(results, annotations), tmp_path / "report.html", resamples=0)

    suspected = json.loads((tmp_path / "report.json").read_text())["suspected_annotations"]
    assert len(swapped & {row["annotation_id"] for row in suspected if row["kind"] == "category"}) >= 18
    missing = [
        (row["image_id"], row["category_id"], np.array(row["bbox"])) for row in suspected if row["kind"] == "missing"
    ]
    found = [
        row
        for row in removed
        if any(
            (image, category) == (row["image_id"], row["category_id"])
            and np.abs(box - row["bbox"]).max() < 0.2 * max(row["bbox"][2:]) + 1
            for image, category, box in missing
        )
    ]
    assert len(found) >= 15
    assert len(analyses.suspects) <= 50
    assert f"{len(suspected)} annotations are worth a look" in Page(tmp_path / "report.html").text


def unsure_detections(coco, seed):
    """A detector with calibrated scores: its category is wrong with the probability of the second guess, and a box on
    background has a low score."""
    rng = np.random.default_rng(seed)
    ids, found = [category["id"] for category in coco["categories"]], []
    for row in coco["annotations"]:
        margin = rng.exponential(3.0)
        guesses = [row["category_id"], int(rng.choice([i for i in ids if i != row["category_id"]]))]
        if rng.random() < 1 / (1 + np.exp(margin)):
            guesses.reverse()
        for category, odds in zip(guesses, (0.5 + margin / 2, 0.5 - margin / 2), strict=True):
            box = np.array(row["bbox"]) + rng.normal(0, 0.03, 4) * np.tile(row["bbox"][2:], 2)
            common = {"image_id": row["image_id"], "bbox": box.clip(0.5).tolist(), "category_id": category}
            found.append({**common, "score": float(1 / (1 + np.exp(-odds)))})
    for image in coco["images"]:
        for _ in range(8):
            box = [*(rng.random(2) * 100).tolist(), *(rng.random(2) * 30 + 5).tolist()]
            common = {"image_id": image["id"], "bbox": box, "category_id": int(rng.choice(ids))}
            found.append({**common, "score": float(1 / (1 + np.exp(-rng.normal(-3.0, 1.0))))})
    return found


@pytest.mark.parametrize("seed", range(3))
def test_exact_annotations_are_not_flagged_although_the_detector_errs(seed, tmp_path):
    coco = synthetic.coco_split(seed=seed, count=150)
    annotations = CocoAnnotations.from_dict(coco)
    found = from_coco_results(unsure_detections(coco, seed), annotations)
    analyses = report(annotations, found, tmp_path / "report.html", resamples=0)
    assert sum(one.kind == "Cls" for one in analyses.wrong) > 20
    assert analyses.suspects == []
    assert "No annotation stands out as wrong." in Page(tmp_path / "report.html").text


def test_the_summary_says_how_many_of_the_flags_are_expected_to_be_false(tmp_path):
    expected = false = true = planted = 0
    for seed in (0, 3, 6):
        coco = synthetic.coco_split(seed=seed, count=150)
        results = unsure_detections(coco, seed)
        swapped = [row for row in coco["annotations"] if not row["iscrowd"]][::12]
        for row in swapped:
            row["category_id"] = row["category_id"] % 3 + 1
        annotations = CocoAnnotations.from_dict(coco)
        analyses = report(annotations, from_coco_results(results, annotations), tmp_path / "report.html", resamples=0)
        flagged = json.loads((tmp_path / "report.json").read_text())["suspected_annotations"]
        chances = [row["chance_false"] for row in flagged]
        said = f"worth a look: {len(flagged)} of another category. About {math.ceil(sum(chances))} of these"
        assert said in Page(tmp_path / "report.html").text
        assert chances == sorted(chances)
        assert all(row["score"] >= analyses.best_threshold for row in flagged)
        right = {row["annotation_id"] for row in flagged} & {row["id"] for row in swapped}
        true, false = true + len(right), false + len(flagged) - len(right)
        expected, planted = expected + sum(chances), planted + len(swapped)
    assert true > planted / 2
    assert false / 2 <= expected <= 2 * false


def test_each_error_is_of_its_type(tmp_path):
    cat, dog = 3, 7
    annotations = data_set(
        tmp_path,
        [(1, cat, [0, 0, 20, 20]), (1, dog, [40, 0, 20, 20]), (1, cat, [70, 0, 20, 20]), (1, dog, [0, 40, 20, 20])],
    )
    boxes = {
        "right": ([0, 0, 20, 20], 0, 0.9),
        "Dupe": ([1, 0, 21, 20], 0, 0.8),
        "Cls": ([40, 0, 60, 20], 0, 0.9),
        "Loc": ([80, 0, 100, 20], 0, 0.9),
        "Bkg": ([60, 50, 90, 70], 1, 0.9),
        "Both": ([10, 0, 35, 20], 1, 0.9),
    }
    found = Detections(1, *map(list, zip(*[(b, s, label) for b, label, s in boxes.values()], strict=True)))
    analyses = analyse(annotations, [found], ("bbox",), resamples=0)
    kinds = {one.kind: one for one in analyses.wrong}
    assert (
        sorted(one.kind for one in analyses.wrong) == sorted({*boxes, "Miss"} - {"right"})
        or analyses.best_threshold > 0.8
    )
    for kind, one in kinds.items():
        if one.detection is not None:
            assert one.detection == [*boxes].index(kind)
    assert kinds["Miss"].annotation == 3


# --- any data gives a page ------------------------------------------------------------------------------

POLYGON = [[10, 10, 30, 10, 30, 30, 10, 30]]


@pytest.mark.parametrize(
    ("boxes", "found", "said"),
    [
        ([(1, 3, [10, 10, 20, 20])], [], "Nothing was detected."),
        ([], [([10, 10, 30, 30], 0.9, 0)], "no object to find"),
        ([], [], "no object to find"),
        ([(1, 3, [10, 10, 20, 20])], [([60, 50, 80, 70], 0.9, 0)], "No detection is right."),
        ([(1, 3, [10, 10, 20, 20])], [([10, 10, 30, 30], 0.9, 0)], "mAP 1.000"),
        ([(1, 3, [10, 10, 20, 20])], [([10, 10, 30, 30], 0.9, 1)], "No detection is right."),
    ],
)
def test_without_detections_without_objects_or_with_one_there_is_a_page(tmp_path, boxes, found, said):
    annotations = data_set(tmp_path, boxes, images=2)
    detections = [Detections(1, *map(list, zip(*found, strict=True)))] if found else []
    Image.new("RGB", (100, 80)).save(tmp_path / "1.png")
    report(annotations, detections, tmp_path / "report.html", images=tmp_path, resamples=10)
    assert said in Page(tmp_path / "report.html").text
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_one_category_and_one_image_give_a_page(tmp_path):
    annotations = data_set(tmp_path, [(1, 3, [10, 10, 20, 20])], categories=CATEGORIES[:1])
    report(annotations, [Detections(1, [[10, 10, 30, 30]], [0.9], [0])], tmp_path / "report.html")
    assert "1 image with 1 object of 1 category." in Page(tmp_path / "report.html").text


def test_masks_without_masks_in_the_truth_give_a_page(tmp_path):
    annotations = data_set(tmp_path, [(1, 3, [10, 10, 20, 20])])
    mask = hotcoco.mask.encode(np.asfortranarray(np.ones((80, 100), np.uint8)))
    detections = [Detections(1, [[10, 10, 30, 30]], [0.9], [0], masks=[mask])]
    report(annotations, detections, tmp_path / "report.html", resamples=10)
    assert "By masks" in Page(tmp_path / "report.html").text


def test_masks_and_keypoints_have_their_numbers(tmp_path):
    points = [float(v) for i in range(17) for v in (12 + i, 15, 2)]
    annotations = data_set(
        tmp_path, [(1, 3, [10, 10, 20, 20])], segmentation=[POLYGON], keypoints=[points], num_keypoints=[17]
    )
    mask = hotcoco.mask.encode(np.asfortranarray(np.pad(np.ones((20, 20), np.uint8), ((10, 50), (10, 70)))))
    detections = [Detections(1, [[10, 10, 30, 30]], [0.9], [0], masks=[mask], keypoints=np.reshape(points, (1, 17, 3)))]
    analyses = report(annotations, detections, tmp_path / "report.html", resamples=10)
    assert {iou_type: of.metrics["mAP"] for iou_type, of in analyses.of.items()} == {
        iou_type: pytest.approx(1.0) for iou_type in ("bbox", "segm", "keypoints")
    }


HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "n" * 200,
    "🐈 $x_1$ {{ 7*7 }}",
    "_קטה",
    "a\nb",
]


def test_hostile_names_are_text_and_the_page_needs_nothing_else(tmp_path):
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(HOSTILE)]
    boxes = [(1, i + 1, [5 + 15 * i, 5, 10, 10]) for i in range(len(HOSTILE))]
    annotations = data_set(tmp_path, boxes, categories=categories)
    found = [([5 + 15 * i, 5, 15 + 15 * i, 15], 0.9, i) for i in range(4)] + [([5, 50, 20, 70], 0.95, 4)]
    Image.new("RGB", (100, 80)).save(tmp_path / "1.png")
    detections = [Detections(1, *map(list, zip(*found, strict=True)))]
    report(annotations, detections, tmp_path / "report.html", images=tmp_path, resamples=0)
    page = Page(tmp_path / "report.html")
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    for name in HOSTILE:
        assert name in page.text
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    assert "@import" not in (html := (tmp_path / "report.html").read_text())
    assert not re.search(r"url\((?!#)", html)


@pytest.mark.parametrize("name", ["../private.png", "/private.png", "sub/../../private.png", "link.png", "far/1.png"])
def test_no_picture_from_outside_of_the_images_folder(tmp_path, name):
    Image.new("RGB", (100, 80), "red").save(tmp_path / "private.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "private.png", tmp_path / "elsewhere/1.png")
    if name == "link.png":
        (tmp_path / "images/link.png").symlink_to(tmp_path / "private.png")
    if name == "far/1.png":
        (tmp_path / "images/far").symlink_to(tmp_path / "elsewhere")
    annotations = data_set(tmp_path, [(1, 3, [10, 10, 20, 20])])
    data = json.loads(annotations.path.read_text())
    data["images"][0]["file_name"] = str(tmp_path / "private.png") if name == "/private.png" else name
    annotations = CocoAnnotations.from_dict(data)
    with pytest.raises(UserError, match=r"leads out of the images' folder|is a link out of"):
        report(annotations, [], tmp_path / "report.html", images=tmp_path / "images", resamples=0)
    assert not (tmp_path / "report.html").exists()


def test_a_link_within_the_images_folder_is_drawn(tmp_path):
    annotations = data_set(tmp_path, [(1, 3, [10, 10, 20, 20])])
    (tmp_path / "images/blobs").mkdir(parents=True)
    Image.new("RGB", (100, 80)).save(tmp_path / "images/blobs/a.png")
    (tmp_path / "images/1.png").symlink_to("blobs/a.png")
    found = [Detections(1, [[50, 50, 70, 70], [10, 10, 30, 30]], [0.9, 0.8], [0, 0])]
    report(annotations, found, tmp_path / "report.html", images=tmp_path / "images", resamples=0)
    assert "data:image/jpeg" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "named",
    [
        {"image_id": "0002", "file_name": "0002.png"},  # Ultralytics
        {"image_id": 2, "file_name": "0002.png"},  # Ultralytics, which takes digits for a number
        {"image_id": "0002.png"},
        {"image_id": "val/0002.png"},
        {"image_id": "0002"},
        {"image_id": "41"},
        {"image_id": 41, "file_name": "elsewhere/val/0002.png"},
    ],
)
def test_results_may_name_images_by_id_by_file_or_by_its_stem(named):
    images = [
        {"id": image_id, "file_name": f"val/000{i}.png", "width": 100, "height": 80}
        for i, image_id in enumerate((2, 7, 41))
    ]
    truth = [{"id": 1, "image_id": 41, "category_id": 3, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}]
    annotations = CocoAnnotations.from_dict({"images": images, "annotations": truth, "categories": CATEGORIES})
    result = {**named, "category_id": 3, "bbox": [10, 10, 20, 20], "score": 0.9}
    assert evaluate(annotations, from_coco_results([result], annotations))["bbox_mAP"] == pytest.approx(1.0)


def test_a_name_that_two_images_share_is_refused():
    images = [{"id": i, "file_name": f"{i}/a.png", "width": 100, "height": 80} for i in (1, 2)]
    annotations = CocoAnnotations.from_dict({"images": images, "annotations": [], "categories": CATEGORIES})
    result = {"category_id": 3, "bbox": [10, 10, 20, 20], "score": 0.9}
    with pytest.raises(UserError, match="result 1: 'a' is not the name of one image"):
        from_coco_results([{**result, "image_id": "2/a.png"}, {**result, "image_id": "a"}], annotations)


def test_the_summary_counts_images_with_more_objects_than_are_scored(tmp_path):
    boxes = [(image, 3, [i % 40 * 2, i // 40 * 2, 1, 1]) for image, count in ((1, 120), (2, 100)) for i in range(count)]
    annotations = data_set(tmp_path, boxes, images=3)
    found = [Detections(r.image_id, r.boxes, np.linspace(1, 0.5, len(r.boxes)), r.labels) for r in annotations]
    report(annotations, found, tmp_path / "report.html", resamples=0)
    text = Page(tmp_path / "report.html").text
    assert "1 image holds more than 100 objects of one category. Only 100 detections of a category are scored" in text


def test_the_report_scores_as_many_detections_as_the_option_says(tmp_path, monkeypatch):
    data_set(tmp_path, [(1, 3, [i % 40 * 2, i // 40 * 2, 1, 1]) for i in range(120)])
    annotations, results = tmp_path / "annotations.json", tmp_path / "found.json"
    rows = json.loads(annotations.read_text())["annotations"]
    results.write_text(json.dumps([{**row, "score": 0.9} for row in rows]))
    values = []
    for option in ([], ["--max-detections", "200"]):
        output = tmp_path / "report.html"
        arguments = [str(annotations), str(results), "--output", str(output), "--resamples", "0"]
        monkeypatch.setattr("sys.argv", ["shared", "report", *arguments, *option])
        shared_main()
        values.append(json.loads(output.with_suffix(".json").read_text())["bbox"]["metrics"]["mAP"])
    assert values[0] < 0.9
    assert values[1] == pytest.approx(1)


# --- figures --------------------------------------------------------------------------------------------


def test_no_legend_covers_a_curve(noisy_analyses):
    names = noisy_analyses.annotations.category_names
    drawn = {**figures_of(noisy_analyses.of["bbox"], names), **learning_curves(REPORTS, "bbox_mAP", 20)}
    assert {"Precision and recall", "Calibration", "loss", "bbox_mAP"} <= drawn.keys()
    for title, figure in drawn.items():
        figure.draw_without_rendering()
        for axes in figure.axes:
            assert axes.get_legend() is None, title
            legends = [legend.get_window_extent() for legend in figure.legends]
            assert not any(legend.overlaps(axes.get_window_extent()) for legend in legends), title


REPORTS = [
    {"batches": batches, "split": split, "metrics": {"loss": 1.0, "lr": 0.1, "val_loss": 2.0, "bbox_mAP": 0.3}}
    for batches in (10, 20)
    for split in ("train", "val")
]


def test_each_learning_curve_keeps_a_readable_size(tmp_path):
    annotations = data_set(tmp_path, [(1, 3, [10, 10, 20, 20])])
    found = [Detections(1, [[10, 10, 30, 30]], [0.9], [0])]
    curves = learning_curves(REPORTS, "bbox_mAP", 20)
    assert [*curves] == ["loss", "bbox_mAP", "learning rate"]
    report(annotations, found, tmp_path / "report.html", resamples=0, about=About(curves=curves))
    page = Page(tmp_path / "report.html")
    sizes = [(a["style"], float(a["viewbox"].split()[2])) for tag, a in page.tags if tag == "svg"]
    assert len(sizes) > 3
    for style, width in sizes:
        assert float(re.search(r"min-width: (\d+)pt", style)[1]) == pytest.approx(0.75 * width, abs=1)


# --- the command ----------------------------------------------------------------------------------------


def test_the_command_reports_on_anybody_s_results(noisy, tmp_path, monkeypatch, capsys):
    arguments = [*map(str, noisy), "--images", str(SHARED_DATA / "coco_tiny/val2017"), "--resamples", "5"]
    monkeypatch.setattr("sys.argv", ["shared", "report", *arguments, "--output", str(tmp_path / "r.html")])
    shared_main()
    said = capsys.readouterr().out
    assert "80 images with" in said
    assert "Most is lost to" in said
    page = Page(tmp_path / "r.html")
    assert sum(tag == "img" for tag, _ in page.tags) > 20
    assert (tmp_path / "r.html").stat().st_size < 5 * 2**20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{here}/none.json", "{here}/r.json"], "none.json"),
        (["{here}/annotations.json", "{here}/none.json"], "none.json cannot be read"),
        (["{here}/annotations.json", "{here}/r.json", "--images", "{here}/none"], "--images: .*none is not a folder"),
        (["{here}/annotations.json", "{here}/r.json", "--resamples", "1"], "--resamples: 1 gives no interval"),
        (["{here}/annotations.json", "{here}/r.json", "--output", "{here}/r.html"], r"r\.json would be replaced"),
        (["{here}/annotations.json", "{here}/r.json", "--output", "{here}/annotations.html"], r"s\.json would be repl"),
        (["{here}/annotations.json", "{here}/r.json", "--output", "{here}/new.json"], r"give it the ending \.html"),
    ],
)
def test_unreadable_input_is_one_line(tmp_path, monkeypatch, arguments, said):
    data_set(tmp_path, [(1, 3, [10, 10, 20, 20])])
    (tmp_path / "r.json").write_text("[]")
    monkeypatch.setattr("sys.argv", ["shared", "report", *(part.format(here=tmp_path) for part in arguments)])
    with pytest.raises(SystemExit, match=said) as ended:
        shared_main()
    assert "\n" not in str(ended.value)
    assert (tmp_path / "r.json").read_text() == "[]"


def test_scores_that_are_no_shares_are_one_line(tmp_path):
    annotations = data_set(tmp_path, [(1, 3, [10, 10, 20, 20])])
    found = from_coco_results([{"image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20], "score": 90}], annotations)
    with pytest.raises(UserError, match="the scores are 90 to 90, and must be 0 to 1"):
        report(annotations, found, tmp_path / "report.html", resamples=0)
    assert evaluate(annotations, found)["bbox_mAP"] == pytest.approx(1)
