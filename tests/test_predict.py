"""`predict` on all kinds of inputs, and `evaluate` of a results.json, with a detector of constant detections."""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import run_command
from PIL import Image
from stores import BUCKET, http_store, s3_store

from shared.commands import detection
from shared.commands.detection import score_limits
from shared.commands.evaluate import evaluate as evaluate_command
from shared.commands.predict import predict as predict_command
from shared.commands.predict_inputs import _find
from shared.config.schema import TrainingHyperparameters
from shared.data.annotations import CocoAnnotations
from shared.data.dataset import CocoDetection
from shared.data.loading import Batch
from shared.errors import UserError
from shared.evaluation.detections import Detections, to_coco_results
from shared.evaluation.evaluator import evaluate
from shared.training.trial import DetectionTrial

SEARCHER = {"metric": "bbox_mAP", "max_length": {"batches": 1}}


@dataclass
class Hyperparameters(TrainingHyperparameters):
    global_batch_size: int = 2


class FindsTwo(DetectionTrial):
    """A detector that finds a square of score 0.9 and one of 0.1 on every image."""

    hyperparameters_class = Hyperparameters
    pretrained_categories = ({"id": 7, "name": "square"},)
    interrupted_after = None

    def check_pretrained(self):
        self.batches = 0

    def build_model(self):
        return torch.nn.Linear(1, 1)

    def evaluation_dataset(self, data):
        return CocoDetection(
            data.annotations, data.images, lambda _, record: record.image_id, 0, False, self.bad_images
        )

    def collate(self, training):
        return lambda ids: Batch(torch.zeros(len(ids)), None, ids)

    def detect(self, model, batch):
        self.batches += 1
        if self.batches == self.interrupted_after:
            raise KeyboardInterrupt
        return [Detections(i, [[4, 4, 20, 20], [1, 1, 3, 3]], [0.9, 0.1], [0, 0]) for i in batch.image_ids]


for abstract in ("training_dataset", "build_optimizer", "losses"):
    setattr(FindsTwo, abstract, None)
FindsTwo.__abstractmethods__ = frozenset()


@pytest.fixture
def predict(tmp_path, monkeypatch):
    """Predicts in this process. Returns results.json by file name."""
    monkeypatch.chdir(tmp_path)

    def call(
        *images,
        output="out",
        trial_class=FindsTwo,
        picture_format="png",
        min_score=0.3,
        checkpoint=None,
        track=False,
        **data,
    ):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"data": {"workers": 0, **data}, "searcher": SEARCHER}))
        outputs = {"output": tmp_path / output, "format": picture_format, "min_score": min_score, "track": track}
        run_command(predict_command, trial_class, path, checkpoint=checkpoint, images=[*map(str, images)], **outputs)
        return json.loads((tmp_path / output / "results.json").read_text())

    return call


def image(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "gray").save(path)
    return path


def names(results):
    return sorted({result["file_name"] for result in results})


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_folder_files_and_a_glob_together_each_image_once(predict, tmp_path, capsys, caplog):
    image(tmp_path / "in/b.jpg")
    image(tmp_path / "in/sub/a.PNG")
    (tmp_path / "in/notes.txt").write_text("no image")
    (tmp_path / "in/broken.png").write_bytes(b"no image")
    image(tmp_path / "x/b.jpg")
    image(tmp_path / "x[1].png")
    results = predict("in", "in/b.jpg", "x/*.jpg", "x[1].png")
    assert names(results) == ["in/b.jpg", "sub/a.PNG", "x/b.jpg", "x[1].png"]
    assert files(tmp_path / "out") == ["in/b.jpg.png", "results.json", "sub/a.PNG.png", "x/b.jpg.png", "x[1].png.png"]
    assert [r["image_id"] for r in results] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert results[0]["category_id"] == 7
    assert "broken.png is skipped: it is not an image" in caplog.text
    said = capsys.readouterr().out
    assert "8 detections on 4 images in" in said
    assert "the 4 of at least 0.3 are drawn" in said
    assert "ms per image" in said


