"""`export`: the file detects like its checkpoint; `evaluate` and `predict` accept it."""

import hashlib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import run_command
from PIL import Image
from tiny_models import efficientdet_config

pytest.importorskip("onnxruntime", reason="export needs the packages of `pip install '.[export]'`")
pytest.importorskip("onnxscript", reason="export needs the packages of `pip install '.[export]'`")
import torch

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
    pytest.skip("export needs torch 2.6", allow_module_level=True)

EXPORT = {
    "format": "onnx",
    "images": None,
    "tolerance": None,
    "precision": "float32",
    "raw": False,
    "checkpoint": None,
    "output": None,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, shapes):
    """A tiny EfficientDet: its config, its checkpoint, and the folder of its ONNX file."""
    from model_def import EfficientDetTrial
    from shared.commands.export import export
    from shared.commands.train import train_locally

    folder = tmp_path_factory.mktemp("export")
    config = efficientdet_config(shapes)
    config["searcher"]["max_length"] = config["min_validation_period"] = {"batches": 24}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_command(train_locally, EfficientDetTrial, folder / "config.yaml", output_dir=folder / "run", resume=None)
        checkpoint = folder / "run/checkpoints/best"
        arguments = EXPORT | {"checkpoint": str(checkpoint), "output": folder / "onnx"}
        run_command(export, EfficientDetTrial, folder / "config.yaml", **arguments)
    return folder


@pytest.fixture(scope="module")
def numbers(exported):
    """The content of export.json."""
    return json.loads((exported / "onnx/export.json").read_text())


def test_exported_file_has_the_map_of_its_checkpoint(numbers):
    (of_boxes,) = numbers["comparisons"]
    overall = of_boxes["metrics"][0]
    assert overall["name"] == "mAP"
    assert overall["a"] == pytest.approx(overall["b"], abs=0.001)
    assert overall["lower"] <= 0 <= overall["upper"]


def test_export_reports_largest_differences_speed_and_memory(numbers):
    found = numbers["differences"]
    assert found["matched"] == found["detections"] > 0
    assert found["box"] < 0.5
    assert found["score"] < 0.01
    for side in numbers["sides"].values():
        assert side["images_per_second"] > 0
        assert side["peak_memory_mib"] > 0


def test_exported_file_names_categories_thresholds_and_checkpoint(exported, shapes):
    import onnxruntime

    strings = onnxruntime.InferenceSession(exported / "onnx/model.onnx").get_modelmeta().custom_metadata_map
    metadata = {name.removeprefix("detector."): json.loads(value) for name, value in strings.items()}
    annotations = json.loads((shapes / "annotations/val.json").read_text())
    report = json.loads((exported / "run/report.json").read_text())
    weights = (exported / "run/checkpoints/best/state_dict.pth").read_bytes()
    assert metadata["categories"] == annotations["categories"]
    assert metadata["best_threshold"] == report["best_threshold"]
    assert metadata["thresholds"].keys() <= {category["name"] for category in annotations["categories"]}
    assert metadata["input_size"] == [128, 128]
    assert metadata["checkpoint"] == hashlib.sha256(weights).hexdigest()
    assert metadata["versions"]["torch"] == torch.__version__.split("+")[0] or metadata["versions"]["torch"]


def test_exported_file_takes_images_of_any_size_in_a_batch(exported):
    from shared.export.runtime import ExportedDetector

    detector = ExportedDetector(exported / "onnx/model.onnx")
    images = [np.random.default_rng(i).integers(0, 256, (90, 160, 3), dtype=np.uint8) for i in range(3)]
    images.append(images[0][:50, :40].copy())
    together = detector.detect(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = detector.detect([image])
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)
        assert (found.boxes <= [image.shape[1], image.shape[0]] * 2).all()


def test_evaluate_of_an_exported_file_gives_the_checkpoint_s_metrics(exported, command, trial_class):
    config, output = exported / "config.yaml", exported / "evaluated"
    for name, given in {
        "model": ["--model", exported / "onnx/model.onnx"],
        "checkpoint": ["--checkpoint", exported / "run/checkpoints/best"],
    }.items():
        command(trial_class, "evaluate", config, *given, "--output", output / name)
    of_file, of_checkpoint = (
        json.loads((output / name / "metrics.json").read_text()) for name in ("model", "checkpoint")
    )
    assert of_file.keys() == of_checkpoint.keys()
    assert of_file["bbox_mAP"] == pytest.approx(of_checkpoint["bbox_mAP"], abs=0.001)


