"""The comparison of detectors: what is the same is no better, what is better is said to be, whatever it is made of."""

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
    """A made-up detector: the truth, some of it, each box off by a share `noise` of its size."""
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


def test_of_two_seeds_of_one_detector_neither_is_said_to_be_better(tmp_path):
    annotations = CocoAnnotations.from_dict(synthetic.coco_split(seed=3, count=60))
    covered = 0
    for pair in range(10):
        both = {"a": found_by(annotations, 2 * pair), "b": found_by(annotations, 2 * pair + 1)}
        (comparison,) = compare(annotations, both, tmp_path / "c.html", resamples=100)
        covered += comparison.overall.lower <= 0 <= comparison.overall.upper
    assert covered >= 9


def test_a_better_detector_is_said_to_be_overall_by_category_and_by_size(coco_tiny, tmp_path):
    annotations = CocoAnnotations.open(coco_tiny / "annotations/instances_val2017.json")
    both = {"worse": found_by(annotations, 1, 0.15, 0.4), "good": found_by(annotations, 2, 0.05, 0.1)}
    images = coco_tiny / "val2017"
    (comparison,) = compare(annotations, both, tmp_path / "c.html", images=images, resamples=50)
    overall = {difference.name: difference for difference in comparison.metrics}
    for name in ("mAP", "mAP_50", "mAP_s", "mAP_m", "mAP_l"):
        assert overall[name].verdict == "better"
        assert overall[name].better == 1
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
    assert comparison.overall.lower == pytest.approx(theirs["ci"]["AP"]["lower"])
    assert comparison.overall.upper == pytest.approx(theirs["ci"]["AP"]["upper"])
    assert comparison.overall.better == theirs["ci"]["AP"]["prob_positive"]
    by_name = {row["cat_name"]: row["delta"] for row in theirs["per_category"]}
    assert {one.name: pytest.approx(one.delta) for one in comparison.categories} == by_name


def test_three_at_once_without_detections_or_objects_give_a_page(annotations, tmp_path):
    three = {"a": found_by(annotations, 1), "b": [], "<b>c</b>": found_by(annotations, 2)}
    comparisons = compare(annotations, three, tmp_path / "c.html", resamples=5)
    assert [(c.a, c.b) for c in comparisons] == [("a", "b"), ("a", "<b>c</b>")]
    assert "<b>c</b>" not in (tmp_path / "c.html").read_text()
    with pytest.raises(UserError, match="two sets of detections, or more"):
        compare(annotations, {"a": []}, tmp_path / "c.html")


def test_the_command_takes_runs_and_results_files(annotations, shapes, tmp_path, monkeypatch, capsys):
    run, evaluated = tmp_path / "runs/a", tmp_path / "runs/b"
    run.mkdir(parents=True)
    evaluated.mkdir()
    evaluator = CocoEvaluator(annotations)
    evaluator.update(found_by(annotations, 1)[:8])  # of the images that its validation counts
    evaluator.skip(annotations.image_ids[8:].tolist())
    evaluator.compute()
    save_detections(run / "detections.npz", evaluator.found_by_id(), annotations.category_names)
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
        ([run], "two sets of detections, or more"),
        ([run, tmp_path / "none.json"], "none.json cannot be read"),
    ):
        monkeypatch.setattr("sys.argv", ["shared", "compare", *map(str, wrong), "--annotations", str(annotations.path)])
        with pytest.raises(SystemExit, match=message):
            shared_main()


def test_a_run_on_other_categories_is_refused(annotations, tmp_path, monkeypatch):
    evaluator = CocoEvaluator(annotations)
    evaluator.update(found_by(annotations, 1))
    evaluator.compute()
    save_detections(tmp_path / "detections.npz", evaluator.found_by_id(), ["a", "b", "c"])
    both = [str(tmp_path), str(tmp_path), "--annotations", str(annotations.path)]
    monkeypatch.setattr("sys.argv", ["shared", "compare", *both])
    with pytest.raises(SystemExit, match=r"has detections of the categories \['a', 'b', 'c'\]"):
        shared_main()


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
