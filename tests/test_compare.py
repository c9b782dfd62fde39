"""The comparison of detectors: equal ones are not better, better ones are, whatever their source."""

import json
import math
import shutil

import hotcoco
import numpy as np
import pytest
from PIL import Image

from shared.__main__ import main as shared_main
from shared.data import synthetic
from shared.data.annotations import CocoAnnotations
from shared.errors import UserError
from shared.evaluation.detections import Detections, to_coco_results
from shared.evaluation.evaluator import CocoEvaluator
from shared.evaluation.gathered import save_detections
from shared.report.compare import compare, summary_of


@pytest.fixture
def annotations(shapes):
    return CocoAnnotations.open(shapes / "annotations/val.json")


def found_by(annotations, seed, noise=0.1, missing=0.2):
    """A made-up detector: a part of the truth, with each box moved by a share `noise` of its size."""
    rng = np.random.default_rng(seed)
    found = []
    for record in annotations:
        kept = rng.random(len(record.boxes)) >= missing
        sizes = np.tile(record.boxes[kept, 2:] - record.boxes[kept, :2], 2)
        boxes = record.boxes[kept] + rng.normal(0, noise, (kept.sum(), 4)) * sizes
        found.append(Detections(record.image_id, boxes, rng.beta(4, 2, kept.sum()), record.labels[kept]))
    return found


def test_a_run_against_itself_is_no_better(annotations, tmp_path):
    found = found_by(annotations, 0)
    (comparison,) = compare(annotations, {"one": found, "other": found}, tmp_path / "c.html", resamples=50)
    for difference in comparison.metrics + comparison.categories:
        if not math.isnan(difference.a):
            assert (difference.delta, difference.lower, difference.upper) == (0, 0, 0)
        assert difference.verdict == ""
        assert math.isnan(difference.better)
    assert "other and one are the same" in summary_of(comparison)
    assert 'class="better"' not in (tmp_path / "c.html").read_text()


def test_neither_of_two_seeds_of_one_detector_is_better(tmp_path):
    annotations = CocoAnnotations.from_dict(synthetic.coco_split(seed=3, count=60))
    covered = 0
    for pair in range(10):
        both = {"a": found_by(annotations, 2 * pair), "b": found_by(annotations, 2 * pair + 1)}
        (comparison,) = compare(annotations, both, tmp_path / "c.html", resamples=100)
        covered += comparison.overall.lower <= 0 <= comparison.overall.upper
    assert covered >= 9


def test_a_better_detector_is_reported_overall_by_category_and_by_size(coco_tiny, tmp_path):
    annotations = CocoAnnotations.open(coco_tiny / "annotations/instances_val2017.json")
    both = {"worse": found_by(annotations, 1, 0.15, 0.4), "good": found_by(annotations, 2, 0.05, 0.1)}
    images = coco_tiny / "val2017"
    (comparison,) = compare(annotations, both, tmp_path / "c.html", images=images, resamples=50)
    overall = {difference.name: difference for difference in comparison.metrics}
    for name in ("mAP", "mAP_50", "mAP_s", "mAP_m", "mAP_l"):
        assert overall[name].verdict == "better"
        assert overall[name].better == pytest.approx(1, abs=1e-3)
    person = next(difference for difference in comparison.categories if difference.name == "person")
    assert person.verdict == "better"
    page = (tmp_path / "c.html").read_text()
    assert page.count("data:image/jpeg") == 8
    assert "good is better than worse" in page
    numbers = json.loads((tmp_path / "c.json").read_text())
    assert numbers[0]["metrics"][0]["delta"] == pytest.approx(overall["mAP"].delta)