def test_predict_draws_what_an_exported_file_detects(exported, command, trial_class, shapes, tmp_path):
    arguments = ["--model", exported / "onnx/model.onnx", "--images", shapes / "val", "--min-score", "best"]
    command(trial_class, "predict", exported / "config.yaml", *arguments, "--output", tmp_path / "found")
    assert len(json.loads((tmp_path / "found/results.json").read_text())) > 0
    assert len(list((tmp_path / "found").glob("*.png"))) == 10


def test_tiles_of_an_exported_file_give_the_checkpoint_s_detections(
    exported, command, trial_class, shapes, tmp_path, monkeypatch
):
    """By both commands, on images of three tiles and a view."""
    from shared.commands import export as of_export
    from shared.data.annotations import CocoAnnotations
    from shared.evaluation.detections import from_coco_results

    monkeypatch.setattr(of_export, "SCORE", 0.01)  # the tiny detector is not sure of much
    coco = json.loads((shapes / "annotations/val.json").read_text())
    (tmp_path / "images").mkdir()
    for image in coco["images"]:  # twice side by side
        image["width"] *= 2
        wide = Image.new("RGB", (image["width"], image["height"]))
        for left in (0, image["width"] // 2):
            wide.paste(Image.open(shapes / "val" / image["file_name"]), (left, 0))
        wide.save(tmp_path / "images" / image["file_name"])
    (tmp_path / "val.json").write_text(json.dumps(coco))
    data = {"annotations": str(tmp_path / "val.json"), "images": str(tmp_path / "images")}
    config = yaml.safe_load((exported / "config.yaml").read_text())
    config["data"]["val"] = data
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    annotations = CocoAnnotations.open(tmp_path / "val.json")
    files = {"file": ["--model", exported / "onnx/model.onnx"]}
    files["checkpoint"] = ["--checkpoint", exported / "run/checkpoints/best"]
    for name, options in {"predict": ["--images", tmp_path / "images"], "evaluate": []}.items():
        found = {}
        for source, given in files.items():
            output = tmp_path / name / source
            options_and_output = [*given, *options, "--tiles", 128, "--output", output]
            command(trial_class, name, tmp_path / "config.yaml", *options_and_output)
            found[source] = from_coco_results(output / "results.json", annotations)
        apart = of_export.differences(found["checkpoint"], found["file"])
        assert apart.matched >= 0.99 * apart.detections > 50, apart
        assert apart.box < 0.1
        assert apart.score < 0.001


def test_predictor_detects_with_an_exported_file(exported, shapes):
    from shared.export.runtime import ExportedDetector
    from shared.predictor import Predictor

    paths = sorted((shapes / "val").iterdir())[:2]
    found = Predictor(exported / "onnx/model.onnx")(paths)
    expected = ExportedDetector(exported / "onnx/model.onnx").detect([np.asarray(Image.open(path)) for path in paths])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.scores, other.scores)
        assert len(one.names) == len(one)
    assert Predictor(exported / "onnx/model.onnx")(paths[0], min_score="best-per-category").draw().size == (128, 128)


def test_detect_py_needs_no_torch(exported, shapes):
    image = next((shapes / "val").iterdir())
    without_torch = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'shared')))\n"
        "import runpy; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = (exported / "onnx/detect.py").read_text().replace("(threshold or 0.3)", "0")
    changed = exported / "detect_all.py"
    changed.write_text(script)
    command = [sys.executable, "-c", without_torch, str(changed), str(exported / "onnx/model.onnx"), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(image) in done.stdout
    assert len((exported / "onnx/detect.py").read_text().splitlines()) <= 40


def test_a_file_that_detects_something_else_is_not_written(exported, monkeypatch, refused, tmp_path):
    from shared.evaluation.detections import Detections
    from shared.export import formats
    from shared.export.runtime import ExportedDetector

    def copied(detector, name, folder, metadata, calibration=()):
        return Path(shutil.copy(exported / "onnx/model.onnx", folder))

    def detects_nothing(self, images, image_ids):
        return [Detections(image_id, np.zeros((0, 4)), [], []) for image_id in image_ids]

    monkeypatch.setattr(formats, "write", copied)
    monkeypatch.setattr(ExportedDetector, "detect", detects_nothing)
    checkpoint = ["--checkpoint", exported / "run/checkpoints/best"]
    line = refused("export", exported / "config.yaml", *checkpoint, "--output", tmp_path / "out")
    assert "The difference is more than 0.001, so nothing was written" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.h5", b"", "is not an exported file. Fix: give a file that ends in .onnx, .xml, .pt2"),
        ("model.onnx", b"nothing", "cannot be read"),
        ("model.onnx", None, "does not exist. Fix: write it with `model_def.py export`"),
    ],
)
def test_a_file_that_is_no_detector_is_refused(name, content, said, refused, exported, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = refused("evaluate", exported / "config.yaml", "--model", tmp_path / name)
    assert said in line


def test_onnx_files_of_others_are_refused(refused, exported, tmp_path):
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1])
    same = helper.make_tensor_value_info("same", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["same"])], "graph", [value], [same])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "other.onnx")
    line = refused("evaluate", exported / "config.yaml", "--model", tmp_path / "other.onnx")
    assert "has no metadata of a detector" in line


