"""The end of MMDetection's pipelines in one step: bit-for-bit equal on the host, and on the device with
`data.fast_images`."""

import copy
import logging

import numpy as np
import pytest
import torch
from mmcv import ConfigDict
from mmdet.datasets.pipelines import Compose

from mmdetection_files.data import collate
from mmdetection_files.pipelines import PipelineTransform
from mmdetection_files.pixels import Normalization, with_quick_end
from shared.data.annotations import CocoAnnotations
from shared.data.dataset import seed_all
from shared.data.storage import DiskImages
from shared.errors import UserError

NORM = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True}
CAFFE = {"mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0], "to_rgb": False}
META = ("filename", "ori_shape", "img_shape", "pad_shape", "scale_factor", "flip", "flip_direction", "img_norm_cfg")


def training_pipeline(norm, pad, direction="horizontal"):
    return [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        {"type": "Resize", "img_scale": [(150, 100), (300, 170)], "keep_ratio": True},
        {"type": "RandomFlip", "flip_ratio": 0.6, "direction": direction},
        {"type": "Normalize", **norm},
        {"type": "Pad", **pad},
        {"type": "DefaultFormatBundle"},
        {"type": "Collect", "keys": ["img", "gt_bboxes", "gt_labels", "gt_masks"], "meta_keys": META},
    ]


def test_pipeline(flip):
    transforms = [
        {"type": "Resize", "keep_ratio": True},
        {"type": "RandomFlip"},
        {"type": "Normalize", **NORM},
        {"type": "Pad", "size_divisor": 32},
        {"type": "DefaultFormatBundle"},
        {"type": "Collect", "keys": ["img"], "meta_keys": META},
    ]
    scales = [(120, 90), (200, 100)] if flip else (120, 90)
    multi = {"type": "MultiScaleFlipAug", "img_scale": scales, "flip": flip, "transforms": transforms}
    return [{"type": "LoadImageFromFile"}, multi]


test_pipeline.__test__ = False


@pytest.fixture(scope="module")
def annotations():
    sizes = [(64, 48), (101, 67), (90, 120)]
    return CocoAnnotations.from_dict(
        {
            "images": [
                {"id": i + 1, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(sizes)
            ],
            "annotations": [
                {
                    "id": i + 1,
                    "image_id": i + 1,
                    "category_id": 1,
                    "bbox": [5, 6, 20, 30],
                    "segmentation": [[5, 6, 25, 6, 25, 36, 5, 36]],
                    "area": 600,
                }
                for i in range(3)
            ],
            "categories": [{"id": 1, "name": "a"}],
        }
    )


class Upstream(PipelineTransform):
    """The same results through MMDetection's pipeline."""

    def __init__(self, pipeline, *arguments, **options):
        super().__init__(pipeline, *arguments, **options)
        self.pipeline = Compose(copy.deepcopy(pipeline[1:]))


def samples(kind, pipeline, annotations, tmp_path, count, annotated=True, **options):
    transform = kind(pipeline, ConfigDict(type="CocoDataset"), DiskImages(tmp_path), annotated, **options)
    made = []
    for number in range(count):
        record = annotations[number % len(annotations)]
        image = np.random.default_rng(number).integers(0, 256, (record.height, record.width, 3), dtype=np.uint8)
        seed_all(1, number)
        made.append((transform(image, record), record.image_id))
    return made


def assert_equal_batches(found, expected):
    images = found.images if isinstance(found.images, list) else [found.images]
    expected_images = expected.images if isinstance(expected.images, list) else [expected.images]
    for one, other in zip(images, expected_images, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert torch.equal(one, other)
    assert str(found.targets) == str(expected.targets)


@pytest.mark.parametrize(
    ("norm", "pad", "direction"),
    [
        (NORM, {"size_divisor": 32}, "horizontal"),
        (CAFFE, {"size": (320, 320)}, ["horizontal", "vertical", "diagonal"]),
        ({**NORM, "std": [1.5, 0.3, 200.0]}, {"size_divisor": 1}, "vertical"),
    ],
)
def test_training_batches_are_mmdetection_s(annotations, tmp_path, norm, pad, direction):
    pipeline = training_pipeline(norm, pad, direction)
    upstream = collate(samples(Upstream, pipeline, annotations, tmp_path, 12))
    assert_equal_batches(collate(samples(PipelineTransform, pipeline, annotations, tmp_path, 12)), upstream)
    batch = collate(samples(PipelineTransform, pipeline, annotations, tmp_path, 12, fast=True))
    assert batch.images.dtype == torch.uint8
    batch.images = Normalization(torch.device("cpu"))(batch.images, batch.targets["img_metas"])
    assert_equal_batches(batch, upstream)


@pytest.mark.parametrize("flip", [False, True])
def test_test_batches_are_mmdetection_s(annotations, tmp_path, flip):
    pipeline = test_pipeline(flip)
    for number in range(3):
        upstream, exact, fast = (
            collate([samples(kind, pipeline, annotations, tmp_path, 3, False, **options)[number]])
            for kind, options in ((Upstream, {}), (PipelineTransform, {}), (PipelineTransform, {"fast": True}))
        )
        assert_equal_batches(exact, upstream)
        assert {image.dtype for image in fast.images} == {torch.uint8}
        fast.images = Normalization(torch.device("cpu"))(fast.images, fast.targets["img_metas"])
        assert_equal_batches(fast, upstream)


def changed(at, **changes):
    pipeline = training_pipeline(NORM, {"size_divisor": 32})
    pipeline[at] |= changes
    return pipeline


@pytest.mark.parametrize(
    ("pipeline", "why"),
    [
        (changed(5, pad_val={"img": 7}), "its pipeline pads images with another value than 0"),
        (changed(6, pad_val={"img": 7, "masks": 0}), "its pipeline pads images with another value than 0"),
        (changed(7, meta_keys=("filename", "img_shape")), "its Collect leaves out"),
        ([*changed(5)[:4], *changed(5)[5:]], "its pipeline has no Normalize, Pad, DefaultFormatBundle one after"),
    ],
)
def test_another_pipeline_end_is_logged_and_keeps_the_numbers(annotations, tmp_path, caplog, pipeline, why):
    upstream = samples(Upstream, pipeline, annotations, tmp_path, 3)
    with caplog.at_level(logging.WARNING):
        found = samples(PipelineTransform, pipeline, annotations, tmp_path, 3, fast=True)
    (said,) = caplog.messages
    assert f"data.fast_images does nothing for CocoDataset: {why}" in said
    for (sample, _), (expected, _) in zip(found, upstream, strict=True):
        assert torch.equal(sample["img"].data, expected["img"].data)


def test_a_step_that_hides_the_size_is_named(annotations, tmp_path):
    pipeline = training_pipeline(NORM, {"size_divisor": 32})
    pipeline.insert(4, lambda results: {**results, "img": results["img"][:-3].copy()})
    with pytest.raises(UserError, match="and not its img_shape"):
        samples(PipelineTransform, pipeline, annotations, tmp_path, 1, fast=True)


def test_images_in_floats_take_mmdetection_s_steps(annotations, tmp_path):
    pipeline = training_pipeline(NORM, {"size_divisor": 32})
    pipeline.insert(4, lambda results: {**results, "img": results["img"].astype(np.float32) / 2})
    for fast in (False, True):
        found = samples(PipelineTransform, pipeline, annotations, tmp_path, 3, fast=fast)
        expected = samples(Upstream, pipeline, annotations, tmp_path, 3)
        assert all(torch.equal(a["img"].data, b["img"].data) for (a, _), (b, _) in zip(found, expected, strict=True))


def test_the_config_s_pipeline_is_left_alone():
    pipeline = training_pipeline(NORM, {"size_divisor": 32})
    before = copy.deepcopy(pipeline)
    with_quick_end(pipeline, True, "train")
    with_quick_end(test_pipeline(True), True, "val")
    assert pipeline == before