def test_its_numbers_are_hotcoco_s(annotations, tmp_path):
    a, b = found_by(annotations, 1), found_by(annotations, 2)
    (comparison,) = compare(annotations, {"a": a, "b": b}, tmp_path / "c.html", resamples=50)
    truth = hotcoco.COCO(str(annotations.path))
    evaluations = []
    for found in (a, b):
        results = [result for one in found for result in to_coco_results(one, annotations.category_ids)]
        evaluations.append(hotcoco.COCOeval(truth, truth.load_res(results), "bbox"))
        evaluations[-1].evaluate()
    theirs = hotcoco.compare(*evaluations, n_bootstrap=50, seed=0)
    assert comparison.overall.delta == pytest.approx(theirs["deltas"]["AP"])
    reach = 1.96 * theirs["ci"]["AP"]["std_err"]
    assert comparison.overall.lower == pytest.approx(theirs["deltas"]["AP"] - reach)
    assert comparison.overall.upper == pytest.approx(theirs["deltas"]["AP"] + reach)
    assert comparison.overall.better == pytest.approx(theirs["ci"]["AP"]["prob_positive"], abs=0.05)
    by_name = {row["cat_name"]: row["delta"] for row in theirs["per_category"]}
    assert {one.name: pytest.approx(one.delta) for one in comparison.categories} == by_name


def test_an_interval_holds_its_number_even_for_rare_categories(coco_tiny, tmp_path):
    """80 categories on 80 images. The bootstrap omits false detections of categories that it does not draw."""
    annotations = CocoAnnotations.open(coco_tiny / "annotations/instances_val2017.json")
    both = {"a": found_by(annotations, 1), "b": found_by(annotations, 2)}
    rng = np.random.default_rng(0)
    for found, most in zip(both.values(), (3, 6), strict=True):  # wrong detections, of b more
        for i, one in enumerate(found):
            wrong = [[10 * k, 5, 10 * k + 30, 40] for k in range(rng.integers(most))]
            found[i] = Detections(
                one.image_id,
                [*one.boxes, *wrong],
                [*one.scores, *rng.random(len(wrong))],
                [*one.labels, *rng.integers(80, size=len(wrong))],
            )
    (comparison,) = compare(annotations, both, tmp_path / "c.html", resamples=50)
    numbers = json.loads((tmp_path / "c.json").read_text())[0]
    shown = [*comparison.metrics, *comparison.categories]
    printed = [(row["lower"], row["delta"], row["upper"]) for row in numbers["metrics"] + numbers["categories"]]
    with_interval = [one for one in shown if not math.isnan(one.lower)]
    assert len(with_interval) > 30
    assert [one for one in with_interval if not one.lower <= one.delta <= one.upper] == []
    for one in with_interval:
        assert one.verdict in ("", "better" if one.delta > 0 else "worse")
        assert math.isnan(one.better) or (one.better >= 0.5) == (one.delta >= 0)
    expected = [(one.lower, one.delta, one.upper) for one in with_interval]
    assert [row for row in printed if row[0] is not None] == expected


def test_detections_beyond_the_most_that_count_widen_no_category_s_interval(annotations, tmp_path):
    def found(second_is_right):
        return [
            Detections(
                record.image_id,
                np.concatenate([record.boxes + 1000, record.boxes + (0 if second_is_right else 1000)]),
                np.repeat([0.9, 0.5], len(record.boxes)),
                np.tile(record.labels, 2),
            )
            for record in annotations
        ]

    both = {"a": found(True), "b": found(False)}
    (comparison,) = compare(annotations, both, tmp_path / "c.html", resamples=50, max_detections=1)
    assert {(each.delta, each.lower, each.upper) for each in comparison.categories} == {(0, 0, 0)}


def test_a_category_of_one_image_has_no_interval(tmp_path):
    coco = synthetic.coco_split(seed=3, count=6)
    coco["categories"] = [*coco["categories"], {"id": 9, "name": "rare"}]
    coco["annotations"][0]["category_id"] = 9
    annotations = CocoAnnotations.from_dict(coco)
    both = {"a": found_by(annotations, 1, 0.3, 0), "b": found_by(annotations, 2, 0.01, 0)}
    (comparison,) = compare(annotations, both, tmp_path / "c.html", resamples=20)
    rare = next(one for one in comparison.categories if one.name == "rare")
    assert rare.delta != 0
    assert (math.isnan(rare.lower), rare.verdict) == (True, "")
    assert not math.isnan(comparison.overall.lower)