def test_model_and_checkpoint_together_are_refused(refused, exported):
    line = refused(
        "evaluate", exported / "config.yaml", "--model", "model.onnx", "--checkpoint", exported / "run/checkpoints/best"
    )
    assert line == "error: --model: it holds the weights itself. Fix: remove --checkpoint"


def test_output_that_holds_other_files_is_refused(refused, exported):
    line = refused("export", exported / "config.yaml", "--output", exported / "run")
    assert "is not empty. Fix: give a new folder" in line


def test_pixels_of_an_exported_file_are_pillow_s():
    from shared.export.operations import resize_as_pillow

    image = np.random.default_rng(0).integers(0, 256, (3, 83, 111), dtype=np.uint8)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    for name, method in filters.items():
        for size in ((40, 53), (120, 140)):
            ours = resize_as_pillow(torch.from_numpy(image)[None], *size, name)[0].numpy()
            theirs = [np.asarray(Image.fromarray(plane).resize(size[::-1], method)) for plane in image]
            assert np.abs(ours - np.stack(theirs)).max() <= 1


def test_the_numpy_decoder_keeps_what_nms_of_torchvision_keeps():
    from torchvision.ops import batched_nms

    from shared.export.detect_raw import decoded

    random = np.random.default_rng(0)
    boxes, scores = random.random((2000, 4), np.float32) * 256, np.float32(random.permutation(20000)) / 20000
    scores = scores.reshape(2000, 10)  # no two are equal: those would have no order
    boxes[:, 2:] += boxes[:, :2] + 10
    steps = {"keeps_ratio": True, "one_label": False, "candidates": 500, "iou_threshold": 0.5, "clips": True}
    found, found_scores, found_labels = decoded(boxes, scores, (480, 640), (512, 512), {**steps, "limit": 100})

    best, pairs = torch.from_numpy(scores).flatten().topk(500)
    candidates = torch.from_numpy(boxes)[pairs // 10] * 1.25
    candidates = torch.minimum(candidates, torch.tensor([640.0, 480.0, 640.0, 480.0]))
    kept = batched_nms(candidates, best, pairs % 10, 0.5)[:100]
    np.testing.assert_allclose(found, candidates[kept], rtol=1e-6)
    np.testing.assert_array_equal(found_scores, best[kept])
    np.testing.assert_array_equal(found_labels, pairs[kept] % 10)


@pytest.mark.slow
@pytest.mark.parametrize("input_size", [(96, 128), None])
def test_onnx_files_resize_as_pillow_does(input_size, tmp_path):
    import onnxruntime

    from shared.export import formats
    from shared.export.metadata import Metadata
    from shared.export.operations import Exportable, inside, resize_as_pillow, size_of

    class Resizing(Exportable):
        outputs = ("found_pixels", "found_size")  # no names of its own graph

        def prepare(self, images):
            return resize_as_pillow(images, *inside(*images.shape[-2:], 96, 128)), size_of(images)

        def detect(self, pixels, sizes):
            return pixels + 0, sizes + 0

    detector = Resizing()
    detector.input_size = input_size
    metadata = Metadata([], detector.outputs, input_size, "float32", None, {}, None, None, {})
    session = onnxruntime.InferenceSession(formats.write(detector, "onnx", tmp_path, metadata))
    for height, width in ((480, 640), (60, 80), (50, 200)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        (pixels, _) = session.run(None, {"images": image.transpose(2, 0, 1)[None].copy()})
        expected = Image.fromarray(image).resize(pixels.shape[:1:-1], Image.Resampling.BILINEAR)
        assert np.abs(pixels[0].transpose(1, 2, 0) - np.asarray(expected)).max() <= 1


def test_pixels_of_an_exported_file_are_opencv_s():
    cv2 = pytest.importorskip("cv2")
    from shared.export.operations import resize_as_opencv

    image = np.random.default_rng(0).integers(0, 256, (83, 111, 3), dtype=np.uint8)
    for size in ((40, 53), (120, 140)):
        ours = resize_as_opencv(torch.from_numpy(image.transpose(2, 0, 1))[None], *size)[0].numpy()
        theirs = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1)
        assert np.abs(ours - theirs).max() <= 1


@pytest.mark.slow
def test_raw_file_and_its_numpy_decoder_detect_what_the_checkpoint_detects(exported, command, trial_class, tmp_path):
    checkpoint = ["--checkpoint", exported / "run/checkpoints/best"]
    command(trial_class, "export", exported / "config.yaml", *checkpoint, "--raw", "--output", tmp_path / "raw")
    found = json.loads((tmp_path / "raw/export.json").read_text())["differences"]
    assert found["matched"] == found["detections"] > 0
    assert found["box"] < 0.001


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "least"),
    [(["--format", "openvino"], 0.99), (["--format", "torch"], 1.0), (["--format", "openvino", "--half"], 0.9)],
)
def test_other_formats_detect_what_the_checkpoint_detects(
    options, least, exported, shapes, command, trial_class, tmp_path
):
    """And `detect.py` beside the file computes the same."""
    from shared.export.runtime import ExportedDetector

    checkpoint = ["--checkpoint", exported / "run/checkpoints/best"]
    command(trial_class, "export", exported / "config.yaml", *checkpoint, *options, "--output", tmp_path / "out")
    found = json.loads((tmp_path / "out/export.json").read_text())["differences"]
    assert found["matched"] >= least * found["detections"] > 0
    file = next((tmp_path / "out").glob("model.[xp]*"))
    image = np.asarray(Image.open(next((shapes / "val").iterdir())).convert("RGB"))
    run, _ = runpy.run_path(str(tmp_path / "out/detect.py"))["load"](str(file))
    boxes, scores = (output[0] for output in run(image.transpose(2, 0, 1)[None].copy())[:2])
    (here,) = ExportedDetector(file).detect([image])
    np.testing.assert_array_equal(here.boxes, boxes[scores > 0])
    np.testing.assert_array_equal(here.scores, scores[scores > 0])