def clip(path, levels=(0, 200), size=(64, 48)):
    """A video of gray frames, as bytes."""
    cv2 = pytest.importorskip("cv2")
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = cv2.VideoWriter_fourcc(*("mp4v" if path.suffix == ".mp4" else "MJPG"))
    writer = cv2.VideoWriter(str(path), codec, 12.5, size)
    for level in levels:
        writer.write(np.full((size[1], size[0], 3), level, np.uint8))
    writer.release()
    return path.read_bytes()


def test_a_video_in_a_folder_further_up_is_not_overwritten(predict, tmp_path, monkeypatch):
    own, other = clip(tmp_path / "work/clips/a.mp4"), clip(tmp_path / "clips/a.mp4", (50, 100))
    (tmp_path / "work/link").symlink_to(tmp_path / "clips")
    monkeypatch.chdir(tmp_path / "work")
    results = predict("clips", "../clips", "clips/../../clips/a.mp4", "link/../clips", output="work/out")
    assert (tmp_path / "work/clips/a.mp4").read_bytes() == own
    assert (tmp_path / "clips/a.mp4").read_bytes() == other
    assert names(results) == sorted(name for name in files(tmp_path / "work/out") if name != "results.json")
    assert len(names(results)) == 2
    assert files(tmp_path) == sorted(["clips/a.mp4", "config.yaml", "work/clips/a.mp4"] + [
        f"work/out/{name}" for name in [*names(results), "results.json"]
    ])  # fmt: skip


@pytest.mark.parametrize("given", [["in"], ["in/../in"], ["in/a.png", "in"], ["in", "in/../in/a.png", "link"]])
def test_a_file_that_is_named_in_several_ways_counts_once(predict, tmp_path, given):
    image(tmp_path / "in/a.png")
    (tmp_path / "link").symlink_to("in")
    assert names(predict(*given)) == ["a.png"]
    assert files(tmp_path / "out") == ["a.png.png", "results.json"]


def test_names_that_differ_only_in_case_or_accents_stay_apart(predict, tmp_path):
    """On the disks of macOS and Windows they are the same name."""
    given = ["one/A.png", "two/a.png", "one/caf\u00e9.png", "two/cafe\u0301.png"]
    for name in given:
        image(tmp_path / name)
    results = predict("one", "two")
    drawn = files(tmp_path / "out")
    assert len(names(results)) == 4
    assert len({name.lower().replace("e\u0301", "\u00e9") for name in drawn}) == 5


def test_no_picture_takes_the_place_of_a_folder_or_of_the_results(predict, tmp_path):
    """The picture of "a.png" would be "a.png.png", which is a folder here."""
    image(tmp_path / "in/a.png")
    image(tmp_path / "in/a.png.png/b.png")
    image(tmp_path / "other/results.json/c.png")
    clip(tmp_path / "in/clip.avi")
    clip(tmp_path / "in/clip.avi.mp4")
    results = predict("in", "other")
    assert len(names(results)) == 5
    assert len(files(tmp_path / "out")) == 6
    before = {result["file_name"]: result["image_id"] for result in results}
    assert {result["file_name"]: result["image_id"] for result in predict("in", "other", output="again")} == before


def test_a_url_s_name_leads_out_of_no_folder(predict, tmp_path):
    image(tmp_path / "store/x.png")
    image(tmp_path / "store/in/x.png")
    victim = image(tmp_path / "x.png").read_bytes()
    with http_store(tmp_path / "store") as url:
        results = predict(f"{url}/in/%2e%2e%2fx.png", f"{url}/in/x.png", output="deep/out")
    assert len(names(results)) == 2
    assert not any(".." in name or name.startswith("/") for name in names(results))
    assert (tmp_path / "x.png").read_bytes() == victim
    assert [name for name in files(tmp_path) if not name.startswith(("store/", "deep/out/"))] == [
        "config.yaml",
        "x.png",
    ]


