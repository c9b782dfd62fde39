"""EfficientDet's samples equal effdet's bit for bit. With `data.fast_images`, only the pixels differ slightly."""

import io

import numpy as np
import pytest
import torch
from effdet import get_efficientdet_config
from effdet.data.loader import DetectionFastCollate
from effdet.data.transforms import Compose, ImageToNumpy, RandomFlip, RandomResizePad, ResizePad
from PIL import Image

from efficientdet_files.data import EfficientDetCollate, EfficientDetTransform, input_config
from efficientdet_hyperparameters import EfficientDetHyperparameters
from shared.data.annotations import CocoAnnotations
from shared.data.dataset import seed_all
from shared.data.images import BadImageError

SIZES = [(640, 427), (100, 75), (64, 200), (300, 301)]


def record_of(width, height):
    boxes = [[1, 2, width * 0.6, height * 0.7], [width * 0.3, height * 0.2, width * 0.6, height * 0.7]]
    return CocoAnnotations.from_dict(
        {
            "images": [{"id": 7, "file_name": "a.jpg", "width": width, "height": height}],
            "annotations": [
                {"id": i + 1, "image_id": 7, "category_id": i + 1, "bbox": box} for i, box in enumerate(boxes)
            ],
            "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        }
    )[0]


def jpeg(width, height):
    x, y = np.meshgrid(np.linspace(0, 9, width), np.linspace(0, 7, height))
    waves = np.stack([np.sin(x + y), np.cos(x * 2), np.sin(y * 3)], axis=-1) * 120 + 128
    buffer = io.BytesIO()
    Image.fromarray(waves.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(params=["random", "bilinear", "lanczos"])
def settings(request):
    hparams = EfficientDetHyperparameters(
        global_batch_size=2, input_size=128, vertical_flip=True, train_interpolation=request.param
    )
    return hparams, {**input_config(hparams, get_efficientdet_config("efficientdet_d0")), "input_size": (3, 128, 128)}


def effdet_s(hparams, inputs, training):
    size, fill = inputs["input_size"][-2:], inputs["fill_color"]
    if not training:
        return Compose([ResizePad(size, inputs["interpolation"], fill), ImageToNumpy()])
    resize = RandomResizePad(size, tuple(hparams.scale_jitter), hparams.train_interpolation, fill)
    return Compose([RandomFlip(horizontal=True, vertical=True), resize, ImageToNumpy()])


@pytest.mark.parametrize("training", [True, False])
def test_samples_are_effdet_s_and_fast_ones_next_to_them(settings, training):
    exact, fast = (EfficientDetTransform(*settings, training, annotated=True, fast=fast) for fast in (False, True))
    theirs = effdet_s(*settings, training)
    for number in range(40 if training else 4):
        width, height = SIZES[number % len(SIZES)]
        record, data = record_of(width, height), jpeg(width, height)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        seed_all(3, number)
        target = {"bbox": record.boxes[:, [1, 0, 3, 2]].copy(), "cls": record.labels + 1}
        expected, target = theirs(image, target)
        seed_all(3, number)
        pixels, own, _ = exact(image, record)
        assert np.array_equal(pixels, expected)
        seed_all(3, number)
        fast_pixels, fast_own, _ = fast(data, record)
        for found in (own, fast_own):
            assert np.array_equal(found["bbox"], target["bbox"])
            assert np.array_equal(found["cls"], target["cls"])
            assert found["img_scale"] == target["img_scale"]
        difference = abs(fast_pixels.astype(int) - expected)
        assert difference.max() <= 2 or width == 640  # which may be decoded at a part of its size
        assert difference.mean() < 0.3


def test_a_banner_is_padded_the_same(settings):
    exact, fast = (EfficientDetTransform(*settings, False, fast=fast) for fast in (False, True))
    data, record = jpeg(900, 2), record_of(900, 2)
    expected, _, _ = exact(Image.open(io.BytesIO(data)).convert("RGB"), record)
    pixels, _, _ = fast(data, record)
    assert abs(pixels.astype(int) - expected).max() <= 2


def test_an_undecodable_file_is_a_bad_image(settings):
    transform = EfficientDetTransform(*settings, True, fast=True)
    with pytest.raises(BadImageError, match=r"a.jpg \(image id 7\) cannot be read as an image"):
        transform(jpeg(100, 75)[:300], record_of(100, 75))


def test_batches_are_effdet_s(settings):
    hparams, inputs = settings
    transform = EfficientDetTransform(hparams, inputs, training=True)
    samples = [transform(Image.open(io.BytesIO(jpeg(*size))), record_of(*size)) for size in SIZES]
    config = get_efficientdet_config("efficientdet_d0")
    hparams.labeler = "device"
    batch = EfficientDetCollate(hparams, config, training=True)(samples)
    images, targets = DetectionFastCollate()([(image, target) for image, target, _ in samples])
    assert torch.equal(batch.images, images)
    assert batch.targets.keys() == targets.keys()
    assert all(torch.equal(batch.targets[name], targets[name]) for name in targets)
