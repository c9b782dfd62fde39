"""`data.fast_images`: pixels close to Pillow's, everything else unchanged."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import other_detectors_are_slow, run_command
from determined import pytorch
from PIL import Image
from tiny_models import CONFIGS, efficientdet_config, trial_classes

from shared.commands.evaluate import evaluate
from shared.data import fast_images, synthetic
from shared.data.dataset import SampleKey
from shared.data.images import decode_rgb, plain_bytes, resize_visible
from shared.training.checkpoints import load_state

ORIENTATION = 274  # EXIF's tag


def picture(width, height, seed=0):
    """A smooth image with edges and some noise."""
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 5, height))
    waves = np.stack([np.sin(x + y), np.cos(x * 2), np.sin(y * 3)], axis=-1) * 100 + 128
    waves[height // 4 : height // 2, width // 3 : width // 2] = 250
    noise = np.random.default_rng(seed).normal(0, 5, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


CROPS = [
    ((96, 72), (0, 0, 96, 72)),
    ((400, 300), (0, 0, 128, 128)),
    ((400, 300), (211, 130, 339, 258)),
    ((401, 301), (273, 173, 401, 301)),
    ((160, 120), (25, 0, 153, 120)),
    ((1000, 700), (7, 0, 135, 128)),
    ((300, 60), (90, 0, 218, 60)),  # of which Pillow resizes the columns first
]


@pytest.mark.parametrize("resample", [Image.BILINEAR, Image.BICUBIC, Image.LANCZOS, Image.HAMMING])
@pytest.mark.parametrize(("size", "box"), CROPS)
def test_resizing_what_stays_of_an_image_gives_pillow_s_bits(size, box, resample):
    image = picture(201, 143)
    expected = np.asarray(image.resize(size, resample).crop(box))
    assert (np.asarray(resize_visible(image, size, box, resample)) == expected).all()


@pytest.mark.parametrize("resample", [Image.BILINEAR, Image.BICUBIC, Image.LANCZOS, Image.HAMMING])
@pytest.mark.parametrize(("size", "box"), CROPS[:-1])
def test_fast_resizing_is_next_to_pillow_s(size, box, resample):
    image = picture(201, 143)
    expected = np.asarray(image.resize(size, resample).crop(box)).astype(int)
    difference = abs(fast_images.resize_visible(np.asarray(image), size, box, resample) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.05


@pytest.mark.parametrize("flip", [None, Image.FLIP_LEFT_RIGHT, Image.FLIP_TOP_BOTTOM, Image.ROTATE_180])
def test_a_flip_is_pillow_s(flip):
    image = picture(31, 22)
    expected = np.asarray(image if flip is None else image.transpose(flip))
    assert (fast_images.flipped(np.asarray(image), flip) == expected).all()


def odd_images():
    image = picture(80, 60)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    plain = encoded(image, quality=90)
    middle = len(plain) // 2
    return {
        "JPEG": plain,
        "progressive": encoded(image, progressive=True),
        "grey": encoded(image.convert("L")),
        "turned": encoded(image, exif=exif),
        "upside down": encoded(image, exif=_orientation(3)),
        "not turned": encoded(image, exif=_orientation(1)),
        "CMYK": encoded(image.convert("CMYK")),
        "palette": encoded(image.quantize(32), "PNG"),
        "16 bits": encoded(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13), "PNG"),
        "PNG": encoded(image, "PNG"),
        "transparent": encoded(image.convert("RGBA"), "PNG"),
        "WebP": encoded(image, "WEBP"),
        "cut out": plain[:middle] + plain[middle + 150 :],
        "spoiled": plain[:middle] + bytes(60) + plain[middle + 60 :],
        "no end": plain[:-2],
        "no pixels": plain[:700] + b"\xff\xd9",
    }


def _orientation(value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def outcome(decode, data):
    try:
        return np.asarray(decode(plain_bytes(data)))
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("kind", odd_images())
def test_odd_files_are_decoded_as_without_it(kind):
    expected, found = (outcome(decode, odd_images()[kind]) for decode in (decode_rgb, fast_images.decode))
    assert np.array_equal(found, expected)
    assert found is expected or found.flags.c_contiguous


def test_a_jpeg_that_is_much_larger_than_what_is_wanted_is_decoded_smaller():
    image = picture(640, 480)
    data = encoded(image, quality=95)
    assert fast_images.decode(data, (160, 120)).shape == (240, 320, 3)
    assert fast_images.decode(data, (161, 121)).shape == (480, 640, 3)
    assert fast_images.decode(data, (20, 15)).shape == (60, 80, 3)
    assert fast_images.decode(encoded(picture(641, 480)), (20, 15)).shape == (480, 641, 3)  # would be shifted
    small = fast_images.resize(fast_images.decode(data, (160, 120)), (160, 120))
    difference = abs(small.astype(int) - np.asarray(decode_rgb(data).resize((160, 120), Image.BILINEAR)))
    assert difference.mean() < 1


# --- in a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger_shapes(tmp_path_factory):
    """Shapes that are larger than the models' inputs, so that they are resized."""
    folder = tmp_path_factory.mktemp("larger_shapes")
    synthetic.write(folder, train=24, val=10, size=160)
    return folder