def test_images_of_a_web_server_leave_no_copies_in_the_cache(predict, tmp_path):
    image(tmp_path / "store/a.png")
    with http_store(tmp_path / "store") as url:
        predict(f"{url}/a.png", cache_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "cache/images").exists()


def test_pictures_of_an_earlier_predict_are_no_input(predict, tmp_path, caplog):
    image(tmp_path / "in/a.jpg")
    predict("in", output="in/first")
    shutil.copy(tmp_path / "in/first/a.jpg.png", tmp_path / "in/moved.png")
    caplog.set_level("INFO")
    assert names(predict("in", output="in/second")) == ["a.jpg"]
    assert "in/first, which holds the results.json" in caplog.text
    assert "1 pictures that an earlier run drew" in caplog.text
    before = files(tmp_path)
    for output in ("in/first", "in"):
        with pytest.raises(UserError, match="is not empty"):
            predict("in", output=output)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "--images: nowhere does not exist"),
        ("*.tif", "no file matches '\\*.tif'"),
        ("empty", "none of the 0 files"),
        ("a.txt", "--images: .*a.txt: it is not an image"),
        ("https://example.org/pictures", "a web server has no list of its files"),
        ("broken.mp4", "--images: .*broken.mp4.* cannot be read as a video"),
        ("pipe.png", "--images: .*pipe.png: it is not a regular file"),
        ("pipe.mp4", "--images: .*pipe.mp4: it is not a regular file"),
    ],
)
def test_predicting_on_unusable_input_is_one_line_and_leaves_nothing(predict, tmp_path, given, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for pipe in ("pipe.png", "pipe.mp4"):
        os.mkfifo(tmp_path / pipe)
    with pytest.raises(UserError, match=message):
        predict(given)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_prediction_keeps_and_counts_its_results(predict, tmp_path, capsys):
    for i in range(6):
        image(tmp_path / f"in/{i}.png")
    with pytest.raises(SystemExit) as ended:
        predict("in", trial_class=type("Stopped", (FindsTwo,), {"interrupted_after": 3}))
    assert ended.value.code == 130
    assert "stopped: 4 of 6 images are done" in capsys.readouterr().err
    assert names(json.loads((tmp_path / "out/results.json").read_text())) == ["0.png", "1.png", "2.png", "3.png"]


def test_the_threshold_of_the_run_s_report_is_drawn_with(predict, tmp_path, monkeypatch, capsys):
    image(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"--min-score best: .* is of no run with a report\. Fix: give a number"):
        predict("a.png", min_score="best")
    path = tmp_path / "run/checkpoints/best"
    fields = {"path": path, "hparams": {}, "categories": None, "weights": None}
    checkpoint = dataclasses.make_dataclass("Checkpoint", fields)(**fields)
    (tmp_path / "run").mkdir()
    per_category = [{"name": "square", "threshold": 0.5}, {"name": "circle", "threshold": None}]
    report = {"best_threshold": 0.05, "bbox": {"categories": per_category}}
    (tmp_path / "run/report.json").write_text(json.dumps(report))
    monkeypatch.setattr(detection, "find_checkpoint", Path)
    monkeypatch.setattr(detection, "read_checkpoint", lambda _: checkpoint)
    monkeypatch.setattr(detection, "load_weights", lambda *_: None)
    monkeypatch.setattr(FindsTwo, "batches", 0, raising=False)
    predict("a.png", min_score="best", checkpoint=str(path))
    assert "the 2 of at least 0.05 are drawn" in capsys.readouterr().out
    predict("a.png", min_score="best-per-category", checkpoint=str(path), output="each")
    assert "the 1 of at least their category's best score are drawn" in capsys.readouterr().out
    categories = [{"name": "square"}, {"name": "circle"}]
    scores, _ = score_limits("best-per-category", categories, path)
    assert scores.tolist() == [0.5, 0.05]


def test_an_image_that_cannot_be_decoded_is_skipped(predict, tmp_path, caplog):
    image(tmp_path / "in/a.jpg")
    cut = image(tmp_path / "in/b.jpg", (400, 300))
    cut.write_bytes(cut.read_bytes()[:700])
    assert names(predict("in", output="pdf", picture_format="pdf")) == ["a.jpg"]
    assert files(tmp_path / "pdf") == ["a.jpg.pdf", "results.json"]
    assert "1 of 2 images" in caplog.text
    with pytest.raises(UserError, match="none of the images"):
        predict("in/b.jpg")


def test_image_ids_are_those_of_the_data_set(predict, shapes):
    val = {"annotations": str(shapes / "annotations/val.json"), "images": str(shapes / "val")}
    assert {r["image_id"] for r in predict(shapes / "val", val=val)} == set(range(1, 11))


def test_images_of_a_web_server_and_of_a_bucket(predict, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    for name in ("a.jpg", "two words.png"):
        image(tmp_path / "store" / name)
    with http_store(tmp_path / "store") as url, s3_store(tmp_path / "store") as endpoint:
        given = (f"{url}/two%20words.png", f"s3://{BUCKET}")
        results = predict(*given, "store/a.jpg", endpoint_url=endpoint)
        with pytest.raises(UserError, match=r"gone\.png"):
            predict(f"{url}/gone.png", output="other")
    assert len(names(results)) == 4
    assert (tmp_path / "out" / f"{results[0]['file_name']}.png").is_file()


def test_a_video_comes_out_with_the_same_frames(predict, tmp_path):
    cv2, size = pytest.importorskip("cv2"), (64, 48)
    clip(tmp_path / "clip.avi", range(0, 250, 50), size)
    image(tmp_path / "a.png")
    results = predict("clip.avi", "a.png")
    of_clip = [r for r in results if r["file_name"] == "clip.avi"]
    assert [r["frame"] for r in of_clip] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert "frame" not in results[-1]
    drawn = cv2.VideoCapture(str(tmp_path / "out/clip.avi.mp4"))
    assert drawn.get(cv2.CAP_PROP_FPS) == 12.5
    for level in range(0, 250, 50):
        there, pixels = drawn.read()
        assert there
        assert pixels.shape == (size[1], size[0], 3)
        assert abs(int(pixels[40, 50].mean()) - level) < 12
    assert not drawn.read()[0]


def test_a_video_is_decoded_once_and_detected_in_batches(predict, tmp_path, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    clip(tmp_path / "clip.avi", range(0, 250, 10))
    reads, batches, real = [], [], cv2.VideoCapture

    class Counting:
        def __init__(self, path):
            self.real = real(path)

        def read(self):
            reads.append(1)
            return self.real.read()

        def __getattr__(self, name):
            return getattr(self.real, name)

    class Noting(FindsTwo):
        def detect(self, model, batch):
            batches.append(len(batch))
            return super().detect(model, batch)

    monkeypatch.setattr(cv2, "VideoCapture", Counting)
    results = predict("clip.avi", trial_class=Noting)
    assert [result["frame"] for result in results[::2]] == list(range(25))
    assert len(reads) <= 25 + 3  # a look at the first frame, and the end
    assert set(batches[:-1]) == {2}


def test_tracked_objects_keep_their_number_from_frame_to_frame(predict, tmp_path):
    pytest.importorskip("trackers")
    clip(tmp_path / "clip.avi", range(0, 250, 50))
    results = predict("clip.avi", track=True, min_score=0.5)
    sure = [result.get("track_id") for result in results if result["score"] > 0.5]
    assert len(set(sure[1:])) == 1
    assert sure[-1] is not None
    assert not any("track_id" in result for result in results if result["score"] < 0.5)
    image(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"--track: it follows objects in videos, and --images has none"):
        predict("a.png", track=True, output="other")


def test_track_without_its_package_says_what_to_install(predict, tmp_path, monkeypatch):
    clip(tmp_path / "clip.avi")
    monkeypatch.setitem(__import__("sys").modules, "trackers", None)
    with pytest.raises(UserError, match=r"--track: it needs the package trackers .*Fix: pip install trackers"):
        predict("clip.avi", track=True)
    assert files(tmp_path / "out") == []


def test_frames_and_images_are_numbered_together_in_the_order_given(predict, tmp_path):
    image(tmp_path / "a.png")
    clip(tmp_path / "b.avi", (0, 100, 200))
    image(tmp_path / "c.png")
    results = predict("a.png", "b.avi", "c.png")
    seen = {(result["image_id"], result["file_name"], result.get("frame")) for result in results}
    assert sorted(seen) == [(0, "a.png", None), (1, "b.avi", 0), (2, "b.avi", 1), (3, "b.avi", 2), (4, "c.png", None)]


def test_without_opencv_a_video_says_what_to_install(predict, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="pip install opencv-python-headless"):
        predict("clip.mp4")


@pytest.fixture
def score(shapes, tmp_path):
    """`evaluate --results` of a file with this content. Returns metrics.json."""

    def call(written, checkpoint=None, report=None):
        config, results, out = tmp_path / "config.yaml", tmp_path / "results.json", tmp_path / "scored"
        val = {"annotations": str(shapes / "annotations/val.json"), "images": str(shapes / "val")}
        config.write_text(yaml.safe_dump({"data": {"val": val}}))
        text = written if isinstance(written, (str, bytes)) else json.dumps(written)
        results.write_bytes(text.encode() if isinstance(text, str) else text)
        arguments = {"checkpoint": checkpoint, "results": results, "output": out, "report": report, "min_score": "best"}
        run_command(evaluate_command, FindsTwo, config, **arguments)
        return json.loads((out / "metrics.json").read_text())

    return call


def test_a_results_file_is_scored_without_a_model(score, shapes, capsys):
    annotations = CocoAnnotations.open(shapes / "annotations/val.json")
    found = [Detections(r.image_id, r.boxes + 1, np.linspace(0.5, 1, len(r.boxes)), r.labels) for r in annotations]
    results = [result for each in found for result in to_coco_results(each, annotations.category_ids)]
    expected = {name: None if value != value else value for name, value in evaluate(annotations, found).items()}
    assert score(results) == pytest.approx(expected)
    assert "AP/circle" in capsys.readouterr().out
    masks = [
        {"image_id": r.image_id, "category_id": r.labels[i].item() + 1, "score": 0.5, "segmentation": segmentation}
        for r in annotations
        for i, segmentation in enumerate(r.segmentations)
        if not r.iscrowd[i]
    ]
    assert score(masks)["segm_mAP"] > 0.99
    with pytest.raises(UserError, match="it scores a file, and no model"):
        score(results, checkpoint="runs/a")


def test_evaluate_says_the_best_threshold_and_reports(score, shapes, tmp_path, capsys):
    annotations = CocoAnnotations.open(shapes / "annotations/val.json")
    found = [Detections(r.image_id, r.boxes, np.full(len(r.boxes), 0.7), r.labels) for r in annotations]
    found += [Detections(found[0].image_id, [[0, 0, 3, 3], [4, 4, 6, 6]], [0.4, 0.8], [0, 0])]
    results = [result for each in found for result in to_coco_results(each, annotations.category_ids)]
    score(results)
    assert "F1 is greatest, 0.9" in capsys.readouterr().out
    score(results, report=tmp_path / "report")
    numbers = json.loads((tmp_path / "report/report.json").read_text())
    assert numbers["best_threshold"] == pytest.approx(0.7)
    assert "data:image/jpeg" in (tmp_path / "report/report.html").read_text()


def test_a_results_file_is_scored_on_data_beside_the_yaml_file(shapes, tmp_path, monkeypatch):
    val = {"annotations": "annotations/val.json", "images": "val"}
    config = shapes / "beside.yaml"
    config.write_text(yaml.safe_dump({"data": {"val": val}}))
    (tmp_path / "results.json").write_text("[]")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    arguments = {"checkpoint": None, "results": tmp_path / "results.json", "output": tmp_path / "scored"}
    run_command(evaluate_command, FindsTwo, config, report=None, min_score="best", **arguments)
    assert json.loads((tmp_path / "scored/metrics.json").read_text())["bbox_mAP"] == 0


def test_split_test_scores_the_test_data(shapes, tmp_path, capsys):
    annotations = CocoAnnotations.open(shapes / "annotations/val.json")
    found = [Detections(r.image_id, r.boxes, np.ones(len(r.boxes)), r.labels) for r in annotations]
    written = [result for d in found for result in to_coco_results(d, annotations.category_ids)]
    (tmp_path / "results.json").write_text(json.dumps(written))
    splits = {
        name: {"annotations": str(shapes / f"annotations/{name}.json"), "images": "x"} for name in ("train", "val")
    }
    config = tmp_path / "config.yaml"
    arguments = {"checkpoint": None, "results": tmp_path / "results.json", "output": tmp_path / "scored"}
    arguments |= {"report": None, "split": "test"}

    config.write_text(yaml.safe_dump({"data": {"val": splits["train"], "test": splits["val"]}}))
    run_command(evaluate_command, FindsTwo, config, **arguments)
    assert json.loads((tmp_path / "scored/metrics.json").read_text())["bbox_mAP"] > 0.99

    config.write_text(yaml.safe_dump({"data": {"val": splits["val"]}}))
    with pytest.raises(UserError, match=r"data\.test is missing\. Fix: give its `annotations`"):
        run_command(evaluate_command, FindsTwo, config, **arguments)
    config.write_text(yaml.safe_dump({"data": {"test": {"annotations": "none.json", "images": "x"}}}))
    with pytest.raises(UserError, match=r"data\.test\.annotations: "):
        run_command(evaluate_command, FindsTwo, config, **arguments)


def test_evaluate_does_not_replace_what_it_scores(score, tmp_path):
    (tmp_path / "scored").mkdir()
    (tmp_path / "scored/metrics.json").write_text("[]")
    (tmp_path / "results.json").symlink_to("scored/metrics.json")
    with pytest.raises(UserError, match=r"--output: .*scored/metrics\.json would be replaced, and is an input"):
        score([])
    assert (tmp_path / "scored/metrics.json").read_text() == "[]"
    (tmp_path / "results.json").unlink()
    assert "bbox_mAP" in score([])


RESULT = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            [RESULT, {**RESULT, "image_id": 99}],
            "result 1: no image of .*val.json has the id 99. This holds for 1 of the results' 2",
        ),
        (
            [{**RESULT, "category_id": 9}],
            "result 0, of image 1: no category has the id 9; the annotations have 1, 2, 3",
        ),
        (
            [RESULT, {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
            "result 1: .*missing required field `score`",
        ),
        ([{**RESULT, "image_id": "one"}], "result 0: 'one' is not the name of one image of .*val.json"),
        ([{**RESULT, "bbox": [1, 2, 3]}], "result 0, of image 1: `bbox` \\[1.*4 numbers"),
        ([{"image_id": 1, "category_id": 1, "score": 1}], "`bbox` is missing"),
        (
            [{**RESULT, "segmentation": {"size": [1, 1], "counts": "04"}}],
            "RLE of the size \\[1, 1\\], and the image's is \\[128",
        ),
        ([{**RESULT, "file_name": "a.png"}], "its file is a.png, and the annotations' image of this id is 000000.png"),
        ({"images": [], "annotations": []}, "is not a list of results but an object, like an annotation file"),
        ("[{", "is not JSON"),
        ([{**RESULT, "image_id": 2**64}], f"results.json: the image_id {2**64} does not fit in 64 bits"),
        ([{**RESULT, "image_id": -(2**63) - 1}], f"results.json: the image_id {-(2**63) - 1} does not fit in 64 bits"),
        ([{**RESULT, "category_id": 2**64}], f"result 0, of image 1: no category has the id {2**64}"),
        ([{**RESULT, "score": float("nan")}], "results.json has the number NaN"),
        ([{**RESULT, "bbox": [1, 2, float("-inf"), 4]}], "results.json has the number -Infinity"),
        (json.dumps([RESULT]).replace("0.5", "1e400"), "results.json has the number 1e400"),
        ([{**RESULT, "bbox": [1, 2, 1e300, 4]}], "result 0, of image 1: `bbox` .*1e\\+300.* all finite"),
        ([{**RESULT, "score": 1e300}], "result 0, of image 1: .*`score` 1e\\+300"),
        ([{**RESULT, "keypoints": [1, 1e300, 2]}], "result 0, of image 1: `keypoints` .*1e\\+300"),
        ('[{"segmentation": ' + "[" * 100_000, "its lists are nested too deep"),
        (json.dumps([RESULT]).encode("utf-16"), "is in UTF-16"),
        ('[{"file_name": "ü"}]'.encode("latin-1"), "is not JSON: it is not in UTF-8"),
    ],
)
def test_a_results_file_that_is_wrong_is_one_line(score, written, message):
    with pytest.raises(UserError, match=message) as error:
        score(written)
    assert "\n" not in str(error.value)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    image(tmp_path / "a.png")
    assert [name for _, name in _find("~/a.png", None)] == ["a.png"]


def cut(path):
    path.write_bytes(path.read_bytes()[:700] if path.suffix == ".jpg" else b"")
    return path


def test_an_image_without_another_of_its_shape_is_skipped(predict, tmp_path, caplog):
    cut(image(tmp_path / "in/tall.jpg", (300, 400)))
    image(tmp_path / "in/wide.png")
    assert names(predict("in")) == ["wide.png"]
    assert "tall.jpg" in caplog.text
    assert "skipped: 1 of 2 images" in caplog.text


@pytest.mark.parametrize(("broken", "mean"), [(["tall.png"], 1.0), (["tall.png", "wide.png"], None)])
def test_an_evaluation_omits_images_that_cannot_be_read(tmp_path, monkeypatch, broken, mean):
    monkeypatch.chdir(tmp_path)
    image(tmp_path / "in/tall.png", (30, 40))
    image(tmp_path / "in/wide.png")
    for name in broken:
        cut(tmp_path / "in" / name)
    Path("val.json").write_text(json.dumps(two_images()))
    val = {"annotations": "val.json", "images": "in"}
    data = {"workers": 0, "val": val, "on_bad_image": "skip", "check_images": False}
    Path("config.yaml").write_text(yaml.safe_dump({"data": data, "searcher": SEARCHER}))

    def run():
        outputs = {"output": Path("out"), "report": None, "results": None}
        run_command(evaluate_command, FindsTwo, Path("config.yaml"), checkpoint=None, **outputs)
        return json.loads(Path("out/metrics.json").read_text())

    if mean is None:
        with pytest.raises(UserError, match=r"data\.val\.images: no image can be read"):
            run()
    else:
        metrics = run()
        assert metrics["skipped_images"] == 1
        assert metrics["bbox_mAP"] == pytest.approx(mean)


def two_images():
    """A square of 16 pixels on a tall and on a wide image."""
    sizes = {"tall.png": (30, 40), "wide.png": (40, 30)}
    images = [{"id": i, "file_name": n, "width": w, "height": h} for i, (n, (w, h)) in enumerate(sizes.items(), 1)]
    square = {"category_id": 7, "bbox": [4, 4, 16, 16], "area": 256, "iscrowd": 0}
    annotations = [{"id": i, "image_id": i, **square} for i in (1, 2)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "square"}]}