def test_three_at_once_without_detections_or_objects_give_a_page(annotations, tmp_path):
    three = {"a": found_by(annotations, 1), "b": [], "<b>c</b>": found_by(annotations, 2)}
    comparisons = compare(annotations, three, tmp_path / "c.html", resamples=5)
    assert [(c.a, c.b) for c in comparisons] == [("a", "b"), ("a", "<b>c</b>")]
    assert "<b>c</b>" not in (tmp_path / "c.html").read_text()
    with pytest.raises(UserError, match="fewer than two sets of detections"):
        compare(annotations, {"a": []}, tmp_path / "c.html")


def test_the_command_takes_runs_and_results_files(annotations, shapes, tmp_path, monkeypatch, capsys):
    run, evaluated = tmp_path / "runs/a", tmp_path / "runs/b"
    run.mkdir(parents=True)
    evaluated.mkdir()
    evaluator = CocoEvaluator(annotations)
    evaluator.update(found_by(annotations, 1)[:8])  # of the images that its validation counts
    evaluator.skip(annotations.image_ids[8:].tolist())
    evaluator.compute()
    save_detections(run / "detections.npz", evaluator.found, annotations.category_names)
    rows = [row for one in found_by(annotations, 2) for row in to_coco_results(one, annotations.category_ids)]
    (evaluated / "results.json").write_text(json.dumps(rows))
    shutil.copy(evaluated / "results.json", tmp_path / "other_tool.json")
    arguments = [run, evaluated, tmp_path / "other_tool.json", "--annotations", annotations.path]
    arguments += ["--images", shapes / "val", "--resamples", 5, "--output", tmp_path / "c.html"]
    monkeypatch.setattr("sys.argv", ["shared", "compare", *map(str, arguments)])
    shared_main()
    said = capsys.readouterr().out
    assert "b and a is better: mAP of boxes" in said or "b is above in" in said
    assert "other_tool" in said
    assert "<td>8</td>" in (tmp_path / "c.html").read_text()

    for wrong, message in (
        ([tmp_path, run], "has neither detections.npz"),
        ([run], "fewer than two sets of detections"),
        ([run, tmp_path / "none.json"], "none.json cannot be read"),
    ):
        monkeypatch.setattr("sys.argv", ["shared", "compare", *map(str, wrong), "--annotations", str(annotations.path)])
        with pytest.raises(SystemExit, match=message):
            shared_main()