def evaluated(trial_class, run, output, fast, monkeypatch):
    """The metrics of a run's last checkpoint, and its sorted scores."""
    with monkeypatch.context() as patch:
        patch.chdir(output.parent)
        run_command(
            evaluate,
            trial_class,
            run / "config.yaml",
            overrides=[f"data.fast_images={str(fast).lower()}"],
            checkpoint=str(run / "checkpoints/last"),
            output=output,
            report=None,
            results=None,
        )
    scores = [found["score"] for found in json.loads((output / "results.json").read_text())]
    return json.loads((output / "metrics.json").read_text()), np.sort(scores)


@other_detectors_are_slow
def test_a_run_with_it_goes_on_with_the_same_bits_and_evaluates_as_without(
    detector, larger_shapes, train, crash_and_resume, tmp_path, without_figures, monkeypatch
):
    config = CONFIGS[detector](larger_shapes)
    config["data"] |= {"workers": 0, "fast_images": True}
    config["searcher"]["max_length"] = {"batches": 6}
    config["min_validation_period"] = config["min_checkpoint_period"] = {"batches": 4}
    trial_class = trial_classes()[detector]
    whole = train(trial_class, config, "whole")
    parts = crash_and_resume(trial_class, config, 5)
    ours, expected = (load_state(r / "checkpoints/last/state_dict.pth")["models_state_dict"][0] for r in (parts, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)

    (metrics, scores), (exact_metrics, exact_scores) = (
        evaluated(trial_class, whole, tmp_path / str(fast), fast, monkeypatch) for fast in (True, False)
    )
    assert metrics == pytest.approx(exact_metrics, abs=0.01, nan_ok=True)
    assert abs(len(scores) - len(exact_scores)) <= 0.02 * len(exact_scores)
    fewer = min(len(scores), len(exact_scores), 100)
    np.testing.assert_allclose(scores[-fewer:], exact_scores[-fewer:], atol=0.01)


@pytest.mark.slow
def test_a_trained_model_has_the_same_ap_with_it(train, tmp_path, without_figures, monkeypatch):
    from model_def import EfficientDetTrial

    synthetic.write(tmp_path / "data", train=200, val=60, size=160)
    config = efficientdet_config(tmp_path / "data")
    config["data"]["workers"] = 0
    config["hyperparameters"] |= {"global_batch_size": 8, "scale_jitter": [0.7, 1.3]}
    config["searcher"]["max_length"] = config["min_validation_period"] = {"batches": 500}
    run = train(EfficientDetTrial, config)
    (metrics, _), (exact, _) = (
        evaluated(EfficientDetTrial, run, tmp_path / str(fast), fast, monkeypatch) for fast in (True, False)
    )
    assert exact["bbox_mAP"] > 0.05
    assert metrics["bbox_mAP"] == pytest.approx(exact["bbox_mAP"], abs=0.01)


def test_bad_images_are_skipped_as_without_fast_images(shapes, tmp_path):
    from model_def import EfficientDetTrial

    folder = shutil.copytree(shapes, tmp_path / "data")
    (folder / "train/000004.png").write_bytes((folder / "train/000004.png").read_bytes()[:200])
    png = (folder / "train/000009.png").read_bytes()
    (folder / "train/000009.png").write_bytes(png[:100] + png[-60:])  # its end says that it is whole
    config = efficientdet_config(folder)
    config["data"] |= {"on_bad_image": "skip", "workers": 0}
    seen = []
    for fast in (False, True):
        config["data"]["fast_images"] = fast
        hparams = config["hyperparameters"]
        with pytorch.init(hparams=hparams, exp_conf=config, enable_tensorboard_logging=False) as context:
            trial = EfficientDetTrial(context)
            dataset = trial.training_dataset()
            samples = [dataset[SampleKey(1, i)] for i in range(len(dataset))]
            seen.append(
                ([(image_id, target["bbox"].tolist()) for _, target, image_id in samples], trial.bad_images.take())
            )
    assert seen[0] == seen[1]
    assert len(seen[0][1]) == 2


# --- batches of an evaluation -----------------------------------------------------------------------

UNTRAINED = {  # configs, with scores low enough to detect with
    "mmdetection": ("mask_rcnn/mask_rcnn_r50_fpn_1x_coco.py", {"model.test_cfg.rcnn.score_thr": 0.001}),
    "detectron2": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        # pixels so small that layers whose statistics nothing has trained give no 0 and 1 only
        {"MODEL.RETINANET.SCORE_THRESH_TEST": 0.001, "MODEL.PIXEL_STD": [1000.0, 1000.0, 1000.0]},
    ),
}