@pytest.mark.slow
def test_int8_is_calibrated_on_training_images_and_reports_its_cost(exported, command, trial_class, tmp_path):
    checkpoint = ["--checkpoint", exported / "run/checkpoints/best"]
    command(trial_class, "export", exported / "config.yaml", *checkpoint, "--int8", "--output", tmp_path / "out")
    numbers = json.loads((tmp_path / "out/export.json").read_text())
    assert "int8" in numbers["facts"]["file"]
    assert numbers["differences"]["score"] > 0
    size, of_float = ((folder / "model.onnx").stat().st_size for folder in (tmp_path / "out", exported / "onnx"))
    assert size < 0.8 * of_float


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--half"], "--half: onnx has no 16-bit files here. Fix: --format openvino"),
        (["--int8", "--format", "torch"], "--int8: torch has no 8-bit files here. Fix: --format onnx or openvino"),
        (["--format", "transformers"], "--format transformers: only a model of `detr` has it"),
        (["--raw", "--format", "openvino"], "--raw: openvino has no raw files here. Fix: --format onnx"),
        (
            ["--format", "tensorrt"],
            "Fix: --format onnx --raw, then on the machine with the GPU: trtexec --onnx=model.onnx --minShapes=images:1"
            "x3x128x128 --optShapes=images:1x3x128x128 --maxShapes=images:8x3x128x128 --saveEngine=model.engine",
        ),
    ],
)
def test_a_format_that_cannot_do_it_is_refused_with_what_to_do(options, said, refused, exported):
    checkpoint = ["--checkpoint", exported / "run/checkpoints/best"]
    assert said in refused("export", exported / "config.yaml", *checkpoint, *options, "--output", exported / "refused")