def test_the_page_does_not_replace_what_is_compared(annotations, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text("[]")
    both = [str(tmp_path / "a"), str(tmp_path / "b/results.json"), "--annotations", str(annotations.path)]
    for output, message in (
        ("a/results.html", r"a/results\.json would be replaced, and is an input"),
        ("b/results.html", r"b/results\.json would be replaced, and is an input"),
        ("b/results.json", r"give it the ending \.html"),
    ):
        monkeypatch.setattr("sys.argv", ["shared", "compare", *both, "--output", str(tmp_path / output)])
        with pytest.raises(SystemExit, match=message):
            shared_main()
    assert (tmp_path / "a/results.json").read_text() == (tmp_path / "b/results.json").read_text() == "[]"


def test_no_picture_from_outside_of_the_images_folder(tmp_path):
    Image.new("RGB", (100, 80)).save(tmp_path / "private.png")
    coco = synthetic.coco_split(seed=3, count=4)
    coco["images"][1]["file_name"] = "../private.png"
    annotations = CocoAnnotations.from_dict(coco)
    (tmp_path / "images").mkdir()
    both = {"a": found_by(annotations, 1), "b": found_by(annotations, 2)}
    with pytest.raises(UserError, match=r"the image file name '\.\./private\.png' leads out of the images' folder"):
        compare(annotations, both, tmp_path / "c.html", images=tmp_path / "images", resamples=0)
    assert not (tmp_path / "c.html").exists()


def test_a_run_on_other_categories_is_refused(annotations, tmp_path, monkeypatch):
    evaluator = CocoEvaluator(annotations)
    evaluator.update(found_by(annotations, 1))
    evaluator.compute()
    save_detections(tmp_path / "detections.npz", evaluator.found, ["a", "b", "c"])
    both = [str(tmp_path), str(tmp_path), "--annotations", str(annotations.path)]
    monkeypatch.setattr("sys.argv", ["shared", "compare", *both])
    with pytest.raises(SystemExit, match=r"has detections of the categories \['a', 'b', 'c'\]"):
        shared_main()


def test_runs_on_category_subsets_are_compared_by_the_common_ones(annotations, tmp_path, monkeypatch, capsys):
    for name, categories in (("all", ["circle", "rectangle", "triangle"]), ("some", ["triangle", "rectangle"])):
        own = annotations.select_categories(categories)
        evaluator = CocoEvaluator(own)
        evaluator.update(found_by(own, 1, noise=0, missing=0))
        evaluator.compute()
        (tmp_path / name).mkdir()
        save_detections(tmp_path / name / "detections.npz", evaluator.found, own.category_names)
    arguments = [str(tmp_path / "all"), str(tmp_path / "some"), "--annotations", str(annotations.path)]
    arguments += ["--output", str(tmp_path / "c.html"), "--resamples", "0"]
    monkeypatch.setattr("sys.argv", ["shared", "compare", *arguments])
    shared_main()
    assert "compared by the categories that all have: rectangle, triangle" in capsys.readouterr().out
    (comparison,) = json.loads((tmp_path / "c.json").read_text())
    both = {row["name"]: (row["a"], row["b"]) for row in comparison["categories"]}
    assert both == {"rectangle": (pytest.approx(1), pytest.approx(1)), "triangle": (pytest.approx(1), pytest.approx(1))}


def test_masks_are_compared_where_all_have_them(annotations, tmp_path):
    mask = hotcoco.mask.encode(np.asfortranarray(np.ones((128, 128), np.uint8)))
    first = int(annotations.image_ids[0])
    with_masks = [Detections(first, [[0, 0, 128, 128]], [0.9], [0], masks=[mask])]
    without = [Detections(first, [[0, 0, 128, 128]], [0.9], [0])]
    both = compare(annotations, {"a": with_masks, "b": with_masks}, tmp_path / "c.html", resamples=5)
    assert [comparison.iou_type for comparison in both] == ["bbox", "segm"]
    one = compare(annotations, {"a": with_masks, "b": without}, tmp_path / "c.html", resamples=5)
    assert [comparison.iou_type for comparison in one] == ["bbox"]


def test_a_size_of_image_that_is_not_there_draws_nothing(annotations, tmp_path):
    Image.new("RGB", (5, 5)).save(tmp_path / annotations.file_name(0))
    both = {"a": found_by(annotations, 1), "b": found_by(annotations, 2)}
    compare(annotations, both, tmp_path / "c.html", images=tmp_path, resamples=0)
    assert "data:image" not in (tmp_path / "c.html").read_text()


def test_runs_are_compared_by_the_detections_that_they_scored(annotations, tmp_path, monkeypatch):
    evaluator = CocoEvaluator(annotations, max_detections=1)
    evaluator.update(found_by(annotations, 1, noise=0, missing=0))
    mean = evaluator.compute()["bbox_mAP"]
    for name, most in (("a", 1), ("b", 1), ("c", None)):
        (tmp_path / name).mkdir()
        found = evaluator.found
        save_detections(tmp_path / name / "detections.npz", found, annotations.category_names, most)
    options = ["--annotations", str(annotations.path), "--output", str(tmp_path / "c.html"), "--resamples", "0"]
    monkeypatch.setattr("sys.argv", ["shared", "compare", str(tmp_path / "a"), str(tmp_path / "b"), *options])
    shared_main()
    (comparison,) = json.loads((tmp_path / "c.json").read_text())
    overall = next(row for row in comparison["metrics"] if row["name"] == "mAP")
    assert overall["a"] == overall["b"] == pytest.approx(mean)
    monkeypatch.setattr("sys.argv", ["shared", "compare", str(tmp_path / "a"), str(tmp_path / "c"), *options])
    with pytest.raises(SystemExit, match=r"different numbers of detections .*c: the default.* Fix: pass --max-"):
        shared_main()