def two_sizes(shapes, folder):
    """Validation images of two sizes and one of a third. The first of each cannot be read."""
    shutil.copytree(shapes, folder)
    path = folder / "annotations/val.json"
    coco = json.loads(path.read_text())
    coco["annotations"] = []
    for i, image in enumerate(coco["images"]):
        size = (90, 128) if i == 9 else ((128, 128), (96, 128))[i % 2]
        image["width"], image["height"] = size
        file = folder / "val" / image["file_name"]
        Image.open(file).resize(size).save(file)
        if i in (0, 1, 9):
            file.write_bytes(file.read_bytes()[:200])
    path.write_text(json.dumps(coco))
    return {image["id"]: (image["width"], image["height"]) for image in coco["images"]}


def detections_by_image(trial, data):
    """Detections by image, and the sizes of each batch's images as the model sees them."""
    found, sizes = {}, []
    for batch in trial.evaluation_loader(data):
        if not batch.image_ids:  # its only image cannot be read
            continue
        metas = batch.targets["img_metas"][0] if isinstance(batch.targets, dict) else None
        shapes = [meta["img_shape"][:2] for meta in metas] if metas else [image.shape[1:] for image in batch.images]
        sizes.append([tuple(shape) for shape in shapes])
        found |= {detections.image_id: detections for detections in trial.detect_on_host_batch(batch)}
    return found, sizes


@pytest.mark.parametrize("detector", ["mmdetection", "detectron2"], indirect=True)
def test_libraries_detect_on_batches_of_one_size_and_only_round_otherwise(detector, shapes, tmp_path, monkeypatch):
    sizes = two_sizes(shapes, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    config_file, overrides = UNTRAINED[detector]
    config = CONFIGS[detector](tmp_path / "data", config_file, **overrides)
    config["data"] |= {"workers": 0, "on_bad_image": "skip", "fast_images": True}
    with pytorch.init(hparams=config["hyperparameters"], exp_conf=config, enable_tensorboard_logging=False) as context:
        trial = trial_classes()[detector](context, for_training=False)
        data = trial.open_val()
        assert trial.batches_evaluations == (context.device.type == "cuda")
        monkeypatch.setattr(type(trial), "batches_evaluations", False)
        alone, batches = detections_by_image(trial, data)
        assert all(len(batch) == 1 for batch in batches)
        monkeypatch.setattr(type(trial), "batches_evaluations", True)
        found, batches = detections_by_image(trial, data)
        assert max(map(len, batches)) == 3  # one of each four images cannot be read
        assert all(len(set(batch)) == 1 for batch in batches)
    bad = {list(sizes)[i] for i in (0, 1, 9)}
    assert found.keys() == alone.keys() == sizes.keys() - bad
    assert sum(map(len, alone.values())) > 50
    for image_id, expected in alone.items():
        np.testing.assert_allclose(found[image_id].boxes, expected.boxes, atol=1e-3)
        np.testing.assert_allclose(found[image_id].scores, expected.scores, atol=1e-5)
        np.testing.assert_array_equal(found[image_id].labels, expected.labels)


@pytest.mark.parametrize("detector", ["mmdetection"], indirect=True)
def test_the_evaluation_batch_size_of_mmdetection_s_config_holds(detector, shapes, monkeypatch):
    monkeypatch.chdir(shapes)
    for overrides, expected in (
        ({"data.val_dataloader.samples_per_gpu": 3}, 3),
        ({"data.val.pipeline.1.flip": True}, 1),  # an image at a time, as its models ask for
        ({}, 4),
    ):
        config = CONFIGS[detector](shapes, **overrides)
        config["data"] |= {"workers": 0, "fast_images": True}
        hparams = config["hyperparameters"]
        with pytorch.init(hparams=hparams, exp_conf=config, enable_tensorboard_logging=False) as context:
            trial = trial_classes()[detector](context, for_training=False)
            trial.open_val()
            monkeypatch.setattr(type(trial), "batches_evaluations", True)
            assert trial.evaluation_batch_size == expected
            assert trial.batches_of_one_size != bool(overrides)
